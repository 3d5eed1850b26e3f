"""Plug-ins: a path names a class, what is none is never called, and nonsense answers of an allocator are refused."""

import os

import numpy as np
import pytest

import allocators
from allocators import UnknownAllocatorError, registry
from kvtoolkit import CacheConfig, ConfigError, KVCache
from kvtoolkit.config import eviction, growth
from kvtoolkit.config.growth import BY_LENGTH, FIXED, GrowthPolicy
from tests.kvtoolkit.config import bad_plugins

HERE = "tests.kvtoolkit.config.bad_plugins"
TIERS = {"hot": 64, "warm": "int8", "pinned_tokens": 0}


def config(**fields):
    return CacheConfig(**{"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "num_tokens": 2048, **fields})


def named(spec):
    """A configuration that names ``spec`` in every field that takes a path, by field."""
    return {
        "allocator": lambda: config(allocator=spec),
        "eviction": lambda: config(eviction=spec),
        "warm_allocator": lambda: config(tiers={**TIERS, "warm_allocator": spec}),
        "create": lambda: allocators.create(spec, 64),
    }


WRONG_SPECS = {
    "os:abort": "to be a class, got builtin_function_or_method 'abort'",
    "tests.kvtoolkit.config.exits_at_import:Anything": "cannot be imported: SystemExit: this module is a program",
    "no.such.module:Class": "cannot be imported: ModuleNotFoundError",
    f"{HERE}:Nobody": "there is no 'Nobody' in it",
    f"{HERE}:": "there is no '' in it",
    ":": "cannot be imported: ValueError",
    f"{HERE}:factory": "to be a class, got function 'factory'",
    f"{HERE}:policy": "to be a class, got LRU 'policy'",
    # a class of a module that the path does not name
    f"{HERE}:np.ndarray": "to be a class, got module 'np'",
    "subprocess:Popen": "lacks",
    f"{HERE}:Answers.allocate": "to be a class, got function 'allocate'",
}


@pytest.mark.parametrize("field", ["allocator", "eviction", "warm_allocator", "create"])
@pytest.mark.parametrize("spec", WRONG_SPECS)
def test_what_is_no_class_with_the_methods_is_refused_and_not_called(spec, field, monkeypatch):
    monkeypatch.setattr(os, "abort", lambda: pytest.fail("called"))
    bad_plugins.called.clear()
    expected = "got function 'abort'" if spec == "os:abort" else WRONG_SPECS[spec]
    with pytest.raises((ConfigError, UnknownAllocatorError)) as caught:
        named(spec)[field]()
    assert expected in str(caught.value)
    assert spec in str(caught.value)
    assert not bad_plugins.called


@pytest.mark.parametrize("field", ["allocator", "warm_allocator", "create"])
def test_missing_methods_are_named_when_the_configuration_is_made(field):
    with pytest.raises((ConfigError, UnknownAllocatorError), match="to have stats, check_integrity, snapshot, restore"):
        named(f"{HERE}:NoAllocator")[field]()
    with pytest.raises((ConfigError, UnknownAllocatorError), match="_allocate, _free.*which AllocatorBase lacks"):
        named("allocators.protocol:AllocatorBase")[field]()


def test_a_policy_without_a_score_is_named_when_the_configuration_is_made():
    with pytest.raises(ConfigError, match="to have score, which NoAllocator lacks"):
        config(eviction=f"{HERE}:NoAllocator")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("PolicyThatExits", "cannot be made: SystemExit: 3"),
        ("NeedsArguments", "cannot be made: TypeError: .*decay"),
    ],
)
def test_a_policy_that_cannot_be_made_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        config(eviction=f"{HERE}:{spec}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("WrongSize", "WrongSize to have num_granules 256, got 512"),
        ("WrongSizes", r"WrongSizes to have block_sizes among 8, 16, 32, 64, got \(8, 128\)"),
        ("NotFresh", "NotFresh to have num_free of a fresh one 256, got 8"),
        ("ExitsWhenMade", "ExitsWhenMade exits when one is made"),
    ],
)
def test_an_allocator_that_is_made_wrong_is_refused_by_the_cache(spec, message):
    with pytest.raises(ConfigError, match=message):
        KVCache(config(allocator=f"{HERE}:{spec}"))


class Point:
    name, value = "mine", "somewhere:Mine"

    def __init__(self, load):
        self.load = load


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: exit(3), r"the entry point 'mine' \(somewhere:Mine\) cannot be imported: SystemExit: 3"),
        (lambda: 1 / 0, "cannot be imported: ZeroDivisionError"),
        (lambda: 7, "to be a class, got int"),
        (lambda: bad_plugins.NoAllocator, "to have stats, check_integrity, snapshot, restore"),
    ],
)
def test_an_entry_point_that_is_no_allocator_is_named(load, message, monkeypatch):
    monkeypatch.setattr(registry, "_entry_points", lambda: [Point(load)])
    with pytest.raises(ConfigError, match=message):
        config(allocator="mine")


@pytest.fixture
def own_names(monkeypatch):
    for module in (eviction, growth):
        monkeypatch.setattr(module, "_POLICIES", dict(module._POLICIES))
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_factories_can_be_registered(own_names):
    allocators.register("mine", lambda num_granules, **options: bad_plugins.Answers(num_granules, **options))
    eviction.register("newest", bad_plugins.factory)
    bad_plugins.called.clear()
    cache = KVCache(config(allocator="mine", eviction="newest"))
    assert isinstance(cache.allocator, bad_plugins.Answers)
    assert bad_plugins.called
    assert "newest" in eviction.names()


def test_a_factory_that_makes_no_allocator_is_named(own_names):
    allocators.register("mine", lambda num_granules, **options: object())
    with pytest.raises(ConfigError, match="to make allocators, got object without allocate, free"):
        KVCache(config(allocator="mine"))
    eviction.register("seven", lambda: 7)
    with pytest.raises(ConfigError, match="to make policies with a method `score`, got 7"):
        config(eviction="seven")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eviction.register("a b", bad_plugins.factory), "name: expected an identifier, got 'a b'"),
        (lambda: eviction.register("mine", 7), "factory: expected a class or a function, got 7"),
        (lambda: growth.register("lazy"), "policy: expected a GrowthPolicy, got 'lazy'"),
        (lambda: eviction.register("lfu", bad_plugins.factory), "name: 'lfu' is a built-in policy.*replace=True"),
        (lambda: growth.register(GrowthPolicy("append", FIXED)), "policy: 'append' is a built-in policy.*replace=True"),
        (lambda: GrowthPolicy("a b", FIXED), "expected an identifier as name, got 'a b'"),
        (lambda: GrowthPolicy("mine", 7), "growth policy mine: expected a rule of this module, got 7"),
        (lambda: GrowthPolicy("mine", FIXED, tail=0), "expected tail to be 1, 2, 4 or 8 granules, got 0"),
        (lambda: GrowthPolicy("mine", FIXED, largest=16), "expected largest to be 1, 2, 4 or 8 granules, got 16"),
        (lambda: GrowthPolicy("mine", FIXED, tail=4, largest=2), "expected largest to be at least tail, 4, got 2"),
        (lambda: GrowthPolicy("mine", FIXED, merges=1), "expected merges to be true or false, got 1"),
        (lambda: GrowthPolicy("mine", FIXED, merges=True, reserve=2), "expected a reserve from 0 to 1, got 2"),
        (lambda: GrowthPolicy("mine", FIXED, reserve=0.5), "expected no reserve without merges, got 0.5"),
        (lambda: config(growth="os:abort"), "growth: expected one of fixed8"),
    ],
)
def test_what_cannot_be_registered_is_named(call, message, own_names):
    with pytest.raises(ConfigError, match=message):
        call()


def test_names_that_are_not_built_in_may_be_registered_again_and_built_in_ones_on_purpose(own_names):
    for factory in (eviction.LFU, bad_plugins.factory):
        eviction.register("mine", factory)
    assert eviction._POLICIES["mine"] is bad_plugins.factory
    eviction.register("lru", eviction.LFU, replace=True)
    assert isinstance(eviction.eviction_policy("lru"), eviction.LFU)
    for tail in (1, 2):
        growth.register(GrowthPolicy("mine", FIXED, tail=tail))
    assert growth.growth_policy("mine").tail == 2
    growth.register(GrowthPolicy("append", FIXED, tail=2), replace=True)
    assert growth.growth_policy("append").tail == 2


def test_a_registered_growth_policy_is_followed(own_names):
    growth.register(GrowthPolicy("pairs", FIXED, tail=2, largest=4))
    cache = KVCache(config(growth="pairs"))
    (seq_id,), _ = cache.open([[]])
    cache.end_step(cache.begin_step([seq_id], 9))
    assert cache.allocator.stats().num_live == 2
    with pytest.raises(ConfigError, match="growth: 'pairs' needs 16 among block_sizes"):
        config(growth="pairs", block_sizes=(8, 64))
    growth.register(GrowthPolicy("small", BY_LENGTH, largest=1))
    with pytest.raises(ConfigError, match="growth: 'small' needs blocks of 8 tokens or less"):
        config(growth="small", block_sizes=(16, 64))


# -- nonsense answers ------------------------------------------------------------------------------------------------


def shifted(by):
    return lambda starts, sizes: np.where(starts < 0, starts, starts + by).astype(np.int32)


def all_at(start):
    return lambda starts, sizes: np.full(len(starts), start, np.int32)


LIES = {
    "not an array": lambda starts, sizes: starts.tolist(),
    "int64": lambda starts, sizes: starts.astype(np.int64),
    "too many": lambda starts, sizes: np.append(starts, starts).astype(np.int32),
    "too few": lambda starts, sizes: starts[1:],
    "two-dimensional": lambda starts, sizes: starts[:, None],
    "None": lambda starts, sizes: None,
    "far outside": shifted(1 << 20),
    "just outside": all_at(256),
    "largest int32": all_at(2**31 - 1),
    "negative": all_at(-8),
    "smallest int32": all_at(-(2**31)),
    "misaligned": lambda starts, sizes: np.where(sizes > 1, starts + 1, starts).astype(np.int32),
    "of a row": all_at(0),  # the first row's first block is there, shared by a fork where the row itself is preempted
}


def step_of(cache, seq_ids, count):
    cache.end_step(cache.begin_step(seq_ids, count))


def calls(cache, seq_ids):
    """Every call that asks the allocator for blocks."""
    return {
        "begin_step": lambda: cache.begin_step(seq_ids, 64),
        "fork": lambda: cache.fork(seq_ids, 2),
        "pin": lambda: cache.pin(seq_ids),
        "truncate": lambda: (cache.fork(seq_ids, 1), cache.truncate(seq_ids, [59] * len(seq_ids))),
        "restore": lambda: cache.restore(seq_ids),
    }


CALLS = ("begin_step", "fork", "pin", "truncate", "restore")
SINGLE_GRANULES = ("fork", "pin", "truncate")
"""Calls that ask for single granules alone, which are aligned anywhere."""


@pytest.mark.parametrize(
    ("call", "lie"),
    [(call, lie) for call in CALLS for lie in LIES if not (lie == "misaligned" and call in SINGLE_GRANULES)],
)
def test_nonsense_of_an_allocator_is_refused_by_every_call_that_asks_for_blocks(lie, call):
    cache = KVCache(config(allocator=f"{HERE}:Answers", growth="proportional"))
    seq_ids, _ = cache.open([[], []])
    step_of(cache, seq_ids, 64 if call == "truncate" else 61)
    if call == "restore":
        cache.fork(seq_ids[:1], 1)
        cache.preempt(seq_ids, to="host")
    if call == "truncate":
        cache.fork(seq_ids, 1)
    lengths = cache.lengths(seq_ids).tolist()
    cache.allocator.inner.distort = LIES[lie]
    with pytest.raises(ConfigError, match="allocator: expected Answers.allocate to return"):
        calls(cache, seq_ids)[call]()
    cache.allocator.inner.distort = None
    assert cache.lengths(seq_ids).tolist() == lengths
    if call != "restore":
        step_of(cache, seq_ids, 1)


def test_blocks_granted_again_are_refused_within_a_call_and_between_calls():
    """The same block twice in one answer, in two answers of one call, and a block that is kept back for merging."""
    for lie in (
        lambda starts, sizes: np.repeat(starts[:1], len(starts)).astype(np.int32),
        lambda starts, sizes: np.where(np.arange(len(starts)) == 0, 128, -1).astype(np.int32),
    ):
        cache = KVCache(config(allocator=f"{HERE}:Answers", block_sizes=(8,)))
        seq_ids, _ = cache.open([[]])
        cache.allocator.inner.distort = lie
        with pytest.raises(ConfigError, match="granted twice in one call|held by the cache or a caller already"):
            cache.begin_step(seq_ids, 64)
    cache = KVCache(config(num_tokens=8192, allocator=f"{HERE}:Answers", growth="adaptive"))
    kept_back = cache._state.group.blocks.reserve[0]
    seq_ids, _ = cache.open([[]])
    cache.allocator.inner.distort = lambda starts, sizes: np.full(len(starts), kept_back, np.int32)
    with pytest.raises(ConfigError, match="held by the cache or a caller already"):
        cache.begin_step(seq_ids, 64)
    cache.check_integrity()


def test_a_start_after_the_first_refusal_is_refused():
    cache = KVCache(config(allocator=f"{HERE}:Answers", growth="append"))
    seq_ids, _ = cache.open([[], []])
    cache.allocator.inner.distort = lambda starts, sizes: np.where(np.arange(len(starts)) == 0, -1, starts).astype(
        np.int32
    )
    with pytest.raises(ConfigError, match="granted after a size that did not fit"):
        cache.begin_step(seq_ids, 64)


def test_a_quantized_tier_checks_its_own_allocator():
    cache = KVCache(config(tiers={**TIERS, "warm_allocator": f"{HERE}:Answers"}, num_tokens=4096))
    pool = cache._state.group.blocks
    size = pool.allocators[1].num_granules
    assert pool.take_block(1) == pool.first[1]
    for start, problem in ((size, "outside the pool"), (size - 4, "outside the pool"), (12, "no multiple of 8")):
        pool.allocators[1].distort = all_at(start)
        with pytest.raises(ConfigError, match=problem):
            pool.take_block(1)


def test_the_answer_is_copied_before_the_allocator_can_change_it():
    cache, plain = (KVCache(config(allocator=name, num_tokens=1024)) for name in (f"{HERE}:OneArray", "buddy"))
    for one in (cache, plain):
        seq_ids, _ = one.open([[]] * 5)
        for count in (100, 8, 1, 30, 60, 40):
            one.end_step(one.begin_step(seq_ids, count))
        one.check_integrity()
    assert cache.stats() == plain.stats()


def test_sizes_that_an_allocator_has_reordered_are_still_those_that_were_asked_for():
    cache = KVCache(config(allocator=f"{HERE}:Sorts", growth="proportional"))
    seq_ids, _ = cache.open([[]])
    with pytest.raises(ConfigError, match="granted twice in one call|no multiple of"):
        cache.begin_step(seq_ids, 56)  # 4, 2 and 1 granules, in this order


def test_scores_that_are_no_numbers_are_refused(own_names):
    class Undecided:
        def score(self, granules):
            scores = granules.last_used.astype(np.float64)
            scores[-1] = np.nan
            return scores

    eviction.register("undecided", Undecided)
    cache = KVCache(config(num_tokens=128, growth="append", eviction="undecided"))
    seq_ids, _ = cache.open([[]])
    cache.end_step(cache.begin_step(seq_ids, 64), list(range(64)))
    cache.close(seq_ids)
    seq_ids, _ = cache.open([[]])
    with pytest.raises(ConfigError, match="eviction: expected Undecided.score to return .* without NaN"):
        cache.begin_step(seq_ids, 100)
    cache.check_integrity()
