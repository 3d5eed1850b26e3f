// Masses: the share of the attention that each tile of a sequence got, by kv head, from what kvt_tiered noted of
// every unit, or kvt_decode of every step.
//
//   unit_lse   [batch, num_kv_heads, unit_slots, unit_rows] float32, log2
//   lse        [num_tokens, num_q_heads] float32, natural log;   cu_seqlens_q  [batch + 1] int32 or null
//   seq_lens   [batch] int32
//   units      [batch, max_units];   num_units  [batch]; null = a slot was noted for every step of 16 positions
//   masses     [batch, max_tiles, num_kv_heads] float32: mean over the queries and the group's heads; 0 where nothing is
//
// Launch:   grid (batch, num_kv_heads, CTAs of a sequence), CTA 256: a thread for a unit. Any architecture.
#include <kvt/attention.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kThreads = 256;
constexpr int kMaxRows = 1024;  // query rows of a kv head

// Filled in by kvtoolkit/cuda/masses.py, in this order.
struct MassParams {
  const float* unit_lse;
  const float* lse;
  const int* cu_seqlens_q;
  const int* seq_lens;
  const int4* units;
  const int* num_units;
  float* masses;
  int num_kv_heads, group_size;
  int max_units, unit_slots, unit_rows, max_tiles;
  int left, right;  // keys seen before and after a query's position; -1 = all
  int stride;       // units from one of a warp to its next, in the kernel that noted
};

extern "C" __global__ void __launch_bounds__(kThreads) kvt_masses(const __grid_constant__ MassParams p) {
  __shared__ float totals[kMaxRows];  // log2
  // what is older than the attention kernel may be read while that one ends
  const int row = blockIdx.x;
  const int kv_head = blockIdx.y;
  const int first_token = p.cu_seqlens_q == nullptr ? row : p.cu_seqlens_q[row];
  const int queries = p.cu_seqlens_q == nullptr ? 1 : p.cu_seqlens_q[row + 1] - first_token;
  const int num_rows = min(queries * p.group_size, min(kMaxRows, p.unit_rows));
  const int4* const units = p.units + static_cast<long long>(row) * p.max_units;
  const StepRange steps = visible_steps(p.left, p.right, p.seq_lens[row], queries);
  // the numbers that units have, and their tiles
  const int first = p.units != nullptr ? 0 : steps.begin;
  const int end = min(p.unit_slots, queries == 0 ? 0 : p.units != nullptr ? p.num_units[row] : steps.end);
  const auto tile_of = [&](int i) { return p.units != nullptr ? units[i].z / kTile : i * kStep / kTile; };
  float* const masses = p.masses + static_cast<long long>(row) * p.max_tiles * p.num_kv_heads + kv_head;
  const float* const notes =
      p.unit_lse + (static_cast<long long>(row) * p.num_kv_heads + kv_head) * p.unit_slots * p.unit_rows;
  int i = first + blockIdx.z * kThreads + threadIdx.x;
  int tile = i < end ? tile_of(i) : p.max_tiles;
  int tile_before = i > first && i < end ? tile_of(i - 1) : -1;
  const int seen = first < end ? tile_of(first) : p.max_tiles;
  const int seen_end = first < end ? tile_of(end - 1) + 1 : p.max_tiles;
  ptx::wait_for_dependencies();
  ptx::launch_dependents();

  for (int r = threadIdx.x; r < num_rows; r += kThreads) {
    const int query = r / p.group_size;
    const long long token = first_token + query;
    totals[r] = p.lse[(token * p.num_kv_heads + kv_head) * p.group_size + r - query * p.group_size] * kLog2E;
  }
  if (blockIdx.z == 0) {  // tiles that nobody sees
    for (int t = threadIdx.x; t < p.max_tiles; t += kThreads) {
      if (t < seen || t >= seen_end) masses[static_cast<long long>(t) * p.num_kv_heads] = 0.0f;
    }
  }
  __syncthreads();
  while (tile < p.max_tiles) {
    if (tile != tile_before) {  // the thread of the tile's first unit does them all
      float sum = 0.0f;
      for (int j = i; j < end && (j == i || tile_of(j) == tile); ++j) {
        const float* const note = notes + static_cast<long long>(place_of_note(j, p.stride)) * p.unit_rows;
#pragma unroll 2
        for (int r = 0; r < num_rows; r += 4) {  // unit_rows is a multiple of 8
          const float4 lse = *reinterpret_cast<const float4*>(note + r);
          const float by_row[4] = {lse.x, lse.y, lse.z, lse.w};
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            // a query that sees nothing has no shares
            if (r + c < num_rows && totals[r + c] > -kInfinity) sum += ptx::exp2(by_row[c] - totals[r + c]);
          }
        }
      }
      masses[static_cast<long long>(tile) * p.num_kv_heads] = sum / num_rows;
    }
    i += gridDim.z * kThreads;
    tile = i < end ? tile_of(i) : p.max_tiles;
    tile_before = i < end ? tile_of(i - 1) : -1;
  }
}

}  // namespace kvt
