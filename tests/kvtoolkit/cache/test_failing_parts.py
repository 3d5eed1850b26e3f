"""Allocators, eviction policies, copies and host memory that fail in the middle of a call."""

import contextlib
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest

from allocators import BlockAllocator, BuddyAllocator, SlabAllocator
from tests.kvtoolkit.cache.broken_calls import CONFIGS, check, clean_runs, make, make_world, put
from tests.kvtoolkit.cache.test_interruptions import Interrupted

HERE = __name__


class Trap:
    """Lets the n-th call of a part raise, before or after it has done its work."""

    part: ClassVar[str] = ""
    left: ClassVar[int] = 0
    when: ClassVar[str] = "before"
    error: ClassVar[type[BaseException]] = RuntimeError
    fired: ClassVar[bool] = False

    @classmethod
    def arm(cls, part, n, when, error):
        cls.part, cls.left, cls.when, cls.error, cls.fired = part, n, when, error, False

    @classmethod
    def passed(cls, part, when):
        if part != cls.part or when != cls.when or cls.fired:
            return
        cls.left -= 1
        if cls.left == 0:
            cls.fired = True
            raise cls.error(f"{part} was made to fail")


class _Breaking:
    def allocate(self, sizes, *, partial=False):
        Trap.passed("allocate", "before")
        starts = super().allocate(sizes, partial=partial)
        Trap.passed("allocate", "after")
        return starts

    def free(self, starts, sizes):
        Trap.passed("free", "before")
        super().free(starts, sizes)
        Trap.passed("free", "after")

    def rebuild(self, starts, sizes):
        Trap.passed("rebuild", "before")
        super().rebuild(starts, sizes)


class BreakingBuddy(_Breaking, BuddyAllocator):
    pass


class BreakingSlab(_Breaking, SlabAllocator):
    pass


class NoRebuild(_Breaking, BuddyAllocator):
    rebuild = BlockAllocator.rebuild


class BreakingPolicy:
    def score(self, granules):
        Trap.passed("score", "before")
        return granules.last_used.astype(np.float64)


PARTS = {
    "buddy": {"allocator": f"{HERE}:BreakingBuddy", "growth": "lazy_merge", "eviction": f"{HERE}:BreakingPolicy"},
    "slab": {**CONFIGS["slab"], "allocator": f"{HERE}:BreakingSlab"},
    "tiers": {**CONFIGS["tiers"], "allocator": f"{HERE}:BreakingBuddy"},
    "groups": {
        **CONFIGS["groups"],
        "allocator": f"{HERE}:BreakingBuddy",
        "growth": "lazy_merge",
        "eviction": f"{HERE}:BreakingPolicy",
    },
    "tiers in groups": {**CONFIGS["tiers in groups"], "allocator": f"{HERE}:BreakingBuddy"},
}


@pytest.fixture(autouse=True)
def disarmed():
    yield
    Trap.arm("", 0, "before", RuntimeError)


def break_part(world, part):
    """Let the storage of a cache pass the trap."""
    if part not in ("copy_granules", "convert_tiles", "read", "write"):
        return
    for group in world.cache._state.groups:
        setattr(group.storage, part, trapped(getattr(group.storage, part), part))


def trapped(inner, part):
    def call(*args):
        Trap.passed(part, "before")
        out = inner(*args)
        Trap.passed(part, "after")
        return out

    return call


def fail_everywhere(config, parts, when, error, *, exact=True, every=1):
    """Let every ``every``-th call of each part fail inside each call of the cache, and check what is left."""
    counts = Counter()
    for name, call, before, after in clean_runs(**config):
        for part in parts:
            n = 1
            while True:
                world = make_world(**config)
                break_part(world, part)
                Trap.arm(part, n, when, error)
                with contextlib.suppress(error):
                    call(world)
                fired = Trap.fired
                Trap.arm("", 0, when, error)
                if not fired:
                    break
                try:
                    check(world, before, after, exact=exact)
                except BaseException as problem:
                    raise AssertionError(f"{name}, {part} number {n} raised {error.__name__} {when}") from problem
                counts[part] += 1
                n += every
    return counts


ALL = ("allocate", "free", "score", "copy_granules", "convert_tiles", "read", "write")


@pytest.mark.parametrize(("when", "error"), [("before", MemoryError), ("after", RuntimeError), ("before", Interrupted)])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_fails_anywhere_in_any_call_leaves_a_whole_cache(name, when, error):
    counts = fail_everywhere(PARTS[name], ALL, when, error, every=2)
    assert counts["allocate"] > 5
    assert counts["free"] > 2
    assert (counts["convert_tiles"] > 1) == ("tiers" in PARTS[name])


def test_an_allocator_without_rebuild_is_trusted_that_a_call_which_raises_changes_nothing():
    config = {**PARTS["buddy"], "allocator": f"{HERE}:NoRebuild"}
    assert sum(fail_everywhere(config, ("allocate", "free"), "before", RuntimeError, every=2).values()) > 8


@pytest.mark.parametrize("part", ["allocate", "free"])
def test_an_allocator_without_rebuild_that_was_interrupted_is_reported(part):
    config = {**PARTS["buddy"], "allocator": f"{HERE}:NoRebuild"}
    assert sum(fail_everywhere(config, (part,), "after", Interrupted, exact=False, every=3).values()) > 2

    world = make_world(**config)
    assert world.cache.repair().unresolved == ()
    Trap.arm(part, 1, "after", Interrupted)
    with pytest.raises(Interrupted):
        put(world.cache, world.open, [[8] * 90, [7] * 100, [6] * 100]) if part == "allocate" else world.cache.close(
            world.open
        )
    (problem,) = world.cache.repair().unresolved
    assert "NoRebuild of the hot tier cannot be rebuilt and was interrupted inside" in problem
    assert part in problem


@pytest.mark.parametrize("name", ["buddy", "NoRebuild"])
def test_an_allocator_that_always_refuses_to_free_does_not_stop_the_cache(name):
    allocator = "BreakingBuddy" if name == "buddy" else name
    cache = make(allocator=f"{HERE}:{allocator}", growth="append", prefix_caching=False)
    ids = cache.open([[]] * 4)[0]
    put(cache, ids, [[1] * 50] * 4)
    for seq in ids[:3]:
        Trap.arm("free", 1, "before", RuntimeError)
        with pytest.raises(RuntimeError):
            cache.close([seq])
        Trap.arm("free", 1, "before", RuntimeError)  # again, when the next call tries to free what was left
        if name == "NoRebuild":
            assert cache.stats().num_seqs >= 1
        Trap.arm("", 0, "before", RuntimeError)
    cache.check_integrity()
    cache.close(ids[3:])
    cache.repair()
    stats = cache.stats()
    assert (stats.num_seqs, stats.free) == (0, stats.capacity)


def test_a_repair_that_is_interrupted_is_done_again():
    for n in range(1, 4):
        world = make_world(**PARTS["buddy"])
        before = world.cache.stats().num_seqs
        Trap.arm("free", 1, "after", Interrupted)
        with pytest.raises(Interrupted):
            world.cache.close(world.open[1:])
        Trap.arm("rebuild", n, "before", Interrupted)
        for _ in range(n):
            try:
                world.cache.stats()
            except Interrupted:
                Trap.arm("rebuild", 1, "before", Interrupted)
        Trap.arm("", 0, "before", Interrupted)
        assert world.cache.stats().num_seqs == before - 2
        world.cache.check_integrity()


def test_what_a_failed_call_left_to_free_is_used_when_memory_is_short():
    cache = make(allocator=f"{HERE}:NoRebuild", growth="append", prefix_caching=False, tiers=None)
    (a, b), _ = cache.open([[]] * 2)
    put(cache, [a], [[1] * 900])
    Trap.arm("free", 1, "before", RuntimeError)
    with pytest.raises(RuntimeError):
        cache.close([a])
    Trap.arm("free", 1, "before", RuntimeError)
    assert cache.stats().free < 200  # it refused again
    Trap.arm("", 0, "before", RuntimeError)
    assert put(cache, [b], [[2] * 900]).all()
