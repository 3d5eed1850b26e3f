// What the 1024 threads of a CTA do together.
#pragma once

#include <kvt/base/warp.cuh>

namespace kvt {

// The sum of `value` over the threads before this one; `total` becomes that over all. `warp_sums` has 32 places in shared
// memory. What threads wrote to shared memory before, all of them see afterwards.
__device__ __forceinline__ int sum_before(int value, int* warp_sums, int& total) {
  const int up_to_here = sum_up_to_lane(value);
  __syncthreads();
  if (lane_id() == 31) warp_sums[threadIdx.x >> 5] = up_to_here;
  __syncthreads();
  const int of_warps = sum_up_to_lane(warp_sums[lane_id()]);
  total = __shfl_sync(kAllLanes, of_warps, 31);
  const int warp = threadIdx.x >> 5;
  const int before = __shfl_sync(kAllLanes, of_warps, max(0, warp - 1));
  return (warp > 0 ? before : 0) + up_to_here - value;
}

}  // namespace kvt
