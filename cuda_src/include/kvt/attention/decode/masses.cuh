// Attention masses: the share of the attention that each tile of a sequence gets, by kv head.
//
//   masses  [batch, max_tiles, num_kv_heads] float32: the mean over the queries and the group's heads; 0 = not seen
//
// A warp writes the log-sum-exp of each of its units. The CTA that completes the last rows of a sequence and kv head
// reads these back while they are still in the L2 cache: a unit's share of a row is exp(lse of the unit - lse of the
// row), and a tile's mass is the sum over its units.
#pragma once

#include <kvt/attention/decode/results.cuh>
#include <kvt/ptx/policy.cuh>

namespace kvt {

// The first of the units that tile `tile` is cut into; those of the next tile follow. Each kernel defines it.
__device__ __forceinline__ int first_unit(const AttentionParams& p, int sequence, StepRange steps, int tile);

// The number of slots in unit_lse. Each step of 16 positions has one. The number is rounded up, because a warp writes
// four units together.
__device__ __forceinline__ int num_slots(const AttentionParams& p) {
  return (p.max_tiles + kStride - 1) / kStride * kStride * (kTile / kStep);
}

// The slot of a unit: four consecutive units of a warp have four consecutive slots.
__device__ __forceinline__ int slot_of_unit(int unit) {
  return unit / (4 * kStride) * (4 * kStride) + unit % kStride * 4 + unit / kStride % 4;
}

// The log-sum-exp of a warp's units by query row, kept until four units can be written together. Lane (g, t) keeps row
// 2t + g % 2 of every fourth unit, so that reducing four units takes few exchanges and they are written side by side.
//
//   unit_lse  [batch, num_kv_heads, slots, unit_rows] log2; `slot_of_unit` says which slot a unit has
struct UnitLse {
  float kept[kRowTiles];
  bool any = false;  // whether this lane keeps one

  // Keep base + log2(sum over a column's lanes of `sums`), for one unit.
  __device__ __forceinline__ void take(int r, int unit, const float (&base)[2], const float (&sums)[2]) {
    const int g = lane_id() >> 2;
    const bool is_odd = g & 1;
    // lanes with an even g add up column 0, those with an odd g column 1
    float sum = (is_odd ? sums[1] : sums[0]) + __shfl_xor_sync(kAllLanes, is_odd ? sums[0] : sums[1], 4);
    sum += __shfl_xor_sync(kAllLanes, sum, 8);
    sum += __shfl_xor_sync(kAllLanes, sum, 16);
    if ((unit / kStride & 3) == g >> 1) {
      kept[r] = (is_odd ? base[1] : base[0]) + ptx::log2(sum);
      any = true;
    }
  }

  // Call this after each unit. It writes after every fourth unit of the warp, and after its last one before `end`.
  __device__ __forceinline__ void write(
      const AttentionParams& p, const RowBlock& block, int kv_head, int unit, int end, unsigned long long policy) {
    if ((unit / kStride & 3) != 3 && unit + kStride < end) return;
    const int g = lane_id() >> 2;
    const int slot = slot_of_unit(unit) / 4 * 4 + (g >> 1);
    const int slots = num_slots(p);
    if (any && slot < slots) {
      const long long head = static_cast<long long>(block.sequence) * p.num_kv_heads + kv_head;
      float* const to = p.unit_lse + (head * slots + slot) * p.unit_rows;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const int row = block.first_row + 8 * r + 2 * (lane_id() & 3) + (g & 1);
        if (row < p.unit_rows) ptx::store_4(to + row, kept[r], policy);
      }
    }
    any = false;
  }
};

#ifdef KVT_SPLIT_ROWS
constexpr bool kMayLoadEarly = KVT_SPLIT_ROWS;  // with more than 4 rows there are no registers for it
#else
constexpr bool kMayLoadEarly = true;
#endif

// Writes the masses of a sequence's tiles. A thread loads the units of its first tile early, so that they arrive while
// the CTA merges states.
class TileMassWriter {
 public:
  // Find the units of the thread's first tile.
  __device__ __forceinline__ void locate(const AttentionParams& p, const RowBlock& block) {
    if (is_early(p, block)) units_ = units_of(p, block, threadIdx.x);
  }

  // Load their log-sum-exps, if the sequence has few rows. All warps must have written theirs.
  __device__ __forceinline__ void load(const AttentionParams& p, const RowBlock& block, int kv_head) {
    if (!is_early(p, block)) return;
    const float* const unit_lse = unit_lse_of(p, block, kv_head);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) loaded_[u] = load_unit(p, unit_lse, units_, u);
  }

  // Write the masses once all rows of a sequence are complete. Every CTA that completes a block of rows, or a part of
  // one, calls this after it has written them. A CTA that completes all rows by itself must have called `load`.
  //   row_lse  [kRows] of the CTA's own rows
  __device__ __forceinline__ void write(
      const AttentionParams& p, const RowBlock& block, int kv_head, const float* row_lse) {
    const int all_rows = block.num_queries * p.group_size;
    const int arrivals = kCluster * ((all_rows + kRows - 1) / kRows);
    if (arrivals == 1) {
      __syncthreads();  // row_lse has been written
    } else {
      if (!is_last_to_arrive(p.mass_counters + block.sequence * p.num_kv_heads + kv_head, arrivals)) return;
      load(p, block, kv_head);
      row_lse = nullptr;
    }
    const int num_rows = num_rows_of(p, block);
    const float of_row = 1.0f / num_rows;
    const float* const unit_lse = unit_lse_of(p, block, kv_head);
    float* const masses = p.masses + static_cast<long long>(block.sequence) * p.max_tiles * p.num_kv_heads + kv_head;
    int base = 0;
    if (is_early(p, block)) {
      const float4 totals = totals_of(p, block, kv_head, 0, num_rows, row_lse);
      float sum = 0.0f;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) sum += sum_of_shares(loaded_[u], totals);
      if (threadIdx.x < p.max_tiles) masses[threadIdx.x * p.num_kv_heads] = sum * of_row;
      base = kThreads;
    }
    // the other tiles, or all of them: a thread takes kTiles at a time, so that their loads are under way together
#pragma unroll 1
    for (; base < p.max_tiles; base += kTiles * kThreads) {
      int2 units[kTiles];
      float sums[kTiles];
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        units[k] = units_of(p, block, base + k * kThreads + threadIdx.x);
        sums[k] = 0.0f;
      }
#pragma unroll 1
      for (int row = 0; row < num_rows; row += 4) {
        const float4 totals = totals_of(p, block, kv_head, row, num_rows, row_lse);
        bool has_more = true;
#pragma unroll 1
        for (int u = 0; has_more; ++u) {  // a cold tile has only one unit, so the loop is worth its cost
          has_more = false;
          float4 of_unit[kTiles];
#pragma unroll
          for (int k = 0; k < kTiles; ++k) {
            of_unit[k] = load_unit(p, unit_lse + row, units[k], u);
            has_more = has_more || units[k].x + u + 1 < units[k].y;
          }
#pragma unroll
          for (int k = 0; k < kTiles; ++k) sums[k] += sum_of_shares(of_unit[k], totals);
        }
      }
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        const long long tile = base + k * kThreads + static_cast<int>(threadIdx.x);
        if (tile < p.max_tiles) masses[tile * p.num_kv_heads] = sums[k] * of_row;
      }
    }
  }

 private:
  static constexpr int kUnits = kTile / kStep;  // most units of a tile
  static constexpr int kTiles = 4;
  int2 units_;  // the first unit of the thread's first tile, and of the next tile
  float4 loaded_[kUnits];

  static __device__ __forceinline__ int num_rows_of(const AttentionParams& p, const RowBlock& block) {
    return min(block.num_queries * p.group_size, p.unit_rows);
  }

  // Whether the units of the first tile are loaded early.
  static __device__ __forceinline__ bool is_early(const AttentionParams& p, const RowBlock& block) {
    return kMayLoadEarly && num_rows_of(p, block) <= 4;
  }

  // The units of a tile: its first, and the first of the next tile. The two are equal if no query sees the tile.
  static __device__ __forceinline__ int2 units_of(const AttentionParams& p, const RowBlock& block, int tile) {
    const StepRange steps = visible_steps(p.left, p.right, block.seq_len, block.num_queries);
    const bool is_seen =
        steps.end > steps.begin && tile >= steps.begin / kUnits && tile < (steps.end + kUnits - 1) / kUnits;
    if (!is_seen) return {0, 0};
    return {first_unit(p, block.sequence, steps, tile), first_unit(p, block.sequence, steps, tile + 1)};
  }

  static __device__ __forceinline__ const float* unit_lse_of(
      const AttentionParams& p, const RowBlock& block, int kv_head) {
    const long long head = static_cast<long long>(block.sequence) * p.num_kv_heads + kv_head;
    return p.unit_lse + head * num_slots(p) * p.unit_rows;
  }

  // The log-sum-exp of 4 rows over the u-th of a tile's units; -inf if the tile has fewer units.
  static __device__ __forceinline__ float4
  load_unit(const AttentionParams& p, const float* unit_lse, int2 units, int u) {
    if (units.x + u >= units.y) return {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
    return ptx::load_l2_16(unit_lse + static_cast<long long>(slot_of_unit(units.x + u)) * p.unit_rows);
  }

  // A unit's share of the attention, added up over 4 rows.
  static __device__ __forceinline__ float sum_of_shares(float4 of_unit, float4 totals) {
    return ptx::exp2(of_unit.x - totals.x) + ptx::exp2(of_unit.y - totals.y) + ptx::exp2(of_unit.z - totals.z) +
           ptx::exp2(of_unit.w - totals.w);
  }

  // The log-sum-exp of 4 rows from `row` on, in units of log2. It is infinite for a row that sees nothing or does not
  // exist, so that such a row adds nothing.
  static __device__ __forceinline__ float4
  totals_of(const AttentionParams& p, const RowBlock& block, int kv_head, int row, int num_rows, const float* row_lse) {
    float totals[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float lse = -kInfinity;
      if (row + c < num_rows) lse = row_lse != nullptr ? row_lse[row + c] : lse_of(p, block, kv_head, row + c);
      totals[c] = lse != -kInfinity ? lse * kLog2E : kInfinity;
    }
    return {totals[0], totals[1], totals[2], totals[3]};
  }

  // The log-sum-exp of any row of the sequence, which another CTA may have written.
  static __device__ __forceinline__ float lse_of(
      const AttentionParams& p, const RowBlock& block, int kv_head, int row) {
    const int query = row / p.group_size;
    const long long token = block.first_token + query;
    return ptx::load_l2(p.lse + (token * p.num_kv_heads + kv_head) * p.group_size + row - query * p.group_size);
  }
};

// Merge the warps' states of a piece and write the outcome: the output, or a partial result if other CTAs share the
// sequence. The last CTA to arrive also merges the partial results, and whoever completes the rows writes their masses.
template <typename StoredStates>
__device__ __forceinline__ void finish_piece(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece, int kv_head, const StoredStates& stored,
    TileMassWriter& masses, float* row_lse) {
  if (kHasMasses && piece.num_pieces == 1) masses.load(p, piece.block, kv_head);
  for (int i = threadIdx.x; i < piece.block.num_rows * kHeadDim / 4; i += kThreads) {
    const int row = i / (kHeadDim / 4);
    const int dim = i % (kHeadDim / 4) * 4;
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
    const SoftmaxRow sums = stored.merge(row, dim, o);
    if (piece.num_pieces == 1) {
      write_row(p, piece.block, kv_head, row, dim, o, sums, row_lse);
    } else {
      const Partial to(p, schedule, piece.slot);
      *reinterpret_cast<float4*>(to.o(row, dim)) = o;
      if (dim == 0) {
        *to.m(row) = sums.m;
        *to.l(row) = sums.l;
      }
    }
  }
  bool is_complete = piece.num_pieces == 1;
  if (!is_complete) {
    is_complete = arrive_with_piece(p, schedule, piece);
    if (is_complete) {
      if (kHasMasses) masses.load(p, piece.block, kv_head);
      merge_pieces(p, schedule, piece, row_lse);
    }
  }
  if (kHasMasses && is_complete) masses.write(p, piece.block, kv_head, row_lse);
}

}  // namespace kvt
