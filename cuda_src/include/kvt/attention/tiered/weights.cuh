// From scores to weights, and the softmax states that the tiers share.
#pragma once

#include <kvt/attention/tiered/stages.cuh>

namespace kvt {

constexpr float kCode = 1.0f / (1 << 24);     // what a code of 1 is as a subnormal half
constexpr float kCodeBy4 = 1.0f / (1 << 22);  // scales are stored times 4
constexpr float kHeadroom = 6.0f;             // how far a score may exceed m
constexpr float kSlack = 2.0f;                // how far m stays below the score that raised it

// The softmax states of a warp if some values are codes.
//   out = o * (in_codes ? 1 / kCodeBy4 : 1) / l
struct TieredStates : States {
  bool in_codes = false;  // o is the sum of weight * 4 * scale * (code - zero point) / 2^24

  // Switch the unit of o to codes, or back. This is exact, because the factor is a power of two.
  __device__ __forceinline__ void count_in(bool codes) {
    if (codes == in_codes) return;
    const float factor = codes ? kCodeBy4 : 1.0f / kCodeBy4;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int d = 0; d < kDimBlocks; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[r][d][i] *= factor;
      }
    }
    in_codes = codes;
  }

  // Subtract a unit's zero points before its codes are added. This keeps o as small as the
  // dequantized sum, so a long sequence of codes loses nothing to rounding.
  __device__ __forceinline__ void subtract_points(int r, const float (&points)[4]) {
#pragma unroll
    for (int d = 0; d < kDimBlocks; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[r][d][i] -= kCode * points[i];
    }
  }
};

// What a warp knows while it attends to the units of a piece.
struct Walk {
  const TieredParams& p;
  const Columns& columns;
  KeyRange keys;
  int seq_len;
  float to_log2;  // from q.k to the score; 1 if there is a cap, because the cap scales
  int unit;       // the number of the present unit in the list
  UnitLse unit_lse;

  // Whether some row does not see all of `num_tokens` tokens from `first` on.
  __device__ __forceinline__ bool is_partial(int first, int num_tokens) const {
    return first < keys.full_begin || first + num_tokens > keys.full_end;
  }

  // Whether the row of column 2t + c sees the token at `position`.
  __device__ __forceinline__ bool sees(int r, int c, int position) const {
    return is_visible(p, columns.position[r][c], position, seq_len);
  }
};

// Turn products of q and k, times Walk::to_log2, into weights: cap, bias, mask, exp2. Adds the weights to l.
//   positions(n, h)  the position of this lane's token in row g + 8h of product n
//   first            the first of kTokens positions
//
// Weights are exp2(score - m). Here m is not the exact largest score: scores may exceed it by up to kHeadroom. m is
// raised, and what was summed up rescaled, only when a score exceeds that margin, so most units need no reduction over
// their tokens.
template <int kProducts, int kTokens, typename Positions>
__device__ __forceinline__ void weigh(
    Walk& walk, int r, float (&s)[kProducts][4], int first, Positions positions, TieredStates& states) {
  const TieredParams& p = walk.p;
  if (p.cap_outer != 0.0f) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = p.cap_outer * tanhf(p.cap_inner * s[n][i]);
    }
  }
  if (p.alibi_slopes != nullptr) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int distance = walk.columns.position[r][i & 1] - positions(n, i >> 1);
        s[n][i] -= walk.columns.slope[r][i & 1] * fabsf(static_cast<float>(distance));
      }
    }
  }
  if (walk.is_partial(first, kTokens)) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!walk.sees(r, i & 1, positions(n, i >> 1))) s[n][i] = -kInfinity;
      }
    }
  }
  float highest[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    highest[c] = fmaxf(s[0][c], s[0][c + 2]);
#pragma unroll
    for (int n = 1; n < kProducts; ++n) highest[c] = fmaxf(highest[c], fmaxf(s[n][c], s[n][c + 2]));
  }
  if (__any_sync(kAllLanes, highest[0] > states.m[r][0] + kHeadroom || highest[1] > states.m[r][1] + kHeadroom)) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float top = max_over_rows(highest[c]);
      // a score above m + kHeadroom is not -inf, and needs no guard
      if (top > states.m[r][c] + kHeadroom) states.raise(r, c, top - kSlack, top - kSlack);
    }
  }
  float base[2];
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    base[c] = base_of(states.m[r][c]);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      s[n][c] = ptx::exp2(s[n][c] - base[c]);
      s[n][c + 2] = ptx::exp2(s[n][c + 2] - base[c]);
      sum[c] += s[n][c] + s[n][c + 2];
    }
    states.l[r][c] += sum[c];
  }
  if (kHasMasses) walk.unit_lse.take(r, walk.unit, base, sum);
}

// The weights of 16 tokens as the operand of a product, rows first. `low` and `high` are the scales of the values of
// this lane's tokens.
template <typename Scalar>
__device__ __forceinline__ uint2 as_operand(const float (&s)[4], float low = 1.0f, float high = 1.0f) {
  return {
      ptx::transpose_matrix(Scalar::pack(s[0] * low, s[1] * low)),
      ptx::transpose_matrix(Scalar::pack(s[2] * high, s[3] * high))};
}

// Take tokens whose values are NaN out of a unit that some rows see only in part, because a weight of 0 times NaN is
// NaN. Rows that see such a token become NaN here; for the others its values are set to 0.
//   value_scales  [kTokens] in shared memory, this warp's own; with kHasPoints the zero points follow
template <int kTokens, bool kHasPoints>
__device__ __forceinline__ void take_lost_tokens(
    const Walk& walk, unsigned value_scales, int first, TieredStates& states) {
  const int lane = lane_id();
  const unsigned scales = value_scales + lane * 4;  // of two tokens
  const unsigned points = scales + 2 * kTokens;
  unsigned lost = 0;
  if (lane < kTokens / 2) {
    lost = nonfinite_mask<Half>(ptx::load_shared_4(scales));
    if (kHasPoints) lost |= nonfinite_mask<Half>(ptx::load_shared_4(points));
  }
  if (!__any_sync(kAllLanes, lost != 0)) return;
  const unsigned tokens[2] = {__ballot_sync(kAllLanes, (lost & 1) != 0), __ballot_sync(kAllLanes, lost >> 31 != 0)};
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float taken = 0.0f;
#pragma unroll 1
      for (int token = 0; token < kTokens; ++token) {
        const bool is_lost = tokens[token & 1] >> (token >> 1) & 1;
        if (is_lost && walk.sees(r, c, first + token)) taken = kInfinity - kInfinity;
      }
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        states.o[r][d][c] += taken;
        states.o[r][d][c + 2] += taken;
      }
    }
  }
  if (lane < kTokens / 2) {
    ptx::store_shared_4(scales, ptx::load_shared_4(scales) & ~lost);
    if (kHasPoints) ptx::store_shared_4(points, ptx::load_shared_4(points) & ~lost);
  }
  __syncwarp();
}

}  // namespace kvt
