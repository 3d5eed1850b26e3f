// Shared reads: find the blocks that rows of a batch have in common at their beginning, once a step, on the device.
//
// Rows with a common beginning are side by side in `order`. Blocks that several have are a *unit*: a sequence of its own
// whose queries are those of all its rows. Units form a tree, since longer beginnings contain shorter ones. What units
// leave of a row is its *rest*. The prompt kernel attends to units and rests at once, and merge_shared.cu merges what it
// finds.
//
//   kvt_find_shared   how many blocks each row has in common with the one before it; compared one by one
//   kvt_plan_shared   the units that pay, and where each row's rest begins
//   kvt_gather        the queries in this order, where it is another than that of the rows
//
// Rows with more than kMostQueries queries, and padding rows, share nothing.
//
// Source:   Ye et al. 2024 (cascade inference), Pan et al. 2025 (PAT, arXiv:2511.22333), on trees of prefixes.
#include <kvt/attention/prompt/item.cuh>
#include <kvt/base/cta.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kMostQueries = 8;
constexpr int kMostRows = 1024;
constexpr int kMostLevels = 3;

// The rows of a batch, as all kernels here see them. Absent arrays are null.
struct SharedRows {
  const int* seq_lens;
  const int* cu_seqlens_q;  // null: one query each
  const int* order;         // null: that of the rows

  __device__ __forceinline__ int row(int position) const { return order == nullptr ? position : order[position]; }
  __device__ __forceinline__ int first_query(int row) const {
    return cu_seqlens_q == nullptr ? row : cu_seqlens_q[row];
  }
  __device__ __forceinline__ int num_queries(int row) const {
    return cu_seqlens_q == nullptr ? 1 : cu_seqlens_q[row + 1] - cu_seqlens_q[row];
  }
  // Whole blocks before the row's queries: those that all of them see.
  __device__ __forceinline__ int blocks_before_queries(int row, int block_size) const {
    const int queries = num_queries(row);
    return queries < 1 || queries > kMostQueries ? 0 : max(0, seq_lens[row] - queries) / block_size;
  }
};

struct FindSharedParams {
  const int* seq_lens;
  const int* cu_seqlens_q;
  const int* order;
  const int* ids;  // [batch, ids_row]
  int* common;     // [batch]
  long long ids_row;
  int block_size;
  int multiple;  // of blocks, that rows may have in common: where there are tiers, the granules of a tile; else 1
};

// Launch: grid = batch, CTA 128.
extern "C" __global__ void __launch_bounds__(128) kvt_find_shared(const __grid_constant__ FindSharedParams p) {
  constexpr int kEach = 8;
  __shared__ int first_other;
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const SharedRows rows{p.seq_lens, p.cu_seqlens_q, p.order};
  const int position = blockIdx.x;
  if (position == 0) {
    if (threadIdx.x == 0) p.common[0] = 0;
    return;
  }
  const int row = rows.row(position);
  const int before = rows.row(position - 1);
  const int most = min(rows.blocks_before_queries(row, p.block_size), rows.blocks_before_queries(before, p.block_size));
  if (threadIdx.x == 0) first_other = most;
  __syncthreads();
  const int* const one = p.ids + row * p.ids_row;
  const int* const other = p.ids + before * p.ids_row;
  for (int begin = 0; begin < most; begin += 128 * kEach) {
    int differs = most;
#pragma unroll
    for (int i = kEach - 1; i >= 0; --i) {
      const int at = begin + i * 128 + threadIdx.x;
      if (at < most && one[at] != other[at]) differs = at;
    }
    if (differs < most) atomicMin(&first_other, differs);
    if (__syncthreads_or(differs < most)) break;
  }
  if (threadIdx.x == 0) p.common[position] = first_other - first_other % p.multiple;
}

struct PlanSharedParams {
  const int* seq_lens;
  const int* cu_seqlens_q;
  const int* order;
  const int* common;  // [batch]
  int* begins;        // [batch] blocks that a row's units have
  int* token_levels;  // [num_tokens] units of a query's row; -1 for a padding row
  int* places;        // [num_tokens] where each query is in `order`
  int* units;         // [batch][4]: first query and level, queries, tokens, place of the first block in `ids`
  int* num_units;
  long long ids_row;
  int batch, num_tokens, block_size;
  int least_tokens;  // of a unit
  int least_saved;   // tokens of a unit times rows but one
};

// The last row whose queries begin at `token` or before it.
__device__ __forceinline__ int row_of_token(const PlanSharedParams& p, int token) {
  if (p.cu_seqlens_q == nullptr) return token;
  int low = 0;
  int high = p.batch - 1;
  while (low < high) {
    const int middle = (low + high + 1) >> 1;
    if (p.cu_seqlens_q[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// For each query, how many units its row has, and where it is in the order; both are given by row.
__device__ __forceinline__ void place_queries(
    const PlanSharedParams& p, const SharedRows& rows, const int* levels, const int* places) {
  const int used = p.cu_seqlens_q == nullptr ? p.num_tokens : p.cu_seqlens_q[p.batch];
  for (int token = threadIdx.x; token < p.num_tokens; token += kMostRows) {
    const bool is_query = token < used;  // others are of no row
    const int row = is_query ? row_of_token(p, token) : 0;
    p.token_levels[token] = is_query ? levels[row] : -1;
    if (p.order != nullptr) p.places[token] = is_query ? places[row] + token - rows.first_query(row) : token;
  }
}

// Launch: one CTA of 1024; batch at most 1024.
extern "C" __global__ void __launch_bounds__(kMostRows) kvt_plan_shared(const __grid_constant__ PlanSharedParams p) {
  // Boundary i, between positions i - 1 and i, has as many blocks as both have in common. A node of the tree is a maximal
  // run of positions that have that many in common; its name is its first such boundary.
  __shared__ int common[kMostRows + 1];
  __shared__ int node_of[kMostRows + 1];
  // of the nodes that are kept, from the root to this one; -1: not known yet
  __shared__ int kept_blocks[kMostRows + 1];
  __shared__ int kept_levels[kMostRows + 1];
  __shared__ int first_place[kMostRows + 1];
  __shared__ int begins[kMostRows], levels[kMostRows], places[kMostRows];  // by row
  __shared__ int warp_sums[32];
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const SharedRows rows{p.seq_lens, p.cu_seqlens_q, p.order};
  const int at = threadIdx.x;
  const bool exists = at < p.batch;
  const int row = exists ? rows.row(at) : 0;
  const int queries = exists ? rows.num_queries(row) : 0;
  common[at] = exists ? p.common[at] : 0;
  kept_blocks[at] = -1;
  if (at == 0) common[kMostRows] = 0;
  // where the queries of each position begin in the order
  int total;
  first_place[at] = sum_before(queries, warp_sums, total);
  if (at == 0) first_place[kMostRows] = total;

  // the node's rows are the positions in [begin, end)
  const int own = common[at];
  int begin = at, end = at, node = at;
  if (own > 0) {
    begin = at - 1;
    while (common[begin] >= own) {
      if (common[begin] == own) node = begin;
      --begin;
    }
    end = at + 1;
    while (common[end] >= own) ++end;
  }
  node_of[at] = node;
  __syncthreads();
  const bool is_node = own > 0 && node == at;
  const int above = is_node ? (common[begin] >= common[end] ? begin : end) : 0;
  const bool has_parent = is_node && common[above] > 0;
  const int parent = has_parent ? node_of[above] : 0;
  bool is_open = is_node;
  bool is_kept = false;
  int first_block = 0;
  int level = 0;
  while (true) {  // from the root on: a node is judged by what the ones above it leave
    const bool is_known = is_open && (!has_parent || kept_blocks[parent] >= 0);
    if (is_known && has_parent) {
      first_block = kept_blocks[parent];
      level = kept_levels[parent];
    }
    __syncthreads();
    if (is_known) {
      const int tokens = (own - first_block) * p.block_size;
      const long long saved = static_cast<long long>(end - begin - 1) * tokens;
      is_kept = level < kMostLevels && tokens >= p.least_tokens && saved >= p.least_saved;
      kept_blocks[at] = is_kept ? own : first_block;
      kept_levels[at] = is_kept ? level + 1 : level;
      is_open = false;
    }
    if (!__syncthreads_or(is_open)) break;
  }
  // in the order of their names: the prompt kernel's plan cuts the first units, and where it cuts changes last bits
  const int number = sum_before(is_kept, warp_sums, total);
  if (at == 0) *p.num_units = total;
  if (is_kept) {
    int* const unit = p.units + 4 * number;
    unit[0] = first_place[begin] | (level + 1) << kLevelShift;
    unit[1] = first_place[end] - first_place[begin];
    unit[2] = (own - first_block) * p.block_size;
    unit[3] = static_cast<int>(rows.row(begin) * p.ids_row + first_block);
  }
  if (exists) {
    const int next = at + 1 < kMostRows ? common[at + 1] : 0;
    const int deepest = max(own, next);
    const int of_row = deepest == 0 ? 0 : node_of[own >= next ? at : at + 1];
    begins[row] = deepest == 0 ? 0 : kept_blocks[of_row];
    levels[row] = p.seq_lens[row] == 0 ? -1 : deepest == 0 ? 0 : kept_levels[of_row];
    p.begins[row] = begins[row];
    places[row] = first_place[at];
  }
  __syncthreads();
  place_queries(p, rows, levels, places);
}

struct GatherParams {
  const unsigned short* q;  // [num_tokens, num_q_heads, head_dim], by strides
  unsigned short* to;       // contiguous
  const int* places;
  long long q_token, q_head;
  int num_q_heads, head_dim;
};

// Launch: grid = num_tokens, CTA 256; 16 bytes a thread.
extern "C" __global__ void __launch_bounds__(256) kvt_gather(const __grid_constant__ GatherParams p) {
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const int token = blockIdx.x;
  const int vectors = p.head_dim / 8;
  const long long place = static_cast<long long>(p.places[token]) * p.num_q_heads * p.head_dim;
  for (int i = threadIdx.x; i < p.num_q_heads * vectors; i += 256) {
    const int head = i / vectors;
    const int dim = (i - head * vectors) * 8;
    const auto from = reinterpret_cast<const uint4*>(p.q + token * p.q_token + head * p.q_head + dim);
    *reinterpret_cast<uint4*>(p.to + place + head * p.head_dim + dim) = *from;
  }
}

}  // namespace kvt
