// Asynchronous copies from global to shared memory (sm_80 and later), one instruction per function.
#pragma once

namespace kvt::ptx {

// The 32-bit address that shared-memory instructions take.
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  unsigned address;
  asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }" : "=r"(address) : "l"(pointer));
  return address;
}

// cp.async.cg.shared.global: 16 bytes past L1 with an L2 policy, prefetching the 128 bytes around them into L2.
// Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async_16(unsigned to_shared, const void* from, unsigned long long policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from),
               "l"(policy)
               : "memory");
}

// cp.async.cg.shared.global: 16 bytes past L1.
__device__ __forceinline__ void copy_async_16(unsigned to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}

// cp.async.commit_group: the copies since the last call become a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: wait until at most kPending groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace kvt::ptx
