// A pool for single threads; see kvt/pool.cuh for the algorithm and for what memory holds.
#pragma once

#include <kvt/pool/words.cuh>

namespace kvt {

// What a failed call returns: a negative number.
enum PoolCode : int {
  kExhausted = -2,   // one granule was asked for: at some moment of the call none was free
  kFragmented = -3,  // more were asked for, or a slab: at some moment no such run was free, though others may have been
  kContended = -4,   // undecided, because others kept freeing
  kInvalid = -5,     // outside the pool, not inside one word, or not live; or the pool has the other layout
};

constexpr int kHints = 8;
constexpr int kVersions = 16;
constexpr int kShards = 32;
constexpr int kShardPitch = 8;
constexpr int kFreeWords = kVersions + kShards * kShardPitch;
constexpr int kEpochs = 4;
constexpr int kMaxPasses = 4;

template <typename LayoutType>
struct BasicPool {
  using Layout = LayoutType;
  static constexpr int kGranules = 1 << Layout::kShift;  // in a word

  Word* memory;

  // Both are 0 if the pool has the other layout.
  KVT_ATOMIC int num_granules() const { return static_cast<int>(memory[Layout::kSizes]); }
  KVT_ATOMIC int num_words() const { return static_cast<int>(memory[Layout::kSizes + 1]); }
  KVT_ATOMIC Word* free_words() const { return memory + kFreeWords; }
  KVT_ATOMIC Word* marks() const { return free_words() + static_cast<long long>(num_words()) * (1 + kEpochs); }
  KVT_ATOMIC Word* limbo_words(Word epoch) const {
    return free_words() + static_cast<long long>(num_words()) * (1 + epoch % kEpochs);
  }

  KVT_ATOMIC Word version() const {
    Word sum = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 8
#endif
    for (int s = 0; s < kShards; ++s) sum += load_relaxed(memory + kVersions + s * kShardPitch);
    return sum;
  }

  // Call this after bits have been set: from now on what was freed may be found.
  KVT_ATOMIC void bump_version(unsigned seed) const {
    add_release(memory + kVersions + seed % kShards * kShardPitch, 1);
    // Whoever sees what this thread takes next must also see the new version. Otherwise the freed block would seem to
    // have moved without a free.
    fence_acq_rel();
  }

  // The word at which a thread begins to search. Consecutive seeds begin far apart, so the number of the thread or of
  // the warp is a good seed.
  KVT_ATOMIC int home_of(unsigned seed) const {
    // Fibonacci hashing spreads consecutive numbers evenly
    return static_cast<int>(static_cast<Word>(seed * 0x9E3779B1u) * static_cast<Word>(num_words()) >> 32);
  }

  // The same for an order. In slabs it is the word where the last search for this order found a block, so that threads
  // fill slabs together and open few.
  KVT_ATOMIC int first_word(int order, unsigned seed) const {
    if (!Layout::kIsSlab) return home_of(seed);
    const Word current = load_relaxed(current_word(order, seed));
    return current != 0 ? static_cast<int>(current) - 1 : home_of(seed % num_currents() * 4 + order);
  }

  KVT_ATOMIC void found_at(int order, unsigned seed, int start) const {
    if (Layout::kIsSlab) store_relaxed(current_word(order, seed), static_cast<Word>(start >> Layout::kShift) + 1);
  }

  // Take one block of 2^order granules for one thread; order is 0 to 3. Returns its first granule, or a PoolCode.
  KVT_ATOMIC int allocate(int order, unsigned seed) const {
    if (num_words() == 0) return kInvalid;
    const int start = search(order, first_word(order, seed));
    if (start >= 0) found_at(order, seed, start);
    return start;
  }

  // Free live granules inside one word, a block or a part of one, for one thread. Returns 0, or kInvalid if some were
  // already free or in limbo; the others are then free.
  KVT_ATOMIC int free(int start, int count) const {
    if (!is_inside(start, count)) return kInvalid;
    const int w = start >> Layout::kShift;
    const Word bits = bits_of(start, count);
    const Word taken = in_limbo(w) & bits;
    const Word old = fetch_or_release(free_words() + w, bits & ~taken) & bits;
    bump_version(static_cast<unsigned>(w));
    return (old | taken) == 0 ? 0 : kInvalid;
  }

  // The same for granules that running kernels may still read: they wait in the limbo of the current epoch.
  KVT_ATOMIC int retire(int start, int count) const {
    if (!is_inside(start, count)) return kInvalid;
    const int w = start >> Layout::kShift;
    const Word bits = bits_of(start, count);
    const Word taken = (in_limbo(w) | load_relaxed(free_words() + w)) & bits;
    const Word old = fetch_or_release(limbo_words(load_acquire(memory + 2)) + w, bits & ~taken) & bits;
    return (old | taken) == 0 ? 0 : kInvalid;
  }

  KVT_ATOMIC Word in_limbo(int w) const {
    Word bits = 0;
    for (int epoch = 0; epoch < kEpochs; ++epoch) bits |= load_relaxed(limbo_words(epoch) + w);
    return bits;
  }

  KVT_ATOMIC static int code_of(int order) { return order == 0 && !Layout::kIsSlab ? kExhausted : kFragmented; }

  KVT_ATOMIC bool is_inside(int start, int count) const {
    return start >= 0 && count >= 1 && count <= kGranules - start % kGranules && count <= num_granules() - start;
  }

  KVT_ATOMIC static Word bits_of(int start, int count) { return ~Word{0} >> (64 - count) << start % kGranules; }

  // Free the granules of a bitmap [num_words], and clear it. Each of `threads` threads calls this with its `rank`.
  KVT_ATOMIC void free_all(Word* bitmap, int rank, int threads) const {
    bool has_freed = false;
    for (int w = rank; w < num_words(); w += threads) {
      if (load_relaxed(bitmap + w) == 0) continue;
      const Word bits = exchange_acq_rel(bitmap + w, 0);
      fetch_or_release(free_words() + w, bits);
      has_freed = true;
    }
    if (has_freed) bump_version(static_cast<unsigned>(rank));
  }

 private:
  KVT_ATOMIC unsigned num_currents() const { return static_cast<unsigned>(num_words()) / 32 + 1; }

  KVT_ATOMIC Word* current_word(int order, unsigned seed) const {
    return marks() + num_words() + seed % num_currents() * 4 + order;
  }

  KVT_ATOMIC int claim(int order, int w) const {
    Word* const word = free_words() + w;
    const Word start = claim_runs<Layout>(word, load_relaxed(word), order, 1);
    return start != 0 ? (w << Layout::kShift) + lowest_bit(start) : kContended;
  }

  KVT_ATOMIC int search(int order, int home) const {
    int start = claim(order, home);
    if (start >= 0) return start;
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      const Word proved = load_acquire(memory + kHints + order);
      const Word before = version();
      fence_acq_rel();
      if (proved == before + 1) return code_of(order);
      for (int i = 0, w = home; i < num_words(); ++i) {
        start = claim(order, w);
        if (start >= 0) return start;
        w = w + 1 == num_words() ? 0 : w + 1;
      }
      fence_acq_rel();
      if (version() == before) {
        store_relaxed(memory + kHints + order, before + 1);  // released by the fence above
        return code_of(order);
      }
    }
    return kContended;
  }
};

using Pool = BasicPool<Buddy>;
using SlabPool = BasicPool<Slab>;

}  // namespace kvt
