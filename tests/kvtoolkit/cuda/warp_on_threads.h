// A warp as 32 threads of the host: what lanes exchange goes through a meeting of the lanes of a mask.
#pragma once

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#define __CUDACC__ 1
#define __host__
#define __device__
#define __forceinline__ inline

struct Meeting {
  unsigned arrived = 0, number = 0;
  unsigned long long brought[32], taken[32];
};

struct Warp {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<unsigned, Meeting> meetings;  // by mask
};

inline thread_local int this_lane = 0;
inline thread_local Warp* this_warp = nullptr;

// What every lane of the mask brings, once all are here. CUDA forbids a mask without the lane that names it.
inline void meet(unsigned mask, unsigned long long mine, unsigned long long (&all)[32]) {
  std::unique_lock<std::mutex> lock(this_warp->mutex);
  Meeting& meeting = this_warp->meetings[mask];
  if ((mask >> this_lane & 1) == 0 || (meeting.arrived >> this_lane & 1) != 0) {
    std::printf("lane %d does not belong to mask %x, or comes twice\n", this_lane, mask);
    std::_Exit(1);
  }
  const unsigned number = meeting.number;
  meeting.brought[this_lane] = mine;
  meeting.arrived |= 1u << this_lane;
  if (meeting.arrived == mask) {
    std::memcpy(meeting.taken, meeting.brought, sizeof meeting.taken);
    meeting.arrived = 0;
    ++meeting.number;
    this_warp->changed.notify_all();
  } else {
    this_warp->changed.wait(lock, [&] { return meeting.number != number; });
  }
  std::memcpy(all, meeting.taken, sizeof all);
}

// Over the lanes of a mask: use(lane, what it brought).
template <typename Use>
void over(unsigned mask, unsigned long long mine, Use use) {
  unsigned long long all[32];
  meet(mask, mine, all);
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) use(lane, all[lane]);
  }
}

inline void __syncwarp(unsigned mask) {
  over(mask, 0, [](int, unsigned long long) {});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  T found{};
  over(mask, static_cast<unsigned long long>(value), [&](int lane, unsigned long long v) {
    if (lane == source) found = static_cast<T>(v);
  });
  return found;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return __shfl_sync(mask, value, this_lane ^ other);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned found = 0;
  over(mask, predicate != 0, [&](int lane, unsigned long long v) { found |= static_cast<unsigned>(v) << lane; });
  return found;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline unsigned __match_any_sync(unsigned mask, int value) {
  unsigned found = 0;
  over(mask, static_cast<unsigned>(value), [&](int lane, unsigned long long v) {
    if (static_cast<int>(v) == value) found |= 1u << lane;
  });
  return found;
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  unsigned found = 0;
  over(mask, value, [&](int, unsigned long long v) { found |= static_cast<unsigned>(v); });
  return found;
}

inline int __reduce_add_sync(unsigned mask, int value) {
  int found = 0;
  over(mask, static_cast<unsigned>(value), [&](int, unsigned long long v) { found += static_cast<int>(v); });
  return found;
}

inline int __ffs(int value) { return __builtin_ffs(value); }

// Run lane_code(lane) on the lanes of a mask.
template <typename Code>
std::vector<std::thread> start_warp(Warp& warp, unsigned lanes, Code lane_code) {
  std::vector<std::thread> threads;
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    threads.emplace_back([&warp, lane, lane_code] {
      this_lane = lane;
      this_warp = &warp;
      lane_code(lane);
    });
  }
  return threads;
}
