// How a warp of the tiered kernel gets its units: it looks them up, and copies them to the stages of its FIFO in shared
// memory.
#pragma once

#include <kvt/attention/decode/masses.cuh>
#include <kvt/attention/units.cuh>
#include <kvt/format/tiers.cuh>
#include <kvt/ptx/async_copy.cuh>
#include <kvt/ptx/policy.cuh>

namespace kvt {

using Half = ptx::Half;
using Sizes = Bytes<kHeadDim>;
constexpr int kChunks = kHeadDim / 8;           // of 16 bytes, in a hot token's row
constexpr int kHotHalf = kStep * kChunks * 16;  // bytes of K in a hot unit; V has as many
constexpr int kStageBytes = Sizes::kCold;       // the largest unit
constexpr int kFifoBytes = kWarps * kStages * kStageBytes;
static_assert(kHeadDim == 64 || kHeadDim == 128, "pieces of keys are pairs of 32 dims");
static_assert(2 * kHotHalf <= kStageBytes && Sizes::kWarm <= kStageBytes, "a stage holds any unit");
static_assert(kStageBytes % 128 == 0, "stages begin at multiples of 128");

// The work of a sequence that CTAs share: the units of its list.
__device__ __forceinline__ StepRange work_of(const AttentionParams& p, const RowBlock& block) {
  return {0, static_cast<const TieredParams&>(p).num_units[block.sequence]};
}

__device__ __forceinline__ int first_unit(const AttentionParams& p, int sequence, StepRange, int tile) {
  const TieredParams& tiered = static_cast<const TieredParams&>(p);
  return tiered.tile_units[static_cast<long long>(sequence) * (tiered.max_units / 4 + 1) + tile];
}

// Copy a unit to a stage.
__device__ __forceinline__ void copy_unit(
    const TieredParams& p, int kv_head, int seq_len, unsigned stage, Unit unit, unsigned long long policy) {
  const int lane = lane_id();
  if (unit.tier() == Tier::kHot) {
    // lanes 0-15 compute where the keys are, lanes 16-31 the values; past the end they repeat the last token
    const int offset = min(lane & 15, seq_len - 1 - unit.position());
    const long long granule = offset < kGranule ? unit.words.x : unit.words.y;
    const int slot = offset & (kGranule - 1);
    const unsigned short* const row = lane < 16
                                          ? p.k_cache + kv_head * p.k_head + granule * p.k_block + slot * p.k_slot
                                          : p.v_cache + kv_head * p.v_head + granule * p.v_block + slot * p.v_slot;
#pragma unroll
    for (int i = 0; i < kStep * kChunks / 32; ++i) {
      const int piece = i * 32 + lane;
      const int token = piece / kChunks;
      const int chunk = piece % kChunks;
      const unsigned short* key = broadcast_pointer(row, token);
      const unsigned short* value = broadcast_pointer(row, token + 16);
      const unsigned line = stage + token * kChunks * 16;
      // K is read as 4 chunks of 2 neighbouring rows, V as one chunk of 8 rows; the XOR spreads both over 8 bank groups
      ptx::copy_async_16(line + (chunk ^ (token & 1) << 2) * 16, key + chunk * 8, policy);
      ptx::copy_async_16(line + kHotHalf + (chunk ^ (token & 7)) * 16, value + chunk * 8, policy);
    }
    return;
  }
  const bool is_warm = unit.tier() == Tier::kWarm;
  const long long head = static_cast<long long>(unit.words.x) * p.num_kv_heads + kv_head;
  const unsigned char* const from =
      (is_warm ? p.warm + (2 * head + unit.words.y) * Sizes::kWarm : p.cold + head * Sizes::kCold) + lane * 16;
  const int rest = (is_warm ? Sizes::kWarm : Sizes::kCold) - lane * 16;
  const unsigned to = stage + lane * 16;
#pragma unroll
  for (int at = 0; at < Sizes::kCold; at += 512) {
    if (at + 512 <= Sizes::kWarm || at < rest) ptx::copy_async_16(to + at, from + at, policy);
  }
}

// Looks up the units of a warp, a few ahead of the one it attends to. A lane holds one of the next 32 units, and one of
// those after them is being loaded: a look-up made only when it is needed would wait for all the keys and values that
// have been requested before it.
class UnitReader {
 public:
  __device__ __forceinline__ UnitReader(const TieredParams& p, const Schedule& schedule, const Piece& piece)
      : schedule_(schedule), piece_(piece) {
    seek(p);
  }

  // The next unit. Returns false, in all lanes, if there is none.
  __device__ __forceinline__ bool next(const TieredParams& p, Unit& unit) {
    while (!is_done_ && unit_ >= piece_.end) {
      is_done_ = !schedule_.next(p, piece_);
      if (!is_done_) seek(p);
    }
    if (is_done_) return false;
    if (used_ == 32) {
      used_ = 0;
      now_ = then_;
      then_ = load(p, unit_ + 32 * kStride);
    }
    unit.words.x = __shfl_sync(kAllLanes, now_.x, used_);
    unit.words.y = __shfl_sync(kAllLanes, now_.y, used_);
    unit.words.z = __shfl_sync(kAllLanes, now_.z, used_);
    unit.words.w = __shfl_sync(kAllLanes, now_.w, used_);
    ++used_;
    unit_ += kStride;
    return true;
  }

  // The length of the sequence that the last unit belongs to.
  __device__ __forceinline__ int seq_len() const { return piece_.block.seq_len; }

  // Whether that unit holds tokens of the present queries, which an earlier kernel may still be writing.
  __device__ __forceinline__ bool is_new(const Unit& unit) const {
    return unit.tier() == Tier::kHot && unit.position() + kStep > piece_.block.seq_len - piece_.block.num_queries;
  }

 private:
  __device__ __forceinline__ void seek(const TieredParams& p) {
    unit_ = first_of_warp(piece_.begin);
    used_ = 0;
    now_ = load(p, unit_);  // even if there is none, so as not to wait for the length of the list
    then_ = load(p, unit_ + 32 * kStride);
  }

  __device__ __forceinline__ int4 load(const TieredParams& p, int unit) const {
    const int index = min(unit + lane_id() * kStride, p.max_units - 1);
    return p.units[static_cast<long long>(piece_.block.sequence) * p.max_units + index];
  }

  Schedule schedule_;
  Piece piece_;
  int unit_;
  int used_;         // how many lanes' units have been used
  int4 now_, then_;  // this lane's unit, and its next one
  bool is_done_ = false;
};

}  // namespace kvt
