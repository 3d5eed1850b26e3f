"""Kernels of your own take blocks from the pool of a live cache, while they run: `python -m examples.in_kernel_alloc`.

The cache holds sequences and goes on decoding. Between its steps a CuPy kernel drafts: each CTA takes a granule for a
beam, writes keys beside the cache's own, and keeps the beam or gives it up by a lease; nobody asks the host. A Numba
kernel gives the kept ones back. What the sequences hold is the same before and after.
"""

import sys
import warnings

import numpy as np

from kvtoolkit import CacheConfig, KVCache, UnsupportedError, get_include

NUM_HEADS, HEAD_DIM, NUM_BEAMS = 2, 64, 100

SOURCE = r"""
// Each CTA drafts 8 tokens in a granule of its own. Grid beams, CTA head_dim threads.
//
//   memory   of the pool;   journals [beams, num_words] uint64 zeros
//   keys     [num_granules, num_heads, 8, head_dim] uint16
//   starts   [beams] int32: the granule of a beam that is kept, -1 of one that is not, or a kvt::PoolCode
#include <kvt/pool.cuh>

extern "C" __global__ void draft(
    kvt::Word* memory, kvt::Word* journals, unsigned short* keys, int num_heads, int* starts) {
  __shared__ int start;
  const int beam = blockIdx.x;
  const kvt::Pool pool{memory};
  const kvt::PoolLease lease{pool, journals + beam * static_cast<long long>(pool.num_words())};
  if (threadIdx.x == 0) start = lease.allocate(/*order: one granule*/ 0, /*where to begin looking*/ beam);
  __syncthreads();
  if (start < 0) {  // no memory is an answer, not a wait: kvt::kExhausted or kvt::kContended
    if (threadIdx.x == 0) starts[beam] = start;
    return;
  }
  unsigned short* const mine = keys + static_cast<long long>(start) * num_heads * 8 * blockDim.x;
  for (int row = 0; row < num_heads * 8; ++row) mine[row * blockDim.x + threadIdx.x] = beam;
  __syncthreads();  // nobody reads or writes the granule any more when the lease ends
  const bool is_kept = beam % 3 == 0;
  if (is_kept) lease.commit(nullptr, threadIdx.x, blockDim.x);
  else lease.abort(threadIdx.x, blockDim.x);
  if (threadIdx.x == 0) starts[beam] = is_kept ? start : -1;
}
"""


def decode(cache: KVCache, seq_ids: np.ndarray, keys) -> None:
    """One token more for each sequence; ``keys`` [num_seqs, num_heads, head_dim]."""
    with cache.begin_step(seq_ids, 1) as step:
        step.append(0, keys, keys)
        cache.end_step(step)


def numba_kernel():
    """Frees the granules that are named, and counts the refusals: ``[grid, CTA](memory, starts, refused)``."""
    from numba import cuda

    from kvtoolkit.numba import pool

    @cuda.jit
    def give_back(memory, starts, refused):
        t = cuda.grid(1)
        if t < starts.size and starts[t] >= 0:
            code = pool.free(memory, starts[t], 1)
            if code != 0:
                cuda.atomic.add(refused, 0, 1)
            starts[t] = pool.allocate(memory, 1, t)  # and a pair of granules instead
            if starts[t] >= 0 and pool.free(memory, starts[t], 2) != 0:
                cuda.atomic.add(refused, 0, 1)

    return give_back


def main() -> int:
    config = CacheConfig(
        num_layers=1, num_kv_heads=NUM_HEADS, head_dim=HEAD_DIM, num_tokens=8192, backend="cuda", allocator="lockfree"
    )
    try:
        cache = KVCache(config)
    except UnsupportedError as error:
        print(f"in_kernel_alloc needs a CUDA device: {error}", file=sys.stderr)
        return 1
    import cupy

    pool = cache.allocator  # a DevicePool: its state is on the GPU
    seq_ids, _ = cache.open([[]] * 8)
    random = np.random.default_rng(0).standard_normal((60, 8, NUM_HEADS, HEAD_DIM)).astype(np.float16)
    for keys in cupy.asarray(random[:50]):
        decode(cache, seq_ids, keys)
    before = cache.key_cache(0).get()
    with cache.begin_step(seq_ids, 0) as step:
        held = [table[table >= 0] & 0xFFFFFF for table in step.block_table]
    num_free = pool.num_free
    print(f"8 sequences of 50 tokens, {num_free} of {pool.num_granules} granules free")

    draft = cupy.RawKernel(SOURCE, "draft", options=("-std=c++17", f"-I{get_include()}"))
    journals, starts = pool.journals(NUM_BEAMS), cupy.empty(NUM_BEAMS, cupy.int32)
    arguments = (pool.memory, journals, cache.key_cache(0), np.int32(NUM_HEADS), starts)
    draft((NUM_BEAMS,), (HEAD_DIM,), arguments)
    kept = starts.get()
    kept = kept[kept >= 0]
    print(f"{NUM_BEAMS} beams drafted by a CuPy kernel, {len(kept)} kept: {pool.num_free} granules free")
    is_right = len(set(kept.tolist())) == len(kept) == num_free - pool.num_free
    drafted = cache.key_cache(0)[cupy.asarray(kept)].view(cupy.uint16)
    is_right &= bool((drafted == 3 * cupy.arange(len(kept))[:, None, None, None]).all())

    for keys in cupy.asarray(random[50:]):
        decode(cache, seq_ids, keys)  # the cache goes on, on granules that no beam has
    cache.check_integrity()

    refused = cupy.zeros(1, cupy.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Numba warns of a grid of one CTA, and of NumPy
        numba_kernel()[1, 128](pool.memory, starts, refused)
    print(f"given back by a Numba kernel: {pool.num_free} granules free, {int(refused[0])} refused")
    after = cache.key_cache(0).get()
    first = np.concatenate(held)  # the first granule of every block that the sequences held
    is_right &= int(refused[0]) == 0 and np.array_equal(before[first, :, :2], after[first, :, :2])
    cache.close(seq_ids)
    is_right &= pool.num_free + cache.stats().cached // 8 + cache.stats().kept_back // 8 == pool.num_granules
    print("the sequences hold what they held" if is_right else "something is wrong")
    return int(not is_right)


if __name__ == "__main__":
    sys.exit(main())
