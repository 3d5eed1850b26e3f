// Decode and verify: the few query rows of one sequence and kv head against one split of its keys, per CTA.
//
//   q            [num_tokens, num_q_heads, head_dim]               scalar_t, rows of 16 bytes aligned
//   k_cache      block, kv head and slot by strides, head_dim contiguous, rows aligned to 16 bytes; v_cache alike
//   block_table  [batch, max_entries] int32: entries with block_starts, else block ids
//   seq_lens     [batch] int32, tokens, the new ones included;     0 = padding row, nothing of it is read
//   out          [num_tokens, num_q_heads, head_dim] scalar_t;     lse [num_tokens, num_q_heads] float32, natural log
//
// Launch:   grid = blocks of rows * max_splits * num_kv_heads, kv head fastest; CTA 32 * KVT_WARPS; dynamic shared
//           memory KVT_WARPS * KVT_STAGES * bytes of 16 tokens of K and V. sm_80 and later.
//           Macros: KVT_HEAD_DIM, KVT_BF16, KVT_ENTRIES, KVT_ROW_TILES (8 query rows each), KVT_WARPS, KVT_STAGES.
// Numerics: scores and running state in float32, weights in scalar_t; an empty sequence gives out = 0, lse = -inf.
// Source:   online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867), alg. 3; split-KV, Dao et al. 2023
//           (Flash-Decoding); merge by the last CTA to arrive, as NVIDIA's XQA kernels do.
//
// Tokens are the 16 rows of an MMA and query rows its 8 columns (S^T = K Q^T, O^T = V^T P^T), so that a group of up to
// 8 heads wastes nothing. A warp owns every KVT_WARPS-th step of 16 tokens and a FIFO of its own in shared memory: no
// CTA barrier in the loop.
#include <kvt/attention.cuh>
#include <kvt/locate.cuh>
#include <kvt/ptx/async_copy.cuh>
#include <kvt/ptx/atomic.cuh>
#include <kvt/ptx/matrix.cuh>
#include <kvt/ptx/scalar.cuh>

namespace kvt {

#if KVT_BF16
using scalar_t = ptx::BFloat16;
#else
using scalar_t = ptx::Half;
#endif
#if KVT_ENTRIES
using Locator = WarpEntries;
#else
using Locator = BlockIds;
#endif

constexpr int kHeadDim = KVT_HEAD_DIM;
constexpr int kRowTiles = KVT_ROW_TILES;
constexpr int kRows = 8 * kRowTiles;
constexpr int kWarps = KVT_WARPS;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = KVT_STAGES;
constexpr int kStep = 16;                                // tokens
constexpr int kChunks = kHeadDim / 8;                    // of 16 bytes, in a token's row
constexpr int kPitch = (kChunks + 7) / 8 * 8;            // chunks from row to row; the XOR below stays inside 8
constexpr int kHalfStage = kStep * kPitch * 16;          // bytes of K, then as many of V
constexpr int kStageBytes = 2 * kHalfStage;
constexpr int kDimPairs = (kHeadDim + 31) / 32;          // products of K and Q take 32 dims at a time
constexpr int kDimBlocks = kHeadDim / 16;
constexpr int kMinSplitTiles = kWarps * kStep / kTile;   // a step for every warp
constexpr int kMaxSplits = 128;
constexpr int kRowPitch = kHeadDim + 4;                  // floats; rows 2t and dims g of a fragment in 32 banks
static_assert(kHeadDim % 16 == 0, "an MMA covers 16 dims");
static_assert(kWarps * kStages * kStageBytes >= 4 * kRows * (kWarps * kRowPitch + 2 * kWarps), "room for the merge");
static_assert(kWarps * kStages * kStageBytes >= 4 * kRows * (kMaxSplits + 2), "room for the weights of the splits");

// The running softmax of the columns (query rows) 2t and 2t + 1 of each row tile, over the tokens of one warp.
struct State {
  float m[kRowTiles][2];                   // largest score so far, log2; the same in all lanes with the same t
  float l[kRowTiles][2];                   // sum of exp2(score - m) over this lane's tokens
  float o[kRowTiles][kDimBlocks][4];       // O^T: dims 16d + g and 16d + g + 8, columns 2t and 2t + 1

  __device__ __forceinline__ State() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      m[r][0] = m[r][1] = -kInfinity;
      l[r][0] = l[r][1] = 0.0f;
#pragma unroll
      for (int d = 0; d < kDimBlocks; ++d) o[r][d][0] = o[r][d][1] = o[r][d][2] = o[r][d][3] = 0.0f;
    }
  }
};

// What a lane knows of its columns.
struct Columns {
  int position[kRowTiles][2];
  float slope[kRowTiles][2];   // ALiBi, times log2(e); 0 where there is none
};

// Copy the K and V of 16 tokens to a stage. Lanes 0-15 know where the keys lie, lanes 16-31 the values.
__device__ __forceinline__ void copy_step(unsigned stage, const unsigned short* row, unsigned long long policy) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kStep * kChunks / 32; ++i) {
    const int piece = i * 32 + lane;
    const int token = piece / kChunks;
    const int chunk = piece % kChunks;
    const unsigned short* key = broadcast_pointer(row, token);
    const unsigned short* value = broadcast_pointer(row, token + 16);
    const unsigned line = stage + token * kPitch * 16;
    // K is read 4 chunks of 2 neighbouring rows at a time, V one chunk of 8 rows: each to 8 different bank groups
    ptx::copy_async_16(line + (chunk ^ (token & 1) << 2) * 16, key + chunk * 8, policy);
    ptx::copy_async_16(line + kHalfStage + (chunk ^ (token & 7)) * 16, value + chunk * 8, policy);
  }
}

// Absorb the 16 tokens from `first` on.
__device__ __forceinline__ void attend_step(
    const AttentionParams& p, const uint4 (&q)[kRowTiles][kDimPairs], const Columns& columns, const KeyRange& keys,
    int seq_len, unsigned stage, int first, State& state) {
  const int lane = lane_id();
  const int g = lane >> 2;
  const int t = lane & 3;

  float s[kRowTiles][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) s[r][0] = s[r][1] = s[r][2] = s[r][3] = 0.0f;
  const unsigned key_row = stage + g * kPitch * 16;
#pragma unroll
  for (int d = 0; d < kDimPairs; ++d) {
    const unsigned chunk = ((4 * d + t) ^ (g & 1) << 2) * 16;
    const uint4 low = ptx::load_shared_16(key_row + chunk);
    const uint4 high = ptx::load_shared_16(key_row + 8 * kPitch * 16 + chunk);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      // which 16 of the 32 dims an MMA takes is free, as long as K and Q agree
      scalar_t::multiply_add(s[r], low.x, high.x, low.y, high.y, q[r][d].x, q[r][d].y);
      scalar_t::multiply_add(s[r], low.z, high.z, low.w, high.w, q[r][d].z, q[r][d].w);
    }
  }

  const bool is_partial = first < keys.full_begin || first + kStep > keys.full_end;
  unsigned weights[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[r][i] = scaled_score(p, s[r][i]);
    if (p.alibi_slopes != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int distance = columns.position[r][i & 1] - (first + g + (i >> 1) * 8);
        s[r][i] -= columns.slope[r][i & 1] * fabsf(static_cast<float>(distance));
      }
    }
    if (is_partial) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!is_visible(p, columns.position[r][i & 1], first + g + (i >> 1) * 8, seq_len)) s[r][i] = -kInfinity;
      }
    }
    float highest[2], base[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      highest[c] = fmaxf(state.m[r][c], max_over_rows(fmaxf(s[r][c], s[r][c + 2])));
      base[c] = highest[c] == -kInfinity ? 0.0f : highest[c];  // -inf - -inf is NaN
    }
    if (__any_sync(kAllLanes, highest[0] > state.m[r][0] || highest[1] > state.m[r][1])) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float shrink = ptx::exp2(state.m[r][c] - base[c]);
        state.m[r][c] = highest[c];
        state.l[r][c] *= shrink;
#pragma unroll
        for (int d = 0; d < kDimBlocks; ++d) {
          state.o[r][d][c] *= shrink;
          state.o[r][d][c + 2] *= shrink;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[r][i] = ptx::exp2(s[r][i] - base[i & 1]);
    state.l[r][0] += s[r][0] + s[r][2];
    state.l[r][1] += s[r][1] + s[r][3];
    // the weights are tokens x rows; as an operand they are wanted rows first
    weights[r][0] = ptx::transpose_matrix(scalar_t::pack(s[r][0], s[r][1]));
    weights[r][1] = ptx::transpose_matrix(scalar_t::pack(s[r][2], s[r][3]));
  }

  const int token = (lane & 7) + (lane >> 4) * 8;
  const unsigned value_row = stage + kHalfStage + token * kPitch * 16;
#pragma unroll
  for (int d = 0; d < kDimBlocks; ++d) {
    unsigned v[4];
    ptx::load_matrices_transposed(v, value_row + ((2 * d + (lane >> 3 & 1)) ^ (token & 7)) * 16);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      scalar_t::multiply_add(state.o[r][d], v[0], v[1], v[2], v[3], weights[r][0], weights[r][1]);
    }
  }
}

// The results of one row over disjoint keys: `o` is the sum of exp2(score - m) * value.
struct Merged {
  float m = -kInfinity;
  float l = 0.0f;
};

// Write one row's output: 4 dims of it, and by one thread its log-sum-exp.
__device__ __forceinline__ void write_row(
    const AttentionParams& p, const RowBlock& block, int kv_head, int row, int dim, float4 o, Merged sums) {
  const RowPlace place = place_of_row(p, block, kv_head, row);
  if (p.sinks != nullptr && block.seq_len > 0) {
    const float sink = p.sinks[place.q_head] * kLog2E;
    const float m = fmaxf(sums.m, sink);
    if (m > -kInfinity) {
      const float shrink = ptx::exp2(sums.m - m);
      sums.l = sums.l * shrink + ptx::exp2(sink - m);
      o.x *= shrink, o.y *= shrink, o.z *= shrink, o.w *= shrink;
      sums.m = m;
    }
  }
  const float factor = sums.l > 0.0f ? 1.0f / sums.l : sums.l == 0.0f ? 0.0f : sums.l;  // NaN stays NaN
  const uint2 packed{scalar_t::pack(o.x * factor, o.y * factor), scalar_t::pack(o.z * factor, o.w * factor)};
  *reinterpret_cast<uint2*>(p.out + place.token * p.out_token + place.q_head * p.out_head + dim) = packed;
  if (p.lse != nullptr && dim == 0) {
    const float lse = sums.l == 0.0f ? -kInfinity : (sums.m + log2f(sums.l)) * kLn2;
    p.lse[static_cast<long long>(place.token) * p.num_kv_heads * p.group_size + place.q_head] = lse;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) kvt_decode(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x >> 5;
  const int lane = lane_id();
  const int kv_head = blockIdx.x % p.num_kv_heads;
  const int split = blockIdx.x / p.num_kv_heads % p.max_splits;
  const int index = blockIdx.x / p.num_kv_heads / p.max_splits;

  const RowBlock block = find_row_block<kRows>(p, index);
  if (block.num_rows == 0 || (p.has_prefill && block.num_queries > kMaxDecodeQueries)) return;
  const KeyRange keys = visible_keys(p, block);
  const int first_tile = keys.begin / kTile;
  const int num_tiles = max(0, (keys.end + kTile - 1) / kTile - first_tile);
  const int even_tiles = (num_tiles + p.max_splits - 1) / p.max_splits;
  const int split_tiles = max(1, p.fixed_splits ? even_tiles : max(even_tiles, kMinSplitTiles));
  const int num_splits = max(1, (num_tiles + split_tiles - 1) / split_tiles);
  if (split >= num_splits) return;
  const int begin = (first_tile + split * split_tiles) * kTile;
  const int end = min(keys.end, begin + split_tiles * kTile);
  // steps of the CTA, then of this warp
  const int first_step = max(begin, keys.begin) / kStep;
  const int end_step = max(first_step, (end + kStep - 1) / kStep);
  const int count = max(0, end_step - first_step - warp + kWarps - 1) / kWarps;

  uint4 q[kRowTiles][kDimPairs];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int row = 8 * r + (lane >> 2);
    const bool is_row = row < block.num_rows && num_tiles > 0;
    const RowPlace place = place_of_row(p, block, kv_head, is_row ? row : 0);
    const unsigned short* from = p.q + place.token * p.q_token + place.q_head * p.q_head + (lane & 3) * 8;
#pragma unroll
    for (int d = 0; d < kDimPairs; ++d) {
      const bool is_dim = kHeadDim % 32 == 0 || 32 * d + (lane & 3) * 8 < kHeadDim;
      q[r][d] = is_row && is_dim ? *reinterpret_cast<const uint4*>(from + 32 * d) : uint4{0, 0, 0, 0};
    }
  }
  Columns columns;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = min(8 * r + 2 * (lane & 3) + c, block.num_rows - 1);
      columns.position[r][c] = block.position(row, p.group_size);
      const int q_head = place_of_row(p, block, kv_head, row).q_head;
      columns.slope[r][c] = p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[q_head] * kLog2E;
    }
  }

  const unsigned fifo = ptx::shared_address(shared) + warp * kStages * kStageBytes;
  if (kHeadDim % 32 != 0) {
    // the last product takes dims that do not exist; Q is 0 there, and 0 * NaN is NaN
    for (int i = lane; i < kStages * kStageBytes / 16; i += 32) ptx::store_shared_16(fifo + i * 16, {0, 0, 0, 0});
    __syncwarp();
  }
  State state;
  if (count > 0) {
    const unsigned long long policy = ptx::evict_first_policy();
    const int last = block.seq_len - 1;
    Locator locate(p, block.sequence);
    locate.seek((first_step + warp) * kStep);
    const auto step_at = [&](int i) { return (first_step + warp + i * kWarps) * kStep; };
    const auto row_of = [&](Place place) {
      return lane < 16 ? p.k_cache + kv_head * p.k_head + place.block * p.k_block + place.slot * p.k_slot
                       : p.v_cache + kv_head * p.v_head + place.block * p.v_block + place.slot * p.v_slot;
    };
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      if (i < count) copy_step(fifo + i * kStageBytes, row_of(locate.of_step(step_at(i), last)), policy);
      ptx::commit_copies();
    }
    int stage = 0;
    for (int i = 0; i < count; ++i) {
      Place ahead{0, 0};
      if (i + kStages < count) ahead = locate.of_step(step_at(i + kStages), last);  // on its way during the products
      ptx::wait_for_copies<kStages - 1>();
      __syncwarp();
      attend_step(p, q, columns, keys, block.seq_len, fifo + stage * kStageBytes, step_at(i), state);
      __syncwarp();
      if (i + kStages < count) copy_step(fifo + stage * kStageBytes, row_of(ahead), policy);
      ptx::commit_copies();
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    ptx::wait_for_copies<0>();
  }

  // the warps' results, over the stages
  __syncthreads();
  float* const warp_o = reinterpret_cast<float*>(shared);              // [kWarps][kRows][kRowPitch]
  float* const warp_m = warp_o + kWarps * kRows * kRowPitch;           // [kWarps][kRows]
  float* const warp_l = warp_m + kWarps * kRows;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = 8 * r + 2 * (lane & 3) + c;
      const float l = sum_over_rows(state.l[r][c]);
      if (lane < 4) {
        warp_m[warp * kRows + row] = state.m[r][c];
        warp_l[warp * kRows + row] = l;
      }
      float* const to = warp_o + (warp * kRows + row) * kRowPitch + (lane >> 2);
#pragma unroll
      for (int d = 0; d < kDimBlocks; ++d) {
        to[16 * d] = state.o[r][d][c];
        to[16 * d + 8] = state.o[r][d][c + 2];
      }
    }
  }
  __syncthreads();
  const int group = index * p.num_kv_heads + kv_head;
  constexpr int kPartial = kRows * (kHeadDim + 2);
  float* const partials = p.partials + static_cast<long long>(group) * p.max_splits * kPartial;
  for (int i = threadIdx.x; i < block.num_rows * kHeadDim / 4; i += kThreads) {
    const int row = i / (kHeadDim / 4);
    const int dim = i % (kHeadDim / 4) * 4;
    Merged sums;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sums.m = fmaxf(sums.m, warp_m[w * kRows + row]);
    const float base = sums.m == -kInfinity ? 0.0f : sums.m;
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = ptx::exp2(warp_m[w * kRows + row] - base);
      const float4 part = *reinterpret_cast<const float4*>(warp_o + (w * kRows + row) * kRowPitch + dim);
      o.x += weight * part.x, o.y += weight * part.y, o.z += weight * part.z, o.w += weight * part.w;
      sums.l += weight * warp_l[w * kRows + row];
    }
    if (num_splits == 1) {
      write_row(p, block, kv_head, row, dim, o, sums);
    } else {
      float* const partial = partials + split * kPartial;
      *reinterpret_cast<float4*>(partial + row * kHeadDim + dim) = o;
      if (dim == 0) {
        partial[kRows * kHeadDim + row] = sums.m;
        partial[kRows * kHeadDim + kRows + row] = sums.l;
      }
    }
  }
  if (num_splits == 1) return;

  // the CTA that arrives last merges the splits, in their order; the counter is then 0 again
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = ptx::increment_acq_rel_gpu(p.counters + group, num_splits - 1) == num_splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  float* const split_weight = reinterpret_cast<float*>(shared);        // [kMaxSplits][kRows]
  float* const row_m = split_weight + kMaxSplits * kRows;              // [kRows]
  float* const row_l = row_m + kRows;
  for (int row = threadIdx.x; row < block.num_rows; row += kThreads) {
    Merged sums;
    for (int s = 0; s < num_splits; ++s) {
      sums.m = fmaxf(sums.m, ptx::load_l2(partials + s * kPartial + kRows * kHeadDim + row));
    }
    const float base = sums.m == -kInfinity ? 0.0f : sums.m;
    for (int s = 0; s < num_splits; ++s) {
      const float* const partial = partials + s * kPartial + kRows * kHeadDim;
      const float weight = ptx::exp2(ptx::load_l2(partial + row) - base);
      split_weight[s * kRows + row] = weight;
      sums.l += weight * ptx::load_l2(partial + kRows + row);
    }
    row_m[row] = sums.m;
    row_l[row] = sums.l;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < block.num_rows * kHeadDim / 4; i += kThreads) {
    const int row = i / (kHeadDim / 4);
    const int dim = i % (kHeadDim / 4) * 4;
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
    for (int s = 0; s < num_splits; ++s) {
      const float weight = split_weight[s * kRows + row];
      const float4 part = ptx::load_l2_16(partials + s * kPartial + row * kHeadDim + dim);
      o.x += weight * part.x, o.y += weight * part.y, o.z += weight * part.z, o.w += weight * part.w;
    }
    write_row(p, block, kv_head, row, dim, o, {row_m[row], row_l[row]});
  }
}

}  // namespace kvt
