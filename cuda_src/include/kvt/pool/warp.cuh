// A pool for whole warps, on the device only: one lane's atomic serves many lanes.
#pragma once

#include <kvt/pool/pool.cuh>

#if defined(__CUDACC__)

namespace kvt {

// What lanes of one warp do together. All lanes of `mask` must call; it is 0xFFFFFFFF, or the __ballot_sync of the
// lanes that take part. Example: PoolWarp(pool, mask).allocate(0, number_of_the_warp);
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

  // Take a block of 2^order granules for each lane; all lanes give the same order. Returns the first granule of the
  // lane's block, or a PoolCode.
  __device__ __forceinline__ int allocate(int order, unsigned seed) {
    if (pool_.num_words() == 0) return kInvalid;
    const int start = allocate_from(order, __shfl_sync(mask_, pool_.first_word(order, seed), leader_));
    if (start >= 0 && rank_ == wanted_ - 1) pool_.found_at(order, seed, start);
    return start;
  }

  // The same, with the search beginning at word `home`.
  __device__ __forceinline__ int allocate_from(int order, int home) {
    begin();
    search(order, home);
    __syncwarp(mask_);  // extends the claiming lane's acquire to all lanes
    return start_;
  }

  // The same, only from slabs that already serve this order; kContended if they do not have enough.
  __device__ __forceinline__ int allocate_opened(int order) {
    begin();
    opens_ = false;
    sweep(order, 0);
    opens_ = true;
    __syncwarp(mask_);
    return start_;
  }

  // Pool::free for each lane. Lanes whose granules share a word take one atomic together, and the warp increments the
  // version once. If two lanes free the same granule, all lanes that free a part of its word get kInvalid.
  __device__ __forceinline__ int free(int start, int count) {
    const int code = set_bits(pool_.free_words(), false, start, count);
    __syncwarp(mask_);
    if (rank_ == 0) pool_.bump_version(static_cast<unsigned>(start) >> Layout::kShift);
    __syncwarp(mask_);  // the version moves before any lane takes a block that a searcher may miss
    return code;
  }

  // Pool::retire for each lane.
  __device__ __forceinline__ int retire(int start, int count) {
    const Word epoch = __shfl_sync(mask_, load_acquire(pool_.memory + 2), leader_);
    return set_bits(pool_.limbo_words(epoch), true, start, count);
  }

 private:
  using Layout = typename AnyPool::Layout;

  // %laneid, because threadIdx.x % 32 is not the lane if a CTA has several axes
  __device__ __forceinline__ static int lane_of_warp() {
    int lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
  }

  __device__ __forceinline__ void begin() {
    granted_ = 0;
    start_ = kContended;
  }

  // One pass over all words, from `home` on, which is even.
  __device__ __forceinline__ void sweep(int order, int home) {
    const int num_words = pool_.num_words();
    for (int i = 0; i < num_words && granted_ < wanted_; i += kAhead * wanted_) {
      if (!__any_sync(mask_, sees_runs(order, home, i))) continue;
      for (int k = 0; k < kAhead && granted_ < wanted_; ++k) scan(order, home, i + k * wanted_);
    }
  }

  // Search for the lanes that have no block yet. Sets start_ to a block, or to a PoolCode if there is none.
  __device__ __forceinline__ void search(int order, int home) {
    scan(order, home, 0);
    home &= ~1;  // from here on, words are loaded in pairs
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

  // Whether this lane sees a run in one of kAhead words. `scan` looks at one of them at a time; here all are loaded at
  // once, in pairs.
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

  // Each lane looks at one word, `i` + rank words after `home`. Lanes that see runs claim, in turn, what is still
  // wanted.
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
    __syncwarp(mask_);  // what the lanes did with their blocks comes before the release
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

  static constexpr int kAhead = 8;  // words that a lane loads at once in a sweep

  const AnyPool pool_;
  const unsigned mask_;
  const int leader_, lane_, rank_, wanted_;
  int granted_ = 0;
  int start_ = kContended;
  bool opens_ = true;  // whether slabs that are wholly free may be opened
};

}  // namespace kvt

#endif
