"""The words of the lock-free pool for Numba kernels: where they are, what their bits mean, how blocks are claimed.

`kvtoolkit.numba.pool` has the calls, and says what their arguments are.
"""

from typing import Any

from kvtoolkit.numba.atomics import (
    LOW_HALF,
    ONE,
    ZERO,
    add_release,
    compare_exchange_acquire,
    fence_acq_rel,
    fetch_and_acquire,
    int64,
    load_relaxed,
    store_relaxed,
    uint64,
)
from kvtoolkit.numba.device import device

EXHAUSTED = -2
"""Asked for one granule: at some moment of the call none was free."""
FRAGMENTED = -3
"""Asked for more, or a slab pool: at some moment no such run was free; other granules may have been."""
CONTENDED = -4
"""Undecided, because others kept freeing."""
INVALID = -5
"""The run is not inside the pool, not inside one word, or not live; or this is not the memory of a pool."""

EPOCH = 2
HINTS = 8
_VERSIONS = 16
_SHARDS = 32
_SHARD_PITCH = 8
FREE_WORDS = _VERSIONS + _SHARDS * _SHARD_PITCH
_EPOCHS = 4
MAX_PASSES = 4

_ALL = uint64(0xFFFFFFFFFFFFFFFF)
_ORDER = uint64(32)  # where the word of a slab has the order that it serves
_ORDER_BITS = uint64(3 << 32)
_SUPERBLOCKS = uint64(34)  # and how many superblocks of it exist

# -- bits of a word --------------------------------------------------------------------------------------------------


@device
def count_bits(word: Any) -> Any:
    count = 0
    while word != ZERO:
        word &= word - ONE  # less its lowest bit
        count += 1
    return count


@device
def lowest_bit(word: Any) -> Any:
    """The index of the lowest set bit of a word that is not 0."""
    return count_bits(~word & (word - ONE))


@device
def _fold_runs(word: Any, order: Any) -> Any:
    """A bit for every aligned run of ``2**order`` set bits, at its start."""
    if order > 0:
        word &= word >> ONE & uint64(0x5555555555555555)
    if order > 1:
        word &= word >> uint64(2) & uint64(0x1111111111111111)
    if order > 2:
        word &= word >> uint64(4) & uint64(0x0101010101010101)
    return word


@device
def _spread_runs(starts: Any, order: Any) -> Any:
    """All bits of the runs whose starts are set."""
    if order > 0:
        starts |= starts << ONE
    if order > 1:
        starts |= starts << uint64(2)
    if order > 2:
        starts |= starts << uint64(4)
    return starts


@device
def lowest_bits(word: Any, count: Any) -> Any:
    """The lowest ``count`` set bits, or all."""
    rest = word
    while rest != ZERO and count > 0:
        rest &= rest - ONE
        count -= 1
    return word ^ rest


@device
def bit_of_rank(word: Any, rank: Any) -> Any:
    """The index of the set bit that has ``rank`` set bits below it."""
    return lowest_bit(word ^ lowest_bits(word, rank))


# -- what memory says ------------------------------------------------------------------------------------------------


@device
def is_slab_pool(memory: Any) -> Any:
    return memory[5] != ZERO


@device
def _num_granules(memory: Any) -> Any:
    return int64(memory[0] + memory[4])  # the words of the other layout are 0


@device
def num_words_of(memory: Any) -> Any:
    return int64(memory[1] + memory[5])


@device
def shift(memory: Any) -> Any:
    """log2 of the granules of a word."""
    return 5 if is_slab_pool(memory) else 6


@device
def limbo_words(memory: Any, epoch: Any) -> Any:
    return FREE_WORDS + num_words_of(memory) * (1 + int64(epoch % uint64(_EPOCHS)))


@device
def _seed(seed: Any) -> Any:
    return uint64(int64(seed)) & LOW_HALF


@device
def _home_of(memory: Any, seed: Any) -> Any:
    """The word at which a thread begins to look; consecutive seeds begin far apart."""
    hashed = _seed(seed) * uint64(0x9E3779B1) & LOW_HALF
    return int64(hashed * uint64(num_words_of(memory)) >> uint64(32))


@device
def _current_word(memory: Any, order: Any, seed: Any) -> Any:
    """In slab pools: the place of 1 plus the word in which a search last found a block."""
    return FREE_WORDS + num_words_of(memory) * (2 + _EPOCHS) + _current(memory, seed) * 4 + order


@device
def _current(memory: Any, seed: Any) -> Any:
    return int64(_seed(seed) % uint64(num_words_of(memory) // 32 + 1))


@device
def first_word(memory: Any, order: Any, seed: Any) -> Any:
    """The word at which to begin for an order. In slab pools where the last block was, so that few slabs are begun."""
    if not is_slab_pool(memory):
        return _home_of(memory, seed)
    current = int64(load_relaxed(memory, _current_word(memory, order, seed)))
    return current - 1 if current != 0 else _home_of(memory, _current(memory, seed) * 4 + order)


@device
def found_at(memory: Any, order: Any, seed: Any, start: Any) -> None:
    if is_slab_pool(memory):
        store_relaxed(memory, _current_word(memory, order, seed), uint64((start >> shift(memory)) + 1))


@device
def version(memory: Any) -> Any:
    total = ZERO
    for shard in range(_SHARDS):
        total += load_relaxed(memory, _VERSIONS + shard * _SHARD_PITCH)
    return total


@device
def bump_version(memory: Any, seed: Any) -> None:
    """Announce that bits have been set, so that freed granules can be found."""
    add_release(memory, _VERSIONS + seed % _SHARDS * _SHARD_PITCH, ONE)
    # whoever sees a later allocation of this thread must see the new version too
    fence_acq_rel()


@device
def in_limbo(memory: Any, w: Any) -> Any:
    bits = ZERO
    for epoch in range(_EPOCHS):
        bits |= load_relaxed(memory, limbo_words(memory, uint64(epoch)) + w)
    return bits


@device
def code_of(memory: Any, order: Any) -> Any:
    return EXHAUSTED if order == 0 and not is_slab_pool(memory) else FRAGMENTED


@device
def is_run_inside(memory: Any, start: Any, count: Any) -> Any:
    granules = 1 << shift(memory)
    is_of_one_word = count >= 1 and count <= granules - start % granules
    return start >= 0 and is_of_one_word and count <= _num_granules(memory) - start


@device
def bits_of(memory: Any, start: Any, count: Any) -> Any:
    return _ALL >> uint64(64 - count) << uint64(start % (1 << shift(memory)))


# -- one thread on its own -------------------------------------------------------------------------------------------


@device
def runs_in(word: Any, order: Any, is_slab: Any) -> Any:
    """Starts of the free runs in a word. A slab has some if it serves this order, or if all of it is free."""
    if not is_slab:
        return _fold_runs(word, order)
    free_bits = word & LOW_HALF
    is_whole = free_bits == (ONE << uint64(8) * (word >> _SUPERBLOCKS)) - ONE
    if is_whole or int64(word >> _ORDER & uint64(3)) == order:
        return _fold_runs(free_bits, order)
    return ZERO


@device
def _choose(word: Any, order: Any, count: Any, is_slab: Any) -> Any:
    """Choose up to ``count`` runs to claim; those in broken superblocks come before those in whole ones."""
    runs = runs_in(word, order, is_slab)
    if is_slab:
        return lowest_bits(runs, count)
    whole = _spread_runs(_fold_runs(word, 3), 3)
    broken = lowest_bits(runs & ~whole, count)
    return broken | lowest_bits(runs & whole, count - count_bits(broken))


@device
def claim_runs(memory: Any, w: Any, seen: Any, order: Any, count: Any) -> Any:
    """Claim up to ``count`` runs of a word whose value was ``seen``; returns their starts.

    It claims fewer than ``count`` only if the word has no more, and tries again only if another thread made progress.
    """
    is_slab = is_slab_pool(memory)
    won = ZERO
    while True:
        starts = _choose(seen, order, count - count_bits(won), is_slab)
        if starts == ZERO:
            return won
        bits = _spread_runs(starts, order)
        if order == 0 and not is_slab:
            old = fetch_and_acquire(memory, FREE_WORDS + w, ~bits)
            won |= old & bits
            if count_bits(won) == count:
                return won
            seen = old & ~bits
        else:
            left = seen & ~bits
            if is_slab:
                left = left & ~_ORDER_BITS | uint64(order) << _ORDER
            old = compare_exchange_acquire(memory, FREE_WORDS + w, seen, left)
            if old == seen:
                return starts
            seen = old
