// What the host does with a pool on the device: whole batches, all or nothing.
//
//   starts  [count] int32 first granules;   sizes  [count] int32, granules;   result  [2] int32
//
// kvt_pool_allocate  one warp, so that the same batch on the same pool is always placed the same way. All or none,
//                    largest first; or, if `partial`, in order until one does not fit. Sizes are 1, 2, 4 or 8.
//                    result: the number of blocks granted, and 0 or a PoolCode.
// kvt_pool_free      one CTA of 1024. Checks all runs, which may span words, before it frees any. result[0]: the index
//                    of a bad run, or -1.
// kvt_pool_complete  any grid. Frees what was retired in an epoch.
//
// Macro: KVT_SLAB, 1 = slab layout. Slabs that already serve an order are filled before others are opened.
#include <kvt/pool.cuh>

namespace kvt {

#if KVT_SLAB
using BatchPool = SlabPool;
#else
using BatchPool = Pool;
#endif

// Packed by kvtoolkit/cuda/pool.py, field by field in this order.
struct BatchParams {
  Word* memory;
  int* starts;
  const int* sizes;
  int* result;
  int count, partial;
};

// Take blocks of one size for the lanes of `mask`. A lane's block is for place `index` of the batch; -1 is stored there
// if there is none. Returns how many were granted. `code` is set to the reason if not all were, and `home` to the word
// where blocks were found.
__device__ __forceinline__ int grant(
    const BatchParams& p, const BatchPool& pool, unsigned mask, int index, int order, int& home, int& code) {
  int start = 0;  // for lanes outside the mask
  const bool is_asking = mask >> threadIdx.x & 1;
  if (is_asking && BatchPool::Layout::kIsSlab) start = PoolWarp(pool, mask).allocate_opened(order);
  const unsigned rest = BatchPool::Layout::kIsSlab ? __ballot_sync(0xFFFFFFFFu, start < 0) : mask;
  if (rest >> threadIdx.x & 1) start = PoolWarp(pool, rest).allocate_from(order, home);
  __syncwarp();
  if (is_asking) p.starts[index] = start >= 0 ? start : -1;
  // the last lane is the first to go without, and the first lane's block is the nearest
  code = __shfl_sync(0xFFFFFFFFu, start < 0 ? start : 0, 31 - __clz(static_cast<int>(mask)));
  if (rest != 0) {
    const int first = __shfl_sync(0xFFFFFFFFu, start, lowest_bit(rest));
    if (first >= 0) home = first >> BatchPool::Layout::kShift;
  }
  return __popc(__ballot_sync(0xFFFFFFFFu, is_asking && start >= 0));
}

extern "C" __global__ void __launch_bounds__(32) kvt_pool_allocate(const __grid_constant__ BatchParams p) {
  const BatchPool pool{p.memory};
  const int lane = threadIdx.x;
  for (int i = lane; i < p.count; i += 32) p.starts[i] = -1;
  __syncwarp();
  int granted = 0;
  int code = 0;
  if (p.partial) {
    int order = 0;
    int home = 0;
    while (granted < p.count && code == 0) {
      const int i = granted + lane;
      const int size = i < p.count ? p.sizes[i] : 0;
      const unsigned alike = __ballot_sync(0xFFFFFFFFu, size == __shfl_sync(0xFFFFFFFFu, size, 0));
      const unsigned mask = alike == 0xFFFFFFFFu ? alike : (1u << lowest_bit(~alike)) - 1;
      const int last_order = order;
      order = lowest_bit(static_cast<Word>(__shfl_sync(0xFFFFFFFFu, size, 0)));
      if (order != last_order) home = 0;
      granted += grant(p, pool, mask, i, order, home, code);
    }
  } else {
    for (int order = 3; order >= 0; --order) {
      int home = 0;
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

// Call use(word, bits) for the part of a run in each word.
template <typename Use>
__device__ __forceinline__ void for_each_word(int start, int size, Use use) {
  for (int granule = start; granule < start + size;) {
    const int count = min(BatchPool::kGranules - granule % BatchPool::kGranules, start + size - granule);
    use(granule / BatchPool::kGranules, BatchPool::bits_of(granule, count));
    granule += count;
  }
}

extern "C" __global__ void __launch_bounds__(1024) kvt_pool_free(const __grid_constant__ BatchParams p) {
  __shared__ int at_fault;
  const BatchPool pool{p.memory};
  Word* const marks = pool.marks();  // all zero between calls, which run one after another
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
  const BatchPool pool{p.memory};
  pool.free_all(pool.limbo_words(static_cast<Word>(p.count)), blockIdx.x * 256 + threadIdx.x, gridDim.x * 256);
}

}  // namespace kvt
