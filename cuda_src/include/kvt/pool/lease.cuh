// Leases: blocks that are all kept or all freed in the end.
#pragma once

#include <kvt/pool/pool.cuh>

namespace kvt {

// Blocks taken ahead for a future that may not come, such as a beam or draft tokens. The journal is a bitmap of
// granules, all zeros at first (DevicePool.journals). Do not free or retire a block of a lease by hand before the lease
// has ended, because the journal would still name it. Leases nest: a lease that is committed hands its blocks to the
// lease around it, if there is one.
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

  // Keep the blocks. All `threads` threads of a group call this, each with its `rank`, after a barrier, when none of
  // them allocates any more. `around` is the journal of the lease around this one, or null.
  KVT_ATOMIC void commit(Word* around, int rank, int threads) const {
    for (int w = rank; w < pool.num_words(); w += threads) {
      const Word bits = exchange_acq_rel(journal + w, 0);
      if (around != nullptr && bits != 0) fetch_or_release(around + w, bits);
    }
  }

  // Free the blocks; called like `commit`. Nobody may still read them.
  KVT_ATOMIC void abort(int rank, int threads) const { pool.free_all(journal, rank, threads); }
};
template <typename AnyPool>
PoolLease(AnyPool, Word*) -> PoolLease<AnyPool>;

}  // namespace kvt
