// Masses: the share of the attention that each tile of a sequence got, by kv head.
//
//   masses  [batch, max_tiles, num_kv_heads] float32: mean over the queries and the group's heads; 0 where nothing is
//
// A warp notes the log-sum-exp of each of its units. The CTA that completes the last rows of a sequence and kv head reads
// the notes back, while they are in the second-level cache, and makes shares of them.
#pragma once

#include <kvt/decode.cuh>

namespace kvt {

// The first of the units that tile `tile` is cut into, each kernel in its own way; those of the next one follow.
__device__ __forceinline__ int first_unit(const AttentionParams& p, int sequence, StepRange steps, int tile);

// Slots for notes: one for every step of 16 positions, and some more, since four of a warp go together.
__device__ __forceinline__ int num_slots(const AttentionParams& p) {
  return (p.max_tiles + kStride - 1) / kStride * kStride * (kTile / kStep);
}

// The slot of a unit's note: every fourth of a warp's units begins a line, and the three after it follow.
__device__ __forceinline__ int place_of_note(int unit) {
  return unit / (4 * kStride) * (4 * kStride) + unit % kStride * 4 + unit / kStride % 4;
}

// What a warp notes of its units: the log-sum-exp of each by query row. Lane (g, t) holds that of row
// 2t + g % 2 of every fourth unit, so that four are reduced with few exchanges and written side by side.
//
//   unit_lse  [batch, num_kv_heads, slots, unit_rows]; `place_of_note` says which slot a unit has
struct Notes {
  float kept[kRowTiles];
  bool any = false;    // whether this lane holds one

  // A unit's: base + log2(sum over a column's lanes of `sums`).
  __device__ __forceinline__ void take(int r, int unit, const float (&base)[2], const float (&sums)[2]) {
    const int g = lane_id() >> 2;
    const bool is_odd = g & 1;
    // the even rows of the lanes' groups add up column 0, the odd ones column 1
    float sum = (is_odd ? sums[1] : sums[0]) + __shfl_xor_sync(kAllLanes, is_odd ? sums[0] : sums[1], 4);
    sum += __shfl_xor_sync(kAllLanes, sum, 8);
    sum += __shfl_xor_sync(kAllLanes, sum, 16);
    if ((unit / kStride & 3) == g >> 1) {
      kept[r] = (is_odd ? base[1] : base[0]) + ptx::log2(sum);
      any = true;
    }
  }

  // After unit `unit`, of which another one follows before `end`, or not: write what is complete.
  __device__ __forceinline__ void write(
      const AttentionParams& p, const RowBlock& block, int kv_head, int unit, int end, unsigned long long policy) {
    if ((unit / kStride & 3) != 3 && unit + kStride < end) return;
    const int g = lane_id() >> 2;
    const int slot = place_of_note(unit) / 4 * 4 + (g >> 1);
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
constexpr bool kMayAskEarly = KVT_SPLIT_ROWS;  // registers are short where there are more than 4 rows
#else
constexpr bool kMayAskEarly = true;
#endif

// Makes the shares of a sequence's tiles of what was noted. A thread asks for its first tile's notes early, so that they
// arrive while the CTA merges what its warps, or other CTAs, found.
class Shares {
 public:
  // Find the units of the thread's first tile.
  __device__ __forceinline__ void locate(const AttentionParams& p, const RowBlock& block) {
    if (is_early(p, block)) units_ = units_of(p, block, threadIdx.x);
  }

  // Ask for what was noted of it, once all warps have, where a sequence has few rows.
  __device__ __forceinline__ void load(const AttentionParams& p, const RowBlock& block, int kv_head) {
    if (!is_early(p, block)) return;
    const float* const notes = notes_of(p, block, kv_head);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) notes_[u] = load_note(p, notes, units_, u);
  }

  // Write the shares, once all rows of a sequence are complete: to be called by every CTA that completes a block of them,
  // or a part of it, after it wrote them. A CTA that completes all of them by itself has called `load`.
  //   row_lse  [kRows] of its own rows
  __device__ __forceinline__ void write(
      const AttentionParams& p, const RowBlock& block, int kv_head, const float* row_lse) {
    const int all_rows = block.num_queries * p.group_size;
    const int arrivals = kCluster * ((all_rows + kRows - 1) / kRows);
    if (arrivals == 1) {
      __syncthreads();  // row_lse is there
    } else {
      if (!is_last_to_arrive(p.mass_counters + block.sequence * p.num_kv_heads + kv_head, arrivals)) return;
      load(p, block, kv_head);
      row_lse = nullptr;
    }
    const int num_rows = num_rows_of(p, block);
    const float share = 1.0f / num_rows;
    const float* const notes = notes_of(p, block, kv_head);
    float* const masses = p.masses + static_cast<long long>(block.sequence) * p.max_tiles * p.num_kv_heads + kv_head;
    int base = 0;
    if (is_early(p, block)) {
      const float4 totals = totals_of(p, block, kv_head, 0, num_rows, row_lse);
      float sum = 0.0f;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) sum += share_of(notes_[u], totals);
      if (threadIdx.x < p.max_tiles) masses[threadIdx.x * p.num_kv_heads] = sum * share;
      base = kThreads;
    }
    // further tiles, or all of them, kTiles of a thread at a time, whose loads are under way together
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
        bool goes_on = true;
#pragma unroll 1
        for (int u = 0; goes_on; ++u) {  // of cold tiles one unit, so that it is worth a loop
          goes_on = false;
          float4 of_unit[kTiles];
#pragma unroll
          for (int k = 0; k < kTiles; ++k) {
            of_unit[k] = load_note(p, notes + row, units[k], u);
            goes_on = goes_on || units[k].x + u + 1 < units[k].y;
          }
#pragma unroll
          for (int k = 0; k < kTiles; ++k) sums[k] += share_of(of_unit[k], totals);
        }
      }
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        const long long tile = base + k * kThreads + static_cast<int>(threadIdx.x);
        if (tile < p.max_tiles) masses[tile * p.num_kv_heads] = sums[k] * share;
      }
    }
  }

 private:
  static constexpr int kUnits = kTile / kStep;  // of a tile, at most
  static constexpr int kTiles = 4;
  int2 units_;  // the first of the thread's first tile and of the next one
  float4 notes_[kUnits];

  static __device__ __forceinline__ int num_rows_of(const AttentionParams& p, const RowBlock& block) {
    return min(block.num_queries * p.group_size, p.unit_rows);
  }

  // Whether the first notes are asked for early.
  static __device__ __forceinline__ bool is_early(const AttentionParams& p, const RowBlock& block) {
    return kMayAskEarly && num_rows_of(p, block) <= 4;
  }

  // The units of a tile: the first of them, and the first of the next tile; alike where it is not seen.
  static __device__ __forceinline__ int2 units_of(const AttentionParams& p, const RowBlock& block, int tile) {
    const StepRange steps = visible_steps(p.left, p.right, block.seq_len, block.num_queries);
    const bool is_seen =
        steps.end > steps.begin && tile >= steps.begin / kUnits && tile < (steps.end + kUnits - 1) / kUnits;
    if (!is_seen) return {0, 0};
    return {first_unit(p, block.sequence, steps, tile), first_unit(p, block.sequence, steps, tile + 1)};
  }

  static __device__ __forceinline__ const float* notes_of(const AttentionParams& p, const RowBlock& block, int kv_head) {
    const long long head = static_cast<long long>(block.sequence) * p.num_kv_heads + kv_head;
    return p.unit_lse + head * num_slots(p) * p.unit_rows;
  }

  // What was noted of 4 rows in the u-th of a tile's units.
  static __device__ __forceinline__ float4 load_note(const AttentionParams& p, const float* notes, int2 units, int u) {
    if (units.x + u >= units.y) return {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
    return ptx::load_l2_16(notes + static_cast<long long>(place_of_note(units.x + u)) * p.unit_rows);
  }

  static __device__ __forceinline__ float share_of(float4 note, float4 totals) {
    return ptx::exp2(note.x - totals.x) + ptx::exp2(note.y - totals.y) + ptx::exp2(note.z - totals.z) +
           ptx::exp2(note.w - totals.w);
  }

  // log2 of what 4 rows from `row` on sum up to; infinite where one sees nothing, or is none, so that it adds nothing.
  static __device__ __forceinline__ float4 totals_of(
      const AttentionParams& p, const RowBlock& block, int kv_head, int row, int num_rows, const float* row_lse) {
    float totals[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float lse = -kInfinity;
      if (row + c < num_rows) lse = row_lse != nullptr ? row_lse[row + c] : lse_of(p, block, kv_head, row + c);
      totals[c] = lse != -kInfinity ? lse * kLog2E : kInfinity;
    }
    return {totals[0], totals[1], totals[2], totals[3]};
  }

  // Of any of the sequence's rows, which another CTA wrote.
  static __device__ __forceinline__ float lse_of(const AttentionParams& p, const RowBlock& block, int kv_head, int row) {
    const int query = row / p.group_size;
    const long long token = block.first_token + query;
    return ptx::load_l2(p.lse + (token * p.num_kv_heads + kv_head) * p.group_size + row - query * p.group_size);
  }
};

// Whether the rows of a piece that was written are complete: the CTA that arrives last merges a sequence's parts, and
// asks for its first notes.
__device__ __forceinline__ bool complete_piece(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece, int kv_head, Shares& shares,
    float* row_lse) {
  bool is_complete = piece.num_pieces == 1;
  if (!is_complete) {
    is_complete = is_last_to_arrive(p.counters + schedule.counter(p, piece), piece.num_pieces);
    if (is_complete) {
      if (kHasMasses) shares.load(p, piece.block, kv_head);
      merge_pieces(p, schedule, piece, row_lse);
    }
  }
  return is_complete;
}

}  // namespace kvt
