// One word of a pool's free bits: counting, finding and claiming runs, in both layouts.
#pragma once

#include <kvt/pool/atomic.cuh>

namespace kvt {

KVT_ATOMIC int count_bits(Word word) {
#if defined(__CUDA_ARCH__)
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

// The number of the lowest set bit. The word must not be 0.
KVT_ATOMIC int lowest_bit(Word word) {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return __builtin_ctzll(word);
#endif
}

// One bit for each aligned run of 2^order set bits, at the start of the run.
KVT_ATOMIC Word fold_runs(Word word, int order) {
  if (order > 0) word &= word >> 1 & 0x5555555555555555ull;
  if (order > 1) word &= word >> 2 & 0x1111111111111111ull;
  if (order > 2) word &= word >> 4 & 0x0101010101010101ull;
  return word;
}

// The inverse: all bits of the runs whose starts are set.
KVT_ATOMIC Word spread_runs(Word starts, int order) {
  if (order > 0) starts |= starts << 1;
  if (order > 1) starts |= starts << 2;
  if (order > 2) starts |= starts << 4;
  return starts;
}

// The lowest `count` of the set bits, or all of them if there are fewer.
KVT_ATOMIC Word lowest_bits(Word word, int count) {
  if (count_bits(word) <= count) return word;
  int width = 0;  // of the widest prefix with no more than count set bits
  for (int step = 32; step > 0; step >>= 1) {
    const Word below = word & ((Word{1} << (width + step)) - 1);
    if (count_bits(below) <= count) width += step;
  }
  return word & ((Word{1} << width) - 1);
}

// The number of the set bit that has `rank` set bits below it.
KVT_ATOMIC int bit_of_rank(Word word, int rank) {
  int place = 0;
  for (int step = 32; step > 0; step >>= 1) {
    const int below = count_bits(word >> place & ((Word{1} << step) - 1));
    if (rank >= below) {
      rank -= below;
      place += step;
    }
  }
  return place;
}

// The buddy layout: all 64 bits of a word are granules.
struct Buddy {
  static constexpr int kShift = 6;  // log2 of the granules of a word
  static constexpr int kSizes = 0;  // word of memory that holds the size of the pool
  static constexpr bool kIsSlab = false;

  // The starts of the free runs.
  KVT_ATOMIC static Word runs(Word word, int order, bool) { return fold_runs(word, order); }

  // Choose up to `count` of them to claim. Runs in superblocks that are already broken come before whole superblocks.
  KVT_ATOMIC static Word choose(Word word, int order, int count, bool) {
    const Word runs = fold_runs(word, order);
    const Word whole = spread_runs(fold_runs(word, 3), 3);
    const Word broken = lowest_bits(runs & ~whole, count);
    return broken | lowest_bits(runs & whole, count - count_bits(broken));
  }

  KVT_ATOMIC static Word without(Word word, Word bits, int) { return word & ~bits; }
};

// The slab layout: bits 0-31 of a word are granules, bits 32-33 the order that the word serves unless all of it is
// free, and bits 34-36 the number of its superblocks that exist.
struct Slab {
  static constexpr int kShift = 5;
  static constexpr int kSizes = 4;
  static constexpr bool kIsSlab = true;

  // `opens`: also in words that are wholly free.
  KVT_ATOMIC static Word runs(Word word, int order, bool opens) {
    const Word free = word & 0xFFFFFFFFull;
    const bool is_whole = free == (Word{1} << 8 * (word >> 34)) - 1;
    const bool serves = is_whole ? opens : static_cast<int>(word >> 32 & 3) == order;
    return serves ? fold_runs(free, order) : 0;
  }

  KVT_ATOMIC static Word choose(Word word, int order, int count, bool opens) {
    return lowest_bits(runs(word, order, opens), count);
  }

  KVT_ATOMIC static Word without(Word word, Word bits, int order) {
    return (word & ~bits & ~(Word{3} << 32)) | static_cast<Word>(order) << 32;
  }
};

// Claim up to `count` runs of a word; `seen` is a value that it had. Returns the starts of the runs, fewer than `count`
// only if the word has no more. Lock-free: the loop repeats only if another thread has changed the word.
template <typename Layout>
KVT_ATOMIC Word claim_runs(Word* word, Word seen, int order, int count, bool opens = true) {
  Word won = 0;
  while (true) {
    const Word starts = Layout::choose(seen, order, count - count_bits(won), opens);
    if (starts == 0) return won;
    const Word bits = spread_runs(starts, order);
    if (order == 0 && !Layout::kIsSlab) {
      const Word old = fetch_and_acquire(word, ~bits);
      won |= old & bits;
      if (count_bits(won) == count) return won;
      seen = old & ~bits;
    } else {
      const Word old = compare_exchange_acquire(word, seen, Layout::without(seen, bits, order));
      if (old == seen) return starts;
      seen = old;
    }
  }
}

}  // namespace kvt
