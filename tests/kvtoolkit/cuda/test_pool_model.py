"""The pool's protocol under every order of steps that Hypothesis can think of."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kvtoolkit.cuda.pool_model import CONTENDED, INVALID, WIDTH, PoolModel

CALLS = st.one_of(
    st.tuples(st.just("allocate"), st.integers(0, 3), st.integers(0, 2)),
    st.tuples(st.just("warp"), st.integers(0, 2), st.integers(0, 2), st.integers(1, 3)),
    st.tuples(st.just("free"), st.integers(0, 9)),
    st.tuples(st.just("free twice"), st.integers(0, 9)),
    st.tuples(st.just("retire"), st.integers(0, 9)),
    st.tuples(st.just("lease"), st.integers(0, 1), st.booleans()),
)


def turns(threads, least=0):
    """Whose turn it is: some steps of one, then some of another."""
    bursts = st.tuples(st.integers(0, threads - 1), st.integers(1, 15))
    return st.lists(bursts, min_size=least, max_size=40).map(lambda some: [one for one, n in some for _ in range(n)])


CASES = {
    "free": st.lists(st.sampled_from([0, 0, 1, 2, 0x80, 0x0C, 0xF0, 0xFF]), min_size=1, max_size=3),
    "calls": st.lists(st.lists(CALLS, min_size=1, max_size=4), min_size=1, max_size=4),
    "order": turns(4),
}


class Thread:
    """One thread and its calls; `steps` goes on by an atomic at a time."""

    def __init__(self, name, pool, calls, is_alone):
        self.name, self.pool, self.is_alone = name, pool, is_alone
        self.held = []  # (start, order)
        self.asks_for, self.was_short = None, False
        self.steps = self._run(calls)

    def _granted(self, start, order):
        for granule in range(start, start + (1 << order)):
            assert granule not in self.pool.owners, f"{granule} has two owners"
            self.pool.owners[granule] = self.name, order
        if self.pool.orders:
            first = start // WIDTH * WIDTH
            together = {self.pool.owners[g][1] for g in range(first, first + WIDTH) if g in self.pool.owners}
            assert together == {order}, "orders mix in a slab"
        self.held.append((start, order))

    def _leaves(self, index):
        start, order = self.held.pop(index % len(self.held))
        for granule in range(start, start + (1 << order)):
            assert self.pool.owners.pop(granule) == (self.name, order)
        return start, 1 << order

    def look(self):
        """After every step of anybody: is there no block that is free for certain, of the order that is asked for?"""
        if self.asks_for is not None:
            self.was_short |= not self.pool.has_settled_run(self.asks_for)

    def _watched(self, steps, order):
        self.asks_for, self.was_short = order, False
        self.look()
        result = yield from steps
        self.asks_for = None
        return result

    def _refused(self, code, order):
        assert code in (CONTENDED, self.pool.code_of(order))
        assert code == CONTENDED or self.was_short, "a false exhaustion"

    def _run(self, calls):
        pool = self.pool
        for what, *how in calls:
            if what == "allocate":
                order, home = how
                start = yield from self._watched(pool.allocate(order, home % len(pool.free)), order)
                if start >= 0:
                    self._granted(start, order)
                else:
                    self._refused(start, order)
            elif what == "warp":
                order, home, wanted = how
                *starts, last = yield from self._watched(
                    pool.allocate_warp(order, home % len(pool.free), wanted), order
                )
                for start in [*starts, last]:
                    if start >= 0:
                        self._granted(start, order)
                    else:
                        self._refused(last, order)
            elif what == "lease":
                order, comes = how
                start = yield from self._watched(pool.allocate(order, 0), order)
                if start >= 0:
                    self._granted(start, order)
                    if not comes:  # the journal of this lease
                        journal = [0] * len(pool.free)
                        first, count = self._leaves(-1)
                        journal[first // WIDTH] |= ((1 << count) - 1) << first % WIDTH
                        pool.settle((yield from pool.free_all(journal)))
                        assert not any(journal)
            elif self.held:
                start, count = self._leaves(how[0])
                granules = list(range(start, start + count))
                if what == "retire":
                    assert (yield from pool.retire(start, count)) == 0
                    assert (yield from pool.retire(start, count)) == INVALID
                    assert (yield from pool.give_back(start, count)) == INVALID, "freed out of limbo"
                else:
                    assert (yield from pool.give_back(start, count)) == 0
                    pool.settle(granules)
                    if what == "free twice" and self.is_alone:  # or it might be another's by now
                        assert (yield from pool.give_back(start, count)) == INVALID, "a double free"


def play(free, calls, order, orders=None, fault=""):
    pool = PoolModel(free, orders, fault)
    capacity = sum(word.bit_count() for word in free)
    threads = [Thread(name, pool, some, len(calls) == 1) for name, some in enumerate(calls)]
    running, whose = list(threads), list(order)
    for turn in range(20_000):
        if not running:
            break
        thread = running[(whose[turn] if turn < len(whose) else turn) % len(running)]
        if next(thread.steps, "ended") == "ended":
            running.remove(thread)
        for one in running:
            one.look()
    assert not running, "a thread does not end"
    # what is left is free, owned, or in limbo, each granule once
    limbo = [sum(bitmap[w].bit_count() for bitmap in pool.limbo) for w in range(len(free))]
    assert sum(word.bit_count() for word in pool.free) + len(pool.owners) + sum(limbo) == capacity, "a granule is lost"
    for granule in pool.owners:
        assert not pool.free[granule // WIDTH] >> granule % WIDTH & 1, "an owned granule is free"


SINGLES = {
    "free": st.lists(st.sampled_from([0, 1, 2]), min_size=2, max_size=3),
    "calls": st.lists(
        st.lists(
            st.tuples(st.just("allocate"), st.just(0), st.integers(0, 2)) | st.tuples(st.just("free"), st.just(0)),
            min_size=1,
            max_size=5,
        ),
        min_size=2,
        max_size=3,
    ),
    "order": turns(3, least=5),
}
"""Few free granules, one asked for at a time: where a block may move behind a pass."""

WARPS = {
    "free": st.lists(st.sampled_from([0, 0, 0xFF]), min_size=2, max_size=3),
    "calls": st.lists(
        st.lists(st.tuples(st.just("warp"), st.just(0), st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=3),
        min_size=2,
        max_size=3,
    ),
    "order": turns(3, least=5),
}
"""Warps that want several granules of a word that has more: where a claim may win a part."""


ORDERS = st.lists(st.integers(0, 3), min_size=3, max_size=3)
SLABS = {name: cases | {"orders": ORDERS} for name, cases in (("all", CASES), ("warps", WARPS))}
CHANGES = {
    "free": st.just([0xFF]),
    "orders": ORDERS,
    "calls": st.tuples(
        st.just([("allocate", 0, 0), ("allocate", 0, 0), ("free", 0), ("free", 0), ("allocate", 1, 0)]),
        st.lists(st.tuples(st.just("allocate"), st.integers(0, 1), st.just(0)), min_size=1, max_size=2),
    ).map(list),
    "order": turns(2, least=3),
}
"""One slab that changes its order while somebody claims."""


@pytest.mark.parametrize(
    "cases",
    [CASES, SINGLES, WARPS, SLABS["all"], SLABS["warps"], CHANGES],
    ids=["all", "singles", "warps", "slabs", "warps in slabs", "one slab"],
)
def test_every_schedule_keeps_blocks_apart_and_exhaustion_exact(cases):
    @settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries(cases))
    def attempt(case):
        play(**case)

    attempt()


FAULTS = [
    "the version stands still",
    "one pass decides",
    "the version comes before the bit",
    "a run is claimed by fetch_and",
    "a lost exchange is not noticed",
    "limbo is not looked at",
    "a double free goes through",
    "a claim that lost a part gives up",
    "the exchange is of the bits alone",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_hypothesis_finds_a_schedule_for_every_fault(fault):
    special = {
        "one pass decides": SINGLES,
        "the version comes before the bit": SINGLES,
        "a claim that lost a part gives up": WARPS,
        "the exchange is of the bits alone": CHANGES,
    }
    cases = special.get(fault, CASES)

    @settings(
        max_examples=30_000,
        deadline=None,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.fixed_dictionaries(cases))
    def attempt(case):
        play(**case, fault=fault)

    with pytest.raises(AssertionError):
        attempt()
