// Grow: begin one step of a batch on the device. Each row gets places for its new tokens, one or a fixed number of them, and
// blocks where it lacks room. Of several new tokens the model may reject some: `kept` of the last step's stay.
//
// Blocks come from a supply that the host has filled: for each size a list, of which the first `taken` are gone. Rows take
// from it in their order, by prefix sums over what each of them wants, so the same state gives the same blocks on every
// GPU. A row wants the size that the growth policy says. If that list is empty, it takes a block of the smallest size that
// is left, and if there is none, the row stalls: it gets no token in this step, keeps all that it holds, and asks again in
// the next one. With several groups of layers a row needs room in all of them; what it got in some stays with it as room.
//
// Launch:   one CTA of up to KVT_THREADS threads, a multiple of 32, with KVT_EACH rows each; further rows in turn. Any
//           architecture. Macros: these two; their product is at most 4096.
// Source:   the policies of kvtoolkit/config/growth.py, which `tail_size` and `split` repeat.
#include <kvt/base/warp.cuh>
#include <kvt/entry.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kMaxGroups = 4;    // of layers
constexpr int kEach = KVT_EACH;  // rows of a thread
constexpr int kNumSizes = 4;     // of blocks: 1, 2, 4 and 8 granules

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
  const long long* tokens;        // [batch, most_new] the new tokens of each row
  int* kept;                      // [batch] how many of the last step's tokens stay, then 0; unused where most_new is 1
  int* pending;                   // [batch] tokens that the last step gave a row, if it had several; or 0
  const int* max_lens;            // [batch] tokens
  int* lengths;                   // [batch] tokens that stay; a single new one counts at once
  int* num_new;                   // [batch] tokens that the row has got since the host's last turn
  int* status;                    // [batch]
  long long* positions;           // [batch, most_new] of the new tokens
  long long* history;             // [max_steps, batch] the tokens that rows have got
  // of each group of layers
  int* block_table[kMaxGroups];         // [batch, width] entries
  int* block_starts[kMaxGroups];        // [batch, width]
  int* seq_lens[kMaxGroups];            // [batch] for attention; 0 for a row without a new token
  long long* slot_mapping[kMaxGroups];  // [batch, most_new]
  int4* tails[kMaxGroups];              // [batch] RowTail
  const int* supply[kMaxGroups];        // [kNumSizes, most_supply] first granules
  const int* held[kMaxGroups];  // [kNumSizes] blocks in the supply, then granules that were free at the host's turn
  int* taken[kMaxGroups];       // [kNumSizes] blocks of it that are gone, then granules of these
  int* grants[kMaxGroups];      // [most_grants + 1, batch] number of blocks of a row; first granule | size << 24
  const int*
      gone[kMaxGroups];  // [batch] entries that windows have passed, which the host's rows have until its turn; or null
  int width[kMaxGroups], num_granules[kMaxGroups];
  int rule[kMaxGroups], tail[kMaxGroups], largest[kMaxGroups];
  int offered[kMaxGroups];  // bit i: blocks of 2^i granules
  int most_supply[kMaxGroups];
  int batch, num_groups, max_steps, most_grants, most_new;
  int beams;  // rows of a family, of which all get a token or none; one launch takes all rows at once where it is above 1
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

// Append a block to a row, as a new entry or as part of the last one. Returns false if it has no entry left for it.
__device__ __forceinline__ bool attach(
    const GrowParams& p, int group, int row, int start, int granules, RowTail& tail) {
  const long long at = static_cast<long long>(row) * p.width[group] + tail.num_entries;
  const int first = tail.first / kGranule;
  const int granule = tail.base / kGranule + first;  // of the last entry
  const int length = tail.capacity - first;
  // an entry stays inside one superblock of 8 granules; with an empty row nothing joins
  if (tail.num_entries > 0 && granule + length == start && granule >> 3 == (start + granules - 1) >> 3) {
    p.block_table[group][at - 1] = Entry::pack(granule, length + granules, Tier::kHot).bits;
  } else if (tail.num_entries + (p.gone[group] == nullptr ? 0 : p.gone[group][row]) >= p.width[group]) {
    return false;
  } else {
    p.block_table[group][at] = Entry::pack(start, granules, Tier::kHot).bits;
    p.block_starts[group][at] = tail.capacity;
    tail.first = tail.capacity * kGranule;
    tail.base = (start - tail.capacity) * kGranule;
    ++tail.num_entries;
  }
  tail.capacity += granules;
  return true;
}

// The slot of a row's token. The row has room for it, usually in its last entry.
__device__ __forceinline__ long long slot_of(const GrowParams& p, int group, int row, int token, const RowTail& tail) {
  if (token >= tail.first) return tail.base + token;
  const int* const starts = p.block_starts[group] + static_cast<long long>(row) * p.width[group];
  // a row may have more entries than the table, of room beyond the longest length that there is here
  const int e = find_entry(starts, min(tail.num_entries, p.width[group]), token / kGranule);
  const Entry entry{p.block_table[group][static_cast<long long>(row) * p.width[group] + e]};
  return static_cast<long long>(entry.granule() - starts[e]) * kGranule + token;
}

// What the threads of the CTA share. A thread has kEach rows, blockDim.x apart.
struct Shared {
  int gone[kNumSizes + 1], held[kNumSizes + 1];  // of a group's supply: blocks of each size, then granules
  int ends[kNumSizes];
  unsigned long long sums[kEach][33];  // of each warp's rows; then of all rows before these, the last one of all rows
  unsigned char chosen[kEach * KVT_THREADS];
};

// The rows of a thread.
struct Rows {
  int row[kEach], length[kEach], status[kEach];
  Want want[kEach];
  bool is_waiting[kEach];  // for blocks
};

// Let the policy choose. It looks at how much is free, and rows make that less one after the other; where it matters, one
// thread chooses for all.
__device__ __forceinline__ void choose(const GrowParams& p, int group, int begin, Shared& shared, Rows& rows) {
  const int free = shared.held[kNumSizes] - shared.gone[kNumSizes];
  const int least_free = free - kMaxBlockGranules * kEach * static_cast<int>(blockDim.x);
  const bool matters =
      p.rule[group] == kByFreeMemory && tail_size(p, group, 0, free) != tail_size(p, group, 0, least_free);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    rows.want[i] = split(p, group, tail_size(p, group, rows.length[i] + p.most_new, free));
    if (matters) shared.chosen[rows.row[i] - begin] = rows.is_waiting[i];
  }
  if (!matters) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    int left = free;
    for (int i = 0; i < kEach * static_cast<int>(blockDim.x); ++i) {
      if (!shared.chosen[i]) continue;
      const Want want = split(p, group, tail_size(p, group, 0, left));
      shared.chosen[i] = want.size | want.count << 4;
      left -= want.count << want.size;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int code = shared.chosen[rows.row[i] - begin];
    rows.want[i] = {code & 15, code >> 4};
  }
}

// Attach blocks of the supply, from place `begin` of its list on, to a row, as many as it has entries for. Returns false if
// that is none. From then on the row counts as one with too many entries, so that it asks for no more blocks in this turn:
// they would be lost to other rows.
__device__ __forceinline__ bool take(const GrowParams& p, int group, int row, Want want, int begin) {
  int* const grants = p.grants[group] + row;
  const int* const supply = p.supply[group] + static_cast<long long>(want.size) * p.most_supply[group];
  const int granted = grants[0];
  const int4 read = p.tails[group][row];
  RowTail tail{read.x, read.y, read.z, read.w};
  int count = 0;
  while (count < want.count && granted + count < p.most_grants) {
    const int start = supply[begin + count];
    if (!attach(p, group, row, start, 1 << want.size, tail)) break;
    grants[static_cast<long long>(1 + granted + count) * p.batch] = start | want.size << 24;
    ++count;
  }
  if (count == 0) tail.num_entries = p.width[group] + 1;
  grants[0] = granted + count;
  p.tails[group][row] = {tail.capacity, tail.num_entries, tail.first, tail.base};
  return count > 0;
}

// Replace `values` of the rows of a thread by the sums over all rows before; returns the sum over all. Each value has four
// numbers of 16 bits.
__device__ __forceinline__ unsigned long long sum_before(unsigned long long (&values)[kEach], Shared& shared) {
  const int lane = lane_id();
  const int warp = threadIdx.x >> 5;
  const auto sum_up = [lane](unsigned long long sum) {
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const unsigned long long below = __shfl_up_sync(kAllLanes, sum, d);
      if (lane >= d) sum += below;
    }
    return sum;
  };
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const unsigned long long sum = sum_up(values[i]);
    if (lane == 31) shared.sums[i][warp] = sum;
    values[i] = sum - values[i];
  }
  __syncthreads();
  if (warp == 0) {
    unsigned long long before = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const unsigned long long own = lane < static_cast<int>(blockDim.x >> 5) ? shared.sums[i][lane] : 0;
      const unsigned long long sum = sum_up(own);
      shared.sums[i][lane] = before + sum - own;
      before += __shfl_sync(kAllLanes, sum, 31);
    }
    if (lane == 0) shared.sums[0][32] = before;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i) values[i] += shared.sums[i][warp];
  return shared.sums[0][32];
}

__device__ __forceinline__ int of_size(unsigned long long sums, int size) {
  return static_cast<int>(sums >> 16 * size & 0xFFFF);
}

// Give blocks to the rows that wait for some. One that gets none has a status that says why.
__device__ __forceinline__ void give(const GrowParams& p, int group, int begin, Shared& shared, Rows& rows) {
  choose(p, group, begin, shared, rows);
  while (true) {
    unsigned long long sums[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      sums[i] = rows.is_waiting[i] ? static_cast<unsigned long long>(rows.want[i].count) << 16 * rows.want[i].size : 0;
    }
    if (threadIdx.x < kNumSizes) shared.ends[threadIdx.x] = shared.gone[threadIdx.x];
    const unsigned long long total = sum_before(sums, shared);
    bool is_short = false;
#pragma unroll
    for (int size = 0; size < kNumSizes; ++size) {
      is_short = is_short || shared.gone[size] + of_size(total, size) > shared.held[size];
    }
    bool goes_on = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (!rows.is_waiting[i]) continue;
      const Want want = rows.want[i];
      const int at = shared.gone[want.size] + of_size(sums[i], want.size);
      if (at + want.count > shared.held[want.size]) {
        goes_on = true;
        continue;
      }
      rows.is_waiting[i] = false;
      // what a row has no entries for is left out, and is the host's again at its next turn
      if (!take(p, group, rows.row[i], want, at)) rows.status[i] = kRowFull;
      if (is_short) atomicMax(&shared.ends[want.size], at + want.count);
    }
    const bool is_left = __syncthreads_or(goes_on);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int size = 0; size < kNumSizes; ++size) {
        const int gone = shared.gone[size];
        const int end = is_short ? shared.ends[size] : gone + of_size(total, size);
        shared.gone[kNumSizes] += end - gone << size;
        p.taken[group][size] = shared.gone[size] = end;
      }
      p.taken[group][kNumSizes] = shared.gone[kNumSizes];
    }
    if (!is_left) return;
    __syncthreads();
    int smallest = 0;  // size of which some are left
    while (smallest < kNumSizes && shared.gone[smallest] == shared.held[smallest]) ++smallest;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (!rows.is_waiting[i]) continue;
      rows.want[i] = {smallest, 1};
      if (smallest == kNumSizes) rows.status[i] = kOutOfBlocks;
    }
    if (smallest == kNumSizes) return;
  }
}

// Let a row that has room wait for one of its family that has none: beams of other lengths could not go on from one another.
__device__ __forceinline__ void stall_families(const GrowParams& p, int begin, Shared& shared, Rows& rows) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) shared.chosen[rows.row[i] - begin] = rows.status[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int first = rows.row[i] / p.beams * p.beams;
    if (rows.row[i] >= p.batch || rows.status[i] != kOk) continue;
    for (int row = first; row < first + p.beams; ++row) {
      const int status = shared.chosen[row - begin];
      if (status == kOutOfBlocks || status == kRowFull) rows.status[i] = status;
    }
  }
}

// The rows from `begin` on; threads without rows take part in all barriers.
__device__ __forceinline__ void grow_rows(const GrowParams& p, int begin, Shared& shared) {
  Rows rows;
  int num_new[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = rows.row[i] = begin + i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    rows.status[i] = kFinished;
    rows.length[i] = num_new[i] = 0;
    if (row >= p.batch) continue;
    rows.length[i] = p.lengths[row];
    num_new[i] = p.num_new[row];
    const bool is_finished = p.finished[row];
    if (p.most_new > 1) {
      const int stay = max(0, min(p.kept[row], p.pending[row]));
      rows.length[i] += stay;
      num_new[i] += stay;
      p.kept[row] = 0;
    }
    const bool is_at_end = rows.length[i] + p.most_new > p.max_lens[row];
    const bool is_over = num_new[i] + p.most_new > p.max_steps;
    rows.status[i] = is_finished ? kFinished : is_at_end ? kAtMaxLen : is_over ? kOutOfSteps : kOk;
  }
  for (int group = 0; group < p.num_groups; ++group) {
    if (threadIdx.x <= kNumSizes) {
      shared.gone[threadIdx.x] = p.taken[group][threadIdx.x];
      shared.held[threadIdx.x] = p.held[group][threadIdx.x];
    }
    while (true) {  // several tokens may need several blocks
      bool waits = false;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int4 tail = rows.row[i] < p.batch ? p.tails[group][rows.row[i]] : int4{};
        rows.is_waiting[i] = rows.status[i] == kOk && rows.length[i] + p.most_new > tail.x * kGranule;
        if (rows.is_waiting[i] && tail.y > p.width[group]) {  // an earlier step has found it full
          rows.is_waiting[i] = false;
          rows.status[i] = kRowFull;
        }
        waits = waits || rows.is_waiting[i];
      }
      if (!__syncthreads_or(waits)) break;
      give(p, group, begin, shared, rows);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = rows.row[i];
      if (rows.status[i] != kOk) continue;
      const int4 read = p.tails[group][row];
      const RowTail tail{read.x, read.y, read.z, read.w};
      p.seq_lens[group][row] = rows.length[i] + p.most_new;
      for (int k = 0; k < p.most_new; ++k) {
        p.slot_mapping[group][row * p.most_new + k] = slot_of(p, group, row, rows.length[i] + k, tail);
      }
    }
    __syncthreads();  // all know what is left, before the next group's supply takes its place
  }
  if (p.beams > 1) stall_families(p, begin, shared, rows);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = rows.row[i];
    if (row >= p.batch) continue;
    const bool is_ok = rows.status[i] == kOk;
    const int advance = is_ok && p.most_new == 1 ? 1 : 0;
    p.status[row] = rows.status[i];
    p.lengths[row] = rows.length[i] + advance;
    p.num_new[row] = num_new[i] + advance;
    p.pending[row] = is_ok ? p.most_new - advance : 0;
    for (int k = 0; k < p.most_new; ++k) {
      const int token = row * p.most_new + k;
      p.positions[token] = is_ok ? rows.length[i] + k : 0;
      if (is_ok) p.history[static_cast<long long>(num_new[i] + k) * p.batch + row] = p.tokens[token];
    }
    if (is_ok) continue;
    for (int group = 0; group < p.num_groups; ++group) {
      p.seq_lens[group][row] = 0;
      for (int k = 0; k < p.most_new; ++k) p.slot_mapping[group][row * p.most_new + k] = -1;
    }
  }
}

extern "C" __global__ void __launch_bounds__(KVT_THREADS) kvt_grow(const __grid_constant__ GrowParams p) {
  __shared__ Shared shared;
  ptx::wait_for_dependencies();
  for (int begin = 0; begin < p.batch; begin += kEach * static_cast<int>(blockDim.x)) grow_rows(p, begin, shared);
}

}  // namespace kvt
