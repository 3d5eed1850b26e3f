// The warps of the prompt kernel that load: keys, values, queries and items of work.
#pragma once

#include <kvt/attention/prompt/shape.cuh>
#include <kvt/base/warp.cuh>
#include <kvt/ptx/policy.cuh>
#include <kvt/ptx/tensor_copy.cuh>

namespace kvt {

// Where granule `index` of a sequence is, in two parts: the look-up takes long, and nothing waits for it until it is used.
struct Lookup {
  int block;
  int in_block;  // granule within the block; -1: past the end of the sequence

  __device__ __forceinline__ Lookup(const PromptParams& p, const Item& item, int index) : block(0), in_block(-1) {
    if (index * 8 < item.seq_len) {
      const int in_row = p.block_shift >= 0 ? index >> p.block_shift : index / p.granules_per_block;
      block = __ldg(p.block_table + item.sequence * p.table_row + in_row);
      in_block = index - in_row * p.granules_per_block;
    }
  }

  // Block and granule as one number. Past the end of the sequence it names a block outside of the map, which tensor
  // copies fill with zeros.
  __device__ __forceinline__ int coordinates(const PromptParams& p) const {
    return in_block < 0 ? p.num_map_blocks << p.coordinate_shift : block * p.block_pitch + in_block;
  }
};

// Every second piece of a tile, from `half` on; `coordinates` are those of the lane's piece. What is in this loop is what
// loading costs: a piece comes as fast as its copy is issued.
template <bool kHasSlots>
__device__ __forceinline__ void copy_pieces(
    const PromptParams& p, const ptx::TensorMap& map, unsigned to, unsigned barrier, int kv_head, int coordinates,
    int half, bool is_elected, unsigned long long policy) {
  const int own_block = kHasSlots ? coordinates >> p.coordinate_shift : coordinates;
  const int own_slot = kHasSlots ? (coordinates - (own_block << p.coordinate_shift)) * 8 : 0;
#pragma unroll 1
  for (int piece = half; piece < kPieces; piece += 2) {
    const int block = __shfl_sync(kAllLanes, own_block, piece);
    const int slot = kHasSlots ? __shfl_sync(kAllLanes, own_slot, piece) : 0;
    if (is_elected) {
      if constexpr (kWholeBoxes) {
        ptx::copy_box(to + piece * kPieceBytes, map, barrier, 0, slot, 0, kv_head, block, policy);
      } else {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          ptx::copy_box(to + piece * kPieceBytes + c * 1024, map, barrier, 64 * c, slot, 0, kv_head, block, policy);
        }
      }
    }
  }
}

// An item's queries to shared memory, by one thread.
__device__ __forceinline__ void copy_queries(
    const PromptParams& p, const ptx::TensorMap& map, const Item& item, unsigned to, unsigned barrier,
    unsigned long long policy) {
  const Halves halves(p.half_sizes);
  const int count = item.has_half(halves, 1) ? 2 : 1;
  ptx::arrive_expecting(barrier, count * kChunks * halves.heads * halves.queries * 128);
#pragma unroll 1
  for (int half = 0; half < count; ++half) {
    const int index = item.first_half + half;
    const int head = item.kv_head * halves.group_size + halves.first_head(index);
    const int token = item.first_token() + halves.first_query(index);
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      ptx::copy_box(to + half * kGroupQueryBytes + c * 8192, map, barrier, 64 * c, head, token, 0, 0, policy);
    }
  }
}

// The items of a CTA, which one warp fetches.
class ItemQueue {
 public:
  int words = 0;  // of the next item: word i in lane i

  __device__ __forceinline__ void begin(const PromptParams& p) { words = fetch(p, blockIdx.x); }

  // At each tile of an item: some tiles before its end, ask for the next one.
  __device__ __forceinline__ void advance(const PromptParams& p, const Item& item, int tile, bool is_elected) {
    const int end = item.end_tile();
    if (tile == item.first_tile()) taken_ = 0;
    if (tile == max(item.first_tile(), end - kAskAhead) && is_elected) {
      taken_ = atomicInc(p.next_item, num_items_ - 1) + gridDim.x;
    }
    if (tile == end - 1) next_words_ = fetch(p, min(__reduce_max_sync(kAllLanes, taken_), num_items_));
  }

  __device__ __forceinline__ void turn() { words = next_words_; }

 private:
  __device__ __forceinline__ int fetch(const PromptParams& p, int index) {
    const int of_head = index / p.num_kv_heads;
    const int lane = lane_id();
    // loaded before it is known whether there is one
    const int word = lane < 8 ? __ldg(p.items + 8 * of_head + lane) : 0;
    if (num_items_ == 0) num_items_ = __ldg(p.num_items) * p.num_kv_heads;
    return index >= num_items_ ? -1 : lane == 8 ? index - of_head * p.num_kv_heads : word;
  }

  int num_items_ = 0;
  unsigned taken_ = 0;
  int next_words_ = -1;
};

// The next item, in a warp that loads: the one that has fetched it gives it to the others.
__device__ __forceinline__ Item pass_item(Item* items, Ring<kItemSlots>& ring, int words, bool is_first) {
  if (is_first) {
    ring.wait_empty();
    if (lane_id() < Item::kWords) {
      reinterpret_cast<int*>(items + ring.stage)[lane_id()] = words;
      ptx::arrive(ring.full + 8 * ring.stage);
    }
  } else {
    ring.wait_full();
    words = reinterpret_cast<const int*>(items + ring.stage)[min(lane_id(), Item::kWords - 1)];
    ptx::arrive(ring.empty + 8 * ring.stage);
  }
  ring.advance();
  return Item::from_lanes(words);
}

// An item's queries, to the next buffer.
__device__ __forceinline__ void load_queries(
    const PromptParams& p, const ptx::TensorMap& map, const Item& item, unsigned shared, Ring<kQueryBuffers>& ring,
    bool is_elected, unsigned long long policy) {
  ring.wait_empty();
  const unsigned to = shared + Layout::kQueries + ring.stage * kQueryBytes;
  if (is_elected) copy_queries(p, map, item, to, ring.full + 8 * ring.stage, policy);
  __syncwarp();
  ring.advance();
}

// A warp that loads: 0 and 2 bring keys, 1 and 3 values, every second piece each; 0 also fetches the items and brings the
// queries. kRole: 0 = warp 0, 1 = values, 2 = warp 2.
template <int kRole>
__device__ __forceinline__ void load_items(
    const PromptParams& p, const ptx::TensorMap& query_map, const ptx::TensorMap& map, unsigned shared, Item* items,
    Rings rings, int half) {
  const bool is_elected = ptx::elect_lane();
  const unsigned long long policy = ptx::evict_last_policy();
  const int lane = lane_id();
  Ring<kStages>& ring = kRole == 1 ? rings.values : rings.keys;
  const unsigned tiles = shared + (kRole == 1 ? Layout::kValueTiles : Layout::kKeyTiles);
  ItemQueue queue;
  if (kRole == 0) queue.begin(p);
  while (true) {
    const Item item = pass_item(items, rings.items, queue.words, kRole == 0);
    if (!item.exists()) break;
    const int end = item.end_tile();
    Lookup lookup(p, item, item.first_tile() * kPieces + min(lane, kPieces - 1));
#pragma unroll 1
    for (int tile = item.first_tile(); tile < end; ++tile) {
      const Lookup next(p, item, (tile + 1) * kPieces + min(lane, kPieces - 1));
      if (kRole == 0) queue.advance(p, item, tile, is_elected);
      if (kRole == 0 && kQueryBuffers > 1 && tile == item.first_tile()) {
        load_queries(p, query_map, item, shared, rings.queries, is_elected, policy);
      }
      ring.wait_empty();
      const unsigned barrier = ring.full + 8 * ring.stage;
      const unsigned to = tiles + ring.stage * kTileBytes;
      if (half == 0 && is_elected) ptx::arrive_expecting(barrier, kTileBytes);
      const int coordinates = lookup.coordinates(p);
      if (p.coordinate_shift == 0) {
        copy_pieces<false>(p, map, to, barrier, item.kv_head, coordinates, half, is_elected, policy);
      } else {
        copy_pieces<true>(p, map, to, barrier, item.kv_head, coordinates, half, is_elected, policy);
      }
      ring.advance();
      // a single buffer is free only once the keys before these are used
      if (kRole == 0 && kQueryBuffers == 1 && tile == item.first_tile()) {
        load_queries(p, query_map, item, shared, rings.queries, is_elected, policy);
      }
      lookup = next;
    }
    if (kRole == 0) queue.turn();
  }
}

}  // namespace kvt
