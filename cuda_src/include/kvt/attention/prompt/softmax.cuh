// The running softmax of the prompt kernel, over the scores of a tile; rows g and g + 8 of a warp's 16.
//
// Weights are exp2(scale * (score - m)). m is not the exact running maximum: a tile's weights are taken against the
// maximum of the tiles before it, and only where a score exceeds that by kHeadroom are they taken again against the new
// one, with the accumulators rescaled. Weights stay below 2^kHeadroom, which float16 holds, too.
#pragma once

#include <kvt/attention/softmax.cuh>
#include <kvt/base/warp.cuh>
#include <kvt/ptx/math.cuh>

namespace kvt {

constexpr float kHeadroom = 8.0f;  // log2

template <typename Scalar, int kKeys>
struct TileSoftmax {
  float scale;      // from a score to log2
  float m[2];       // a maximum of the scores so far, up to kHeadroom
  float l[2];       // sum of the weights of this lane's keys
  float shrink[2];  // what the accumulators have to be multiplied by, where `raised`
  bool raised;      // m changed in the last tile

  __device__ __forceinline__ explicit TileSoftmax(float scale) : scale(scale) {}

  __device__ __forceinline__ void reset() {
    m[0] = m[1] = -kInfinity;
    l[0] = l[1] = 0.0f;
    shrink[0] = shrink[1] = 1.0f;
  }

  // Weights with m raised to the exact maximum of everything so far, in rows where a score is too far above it. Other
  // rows get the bits that `absorb` gives them, so what one row sees changes nothing for the rows beside it.
  __device__ __forceinline__ void absorb_and_raise(const float (&s)[kKeys / 2], unsigned (&weights)[kKeys / 4]) {
    float high[2] = {m[0], m[1]};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      high[0] = fmaxf(high[0], fmaxf(s[4 * j], s[4 * j + 1]));
      high[1] = fmaxf(high[1], fmaxf(s[4 * j + 2], s[4 * j + 3]));
    }
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = max_over_columns(high[r]);
      const bool raises = is_above(high[r], m[r]);
      const float raised_m = raises ? high[r] : m[r];
      base[r] = base_of(raised_m) * scale;
      shrink[r] = raises ? ptx::exp2(m[r] * scale - base[r]) : 1.0f;  // a fused product would be off by its rounding
      m[r] = raised_m;
      l[r] *= shrink[r];
    }
    take_weights(s, weights, base, l);
    raised = true;
  }

  // Weights against the maximum before this tile, or raised where that is too far below.
  __device__ __forceinline__ void absorb(const float (&s)[kKeys / 2], unsigned (&weights)[kKeys / 4]) {
    float high[2] = {m[0], m[1]};
    float base[2];
    float sum[2] = {l[0], l[1]};
#pragma unroll
    for (int r = 0; r < 2; ++r) base[r] = base_of(m[r]) * scale;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float a = s[4 * j + 2 * r];
        const float b = s[4 * j + 2 * r + 1];
        high[r] = fmaxf(high[r], fmaxf(a, b));
        const float x = ptx::exp2(fmaf(a, scale, -base[r]));
        const float y = ptx::exp2(fmaf(b, scale, -base[r]));
        sum[r] += x + y;
        weights[2 * j + r] = Scalar::pack(x, y);
      }
    }
    const bool above = is_above(high[0], m[0]) || is_above(high[1], m[1]);
    raised = __any_sync(kAllLanes, above);
    if (raised) {
      absorb_and_raise(s, weights);
    } else {
      l[0] = sum[0];
      l[1] = sum[1];
      shrink[0] = shrink[1] = 1.0f;  // the old ones need no registers then
    }
  }

 private:
  __device__ __forceinline__ bool is_above(float high, float low) const { return (high - low) * scale > kHeadroom; }

  __device__ __forceinline__ void take_weights(
      const float (&s)[kKeys / 2], unsigned (&weights)[kKeys / 4], const float (&base)[2], float (&sum)[2]) const {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x = ptx::exp2(fmaf(s[4 * j + 2 * r], scale, -base[r]));
        const float y = ptx::exp2(fmaf(s[4 * j + 2 * r + 1], scale, -base[r]));
        sum[r] += x + y;
        weights[2 * j + r] = Scalar::pack(x, y);
      }
    }
  }
};

}  // namespace kvt
