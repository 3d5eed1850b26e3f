// Conversions: copy 64 tokens from one tier to another, in all layers: for demotion, and back when a sequence is
// truncated.
//
//   hot         [2 * num_layers, num_granules, num_kv_heads, 8, head_dim] by strides: keys, then values of each layer
//   warm, cold  [num_layers, num_blocks, num_kv_heads, bytes of a block], see kvtoolkit/formats/quantized.py
//   moves       8 source granules and 8 target granules of each; -1 = not wanted. Up to kMaxMoves in the parameters, or
//               any number in a list on the device, which migrate.cu makes. The tiers share one range of granule numbers.
//
// Launch:   grid (moves, num_kv_heads, num_layers), for a list any number of CTAs; CTA 256. Any architecture. Macros:
//           KVT_HEAD_DIM, KVT_BF16.
// Numerics: in float32, with each operation rounded by itself, so that codes equal those of kvtoolkit.formats to the
//           bit. A token that holds an infinity or NaN becomes NaN, as in kvtoolkit.formats. The host cannot see such
//           tokens, so it cannot keep their tiles from being converted.
#include <kvt/base/numbers.cuh>
#include <kvt/base/scalar.cuh>
#include <kvt/base/warp.cuh>
#include <kvt/entry.cuh>
#include <kvt/format/tiers.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

using Half = ptx::Half;

constexpr int kHeadDim = KVT_HEAD_DIM;
constexpr int kThreads = 256;
constexpr int kMaxMoves = 48;
constexpr int kPitch = kHeadDim + 1;  // floats; the tokens of one dim are in different banks
constexpr float kLargest = 65504.0f;  // of a half
constexpr float kSmallestNormal = 1.0f / (1 << 14);
constexpr unsigned short kNaN = 0x7E00;  // as a half
using Sizes = Bytes<kHeadDim>;

struct ConvertArrays {
  unsigned short* hot;
  unsigned char* warm;
  unsigned char* cold;
  long long hot_array, hot_granule;  // elements
  long long warm_layer, cold_layer;  // bytes
  int num_kv_heads;
  int first_granules[3];
};

// Packed by kvtoolkit/cuda/copy.py, field by field in this order, those of the base first.
struct ConvertParams : ConvertArrays {
  int sources[kMaxMoves * 8];
  int targets[kMaxMoves * 8];
};

struct ListParams : ConvertArrays {
  const int* num_moves;
  const int* moves;  // [num_moves, 16] sources, then targets; the first source is -1 where nothing is to be done
  long long num_layers;
};

__device__ __forceinline__ unsigned short half_bits(float x) {
  return Half::pack(fminf(fmaxf(x, -kLargest), kLargest), 0.0f) & 0xFFFF;
}

__device__ __forceinline__ float half_value(unsigned short bits) { return Half::low(bits); }

// A scale as it is stored. Below the normal range it is rounded up, because a scale that is rounded down would clip.
__device__ __forceinline__ unsigned short scale_bits(float x) {
  const unsigned short nearest = half_bits(x);
  return x < kSmallestNormal && half_value(nearest) < x ? nearest + 1 : nearest;
}

__device__ __forceinline__ Tier tier_of(const ConvertArrays& p, int granule) {
  return granule >= p.first_granules[2] ? Tier::kCold : granule >= p.first_granules[1] ? Tier::kWarm : Tier::kHot;
}

// 64 tokens of keys or of values in shared memory, with the scales that they are read or written with.
struct Tile {
  float x[kBlock * kPitch];
  float scale[kHeadDim > kBlock ? kHeadDim : kBlock];  // a value is a multiple of it
  float zero[kHeadDim > kBlock ? kHeadDim : kBlock];   // of int4: the zero of keys, the zero point of values
  bool bad_key[kBlock], bad_value[kBlock];             // tokens that hold an infinity or NaN

  __device__ __forceinline__ float& at(int token, int dim) { return x[token * kPitch + dim]; }
};

// The token and dim of a code, from its number in the order of storage. See kvtoolkit/formats/quantized.py.
struct CodePlace {
  int token, dim;
};

__device__ __forceinline__ CodePlace warm_place(bool is_value, int index) {  // within a unit of 32 tokens
  const int byte = index & 15;
  const int lane = index >> 4 & 31;
  const int piece = index >> 9;
  const int g = lane >> 2;
  const int t = lane & 3;
  constexpr int kPieces = kHeadDim / 32;
  const int i = piece / kPieces;
  const int c = piece % kPieces;
  if (!is_value) return {4 * g + 2 * i + (byte >> 3), 32 * c + 8 * t + (byte & 7)};
  return {8 * t + 2 * i + (byte >> 1 & 1) + 4 * (byte & 1), 32 * c + 8 * (byte >> 2) + g};
}

__device__ __forceinline__ CodePlace cold_place(bool is_value, int index) {
  const int nibble = index & 7;
  const int word = index >> 3 & 3;
  const int lane = index >> 5 & 31;
  const int piece = index >> 10;
  const int g = lane >> 2;
  const int t = lane & 3;
  if (!is_value) {
    constexpr int kPieces = kHeadDim / 64;
    const int n = piece / kPieces;
    const int j = 2 * (piece % kPieces) + (word & 1);
    return {32 * (n >> 1) + 4 * g + 2 * (n & 1) + (word >> 1), 32 * j + 8 * t + 2 * (nibble & 3) + (nibble >> 2)};
  }
  constexpr int kPieces = kHeadDim / 32;
  return {32 * (piece / kPieces) + 8 * t + nibble, 32 * (piece % kPieces) + 8 * word + g};
}

// The stored scale divided by the scale.
__device__ __forceinline__ float warm_factor(bool is_value) { return is_value ? 4.0f : 1.0f; }
__device__ __forceinline__ float cold_factor(bool is_value, int index) {
  return (is_value ? index & 1 : index >> 1 & 1) == 0 ? 4.0f : 0.25f;
}

__device__ __forceinline__ const unsigned short* halves(const unsigned char* bytes) {
  return reinterpret_cast<const unsigned short*>(bytes);
}

__device__ __forceinline__ void read_warm(const unsigned char* block, bool is_value, Tile& tile) {
  for (int i = threadIdx.x; i < kBlock * kHeadDim; i += kThreads) {
    const int unit = i / Sizes::kWarmCodes;
    const int index = i % Sizes::kWarmCodes;
    const unsigned char* const codes = block + unit * Sizes::kWarm + (is_value ? Sizes::kWarmCodes + 2 * kWarmUnit : 0);
    const CodePlace place = warm_place(is_value, index);
    const float scale = half_value(halves(codes + Sizes::kWarmCodes)[place.token]) / warm_factor(is_value);
    tile.at(unit * kWarmUnit + place.token, place.dim) = __fmul_rn(scale, static_cast<float>(codes[index]) - 128.0f);
  }
}

__device__ __forceinline__ const unsigned char* cold_part(const unsigned char* block, bool is_value) {
  return is_value ? block + Sizes::kColdCodes + 4 * kHeadDim : block;
}

__device__ __forceinline__ void read_cold(const unsigned char* block, bool is_value, Tile& tile) {
  const unsigned char* const codes = cold_part(block, is_value);
  const unsigned short* const scales = halves(codes + Sizes::kColdCodes);
  const unsigned short* const zeros = scales + (is_value ? kBlock : kHeadDim);  // for values, zero points
  for (int i = threadIdx.x; i < kBlock * kHeadDim; i += kThreads) {
    const CodePlace place = cold_place(is_value, i);
    const int of = is_value ? place.token : place.dim;
    const float factor = cold_factor(is_value, of);
    const float scale = half_value(scales[of]) / factor;
    const float zero = half_value(zeros[of]);
    const int code = codes[i >> 1] >> (i & 1) * 4 & 15;
    tile.at(place.token, place.dim) = is_value
                                          ? __fmul_rn(scale, __fsub_rn(static_cast<float>(code), zero * factor / 4))
                                          : __fadd_rn(__fmul_rn(scale, static_cast<float>(code - 8)), zero);
  }
}

// The code of a value; `middle` if the scale is 0.
__device__ __forceinline__ int code_of(float x, float scale, float zero, int middle, int low, int high) {
  const float steps = scale > 0.0f ? rintf(__fdiv_rn(__fsub_rn(x, zero), scale)) : 0.0f;
  return static_cast<int>(fminf(fmaxf(steps + middle, static_cast<float>(low)), static_cast<float>(high)));
}

// The code of an int4 value, whose zero is given as a point among the codes.
__device__ __forceinline__ int point_code(float x, float scale, float point) {
  const float steps = scale > 0.0f ? rintf(__fadd_rn(__fdiv_rn(x, scale), point)) : 0.0f;
  return static_cast<int>(fminf(fmaxf(steps, 0.0f), 15.0f));
}

// The lowest and highest value of token threadIdx.x / 4. Four threads share a token, and all of them get the result.
__device__ __forceinline__ float2 range_of_token(Tile& tile) {
  const int token = threadIdx.x >> 2;
  float low = kInfinity;
  float high = -kInfinity;
  for (int dim = threadIdx.x & 3; dim < kHeadDim; dim += 4) {
    const float x = tile.at(token, dim);
    low = fminf(low, x);
    high = fmaxf(high, x);
  }
#pragma unroll
  for (int d = 1; d < 4; d <<= 1) {
    low = fminf(low, __shfl_xor_sync(kAllLanes, low, d));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, d));
  }
  return {low, high};
}

// Set tokens that hold an infinity or NaN to 0, and record them in `bad`. Four threads share a token.
__device__ __forceinline__ void take_nonfinite(Tile& tile, bool (&bad)[kBlock]) {
  const int token = threadIdx.x >> 2;
  bool is_bad = false;
  for (int dim = threadIdx.x & 3; dim < kHeadDim; dim += 4) is_bad |= !(fabsf(tile.at(token, dim)) < kInfinity);
#pragma unroll
  for (int d = 1; d < 4; d <<= 1) is_bad |= __shfl_xor_sync(kAllLanes, static_cast<int>(is_bad), d) != 0;
  if (is_bad) {
    for (int dim = threadIdx.x & 3; dim < kHeadDim; dim += 4) tile.at(token, dim) = 0.0f;
  }
  if ((threadIdx.x & 3) == 0) bad[token] = is_bad;
}

__device__ __forceinline__ void write_warm(unsigned char* block, bool is_value, Tile& tile) {
  const float2 range = range_of_token(tile);
  const float factor = warm_factor(is_value);
  unsigned char* const part = block + (is_value ? Sizes::kWarmCodes + 2 * kWarmUnit : 0);
  if ((threadIdx.x & 3) == 0) {
    const int token = threadIdx.x >> 2;
    const float largest = fmaxf(fabsf(range.x), fabsf(range.y));
    const unsigned short stored = scale_bits(__fmul_rn(__fdiv_rn(largest, 127.0f), factor));
    const bool is_bad = (is_value ? tile.bad_value : tile.bad_key)[token];
    unsigned char* const codes = part + token / kWarmUnit * Sizes::kWarm;
    reinterpret_cast<unsigned short*>(codes + Sizes::kWarmCodes)[token % kWarmUnit] = is_bad ? kNaN : stored;
    tile.scale[token] = half_value(stored) / factor;
  }
  __syncthreads();
  for (int w = threadIdx.x; w < kBlock * kHeadDim / 4; w += kThreads) {
    const int unit = w / (Sizes::kWarmCodes / 4);
    const int at = w % (Sizes::kWarmCodes / 4);
    unsigned word = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const CodePlace place = warm_place(is_value, 4 * at + b);
      const int token = unit * kWarmUnit + place.token;
      word |= static_cast<unsigned>(code_of(tile.at(token, place.dim), tile.scale[token], 0.0f, 128, 1, 255)) << 8 * b;
    }
    reinterpret_cast<unsigned*>(part + unit * Sizes::kWarm)[at] = word;
  }
}

__device__ __forceinline__ void write_cold(unsigned char* block, bool is_value, Tile& tile) {
  unsigned char* const codes = const_cast<unsigned char*>(cold_part(block, is_value));
  unsigned short* const scales = reinterpret_cast<unsigned short*>(codes + Sizes::kColdCodes);
  unsigned short* const zeros = scales + (is_value ? kBlock : kHeadDim);
  const auto settle = [&](int of, float low, float high) {
    const float factor = cold_factor(is_value, of);
    float step = __fdiv_rn(__fsub_rn(high, low), 15.0f);
    if (!is_value) {
      // a zero beyond the range of a half is clipped, and the step is chosen so that the codes around it reach both
      // ends
      step = fmaxf(step, fmaxf(__fdiv_rn(__fsub_rn(high, kLargest), 7.0f), __fdiv_rn(__fsub_rn(-kLargest, low), 8.0f)));
    }
    const unsigned short stored = scale_bits(__fmul_rn(step, factor));
    const float scale = half_value(stored) / factor;
    // the point is at most 15, so that a value of 0 has a code
    const float point = scale > 0.0f ? fminf(__fdiv_rn(-low, scale), 15.0f) / factor * 4 : 0.0f;
    const unsigned short zero = half_bits(is_value ? point : __fadd_rn(low, __fmul_rn(8.0f, scale)));
    scales[of] = is_value && (tile.bad_key[of] || tile.bad_value[of]) ? kNaN : stored;
    zeros[of] = zero;
    tile.scale[of] = scale;
    tile.zero[of] = half_value(zero) * (is_value ? factor / 4 : 1.0f);
  };
  if (is_value) {
    const float2 range = range_of_token(tile);
    if ((threadIdx.x & 3) == 0) settle(threadIdx.x >> 2, fminf(range.x, 0.0f), fmaxf(range.y, 0.0f));
  } else if (threadIdx.x < kHeadDim) {
    float low = kInfinity;
    float high = -kInfinity;
    for (int token = 0; token < kBlock; ++token) {
      if (tile.bad_key[token]) continue;
      const float x = tile.at(token, threadIdx.x);
      low = fminf(low, x);
      high = fmaxf(high, x);
    }
    const bool is_any = low <= high;
    settle(threadIdx.x, is_any ? low : 0.0f, is_any ? high : 0.0f);
  }
  __syncthreads();
  for (int w = threadIdx.x; w < kBlock * kHeadDim / 8; w += kThreads) {
    unsigned word = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const CodePlace place = cold_place(is_value, 8 * w + n);
      const int of = is_value ? place.token : place.dim;
      const float x = tile.at(place.token, place.dim);
      const int code =
          is_value ? point_code(x, tile.scale[of], tile.zero[of]) : code_of(x, tile.scale[of], tile.zero[of], 8, 0, 15);
      word |= static_cast<unsigned>(code) << 4 * n;
    }
    reinterpret_cast<unsigned*>(codes)[w] = word;
  }
}

// Convert the tokens of one kv head in one layer.
__device__ __forceinline__ void convert_tile(
    const ConvertArrays& p, const int* sources, const int* targets, int kv_head, int layer, Tile& tile) {
  const auto quantized = [&](int granule, Tier tier) {
    const bool is_warm = tier == Tier::kWarm;
    const long long block = (granule - p.first_granules[static_cast<int>(tier)]) >> 3;
    const long long nbytes = is_warm ? 2 * Sizes::kWarm : Sizes::kCold;
    return (is_warm ? p.warm + layer * p.warm_layer : p.cold + layer * p.cold_layer) +
           (block * p.num_kv_heads + kv_head) * nbytes;
  };
  const Tier from = tier_of(p, sources[0]);
  int first_target = -1;
  for (int i = 7; i >= 0; --i) first_target = targets[i] >= 0 ? targets[i] : first_target;
  if (first_target < 0) return;
  const Tier to = tier_of(p, first_target);
  for (int which = 0; which < 2; ++which) {
    unsigned short* const hot = p.hot + (2 * layer + which) * p.hot_array + kv_head * (8 * kHeadDim);
    if (from == Tier::kHot) {
      for (int i = threadIdx.x; i < kBlock * kHeadDim / 2; i += kThreads) {
        const int token = i / (kHeadDim / 2);
        const int dim = i % (kHeadDim / 2) * 2;
        const int granule = sources[token >> 3];
        const unsigned pair =
            *reinterpret_cast<const unsigned*>(hot + granule * p.hot_granule + (token & 7) * kHeadDim + dim);
        tile.at(token, dim) = scalar_t::low(pair);
        tile.at(token, dim + 1) = scalar_t::high(pair);
      }
    } else if (from == Tier::kWarm) {
      read_warm(quantized(sources[0], from), which == 1, tile);
    } else {
      read_cold(quantized(sources[0], from), which == 1, tile);
    }
    __syncthreads();
    if (to != Tier::kHot) {
      take_nonfinite(tile, which == 1 ? tile.bad_value : tile.bad_key);
      __syncthreads();
    }
    if (to == Tier::kHot) {
      for (int i = threadIdx.x; i < kBlock * kHeadDim / 2; i += kThreads) {
        const int token = i / (kHeadDim / 2);
        const int dim = i % (kHeadDim / 2) * 2;
        const int granule = targets[token >> 3];
        if (granule < 0) continue;
        *reinterpret_cast<unsigned*>(hot + granule * p.hot_granule + (token & 7) * kHeadDim + dim) =
            scalar_t::pack(tile.at(token, dim), tile.at(token, dim + 1));
      }
    } else if (to == Tier::kWarm) {
      write_warm(quantized(first_target, to), which == 1, tile);
    } else {
      write_cold(quantized(first_target, to), which == 1, tile);
    }
    __syncthreads();
  }
}

extern __shared__ __align__(16) unsigned char shared_tile[];

extern "C" __global__ void __launch_bounds__(kThreads, 2) kvt_convert(const __grid_constant__ ConvertParams p) {
  Tile& tile = *reinterpret_cast<Tile*>(shared_tile);
  convert_tile(p, p.sources + blockIdx.x * 8, p.targets + blockIdx.x * 8, blockIdx.y, blockIdx.z, tile);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) kvt_convert_listed(const __grid_constant__ ListParams p) {
  ptx::wait_for_dependencies();
  Tile& tile = *reinterpret_cast<Tile*>(shared_tile);
  const int of_move = p.num_kv_heads * static_cast<int>(p.num_layers);
  const int count = *p.num_moves * of_move;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    const int* const move = p.moves + i / of_move * 16ll;
    if (move[0] < 0) continue;
    convert_tile(p, move, move + 8, i % of_move % p.num_kv_heads, i % of_move / p.num_kv_heads, tile);
  }
}

}  // namespace kvt
