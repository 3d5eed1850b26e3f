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

// prmt.b32: the bytes that `selector` names.
__device__ __forceinline__ unsigned select_bytes(unsigned a, unsigned b, unsigned selector) {
  unsigned bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// lop3.b32: a & mask | bits. The compiler makes two instructions of it where both are constants.
__device__ __forceinline__ unsigned select_or(unsigned a, unsigned mask, unsigned bits) {
  unsigned word;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(word) : "r"(a), "r"(mask), "r"(bits));
  return word;
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

}  // namespace kvt::ptx
