"""Sets of small integers that find their lowest member in a few instructions: 64-ary bitmaps with two summary levels.

A `BitSets` holds several sets over the same range, one per row. Summary bit ``i`` is set exactly if word ``i`` of the
level below is not zero, so the lowest member is three counts of trailing zeros away (the top level is scanned; it has
8 words for two million members).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._bits import count_trailing_zeros
from allocators._jit import jit

_ONE = np.uint64(1)


class BitSets(NamedTuple):
    """Bit ``b`` of ``members[s, w]`` tells whether ``64 w + b`` is in set ``s``; the others sum up the level below."""

    members: NDArray[np.uint64]
    summary: NDArray[np.uint64]
    top: NDArray[np.uint64]


def make_bitsets(num_sets: int, size: int) -> BitSets:
    """``num_sets`` empty sets over ``range(size)``."""

    def words(count: int) -> int:
        return -(-count // 64)

    low, middle = words(size), words(words(size))
    return BitSets(
        np.zeros((num_sets, low), np.uint64),
        np.zeros((num_sets, middle), np.uint64),
        np.zeros((num_sets, words(middle)), np.uint64),
    )


def clear(sets: BitSets) -> None:
    """Empty every set."""
    for level in sets:
        level[...] = 0


def nbytes(sets: BitSets) -> int:
    """Bytes that the sets occupy."""
    return sum(level.nbytes for level in sets)


@jit
def add(sets: BitSets, s: int, i: int) -> None:
    """Put ``i`` into set ``s``."""
    word, group = i >> 6, i >> 12
    sets.members[s, word] |= _ONE << np.uint64(i & 63)
    sets.summary[s, group] |= _ONE << np.uint64(word & 63)
    sets.top[s, i >> 18] |= _ONE << np.uint64(group & 63)


@jit
def discard(sets: BitSets, s: int, i: int) -> None:
    """Take ``i`` out of set ``s``."""
    word, group = i >> 6, i >> 12
    sets.members[s, word] &= ~(_ONE << np.uint64(i & 63))
    if sets.members[s, word] == 0:
        sets.summary[s, group] &= ~(_ONE << np.uint64(word & 63))
        if sets.summary[s, group] == 0:
            sets.top[s, i >> 18] &= ~(_ONE << np.uint64(group & 63))


@jit
def lowest(sets: BitSets, s: int) -> Any:
    """The lowest member of set ``s``, or -1."""
    for t in range(sets.top.shape[1]):
        if sets.top[s, t] != 0:
            group = t * 64 + count_trailing_zeros(sets.top[s, t])
            word = group * 64 + count_trailing_zeros(sets.summary[s, group])
            return word * 64 + count_trailing_zeros(sets.members[s, word])
    return -1


@jit
def is_empty(sets: BitSets, s: int) -> Any:
    """Whether set ``s`` has no member."""
    members = np.uint64(0)
    for t in range(sets.top.shape[1]):
        members |= sets.top[s, t]
    return members == 0
