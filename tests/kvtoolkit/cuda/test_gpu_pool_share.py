"""The host's share of a pool on a GPU, with kernels that take blocks of the same pool and give them back."""

import numpy as np
import pytest

from allocators import create
from kvtoolkit import CacheConfig, KVCache, get_include

pytestmark = pytest.mark.gpu

SOURCE = r"""
#include <kvt/pool.cuh>

extern "C" __global__ void take(kvt::Word* memory, int* starts, int count) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t < count) starts[t] = kvt::Pool{memory}.allocate(0, t);
}

extern "C" __global__ void give_back(kvt::Word* memory, int* starts, int count) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t < count) starts[t] = kvt::Pool{memory}.free(starts[t], 1);
}
"""


@pytest.fixture(scope="module")
def kernels():
    import cupy

    module = cupy.RawModule(code=SOURCE, options=("-std=c++17", f"-I{get_include()}"))
    return {name: module.get_function(name) for name in ("take", "give_back")}


def run(kernel, pool, starts):
    """Run a kernel on ``starts`` and return what it leaves there."""
    import cupy

    there = cupy.asarray(np.asarray(starts, np.int32))
    kernel((-(-len(there) // 128),), (128,), (pool.memory, there, np.int32(len(there))))
    return there.get()


def make(**fields):
    config = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "num_tokens": 1 << 15, "max_seqs": 64}
    return KVCache(CacheConfig(**{**config, "backend": "cuda", "allocator": "lockfree", "growth": "append", **fields}))


def test_kernels_and_a_cache_take_blocks_of_one_pool_and_nobody_gets_what_another_has(kernels):
    cache, rng, of_kernels = make(), np.random.default_rng(0), []
    pool, (ids, _) = cache.allocator, cache.open([[]] * 48)
    for turn in range(120):
        with cache.begin_step(ids, rng.integers(1, 9, len(ids))) as step:
            cache.end_step(step)
        found = run(kernels["take"], pool, np.zeros(40)).tolist()
        of_kernels += [start for start in found if start >= 0]
        rng.shuffle(of_kernels)
        gone, of_kernels = of_kernels[:30], of_kernels[30:]
        assert not run(kernels["give_back"], pool, gone).any()
        ids_gone = ids[rng.random(len(ids)) < 0.05]
        cache.close(ids_gone)
        ids = np.setdiff1d(ids, ids_gone)
        if len(ids) < 40:
            ids = np.concatenate([ids, cache.open([[]] * 8)[0]])
        assert len(set(of_kernels)) == len(of_kernels)
        assert not pool.held[of_kernels].any()
        if turn % 10 == 0:
            cache.check_integrity()
            assert cache.stats().callers == 8 * len(of_kernels)
    cache.close(ids)
    assert pool.num_free == pool.num_granules - len(of_kernels)


def test_kernels_get_all_that_is_free_once_the_share_is_returned(kernels):
    cache = make(num_tokens=8192)
    ids, _ = cache.open([[]] * 16)
    with cache.begin_step(ids, 8) as step:
        cache.end_step(step)
    pool = cache.allocator
    assert pool.share.num_free > 0
    pool.return_share()
    assert (run(kernels["take"], pool, np.zeros(2048)) >= 0).sum() == 1024 - 16


def test_the_same_steps_get_the_same_blocks():
    tables = []
    for _ in range(2):
        cache, rng, seen = make(), np.random.default_rng(1), []
        ids, _ = cache.open([[]] * 48)
        for _ in range(40):
            with cache.begin_step(ids, rng.integers(1, 20, 48)) as step:
                seen.append(step.block_table.copy())
                cache.end_step(step)
        tables.append(seen)
    assert all(np.array_equal(one, other) for one, other in zip(*tables, strict=True))


def test_what_was_freed_on_one_stream_waits_for_it_before_another_lets_kernels_have_it():
    import torch

    torch.cuda.init()
    pool, ones = create("lockfree", 4096, device=0), np.ones(16, np.int32)
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    pool.give_back(pool.take(ones), ones)  # compiled before the kernel below begins, which is no longer than that
    blocks, ended = pool.take(ones), torch.cuda.Event()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(1 << 28)  # as a kernel that still reads them
        ended.record()
        pool.give_back(blocks, ones)
    assert not ended.query()  # freeing did not wait
    with torch.cuda.stream(other):
        pool.return_share()
    assert ended.query()
