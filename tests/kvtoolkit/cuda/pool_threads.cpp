// Real threads on kvt/pool.cuh, as the tests build and run it: pool_threads GRANULES THREADS ROUNDS SEED MODE LAYOUT
//
//   mix    allocate and free blocks of all sizes; some are retired, and freed when an epoch is completed; leases nest
//   spare  every thread keeps to its share of the granules, and so may never be told of exhaustion
//   fill   take single granules until told of exhaustion: all of them must have been granted
//
// `owners` is plain memory that a block's owner writes: two owners at once are seen by the check, and an order that is
// missing by ThreadSanitizer. `served` counts the live blocks of each order in a slab. Prints what went wrong and
// returns 1.
#include <kvt/pool.cuh>

#include "pool_words.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Block {
  int start, order;
};

int num_granules, num_threads, num_rounds;
std::vector<kvt::Word> memory;
std::vector<int> owners;
std::vector<kvt::Word> served;  // by word, 16 bits for each order
int failures = 0;

void fail(const char* what, int a, int b) {
  if (__atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED) == 0) std::printf("%s: %d %d\n", what, a, b);
}

template <typename Pool>
void take(Block block, int owner) {
  const int size = 1 << block.order;
  if (Pool::Layout::kIsSlab) {
    const kvt::Word one = kvt::Word{1} << 16 * block.order;
    const kvt::Word all = __atomic_add_fetch(&served[block.start / Pool::kGranules], one, __ATOMIC_RELAXED);
    if ((all & ~(one * 0xFFFF)) != 0) fail("another order in this slab", block.start, block.order);
  }
  if (block.start % size != 0 || block.start + size > num_granules) fail("not aligned, or outside", block.start, size);
  for (int g = block.start; g < block.start + size && g < num_granules; ++g) {
    if (owners[g] != 0) fail("two owners", g, owner);
    owners[g] = owner;
  }
}

template <typename Pool>
void leave(Block block, int owner) {
  if (Pool::Layout::kIsSlab) {
    const kvt::Word one = kvt::Word{1} << 16 * block.order;
    __atomic_sub_fetch(&served[block.start / Pool::kGranules], one, __ATOMIC_RELAXED);
  }
  for (int g = block.start; g < block.start + (1 << block.order); ++g) {
    if (owners[g] != owner) fail("lost to another owner", g, owners[g]);
    owners[g] = 0;
  }
}

template <typename Pool>
void mix(Pool pool, int owner, unsigned seed) {
  std::mt19937 draw(seed);
  std::vector<Block> held;
  std::vector<kvt::Word> outer(pool.num_words()), inner(pool.num_words());
  for (int round = 0; round < num_rounds; ++round) {
    const int order = draw() % 4;
    if (draw() % 2 == 0) {
      const int start = pool.allocate(order, draw());
      if (start >= 0) {
        take<Pool>({start, order}, owner);
        held.push_back({start, order});
      }
    } else if (draw() % 4 == 0) {  // several at once, as a warp claims them
      const int w = draw() % pool.num_words();
      kvt::Word* const word = pool.free_words() + w;
      kvt::Word starts = kvt::claim_runs<typename Pool::Layout>(word, kvt::load_relaxed(word), order, 5);
      for (; starts != 0; starts &= starts - 1) {
        held.push_back({w * Pool::kGranules + kvt::lowest_bit(starts), order});
        take<Pool>(held.back(), owner);
      }
    } else if (!held.empty()) {
      std::swap(held[draw() % held.size()], held.back());
      const Block block = held.back();
      held.pop_back();
      leave<Pool>(block, owner);
      const int size = 1 << block.order;
      const int code = draw() % 4 == 0 ? pool.retire(block.start, size) : pool.free(block.start, size);
      if (code != 0) fail("refused a live block", block.start, code);
    }
    if (round % 16 == 15) {  // two nested futures: one comes, one does not
      kvt::PoolLease first{pool, outer.data()}, second{pool, inner.data()};
      const int kept = first.allocate(order, draw());
      const int draft = second.allocate(0, draw());
      const int beam = second.allocate(1, draw());
      for (const Block block : {Block{kept, order}, Block{draft, 0}, Block{beam, 1}}) {
        if (block.start >= 0) take<Pool>(block, owner), leave<Pool>(block, owner);
      }
      if (draw() % 2 == 0)
        second.commit(outer.data(), 0, 1);
      else
        second.abort(0, 1);
      first.abort(0, 1);
    }
    if (round % 32 == 31) pool.free_all(pool.limbo_words(0), 0, 1);
  }
  for (const Block block : held) {
    leave<Pool>(block, owner);
    pool.free(block.start, 1 << block.order);
  }
}

template <typename Pool>
void spare(Pool pool, int owner, unsigned seed) {
  std::mt19937 draw(seed);
  std::vector<Block> held;
  const unsigned most = num_granules / num_threads;
  for (int round = 0; round < num_rounds; ++round) {
    if (held.size() < most && (held.empty() || draw() % 4 != 0)) {
      int start;
      do start = pool.allocate(0, draw());
      while (start == kvt::kContended);
      if (start < 0) {
        fail("false exhaustion", start, owner);
        return;
      }
      take<Pool>({start, 0}, owner);
      held.push_back({start, 0});
    } else {
      std::swap(held[draw() % held.size()], held.back());
      leave<Pool>(held.back(), owner);
      pool.free(held.back().start, 1);
      held.pop_back();
    }
  }
  for (const Block block : held) {
    leave<Pool>(block, owner);
    pool.free(block.start, 1);
  }
}

template <typename Pool>
void fill(Pool pool, int owner, unsigned seed) {
  for (int w = 0; w < pool.num_words(); ++w) {  // several at once first: fewer than asked for if the word has no more
    kvt::Word* const word = pool.free_words() + w;
    const kvt::Word starts = kvt::claim_runs<typename Pool::Layout>(word, kvt::load_relaxed(word), 0, 5);
    const kvt::Word left = kvt::load_relaxed(word) & granule_bits<Pool>();
    if (kvt::count_bits(starts) < 5 && left != 0) fail("a claim gave up early", w, owner);
    for (kvt::Word rest = starts; rest != 0; rest &= rest - 1) {
      take<Pool>({w * Pool::kGranules + kvt::lowest_bit(rest), 0}, owner);
    }
  }
  while (true) {
    const int start = pool.allocate(0, seed++);
    if (start == kvt::kContended) continue;
    if (start < 0) return;
    take<Pool>({start, 0}, owner);
  }
}

template <typename Pool>
void play(unsigned seed, const std::string& mode) {
  memory = make_memory<Pool>(num_granules);
  const std::vector<kvt::Word> fresh = memory;
  owners.assign(num_granules, 0);
  const Pool pool{memory.data()};
  served.assign(pool.num_words(), 0);
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    const auto what = mode == "mix" ? mix<Pool> : mode == "spare" ? spare<Pool> : fill<Pool>;
    threads.emplace_back(what, pool, t + 1, seed * 1000 + t);
  }
  for (auto& thread : threads) thread.join();

  if (mode == "fill") {
    for (int g = 0; g < num_granules; ++g) {
      if (owners[g] == 0) fail("exhausted, and a granule is left", g, 0);
    }
    if (pool.allocate(0, seed) != Pool::code_of(0)) fail("not exhausted", 0, 0);
    if (pool.allocate(3, seed) != kvt::kFragmented) fail("not fragmented", 3, 0);
    pool.free(5, 1);
    if (pool.allocate(1, seed) != kvt::kFragmented) fail("not fragmented", 0, 0);
    if (pool.free(5, 1) != kvt::kInvalid) fail("a double free went through", 5, 1);
    if (pool.retire(5, 1) != kvt::kInvalid) fail("a free granule was retired", 5, 1);
    for (const int start : {num_granules - 4, Pool::kGranules - 4, -1}) {
      if (pool.free(start, 8) != kvt::kInvalid) fail("a run that leaves the pool or the word went through", start, 8);
    }
    if (pool.retire(6, 1) != 0 || pool.retire(6, 1) != kvt::kInvalid || pool.free(6, 1) != kvt::kInvalid) {
      fail("a granule left limbo early", 6, 1);
    }
    if (pool.allocate(0, seed) != 5) fail("what was freed is not found", 5, 0);
    for (int g = 0; g < num_granules; ++g) pool.free(g, 1);
    pool.free_all(pool.limbo_words(0), 0, 1);
    for (int i = 0; i < num_granules / 8; ++i) {  // what served granules serves blocks of 8 now
      if (pool.allocate(3, seed + i) < 0) fail("a block of 8 is not found", i, 0);
    }
    for (int g = 0; g < num_granules; g += 8) pool.free(g, 8);
  }
  pool.free_all(pool.limbo_words(0), 0, 1);
  if (!is_same<Pool>(fresh, memory)) fail("the pool is not as it was", 0, 0);
}

}  // namespace

int main(int, char** arguments) {
  num_granules = std::atoi(arguments[1]), num_threads = std::atoi(arguments[2]), num_rounds = std::atoi(arguments[3]);
  const unsigned seed = std::atoi(arguments[4]);
  if (std::string(arguments[6]) == "slab")
    play<kvt::SlabPool>(seed, arguments[5]);
  else
    play<kvt::Pool>(seed, arguments[5]);
  return failures != 0;
}
