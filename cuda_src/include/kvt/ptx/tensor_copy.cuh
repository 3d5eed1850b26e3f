// Bulk copies (TMA, sm_90) from global to shared memory: a box of an array that a map describes, or a run of bytes.
#pragma once

namespace kvt::ptx {

// What cuTensorMapEncodeTiled makes. Passed as a `const __grid_constant__` parameter.
struct alignas(64) TensorMap {
  unsigned long long words[16];
};

// prefetch.tensormap
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// cp.async.bulk.tensor.5d: the box that begins at these coordinates; its bytes count on `barrier`. What is outside of
// the array is filled with zeros, and counts too.
__device__ __forceinline__ void copy_box(
    unsigned to_shared, const TensorMap& map, unsigned barrier, int x0, int x1, int x2, int x3, int x4,
    unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to_shared),
      "l"(&map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "l"(policy)
      : "memory");
}

// cp.async.bulk: bytes that follow each other, a multiple of 16 as both addresses; they count on `barrier`.
__device__ __forceinline__ void copy_bytes(unsigned to_shared, const void* from, unsigned nbytes, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to_shared),
      "l"(from), "r"(nbytes), "r"(barrier)
      : "memory");
}

}  // namespace kvt::ptx
