// The warps that load where tokens are in several tiers: keys and values of 16 bits come by tensor copies, codes by bulk
// copies to slots of their own, from which the four warps make 16-bit keys and values.
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

// Asks for the codes of an item, as far ahead of their use as there are slots. By one warp.
class CodeCopier {
 public:
  __device__ __forceinline__ void begin(const PromptParams& p, const Item& item) {
    block_ = first_ = item.first_tile() * (kKeys / kBlock);
    end_ = item.end_tile() * (kKeys / kBlock);
    now_ = load(p, item, first_);
  }

  __device__ __forceinline__ void run(const PromptParams& p, const Item& item, unsigned codes, bool is_elected) {
    while (block_ < end_) {
      if (block_ == first_ + 32) {
        first_ = block_;
        now_ = load(p, item, first_);
      }
      const TieredGranule granule{__shfl_sync(kAllLanes, now_, block_ - first_)};
      const bool is_warm = granule.tier() == Tier::kWarm;
      if (granule.tier() != Tier::kHot) {
        const int units = is_warm ? 2 : 1;
        if (used_ + units > kCodeSlots) return;
        const long long head = static_cast<long long>(granule.granule() >> 3) * p.num_kv_heads + item.kv_head;
        const unsigned nbytes = is_warm ? Sizes::kWarm : Sizes::kCold;
        const unsigned char* from = is_warm ? p.warm + 2 * head * Sizes::kWarm : p.cold + head * Sizes::kCold;
        for (int u = 0; u < units; ++u, from += nbytes) {
          ring_.wait_empty();
          if (is_elected) {
            const unsigned barrier = ring_.full + 8 * ring_.stage;
            ptx::arrive_expecting(barrier, nbytes);
            ptx::copy_bytes(codes + ring_.stage * kCodeSlotBytes, from, nbytes, barrier);
          }
          ring_.advance();
        }
        used_ += units;
      }
      ++block_;
    }
  }

  __device__ __forceinline__ explicit CodeCopier(const Ring<kCodeSlots>& ring) : ring_(ring) {}
  __device__ __forceinline__ void release(int units) { used_ -= units; }

 private:
  // Lane i: the first granule of block number `first` + i.
  __device__ __forceinline__ int load(const PromptParams& p, const Item& item, int first) const {
    return TieredGranule::at(p, item, 8 * (first + lane_id())).word;
  }

  Ring<kCodeSlots> ring_;
  int used_ = 0;  // slots
  int first_, block_, end_;
  int now_;
};

// A tile's keys or values, of 16 bits: this warp's share. `granule` is the lane's.
__device__ __forceinline__ void copy_hot_pieces(
    const PromptParams& p, const ptx::TensorMap& map, unsigned to, unsigned barrier, int kv_head, TieredGranule granule,
    int warp, bool is_elected) {
  const unsigned hot = __ballot_sync(kAllLanes, lane_id() < kPieces && granule.tier() == Tier::kHot);
  const unsigned own = hot & 0x11111111u << warp;
  if (own == 0) return;
  if (is_elected) ptx::expect(barrier, __popc(own) * kPieceBytes);
  __syncwarp();
  const unsigned long long policy = ptx::evict_last_policy();
#pragma unroll 1
  for (int piece = warp; piece < kPieces; piece += kLoaders) {
    const int word = __shfl_sync(kAllLanes, granule.word, piece);
    const int block = word < 0 ? p.num_map_blocks : word;  // outside of the map: filled with zeros
    if (is_elected && hot >> piece & 1) {
      ptx::copy_box(to + piece * kPieceBytes, map, barrier, 0, 0, 0, kv_head, block, policy);
    }
  }
}

// A tile's keys, or values, from codes: this warp's share. -> units that were read.
template <bool kIsKeys>
__device__ __forceinline__ int bring_codes(
    Ring<kCodeSlots> ring, unsigned codes, unsigned to, TieredGranule granule, int warp) {
  int units = 0;
#pragma unroll 1
  for (int half = 0; half < kKeys / kBlock; ++half) {
    const TieredGranule first{__shfl_sync(kAllLanes, granule.word, 8 * half)};
    const unsigned at = to + half * 8 * kPieceBytes;
    if (first.tier() == Tier::kCold) {
      ring.wait_full();
      const unsigned from = codes + ring.stage * kCodeSlotBytes;
      (kIsKeys ? bring_cold_keys : bring_cold_values)(from, at, warp);
      ring.advance();
      units += 1;
    } else if (first.tier() == Tier::kWarm) {
#pragma unroll 1
      for (int u = 0; u < 2; ++u) {
        ring.wait_full();
        const unsigned from = codes + ring.stage * kCodeSlotBytes;
        (kIsKeys ? bring_warm_keys : bring_warm_values)(from, at + u * 4 * kPieceBytes, warp);
        ring.advance();
      }
      units += 2;
    }
  }
  return units;
}

// The next tile of keys, or of values: this warp's share. -> units of codes that it has.
template <bool kIsKeys>
__device__ __forceinline__ int bring_tile(
    const PromptParams& p, const ptx::TensorMap& map, unsigned shared, Rings& rings, int kv_head, TieredGranule granule,
    int warp, bool is_elected) {
  Ring<kStages>& ring = kIsKeys ? rings.keys : rings.values;
  ring.wait_empty();
  const unsigned barrier = ring.full + 8 * ring.stage;
  const unsigned to = shared + (kIsKeys ? Layout::kKeyTiles : Layout::kValueTiles) + ring.stage * kTileBytes;
  copy_hot_pieces(p, map, to, barrier, kv_head, granule, warp, is_elected);
  const int units = bring_codes<kIsKeys>(rings.codes, shared + Layout::kCodes, to, granule, warp);
  ptx::fence_async_proxy();
  __syncwarp();
  if (is_elected) ptx::arrive(barrier);
  ring.advance();
  return units;
}

// A warp that loads; warp 0 also fetches the items, brings the queries and asks for codes.
__device__ __forceinline__ void load_tiered_items(
    const PromptParams& p, const ptx::TensorMap& query_map, const ptx::TensorMap& key_map,
    const ptx::TensorMap& value_map, unsigned shared, Item* items, Rings rings, int warp) {
  const bool is_elected = ptx::elect_lane();
  CodeCopier copier(rings.codes);
  ItemQueue queue;
  if (warp == 0) queue.begin(p);
  while (true) {
    const Item item = pass_item(items, rings.items, queue.words, warp == 0, is_elected);
    if (!item.exists()) break;
    if (warp == 0) copier.begin(p, item);
    const auto granule_of = [&](int tile) {
      return TieredGranule::at(p, item, tile * kPieces + min(lane_id(), kPieces - 1));
    };
    TieredGranule granule = granule_of(item.first_tile());
#pragma unroll 1
    for (int tile = item.first_tile(); tile < item.end_tile(); ++tile) {
      const TieredGranule next = granule_of(tile + 1);
      if (warp == 0) {
        queue.advance(p, item, tile, is_elected);
        copier.run(p, item, shared + Layout::kCodes, is_elected);
      }
      bring_tile<true>(p, key_map, shared, rings, item.kv_head, granule, warp, is_elected);
      // there is a single buffer, which is free once the keys before these are used
      if (warp == 0 && tile == item.first_tile()) {
        load_queries(p, query_map, item, shared, rings.queries, is_elected, ptx::evict_last_policy());
      }
      const int units = bring_tile<false>(p, value_map, shared, rings, item.kv_head, granule, warp, is_elected);
      for (int u = 0; u < units; ++u) {
        if (is_elected) ptx::arrive(rings.codes.empty + 8 * rings.codes.stage);
        rings.codes.advance();
      }
      copier.release(units);
      granule = next;
    }
    if (warp == 0) queue.turn();
  }
}

}  // namespace kvt
