// Clusters and dependent launch (sm_90 and later), one or two instructions per function. On older chips there are no
// clusters, and the functions for dependent launch do nothing.
#pragma once

namespace kvt::ptx {

#if __CUDA_ARCH__ >= 900

// %cluster_ctarank
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// barrier.cluster.arrive.relaxed: called by whole warps. It does not publish earlier writes, see initialize_barrier.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// barrier.cluster.wait.acquire: called by whole warps; waits until all threads of the cluster have arrived.
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// mapa: the address of the same place in the shared memory of another CTA of the cluster.
__device__ __forceinline__ unsigned address_in_rank(unsigned shared, unsigned rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// mbarrier.init, and the fence that makes it visible to the cluster after the cluster's barrier.
__device__ __forceinline__ void initialize_barrier(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1; fence.mbarrier_init.release.cluster;" ::"r"(barrier),
               "r"(arrivals)
               : "memory");
}

// mbarrier.arrive.expect_tx: arrive once, and expect as many bytes from st.async.
__device__ __forceinline__ void arrive_and_expect(unsigned barrier, unsigned nbytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(nbytes) : "memory");
}

// mbarrier.try_wait.parity.acquire.cluster: wait until the first phase is complete.
__device__ __forceinline__ void wait_for_barrier(unsigned barrier) {
  unsigned is_complete;
  do {
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0; "
        "selp.u32 %0, 1, 0, done; }"
        : "=r"(is_complete)
        : "r"(barrier)
        : "memory");
  } while (is_complete == 0);
}

// st.async: store to the shared memory of another CTA, whose barrier counts the bytes that have arrived.
__device__ __forceinline__ void store_async(unsigned address, float4 v, unsigned barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void store_async(unsigned address, float2 v, unsigned barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "f"(v.x), "f"(v.y), "r"(barrier)
               : "memory");
}

// griddepcontrol.wait: wait until the kernels before this one have finished and their writes are visible.
__device__ __forceinline__ void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// griddepcontrol.launch_dependents: the next kernel may begin.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#else

__device__ __forceinline__ void wait_for_dependencies() {}
__device__ __forceinline__ void launch_dependents() {}

#endif

}  // namespace kvt::ptx
