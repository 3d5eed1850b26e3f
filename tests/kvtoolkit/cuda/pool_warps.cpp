// kvt::PoolWarp on a warp of host threads beside single threads: pool_warps GRANULES SINGLES LANES SEED LAYOUT
//
// Rounds of: the warp takes a block for each of its lanes, threads take single granules, all write their names into
// what they got; nobody frees, so whoever is refused must be right. Then all give back: by the warp, alone, or to limbo.
#include "warp_on_threads.h"

#include "pool_words.h"

#include <algorithm>
#include <random>
#include <string>

template <typename Pool>
int play(char** arguments) {
  using Layout = typename Pool::Layout;
  const int num_granules = std::atoi(arguments[1]), num_singles = std::atoi(arguments[2]);
  const unsigned lanes = static_cast<unsigned>(std::strtoul(arguments[3], nullptr, 0));
  std::mt19937 draw(std::atoi(arguments[4]));
  std::vector<kvt::Word> memory = make_memory<Pool>(num_granules);
  const std::vector<kvt::Word> fresh = memory;
  const Pool pool{memory.data()};
  const int num_words = pool.num_words();
  kvt::Word* const words = pool.free_words();
  int wrong = 0;

  for (int round = 0; round < 30; ++round) {
    // most granules are somebody else's; often all but one word of them
    const int only = draw() % 2 == 0 ? static_cast<int>(draw() % num_words) : -1;
    for (int w = 0; w < num_words; ++w) {
      const unsigned kind = only < 0 ? draw() % 4 : w == only ? 3 : 0;
      kvt::Word kept = kind < 2 ? 0 : kind == 2 ? draw() & draw() * 0x100000001ull : ~0ull;
      const int serves = draw() % 4;
      if (Layout::kIsSlab) {
        kept = kvt::spread_runs(kvt::fold_runs(kept, serves), serves);  // blocks of one size are live
        words[w] |= static_cast<kvt::Word>(serves) << 32;
      }
      words[w] &= kept | ~granule_bits<Pool>();
    }
    kvt::add_release(memory.data() + kvt::kVersions, 1);
    const std::vector<kvt::Word> before = memory;
    const int order = draw() % 2 == 0 ? 0 : draw() % 4;
    const bool retires = draw() % 3 == 0;
    // only slabs that serve the order already, of which others might open more
    const bool prefers = Layout::kIsSlab && num_singles == 0 && draw() % 3 == 0;
    const unsigned seed = draw();
    std::vector<int> owners(num_granules, 0), of_lanes(32, kvt::kInvalid), of_singles(num_singles, kvt::kInvalid);
    const auto take = [&](int start, int count, int owner) {
      for (int g = start; g < start + count; ++g) {
        if (g >= num_granules || __atomic_exchange_n(&owners[g], owner, __ATOMIC_RELAXED) != 0) wrong |= 1;
      }
    };
    Warp warp;
    std::vector<std::thread> threads = start_warp(warp, lanes, [&](int lane) {
      kvt::PoolWarp group(pool, lanes);
      of_lanes[lane] = prefers ? group.allocate_opened(order) : group.allocate(order, seed);
      if (of_lanes[lane] >= 0) take(of_lanes[lane], 1 << order, lane + 1);
    });
    for (int t = 0; t < num_singles; ++t) {
      threads.emplace_back([&, t] {
        of_singles[t] = pool.allocate(0, seed + t);
        if (of_singles[t] >= 0) take(of_singles[t], 1, 100 + t);
      });
    }
    for (auto& thread : threads) thread.join();
    int runs_left = 0, granules_left = 0;
    for (int w = 0; w < num_words; ++w) {
      runs_left += kvt::count_bits(Layout::runs(words[w], order, !prefers));
      granules_left += kvt::count_bits(Layout::runs(words[w], 0, true));
      for (int i = 0; i < Pool::kGranules && w * Pool::kGranules + i < num_granules; ++i) {
        const bool is_gone = (before[kvt::kFreeWords + w] & ~words[w]) >> i & 1;
        if (is_gone != (owners[w * Pool::kGranules + i] != 0)) wrong |= 2;
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      if ((lanes >> lane & 1) != 0 && of_lanes[lane] < 0 && runs_left > 0) wrong |= 4;
    }
    for (const int start : of_lanes) {
      if (!prefers || start < 0) continue;
      const kvt::Word seen = before[kvt::kFreeWords + start / Pool::kGranules];
      if ((Layout::runs(seen, order, false) >> start % Pool::kGranules & 1) == 0) wrong |= 64;
    }
    for (const int start : of_singles) wrong |= start < 0 && granules_left > 0 ? 4 : 0;

    unsigned holders = 0;
    for (int lane = 0; lane < 32; ++lane) holders |= of_lanes[lane] >= 0 ? 1u << lane : 0;
    threads = start_warp(warp, holders, [&](int lane) {
      kvt::PoolWarp group(pool, holders);
      const auto give = [&](bool to_limbo) {
        return to_limbo ? group.retire(of_lanes[lane], 1 << order) : group.free(of_lanes[lane], 1 << order);
      };
      if (give(retires) != 0) wrong |= 8;
      if (give(retires) != kvt::kInvalid || give(!retires) != kvt::kInvalid) wrong |= 16;
    });
    for (int t = 0; t < num_singles; ++t) {
      if (of_singles[t] >= 0 && pool.free(of_singles[t], 1) != 0) wrong |= 8;
    }
    for (auto& thread : threads) thread.join();
    pool.free_all(pool.limbo_words(0), 0, 1);
    if (!is_same<Pool>(before, memory)) wrong |= 32;
    std::copy(fresh.begin() + kvt::kFreeWords, fresh.begin() + kvt::kFreeWords + num_words, words);
    if (wrong != 0) {
      std::printf("round %d, order %d: %d\n", round, order, wrong);
      return 1;
    }
  }
  return 0;
}

int main(int, char** arguments) {
  return std::string(arguments[5]) == "slab" ? play<kvt::SlabPool>(arguments) : play<kvt::Pool>(arguments);
}
