"""Which elements around its first one an array reaches, and whether arrays share memory: arithmetic on strides alone.

Nothing is dereferenced, so the functions serve arrays on a device as well. Results are cached by shape and strides,
because the arrays of a step have the same ones in every layer.
"""

import functools
from typing import NamedTuple

import numpy as np

_MAX_EXTENTS = 4096
_MAX_WORK = 1_000_000  # of NumPy's exact solver; a few milliseconds


class Extent(NamedTuple):
    """The elements that an array reaches, counted from its first one."""

    shape: tuple[int, ...]
    """Of the array, as a plain tuple: a ``torch.Size`` is slow to slice and prints differently."""
    low: int
    """Lowest index; negative only for negative strides."""
    end: int
    """One past the highest index; 0 for an array without elements."""
    repeats: bool
    """Whether two elements may share a place, as after a broadcast."""


EXTENTS: dict[tuple[tuple[int, ...], tuple[int, ...]], Extent] = {}
"""What `extent` has computed, for callers that cannot afford a call: look here first."""


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> Extent:
    """The extent of an array of ``shape`` with ``strides`` in elements."""
    found = EXTENTS.get((shape, strides))
    if found is None:
        if len(EXTENTS) >= _MAX_EXTENTS:
            EXTENTS.clear()
        found = EXTENTS[tuple(shape), tuple(strides)] = _compute(shape, strides)
    return found


def _compute(shape: tuple[int, ...], strides: tuple[int, ...]) -> Extent:
    if 0 in shape:
        return Extent(tuple(shape), 0, 0, False)
    low, high, reach, repeats = 0, 0, 0, False
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        # A step along this axis must pass everything that the axes with smaller strides reach.
        repeats = repeats or stride <= reach
        reach += stride * (size - 1)
    for stride, size in zip(strides, shape, strict=True):
        low += min(stride, 0) * (size - 1)
        high += max(stride, 0) * (size - 1)
    return Extent(tuple(shape), low, high + 1, repeats)


_Layout = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, strides in elements, bytes of an element."""


@functools.lru_cache(4096)
def share_bytes(distance: int, one: _Layout, other: _Layout) -> bool:
    """Whether two arrays, the second beginning ``distance`` bytes after the first, have a byte in common.

    Exact, so that the interleaved halves of one buffer are told apart; arrays for which the answer would take too long
    count as overlapping.
    """
    base = 1 << 50
    try:
        return np.shares_memory(_dummy(base, one), _dummy(base + distance, other), max_work=_MAX_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Described:
    def __init__(self, address: int, layout: _Layout) -> None:
        shape, strides, itemsize = layout
        self.__array_interface__ = {
            "version": 3, "data": (address, True), "shape": shape, "typestr": f"|V{itemsize}",
            "strides": tuple(stride * itemsize for stride in strides),
        }  # fmt: skip


def _dummy(address: int, layout: _Layout) -> np.ndarray:
    """An array that says where it is but must not be read."""
    return np.asarray(_Described(address, layout))
