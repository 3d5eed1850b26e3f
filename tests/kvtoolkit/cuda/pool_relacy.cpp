// kvt/pool.cuh under Relacy: threads whose turns are drawn at every atomic, and relaxed loads that see old values
// wherever no order forbids it: pool_relacy PLAY LAYOUT ORDER ITERATIONS
//
//   pass    two threads, one block: who takes it must see what the one before wrote into it
//   limbo   a block is retired, freed out of limbo by another thread, and taken by any
//   lease   two threads take blocks of nested leases, which the last of them ends; a third waits for the blocks
//   move    two threads, two blocks: one frees its block and asks for another; the other asks, one block is to spare
//   shares  three threads, three blocks, two of which are freed: nobody may be told of exhaustion
//   fewer   three threads, two blocks, both of which are freed: when all have asked, none may be left
//
// Blocks are of 2^ORDER granules. `owners` is plain memory that the owners of granules write, watched by Relacy. Every
// iteration has its own seed, its number: runs repeat exactly. What Relacy cannot show is a load that sees a later
// store, and a compare-and-swap that fails on an old value. Prints what went wrong, step by step, and returns 1.
#define RL_DO_ASSERT 1  // or an order that an operation cannot have would be taken in silence
#include <relacy/relacy.hpp>
// macros of Relacy that are names here
#undef delete
#undef free
#undef new

#include <cstdlib>
#include <string>
#include <vector>

// The builtins of kvt/pool/atomic.cuh, by text: each with the order that the header gives it.
namespace cells {

using Word = unsigned long long;

std::vector<Word> memory;           // what the pool is told of: addresses, its size, and what it holds at first
rl::atomic<Word>* first = nullptr;  // what is read and written in its place

rl::atomic<Word>& at(const Word* address) { return first[address - memory.data()]; }

rl::memory_order of(int order) { return static_cast<rl::memory_order>(order); }
static_assert(int{rl::mo_relaxed} == __ATOMIC_RELAXED && int{rl::mo_acquire} == __ATOMIC_ACQUIRE);
static_assert(int{rl::mo_release} == __ATOMIC_RELEASE && int{rl::mo_acq_rel} == __ATOMIC_ACQ_REL);

// for the list of steps: the place in kvt/pool/atomic.cuh
struct Here : rl::debug_info {
  Here(const char* function = __builtin_FUNCTION(), const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : rl::debug_info(function, file, line) {}
};

Word load_n(const Word* from, int order, Here here = {}) { return at(from).load(of(order), here); }
void store_n(Word* to, Word value, int order, Here here = {}) { at(to).store(value, of(order), here); }
Word fetch_and(Word* to, Word value, int order, Here here = {}) { return at(to).fetch_and(value, of(order), here); }
Word fetch_or(Word* to, Word value, int order, Here here = {}) { return at(to).fetch_or(value, of(order), here); }
Word fetch_add(Word* to, Word value, int order, Here here = {}) { return at(to).fetch_add(value, of(order), here); }
Word exchange_n(Word* to, Word value, int order, Here here = {}) { return at(to).exchange(value, of(order), here); }
bool compare_exchange_n(Word* to, Word* expected, Word value, bool, int order, int failed, Here here = {}) {
  return at(to).compare_exchange(rl::bool_t<false>(), *expected, value, of(order), of(failed), here);
}
void thread_fence(int order, Here here = {}) { rl::atomic_thread_fence(of(order), here); }

}  // namespace cells

#include <kvt/pool.cuh>

#include "pool_words.h"

namespace {

constexpr int kThreads = 3;
constexpr int kWords = 2;
constexpr int kJournals = kvt::kFreeWords + kWords * (2 + kvt::kEpochs) + 4;  // behind what a pool has itself

int order;

struct Run;
struct Play {
  void (*before)(Run&);
  void (*thread)(Run&, int);
  void (*after)(Run&);
} play;

struct Run : rl::test_suite<Run, kThreads> {
  rl::atomic<kvt::Word> memory[kJournals + 2 * kWords];
  rl::var<int> owners[kWords][4];
  rl::atomic<int> arrived;
  int starts[kThreads];  // what each thread was told at last

  void before() {
    cells::first = memory;
    for (unsigned i = 0; i < cells::memory.size(); ++i) memory[i].store(cells::memory[i], rl::mo_relaxed, $);
    for (auto& of_word : owners) {
      for (auto& owner : of_word) owner($) = 0;
    }
    arrived.store(0, rl::mo_relaxed, $);
    play.before(*this);
  }
  void thread(unsigned index) { play.thread(*this, index); }
  void after() { play.after(*this); }
};

template <typename Pool>
struct Plays {
  static Pool pool() { return Pool{cells::memory.data()}; }

  // Block i of a word.
  static int block(int word, int i) { return word * Pool::kGranules + (i << order); }

  // Thread t is number t + 1 among the owners.
  static void write(Run& run, int start, int old, int owner) {
    for (int g = start; g < start + (1 << order); ++g) {
      auto& cell = run.owners[g / Pool::kGranules][g % Pool::kGranules];
      RL_ASSERT(cell($) == old);
      cell($) = owner;
    }
  }

  static int ask(Run& run, int t) {
    // a seed for each of the two words to begin at
    const int start = pool().allocate(order, rl::rand(2));
    if (start >= 0) write(run, start, 0, t + 1);
    return start;
  }

  static void give(Run& run, int t, int start) {
    write(run, start, t + 1, 0);
    RL_ASSERT(pool().free(start, 1 << order) == 0);
  }

  static void retire(Run& run, int t, int start) {
    write(run, start, t + 1, 0);
    RL_ASSERT(pool().retire(start, 1 << order) == 0);
  }

  static void pass(Run& run, int t) {
    for (int i = 0; i < 2 && t < 2; ++i) {
      const int start = ask(run, t);
      if (start >= 0) give(run, t, start);
    }
  }

  static void limbo(Run& run, int t) {
    if (t == 0) return retire(run, t, block(0, 0));
    if (t == 1) pool().free_all(pool().limbo_words(0), 0, 1);
    const int start = ask(run, t);
    if (start >= 0) t == 1 ? retire(run, t, start) : give(run, t, start);
  }

  static void lease(Run& run, int t) {
    const kvt::PoolLease outer{pool(), cells::memory.data() + kJournals};
    const kvt::PoolLease inner{pool(), outer.journal + kWords};
    if (t < 2) {
      const int start = (t == 0 ? outer : inner).allocate(order, 0);
      if (start >= 0) write(run, start, 0, t + 1), write(run, start, t + 1, 0);
      // the barrier: who comes last goes on alone
      if (run.arrived.fetch_add(1, rl::mo_acq_rel, $) == 0) return;
      inner.commit(outer.journal, 0, 1);
      outer.abort(0, 1);
    }
    const int start = ask(run, t);
    if (start >= 0) give(run, t, start);
  }

  // The first `movers` of the threads hold a block at first, each in another word.
  template <int movers>
  static void hold(Run& run) {
    for (int t = 0; t < movers; ++t) write(run, block(t, 0), 0, t + 1);
  }

  template <int movers, int askers>
  static void ask_all(Run& run, int t) {
    if (t < movers) give(run, t, block(t, 0));
    if (t < askers) run.starts[t] = ask(run, t);
  }

  template <int askers, int blocks>
  static void all_are_taken(Run& run) {
    int taken = 0;
    for (int t = 0; t < askers; ++t) taken += run.starts[t] >= 0;
    RL_ASSERT(taken == blocks);
  }

  static void nothing(Run&) {}

  // So many blocks are free at first, from `from` on in a word; all others are taken, and stay so.
  static void set_free(int word, int from, int count) {
    cells::memory = make_memory<Pool>(kWords * Pool::kGranules);
    cells::memory.resize(kJournals + 2 * kWords);
    for (int w = 0; w < kWords; ++w) {
      kvt::Word& bits = pool().free_words()[w];
      bits &= ~granule_bits<Pool>();
      if (Pool::Layout::kIsSlab) bits |= kvt::Word(order) << 32;
    }
    if (count > 0) pool().free_words()[word] |= Pool::bits_of(block(0, from), count << order);
  }

  static void set(const std::string& name) {
    if (name == "pass") set_free(0, 0, 1), play = {nothing, pass, nothing};
    if (name == "limbo") set_free(0, 0, 0), play = {hold<1>, limbo, nothing};
    if (name == "lease") set_free(0, 0, 2), play = {nothing, lease, nothing};
    if (name == "move") set_free(1, 1, 1), play = {hold<1>, ask_all<1, 2>, all_are_taken<2, 2>};
    if (name == "shares") set_free(1, 1, 1), play = {hold<2>, ask_all<2, 3>, all_are_taken<3, 3>};
    if (name == "fewer") set_free(0, 0, 0), play = {hold<2>, ask_all<2, 3>, all_are_taken<3, 2>};
  }
};

}  // namespace

int main(int, char** arguments) {
  order = std::atoi(arguments[3]);
  if (std::string(arguments[2]) == "slab")
    Plays<kvt::SlabPool>::set(arguments[1]);
  else
    Plays<kvt::Pool>::set(arguments[1]);
  rl::test_params params;
  params.iteration_count = std::atoi(arguments[4]);
  return rl::simulate<Run>(params) ? 0 : 1;
}
