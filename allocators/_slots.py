"""Derives what is free and what is held back from what is live, in words of 64 granules with slots of one size.

Shared by the two slab layouts on the host.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD = 64


def slots_of(
    live: NDArray[np.bool_], orders: NDArray[Any], offered: list[int]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]:
    """The words in which exactly these granules are live.

    Args:
        live: ``[num_granules]``
        orders: ``[num_words]`` order of the slots in each word; -1 = choose one.
        offered: orders of the block sizes on offer, ascending.

    Returns:
        ``(free, returned, orders)``. Slots without a live granule are free; the other granules that are not live are
        returned. The order chosen is the largest one whose slots are each wholly live or wholly not, or else the
        smallest; it is -1 if no granule of the word is live.
    """
    num_words = -(-len(live) // _WORD)
    both = np.zeros((2, num_words * _WORD), np.bool_)
    both[0, : len(live)], both[1, : len(live)] = live, True
    words, valid = both.reshape(2, num_words, _WORD)
    chosen = np.full(num_words, offered[0])
    for order in offered:
        live_in_slot = words.reshape(num_words, -1, 1 << order).sum(axis=2)
        chosen[(live_in_slot % (1 << order) == 0).all(axis=1)] = order
    orders = np.where(words.any(axis=1), np.where(orders < 0, chosen, orders), -1)
    free = valid & (orders < 0)[:, None]
    for order in range(4):
        which = orders == order
        slots = words[which].reshape(-1, _WORD >> order, 1 << order)
        free[which] = valid[which] & np.repeat(~slots.any(axis=2), 1 << order, axis=1)
    return _packed(free), _packed(valid & ~words & ~free), orders


def _packed(bits: NDArray[np.bool_]) -> NDArray[np.uint64]:
    words: NDArray[np.uint64] = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)[:, 0]
    return words
