// The kernel of `kvtoolkit fuzz`: many threads perform random operations on a pool, and each checks what it gets.
//
//   owners    [num_granules] int32: 0, or 1 + the thread that holds the granule, or what the host has put there
//   journals  [CTAs, num_words] uint64, zeros before and after
//   report    [5] int32: the number of faults; for one of them the FuzzFault, the thread, the granule, what was found
//   done      [1] uint64: the number of operations
//
// A granule's owner is exchanged when it is granted, and again before it is given back. If two threads hold the same
// granule, at least one of them therefore sees it. Macro: KVT_SLAB, 1 = slab layout.
//
// Launch:   CTA 128.
#include <kvt/pool.cuh>

namespace kvt {

#if KVT_SLAB
using FuzzPool = SlabPool;
#else
using FuzzPool = Pool;
#endif

// The same numbers are in kvtoolkit/commands/fuzz.py.
enum FuzzFault : int { kNotAligned = 1, kTwoOwners, kLost, kRefusedFree, kFalseExhaustion, kUnknownCode };

struct FuzzParams {
  Word* memory;
  int* owners;
  Word* journals;
  int* report;
  Word* done;
  unsigned seed;
  int threads, rounds;
  int orders;    // a bit for each order that threads ask for
  int share;     // most blocks that a thread holds; if `is_spare`, there is room for all of them
  int is_spare;  // 1: no request may be refused
  int is_warp;   // 1: lanes that ask for the same order ask together
  int retires;   // 1: some blocks go to limbo
};

constexpr int kMostHeld = 8;

struct Fuzzer {
  const FuzzParams& p;
  const FuzzPool pool;
  const int name;
  unsigned state;

  __device__ unsigned draw() {
    state = state * 1664525u + 1013904223u;
    return state >> 8 ^ state >> 20;
  }

  __device__ void fault(FuzzFault what, int granule, int found) const {
    if (atomicAdd(p.report, 1) != 0) return;
    p.report[1] = what, p.report[2] = name - 1, p.report[3] = granule, p.report[4] = found;
  }

  __device__ int draw_order() {
    int order = draw() & 3;
    while ((p.orders >> order & 1) == 0) order = (order + 1) & 3;
    return order;
  }

  __device__ int take(int order) {
    const unsigned seed = draw();
    if (!p.is_warp) return pool.allocate(order, seed);
    return PoolWarp(pool, __match_any_sync(__activemask(), order)).allocate(order, seed);
  }

  __device__ void mark(int start, int order) const {
    if (start % (1 << order) != 0 || start + (1 << order) > pool.num_granules()) {
      fault(kNotAligned, start, order);
      return;
    }
    for (int g = start; g < start + (1 << order); ++g) {
      const int before = atomicExch(p.owners + g, name);
      if (before != 0) fault(kTwoOwners, g, before);
    }
  }

  __device__ void unmark(int start, int order) const {
    for (int g = start; g < start + (1 << order) && g < pool.num_granules(); ++g) {
      const int before = atomicExch(p.owners + g, 0);
      if (before != name) fault(kLost, g, before);
    }
  }

  __device__ void refused(int code) const {
    if (code < kContended || code > kExhausted) fault(kUnknownCode, code, 0);
    if (p.is_spare && code != kContended) fault(kFalseExhaustion, code, 0);
  }

  // Give a block back in one of four ways. Returns the number of operations that this took.
  __device__ int give(int start, int order) {
    unmark(start, order);
    const int way = draw() & 3;
    const int size = 1 << order;
    int code;
    if (way == 0 && order > 0) {
      code = pool.free(start + size / 2, size / 2);
      code |= pool.free(start, size / 2);
    } else if (way == 1 && p.retires) {
      code = pool.retire(start, size);
    } else if (way == 2 && p.is_warp) {
      code = PoolWarp(pool, __activemask()).free(start, size);
    } else {
      code = pool.free(start, size);
    }
    if (code != 0) fault(kRefusedFree, start, code);
    return way == 0 && order > 0 ? 2 : 1;
  }
};

extern "C" __global__ void __launch_bounds__(128) kvt_fuzz(const __grid_constant__ FuzzParams p) {
  const int t = blockIdx.x * 128 + threadIdx.x;
  Fuzzer fuzzer{p, FuzzPool{p.memory}, t + 1, p.seed * 2654435761u ^ t * 0x9E3779B1u};
  const bool is_here = t < p.threads;
  int starts[kMostHeld], orders[kMostHeld];
  int held = 0;
  Word done = 0;
  for (int round = 0; is_here && round < p.rounds; ++round) {
    if (held < p.share && (held == 0 || (fuzzer.draw() & 7) < 5)) {
      const int order = fuzzer.draw_order();
      const int start = fuzzer.take(order);
      ++done;
      if (start >= 0) {
        fuzzer.mark(start, order);
        starts[held] = start, orders[held] = order;
        ++held;
      } else {
        fuzzer.refused(start);
      }
    } else if (held > 0) {
      const int which = fuzzer.draw() % held;
      done += fuzzer.give(starts[which], orders[which]);
      --held;
      starts[which] = starts[held], orders[which] = orders[held];
    }
  }
  while (is_here && held > 0) {
    --held;
    done += fuzzer.give(starts[held], orders[held]);
  }

  // A lease of the whole CTA. It is committed, and the blocks are then freed by hand, or it is aborted.
  const PoolLease lease{fuzzer.pool, p.journals + static_cast<long long>(blockIdx.x) * fuzzer.pool.num_words()};
  const int order = fuzzer.draw_order();
  const int start = is_here ? lease.allocate(order, fuzzer.draw()) : kContended;
  if (start >= 0) fuzzer.mark(start, order);
  __syncthreads();
  if (start >= 0) fuzzer.unmark(start, order);
  __syncthreads();
  const bool comes = (p.seed + blockIdx.x) % 2 == 0;
  if (comes)
    lease.commit(nullptr, threadIdx.x, 128);
  else
    lease.abort(threadIdx.x, 128);
  __syncthreads();
  if (comes && start >= 0 && fuzzer.pool.free(start, 1 << order) != 0) fuzzer.fault(kRefusedFree, start, order);
  if (is_here) atomicAdd(p.done, done + 2);
}

}  // namespace kvt
