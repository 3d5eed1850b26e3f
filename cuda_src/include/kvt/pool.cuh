// The lock-free pool: running kernels take blocks of granules from it and give them back. No thread ever waits.
//
// A free bit is the state of its granule, and a block of 1, 2, 4 or 8 aligned granules lies inside one word. It is
// claimed by one atomic on that word and freed by another; buddies coalesce by themselves, and there is no list and no
// ABA. A set bit that is freed again gives a double free away. Two layouts, a type each, since a kernel knows its pool:
//
//   Pool      buddy: 64 granules a word, sizes mix.
//   SlabPool  32 granules a word, which serve one order until all of them are free. The order stands in the same word,
//             so a claim checks it by its compare-and-swap. A block that is freed in part is whole again, and free,
//             once the rest of it is.
//
// When is the pool exhausted? Not when one pass over the words finds nothing: a block may move behind it. Every free
// is followed by an increment of the version. A pass that found nothing, with the version the same before and after it,
// proves that there was no such block when it ended: without frees, free runs only shrink. The proof is kept, so that
// all who ask at the same version are told at once. After kMaxPasses with a moving version the answer is kContended.
// The version is a sum of shards, and two threads that each miss another's free may see the same sum: so a proof is
// acquired before the version is read that it is compared with. The reader then sees no shard older than the prover saw.
//
//   memory  uint64, made by kvtoolkit.DevicePool: granules and words of a Pool, epoch, unused, those of a SlabPool
//           | kHints    [4], by order: the version at which no block was left, plus 1
//           | kVersions [kShards], a cache line each; the version is their sum
//           | free words, an even number | limbo words of kEpochs epochs | marks of a batch that is being freed
//           | of slabs [words / 32 + 1, 4 orders]: the word plus 1 where a search found a block last, or 0
//
// free is for blocks that no other thread can still read, retire for all others: they wait in the limbo of the epoch
// that memory holds, until the host completes it. A kernel that takes blocks must not read what lies in them by the
// non-coherent path (__ldg), and bulk copies of a block that was reused need a proxy fence. A granule is 8 token slots.
//
// Source: this project's; claims by bitmap word, Pham et al. 2025 (ACM TOPC 12, 1), are the nearest published design.
#pragma once

#include <kvt/atomic.cuh>

namespace kvt {

// What a failed call returns, as a negative number.
enum PoolCode : int {
  kExhausted = -2,   // of one granule: at some moment of the call none was free
  kFragmented = -3,  // of more, or of a slab: at some moment no such run was free; others may have been
  kContended = -4,   // undecided: others kept freeing
  kInvalid = -5,     // free, retire: not inside the pool, not inside one word, or not live; all: the other layout's pool
};

constexpr int kHints = 8;
constexpr int kVersions = 16;
constexpr int kShards = 32;
constexpr int kShardPitch = 8;
constexpr int kFreeWords = kVersions + kShards * kShardPitch;
constexpr int kEpochs = 4;
constexpr int kMaxPasses = 4;

KVT_ATOMIC int count_bits(Word word) {
#if defined(__CUDA_ARCH__)
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

// Of a word that is not 0.
KVT_ATOMIC int lowest_bit(Word word) {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return __builtin_ctzll(word);
#endif
}

// A bit for every aligned run of 2^order set bits, at its start.
KVT_ATOMIC Word fold_runs(Word word, int order) {
  if (order > 0) word &= word >> 1 & 0x5555555555555555ull;
  if (order > 1) word &= word >> 2 & 0x1111111111111111ull;
  if (order > 2) word &= word >> 4 & 0x0101010101010101ull;
  return word;
}

// All bits of the runs whose starts are set.
KVT_ATOMIC Word spread_runs(Word starts, int order) {
  if (order > 0) starts |= starts << 1;
  if (order > 1) starts |= starts << 2;
  if (order > 2) starts |= starts << 4;
  return starts;
}

// Of the set bits, the lowest `count`, or all.
KVT_ATOMIC Word lowest_bits(Word word, int count) {
  if (count_bits(word) <= count) return word;
  int width = 0;  // the widest prefix that holds no more than count bits
  for (int step = 32; step > 0; step >>= 1) {
    const Word below = word & ((Word{1} << (width + step)) - 1);
    if (count_bits(below) <= count) width += step;
  }
  return word & ((Word{1} << width) - 1);
}

// Where the set bit lies that has `rank` set bits below it.
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

// What a word says, by layout.
struct Buddy {
  static constexpr int kShift = 6;  // log2 of the granules of a word
  static constexpr int kSizes = 0;  // where memory has the size of the pool
  static constexpr bool kIsSlab = false;

  // Starts of the free runs.
  KVT_ATOMIC static Word runs(Word word, int order, bool) { return fold_runs(word, order); }

  // Up to `count` of them to claim: those in superblocks that are broken already, before whole ones.
  KVT_ATOMIC static Word choose(Word word, int order, int count, bool) {
    const Word runs = fold_runs(word, order);
    const Word whole = spread_runs(fold_runs(word, 3), 3);
    const Word broken = lowest_bits(runs & ~whole, count);
    return broken | lowest_bits(runs & whole, count - count_bits(broken));
  }

  KVT_ATOMIC static Word without(Word word, Word bits, int) { return word & ~bits; }
};

// Bits 0-31 are the granules, 32-33 the order that the word serves unless all of it is free, 34-36 the superblocks of
// the word that exist.
struct Slab {
  static constexpr int kShift = 5;
  static constexpr int kSizes = 4;
  static constexpr bool kIsSlab = true;

  // `opens`: in words that are wholly free, too.
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

// Claim up to `count` runs of a word whose value was seen; returns their starts. Fewer than `count` only if the word
// has no more. Lock-free: a repetition means that another thread has got on.
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

template <typename LayoutType>
struct BasicPool {
  using Layout = LayoutType;
  static constexpr int kGranules = 1 << Layout::kShift;  // of a word

  Word* memory;

  // Both 0 for a pool of the other layout.
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

  // After bits have been set: what was freed may be found from now on.
  KVT_ATOMIC void bump_version(unsigned seed) const {
    add_release(memory + kVersions + seed % kShards * kShardPitch, 1);
    // and whoever sees what this thread takes next sees the version too: or its block would seem to have moved unseen
    fence_acq_rel();
  }

  // Where a thread begins to look. Seeds in a row begin far apart: the number of the thread, or of the warp, will do.
  KVT_ATOMIC int home_of(unsigned seed) const {
    // Fibonacci hashing: numbers in a row are spread evenly
    return static_cast<int>(static_cast<Word>(seed * 0x9E3779B1u) * static_cast<Word>(num_words()) >> 32);
  }

  // Likewise for an order. In slabs it is where the last one went on from: threads that fill slabs together begin few.
  KVT_ATOMIC int first_word(int order, unsigned seed) const {
    if (!Layout::kIsSlab) return home_of(seed);
    const Word current = load_relaxed(current_word(order, seed));
    return current != 0 ? static_cast<int>(current) - 1 : home_of(seed % num_currents() * 4 + order);
  }

  KVT_ATOMIC void found_at(int order, unsigned seed, int start) const {
    if (Layout::kIsSlab) store_relaxed(current_word(order, seed), static_cast<Word>(start >> Layout::kShift) + 1);
  }

  // One thread on its own takes one block of 2^order granules, order 0 to 3. Returns its first granule, or a PoolCode.
  KVT_ATOMIC int allocate(int order, unsigned seed) const {
    if (num_words() == 0) return kInvalid;
    const int start = search(order, first_word(order, seed));
    if (start >= 0) found_at(order, seed, start);
    return start;
  }

  // One thread on its own frees live granules inside one word: a block or a part of one. Returns 0, or kInvalid where
  // some were free already or in limbo; the others are free then.
  KVT_ATOMIC int free(int start, int count) const {
    if (!is_inside(start, count)) return kInvalid;
    const int w = start >> Layout::kShift;
    const Word bits = bits_of(start, count);
    const Word taken = in_limbo(w) & bits;
    const Word old = fetch_or_release(free_words() + w, bits & ~taken) & bits;
    bump_version(static_cast<unsigned>(w));
    return (old | taken) == 0 ? 0 : kInvalid;
  }

  // Likewise, for granules that running kernels may still read.
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

  // Give back what thread `rank` of `threads` finds in a bitmap of granules, [num_words], and clear it.
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
        store_relaxed(memory + kHints + order, before + 1);  // the fence releases what `before` was read from
        return code_of(order);
      }
    }
    return kContended;
  }
};

using Pool = BasicPool<Buddy>;
using SlabPool = BasicPool<Slab>;

// Blocks taken ahead for a future that may not come - a beam, draft tokens. The journal is a bitmap of granules, zeros
// at first (DevicePool.journals). A block of a lease is not freed or retired by hand before the lease has ended: the
// journal would still name it. Leases nest: one whose future came hands its blocks to the lease around it, or to
// nobody.
template <typename AnyPool>
struct PoolLease {
  AnyPool pool;
  Word* journal;

  // As Pool::allocate.
  KVT_ATOMIC int allocate(int order, unsigned seed) const {
    const int start = pool.allocate(order, seed);
    if (start >= 0) fetch_or_release(journal + start / AnyPool::kGranules, AnyPool::bits_of(start, 1 << order));
    return start;
  }

  // All threads of a group, `rank` of `threads`, when nobody allocates any more (behind a barrier): keep the blocks;
  // `around`, the journal of the lease around, or null.
  KVT_ATOMIC void commit(Word* around, int rank, int threads) const {
    for (int w = rank; w < pool.num_words(); w += threads) {
      const Word bits = exchange_acq_rel(journal + w, 0);
      if (around != nullptr && bits != 0) fetch_or_release(around + w, bits);
    }
  }

  // Likewise: give the blocks back. Nobody may still read them.
  KVT_ATOMIC void abort(int rank, int threads) const { pool.free_all(journal, rank, threads); }
};
template <typename AnyPool>
PoolLease(AnyPool, Word*) -> PoolLease<AnyPool>;

#if defined(__CUDACC__)

// What the lanes of `mask` do together: lanes of one warp that all get here, such as __ballot_sync of who wants to, or
// 0xFFFFFFFF. PoolWarp(pool, mask).allocate(0, number_of_the_warp);
template <typename AnyPool>
class PoolWarp {
 public:
  __device__ __forceinline__ PoolWarp(const AnyPool& pool, unsigned mask)
      : pool_(pool),
        mask_(mask),
        leader_(lowest_bit(mask)),
        lane_(lane_of_warp()),
        rank_(count_bits(mask & ((1u << lane_) - 1))),
        wanted_(count_bits(mask)) {}

  // A block of 2^order granules for each lane, of the same order. Returns the lane's first granule, or a PoolCode.
  __device__ __forceinline__ int allocate(int order, unsigned seed) {
    if (pool_.num_words() == 0) return kInvalid;
    const int start = allocate_from(order, __shfl_sync(mask_, pool_.first_word(order, seed), leader_));
    if (start >= 0 && rank_ == wanted_ - 1) pool_.found_at(order, seed, start);
    return start;
  }

  // Likewise, the search beginning at a word.
  __device__ __forceinline__ int allocate_from(int order, int home) {
    begin();
    search(order, home);
    __syncwarp(mask_);  // what the lane that claimed has acquired holds for all
    return start_;
  }

  // Likewise, of slabs that serve this order already; kContended where that is not enough.
  __device__ __forceinline__ int allocate_opened(int order) {
    begin();
    opens_ = false;
    sweep(order, 0);
    opens_ = true;
    __syncwarp(mask_);
    return start_;
  }

  // As Pool::free, for each lane. Lanes whose granules share a word take one atomic, the warp one version. Where two
  // lanes free a granule, all that free something of its word are told kInvalid.
  __device__ __forceinline__ int free(int start, int count) {
    const int code = set_bits(pool_.free_words(), false, start, count);
    __syncwarp(mask_);
    if (rank_ == 0) pool_.bump_version(static_cast<unsigned>(start) >> Layout::kShift);
    __syncwarp(mask_);  // before any lane takes what a searcher may miss, the version has moved
    return code;
  }

  // As Pool::retire, for each lane.
  __device__ __forceinline__ int retire(int start, int count) {
    const Word epoch = __shfl_sync(mask_, load_acquire(pool_.memory + 2), leader_);
    return set_bits(pool_.limbo_words(epoch), true, start, count);
  }

 private:
  using Layout = typename AnyPool::Layout;

  // %laneid: threads are numbered across all axes of a CTA
  __device__ __forceinline__ static int lane_of_warp() {
    int lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
  }

  __device__ __forceinline__ void begin() {
    granted_ = 0;
    start_ = kContended;
  }

  // A pass over all words, from an even one on.
  __device__ __forceinline__ void sweep(int order, int home) {
    const int num_words = pool_.num_words();
    for (int i = 0; i < num_words && granted_ < wanted_; i += kAhead * wanted_) {
      if (!__any_sync(mask_, sees_runs(order, home, i))) continue;
      for (int k = 0; k < kAhead && granted_ < wanted_; ++k) scan(order, home, i + k * wanted_);
    }
  }

  // For the lanes that have none yet: fills start_, with a code where there is none.
  __device__ __forceinline__ void search(int order, int home) {
    scan(order, home, 0);
    home &= ~1;  // from here on words are loaded in pairs
    for (int pass = 0; pass < kMaxPasses && granted_ < wanted_; ++pass) {
      const Word proved = __shfl_sync(mask_, load_acquire(pool_.memory + kHints + order), leader_);
      __syncwarp(mask_);
      const Word before = version();
      fence_acq_rel();
      __syncwarp(mask_);
      bool is_proved = proved == before + 1;
      if (!is_proved) {
        sweep(order, home);
        if (granted_ == wanted_) return;
        fence_acq_rel();
        __syncwarp(mask_);
        is_proved = version() == before;
        if (is_proved && rank_ == 0) store_relaxed(pool_.memory + kHints + order, before + 1);
      }
      if (is_proved) {
        if (start_ < 0) start_ = AnyPool::code_of(order);
        return;
      }
    }
  }

  __device__ __forceinline__ Word version() const {
    Word sum = 0;
    if (wanted_ == kShards) {
      sum = load_relaxed(pool_.memory + kVersions + lane_ * kShardPitch);
      for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(mask_, sum, d);
      return sum;
    }
    if (rank_ == 0) sum = pool_.version();
    return __shfl_sync(mask_, sum, leader_);
  }

  __device__ __forceinline__ int word_at(int home, int place) const {
    return home + place >= pool_.num_words() ? home + place - pool_.num_words() : home + place;
  }

  // Whether the lane sees a run in one of kAhead words, of which `scan` looks at one: they are all asked for at once,
  // in pairs.
  __device__ __forceinline__ bool sees_runs(int order, int home, int i) const {
    Word seen[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; k += 2) {
      const int place = i + k * wanted_ + 2 * rank_;
      seen[k] = seen[k + 1] = 0;
      if (place < pool_.num_words()) load_relaxed_pair(pool_.free_words() + word_at(home, place), seen[k], seen[k + 1]);
    }
    Word runs = 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) runs |= Layout::runs(seen[k], order, opens_);
    return runs != 0;
  }

  // Each lane looks at one word, from place `i` behind `home` on, and claims what lanes still want.
  __device__ __forceinline__ void scan(int order, int home, int i) {
    const bool is_word = i + rank_ < pool_.num_words();
    const int w = is_word ? word_at(home, i + rank_) : 0;
    const Word seen = is_word ? load_relaxed(pool_.free_words() + w) : 0;
    const Word runs = Layout::runs(seen, order, opens_);
    unsigned finders = __ballot_sync(mask_, runs != 0);
    while (finders != 0 && granted_ < wanted_) {
      const int source = lowest_bit(finders);
      finders &= finders - 1;
      Word starts = 0;
      if (lane_ == source) starts = claim_runs<Layout>(pool_.free_words() + w, seen, order, wanted_ - granted_, opens_);
      starts = __shfl_sync(mask_, starts, source);
      const int its_word = __shfl_sync(mask_, w, source);
      const int count = count_bits(starts);
      if (rank_ >= granted_ && rank_ < granted_ + count) {
        start_ = (its_word << Layout::kShift) + bit_of_rank(starts, rank_ - granted_);
      }
      granted_ += count;
    }
  }

  __device__ __forceinline__ int set_bits(Word* bitmap, bool is_limbo, int start, int count) {
    __syncwarp(mask_);  // what lanes did with their blocks comes before the release
    const bool is_inside = pool_.is_inside(start, count);
    const Word bits = is_inside ? AnyPool::bits_of(start, count) : 0;
    const int w = is_inside ? start >> Layout::kShift : -1;
    const unsigned group = __match_any_sync(mask_, w);
    const unsigned low = __reduce_or_sync(group, static_cast<unsigned>(bits));
    const unsigned high = __reduce_or_sync(group, static_cast<unsigned>(bits >> 32));
    const int total = __reduce_add_sync(group, count_bits(bits));
    const Word all = static_cast<Word>(high) << 32 | low;
    const int first = lowest_bit(group);
    Word taken = 0;
    if (lane_ == first && is_inside) {
      taken = pool_.in_limbo(w);
      if (is_limbo) taken |= load_relaxed(pool_.free_words() + w);
      taken |= fetch_or_release(bitmap + w, all & ~taken);
    }
    taken = __shfl_sync(group, taken, first);
    return is_inside && (taken & bits) == 0 && total == count_bits(all) ? 0 : kInvalid;
  }

  static constexpr int kAhead = 8;  // words of a lane that are looked at together, where many must be

  const AnyPool pool_;
  const unsigned mask_;
  const int leader_, lane_, rank_, wanted_;
  int granted_ = 0;
  int start_ = kContended;
  bool opens_ = true;  // whether words that are wholly free are looked at
};

#endif

}  // namespace kvt
