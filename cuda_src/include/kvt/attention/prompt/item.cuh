// Items of work of the prompt kernel: 128 query rows of a sequence and kv head, and a range of tiles of its keys.
//
// A warpgroup has 64 rows, a half of an item: as many whole queries as fit with all heads of the group, or 64 heads of
// one query where the group has more. So a tensor copy brings a half, whatever the group is.
#pragma once

#include <kvt/attention/keys.cuh>
#include <kvt/base/warp.cuh>

namespace kvt {

constexpr int kHalfRows = 64;
constexpr int kLevelShift = 24;  // of a level, in the word that has an item's first query

// How the query rows of a sequence are cut into halves.
struct Halves {
  int group_size;
  int heads;      // of a half: all of the group, or kHalfRows
  int queries;    // of a half
  int per_query;  // halves of a query, where queries is 1
  int inverse;    // 2^16 / heads, rounded up

  __device__ __forceinline__ explicit Halves(const int (&sizes)[5])
      : group_size(sizes[0]), heads(sizes[1]), queries(sizes[2]), per_query(sizes[3]), inverse(sizes[4]) {}

  __device__ __forceinline__ int count(int num_queries) const {
    return per_query > 1 ? num_queries * per_query : (num_queries + queries - 1) / queries;
  }
  __device__ __forceinline__ int first_query(int half) const {
    return per_query > 1 ? half / per_query : half * queries;
  }
  __device__ __forceinline__ int first_head(int half) const { return per_query > 1 ? half % per_query * kHalfRows : 0; }
  // The query that a row of a half belongs to, counted from the half's first.
  __device__ __forceinline__ int query_of(int row) const { return row * inverse >> 16; }
};

// Strides in elements. Absent arrays are null.
struct alignas(64) PromptParams {
  long long query_map[16];  // tensor maps, each at a multiple of 64 bytes
  long long key_map[16];
  long long value_map[16];
  unsigned short* out;
  float* lse;
  unsigned short* unit_out;  // [levels, level_tokens, num_q_heads, head_dim]
  float* unit_lse;           // [levels, level_tokens, num_q_heads]
  const int* block_table;
  const float* alibi_slopes;
  const float* sinks;
  // [max_items][8], made by kvt_plan_prompts. A CTA loads an item before it knows whether it exists, so one item past the
  // last, and one for each CTA, must be readable.
  const int* items;
  const int* num_items;  // for each kv head
  unsigned* next_item;   // 0 between kernels
  unsigned* arrivals;    // [slots, num_kv_heads], all 0 between kernels
  float* partials;       // [slots, num_kv_heads, Partial::kFloats]
  long long out_token, out_head;
  long long table_row;
  int half_sizes[5];  // see Halves
  int num_kv_heads;
  int granules_per_block;
  int block_shift;       // log2(granules_per_block); -1 where it is no power of two
  int block_pitch;       // a granule's coordinates are block * block_pitch + its number in the block
  int coordinate_shift;  // bits of the number: 0 where granules are the map's blocks
  int num_map_blocks;
  int level_tokens;  // of unit_out, from level to level
  int left, right;   // keys seen before and after a query's position; -1 = all
  int list_is_old;   // the list of items was complete before the kernel in front of this one released it
  float scale_log2;  // softmax_scale * log2(e)
  float cap_inner;   // softmax_scale / softcap
  float cap_outer;   // softcap * log2(e); 0 = no cap
  // with KVT_TIERS: blocks of 64 tokens, see kvtoolkit/formats/quantized.py
  const unsigned char* warm;
  const unsigned char* cold;
};

struct alignas(64) Item {
  int first_query;  // of the sequence, in q | level << kLevelShift: 0 for rows, from 1 on for units, see shared.cu
  int num_queries;  // of the sequence
  int first_half;
  int sequence;  // row of the table
  int seq_len;
  int tiles;    // first | end << 16
  int parts;    // of the item's keys: which | how many << 16
  int slot;     // of the results of its first part
  int kv_head;  // -1: there is no more

  static constexpr int kWords = 9;

  // From the lanes of a warp; the compiler knows then that it is the same in all of them.
  __device__ __forceinline__ static Item from_lanes(int word) {
    const auto at = [&](int lane) { return __shfl_sync(kAllLanes, word, lane); };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
  }

  __device__ __forceinline__ bool exists() const { return kv_head >= 0; }
  // In q, and in the results of the item's level.
  __device__ __forceinline__ int first_token() const { return first_query & (1 << kLevelShift) - 1; }
  __device__ __forceinline__ int level() const { return first_query >> kLevelShift; }
  __device__ __forceinline__ int first_tile() const { return tiles & 0xFFFF; }
  __device__ __forceinline__ int end_tile() const { return static_cast<unsigned>(tiles) >> 16; }
  __device__ __forceinline__ int part() const { return parts & 0xFFFF; }
  __device__ __forceinline__ int num_parts() const { return parts >> 16; }
  __device__ __forceinline__ bool has_half(const Halves& halves, int half) const {
    return halves.first_query(first_half + half) < num_queries;
  }
  // Position of query number `query`. The queries of a unit come after all of its keys, so they count as at its end.
  __device__ __forceinline__ int position(int query) const {
    return level() > 0 ? seq_len : seq_len - num_queries + query;
  }
};

// How the parts of an item are merged. Many are merged in groups first, because everything waits for the CTA that merges
// last.
struct MergeRounds {
  static constexpr int kAtOnce = 4;

  int in_group;  // parts of a group; all, where there are few
  int groups;
  int first;    // part of this part's group
  int count;    // of its parts
  int counter;  // of arrivals in it

  __device__ __forceinline__ explicit MergeRounds(const Item& item) : in_group(kAtOnce) {
    const int parts = item.num_parts();
    while (in_group * in_group < parts) ++in_group;
    if (parts <= kAtOnce) in_group = parts;
    first = item.part() / in_group * in_group;
    groups = (parts + in_group - 1) / in_group;
    count = min(in_group, parts - first);
    counter = groups > 1 ? item.slot + 1 + first / in_group : item.slot;
  }
};

// The keys that the rows of an item see.
__device__ __forceinline__ KeyRange
keys_of_item(const Halves& halves, int left, int right, int seq_len, int num_queries, int first_half) {
  const int first = halves.first_query(first_half);
  const int last = min(num_queries, halves.first_query(first_half + 1) + halves.queries) - 1;
  const int position = seq_len - num_queries;
  return visible_keys(left, right, seq_len, position + first, position + last);
}

}  // namespace kvt
