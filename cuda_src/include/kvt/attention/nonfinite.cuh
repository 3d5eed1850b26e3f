// Infinities and NaN among the values of a step. The rows of a matrix product share every value, and a weight of 0
// times an infinity or NaN is NaN. If some rows do not see all tokens, such values are therefore taken out of the
// product.
#pragma once

#include <kvt/ptx/matrix.cuh>

namespace kvt {

// Bit 15 is set if the lower number of a pair is an infinity or NaN, bit 31 if the upper one is.
template <typename Scalar>
__device__ __forceinline__ unsigned nonfinite_flags(unsigned pair) {
  return ((pair & Scalar::kExponents) + Scalar::kLowestExponentBits) & 0x80008000u;
}

// All bits of those numbers of a pair that are an infinity or NaN.
template <typename Scalar>
__device__ __forceinline__ unsigned nonfinite_mask(unsigned pair) {
  return (nonfinite_flags<Scalar>(pair) >> 15) * 0xFFFFu;
}

// Not 0 if any of 8 numbers in shared memory is an infinity or NaN.
template <typename Scalar>
__device__ __forceinline__ unsigned any_nonfinite(unsigned shared) {
  const uint4 words = ptx::load_shared_16(shared);
  return nonfinite_flags<Scalar>(words.x) | nonfinite_flags<Scalar>(words.y) | nonfinite_flags<Scalar>(words.z) |
         nonfinite_flags<Scalar>(words.w);
}

// Replace infinities and NaN among 8 numbers in shared memory by 0.
template <typename Scalar>
__device__ __forceinline__ void clear_nonfinite(unsigned shared) {
  const uint4 words = ptx::load_shared_16(shared);
  ptx::store_shared_16(
      shared, {words.x & ~nonfinite_mask<Scalar>(words.x), words.y & ~nonfinite_mask<Scalar>(words.y),
               words.z & ~nonfinite_mask<Scalar>(words.z), words.w & ~nonfinite_mask<Scalar>(words.w)});
}

}  // namespace kvt
