"""Kernels that call `kvtoolkit.numba.pool`, in the simulator or on a GPU; to be imported late, as they import Numba."""

from kvtoolkit.numba import pool
from kvtoolkit.numba.device import cuda, kernel

CALLS = ("allocate", "free", "retire", "lease_allocate", "lease_commit", "hand_over", "lease_abort")
WHOLE_WARP = 0xFFFFFFFF


@kernel
def call(memory, journals, what, first, second, answer):
    """One of `CALLS`, by one thread; leases are of journal 0, inside that of journal 1."""
    answer[0] = 0
    if what == 0:
        answer[0] = pool.allocate(memory, first, second)
    elif what == 1:
        answer[0] = pool.free(memory, first, second)
    elif what == 2:
        answer[0] = pool.retire(memory, first, second)
    elif what == 3:
        answer[0] = pool.lease_allocate(memory, journals[0], first, second)
    elif what == 4:
        pool.lease_commit(memory, journals[0], None, 0, 1)
    elif what == 5:
        pool.lease_commit(memory, journals[0], journals[1], 0, 1)
    elif what == 6:
        pool.lease_abort(memory, journals[0], 0, 1)


@kernel
def take(memory, starts, order, by_warp):
    """A block for each thread; an ``order`` of -1 is the thread's number modulo 4."""
    t = cuda.grid(1)
    mine = order if order >= 0 else t % 4
    is_asking = t < starts.shape[0]
    if by_warp:
        for each in range(4):
            mask = cuda.ballot_sync(WHOLE_WARP, is_asking and mine == each)
            if is_asking and mine == each:
                starts[t] = pool.warp_allocate(memory, mask, each, t // 32)
    elif is_asking:
        starts[t] = pool.allocate(memory, mine, t)


@kernel
def give_back(memory, starts, order, by_warp, to_limbo):
    """What `take` got, each start becomes the code."""
    t = cuda.grid(1)
    size = 1 << (order if order >= 0 else t % 4)
    has_block = t < starts.shape[0] and starts[t] >= 0
    if by_warp:
        mask = cuda.ballot_sync(WHOLE_WARP, has_block)
        if has_block and to_limbo:
            starts[t] = pool.warp_retire(memory, mask, starts[t], size)
        elif has_block:
            starts[t] = pool.warp_free(memory, mask, starts[t], size)
    elif has_block and to_limbo:
        starts[t] = pool.retire(memory, starts[t], size)
    elif has_block:
        starts[t] = pool.free(memory, starts[t], size)


@kernel
def churn(memory, canaries, first_name, rounds, order, by_warp, naps, wrong):
    """Every thread takes and gives back, and has its name in the granules meanwhile.

    With an ``order`` of -1 they are drawn; with others there must be room for all, so that nobody may be refused.
    """
    t = cuda.grid(1)
    name = first_name + t
    draw = name * 2654435761 & 0xFFFFFFFF
    for _ in range(rounds):
        draw = draw * 1664525 + 1013904223 & 0xFFFFFFFF
        mine = order if order >= 0 else draw >> 20 & 3
        start = 0
        if by_warp:
            for each in range(4):
                mask = cuda.ballot_sync(WHOLE_WARP, mine == each)
                if mine == each:
                    start = pool.warp_allocate(memory, mask, each, draw)
        else:
            start = pool.allocate(memory, mine, draw)
        if start >= 0:
            for granule in range(start, start + (1 << mine)):
                if cuda.atomic.exch(canaries, granule, name) != 0:
                    cuda.atomic.add(wrong, 0, 1)
            if naps:
                cuda.nanosleep(draw >> 24 << 8)  # there must be moments in which nobody frees
            for granule in range(start, start + (1 << mine)):
                if cuda.atomic.exch(canaries, granule, 0) != name:
                    cuda.atomic.add(wrong, 0, 1)
        elif start != pool.CONTENDED and (order >= 0 or start < pool.CONTENDED or start > pool.EXHAUSTED):
            cuda.atomic.add(wrong, 0, 1)
        code = 0
        if by_warp:
            mask = cuda.ballot_sync(WHOLE_WARP, start >= 0)
            if start >= 0:
                code = pool.warp_free(memory, mask, start, 1 << mine)
        elif start >= 0:
            code = pool.free(memory, start, 1 << mine)
        if code != 0:
            cuda.atomic.add(wrong, 0, 1)


@kernel
def speculate(memory, journals, is_inner_kept, is_outer_kept, starts):
    """Two nested futures for each CTA, and whether each of them comes."""
    outer, inner = journals[2 * cuda.blockIdx.x], journals[2 * cuda.blockIdx.x + 1]
    t = cuda.grid(1)
    rank, threads = cuda.threadIdx.x, cuda.blockDim.x
    starts[t, 0] = pool.lease_allocate(memory, outer, t % 4, t)
    starts[t, 1] = pool.lease_allocate(memory, inner, 0, t)
    cuda.syncthreads()
    if is_inner_kept:
        pool.lease_commit(memory, inner, outer, rank, threads)
    else:
        pool.lease_abort(memory, inner, rank, threads)
    cuda.syncthreads()
    if is_outer_kept:
        pool.lease_commit(memory, outer, None, rank, threads)
    else:
        pool.lease_abort(memory, outer, rank, threads)


@kernel
def misuse(memory, live, codes):
    """By the lanes of a warp: two free one granule, one a granule of that word, one of another word, one nothing."""
    t = cuda.threadIdx.x
    mask = cuda.ballot_sync(WHOLE_WARP, t < 5)
    if t < 5:
        start = live[0]  # lanes 0 and 1
        if t == 2:
            start = live[1]
        elif t == 3:
            start = live[2]
        elif t == 4:
            start = -1
        codes[t] = pool.warp_free(memory, mask, start, 1)
