// The running softmax: what attention knows of a query row after the keys that it has seen.
//
//   m  (row max)  the largest score so far, in units of log2; -inf = the row has seen no key
//   l  (row sum)  sum of exp2(score - m)
//   o             sum of exp2(score - m) * value
//
// A state absorbs scores, is merged with the state of other keys, and is normalized at the end: out = o / l and
// lse = log(sum of exp(score)) = (m + log2(l)) * ln(2).
//
// The -inf guard: while a row has seen only masked keys, its m is -inf, and exp2(score - m) = exp2(-inf - -inf) is NaN.
// What is subtracted from scores is therefore base_of(m), which is 0 while m is -inf. A masked score then has weight
// exp2(-inf) = 0, and the row keeps l = 0 and o = 0.
//
// Source: online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867), alg. 3.
#pragma once

#include <kvt/base/numbers.cuh>
#include <kvt/ptx/math.cuh>

namespace kvt {

// outer * tanh(inner * x), as outer * (1 - 2 / (exp(2 * inner * x) + 1)): within 2e-6 of `outer`.
__device__ __forceinline__ float capped(float x, float inner, float outer) {
  const float below = ptx::reciprocal(ptx::exp2(2.0f * kLog2E * inner * x) + 1.0f);
  return fmaf(-2.0f * outer, below, outer);
}

// What to subtract from the scores of a row.
__device__ __forceinline__ float base_of(float m) { return m == -kInfinity ? 0.0f : m; }

// Raise m to `highest`, where `base` is base_of(highest). Returns the factor for o.
__device__ __forceinline__ float raise(float& m, float& l, float highest, float base) {
  const float factor = ptx::exp2(m - base);
  m = highest;
  l *= factor;
  return factor;
}

// m and l of one row. Whoever holds the row's o, in fragments, vectors or memory, multiplies it by what these functions
// return.
struct SoftmaxRow {
  float m = -kInfinity;
  float l = 0.0f;

  // Absorb an attention sink: a score, in units of log2, without a value. Returns whether o changes, by `factor`.
  __device__ __forceinline__ bool absorb_sink(float sink, float& factor) {
    const float highest = fmaxf(m, sink);
    if (!(highest > -kInfinity)) return false;
    factor = ptx::exp2(m - highest);
    l = l * factor + ptx::exp2(sink - highest);
    m = highest;
    return true;
  }

  // The factor that makes o the output: numerator / l, or 0 for a row that has seen no key. NaN stays NaN.
  __device__ __forceinline__ float normalizer(float numerator = 1.0f) const {
    const float sum = l;
    return sum > 0.0f ? numerator / sum : sum == 0.0f ? 0.0f : sum;
  }

  // The log-sum-exp of the scores, natural log.
  __device__ __forceinline__ float lse() const { return l == 0.0f ? -kInfinity : (m + log2f(l)) * kLn2; }
};

// Merge kCount states of one row at once: first the largest m, then every l and o relative to it.
//   m_of(k)  m of the k-th state;   add(k, weight, l)  adds its l, times the weight, to `l`, and its o to the caller's
template <int kCount, typename MOf, typename Add>
__device__ __forceinline__ SoftmaxRow merge_rows(MOf m_of, Add add) {
  SoftmaxRow merged;
#pragma unroll
  for (int k = 0; k < kCount; ++k) merged.m = fmaxf(merged.m, m_of(k));
  const float base = base_of(merged.m);
#pragma unroll
  for (int k = 0; k < kCount; ++k) add(k, ptx::exp2(m_of(k) - base), merged.l);
  return merged;
}

// How two normalized results over disjoint keys combine: out = weight_a * out_a + weight_b * out_b.
struct NormalizedMerge {
  float weight_a, weight_b;
  float lse;  // of both together, natural log
};

// Two empty results combine to an empty one, and NaN stays NaN.
__device__ __forceinline__ NormalizedMerge merge_normalized(float lse_a, float lse_b) {
  const float highest = lse_a > lse_b ? lse_a : lse_b;
  float weight_a = 0.0f;
  float weight_b = 0.0f;
  float lse = highest;
  if (lse_a != lse_a || lse_b != lse_b) {
    weight_a = weight_b = lse = lse_a + lse_b;  // NaN
  } else if (highest > -kInfinity) {
    weight_a = expf(lse_a - highest);
    weight_b = expf(lse_b - highest);
    const float l = weight_a + weight_b;
    weight_a /= l;
    weight_b /= l;
    lse = highest + logf(l);
  }
  return {weight_a, weight_b, lse};
}

// The states of the query rows in columns 2t and 2t + 1 of each row tile, where tokens are the rows of a matrix
// product. They are over the tokens of one warp.
template <int kRowTiles, int kDimBlocks>
struct ColumnStates {
  float m[kRowTiles][2];              // the same in all lanes with the same t
  float l[kRowTiles][2];              // over this lane's tokens
  float o[kRowTiles][kDimBlocks][4];  // O^T: dims 16d + g and 16d + g + 8, columns 2t and 2t + 1

  __device__ __forceinline__ ColumnStates() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      m[r][0] = m[r][1] = -kInfinity;
      l[r][0] = l[r][1] = 0.0f;
#pragma unroll
      for (int d = 0; d < kDimBlocks; ++d) o[r][d][0] = o[r][d][1] = o[r][d][2] = o[r][d][3] = 0.0f;
    }
  }

  // Raise m of a column, and rescale what has been summed up.
  __device__ __forceinline__ void raise(int r, int c, float highest, float base) {
    const float factor = kvt::raise(m[r][c], l[r][c], highest, base);
#pragma unroll
    for (int d = 0; d < kDimBlocks; ++d) {
      o[r][d][c] *= factor;
      o[r][d][c + 2] *= factor;
    }
  }
};

}  // namespace kvt
