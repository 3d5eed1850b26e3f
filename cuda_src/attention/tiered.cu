// Tiered decode: like decode.cu, for sequences whose tokens are in a 16-bit, an int8 and an int4 tier, with one
// softmax.
//
//   q, k_cache, v_cache, seq_lens, out, lse   as in decode.cu; the caches are the hot tier, [num_granules, ...]
//   warm, cold     blocks of 64 tokens, see kvtoolkit/formats/quantized.py
//   units          the units that each sequence's queries see, see kvt/attention/units.cuh and units.cu
//
// Launch:   as decode.cu without clusters; dynamic shared memory for the FIFOs of units, then the warps' states.
//           head_dim 64 or 128. sm_80 and later. One more macro: KVT_SPLIT_ROWS (1: no sequence has more than 4 query
//           rows to a kv head).
// Numerics: scores and running state in float32; the weights of the hot tier in scalar_t, those of codes in float16 for
//           every model.
// Source:   as decode.cu; codes as subnormal halves, and the zero point as a product with a constant, are our own.
#define KVT_TIERED 1
#define KVT_CLUSTER 1
#include <kvt/attention/tiered/cold.cuh>
#include <kvt/attention/tiered/hot.cuh>
#include <kvt/attention/tiered/warm.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

using Stored = WarpStates<kFifoBytes, kStateFloats>;

extern "C" __global__ void __launch_bounds__(kThreads, KVT_PER_SM) kvt_tiered(const __grid_constant__ TieredParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x >> 5;
  if (p.wait_first) ptx::wait_for_dependencies();
  Schedule schedule(p);
  const int kv_head = schedule.kv_head();
  const unsigned fifo = ptx::shared_address(shared) + warp * kStages * kStageBytes;
  Piece piece;
  if (!schedule.next(p, piece)) {
    ptx::wait_for_dependencies();  // a kernel that waits for this one relies on the earlier ones, too
    return;
  }
  const unsigned long long policy = ptx::evict_first_policy();
  const unsigned long long mass_policy = ptx::evict_last_policy();
  UnitReader reader(p, schedule, piece);
  Unit staged[kStages];  // what is in each stage, or on its way there
  Unit ahead;
  bool is_ahead = reader.next(p, ahead);
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    staged[i] = ahead;
    if (is_ahead) {
      if (reader.is_new(ahead)) ptx::wait_for_dependencies();
      copy_unit(p, kv_head, reader.seq_len(), fifo + i * kStageBytes, ahead, policy);
      if (kStages > 1 || i + 1 < kStages) is_ahead = reader.next(p, ahead);
    }
    ptx::commit_copies();
  }
  if (kStages == 1 && is_ahead) is_ahead = reader.next(p, ahead);
  // All earlier kernels have finished, so everything may be read. Release the dependent launch only now: the next
  // kernel may then rely on every write made before this kernel.
  ptx::wait_for_dependencies();
  ptx::launch_dependents();

  const Stored stored(shared);
  int stage = 0;
  __shared__ float row_lse[kRows];
  Queries queries;
  CodeQueries code_queries;
  do {
    if (queries.sequence != piece.block.sequence) {
      queries.load(p, piece.block, kv_head, kSplitRows ? 3 : -1);
      code_queries.make(queries);
    }
    TileMassWriter masses;
    if (kHasMasses) masses.locate(p, piece.block);
    const Columns columns = columns_of(p, piece.block, kv_head);
    Walk walk{p, columns,  visible_keys(p, piece.block), piece.block.seq_len, p.cap_outer == 0.0f ? p.scale_log2 : 1.0f,
              0, UnitLse()};
    TieredStates states;
#pragma unroll 1
    for (int unit = first_of_warp(piece.begin); unit < piece.end; unit += kStride) {
      ptx::wait_for_copies<kStages - 1>();
      __syncwarp();
      const unsigned at = fifo + stage * kStageBytes;
      walk.unit = unit;
      Unit present = staged[0];
      if (present.tier() == Tier::kCold) {
        attend_cold(walk, code_queries, at, present.position(), states);
      } else if (present.tier() == Tier::kWarm) {
        attend_warm(walk, code_queries, at, present.position(), states);
      } else {
        attend_hot(walk, queries, at, present.position(), states);
      }
      if (kHasMasses) walk.unit_lse.write(p, piece.block, kv_head, unit, piece.end, mass_policy);
      __syncwarp();
#pragma unroll
      for (int i = 0; i + 1 < kStages; ++i) staged[i] = staged[i + 1];
      staged[kStages - 1] = ahead;
      if (is_ahead) {
        copy_unit(p, kv_head, reader.seq_len(), at, ahead, policy);
        is_ahead = reader.next(p, ahead);  // the look-up has until the next unit to arrive
      }
      ptx::commit_copies();
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    states.count_in(false);

    __syncthreads();  // the states of the piece before have been read
    stored.store(states, piece.block.num_rows);
    __syncthreads();
    finish_piece(p, schedule, piece, kv_head, stored, masses, row_lse);
  } while (schedule.next(p, piece));
}

}  // namespace kvt
