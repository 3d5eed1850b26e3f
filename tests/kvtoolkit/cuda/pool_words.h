// What the host writes into a pool's memory, and whether two of them say the same.
#pragma once

#include <kvt/pool.cuh>

#include <vector>

// Which bits of a free word are granules.
template <typename Pool>
constexpr kvt::Word granule_bits() {
  return ~kvt::Word{0} >> (64 - Pool::kGranules);
}

// All of it is free.
template <typename Pool>
std::vector<kvt::Word> make_memory(int num_granules) {
  const int num_words = (num_granules + 2 * Pool::kGranules - 1) / (2 * Pool::kGranules) * 2;
  std::vector<kvt::Word> memory(kvt::kFreeWords + num_words * (2 + kvt::kEpochs) + (num_words / 32 + 1) * 4, 0);
  memory[Pool::Layout::kSizes] = num_granules, memory[Pool::Layout::kSizes + 1] = num_words;
  kvt::Word* const words = memory.data() + kvt::kFreeWords;
  for (int g = 0; g < num_granules; ++g) words[g / Pool::kGranules] |= kvt::Word{1} << g % Pool::kGranules;
  if (Pool::Layout::kIsSlab) {
    for (int g = 0; g < num_granules; g += 8) words[g / Pool::kGranules] += kvt::Word{1} << 34;
  }
  return memory;
}

// The order that a slab served last does not count.
template <typename Pool>
bool is_same(const std::vector<kvt::Word>& a, const std::vector<kvt::Word>& b) {
  const unsigned end = kvt::kFreeWords + a[Pool::Layout::kSizes + 1] * (2 + kvt::kEpochs);
  for (unsigned i = kvt::kFreeWords; i < end; ++i) {
    const kvt::Word meant = Pool::Layout::kIsSlab ? ~(kvt::Word{3} << 32) : ~kvt::Word{0};
    if (((a[i] ^ b[i]) & meant) != 0) return false;
  }
  return true;
}
