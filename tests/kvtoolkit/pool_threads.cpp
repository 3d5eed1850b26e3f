// Real threads on kvt/pool.cuh, as the tests build and run it: pool_threads GRANULES THREADS ROUNDS SEED MODE
//
//   mix    allocate and free blocks of all sizes; some are retired, and freed when an epoch is completed; leases nest
//   spare  every thread keeps to its share of the granules, and so may never be told of exhaustion
//   fill   take single granules until told of exhaustion: all of them must have been granted
//
// `owners` and `kept` are plain memory that a block's owner writes: two owners at once are seen by the check, and an
// order that is missing by ThreadSanitizer. Prints what went wrong and returns 1.
#include <kvt/pool.cuh>

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
int failures = 0;

void fail(const char* what, int a, int b) {
  if (__atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED) == 0) std::printf("%s: %d %d\n", what, a, b);
}

void take(Block block, int owner) {
  const int size = 1 << block.order;
  if (block.start % size != 0 || block.start + size > num_granules) fail("not aligned, or outside", block.start, size);
  for (int g = block.start; g < block.start + size && g < num_granules; ++g) {
    if (owners[g] != 0) fail("two owners", g, owner);
    owners[g] = owner;
  }
}

void leave(Block block, int owner) {
  for (int g = block.start; g < block.start + (1 << block.order); ++g) {
    if (owners[g] != owner) fail("lost to another owner", g, owners[g]);
    owners[g] = 0;
  }
}

void mix(kvt::Pool pool, int owner, unsigned seed) {
  std::mt19937 draw(seed);
  std::vector<Block> held;
  std::vector<kvt::Word> outer(pool.num_words()), inner(pool.num_words());
  for (int round = 0; round < num_rounds; ++round) {
    const int order = draw() % 4;
    if (draw() % 2 == 0) {
      const int start = pool.allocate(order, draw());
      if (start >= 0) {
        take({start, order}, owner);
        held.push_back({start, order});
      }
    } else if (draw() % 4 == 0) {  // several at once, as a warp claims them
      const int w = draw() % pool.num_words();
      kvt::Word* const word = pool.free_words() + w;
      kvt::Word starts = kvt::claim_runs(word, kvt::load_relaxed(word), order, 5);
      for (; starts != 0; starts &= starts - 1) {
        held.push_back({w * 64 + kvt::lowest_bit(starts), order});
        take(held.back(), owner);
      }
    } else if (!held.empty()) {
      std::swap(held[draw() % held.size()], held.back());
      const Block block = held.back();
      held.pop_back();
      leave(block, owner);
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
        if (block.start >= 0) take(block, owner), leave(block, owner);
      }
      if (draw() % 2 == 0) second.commit(outer.data(), 0, 1);
      else second.abort(0, 1);
      first.abort(0, 1);
    }
    if (round % 32 == 31) pool.free_all(pool.limbo_words(0), 0, 1);
  }
  for (const Block block : held) {
    leave(block, owner);
    pool.free(block.start, 1 << block.order);
  }
}

void spare(kvt::Pool pool, int owner, unsigned seed) {
  std::mt19937 draw(seed);
  std::vector<Block> held;
  const unsigned most = num_granules / num_threads;
  for (int round = 0; round < num_rounds; ++round) {
    if (held.size() < most && (held.empty() || draw() % 4 != 0)) {
      int start;
      do start = pool.allocate(0, draw()); while (start == kvt::kContended);
      if (start < 0) {
        fail("false exhaustion", start, owner);
        return;
      }
      take({start, 0}, owner);
      held.push_back({start, 0});
    } else {
      std::swap(held[draw() % held.size()], held.back());
      leave(held.back(), owner);
      pool.free(held.back().start, 1);
      held.pop_back();
    }
  }
  for (const Block block : held) {
    leave(block, owner);
    pool.free(block.start, 1);
  }
}

void fill(kvt::Pool pool, int owner, unsigned seed) {
  for (int w = 0; w < pool.num_words(); ++w) {  // several at once first: fewer than asked for if the word has no more
    kvt::Word* const word = pool.free_words() + w;
    const kvt::Word starts = kvt::claim_runs(word, kvt::load_relaxed(word), 0, 5);
    if (kvt::count_bits(starts) < 5 && kvt::load_relaxed(word) != 0) fail("a claim gave up early", w, owner);
    for (kvt::Word rest = starts; rest != 0; rest &= rest - 1) take({w * 64 + kvt::lowest_bit(rest), 0}, owner);
  }
  while (true) {
    const int start = pool.allocate(0, seed++);
    if (start == kvt::kContended) continue;
    if (start < 0) return;
    take({start, 0}, owner);
  }
}

}  // namespace

int main(int, char** arguments) {
  num_granules = std::atoi(arguments[1]), num_threads = std::atoi(arguments[2]), num_rounds = std::atoi(arguments[3]);
  const unsigned seed = std::atoi(arguments[4]);
  const std::string mode = arguments[5];
  const int num_words = (num_granules + 63) / 64;
  memory.assign(kvt::kFreeWords + num_words * (2 + kvt::kEpochs), 0);
  owners.assign(num_granules, 0);
  memory[0] = num_granules, memory[1] = num_words;
  for (int g = 0; g < num_granules; ++g) memory[kvt::kFreeWords + g / 64] |= kvt::Word{1} << g % 64;
  const std::vector<kvt::Word> fresh(memory.begin() + kvt::kFreeWords, memory.end());
  kvt::Pool pool{memory.data()};
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back(mode == "mix" ? mix : mode == "spare" ? spare : fill, pool, t + 1, seed * 1000 + t);
  }
  for (auto& thread : threads) thread.join();

  if (mode == "fill") {
    for (int g = 0; g < num_granules; ++g) {
      if (owners[g] == 0) fail("exhausted, and a granule is left", g, 0);
    }
    if (pool.allocate(0, seed) != kvt::kExhausted) fail("not exhausted", 0, 0);
    if (pool.allocate(3, seed) != kvt::kFragmented) fail("not fragmented", 3, 0);
    pool.free(5, 1);
    if (pool.allocate(1, seed) != kvt::kFragmented) fail("not fragmented", 0, 0);
    if (pool.free(5, 1) != kvt::kInvalid) fail("a double free went through", 5, 1);
    if (pool.retire(5, 1) != kvt::kInvalid) fail("a free granule was retired", 5, 1);
    for (const int start : {num_granules - 4, 60, -1}) {
      if (pool.free(start, 8) != kvt::kInvalid) fail("a run that leaves the pool or the word went through", start, 8);
    }
    if (pool.retire(6, 1) != 0 || pool.retire(6, 1) != kvt::kInvalid || pool.free(6, 1) != kvt::kInvalid) {
      fail("a granule left limbo early", 6, 1);
    }
    if (pool.allocate(0, seed) != 5) fail("what was freed is not found", 5, 0);
    for (int g = 0; g < num_granules; ++g) pool.free(g, 1);
  }
  pool.free_all(pool.limbo_words(0), 0, 1);
  if (std::memcmp(fresh.data(), memory.data() + kvt::kFreeWords, fresh.size() * sizeof(kvt::Word)) != 0) {
    fail("the pool is not as it was", 0, 0);
  }
  return failures != 0;
}
