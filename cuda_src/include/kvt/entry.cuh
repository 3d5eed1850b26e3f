// An entry of a block table, one int32: where a run of granules is, how long it is, and in which tier. See
// kvtoolkit/formats/entry.py.
//
//   bits 0-23 granule (8 token slots each) | 24-26 length in granules - 1 | 27-29 tier | 30 spare | 31 zero; empty = -1
//
// This is plain integer arithmetic, so the header also compiles as C++17 on the host, where the tests use it.
#pragma once

#if defined(__CUDACC__)
#define KVT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KVT_HOST_DEVICE inline
#endif

namespace kvt {

constexpr int kGranule = 8;           // token slots
constexpr int kMaxBlockGranules = 8;  // 64 tokens
constexpr int kEmptyEntry = -1;

enum class Tier : int { kHot = 0, kWarm = 1, kCold = 2, kHost16 = 3, kHostCold = 4 };

struct Entry {
  int bits;

  KVT_HOST_DEVICE bool empty() const { return bits < 0; }
  KVT_HOST_DEVICE int granule() const { return bits & 0xFFFFFF; }
  KVT_HOST_DEVICE int num_granules() const { return ((bits >> 24) & 7) + 1; }
  KVT_HOST_DEVICE Tier tier() const { return static_cast<Tier>((bits >> 27) & 7); }

  // num_granules is 1 to 8.
  KVT_HOST_DEVICE static Entry pack(int granule, int num_granules, Tier tier) {
    return Entry{granule | ((num_granules - 1) << 24) | (static_cast<int>(tier) << 27)};
  }
};

// The index of the entry that holds logical granule `granule`: the last one whose start is not above it.
//   block_starts [num_entries] int32, ascending, block_starts[0] == 0
KVT_HOST_DEVICE int find_entry(const int* block_starts, int num_entries, int granule) {
  int low = 0;
  int high = num_entries - 1;
  while (low < high) {
    const int middle = (low + high + 1) >> 1;
    if (block_starts[middle] <= granule) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace kvt
