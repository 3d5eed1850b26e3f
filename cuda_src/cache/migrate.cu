// Migrate: choose the tiles (64 tokens) of a batch that move in a step of the device, and change the rows that have them.
// Kernels after it copy what it lists. A tile may go to a colder tier, by age, or small blocks may become one of 64 tokens.
//
// It does what the host does at the begin of a step, and in the same order: rows let go of what a window has passed; of all
// tiles that are due, the oldest move, one in kSpread of them but no more than `most`; then tails that have just become
// full, `most` of them, in the order of the rows.
//
// Blocks to move to come from lists that the host has filled. Granules that are left stay as they are until its next turn,
// in which it reads the journal and makes the same changes. So nothing is lost if that turn never comes.
//
// What the host must do itself is marked by it: tiles that several rows share, and rows whose tiles are not where age puts
// them. If a list is empty, or a row has too few entries, the tile waits for the host, too.
//
// Launch:   one CTA of a multiple of 32 threads. Any architecture.
// Source:   kvtoolkit/cache/tiering/, state/group_passes.py and state/block_merging.py there, whose rules this repeats.
#include <kvt/base/warp.cuh>
#include <kvt/entry.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kSpread = 32;  // as in kvtoolkit/cache/tiering/demoter.py
constexpr int kNever = 0x7FFFFFFF;
constexpr int kTile = 8;  // granules

// What the host says of a row; tiles by number. Those in [first, cold_end) are cold, in [cold_end, hot_begin) warm, then
// hot; only they move.
struct RowMarks {
  int cold_end, hot_begin;  // kNever: the row's tiles are left to the host
  int merge_begin;          // tiles before are not merged
  int order;                // of rows whose tiles are equally old
};

// Packed by kvtoolkit/cuda/migrate.py, field by field in this order.
struct MigrateParams {
  const unsigned char* finished;  // [batch] as in grow.cu; so are those up to num_new, and tables and tails
  const int* kept;
  const int* pending;
  const int* max_lens;
  const int* lengths;
  const int* num_new;
  int* block_table;
  int* block_starts;
  int4* tails;
  int4* marks;         // [batch] RowMarks
  const int* targets;  // [3, most_targets] first granules of free blocks of 64 tokens: hot, warm, cold
  const int* held;     // [3] how many there are
  int* taken;          // [4] how many of them are gone, then moves so far
  int4* journal;  // [3, most_targets] of each block that is gone: row, tile, number of the move, blocks that the row
                  // had been granted by then; row -1 = unused
  const int* grants;  // [batch] as in grow.cu: how many blocks rows have been granted
  int* gone;          // [batch] entries that rows have let go of since the host's turn
  int4* edits;        // [2 * most] scratch: row, tile, list | place << 2, first granule of the block
  int* num_moves;     // [2] of this step: to colder tiers, merges
  int* demotions;     // [most, 16] granules: 8 to read, 8 to write; -1 = none
  int* merges;        // [most, 16]
  int batch, width, most_targets, most, most_new, max_steps;
  int hot, warm;           // tokens, see kvtoolkit/cache/tiering/rules.py
  int demotes, is_merged;  // whether the group has tiers; whether its growth policy merges
  int window;              // tokens that a query sees, itself included; 0 = all
};

struct Shared {
  unsigned long long best[32];  // of each warp
  int sums[33];
  int num_edits, num_due;
};

__device__ __forceinline__ int length_of(const MigrateParams& p, int row) {
  const int stay = p.most_new > 1 ? max(0, min(p.kept[row], p.pending[row])) : 0;
  return p.lengths[row] + stay;
}

// The tile of a row that is due next, how many are, and where that one goes.
struct Due {
  int count, tile;
  Tier goal;

  __device__ __forceinline__ Due(const MigrateParams& p, int row, const int4& marks)
      : count(0), tile(0), goal(Tier::kWarm) {
    const int length = length_of(p, row);
    if (marks.x == kNever || length > p.max_lens[row]) return;  // the latter after the host's turn
    const int warm_end = max(length - p.hot, 0) / (8 * kTile);
    const int cold_end = max(length - p.hot - p.warm, 0) / (8 * kTile);
    const int num_cooling = max(0, min(cold_end, marks.y) - marks.x);
    count = num_cooling + max(0, warm_end - marks.y);
    tile = num_cooling > 0 ? marks.x : marks.y;
    goal = tile < cold_end ? Tier::kCold : Tier::kWarm;
  }
};

__device__ __forceinline__ unsigned long long max_of_warp(unsigned long long x) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) {
    const unsigned long long other = __shfl_xor_sync(kAllLanes, x, d);
    if (other > x) x = other;
  }
  return x;
}

__device__ __forceinline__ unsigned long long max_of_cta(unsigned long long x, Shared& shared) {
  x = max_of_warp(x);
  if (lane_id() == 0) shared.best[threadIdx.x >> 5] = x;
  __syncthreads();
  unsigned long long best = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x >> 5); ++warp) {
    if (shared.best[warp] > best) best = shared.best[warp];
  }
  __syncthreads();
  return best;
}

// Note a move for later; `list` is that of its block, 0 for a merge. The caller has seen that there is a block left.
__device__ __forceinline__ void note(const MigrateParams& p, int edit, int row, int tile, int list, int place) {
  const long long at = static_cast<long long>(list) * p.most_targets + place;
  p.edits[edit] = {row, tile, list | place << 2, p.targets[at]};
  p.journal[at] = {row, tile, p.taken[3] + edit, p.grants[row]};
}

// Choose what goes to a colder tier.
__device__ __forceinline__ void choose_demotions(const MigrateParams& p, Shared& shared) {
  int num_due = 0;
  for (int row = threadIdx.x; row < p.batch; row += blockDim.x) {
    num_due += Due(p, row, p.marks[row]).count;
  }
  if (num_due > 0) atomicAdd(&shared.num_due, num_due);
  __syncthreads();
  const int share = min(p.most, (shared.num_due + kSpread - 1) / kSpread);
  for (int i = 0; i < share; ++i) {
    unsigned long long mine = 0;  // age, then the first in the order of rows
    int my_row = 0;
    for (int row = threadIdx.x; row < p.batch; row += blockDim.x) {
      const int4 marks = p.marks[row];
      const Due due(p, row, marks);
      if (due.count == 0) continue;
      const unsigned age = length_of(p, row) - due.tile * 8 * kTile;
      const unsigned long long key = static_cast<unsigned long long>(age) << 32 | ~static_cast<unsigned>(marks.w);
      if (key > mine) {
        mine = key;
        my_row = row;
      }
    }
    const unsigned long long best = max_of_cta(mine, shared);
    if (best == 0) break;
    if (mine == best) {  // only one, since no two rows have the same order
      int4 marks = p.marks[my_row];
      const Due due(p, my_row, marks);
      const int list = static_cast<int>(due.goal);
      const int place = p.taken[list];
      if (place < p.held[list]) {
        note(p, shared.num_edits++, my_row, due.tile, list, place);
        p.taken[list] = place + 1;
        if (due.goal == Tier::kCold) marks.x = due.tile + 1;
        marks.y = max(marks.y, due.tile + 1);
      } else {
        marks.x = marks.y = kNever;
      }
      p.marks[my_row] = marks;
    }
    __syncthreads();
  }
}

// Whether a row will have a new token if there is room for it.
__device__ __forceinline__ bool goes_on(const MigrateParams& p, int row, int length) {
  return !p.finished[row] && length + p.most_new <= p.max_lens[row] &&
         p.num_new[row] + length - p.lengths[row] + p.most_new <= p.max_steps;
}

// Whether a row's last full tile has just become full, and several entries cover just that.
__device__ __forceinline__ bool may_merge(const MigrateParams& p, int row, int length) {
  if (length == 0 || length % (8 * kTile) != 0) return false;
  const int tile = length / (8 * kTile) - 1;
  const int num_entries = p.tails[row].y;
  if (!goes_on(p, row, length) || tile < p.marks[row].z || num_entries > p.width) return false;
  const int* const starts = p.block_starts + static_cast<long long>(row) * p.width;
  const int first = find_entry(starts, num_entries, tile * kTile);
  const int last = find_entry(starts, num_entries, tile * kTile + kTile - 1);
  if (first == last || starts[first] != tile * kTile) return false;
  const Entry entry{p.block_table[static_cast<long long>(row) * p.width + last]};
  return starts[last] + entry.num_granules() == (tile + 1) * kTile;
}

// Choose which tails are merged.
__device__ __forceinline__ void choose_merges(const MigrateParams& p, Shared& shared) {
  const int before = p.taken[0];
  const int first_edit = shared.num_edits;
  const int most = min(p.most, p.held[0] - before);
  int count = 0;
  for (int begin = 0; begin < p.batch; begin += blockDim.x) {
    const int row = begin + threadIdx.x;
    const int length = row < p.batch ? length_of(p, row) : 0;
    const bool is_one = row < p.batch && may_merge(p, row, length);
    const unsigned ones = __ballot_sync(kAllLanes, is_one);
    if (lane_id() == 0) shared.sums[threadIdx.x >> 5] = __popc(ones);
    __syncthreads();
    int place = count + __popc(ones & ((1u << lane_id()) - 1));
    for (int warp = 0; warp < static_cast<int>(blockDim.x >> 5); ++warp) {
      if (warp < static_cast<int>(threadIdx.x >> 5)) place += shared.sums[warp];
      count += shared.sums[warp];
    }
    if (is_one && place < most) note(p, first_edit + place, row, length / (8 * kTile) - 1, 0, before + place);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    count = max(0, min(count, most));
    p.taken[0] = before + count;
    shared.num_edits = first_edit + count;
  }
  __syncthreads();
}

// Let a warp move the entries of a row from `begin` on by `shift` places.
__device__ __forceinline__ void shift_entries(int* entries, int* starts, int begin, int end, int shift) {
  const int count = end - begin;
  for (int done = 0; done < count; done += 32) {
    const int i = shift < 0 ? begin + done + lane_id() : end - 1 - done - lane_id();
    const bool is_one = done + lane_id() < count;
    const int entry = is_one ? entries[i] : 0;
    const int start = is_one ? starts[i] : 0;
    __syncwarp();
    if (is_one) {
      entries[i + shift] = entry;
      starts[i + shift] = start;
    }
    __syncwarp();
  }
}

// Let the rows go of what no later query sees: entries before the window, and the first part of the one where it begins.
__device__ __forceinline__ void drop_past(const MigrateParams& p) {
  for (int begin = threadIdx.x - lane_id(); begin < p.batch; begin += blockDim.x) {
    const int row = begin + lane_id();
    int gone = 0;
    int count = 0;
    const int length = row < p.batch ? length_of(p, row) : 0;
    const int first = max(length - p.window + 1, 0) / kGranule;
    if (row < p.batch && goes_on(p, row, length) && p.tails[row].y <= p.width) {
      int* const entries = p.block_table + static_cast<long long>(row) * p.width;
      int* const starts = p.block_starts + static_cast<long long>(row) * p.width;
      int4 tail = p.tails[row];
      count = tail.y;
      while (gone < count && starts[gone] + Entry{entries[gone]}.num_granules() <= first) ++gone;
      if (gone < count && starts[gone] < first) {
        const Entry entry{entries[gone]};
        const int passed = first - starts[gone];
        entries[gone] = Entry::pack(entry.granule() + passed, entry.num_granules() - passed, entry.tier()).bits;
        starts[gone] = first;
        if (gone == count - 1) tail.z = 8 * first;
      }
      tail.y = count - gone;
      p.tails[row] = tail;
      p.gone[row] += gone;
    }
    for (unsigned left = __ballot_sync(kAllLanes, gone > 0); left != 0; left &= left - 1) {
      const int lane = 31 - __clz(left & -left);
      const int shift = __shfl_sync(kAllLanes, gone, lane);
      const int end = __shfl_sync(kAllLanes, count, lane);
      int* const entries = p.block_table + static_cast<long long>(begin + lane) * p.width;
      int* const starts = p.block_starts + static_cast<long long>(begin + lane) * p.width;
      shift_entries(entries, starts, shift, end, -shift);
      for (int e = end - shift + lane_id(); e < end; e += 32) entries[e] = starts[e] = kEmptyEntry;
      __syncwarp();
    }
  }
}

// Let a warp make a tile of a row one entry, that of a fresh block; entries that reach into it are cut. Lists what is to be
// copied.
__device__ __forceinline__ void put_block(const MigrateParams& p, const int4& edit, int* listed) {
  const int row = edit.x;
  const int list = edit.z & 3;
  const int begin = edit.y * kTile;
  const int end = begin + kTile;
  int* const entries = p.block_table + static_cast<long long>(row) * p.width;
  int* const starts = p.block_starts + static_cast<long long>(row) * p.width;
  int4 tail = p.tails[row];  // capacity, entries, first token of the last entry, its slot minus its number
  const int count = tail.y;
  const int first = find_entry(starts, min(count, p.width), begin);
  const int last = find_entry(starts, min(count, p.width), end - 1);
  const Entry before{entries[first]};
  const Entry after{entries[last]};
  const int left = begin - starts[first];
  const int right = starts[last] + after.num_granules() - end;
  const int more = first - last + (left > 0) + (right > 0);
  int source = -1;
  if (lane_id() < kTile) {
    const int e = find_entry(starts, min(count, p.width), begin + lane_id());
    source = Entry{entries[e]}.granule() + begin + lane_id() - starts[e];
  }
  const bool fits = count + more <= p.width;
  if (lane_id() < kTile) {
    listed[lane_id()] = fits ? source : -1;
    listed[kTile + lane_id()] = fits ? edit.w + lane_id() : -1;
  }
  __syncwarp();
  if (!fits) {
    if (lane_id() == 0) {
      p.journal[static_cast<long long>(list) * p.most_targets + (edit.z >> 2)].x = -1;
      p.marks[row].x = p.marks[row].y = kNever;
    }
    __syncwarp();
    return;
  }
  if (more != 0) shift_entries(entries, starts, last + 1, count, more);
  if (more < 0 && lane_id() < -more) entries[count + more + lane_id()] = starts[count + more + lane_id()] = kEmptyEntry;
  __syncwarp();
  if (lane_id() == 0) {
    int e = first;
    if (left > 0) entries[e++] = Entry::pack(before.granule(), left, before.tier()).bits;
    entries[e] = Entry::pack(edit.w, kTile, static_cast<Tier>(list)).bits;
    starts[e] = begin;
    if (right > 0) {
      entries[e + 1] = Entry::pack(after.granule() + after.num_granules() - right, right, after.tier()).bits;
      starts[e + 1] = end;
    }
    tail.y = count + more;
    if (last == count - 1) {  // no entry reaches beyond a tile that is merged, and after others there are hot tokens
      tail.z = 8 * begin;
      tail.w = 8 * (edit.w - begin);
    }
    p.tails[row] = tail;
  }
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__(1024) kvt_migrate(const __grid_constant__ MigrateParams p) {
  __shared__ Shared shared;
  ptx::wait_for_dependencies();
  if (threadIdx.x == 0) shared.num_edits = shared.num_due = 0;
  __syncthreads();
  if (p.window > 0) drop_past(p);
  __syncthreads();
  if (p.demotes) choose_demotions(p, shared);
  __syncthreads();
  const int num_demotions = shared.num_edits;
  if (p.is_merged) choose_merges(p, shared);
  __syncthreads();
  const int num_edits = shared.num_edits;
  const int warp = threadIdx.x >> 5;
  for (int i = 0; i < num_edits; ++i) {
    const int4 edit = p.edits[i];
    if (edit.x % static_cast<int>(blockDim.x >> 5) != warp) continue;  // those of a row one after the other
    put_block(p, edit, i < num_demotions ? p.demotions + 16ll * i : p.merges + 16ll * (i - num_demotions));
  }
  if (threadIdx.x == 0) {
    p.num_moves[0] = num_demotions;
    p.num_moves[1] = num_edits - num_demotions;
    p.taken[3] += num_edits;
  }
}

}  // namespace kvt
