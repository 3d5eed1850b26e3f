// Clusters and dependent launch (sm_90 and later), an instruction or two per function; on older chips they do nothing.
#pragma once

namespace kvt::ptx {

#if __CUDA_ARCH__ >= 900

// %cluster_ctarank
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// barrier.cluster.arrive.relaxed: by whole warps; shows nobody what was written before, see initialize_barrier.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// barrier.cluster.wait.acquire: by whole warps, until all threads of all CTAs of the cluster have arrived.
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// mapa: the address of the same place in the shared memory of another CTA.
__device__ __forceinline__ unsigned address_in_rank(unsigned shared, unsigned rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// mbarrier.init, and the fence that shows it to the cluster once it has met at its barrier.
__device__ __forceinline__ void initialize_barrier(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1; fence.mbarrier_init.release.cluster;"
               :: "r"(barrier), "r"(arrivals) : "memory");
}

// mbarrier.arrive.expect_tx: one arrival, and bytes that st.async must still bring.
__device__ __forceinline__ void arrive_and_expect(unsigned barrier, unsigned nbytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(nbytes) : "memory");
}

// mbarrier.try_wait.parity.acquire.cluster: until the first phase is complete.
__device__ __forceinline__ void wait_for_barrier(unsigned barrier) {
  unsigned is_complete;
  do {
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0; "
        "selp.u32 %0, 1, 0, done; }" : "=r"(is_complete) : "r"(barrier) : "memory");
  } while (is_complete == 0);
}

// st.async: to the shared memory of another CTA, whose barrier counts the bytes that have come.
__device__ __forceinline__ void store_async(unsigned address, float4 v, unsigned barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               :: "r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier) : "memory");
}

__device__ __forceinline__ void store_async(unsigned address, float2 v, unsigned barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
               :: "r"(address), "f"(v.x), "f"(v.y), "r"(barrier) : "memory");
}

// griddepcontrol.wait: until the kernels before this one are done and their writes are seen.
__device__ __forceinline__ void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// griddepcontrol.launch_dependents: the next kernel may begin.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#else

__device__ __forceinline__ void wait_for_dependencies() {}
__device__ __forceinline__ void launch_dependents() {}

#endif

}  // namespace kvt::ptx
