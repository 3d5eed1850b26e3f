// Arithmetic on two 16-bit floats in a register (sm_90), one instruction per function.
#pragma once

namespace kvt::ptx {

struct HalfPair {
  // add.rn.f16x2
  __device__ __forceinline__ static unsigned add(unsigned a, unsigned b) {
    unsigned sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
  }
  // sub.rn.f16x2
  __device__ __forceinline__ static unsigned subtract(unsigned a, unsigned b) {
    unsigned rest;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(rest) : "r"(a), "r"(b));
    return rest;
  }
  // mul.rn.f16x2
  __device__ __forceinline__ static unsigned multiply(unsigned a, unsigned b) {
    unsigned product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
  }
  // fma.rn.f16x2: a b + c
  __device__ __forceinline__ static unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
  }
};

struct BFloat16Pair {
  // add.rn.bf16x2
  __device__ __forceinline__ static unsigned add(unsigned a, unsigned b) {
    unsigned sum;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
  }
  // sub.rn.bf16x2
  __device__ __forceinline__ static unsigned subtract(unsigned a, unsigned b) {
    unsigned rest;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(rest) : "r"(a), "r"(b));
    return rest;
  }
  // mul.rn.bf16x2
  __device__ __forceinline__ static unsigned multiply(unsigned a, unsigned b) {
    unsigned product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
  }
  // fma.rn.bf16x2: a b + c
  __device__ __forceinline__ static unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
  }
};

}  // namespace kvt::ptx
