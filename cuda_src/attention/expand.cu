// Expand: turn the entries of a block table into a list of granules, on the device, once a step for all layers.
//
//   block_table   [batch, max_entries] int32 entries, -1 = empty;   block_starts  [batch, max_entries] int32, granules
//   seq_lens      [batch] int32
//   granules      [batch, width] int32: granule inside its tier | tier << 27, so plain granules where all are hot
//
// A row of layers with a window begins with the first granule that it still holds. Nothing before that is seen, but
// kernels read whole tiles of keys and then mask some, so up to kMostBefore places before it name this first granule.
//
// Launch:   one thread per entry, CTA 256, grid = (batch, CTAs of a row). Any architecture.
#include <kvt/entry.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kMostBefore = 512;  // granules of the largest tile: the prefill kernel's for very long sequences

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

// The granules of an entry come one after the other from this word on.
__device__ __forceinline__ int first_word(const ExpandParams& p, Entry entry) {
  const int tier = static_cast<int>(entry.tier());
  return entry.granule() - p.first_granules[min(tier, 2)] | tier << 27;
}

extern "C" __global__ void __launch_bounds__(256) kvt_expand(const __grid_constant__ ExpandParams p) {
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const int row = blockIdx.x;
  const int thread = blockIdx.y * 256 + threadIdx.x;
  const int used = min(p.width, (p.seq_lens[row] + kGranule - 1) / kGranule);
  const int num_entries = min(p.max_entries, used);  // an entry has at least one granule
  if (num_entries == 0) return;
  const int* const entries = p.block_table + row * p.table_row;
  const int* const starts = p.block_starts + row * p.starts_row;
  int* const to = p.granules + static_cast<long long>(row) * p.width;
  const int begin = min(used, starts[0]);
  if (begin > 0) {
    const int word = first_word(p, Entry{entries[0]});
    for (int i = max(0, begin - kMostBefore) + thread; i < begin; i += 256 * gridDim.y) to[i] = word;
  }
  if (thread >= num_entries) return;
  const Entry entry{entries[thread]};
  const int start = starts[thread];
  if (entry.empty() || start < 0) return;
  const int word = first_word(p, entry);
  for (int i = 0; i < entry.num_granules() && start + i < used; ++i) to[start + i] = word + i;
}

}  // namespace kvt
