"""The lock-free pool for Numba kernels of your own: device functions that take blocks of granules and give them back.

    memory    uint64, `DevicePool.memory` of either layout; it says itself which one
    journal   [num_words] uint64, a row of `DevicePool.journals`
    order     0 to 3: a block of 2**order granules;    start, its first granule
    seed      any number, where to look first: that of the thread, or of the warp
    mask      lanes of one warp that all make the call together; they ask for blocks of the same order

The twin of ``kvt/pool.cuh``, which states the algorithm: the same words, changed in the same steps, so that kernels in
CUDA C++, kernels in Numba and the host may use one pool at the same time. A call that fails returns a negative code.
"""

from typing import Any

from kvtoolkit.numba.atomics import (
    ONE,
    ZERO,
    exchange_acq_rel,
    fence_acq_rel,
    fetch_or_release,
    int64,
    load_acquire,
    load_relaxed,
    store_relaxed,
)
from kvtoolkit.numba.device import device
from kvtoolkit.numba.pool_warp import warp_allocate, warp_free, warp_retire
from kvtoolkit.numba.pool_words import (
    CONTENDED,
    EPOCH,
    EXHAUSTED,
    FRAGMENTED,
    FREE_WORDS,
    HINTS,
    INVALID,
    MAX_PASSES,
    bits_of,
    bump_version,
    claim_runs,
    code_of,
    first_word,
    found_at,
    in_limbo,
    is_run_inside,
    limbo_words,
    lowest_bit,
    num_words_of,
    shift,
    version,
)

__all__ = [
    "CONTENDED", "EXHAUSTED", "FRAGMENTED", "INVALID", "allocate", "free", "lease_abort", "lease_allocate",
    "lease_commit", "retire", "warp_allocate", "warp_free", "warp_retire",
]  # fmt: skip


@device
def _claim(memory: Any, order: Any, w: Any) -> Any:
    start = claim_runs(memory, w, load_relaxed(memory, FREE_WORDS + w), order, 1)
    return (w << shift(memory)) + lowest_bit(start) if start != ZERO else CONTENDED


@device
def _search(memory: Any, order: Any, home: Any) -> Any:
    start = _claim(memory, order, home)
    if start >= 0:
        return start
    num_words = num_words_of(memory)
    for _ in range(MAX_PASSES):
        proved = load_acquire(memory, HINTS + order)
        before = version(memory)
        fence_acq_rel()
        if proved == before + ONE:
            return code_of(memory, order)  # somebody has proved it
        for i in range(num_words):
            start = _claim(memory, order, (home + i) % num_words)
            if start >= 0:
                return start
        fence_acq_rel()
        if version(memory) == before:
            store_relaxed(memory, HINTS + order, before + ONE)
            return code_of(memory, order)
    return CONTENDED


@device
def allocate(memory: Any, order: Any, seed: Any) -> Any:
    """Take one block of ``2**order`` granules; returns its first granule, or a code."""
    if num_words_of(memory) == 0:
        return INVALID
    order = int64(order)
    start = _search(memory, order, first_word(memory, order, seed))
    if start >= 0:
        found_at(memory, order, seed, start)
    return start


@device
def free(memory: Any, start: Any, count: Any) -> Any:
    """Free live granules inside one word, a block or a part of one, that nobody can still read.

    Returns 0, or `INVALID` if some were free already or in limbo; the others have been freed.
    """
    start, count = int64(start), int64(count)
    if not is_run_inside(memory, start, count):
        return INVALID
    w = start >> shift(memory)
    bits = bits_of(memory, start, count)
    taken = in_limbo(memory, w) & bits
    old = fetch_or_release(memory, FREE_WORDS + w, bits & ~taken) & bits
    bump_version(memory, w)
    return 0 if old | taken == ZERO else INVALID


@device
def retire(memory: Any, start: Any, count: Any) -> Any:
    """Free granules that running kernels may still read: they stay in limbo until `DevicePool.complete`."""
    start, count = int64(start), int64(count)
    if not is_run_inside(memory, start, count):
        return INVALID
    w = start >> shift(memory)
    bits = bits_of(memory, start, count)
    taken = (in_limbo(memory, w) | load_relaxed(memory, FREE_WORDS + w)) & bits
    limbo = limbo_words(memory, load_acquire(memory, EPOCH))
    old = fetch_or_release(memory, limbo + w, bits & ~taken) & bits
    return 0 if old | taken == ZERO else INVALID


# -- leases ----------------------------------------------------------------------------------------------------------


@device
def lease_allocate(memory: Any, journal: Any, order: Any, seed: Any) -> Any:
    """Take a block for a future that may not come. Do not free or retire it before the lease has ended."""
    start = allocate(memory, order, seed)
    if start >= 0:
        fetch_or_release(journal, start >> shift(memory), bits_of(memory, start, 1 << int64(order)))
    return start


@device
def lease_commit(memory: Any, journal: Any, around: Any, rank: Any, threads: Any) -> None:
    """Keep the blocks of a lease. They go to the enclosing lease, whose journal is ``around``, unless that is None.

    All threads of a group call it, each with its ``rank`` of ``threads``, after a barrier: none may allocate any more.
    """
    for w in range(int64(rank), num_words_of(memory), int64(threads)):
        bits = exchange_acq_rel(journal, w, ZERO)
        if around is not None:  # noqa: SIM102 - on its own, Numba drops the branch where it is None
            if bits != ZERO:
                fetch_or_release(around, w, bits)


@device
def lease_abort(memory: Any, journal: Any, rank: Any, threads: Any) -> None:
    """Give the blocks of a lease back, called as `lease_commit` is. Nobody may still read them."""
    has_freed = False
    for w in range(int64(rank), num_words_of(memory), int64(threads)):
        if load_relaxed(journal, w) != ZERO:
            bits = exchange_acq_rel(journal, w, ZERO)
            fetch_or_release(memory, FREE_WORDS + w, bits)
            has_freed = True
    if has_freed:
        bump_version(memory, int64(rank))
