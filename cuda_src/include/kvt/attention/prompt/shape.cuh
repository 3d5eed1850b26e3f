// The prompt kernel's sizes, its shared memory, and the rings of stages in it.
//
// Macros: KVT_HEAD_DIM, KVT_TIERS.
#pragma once

#include <kvt/attention/prompt/item.cuh>
#include <kvt/format/tiers.cuh>
#include <kvt/ptx/barrier.cuh>

namespace kvt {

constexpr int kHeadDim = KVT_HEAD_DIM;
// columns of O: the next size of a product that is made
constexpr int kDims = kHeadDim <= 64 ? 64 : kHeadDim <= 96 ? 96 : kHeadDim <= 128 ? 128 : kHeadDim <= 192 ? 192 : 256;
constexpr int kChunks = (kDims + 63) / 64;                          // of 128 bytes, in a row of shared memory
constexpr bool kWholeBoxes = kHeadDim % 64 == 0;                    // a tensor copy brings all chunks of a granule
constexpr int kKeys = kDims <= 128 ? 128 : kDims == 192 ? 96 : 64;  // of a tile
constexpr int kPieces = kKeys / 8;                                  // granules of a tile
constexpr int kPieceBytes = kChunks * 1024;
constexpr int kTileBytes = kPieces * kPieceBytes;
constexpr int kStages = 2;
constexpr bool kHasTiers = KVT_TIERS;
constexpr int kQueryBuffers = kDims <= 128 && !kHasTiers ? 2 : 1;
constexpr int kGroupQueryBytes = 64 * kChunks * 128;  // of a warpgroup
constexpr int kQueryBytes = 2 * kGroupQueryBytes;
constexpr int kConsumers = 256;
constexpr int kThreads = kConsumers + (kHasTiers ? 256 : 128);
constexpr int kConsumerWarps = 8;
constexpr int kLoaders = 4;     // warps of the first warpgroup; with tiers two, and four that convert codes
constexpr int kConverters = 4;  // warps, of which every lane arrives at barriers
constexpr int kLoaderRegisters = kHasTiers ? 32 : 24;
constexpr int kConverterRegisters = 64;
constexpr int kConsumerRegisters = kHasTiers ? 208 : 240;
constexpr int kItemSlots = 4;
constexpr int kAskAhead = 3;  // tiles before its end at which a CTA asks for its next item

// Units of codes on their way: a block of the cold tier, or half a block of the warm one.
using Sizes = Bytes<kHeadDim>;
constexpr int kCodeSlots = 7;
constexpr int kCodeSlotBytes = Sizes::kCold > Sizes::kWarm ? Sizes::kCold : Sizes::kWarm;
static_assert(!kHasTiers || kCodeSlotBytes % 128 == 0, "slots follow each other");

// Shared memory, in bytes from its beginning.
struct Layout {
  static constexpr int kQueries = 0;
  static constexpr int kKeyTiles = kQueries + kQueryBuffers * kQueryBytes;
  static constexpr int kValueTiles = kKeyTiles + kStages * kTileBytes;
  static constexpr int kCodes = kValueTiles + kStages * kTileBytes;
  static constexpr int kBarriers = kCodes + (kHasTiers ? kCodeSlots * kCodeSlotBytes : 0);
  static constexpr int kNumBarriers =
      4 * kStages + 2 * kQueryBuffers + 2 * kItemSlots + (kHasTiers ? 2 * kCodeSlots : 0);
  static constexpr int kItems = kBarriers + 256;  // a multiple of 64
  static_assert(8 * kNumBarriers <= 256, "barriers are before the items");
  static constexpr int kIsLast = kItems + kItemSlots * sizeof(Item);
  static constexpr int kBytes = kIsLast + 16;
};

// Numbered barriers.
constexpr int kTurn = 2;      // and the next: whose turn it is to issue products
constexpr int kGroupMet = 4;  // and the next: of each warpgroup
constexpr int kBothMet = 6;

// A ring of stages in shared memory, as one side of it sees it.
template <int kCount>
struct Ring {
  unsigned full, empty;  // barriers of its stages
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void wait_full() const { ptx::wait_for_phase(full + 8 * stage, parity); }
  __device__ __forceinline__ void wait_empty() const { ptx::wait_for_phase(empty + 8 * stage, parity ^ 1); }
  __device__ __forceinline__ bool is_empty() const { return ptx::is_phase_over(empty + 8 * stage, parity ^ 1); }
  __device__ __forceinline__ void advance() {
    if (++stage == kCount) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Rings {
  Ring<kStages> keys, values;
  Ring<kQueryBuffers> queries;
  Ring<kItemSlots> items;
  Ring<kCodeSlots> codes;

  __device__ __forceinline__ explicit Rings(unsigned shared) {
    unsigned at = shared + Layout::kBarriers;
    const auto place = [&](auto& ring, int count) {
      ring.full = at;
      ring.empty = at + 8 * count;
      at += 16 * count;
    };
    place(keys, kStages);
    place(values, kStages);
    place(queries, kQueryBuffers);
    place(items, kItemSlots);
    if (kHasTiers) place(codes, kCodeSlots);
  }

  // By one thread.
  __device__ __forceinline__ void init() const {
    const auto all = [](const auto& ring, int count, int filling, int emptying) {
      for (int i = 0; i < count; ++i) {
        ptx::init_barrier(ring.full + 8 * i, filling);
        ptx::init_barrier(ring.empty + 8 * i, emptying);
      }
    };
    all(keys, kStages, kHasTiers ? 1 + 32 * kConverters : 1, kConsumerWarps);
    all(values, kStages, kHasTiers ? 1 + 32 * kConverters : 1, kConsumerWarps);
    all(queries, kQueryBuffers, 1, kConsumerWarps);
    // all warps but the one that fills it
    all(items, kItemSlots, Item::kWords, 32 * (kConsumerWarps + (kHasTiers ? 1 + kConverters : kLoaders - 1)));
    if (kHasTiers) all(codes, kCodeSlots, 1, 32 * kConverters);
    ptx::fence_barrier_init();
  }
};

}  // namespace kvt
