// Grow: begin one step of a batch on the device. Each row gets a place for one new token, and a block where it has none.
//
// Blocks come from a supply that the host has filled: for each size a list, of which the first `taken` are gone. Rows take
// from it in their order, by prefix sums over what each of them wants, so the same state gives the same blocks on every
// GPU. A row wants the size that the growth policy says. If that list is empty, it takes a block of the smallest size that
// is left, and if there is none, the row stalls: it gets no token in this step, keeps all that it holds, and asks again in
// the next one. With several groups of layers a row needs room in all of them; what it got in some stays with it as room.
//
// Launch:   one CTA of up to 1024 threads, a multiple of 32, with up to KVT_EACH (1, 2 or 4) neighbouring rows each; further
//           rows in turn. Any architecture.
// Source:   the policies of kvtoolkit/config/growth.py, which `tail_size` and `split` repeat.
#include <kvt/base/warp.cuh>
#include <kvt/entry.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kMaxGroups = 4;  // of layers
constexpr int kMostEach = KVT_EACH;  // rows of a thread
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

// The rows of a thread, one after the other in the batch.
struct Rows {
  int first, count;
  int length[kMostEach], status[kMostEach];
  RowTail tail[kMostEach];  // of one group
  Want want[kMostEach];
  bool is_waiting[kMostEach];  // for blocks
};

// A group's supply as the CTA knows it: `gone` and `held` have the blocks of each size, then granules.
struct Supply {
  int gone[kNumSizes + 1], held[kNumSizes + 1], ends[kNumSizes];
};

// Let the policy choose. It looks at how much is free, and rows make that less one after the other; where it matters, one
// thread chooses for all.
__device__ __forceinline__ void choose(const GrowParams& p, int group, const Supply& supply, int begin, Rows& rows) {
  __shared__ unsigned char chosen[1024 * kMostEach];
  const int free = supply.held[kNumSizes] - supply.gone[kNumSizes];
  const int least_free = free - kMaxBlockGranules * kMostEach * static_cast<int>(blockDim.x);
  const bool matters =
      p.rule[group] == kByFreeMemory && tail_size(p, group, 0, free) != tail_size(p, group, 0, least_free);
#pragma unroll
  for (int i = 0; i < kMostEach; ++i) {
    rows.want[i] = split(p, group, tail_size(p, group, rows.length[i] + 1, free));
    if (matters && i < rows.count) chosen[rows.first - begin + i] = rows.is_waiting[i];
  }
  if (!matters) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    int left = free;
    for (int i = 0; i < min(p.batch - begin, kMostEach * static_cast<int>(blockDim.x)); ++i) {
      if (!chosen[i]) continue;
      const Want want = split(p, group, tail_size(p, group, 0, left));
      chosen[i] = want.size | want.count << 4;
      left -= want.count << want.size;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMostEach; ++i) {
    if (i >= rows.count) continue;
    const int code = chosen[rows.first - begin + i];
    rows.want[i] = {code & 15, code >> 4};
  }
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

// The sum of `value` over the threads before this one; `total` becomes that over all. It has four sums of 16 bits in it.
__device__ __forceinline__ unsigned long long sum_before(
    unsigned long long value, unsigned long long* warp_sums, unsigned long long& total) {
  const int lane = lane_id();
  unsigned long long up_to_here = value;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const unsigned long long below = __shfl_up_sync(kAllLanes, up_to_here, d);
    if (lane >= d) up_to_here += below;
  }
  if (lane == 31) warp_sums[threadIdx.x >> 5] = up_to_here;
  __syncthreads();
  unsigned long long before = up_to_here - value;
  total = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x >> 5); ++warp) {
    if (warp == static_cast<int>(threadIdx.x >> 5)) before += total;
    total += warp_sums[warp];
  }
  return before;
}

// Give blocks to the rows that wait for some. One that gets none has a status that says why.
__device__ __forceinline__ void give(const GrowParams& p, int group, Supply& supply, int begin, Rows& rows) {
  __shared__ unsigned long long warp_sums[32];
  choose(p, group, supply, begin, rows);
  while (true) {
    unsigned long long own = 0;
#pragma unroll
    for (int i = 0; i < kMostEach; ++i) {
      if (rows.is_waiting[i]) own += static_cast<unsigned long long>(rows.want[i].count) << 16 * rows.want[i].size;
    }
    if (threadIdx.x < kNumSizes) supply.ends[threadIdx.x] = supply.gone[threadIdx.x];
    unsigned long long total;
    unsigned long long before = sum_before(own, warp_sums, total);
    bool is_short = false;
#pragma unroll
    for (int size = 0; size < kNumSizes; ++size) {
      is_short = is_short || supply.gone[size] + static_cast<int>(total >> 16 * size & 0xFFFF) > supply.held[size];
    }
    bool goes_on = false;
#pragma unroll
    for (int i = 0; i < kMostEach; ++i) {
      if (!rows.is_waiting[i]) continue;
      const Want want = rows.want[i];
      const int at = supply.gone[want.size] + static_cast<int>(before >> 16 * want.size & 0xFFFF);
      before += static_cast<unsigned long long>(want.count) << 16 * want.size;
      if (at + want.count > supply.held[want.size]) {
        goes_on = true;
        continue;
      }
      rows.is_waiting[i] = false;
      // what a row without entries was to get is left out, and is the host's again at its next turn
      if (!take(p, group, rows.first + i, want, at, rows.tail[i])) rows.status[i] = kRowFull;
      if (is_short) atomicMax(&supply.ends[want.size], at + want.count);
    }
    const bool is_left = __syncthreads_or(goes_on);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int size = 0; size < kNumSizes; ++size) {
        const int gone = supply.gone[size];
        const int end = is_short ? supply.ends[size] : gone + static_cast<int>(total >> 16 * size & 0xFFFF);
        supply.gone[kNumSizes] += end - gone << size;
        p.taken[group][size] = supply.gone[size] = end;
      }
      p.taken[group][kNumSizes] = supply.gone[kNumSizes];
    }
    __syncthreads();
    if (!is_left) return;
    int smallest = 0;  // size of which some are left
    while (smallest < kNumSizes && supply.gone[smallest] == supply.held[smallest]) ++smallest;
#pragma unroll
    for (int i = 0; i < kMostEach; ++i) {
      if (!rows.is_waiting[i]) continue;
      rows.want[i] = {smallest, 1};
      if (smallest == kNumSizes) rows.status[i] = kOutOfBlocks;
    }
    if (smallest == kNumSizes) return;
  }
}

// The rows of a thread, from row `begin` of the CTA's on; threads without rows take part in all barriers.
__device__ __forceinline__ void grow_rows(const GrowParams& p, int begin, Rows& rows) {
  __shared__ Supply supply;
  int num_new[kMostEach];
#pragma unroll
  for (int i = 0; i < kMostEach; ++i) {
    rows.status[i] = kFinished;
    rows.length[i] = num_new[i] = 0;
    if (i >= rows.count) continue;
    const int row = rows.first + i;
    rows.length[i] = p.lengths[row];
    num_new[i] = p.num_new[row];
    rows.status[i] = p.finished[row]                     ? kFinished
                     : rows.length[i] >= p.max_lens[row] ? kAtMaxLen
                     : num_new[i] == p.max_steps         ? kOutOfSteps
                                                         : kOk;
  }
  for (int group = 0; group < p.num_groups; ++group) {
    if (threadIdx.x <= kNumSizes) {
      supply.gone[threadIdx.x] = p.taken[group][threadIdx.x];
      supply.held[threadIdx.x] = p.held[group][threadIdx.x];
    }
    bool waits = false;
#pragma unroll
    for (int i = 0; i < kMostEach; ++i) {
      rows.is_waiting[i] = false;
      if (i >= rows.count) continue;
      const int4 tail = p.tails[group][rows.first + i];
      rows.tail[i] = {tail.x, tail.y, tail.z, tail.w};
      rows.is_waiting[i] = rows.status[i] == kOk && rows.length[i] == tail.x * kGranule;
      waits = waits || rows.is_waiting[i];
    }
    if (__syncthreads_or(waits)) give(p, group, supply, begin, rows);
#pragma unroll
    for (int i = 0; i < kMostEach; ++i) {
      if (i >= rows.count || rows.status[i] != kOk) continue;
      const int row = rows.first + i;
      p.seq_lens[group][row] = rows.length[i] + 1;
      p.slot_mapping[group][row] = slot_of(p, group, row, rows.length[i], rows.tail[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kMostEach; ++i) {
    if (i >= rows.count) continue;
    const int row = rows.first + i;
    const bool is_ok = rows.status[i] == kOk;
    p.status[row] = rows.status[i];
    p.positions[row] = is_ok ? rows.length[i] : 0;
    if (is_ok) {
      p.lengths[row] = rows.length[i] + 1;
      p.num_new[row] = num_new[i] + 1;
      p.history[static_cast<long long>(row) * p.max_steps + num_new[i]] = p.tokens[row];
      continue;
    }
    for (int group = 0; group < p.num_groups; ++group) {
      p.seq_lens[group][row] = 0;
      p.slot_mapping[group][row] = -1;
    }
  }
}

extern "C" __global__ void __launch_bounds__(1024) kvt_grow(const __grid_constant__ GrowParams p) {
  ptx::wait_for_dependencies();
  const int threads = static_cast<int>(blockDim.x);
  const int each = min(kMostEach, (p.batch + threads - 1) / threads);
  for (int begin = 0; begin < p.batch; begin += threads * each) {
    Rows rows;
    rows.first = begin + static_cast<int>(threadIdx.x) * each;
    rows.count = max(0, min(each, p.batch - rows.first));
    grow_rows(p, begin, rows);
    __syncthreads();  // before the next rows look at the supply
  }
}

}  // namespace kvt
