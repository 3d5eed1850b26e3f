"""Scratch memory of the attention kernels, one piece per device and stream, kept until the program ends.

It only grows, and pieces that became too small are kept too, because a captured CUDA graph may hold their address.
Calls on one stream follow one another, so they can share it; graphs captured on one stream must not be replayed on two
at once. Nothing can be allocated while a graph is captured: a stream that was never used before its capture gets a
spare piece, which every device has, as large as its largest.
"""

import atexit
import threading
from typing import Any, NamedTuple

from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime import is_capturing


class Sizes(NamedTuple):
    """Bytes of each part."""

    partials: int
    """Results of pieces of sequences."""
    counters: int
    """uint32 each, all zero between kernels."""
    step: int
    """The plan and the list of granules of a call that has no memory of its own for them."""


class Workspace(NamedTuple):
    """Addresses of the parts, and their sizes."""

    partials: int
    counters: int
    step: int
    sizes: Sizes
    memory: tuple[Any, ...]


_LEAST = Sizes(4 << 20, 1 << 18, 1 << 20)

_lock = threading.Lock()
_spaces: dict[tuple[int, int], Workspace] = {}
_spares: dict[int, Workspace] = {}
_outgrown: list[Workspace] = []


@atexit.register
def _free_all() -> None:
    """CuPy cannot free memory any more once the interpreter takes modules apart."""
    for kept in (_spaces, _spares, _outgrown):
        kept.clear()


def workspace(device: int, stream: int, sizes: Sizes) -> Workspace:
    """Scratch of at least these sizes; UnsupportedError if it had to grow while the stream is captured."""
    found = _spaces.get((device, stream))
    if found is not None and _fits(found, sizes) and device in _spares:
        return found
    with _lock:
        found, spare = _spaces.get((device, stream)), _spares.get(device)
        if is_capturing(stream):
            if found is not None and _fits(found, sizes):
                return found
            if spare is None or not _fits(spare, sizes):
                raise UnsupportedError(
                    "attention: expected its scratch memory to be there before a CUDA graph is captured; run the same "
                    "call once before the capture, on any stream"
                )
            if found is not None:
                _outgrown.append(found)
            _spaces[device, stream] = _spares.pop(device)
            return spare
        if found is None or not _fits(found, sizes):
            if found is not None:
                _outgrown.append(found)
                # only what is too small: parts that grow in turns would otherwise double one another
                pairs = zip(sizes, found.sizes, strict=True)
                sizes = Sizes(*(max(want, 2 * have) if want > have else have for want, have in pairs))
            found = _spaces[device, stream] = _make(sizes)
        if spare is None or not _fits(spare, found.sizes):
            _spares[device] = _make(found.sizes)
        return found


def _fits(space: Workspace, sizes: Sizes) -> bool:
    return all(have >= want for have, want in zip(space.sizes, sizes, strict=True))


def _make(sizes: Sizes) -> Workspace:
    import cupy

    sizes = Sizes(*(-(-max(size, least) // 512) * 512 for size, least in zip(sizes, _LEAST, strict=True)))
    parts = tuple(cupy.cuda.Memory(size) for size in sizes)
    cupy.cuda.runtime.memset(parts[1].ptr, 0, sizes.counters)
    cupy.cuda.runtime.deviceSynchronize()  # any stream may use it from now on
    return Workspace(parts[0].ptr, parts[1].ptr, parts[2].ptr, sizes, parts)
