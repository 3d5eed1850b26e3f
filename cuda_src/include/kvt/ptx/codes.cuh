// Quantized codes as 16-bit floats, one instruction per function.
//
// A code c in the low bits of 16 is the subnormal half c * 2^-24. Matrix products take it exactly and at full rate, so
// a code needs a mask but no conversion.
#pragma once

namespace kvt::ptx {

// prmt.b32: bytes 0 and 1 as two 16-bit numbers.
__device__ __forceinline__ unsigned low_bytes(unsigned word) {
  unsigned pair;
  asm("prmt.b32 %0, %1, 0, 0x4140;" : "=r"(pair) : "r"(word));
  return pair;
}

// prmt.b32: bytes 2 and 3.
__device__ __forceinline__ unsigned high_bytes(unsigned word) {
  unsigned pair;
  asm("prmt.b32 %0, %1, 0, 0x4342;" : "=r"(pair) : "r"(word));
  return pair;
}

// prmt.b32: the lower halves of two words.
__device__ __forceinline__ unsigned low_halves(unsigned a, unsigned b) {
  unsigned pair;
  asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// prmt.b32: the upper halves of two words.
__device__ __forceinline__ unsigned high_halves(unsigned a, unsigned b) {
  unsigned pair;
  asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// mul.rn.f16x2
__device__ __forceinline__ unsigned multiply_halves(unsigned a, unsigned b) {
  unsigned product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// fma.rn.f16x2: a b - c. If c is a b rounded, this is what the rounding lost.
__device__ __forceinline__ unsigned multiply_subtract_halves(unsigned a, unsigned b, unsigned c) {
  unsigned rest;
  asm("{ .reg .b32 minus; neg.f16x2 minus, %3; fma.rn.f16x2 %0, %1, %2, minus; }"
      : "=r"(rest)
      : "r"(a), "r"(b), "r"(c));
  return rest;
}

// ld.shared.v2.u32: 8 bytes.
__device__ __forceinline__ uint2 load_shared_8(unsigned shared) {
  uint2 words;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(shared) : "memory");
  return words;
}

// createpolicy.fractional.L2::evict_last: for data that is read again soon. It is volatile, so that the policy is made
// where it is used and not kept in two registers.
__device__ __forceinline__ unsigned long long evict_last_policy() {
  unsigned long long policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// st.global.L2::cache_hint.f32: store 4 bytes with an L2 policy.
__device__ __forceinline__ void store_4(float* to, float value, unsigned long long policy) {
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(value), "l"(policy) : "memory");
}

}  // namespace kvt::ptx
