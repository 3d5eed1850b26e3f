// Barriers in shared memory that count arrivals and bytes (sm_90), and numbered barriers; one instruction per function.
#pragma once

namespace kvt::ptx {

// mbarrier.init
__device__ __forceinline__ void init_barrier(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: makes initialized barriers visible to tensor copies.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive.expect_tx: one arrival, and bytes that copies must still bring.
__device__ __forceinline__ void arrive_expecting(unsigned barrier, unsigned nbytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(nbytes) : "memory");
}

// mbarrier.arrive
__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.try_wait.parity: until the phase of this parity is complete.
__device__ __forceinline__ void wait_for_phase(unsigned barrier, unsigned parity) {
  unsigned is_complete;
  do {
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
        : "=r"(is_complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (is_complete == 0);
}

// mbarrier.test_wait.parity: whether the phase of this parity is complete.
__device__ __forceinline__ bool is_phase_over(unsigned barrier, unsigned parity) {
  unsigned is_complete;
  asm volatile("{ .reg .pred done; mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
               : "=r"(is_complete)
               : "r"(barrier), "r"(parity)
               : "memory");
  return is_complete != 0;
}

// fence.proxy.async: what threads wrote to shared memory is seen by wgmma and tensor copies.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// bar.sync: whole warps meet at a numbered barrier, `threads` in all.
__device__ __forceinline__ void meet(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// bar.arrive: as `meet`, without waiting for the others.
__device__ __forceinline__ void pass(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// bar.red.or: as `meet`; whether `flag` is true in any thread.
__device__ __forceinline__ bool meet_any(int number, int threads, bool flag) {
  unsigned any;
  asm volatile(
      "{ .reg .pred mine, all; setp.ne.u32 mine, %3, 0; bar.red.or.pred all, %1, %2, mine; selp.u32 %0, 1, 0, all; }"
      : "=r"(any)
      : "r"(number), "r"(threads), "r"(static_cast<unsigned>(flag))
      : "memory");
  return any != 0;
}

// elect.sync: true in one lane of the warp.
__device__ __forceinline__ bool elect_lane() {
  unsigned elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
}

// setmaxnreg: the warpgroup gives registers back, or takes them.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace kvt::ptx
