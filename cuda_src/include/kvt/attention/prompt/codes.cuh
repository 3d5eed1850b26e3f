// From codes to the 16-bit keys and values that matrix products take, by four warps.
//
// Codes are stored as the fragments of mma.sync, see kvtoolkit/formats/quantized.py. Here they become rows of tokens in
// the 128-byte swizzle of tensor copies: a lane has 8 neighbouring dims of a key, which are 16 bytes of a row, and 8
// neighbouring tokens of a dim of the values, which stmatrix turns into rows.
//
// Numerics: codes are exact. Keys and values made from them are rounded to scalar_t. In bfloat16 a scale or a zero is
//           the sum of two numbers, because the rounding of a single one would add an error as large as that.
#pragma once

#include <kvt/attention/prompt/shape.cuh>
#include <kvt/base/scalar.cuh>
#include <kvt/ptx/codes.cuh>
#include <kvt/ptx/matrix.cuh>

namespace kvt {

#if KVT_BF16
constexpr unsigned kMagic = 0x43004300u;  // 128: its last bits count ones
#else
constexpr unsigned kMagic = 0x64006400u;  // 1024
#endif

// The lowest nibble of each 16-bit half as a number, less what `minus` has more than kMagic.
__device__ __forceinline__ unsigned nibbles_of(unsigned halves, unsigned minus) {
  return scalar_t::subtract_pairs(ptx::select_or(halves, 0x000F000Fu, kMagic), minus);
}

// Two bytes, each in a 16-bit half, minus 128.
__device__ __forceinline__ unsigned bytes_of(unsigned halves) {
#if KVT_BF16
  // 128 + the lower 7 bits, minus 128 where the highest bit is set, else minus 256
  return scalar_t::subtract_pairs(
      ptx::select_or(halves, 0x007F007Fu, kMagic), ptx::select_or(~halves, 0x00800080u, kMagic));
#else
  return scalar_t::subtract_pairs(halves | kMagic, 0x64806480u);  // 1152
#endif
}

// Two scales or zeros of two numbers.
struct Parts {
  unsigned high;
  unsigned rest;  // what `high` is off by; bfloat16 only

  __device__ __forceinline__ Parts(float low_half, float high_half)
      : high(scalar_t::pack(low_half, high_half)), rest(0) {
    if (KVT_BF16) rest = scalar_t::pack(low_half - scalar_t::low(high), high_half - scalar_t::high(high));
  }
  // Two float16 times a factor.
  __device__ __forceinline__ static Parts scaled(unsigned halves, float factor) {
    return {ptx::Half::low(halves) * factor, ptx::Half::high(halves) * factor};
  }
};

__device__ __forceinline__ unsigned multiply(unsigned codes, const Parts& scale) {
  if (!KVT_BF16) return scalar_t::multiply_pairs(codes, scale.high);
  return scalar_t::multiply_add_pairs(codes, scale.high, scalar_t::multiply_pairs(codes, scale.rest));
}

__device__ __forceinline__ unsigned multiply_add(unsigned codes, const Parts& scale, const Parts& zero) {
  const unsigned sum = scalar_t::multiply_add_pairs(codes, scale.high, zero.high);
  return KVT_BF16 ? scalar_t::add_pairs(sum, scalar_t::multiply_add_pairs(codes, scale.rest, zero.rest)) : sum;
}

// What an address is XORed with to go to a token and a unit of 8 dims whose numbers differ in these bits. Rows of a
// swizzled tile are 128 bytes, and the number of a row is XORed into the places of its units.
constexpr unsigned change(int tokens, int units) { return tokens << 7 ^ (tokens ^ units) << 4; }

// The address of the first key that a lane brings: token 4 * g, unit t. A unit of codes begins at `to`, a multiple of
// 1024.
__device__ __forceinline__ unsigned first_key(unsigned to) {
  const int g = lane_id() >> 2;
  const int t = lane_id() & 3;
  return to + (g >> 1) * kPieceBytes + ((g & 1) << 9) + ((t ^ (g & 1) << 2) << 4);
}

// The address of the row of values that a lane stores for product 0. A product has 8 dims of the tokens p and p + 4 of
// each of 4 pieces, where p = product ^ piece, so that its 8 rows begin in different banks.
__device__ __forceinline__ unsigned first_value(unsigned to) {
  const int piece = lane_id() >> 1 & 3;
  const int token = piece | (lane_id() & 1) << 2;
  return to + piece * kPieceBytes + token * 128 + ((lane_id() >> 3 ^ token) << 4);
}

// The pair of 16-bit numbers at tokens p and p + 4 of eight.
__device__ __forceinline__ unsigned pair_of(uint4 eight, int p) {
  return ptx::select_bytes(p & 2 ? eight.y : eight.x, p & 2 ? eight.w : eight.z, p & 1 ? 0x7632 : 0x5410);
}

// The warm tier: 32 tokens of int8, which begin at `to` in a tile. Each of the four warps brings some of the dims of all
// tokens.
__device__ __forceinline__ void bring_warm_keys(unsigned from, unsigned to, int warp) {
  constexpr int kParts = kHeadDim / 32;
  const uint2 scales = ptx::load_shared_8(from + Sizes::kWarmCodes + 8 * (lane_id() >> 2));
  const int d = warp % kParts;
  const unsigned at = first_key(to + (d >> 1) * 1024) ^ (d & 1) << 6;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (kParts < kConverters && i != warp / kParts) continue;
    const uint4 codes = ptx::load_shared_16(from + ((i * kParts + d) * 32 + lane_id()) * 16);
    const unsigned scale = i == 0 ? scales.x : scales.y;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float of_token = h == 0 ? ptx::Half::low(scale) : ptx::Half::high(scale);
      const Parts factor(of_token, of_token);
      const unsigned low = h == 0 ? codes.x : codes.z;
      const unsigned high = h == 0 ? codes.y : codes.w;
      ptx::store_shared_16(
          at ^ change(2 * i + h, 0),
          {multiply(bytes_of(ptx::low_bytes(low)), factor), multiply(bytes_of(ptx::high_bytes(low)), factor),
           multiply(bytes_of(ptx::low_bytes(high)), factor), multiply(bytes_of(ptx::high_bytes(high)), factor)});
    }
  }
}

// Each warp brings all dims of some of the tokens: those of one product.
__device__ __forceinline__ void bring_warm_values(unsigned from, unsigned to, int warp) {
  constexpr int kParts = kHeadDim / 32;
  const int t = lane_id() & 3;
  const int pair = warp ^ t;
  const unsigned values = from + Sizes::kWarmCodes + 2 * kWarmUnit;
  const uint4 scales = ptx::load_shared_16(values + Sizes::kWarmCodes + 16 * t);
  const Parts factor = Parts::scaled(pair_of(scales, pair), 0.25f);
  const unsigned bytes = pair & 1 ? 0x4342 : 0x4140;
  const unsigned at = first_value(to) ^ change(warp, 0);
  const unsigned codes_at = values + ((pair >> 1) * kParts * 32 + lane_id()) * 16;
#pragma unroll
  for (int c = 0; c < kParts; ++c) {
    const uint4 codes = ptx::load_shared_16(codes_at + c * 512);
    const auto dims_of = [&](unsigned word) { return multiply(bytes_of(ptx::select_bytes(word, 0, bytes)), factor); };
    ptx::store_matrices_transposed(
        (at ^ change(0, c & 1 ? 4 : 0)) + (c >> 1) * 1024,
        {dims_of(codes.x), dims_of(codes.y), dims_of(codes.z), dims_of(codes.w)});
  }
}

// The cold tier: 64 tokens of int4. Scales are stored times 4 or 1/4, as suits the nibbles' places in mma.sync.
__device__ __forceinline__ void bring_cold_keys(unsigned from, unsigned to, int warp) {
  constexpr int kParts = kHeadDim / 64;
  constexpr int kEach = 2 * kParts;  // quarters of the tokens that a warp has: all, or half where dims are few
  constexpr unsigned kMagicAnd8 = kMagic + 0x00080008u;
  const int d = warp / 2 % kParts;
  const int j = warp & 1;
  const int first = warp / (2 * kParts) * kEach;
  const unsigned scales_at = from + Sizes::kColdCodes + (4 * (2 * d + j) + (lane_id() & 3)) * 16;
  const uint4 scale = ptx::load_shared_16(scales_at);
  const uint4 zero = ptx::load_shared_16(scales_at + 2 * kHeadDim);
  const Parts scales[4] = {
      Parts::scaled(scale.x, 0.25f), Parts::scaled(scale.y, 4.0f), Parts::scaled(scale.z, 0.25f),
      Parts::scaled(scale.w, 4.0f)};
  const Parts zeros[4] = {
      Parts::scaled(zero.x, 1.0f), Parts::scaled(zero.y, 1.0f), Parts::scaled(zero.z, 1.0f),
      Parts::scaled(zero.w, 1.0f)};
  const unsigned at = first_key(to + (first >> 1) * 4 * kPieceBytes + d * 1024) ^ change(0, 4) * j;
  const unsigned words_at = from + ((first * kParts + d) * 32 + lane_id()) * 16 + 4 * j;
  unsigned words[2 * kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
#pragma unroll
    for (int h = 0; h < 2; ++h) words[2 * e + h] = ptx::load_shared_4(words_at + e * kParts * 512 + 8 * h);
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const unsigned word = words[2 * e + h];
      const auto dims_of = [&](int p) {
        return multiply_add(nibbles_of(word >> 4 * p, kMagicAnd8), scales[p], zeros[p]);
      };
      ptx::store_shared_16(
          (at ^ change(2 * (e & 1) + h, 0)) + (e >> 1) * 4 * kPieceBytes,
          {dims_of(0), dims_of(1), dims_of(2), dims_of(3)});
    }
  }
}

__device__ __forceinline__ void bring_cold_values(unsigned from, unsigned to, int warp) {
  constexpr int kParts = kHeadDim / 32;
  const int t = lane_id() & 3;
  const int pair = warp ^ t;
  const unsigned values = from + Sizes::kColdCodes + 4 * kHeadDim;
  const float of_scale = pair & 1 ? 4.0f : 0.25f;
  const float of_point = pair & 1 ? -1.0f / 16 : -1.0f;
  const unsigned at = first_value(to) ^ change(warp, 0);
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    uint4 codes[kParts];
#pragma unroll
    for (int c = 0; c < kParts; ++c) {
      codes[c] = ptx::load_shared_16(values + ((b * kParts + c) * 32 + lane_id()) * 16);
    }
    const unsigned scales_at = values + Sizes::kColdCodes + 64 * b + 16 * t;
    const unsigned scale = pair_of(ptx::load_shared_16(scales_at), pair);
    const unsigned point = pair_of(ptx::load_shared_16(scales_at + 2 * kBlock), pair);
    const float low = ptx::Half::low(scale) * of_scale;
    const float high = ptx::Half::high(scale) * of_scale;
    const Parts factor(low, high);
    const Parts zero(low * (ptx::Half::low(point) * of_point), high * (ptx::Half::high(point) * of_point));
#pragma unroll
    for (int c = 0; c < kParts; ++c) {
      const auto dims_of = [&](unsigned word) {
        return multiply_add(nibbles_of(word >> 4 * pair, kMagic), factor, zero);
      };
      ptx::store_matrices_transposed(
          (at ^ change(0, c & 1 ? 4 : 0)) + (c >> 1) * 1024 + 4 * b * kPieceBytes,
          {dims_of(codes[c].x), dims_of(codes[c].y), dims_of(codes[c].z), dims_of(codes[c].w)});
    }
  }
}

}  // namespace kvt
