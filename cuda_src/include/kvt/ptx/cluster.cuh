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

// barrier.cluster.arrive.release, then wait.acquire: all threads of all CTAs of the cluster.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// mapa: the address of the same place in the shared memory of another CTA.
__device__ __forceinline__ unsigned address_in_rank(unsigned shared, unsigned rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// ld.shared::cluster.v4.f32
__device__ __forceinline__ float4 load_cluster_16(unsigned address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}

// ld.shared::cluster.f32
__device__ __forceinline__ float load_cluster(unsigned address) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
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
