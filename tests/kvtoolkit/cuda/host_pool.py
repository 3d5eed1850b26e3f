"""A pool "on a device" in host memory: what `DevicePool` uses of CuPy, and its kernels, which take the lowest block."""

import contextlib
import ctypes
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtoolkit.cuda import pool, pool_share


class Array(np.ndarray):
    """A NumPy array with the methods of one on a device."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)

    def get(self) -> Any:
        return np.array(self)

    def set(self, array: Any) -> None:
        self[...] = array


class Device:
    """What has happened on the device.

    Attributes:
        launches: names of the kernels, in order.
        num_waits: for all streams.
        stream: the current one.
        before_launch: called with the name of a kernel before it runs; other kernels may take or free blocks there.
    """

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.num_waits = 0
        self.stream = 0
        self.before_launch: Callable[[str], Any] = lambda name: None

    def wait(self) -> None:
        self.num_waits += 1


def use_host(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Let a `DevicePool` of buddies be in host memory; returns what its kernels will have done."""
    device = Device()
    stream = SimpleNamespace(ptr=0, synchronize=lambda: None)
    cupy = SimpleNamespace(
        uint64=np.uint64,
        zeros=lambda shape, dtype: np.zeros(shape, dtype).view(Array),
        asarray=lambda array: np.array(array).view(Array),
        cuda=SimpleNamespace(
            get_current_stream=lambda: stream, runtime=SimpleNamespace(deviceSynchronize=device.wait)
        ),
    )  # fmt: skip
    monkeypatch.setattr(pool, "cupy_on_current_stream", lambda number: contextlib.nullcontext(cupy))
    monkeypatch.setattr(pool, "current_device", lambda: 0)
    monkeypatch.setattr(pool, "num_sms", lambda number: 1)
    monkeypatch.setattr(pool, "load", lambda source, name, macros, number: name)
    monkeypatch.setattr(pool_share, "current_stream", lambda number: device.stream)

    class Launch:
        def __init__(self, kernel: str, grid: Any, threads: int, smem_nbytes: int, parameters: bytes) -> None:
            self.kernel, self.parameters = kernel, parameters

        def run(self, stream: int) -> None:
            device.before_launch(self.kernel)
            device.launches.append(self.kernel)
            _run(self.kernel, self.parameters)

    monkeypatch.setattr(pool, "Launch", Launch)
    return device


def _at(address: int, dtype: Any, count: int) -> Any:
    nbytes = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype) if count else np.empty(0, dtype)


class Words:
    """The bitmaps of a pool of buddies, as kernels see them."""

    def __init__(self, address: int) -> None:
        self.num_granules, self.num_words = _at(address, np.int64, 2).tolist()
        begin = address + 8 * pool._FREE
        self.free, *self.limbo = (_at(begin + 8 * self.num_words * i, np.uint64, self.num_words) for i in range(5))

    @staticmethod
    def bits(words: Any) -> Any:
        return np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)

    @staticmethod
    def write(words: Any, bits: Any) -> None:
        words[:] = np.packbits(bits, bitorder="little").view(np.uint64)

    def take(self, size: int) -> int:
        """The lowest free block, or -1."""
        bits = self.bits(self.free)
        found = np.flatnonzero(bits.reshape(-1, size).all(axis=1))
        if not len(found):
            return -1
        start = int(found[0]) * size
        bits[start : start + size] = False
        self.write(self.free, bits)
        return start

    def give_back(self, start: int, size: int) -> bool:
        """Free a run; False if it is not live."""
        bits = self.bits(self.free)
        taken = np.logical_or.reduce([bits, *map(self.bits, self.limbo)])
        if start < 0 or size < 1 or start + size > self.num_granules or taken[start : start + size].any():
            return False
        bits[start : start + size] = True
        self.write(self.free, bits)
        return True


def _run(kernel: str, parameters: bytes) -> None:
    memory, starts_at, sizes_at, result_at, count, partial = struct.unpack_from(pool._params.format, parameters)
    words, result = Words(memory), _at(result_at, np.int32, 2)
    if kernel == "kvt_pool_complete":
        limbo = words.limbo[count % 4]
        words.free |= limbo
        limbo[:] = 0
        return
    starts, sizes, before = _at(starts_at, np.int32, count), _at(sizes_at, np.int32, count), words.free.copy()
    if kernel == "kvt_pool_free":
        result[0] = -1
        for i in range(count):
            if not words.give_back(int(starts[i]), int(sizes[i])):
                words.free[:], result[0] = before, i
                return
        return
    starts[:], result[:] = -1, 0
    for i in range(count) if partial else np.argsort(-sizes, kind="stable"):
        starts[i] = words.take(int(sizes[i]))
        if starts[i] < 0:
            result[1] = -2
            break
        result[0] += 1
    if result[1] and not partial:
        words.free[:], starts[:], result[0] = before, -1, 0
