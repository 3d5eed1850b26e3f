// The warps that load where tokens are in several tiers: keys and values of 16 bits come by tensor copies, codes by bulk
// copies to slots of their own, from which four further warps make 16-bit keys and values.
#pragma once

#include <kvt/attention/prompt/codes.cuh>
#include <kvt/attention/prompt/load.cuh>
#include <kvt/entry.cuh>

namespace kvt {

// A granule of a sequence: its number in its tier | tier << 27, as expand.cu lists them; past the end -1.
struct TieredGranule {
  int word;

  __device__ __forceinline__ static TieredGranule at(const PromptParams& p, const Item& item, int index) {
    return {index * 8 < item.seq_len ? __ldg(p.block_table + item.sequence * p.table_row + index) : -1};
  }
  __device__ __forceinline__ Tier tier() const { return word < 0 ? Tier::kHot : static_cast<Tier>(word >> 27); }
  __device__ __forceinline__ int granule() const { return word & (1 << 24) - 1; }
};

// Asks for the codes of an item, as far ahead of their use as there are slots.
class CodeCopier {
 public:
  __device__ __forceinline__ explicit CodeCopier(const Ring<kCodeSlots>& ring) : ring_(ring) {}

  __device__ __forceinline__ void begin(const PromptParams& p, const Item& item) {
    block_ = first_ = item.first_tile() * kPerTile;
    load(p, item);
  }

  // Those of a tile's blocks, and of others while slots are free.
  __device__ __forceinline__ void run(
      const PromptParams& p, const Item& item, int tile, unsigned codes, bool is_elected) {
    while (block_ < item.end_tile() * kPerTile) {
      if (block_ == first_ + 32) {
        first_ = block_;
        load(p, item);
      }
      const TieredGranule granule{__shfl_sync(kAllLanes, words_, block_ - first_)};
      const bool is_warm = granule.tier() == Tier::kWarm;
      if (granule.tier() != Tier::kHot) {
        const long long head = static_cast<long long>(granule.granule() >> 3) * p.num_kv_heads + item.kv_head;
        const unsigned nbytes = is_warm ? Sizes::kWarm : Sizes::kCold;
        const unsigned char* from = is_warm ? p.warm + 2 * head * Sizes::kWarm : p.cold + head * Sizes::kCold;
        if (is_warm) from += half_ * Sizes::kWarm;
        if (block_ >= (tile + 1) * kPerTile && !__any_sync(kAllLanes, ring_.is_empty())) return;
        ring_.wait_empty();
        if (is_elected) {
          const unsigned barrier = ring_.full + 8 * ring_.stage;
          ptx::arrive_expecting(barrier, nbytes);
          ptx::copy_bytes(codes + ring_.stage * kCodeSlotBytes, from, nbytes, barrier);
        }
        __syncwarp();
        ring_.advance();
        half_ ^= is_warm;
        if (half_) continue;
      }
      ++block_;
    }
  }

 private:
  static constexpr int kPerTile = kKeys / kBlock;

  // Lane i: the first granule of block number `first_` + i.
  __device__ __forceinline__ void load(const PromptParams& p, const Item& item) {
    words_ = TieredGranule::at(p, item, 8 * (first_ + lane_id())).word;
  }

  Ring<kCodeSlots> ring_;
  int first_, block_;
  int half_ = 0;  // of a warm block, which takes two slots
  int words_;
};

// The next tile's keys or values of 16 bits. `granule` is the lane's.
__device__ __forceinline__ void copy_hot_pieces(
    const PromptParams& p, const ptx::TensorMap& map, Ring<kStages>& ring, unsigned tiles, int kv_head,
    TieredGranule granule, bool is_elected, unsigned long long policy) {
  const unsigned hot = __ballot_sync(kAllLanes, lane_id() < kPieces && granule.tier() == Tier::kHot);
  ring.wait_empty();
  const unsigned barrier = ring.full + 8 * ring.stage;
  const unsigned to = tiles + ring.stage * kTileBytes;
  if (is_elected) ptx::arrive_expecting(barrier, __popc(hot) * kPieceBytes);
  // outside of the map: filled with zeros
  const int own_block = granule.word < 0 ? p.num_map_blocks : granule.word;
#pragma unroll 1
  for (unsigned rest = hot; rest != 0; rest &= rest - 1) {
    const int piece = __ffs(rest) - 1;
    const int block = __shfl_sync(kAllLanes, own_block, piece);
    if (is_elected) ptx::copy_box(to + piece * kPieceBytes, map, barrier, 0, 0, 0, kv_head, block, policy);
  }
  ring.advance();
}

// One of two warps that copy: the first brings keys, asks for codes, fetches the items and brings the queries; the other
// brings values.
template <bool kIsFirst>
__device__ __forceinline__ void load_tiered_items(
    const PromptParams& p, const ptx::TensorMap& query_map, const ptx::TensorMap& map, unsigned shared, Item* items,
    Rings rings) {
  const bool is_elected = ptx::elect_lane();
  const unsigned long long policy = ptx::evict_last_policy();
  Ring<kStages>& ring = kIsFirst ? rings.keys : rings.values;
  const unsigned tiles = shared + (kIsFirst ? Layout::kKeyTiles : Layout::kValueTiles);
  CodeCopier copier(rings.codes);
  ItemQueue queue;
  if (kIsFirst) queue.begin(p);
  while (true) {
    const Item item = pass_item(items, rings.items, queue.words, kIsFirst);
    if (!item.exists()) break;
    if (kIsFirst) copier.begin(p, item);
    const auto granule_of = [&](int tile) {
      return TieredGranule::at(p, item, tile * kPieces + min(lane_id(), kPieces - 1));
    };
    TieredGranule granule = granule_of(item.first_tile());
#pragma unroll 1
    for (int tile = item.first_tile(); tile < item.end_tile(); ++tile) {
      const TieredGranule next = granule_of(tile + 1);
      if (kIsFirst) {
        queue.advance(p, item, tile, is_elected);
        copier.run(p, item, tile, shared + Layout::kCodes, is_elected);
      }
      copy_hot_pieces(p, map, ring, tiles, item.kv_head, granule, is_elected, policy);
      // there is a single buffer, which is free once the keys before these are used
      if (kIsFirst && tile == item.first_tile()) {
        load_queries(p, query_map, item, shared, rings.queries, is_elected, policy);
      }
      granule = next;
    }
    if (kIsFirst) queue.turn();
  }
}

// A tile's keys, or values, from codes: this warp's share. `words` are the first granules of its blocks.
template <bool kIsKeys>
__device__ __forceinline__ void bring_codes(
    Ring<kCodeSlots>& ring, unsigned codes, unsigned to, const int (&words)[kKeys / kBlock], int warp) {
#pragma unroll 1
  for (int half = 0; half < kKeys / kBlock; ++half) {
    const TieredGranule first{half == 0 ? words[0] : words[kKeys / kBlock - 1]};
    if (first.tier() == Tier::kHot) continue;
    const bool is_warm = first.tier() == Tier::kWarm;
    const unsigned at = to + half * 8 * kPieceBytes;
#pragma unroll 1
    for (int u = 0; u < (is_warm ? 2 : 1); ++u) {
      ring.wait_full();
      const unsigned from = codes + ring.stage * kCodeSlotBytes;
      if (is_warm) {
        (kIsKeys ? bring_warm_keys : bring_warm_values)(from, at + u * 4 * kPieceBytes, warp);
      } else {
        (kIsKeys ? bring_cold_keys : bring_cold_values)(from, at, warp);
      }
      if (!kIsKeys) ptx::arrive(ring.empty + 8 * ring.stage);
      ring.advance();
    }
  }
}

// One of the four warps that make 16-bit keys and values of codes. They meet each tile, also where nothing is a code.
__device__ __forceinline__ void convert_items(
    const PromptParams& p, unsigned shared, Item* items, Rings rings, int warp) {
  Ring<kCodeSlots> key_codes = rings.codes;
  while (true) {
    const Item item = pass_item(items, rings.items, 0, false);
    if (!item.exists()) break;
    int words_of_lane = 0;
#pragma unroll 1
    for (int tile = item.first_tile(); tile < item.end_tile(); ++tile) {
      constexpr int kBlocks = kKeys / kBlock;
      const int at = (tile - item.first_tile()) * kBlocks & 31;
      if (at == 0) words_of_lane = TieredGranule::at(p, item, 8 * (tile * kBlocks + lane_id())).word;
      int words[kBlocks];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) words[i] = __shfl_sync(kAllLanes, words_of_lane, at + i);
      const auto finish = [&](Ring<kStages>& ring) {
        ptx::fence_async_proxy();
        ptx::arrive(ring.full + 8 * ring.stage);
        ring.advance();
      };
      rings.keys.wait_empty();
      bring_codes<true>(
          key_codes, shared + Layout::kCodes, shared + Layout::kKeyTiles + rings.keys.stage * kTileBytes, words, warp);
      finish(rings.keys);
      rings.values.wait_empty();
      bring_codes<false>(
          rings.codes, shared + Layout::kCodes, shared + Layout::kValueTiles + rings.values.stage * kTileBytes, words,
          warp);
      finish(rings.values);
    }
  }
}

}  // namespace kvt
