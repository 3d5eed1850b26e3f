// Where the tokens of a sequence lie: from positions to blocks and slots, by a row of block ids.
//
// Entries of several lengths come here as a list of granules (kvt_expand): block ids of 8 tokens.
#pragma once

#include <kvt/attention.cuh>

namespace kvt {

struct Place {
  int block;
  int slot;
};

// One lane on its own, any position below seq_len.
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

// A warp that takes every kStride-th step of 16 tokens. Where a step lies in one block, or in two of 8 tokens, the
// lanes hold the ids of the next 16 or 32 steps, and have those after them on the way: a look-up that is made when it
// is needed waits behind all the keys and values that have been asked for. Ids behind a sequence's end are loaded too,
// and not used, so that looking up need not wait for its length.
template <int kStride>
class StepBlocks {
 public:
  __device__ __forceinline__ StepBlocks(const AttentionParams& p, int sequence)
      : ids_(p, sequence), per_step_(p.ids_per_step), last_id_(p.max_blocks - 1) {}

  // The next look-up is of `step`.
  __device__ __forceinline__ void seek(int step) {
    used_ = 0;
    step_ = step;
    if (per_step_ > 0) {
      now_ = load(step);
      then_ = load(step + 32 / per_step_ * kStride);
    }
  }

  // The next step: the place of its token l % 16, for lane l, clamped to the sequence's last position.
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
  int per_step_;    // 1, 2; 0 = a look-up for every token
  int last_id_;
  int step_;
  int now_, then_;  // ids of this lane
  int used_;        // lanes whose ids have been used
};

}  // namespace kvt
