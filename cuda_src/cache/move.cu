// Moves: copy whole granules inside an arena, keys and values of all layers, for forks, merges and compaction.
//
//   arena   [num_arrays, num_granules, granule_nbytes] by strides; an array is the keys or the values of one layer
//   moves   up to kMaxMoves pairs of granules, in the parameters, so that nothing has to be copied to the device first
//
// Launch:   grid = (CTAs of one array, num_arrays), CTA 256, 16 bytes per thread and step. Moves run in any order, so
//           no granule may be both read and written. Any architecture.
namespace kvt {

constexpr int kMaxMoves = 448;  // the struct stays below the 4 KB that parameters may take

// Packed by kvtoolkit/cuda/copy.py, field by field in this order.
struct MoveParams {
  char* arena;
  long long array_stride, granule_stride;  // bytes
  int granule_vectors;                     // of 16 bytes
  int num_moves;
  int sources[kMaxMoves];
  int targets[kMaxMoves];
};

extern "C" __global__ void __launch_bounds__(256) kvt_move(const __grid_constant__ MoveParams p) {
  constexpr int kUnroll = 4;  // loads under way in a thread
  char* const array = p.arena + blockIdx.y * p.array_stride;
  const int total = p.num_moves * p.granule_vectors;
  for (int base = blockIdx.x * 256 * kUnroll + threadIdx.x; base < total; base += gridDim.x * 256 * kUnroll) {
    uint4 words[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int index = base + i * 256;
      if (index < total) {
        const int move = index / p.granule_vectors;
        const long long inside = (index - move * p.granule_vectors) * 16ll;
        words[i] = __ldcs(reinterpret_cast<const uint4*>(array + p.sources[move] * p.granule_stride + inside));
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int index = base + i * 256;
      if (index < total) {
        const int move = index / p.granule_vectors;
        const long long inside = (index - move * p.granule_vectors) * 16ll;
        *reinterpret_cast<uint4*>(array + p.targets[move] * p.granule_stride + inside) = words[i];
      }
    }
  }
}

}  // namespace kvt
