// Attention of prompts and of any batch with more than a few new tokens, on any architecture: 128 query rows of a
// sequence and kv head against a range of tiles of its keys, per item of work.
//
//   q            [num_tokens, num_q_heads, head_dim]               scalar_t, rows of 16 bytes aligned
//   k_cache      block, kv head and slot by strides, head_dim contiguous, rows aligned to 16 bytes; v_cache the same
//   block_table  [batch, max_blocks] int32 block ids; entries come as a list of granules, see expand.cu
//   items        see prompt/item.cuh and plan_prompts.cu
//   out          [num_tokens, num_q_heads, head_dim] scalar_t;     lse [num_tokens, num_q_heads] float32, natural log
//
// Launch:   grid = as many CTAs as run at once, CTA kThreads, dynamic shared memory Layout::kBytes. sm_80 and later.
//           Macros: KVT_HEAD_DIM, KVT_BF16, KVT_RULES (1: softcap, ALiBi, any scale), KVT_KEYS, KVT_STAGES, KVT_PER_SM.
// How:      A warp has 32 rows, so that what it loads from shared memory serves two products. While it computes scores,
//           values are on their way, and keys while it multiplies by values. Two CTAs share an SM: one's softmax runs
//           beside the other's products.
// Numerics: scores and running state in float32, weights in scalar_t; see prompt/softmax.cuh.
// Source:   Dao 2023 (FlashAttention-2, arXiv:2307.08691), sec. 3; block tables, Kwon et al. 2023 (arXiv:2309.06180).
//           Unlike FlashAttention-2, a CTA takes the rows of a whole group of heads, so that it reads K and V once.
#include <kvt/attention/nonfinite.cuh>
#include <kvt/attention/prefill/feed.cuh>
#include <kvt/attention/prompt/softmax.cuh>
#include <kvt/base/scalar.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

// What a thread holds of its rows, and what it does with them.
class Rows {
 public:
  __device__ __forceinline__ Rows(const PrefillParams& p, unsigned shared, int* is_last)
      : p_(p), halves_(p.half_sizes), shared_(shared), is_last_(is_last) {
    const int lane = lane_id();
    const int warp = __shfl_sync(kAllLanes, threadIdx.x >> 5, 0);
    first_row_ = warp * 16 * kRowTiles;
    query_at_ = row_address(shared + Layout::kQueries, first_row_ + (lane & 15), lane >> 4);
    key_at_ = row_address(shared + Layout::kKeyTiles, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
    value_at_ = row_address(shared + Layout::kValueTiles, lane & 15, lane >> 4);
  }

  __device__ __forceinline__ void begin(const Item& item) {
    const KeyRange keys = keys_of_item(halves_, p_.left, p_.right, item.seq_len, item.num_queries, item.first_half);
    full_begin_ = keys.full_begin;
    full_end_ = keys.full_end;
    has_rows_ = QueryRow(halves_, item, first_row_).exists;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      softmax_[i].reset();
#pragma unroll
      for (int j = 0; j < 2 * kDimBlocks; ++j) o_[i][j][0] = o_[i][j][1] = o_[i][j][2] = o_[i][j][3] = 0.0f;
    }
  }

  // Weights of the keys of a tile.
  __device__ __forceinline__ void absorb_keys(const Item& item, int tile) {
    if (!has_rows_) return;
    float s[kRowTiles][kKeys / 2];
    multiply_keys(s, key_at_ + (tile & (kStages - 1)) * Layout::kTileBytes);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      apply_rules(item, tile, i, s[i]);
      softmax_[i].absorb(s[i], weights_[i]);
      if (softmax_[i].raised) {
#pragma unroll
        for (int j = 0; j < 8 * kDimBlocks; ++j) o_[i][j >> 2][j & 3] *= softmax_[i].shrink[j >> 1 & 1];
      }
    }
  }

  // O += P V for the same tile, by all threads.
  __device__ __forceinline__ void absorb_values(const Item& item, int tile) {
    const unsigned offset = (tile & (kStages - 1)) * Layout::kTileBytes;
    if (is_masked(tile)) clean_values(item, tile, shared_ + Layout::kValueTiles + offset);
    if (has_rows_) multiply_values(value_at_ + offset);
  }

  __device__ __forceinline__ void finish(const Item& item) {
    SoftmaxRow rows[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows[i][r].m = softmax_[i].m[r] * softmax_[i].scale;
        rows[i][r].l = sum_over_columns(softmax_[i].l[r]);
      }
    }
    if (item.num_parts() > 1 && !merge_parts(item, rows)) return;
    if (!has_rows_) return;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) write_row(item, i, r, rows[i][r]);
    }
  }

 private:
  // This thread's rows of tile i are g and g + 8 of its 16, for g = lane / 4.
  __device__ __forceinline__ QueryRow row_of(const Item& item, int i, int r) const {
    return QueryRow(halves_, item, first_row_ + 16 * i + 8 * r + (lane_id() >> 2));
  }
  __device__ __forceinline__ int position_of(const Item& item, int i, int r) const {
    return item.position(min(row_of(item, i, r).query, item.num_queries - 1));
  }

  // Whether some row of the item does not see all keys of a tile.
  __device__ __forceinline__ bool is_masked(int tile) const {
    return tile * kKeys < full_begin_ || (tile + 1) * kKeys > full_end_;
  }

  __device__ __forceinline__ void multiply_keys(float (&s)[kRowTiles][kKeys / 2], unsigned keys) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kKeys / 2; ++j) s[i][j] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < kDimBlocks; ++d) {
      unsigned a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::load_matrices(a[i], block_address(query_at_, d) + i * 16 * kRowBytes);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        unsigned b[4];
        ptx::load_matrices(b, block_address(keys, d) + n * 16 * kRowBytes);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply(s[i] + 8 * n, a[i], b[0], b[1]);
          multiply(s[i] + 8 * n + 4, a[i], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_values(unsigned values) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int d = 0; d < kDimBlocks; ++d) {
        unsigned b[4];
        ptx::load_matrices_transposed(b, block_address(values, d) + n * 16 * kRowBytes);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          // weights are already as an operand has them
          multiply(o_[i][2 * d], weights_[i] + 4 * n, b[0], b[1]);
          multiply(o_[i][2 * d + 1], weights_[i] + 4 * n, b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ static void multiply(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    scalar_t::multiply_add(reinterpret_cast<float (&)[4]>(*c), a[0], a[1], a[2], a[3], b0, b1);
  }

  // From products to scores that rows see; where there are rules to apply, in log2.
  __device__ __forceinline__ void apply_rules(const Item& item, int tile, int i, float (&s)[kKeys / 2]) const {
    const int first = tile * kKeys + 2 * (lane_id() & 3);
    if (KVT_RULES) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const QueryRow row = row_of(item, i, r);
        const float slope = p_.alibi_slopes == nullptr || !row.exists ? 0.0f : p_.alibi_slopes[row.q_head] * kLog2E;
        const float ahead = static_cast<float>(position_of(item, i, r) - first);
#pragma unroll
        for (int j = 0; j < kKeys / 4; ++j) {
          float& x = s[(j >> 1) * 4 + 2 * r + (j & 1)];
          x = p_.cap_outer == 0.0f ? x * p_.scale_log2 : capped(x, p_.cap_inner, p_.cap_outer);
          x -= slope * fabsf(ahead - static_cast<float>((j >> 1) * 8 + (j & 1)));
        }
      }
    }
    if (is_masked(tile)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) mask(item, position_of(item, i, r), first, r, s);
    }
  }

  // Hide the keys that a row does not see; `first` is this lane's first key.
  __device__ __forceinline__ void mask(const Item& item, int position, int first, int r, float (&s)[kKeys / 2]) const {
    const int last_key = p_.right < 0 ? item.seq_len - 1 : min(item.seq_len - 1, position + p_.right);
    const int end = last_key - first;
    const int begin = p_.left < 0 ? -kKeys : position - p_.left - first;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * j + e > end || 8 * j + e < begin) s[4 * j + 2 * r + e] = -kInfinity;
      }
    }
  }

  // Rows share every value of a tile, and a weight of 0 times an infinity or NaN is NaN: so these go to the rows that see
  // them, and out of the product.
  __device__ __forceinline__ void clean_values(const Item& item, int tile, unsigned values) {
    const auto piece = [&](int i) { return chunk_address(values, i / kChunks, i % kChunks); };
    unsigned any = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) any |= any_nonfinite<scalar_t>(piece(i));
    if (!__syncthreads_or(any != 0)) return;
    if (has_rows_) add_nonfinite(item, tile, values);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) clear_nonfinite<scalar_t>(piece(i));
    __syncthreads();
  }

  __device__ __forceinline__ void add_nonfinite(const Item& item, int tile, unsigned values) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int position = position_of(item, i, r);
#pragma unroll 1
        for (int k = 0; k < kKeys; ++k) {
          const int key = tile * kKeys + k;
          if (key >= item.seq_len || (p_.left >= 0 && key < position - p_.left) ||
              (p_.right >= 0 && key > position + p_.right)) {
            continue;
          }
#pragma unroll
          for (int d = 0; d < 2 * kDimBlocks; ++d) {
            const unsigned pair = ptx::load_shared_4(chunk_address(values, k, d) + (lane_id() & 3) * 4);
            const unsigned lost = pair & nonfinite_mask<scalar_t>(pair);
            o_[i][d][2 * r] += scalar_t::low(lost);
            o_[i][d][2 * r + 1] += scalar_t::high(lost);
          }
        }
      }
    }
  }

  // A part of an item leaves its sums in memory; the CTA that is the last to do so merges them, in order. Sums are as
  // threads hold them, 4 numbers of each thread side by side.
  struct Partial {
    static constexpr int kOfTile = 2 * kDimBlocks + 1;  // vectors: O, then m and l of two rows
    static constexpr int kFloats = kThreads * kRowTiles * kOfTile * 4;
  };

  __device__ __forceinline__ float4* place_of(const Item& item, int part, int i) const {
    const long long slot = static_cast<long long>(item.slot + part) * p_.num_kv_heads + item.kv_head;
    return reinterpret_cast<float4*>(p_.partials + slot * Partial::kFloats) + i * Partial::kOfTile * kThreads +
           threadIdx.x;
  }

  // -> whether this CTA has the sums of all parts now.
  __device__ __forceinline__ bool merge_parts(const Item& item, SoftmaxRow (&rows)[kRowTiles][2]) {
    const MergeRounds rounds(item);
    if (!merge_some(item, rows, item.part(), rounds.first, 1, rounds.count, rounds.counter)) return false;
    return rounds.groups == 1 || merge_some(item, rows, rounds.first, 0, rounds.in_group, rounds.groups, item.slot);
  }

  // Leave this CTA's sums at `part`; the last to do so merges `count` from `first` on.
  __device__ __forceinline__ bool merge_some(
      const Item& item, SoftmaxRow (&rows)[kRowTiles][2], int part, int first, int stride, int count, int counter) {
    if (count == 1) return true;
    if (has_rows_) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) leave(place_of(item, part, i), i, rows[i]);
      __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* const arrivals = p_.arrivals + counter * p_.num_kv_heads + item.kv_head;
      const bool last = atomicAdd(arrivals, 1) == count - 1;
      if (last) *arrivals = 0;
      *is_last_ = last;
      __threadfence();
    }
    __syncthreads();
    if (*is_last_ == 0) return false;
    if (!has_rows_) return true;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      collect(place_of(item, first, i), static_cast<long long>(stride) * p_.num_kv_heads, i, count, rows[i]);
    }
    return true;
  }

  __device__ __forceinline__ void leave(float4* to, int i, const SoftmaxRow (&rows)[2]) const {
#pragma unroll
    for (int j = 0; j < 2 * kDimBlocks; ++j) {
      to[j * kThreads] = make_float4(o_[i][j][0], o_[i][j][1], o_[i][j][2], o_[i][j][3]);
    }
    to[2 * kDimBlocks * kThreads] = make_float4(rows[0].m, rows[1].m, rows[0].l, rows[1].l);
  }

  // `stride` slots are between one part and the next.
  __device__ __forceinline__ void collect(
      const float4* from, long long stride, int i, int count, SoftmaxRow (&rows)[2]) {
    stride *= Partial::kFloats / 4;
    const float4* const states = from + 2 * kDimBlocks * kThreads;
    rows[0] = rows[1] = SoftmaxRow();
#pragma unroll 4
    for (int at = 0; at < count; ++at) {
      const float4 state = __ldcg(states + at * stride);
      rows[0].m = fmaxf(rows[0].m, state.x);
      rows[1].m = fmaxf(rows[1].m, state.y);
    }
#pragma unroll
    for (int j = 0; j < 2 * kDimBlocks; ++j) o_[i][j][0] = o_[i][j][1] = o_[i][j][2] = o_[i][j][3] = 0.0f;
#pragma unroll 1
    for (int at = 0; at < count; ++at) {
      const float4 state = __ldcg(states + at * stride);
      const float factor[2] = {ptx::exp2(state.x - base_of(rows[0].m)), ptx::exp2(state.y - base_of(rows[1].m))};
      rows[0].l += factor[0] * state.z;
      rows[1].l += factor[1] * state.w;
#pragma unroll
      for (int j = 0; j < 2 * kDimBlocks; ++j) {
        const float4 x = __ldcg(from + at * stride + j * kThreads);
        o_[i][j][0] += factor[0] * x.x;
        o_[i][j][1] += factor[0] * x.y;
        o_[i][j][2] += factor[1] * x.z;
        o_[i][j][3] += factor[1] * x.w;
      }
    }
  }

  __device__ __forceinline__ void write_row(const Item& item, int i, int r, SoftmaxRow state) const {
    const QueryRow row = row_of(item, i, r);
    float factor = 1.0f;
    if (p_.sinks != nullptr && row.exists && item.seq_len > 0) state.absorb_sink(p_.sinks[row.q_head] * kLog2E, factor);
    factor = state.normalizer(factor);
    const long long token = item.first_token() + row.query;
    const int t = lane_id() & 3;
    // of two blocks of 8 dims lane t has dims 2t and 2t + 1; it stores 4 of block t % 2
    unsigned short* const to = p_.out + token * p_.out_token + row.q_head * p_.out_head + 8 * (t & 1) + 4 * (t >> 1);
#pragma unroll
    for (int d = 0; d < kDimBlocks; ++d) {
      unsigned x[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        x[j] = scalar_t::pack(o_[i][2 * d + j][2 * r] * factor, o_[i][2 * d + j][2 * r + 1] * factor);
      }
      const unsigned got = __shfl_xor_sync(kAllLanes, t & 1 ? x[0] : x[1], 1);
      if (row.exists) {
        *reinterpret_cast<uint2*>(to + 16 * d) = t & 1 ? make_uint2(got, x[1]) : make_uint2(x[0], got);
      }
    }
    if (p_.lse != nullptr && row.exists && t == 0) {
      p_.lse[token * p_.num_kv_heads * halves_.group_size + row.q_head] = state.lse();
    }
  }

  const PrefillParams& p_;
  Halves halves_;
  unsigned shared_;
  int* is_last_;
  int first_row_;                          // of the warp
  unsigned query_at_, key_at_, value_at_;  // this lane's row of the first matrices
  int full_begin_, full_end_;              // every row of the item sees the keys between
  bool has_rows_;                          // the warp
  TileSoftmax<scalar_t, kKeys> softmax_[kRowTiles] = {
      TileSoftmax<scalar_t, kKeys>(KVT_RULES ? 1.0f : p_.scale_log2),
#if KVT_HEAD_DIM <= 128
      TileSoftmax<scalar_t, kKeys>(KVT_RULES ? 1.0f : p_.scale_log2),
#endif
  };
  float o_[kRowTiles][2 * kDimBlocks][4];
  unsigned weights_[kRowTiles][kKeys / 4];
};

extern "C" __global__ void __launch_bounds__(kThreads, KVT_PER_SM)
    kvt_prefill(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const unsigned shared = ptx::shared_address(memory);
  Item* const items = reinterpret_cast<Item*>(memory + Layout::kItems);
  int* const next = reinterpret_cast<int*>(memory + Layout::kNext);
  ptx::wait_for_dependencies();
  const ItemQueue queue(p, items, next);
  TileFeed feed(p, shared);
  Rows rows(p, shared, next + 1);

  queue.fetch(blockIdx.x, 0);
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
  __syncthreads();
  int buffer = 0;
  if (!items[0].exists()) return;
  feed.start(items[0], first_tile_of(p, items[0]), end_tile_of(p, items[0]));
  while (true) {
    const Item& item = items[buffer];
    const int first = first_tile_of(p, item);
    const int end = end_tile_of(p, item);
    rows.begin(item);
#pragma unroll 1
    for (int tile = first; tile < end; ++tile) {
      // this tile's keys are there, and all warps are done with the values that the next copies overwrite
      ptx::wait_for_copies<2 * kStages - 2>();
      __syncthreads();
      feed.copy_values(item, tile + kStages - 1, end);
      if (tile == max(first, end - kAskAhead)) queue.ask();
      rows.absorb_keys(item, tile);
      ptx::wait_for_copies<2 * kStages - 2>();
      __syncthreads();
      if (tile == end - 1) queue.fetch_next(buffer ^ 1);
      feed.copy_keys(item, tile + kStages, end);
      rows.absorb_values(item, tile);
    }
    ptx::wait_for_copies<0>();
    __syncthreads();
    const Item& next_item = items[buffer ^ 1];
    const bool is_last = !next_item.exists();
    // its first tiles come while this one's results are written
    if (!is_last) feed.start(next_item, first_tile_of(p, next_item), end_tile_of(p, next_item));
    rows.finish(item);
    if (is_last) break;
    buffer ^= 1;
  }
}

}  // namespace kvt
