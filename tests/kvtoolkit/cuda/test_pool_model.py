"""The pool's protocol under thousands of random orders of steps; planted faults must be found.

Draws are plain random ones, because Hypothesis takes ten times as long to draw a case as the model to play it.
"""

import random

import pytest

from tests.kvtoolkit.cuda.pool_model import CONTENDED, INVALID, WIDTH, PoolModel

NUM_CASES = 8_000
"""Within so many every planted fault is found, so they are what is tried where none is planted."""


def a_call(draw):
    """Any call of the pool."""
    what = draw.choice(["allocate", "warp", "free", "free twice", "retire", "lease"])
    if what == "allocate":
        return what, draw.randint(0, 3), draw.randint(0, 2)
    if what == "warp":
        return what, draw.randint(0, 2), draw.randint(0, 2), draw.randint(1, 3)
    if what == "lease":
        return what, draw.randint(0, 1), draw.random() < 0.5
    return what, draw.randint(0, 9)


def some(draw, least, most, one):
    """Between ``least`` and ``most`` of what ``one`` draws."""
    return [one(draw) for _ in range(draw.randint(least, most))]


def turns(draw, threads, least=0):
    """Whose turn it is: some steps of one, then some of another."""
    # few bursts as often as many, because some faults show only where threads run through and others only where not
    most = draw.choice([least + 3, 12, 40])
    bursts = some(draw, least, most, lambda draw: (draw.randrange(threads), draw.randint(1, 15)))
    return [one for one, n in bursts for _ in range(n)]


def any_calls(draw):
    """Up to four threads with any calls."""
    return {
        "free": some(draw, 1, 3, lambda draw: draw.choice([0, 0, 1, 2, 0x80, 0x0C, 0xF0, 0xFF])),
        "calls": some(draw, 1, 4, lambda draw: some(draw, 1, 4, a_call)),
        "order": turns(draw, 4),
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


def singles(draw):
    """Few free granules, one asked for at a time: where a block may move behind a pass."""

    def call(draw):
        return ("allocate", 0, draw.randint(0, 2)) if draw.random() < 0.5 else ("free", 0)

    return {
        "free": some(draw, 2, 3, lambda draw: draw.randint(0, 2)),
        "calls": some(draw, 2, 3, lambda draw: some(draw, 1, 5, call)),
        "order": turns(draw, 3, least=5),
    }


def warps(draw):
    """Warps that want several granules of a word that has more: where a claim may win a part."""

    def call(draw):
        return "warp", 0, draw.randint(0, 2), draw.randint(1, 3)

    return {
        "free": some(draw, 2, 3, lambda draw: draw.choice([0, 0, 0xFF])),
        "calls": some(draw, 2, 3, lambda draw: some(draw, 1, 3, call)),
        "order": turns(draw, 3, least=5),
    }


def orders(draw):
    return some(draw, 3, 3, lambda draw: draw.randint(0, 3))


def slabs(draw):
    """Any calls of a pool of slabs."""
    return {**any_calls(draw), "orders": orders(draw)}


def warps_in_slabs(draw):
    return {**warps(draw), "orders": orders(draw)}


def one_slab(draw):
    """One slab that changes its order while somebody claims."""
    changes = [("allocate", 0, 0), ("allocate", 0, 0), ("free", 0), ("free", 0), ("allocate", 1, 0)]
    claims = some(draw, 1, 2, lambda draw: ("allocate", draw.randint(0, 1), 0))
    return {"free": [0xFF], "orders": orders(draw), "calls": [changes, claims], "order": turns(draw, 2, least=3)}


def attempt(draw_case, fault=""):
    """Play random cases, the same ones in every run; a failure says which case it is of."""
    for seed in range(NUM_CASES):
        case = draw_case(random.Random(seed))
        try:
            play(**case, fault=fault)
        except AssertionError as error:
            error.add_note(f"play(**{case!r}, fault={fault!r})  # seed {seed}")
            raise


@pytest.mark.parametrize("draw_case", [any_calls, singles, warps, slabs, warps_in_slabs, one_slab])
def test_every_schedule_keeps_blocks_apart_and_exhaustion_exact(draw_case):
    attempt(draw_case)


FAULTS = {
    "the version stands still": any_calls,
    "one pass decides": singles,
    "the version comes before the bit": singles,
    "a run is claimed by fetch_and": any_calls,
    "a lost exchange is not noticed": any_calls,
    "limbo is not looked at": any_calls,
    "a double free goes through": any_calls,
    "a claim that lost a part gives up": warps,
    "the exchange is of the bits alone": one_slab,
}
"""What is planted, and the cases that must show it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_random_schedules_find_every_fault(fault):
    with pytest.raises(AssertionError) as caught:
        attempt(FAULTS[fault], fault)
    assert fault in caught.value.__notes__[-1]
