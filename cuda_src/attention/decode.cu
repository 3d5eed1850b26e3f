// Decode and verify: the few query rows of one sequence and kv head against one split of its keys, per CTA.
//
//   q            [num_tokens, num_q_heads, head_dim]               scalar_t, rows of 16 bytes aligned
//   k_cache      block, kv head and slot by strides, head_dim contiguous, rows aligned to 16 bytes; v_cache the same
//   block_table  [batch, max_blocks] int32 block ids; entries come as a list of granules, see expand.cu
//   seq_lens     [batch] int32, tokens, the new ones included;     0 = padding row, of which nothing is read
//   out          [num_tokens, num_q_heads, head_dim] scalar_t;     lse [num_tokens, num_q_heads] float32, natural log
//
// Launch:   CTA 32 * KVT_WARPS; dynamic shared memory for the FIFOs, then the warps' states or an Inbox; the grid is
//           planned (KVT_PLANNED):  (num_kv_heads, num_row_blocks, ranges)
//           even:                   (num_kv_heads * blocks of rows, max_splits)
//           even with KVT_CLUSTER:  (KVT_CLUSTER, num_kv_heads, blocks of rows)
//           sm_80 and later. Macros: KVT_HEAD_DIM, KVT_BF16, KVT_ROW_TILES (8 query rows each), KVT_WARPS,
//           KVT_STAGES, KVT_PLANNED, KVT_CLUSTER (CTAs that share one sequence and merge through shared memory, sm_90;
//           1 = none), KVT_PER_SM (CTAs of an SM).
// Numerics: scores and running state in float32, weights in scalar_t; an empty sequence gives out = 0, lse = -inf.
// Source:   online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867), alg. 3; split-KV, Dao et al. 2023
//           (Flash-Decoding).
//
// Tokens are the 16 rows of an MMA and query rows its 8 columns (S^T = K Q^T, O^T = V^T P^T), so a group of up to 8
// heads takes one MMA. A warp owns every KVT_WARPS-th step of 16 tokens, and has a FIFO of its own in shared memory, so
// the loop needs no CTA barrier. The FIFO continues from one sequence of the CTA's range to the next.
#define KVT_TIERED 0
#include <kvt/attention/decode/masses.cuh>
#include <kvt/attention/locate.cuh>
#include <kvt/ptx/async_copy.cuh>
#include <kvt/ptx/policy.cuh>
#include <kvt/ptx/cluster.cuh>
#include <kvt/ptx/matrix.cuh>

namespace kvt {

constexpr int kChunks = kHeadDim / 8;            // of 16 bytes, in a token's row
constexpr int kPitch = (kChunks + 7) / 8 * 8;    // chunks from row to row; the XOR in copy_step stays inside 8
constexpr int kHalfStage = kStep * kPitch * 16;  // bytes of K; V has as many
constexpr int kStageBytes = 2 * kHalfStage;
constexpr int kFifoBytes = kWarps * kStages * kStageBytes;
using Locator = StepBlocks<kStride>;
// The warps' states of a piece follow the FIFOs. In a cluster each takes the place of the warp's FIFO, which is no
// longer needed by then.
using Stored = WarpStates<kCluster == 1 ? kFifoBytes : 0, kCluster == 1 ? kStateFloats : kStages * kStageBytes / 4>;

// The work of a sequence that CTAs share: steps of 16 tokens.
__device__ __forceinline__ StepRange work_of(const AttentionParams& p, const RowBlock& block) {
  return visible_steps(p.left, p.right, block.seq_len, block.num_queries);
}

__device__ __forceinline__ int first_unit(const AttentionParams&, int, StepRange steps, int tile) {
  return max(steps.begin, min(steps.end, tile * (kTile / kStep)));
}

// Copy the K and V of 16 tokens to a stage. Lane l holds the place of token l % 16.
__device__ __forceinline__ void copy_step(
    const AttentionParams& p, int kv_head, unsigned stage, Place place, unsigned long long policy) {
  const int lane = lane_id();
  // lanes 0-15 compute where the keys are, lanes 16-31 the values
  const unsigned short* const row =
      lane < 16 ? p.k_cache + kv_head * p.k_head + place.block * p.k_block + place.slot * p.k_slot
                : p.v_cache + kv_head * p.v_head + place.block * p.v_block + place.slot * p.v_slot;
#pragma unroll
  for (int i = 0; i < kStep * kChunks / 32; ++i) {
    const int piece = i * 32 + lane;
    const int token = piece / kChunks;
    const int chunk = piece % kChunks;
    const unsigned short* key = broadcast_pointer(row, token);
    const unsigned short* value = broadcast_pointer(row, token + 16);
    const unsigned line = stage + token * kPitch * 16;
    // K is read as 4 chunks of 2 neighbouring rows, V as one chunk of 8 rows; the XOR spreads both over 8 bank groups
    ptx::copy_async_16(line + (chunk ^ (token & 1) << 2) * 16, key + chunk * 8, policy);
    ptx::copy_async_16(line + kHalfStage + (chunk ^ (token & 7)) * 16, value + chunk * 8, policy);
  }
}

// Absorb the 16 tokens from `first` on, for the rows of the first `kTiles` row tiles.
template <int kTiles>
__device__ __forceinline__ void attend_step(
    const AttentionParams& p, const uint4 (&q)[kRowTiles][kDimPairs], const Columns& columns, const KeyRange& keys,
    int seq_len, unsigned stage, int first, States& states, UnitLse& unit_lse) {
  const int lane = lane_id();
  const int g = lane >> 2;
  const int t = lane & 3;

  float s[kTiles][4];
#pragma unroll
  for (int r = 0; r < kTiles; ++r) s[r][0] = s[r][1] = s[r][2] = s[r][3] = 0.0f;
  const unsigned key_row = stage + g * kPitch * 16;
#pragma unroll
  for (int d = 0; d < kDimPairs; ++d) {
    const unsigned chunk = ((4 * d + t) ^ (g & 1) << 2) * 16;
    const uint4 low = ptx::load_shared_16(key_row + chunk);
    const uint4 high = ptx::load_shared_16(key_row + 8 * kPitch * 16 + chunk);
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      // an MMA may take any 16 of the 32 dims, as long as K and Q agree
      scalar_t::multiply_add(s[r], low.x, high.x, low.y, high.y, q[r][d].x, q[r][d].y);
      scalar_t::multiply_add(s[r], low.z, high.z, low.w, high.w, q[r][d].z, q[r][d].w);
    }
  }

  const bool is_partial = first < keys.full_begin || first + kStep > keys.full_end;
  unsigned weights[kTiles][2];
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[r][i] = scaled_score(p, s[r][i]);
    if (p.alibi_slopes != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int distance = columns.position[r][i & 1] - (first + g + (i >> 1) * 8);
        s[r][i] -= columns.slope[r][i & 1] * fabsf(static_cast<float>(distance));
      }
    }
    if (is_partial) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!is_visible(p, columns.position[r][i & 1], first + g + (i >> 1) * 8, seq_len)) s[r][i] = -kInfinity;
      }
    }
    float highest[2], base[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      highest[c] = fmaxf(states.m[r][c], max_over_rows(fmaxf(s[r][c], s[r][c + 2])));
      base[c] = base_of(highest[c]);
    }
    if (__any_sync(kAllLanes, highest[0] > states.m[r][0] || highest[1] > states.m[r][1])) {
#pragma unroll
      for (int c = 0; c < 2; ++c) states.raise(r, c, highest[c], base[c]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[r][i] = ptx::exp2(s[r][i] - base[i & 1]);
    const float sums[2] = {s[r][0] + s[r][2], s[r][1] + s[r][3]};
    states.l[r][0] += sums[0];
    states.l[r][1] += sums[1];
    if (kHasMasses) unit_lse.take(r, first / kStep, base, sums);
    // the weights are tokens x rows, and the next product takes rows x tokens
    weights[r][0] = ptx::transpose_matrix(scalar_t::pack(s[r][0], s[r][1]));
    weights[r][1] = ptx::transpose_matrix(scalar_t::pack(s[r][2], s[r][3]));
  }

  if (is_partial) take_nonfinite<kPitch>(p, columns, seq_len, stage + kHalfStage, first, states);
  const int token = (lane & 7) + (lane >> 4) * 8;
  const unsigned value_row = stage + kHalfStage + token * kPitch * 16;
#pragma unroll
  for (int d = 0; d < kDimBlocks; ++d) {
    unsigned v[4];
    ptx::load_matrices_transposed(v, value_row + ((2 * d + (lane >> 3 & 1)) ^ (token & 7)) * 16);
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      scalar_t::multiply_add(states.o[r][d], v[0], v[1], v[2], v[3], weights[r][0], weights[r][1]);
    }
  }
}

// Looks up the steps of a warp, a few ahead of the one it attends to: where their tokens are, and the next queries.
class StepReader {
 public:
  Queries queries;  // of the sequence of the last look-up, if there are registers for them

  // `locate` has been started at `step`; -1 = not started.
  __device__ __forceinline__
  StepReader(const AttentionParams& p, const Schedule& schedule, const Piece& piece, const Locator& locate, int step)
      : schedule_(schedule), locate_(locate), piece_(piece), step_(first_of_warp(piece.begin)) {
    if (step_ != step && step_ < piece_.end) {
      locate_ = Locator(p, piece.block.sequence);
      locate_.seek(step_);
    }
  }

  // Look up the next step. Returns, in lane l, the place of its token l % 16; in all lanes slot -1 if there is no next
  // step. The queries that are loaded here are not used here, so nothing waits for them yet.
  __device__ __forceinline__ Place next(const AttentionParams& p, bool may_load_queries) {
    while (!is_done_ && step_ >= piece_.end) {
      is_done_ = !schedule_.next(p, piece_);
      if (is_done_) break;
      step_ = first_of_warp(piece_.begin);
      if (step_ < piece_.end) {
        locate_ = Locator(p, piece_.block.sequence);
        locate_.seek(step_);
        if (kRowTiles == 1 && may_load_queries) queries.load(p, piece_.block, schedule_.kv_head());
      }
    }
    if (is_done_) return {0, -1};
    step_ += kStride;
    return locate_.next(piece_.block.seq_len - 1);
  }

  // Whether the last step of `next` holds tokens of the present queries, which an earlier kernel may still be writing.
  __device__ __forceinline__ bool is_new() const {
    return !is_done_ && (step_ - kStride + 1) * kStep > piece_.block.seq_len - piece_.block.num_queries;
  }

 private:
  Schedule schedule_;
  Locator locate_;
  Piece piece_;
  int step_;
  bool is_done_ = false;
};

#if KVT_CLUSTER > 1

// What a CTA of a cluster receives: each CTA owns a part of the output, and the others send it their states of that
// part.
struct Inbox {
  static constexpr int kTasks = kRows * kHeadDim / 4;  // of 4 dims
  static constexpr int kOwned = (kTasks + kCluster - 1) / kCluster;
  float4 o[kCluster][kOwned];
  float2 sums[kCluster][kOwned];  // m, l
  unsigned long long barrier;     // counts the bytes that have arrived
};

__device__ __forceinline__ void merge_cluster(
    const AttentionParams& p, const Schedule& schedule, const Piece& piece, const Stored& stored, Inbox* inbox,
    float* row_lse) {
  const int rank = ptx::cluster_rank();
  const int num_tasks = piece.block.num_rows * kHeadDim / 4;
  const int num_owned = min(Inbox::kOwned, num_tasks - rank * Inbox::kOwned);
  const unsigned barrier = ptx::shared_address(&inbox->barrier);
  if (threadIdx.x == 0 && num_owned > 0) ptx::arrive_and_expect(barrier, kCluster * num_owned * 24);
  __syncwarp();
  ptx::cluster_wait();  // all CTAs have begun, and their barriers count
  for (int i = threadIdx.x; i < num_tasks; i += kThreads) {
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
    const SoftmaxRow sums = stored.merge(i / (kHeadDim / 4), i % (kHeadDim / 4) * 4, o);
    const int owner = i / Inbox::kOwned;
    const int own = i % Inbox::kOwned;
    const unsigned its_barrier = ptx::address_in_rank(barrier, owner);
    ptx::store_async(ptx::address_in_rank(ptx::shared_address(&inbox->o[rank][own]), owner), o, its_barrier);
    ptx::store_async(
        ptx::address_in_rank(ptx::shared_address(&inbox->sums[rank][own]), owner), float2{sums.m, sums.l}, its_barrier);
  }
  // a CTA that owns nothing is sent nothing, and may leave
  for (int own = threadIdx.x; own < num_owned; own += kThreads) {
    ptx::wait_for_barrier(barrier);
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
    const SoftmaxRow sums = merge_rows<kCluster>(
        [&](int k) { return inbox->sums[k][own].x; },
        [&](int k, float weight, float& l) {
          l += weight * inbox->sums[k][own].y;
          add_scaled(o, weight, inbox->o[k][own]);
        });
    const int i = rank * Inbox::kOwned + own;
    write_row(p, piece.block, schedule.kv_head(), i / (kHeadDim / 4), i % (kHeadDim / 4) * 4, o, sums, row_lse);
  }
}

#endif

#if KVT_CLUSTER > 1
#define KVT_CLUSTER_DIMS __cluster_dims__(KVT_CLUSTER, 1, 1)
#else
#define KVT_CLUSTER_DIMS
#endif

extern "C" __global__ void __launch_bounds__(kThreads, KVT_PER_SM) KVT_CLUSTER_DIMS
    kvt_decode(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x >> 5;
#if KVT_CLUSTER > 1
  Inbox* const inbox = reinterpret_cast<Inbox*>(shared + kFifoBytes);
  if (threadIdx.x == 0) ptx::initialize_barrier(ptx::shared_address(&inbox->barrier), 1);
  __syncwarp();
  ptx::cluster_arrive_relaxed();
#endif
  if (p.wait_first) ptx::wait_for_dependencies();
  Schedule schedule(p);
  const int kv_head = schedule.kv_head();
  const unsigned fifo = ptx::shared_address(shared) + warp * kStages * kStageBytes;
  if (kHeadDim % 32 != 0) {
    // The last product takes dims that do not exist. Q is 0 there, but 0 * NaN is NaN, so K must not hold garbage.
    for (int i = lane_id(); i < kStages * kStageBytes / 16; i += 32) ptx::store_shared_16(fifo + i * 16, {0, 0, 0, 0});
    __syncwarp();
  }

  Locator locate(p, 0);
  int located = -1;
  if (kCluster > 1 && p.left < 0) {  // the first look-ups of the only sequence need not wait for its length
    located = first_of_warp(0);
    locate.seek(located);
  }
  Piece piece;
  if (!schedule.next(p, piece)) {
    ptx::wait_for_dependencies();  // a kernel that waits for this one relies on the earlier ones, too
    return;
  }
  const unsigned long long policy = ptx::evict_first_policy();
  Queries queries;
  if (p.wait_first) queries.load(p, piece.block, kv_head);
  StepReader reader(p, schedule, piece, locate, located);
  Place ahead = reader.next(p, false);
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) {
    if (reader.is_new()) ptx::wait_for_dependencies();
    if (ahead.slot >= 0) copy_step(p, kv_head, fifo + i * kStageBytes, ahead, policy);
    ptx::commit_copies();
    ahead = reader.next(p, p.wait_first);
  }
  // All earlier kernels have finished, so everything may be read. Release the dependent launch only now: the next
  // kernel may then rely on every write made before this kernel.
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  if (!p.wait_first) queries.load(p, piece.block, kv_head);

  const Stored stored(shared);
  int stage = 0;
  __shared__ float row_lse[kRows];
  do {
    if (queries.sequence != piece.block.sequence) {
      if (reader.queries.sequence == piece.block.sequence) {
        queries = reader.queries;
      } else {
        queries.load(p, piece.block, kv_head);
      }
    }
    const Columns columns = columns_of(p, piece.block, kv_head);
    const KeyRange keys = visible_keys(p, piece.block);
    States states;
    UnitLse unit_lse;
    TileMassWriter masses;
    if (kHasMasses) masses.locate(p, piece.block);
    for (int step = first_of_warp(piece.begin); step < piece.end; step += kStride) {
      ptx::wait_for_copies<kStages - 1>();
      __syncwarp();
      const unsigned at = fifo + stage * kStageBytes;
      if (kRowTiles == 1 || piece.block.num_rows > 8) {
        attend_step<kRowTiles>(p, queries.q, columns, keys, piece.block.seq_len, at, step * kStep, states, unit_lse);
      } else {  // one query of a sequence that might have had more
        attend_step<1>(p, queries.q, columns, keys, piece.block.seq_len, at, step * kStep, states, unit_lse);
      }
      if (kHasMasses) unit_lse.write(p, piece.block, kv_head, step, piece.end, ptx::evict_last_policy());
      __syncwarp();
      if (ahead.slot >= 0) copy_step(p, kv_head, fifo + stage * kStageBytes, ahead, policy);
      ptx::commit_copies();
      ahead = reader.next(p, true);  // the look-up has until the next step to arrive
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    if (kCluster == 1) __syncthreads();  // the states of the piece before have been read
    stored.store(states, piece.block.num_rows);
    __syncthreads();
#if KVT_CLUSTER > 1
    merge_cluster(p, schedule, piece, stored, inbox, row_lse);
    if (kHasMasses) masses.write(p, piece.block, kv_head, row_lse);
#else
    finish_piece(p, schedule, piece, kv_head, stored, masses, row_lse);
#endif
  } while (schedule.next(p, piece));
}

}  // namespace kvt
