// kvt::PoolWarp on a warp of host threads beside single threads: pool_warps GRANULES SINGLES LANES SEED
//
// Rounds of: the warp takes a block for each of its lanes, threads take single granules, all write their names into
// what they got; nobody frees, so whoever is refused must be right. Then all give back: by the warp, alone, or to limbo.
#include "warp_on_threads.h"

#include <kvt/pool.cuh>

#include <random>

int main(int, char** arguments) {
  const int num_granules = std::atoi(arguments[1]), num_singles = std::atoi(arguments[2]);
  const unsigned lanes = static_cast<unsigned>(std::strtoul(arguments[3], nullptr, 0));
  std::mt19937 draw(std::atoi(arguments[4]));
  const int num_words = (num_granules + 127) / 128 * 2;
  std::vector<kvt::Word> memory(kvt::kFreeWords + num_words * (2 + kvt::kEpochs), 0);
  memory[0] = num_granules, memory[1] = num_words;
  kvt::Word* const words = memory.data() + kvt::kFreeWords;
  for (int g = 0; g < num_granules; ++g) words[g / 64] |= kvt::Word{1} << g % 64;
  const std::vector<kvt::Word> fresh(words, words + num_words);
  const kvt::Pool pool{memory.data()};
  int wrong = 0;

  for (int round = 0; round < 30; ++round) {
    // most granules are somebody else's; often all but one word of them
    const int only = draw() % 2 == 0 ? static_cast<int>(draw() % num_words) : -1;
    for (int w = 0; w < num_words; ++w) {
      const unsigned kind = only < 0 ? draw() % 4 : w == only ? 3 : 0;
      words[w] = kind < 2 ? 0 : kind == 2 ? words[w] & draw() & draw() * 0x100000001ull : words[w];
    }
    kvt::add_release(memory.data() + kvt::kVersions, 1);
    const std::vector<kvt::Word> before(words, words + num_words);
    const int order = draw() % 2 == 0 ? 0 : draw() % 4;
    const bool retires = draw() % 3 == 0;
    const unsigned seed = draw();
    std::vector<int> owners(num_granules, 0), of_lanes(32, kvt::kInvalid), of_singles(num_singles, kvt::kInvalid);
    const auto take = [&](int start, int count, int owner) {
      for (int g = start; g < start + count; ++g) {
        if (g >= num_granules || __atomic_exchange_n(&owners[g], owner, __ATOMIC_RELAXED) != 0) wrong |= 1;
      }
    };
    Warp warp;
    std::vector<std::thread> threads = start_warp(warp, lanes, [&](int lane) {
      of_lanes[lane] = kvt::PoolWarp(pool, lanes).allocate(order, seed);
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
      runs_left += kvt::count_bits(kvt::fold_runs(words[w], order));
      granules_left += kvt::count_bits(words[w]);
      for (int g = 64 * w; g < 64 * w + 64 && g < num_granules; ++g) {
        if ((((before[w] & ~words[w]) >> g % 64 & 1) != 0) != (owners[g] != 0)) wrong |= 2;
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      if ((lanes >> lane & 1) != 0 && of_lanes[lane] < 0 && runs_left > 0) wrong |= 4;
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
    if (std::memcmp(before.data(), words, num_words * sizeof(kvt::Word)) != 0) wrong |= 32;
    std::memcpy(words, fresh.data(), num_words * sizeof(kvt::Word));
    if (wrong != 0) {
      std::printf("round %d, order %d: %d\n", round, order, wrong);
      return 1;
    }
  }
  return 0;
}
