"""Which way of copying a cache uses, measured when it is made: it depends on the link, and on how large blocks are.

Small pieces are slow by the copy engines, and a kernel takes multiprocessors and memory bandwidth from the caller's
own. So each way is measured while a kernel reads and writes the device's memory as decoding does. The fastest one wins
of those that slow it no more than the best does, give or take 5 %. Moves to the host go by engines wherever the driver
takes many copies at once: on an H200 a kernel that fills the link in this direction slows decoding by 60 %, in spite of
its few CTAs, see ``docs/results/gpu_transfers.md``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kvtoolkit.cuda import copy, copy_engine
from kvtoolkit.cuda.copy import Superblocks

ENGINES = 0
"""In place of a number of CTAs."""
_CANDIDATES = (2, 4)
_NUM_BLOCKS = 32  # that one measurement moves, if there are as many
_LEAST_NBYTES = 4 << 20  # less than this is all launch
_MARGIN = 1.05


class Ways(NamedTuple):
    """CTAs of the kernel that copies in each direction, or `ENGINES`."""

    to_device: int
    to_host: int


def guess(nbytes: int) -> Ways:
    """What is best on an H200 for blocks of so many bytes in an array."""
    if not copy_engine.has_batches():
        return Ways(2, 2)
    return Ways(ENGINES if nbytes >= 1 << 17 else 4, ENGINES)


def calibrate(held: Superblocks, first_in_host: int, num: int, device: int, stream: Any) -> Ways:
    """Measure; takes some tens of milliseconds, and changes nothing if nothing is stored yet.

    Args:
        held: superblocks, from 0 on in device memory, and from ``first_in_host`` on in host memory.
        num: how many there are at least in either.
        device: CUDA ordinal, the current one.
        stream: for the copies.
    """
    expected = guess(held.nbytes)
    moved = min(_NUM_BLOCKS, num // 2)
    if not copy_engine.has_batches() or moved * held.nbytes * held.num_arrays < _LEAST_NBYTES:
        return expected
    import cupy

    rng = np.random.default_rng(0)
    on_device = rng.permutation(num // 2)[:moved].astype(np.int32)
    in_host = (first_in_host + rng.permutation(num)[:moved]).astype(np.int32)
    load = _Load(held, num, device, cupy)
    best, found = (0.0, 0.0), expected.to_device
    for ctas in (ENGINES, *_CANDIDATES):
        rate, slowed = load.measure(_copies(held, in_host, on_device, ctas, device, stream), stream)
        least = best[1] or slowed
        if slowed <= least * _MARGIN and (rate > best[0] or slowed * _MARGIN < least):
            best, found = (rate, min(slowed, least)), ctas
    return Ways(found, ENGINES)


def _copies(held: Superblocks, sources: Any, targets: Any, ctas: int, device: int, stream: Any) -> Callable[[], None]:
    if ctas == ENGINES:
        return lambda: copy_engine.transfer(held, sources, targets, stream=stream.ptr)
    return lambda: copy.transfer(held, sources, targets, ctas=ctas, stream=stream.ptr, device=device)


class _Load:
    """A kernel that copies inside the memory of a device, on a stream of its own."""

    def __init__(self, held: Superblocks, num: int, device: int, cupy: Any) -> None:
        half = min(num // 2, copy.MAX_MOVES)
        self._listed = np.arange(half, dtype=np.int32), np.arange(half, 2 * half, dtype=np.int32)
        self._held, self._device, self._cupy = held, device, cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._run()  # loads the kernel
        self._ms = self._timed(self._run, self._stream)
        self._count = max(1, round(3 / max(self._ms, 1e-3)))

    def _run(self) -> None:
        copy.transfer(self._held, *self._listed, ctas=128, stream=self._stream.ptr, device=self._device)

    def _timed(self, call: Callable[[], Any], stream: Any) -> float:
        """Milliseconds of a call on a stream."""
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(begin, end))

    def measure(self, copies: Callable[[], None], stream: Any) -> tuple[float, float]:
        """``(rate, slowed)``: copies in a millisecond while this runs, and how much longer this takes meanwhile."""
        copies()
        stream.synchronize()
        runtime = self._cupy.cuda
        marks = [runtime.Event() for _ in range(4)]
        marks[0].record(stream)
        marks[2].record(self._stream)
        copies()
        marks[1].record(stream)
        for _ in range(self._count):
            self._run()
        marks[3].record(self._stream)
        marks[1].synchronize()
        marks[3].synchronize()
        alone = self._ms * self._count
        return (
            1 / max(runtime.get_elapsed_time(marks[0], marks[1]), 1e-6),
            max(1.0, runtime.get_elapsed_time(marks[2], marks[3]) / alone),
        )
