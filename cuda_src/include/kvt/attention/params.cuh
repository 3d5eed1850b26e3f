// The parameters of the attention kernels.
#pragma once

namespace kvt {

// Packed by kvtoolkit/cuda/params.py, field by field in this order. Strides count elements. Absent arrays are null.
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
  unsigned* counters;        // all 0 between kernels
  unsigned* group_counters;  // one for each partial result, all 0 between kernels
  unsigned* mass_counters;   // [batch, num_kv_heads], all 0 between kernels
  const int4* ranges;        // made by kvt_plan, see plan.cu; null if the schedule is even
  const int2* sequences;
  float* masses;    // [batch, max_tiles, num_kv_heads], see decode/masses.cuh; lse is given then
  float* unit_lse;  // [batch, num_kv_heads, slots, unit_rows] log2, see decode/masses.cuh
  long long q_token, q_head, out_token, out_head;
  long long k_block, k_head, k_slot, v_block, v_head, v_slot;
  long long table_row;
  int batch, num_tokens, num_kv_heads, group_size, block_size;
  int max_blocks;      // of a row of block_table
  int block_shift;     // log2(block_size); -1 if that is no power of two
  int ids_per_step;    // block ids of 16 tokens that begin at a multiple of 16: 1 or 2; 0 = any number
  int left, right;     // keys seen before and after a query's position; -1 = all
  int max_splits;      // even schedule: CTAs for each block of rows
  int fixed_splits;    // even schedule: 1 = cut every sequence into max_splits; 0 = into as many as are worth it
  int num_row_blocks;  // planned schedule: most blocks of rows of a sequence
  int most_queries;    // sequences with more are left to another kernel
  int max_tiles;       // of masses
  int unit_rows;       // query rows of a kv head that unit_lse has room for, a multiple of 4
  int wait_first;      // 1: what this kernel reads may still be written when it begins
  float scale_log2;    // softmax_scale * log2(e)
  float cap_inner;     // softmax_scale / softcap
  float cap_outer;     // softcap * log2(e); 0 = no cap
};

// The same for sequences in tiers; the fields below are packed after those of AttentionParams.
struct TieredParams : AttentionParams {
  const unsigned char* warm;  // [num_blocks, num_kv_heads, 2 * kWarm bytes]
  const unsigned char* cold;  // [num_blocks, num_kv_heads, kCold bytes]
  const int4* units;          // [batch, max_units], made by kvt_units, see units.cu
  const int* num_units;       // [batch]
  const int* tile_units;      // [batch, max_units / 4 + 1] the first unit of each tile
  int max_units;
};

}  // namespace kvt
