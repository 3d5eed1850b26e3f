// Moves: copy whole granules inside an arena, keys and values of all layers, for forks, merges and compaction.
//
//   arena   [num_arrays, num_granules, granule_nbytes] by strides; an array is the keys or the values of one layer
//   moves   up to kMaxMoves pairs of granules, in the parameters, so that nothing has to be copied to the device first; or
//           any number in a list on the device, which migrate.cu makes
//
// Launch:   grid = (CTAs of one array, num_arrays), CTA 256, 16 bytes per thread and step. Moves run in any order, so
//           no granule may be both read and written. kvt_transfer, for moves between the device and pinned host memory,
//           has grid = (CTAs), CTA 1024: few CTAs fill the link, and more would only keep others from running. Any
//           architecture.
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kMaxMoves = 448;  // the struct stays below the 4 KB that parameters may take

struct Arena {
  char* arena;
  long long array_stride, granule_stride;  // bytes
  int granule_vectors;                     // of 16 bytes
  int num_moves;                           // in the parameters
};

// Packed by kvtoolkit/cuda/copy.py, field by field in this order, those of the base first.
struct MoveParams : Arena {
  int sources[kMaxMoves];
  int targets[kMaxMoves];
};

struct ListedMoveParams : Arena {
  const int* num_merges;
  const int* merges;  // [num_merges, 16] 8 granules to read, 8 to write; the first is -1 where nothing is to be done
};

// Copy granule source_of(i) to target_of(i) of this CTA's array, for each i below num_moves; a negative one is none.
template <typename Source, typename Target>
__device__ __forceinline__ void move_all(const Arena& p, int num_moves, Source source_of, Target target_of) {
  constexpr int kUnroll = 4;  // loads under way in a thread
  char* const array = p.arena + blockIdx.y * p.array_stride;
  const int total = num_moves * p.granule_vectors;
  for (int base = blockIdx.x * 256 * kUnroll + threadIdx.x; base < total; base += gridDim.x * 256 * kUnroll) {
    uint4 words[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int index = base + i * 256;
      if (index < total) {
        const int move = index / p.granule_vectors;
        const long long inside = (index - move * p.granule_vectors) * 16ll;
        const long long source = source_of(move);
        if (source >= 0) words[i] = __ldcs(reinterpret_cast<const uint4*>(array + source * p.granule_stride + inside));
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int index = base + i * 256;
      if (index < total) {
        const int move = index / p.granule_vectors;
        const long long inside = (index - move * p.granule_vectors) * 16ll;
        const long long target = target_of(move);
        if (target >= 0) *reinterpret_cast<uint4*>(array + target * p.granule_stride + inside) = words[i];
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) kvt_move(const __grid_constant__ MoveParams p) {
  const auto source_of = [&](int i) -> long long { return p.sources[i]; };
  const auto target_of = [&](int i) -> long long { return p.targets[i]; };
  move_all(p, p.num_moves, source_of, target_of);
}

struct TransferParams : Arena {
  long long num_arrays;
  int sources[kMaxMoves];
  int targets[kMaxMoves];
};

struct ListedTransferParams : Arena {
  long long num_arrays;
  const int* num_pairs;
  const int* pairs;  // [num_pairs, 2] the granule to read, the one to write
};

// Copy in every array granule source_of(i) to target_of(i), for each i below num_moves, by all threads of the grid.
template <typename Source, typename Target>
__device__ __forceinline__ void transfer_all(
    const Arena& p, long long num_arrays, int num_moves, Source source_of, Target target_of) {
  constexpr int kUnroll = 4;  // loads under way in a thread
  const int of_array = num_moves * p.granule_vectors;
  const long long total = of_array * num_arrays;
  const long long step = gridDim.x * 1024ll * kUnroll;
  for (long long base = blockIdx.x * 1024ll * kUnroll + threadIdx.x; base < total; base += step) {
    uint4 words[kUnroll];
    char* targets[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const long long index = base + i * 1024;
      if (index < total) {
        const int array = index / of_array;
        const int in_array = index - static_cast<long long>(array) * of_array;
        const int move = in_array / p.granule_vectors;
        char* const at = p.arena + array * p.array_stride + (in_array - move * p.granule_vectors) * 16ll;
        words[i] = __ldcs(reinterpret_cast<const uint4*>(at + source_of(move) * p.granule_stride));
        targets[i] = at + target_of(move) * p.granule_stride;
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (base + i * 1024 < total) __stcs(reinterpret_cast<uint4*>(targets[i]), words[i]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(1024) kvt_transfer(const __grid_constant__ TransferParams p) {
  const auto source_of = [&](int i) { return p.sources[i]; };
  const auto target_of = [&](int i) { return p.targets[i]; };
  transfer_all(p, p.num_arrays, p.num_moves, source_of, target_of);
}

extern "C" __global__ void __launch_bounds__(1024) kvt_transfer_listed(const __grid_constant__ ListedTransferParams p) {
  const auto source_of = [&](int i) { return p.pairs[2 * i]; };
  const auto target_of = [&](int i) { return p.pairs[2 * i + 1]; };
  transfer_all(p, p.num_arrays, *p.num_pairs, source_of, target_of);
}

extern "C" __global__ void __launch_bounds__(256) kvt_move_listed(const __grid_constant__ ListedMoveParams p) {
  ptx::wait_for_dependencies();
  const auto place_of = [](int i) { return i / 8 * 16ll + i % 8; };
  const auto source_of = [&](int i) -> long long { return p.merges[place_of(i)]; };
  const auto target_of = [&](int i) -> long long { return p.merges[place_of(i) + 8]; };
  move_all(p, *p.num_merges * 8, source_of, target_of);
}

}  // namespace kvt
