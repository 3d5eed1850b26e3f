// Atomics and loads with their order and scope in the name, one instruction per function.
#pragma once

namespace kvt::ptx {

// atom.inc.acq_rel.gpu: add one, or restart at 0 if the value is `last`. Returns the old value.
__device__ __forceinline__ unsigned increment_acq_rel_gpu(unsigned* counter, unsigned last) {
  unsigned old;
  asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
  return old;
}

// ld.global.cg.v4: past L1, which may hold a stale copy of what another SM has written.
__device__ __forceinline__ float4 load_l2_16(const float* from) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from));
  return v;
}

// ld.global.cg: past L1.
__device__ __forceinline__ float load_l2(const float* from) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from));
  return v;
}

}  // namespace kvt::ptx
