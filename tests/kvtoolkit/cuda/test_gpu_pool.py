"""Kernels that take blocks from a pool on the GPU: by any number of threads, at any load, and what is left behind."""

import numpy as np
import pytest

from allocators import EpochPool, InvalidFreeError, OutOfBlocksError, create
from allocators.testing import run_conformance
from allocators.testing.history import Event, check_history
from kvtoolkit import DevicePool, StepError, get_include

pytestmark = pytest.mark.gpu

SOURCE = r"""
#include <kvt/pool.cuh>
using Pool = kvt::KVT_POOL;
using kvt::PoolWarp;
using kvt::Word;

__device__ long long now() {
  long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// how: 0 each on its own, else the lanes that ask for one order together
__device__ int take(const Pool& pool, int order, int how, unsigned seed) {
  if (how == 0) return pool.allocate(order, seed);
  const unsigned mask = __match_any_sync(__activemask(), order);
  return PoolWarp(pool, mask).allocate(order, seed);
}

// lanes: who asks; how: 0 each on its own, 1 the warp together, 2 orders that differ from lane to lane; plus 16 times
// the order
extern "C" __global__ void take_once(Word* memory, int* starts, int count, unsigned lanes, int how) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  const Pool pool{memory};
  const bool asks = t < count && (lanes >> (t & 31) & 1);
  const int order = how >> 4 & 3;
  if (t < count) starts[t] = -9;
  if (asks) starts[t] = take(pool, (how & 15) == 2 ? t % 4 : order, how & 15, how & 1 ? t >> 5 : t);
}

extern "C" __global__ void give_back(Word* memory, int* starts, int count, int how) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  const Pool pool{memory};
  const int order = (how & 15) == 2 ? t % 4 : how >> 4 & 3;
  if (t < count && starts[t] >= 0) {
    starts[t] = how & 1 ? PoolWarp(pool, __activemask()).free(starts[t], 1 << order) : pool.free(starts[t], 1 << order);
  }
}

// Every thread takes and gives back, writing its name into the granules meanwhile. events [threads][rounds][5]: what it
// got, when it asked and was answered, when it gave it back and was answered; ns.
extern "C" __global__ void churn(
    Word* memory, unsigned* canaries, int rounds, int how, int* wrong, long long* events, int num_granules) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  const Pool pool{memory};
  unsigned draw = t * 2654435761u + 1;
  for (int i = 0; i < rounds; ++i) {
    draw = draw * 1664525u + 1013904223u;
    const int order = (how & 15) == 2 ? draw >> 20 & 3 : how >> 4 & 3;
    const long long begin = now();
    const int start = take(pool, order, how & 15, draw);
    const long long end = now();
    if (events != nullptr) {
      long long* const event = events + (static_cast<long long>(t) * rounds + i) * 5;
      event[0] = start, event[1] = begin, event[2] = end;
    }
    if (start >= 0) {
      for (int g = start; g < start + (1 << order); ++g) {
        if (g >= num_granules || canaries[g] != 0) atomicAdd(wrong, 1);
        canaries[g] = t + 1;
      }
      __nanosleep(draw >> 20 << 8);  // up to 1 ms: there must be moments in which nobody frees
      for (int g = start; g < start + (1 << order); ++g) {
        if (canaries[g] != t + 1) atomicAdd(wrong, 1);
        canaries[g] = 0;
      }
      const long long freed = now();
      if (pool.free(start, 1 << order) != 0) atomicAdd(wrong, 1);
      if (events != nullptr) {
        long long* const event = events + (static_cast<long long>(t) * rounds + i) * 5;
        event[3] = freed, event[4] = now();
      }
    } else if (start < kvt::kContended || start > kvt::kExhausted) {
      atomicAdd(wrong, 1);
    }
  }
}

// Two nested futures for each CTA: the inner one comes if `inner`, the outer one if `outer`.
extern "C" __global__ void speculate(Word* memory, Word* journals, int inner, int outer, int* starts) {
  const Pool pool{memory};
  Word* const journal = journals + 2 * static_cast<long long>(blockIdx.x) * pool.num_words();
  const kvt::PoolLease first{pool, journal};
  const kvt::PoolLease second{pool, journal + pool.num_words()};
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  starts[2 * t] = first.allocate(t % 4, t);
  starts[2 * t + 1] = second.allocate(0, t);
  __syncthreads();
  if (inner) second.commit(first.journal, threadIdx.x, blockDim.x); else second.abort(threadIdx.x, blockDim.x);
  __syncthreads();
  if (outer) first.commit(nullptr, threadIdx.x, blockDim.x); else first.abort(threadIdx.x, blockDim.x);
}

extern "C" __global__ void retire(Word* memory, int* starts, int count, int how) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  const Pool pool{memory};
  if (t < count) starts[t] = how ? PoolWarp(pool, __activemask()).retire(starts[t], 1) : pool.retire(starts[t], 1);
}

extern "C" __global__ void misuse(Word* memory, int live, int* codes) {
  const Pool pool{memory};
  const int starts[] = {live, live, -1, pool.num_granules() - 1, Pool::kGranules - 4, pool.num_granules() + 64, live};
  const int sizes[] = {0, 65, 1, 2, 8, 1, 1};
  const int t = threadIdx.x;
  if (t < 7) codes[t] = pool.free(starts[t], sizes[t]);
  __syncwarp();
  if (t < 2) codes[7 + t] = pool.free(live, 1);                            // free already
  if (t < 2) codes[9 + t] = PoolWarp(pool, 3).free(live + 1, 1);            // live, by two lanes at once
}

extern "C" __global__ void other_layout(Word* memory, int* codes) {
  const kvt::KVT_OTHER pool{memory};
  codes[threadIdx.x] = threadIdx.x < 16 ? pool.allocate(0, threadIdx.x) : pool.free(threadIdx.x, 1);
  codes[32 + threadIdx.x] = PoolWarp(pool, 0xFFFFFFFFu).allocate(threadIdx.x & 3, 0);
}
"""


LAYOUTS = ("buddy", "slab")


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def kernels(layout):
    import cupy

    pools = ("Pool", "SlabPool") if layout == "buddy" else ("SlabPool", "Pool")
    options = ("-std=c++17", f"-I{get_include()}", f"-DKVT_POOL={pools[0]}", f"-DKVT_OTHER={pools[1]}")
    return cupy.RawModule(code=SOURCE, options=options)


def launch(kernels, name, count, *arguments, threads=256):
    kernels.get_function(name)(((count + threads - 1) // threads,), (min(threads, count),), arguments)


def free_granules(pool):
    """``[num_granules]``: whether each is free, or held back in a slab."""
    bits = np.unpackbits(pool._free_words().view(np.uint8), bitorder="little").reshape(-1, 64)
    return bits[:, : pool._word].reshape(-1)[: pool.num_granules].astype(bool)


def orders_of(pool):
    """``[num_words]``: which order each slab serves."""
    return pool._free_words() >> np.uint64(32) & np.uint64(3) if pool.layout == "slab" else 0


def set_free(pool, keep, rng):
    """Leave a share of the pool free, in slabs by whole blocks of the order that each serves."""
    if pool.layout == "buddy":
        pool._reset(pool._words_with(rng.random(pool.num_granules) < keep))
        return
    orders = rng.integers(0, 4, pool.num_words)
    slots = np.arange(pool.num_words * 32).reshape(-1, 32) >> orders[:, None] << orders[:, None]
    free = rng.random(pool.num_words * 32)[slots].reshape(-1)[: pool.num_granules] < keep
    pool._reset(pool._words_with(free, orders))


def test_a_pool_on_the_device_keeps_the_promises_of_every_allocator(layout):
    run_conformance(lambda: create("lockfree", 128, layout=layout, device=0), max_examples=12, num_steps=25)
    run_conformance(lambda: DevicePool(72, block_sizes=(8, 64), layout=layout), max_examples=8, num_steps=25)
    run_conformance(lambda: EpochPool(DevicePool(64, layout=layout)), max_examples=6, num_steps=25)


LANES = {"all": 0xFFFFFFFF, "some": 0x5A3C90F1, "one": 0x00010000}


@pytest.mark.parametrize("threads", [1, 32, 1000, 32768, 1 << 20])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("how", [0, 1, 2], ids=["alone", "warp", "mixed"])
def test_blocks_are_disjoint_and_exhaustion_is_exact(kernels, layout, threads, lanes, how):
    import cupy

    rng = np.random.default_rng(threads)
    num_granules = 1 << 20 if threads > 1000 else 4096
    for order in (0, 1, 3) if how != 2 else (0,):
        for load in ("empty", "half", "nearly full", "full"):
            pool = DevicePool(num_granules, layout=layout)
            fresh = pool.snapshot()
            set_free(pool, {"empty": 1.0, "half": 0.5, "nearly full": 0.01, "full": 0.0}[load], rng)
            before = free_granules(pool)
            starts = cupy.empty(threads, cupy.int32)
            code = how | order << 4
            launch(
                kernels,
                "take_once",
                threads,
                pool.memory,
                starts,
                np.int32(threads),
                np.uint32(LANES[lanes]),
                np.int32(code),
            )
            found, after = starts.get(), free_granules(pool)
            asked = np.array([LANES[lanes] >> (t & 31) & 1 for t in range(32)], bool)[np.arange(threads) % 32]
            orders = np.arange(threads) % 4 if how == 2 else np.full(threads, order)
            assert (found[~asked] == -9).all()
            got = asked & (found >= 0)
            taken = np.zeros(num_granules, np.int32)
            for k in range(4):
                mine = found[got & (orders == k)]
                assert (mine % (1 << k) == 0).all()
                for i in range(1 << k):
                    np.add.at(taken, mine + i, 1)
            assert taken.max(initial=0) <= 1
            # what is gone from the words is what was granted
            assert np.array_equal(before & ~after, taken)
            assert not (after & ~before).any()
            refused = asked & ~got
            assert np.isin(found[refused], [-2, -3]).all()  # nobody frees, so nothing is contended
            assert ((found[refused] == -2) == ((orders[refused] == 0) & (layout == "buddy"))).all()
            for k in np.unique(orders[refused]):
                assert pool.stats().free_blocks[8 << k] == 0
            if layout == "slab":  # nobody got another order than his slab's
                assert (orders_of(pool)[found[got] // 32] == orders[got]).all()
            pool._reset(pool._words_with(after | ~before, orders_of(pool)))  # what was not granted by kernels is free
            launch(kernels, "give_back", threads, pool.memory, starts, np.int32(threads), np.int32(code))
            assert (starts.get()[got] == 0).all()
            assert pool.snapshot() == fresh
            pool.check_integrity()


@pytest.mark.parametrize("how", [0, 1, 2, 0x31, 0x10], ids=["alone", "warp", "mixed", "warp of 64s", "alone in pairs"])
@pytest.mark.parametrize("num_granules", [64, 4096, 1 << 17])
def test_live_blocks_are_nobody_elses(kernels, layout, how, num_granules):
    import cupy

    pool = DevicePool(num_granules, layout=layout)
    fresh = pool.snapshot()
    canaries, wrong = cupy.zeros(num_granules, cupy.uint32), cupy.zeros(1, cupy.int32)
    for threads in (33, 2048, 1 << 15):
        rounds = 40 if threads < 1 << 15 else 8
        launch(
            kernels, "churn", threads, pool.memory, canaries, np.int32(rounds), np.int32(how), wrong,
            np.intp(0), np.int32(num_granules),
        )  # fmt: skip
        assert int(wrong[0]) == 0
        assert pool.snapshot() == fresh


@pytest.mark.parametrize("how", [0, 1], ids=["alone", "warp"])
@pytest.mark.parametrize("order", [0, 2])
def test_recorded_histories_hold_no_overlap_and_no_false_exhaustion(kernels, layout, order, how):
    import cupy

    num_granules, threads, rounds = 256, 1024, 8
    pool = DevicePool(num_granules, layout=layout)
    canaries, wrong = cupy.zeros(num_granules, cupy.uint32), cupy.zeros(1, cupy.int32)
    recorded = cupy.zeros((threads, rounds, 5), cupy.int64)
    for _ in range(20):  # until somebody is refused: while others keep freeing, most are told of contention
        launch(
            kernels, "churn", threads, pool.memory, canaries, np.int32(rounds), np.int32(order << 4 | how), wrong,
            recorded, np.int32(num_granules), threads=32,
        )  # fmt: skip
        assert int(wrong[0]) == 0
        found = recorded.get()
        if np.isin(found[..., 0], [-2, -3]).any():
            break
    ticks = np.unique(found[..., 1:3])
    tick = int(np.diff(ticks).min())  # the clock's resolution, by which every interval is widened
    events, refusals = [], 0
    for t in range(threads):
        for start, begin, end, freed, gone in found[t].tolist():
            if start >= 0:
                run = ((start, 1 << order),)
                events.append(Event(t, "grant", run, begin - tick, end + tick))
                events.append(Event(t, "free", run, freed - tick, gone + tick))
            elif start != -4:
                refusals += 1
                events.append(Event(t, "grant", (), begin - tick, end + tick, missing=1))
    assert refusals > 0
    check_history(events, block=1 << order if order == 0 else None, capacity=num_granules)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_leases_nest_and_abort_returns_the_pool_to_the_bit(kernels, layout, inner, outer):
    import cupy

    pool = DevicePool(4096, layout=layout)
    fresh = pool.snapshot()
    journals = pool.journals(8 * 2)
    starts = cupy.empty((8 * 64, 2), cupy.int32)
    launch(kernels, "speculate", 8 * 64, pool.memory, journals, np.int32(inner), np.int32(outer), starts, threads=64)
    assert not journals.get().any()
    found = starts.get()
    assert (found >= 0).all()
    if not outer:
        assert pool.snapshot() == fresh
        return
    kept = np.zeros(4096, bool)
    for t, (first, second) in enumerate(found.tolist()):
        kept[first : first + (1 << t % 4)] = True
        if inner:
            kept[second] = True
    assert np.array_equal(~free_granules(pool), kept)


@pytest.mark.parametrize("how", [0, 1], ids=["alone", "warp"])
def test_retired_blocks_wait_for_their_epoch(kernels, layout, how):
    import cupy

    pool = DevicePool(256, layout=layout)
    starts = cupy.asarray(pool.allocate(np.ones(256, int)))
    first = starts[:100].copy()
    launch(kernels, "retire", 100, pool.memory, first, np.int32(100), np.int32(how))
    assert not first.get().any()
    assert pool.advance() == 1
    second = starts[100:150].copy()
    launch(kernels, "retire", 50, pool.memory, second, np.int32(50), np.int32(how))
    assert (pool.num_free, pool.num_in_limbo) == (0, 150)
    pool.check_integrity()
    with pytest.raises(OutOfBlocksError):
        pool.allocate([1])
    with pytest.raises(InvalidFreeError, match="is free already"):
        pool.free([int(starts[0])], [1])
    again = starts[:1].copy()  # twice is once too often
    launch(kernels, "retire", 1, pool.memory, again, np.int32(1), np.int32(how))
    assert int(again[0]) == -5
    again[0] = starts[0]
    launch(kernels, "give_back", 1, pool.memory, again, np.int32(1), np.int32(how))
    assert int(again[0]) == -5
    pool.restore(pool.snapshot())  # limbo is part of the state
    pool.complete(0)
    assert pool.num_free == 100
    pool.complete(1)
    assert pool.num_free == 150
    with pytest.raises(StepError, match="expected one of the last 4"):
        pool.complete(2)


def test_an_epoch_does_not_begin_on_the_limbo_of_an_old_one(kernels, layout):
    import cupy

    pool = DevicePool(64, layout=layout)
    starts = cupy.asarray(pool.allocate([1]))
    launch(kernels, "retire", 1, pool.memory, starts, np.int32(1), np.int32(0))
    for _ in range(3):
        pool.advance()
    with pytest.raises(StepError, match="expected epoch 0 to be complete"):
        pool.advance()
    pool.complete(0)
    assert pool.advance() == 4


def test_misuse_is_told(kernels, layout):
    import cupy

    pool = DevicePool(128, layout=layout)
    (live,) = pool.allocate([2])
    codes = cupy.empty(11, cupy.int32)
    launch(kernels, "misuse", 32, pool.memory, np.int32(live), codes)
    found = codes.get().tolist()
    assert found[:6] == [-5] * 6
    assert found[6] == 0
    assert found[7:9] == [-5, -5]
    assert found[9:] == [-5, -5]
    assert pool.num_free == 128


def test_a_pool_of_the_other_layout_refuses_and_stays_as_it_is(kernels, layout):
    import cupy

    pool = DevicePool(4096, layout=layout)
    fresh = pool.snapshot()
    codes = cupy.empty(64, cupy.int32)
    launch(kernels, "other_layout", 32, pool.memory, codes)
    assert (codes.get() == -5).all()
    assert pool.snapshot() == fresh


def test_kernels_that_take_blocks_can_be_captured_and_replayed(kernels, layout):
    import cupy

    pool = DevicePool(4096, layout=layout)
    starts = cupy.empty(256, cupy.int32)
    stream = cupy.cuda.Stream(non_blocking=True)
    arguments = (pool.memory, starts, np.int32(256), np.uint32(0xFFFFFFFF), np.int32(1))
    with stream:
        launch(kernels, "take_once", 256, *arguments)
        stream.begin_capture()
        launch(kernels, "take_once", 256, *arguments)
        graph = stream.end_capture()
        seen = set(starts.get().tolist())
        for _ in range(5):
            graph.launch()
            new = set(starts.get().tolist())
            assert len(new) == 256
            assert not new & seen
            seen |= new
    assert pool.num_free == 4096 - 6 * 256
