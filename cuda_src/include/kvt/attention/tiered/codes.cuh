// Queries for keys that are codes. A code in the low bits of 16 is the subnormal half code * 2^-24, which matrix
// products take exactly and at full rate, so codes need no conversion; see ptx/codes.cuh. Scales never touch a code: a
// channel's key scale goes into the query, a token's scale into its score or its weight.
#pragma once

#include <kvt/attention/tiered/weights.cuh>
#include <kvt/ptx/codes.cuh>
#include <kvt/ptx/matrix.cuh>

namespace kvt {

constexpr unsigned kMinus128 = 0x80808080u;  // -128 as codes of int8
constexpr bool kSplitRows = KVT_SPLIT_ROWS;  // at most 4 query rows; columns 4 to 7 repeat them

// The fragments of a block's queries as halves, and the value that int8 scores start from, which is the query times
// -128 in every dim.
struct CodeQueries {
  uint4 q[kRowTiles][kDimPairs];
  float start[kRowTiles][2];

  __device__ __forceinline__ void make(const Queries& queries) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int d = 0; d < kDimPairs; ++d) {
        const uint4 from = queries.q[r][d];
#if KVT_BF16
        const auto to_half = [](unsigned pair) { return Half::pack(scalar_t::low(pair), scalar_t::high(pair)); };
        q[r][d] = {to_half(from.x), to_half(from.y), to_half(from.z), to_half(from.w)};
#else
        q[r][d] = from;
#endif
        Half::multiply_add(sum, kMinus128, kMinus128, kMinus128, kMinus128, q[r][d].x, q[r][d].y);
        Half::multiply_add(sum, kMinus128, kMinus128, kMinus128, kMinus128, q[r][d].z, q[r][d].w);
      }
      start[r][0] = sum[0];
      start[r][1] = sum[1];
    }
  }
};

}  // namespace kvt
