// Where the tokens of a sequence are: from positions to blocks and slots, by a row of block ids.
//
// Entries of several lengths have been expanded to a list of granules by kvt_expand, that is, to ids of blocks of 8
// tokens.
#pragma once

#include <kvt/attention/keys.cuh>

namespace kvt {

struct Place {
  int block;
  int slot;
};

// Looks up one position below seq_len, for one lane.
struct BlockIds {
  const int* ids;
  int block_size;
  int shift;

  __device__ __forceinline__ BlockIds(const AttentionParams& p, int sequence)
      : ids(p.block_table + sequence * p.table_row), block_size(p.block_size), shift(p.block_shift) {}

  __device__ __forceinline__ int index_of(int position) const {
    return shift >= 0 ? position >> shift : position / block_size;
  }

  __device__ __forceinline__ Place operator()(int position) const {
    const int index = index_of(position);
    return {ids[index], position - index * block_size};
  }
};

// Looks up the steps of a warp that takes every kStride-th step of 16 tokens. If a step is in one block, or in two of 8
// tokens, the lanes hold the ids of the next 32 or 16 steps, and those after them are being loaded: a look-up made only
// when it is needed would wait for all the keys and values that have been requested before it. Ids past the end of a
// sequence are loaded too, but not used, so that a look-up need not wait for the sequence's length.
template <int kStride>
class StepBlocks {
 public:
  __device__ __forceinline__ StepBlocks(const AttentionParams& p, int sequence)
      : ids_(p, sequence), per_step_(p.ids_per_step), last_id_(p.max_blocks - 1) {}

  // Start at `step`.
  __device__ __forceinline__ void seek(int step) {
    used_ = 0;
    step_ = step;
    if (per_step_ > 0) {
      now_ = load(step);
      then_ = load(step + 32 / per_step_ * kStride);
    }
  }

  // The place of token l % 16 of the next step, for lane l. Positions are clamped to `last`, the sequence's last one.
  __device__ __forceinline__ Place next(int last) {
    const int first = step_ * kStep;
    const int position = min(first + (lane_id() & 15), last);
    step_ += kStride;
    if (per_step_ == 0) return ids_(position);
    if (used_ == 32) {
      used_ = 0;
      now_ = then_;
      then_ = load(step_ - kStride + 32 / per_step_ * kStride);
    }
    const int half = per_step_ == 2 ? (position - first) >> 3 : 0;
    const int block = __shfl_sync(kAllLanes, now_, used_ + half);
    used_ += per_step_;
    return {block, position - ids_.index_of(position) * ids_.block_size};
  }

 private:
  __device__ __forceinline__ int load(int step) const {
    const int lane = lane_id();
    const int ahead = per_step_ == 2 ? lane >> 1 : lane;
    const int position = (step + ahead * kStride) * kStep + (per_step_ == 2 ? (lane & 1) * 8 : 0);
    return last_id_ < 0 ? 0 : ids_.ids[min(ids_.index_of(position), last_id_)];
  }

  BlockIds ids_;
  int per_step_;  // block ids of a step: 1 or 2; 0 = look every token up
  int last_id_;
  int step_;
  int now_, then_;  // this lane's id, and its next one
  int used_;        // how many lanes' ids have been used
};

}  // namespace kvt
