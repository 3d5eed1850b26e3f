// Units: list the units of each sequence that its queries see, on the device, once a step for all layers.
//
//   block_table   [batch, max_entries] int32 entries with tiers, -1 = empty
//   block_starts  [batch, max_entries] int32, granules
//   seq_lens      [batch] int32;   cu_seqlens_q  [batch + 1] int32 or null = one query each
//   granules      [batch, width] int32, scratch: granule inside its tier | tier << 27
//   units         [batch, max_units] in order of their positions, see kvt/attention/units.cuh;   num_units  [batch]
//   tile_units    [batch, max_units / 4 + 1] the first unit of each tile that is seen, and of the tile after them
//   plan_lens     [batch] for kvt_plan: how many hot tokens would cost as much; a unit costs as much as 16 of them
//
// Launch:   one CTA of 256 threads for each sequence. Any architecture.
#include <kvt/attention/keys.cuh>
#include <kvt/attention/units.cuh>
#include <kvt/format/tiers.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kThreads = 256;

// Packed by kvtoolkit/cuda/units.py, field by field in this order.
struct UnitsParams {
  const int* block_table;
  const int* block_starts;
  const int* seq_lens;
  const int* cu_seqlens_q;
  int* granules;
  int4* units;
  int* num_units;
  int* plan_lens;
  int* tile_units;
  long long table_row, starts_row;
  int max_entries, width, max_units;
  int left, right;        // keys seen before and after a query's position; -1 = all
  int first_granules[3];  // the first granule number of the hot, warm and cold tier
};

extern "C" __global__ void __launch_bounds__(kThreads) kvt_units(const __grid_constant__ UnitsParams p) {
  __shared__ int warp_sums[kThreads / 32];
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const int row = blockIdx.x;
  const int seq_len = p.seq_lens[row];
  const int used = min(p.width, (seq_len + kGranule - 1) / kGranule);
  int* const granules = p.granules + static_cast<long long>(row) * p.width;
  for (int e = threadIdx.x; e < min(p.max_entries, used); e += kThreads) {  // an entry has at least one granule
    const Entry entry{p.block_table[row * p.table_row + e]};
    const int start = p.block_starts[row * p.starts_row + e];
    if (entry.empty() || start < 0 || start >= used) break;
    const int tier = static_cast<int>(entry.tier());
    const int granule = entry.granule() - p.first_granules[min(tier, 2)];
    for (int i = 0; i < entry.num_granules() && start + i < used; ++i) granules[start + i] = (granule + i) | tier << 27;
  }
  __syncthreads();

  const int queries = p.cu_seqlens_q == nullptr ? 1 : p.cu_seqlens_q[row + 1] - p.cu_seqlens_q[row];
  KeyRange keys = visible_keys(p.left, p.right, seq_len, seq_len - queries, seq_len - 1);
  if (queries == 0) keys.end = 0;
  int4* const units = p.units + static_cast<long long>(row) * p.max_units;
  int* const tile_units = p.tile_units + static_cast<long long>(row) * (p.max_units / 4 + 1);
  const int lane = lane_id();
  const int warp = threadIdx.x >> 5;
  int count = 0;
  for (int base = keys.begin / kTile; base * kTile < keys.end; base += kThreads) {
    const int tile = base + threadIdx.x;
    const int first = tile * kTile;
    int word = 0;
    int begin = 0;
    int end = 0;
    int tokens = kStep;
    if (first < keys.end) {
      word = granules[8 * tile];
      const Tier tier = static_cast<Tier>(word >> 27);
      tokens = tier == Tier::kHot ? kStep : tier == Tier::kWarm ? kWarmUnit : kBlock;
      begin = max(0, keys.begin - first) / tokens;
      end = min(kTile / tokens, (keys.end - first + tokens - 1) / tokens);
    }
    const int inclusive = sum_up_to_lane(end - begin);
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    int before = 0;
    int total = 0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) before += warp_sums[w];
      total += warp_sums[w];
    }
    __syncthreads();
    int at = count + before + inclusive - (end - begin);
    if (first < keys.end) tile_units[tile] = at;
    for (int u = begin; u < end; ++u, ++at) {
      int4 unit{(word & 0xFFFFFF) >> 3, u, first + u * tokens, word >> 27};
      if (tokens == kStep) {
        const int index = 8 * tile + 2 * u;
        unit.x = granules[index] & 0xFFFFFF;
        unit.y = index + 1 < used ? granules[index + 1] & 0xFFFFFF : unit.x;
      }
      if (at < p.max_units) units[at] = unit;
    }
    count += total;
  }
  if (threadIdx.x == 0) {
    tile_units[(keys.end + kTile - 1) / kTile] = count;
    p.num_units[row] = count;
    p.plan_lens[row] = count * kStep;
  }
}

}  // namespace kvt
