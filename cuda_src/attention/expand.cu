// Expand: turn the entries of a block table into a list of granules, on the device, once a step for all layers.
//
//   block_table   [batch, max_entries] int32 entries, -1 = empty;   block_starts  [batch, max_entries] int32, granules
//   seq_lens      [batch] int32
//   granules      [batch, width] int32: granule inside its tier | tier << 27, so plain granules where all are hot
//
// Launch:   one thread per entry, CTA 256, grid = (batch, CTAs of a row). Any architecture.
#include <kvt/entry.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

// Packed by kvtoolkit/cuda/expand.py, field by field in this order.
struct ExpandParams {
  const int* block_table;
  const int* block_starts;
  const int* seq_lens;
  int* granules;
  long long table_row, starts_row;
  int max_entries, width;
  int first_granules[3];  // the first granule number of the hot, warm and cold tier
};

extern "C" __global__ void __launch_bounds__(256) kvt_expand(const __grid_constant__ ExpandParams p) {
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const int row = blockIdx.x;
  const int e = blockIdx.y * 256 + threadIdx.x;
  const int used = min(p.width, (p.seq_lens[row] + kGranule - 1) / kGranule);
  if (e >= p.max_entries || e >= used) return;  // an entry has at least one granule
  const Entry entry{p.block_table[row * p.table_row + e]};
  const int start = p.block_starts[row * p.starts_row + e];
  if (entry.empty() || start < 0) return;
  const int tier = static_cast<int>(entry.tier());
  const int granule = entry.granule() - p.first_granules[min(tier, 2)];
  int* const to = p.granules + static_cast<long long>(row) * p.width;
  for (int i = 0; i < entry.num_granules() && start + i < used; ++i) to[start + i] = granule + i | tier << 27;
}

}  // namespace kvt
