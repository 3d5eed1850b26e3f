// The kernels that `kvtoolkit bench alloc` times: warps take single granules from a pool and give them back.
//
// Launch:   CTA 256, one granule per thread. kvt_none is the baseline: it does what the others do without the pool.
// KVT_SLAB is 0 or 1, the layout.
#include <kvt/pool.cuh>

namespace kvt {

#if KVT_SLAB
using BenchPool = SlabPool;
#else
using BenchPool = Pool;
#endif

struct AllocParams {
  Word* memory;
  int* starts;         // [threads]
  long long* elapsed;  // ns
  int threads, rounds;
};

#define KVT_THREAD                                                 \
  const int t = blockIdx.x * 256 + threadIdx.x;                    \
  const unsigned mask = __ballot_sync(0xFFFFFFFFu, t < p.threads); \
  if (t >= p.threads) return;

extern "C" __global__ void __launch_bounds__(256) kvt_none(const __grid_constant__ AllocParams p) {
  KVT_THREAD
  p.starts[t] = __popc(mask);
}

extern "C" __global__ void __launch_bounds__(256) kvt_take(const __grid_constant__ AllocParams p) {
  KVT_THREAD
  p.starts[t] = PoolWarp(BenchPool{p.memory}, mask).allocate(0, t >> 5);
}

extern "C" __global__ void __launch_bounds__(256) kvt_give(const __grid_constant__ AllocParams p) {
  KVT_THREAD
  p.starts[t] = PoolWarp(BenchPool{p.memory}, mask).free(p.starts[t], 1);
}

extern "C" __global__ void __launch_bounds__(256) kvt_churn(const __grid_constant__ AllocParams p) {
  KVT_THREAD
  PoolWarp warp(BenchPool{p.memory}, mask);
  int failures = 0;
  for (int i = 0; i < p.rounds; ++i) {
    const int start = warp.allocate(0, t >> 5);
    failures += warp.free(start, 1) != 0;
  }
  p.starts[t] = failures;
}

__device__ __forceinline__ long long nanoseconds() {
  long long time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time)::"memory");
  return time;
}

// Times allocations one after another, each of which begins its search elsewhere.
extern "C" __global__ void __launch_bounds__(256) kvt_take_alone(const __grid_constant__ AllocParams p) {
  KVT_THREAD
  const BenchPool pool{p.memory};
  const long long begin = nanoseconds();
  int last = 0;
  for (int i = 0; i < p.rounds; ++i) last = pool.allocate(0, t + i + (last >> 31));
  *p.elapsed = nanoseconds() - begin + (last >> 31) + (mask >> 31);
}

}  // namespace kvt
