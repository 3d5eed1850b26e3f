// Where the tokens of a sequence lie: from positions to blocks and slots, for plain block ids and for entries.
#pragma once

#include <kvt/attention.cuh>
#include <kvt/entry.cuh>

namespace kvt {

struct Place {
  int block;  // granule, where the table holds entries
  int slot;
};

// Plain block ids: one look-up a token.
struct BlockIds {
  const int* ids;
  int block_size;

  __device__ __forceinline__ BlockIds(const AttentionParams& p, int sequence)
      : ids(p.block_table + sequence * p.table_row), block_size(p.block_size) {}

  // Look-ups will be from `position` on.
  __device__ __forceinline__ void seek(int position) {}

  // For one lane: any position below seq_len, ascending or not.
  __device__ __forceinline__ Place operator()(int position) {
    const int index = position / block_size;
    return {ids[index], position - index * block_size};
  }

  // For a whole warp: 16 positions from `first` on, lanes l and l + 16 get the place of first + l, clamped to `last`.
  __device__ __forceinline__ Place of_step(int first, int last) {
    return (*this)(min(first + (lane_id() & 15), last));
  }
};

// Entries, walked by a whole warp: 32 neighbouring ones lie in the lanes' registers, so a look-up is a ballot.
struct WarpEntries {
  const int* entries;
  const int* starts;
  int count;
  int base;    // first entry in the registers
  int entry;   // of this lane
  int start;

  __device__ __forceinline__ WarpEntries(const AttentionParams& p, int sequence)
      : entries(p.block_table + sequence * p.table_row), starts(p.block_starts + sequence * p.starts_row),
        count(p.max_entries) {}

  __device__ __forceinline__ void seek(int position) {
    const int granule = position / kGranule;
    load(last_where(count, [&](int e) { return entries[e] >= 0 && starts[e] <= granule; }));
  }

  __device__ __forceinline__ void load(int first) {
    base = first;
    const int e = first + lane_id();
    entry = e < count ? entries[e] : kEmptyEntry;
    start = entry < 0 ? 0x7FFFFFFF : starts[e];
  }

  // The granule of the pool at a logical granule, not below one asked for before by more than 31 entries.
  __device__ __forceinline__ int granule_at(int granule) {
    unsigned before = __ballot_sync(kAllLanes, start <= granule);
    while (before == kAllLanes) {
      load(base + 31);
      before = __ballot_sync(kAllLanes, start <= granule);
    }
    const int owner = 31 - __clz(before | 1u);
    const Entry found{__shfl_sync(kAllLanes, entry, owner)};
    return found.granule() + granule - __shfl_sync(kAllLanes, start, owner);
  }

  __device__ __forceinline__ Place of_step(int first, int last) {
    const int low = granule_at(first / kGranule);
    const int high = granule_at(min(first + kGranule, last) / kGranule);
    const int position = min(first + (lane_id() & 15), last);
    return {position / kGranule == first / kGranule ? low : high, position % kGranule};
  }
};

// Entries, walked by one lane on its own, upwards.
struct LaneEntries {
  const int* entries;
  const int* starts;
  int last;  // entry
  int e;

  __device__ __forceinline__ LaneEntries(const AttentionParams& p, int sequence)
      : entries(p.block_table + sequence * p.table_row), starts(p.block_starts + sequence * p.starts_row),
        last(p.max_entries - 1), e(0) {}

  __device__ __forceinline__ void seek(int position) {
    int low = 0;
    int high = last;
    while (low < high) {
      const int middle = (low + high + 1) >> 1;
      if (entries[middle] >= 0 && starts[middle] <= position / kGranule) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    e = low;
  }

  __device__ __forceinline__ Place operator()(int position) {
    const int granule = position / kGranule;
    while (e < last && entries[e + 1] >= 0 && starts[e + 1] <= granule) ++e;
    return {Entry{entries[e]}.granule() + granule - starts[e], position % kGranule};
  }
};

}  // namespace kvt
