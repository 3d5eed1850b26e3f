// Reorder: let rows of a step of the device go on from what other rows hold, as beam search does.
//
// Rows are in families of KVT_BEAMS, the beams of one search, which began the host's turn with equally many tokens. What a
// row held then in full granules is of fixed entries, which others may hold, too: it is taken over by copying the entries of
// the row's ancestor. What was added since is in granules of the row's own: it is taken over by copying keys and values. So
// no reference count changes, and nothing has to be freed, until the host's next turn, which finds in `ancestors` whose
// granules each row has.
//
// A row whose parent is in another family, or has another length, or more entries than there is room for, is finished.
//
// Launch:   kvt_reorder one CTA of a multiple of 32 threads; kvt_reorder_copy grid (CTAs of one array, num_arrays), CTA 256,
//           16 bytes per thread and row. Any architecture. Macros: KVT_BEAMS, up to 16.
#include <kvt/entry.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kMaxGroups = 4;  // of layers
constexpr int kBeams = KVT_BEAMS;

// Packed by kvtoolkit/cuda/reorder.py, field by field in this order.
struct ReorderParams {
  int* parents;             // [batch] rows; afterwards each is its own
  int* ancestors;           // [batch] the row whose granules of the host's turn each row has
  int* sources;             // [batch] receives the row whose keys and values are to be copied, or -1
  int* scratch;             // [batch]
  unsigned char* finished;  // [batch]
  const int* max_lens;      // [batch] below the length: the host's turn is over
  const int* lengths;       // [batch] tokens
  const int* num_new;       // [batch] of them since the host's turn
  long long* history;       // [max_steps, batch]
  // of each group of layers
  int* block_table[kMaxGroups];        // [batch, width]
  int* block_starts[kMaxGroups];       // [batch, width]
  int4* tails[kMaxGroups];             // [batch] as in grow.cu
  const int* first_table[kMaxGroups];  // the same as they were at the host's turn
  const int* first_starts[kMaxGroups];
  const int4* first_tails[kMaxGroups];
  int* own[kMaxGroups];  // [batch, most_own] receives the granules of each row from the host's turn on
  int width[kMaxGroups];
  int batch, num_groups, most_own, max_steps;
};

// The first granule that a row did not share at the host's turn.
__device__ __forceinline__ int first_own(const int* lengths, const int* num_new, int row) {
  return (lengths[row] - num_new[row]) / kGranule;
}

// How many entries hold the first granules of a row at the host's turn.
__device__ __forceinline__ int num_before(const ReorderParams& p, int group, int row, int granules) {
  const int* const starts = p.first_starts[group] + static_cast<long long>(row) * p.width[group];
  return granules == 0 ? 0 : find_entry(starts, min(p.first_tails[group][row].y, p.width[group]), granules - 1) + 1;
}

__device__ __forceinline__ bool can_take(const ReorderParams& p, int row, int parent) {
  const bool is_row = parent >= 0 && parent < p.batch && parent / kBeams == row / kBeams;
  if (!is_row || p.lengths[parent] != p.lengths[row] || p.lengths[row] > p.max_lens[row]) return false;
  const int own = first_own(p.lengths, p.num_new, row);
  for (int group = 0; group < p.num_groups; ++group) {
    const int4 tail = p.tails[group][row];
    if (tail.y > p.width[group] || p.first_tails[group][p.ancestors[parent]].y > p.width[group]) return false;
    const int* const starts = p.block_starts[group] + static_cast<long long>(row) * p.width[group];
    const int num_own = tail.x > own ? tail.y - find_entry(starts, tail.y, own) : 0;
    if (num_before(p, group, p.ancestors[parent], own) + num_own > p.width[group]) return false;
  }
  return true;
}

// Let a warp put the granules of an ancestor in front of a row's own ones.
__device__ __forceinline__ void rebuild(const ReorderParams& p, int group, int row, int own, int num_own) {
  const int width = p.width[group];
  const int lane = threadIdx.x & 31;
  const int ancestor = p.ancestors[row];
  const int* const first_table = p.first_table[group] + static_cast<long long>(ancestor) * width;
  const int* const first_starts = p.first_starts[group] + static_cast<long long>(ancestor) * width;
  int* const entries = p.block_table[group] + static_cast<long long>(row) * width;
  int* const starts = p.block_starts[group] + static_cast<long long>(row) * width;
  const int* const granules = p.own[group] + static_cast<long long>(row) * p.most_own;
  const int before = num_before(p, group, ancestor, own);
  for (int e = lane; e < before; e += 32) {
    const Entry entry{first_table[e]};
    entries[e] = Entry::pack(entry.granule(), min(entry.num_granules(), own - first_starts[e]), entry.tier()).bits;
    starts[e] = first_starts[e];
  }
  __syncwarp();
  if (lane == 0) {
    int4 tail = p.tails[group][row];
    int count = before;
    int first = 0;
    int length = 0;
    for (int i = 0; i < num_own; ++i) {
      const int granule = granules[i];
      if (length > 0 && granule == first + length && granule >> 3 == first >> 3) {
        ++length;
      } else {
        first = granule;
        length = 1;
        starts[count++] = own + i;
      }
      entries[count - 1] = Entry::pack(first, length, Tier::kHot).bits;
    }
    for (int e = count; e < tail.y; ++e) entries[e] = starts[e] = kEmptyEntry;
    tail.y = count;
    if (count > 0) {
      tail.z = 8 * starts[count - 1];
      tail.w = 8 * (Entry{entries[count - 1]}.granule() - starts[count - 1]);
    }
    p.tails[group][row] = tail;
  }
}

extern "C" __global__ void __launch_bounds__(1024) kvt_reorder(const __grid_constant__ ReorderParams p) {
  __shared__ int most_new;
  ptx::wait_for_dependencies();
  if (threadIdx.x == 0) most_new = -1;
  __syncthreads();
  for (int row = threadIdx.x; row < p.batch; row += blockDim.x) {
    const int parent = p.parents[row];
    const bool is_good = parent == row || can_take(p, row, parent);
    if (!is_good) p.finished[row] = 1;
    p.sources[row] = is_good && parent != row ? parent : -1;
    p.scratch[row] = p.ancestors[is_good ? parent : row];
    if (p.sources[row] >= 0) atomicMax(&most_new, p.num_new[row]);
  }
  __syncthreads();
  for (int row = threadIdx.x; row < p.batch; row += blockDim.x) {
    p.ancestors[row] = p.scratch[row];
    p.parents[row] = row;
  }
  if (most_new < 0) return;  // no row goes on from another one
  for (int i = threadIdx.x; i < most_new * (p.batch / kBeams); i += blockDim.x) {
    const int row = i % (p.batch / kBeams) * kBeams;
    long long* const tokens = p.history + static_cast<long long>(i / (p.batch / kBeams)) * p.batch;
    long long read[kBeams];
#pragma unroll
    for (int k = 0; k < kBeams; ++k) read[k] = p.sources[row + k] >= 0 ? tokens[p.sources[row + k]] : tokens[row + k];
#pragma unroll
    for (int k = 0; k < kBeams; ++k) tokens[row + k] = read[k];
  }
  __syncthreads();
  for (int row = threadIdx.x >> 5; row < p.batch; row += blockDim.x >> 5) {
    bool is_part = false;  // whether keys and values of the family are copied
    for (int k = 0; k < kBeams; ++k) is_part = is_part || p.sources[row / kBeams * kBeams + k] >= 0;
    if (!is_part) continue;
    const int own = first_own(p.lengths, p.num_new, row);
    for (int group = 0; group < p.num_groups; ++group) {
      const int4 tail = p.tails[group][row];
      const int num_own = min(max(tail.x - own, 0), p.most_own);
      const int num_entries = min(tail.y, p.width[group]);
      const int* const entries = p.block_table[group] + static_cast<long long>(row) * p.width[group];
      const int* const starts = p.block_starts[group] + static_cast<long long>(row) * p.width[group];
      for (int i = threadIdx.x & 31; i < num_own; i += 32) {
        const int e = find_entry(starts, num_entries, own + i);
        const Entry entry{entries[e]};
        p.own[group][static_cast<long long>(row) * p.most_own + i] = entry.granule() + own + i - starts[e];
      }
      __syncwarp();
      if (p.sources[row] >= 0) rebuild(p, group, row, own, num_own);
      __syncwarp();
    }
  }
}

struct ReorderCopyParams {
  char* arena;
  long long array_stride, granule_stride;  // bytes
  const int* sources;
  const int* own;
  const int* lengths;
  const int* num_new;
  int granule_vectors;  // of 16 bytes
  int batch, most_own;
};

extern "C" __global__ void __launch_bounds__(256) kvt_reorder_copy(const __grid_constant__ ReorderCopyParams p) {
  ptx::wait_for_dependencies();
  char* const array = p.arena + blockIdx.y * p.array_stride;
  const int total = p.batch / kBeams * p.most_own * p.granule_vectors;
  for (int i = blockIdx.x * 256 + threadIdx.x; i < total; i += gridDim.x * 256) {
    const int vector = i % p.granule_vectors;
    const int place = i / p.granule_vectors % p.most_own;
    const int row = i / p.granule_vectors / p.most_own * kBeams;
    const auto at = [&](int of) {
      const long long granule = p.own[static_cast<long long>(of) * p.most_own + place];
      return reinterpret_cast<uint4*>(array + granule * p.granule_stride + vector * 16ll);
    };
    uint4 read[kBeams];
    bool is_one[kBeams];
#pragma unroll
    for (int k = 0; k < kBeams; ++k) {
      const int source = p.sources[row + k];
      const int own = source >= 0 ? first_own(p.lengths, p.num_new, row + k) : 0;
      is_one[k] = source >= 0 && (own + place) * kGranule < p.lengths[row + k];
      if (is_one[k]) read[k] = *at(source);
    }
#pragma unroll
    for (int k = 0; k < kBeams; ++k) {
      if (is_one[k]) *at(row + k) = read[k];
    }
  }
}

}  // namespace kvt
