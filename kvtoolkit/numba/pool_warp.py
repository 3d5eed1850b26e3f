"""The calls of the lock-free pool that the lanes of a warp make together; see `kvtoolkit.numba.pool`.

``lanes`` is the mask as a word. Numba's simulator has no shuffles and ballots, so only a GPU can run these calls.
"""

from typing import Any

from kvtoolkit.numba.atomics import (
    LOW_HALF,
    ONE,
    ZERO,
    fence_acq_rel,
    fetch_or_release,
    int32,
    int64,
    load_acquire,
    load_relaxed,
    store_relaxed,
    uint64,
)
from kvtoolkit.numba.device import cuda, device
from kvtoolkit.numba.pool_words import (
    CONTENDED,
    EPOCH,
    FREE_WORDS,
    HINTS,
    INVALID,
    MAX_PASSES,
    bit_of_rank,
    bits_of,
    bump_version,
    claim_runs,
    code_of,
    count_bits,
    first_word,
    found_at,
    in_limbo,
    is_run_inside,
    is_slab_pool,
    limbo_words,
    lowest_bit,
    num_words_of,
    runs_in,
    shift,
    version,
)


@device
def _lanes_of(mask: Any) -> Any:
    return uint64(int64(mask)) & LOW_HALF  # ballots are int32


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
    return count_bits(lanes & ((ONE << uint64(lane)) - ONE))


@device
def _warp_version(memory: Any, lanes: Any) -> Any:
    """The version as the leader sums it up; other lanes may get other sums."""
    leader = lowest_bit(lanes)
    total = ZERO
    if _lane() == leader:
        total = version(memory)
    return _shuffle(lanes, total, leader)


@device
def _warp_scan(memory: Any, lanes: Any, order: Any, first: Any, granted: Any, start: Any) -> Any:
    """Let each lane look at one word, from ``first`` on; a lane that finds runs claims them for lanes without a block.

    Returns how many lanes have a block now, and the lane's own ``start``.
    """
    wanted = count_bits(lanes)
    rank = _rank_of(lanes, _lane())
    num_words = num_words_of(memory)
    w = (first + rank) % num_words
    seen = load_relaxed(memory, FREE_WORDS + w)
    has_runs = rank < num_words and runs_in(seen, order, is_slab_pool(memory)) != ZERO
    finders = _lanes_of(cuda.ballot_sync(int32(lanes), has_runs))
    while finders != ZERO and granted < wanted:
        source = lowest_bit(finders)
        finders &= finders - ONE
        starts = ZERO
        if _lane() == source:
            starts = claim_runs(memory, w, seen, order, wanted - granted)
        starts = _shuffle(lanes, starts, source)
        its_word = int64(_shuffle(lanes, uint64(w), source))
        count = count_bits(starts)
        if rank >= granted and rank < granted + count:
            start = (its_word << shift(memory)) + bit_of_rank(starts, rank - granted)
        granted += count
    return granted, start


@device
def _warp_search(memory: Any, lanes: Any, order: Any, home: Any) -> Any:
    """Returns each lane's start, or a code."""
    wanted = count_bits(lanes)
    granted, start = _warp_scan(memory, lanes, order, home, 0, CONTENDED)
    for _ in range(MAX_PASSES):
        if granted == wanted:
            return start
        proved = _shuffle(lanes, load_acquire(memory, HINTS + order), lowest_bit(lanes))
        _sync(lanes)
        before = _warp_version(memory, lanes)
        fence_acq_rel()
        _sync(lanes)
        is_proved = proved == before + ONE
        if not is_proved:
            for i in range(0, num_words_of(memory), wanted):
                if granted < wanted:
                    granted, start = _warp_scan(memory, lanes, order, home + i, granted, start)
            if granted == wanted:
                return start
            fence_acq_rel()
            _sync(lanes)
            is_proved = _warp_version(memory, lanes) == before
            if is_proved and _lane() == lowest_bit(lanes):
                store_relaxed(memory, HINTS + order, before + ONE)
        if is_proved:
            return start if start >= 0 else code_of(memory, order)
    return start


@device
def warp_allocate(memory: Any, mask: Any, order: Any, seed: Any) -> Any:
    """Take a block of ``2**order`` granules for each lane; returns the lane's first granule, or a code."""
    if num_words_of(memory) == 0:
        return INVALID
    lanes = _lanes_of(mask)
    order = int64(order)
    first = int64(_shuffle(lanes, uint64(first_word(memory, order, seed)), lowest_bit(lanes)))
    start = _warp_search(memory, lanes, order, first)
    _sync(lanes)  # so that all lanes see what the claiming lane has acquired
    if start >= 0 and _rank_of(lanes, _lane()) == count_bits(lanes) - 1:
        found_at(memory, order, seed, start)
    return start


@device
def _warp_set_bits(memory: Any, lanes: Any, bitmap: Any, is_limbo: bool, start: Any, count: Any) -> Any:
    """Set bits with one atomic for all lanes whose granules share a word; returns each lane's code."""
    _sync(lanes)  # what lanes did with their blocks must come before the release
    is_inside = is_run_inside(memory, start, count)
    w = int64(-1)
    bits = ZERO
    if is_inside:
        w = start >> shift(memory)
        bits = bits_of(memory, start, count)
    first = int64(-1)  # first lane of this word; its lanes set `all_bits`, `total` of them if no bit twice
    all_bits = ZERO
    total = 0
    rest = lanes
    while rest != ZERO:
        other = lowest_bit(rest)
        rest &= rest - ONE
        its_word = int64(_shuffle(lanes, uint64(w), other))
        its_bits = _shuffle(lanes, bits, other)
        if its_word == w:
            if first < 0:
                first = other
            all_bits |= its_bits
            total += count_bits(its_bits)
    taken = ZERO
    if _lane() == first and is_inside:
        taken = in_limbo(memory, w)
        if is_limbo:
            taken |= load_relaxed(memory, FREE_WORDS + w)
        taken |= fetch_or_release(memory, bitmap + w, all_bits & ~taken)
    taken = _shuffle(lanes, taken, first)
    is_good = is_inside and taken & bits == ZERO and total == count_bits(all_bits)
    return 0 if is_good else INVALID


@device
def warp_free(memory: Any, mask: Any, start: Any, count: Any) -> Any:
    """`free` for each lane. If two lanes name the same granule, all lanes that free in its word get `INVALID`."""
    lanes = _lanes_of(mask)
    start, count = int64(start), int64(count)
    code = _warp_set_bits(memory, lanes, FREE_WORDS, False, start, count)
    _sync(lanes)
    if _lane() == lowest_bit(lanes):
        bump_version(memory, start >> shift(memory))
    _sync(lanes)  # no lane may go on, and perhaps allocate, before the version has changed
    return code


@device
def warp_retire(memory: Any, mask: Any, start: Any, count: Any) -> Any:
    """`retire` for each lane."""
    lanes = _lanes_of(mask)
    epoch = _shuffle(lanes, load_acquire(memory, EPOCH), lowest_bit(lanes))
    return _warp_set_bits(memory, lanes, limbo_words(memory, epoch), True, int64(start), int64(count))
