// Grow: begin one step of a batch on the device. Each row gets a place for one new token, and a block where it has none.
//
// Blocks come from a supply that the host has filled: for each size a list, of which the first `taken` are gone. Rows take
// from it in their order, by prefix sums over what each of them wants, so the same state gives the same blocks on every
// GPU. A row wants the size that the growth policy says. If that list is empty, it takes a block of the smallest size that
// is left, and if there is none, the row stalls: it gets no token in this step, keeps all that it holds, and asks again in
// the next one. With several groups of layers a row needs room in all of them; what it got in some stays with it as room.
//
// Launch:   one CTA of up to 1024 threads, a multiple of 32, a row to each; further rows in turn. Any architecture.
// Source:   the policies of kvtoolkit/config/growth.py, which `tail_size` and `split` repeat.
#include <kvt/base/cta.cuh>
#include <kvt/entry.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kMaxGroups = 4;  // of layers
constexpr int kNumSizes = 4;   // of blocks: 1, 2, 4 and 8 granules

// as in kvtoolkit/cache/state/step_passes.py, and two more
constexpr int kOk = 0;
constexpr int kOutOfBlocks = 1;
constexpr int kRowFull = 2;
constexpr int kAtMaxLen = 3;
constexpr int kFinished = 4;
constexpr int kOutOfSteps = 5;

// rules of growth policies
constexpr int kByLength = 1;
constexpr int kByFreeMemory = 2;

// What a group has of a row: granules, entries, the first token of the last entry, its slot minus its number.
struct RowTail {
  int capacity, num_entries, first, base;
};

// Packed by kvtoolkit/cuda/grow.py, field by field in this order.
struct GrowParams {
  const unsigned char* finished;  // [batch] not 0: the row gets no more tokens
  const long long* tokens;        // [batch] the new token of each row
  const int* max_lens;            // [batch] tokens
  int* lengths;                   // [batch] tokens before this step; then with the new one
  int* num_new;                   // [batch] tokens that the row has got since the host's last turn
  int* status;                    // [batch]
  long long* positions;           // [batch] of the new tokens
  long long* history;             // [batch, max_steps] the tokens that rows have got
  // of each group of layers
  int* block_table[kMaxGroups];         // [batch, width] entries
  int* block_starts[kMaxGroups];        // [batch, width]
  int* seq_lens[kMaxGroups];            // [batch] for attention; 0 for a row without a new token
  long long* slot_mapping[kMaxGroups];  // [batch]
  int4* tails[kMaxGroups];              // [batch] RowTail
  const int* supply[kMaxGroups];        // [kNumSizes, most_supply] first granules
  const int* held[kMaxGroups];  // [kNumSizes] blocks in the supply, then granules that were free at the host's turn
  int* taken[kMaxGroups];       // [kNumSizes] blocks of it that are gone, then granules of these
  int* grants[kMaxGroups];      // [batch, most_grants + 1] number of blocks of a row; first granule | size << 24
  int width[kMaxGroups], num_granules[kMaxGroups];
  int rule[kMaxGroups], tail[kMaxGroups], largest[kMaxGroups];
  int offered[kMaxGroups];  // bit i: blocks of 2^i granules
  int most_supply[kMaxGroups];
  int batch, num_groups, max_steps, most_grants;
};

// Blocks of one size.
struct Want {
  int size;  // 0 to 3: 1, 2, 4 or 8 granules
  int count;
};

// The size in granules of the next block of a row of `length` tokens while so many granules are free.
__device__ __forceinline__ int tail_size(const GrowParams& p, int group, int length, int free) {
  if (p.rule[group] == kByLength) return length >= 512 ? 8 : length >= 256 ? 4 : length >= 128 ? 2 : 1;
  if (p.rule[group] != kByFreeMemory) return p.tail[group];
  const double share = static_cast<double>(max(free, 0)) / p.num_granules[group];
  return share > 0.10 ? 8 : share > 0.06 ? 4 : share > 0.035 ? 2 : 1;
}

// The largest size on offer that is not above `granules` and the policy's largest; the smallest if none is.
__device__ __forceinline__ Want split(const GrowParams& p, int group, int granules) {
  const int offered = p.offered[group];
  const int largest_offered = 1 << (31 - __clz(offered));
  granules = min(min(granules, p.largest[group]), largest_offered);
  const int fitting = offered & (2 * granules - 1);
  if (fitting == 0) return {31 - __clz(offered & -offered), 1};
  const int size = 31 - __clz(fitting);
  return {size, granules >> size};
}

// Append a block to a row. The row has an entry left, or the block continues the last one.
__device__ __forceinline__ bool attach(
    const GrowParams& p, int group, int row, int start, int granules, RowTail& tail) {
  int* const entries = p.block_table[group] + static_cast<long long>(row) * p.width[group];
  int* const starts = p.block_starts[group] + static_cast<long long>(row) * p.width[group];
  if (tail.num_entries > 0) {
    const Entry last{entries[tail.num_entries - 1]};
    const int length = last.num_granules();
    // an entry stays inside one superblock of 8 granules
    if (last.granule() + length == start && last.granule() >> 3 == (start + granules - 1) >> 3) {
      entries[tail.num_entries - 1] = Entry::pack(last.granule(), length + granules, last.tier()).bits;
      tail.capacity += granules;
      return true;
    }
  }
  if (tail.num_entries == p.width[group]) return false;
  entries[tail.num_entries] = Entry::pack(start, granules, Tier::kHot).bits;
  starts[tail.num_entries] = tail.capacity;
  tail.first = tail.capacity * kGranule;
  tail.base = (start - tail.capacity) * kGranule;
  tail.capacity += granules;
  ++tail.num_entries;
  return true;
}

// The slot of a row's token. The row has room for it, usually in its last entry.
__device__ __forceinline__ long long slot_of(const GrowParams& p, int group, int row, int token, const RowTail& tail) {
  if (token >= tail.first) return tail.base + token;
  const int* const starts = p.block_starts[group] + static_cast<long long>(row) * p.width[group];
  const int e = find_entry(starts, tail.num_entries, token / kGranule);
  const Entry entry{p.block_table[group][static_cast<long long>(row) * p.width[group] + e]};
  return static_cast<long long>(entry.granule() - starts[e]) * kGranule + token;
}

// What a row wants of a group's supply. The policy looks at how much is free, and rows make that less one after the other;
// where it matters, one thread chooses for all.
__device__ __forceinline__ Want choose(const GrowParams& p, int group, int length, bool is_waiting) {
  __shared__ unsigned char chosen[1024];
  const int free = p.held[group][kNumSizes] - p.taken[group][kNumSizes];
  const int least_free = free - kMaxBlockGranules * static_cast<int>(blockDim.x);
  if (p.rule[group] != kByFreeMemory || tail_size(p, group, 0, free) == tail_size(p, group, 0, least_free)) {
    return split(p, group, tail_size(p, group, length, free));
  }
  chosen[threadIdx.x] = is_waiting;
  __syncthreads();
  if (threadIdx.x == 0) {
    int left = free;
    for (int i = 0; i < static_cast<int>(blockDim.x); ++i) {
      if (!chosen[i]) continue;
      const Want want = split(p, group, tail_size(p, group, 0, left));
      chosen[i] = want.size | want.count << 4;
      left -= want.count << want.size;
    }
  }
  __syncthreads();
  return {chosen[threadIdx.x] & 15, chosen[threadIdx.x] >> 4};
}

// Attach blocks of the supply, from place `begin` of its list on, to a row. Does nothing if the row has too few entries.
__device__ __forceinline__ bool take(const GrowParams& p, int group, int row, Want want, int begin, RowTail& tail) {
  int* const grants = p.grants[group] + static_cast<long long>(row) * (p.most_grants + 1);
  const int* const supply = p.supply[group] + static_cast<long long>(want.size) * p.most_supply[group];
  const int granted = grants[0];
  if (granted + want.count > p.most_grants || tail.num_entries + want.count > p.width[group]) return false;
  for (int k = 0; k < want.count; ++k) {
    const int start = supply[begin + k];
    attach(p, group, row, start, 1 << want.size, tail);
    grants[1 + granted + k] = start | want.size << 24;
  }
  grants[0] = granted + want.count;
  p.tails[group][row] = {tail.capacity, tail.num_entries, tail.first, tail.base};
  return true;
}

// Give blocks to the threads whose rows wait for some; returns the status of the own row.
__device__ __forceinline__ int give(
    const GrowParams& p, int group, int row, int length, bool is_waiting, RowTail& tail, int* warp_sums) {
  __shared__ int ends[kNumSizes];  // how much of each list is gone then
  int* const taken = p.taken[group];
  const int* const held = p.held[group];
  int status = kOk;
  Want want = choose(p, group, length + 1, is_waiting);
  while (true) {
    if (threadIdx.x < kNumSizes) ends[threadIdx.x] = taken[threadIdx.x];
    int begin = 0;
#pragma unroll
    for (int size = 0; size < kNumSizes; ++size) {
      int total;
      const bool is_mine = is_waiting && want.size == size;
      const int before = sum_before(is_mine ? want.count : 0, warp_sums, total);
      if (is_mine) begin = taken[size] + before;
    }
    if (is_waiting && begin + want.count <= held[want.size]) {
      is_waiting = false;
      if (take(p, group, row, want, begin, tail)) {
        atomicMax(&ends[want.size], begin + want.count);
      } else {
        status = kRowFull;  // what it was to get is left out, and is the host's again at its next turn
      }
    }
    __syncthreads();
    if (threadIdx.x < kNumSizes) {
      const int gone = ends[threadIdx.x] - taken[threadIdx.x] << threadIdx.x;
      taken[threadIdx.x] = ends[threadIdx.x];
      atomicAdd(&taken[kNumSizes], gone);
    }
    if (!__syncthreads_or(is_waiting)) return status;
    int smallest = 0;  // size of which some are left
    while (smallest < kNumSizes && taken[smallest] == held[smallest]) ++smallest;
    if (smallest == kNumSizes) return is_waiting ? kOutOfBlocks : status;
    want = {smallest, 1};
    __syncthreads();
  }
}

// One row, whose thread takes part in all barriers even where there is none.
__device__ __forceinline__ void grow_row(const GrowParams& p, int row, bool is_row, int* warp_sums) {
  int length = 0, num_new = 0, status = kFinished;
  if (is_row) {
    length = p.lengths[row];
    num_new = p.num_new[row];
    if (!p.finished[row]) {
      status = length >= p.max_lens[row] ? kAtMaxLen : num_new == p.max_steps ? kOutOfSteps : kOk;
    }
  }
  for (int group = 0; group < p.num_groups; ++group) {
    RowTail tail{0, 0, 0, 0};
    if (status == kOk) {
      const int4 read = p.tails[group][row];
      tail = {read.x, read.y, read.z, read.w};
    }
    const bool is_waiting = status == kOk && length == tail.capacity * kGranule;
    if (__syncthreads_or(is_waiting)) {
      const int given = give(p, group, row, length, is_waiting, tail, warp_sums);
      if (is_waiting) status = given;
    }
    if (status != kOk) continue;
    p.seq_lens[group][row] = length + 1;
    p.slot_mapping[group][row] = slot_of(p, group, row, length, tail);
  }
  if (!is_row) return;
  p.status[row] = status;
  p.positions[row] = status == kOk ? length : 0;
  if (status == kOk) {
    p.lengths[row] = length + 1;
    p.num_new[row] = num_new + 1;
    p.history[static_cast<long long>(row) * p.max_steps + num_new] = p.tokens[row];
    return;
  }
  for (int group = 0; group < p.num_groups; ++group) {
    p.seq_lens[group][row] = 0;
    p.slot_mapping[group][row] = -1;
  }
}

extern "C" __global__ void __launch_bounds__(1024) kvt_grow(const __grid_constant__ GrowParams p) {
  __shared__ int warp_sums[32];
  if (threadIdx.x < 32) warp_sums[threadIdx.x] = 0;  // there may be fewer warps
  ptx::wait_for_dependencies();
  for (int first = 0; first < p.batch; first += blockDim.x) {
    const int row = first + static_cast<int>(threadIdx.x);
    grow_row(p, row, row < p.batch, warp_sums);
  }
}

}  // namespace kvt
