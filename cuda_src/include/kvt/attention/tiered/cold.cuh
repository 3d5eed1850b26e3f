// Attend to a unit of the cold tier: a block of 64 tokens as int4 codes.
#pragma once

#include <kvt/attention/tiered/codes.cuh>

namespace kvt {

constexpr unsigned kEven = 0x000F000Fu;        // nibbles 0 and 4: codes times 2^-24
constexpr unsigned kOdd = 0x00F000F0u;         // nibbles 1 and 5: codes times 2^-20
constexpr unsigned kMinus8Even = 0x80088008u;  // -8 as such codes
constexpr unsigned kMinus8Odd = 0x80808080u;

// c += A b, where A is 16 x 16 codes: the nibbles of two words from bit `shift` on, for rows g and g + 8.
__device__ __forceinline__ void multiply_add_nibbles(
    float (&c)[4], unsigned low, unsigned high, int shift, unsigned b0, unsigned b1) {
  low >>= shift;
  high >>= shift;
  Half::multiply_add(c, low & kEven, high & kEven, low & kOdd, high & kOdd, b0, b1);
}

// Product n = 2b + i takes tokens 32b + 4g + 2i + h as its rows g + 8h.
__device__ __forceinline__ void attend_cold(
    Walk& walk, const CodeQueries& queries, unsigned stage, int first, TieredStates& states) {
  const int lane = lane_id();
  const int g = lane >> 2;
  const int t = lane & 3;
  constexpr int kPieces = kHeadDim / 64;
  const unsigned key_scales = stage + Sizes::kColdCodes;
  const unsigned key_zeros = key_scales + 2 * kHeadDim;
  const unsigned values = key_zeros + 2 * kHeadDim;
  const unsigned value_scales = values + Sizes::kColdCodes;
  // A score is q.zero + (q * scale).(code - 8). The scaled query is rounded to halves. What the rounding loses is a
  // second query: in columns 4 to 7 if there are at most 4 rows, otherwise in further products.
  float s[kRowTiles][4][4];
  float of_zeros[kRowTiles][4];
  float of_middle[kRowTiles][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      of_zeros[r][i] = of_middle[r][i] = s[r][0][i] = s[r][1][i] = s[r][2][i] = s[r][3][i] = 0.0f;
  }
#pragma unroll
  for (int d = 0; d < kPieces; ++d) {
    uint4 scaled[kRowTiles][2];
    uint4 rest[kRowTiles][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned dims = (4 * (2 * d + half) + t) * 16;
      const uint4 zero = ptx::load_shared_16(key_zeros + dims);
      const uint4 scale = ptx::load_shared_16(key_scales + dims);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint4 q = queries.q[r][2 * d + half];
        Half::multiply_add(of_zeros[r], zero.x, zero.x, zero.y, zero.y, q.x, q.y);
        Half::multiply_add(of_zeros[r], zero.z, zero.z, zero.w, zero.w, q.z, q.w);
        uint4 b{
            Half::multiply_pairs(q.x, scale.x), Half::multiply_pairs(q.y, scale.y), Half::multiply_pairs(q.z, scale.z),
            Half::multiply_pairs(q.w, scale.w)};
        const uint4 c{
            ptx::multiply_subtract_halves(q.x, scale.x, b.x), ptx::multiply_subtract_halves(q.y, scale.y, b.y),
            ptx::multiply_subtract_halves(q.z, scale.z, b.z), ptx::multiply_subtract_halves(q.w, scale.w, b.w)};
        if (kSplitRows && g >= 4) b = c;
        scaled[r][half] = b;
        rest[r][half] = c;
        Half::multiply_add(of_middle[r], kMinus8Even, kMinus8Even, kMinus8Odd, kMinus8Odd, b.x, b.y);
        Half::multiply_add(of_middle[r], kMinus8Even, kMinus8Even, kMinus8Odd, kMinus8Odd, b.z, b.w);
        if (kSplitRows) continue;
        Half::multiply_add(of_middle[r], kMinus8Even, kMinus8Even, kMinus8Odd, kMinus8Odd, c.x, c.y);
        Half::multiply_add(of_middle[r], kMinus8Even, kMinus8Even, kMinus8Odd, kMinus8Odd, c.z, c.w);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint4 k = ptx::load_shared_16(stage + ((n * kPieces + d) * 32 + lane) * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply_add_nibbles(s[r][n], k.x, k.z, 0, scaled[r][0].x, scaled[r][0].y);
        multiply_add_nibbles(s[r][n], k.x, k.z, 8, scaled[r][0].z, scaled[r][0].w);
        multiply_add_nibbles(s[r][n], k.y, k.w, 0, scaled[r][1].x, scaled[r][1].y);
        multiply_add_nibbles(s[r][n], k.y, k.w, 8, scaled[r][1].z, scaled[r][1].w);
        if (kSplitRows) continue;
        multiply_add_nibbles(s[r][n], k.x, k.z, 0, rest[r][0].x, rest[r][0].y);
        multiply_add_nibbles(s[r][n], k.x, k.z, 8, rest[r][0].z, rest[r][0].w);
        multiply_add_nibbles(s[r][n], k.y, k.w, 0, rest[r][1].x, rest[r][1].y);
        multiply_add_nibbles(s[r][n], k.y, k.w, 8, rest[r][1].z, rest[r][1].w);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        s[r][n][i] += of_middle[r][i];
        if (kSplitRows) s[r][n][i] += __shfl_xor_sync(kAllLanes, s[r][n][i], 2);  // columns c and c + 4
        s[r][n][i] += of_zeros[r][i] * kCodeBy4;
      }
    }
  }
  states.count_in(true);
  if (walk.is_partial(first, kBlock)) take_lost_tokens<kBlock, true>(walk, value_scales, first, states);
  const float to_log2 = walk.to_log2 * (1.0f / kCodeBy4);
  uint2 weights[kRowTiles][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[r][n][i] *= to_log2;
    }
    const auto positions = [&](int n, int h) { return first + 32 * (n >> 1) + 4 * g + 2 * (n & 1) + h; };
    weigh<4, kBlock>(walk, r, s[r], first, positions, states);
    float of_points[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // sum of weight * scale * 4 * zero point
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint2 scale = ptx::load_shared_8(value_scales + 64 * b + 8 * g);
      const uint4 points = ptx::load_shared_16(value_scales + 2 * kBlock + 64 * b + 16 * t);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned scales = i == 0 ? scale.x : scale.y;
        const float (&w)[4] = s[r][2 * b + i];
        const uint2 operand = as_operand<Half>(w, Half::low(scales), Half::high(scales));
        // the points of tokens in the order of a nibble pair: 2i and 2i + 4, then 2i + 1 and 2i + 5
        const unsigned low = ptx::low_halves(i == 0 ? points.x : points.y, i == 0 ? points.z : points.w);
        const unsigned high = ptx::high_halves(i == 0 ? points.x : points.y, i == 0 ? points.z : points.w);
        Half::multiply_add(of_points, low, low, high, high, operand.x, operand.y);
        weights[r][2 * b + i] = operand;
      }
    }
    states.subtract_points(r, of_points);
  }
#pragma unroll
  for (int b = 0; b < 2; ++b) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      const uint4 v = ptx::load_shared_16(values + ((b * (kHeadDim / 32) + c) * 32 + lane) * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint2 w = weights[r][2 * b + i];
          multiply_add_nibbles(states.o[r][2 * c], v.x, v.y, 8 * i, w.x, w.y);
          multiply_add_nibbles(states.o[r][2 * c + 1], v.z, v.w, 8 * i, w.x, w.y);
        }
      }
    }
  }
}

}  // namespace kvt
