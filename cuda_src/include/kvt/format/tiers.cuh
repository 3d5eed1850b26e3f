// How many tokens and bytes the quantized tiers store together. Layouts: kvtoolkit/formats/quantized.py.
#pragma once

namespace kvt {

constexpr int kBlock = 64;     // tokens that are quantized together
constexpr int kWarmUnit = 32;  // tokens of a warm block that attention reads at once

template <int kHeadDim>
struct Bytes {
  static constexpr int kWarmCodes = kWarmUnit * kHeadDim;       // of a unit's keys; its values have as many
  static constexpr int kWarm = 2 * kWarmCodes + 4 * kWarmUnit;  // of a unit
  static constexpr int kColdCodes = kBlock * kHeadDim / 2;      // of a block's keys; its values have as many
  static constexpr int kCold = 2 * kColdCodes + 4 * kHeadDim + 4 * kBlock;  // of a block
};

}  // namespace kvt
