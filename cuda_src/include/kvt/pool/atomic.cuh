// 64-bit atomics at device scope, with the memory order in the name. On the host they are the compiler's, for real
// threads.
#pragma once

#if defined(__CUDACC__)
#define KVT_ATOMIC __host__ __device__ __forceinline__
#else
#define KVT_ATOMIC inline
#endif

namespace kvt {

using Word = unsigned long long;

KVT_ATOMIC Word load_relaxed(const Word* from) {
#if defined(__CUDA_ARCH__)
  Word value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
#else
  return __atomic_load_n(from, __ATOMIC_RELAXED);
#endif
}

// Load two neighbouring words at a multiple of 16 bytes. Each load is atomic, the pair is not.
KVT_ATOMIC void load_relaxed_pair(const Word* from, Word& low, Word& high) {
#if defined(__CUDA_ARCH__)
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(from) : "memory");
#else
  low = __atomic_load_n(from, __ATOMIC_RELAXED);
  high = __atomic_load_n(from + 1, __ATOMIC_RELAXED);
#endif
}

KVT_ATOMIC Word load_acquire(const Word* from) {
#if defined(__CUDA_ARCH__)
  Word value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
#else
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
#endif
}

KVT_ATOMIC void store_relaxed(Word* to, Word value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
#else
  __atomic_store_n(to, value, __ATOMIC_RELAXED);
#endif
}

KVT_ATOMIC Word fetch_and_acquire(Word* at, Word value) {
#if defined(__CUDA_ARCH__)
  Word old;
  asm volatile("atom.and.acquire.gpu.global.b64 %0, [%1], %2;" : "=l"(old) : "l"(at), "l"(value) : "memory");
  return old;
#else
  return __atomic_fetch_and(at, value, __ATOMIC_ACQUIRE);
#endif
}

KVT_ATOMIC Word fetch_or_release(Word* at, Word value) {
#if defined(__CUDA_ARCH__)
  Word old;
  asm volatile("atom.or.release.gpu.global.b64 %0, [%1], %2;" : "=l"(old) : "l"(at), "l"(value) : "memory");
  return old;
#else
  return __atomic_fetch_or(at, value, __ATOMIC_RELEASE);
#endif
}

// Set the word to `value` if it is `expected`. Returns what it was.
KVT_ATOMIC Word compare_exchange_acquire(Word* at, Word expected, Word value) {
#if defined(__CUDA_ARCH__)
  Word old;
  asm volatile("atom.cas.acquire.gpu.global.b64 %0, [%1], %2, %3;"
               : "=l"(old)
               : "l"(at), "l"(expected), "l"(value)
               : "memory");
  return old;
#else
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE);
  return expected;
#endif
}

KVT_ATOMIC Word exchange_acq_rel(Word* at, Word value) {
#if defined(__CUDA_ARCH__)
  Word old;
  asm volatile("atom.exch.acq_rel.gpu.global.b64 %0, [%1], %2;" : "=l"(old) : "l"(at), "l"(value) : "memory");
  return old;
#else
  return __atomic_exchange_n(at, value, __ATOMIC_ACQ_REL);
#endif
}

KVT_ATOMIC void add_release(Word* at, Word value) {
#if defined(__CUDA_ARCH__)
  asm volatile("red.add.release.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#else
  __atomic_fetch_add(at, value, __ATOMIC_RELEASE);
#endif
}

// Whoever sees an access that this thread makes after the fence also sees those that it made before it, relaxed or not.
KVT_ATOMIC void fence_acq_rel() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
  __atomic_thread_fence(__ATOMIC_ACQ_REL);
#endif
}

}  // namespace kvt
