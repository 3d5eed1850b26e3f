// Which keys a query sees, and what score it gives them.
#pragma once

#include <kvt/attention/rows.cuh>

namespace kvt {

constexpr int kTile = 64;  // positions; splits are cut at multiples of it
constexpr int kStep = 16;  // positions that decode takes at once

// The keys that a block of rows sees: at least one row sees those in [begin, end), every row those in
// [full_begin, full_end).
struct KeyRange {
  int begin, end;
  int full_begin, full_end;
};

// The keys for queries at positions `lowest` to `highest`.
__device__ __forceinline__ KeyRange visible_keys(int left, int right, int seq_len, int lowest, int highest) {
  KeyRange keys{0, seq_len, 0, seq_len};
  if (left >= 0) {
    keys.begin = max(0, lowest - left);
    keys.full_begin = max(0, highest - left);
  }
  if (right >= 0) {
    keys.end = min(seq_len, highest + right + 1);
    keys.full_end = min(seq_len, lowest + right + 1);
  }
  return keys;
}

__device__ __forceinline__ KeyRange visible_keys(const AttentionParams& p, const RowBlock& block) {
  const int lowest = block.position(0, p.group_size);
  const int highest = block.position(block.num_rows - 1, p.group_size);
  return visible_keys(p.left, p.right, block.seq_len, lowest, highest);
}

// The steps in which any query of a sequence sees a key; the same for all its blocks of rows.
struct StepRange {
  int begin, end;  // end >= begin
};

__device__ __forceinline__ StepRange visible_steps(int left, int right, int seq_len, int num_queries) {
  const KeyRange keys = visible_keys(left, right, seq_len, seq_len - num_queries, seq_len - 1);
  const int begin = keys.begin / kStep;
  return {begin, max(begin, (keys.end + kStep - 1) / kStep)};
}

// Whether the query at `position` sees the key at `key`.
__device__ __forceinline__ bool is_visible(const AttentionParams& p, int position, int key, int seq_len) {
  return key < seq_len && (p.left < 0 || key >= position - p.left) && (p.right < 0 || key <= position + p.right);
}

// The score, in units of log2, for the product q.k: scaled and capped.
__device__ __forceinline__ float scaled_score(const AttentionParams& p, float product) {
  if (p.cap_outer == 0.0f) return product * p.scale_log2;
  return p.cap_outer * tanhf(p.cap_inner * product);
}

}  // namespace kvt
