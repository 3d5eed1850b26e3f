// Units: the pieces in which attention reads a sequence whose tokens are in several tiers.
//
// A unit is about the same number of bytes in every tier, so that cutting a list of units cuts the bytes: 16 tokens of
// the hot tier, half a block of 64 tokens of the warm one (int8), or a block of the cold one (int4).
#pragma once

#include <kvt/entry.cuh>

namespace kvt {

// One unit. words.z is its first position, words.w its tier; x and y say where it is:
//   hot   x, y  the granules of its 16 tokens
//   warm  x     the block,  y  which half of it
//   cold  x     the block
struct Unit {
  int4 words;

  __device__ __forceinline__ int position() const { return words.z; }
  __device__ __forceinline__ Tier tier() const { return static_cast<Tier>(words.w); }
};

}  // namespace kvt
