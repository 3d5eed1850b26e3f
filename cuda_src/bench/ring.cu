// What `kvtoolkit bench device` compares `kvt_grow` with: one thread that gives each row its next place, and a block of 8
// tokens out of a ring where it needs one, as the scheduler of a persistent kernel does.
//
// Launch:   one thread. Any architecture.
// Source:   the idea of Mirage's persistent kernel (mirage-project/mirage, persistent_kernel.cuh), without its bookkeeping
//           of requests.
#include <kvt/entry.cuh>

namespace kvt {

struct RingParams {
  int* lengths;             // [batch] tokens
  int* block_table;         // [batch, width] entries
  int* block_starts;        // [batch, width]
  int* seq_lens;            // [batch]
  long long* slot_mapping;  // [batch]
  const int* ring;          // [size] free granules
  int* head;                // [1] how many were taken
  int batch, width, size;
};

extern "C" __global__ void __launch_bounds__(32) kvt_ring(const __grid_constant__ RingParams p) {
  if (threadIdx.x > 0) return;
  for (int row = 0; row < p.batch; ++row) {
    const int length = p.lengths[row];
    int* const entry = p.block_table + static_cast<long long>(row) * p.width + length / kGranule;
    if (length % kGranule == 0) {
      *entry = Entry::pack(p.ring[(*p.head)++ % p.size], 1, Tier::kHot).bits;
      p.block_starts[static_cast<long long>(row) * p.width + length / kGranule] = length / kGranule;
    }
    p.slot_mapping[row] = static_cast<long long>(Entry{*entry}.granule()) * kGranule + length % kGranule;
    p.lengths[row] = p.seq_lens[row] = length + 1;
  }
}

}  // namespace kvt
