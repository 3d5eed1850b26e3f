// The tiers of a sequence: their bytes, and the units that attention reads them in.
//
// A unit is about the same number of bytes in every tier, so that cutting a list of units cuts the bytes: 16 tokens of
// the hot tier, half a block of 64 of the warm one (int8), a block of the cold one (int4).
// Layouts: kvtoolkit/formats/quantized.py.
#pragma once

#include <kvt/attention.cuh>
#include <kvt/entry.cuh>

namespace kvt {

constexpr int kBlock = 64;       // tokens that are quantized together
constexpr int kWarmUnit = 32;    // tokens

template <int kHeadDim>
struct Bytes {
  static constexpr int kWarmCodes = kWarmUnit * kHeadDim;           // of keys, as many of values
  static constexpr int kWarm = 2 * kWarmCodes + 4 * kWarmUnit;      // of a unit
  static constexpr int kColdCodes = kBlock * kHeadDim / 2;
  static constexpr int kCold = 2 * kColdCodes + 4 * kHeadDim + 4 * kBlock;
};

// One unit: where it lies, its first position, its tier.
//   hot   x, y  the granules of its 16 tokens;   warm  x  block, y  half;   cold  x  block
struct Unit {
  int4 words;

  __device__ __forceinline__ int position() const { return words.z; }
  __device__ __forceinline__ Tier tier() const { return static_cast<Tier>(words.w); }
};

// Filled in by kvtoolkit/cuda/attention.py, behind the fields of AttentionParams.
struct TieredParams : AttentionParams {
  const unsigned char* warm;   // [num_blocks, num_kv_heads, 2 * kWarm bytes]
  const unsigned char* cold;   // [num_blocks, num_kv_heads, kCold bytes]
  const int4* units;           // [batch, max_units], made by kvt_units
  const int* num_units;        // [batch]
  const int* tile_units;       // [batch, max_units / 4 + 1] the first unit of each tile
  int max_units;
};

}  // namespace kvt
