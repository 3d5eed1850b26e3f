// Check: look at every length, table entry and slot that a launch will read, on the device, before that launch.
//
// Launch:   one CTA of 256 threads; each thread takes every 256th row. Any architecture.
// Result:   finding [3] int32: a code (0 = nothing is wrong, see kvtoolkit/findings.py), the row or index, the value.
//           The lowest row that is wrong is reported, so that the message does not change from run to run.
#include <kvt/entry.cuh>

namespace kvt {

enum Finding : int {
  kFine,
  kBadSeqLen,
  kBadCoverage,
  kBadBlock,
  kBadCuSeqlens,
  kBadStarts,
  kBadTier,
  kBadSlot,
  kNoTier,
  kBadUnit,
  kBadPlace
};

// Packed by kvtoolkit/cuda/check.py, field by field in this order. Absent arrays are null.
struct CheckParams {
  int* finding;
  const int* block_table;
  const int* block_starts;
  const int* seq_lens;
  const int* cu_seqlens_q;
  const long long* slot_mapping;
  long long table_row, starts_row, num_slots;
  int batch, num_tokens, block_size, num_blocks, max_entries;
  int has_tiers;            // 1: entries may be in the quantized tiers
  int first_granules[3];    // the first granule number of the hot, warm and cold tier
  int quantized_blocks[2];  // blocks of the warm and the cold tier; 0 = there is no such tier
};

struct Found {
  int code, index, value;
};

// The finding for an entry of a cache with tiers.
__device__ int check_entry(const CheckParams& p, Entry entry, int start) {
  const int tier = static_cast<int>(entry.tier());
  if (tier > 2 || (tier > 0 && p.quantized_blocks[tier - 1] == 0)) return kNoTier;
  const int granule = entry.granule() - p.first_granules[tier];
  if (tier > 0 && (entry.num_granules() != 8 || granule % 8 != 0 || start % 8 != 0)) return kBadUnit;
  const int num_granules = tier > 0 ? 8 * p.quantized_blocks[tier - 1] : p.num_blocks;
  return granule < 0 || granule + entry.num_granules() > num_granules ? kBadPlace : kFine;
}

__device__ Found check_row(const CheckParams& p, int row) {
  const int seq_len = p.seq_lens[row];
  if (p.cu_seqlens_q != nullptr) {
    if (row == 0 && p.cu_seqlens_q[0] != 0) return {kBadCuSeqlens, 0, p.cu_seqlens_q[0]};
    const int next = p.cu_seqlens_q[row + 1];
    if (next < p.cu_seqlens_q[row]) return {kBadCuSeqlens, row + 1, next};
    if (row == p.batch - 1 && next != p.num_tokens) return {kBadCuSeqlens, row + 1, next};
  }
  if (seq_len < 0) return {kBadSeqLen, row, seq_len};
  const int* const table = p.block_table + row * p.table_row;
  const int blocks = seq_len / p.block_size + (seq_len % p.block_size != 0);
  if (p.block_starts == nullptr) {
    if (blocks > p.max_entries) return {kBadCoverage, row, seq_len};
    for (int i = 0; i < blocks; ++i) {
      if (table[i] < 0 || table[i] >= p.num_blocks) return {kBadBlock, row, table[i]};
    }
    return {kFine, 0, 0};
  }
  const int* const starts = p.block_starts + row * p.starts_row;
  int covered = 0;
  for (int i = 0; covered < blocks; ++i) {
    if (i == p.max_entries || table[i] < 0) return {kBadCoverage, row, seq_len};
    const Entry entry{table[i]};
    if (starts[i] != covered) return {kBadStarts, row, i};
    if (p.has_tiers) {
      const int code = check_entry(p, entry, starts[i]);
      if (code != kFine) return {code, row, i};
    } else if (entry.tier() != Tier::kHot) {
      return {kBadTier, row, i};
    } else if (entry.granule() + entry.num_granules() > p.num_blocks) {
      return {kBadBlock, row, entry.granule()};
    }
    covered += entry.num_granules();
  }
  return {kFine, 0, 0};
}

extern "C" __global__ void __launch_bounds__(256) kvt_check(const __grid_constant__ CheckParams p) {
  __shared__ int lowest;
  if (threadIdx.x == 0) lowest = 0x7FFFFFFF;
  __syncthreads();
  int mine = 0x7FFFFFFF;
  Found found{kFine, 0, 0};
  const int count = p.slot_mapping == nullptr ? p.batch : p.num_tokens;
  for (int row = threadIdx.x; row < count && found.code == kFine; row += 256) {
    if (p.slot_mapping == nullptr) {
      found = check_row(p, row);
    } else if (p.slot_mapping[row] < -1 || p.slot_mapping[row] >= p.num_slots) {
      found = {kBadSlot, row, static_cast<int>(p.slot_mapping[row])};
    }
    if (found.code != kFine) mine = row;
  }
  atomicMin(&lowest, mine);
  __syncthreads();
  if (threadIdx.x == 0 && lowest == 0x7FFFFFFF) p.finding[0] = kFine;
  if (mine == lowest && mine != 0x7FFFFFFF) {
    p.finding[0] = found.code;
    p.finding[1] = found.index;
    p.finding[2] = found.value;
  }
}

}  // namespace kvt
