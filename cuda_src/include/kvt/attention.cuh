// What the attention kernels have in common: parameters, which rows a CTA has, which keys it sees, the score rule.
//
// The query rows of a sequence and kv head are its query tokens times the group's heads, one after the other:
// row = query * group_size + head. They share every byte of K and V, and are cut into blocks of rows.
#pragma once

#include <kvt/ptx/math.cuh>
#include <kvt/warp.cuh>

namespace kvt {

#define kInfinity __int_as_float(0x7F800000)  // NVRTC has no constant for it
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kTile = 64;            // positions; splits are cut at multiples of it
constexpr int kMaxDecodeQueries = 8;  // a row with more query tokens is a prefill

// Filled in by kvtoolkit/cuda/attention.py, in this order. Strides in elements. Absent arrays are null.
struct AttentionParams {
  const unsigned short* q;
  unsigned short* out;
  float* lse;
  const unsigned short* k_cache;
  const unsigned short* v_cache;
  const int* block_table;
  const int* seq_lens;
  const int* cu_seqlens_q;
  const float* alibi_slopes;
  const float* sinks;
  float* partials;
  unsigned* counters;      // all 0 between kernels
  unsigned* mass_counters;  // [batch, num_kv_heads], alike
  const int4* ranges;      // made by kvt_plan, see plan.cu; null where the schedule is even
  const int2* sequences;
  float* masses;           // [batch, max_tiles, num_kv_heads], see masses.cuh; lse is given then
  float* unit_lse;         // [batch, num_kv_heads, slots, unit_rows] log2, what the warps note of their units
  long long q_token, q_head, out_token, out_head;
  long long k_block, k_head, k_slot, v_block, v_head, v_slot;
  long long table_row;
  int batch, num_tokens, num_kv_heads, group_size, block_size;
  int max_blocks;          // of a row of block_table
  int block_shift;         // log2(block_size); -1 where it is no power of two
  int ids_per_step;        // block ids of 16 tokens that begin at a multiple of 16: 1, 2; 0 = any number
  int left, right;         // keys seen before and after a query's position; -1 = all
  int max_splits;          // even schedule: CTAs for each block of rows
  int fixed_splits;        // even schedule, 1: every sequence is cut into max_splits; 0: as many as are worth it
  int num_row_blocks;      // planned schedule: blocks of rows that a sequence may have
  int has_prefill;         // 1: sequences with more than kMaxDecodeQueries queries are another kernel's
  int max_tiles;           // of masses
  int unit_rows;           // query rows of a kv head that it has room for, a multiple of 4
  int wait_first;          // 1: whatever this kernel reads may still be written when it begins
  float scale_log2;     // softmax_scale * log2(e)
  float cap_inner;      // softmax_scale / softcap
  float cap_outer;      // softcap * log2(e); 0 = no cap
};

// One sequence of the batch and a block of its query rows.
struct RowBlock {
  int sequence;
  int first_token;    // of the sequence's queries, in q
  int num_queries;
  int first_row;      // of the block
  int num_rows;       // in the block; 0 = nothing to do
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

// The block of rows that begins at row `first_row` of a sequence, whose length may be known; -1 = look it up.
template <int kRows>
__device__ __forceinline__ RowBlock row_block_at(
    const AttentionParams& p, int sequence, int first_row, int seq_len = -1) {
  RowBlock block;
  block.sequence = sequence;
  block.first_token = p.cu_seqlens_q == nullptr ? sequence : p.cu_seqlens_q[sequence];
  block.num_queries = p.cu_seqlens_q == nullptr ? 1 : p.cu_seqlens_q[sequence + 1] - block.first_token;
  block.first_row = first_row;
  block.num_rows = max(0, min(kRows, block.num_queries * p.group_size - first_row));
  block.seq_len = seq_len >= 0 ? seq_len : p.seq_lens[sequence];
  return block;
}

// The block numbered `index` of all blocks of kRows rows. With cu_seqlens_q sequence b owns the numbers from
// cu[b] * group / kRows + b on, rounded down: always enough, and no sum over the batch is needed to find it.
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

// Where a row of a block lies in q and out: its token and its query head.
struct RowPlace {
  int token;
  int q_head;
};

__device__ __forceinline__ RowPlace place_of_row(const AttentionParams& p, const RowBlock& block, int kv_head, int row) {
  const int query = block.query(row, p.group_size);
  const int head = block.first_row + row - query * p.group_size;
  return {block.first_token + query, kv_head * p.group_size + head};
}

// The keys that a block of rows sees: those in [begin, end) by some row, those in [full_begin, full_end) by every row.
struct KeyRange {
  int begin, end;
  int full_begin, full_end;
};

__device__ __forceinline__ KeyRange visible_keys(int left, int right, int seq_len, int lowest, int highest) {
  KeyRange keys{0, seq_len, 0, seq_len};
  if (left >= 0) {
    keys.begin = max(0, lowest - left);
    keys.full_begin = max(0, highest - left);
  }
  if (right >= 0) {
    keys.end = min(seq_len, highest + right + 1);
    keys.full_end = min(seq_len, lowest + right + 1);
  }
  return keys;
}

__device__ __forceinline__ KeyRange visible_keys(const AttentionParams& p, const RowBlock& block) {
  const int lowest = block.position(0, p.group_size);
  const int highest = block.position(block.num_rows - 1, p.group_size);
  return visible_keys(p.left, p.right, block.seq_len, lowest, highest);
}

// The steps of kStep positions in which any query of a sequence sees a key; the same for all its blocks of rows.
constexpr int kStep = 16;

struct StepRange {
  int begin, end;  // end >= begin
};

__device__ __forceinline__ StepRange visible_steps(int left, int right, int seq_len, int num_queries) {
  const KeyRange keys = visible_keys(left, right, seq_len, seq_len - num_queries, seq_len - 1);
  const int begin = keys.begin / kStep;
  return {begin, max(begin, (keys.end + kStep - 1) / kStep)};
}

// Whether the query at `position` sees the key at `key`.
__device__ __forceinline__ bool is_visible(const AttentionParams& p, int position, int key, int seq_len) {
  return key < seq_len && (p.left < 0 || key >= position - p.left) && (p.right < 0 || key <= position + p.right);
}

// From q.k to the score in units of log2: scaled, capped.
__device__ __forceinline__ float scaled_score(const AttentionParams& p, float product) {
  if (p.cap_outer == 0.0f) return product * p.scale_log2;
  return p.cap_outer * tanhf(p.cap_inner * product);
}

}  // namespace kvt
