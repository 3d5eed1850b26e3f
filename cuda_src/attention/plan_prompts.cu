// Plan prompts: cut a batch into items of work for the prompt or the prefill kernel, once a step, on the device, for all layers.
//
//   seq_lens     [batch] int32;   cu_seqlens_q  [batch + 1] int32 or null = one query each
//   units        sequences besides the rows, or null; see shared.cu, also for `begins` and `places`
//   items        [max_items][8] int32, the words of Item but the last
//   num_items    int32
//
// An item is 128 query rows of a sequence (for each kv head) and the tiles of keys that they see. The longest come first,
// so that a CTA that takes its last item late gets a short one. If items are uneven, those longer than 1.25 of a CTA's
// share of tiles are cut into equal parts. If they are even, only as many are cut as would form an incomplete last wave.
//
// Rows with up to most_decoded queries may be the decode kernel's: with by_row each of them is, otherwise all rows are, if
// no row has more.
//
// Launch:   one CTA of 1024; dynamic shared memory 4 * batch, with units 8 * batch. Any architecture.
//           Macros: KVT_KEYS, of a tile.
#include <kvt/attention/prompt/item.cuh>
#include <kvt/base/cta.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kPlanThreads = 1024;
constexpr int kBins = 1024;        // items whose numbers of tiles share a bin are in no order
constexpr int kMinPart = 4;        // tiles
constexpr int kMostLateItems = 4;  // that the last wave may become once it is cut, for each CTA

struct PlanPromptsParams {
  const int* seq_lens;
  const int* cu_seqlens_q;
  const int* units;  // [*num_units][4], or null
  const int* num_units;
  const int* begins;  // [batch] blocks of each row that are in units
  const int* places;  // [num_tokens] where each query is in q; null: in its place
  int* items;
  int* num_items;
  long long ids_row;  // of the table, from row to row, where there are units
  int block_size;
  int half_sizes[5];     // see Halves
  int first_row, batch;  // the rows to plan
  int num_kv_heads;
  int left, right;
  int num_ctas;      // of the prompt kernel, at once
  int most_decoded;  // queries; without units only. 0: no row is the decode kernel's
  int by_row;        // 1: rows with no more than that are the decode kernel's; 0: the whole batch is one kernel's
  int max_parts;     // most parts of 128 query rows; at 1 a row's bits do not depend on its batch
};

// Units, if there are any, then rows, or what units leave of them.
struct Batch {
  const PlanPromptsParams& p;
  Halves halves;
  int num_units;
  int size;

  __device__ __forceinline__ explicit Batch(const PlanPromptsParams& p)
      : p(p), halves(p.half_sizes), num_units(p.units == nullptr ? 0 : *p.num_units), size(num_units + p.batch) {}

  __device__ __forceinline__ int row_of(int b) const { return p.first_row + b - num_units; }
  __device__ __forceinline__ int first_of_row(int row) const {
    return p.cu_seqlens_q == nullptr ? row : p.cu_seqlens_q[row];
  }
  __device__ __forceinline__ int first_query(int b) const {
    if (b < num_units) return p.units[4 * b];
    const int query = first_of_row(row_of(b));
    return p.places == nullptr ? query : p.places[query];
  }
  __device__ __forceinline__ int num_queries(int b) const {
    if (b < num_units) return p.units[4 * b + 1];
    return first_of_row(row_of(b) + 1) - first_of_row(row_of(b));
  }
  __device__ __forceinline__ int length(int b) const {
    if (b < num_units) return p.units[4 * b + 2];
    const int length = p.seq_lens[row_of(b)];
    return p.units == nullptr ? length : length - p.begins[row_of(b)] * p.block_size;
  }
  // Item::sequence: the row of the table; with units, the place of the first block in the table, because a unit or a
  // rest begins anywhere in a row.
  __device__ __forceinline__ int table_row(int b) const {
    if (b < num_units) return p.units[4 * b + 3];
    const int row = row_of(b);
    return p.units == nullptr ? row : static_cast<int>(row * p.ids_row + p.begins[row]);
  }
  __device__ __forceinline__ int num_blocks(int queries) const {
    return p.by_row && queries <= p.most_decoded ? 0 : (halves.count(queries) + 1) / 2;
  }
};

// Up to 128 query rows of a sequence, and the tiles of keys that they see.
struct Block {
  int sequence, first_half, queries, length, first_tile, num_tiles;
};

// A block by its number; `ends` has, for each sequence, how many blocks there are up to its last one.
__device__ __forceinline__ Block block_at(const Batch& batch, const int* ends, int index) {
  int low = 0;
  int high = batch.size - 1;
  while (low < high) {  // the first sequence that ends above it
    const int middle = (low + high) >> 1;
    if (ends[middle] > index) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  Block block;
  block.sequence = low;
  block.first_half = (index - (low > 0 ? ends[low - 1] : 0)) * 2;
  block.queries = batch.num_queries(low);
  block.length = batch.length(low);
  const KeyRange keys = keys_of_item(
      batch.halves, batch.p.left, low < batch.num_units ? -1 : batch.p.right, block.length, block.queries,
      block.first_half);
  block.first_tile = keys.begin / KVT_KEYS;
  // one that sees nothing has a tile nevertheless, and writes zeros
  const int end = max(block.first_tile + 1, (keys.end + KVT_KEYS - 1) / KVT_KEYS);
  block.num_tiles = end - block.first_tile;
  return block;
}

// Into how many parts blocks are cut.
struct Cuts {
  int longest;  // tiles of a block
  int share;    // tiles of a CTA
  int max_parts;
  // Where all blocks are about as long, CTAs take them in waves: those of the last, which does not fill the GPU, are cut.
  bool are_even;
  int late_blocks, late_parts;

  __device__ __forceinline__ int parts_of(int index, int num_tiles) const {
    if (are_even) return index >= late_blocks ? 1 : max(1, min(late_parts, num_tiles / kMinPart));
    return 4 * num_tiles <= 5 * share ? 1 : min(max_parts, (2 * num_tiles + share) / (2 * share));
  }
  // The bin of a part; the longest have the first bins.
  __device__ __forceinline__ int bin_of(int num_tiles) const {
    return static_cast<int>(static_cast<long long>(longest - num_tiles) * (kBins - 1) / longest);
  }
};

// The number of parts that ends a last wave of so many blocks first. By a warp.
__device__ __forceinline__ int parts_of_last_wave(const PlanPromptsParams& p, int blocks, int longest) {
  unsigned best = 0xFFFFFFFFu;  // cost in eighths of a tile, then parts
  for (int parts = lane_id() + 1; parts <= p.max_parts; parts += 32) {
    const int items = blocks * p.num_kv_heads * parts;
    const int of_part = (longest + parts - 1) / parts;
    if (parts > 1 && (of_part < kMinPart || items > kMostLateItems * p.num_ctas)) break;
    const int waves = (items + p.num_ctas - 1) / p.num_ctas;
    const int merging = parts == 1 ? 0 : 16 + parts;
    best = min(best, static_cast<unsigned>(8 * waves * of_part + merging) << 8 | parts);
  }
  return __reduce_min_sync(kAllLanes, best) & 0xFF;
}

// Write the items of a block: its parts, from place `at` on, of which the partial results begin at `slot`.
__device__ __forceinline__ void write_items(const Batch& batch, const Block& block, int parts, int at, int slot) {
  for (int part = 0; part < parts; ++part) {
    const int begin = block.first_tile + static_cast<int>(static_cast<long long>(block.num_tiles) * part / parts);
    const int end = block.first_tile + static_cast<int>(static_cast<long long>(block.num_tiles) * (part + 1) / parts);
    int4* const to = reinterpret_cast<int4*>(batch.p.items) + 2 * (at + part);
    to[0] = {batch.first_query(block.sequence), block.queries, block.first_half, batch.table_row(block.sequence)};
    to[1] = {block.length, begin | end << 16, part | parts << 16, slot};
  }
}

// How all blocks are cut; `block_of` returns one by its number.
template <typename BlockOf>
__device__ __forceinline__ Cuts cuts_of(const PlanPromptsParams& p, int num_blocks, const BlockOf& block_of) {
  __shared__ unsigned long long sum_of_tiles;
  __shared__ int longest_block, late_blocks, late_parts;
  if (threadIdx.x == 0) {
    sum_of_tiles = 0;
    longest_block = 1;
    late_blocks = late_parts = 0;
  }
  __syncthreads();
  int tiles = 0;
  int longest = 0;
  for (int i = threadIdx.x; i < num_blocks; i += kPlanThreads) {
    const int of_block = block_of(i).num_tiles;
    tiles += of_block;
    longest = max(longest, of_block);
  }
  tiles = __reduce_add_sync(kAllLanes, tiles);
  longest = __reduce_max_sync(kAllLanes, longest);
  if (lane_id() == 0 && tiles > 0) {
    atomicAdd(&sum_of_tiles, static_cast<unsigned long long>(tiles));
    atomicMax(&longest_block, longest);
  }
  __syncthreads();
  const long long total = static_cast<long long>(sum_of_tiles) * p.num_kv_heads;
  Cuts cuts;
  cuts.longest = longest_block;
  cuts.max_parts = p.max_parts;
  cuts.share = max(kMinPart, static_cast<int>((total + p.num_ctas - 1) / p.num_ctas));
  cuts.are_even = 4LL * cuts.longest * num_blocks <= 5LL * static_cast<long long>(sum_of_tiles);
  if (cuts.are_even && threadIdx.x < 32) {
    const int in_last = num_blocks * p.num_kv_heads % p.num_ctas;
    const int blocks = (in_last + p.num_kv_heads - 1) / p.num_kv_heads;
    const int parts = parts_of_last_wave(p, blocks, cuts.longest);
    if (lane_id() == 0) {
      late_blocks = blocks;
      late_parts = parts;
    }
  }
  __syncthreads();
  cuts.late_blocks = late_blocks;
  cuts.late_parts = late_parts;
  return cuts;
}

extern "C" __global__ void __launch_bounds__(kPlanThreads)
    kvt_plan_prompts(const __grid_constant__ PlanPromptsParams p) {
  extern __shared__ int ends[];  // of each sequence: blocks of query rows up to its last one
  __shared__ int bins[kBins];
  __shared__ int warp_sums[32];
  __shared__ int used_slots;
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const Batch batch(p);
  if (threadIdx.x == 0) used_slots = 0;
  for (int i = threadIdx.x; i < kBins; i += kPlanThreads) bins[i] = 0;
  const int each = (batch.size + kPlanThreads - 1) / kPlanThreads;
  const int first = min(batch.size, static_cast<int>(threadIdx.x) * each);
  const int last = min(batch.size, first + each);
  int sum = 0;
  bool is_prompt = false;
  for (int b = first; b < last; ++b) {
    const int queries = batch.num_queries(b);
    is_prompt = is_prompt || queries > p.most_decoded;
    sum += batch.num_blocks(queries);
    ends[b] = sum;
  }
  if (!__syncthreads_or(is_prompt)) {
    if (threadIdx.x == 0) *p.num_items = 0;
    return;
  }
  int num_blocks;
  const int before = sum_before(sum, warp_sums, num_blocks);
  for (int b = first; b < last; ++b) ends[b] += before;
  __syncthreads();
  // each thread's first block is looked up once
  const Block own = block_at(batch, ends, min(static_cast<int>(threadIdx.x), num_blocks - 1));
  const auto block_of = [&](int index) { return index < kPlanThreads ? own : block_at(batch, ends, index); };
  const Cuts cuts = cuts_of(p, num_blocks, block_of);
  for (int i = threadIdx.x; i < num_blocks; i += kPlanThreads) {
    const Block block = block_of(i);
    const int parts = cuts.parts_of(i, block.num_tiles);
    atomicAdd(&bins[cuts.bin_of(block.num_tiles / parts)], parts);
  }
  __syncthreads();
  const int in_bin = bins[threadIdx.x];
  int num_items;
  const int before_bin = sum_before(in_bin, warp_sums, num_items);
  bins[threadIdx.x] = before_bin;
  if (threadIdx.x == 0) *p.num_items = num_items;
  __syncthreads();
  for (int i = threadIdx.x; i < num_blocks; i += kPlanThreads) {
    const Block block = block_of(i);
    const int parts = cuts.parts_of(i, block.num_tiles);
    const int slot = parts > 1 ? atomicAdd(&used_slots, parts) : 0;
    const int at = atomicAdd(&bins[cuts.bin_of(block.num_tiles / parts)], parts);
    write_items(batch, block, parts, at, slot);
  }
}

}  // namespace kvt
