// Which query rows a CTA has.
//
// The query rows of a sequence and kv head are its query tokens times the group's heads, one after the other:
// row = query * group_size + head. They share every byte of K and V, and are cut into blocks of rows.
#pragma once

#include <kvt/attention/params.cuh>
#include <kvt/base/warp.cuh>

namespace kvt {

// A block of the query rows of one sequence.
struct RowBlock {
  int sequence;
  int first_token;  // of the sequence's queries, in q
  int num_queries;  // of the sequence
  int first_row;    // of the block
  int num_rows;     // in the block; 0 = nothing to do
  int seq_len;

  // The query that a row of the block belongs to.
  __device__ __forceinline__ int query(int row, int group_size) const {
    return num_queries == 1 ? 0 : (first_row + row) / group_size;
  }

  // Its position.
  __device__ __forceinline__ int position(int row, int group_size) const {
    return seq_len - num_queries + query(row, group_size);
  }
};

// The block of rows that begins at row `first_row` of a sequence; seq_len = -1: look the length up.
template <int kRows>
__device__ __forceinline__ RowBlock
row_block_at(const AttentionParams& p, int sequence, int first_row, int seq_len = -1) {
  RowBlock block;
  block.sequence = sequence;
  block.first_token = p.cu_seqlens_q == nullptr ? sequence : p.cu_seqlens_q[sequence];
  block.num_queries = p.cu_seqlens_q == nullptr ? 1 : p.cu_seqlens_q[sequence + 1] - block.first_token;
  block.first_row = first_row;
  block.num_rows = max(0, min(kRows, block.num_queries * p.group_size - first_row));
  block.seq_len = seq_len >= 0 ? seq_len : p.seq_lens[sequence];
  return block;
}

// The block with number `index` among all blocks of kRows rows. With cu_seqlens_q the blocks of sequence b are numbered
// from floor(cu[b] * group_size / kRows) + b. That leaves room enough for each, some numbers stay unused, and a block
// is found without a sum over the batch.
template <int kRows>
__device__ __forceinline__ RowBlock find_row_block(const AttentionParams& p, int index) {
  if (p.cu_seqlens_q == nullptr) {
    const int per_sequence = (p.group_size + kRows - 1) / kRows;
    const int sequence = per_sequence == 1 ? index : index / per_sequence;
    return row_block_at<kRows>(p, sequence, (index - sequence * per_sequence) * kRows);
  }
  const auto first_of = [&](int b) {
    return static_cast<int>(static_cast<long long>(p.cu_seqlens_q[b]) * p.group_size / kRows) + b;
  };
  const int sequence = last_where(p.batch, [&](int b) { return first_of(b) <= index; });
  return row_block_at<kRows>(p, sequence, (index - first_of(sequence)) * kRows);
}

// Where a row is in q and out.
struct RowPlace {
  int token;
  int q_head;
};

__device__ __forceinline__ RowPlace
place_of_row(const AttentionParams& p, const RowBlock& block, int kv_head, int row) {
  const int query = block.query(row, p.group_size);
  const int head = block.first_row + row - query * p.group_size;
  return {block.first_token + query, kv_head * p.group_size + head};
}

}  // namespace kvt
