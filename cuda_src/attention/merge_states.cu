// Merge the attention over two disjoint sets of keys into that over both, by their log-sum-exp.
//
//   out_a, out_b   [num_tokens, num_q_heads, head_dim] scalar_t or float32, by strides;   out contiguous
//   lse_a, lse_b   [num_tokens, num_q_heads] float32, natural log, contiguous, -inf = no keys;   lse alike
//
// Launch:   a thread per pair of dims, CTA 256. Macros: KVT_DTYPE 0 = float32, 1 = float16, 2 = bfloat16. sm_80.
// Numerics: float32; an empty side is not read, two of them give 0 and -inf.
// Source:   Ye et al. 2025 (FlashInfer, arXiv:2501.01005), composition of attention states.
#include <kvt/ptx/scalar.cuh>

namespace kvt {

// Filled in by kvtoolkit/cuda/merge.py, in this order. Strides in elements.
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
#if KVT_DTYPE == 1
using scalar_t = ptx::Half;
#else
using scalar_t = ptx::BFloat16;
#endif
__device__ __forceinline__ float2 load_pair(const void* base, long long element) {
  const auto from = static_cast<const unsigned short*>(base) + element;
  const unsigned packed = from[0] | from[1] << 16;  // by halves: a stride may be odd
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
  const float a = p.lse_a[row];
  const float b = p.lse_b[row];
  const float highest = a > b ? a : b;
  float weight_a = 0.0f;
  float weight_b = 0.0f;
  float lse = highest;
  if (a != a || b != b) {
    weight_a = weight_b = lse = a + b;  // NaN
  } else if (highest > __int_as_float(0xFF800000)) {  // -inf - -inf is NaN: two empty sides merge to an empty one
    weight_a = expf(a - highest);
    weight_b = expf(b - highest);
    const float mass = weight_a + weight_b;
    weight_a /= mass;
    weight_b /= mass;
    lse = highest + logf(mass);
  }
  float2 merged{0.0f, 0.0f};
  // an empty side may hold anything, and 0 * NaN is NaN
  if (weight_a != 0.0f) {
    const float2 part = load_pair(p.out_a, token * p.a_token + head * p.a_head + dim);
    merged.x = weight_a * part.x;
    merged.y = weight_a * part.y;
  }
  if (weight_b != 0.0f) {
    const float2 part = load_pair(p.out_b, token * p.b_token + head * p.b_head + dim);
    merged.x += weight_b * part.x;
    merged.y += weight_b * part.y;
  }
  store_pair(p.out, (row * p.head_pairs) * 2 + dim, merged);
  if (dim == 0) p.lse[row] = lse;
}

}  // namespace kvt
