// From the states of warps to the output. The warps of a CTA merge their states of a piece. If other CTAs share the
// sequence, each writes a partial result, and the last one to arrive merges them, as NVIDIA's XQA kernels do.
#pragma once

#include <kvt/attention/decode/queries.cuh>
#include <kvt/attention/decode/schedule.cuh>
#include <kvt/ptx/atomic.cuh>

namespace kvt {

constexpr int kRowPitch = kHeadDim + 4;  // floats; rows 2t and dims g of a fragment are in 32 different banks
constexpr int kStateFloats = kRows * (kRowPitch + 2);

__device__ __forceinline__ void add_scaled(float4& sum, float weight, const float4& part) {
  sum.x += weight * part.x, sum.y += weight * part.y, sum.z += weight * part.z, sum.w += weight * part.w;
}

__device__ __forceinline__ void scale(float4& o, float factor) {
  o.x *= factor, o.y *= factor, o.z *= factor, o.w *= factor;
}

// Write 4 dims of a row's output; the thread that has dim 0 also writes its log-sum-exp.
//   row_lse  [kRows] in shared memory; written if there are masses, which are shares of it
__device__ __forceinline__ void write_row(
    const AttentionParams& p, const RowBlock& block, int kv_head, int row, int dim, float4 o, SoftmaxRow sums,
    float* row_lse) {
  const RowPlace place = place_of_row(p, block, kv_head, row);
  if (p.sinks != nullptr && block.seq_len > 0) {
    float factor;
    if (sums.absorb_sink(p.sinks[place.q_head] * kLog2E, factor)) scale(o, factor);
  }
  const float factor = sums.normalizer();
  const uint2 packed{scalar_t::pack(o.x * factor, o.y * factor), scalar_t::pack(o.z * factor, o.w * factor)};
  *reinterpret_cast<uint2*>(p.out + place.token * p.out_token + place.q_head * p.out_head + dim) = packed;
  if ((kHasMasses || p.lse != nullptr) && dim == 0) {
    const float lse = sums.lse();
    if (kHasMasses) row_lse[row] = lse;
    p.lse[static_cast<long long>(place.token) * p.num_kv_heads * p.group_size + place.q_head] = lse;
  }
}

// The warps' states of one piece, in shared memory: o [kRows][kRowPitch], then m [kRows] and l [kRows].
//   kAt  where they begin, in bytes;   kWarpPitch  floats from warp to warp
template <int kAt, int kWarpPitch>
struct WarpStates {
  static constexpr int kM = kRows * kRowPitch;
  static constexpr int kL = kM + kRows;
  static_assert(kStateFloats <= kWarpPitch, "a warp's states fit into its place");
  float* base;

  __device__ __forceinline__ explicit WarpStates(unsigned char* shared)
      : base(reinterpret_cast<float*>(shared + kAt)) {}

  __device__ __forceinline__ void store(const States& states, int num_rows) const {
    float* const own = base + (threadIdx.x >> 5) * kWarpPitch;
    const int lane = lane_id();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (r > 0 && num_rows <= 8 * r) break;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = 8 * r + 2 * (lane & 3) + c;
        const float sum = sum_over_rows(states.l[r][c]);
        if (lane < 4) {
          own[kM + row] = states.m[r][c];
          own[kL + row] = sum;
        }
        float* const to = own + row * kRowPitch + (lane >> 2);
#pragma unroll
        for (int d = 0; d < kDimBlocks; ++d) {
          to[16 * d] = states.o[r][d][c];
          to[16 * d + 8] = states.o[r][d][c + 2];
        }
      }
    }
  }

  // Merge one row over all warps: its m and l, and 4 dims of its o.
  __device__ __forceinline__ SoftmaxRow merge(int row, int dim, float4& o) const {
    return merge_rows<kWarps>(
        [&](int w) { return base[w * kWarpPitch + kM + row]; },
        [&](int w, float weight, float& l) {
          const float* const own = base + w * kWarpPitch;
          add_scaled(o, weight, *reinterpret_cast<const float4*>(own + row * kRowPitch + dim));
          l += weight * own[kL + row];
        });
  }
};

// The partial result in a slot: o of all rows, then their m, then their l.
struct Partial {
  float* base;

  __device__ __forceinline__ Partial(const AttentionParams& p, const Schedule& schedule, int slot)
      : base(p.partials + schedule.place(p, slot) * kPartial) {}
  __device__ __forceinline__ float* m(int row) const { return base + kRows * kHeadDim + row; }
  __device__ __forceinline__ float* l(int row) const { return m(row) + kRows; }
  __device__ __forceinline__ float* o(int row, int dim) const { return base + row * kHeadDim + dim; }
};

// Whether this CTA is the last of `count` to arrive. If so, it sees what the others wrote before they arrived, and the
// counter is 0 again.
__device__ __forceinline__ bool is_last_to_arrive(unsigned* counter, int count) {
  __shared__ bool is_last;
  __syncthreads();  // extends the counter's release and acquire to what the CTA's other threads write and read
  if (threadIdx.x == 0) {
    const unsigned last = count - 1;
    is_last = ptx::increment_acq_rel_gpu(counter, last) == last;
  }
  __syncthreads();
  return is_last;
}

// Partial results that a thread loads together, since what counts is how long the last CTA is alone. Twice as many pieces,
// or more, are merged in two rounds: groups of so many, each by the CTA of it that arrives last, then the groups.
// The tiered kernel is short of registers on older architectures.
constexpr int kMergedAtOnce = kHeadDim > 64 && (!KVT_TIERED || __CUDA_ARCH__ >= 900) ? 16 : 8;

__device__ __forceinline__ int pieces_of_group(const Piece& piece) {
  return piece.num_pieces >= 2 * kMergedAtOnce ? kMergedAtOnce : 1;
}

// Merge 4 dims of a row over every `step`-th of the sequence's pieces from `begin` to before `end`, in their order.
__device__ __forceinline__ SoftmaxRow merge_partials(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece, int begin, int end, int step, int row,
    int dim, float4& o) {
  SoftmaxRow sums;
#pragma unroll 1
  for (int first = begin; first < end; first += kMergedAtOnce * step) {
    SoftmaxRow of_part[kMergedAtOnce];
    float4 parts[kMergedAtOnce];
    float highest = sums.m;
#pragma unroll
    for (int k = 0; k < kMergedAtOnce; ++k) {
      parts[k] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (first + k * step >= end) continue;
      const Partial partial(p, schedule, piece.slot_of(first + k * step));
      of_part[k] = {ptx::load_l2(partial.m(row)), ptx::load_l2(partial.l(row))};
      parts[k] = ptx::load_l2_16(partial.o(row, dim));
    }
#pragma unroll
    for (int k = 0; k < kMergedAtOnce; ++k) highest = fmaxf(highest, of_part[k].m);
    const float base = base_of(highest);
    scale(o, raise(sums.m, sums.l, highest, base));
#pragma unroll
    for (int k = 0; k < kMergedAtOnce; ++k) {
      const float weight = ptx::exp2(of_part[k].m - base);
      sums.l += weight * of_part[k].l;
      add_scaled(o, weight, parts[k]);
    }
  }
  return sums;
}

// Arrive with a piece's partial result. The CTA that arrives last in the piece's group merges the group into the partial
// result of its first piece. Returns whether this CTA was the last of all.
__device__ __forceinline__ bool arrive_with_piece(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece) {
  int arrivals = piece.num_pieces;
  if (pieces_of_group(piece) > 1) {
    const int begin = piece.number() / kMergedAtOnce * kMergedAtOnce;
    const int count = min(kMergedAtOnce, piece.num_pieces - begin);
    const int slot = piece.slot_of(begin);
    if (!is_last_to_arrive(p.group_counters + schedule.place(p, slot), count)) return false;
    __shared__ float2 merged[kRows];
    const Partial to(p, schedule, slot);
    for (int i = threadIdx.x; i < piece.block.num_rows * kHeadDim / 4; i += kThreads) {
      const int row = i / (kHeadDim / 4);
      const int dim = i % (kHeadDim / 4) * 4;
      float4 o{0.0f, 0.0f, 0.0f, 0.0f};
      const SoftmaxRow sums = merge_partials(p, schedule, piece, begin, begin + count, 1, row, dim, o);
      *reinterpret_cast<float4*>(to.o(row, dim)) = o;
      if (dim == 0) merged[row] = {sums.m, sums.l};
    }
    __syncthreads();  // all threads have read the m and l that are replaced
    if (threadIdx.x < piece.block.num_rows) {
      *to.m(threadIdx.x) = merged[threadIdx.x].x;
      *to.l(threadIdx.x) = merged[threadIdx.x].y;
    }
    arrivals = (arrivals + kMergedAtOnce - 1) / kMergedAtOnce;
  }
  return is_last_to_arrive(p.counters + schedule.counter(p, piece), arrivals);
}

// Write the output of a sequence from the partial results of its pieces. Only the last CTA to arrive calls this.
__device__ __forceinline__ void merge_pieces(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece, float* row_lse) {
  const int step = pieces_of_group(piece);
  for (int i = threadIdx.x; i < piece.block.num_rows * kHeadDim / 4; i += kThreads) {
    const int row = i / (kHeadDim / 4);
    const int dim = i % (kHeadDim / 4) * 4;
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
    const SoftmaxRow sums = merge_partials(p, schedule, piece, 0, piece.num_pieces, step, row, dim, o);
    write_row(p, piece.block, schedule.kv_head(), row, dim, o, sums, row_lse);
  }
}

}  // namespace kvt
