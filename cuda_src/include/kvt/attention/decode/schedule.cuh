// Which pieces of work a decode CTA takes: the planned schedule (KVT_PLANNED) or the even one.
#pragma once

#include <kvt/attention/decode/shape.cuh>

namespace kvt {

constexpr int kPartial = kRows * (kHeadDim + 2);  // floats of a partial result: o, then m and l of each row

// The work of a block's sequence that CTAs share, counted in steps or in units. Each kernel defines it.
__device__ __forceinline__ StepRange work_of(const AttentionParams& p, const RowBlock& block);

// The first step or unit from `begin` on that this warp takes. It takes every kStride-th from there.
__device__ __forceinline__ int first_of_warp(int begin) {
  const int own = (kCluster > 1 ? blockIdx.x * kWarps : 0) + static_cast<int>(threadIdx.x >> 5);
  return begin + ((own - begin) & (kStride - 1));
}

// A block of rows, and the steps or units of its sequence that this CTA takes.
struct Piece {
  RowBlock block;
  int begin, end;
  int num_pieces;  // of the sequence
  int slot;        // of this piece among the partial results
  int first_slot;  // of the sequence's first piece

  // The slot of the sequence's k-th piece.
  __device__ __forceinline__ int slot_of(int k) const {
#if KVT_PLANNED
    return k == 0 ? first_slot : first_slot - 1 + 2 * k;
#else
    return first_slot + k;
#endif
  }
  // Which of the sequence's pieces this is.
  __device__ __forceinline__ int number() const { return KVT_PLANNED ? slot - first_slot + 1 >> 1 : slot - first_slot; }
};

#if KVT_PLANNED

// The pieces of one of the ranges that kvt_plan has cut the batch into. At most two pieces of a range belong to
// sequences that are cut: the first, if it continues a sequence, has slot 2 * range; the last, if it begins one, has
// slot 2 * range + 1.
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const AttentionParams& p)
      : begin_(p.ranges[blockIdx.z]), end_(p.ranges[blockIdx.z + 1]), sequence_(begin_.x) {}

  __device__ __forceinline__ bool next(const AttentionParams& p, Piece& piece) {
    while (sequence_ < end_.x || (sequence_ == end_.x && end_.y > 0)) {
      const int sequence = sequence_++;
      const int seq_len = kPlanHasLengths && sequence == begin_.x ? begin_.z : -1;
      piece.block = row_block_at<kRows>(p, sequence, blockIdx.y * kRows, seq_len);
      if (piece.block.num_rows == 0 || piece.block.num_queries > p.most_queries) continue;
      const StepRange steps = work_of(p, piece.block);
      const bool continues = sequence == begin_.x && begin_.y > 0;
      const bool is_cut = sequence == end_.x;
      piece.begin = steps.begin + (continues ? begin_.y : 0);
      piece.end = is_cut ? steps.begin + end_.y : steps.end;
      piece.num_pieces = 1;
      if (continues || is_cut) {
        const int2 cut = p.sequences[sequence];  // its first range, and how many pieces it is cut into
        piece.num_pieces = cut.y;
        piece.first_slot = 2 * cut.x + 1;
        piece.slot = 2 * blockIdx.z + (continues ? 0 : 1);
      }
      return true;
    }
    return false;
  }

  // The counter on which the CTAs that share a piece's sequence and block of rows arrive.
  __device__ __forceinline__ int counter(const AttentionParams& p, const Piece& piece) const {
    return (piece.block.sequence * p.num_row_blocks + blockIdx.y) * p.num_kv_heads + blockIdx.x;
  }

  // The place of a slot's partial result.
  __device__ __forceinline__ long long place(const AttentionParams& p, int slot) const {
    return (static_cast<long long>(slot) * p.num_row_blocks + blockIdx.y) * p.num_kv_heads + blockIdx.x;
  }

  __device__ __forceinline__ int kv_head() const { return blockIdx.x; }

 private:
  int4 begin_, end_;  // sequence, steps of it that belong to the range before, its length
  int sequence_;
};

#else

// One piece: a split of one sequence, independent of the rest of the batch. A cluster shares the only sequence.
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const AttentionParams& p) {
    if (kCluster > 1) {
      split_ = blockIdx.x;
      kv_head_ = blockIdx.y;
      index_ = blockIdx.z;
    } else {
      split_ = blockIdx.y;
      index_ = blockIdx.x / p.num_kv_heads;
      kv_head_ = blockIdx.x - index_ * p.num_kv_heads;
    }
  }

  __device__ __forceinline__ bool next(const AttentionParams& p, Piece& piece) {
    if (is_done_) return false;
    is_done_ = true;
    piece.block = find_row_block<kRows>(p, index_);
    if (piece.block.num_rows == 0 || piece.block.num_queries > p.most_queries) return false;
    const StepRange steps = work_of(p, piece.block);
    if (kCluster > 1) {  // the CTAs take steps in turn, so that where one begins does not depend on the length
      piece.begin = steps.begin;
      piece.end = steps.end;
      return true;
    }
    const int first_tile = steps.begin * kStep / kTile;
    const int num_tiles = (steps.end * kStep + kTile - 1) / kTile - first_tile;
    const int even_tiles = (num_tiles + p.max_splits - 1) / p.max_splits;
    const int split_tiles = max(1, p.fixed_splits ? even_tiles : max(even_tiles, kMinSplitTiles));
    piece.num_pieces = max(1, (num_tiles + split_tiles - 1) / split_tiles);
    piece.begin = max(steps.begin, (first_tile + split_ * split_tiles) * (kTile / kStep));
    piece.end = min(steps.end, (first_tile + (split_ + 1) * split_tiles) * (kTile / kStep));
    piece.first_slot = index_ * p.max_splits;
    piece.slot = piece.first_slot + split_;
    return split_ < piece.num_pieces;
  }

  __device__ __forceinline__ int counter(const AttentionParams& p, const Piece&) const {
    return index_ * p.num_kv_heads + kv_head_;
  }

  __device__ __forceinline__ long long place(const AttentionParams& p, int slot) const {
    return static_cast<long long>(slot) * p.num_kv_heads + kv_head_;
  }

  __device__ __forceinline__ int kv_head() const { return kv_head_; }

 private:
  int index_, split_, kv_head_;
  bool is_done_ = false;
};

#endif

}  // namespace kvt
