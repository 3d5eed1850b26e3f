// Prefill and long verify: 64 query rows of one sequence and kv head against all the keys that they see, per CTA.
//
//   q            [num_tokens, num_q_heads, head_dim]               scalar_t, rows of 16 bytes aligned
//   k_cache      block, kv head and slot by strides, head_dim contiguous, rows aligned to 16 bytes; v_cache the same
//   block_table  [batch, max_blocks] int32 block ids; entries come as a list of granules, see expand.cu
//   seq_lens     [batch] int32, tokens, the new ones included
//   out          [num_tokens, num_q_heads, head_dim] scalar_t;     lse [num_tokens, num_q_heads] float32, natural log
//
// Launch:   grid = (blocks of rows, num_kv_heads), CTA 128 = 4 warps of 16 rows each, dynamic shared memory
//           Layout::kBytes. Sequences with at most kMaxDecodeQueries queries are left to kvt_decode. sm_80 and later.
//           Macros: KVT_HEAD_DIM, KVT_BF16.
// Numerics: scores and running state in float32, weights in scalar_t.
// Source:   Dao 2023 (FlashAttention-2, arXiv:2307.08691), sec. 3; block tables, Kwon et al. 2023 (arXiv:2309.06180).
//           Unlike FlashAttention-2, a CTA takes the rows of a whole group of heads, so that it reads K and V once.
#include <kvt/attention/locate.cuh>
#include <kvt/attention/nonfinite.cuh>
#include <kvt/attention/softmax.cuh>
#include <kvt/base/scalar.cuh>
#include <kvt/ptx/async_copy.cuh>
#include <kvt/ptx/matrix.cuh>

namespace kvt {

constexpr int kHeadDim = KVT_HEAD_DIM;
constexpr int kRows = 64;
constexpr int kThreads = 128;
constexpr int kKeys = kHeadDim <= 128 ? 64 : 32;  // of a tile in shared memory
constexpr int kChunks = kHeadDim / 8;             // of 16 bytes, in a row
constexpr int kPitch = (kChunks + 7) / 8 * 8;     // chunks from row to row; chunk_address permutes groups of 8
constexpr int kDimBlocks = kHeadDim / 16;
static_assert(kHeadDim % 16 == 0, "an MMA covers 16 dims");

// Shared memory, in bytes from its beginning.
struct Layout {
  static constexpr int kQueries = 0;
  static constexpr int kKeysAt = kQueries + kRows * kPitch * 16;
  static constexpr int kTileBytes = kKeys * kPitch * 16;
  static constexpr int kValuesAt = kKeysAt + 2 * kTileBytes;  // two tiles of each
  static constexpr int kRowsAt = kValuesAt + 2 * kTileBytes;  // [2][kKeys] pointers to keys, then to values
  static constexpr int kBytes = kRowsAt + 2 * 2 * kKeys * 8;
};

// The address of a chunk of a row. The XOR puts one chunk of 8 neighbouring rows into 8 different bank groups, so that
// ldmatrix has no bank conflicts.
__device__ __forceinline__ unsigned chunk_address(unsigned base, int row, int chunk) {
  return base + (row * kPitch + (chunk ^ (row & 7))) * 16;
}

extern "C" __global__ void __launch_bounds__(kThreads) kvt_prefill(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x >> 5;
  const int lane = lane_id();
  const int kv_head = blockIdx.y;
  const RowBlock block = find_row_block<kRows>(p, blockIdx.x);
  if (block.num_rows == 0 || block.num_queries <= kMaxDecodeQueries) return;
  const KeyRange keys = visible_keys(p, block);
  const int first_tile = keys.begin / kKeys;
  const int num_tiles = max(0, (keys.end + kKeys - 1) / kKeys - first_tile);

  const unsigned queries = ptx::shared_address(shared);
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    uint4 words{0, 0, 0, 0};
    if (row < block.num_rows && num_tiles > 0) {
      const RowPlace place = place_of_row(p, block, kv_head, row);
      words = *reinterpret_cast<const uint4*>(p.q + place.token * p.q_token + place.q_head * p.q_head + chunk * 8);
    }
    ptx::store_shared_16(chunk_address(queries, row, chunk), words);
  }

  const auto row_pointers = reinterpret_cast<const unsigned short**>(shared + Layout::kRowsAt);
  const BlockIds locate(p, block.sequence);
  // threads below kKeys look up where the keys and values of a tile are
  const auto locate_tile = [&](int tile) {
    if (threadIdx.x < kKeys) {
      const Place place = locate(min(tile * kKeys + static_cast<int>(threadIdx.x), block.seq_len - 1));
      const unsigned short** const to = row_pointers + (tile & 1) * 2 * kKeys + threadIdx.x;
      to[0] = p.k_cache + kv_head * p.k_head + place.block * p.k_block + place.slot * p.k_slot;
      to[kKeys] = p.v_cache + kv_head * p.v_head + place.block * p.v_block + place.slot * p.v_slot;
    }
  };
  const auto copy_tile = [&](int tile) {
    const unsigned short* const* const from = row_pointers + (tile & 1) * 2 * kKeys;
    const unsigned key_tile = queries + Layout::kKeysAt + (tile & 1) * Layout::kTileBytes;
    const unsigned value_tile = queries + Layout::kValuesAt + (tile & 1) * Layout::kTileBytes;
#pragma unroll 4
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      ptx::copy_async_16(chunk_address(key_tile, row, chunk), from[row] + chunk * 8);
      ptx::copy_async_16(chunk_address(value_tile, row, chunk), from[kKeys + row] + chunk * 8);
    }
  };

  // this lane's rows of the warp's 16: g and g + 8
  const int first_row = warp * 16 + (lane >> 2);
  int position[2];
  float slope[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = min(first_row + 8 * i, block.num_rows - 1);
    position[i] = block.position(row, p.group_size);
    const int q_head = place_of_row(p, block, kv_head, row).q_head;
    slope[i] = p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[q_head] * kLog2E;
  }
  RowStates<kDimBlocks> states;

  if (num_tiles > 0) locate_tile(first_tile);
  __syncthreads();
  if (num_tiles > 0) copy_tile(first_tile);
  ptx::commit_copies();
  for (int tile = first_tile; tile < first_tile + num_tiles; ++tile) {
    if (tile + 1 < first_tile + num_tiles) locate_tile(tile + 1);
    __syncthreads();  // the pointers are there, and all warps are done with the tile that the next copies overwrite
    if (tile + 1 < first_tile + num_tiles) copy_tile(tile + 1);
    ptx::commit_copies();
    ptx::wait_for_copies<1>();
    __syncthreads();

    const unsigned key_tile = queries + Layout::kKeysAt + (tile & 1) * Layout::kTileBytes;
    const unsigned value_tile = queries + Layout::kValuesAt + (tile & 1) * Layout::kTileBytes;
    float s[kKeys / 8][4];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
    for (int d = 0; d < kDimBlocks; ++d) {
      unsigned a[4];
      ptx::load_matrices(a, chunk_address(queries, warp * 16 + (lane & 15), 2 * d + (lane >> 4)));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        unsigned b[4];
        const int key = 16 * n + (lane & 7) + (lane >> 4) * 8;
        ptx::load_matrices(b, chunk_address(key_tile, key, 2 * d + (lane >> 3 & 1)));
        scalar_t::multiply_add(s[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
        scalar_t::multiply_add(s[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }

    const int first = tile * kKeys;
    const bool is_partial = first < keys.full_begin || first + kKeys > keys.full_end;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + 8 * n + 2 * (lane & 3) + (i & 1);
        s[n][i] = scaled_score(p, s[n][i]);
        if (p.alibi_slopes != nullptr) {
          s[n][i] -= slope[i >> 1] * fabsf(static_cast<float>(position[i >> 1] - key));
        }
        if (is_partial && !is_visible(p, position[i >> 1], key, block.seq_len)) s[n][i] = -kInfinity;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = states.m[r];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      highest = max_over_columns(highest);
      const float base = base_of(highest);
      states.raise(r, highest, base);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        s[n][2 * r] = ptx::exp2(s[n][2 * r] - base);
        s[n][2 * r + 1] = ptx::exp2(s[n][2 * r + 1] - base);
        states.l[r] += s[n][2 * r] + s[n][2 * r + 1];
      }
    }
    if (is_partial) {
      // rows that see an infinity or NaN get it here, and it is taken out of the product, because 0 * NaN is NaN
      const auto piece = [&](int i) { return chunk_address(value_tile, i / kChunks, i % kChunks); };
      unsigned any = 0;
      for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) any |= any_nonfinite<scalar_t>(piece(i));
      if (__syncthreads_or(any != 0)) {
#pragma unroll 1
        for (int key = 0; key < kKeys; ++key) {
          const bool sees[2] = {
              is_visible(p, position[0], first + key, block.seq_len),
              is_visible(p, position[1], first + key, block.seq_len)};
#pragma unroll
          for (int d = 0; d < 2 * kDimBlocks; ++d) {
            const unsigned pair = ptx::load_shared_4(chunk_address(value_tile, key, d) + (lane & 3) * 4);
            const unsigned lost = pair & nonfinite_mask<scalar_t>(pair);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              states.o[d][2 * r] += sees[r] ? scalar_t::low(lost) : 0.0f;
              states.o[d][2 * r + 1] += sees[r] ? scalar_t::high(lost) : 0.0f;
            }
          }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) clear_nonfinite<scalar_t>(piece(i));
        __syncthreads();
      }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      // the fragment of the weights is already that of an operand
      const unsigned a[4] = {
          scalar_t::pack(s[2 * n][0], s[2 * n][1]), scalar_t::pack(s[2 * n][2], s[2 * n][3]),
          scalar_t::pack(s[2 * n + 1][0], s[2 * n + 1][1]), scalar_t::pack(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
      for (int d = 0; d < kDimBlocks; ++d) {
        unsigned b[4];
        ptx::load_matrices_transposed(b, chunk_address(value_tile, 16 * n + (lane & 15), 2 * d + (lane >> 4)));
        scalar_t::multiply_add(states.o[2 * d], a[0], a[1], a[2], a[3], b[0], b[1]);
        scalar_t::multiply_add(states.o[2 * d + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
  }
  ptx::wait_for_copies<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    SoftmaxRow sums{states.m[r], sum_over_columns(states.l[r])};
    if (row >= block.num_rows) continue;
    const RowPlace place = place_of_row(p, block, kv_head, row);
    float scale = 1.0f;
    if (p.sinks != nullptr && block.seq_len > 0) sums.absorb_sink(p.sinks[place.q_head] * kLog2E, scale);
    const float factor = sums.normalizer(scale);
    unsigned short* const to = p.out + place.token * p.out_token + place.q_head * p.out_head + 2 * (lane & 3);
#pragma unroll
    for (int d = 0; d < 2 * kDimBlocks; ++d) {
      *reinterpret_cast<unsigned*>(to + 8 * d) =
          scalar_t::pack(states.o[d][2 * r] * factor, states.o[d][2 * r + 1] * factor);
    }
    if (p.lse != nullptr && (lane & 3) == 0) {
      p.lse[static_cast<long long>(place.token) * p.num_kv_heads * p.group_size + place.q_head] = sums.lse();
    }
  }
}

}  // namespace kvt
