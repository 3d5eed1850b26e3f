// What the decode kernels have in common: how CTAs share the batch, and how warps and CTAs merge what they found.
//
// Macros: KVT_HEAD_DIM, KVT_BF16, KVT_ROW_TILES, KVT_WARPS, KVT_STAGES, KVT_PLANNED, KVT_CLUSTER as in decode.cu, and
//         KVT_TIERED: 0 = work is steps of 16 tokens, 1 = units of a tiered sequence;
//         KVT_MASSES: 1 = also tell what share of the attention each tile got, see masses.cuh.
#pragma once

#include <kvt/attention.cuh>
#include <kvt/finite.cuh>
#include <kvt/ptx/atomic.cuh>
#include <kvt/ptx/codes.cuh>
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
constexpr int kDimPairs = (kHeadDim + 31) / 32;          // products of K and Q take 32 dims at a time
constexpr int kDimBlocks = kHeadDim / 16;
constexpr int kCluster = KVT_CLUSTER;
#ifndef KVT_MASSES
#define KVT_MASSES 0
#endif
constexpr bool kHasMasses = KVT_MASSES;
constexpr int kStride = kWarps * kCluster;               // steps from one of a warp to its next
constexpr int kMinSplitTiles = kWarps * kStep / kTile;   // a step for every warp
constexpr int kRowPitch = kHeadDim + 4;                  // floats; rows 2t and dims g of a fragment in 32 banks
constexpr int kStateFloats = kRows * (kRowPitch + 2);
constexpr int kPartial = kRows * (kHeadDim + 2);         // floats: O, then m and l of each row
static_assert((kStride & (kStride - 1)) == 0, "whose turn it is follows from the lowest bits");
constexpr bool kPlanHasLengths = !KVT_TIERED;            // a tiered plan has the lengths of lists of units instead
static_assert(kHeadDim % 16 == 0, "an MMA covers 16 dims");
static_assert(kCluster == 1 || !KVT_PLANNED, "a cluster shares one sequence");

// What the CTAs share of a block's sequence, each kernel in its own unit.
__device__ __forceinline__ StepRange work_of(const AttentionParams& p, const RowBlock& block);

// The first step or unit from `begin` on that this warp takes; then every kStride-th.
__device__ __forceinline__ int first_of_warp(int begin) {
  const int own = (kCluster > 1 ? blockIdx.x * kWarps : 0) + static_cast<int>(threadIdx.x >> 5);
  return begin + ((own - begin) & (kStride - 1));
}

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

// The results of one row over disjoint keys: `o` is the sum of exp2(score - m) * value.
struct Merged {
  float m = -kInfinity;
  float l = 0.0f;
};

__device__ __forceinline__ void add_scaled(float4& sum, float weight, const float4& part) {
  sum.x += weight * part.x, sum.y += weight * part.y, sum.z += weight * part.z, sum.w += weight * part.w;
}

// Write one row's output: 4 dims of it, and by one thread its log-sum-exp.
//   row_lse  [kRows] in shared memory, written where there are masses, which are shares of it
__device__ __forceinline__ void write_row(
    const AttentionParams& p, const RowBlock& block, int kv_head, int row, int dim, float4 o, Merged sums,
    float* row_lse) {
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
  if ((kHasMasses || p.lse != nullptr) && dim == 0) {
    const float lse = sums.l == 0.0f ? -kInfinity : (sums.m + log2f(sums.l)) * kLn2;
    if (kHasMasses) row_lse[row] = lse;
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
      const int seq_len = kPlanHasLengths && sequence == begin_.x ? begin_.z : -1;
      piece.block = row_block_at<kRows>(p, sequence, blockIdx.y * kRows, seq_len);
      if (piece.block.num_rows == 0 || (p.has_prefill && piece.block.num_queries > kMaxDecodeQueries)) continue;
      const StepRange steps = work_of(p, piece.block);
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
    const StepRange steps = work_of(p, piece.block);
    if (kCluster > 1) {  // the CTAs take turns, so that where one begins does not depend on the length
      piece.begin = steps.begin;
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

// The fragments of a block's queries: dims 32d + 8t to 32d + 8t + 7 of row 8r + g; with a mask of rows, of row & mask.
struct Queries {
  uint4 q[kRowTiles][kDimPairs];
  int sequence = -1;

  __device__ __forceinline__ void load(const AttentionParams& p, const RowBlock& block, int kv_head, int rows = -1) {
    const int lane = lane_id();
    sequence = block.sequence;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int row = (8 * r + (lane >> 2)) & rows;
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

// Take infinities and NaN out of the values of a step that some rows see in part: the rows that see one of them get it
// now, as what they would become, and in shared memory it is 0 from here on. To be called once o is rescaled.
//   values  [kStep] tokens of kPitch chunks of 16 bytes, this warp's own; chunk c of token k lies at c ^ (k & 7)
template <int kPitch>
__device__ __forceinline__ void take_nonfinite(
    const AttentionParams& p, const Columns& columns, int seq_len, unsigned values, int first, State& state) {
  constexpr int kChunks = kHeadDim / 8;
  const int lane = lane_id();
  const auto piece = [&](int i) {
    const int token = (i * 32 + lane) / kChunks;
    return values + (token * kPitch + ((i * 32 + lane) % kChunks ^ (token & 7))) * 16;
  };
  unsigned any = 0;
#pragma unroll
  for (int i = 0; i < kStep * kChunks / 32; ++i) any |= any_nonfinite<scalar_t>(piece(i));
  if (!__any_sync(kAllLanes, any != 0)) return;
  const int g = lane >> 2;
#pragma unroll 1
  for (int token = 0; token < kStep; ++token) {
    bool sees[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) sees[r][c] = is_visible(p, columns.position[r][c], first + token, seq_len);
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {  // dims 8 * chunk + g
      const unsigned pair = ptx::load_shared_4(values + (token * kPitch + (chunk ^ (token & 7))) * 16 + g / 2 * 4);
      const unsigned lost = pair & nonfinite_mask<scalar_t>(pair);
      const float x = g & 1 ? scalar_t::high(lost) : scalar_t::low(lost);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int c = 0; c < 2; ++c) state.o[r][chunk / 2][c + chunk % 2 * 2] += sees[r][c] ? x : 0.0f;
      }
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < kStep * kChunks / 32; ++i) clear_nonfinite<scalar_t>(piece(i));
  __syncwarp();
}

// The warps' states of one piece, in shared memory: O [kRows][kRowPitch], then m [kRows] and l [kRows].
//   kAt      where they begin, bytes;   kWarpPitch  floats from warp to warp
template <int kAt, int kWarpPitch>
struct Scratch {
  static constexpr int kM = kRows * kRowPitch;
  static constexpr int kL = kM + kRows;
  static_assert(kStateFloats <= kWarpPitch, "a warp's results fit into its place");
  float* states;

  __device__ __forceinline__ explicit Scratch(unsigned char* shared)
      : states(reinterpret_cast<float*>(shared + kAt)) {}

  __device__ __forceinline__ void store(const State& state) const {
    float* const own = states + (threadIdx.x >> 5) * kWarpPitch;
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
    for (int w = 0; w < kWarps; ++w) sums.m = fmaxf(sums.m, states[w * kWarpPitch + kM + row]);
    const float base = sums.m == -kInfinity ? 0.0f : sums.m;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* const state = states + w * kWarpPitch;
      const float weight = ptx::exp2(state[kM + row] - base);
      add_scaled(sum, weight, *reinterpret_cast<const float4*>(state + row * kRowPitch + dim));
      sums.l += weight * state[kL + row];
    }
    return sums;
  }
};

// Write 4 dims of a piece's partial result, and with the first of them the row's sums.
__device__ __forceinline__ void write_partial(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece, int row, int dim, float4 o, Merged sums) {
  float* const partial = schedule.partial(p, piece.slot);
  *reinterpret_cast<float4*>(partial + row * kHeadDim + dim) = o;
  if (dim == 0) {
    partial[kRows * kHeadDim + row] = sums.m;
    partial[kRows * kHeadDim + kRows + row] = sums.l;
  }
}

// Whether this CTA is the last of `count` to come here; it sees what the others wrote before. The counter is then 0 again.
__device__ __forceinline__ bool is_last_to_arrive(unsigned* counter, int count) {
  __shared__ bool is_last;
  __syncthreads();  // the order of the counter's release and acquire holds for what the other threads write and read
  if (threadIdx.x == 0) {
    const unsigned last = count - 1;
    is_last = ptx::increment_acq_rel_gpu(counter, last) == last;
  }
  __syncthreads();
  return is_last;
}

// Merge the pieces of a sequence, in their order: for the last CTA to arrive.
__device__ __forceinline__ void merge_pieces(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece, float* row_lse) {
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
    write_row(p, piece.block, schedule.kv_head(), row, dim, o, sums, row_lse);
  }
}

}  // namespace kvt
