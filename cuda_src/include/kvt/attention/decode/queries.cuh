// The queries of a decode CTA, and what its lanes know of the query rows in their columns.
#pragma once

#include <kvt/attention/decode/shape.cuh>
#include <kvt/attention/nonfinite.cuh>
#include <kvt/attention/softmax.cuh>

namespace kvt {

// The softmax states of a warp.
using States = ColumnStates<kRowTiles, kDimBlocks>;

// The fragments of a block's queries: dims 32d + 8t to 32d + 8t + 7 of row 8r + g.
struct Queries {
  uint4 q[kRowTiles][kDimPairs];
  int sequence = -1;

  // `rows` masks the row numbers, so that rows can be repeated: with 3, columns 4 to 7 hold rows 0 to 3 again.
  __device__ __forceinline__ void load(const AttentionParams& p, const RowBlock& block, int kv_head, int rows = -1) {
    const int lane = lane_id();
    sequence = block.sequence;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int row = (8 * r + (lane >> 2)) & rows;
      const bool is_row = row < block.num_rows;
      const RowPlace place = place_of_row(p, block, kv_head, is_row ? row : 0);
      const unsigned short* from = p.q + place.token * p.q_token + place.q_head * p.q_head + (lane & 3) * 8;
#pragma unroll
      for (int d = 0; d < kDimPairs; ++d) {
        const bool is_dim = kHeadDim % 32 == 0 || 32 * d + (lane & 3) * 8 < kHeadDim;
        q[r][d] = is_row && is_dim ? *reinterpret_cast<const uint4*>(from + 32 * d) : uint4{0, 0, 0, 0};
      }
    }
  }
};

// What a lane knows of the query rows in its columns 2t and 2t + 1.
struct Columns {
  int position[kRowTiles][2];
  float slope[kRowTiles][2];  // ALiBi, times log2(e); 0 = none
};

__device__ __forceinline__ Columns columns_of(const AttentionParams& p, const RowBlock& block, int kv_head) {
  Columns columns;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = min(8 * r + 2 * (lane_id() & 3) + c, block.num_rows - 1);
      columns.position[r][c] = block.position(row, p.group_size);
      columns.slope[r][c] = 0.0f;
      if (p.alibi_slopes != nullptr) {
        columns.slope[r][c] = p.alibi_slopes[place_of_row(p, block, kv_head, row).q_head] * kLog2E;
      }
    }
  }
  return columns;
}

// Take infinities and NaN out of the values of a step that some rows see only in part. Rows that see one of them get it
// here, since their output becomes infinite or NaN in any case; in shared memory it is then set to 0. Call this after o
// has been rescaled.
//   values  [kStep] tokens of kPitch chunks of 16 bytes, this warp's own; chunk c of token k is at place c ^ (k & 7)
template <int kPitch>
__device__ __forceinline__ void take_nonfinite(
    const AttentionParams& p, const Columns& columns, int seq_len, unsigned values, int first, States& states) {
  constexpr int kChunks = kHeadDim / 8;
  const int lane = lane_id();
  const auto piece = [&](int i) {
    const int token = (i * 32 + lane) / kChunks;
    return values + (token * kPitch + ((i * 32 + lane) % kChunks ^ (token & 7))) * 16;
  };
  unsigned any = 0;
#pragma unroll
  for (int i = 0; i < kStep * kChunks / 32; ++i) any |= any_nonfinite<scalar_t>(piece(i));
  if (!__any_sync(kAllLanes, any != 0)) return;
  const int g = lane >> 2;
#pragma unroll 1
  for (int token = 0; token < kStep; ++token) {
    bool sees[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) sees[r][c] = is_visible(p, columns.position[r][c], first + token, seq_len);
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {  // dims 8 * chunk + g
      const unsigned pair = ptx::load_shared_4(values + (token * kPitch + (chunk ^ (token & 7))) * 16 + g / 2 * 4);
      const unsigned lost = pair & nonfinite_mask<scalar_t>(pair);
      const float x = g & 1 ? scalar_t::high(lost) : scalar_t::low(lost);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int c = 0; c < 2; ++c) states.o[r][chunk / 2][c + chunk % 2 * 2] += sees[r][c] ? x : 0.0f;
      }
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < kStep * kChunks / 32; ++i) clear_nonfinite<scalar_t>(piece(i));
  __syncwarp();
}

}  // namespace kvt
