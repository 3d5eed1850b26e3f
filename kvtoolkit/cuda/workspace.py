"""Scratch memory of the attention kernels, one piece per device and stream, kept for ever.

It only grows, and what it has outgrown is kept too: a captured CUDA graph may hold its address. Kernels on one stream
follow one another, so they can share it.
"""

import threading
from typing import Any, NamedTuple

from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime import is_capturing


class Workspace(NamedTuple):
    """Addresses and sizes."""

    partials: int
    partials_nbytes: int
    counters: int
    """uint32, all zero between kernels."""
    num_counters: int
    memory: tuple[Any, ...]


_lock = threading.Lock()
_spaces: dict[tuple[int, int], Workspace] = {}
_outgrown: list[Workspace] = []


def workspace(device: int, stream: int, partials_nbytes: int, num_counters: int) -> Workspace:
    """Scratch of at least these sizes; UnsupportedError if it had to grow while the stream is captured."""
    found = _spaces.get((device, stream))
    if found is not None and found.partials_nbytes >= partials_nbytes and found.num_counters >= num_counters:
        return found
    if is_capturing(stream):
        raise UnsupportedError(
            "attention: expected its scratch memory to be there before a CUDA graph is captured; run the same call "
            "once on this stream before the capture"
        )
    import cupy

    with _lock:
        found = _spaces.get((device, stream))
        if found is not None:
            partials_nbytes = max(partials_nbytes, 2 * found.partials_nbytes)
            num_counters = max(num_counters, 2 * found.num_counters)
            _outgrown.append(found)
        partials = cupy.cuda.Memory(max(partials_nbytes, 1 << 20))
        counters = cupy.cuda.Memory(4 * max(num_counters, 4096))
        cupy.cuda.runtime.memsetAsync(counters.ptr, 0, counters.size, stream)
        made = Workspace(partials.ptr, partials.size, counters.ptr, counters.size // 4, (partials, counters))
        _spaces[device, stream] = made
        return made
