// Attend to a unit of the hot tier: 16 tokens in scalar_t.
#pragma once

#include <kvt/attention/tiered/weights.cuh>
#include <kvt/ptx/matrix.cuh>

namespace kvt {

__device__ __forceinline__ void attend_hot(
    Walk& walk, const Queries& queries, unsigned stage, int first, TieredStates& states) {
  const int lane = lane_id();
  const int g = lane >> 2;
  const int t = lane & 3;
  float s[kRowTiles][1][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) s[r][0][0] = s[r][0][1] = s[r][0][2] = s[r][0][3] = 0.0f;
  const unsigned key_row = stage + g * kChunks * 16;
#pragma unroll
  for (int d = 0; d < kDimPairs; ++d) {
    const unsigned chunk = ((4 * d + t) ^ (g & 1) << 2) * 16;
    const uint4 low = ptx::load_shared_16(key_row + chunk);
    const uint4 high = ptx::load_shared_16(key_row + 8 * kChunks * 16 + chunk);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const uint4 q = queries.q[r][d];
      scalar_t::multiply_add(s[r][0], low.x, high.x, low.y, high.y, q.x, q.y);
      scalar_t::multiply_add(s[r][0], low.z, high.z, low.w, high.w, q.z, q.w);
    }
  }
  states.count_in(false);
  uint2 weights[kRowTiles];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[r][0][i] *= walk.to_log2;
    weigh<1, kStep>(walk, r, s[r], first, [&](int, int h) { return first + g + 8 * h; }, states);
    weights[r] = as_operand<scalar_t>(s[r][0]);
  }
  if (walk.is_partial(first, kStep)) {
    take_nonfinite<kChunks>(walk.p, walk.columns, walk.seq_len, stage + kHotHalf, first, states);
  }
  const int token = (lane & 7) + (lane >> 4) * 8;
  const unsigned value_row = stage + kHotHalf + token * kChunks * 16;
#pragma unroll
  for (int d = 0; d < kDimBlocks; ++d) {
    unsigned v[4];
    ptx::load_matrices_transposed(v, value_row + ((2 * d + (lane >> 3 & 1)) ^ (token & 7)) * 16);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      scalar_t::multiply_add(states.o[r][d], v[0], v[1], v[2], v[3], weights[r].x, weights[r].y);
    }
  }
}

}  // namespace kvt
