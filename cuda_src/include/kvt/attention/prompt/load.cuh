// The warps of the prompt kernel that load: keys, values, queries and items of work.
#pragma once

#include <kvt/attention/prompt/shape.cuh>
#include <kvt/base/warp.cuh>
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

  int num_items = 0;
  // lane i: word i of the item numbered `index`
  const auto fetch = [&](int index) {
    const int of_head = index / p.num_kv_heads;
    // loaded before it is known whether there is one
    const int word = lane < 8 ? __ldg(p.items + 8 * of_head + lane) : 0;
    if (num_items == 0) num_items = __ldg(p.num_items) * p.num_kv_heads;
    return index >= num_items ? -1 : lane == 8 ? index - of_head * p.num_kv_heads : word;
  };
  const auto load_queries = [&](const Item& item) {
    rings.queries.wait_empty();
    const unsigned to = shared + Layout::kQueries + rings.queries.stage * kQueryBytes;
    if (is_elected) copy_queries(p, query_map, item, to, rings.queries.full + 8 * rings.queries.stage, policy);
    __syncwarp();
    rings.queries.advance();
  };
  int words = kRole == 0 ? fetch(blockIdx.x) : 0;
  while (true) {
    if (kRole == 0) {
      rings.items.wait_empty();
      if (lane < Item::kWords) {
        reinterpret_cast<int*>(items + rings.items.stage)[lane] = words;
        ptx::arrive(rings.items.full + 8 * rings.items.stage);
      }
    } else {
      rings.items.wait_full();
      words = reinterpret_cast<const int*>(items + rings.items.stage)[min(lane, Item::kWords - 1)];
      __syncwarp();
      if (is_elected) ptx::arrive(rings.items.empty + 8 * rings.items.stage);
    }
    rings.items.advance();
    const Item item = Item::from_lanes(words);
    if (!item.exists()) break;
    const int end = item.end_tile();
    Lookup lookup(p, item, item.first_tile() * kPieces + min(lane, kPieces - 1));
    unsigned taken = 0;
    int next_words = -1;
#pragma unroll 1
    for (int tile = item.first_tile(); tile < end; ++tile) {
      const Lookup next(p, item, (tile + 1) * kPieces + min(lane, kPieces - 1));
      if (kRole == 0) {
        if (tile == max(item.first_tile(), end - kAskAhead) && is_elected) {
          taken = atomicInc(p.next_item, num_items - 1) + gridDim.x;
        }
        if (tile == end - 1) next_words = fetch(min(__reduce_max_sync(kAllLanes, taken), num_items));
      }
      if (kRole == 0 && kQueryBuffers > 1 && tile == item.first_tile()) load_queries(item);
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
      if (kRole == 0 && kQueryBuffers == 1 && tile == item.first_tile()) load_queries(item);
      lookup = next;
    }
    if (kRole == 0) words = next_words;
  }
}

}  // namespace kvt
