// What the 32 lanes of a warp do together.
#pragma once

namespace kvt {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }

// Give every lane the pointer that lane `source` holds.
template <typename T>
__device__ __forceinline__ T* broadcast_pointer(T* pointer, int source) {
  return reinterpret_cast<T*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), source));
}

// Over the 8 lanes that share lane % 4: in a matrix fragment, over its rows.
__device__ __forceinline__ float max_over_rows(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 4));
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 8));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 16));
}

__device__ __forceinline__ float sum_over_rows(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 4);
  x += __shfl_xor_sync(kAllLanes, x, 8);
  return x + __shfl_xor_sync(kAllLanes, x, 16);
}

// Over the 4 lanes that share lane / 4: in a matrix fragment, over the columns of a row.
__device__ __forceinline__ float max_over_columns(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float sum_over_columns(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The sum of `x` over lanes 0 to this one.
__device__ __forceinline__ int sum_up_to_lane(int x) {
  const int lane = lane_id();
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int below = __shfl_up_sync(kAllLanes, x, d);
    if (lane >= d) x += below;
  }
  return x;
}

// Returns the last i in [0, count) with holds(i). holds(0) must be true, and after the first false all must be false.
// The whole warp searches together, 32 places a round: 2 rounds for 1024 places.
template <typename Predicate>
__device__ __forceinline__ int last_where(int count, Predicate holds) {
  int low = 0;
  int length = count;
  while (length > 1) {
    const int stride = (length + 31) >> 5;
    const int offset = lane_id() * stride;
    const bool good = offset < length && holds(low + offset);
    const int last = 31 - __clz(__ballot_sync(kAllLanes, good) | 1u);
    low += last * stride;
    length = min(stride, length - last * stride);
  }
  return low;
}

}  // namespace kvt
