// Clusters and dependent launch (sm_90 and later), one instruction per function; on older chips they do nothing.
#pragma once

namespace kvt::ptx {

#if __CUDA_ARCH__ >= 900

// %cluster_ctarank
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// barrier.cluster.arrive.release: what this thread wrote before is seen by those that wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

// barrier.cluster.wait.acquire: until all threads of all CTAs of the cluster have arrived.
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// mapa: the address of the same place in the shared memory of another CTA.
__device__ __forceinline__ unsigned address_in_rank(unsigned shared, unsigned rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// st.shared::cluster.v4.f32
__device__ __forceinline__ void store_cluster_16(unsigned address, float4 v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// st.shared::cluster.f32
__device__ __forceinline__ void store_cluster(unsigned address, float v) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(address), "f"(v) : "memory");
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
