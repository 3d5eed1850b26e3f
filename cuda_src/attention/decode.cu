// Decode and verify: the few query rows of one sequence and kv head against one split of its keys, per CTA.
//
//   q            [num_tokens, num_q_heads, head_dim]               scalar_t, rows of 16 bytes aligned
//   k_cache      block, kv head and slot by strides, head_dim contiguous, rows aligned to 16 bytes; v_cache alike
//   block_table  [batch, max_blocks] int32 block ids; entries come as a list of granules, see expand.cu
//   seq_lens     [batch] int32, tokens, the new ones included;     0 = padding row, nothing of it is read
//   out          [num_tokens, num_q_heads, head_dim] scalar_t;     lse [num_tokens, num_q_heads] float32, natural log
//
// Launch:   CTA 32 * KVT_WARPS; dynamic shared memory for the FIFOs and the warps' results, or an Inbox; the grid is
//           planned (KVT_PLANNED):  (num_kv_heads, num_row_blocks, ranges)
//           even:                   (num_kv_heads * blocks of rows, max_splits)
//           even with KVT_CLUSTER:  (KVT_CLUSTER, num_kv_heads, blocks of rows)
//           sm_80 and later. Macros: KVT_HEAD_DIM, KVT_BF16, KVT_ROW_TILES (8 query rows each), KVT_WARPS,
//           KVT_STAGES, KVT_PLANNED, KVT_CLUSTER (CTAs that share one sequence and merge through shared memory, sm_90;
//           1 = none).
// Numerics: scores and running state in float32, weights in scalar_t; an empty sequence gives out = 0, lse = -inf.
// Source:   online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867), alg. 3; split-KV, Dao et al. 2023
//           (Flash-Decoding); merge by the last CTA to arrive, as NVIDIA's XQA kernels do.
//
// Tokens are the 16 rows of an MMA and query rows its 8 columns (S^T = K Q^T, O^T = V^T P^T), so that a group of up to
// 8 heads wastes nothing. A warp owns every KVT_WARPS-th step of 16 tokens and a FIFO of its own in shared memory: no
// CTA barrier in the loop. The FIFO runs on from one sequence of the CTA's range to the next.
#include <kvt/attention.cuh>
#include <kvt/locate.cuh>
#include <kvt/ptx/async_copy.cuh>
#include <kvt/ptx/atomic.cuh>
#include <kvt/ptx/cluster.cuh>
#include <kvt/ptx/matrix.cuh>
#include <kvt/ptx/scalar.cuh>

namespace kvt {

#if KVT_BF16
using scalar_t = ptx::BFloat16;
#else
using scalar_t = ptx::Half;
#endif

constexpr int kHeadDim = KVT_HEAD_DIM;
constexpr int kRowTiles = KVT_ROW_TILES;
constexpr int kRows = 8 * kRowTiles;
constexpr int kWarps = KVT_WARPS;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = KVT_STAGES;
constexpr int kChunks = kHeadDim / 8;                    // of 16 bytes, in a token's row
constexpr int kPitch = (kChunks + 7) / 8 * 8;            // chunks from row to row; the XOR below stays inside 8
constexpr int kHalfStage = kStep * kPitch * 16;          // bytes of K, then as many of V
constexpr int kStageBytes = 2 * kHalfStage;
constexpr int kDimPairs = (kHeadDim + 31) / 32;          // products of K and Q take 32 dims at a time
constexpr int kDimBlocks = kHeadDim / 16;
constexpr int kCluster = KVT_CLUSTER;
constexpr int kStride = kWarps * kCluster;               // steps from one of a warp to its next
using Locator = StepBlocks<kStride>;
constexpr int kMinSplitTiles = kWarps * kStep / kTile;   // a step for every warp
constexpr int kRowPitch = kHeadDim + 4;                  // floats; rows 2t and dims g of a fragment in 32 banks
constexpr int kFifoBytes = kWarps * kStages * kStageBytes;
constexpr int kPartial = kRows * (kHeadDim + 2);         // floats: O, then m and l of each row
// a warp's results of a piece, floats: behind the FIFOs, or in the warp's own, which a cluster needs no more by then
constexpr int kStateFloats = kRows * (kRowPitch + 2);
constexpr int kScratchAt = kCluster == 1 ? kFifoBytes : 0;
constexpr int kScratchPitch = kCluster == 1 ? kStateFloats : kStages * kStageBytes / 4;
static_assert(kStateFloats <= kScratchPitch, "a warp's results fit into its FIFO");
static_assert(kHeadDim % 16 == 0, "an MMA covers 16 dims");
static_assert(kCluster == 1 || !KVT_PLANNED, "a cluster shares one sequence");

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

// Copy the K and V of 16 tokens to a stage: token l % 16 lies at the place that lane l knows.
__device__ __forceinline__ void copy_step(
    const AttentionParams& p, int kv_head, unsigned stage, Place place, unsigned long long policy) {
  const int lane = lane_id();
  // lanes 0-15 work out where the keys lie, lanes 16-31 the values
  const unsigned short* const row =
      lane < 16 ? p.k_cache + kv_head * p.k_head + place.block * p.k_block + place.slot * p.k_slot
                : p.v_cache + kv_head * p.v_head + place.block * p.v_block + place.slot * p.v_slot;
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

__device__ __forceinline__ void add_scaled(float4& sum, float weight, const float4& part) {
  sum.x += weight * part.x, sum.y += weight * part.y, sum.z += weight * part.z, sum.w += weight * part.w;
}

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

// A block of rows and the steps of its sequence that this CTA takes.
struct Piece {
  RowBlock block;
  int begin, end;       // steps
  int num_pieces;       // of the sequence
  int slot;             // of this one among the partial results
  int first_slot;       // of the sequence's first

  // Of the sequence's k-th piece.
  __device__ __forceinline__ int slot_of(int k) const {
#if KVT_PLANNED
    return k == 0 ? first_slot : first_slot - 1 + 2 * k;
#else
    return first_slot + k;
#endif
  }
};

#if KVT_PLANNED

// The pieces of one of the ranges that kvt_plan cut the batch into. A range has at most two pieces of sequences that
// are cut: its first, which goes on with a sequence, has slot 2 * range, its last, which begins one, the next slot.
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const AttentionParams& p)
      : begin_(p.ranges[blockIdx.z]), end_(p.ranges[blockIdx.z + 1]), sequence_(begin_.x) {}

  __device__ __forceinline__ bool next(const AttentionParams& p, Piece& piece) {
    while (sequence_ < end_.x || (sequence_ == end_.x && end_.y > 0)) {
      const int sequence = sequence_++;
      piece.block = row_block_at<kRows>(p, sequence, blockIdx.y * kRows, sequence == begin_.x ? begin_.z : -1);
      if (piece.block.num_rows == 0 || (p.has_prefill && piece.block.num_queries > kMaxDecodeQueries)) continue;
      const StepRange steps = visible_steps(p.left, p.right, piece.block.seq_len, piece.block.num_queries);
      const bool goes_on = sequence == begin_.x && begin_.y > 0;
      const bool is_cut = sequence == end_.x;
      piece.begin = steps.begin + (goes_on ? begin_.y : 0);
      piece.end = is_cut ? steps.begin + end_.y : steps.end;
      piece.num_pieces = 1;
      if (goes_on || is_cut) {
        const int2 cut = p.sequences[sequence];  // its first range, and into how many it is cut
        piece.num_pieces = cut.y;
        piece.first_slot = 2 * cut.x + 1;
        piece.slot = 2 * blockIdx.z + (goes_on ? 0 : 1);
      }
      return true;
    }
    return false;
  }

  // Of a piece's sequence and block of rows: where the CTAs that share it count their arrivals.
  __device__ __forceinline__ int counter(const AttentionParams& p, const Piece& piece) const {
    return (piece.block.sequence * p.num_row_blocks + blockIdx.y) * p.num_kv_heads + blockIdx.x;
  }

  __device__ __forceinline__ float* partial(const AttentionParams& p, int slot) const {
    const long long block = static_cast<long long>(slot) * p.num_row_blocks + blockIdx.y;
    return p.partials + (block * p.num_kv_heads + blockIdx.x) * kPartial;
  }

  __device__ __forceinline__ int kv_head() const { return blockIdx.x; }

 private:
  int4 begin_, end_;   // sequence, steps of it that belong to the range before, its length
  int sequence_;
};

#else

// One piece: a split of one sequence, whatever the batch holds beside it. A cluster shares the only sequence.
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const AttentionParams& p) {
    if (kCluster > 1) {
      split_ = blockIdx.x;
      kv_head_ = blockIdx.y;
      index_ = blockIdx.z;
    } else {
      split_ = blockIdx.y;
      index_ = blockIdx.x / p.num_kv_heads;
      kv_head_ = blockIdx.x - index_ * p.num_kv_heads;
    }
  }

  __device__ __forceinline__ bool next(const AttentionParams& p, Piece& piece) {
    if (is_done_) return false;
    is_done_ = true;
    piece.block = find_row_block<kRows>(p, index_);
    if (piece.block.num_rows == 0 || (p.has_prefill && piece.block.num_queries > kMaxDecodeQueries)) return false;
    const StepRange steps = visible_steps(p.left, p.right, piece.block.seq_len, piece.block.num_queries);
    if (kCluster > 1) {  // the CTAs take turns, so that where one begins does not depend on the length
      piece.begin = steps.begin + split_ * kWarps;
      piece.end = steps.end;
      return true;
    }
    const int first_tile = steps.begin * kStep / kTile;
    const int num_tiles = (steps.end * kStep + kTile - 1) / kTile - first_tile;
    const int even_tiles = (num_tiles + p.max_splits - 1) / p.max_splits;
    const int split_tiles = max(1, p.fixed_splits ? even_tiles : max(even_tiles, kMinSplitTiles));
    piece.num_pieces = max(1, (num_tiles + split_tiles - 1) / split_tiles);
    piece.begin = max(steps.begin, (first_tile + split_ * split_tiles) * (kTile / kStep));
    piece.end = min(steps.end, (first_tile + (split_ + 1) * split_tiles) * (kTile / kStep));
    piece.first_slot = index_ * p.max_splits;
    piece.slot = piece.first_slot + split_;
    return split_ < piece.num_pieces;
  }

  __device__ __forceinline__ int counter(const AttentionParams& p, const Piece&) const {
    return index_ * p.num_kv_heads + kv_head_;
  }

  __device__ __forceinline__ float* partial(const AttentionParams& p, int slot) const {
    return p.partials + (static_cast<long long>(slot) * p.num_kv_heads + kv_head_) * kPartial;
  }

  __device__ __forceinline__ int kv_head() const { return kv_head_; }

 private:
  int index_, split_, kv_head_;
  bool is_done_ = false;
};

#endif

// The fragments of a block's queries: dims 32d + 8t to 32d + 8t + 7 of row 8r + g.
struct Queries {
  uint4 q[kRowTiles][kDimPairs];
  int sequence = -1;

  __device__ __forceinline__ void load(const AttentionParams& p, const RowBlock& block, int kv_head) {
    const int lane = lane_id();
    sequence = block.sequence;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int row = 8 * r + (lane >> 2);
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

// The steps that a warp will take, a few ahead of those that it takes: where their tokens lie, and the next queries.
class Reader {
 public:
  Queries queries;  // of the sequence that the look-ups are in, where there are registers for them

  // `locate` looks up `step`, or nothing yet: -1.
  __device__ __forceinline__ Reader(
      const AttentionParams& p, const Schedule& schedule, const Piece& piece, const Locator& locate, int step)
      : schedule_(schedule), locate_(locate), piece_(piece), step_(piece.begin + static_cast<int>(threadIdx.x >> 5)) {
    if (step_ != step && step_ < piece_.end) {
      locate_ = Locator(p, piece.block.sequence);
      locate_.seek(step_);
    }
  }

  // Look up the next step: where token l % 16 of it lies, for lane l; in all lanes slot -1 where there is no next step.
  // Nothing is done with what was loaded, so that nobody waits for it yet.
  __device__ __forceinline__ Place next(const AttentionParams& p, bool may_load_queries) {
    while (!is_done_ && step_ >= piece_.end) {
      is_done_ = !schedule_.next(p, piece_);
      if (is_done_) break;
      step_ = piece_.begin + static_cast<int>(threadIdx.x >> 5);
      if (step_ < piece_.end) {
        locate_ = Locator(p, piece_.block.sequence);
        locate_.seek(step_);
        if (kRowTiles == 1 && may_load_queries) queries.load(p, piece_.block, schedule_.kv_head());
      }
    }
    if (is_done_) return {0, -1};
    step_ += kStride;
    return locate_.next(piece_.block.seq_len - 1);
  }

  // Whether the step that `next` gave last holds tokens of the present queries, which a kernel before may be writing.
  __device__ __forceinline__ bool is_new() const {
    return !is_done_ && (step_ - kStride + 1) * kStep > piece_.block.seq_len - piece_.block.num_queries;
  }

 private:
  Schedule schedule_;
  Locator locate_;
  Piece piece_;
  int step_;
  bool is_done_ = false;
};

// The warps' states of one piece, in shared memory: O [kRows][kRowPitch], then m [kRows] and l [kRows].
struct Scratch {
  static constexpr int kM = kRows * kRowPitch;
  static constexpr int kL = kM + kRows;
  float* states;  // kScratchPitch from warp to warp

  __device__ __forceinline__ explicit Scratch(unsigned char* shared)
      : states(reinterpret_cast<float*>(shared + kScratchAt)) {}

  __device__ __forceinline__ void store(const State& state) const {
    float* const own = states + (threadIdx.x >> 5) * kScratchPitch;
    const int lane = lane_id();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = 8 * r + 2 * (lane & 3) + c;
        const float sum = sum_over_rows(state.l[r][c]);
        if (lane < 4) {
          own[kM + row] = state.m[r][c];
          own[kL + row] = sum;
        }
        float* const to = own + row * kRowPitch + (lane >> 2);
#pragma unroll
        for (int d = 0; d < kDimBlocks; ++d) {
          to[16 * d] = state.o[r][d][c];
          to[16 * d + 8] = state.o[r][d][c + 2];
        }
      }
    }
  }

  // 4 dims of a row over all warps.
  __device__ __forceinline__ Merged merge(int row, int dim, float4& sum) const {
    Merged sums;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sums.m = fmaxf(sums.m, states[w * kScratchPitch + kM + row]);
    const float base = sums.m == -kInfinity ? 0.0f : sums.m;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* const state = states + w * kScratchPitch;
      const float weight = ptx::exp2(state[kM + row] - base);
      add_scaled(sum, weight, *reinterpret_cast<const float4*>(state + row * kRowPitch + dim));
      sums.l += weight * state[kL + row];
    }
    return sums;
  }
};

// The last CTA to arrive merges the pieces of a sequence, in their order; the counter is then 0 again.
__device__ __forceinline__ void merge_pieces(const AttentionParams& p, const Schedule& schedule, const Piece& piece) {
  __shared__ bool is_last;
  __syncthreads();  // the order of the counter's release and acquire holds for what the other threads write and read
  if (threadIdx.x == 0) {
    const unsigned last = piece.num_pieces - 1;
    is_last = ptx::increment_acq_rel_gpu(p.counters + schedule.counter(p, piece), last) == last;
  }
  __syncthreads();
  if (!is_last) return;
  for (int i = threadIdx.x; i < piece.block.num_rows * kHeadDim / 4; i += kThreads) {
    const int row = i / (kHeadDim / 4);
    const int dim = i % (kHeadDim / 4) * 4;
    Merged sums;
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int k = 0; k < piece.num_pieces; ++k) {  // in one pass, so that all loads are under way together
      const float* const partial = schedule.partial(p, piece.slot_of(k));
      const float m = ptx::load_l2(partial + kRows * kHeadDim + row);
      const float l = ptx::load_l2(partial + kRows * kHeadDim + kRows + row);
      const float4 part = ptx::load_l2_16(partial + row * kHeadDim + dim);
      const float highest = fmaxf(sums.m, m);
      const float base = highest == -kInfinity ? 0.0f : highest;
      const float shrink = ptx::exp2(sums.m - base);
      const float weight = ptx::exp2(m - base);
      sums.m = highest;
      sums.l = sums.l * shrink + l * weight;
      o.x *= shrink, o.y *= shrink, o.z *= shrink, o.w *= shrink;
      add_scaled(o, weight, part);
    }
    write_row(p, piece.block, schedule.kv_head(), row, dim, o, sums);
  }
}

#if KVT_CLUSTER > 1

// What the CTAs of a cluster send each other: each owns a part of the output, and gets all results for it.
struct Inbox {
  static constexpr int kTasks = kRows * kHeadDim / 4;                      // of 4 dims
  static constexpr int kOwned = (kTasks + kCluster - 1) / kCluster;
  float4 o[kCluster][kOwned];
  float2 sums[kCluster][kOwned];  // m, l
  unsigned long long barrier;     // counts the bytes that have come
};

__device__ __forceinline__ void merge_cluster(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece, const Scratch& scratch, Inbox* inbox) {
  const int rank = ptx::cluster_rank();
  const int num_tasks = piece.block.num_rows * kHeadDim / 4;
  const int num_owned = min(Inbox::kOwned, num_tasks - rank * Inbox::kOwned);
  const unsigned barrier = ptx::shared_address(&inbox->barrier);
  if (threadIdx.x == 0 && num_owned > 0) ptx::arrive_and_expect(barrier, kCluster * num_owned * 24);
  __syncwarp();
  ptx::cluster_wait();  // all have begun, and their barriers count
  for (int i = threadIdx.x; i < num_tasks; i += kThreads) {
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
    const Merged sums = scratch.merge(i / (kHeadDim / 4), i % (kHeadDim / 4) * 4, o);
    const int owner = i / Inbox::kOwned;
    const int own = i % Inbox::kOwned;
    const unsigned its_barrier = ptx::address_in_rank(barrier, owner);
    ptx::store_async(ptx::address_in_rank(ptx::shared_address(&inbox->o[rank][own]), owner), o, its_barrier);
    ptx::store_async(
        ptx::address_in_rank(ptx::shared_address(&inbox->sums[rank][own]), owner), float2{sums.m, sums.l}, its_barrier);
  }
  // who owns nothing is sent nothing, and may leave
  for (int own = threadIdx.x; own < num_owned; own += kThreads) {
    ptx::wait_for_barrier(barrier);
    Merged sums;
#pragma unroll
    for (int k = 0; k < kCluster; ++k) sums.m = fmaxf(sums.m, inbox->sums[k][own].x);
    const float base = sums.m == -kInfinity ? 0.0f : sums.m;
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kCluster; ++k) {
      const float weight = ptx::exp2(inbox->sums[k][own].x - base);
      sums.l += weight * inbox->sums[k][own].y;
      add_scaled(o, weight, inbox->o[k][own]);
    }
    const int i = rank * Inbox::kOwned + own;
    write_row(p, piece.block, schedule.kv_head(), i / (kHeadDim / 4), i % (kHeadDim / 4) * 4, o, sums);
  }
}

#endif

#if KVT_CLUSTER > 1
#define KVT_CLUSTER_DIMS __cluster_dims__(KVT_CLUSTER, 1, 1)
#else
#define KVT_CLUSTER_DIMS
#endif

extern "C" __global__ void __launch_bounds__(kThreads, 1) KVT_CLUSTER_DIMS
    kvt_decode(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x >> 5;
#if KVT_CLUSTER > 1
  Inbox* const inbox = reinterpret_cast<Inbox*>(shared + kFifoBytes);
  if (threadIdx.x == 0) ptx::initialize_barrier(ptx::shared_address(&inbox->barrier), 1);
  __syncwarp();
  ptx::cluster_arrive_relaxed();
#endif
  if (p.wait_first) ptx::wait_for_dependencies();
  Schedule schedule(p);
  const int kv_head = schedule.kv_head();
  const unsigned fifo = ptx::shared_address(shared) + warp * kStages * kStageBytes;
  if (kHeadDim % 32 != 0) {
    // the last product takes dims that do not exist; Q is 0 there, and 0 * NaN is NaN
    for (int i = lane_id(); i < kStages * kStageBytes / 16; i += 32) ptx::store_shared_16(fifo + i * 16, {0, 0, 0, 0});
    __syncwarp();
  }

  Locator locate(p, 0);
  int located = -1;
  if (kCluster > 1 && p.left < 0) {  // the only sequence's first look-ups need not wait for its length
    located = blockIdx.x * kWarps + warp;
    locate.seek(located);
  }
  Piece piece;
  if (!schedule.next(p, piece)) {
    ptx::wait_for_dependencies();  // who waits for this kernel relies on those before it as well
    return;
  }
  const unsigned long long policy = ptx::evict_first_policy();
  Queries queries;
  if (p.wait_first) queries.load(p, piece.block, kv_head);
  Reader reader(p, schedule, piece, locate, located);
  Place ahead = reader.next(p, false);
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) {
    if (reader.is_new()) ptx::wait_for_dependencies();
    if (ahead.slot >= 0) copy_step(p, kv_head, fifo + i * kStageBytes, ahead, policy);
    ptx::commit_copies();
    ahead = reader.next(p, p.wait_first);
  }
  // from here on everything may be read; only now may the next kernel begin, so that what it finds written by kernels
  // before this one is complete
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  if (!p.wait_first) queries.load(p, piece.block, kv_head);

  const Scratch scratch(shared);
  int stage = 0;
  do {
    if (queries.sequence != piece.block.sequence) {
      if (reader.queries.sequence == piece.block.sequence) {
        queries = reader.queries;
      } else {
        queries.load(p, piece.block, kv_head);
      }
    }
    const Columns columns = columns_of(p, piece.block, kv_head);
    const KeyRange keys = visible_keys(p, piece.block);
    State state;
    for (int step = piece.begin + warp; step < piece.end; step += kStride) {
      ptx::wait_for_copies<kStages - 1>();
      __syncwarp();
      attend_step(p, queries.q, columns, keys, piece.block.seq_len, fifo + stage * kStageBytes, step * kStep, state);
      __syncwarp();
      if (ahead.slot >= 0) copy_step(p, kv_head, fifo + stage * kStageBytes, ahead, policy);
      ptx::commit_copies();
      ahead = reader.next(p, true);  // it has until the next step to arrive
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    if (kCluster == 1) __syncthreads();  // the scratch of the piece before has been read
    scratch.store(state);
    __syncthreads();
#if KVT_CLUSTER > 1
    merge_cluster(p, schedule, piece, scratch, inbox);
#else
    for (int i = threadIdx.x; i < piece.block.num_rows * kHeadDim / 4; i += kThreads) {
      const int row = i / (kHeadDim / 4);
      const int dim = i % (kHeadDim / 4) * 4;
      float4 o{0.0f, 0.0f, 0.0f, 0.0f};
      const Merged sums = scratch.merge(row, dim, o);
      if (piece.num_pieces == 1) {
        write_row(p, piece.block, kv_head, row, dim, o, sums);
      } else {
        float* const partial = schedule.partial(p, piece.slot);
        *reinterpret_cast<float4*>(partial + row * kHeadDim + dim) = o;
        if (dim == 0) {
          partial[kRows * kHeadDim + row] = sums.m;
          partial[kRows * kHeadDim + kRows + row] = sums.l;
        }
      }
    }
    if (piece.num_pieces > 1) merge_pieces(p, schedule, piece);
#endif
  } while (schedule.next(p, piece));
}

}  // namespace kvt
