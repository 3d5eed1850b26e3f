// The prefill kernel's parameters, its sizes, and its shared memory.
//
// Macros: KVT_HEAD_DIM, KVT_KEYS (keys of a tile), KVT_STAGES (tiles of keys in shared memory; as many of values).
#pragma once

#include <kvt/attention/prompt/item.cuh>

namespace kvt {

// Packed by kvtoolkit/cuda/prefill.py, field by field in this order. Strides count elements. Absent arrays are null.
struct PrefillParams {
  const unsigned short* q;
  unsigned short* out;
  const unsigned short* k_cache;
  const unsigned short* v_cache;
  float* lse;
  const int* block_table;
  const float* alibi_slopes;
  const float* sinks;
  const int* items;      // [max_items][8], made by kvt_plan_prompts
  const int* num_items;  // for each kv head
  unsigned* next_item;   // 0 between kernels
  unsigned* arrivals;    // [slots, num_kv_heads], all 0 between kernels
  float* partials;       // [slots, num_kv_heads, Partial::kFloats]
  long long q_token, q_head, out_token, out_head;
  long long k_block, k_head, k_slot, v_block, v_head, v_slot;
  long long table_row;
  int half_sizes[5];  // see Halves
  int num_kv_heads;
  int block_size;
  unsigned block_inverse;  // 2^(31 + block_shift) / block_size, rounded up
  int block_shift;         // log2(block_size), rounded up
  int tiles_per_planned;   // an item counts its keys in so many tiles
  int left, right;         // keys seen before and after a query's position; -1 = all
  float scale_log2;        // softmax_scale * log2(e)
  float cap_inner;         // softmax_scale / softcap
  float cap_outer;         // softcap * log2(e); 0 = no cap
};

constexpr int kHeadDim = KVT_HEAD_DIM;
constexpr int kKeys = KVT_KEYS;
constexpr int kStages = KVT_STAGES;
constexpr int kRows = 2 * kHalfRows;
constexpr int kRowTiles = kHeadDim <= 128 ? 2 : 1;  // of 16 rows, of a warp: more do not fit into registers
constexpr int kWarps = kRows / 16 / kRowTiles;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpKeys = kKeys / kWarps;  // of a tile, that a warp copies
constexpr int kDimBlocks = kHeadDim / 16;
constexpr int kChunks = kHeadDim / 8;                  // of 16 bytes, in a row
constexpr int kRowBytes = (kHeadDim + 63) / 64 * 128;  // of a row in shared memory
constexpr int kAskAhead = 3;                           // tiles before its end at which a CTA asks for its next item
static_assert(kHeadDim % 16 == 0, "an MMA covers 16 dims");

// Shared memory, in bytes from its beginning.
struct Layout {
  static constexpr int kQueries = 0;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kKeyTiles = kQueries + kRows * kRowBytes;
  static constexpr int kValueTiles = kKeyTiles + kStages * kTileBytes;
  static constexpr int kItems = kValueTiles + kStages * kTileBytes;
  static constexpr int kNext = kItems + 2 * sizeof(Item);  // number of the next item, then whether this CTA merges
  static constexpr int kBytes = kNext + 16;
};

// The address of chunk `half`, 0 or 1, of a row. Chunks are permuted so that the same chunk of 8 neighbouring rows is in
// 8 different bank groups, and ldmatrix has no bank conflicts.
__device__ __forceinline__ unsigned row_address(unsigned base, int row, int half) {
  return base + row * kRowBytes + ((half ^ (row & 7)) << 4);
}

// The address of chunk 2 * block + half of the same row.
__device__ __forceinline__ unsigned block_address(unsigned row, int block) {
  return (row ^ ((block & 3) << 5)) + (block >> 2) * 128;
}

__device__ __forceinline__ unsigned chunk_address(unsigned base, int row, int chunk) {
  return base + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

}  // namespace kvt
