// Tiered decode: as decode.cu, over sequences whose tokens lie in a 16-bit, an int8 and an int4 tier, with one softmax.
//
//   q, k_cache, v_cache, seq_lens, out, lse   as in decode.cu; the caches are the hot tier, [num_granules, ...]
//   warm, cold     blocks of 64 tokens, see kvtoolkit/formats/quantized.py
//   units          the units that each sequence's queries see, see kvt/tiers.cuh and units.cu
//
// Launch:   as decode.cu without clusters; dynamic shared memory for FIFOs of units, then the warps' results. head_dim 64
//           or 128. sm_80 and later. A further macro: KVT_SPLIT_ROWS (1: no sequence has more than 4 query rows to a
//           kv head).
// Numerics: scores and running state in float32; the weights of the hot tier in scalar_t, those of codes in float16,
//           whatever the model has. Scales never touch a code: a channel's key scale goes into the query, a token's into
//           its score or its weight.
// Source:   as decode.cu; codes as subnormal halves and the zero as a product with a constant are our own.
//
// A weight is exp2(score - m) where m is a reference that the scores pass by at most kHeadroom: it moves, and what was
// summed up is rescaled, only where a score is above that, so most units need no reduction over their tokens.
#define KVT_TIERED 1
#define KVT_CLUSTER 1
#include <kvt/decode.cuh>
#include <kvt/masses.cuh>
#include <kvt/ptx/async_copy.cuh>
#include <kvt/ptx/cluster.cuh>
#include <kvt/ptx/codes.cuh>
#include <kvt/ptx/matrix.cuh>
#include <kvt/tiers.cuh>

namespace kvt {

using Half = ptx::Half;
using Sizes = Bytes<kHeadDim>;
constexpr int kChunks = kHeadDim / 8;                // of 16 bytes, in a hot token's row
constexpr int kHotHalf = kStep * kChunks * 16;       // bytes of K, then as many of V
constexpr int kStageBytes = Sizes::kCold;            // the largest unit
constexpr int kFifoBytes = kWarps * kStages * kStageBytes;
using WarpStates = Scratch<kFifoBytes, kStateFloats>;
static_assert(kHeadDim == 64 || kHeadDim == 128, "pieces of keys are pairs of 32 dims");
static_assert(2 * kHotHalf <= kStageBytes && Sizes::kWarm <= kStageBytes, "a stage holds any unit");
static_assert(kStageBytes % 128 == 0, "stages begin at multiples of 128");

constexpr unsigned kEven = 0x000F000Fu;              // nibbles 0 and 4: codes times 2^-24
constexpr unsigned kOdd = 0x00F000F0u;               // nibbles 1 and 5: codes times 2^-20
constexpr unsigned kMinus8Even = 0x80088008u;        // -8 as such codes
constexpr unsigned kMinus8Odd = 0x80808080u;
constexpr unsigned kMinus128 = 0x80808080u;          // as codes of int8
constexpr unsigned kMiddle = 0x58005800u;            // 128 as a half: the zero point of int8
constexpr float kCode = 1.0f / (1 << 24);
constexpr float kCodeBy4 = 1.0f / (1 << 22);         // scales are stored times 4
constexpr bool kSplitRows = KVT_SPLIT_ROWS;           // at most 4 query rows; columns 4 to 7 repeat them
constexpr float kHeadroom = 6.0f;
constexpr float kSlack = 2.0f;                       // how far the reference stays below the score that moved it

// What the CTAs share of a sequence: the units of its list.
__device__ __forceinline__ StepRange work_of(const AttentionParams& p, const RowBlock& block) {
  return {0, static_cast<const TieredParams&>(p).num_units[block.sequence]};
}

__device__ __forceinline__ int first_unit(const AttentionParams& p, int sequence, StepRange, int tile) {
  const TieredParams& tiered = static_cast<const TieredParams&>(p);
  return tiered.tile_units[static_cast<long long>(sequence) * (tiered.max_units / 4 + 1) + tile];
}

// The running softmax where some of the values come as codes.
//   out = o * (in_codes ? 1 / kCodeBy4 : 1) / l
struct TieredState : State {
  bool in_codes = false;       // o is a sum of weight * scale * 4 * (code - zero point)

  // Let o count in codes or not; exact, the factor is a power of two.
  __device__ __forceinline__ void count_in(bool codes) {
    if (codes == in_codes) return;
    const float factor = codes ? kCodeBy4 : 1.0f / kCodeBy4;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int d = 0; d < kDimBlocks; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[r][d][i] *= factor;
      }
    }
    in_codes = codes;
  }

  __device__ __forceinline__ void rescale(int r, int c, float factor) {
    l[r][c] *= factor;
#pragma unroll
    for (int d = 0; d < kDimBlocks; ++d) {
      o[r][d][c] *= factor;
      o[r][d][c + 2] *= factor;
    }
  }

  // Take a unit's zero points off, before its codes come: o stays as small as what it stands for, so that a long
  // sequence of codes loses nothing in the roundings of its sum.
  __device__ __forceinline__ void take_points(int r, const float (&points)[4]) {
#pragma unroll
    for (int d = 0; d < kDimBlocks; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[r][d][i] -= kCode * points[i];
    }
  }
};

// The fragments of a block's queries as halves, and what int8 scores begin with: the query times -128 in every dim.
struct CodeQueries {
  uint4 q[kRowTiles][kDimPairs];
  float start[kRowTiles][2];

  __device__ __forceinline__ void make(const Queries& queries) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int d = 0; d < kDimPairs; ++d) {
        const uint4 from = queries.q[r][d];
#if KVT_BF16
        const auto to_half = [](unsigned pair) { return Half::pack(scalar_t::low(pair), scalar_t::high(pair)); };
        q[r][d] = {to_half(from.x), to_half(from.y), to_half(from.z), to_half(from.w)};
#else
        q[r][d] = from;
#endif
        Half::multiply_add(sum, kMinus128, kMinus128, kMinus128, kMinus128, q[r][d].x, q[r][d].y);
        Half::multiply_add(sum, kMinus128, kMinus128, kMinus128, kMinus128, q[r][d].z, q[r][d].w);
      }
      start[r][0] = sum[0];
      start[r][1] = sum[1];
    }
  }
};

// What a warp knows while it goes through the units of a piece.
struct Walk {
  const TieredParams& p;
  const Columns& columns;
  KeyRange keys;
  int seq_len;
  float to_log2;      // from q.k to the score, where there is no cap
  int unit;           // the present one's number in the list
  Notes notes;

  // Whether some row does not see all of the tokens from `first` on.
  __device__ __forceinline__ bool is_partial(int first, int num_tokens) const {
    return first < keys.full_begin || first + num_tokens > keys.full_end;
  }

  // Whether the row of column 2t + c sees the token at `position`.
  __device__ __forceinline__ bool sees(int r, int c, int position) const {
    return is_visible(p, columns.position[r][c], position, seq_len);
  }
};

// Copy a unit to a stage.
__device__ __forceinline__ void copy_unit(
    const TieredParams& p, int kv_head, int seq_len, unsigned stage, Unit unit, unsigned long long policy) {
  const int lane = lane_id();
  if (unit.tier() == Tier::kHot) {
    // lanes 0-15 work out where the keys lie, lanes 16-31 the values; past the end they repeat the last token
    const int offset = min(lane & 15, seq_len - 1 - unit.position());
    const long long granule = offset < kGranule ? unit.words.x : unit.words.y;
    const int slot = offset & (kGranule - 1);
    const unsigned short* const row = lane < 16 ? p.k_cache + kv_head * p.k_head + granule * p.k_block + slot * p.k_slot
                                                : p.v_cache + kv_head * p.v_head + granule * p.v_block + slot * p.v_slot;
#pragma unroll
    for (int i = 0; i < kStep * kChunks / 32; ++i) {
      const int piece = i * 32 + lane;
      const int token = piece / kChunks;
      const int chunk = piece % kChunks;
      const unsigned short* key = broadcast_pointer(row, token);
      const unsigned short* value = broadcast_pointer(row, token + 16);
      const unsigned line = stage + token * kChunks * 16;
      // K is read 4 chunks of 2 neighbouring rows at a time, V one chunk of 8 rows: each to 8 different bank groups
      ptx::copy_async_16(line + (chunk ^ (token & 1) << 2) * 16, key + chunk * 8, policy);
      ptx::copy_async_16(line + kHotHalf + (chunk ^ (token & 7)) * 16, value + chunk * 8, policy);
    }
    return;
  }
  const bool is_warm = unit.tier() == Tier::kWarm;
  const long long head = static_cast<long long>(unit.words.x) * p.num_kv_heads + kv_head;
  const unsigned char* const from =
      (is_warm ? p.warm + (2 * head + unit.words.y) * Sizes::kWarm : p.cold + head * Sizes::kCold) + lane * 16;
  const int rest = (is_warm ? Sizes::kWarm : Sizes::kCold) - lane * 16;
  const unsigned to = stage + lane * 16;
#pragma unroll
  for (int at = 0; at < Sizes::kCold; at += 512) {
    if (at + 512 <= Sizes::kWarm || at < rest) ptx::copy_async_16(to + at, from + at, policy);
  }
}

// Turn the products of q and k, times the factor to log2, into weights: biased, masked, exp2. `positions(n, h)` is the
// position of this lane's token in row g + 8h of product n, kTokens of them from `first` on.
template <int kProducts, int kTokens, typename Positions>
__device__ __forceinline__ void weigh(
    Walk& walk, int r, float (&s)[kProducts][4], int first, Positions positions, TieredState& state) {
  const TieredParams& p = walk.p;
  if (p.cap_outer != 0.0f) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = p.cap_outer * tanhf(p.cap_inner * s[n][i]);
    }
  }
  if (p.alibi_slopes != nullptr) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int distance = walk.columns.position[r][i & 1] - positions(n, i >> 1);
        s[n][i] -= walk.columns.slope[r][i & 1] * fabsf(static_cast<float>(distance));
      }
    }
  }
  if (walk.is_partial(first, kTokens)) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!walk.sees(r, i & 1, positions(n, i >> 1))) s[n][i] = -kInfinity;
      }
    }
  }
  float highest[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    highest[c] = fmaxf(s[0][c], s[0][c + 2]);
#pragma unroll
    for (int n = 1; n < kProducts; ++n) highest[c] = fmaxf(highest[c], fmaxf(s[n][c], s[n][c + 2]));
  }
  if (__any_sync(kAllLanes, highest[0] > state.m[r][0] + kHeadroom || highest[1] > state.m[r][1] + kHeadroom)) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float top = max_over_rows(highest[c]);
      if (top > state.m[r][c] + kHeadroom) {
        state.rescale(r, c, ptx::exp2(state.m[r][c] - (top - kSlack)));
        state.m[r][c] = top - kSlack;
      }
    }
  }
  float base[2];
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    base[c] = state.m[r][c] == -kInfinity ? 0.0f : state.m[r][c];  // -inf - -inf is NaN
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      s[n][c] = ptx::exp2(s[n][c] - base[c]);
      s[n][c + 2] = ptx::exp2(s[n][c + 2] - base[c]);
      sum[c] += s[n][c] + s[n][c + 2];
    }
    state.l[r][c] += sum[c];
  }
  if (kHasMasses) walk.notes.take(r, walk.unit, base, sum);
}

// Weights of 16 tokens as the operand of a product: rows first, times what each token's values are scaled by.
template <typename Scalar>
__device__ __forceinline__ uint2 as_operand(const float (&s)[4], float low = 1.0f, float high = 1.0f) {
  return {ptx::transpose_matrix(Scalar::pack(s[0] * low, s[1] * low)),
          ptx::transpose_matrix(Scalar::pack(s[2] * high, s[3] * high))};
}

// Take tokens whose values are NaN out of a unit that some rows see in part, since a weight of 0 times NaN is NaN: rows
// that see one of them are NaN from here on, and for the others its values are 0.
//   value_scales  [kTokens], with kHasPoints then the zero points; this warp's own
template <int kTokens, bool kHasPoints>
__device__ __forceinline__ void take_lost_tokens(const Walk& walk, unsigned value_scales, int first, TieredState& state) {
  const int lane = lane_id();
  const unsigned scales = value_scales + lane * 4;  // of two tokens
  const unsigned points = scales + 2 * kTokens;
  unsigned lost = 0;
  if (lane < kTokens / 2) {
    lost = nonfinite_mask<Half>(ptx::load_shared_4(scales));
    if (kHasPoints) lost |= nonfinite_mask<Half>(ptx::load_shared_4(points));
  }
  if (!__any_sync(kAllLanes, lost != 0)) return;
  const unsigned tokens[2] = {__ballot_sync(kAllLanes, (lost & 1) != 0), __ballot_sync(kAllLanes, lost >> 31 != 0)};
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float taken = 0.0f;
#pragma unroll 1
      for (int token = 0; token < kTokens; ++token) {
        const bool is_lost = tokens[token & 1] >> (token >> 1) & 1;
        if (is_lost && walk.sees(r, c, first + token)) taken = kInfinity - kInfinity;
      }
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        state.o[r][d][c] += taken;
        state.o[r][d][c + 2] += taken;
      }
    }
  }
  if (lane < kTokens / 2) {
    ptx::store_shared_4(scales, ptx::load_shared_4(scales) & ~lost);
    if (kHasPoints) ptx::store_shared_4(points, ptx::load_shared_4(points) & ~lost);
  }
  __syncwarp();
}

__device__ __forceinline__ void attend_hot(
    Walk& walk, const Queries& queries, unsigned stage, int first, TieredState& state) {
  const int lane = lane_id();
  const int g = lane >> 2;
  const int t = lane & 3;
  float s[kRowTiles][1][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) s[r][0][0] = s[r][0][1] = s[r][0][2] = s[r][0][3] = 0.0f;
  const unsigned key_row = stage + g * kChunks * 16;
#pragma unroll
  for (int d = 0; d < kDimPairs; ++d) {
    const unsigned chunk = ((4 * d + t) ^ (g & 1) << 2) * 16;
    const uint4 low = ptx::load_shared_16(key_row + chunk);
    const uint4 high = ptx::load_shared_16(key_row + 8 * kChunks * 16 + chunk);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const uint4 q = queries.q[r][d];
      scalar_t::multiply_add(s[r][0], low.x, high.x, low.y, high.y, q.x, q.y);
      scalar_t::multiply_add(s[r][0], low.z, high.z, low.w, high.w, q.z, q.w);
    }
  }
  state.count_in(false);
  uint2 weights[kRowTiles];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[r][0][i] *= walk.to_log2;
    weigh<1, kStep>(walk, r, s[r], first, [&](int, int h) { return first + g + 8 * h; }, state);
    weights[r] = as_operand<scalar_t>(s[r][0]);
  }
  if (walk.is_partial(first, kStep)) {
    take_nonfinite<kChunks>(walk.p, walk.columns, walk.seq_len, stage + kHotHalf, first, state);
  }
  const int token = (lane & 7) + (lane >> 4) * 8;
  const unsigned value_row = stage + kHotHalf + token * kChunks * 16;
#pragma unroll
  for (int d = 0; d < kDimBlocks; ++d) {
    unsigned v[4];
    ptx::load_matrices_transposed(v, value_row + ((2 * d + (lane >> 3 & 1)) ^ (token & 7)) * 16);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      scalar_t::multiply_add(state.o[r][d], v[0], v[1], v[2], v[3], weights[r].x, weights[r].y);
    }
  }
}

// int8: product i takes tokens 4g + 2i + h as its rows g + 8h.
__device__ __forceinline__ void attend_warm(
    Walk& walk, const CodeQueries& queries, unsigned stage, int first, TieredState& state) {
  const int lane = lane_id();
  const int g = lane >> 2;
  constexpr int kPieces = kHeadDim / 32;
  float s[kRowTiles][2][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      s[r][i][0] = s[r][i][2] = queries.start[r][0];
      s[r][i][1] = s[r][i][3] = queries.start[r][1];
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int d = 0; d < kPieces; ++d) {
      const uint4 k = ptx::load_shared_16(stage + ((i * kPieces + d) * 32 + lane) * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint4 q = queries.q[r][d];
        Half::multiply_add(s[r][i], ptx::low_bytes(k.x), ptx::low_bytes(k.z), ptx::high_bytes(k.x), ptx::high_bytes(k.z),
                           q.x, q.y);
        Half::multiply_add(s[r][i], ptx::low_bytes(k.y), ptx::low_bytes(k.w), ptx::high_bytes(k.y), ptx::high_bytes(k.w),
                           q.z, q.w);
      }
    }
  }
  const uint2 key_scales = ptx::load_shared_8(stage + Sizes::kWarmCodes + 8 * g);
  const unsigned values = stage + Sizes::kWarmCodes + 2 * kWarmUnit;
  if (walk.is_partial(first, kWarmUnit)) take_lost_tokens<kWarmUnit, false>(walk, values + Sizes::kWarmCodes, first, state);
  const uint2 value_scales = ptx::load_shared_8(values + Sizes::kWarmCodes + 8 * g);
  const float to_log2 = walk.to_log2 * (1.0f / kCode);
  const float factors[4] = {Half::low(key_scales.x) * to_log2, Half::high(key_scales.x) * to_log2,
                            Half::low(key_scales.y) * to_log2, Half::high(key_scales.y) * to_log2};
  const float scales[4] = {Half::low(value_scales.x), Half::high(value_scales.x), Half::low(value_scales.y),
                           Half::high(value_scales.y)};
  state.count_in(true);
  uint2 weights[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[r][i][j] *= factors[2 * i + (j >> 1)];
    }
    const auto positions = [&](int i, int h) { return first + 4 * g + 2 * i + h; };
    weigh<2, kWarmUnit>(walk, r, s[r], first, positions, state);
    float points[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // sum of weight * scale * 4 * 128
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weights[r][i] = as_operand<Half>(s[r][i], scales[2 * i], scales[2 * i + 1]);
      Half::multiply_add(points, kMiddle, kMiddle, kMiddle, kMiddle, weights[r][i].x, weights[r][i].y);
    }
    state.take_points(r, points);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      const uint4 v = ptx::load_shared_16(values + ((i * kPieces + c) * 32 + lane) * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint2 w = weights[r][i];
        Half::multiply_add(state.o[r][2 * c], ptx::low_bytes(v.x), ptx::low_bytes(v.y), ptx::high_bytes(v.x),
                           ptx::high_bytes(v.y), w.x, w.y);
        Half::multiply_add(state.o[r][2 * c + 1], ptx::low_bytes(v.z), ptx::low_bytes(v.w), ptx::high_bytes(v.z),
                           ptx::high_bytes(v.w), w.x, w.y);
      }
    }
  }
}

// c += A b where A are 16 x 16 codes: nibbles `shift` and on of two words, rows g and g + 8.
__device__ __forceinline__ void multiply_add_nibbles(
    float (&c)[4], unsigned low, unsigned high, int shift, unsigned b0, unsigned b1) {
  low >>= shift;
  high >>= shift;
  Half::multiply_add(c, low & kEven, high & kEven, low & kOdd, high & kOdd, b0, b1);
}

// int4: product n = 2b + i takes tokens 32b + 4g + 2i + h as its rows g + 8h.
__device__ __forceinline__ void attend_cold(
    Walk& walk, const CodeQueries& queries, unsigned stage, int first, TieredState& state) {
  const int lane = lane_id();
  const int g = lane >> 2;
  const int t = lane & 3;
  constexpr int kPieces = kHeadDim / 64;
  const unsigned key_scales = stage + Sizes::kColdCodes;
  const unsigned key_zeros = key_scales + 2 * kHeadDim;
  const unsigned values = key_zeros + 2 * kHeadDim;
  const unsigned value_scales = values + Sizes::kColdCodes;
  // A score is q.zero + (q * scale).(code - 8). The scaled query is rounded to a half, and what that loses is a query of
  // its own: in columns that up to 4 rows leave free, or else in further products.
  float s[kRowTiles][4][4];
  float of_zeros[kRowTiles][4];
  float of_middle[kRowTiles][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) of_zeros[r][i] = of_middle[r][i] = s[r][0][i] = s[r][1][i] = s[r][2][i] = s[r][3][i] = 0.0f;
  }
#pragma unroll
  for (int d = 0; d < kPieces; ++d) {
    uint4 scaled[kRowTiles][2];
    uint4 rest[kRowTiles][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned dims = (4 * (2 * d + half) + t) * 16;
      const uint4 zero = ptx::load_shared_16(key_zeros + dims);
      const uint4 scale = ptx::load_shared_16(key_scales + dims);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint4 q = queries.q[r][2 * d + half];
        Half::multiply_add(of_zeros[r], zero.x, zero.x, zero.y, zero.y, q.x, q.y);
        Half::multiply_add(of_zeros[r], zero.z, zero.z, zero.w, zero.w, q.z, q.w);
        uint4 b{ptx::multiply_halves(q.x, scale.x), ptx::multiply_halves(q.y, scale.y),
                ptx::multiply_halves(q.z, scale.z), ptx::multiply_halves(q.w, scale.w)};
        const uint4 c{ptx::multiply_subtract_halves(q.x, scale.x, b.x), ptx::multiply_subtract_halves(q.y, scale.y, b.y),
                      ptx::multiply_subtract_halves(q.z, scale.z, b.z), ptx::multiply_subtract_halves(q.w, scale.w, b.w)};
        if (kSplitRows && g >= 4) b = c;
        scaled[r][half] = b;
        rest[r][half] = c;
        Half::multiply_add(of_middle[r], kMinus8Even, kMinus8Even, kMinus8Odd, kMinus8Odd, b.x, b.y);
        Half::multiply_add(of_middle[r], kMinus8Even, kMinus8Even, kMinus8Odd, kMinus8Odd, b.z, b.w);
        if (kSplitRows) continue;
        Half::multiply_add(of_middle[r], kMinus8Even, kMinus8Even, kMinus8Odd, kMinus8Odd, c.x, c.y);
        Half::multiply_add(of_middle[r], kMinus8Even, kMinus8Even, kMinus8Odd, kMinus8Odd, c.z, c.w);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint4 k = ptx::load_shared_16(stage + ((n * kPieces + d) * 32 + lane) * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply_add_nibbles(s[r][n], k.x, k.z, 0, scaled[r][0].x, scaled[r][0].y);
        multiply_add_nibbles(s[r][n], k.x, k.z, 8, scaled[r][0].z, scaled[r][0].w);
        multiply_add_nibbles(s[r][n], k.y, k.w, 0, scaled[r][1].x, scaled[r][1].y);
        multiply_add_nibbles(s[r][n], k.y, k.w, 8, scaled[r][1].z, scaled[r][1].w);
        if (kSplitRows) continue;
        multiply_add_nibbles(s[r][n], k.x, k.z, 0, rest[r][0].x, rest[r][0].y);
        multiply_add_nibbles(s[r][n], k.x, k.z, 8, rest[r][0].z, rest[r][0].w);
        multiply_add_nibbles(s[r][n], k.y, k.w, 0, rest[r][1].x, rest[r][1].y);
        multiply_add_nibbles(s[r][n], k.y, k.w, 8, rest[r][1].z, rest[r][1].w);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        s[r][n][i] += of_middle[r][i];
        if (kSplitRows) s[r][n][i] += __shfl_xor_sync(kAllLanes, s[r][n][i], 2);  // columns c and c + 4
        s[r][n][i] += of_zeros[r][i] * kCodeBy4;
      }
    }
  }
  state.count_in(true);
  if (walk.is_partial(first, kBlock)) take_lost_tokens<kBlock, true>(walk, value_scales, first, state);
  const float to_log2 = walk.to_log2 * (1.0f / kCodeBy4);
  uint2 weights[kRowTiles][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[r][n][i] *= to_log2;
    }
    const auto positions = [&](int n, int h) { return first + 32 * (n >> 1) + 4 * g + 2 * (n & 1) + h; };
    weigh<4, kBlock>(walk, r, s[r], first, positions, state);
    float of_points[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // sum of weight * scale * 4 * zero point
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint2 scale = ptx::load_shared_8(value_scales + 64 * b + 8 * g);
      const uint4 points = ptx::load_shared_16(value_scales + 2 * kBlock + 64 * b + 16 * t);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned scales = i == 0 ? scale.x : scale.y;
        const float (&w)[4] = s[r][2 * b + i];
        const uint2 operand = as_operand<Half>(w, Half::low(scales), Half::high(scales));
        // those of the tokens in a nibble pair's order: 2i and 2i + 4, then 2i + 1 and 2i + 5
        const unsigned low = ptx::low_halves(i == 0 ? points.x : points.y, i == 0 ? points.z : points.w);
        const unsigned high = ptx::high_halves(i == 0 ? points.x : points.y, i == 0 ? points.z : points.w);
        Half::multiply_add(of_points, low, low, high, high, operand.x, operand.y);
        weights[r][2 * b + i] = operand;
      }
    }
    state.take_points(r, of_points);
  }
#pragma unroll
  for (int b = 0; b < 2; ++b) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      const uint4 v = ptx::load_shared_16(values + ((b * (kHeadDim / 32) + c) * 32 + lane) * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint2 w = weights[r][2 * b + i];
          multiply_add_nibbles(state.o[r][2 * c], v.x, v.y, 8 * i, w.x, w.y);
          multiply_add_nibbles(state.o[r][2 * c + 1], v.z, v.w, 8 * i, w.x, w.y);
        }
      }
    }
  }
}

// The units that a warp will take, a few ahead of those that it takes. A lane holds one of the next 32, and has one of
// those after them on the way: a look-up that is made when it is needed waits behind all keys and values asked for.
class Reader {
 public:
  __device__ __forceinline__ Reader(const TieredParams& p, const Schedule& schedule, const Piece& piece)
      : schedule_(schedule), piece_(piece) {
    seek(p);
  }

  // The next unit; false where there is none, in all lanes.
  __device__ __forceinline__ bool next(const TieredParams& p, Unit& unit) {
    while (!is_done_ && unit_ >= piece_.end) {
      is_done_ = !schedule_.next(p, piece_);
      if (!is_done_) seek(p);
    }
    if (is_done_) return false;
    if (used_ == 32) {
      used_ = 0;
      now_ = then_;
      then_ = load(p, unit_ + 32 * kStride);
    }
    unit.words.x = __shfl_sync(kAllLanes, now_.x, used_);
    unit.words.y = __shfl_sync(kAllLanes, now_.y, used_);
    unit.words.z = __shfl_sync(kAllLanes, now_.z, used_);
    unit.words.w = __shfl_sync(kAllLanes, now_.w, used_);
    ++used_;
    unit_ += kStride;
    return true;
  }

  // Of the sequence that the unit given last belongs to.
  __device__ __forceinline__ int seq_len() const { return piece_.block.seq_len; }

  // Whether that unit holds tokens of the present queries, which a kernel before may be writing.
  __device__ __forceinline__ bool is_new(const Unit& unit) const {
    return unit.tier() == Tier::kHot && unit.position() + kStep > piece_.block.seq_len - piece_.block.num_queries;
  }

 private:
  __device__ __forceinline__ void seek(const TieredParams& p) {
    unit_ = first_of_warp(piece_.begin);
    used_ = 0;
    now_ = load(p, unit_);  // whether there is one or not, so that the list's length is not waited for
    then_ = load(p, unit_ + 32 * kStride);
  }

  __device__ __forceinline__ int4 load(const TieredParams& p, int unit) const {
    const int index = min(unit + lane_id() * kStride, p.max_units - 1);
    return p.units[static_cast<long long>(piece_.block.sequence) * p.max_units + index];
  }

  Schedule schedule_;
  Piece piece_;
  int unit_;
  int used_;            // lanes whose units have been used
  int4 now_, then_;     // units of this lane
  bool is_done_ = false;
};

extern "C" __global__ void __launch_bounds__(kThreads, KVT_PER_SM) kvt_tiered(const __grid_constant__ TieredParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x >> 5;
  if (p.wait_first) ptx::wait_for_dependencies();
  Schedule schedule(p);
  const int kv_head = schedule.kv_head();
  const unsigned fifo = ptx::shared_address(shared) + warp * kStages * kStageBytes;
  Piece piece;
  if (!schedule.next(p, piece)) {
    ptx::wait_for_dependencies();  // who waits for this kernel relies on those before it as well
    return;
  }
  const unsigned long long policy = ptx::evict_first_policy();
  const unsigned long long mass_policy = ptx::evict_last_policy();
  Reader reader(p, schedule, piece);
  Unit tiers[kStages];  // what is in each stage or on its way there
  Unit ahead;
  bool is_ahead = reader.next(p, ahead);
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    tiers[i] = ahead;
    if (is_ahead) {
      if (reader.is_new(ahead)) ptx::wait_for_dependencies();
      copy_unit(p, kv_head, reader.seq_len(), fifo + i * kStageBytes, ahead, policy);
      if (kStages > 1 || i + 1 < kStages) is_ahead = reader.next(p, ahead);
    }
    ptx::commit_copies();
  }
  if (kStages == 1 && is_ahead) is_ahead = reader.next(p, ahead);
  // from here on everything may be read; only now may the next kernel begin, so that what it finds written by kernels
  // before this one is complete
  ptx::wait_for_dependencies();
  ptx::launch_dependents();

  const WarpStates scratch(shared);
  int stage = 0;
  __shared__ float row_lse[kRows];
  Queries queries;
  CodeQueries code_queries;
  do {
    if (queries.sequence != piece.block.sequence) {
      queries.load(p, piece.block, kv_head, kSplitRows ? 3 : -1);
      code_queries.make(queries);
    }
    Shares shares;
    if (kHasMasses) shares.locate(p, piece.block);
    const Columns columns = columns_of(p, piece.block, kv_head);
    Walk walk{p, columns, visible_keys(p, piece.block), piece.block.seq_len,
              p.cap_outer == 0.0f ? p.scale_log2 : 1.0f, 0, Notes()};
    TieredState state;
#pragma unroll 1
    for (int unit = first_of_warp(piece.begin); unit < piece.end; unit += kStride) {
      ptx::wait_for_copies<kStages - 1>();
      __syncwarp();
      const unsigned at = fifo + stage * kStageBytes;
      walk.unit = unit;
      Unit present = tiers[0];
      if (present.tier() == Tier::kCold) {
        attend_cold(walk, code_queries, at, present.position(), state);
      } else if (present.tier() == Tier::kWarm) {
        attend_warm(walk, code_queries, at, present.position(), state);
      } else {
        attend_hot(walk, queries, at, present.position(), state);
      }
      if (kHasMasses) walk.notes.write(p, piece.block, kv_head, unit, piece.end, mass_policy);
      __syncwarp();
#pragma unroll
      for (int i = 0; i + 1 < kStages; ++i) tiers[i] = tiers[i + 1];
      tiers[kStages - 1] = ahead;
      if (is_ahead) {
        copy_unit(p, kv_head, reader.seq_len(), at, ahead, policy);
        is_ahead = reader.next(p, ahead);  // it has until the next unit to arrive
      }
      ptx::commit_copies();
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    state.count_in(false);

    __syncthreads();  // the scratch of the piece before has been read
    scratch.store(state);
    __syncthreads();
    if (kHasMasses && piece.num_pieces == 1) shares.load(p, piece.block, kv_head);
    for (int i = threadIdx.x; i < piece.block.num_rows * kHeadDim / 4; i += kThreads) {
      const int row = i / (kHeadDim / 4);
      const int dim = i % (kHeadDim / 4) * 4;
      float4 o{0.0f, 0.0f, 0.0f, 0.0f};
      const Merged sums = scratch.merge(row, dim, o);
      if (piece.num_pieces == 1) {
        write_row(p, piece.block, kv_head, row, dim, o, sums, row_lse);
      } else {
        write_partial(p, schedule, piece, row, dim, o, sums);
      }
    }
    const bool is_complete = complete_piece(p, schedule, piece, kv_head, shares, row_lse);
    if (kHasMasses && is_complete) shares.write(p, piece.block, kv_head, row_lse);
  } while (schedule.next(p, piece));
}

}  // namespace kvt
