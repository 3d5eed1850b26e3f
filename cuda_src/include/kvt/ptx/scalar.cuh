// The two 16-bit floats as types: conversions and the matrix product, one instruction per function.
//
// Fragments of m16n8k16 in lane l, with g = l / 4 and t = l % 4. A register holds two elements of a or b; the element
// with the lower column of a, or the lower row of b, is in the lower half:
//   a [16 x 16]  a[0] row g, columns 2t, 2t+1 | a[1] row g + 8 | a[2] row g, columns 2t + 8, 2t + 9 | a[3] row g + 8
//   b [16 x 8]   b[0] rows 2t, 2t+1, column g | b[1] rows 2t + 8, 2t + 9
//   c [16 x 8]   c[0], c[1] row g, columns 2t, 2t+1 | c[2], c[3] row g + 8; float32
#pragma once

namespace kvt::ptx {

struct Half {
  static constexpr unsigned kExponents = 0x7C007C00u;  // of a pair; all set in infinities and NaN
  static constexpr unsigned kLowestExponentBits = 0x04000400u;

  // cvt.rn.f16x2.f32
  __device__ __forceinline__ static unsigned pack(float low, float high) {
    unsigned packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  // cvt.f32.f16
  __device__ __forceinline__ static float low(unsigned packed) {
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(packed));
    return value;
  }
  __device__ __forceinline__ static float high(unsigned packed) {
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(packed));
    return value;
  }
  // add.rn.f16x2
  __device__ __forceinline__ static unsigned add_pairs(unsigned a, unsigned b) {
    unsigned pair;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
  }
  // sub.rn.f16x2
  __device__ __forceinline__ static unsigned subtract_pairs(unsigned a, unsigned b) {
    unsigned pair;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
  }
  // mul.rn.f16x2
  __device__ __forceinline__ static unsigned multiply_pairs(unsigned a, unsigned b) {
    unsigned pair;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
  }
  // fma.rn.f16x2: a b + c
  __device__ __forceinline__ static unsigned multiply_add_pairs(unsigned a, unsigned b, unsigned c) {
    unsigned pair;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
    return pair;
  }
  // mma.sync.m16n8k16: c += a b
  __device__ __forceinline__ static void multiply_add(
      float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

struct BFloat16 {
  static constexpr unsigned kExponents = 0x7F807F80u;
  static constexpr unsigned kLowestExponentBits = 0x00800080u;

  // cvt.rn.bf16x2.f32
  __device__ __forceinline__ static unsigned pack(float low, float high) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  __device__ __forceinline__ static float low(unsigned packed) { return __uint_as_float(packed << 16); }
  __device__ __forceinline__ static float high(unsigned packed) { return __uint_as_float(packed & 0xFFFF0000u); }
  // add.rn.bf16x2, sm_90
  __device__ __forceinline__ static unsigned add_pairs(unsigned a, unsigned b) {
    unsigned pair;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
  }
  // sub.rn.bf16x2, sm_90
  __device__ __forceinline__ static unsigned subtract_pairs(unsigned a, unsigned b) {
    unsigned pair;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
  }
  // mul.rn.bf16x2, sm_90
  __device__ __forceinline__ static unsigned multiply_pairs(unsigned a, unsigned b) {
    unsigned pair;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
  }
  // fma.rn.bf16x2: a b + c
  __device__ __forceinline__ static unsigned multiply_add_pairs(unsigned a, unsigned b, unsigned c) {
    unsigned pair;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
    return pair;
  }
  // mma.sync.m16n8k16: c += a b
  __device__ __forceinline__ static void multiply_add(
      float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

}  // namespace kvt::ptx
