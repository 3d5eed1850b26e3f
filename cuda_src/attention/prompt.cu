// Attention of prompts and of any batch with more than a few new tokens, on sm_90a: 128 query rows of a sequence and kv
// head against a range of tiles of its keys, per item of work.
//
//   q            tensor map, dims (head_dim, q heads, tokens, 1, 1), box (64, heads and queries of a half, 1, 1)
//   keys         tensor map of the k_cache, dims (64, slots, chunks of 64 dims, kv heads, blocks), box (64, 8, chunks, 1, 1),
//                or (head_dim, slots, 1, kv heads, blocks), box (64, 8, 1, 1, 1); values the same
//   block_table  [batch, max_blocks] int32 block ids of granules_per_block * 8 tokens; with tiers a list of granules, see
//                expand.cu
//   warm, cold   with tiers: blocks of 64 tokens, see kvtoolkit/formats/quantized.py
//   items        see prompt/item.cuh and plan_prompts.cu
//   out          [num_tokens, num_q_heads, head_dim] scalar_t;     lse [num_tokens, num_q_heads] float32, natural log
//
// Launch:   grid = at most one CTA an SM, CTA 384: a warpgroup that loads, two that compute 64 rows each; with tiers 512:
//           one more that converts codes. Dynamic shared memory Layout::kBytes. Macros: KVT_HEAD_DIM, KVT_BF16, KVT_TIERS,
//           KVT_RULES (1: ALiBi, any scale; 2: softcap, too).
// How:      A granule of 8 tokens of 128 bytes is one atom of the 128-byte swizzle, so tensor copies bring blocks of any
//           multiple of 8 tokens to shared memory as wgmma wants them. Items are taken from a counter, longest first;
//           the first products of an item overlap with the end of the one before. Scores of the next tile are computed
//           while this one's weights multiply the values, and the two warpgroups take turns.
// Numerics: scores and running state in float32, weights in scalar_t; see prompt/softmax.cuh.
// Source:   Shah et al. 2024 (FlashAttention-3, arXiv:2407.08608), sec. 3; block tables, Kwon et al. 2023
//           (arXiv:2309.06180).
#include <kvt/attention/nonfinite.cuh>
#include <kvt/attention/prompt/load.cuh>
#if KVT_TIERS
#include <kvt/attention/prompt/load_tiers.cuh>
#endif
#include <kvt/attention/prompt/softmax.cuh>
#include <kvt/base/scalar.cuh>
#include <kvt/ptx/async_copy.cuh>
#include <kvt/ptx/cluster.cuh>
#include <kvt/ptx/wgmma.cuh>

namespace kvt {

// A number that is the same in the whole warp, and known to be so by the compiler.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }

// What a thread of the computing warpgroups holds, and what it does with it.
class Consumer {
 public:
  __device__ __forceinline__
  Consumer(const PromptParams& p, unsigned shared, const Item* items, int* is_last, Rings rings, int warp)
      : p_(p),
        halves_(p.half_sizes),
        shared_(shared),
        items_(items),
        is_last_(is_last),
        rings_(rings),
        group_((warp >> 2) - (kThreads - kConsumers) / 128),
        row_((warp & 3) * 16 + (lane_id() >> 2)),
        softmax_(KVT_RULES ? 1.0f : p.scale_log2) {}

  __device__ __forceinline__ void run() {
    if (group_ == 1) ptx::pass(kTurn, kConsumers);
    const Item* item_at = next_item();
    if (!uniform(item_at->exists())) return;
    wait_for_queries();
    rings_.keys.wait_full();
    ptx::pin(s_);
    ptx::fence_products();
    issue_scores();
    while (true) {
      const Item& item = *item_at;
      begin(item);
      const int first = uniform(item.first_tile());
      const int end = uniform(item.end_tile());
      ptx::wait_for_products<0>();
      ptx::pin(s_);
      release_keys();
      if (first == end - 1) release_queries();
      const bool has_rows = uniform(item.has_half(halves_, group_));
      if (has_rows) {
        apply_rules<true>(item, first);
        softmax_.absorb_and_raise(s_, weights_);
        int tile = first + 1;
        if (full_begin_ <= first * kKeys) {
          const int full_end = uniform(min(end, full_end_ / kKeys));
#pragma unroll 1
          for (; tile < full_end; ++tile) step<false>(item, tile, end);
        }
#pragma unroll 1
        for (; tile < end; ++tile) step<true>(item, tile, end);
      } else {
#pragma unroll 1
        for (int tile = first + 1; tile < end; ++tile) pass_on(item, tile, end);
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i) weights_[i] = 0;
      }
      rings_.values.wait_full();
      if (is_masked(end - 1)) clean_values(item, end - 1);
      ptx::pin(weights_);
      ptx::pin(o_);
      ptx::fence_products();
      issue_values();
      const Item* const next = next_item();
      const bool is_last = !uniform(next->exists());
      rings_.queries.advance();
      if (!is_last) {
        wait_for_queries();
        rings_.keys.wait_full();
      }
      ptx::pin(s_);
      ptx::fence_products();
      // after the last item too, on old data that nobody reads: a branch around a product would make the compiler
      // serialize all products
      issue_scores();
      ptx::wait_for_products<1>();
      ptx::pin(o_);
      release_values();
      if (has_rows || uniform(item.num_parts()) > 1) finish(item, has_rows);
      if (is_last) break;
      release_item();
      item_at = next;
    }
    ptx::wait_for_products<0>();
    ptx::pin(s_);
  }

 private:
  using Scores = ptx::Product<scalar_t, kKeys>;
  using Values = ptx::Product<scalar_t, kDims>;

  // Items stay in shared memory until they are finished: few of their words are needed often, and registers are short.
  __device__ __forceinline__ const Item* next_item() {
    rings_.items.wait_full();
    const Item* const item = items_ + rings_.items.stage;
    rings_.items.advance();
    return item;
  }

  __device__ __forceinline__ void release_item() {
    ptx::arrive(rings_.items.empty + 8 * finished_);  // every lane has read it
    finished_ = finished_ + 1 & kItemSlots - 1;
  }

  __device__ __forceinline__ void wait_for_queries() const { rings_.queries.wait_full(); }

  __device__ __forceinline__ void release_keys() { release(rings_.keys); }
  __device__ __forceinline__ void release_values() { release(rings_.values); }
  template <int kCount>
  __device__ __forceinline__ void release(Ring<kCount>& ring) {
    if (lane_id() == 0) ptx::arrive(ring.empty + 8 * ring.stage);
    ring.advance();
  }
  __device__ __forceinline__ void release_queries() const {
    if (lane_id() == 0) ptx::arrive(rings_.queries.empty + 8 * rings_.queries.stage);
  }

  // S = Q K^T for the tile that comes next.
  __device__ __forceinline__ void issue_scores() {
    const unsigned queries =
        shared_ + Layout::kQueries + group_ * kGroupQueryBytes + rings_.queries.stage * kQueryBytes;
    const unsigned long long q = ptx::swizzled_matrix(queries, 1024);
    const unsigned long long k =
        ptx::swizzled_matrix(shared_ + Layout::kKeyTiles + rings_.keys.stage * kTileBytes, kPieceBytes);
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      Scores::shared(s_, q + (d >> 2) * 512 + (d & 3) * 2, k + (d >> 2) * 64 + (d & 3) * 2, d > 0);
    }
    ptx::commit_products();
  }

  // O += P V for the tile that comes next.
  __device__ __forceinline__ void issue_values() {
    const unsigned long long v =
        ptx::swizzled_matrix(shared_ + Layout::kValueTiles + rings_.values.stage * kTileBytes, kPieceBytes, 1024);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      Values::registers(
          o_, weights_[4 * k], weights_[4 * k + 1], weights_[4 * k + 2], weights_[4 * k + 3],
          v + k * (2 * kPieceBytes >> 4));
    }
    ptx::commit_products();
  }

  // The query and the query head of one of this thread's rows.
  struct Row {
    int query;
    int q_head;
    bool exists;
  };

  __device__ __forceinline__ Row row_of(const Item& item, int r) const {
    const int half = item.first_half + group_;
    const int row = row_ + 8 * r;
    const int in_half = halves_.query_of(row);
    const int query = halves_.first_query(half) + in_half;
    const int head = halves_.first_head(half) + row - in_half * halves_.heads;
    const bool exists = in_half < halves_.queries && query < item.num_queries && head < halves_.group_size;
    return {query, item.kv_head * halves_.group_size + head, exists};
  }

  __device__ __forceinline__ void begin(const Item& item) {
    if (KVT_RULES) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Row row = row_of(item, r);
        slope_[r] = p_.alibi_slopes == nullptr || !row.exists ? 0.0f : p_.alibi_slopes[row.q_head] * kLog2E;
      }
    }
    const KeyRange keys = keys_of_item(
        halves_, p_.left, item.level() > 0 ? -1 : p_.right, item.seq_len, item.num_queries, item.first_half);
    full_begin_ = uniform(keys.full_begin);
    full_end_ = uniform(keys.full_end);
    softmax_.reset();
#pragma unroll
    for (int i = 0; i < kDims / 2; ++i) o_[i] = 0.0f;
  }

  // Not kept, since registers are short where it is not needed.
  __device__ __forceinline__ int position_of(const Item& item, int r) const {
    return item.position(min(row_of(item, r).query, item.num_queries - 1));
  }

  // Whether some row of the item, in either warpgroup, does not see all keys of a tile.
  __device__ __forceinline__ bool is_masked(int tile) const {
    return tile * kKeys < full_begin_ || (tile + 1) * kKeys > full_end_;
  }

  // From products to scores that rows see; where there are rules to apply, in log2.
  template <bool kMayMask>
  __device__ __forceinline__ void apply_rules(const Item& item, int tile) {
    const int first = tile * kKeys + 2 * (lane_id() & 3);
    if (KVT_RULES) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i)
        s_[i] = KVT_RULES == 2 ? capped(s_[i], p_.cap_inner, p_.cap_outer) : s_[i] * p_.scale_log2;
      if (p_.alibi_slopes != nullptr) {
        const float ahead[2] = {
            static_cast<float>(position_of(item, 0) - first), static_cast<float>(position_of(item, 1) - first)};
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          const int r = i >> 1 & 1;
          s_[i] -= slope_[r] * fabsf(ahead[r] - static_cast<float>((i >> 2) * 8 + (i & 1)));
        }
      }
    }
    if constexpr (kMayMask) {
      if (is_masked(tile)) mask(item, first);
    }
  }

  // Hide the keys that a row does not see; `first` is this lane's first key.
  __device__ __forceinline__ void mask(const Item& item, int first) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = position_of(item, r);
      const int last_key = p_.right < 0 ? item.seq_len - 1 : min(item.seq_len - 1, position + p_.right);
      const int end = last_key - first;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * j + e > end) s_[4 * j + 2 * r + e] = -kInfinity;
        }
      }
      if (p_.left >= 0) {
        const int begin = position - p_.left - first;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (8 * j + e < begin) s_[4 * j + 2 * r + e] = -kInfinity;
          }
        }
      }
    }
  }

  // The scores and weights of `tile`, while those of the one before multiply its values. kMayMask: of tiles that some
  // rows see a part of.
  template <bool kMayMask>
  __device__ __forceinline__ void step(const Item& item, int tile, int end) {
    rings_.keys.wait_full();
    if (kMayMask && is_masked(tile - 1)) {
      rings_.values.wait_full();
      clean_values(item, tile - 1);
    }
    ptx::meet(kTurn + group_, kConsumers);
    ptx::pin(s_);
    ptx::pin(weights_);
    ptx::fence_products();
    issue_scores();
    rings_.values.wait_full();
    ptx::pin(o_);
    ptx::fence_products();
    issue_values();
    ptx::pass(kTurn + (group_ ^ 1), kConsumers);
    ptx::wait_for_products<1>();
    ptx::pin(s_);
    release_keys();
    if (tile == end - 1) release_queries();
    apply_rules<kMayMask>(item, tile);
    unsigned next[kKeys / 4];
    softmax_.absorb(s_, next);
    ptx::wait_for_products<0>();
    ptx::pin(o_);
    ptx::pin(weights_);
    release_values();
    if (softmax_.raised) {
#pragma unroll
      for (int i = 0; i < kDims / 2; ++i) o_[i] *= softmax_.shrink[i >> 1 & 1];
    }
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) asm volatile("mov.b32 %0, %1;" : "=r"(weights_[i]) : "r"(next[i]));
  }

  // A step of a warpgroup that has no rows of the item.
  __device__ __forceinline__ void pass_on(const Item& item, int tile, int end) {
    rings_.keys.wait_full();
    rings_.values.wait_full();
    if (is_masked(tile - 1)) clean_values(item, tile - 1);
    ptx::meet(kTurn + group_, kConsumers);
    ptx::pass(kTurn + (group_ ^ 1), kConsumers);
    release_keys();
    if (tile == end - 1) release_queries();
    release_values();
  }

  // Rows of a tile share every value, and a weight of 0 times an infinity or NaN is NaN: so these go to the rows that
  // see them, and out of the product. Each warpgroup looks at the whole tile, since waiting for the other costs more;
  // both see the same, so where there is something to do they do it together.
  __device__ __forceinline__ void clean_values(const Item& item, int tile) {
    const unsigned values = shared_ + Layout::kValueTiles + rings_.values.stage * kTileBytes;
    const int thread = threadIdx.x & 127;
    const int num_keys = item.seq_len - tile * kKeys;  // slots past the sequence's end may hold anything
    if (num_keys < kKeys) {
#pragma unroll 1
      for (int at = threadIdx.x - (kThreads - kConsumers); at < kTileBytes / 16; at += kConsumers) {
        const int key = at / (kPieceBytes / 16) * 8 + (at >> 3 & 7);
        if (key >= num_keys) ptx::store_shared_16(values + at * 16, {0, 0, 0, 0});
      }
      ptx::fence_async_proxy();
      ptx::meet(kBothMet, kConsumers);
    }
    unsigned any = 0;
#pragma unroll 8
    for (int i = 0; i < kTileBytes / 16 / 128; ++i) any |= any_nonfinite<scalar_t>(values + (thread + i * 128) * 16);
    if (ptx::meet_any(kGroupMet + group_, 128, any != 0)) move_nonfinite(item, tile, values);
  }

  __device__ __forceinline__ void move_nonfinite(const Item& item, int tile, unsigned values) {
    ptx::meet(kBothMet, kConsumers);
    add_nonfinite(item, tile, values);
    ptx::meet(kBothMet, kConsumers);
#pragma unroll 1
    for (int i = threadIdx.x - (kThreads - kConsumers); i < kTileBytes / 16; i += kConsumers) {
      clear_nonfinite<scalar_t>(values + i * 16);
    }
    ptx::fence_async_proxy();
    ptx::meet(kBothMet, kConsumers);
  }

  __device__ __forceinline__ void add_nonfinite(const Item& item, int tile, unsigned values) {
    const int position[2] = {position_of(item, 0), position_of(item, 1)};
#pragma unroll 1
    for (int k = 0; k < kKeys; ++k) {
      const int key = tile * kKeys + k;
      bool sees[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sees[r] = key < item.seq_len && (p_.left < 0 || key >= position[r] - p_.left) &&
                  (p_.right < 0 || key <= position[r] + p_.right);
      }
      const unsigned row = values + (k >> 3) * kPieceBytes + (k & 7) * 128;
#pragma unroll
      for (int d = 0; d < kDims / 8; ++d) {
        const unsigned pair =
            ptx::load_shared_4(row + (d >> 3) * 1024 + (((d & 7) ^ (k & 7)) << 4) + (lane_id() & 3) * 4);
        const unsigned lost = pair & nonfinite_mask<scalar_t>(pair);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          o_[4 * d + 2 * r] += sees[r] ? scalar_t::low(lost) : 0.0f;
          o_[4 * d + 2 * r + 1] += sees[r] ? scalar_t::high(lost) : 0.0f;
        }
      }
    }
  }

  // A part of an item leaves its sums in memory; the CTA that is the last to do so merges them, in order. A half's sums
  // are as its threads hold them, 4 numbers of each thread side by side.
  struct Partial {
    static constexpr int kVectors = kDims / 8 + 1;  // of a thread: O, then m and l of its two rows
    static constexpr int kFloats = 2 * 128 * 4 * kVectors;
  };

  __device__ __forceinline__ float4* place_of(const Item& item, int part) const {
    const long long slot = static_cast<long long>(item.slot + part) * p_.num_kv_heads + item.kv_head;
    const int thread = threadIdx.x & 127;
    return reinterpret_cast<float4*>(p_.partials + slot * Partial::kFloats) + group_ * 128 * Partial::kVectors + thread;
  }

  // -> whether this CTA has the sums of all parts now.
  __device__ __forceinline__ bool merge_parts(const Item& item, bool has_rows, SoftmaxRow (&rows)[2]) {
    const MergeRounds rounds(item);
    if (!merge_some(item, has_rows, rows, item.part(), rounds.first, 1, rounds.count, rounds.counter)) return false;
    return rounds.groups == 1 ||
           merge_some(item, has_rows, rows, rounds.first, 0, rounds.in_group, rounds.groups, item.slot);
  }

  // Leave this CTA's sums at `part`; the last to do so merges `count` from `first` on.
  __device__ __forceinline__ bool merge_some(
      const Item& item, bool has_rows, SoftmaxRow (&rows)[2], int part, int first, int stride, int count, int counter) {
    if (count == 1) return true;
    if (has_rows) {
      float4* const own = place_of(item, part);
#pragma unroll
      for (int i = 0; i < kDims / 8; ++i) {
        own[i * 128] = make_float4(o_[4 * i], o_[4 * i + 1], o_[4 * i + 2], o_[4 * i + 3]);
      }
      own[kDims / 8 * 128] = make_float4(rows[0].m, rows[1].m, rows[0].l, rows[1].l);
      __threadfence();
    }
    ptx::meet(kBothMet, kConsumers);
    if (threadIdx.x == kThreads - 1) {
      unsigned* const arrivals = p_.arrivals + counter * p_.num_kv_heads + item.kv_head;
      const bool last = atomicAdd(arrivals, 1) == count - 1;
      if (last) *arrivals = 0;
      *is_last_ = last;
      __threadfence();
    }
    ptx::meet(kBothMet, kConsumers);
    if (*is_last_ == 0) return false;
    if (!has_rows) return true;
    rows[0] = rows[1] = SoftmaxRow();
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float4 state = __ldcg(place_of(item, first + i * stride) + kDims / 8 * 128);
      rows[0].m = fmaxf(rows[0].m, state.x);
      rows[1].m = fmaxf(rows[1].m, state.y);
    }
#pragma unroll
    for (int i = 0; i < kDims / 2; ++i) o_[i] = 0.0f;
#pragma unroll 1
    for (int at = 0; at < count; ++at) {
      const float4* const from = place_of(item, first + at * stride);
      const float4 state = __ldcg(from + kDims / 8 * 128);
      const float factor[2] = {ptx::exp2(state.x - base_of(rows[0].m)), ptx::exp2(state.y - base_of(rows[1].m))};
      rows[0].l += factor[0] * state.z;
      rows[1].l += factor[1] * state.w;
#pragma unroll
      for (int i = 0; i < kDims / 8; ++i) {
        const float4 x = __ldcg(from + i * 128);
        o_[4 * i] += factor[0] * x.x;
        o_[4 * i + 1] += factor[0] * x.y;
        o_[4 * i + 2] += factor[1] * x.z;
        o_[4 * i + 3] += factor[1] * x.w;
      }
    }
    return true;
  }

  __device__ __forceinline__ void finish(const Item& item, bool has_rows) {
    SoftmaxRow rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[r].m = softmax_.m[r] * softmax_.scale;
      rows[r].l = sum_over_columns(softmax_.l[r]);
    }
    if (item.num_parts() > 1 && !merge_parts(item, has_rows, rows)) return;
    if (!has_rows) return;
    const int t = lane_id() & 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto [query, q_head, exists] = row_of(item, r);
      float factor = 1.0f;
      if (p_.sinks != nullptr && exists && item.seq_len > 0) rows[r].absorb_sink(p_.sinks[q_head] * kLog2E, factor);
      factor = rows[r].normalizer(factor);
      const long long token = item.first_token() + query;
      const int num_q_heads = p_.num_kv_heads * halves_.group_size;
      const long long row = token * num_q_heads + q_head;
      unsigned short* to = p_.out + token * p_.out_token + q_head * p_.out_head + 8 * t;
      float* lse = p_.lse == nullptr ? nullptr : p_.lse + row;
      if (item.level() > 0) {
        const long long in_units = (item.level() - 1) * static_cast<long long>(p_.level_tokens) * num_q_heads + row;
        to = p_.unit_out + in_units * kHeadDim + 8 * t;
        lse = p_.unit_lse + in_units;
      }
#pragma unroll
      for (int b = 0; b < kDims / 32; ++b) {
        // lane t of 4 has dims 8d + 2t of 4 blocks of 8; it stores the whole block t
        unsigned x[4];
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          x[d] = scalar_t::pack(o_[16 * b + 4 * d + 2 * r] * factor, o_[16 * b + 4 * d + 2 * r + 1] * factor);
        }
        transpose_in_quad(x, t);
        if (exists && (kDims == kHeadDim || 32 * b + 8 * t < kHeadDim)) {
          *reinterpret_cast<uint4*>(to + 32 * b) = make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
      if (lse != nullptr && exists && t == 0) *lse = rows[r].lse();
    }
  }

  // x[d] of lane t becomes x[t] of lane d.
  __device__ __forceinline__ static void transpose_in_quad(unsigned (&x)[4], int t) {
    const auto swap = [&](unsigned& a, unsigned& b, int distance) {
      const bool upper = t & distance;
      const unsigned got = __shfl_xor_sync(kAllLanes, upper ? a : b, distance);
      (upper ? a : b) = got;
    };
    swap(x[0], x[1], 1);
    swap(x[2], x[3], 1);
    swap(x[0], x[2], 2);
    swap(x[1], x[3], 2);
  }

  const PromptParams& p_;
  Halves halves_;
  unsigned shared_;
  const Item* items_;
  int finished_ = 0;  // slot of the item under way
  int* is_last_;
  Rings rings_;
  int group_;  // 0 or 1
  int row_;    // of the warpgroup's; this thread has it and the one 8 below
  TileSoftmax<scalar_t, kKeys> softmax_;
  float slope_[2];
  int full_begin_, full_end_;
  float s_[kKeys / 2];
  float o_[kDims / 2];
  unsigned weights_[kKeys / 4];
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) kvt_prompt(const __grid_constant__ PromptParams p) {
  if (p.list_is_old && __ldg(p.num_items) == 0) {  // nothing to do, as early as that can be known
    ptx::wait_for_dependencies();                  // a kernel that waits for this one relies on the earlier ones, too
    return;
  }
  extern __shared__ __align__(1024) unsigned char memory[];
  const unsigned shared = ptx::shared_address(memory);
  const auto& query_map = reinterpret_cast<const ptx::TensorMap&>(p.query_map);
  const auto& key_map = reinterpret_cast<const ptx::TensorMap&>(p.key_map);
  const auto& value_map = reinterpret_cast<const ptx::TensorMap&>(p.value_map);
  const int warp = __shfl_sync(kAllLanes, threadIdx.x >> 5, 0);
  Item* const items = reinterpret_cast<Item*>(memory + Layout::kItems);
  const Rings rings(shared);
  if (threadIdx.x == 32) {
    ptx::prefetch_map(query_map);
    ptx::prefetch_map(key_map);
    ptx::prefetch_map(value_map);
  }
  if (threadIdx.x == 0) rings.init();
  __syncthreads();
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  if (warp < 4) {
    ptx::give_registers<kLoaderRegisters>();
#if KVT_TIERS
    if (warp == 0) {
      load_tiered_items<true>(p, query_map, key_map, shared, items, rings);
    } else if (warp == 1) {
      load_tiered_items<false>(p, query_map, value_map, shared, items, rings);
    }
  } else if (warp < 8) {
    ptx::give_registers<kConverterRegisters>();
    convert_items(p, shared, items, rings, warp - 4);
#else
    if (warp == 0) {
      load_items<0>(p, query_map, key_map, shared, items, rings, 0);
    } else if (warp == 2) {
      load_items<2>(p, query_map, key_map, shared, items, rings, 1);
    } else {
      load_items<1>(p, query_map, value_map, shared, items, rings, warp >> 1);
    }
#endif
  } else {
    ptx::take_registers<kConsumerRegisters>();
    Consumer(p, shared, items, reinterpret_cast<int*>(memory + Layout::kIsLast), rings, warp).run();
  }
}

}  // namespace kvt
