// Attend to a unit of the warm tier: 32 tokens as int8 codes.
#pragma once

#include <kvt/attention/tiered/codes.cuh>

namespace kvt {

constexpr unsigned kMiddle = 0x58005800u;  // 128 as halves: the zero point of int8

// Product i takes tokens 4g + 2i + h as its rows g + 8h.
__device__ __forceinline__ void attend_warm(
    Walk& walk, const CodeQueries& queries, unsigned stage, int first, TieredStates& states) {
  const int lane = lane_id();
  const int g = lane >> 2;
  constexpr int kPieces = kHeadDim / 32;
  float s[kRowTiles][2][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      s[r][i][0] = s[r][i][2] = queries.start[r][0];
      s[r][i][1] = s[r][i][3] = queries.start[r][1];
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int d = 0; d < kPieces; ++d) {
      const uint4 k = ptx::load_shared_16(stage + ((i * kPieces + d) * 32 + lane) * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint4 q = queries.q[r][d];
        Half::multiply_add(
            s[r][i], ptx::low_bytes(k.x), ptx::low_bytes(k.z), ptx::high_bytes(k.x), ptx::high_bytes(k.z), q.x, q.y);
        Half::multiply_add(
            s[r][i], ptx::low_bytes(k.y), ptx::low_bytes(k.w), ptx::high_bytes(k.y), ptx::high_bytes(k.w), q.z, q.w);
      }
    }
  }
  const uint2 key_scales = ptx::load_shared_8(stage + Sizes::kWarmCodes + 8 * g);
  const unsigned values = stage + Sizes::kWarmCodes + 2 * kWarmUnit;
  if (walk.is_partial(first, kWarmUnit))
    take_lost_tokens<kWarmUnit, false>(walk, values + Sizes::kWarmCodes, first, states);
  const uint2 value_scales = ptx::load_shared_8(values + Sizes::kWarmCodes + 8 * g);
  const float to_log2 = walk.to_log2 * (1.0f / kCode);
  const float factors[4] = {
      Half::low(key_scales.x) * to_log2, Half::high(key_scales.x) * to_log2, Half::low(key_scales.y) * to_log2,
      Half::high(key_scales.y) * to_log2};
  const float scales[4] = {
      Half::low(value_scales.x), Half::high(value_scales.x), Half::low(value_scales.y), Half::high(value_scales.y)};
  states.count_in(true);
  uint2 weights[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[r][i][j] *= factors[2 * i + (j >> 1)];
    }
    const auto positions = [&](int i, int h) { return first + 4 * g + 2 * i + h; };
    weigh<2, kWarmUnit>(walk, r, s[r], first, positions, states);
    float points[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // sum of weight * scale * 4 * 128
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weights[r][i] = as_operand<Half>(s[r][i], scales[2 * i], scales[2 * i + 1]);
      Half::multiply_add(points, kMiddle, kMiddle, kMiddle, kMiddle, weights[r][i].x, weights[r][i].y);
    }
    states.subtract_points(r, points);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      const uint4 v = ptx::load_shared_16(values + ((i * kPieces + c) * 32 + lane) * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint2 w = weights[r][i];
        Half::multiply_add(
            states.o[r][2 * c], ptx::low_bytes(v.x), ptx::low_bytes(v.y), ptx::high_bytes(v.x), ptx::high_bytes(v.y),
            w.x, w.y);
        Half::multiply_add(
            states.o[r][2 * c + 1], ptx::low_bytes(v.z), ptx::low_bytes(v.w), ptx::high_bytes(v.z),
            ptx::high_bytes(v.w), w.x, w.y);
      }
    }
  }
}

}  // namespace kvt
