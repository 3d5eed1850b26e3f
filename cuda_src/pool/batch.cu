// What the host does with a pool that lies on the device: whole batches, all or nothing.
//
//   starts  [count] int32 first granules;   sizes  [count] int32, granules;   result  [2] int32
//
// kvt_pool_allocate  one warp, so that a batch is placed the same way whenever it meets the same pool. Largest first,
//                    all or none; or, `partial`, in order until one does not fit. result: blocks granted, and a
//                    PoolCode or 0. Sizes are 1, 2, 4 or 8.
// kvt_pool_free      one CTA of 1024. Checks all runs, which may span words, before it frees any. result[0]: the run at
//                    fault, or -1.
// kvt_pool_complete  any grid: what was retired in an epoch is free.
#include <kvt/pool.cuh>

namespace kvt {

// Filled in by kvtoolkit/device_pool.py, in this order.
struct BatchParams {
  Word* memory;
  int* starts;
  const int* sizes;
  int* result;
  int count, partial;
};

// Blocks of one size for the lanes of `mask`, each for the place `index` of the batch; -1 where there is none. Returns
// how many were granted; `code` says why not all, and `home` moves on to where they were found.
__device__ __forceinline__ int grant(
    const BatchParams& p, const Pool& pool, unsigned mask, int index, int order, int& home, int& code) {
  int granted = 0;
  const int lane = threadIdx.x & 31;
  if (mask >> lane & 1) {
    const int start = PoolWarp(pool, mask).allocate_from(order, home);
    p.starts[index] = start >= 0 ? start : -1;
    granted = __popc(__ballot_sync(mask, start >= 0));
    const int last = 31 - __clz(static_cast<int>(mask));
    code = __shfl_sync(mask, start < 0 ? start : 0, last);  // who comes last goes without first
    const int first = __shfl_sync(mask, start, __ffs(static_cast<int>(mask)) - 1);
    if (first >= 0) home = first >> 6;
  }
  const int any = __ffs(static_cast<int>(mask)) - 1;
  home = __shfl_sync(0xFFFFFFFFu, home, any);
  code = __shfl_sync(0xFFFFFFFFu, code, any);
  return __shfl_sync(0xFFFFFFFFu, granted, any);
}

extern "C" __global__ void __launch_bounds__(32) kvt_pool_allocate(const __grid_constant__ BatchParams p) {
  const Pool pool{p.memory};
  const int lane = threadIdx.x;
  for (int i = lane; i < p.count; i += 32) p.starts[i] = -1;
  __syncwarp();
  int granted = 0;
  int code = 0;
  int home = 0;
  if (p.partial) {
    while (granted < p.count && code == 0) {
      const int i = granted + lane;
      const int size = i < p.count ? p.sizes[i] : 0;
      const unsigned alike = __ballot_sync(0xFFFFFFFFu, size == __shfl_sync(0xFFFFFFFFu, size, 0));
      const unsigned mask = alike == 0xFFFFFFFFu ? alike : (1u << (__ffs(static_cast<int>(~alike)) - 1)) - 1;
      const int order = __ffs(__shfl_sync(0xFFFFFFFFu, size, 0)) - 1;
      granted += grant(p, pool, mask, i, order, home, code);
    }
  } else {
    for (int order = 3; order >= 0; --order) {
      for (int first = 0; first < p.count && code == 0; first += 32) {
        const int i = first + lane;
        const unsigned mask = __ballot_sync(0xFFFFFFFFu, i < p.count && p.sizes[i] == 1 << order);
        if (mask != 0) granted += grant(p, pool, mask, i, order, home, code);
      }
    }
    if (code != 0) {
      __syncwarp();
      for (int i = lane; i < p.count; i += 32) {
        if (p.starts[i] < 0) continue;
        pool.free(p.starts[i], p.sizes[i]);
        p.starts[i] = -1;
      }
      granted = 0;
    }
  }
  if (lane == 0) p.result[0] = granted, p.result[1] = code;
}

// For the part of a run that lies in each word: use(word, bits).
template <typename Use>
__device__ __forceinline__ void for_each_word(int start, int size, Use use) {
  for (int granule = start; granule < start + size;) {
    const int count = min(64 - (granule & 63), start + size - granule);
    use(granule >> 6, Pool::bits_of(granule, count));
    granule += count;
  }
}

extern "C" __global__ void __launch_bounds__(1024) kvt_pool_free(const __grid_constant__ BatchParams p) {
  __shared__ int at_fault;
  const Pool pool{p.memory};
  Word* const marks = pool.marks();  // all zero between calls, which follow one another
  if (threadIdx.x == 0) at_fault = p.count;
  __syncthreads();
  for (int i = threadIdx.x; i < p.count; i += 1024) {
    const int start = p.starts[i];
    const int size = p.sizes[i];
    bool is_good = start >= 0 && size >= 1 && size <= pool.num_granules() - start;
    if (is_good) {
      for_each_word(start, size, [&](int w, Word bits) {
        const Word marked = atomicOr(marks + w, bits);
        is_good = is_good && ((marked | load_relaxed(pool.free_words() + w)) & bits) == 0;
        for (int epoch = 0; epoch < kEpochs; ++epoch) {
          is_good = is_good && (load_relaxed(pool.limbo_words(epoch) + w) & bits) == 0;
        }
      });
    }
    if (!is_good) atomicMin(&at_fault, i);
  }
  __syncthreads();
  const bool is_good = at_fault == p.count;
  for (int i = threadIdx.x; i < p.count; i += 1024) {
    const int start = p.starts[i];
    const int size = p.sizes[i];
    if (start < 0 || size < 1 || size > pool.num_granules() - start) continue;
    for_each_word(start, size, [&](int w, Word bits) {
      if (is_good) fetch_or_release(pool.free_words() + w, bits);
      atomicAnd(marks + w, ~bits);
    });
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (is_good) pool.bump_version(0);
    p.result[0] = is_good ? -1 : at_fault;
  }
}

extern "C" __global__ void __launch_bounds__(256) kvt_pool_complete(const __grid_constant__ BatchParams p) {
  const Pool pool{p.memory};
  pool.free_all(pool.limbo_words(static_cast<Word>(p.count)), blockIdx.x * 256 + threadIdx.x, gridDim.x * 256);
}

}  // namespace kvt
