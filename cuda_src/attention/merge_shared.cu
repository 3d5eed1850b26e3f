// Merge the attention to what a row shares with others and to the rest of it, by their log-sum-exp.
//
//   rest_out      [num_tokens, num_q_heads, head_dim] scalar_t, by strides;   rest_lse  float32, natural log, without them
//   unit_out      [levels, num_tokens, num_q_heads, head_dim] scalar_t, contiguous;   unit_lse  without head_dim
//   token_levels  [num_tokens] int32, of a row's units; -1 for a padding row
//   places        [num_tokens] int32: where a query is in all of these; null: in its place
//   out           [num_tokens, num_q_heads, head_dim] scalar_t, by strides, may be rest_out where there are no places
//   lse           [num_tokens, num_q_heads] float32 or null, may be rest_lse where there are no places
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
  const unsigned short* rest_out;
  const float* rest_lse;
  const unsigned short* unit_out;
  const float* unit_lse;
  const int* token_levels;
  const int* places;
  const float* sinks;
  long long out_token, out_head, rest_token, rest_head;
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
  const bool is_padding = levels < 0;
  // `out` already has the rest's result, and no sink must be added: only rows with units need work
  const bool is_done = p.rest_out == p.out && (p.sinks == nullptr || is_padding);
  if (levels <= 0 && is_done) return;
  const long long place = p.places == nullptr ? token : p.places[token];
  const float rest_lse = p.rest_lse[place * p.num_q_heads + head];
  float lses[kMostLevels + 1];
  float highest = rest_lse;
#pragma unroll
  for (int i = 0; i < kMostLevels; ++i) {
    lses[i] = -kInfinity;
    if (i < levels) lses[i] = p.unit_lse[(i * static_cast<long long>(p.num_tokens) + place) * p.num_q_heads + head];
    highest = fmaxf(highest, lses[i]);
  }
  lses[kMostLevels] = rest_lse;
  const float sink = p.sinks == nullptr || is_padding ? -kInfinity : p.sinks[head];
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
  const unsigned short* const rest = p.rest_out + place * p.rest_token + head * p.rest_head;
  for (int dim = 2 * lane_id(); dim < p.head_dim; dim += 64) {
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
    if (weights[kMostLevels] != 0.0f) add(*reinterpret_cast<const unsigned*>(rest + dim), weights[kMostLevels]);
    *reinterpret_cast<unsigned*>(out + dim) = scalar_t::pack(merged.x * factor, merged.y * factor);
  }
}

}  // namespace kvt
