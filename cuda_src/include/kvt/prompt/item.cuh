// Items of work of the prompt kernel: 128 query rows of a sequence and kv head, and a range of tiles of its keys.
#pragma once

#include <kvt/attention.cuh>
#include <kvt/ptx/tensor_copy.cuh>

namespace kvt {

constexpr int kPromptRows = 128;  // of an item: two warpgroups of 64

// Filled in by kvtoolkit/cuda/prompt.py, in this order. Strides in elements. Absent arrays are null.
struct PromptParams {
  const unsigned short* q;
  unsigned short* out;
  float* lse;
  const int* block_table;
  const float* alibi_slopes;
  const float* sinks;
  const int4* items;         // [num_items][2], made by kvt_plan_prompts
  const int* num_items;      // for each kv head
  unsigned* next_item;       // 0 between kernels
  unsigned* arrivals;        // [slots, num_kv_heads], all 0 between kernels
  float* partials;           // [slots, num_kv_heads, Partial::kFloats]
  long long q_token, q_head, out_token, out_head;
  long long table_row;
  int num_kv_heads, group_size;
  int group_inverse;         // 2^20 / group_size, rounded up
  int granules_per_block;
  int block_pitch;           // a granule's coordinates are those of block * block_pitch + its number in the block
  int coordinate_shift;      // bits of the number: 0 where granules are the map's blocks
  int num_map_blocks;
  int left, right;           // keys seen before and after a query's position; -1 = all
  float scale_log2;          // softmax_scale * log2(e)
  float cap_inner;           // softmax_scale / softcap
  float cap_outer;           // softcap * log2(e); 0 = no cap
};

// As it is in memory, and in registers: the same in all lanes of a warp, and known to be so by the compiler, which else
// serializes products that depend on it.
struct Item {
  int first_token;   // of the sequence's queries, in q
  int first_row;     // of the item: query * group_size + head of the group
  int position;      // of the sequence's first query
  int sequence;
  int seq_len;
  int tiles;         // first | end << 16
  int rows_parts;    // rows | part << 8 | parts << 16
  int slot;          // of its parts' results: first of them
  int kv_head;       // -1: there is no more

  static constexpr int kWords = 9;

  __device__ __forceinline__ static Item from_lanes(int word) {
    const auto at = [&](int lane) { return __shfl_sync(kAllLanes, word, lane); };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
  }

  __device__ __forceinline__ bool exists() const { return kv_head >= 0; }
  __device__ __forceinline__ int first_tile() const { return tiles & 0xFFFF; }
  __device__ __forceinline__ int end_tile() const { return static_cast<unsigned>(tiles) >> 16; }
  __device__ __forceinline__ int num_rows() const { return rows_parts & 0xFF; }
  __device__ __forceinline__ int part() const { return rows_parts >> 8 & 0xFF; }
  __device__ __forceinline__ int num_parts() const { return static_cast<unsigned>(rows_parts) >> 16; }
};

// The query and the head of its group that a row of an item belongs to.
struct ItemRows {
  int first_query;
  int first_head;
  int group_size;
  int inverse;

  __device__ __forceinline__ ItemRows(const PromptParams& p, const Item& item)
      : first_query(item.first_row / p.group_size),
        first_head(item.first_row - first_query * p.group_size),
        group_size(p.group_size),
        inverse(p.group_inverse) {}

  __device__ __forceinline__ int query(int row) const {
    return first_query + static_cast<int>(static_cast<unsigned>((first_head + row) * inverse) >> 20);
  }
  __device__ __forceinline__ int head(int row, int query) const {
    return first_head + row - (query - first_query) * group_size;
  }
};

}  // namespace kvt
