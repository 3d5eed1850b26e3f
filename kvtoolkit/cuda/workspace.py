"""Scratch memory of the attention kernels, one piece per device and stream, kept for ever.

It only grows, and what it has outgrown is kept too: a captured CUDA graph may hold its address. Kernels on one stream
follow one another, so they can share it. Nothing can be allocated while a graph is captured: a stream that was never
used before its capture gets a spare piece, which every device has as large as its largest.
"""

import atexit
import threading
from typing import Any, NamedTuple

from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime import is_capturing
from kvtoolkit.runtime.streams import on_stream

_MIN_PARTIALS = 4 << 20
_MIN_COUNTERS = 1 << 16
_CAPTURED_NBYTES = 32 << 20  # for what steps make during a capture


class Workspace(NamedTuple):
    """Addresses and sizes."""

    partials: int
    partials_nbytes: int
    counters: int
    """uint32, all zero between kernels."""
    num_counters: int
    memory: tuple[Any, ...]


class _Captured:
    """Memory for the plans and lists of captured graphs, handed out once and never taken back."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.used = 0


_lock = threading.Lock()
_spaces: dict[tuple[int, int], Workspace] = {}
_spares: dict[int, Workspace] = {}
_captured: dict[int, _Captured] = {}
_outgrown: list[Any] = []


@atexit.register
def _free_all() -> None:
    """CuPy cannot free memory any more once the interpreter takes modules apart."""
    for kept in (_spaces, _spares, _captured, _outgrown):
        kept.clear()


def workspace(device: int, stream: int, partials_nbytes: int, num_counters: int) -> Workspace:
    """Scratch of at least these sizes; UnsupportedError if it had to grow while the stream is captured."""
    found = _spaces.get((device, stream))
    if found is not None and _fits(found, partials_nbytes, num_counters):
        return found
    with _lock:
        spare = _spares.get(device)
        if is_capturing(stream):
            if spare is None or not _fits(spare, partials_nbytes, num_counters):
                raise UnsupportedError(
                    "attention: expected its scratch memory to be there before a CUDA graph is captured; run the same "
                    "call once before the capture, on any stream"
                )
            _spaces[device, stream] = _spares.pop(device)
            return spare
        if found is not None:
            partials_nbytes = max(partials_nbytes, 2 * found.partials_nbytes)
            num_counters = max(num_counters, 2 * found.num_counters)
            _outgrown.append(found)
        made = _spaces[device, stream] = _make(partials_nbytes, num_counters)
        if spare is None or not _fits(spare, made.partials_nbytes, made.num_counters):
            _spares[device] = _make(made.partials_nbytes, made.num_counters)
        if device not in _captured:
            import cupy

            _captured[device] = _Captured(cupy.cuda.Memory(_CAPTURED_NBYTES))
        return made


def step_memory(device: int, stream: int, nbytes: int) -> tuple[int, Any]:
    """``(address, owner)`` of memory for the plan or the list of a step.

    It lasts as long as its owner; of a captured step for ever.
    """
    import cupy

    if not is_capturing(stream):
        with on_stream(stream):  # its memory is handed out again in the order of this stream
            memory = cupy.empty(nbytes, "uint8")
        return memory.data.ptr, memory
    with _lock:
        captured = _captured.get(device)
        if captured is None or captured.used + nbytes > captured.memory.size:
            raise UnsupportedError(
                f"attention: expected room for the plans of captured CUDA graphs, {_CAPTURED_NBYTES >> 20} MiB in all "
                "on a device that has run attention before; run the call once before the capture, or capture less"
            )
        address = captured.memory.ptr + captured.used
        captured.used += -(-nbytes // 256) * 256
        return address, captured.memory


def _fits(space: Workspace, partials_nbytes: int, num_counters: int) -> bool:
    return space.partials_nbytes >= partials_nbytes and space.num_counters >= num_counters


def _make(partials_nbytes: int, num_counters: int) -> Workspace:
    import cupy

    partials = cupy.cuda.Memory(max(partials_nbytes, _MIN_PARTIALS))
    counters = cupy.cuda.Memory(4 * max(num_counters, _MIN_COUNTERS))
    cupy.cuda.runtime.memset(counters.ptr, 0, counters.size)
    cupy.cuda.runtime.deviceSynchronize()  # any stream may use it from now on
    return Workspace(partials.ptr, partials.size, counters.ptr, counters.size // 4, (partials, counters))
