// What the 32 lanes of a warp do together.
#pragma once

namespace kvt {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }

// A pointer that lane `source` holds, for every lane.
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

// The last i in [0, count) where holds(i), which holds at 0 and, once it fails, fails for all that follow.
// The whole warp looks together: 32 places a round, so 2 rounds for 1024.
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
