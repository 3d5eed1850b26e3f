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

// Make shares of a sequence's notes, once all of its rows are complete: to be called by every CTA that completes a block
// of them (or a part of it), after it wrote them. A warp takes kTiles tiles of a lane at a time, whose loads are under way
// together; short sequences are one warp's, while the others go on.
__device__ __forceinline__ void write_masses(const AttentionParams& p, const RowBlock& block, int kv_head) {
  constexpr int kTiles = 4;
  constexpr int kUnits = kTile / kStep;  // of a tile, at most
  const int all_rows = block.num_queries * p.group_size;
  const int arrivals = kCluster * ((all_rows + kRows - 1) / kRows);
  if (arrivals > 1) {
    if (!is_last_to_arrive(p.mass_counters + block.sequence * p.num_kv_heads + kv_head, arrivals)) return;
  } else {
    __syncthreads();  // lse is there
  }
  const int num_rows = min(all_rows, p.unit_rows);
  const float share = 1.0f / num_rows;
  const StepRange steps = visible_steps(p.left, p.right, block.seq_len, block.num_queries);
  const bool sees = steps.end > steps.begin;
  const int begin = sees ? steps.begin / kUnits : 0;
  const int end = sees ? (steps.end + kUnits - 1) / kUnits : 0;
  const long long head = static_cast<long long>(block.sequence) * p.num_kv_heads + kv_head;
  const float* const notes = p.unit_lse + head * num_slots(p) * p.unit_rows;
  float* const masses = p.masses + static_cast<long long>(block.sequence) * p.max_tiles * p.num_kv_heads + kv_head;
#pragma unroll 1
  for (int base = (threadIdx.x >> 5) * 32 * kTiles; base < p.max_tiles; base += kThreads * kTiles) {
    int first[kTiles];
    int behind[kTiles];  // the first unit of the next tile
    float sums[kTiles];
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const int tile = base + 32 * k + lane_id();
      const bool is_seen = tile >= begin && tile < end;
      first[k] = is_seen ? first_unit(p, block.sequence, steps, tile) : 0;
      behind[k] = is_seen ? first_unit(p, block.sequence, steps, tile + 1) : 0;
      sums[k] = 0.0f;
    }
#pragma unroll 1
    for (int r = 0; r < num_rows && base < end; r += 4) {
      float totals[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {  // log2; infinite where a row sees nothing, or is none, so that it adds nothing
        const int row = min(r + c, num_rows - 1);
        const int query = block.num_queries == 1 ? 0 : row / p.group_size;
        const long long token = block.first_token + query;
        const int q_head = kv_head * p.group_size + row - query * p.group_size;
        const float lse = ptx::load_l2(p.lse + token * p.num_kv_heads * p.group_size + q_head) * kLog2E;
        totals[c] = r + c < num_rows && lse != -kInfinity ? lse : kInfinity;
      }
      bool goes_on = true;
#pragma unroll 1
      for (int u = 0; goes_on; ++u) {  // of cold tiles one unit, so that it is worth a loop
        goes_on = false;
        float4 of_unit[kTiles];
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          const float* const note = notes + static_cast<long long>(place_of_note(first[k] + u)) * p.unit_rows + r;
          of_unit[k] =
              first[k] + u < behind[k] ? ptx::load_l2_16(note) : float4{-kInfinity, -kInfinity, -kInfinity, -kInfinity};
          goes_on = goes_on || first[k] + u + 1 < behind[k];
        }
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          sums[k] += ptx::exp2(of_unit[k].x - totals[0]) + ptx::exp2(of_unit[k].y - totals[1]) +
                     ptx::exp2(of_unit[k].z - totals[2]) + ptx::exp2(of_unit[k].w - totals[3]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const long long tile = base + 32 * k + lane_id();
      if (tile < p.max_tiles) masses[tile * p.num_kv_heads] = sums[k] * share;
    }
  }
}

}  // namespace kvt
