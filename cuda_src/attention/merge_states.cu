// Merge the attention over two disjoint sets of keys into the attention over both, by their log-sum-exp.
//
//   out_a, out_b   [num_tokens, num_q_heads, head_dim] scalar_t or float32, by strides;   out contiguous
//   lse_a, lse_b   [num_tokens, num_q_heads] float32, natural log, contiguous, -inf = no keys;   lse the same
//
// Launch:   one thread per pair of dims, CTA 256. sm_80 and later.
//           Macro: KVT_DTYPE 0 = float32, 1 = float16, 2 = bfloat16.
// Numerics: float32; the output of an empty side is not read; two empty sides give out = 0, lse = -inf.
// Source:   Ye et al. 2025 (FlashInfer, arXiv:2501.01005), composition of attention states.
#define KVT_BF16 (KVT_DTYPE == 2)
#include <kvt/attention/softmax.cuh>
#include <kvt/base/scalar.cuh>

namespace kvt {

// Packed by kvtoolkit/cuda/merge.py, field by field in this order. Strides count elements.
struct MergeParams {
  void* out;
  float* lse;
  const void* out_a;
  const float* lse_a;
  const void* out_b;
  const float* lse_b;
  long long a_token, a_head, b_token, b_head;
  long long num_rows;
  int num_heads, head_pairs;
};

#if KVT_DTYPE == 0
__device__ __forceinline__ float2 load_pair(const void* base, long long element) {
  const float* const from = static_cast<const float*>(base) + element;
  return {from[0], from[1]};
}
__device__ __forceinline__ void store_pair(void* base, long long element, float2 pair) {
  float* const to = static_cast<float*>(base) + element;
  to[0] = pair.x;
  to[1] = pair.y;
}
#else
__device__ __forceinline__ float2 load_pair(const void* base, long long element) {
  const auto from = static_cast<const unsigned short*>(base) + element;
  const unsigned packed = from[0] | from[1] << 16;  // two loads, because a stride may be odd
  return {scalar_t::low(packed), scalar_t::high(packed)};
}
__device__ __forceinline__ void store_pair(void* base, long long element, float2 pair) {
  *reinterpret_cast<unsigned*>(static_cast<unsigned short*>(base) + element) = scalar_t::pack(pair.x, pair.y);
}
#endif

extern "C" __global__ void __launch_bounds__(256) kvt_merge_states(const __grid_constant__ MergeParams p) {
  const long long index = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;
  const long long row = index / p.head_pairs;
  if (row >= p.num_rows) return;
  const int dim = (index - row * p.head_pairs) * 2;
  const long long token = row / p.num_heads;
  const int head = row - token * p.num_heads;
  const NormalizedMerge weights = merge_normalized(p.lse_a[row], p.lse_b[row]);
  float2 merged{0.0f, 0.0f};
  // the output of an empty side may hold anything, and 0 * NaN is NaN
  if (weights.weight_a != 0.0f) {
    const float2 part = load_pair(p.out_a, token * p.a_token + head * p.a_head + dim);
    merged.x = weights.weight_a * part.x;
    merged.y = weights.weight_a * part.y;
  }
  if (weights.weight_b != 0.0f) {
    const float2 part = load_pair(p.out_b, token * p.b_token + head * p.b_head + dim);
    merged.x += weights.weight_b * part.x;
    merged.y += weights.weight_b * part.y;
  }
  store_pair(p.out, (row * p.head_pairs) * 2 + dim, merged);
  if (dim == 0) p.lse[row] = weights.lse;
}

}  // namespace kvt
