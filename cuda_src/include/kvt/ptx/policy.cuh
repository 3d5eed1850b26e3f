// Which data the second-level cache keeps, one instruction per function.
#pragma once

namespace kvt::ptx {

// createpolicy.fractional.L2::evict_first: for data that is read once.
__device__ __forceinline__ unsigned long long evict_first_policy() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// createpolicy.fractional.L2::evict_last: for data that is read again soon. It is volatile, so that the policy is made
// where it is used and not kept in two registers.
__device__ __forceinline__ unsigned long long evict_last_policy() {
  unsigned long long policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// st.global.L2::cache_hint.f32: store 4 bytes with an L2 policy.
__device__ __forceinline__ void store_4(float* to, float value, unsigned long long policy) {
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(value), "l"(policy) : "memory");
}

}  // namespace kvt::ptx
