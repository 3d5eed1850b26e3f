"""The lock-free pool for Numba kernels of your own: device functions that take blocks of granules and give them back.

    memory    uint64, `DevicePool.memory` of either layout; it says itself which one
    journal   [num_words] uint64, a row of `DevicePool.journals`
    order     0 to 3: a block of 2**order granules;    start, its first granule
    seed      any number, where to look first: that of the thread, or of the warp
    mask      lanes of one warp that all make the call together; they ask for blocks of the same order

The twin of ``kvt/pool.cuh``, which states the algorithm: the same words, changed in the same steps, so that kernels in
CUDA C++, kernels in Numba and the host may use one pool at the same time. What fails returns a negative code.

Orders: Numba's atomics are relaxed; a fence behind one acquires, a fence before one releases. Numba has no volatile
        load, so a word that others change is read by an atomic that changes nothing.
"""

import threading
from typing import Any

import numpy as np

from kvtoolkit.numba.device import SIMULATED, cuda, device

__all__ = [
    "CONTENDED", "EXHAUSTED", "FRAGMENTED", "INVALID", "allocate", "free", "lease_abort", "lease_allocate",
    "lease_commit", "retire", "warp_allocate", "warp_free", "warp_retire",
]  # fmt: skip

EXHAUSTED = -2
"""Of one granule: at some moment of the call none was free."""
FRAGMENTED = -3
"""Of more, or of a slab: at some moment no such run was free; others may have been."""
CONTENDED = -4
"""Undecided: others kept freeing."""
INVALID = -5
"""Not inside the pool, not inside one word, or not live; of all calls: not the memory of a pool."""

_EPOCH = 2
_HINTS = 8
_VERSIONS = 16
_SHARDS = 32
_SHARD_PITCH = 8
_FREE_WORDS = _VERSIONS + _SHARDS * _SHARD_PITCH
_EPOCHS = 4
_MAX_PASSES = 4

# as casts: Numba makes a float64 of an int64 and a uint64, so words meet words alone, and numbers numbers
int32: Any = np.int32
int64: Any = np.int64
uint64: Any = np.uint64
_ZERO = uint64(0)
_ONE = uint64(1)
_ALL = uint64(0xFFFFFFFFFFFFFFFF)
_LOW_HALF = uint64(0xFFFFFFFF)
_ORDER = uint64(32)  # where the word of a slab has the order that it serves
_ORDER_BITS = uint64(3 << 32)
_SUPERBLOCKS = uint64(34)  # and how many superblocks of it exist

# -- atomics, as in kvt/pool/atomic.cuh --------------------------------------------------------------------------------

if SIMULATED:
    # the simulator's own are atomic among calls of one name only, and only in the module of the kernel
    _turn = threading.Lock()

    def _load_relaxed(array: Any, at: Any) -> Any:
        return array[at]

    def _store_relaxed(array: Any, at: Any, value: Any) -> None:
        with _turn:
            array[at] = value

    def _fetch_and_acquire(array: Any, at: Any, value: Any) -> Any:
        with _turn:
            old = array[at]
            array[at] = old & value
        return old

    def _fetch_or_release(array: Any, at: Any, value: Any) -> Any:
        with _turn:
            old = array[at]
            array[at] = old | value
        return old

    def _compare_exchange_acquire(array: Any, at: Any, expected: Any, value: Any) -> Any:
        with _turn:
            old = array[at]
            if old == expected:
                array[at] = value
        return old

    def _exchange_acq_rel(array: Any, at: Any, value: Any) -> Any:
        with _turn:
            old = array[at]
            array[at] = value
        return old

    def _add_release(array: Any, at: Any, value: Any) -> None:
        with _turn:
            array[at] += value

    def _fence_acq_rel() -> None:
        pass

else:

    @device
    def _load_relaxed(array: Any, at: Any) -> Any:
        return cuda.atomic.or_(array, at, _ZERO)

    @device
    def _store_relaxed(array: Any, at: Any, value: Any) -> None:
        cuda.atomic.exch(array, at, value)

    @device
    def _fetch_and_acquire(array: Any, at: Any, value: Any) -> Any:
        old = cuda.atomic.and_(array, at, value)
        cuda.threadfence()
        return old

    @device
    def _fetch_or_release(array: Any, at: Any, value: Any) -> Any:
        cuda.threadfence()
        return cuda.atomic.or_(array, at, value)

    @device
    def _compare_exchange_acquire(array: Any, at: Any, expected: Any, value: Any) -> Any:
        old = cuda.atomic.cas(array, at, expected, value)
        cuda.threadfence()
        return old

    @device
    def _exchange_acq_rel(array: Any, at: Any, value: Any) -> Any:
        cuda.threadfence()
        old = cuda.atomic.exch(array, at, value)
        cuda.threadfence()
        return old

    @device
    def _add_release(array: Any, at: Any, value: Any) -> None:
        cuda.threadfence()
        cuda.atomic.add(array, at, value)

    @device
    def _fence_acq_rel() -> None:
        cuda.threadfence()


@device
def _load_acquire(array: Any, at: Any) -> Any:
    value = _load_relaxed(array, at)
    _fence_acq_rel()
    return value


# -- bits of a word --------------------------------------------------------------------------------------------------


@device
def _count_bits(word: Any) -> Any:
    count = 0
    while word != _ZERO:
        word &= word - _ONE  # less its lowest bit
        count += 1
    return count


@device
def _lowest_bit(word: Any) -> Any:
    """Of a word that is not 0."""
    return _count_bits(~word & (word - _ONE))


@device
def _fold_runs(word: Any, order: Any) -> Any:
    """A bit for every aligned run of ``2**order`` set bits, at its start."""
    if order > 0:
        word &= word >> _ONE & uint64(0x5555555555555555)
    if order > 1:
        word &= word >> uint64(2) & uint64(0x1111111111111111)
    if order > 2:
        word &= word >> uint64(4) & uint64(0x0101010101010101)
    return word


@device
def _spread_runs(starts: Any, order: Any) -> Any:
    """All bits of the runs whose starts are set."""
    if order > 0:
        starts |= starts << _ONE
    if order > 1:
        starts |= starts << uint64(2)
    if order > 2:
        starts |= starts << uint64(4)
    return starts


@device
def _lowest_bits(word: Any, count: Any) -> Any:
    """Of the set bits, the lowest ``count``, or all."""
    rest = word
    while rest != _ZERO and count > 0:
        rest &= rest - _ONE
        count -= 1
    return word ^ rest


@device
def _bit_of_rank(word: Any, rank: Any) -> Any:
    """Where the set bit lies that has ``rank`` set bits below it."""
    return _lowest_bit(word ^ _lowest_bits(word, rank))


# -- what memory says ------------------------------------------------------------------------------------------------


@device
def _is_slab(memory: Any) -> Any:
    return memory[5] != _ZERO


@device
def _num_granules(memory: Any) -> Any:
    return int64(memory[0] + memory[4])  # what the other layout has there is 0


@device
def _num_words(memory: Any) -> Any:
    return int64(memory[1] + memory[5])


@device
def _shift(memory: Any) -> Any:
    """log2 of the granules of a word."""
    return 5 if _is_slab(memory) else 6


@device
def _limbo_words(memory: Any, epoch: Any) -> Any:
    return _FREE_WORDS + _num_words(memory) * (1 + int64(epoch % uint64(_EPOCHS)))


@device
def _seed(seed: Any) -> Any:
    return uint64(int64(seed)) & _LOW_HALF


@device
def _home_of(memory: Any, seed: Any) -> Any:
    """Where a thread begins to look; seeds in a row begin far apart."""
    hashed = _seed(seed) * uint64(0x9E3779B1) & _LOW_HALF
    return int64(hashed * uint64(_num_words(memory)) >> uint64(32))


@device
def _current_word(memory: Any, order: Any, seed: Any) -> Any:
    """Of slabs: where the word plus 1 lies in which a search found a block last."""
    return _FREE_WORDS + _num_words(memory) * (2 + _EPOCHS) + _current(memory, seed) * 4 + order


@device
def _current(memory: Any, seed: Any) -> Any:
    return int64(_seed(seed) % uint64(_num_words(memory) // 32 + 1))


@device
def _first_word(memory: Any, order: Any, seed: Any) -> Any:
    """As `_home_of` for an order; in slabs where the last one found a block, so that few are begun."""
    if not _is_slab(memory):
        return _home_of(memory, seed)
    current = int64(_load_relaxed(memory, _current_word(memory, order, seed)))
    return current - 1 if current != 0 else _home_of(memory, _current(memory, seed) * 4 + order)


@device
def _found_at(memory: Any, order: Any, seed: Any, start: Any) -> None:
    if _is_slab(memory):
        _store_relaxed(memory, _current_word(memory, order, seed), uint64((start >> _shift(memory)) + 1))


@device
def _version(memory: Any) -> Any:
    total = _ZERO
    for shard in range(_SHARDS):
        total += _load_relaxed(memory, _VERSIONS + shard * _SHARD_PITCH)
    return total


@device
def _bump_version(memory: Any, seed: Any) -> None:
    """After bits have been set: what was freed may be found from now on."""
    _add_release(memory, _VERSIONS + seed % _SHARDS * _SHARD_PITCH, _ONE)
    # and whoever sees what this thread takes next sees the version too: or its block would seem to have moved unseen
    _fence_acq_rel()


@device
def _in_limbo(memory: Any, w: Any) -> Any:
    bits = _ZERO
    for epoch in range(_EPOCHS):
        bits |= _load_relaxed(memory, _limbo_words(memory, uint64(epoch)) + w)
    return bits


@device
def _code_of(memory: Any, order: Any) -> Any:
    return EXHAUSTED if order == 0 and not _is_slab(memory) else FRAGMENTED


@device
def _is_inside(memory: Any, start: Any, count: Any) -> Any:
    granules = 1 << _shift(memory)
    is_of_one_word = count >= 1 and count <= granules - start % granules
    return start >= 0 and is_of_one_word and count <= _num_granules(memory) - start


@device
def _bits_of(memory: Any, start: Any, count: Any) -> Any:
    return _ALL >> uint64(64 - count) << uint64(start % (1 << _shift(memory)))


# -- one thread on its own -------------------------------------------------------------------------------------------


@device
def _runs(word: Any, order: Any, is_slab: Any) -> Any:
    """Starts of the free runs; a slab has some if it serves this order, or if all of it is free."""
    if not is_slab:
        return _fold_runs(word, order)
    free_bits = word & _LOW_HALF
    is_whole = free_bits == (_ONE << uint64(8) * (word >> _SUPERBLOCKS)) - _ONE
    if is_whole or int64(word >> _ORDER & uint64(3)) == order:
        return _fold_runs(free_bits, order)
    return _ZERO


@device
def _choose(word: Any, order: Any, count: Any, is_slab: Any) -> Any:
    """Up to ``count`` runs to claim: those in superblocks that are broken already, before whole ones."""
    runs = _runs(word, order, is_slab)
    if is_slab:
        return _lowest_bits(runs, count)
    whole = _spread_runs(_fold_runs(word, 3), 3)
    broken = _lowest_bits(runs & ~whole, count)
    return broken | _lowest_bits(runs & whole, count - _count_bits(broken))


@device
def _claim_runs(memory: Any, w: Any, seen: Any, order: Any, count: Any) -> Any:
    """Claim up to ``count`` runs of a word whose value was ``seen``; returns their starts.

    Fewer than ``count`` only if the word has no more. A repetition means that another thread has got on.
    """
    is_slab = _is_slab(memory)
    won = _ZERO
    while True:
        starts = _choose(seen, order, count - _count_bits(won), is_slab)
        if starts == _ZERO:
            return won
        bits = _spread_runs(starts, order)
        if order == 0 and not is_slab:
            old = _fetch_and_acquire(memory, _FREE_WORDS + w, ~bits)
            won |= old & bits
            if _count_bits(won) == count:
                return won
            seen = old & ~bits
        else:
            left = seen & ~bits
            if is_slab:
                left = left & ~_ORDER_BITS | uint64(order) << _ORDER
            old = _compare_exchange_acquire(memory, _FREE_WORDS + w, seen, left)
            if old == seen:
                return starts
            seen = old


@device
def _claim(memory: Any, order: Any, w: Any) -> Any:
    start = _claim_runs(memory, w, _load_relaxed(memory, _FREE_WORDS + w), order, 1)
    return (w << _shift(memory)) + _lowest_bit(start) if start != _ZERO else CONTENDED


@device
def _search(memory: Any, order: Any, home: Any) -> Any:
    start = _claim(memory, order, home)
    if start >= 0:
        return start
    num_words = _num_words(memory)
    for _ in range(_MAX_PASSES):
        proved = _load_acquire(memory, _HINTS + order)
        before = _version(memory)
        _fence_acq_rel()
        if proved == before + _ONE:
            return _code_of(memory, order)  # somebody has proved it
        for i in range(num_words):
            start = _claim(memory, order, (home + i) % num_words)
            if start >= 0:
                return start
        _fence_acq_rel()
        if _version(memory) == before:
            _store_relaxed(memory, _HINTS + order, before + _ONE)
            return _code_of(memory, order)
    return CONTENDED


@device
def allocate(memory: Any, order: Any, seed: Any) -> Any:
    """Take one block of ``2**order`` granules; returns its first granule, or a code."""
    if _num_words(memory) == 0:
        return INVALID
    order = int64(order)
    start = _search(memory, order, _first_word(memory, order, seed))
    if start >= 0:
        _found_at(memory, order, seed, start)
    return start


@device
def free(memory: Any, start: Any, count: Any) -> Any:
    """Free live granules inside one word, a block or a part of one, that nobody can still read.

    Returns 0, or `INVALID` where some were free already or in limbo; the others are free then.
    """
    start, count = int64(start), int64(count)
    if not _is_inside(memory, start, count):
        return INVALID
    w = start >> _shift(memory)
    bits = _bits_of(memory, start, count)
    taken = _in_limbo(memory, w) & bits
    old = _fetch_or_release(memory, _FREE_WORDS + w, bits & ~taken) & bits
    _bump_version(memory, w)
    return 0 if old | taken == _ZERO else INVALID


@device
def retire(memory: Any, start: Any, count: Any) -> Any:
    """As `free`, for granules that running kernels may still read: they wait for `DevicePool.complete`."""
    start, count = int64(start), int64(count)
    if not _is_inside(memory, start, count):
        return INVALID
    w = start >> _shift(memory)
    bits = _bits_of(memory, start, count)
    taken = (_in_limbo(memory, w) | _load_relaxed(memory, _FREE_WORDS + w)) & bits
    limbo = _limbo_words(memory, _load_acquire(memory, _EPOCH))
    old = _fetch_or_release(memory, limbo + w, bits & ~taken) & bits
    return 0 if old | taken == _ZERO else INVALID


# -- leases ----------------------------------------------------------------------------------------------------------


@device
def lease_allocate(memory: Any, journal: Any, order: Any, seed: Any) -> Any:
    """As `allocate`, for a future that may not come; the block is not freed or retired before the lease has ended."""
    start = allocate(memory, order, seed)
    if start >= 0:
        _fetch_or_release(journal, start >> _shift(memory), _bits_of(memory, start, 1 << int64(order)))
    return start


@device
def lease_commit(memory: Any, journal: Any, around: Any, rank: Any, threads: Any) -> None:
    """The future came: keep the blocks, for the lease of the journal ``around`` if there is one, else None.

    All threads of a group call it, ``rank`` of ``threads``, when none of them allocates any more (behind a barrier).
    """
    for w in range(int64(rank), _num_words(memory), int64(threads)):
        bits = _exchange_acq_rel(journal, w, _ZERO)
        if around is not None:  # noqa: SIM102 - on its own, Numba drops the branch where it is None
            if bits != _ZERO:
                _fetch_or_release(around, w, bits)


@device
def lease_abort(memory: Any, journal: Any, rank: Any, threads: Any) -> None:
    """Likewise, it did not come: give the blocks back. Nobody may still read them."""
    has_freed = False
    for w in range(int64(rank), _num_words(memory), int64(threads)):
        if _load_relaxed(journal, w) != _ZERO:
            bits = _exchange_acq_rel(journal, w, _ZERO)
            _fetch_or_release(memory, _FREE_WORDS + w, bits)
            has_freed = True
    if has_freed:
        _bump_version(memory, int64(rank))


# -- the lanes of a warp together ------------------------------------------------------------------------------------
# `lanes` is the mask as a word. The simulator has nothing of what they need.


@device
def _lanes_of(mask: Any) -> Any:
    return uint64(int64(mask)) & _LOW_HALF  # ballots are int32


@device
def _shuffle(lanes: Any, word: Any, source: Any) -> Any:
    return uint64(cuda.shfl_sync(int32(lanes), int64(word), int32(source)))


@device
def _sync(lanes: Any) -> None:
    cuda.syncwarp(int32(lanes))


@device
def _lane() -> Any:
    return int64(cuda.laneid)


@device
def _rank_of(lanes: Any, lane: Any) -> Any:
    return _count_bits(lanes & ((_ONE << uint64(lane)) - _ONE))


@device
def _warp_version(memory: Any, lanes: Any) -> Any:
    """The leader's, since sums of others may differ."""
    leader = _lowest_bit(lanes)
    total = _ZERO
    if _lane() == leader:
        total = _version(memory)
    return _shuffle(lanes, total, leader)


@device
def _warp_scan(memory: Any, lanes: Any, order: Any, first: Any, granted: Any, start: Any) -> Any:
    """Each lane looks at one word, from ``first`` on; who finds runs claims them for the lanes that have none yet.

    Returns how many have a block then, and the lane's own ``start``.
    """
    wanted = _count_bits(lanes)
    rank = _rank_of(lanes, _lane())
    num_words = _num_words(memory)
    w = (first + rank) % num_words
    seen = _load_relaxed(memory, _FREE_WORDS + w)
    has_runs = rank < num_words and _runs(seen, order, _is_slab(memory)) != _ZERO
    finders = _lanes_of(cuda.ballot_sync(int32(lanes), has_runs))
    while finders != _ZERO and granted < wanted:
        source = _lowest_bit(finders)
        finders &= finders - _ONE
        starts = _ZERO
        if _lane() == source:
            starts = _claim_runs(memory, w, seen, order, wanted - granted)
        starts = _shuffle(lanes, starts, source)
        its_word = int64(_shuffle(lanes, uint64(w), source))
        count = _count_bits(starts)
        if rank >= granted and rank < granted + count:
            start = (its_word << _shift(memory)) + _bit_of_rank(starts, rank - granted)
        granted += count
    return granted, start


@device
def _warp_search(memory: Any, lanes: Any, order: Any, home: Any) -> Any:
    """Returns each lane's start, or a code."""
    wanted = _count_bits(lanes)
    granted, start = _warp_scan(memory, lanes, order, home, 0, CONTENDED)
    for _ in range(_MAX_PASSES):
        if granted == wanted:
            return start
        proved = _shuffle(lanes, _load_acquire(memory, _HINTS + order), _lowest_bit(lanes))
        _sync(lanes)
        before = _warp_version(memory, lanes)
        _fence_acq_rel()
        _sync(lanes)
        is_proved = proved == before + _ONE
        if not is_proved:
            for i in range(0, _num_words(memory), wanted):
                if granted < wanted:
                    granted, start = _warp_scan(memory, lanes, order, home + i, granted, start)
            if granted == wanted:
                return start
            _fence_acq_rel()
            _sync(lanes)
            is_proved = _warp_version(memory, lanes) == before
            if is_proved and _lane() == _lowest_bit(lanes):
                _store_relaxed(memory, _HINTS + order, before + _ONE)
        if is_proved:
            return start if start >= 0 else _code_of(memory, order)
    return start


@device
def warp_allocate(memory: Any, mask: Any, order: Any, seed: Any) -> Any:
    """Take a block of ``2**order`` granules for each lane; returns the lane's first granule, or a code."""
    if _num_words(memory) == 0:
        return INVALID
    lanes = _lanes_of(mask)
    order = int64(order)
    first = int64(_shuffle(lanes, uint64(_first_word(memory, order, seed)), _lowest_bit(lanes)))
    start = _warp_search(memory, lanes, order, first)
    _sync(lanes)  # what the lane that claimed has acquired holds for all
    if start >= 0 and _rank_of(lanes, _lane()) == _count_bits(lanes) - 1:
        _found_at(memory, order, seed, start)
    return start


@device
def _warp_set_bits(memory: Any, lanes: Any, bitmap: Any, is_limbo: bool, start: Any, count: Any) -> Any:
    """Lanes whose granules share a word take one atomic; returns each lane's code."""
    _sync(lanes)  # what lanes did with their blocks comes before the release
    is_inside = _is_inside(memory, start, count)
    w = int64(-1)
    bits = _ZERO
    if is_inside:
        w = start >> _shift(memory)
        bits = _bits_of(memory, start, count)
    first = int64(-1)  # of the lanes of this word, which together set `all_bits`, `total` if none twice
    all_bits = _ZERO
    total = 0
    rest = lanes
    while rest != _ZERO:
        other = _lowest_bit(rest)
        rest &= rest - _ONE
        its_word = int64(_shuffle(lanes, uint64(w), other))
        its_bits = _shuffle(lanes, bits, other)
        if its_word == w:
            if first < 0:
                first = other
            all_bits |= its_bits
            total += _count_bits(its_bits)
    taken = _ZERO
    if _lane() == first and is_inside:
        taken = _in_limbo(memory, w)
        if is_limbo:
            taken |= _load_relaxed(memory, _FREE_WORDS + w)
        taken |= _fetch_or_release(memory, bitmap + w, all_bits & ~taken)
    taken = _shuffle(lanes, taken, first)
    is_good = is_inside and taken & bits == _ZERO and total == _count_bits(all_bits)
    return 0 if is_good else INVALID


@device
def warp_free(memory: Any, mask: Any, start: Any, count: Any) -> Any:
    """As `free`, for each lane. Where two lanes name a granule, all that name something of its word are told."""
    lanes = _lanes_of(mask)
    start, count = int64(start), int64(count)
    code = _warp_set_bits(memory, lanes, _FREE_WORDS, False, start, count)
    _sync(lanes)
    if _lane() == _lowest_bit(lanes):
        _bump_version(memory, start >> _shift(memory))
    _sync(lanes)  # no lane goes on, and takes a block, before the version has moved
    return code


@device
def warp_retire(memory: Any, mask: Any, start: Any, count: Any) -> Any:
    """As `retire`, for each lane."""
    lanes = _lanes_of(mask)
    epoch = _shuffle(lanes, _load_acquire(memory, _EPOCH), _lowest_bit(lanes))
    return _warp_set_bits(memory, lanes, _limbo_words(memory, epoch), True, int64(start), int64(count))
