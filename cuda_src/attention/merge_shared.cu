// Merge the attention to what a row shares with others and to the rest of it, by their log-sum-exp, in place.
//
//   out           [num_tokens, num_q_heads, head_dim] scalar_t, by strides: the rest's, becomes that of all keys
//   rest_lse      [num_tokens, num_q_heads] float32, natural log;   lse the same or null, may be rest_lse
//   unit_out      [levels, num_tokens, num_q_heads, head_dim] scalar_t, contiguous;   unit_lse  without head_dim
//   token_levels  [num_tokens] int32, of a row's units; -1 for a padding row
//   places        [num_tokens] int32 or null: where a query is in unit_out
//
// Launch:   one warp per query and head, CTA 256. sm_80 and later. Macros: KVT_BF16.
// Numerics: float32. Sinks are counted here, once.
// Source:   Ye et al. 2025 (FlashInfer, arXiv:2501.01005), composition of attention states.
#include <kvt/attention/softmax.cuh>
#include <kvt/base/scalar.cuh>
#include <kvt/base/warp.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kMostLevels = 3;  // as in shared.cu

// Absent arrays are null. Strides in elements.
struct MergeSharedParams {
  unsigned short* out;
  float* lse;
  const float* rest_lse;
  const unsigned short* unit_out;
  const float* unit_lse;
  const int* token_levels;
  const int* places;
  const float* sinks;
  long long out_token, out_head;
  int num_tokens, num_q_heads, head_dim;
};

extern "C" __global__ void __launch_bounds__(256) kvt_merge_shared(const __grid_constant__ MergeSharedParams p) {
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const int row = blockIdx.x * 8 + (threadIdx.x >> 5);
  const int token = row / p.num_q_heads;
  if (token >= p.num_tokens) return;
  const int head = row - token * p.num_q_heads;
  const int levels = p.token_levels[token];
  const float rest_lse = p.rest_lse[row];
  if (levels < 0 || (levels == 0 && p.sinks == nullptr)) return;  // a padding row's are right, too
  const long long place = p.places == nullptr || levels == 0 ? token : p.places[token];
  float lses[kMostLevels + 1];
  float highest = rest_lse;
#pragma unroll
  for (int i = 0; i < kMostLevels; ++i) {
    lses[i] = -kInfinity;
    if (i < levels) lses[i] = p.unit_lse[(i * static_cast<long long>(p.num_tokens) + place) * p.num_q_heads + head];
    highest = fmaxf(highest, lses[i]);
  }
  lses[kMostLevels] = rest_lse;
  const float sink = p.sinks == nullptr ? -kInfinity : p.sinks[head];
  highest = fmaxf(highest, sink);
  const float base = base_of(highest);
  float weights[kMostLevels + 1];
  float sum = sink == -kInfinity ? 0.0f : expf(sink - base);
#pragma unroll
  for (int i = 0; i <= kMostLevels; ++i) {
    weights[i] = lses[i] == -kInfinity ? 0.0f : expf(lses[i] - base);
    sum += weights[i];
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  __syncwarp();  // all lanes have read what may be overwritten
  if (p.lse != nullptr && lane_id() == 0) p.lse[row] = sum == 0.0f ? -kInfinity : logf(sum) + base;
  unsigned short* const out = p.out + token * p.out_token + head * p.out_head;
  for (int dim = 2 * lane_id(); dim < p.head_dim; dim += 64) {
    unsigned* const to = reinterpret_cast<unsigned*>(out + dim);
    float2 merged{0.0f, 0.0f};
    const auto add = [&](unsigned packed, float weight) {
      merged.x += weight * scalar_t::low(packed);
      merged.y += weight * scalar_t::high(packed);
    };
#pragma unroll
    for (int i = 0; i < kMostLevels; ++i) {
      if (weights[i] == 0.0f) continue;  // an empty side may hold anything
      const long long at = (i * static_cast<long long>(p.num_tokens) + place) * p.num_q_heads + head;
      add(*reinterpret_cast<const unsigned*>(p.unit_out + at * p.head_dim + dim), weights[i]);
    }
    if (weights[kMostLevels] != 0.0f) add(*to, weights[kMostLevels]);
    *to = scalar_t::pack(merged.x * factor, merged.y * factor);
  }
}

}  // namespace kvt
