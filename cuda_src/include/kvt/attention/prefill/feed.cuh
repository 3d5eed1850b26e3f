// What comes to the prefill kernel's shared memory: items of work, their queries, and tiles of keys and values.
#pragma once

#include <kvt/attention/prefill/shape.cuh>
#include <kvt/ptx/async_copy.cuh>
#include <kvt/ptx/matrix.cuh>

namespace kvt {

// One of an item's query rows.
struct QueryRow {
  int query;  // of the sequence
  int q_head;
  bool exists;

  __device__ __forceinline__ QueryRow(const Halves& halves, const Item& item, int row) {
    const int half = item.first_half + row / kHalfRows;
    const int in_half = halves.query_of(row % kHalfRows);
    const int head = halves.first_head(half) + row % kHalfRows - in_half * halves.heads;
    query = halves.first_query(half) + in_half;
    q_head = item.kv_head * halves.group_size + head;
    exists = in_half < halves.queries && query < item.num_queries && head < halves.group_size;
  }
};

// The tiles of an item: planned ones may be larger, and the last of these may end later than what the rows see.
__device__ __forceinline__ int first_tile_of(const PrefillParams& p, const Item& item) {
  return item.first_tile() * p.tiles_per_planned;
}
__device__ __forceinline__ int end_tile_of(const PrefillParams& p, const Item& item) {
  const int end = item.end_tile() * p.tiles_per_planned;
  if (p.tiles_per_planned == 1) return end;
  return min(end, max(first_tile_of(p, item) + 1, (item.seq_len + kKeys - 1) / kKeys));
}

// Tiles are copied by all threads, each warp its keys of a tile. All copies of a tile are one group, also where there is
// no such tile.
class TileFeed {
 public:
  __device__ __forceinline__ TileFeed(const PrefillParams& p, unsigned shared)
      : p_(p), shared_(shared), warp_(__shfl_sync(kAllLanes, threadIdx.x >> 5, 0)) {}

  // Bring an item's queries, and all tiles that there is room for but the last one of values.
  __device__ __forceinline__ void start(const Item& item, int first, int end) {
    look_up(item, first);
    copy_queries(item);
    copy_keys(item, first, end);
#pragma unroll
    for (int stage = 1; stage < kStages; ++stage) {
      copy_values(item, first + stage - 1, end);
      copy_keys(item, first + stage, end);
    }
  }

  __device__ __forceinline__ void copy_keys(const Item& item, int tile, int end) {
    if (tile < end && item.seq_len > 0) {
      const unsigned short* const keys = p_.k_cache + item.kv_head * p_.k_head;
      copy(Layout::kKeyTiles, keys + block_ * p_.k_block + slot_of(item, tile) * p_.k_slot, tile);
    }
    ptx::commit_copies();
  }

  // After the keys of the same tile.
  __device__ __forceinline__ void copy_values(const Item& item, int tile, int end) {
    if (tile < end && item.seq_len > 0) {
      const unsigned short* const values = p_.v_cache + item.kv_head * p_.v_head;
      copy(Layout::kValueTiles, values + block_ * p_.v_block + slot_of(item, tile) * p_.v_slot, tile);
      if (tile + 1 < end) look_up(item, tile + 1);
    }
    ptx::commit_copies();
  }

 private:
  // Lane l has key l % kWarpKeys of the warp's; past the end of a sequence, its last token.
  __device__ __forceinline__ int position_of(const Item& item, int tile) const {
    return min(tile * kKeys + warp_ * kWarpKeys + lane_id() % kWarpKeys, item.seq_len - 1);
  }
  // position / block_size, exact below 2^31.
  __device__ __forceinline__ int index_of(int position) const {
    return __umulhi(2u * position, p_.block_inverse) >> p_.block_shift;
  }
  __device__ __forceinline__ int slot_of(const Item& item, int tile) const {
    const int position = position_of(item, tile);
    return position - index_of(position) * p_.block_size;
  }
  __device__ __forceinline__ void look_up(const Item& item, int tile) {
    if (item.seq_len > 0) {
      block_ = __ldg(p_.block_table + item.sequence * p_.table_row + index_of(position_of(item, tile)));
    }
  }

  // `row` is where this lane's key is.
  __device__ __forceinline__ void copy(int tiles, const unsigned short* row, int tile) const {
    const unsigned to = shared_ + tiles + (tile & (kStages - 1)) * Layout::kTileBytes;
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < (kWarpKeys * kChunks + 31) / 32; ++i) {
      const int at = i * 32 + lane;
      const int key = at / kChunks;
      const int chunk = at - key * kChunks;
      const auto from = reinterpret_cast<const unsigned short*>(
          __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(row), key & (kWarpKeys - 1)));
      if (kWarpKeys * kChunks % 32 == 0 || at < kWarpKeys * kChunks) {
        ptx::copy_async_16(chunk_address(to, warp_ * kWarpKeys + key, chunk), from + chunk * 8);
      }
    }
  }

  __device__ __forceinline__ void copy_queries(const Item& item) const {
    const Halves halves(p_.half_sizes);
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks;
      const int chunk = i - row * kChunks;
      const QueryRow place(halves, item, row);
      const unsigned to = chunk_address(shared_ + Layout::kQueries, row, chunk);
      if (place.exists) {
        const long long token = item.first_token() + place.query;
        ptx::copy_async_16(to, p_.q + token * p_.q_token + place.q_head * p_.q_head + chunk * 8);
      } else {
        ptx::store_shared_16(to, {0, 0, 0, 0});
      }
    }
  }

  const PrefillParams& p_;
  unsigned shared_;
  int warp_;
  int block_;  // that this lane's key of the tile to copy is in
};

// The items that a CTA takes, one after the other, from a counter that all share.
class ItemQueue {
 public:
  __device__ __forceinline__ ItemQueue(const PrefillParams& p, Item* items, int* next)
      : p_(p), items_(items), next_(next) {}

  // Bring item `index`, by all threads; asynchronous, in the group of copies that is committed next.
  __device__ __forceinline__ void fetch(int index, int buffer) const {
    if (threadIdx.x < 2) {
      const int of_head = index / p_.num_kv_heads;
      const bool exists = of_head < *p_.num_items;
      Item* const item = items_ + buffer;
      if (exists) {
        const unsigned to = ptx::shared_address(item) + 16 * threadIdx.x;
        ptx::copy_async_16(to, p_.items + 8 * of_head + 4 * threadIdx.x);
      }
      if (threadIdx.x == 0) item->kv_head = exists ? index - of_head * p_.num_kv_heads : -1;
    }
  }
  __device__ __forceinline__ void fetch_next(int buffer) const { fetch(*next_, buffer); }

  // Ask for the next item, once for each item.
  __device__ __forceinline__ void ask() const {
    if (threadIdx.x == 0) *next_ = gridDim.x + atomicInc(p_.next_item, *p_.num_items * p_.num_kv_heads - 1);
  }

 private:
  const PrefillParams& p_;
  Item* items_;
  int* next_;
};

}  // namespace kvt
