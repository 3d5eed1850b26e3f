// The compile-time shape of a decode kernel.
//
// Macros: KVT_HEAD_DIM, KVT_BF16, KVT_ROW_TILES, KVT_WARPS, KVT_STAGES, KVT_PLANNED and KVT_CLUSTER as in decode.cu;
//         KVT_TIERED: 0 = work is counted in steps of 16 tokens, 1 = in units of a tiered sequence;
//         KVT_MASSES: 1 = also write which share of the attention each tile got, see decode/masses.cuh.
#pragma once

#include <kvt/attention/keys.cuh>
#include <kvt/base/scalar.cuh>

#ifndef KVT_MASSES
#define KVT_MASSES 0
#endif

namespace kvt {

constexpr int kHeadDim = KVT_HEAD_DIM;
constexpr int kRowTiles = KVT_ROW_TILES;
constexpr int kRows = 8 * kRowTiles;
constexpr int kWarps = KVT_WARPS;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = KVT_STAGES;
constexpr int kDimPairs = (kHeadDim + 31) / 32;  // products of K and Q take 32 dims at a time
constexpr int kDimBlocks = kHeadDim / 16;
constexpr int kCluster = KVT_CLUSTER;
constexpr bool kHasMasses = KVT_MASSES;
constexpr int kStride = kWarps * kCluster;  // steps from one of a warp to its next
// of a split, unless the caller says how many, since the CTA that ends last merges some of them alone
constexpr int kMinSplitTiles = kHeadDim > 64 ? 4 : 2;
constexpr bool kPlanHasLengths = !KVT_TIERED;  // a tiered plan has the lengths of lists of units instead
static_assert(kHeadDim % 16 == 0, "an MMA covers 16 dims");
static_assert((kStride & (kStride - 1)) == 0, "first_of_warp masks with kStride - 1");
static_assert(kCluster == 1 || !KVT_PLANNED, "a cluster shares one sequence");

}  // namespace kvt
