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

  __device__ __forceinline__ void store(const States& states) const {
    float* const own = base + (threadIdx.x >> 5) * kWarpPitch;
    const int lane = lane_id();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
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

// Write 4 dims of a piece's partial result, and with the first of them the row's m and l.
__device__ __forceinline__ void write_partial(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece, int row, int dim, float4 o,
    SoftmaxRow sums) {
  float* const partial = schedule.partial(p, piece.slot);
  *reinterpret_cast<float4*>(partial + row * kHeadDim + dim) = o;
  if (dim == 0) {
    partial[kRows * kHeadDim + row] = sums.m;
    partial[kRows * kHeadDim + kRows + row] = sums.l;
  }
}

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

// Merge the partial results of a sequence's pieces, in the order of the pieces. Only the last CTA to arrive calls this.
__device__ __forceinline__ void merge_pieces(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece, float* row_lse) {
  for (int i = threadIdx.x; i < piece.block.num_rows * kHeadDim / 4; i += kThreads) {
    const int row = i / (kHeadDim / 4);
    const int dim = i % (kHeadDim / 4) * 4;
    SoftmaxRow sums;
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int k = 0; k < piece.num_pieces; ++k) {  // one pass, not two, so that all loads are under way together
      const float* const partial = schedule.partial(p, piece.slot_of(k));
      const float m = ptx::load_l2(partial + kRows * kHeadDim + row);
      const float l = ptx::load_l2(partial + kRows * kHeadDim + kRows + row);
      const float4 part = ptx::load_l2_16(partial + row * kHeadDim + dim);
      const MergeFactors factors = sums.merge({m, l});
      scale(o, factors.own);
      add_scaled(o, factors.other, part);
    }
    write_row(p, piece.block, schedule.kv_head(), row, dim, o, sums, row_lse);
  }
}

}  // namespace kvt
