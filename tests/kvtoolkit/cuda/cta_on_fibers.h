// A CTA as fibers of one host thread, so that kernels without inline PTX run where there is no GPU. A fiber gives way at
// barriers and in what a warp exchanges; the order in which fibers run is drawn from a seed, since a GPU promises none.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one CTA runs at a time

using std::max;
using std::min;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, gridDim, blockDim;

namespace fibers {

using Word = unsigned long long;

// Threads that wait for each other, a warp or a CTA, and what each of them brings.
struct Meeting {
  int members = 0, arrived = 0;
  unsigned number = 0;
  std::vector<Word> brought[2];  // a member may bring the next word while others still take the last ones
};

struct Fiber {
  ucontext_t begin;
  jmp_buf place;  // where it goes on; a jump needs no system call
  bool has_begun = false;
};

inline std::vector<Fiber> threads_of_cta;
inline ucontext_t first_return;
inline jmp_buf scheduler;
inline std::vector<bool> has_ended;
inline std::vector<Meeting> warps;
inline Meeting cta;
inline unsigned current;
inline bool has_moved;
inline std::vector<char> dynamic_shared;

inline void give_way() {
  if (_setjmp(threads_of_cta[current].place) == 0) _longjmp(scheduler, 1);
}

inline void go_on(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.has_begun) _longjmp(fiber.place, 1);
  fiber.has_begun = true;
  swapcontext(&first_return, &fiber.begin);
}

// What every member brings, once all have come.
inline const std::vector<Word>& meet(Meeting& meeting, unsigned index, Word mine) {
  const unsigned number = meeting.number;
  std::vector<Word>& brought = meeting.brought[number & 1];
  brought[index] = mine;
  has_moved = true;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.number;
  } else {
    while (meeting.number == number) give_way();
  }
  return brought;
}

inline const std::vector<Word>& meet_warp(unsigned mask, Word mine) {
  if (mask != 0xFFFFFFFFu) std::abort();
  return meet(warps[current / 32], current % 32, mine);
}

template <typename T>
Word to_word(T value) {
  Word word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <typename T>
T from_word(Word word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <typename T, typename Merge>
T reduce(unsigned mask, T mine, Merge merge) {
  const std::vector<Word>& all = meet_warp(mask, to_word(mine));
  T sum = from_word<T>(all[0]);
  for (int lane = 1; lane < 32; ++lane) sum = merge(sum, from_word<T>(all[lane]));
  return sum;
}

// Run a kernel; false if threads wait for each other for good.
template <typename Kernel>
bool run(Kernel kernel, Index grid, unsigned threads, unsigned smem_nbytes, unsigned seed) {
  static Kernel* running;
  constexpr size_t kStack = 1 << 15;
  running = &kernel;
  std::mt19937 random(seed);
  static std::vector<char> stacks;
  stacks.resize(max(stacks.size(), kStack * threads));
  dynamic_shared.assign(smem_nbytes + 16, 0x55);
  gridDim = grid;
  blockDim.x = threads;
  for (unsigned block = 0; block < grid.x * grid.y; ++block) {
    blockIdx.x = block % grid.x;
    blockIdx.y = block / grid.x;
    threads_of_cta.assign(threads, {});
    has_ended.assign(threads, false);
    warps.assign(threads / 32, {});
    cta = {};
    cta.members = threads;
    for (auto& brought : cta.brought) brought.assign(threads, 0);
    for (Meeting& warp : warps) {
      warp.members = 32;
      for (auto& brought : warp.brought) brought.assign(32, 0);
    }
    for (unsigned i = 0; i < threads; ++i) {
      ucontext_t& begin = threads_of_cta[i].begin;
      getcontext(&begin);
      begin.uc_stack.ss_sp = stacks.data() + kStack * i;
      begin.uc_stack.ss_size = kStack;
      makecontext(
          &begin,
          [] {
            (*running)();
            has_ended[current] = has_moved = true;
            _longjmp(scheduler, 1);
          },
          0);
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0);
    do {
      if (seed != 0) std::shuffle(order.begin(), order.end(), random);
      has_moved = false;
      for (unsigned i : order) {
        if (has_ended[i]) continue;
        current = threadIdx.x = i;
        go_on(threads_of_cta[i]);
      }
    } while (has_moved);
    if (!std::all_of(has_ended.begin(), has_ended.end(), [](bool ended) { return ended; })) return false;
  }
  return true;
}

}  // namespace fibers

inline void __syncthreads() { fibers::meet(fibers::cta, threadIdx.x, 0); }

inline void __syncwarp() { fibers::meet_warp(0xFFFFFFFFu, 0); }

inline int __syncthreads_or(int mine) {
  const auto& all = fibers::meet(fibers::cta, threadIdx.x, mine != 0);
  return std::any_of(all.begin(), all.end(), [](fibers::Word word) { return word != 0; });
}

inline int __syncthreads_count(int mine) {
  const auto& all = fibers::meet(fibers::cta, threadIdx.x, mine != 0);
  return static_cast<int>(std::count(all.begin(), all.end(), 1));
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return fibers::from_word<T>(fibers::meet_warp(mask, fibers::to_word(value))[source & 31]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return __shfl_sync(mask, value, (threadIdx.x & 31) ^ other);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = threadIdx.x & 31;
  return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane);
}

inline unsigned __ballot_sync(unsigned mask, int mine) {
  return fibers::reduce(mask, mine != 0 ? 1u << (threadIdx.x & 31) : 0u, [](unsigned a, unsigned b) { return a | b; });
}

template <typename T>
T __reduce_add_sync(unsigned mask, T mine) {
  return fibers::reduce(mask, mine, [](T a, T b) { return a + b; });
}

template <typename T>
T __reduce_max_sync(unsigned mask, T mine) {
  return fibers::reduce(mask, mine, [](T a, T b) { return max(a, b); });
}

template <typename T>
T __reduce_min_sync(unsigned mask, T mine) {
  return fibers::reduce(mask, mine, [](T a, T b) { return min(a, b); });
}

inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename T>
T atomicCAS(T* at, T compare, T value) {
  const T old = *at;
  if (old == compare) *at = value;
  return old;
}

template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}

template <typename T>
T atomicMax(T* at, T value) {
  const T old = *at;
  *at = max(old, value);
  return old;
}

template <typename T>
T atomicMin(T* at, T value) {
  const T old = *at;
  *at = min(old, value);
  return old;
}
