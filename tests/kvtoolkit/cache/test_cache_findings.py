"""What a hostile tester found once: each finding stays a test."""

import contextlib

import numpy as np
import pytest

from allocators import BuddyAllocator, OutOfBlocksError
from kvtoolkit import CacheConfig, ConfigError, KVCache


def make(**fields):
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "dtype": "float32", "num_tokens": 512}
    return KVCache(CacheConfig(**{**shape, **fields}))


def put(cache, seq_ids, counts, tokens=None):
    """Append tokens whose keys count up from 1."""
    step = cache.begin_step(seq_ids, counts)
    total = len(step.slot_mapping)
    key = np.arange(1, total + 1, dtype=np.float32)[:, None, None] * np.ones((1, 1, 8), np.float32)
    step.append(0, key, key)
    ok = step.ok.all()
    cache.end_step(step, np.arange(total) if tokens is None else tokens)
    return ok


def keys(cache, seq_id):
    with cache.begin_step([seq_id], 0) as step:
        return cache.key_cache(0)[step.block_table[0, 0] & 0xFFFFFF, 0, : step.seq_lens[0], 0].tolist()


def accounted(cache):
    stats = cache.stats()
    return stats.free + stats.cached + stats.kept_back + stats.used + stats.callers + stats.pinned


@pytest.mark.parametrize("what", ["fork", "pin", "reorder"])
def test_a_copied_tail_fits_where_only_small_blocks_are_left(what):
    cache = make(num_tokens=128, growth="fixed32", block_sizes=(8, 32), max_entries=1)
    seq_ids, _ = cache.open([[]] * 4)
    put(cache, seq_ids, [4, 32, 32, 32])
    cache.truncate(seq_ids[1:], [8, 8, 8])
    if what == "fork":
        (copy,) = cache.fork(seq_ids[:1], 1)[0]
    elif what == "pin":
        (copy,) = cache.pin(seq_ids[:1]).commit()
    else:
        cache.reorder(seq_ids[:2], [0, 0])
        copy = seq_ids[1]
    cache.check_integrity()
    assert keys(cache, copy) == [1, 2, 3, 4]


def test_what_was_preempted_to_the_host_can_use_the_merge_reserve():
    cache = make(num_tokens=6400, prefix_caching=False)
    seq_ids, _ = cache.open([[], []])
    put(cache, seq_ids[:1], 6400)
    cache.preempt(seq_ids[:1], "host")
    put(cache, seq_ids[1:], 8)
    cache.close(seq_ids[1:])
    assert cache.restore(seq_ids[:1]).tolist() == [True]


def test_a_fork_can_use_the_merge_reserve():
    cache = make(num_tokens=6400, prefix_caching=False)
    seq_ids, _ = cache.open([[]])
    put(cache, seq_ids, 6400 - 68)
    cache.fork(seq_ids, 1)
    cache.check_integrity()


class Moody:
    """An eviction policy that does what it is told."""

    mood = staticmethod(lambda granules: np.zeros(len(granules.depth)))

    def score(self, granules):
        return Moody.mood(granules)


@pytest.fixture
def moody():
    yield Moody
    Moody.mood = staticmethod(lambda granules: np.zeros(len(granules.depth)))


def cached_twice(**fields):
    cache = make(num_tokens=256, growth="append", eviction="tests.kvtoolkit.cache.test_cache_findings:Moody", **fields)
    for tokens in (range(100, 164), None):
        seq_ids, _ = cache.open([[]])
        put(cache, seq_ids, 64 if tokens else 180, tokens)
        cache.close(seq_ids)
    return cache


def test_a_raising_eviction_policy_loses_nothing(moody):
    cache = cached_twice()
    seq_ids, _ = cache.open([[]])

    def fail(granules):
        raise ZeroDivisionError("no idea")

    moody.mood = staticmethod(fail)
    with pytest.raises(ZeroDivisionError):
        cache.begin_step(seq_ids, 256)
    cache.check_integrity()
    cache.close(seq_ids)
    assert accounted(cache) == 256


@pytest.mark.parametrize("answer", [None, 3.0, [1.0], [[1.0]], "many"])
def test_an_eviction_policy_with_a_wrong_answer_is_named(moody, answer):
    cache = cached_twice()
    seq_ids, _ = cache.open([[]])
    moody.mood = staticmethod(lambda granules: answer)
    with pytest.raises(ConfigError, match=r"eviction: expected Moody.score to return \[\d+\] numbers, got"):
        cache.begin_step(seq_ids, 256)
    cache.check_integrity()


class Failing(BuddyAllocator):
    """Raises at its n-th call from now."""

    countdown = 10**9

    def allocate(self, sizes, *, partial=False):
        Failing.countdown -= 1
        if Failing.countdown == 0:
            raise OutOfBlocksError("boom")
        return super().allocate(sizes, partial=partial)


@pytest.mark.parametrize("call", range(1, 12))
@pytest.mark.parametrize("what", ["fork", "step", "restore", "truncate", "reorder"])
def test_a_raising_allocator_loses_nothing(what, call):
    Failing.countdown = 10**9
    cache = make(num_tokens=256, allocator="tests.kvtoolkit.cache.test_cache_findings:Failing", growth="append")
    seq_ids, _ = cache.open([[]] * 3)
    put(cache, seq_ids, 12)
    forks = cache.fork(seq_ids[:1], 1)[0]
    cache.preempt(seq_ids[2:], "host")
    other, _ = cache.open([[]])
    put(cache, other, 176, range(500, 676))
    cache.close(other)
    Failing.countdown = call
    calls = {
        "fork": lambda: cache.fork(seq_ids[:2], 1),
        "step": lambda: cache.abort_step(cache.begin_step([*seq_ids[:2], *forks], 70)),
        "restore": lambda: cache.restore(seq_ids[2:]),
        "truncate": lambda: cache.truncate(forks, [5]),
        "reorder": lambda: cache.reorder(seq_ids[:2], [1, 0]),
    }
    with contextlib.suppress(OutOfBlocksError):
        calls[what]()
    Failing.countdown = 10**9
    cache.check_integrity()
    cache.close([*seq_ids, *forks] if what != "fork" else seq_ids)


@pytest.mark.parametrize("what", ["fork", "truncate", "reorder"])
def test_a_copy_that_raises_loses_nothing(what, monkeypatch):
    cache = make(num_tokens=256, growth="append")
    seq_ids, _ = cache.open([[]] * 2)
    put(cache, seq_ids, 12)
    forks = cache.fork(seq_ids[:1], 1)[0]
    put(cache, forks, 9)
    forks = [*forks, *cache.fork(forks, 1)[0]]
    before = cache.stats().free

    def fail(*_):
        raise MemoryError("no scratch")

    with monkeypatch.context() as patch:
        patch.setattr(cache._state.group, "copy_granules", fail)
        calls = {
            "fork": lambda: cache.fork(seq_ids, 1),
            "truncate": lambda: cache.truncate(forks, [13, 13]),
            "reorder": lambda: cache.reorder(seq_ids, [1, 0]),
        }
        with pytest.raises(MemoryError):
            calls[what]()
    cache.check_integrity()
    assert cache.stats().free == before
    calls[what]()
    cache.check_integrity()


@pytest.mark.parametrize("answer", [None, [0], np.zeros(1), np.zeros((1, 1), np.int32), np.zeros(2, np.int32)])
def test_an_allocator_with_a_wrong_answer_is_named(answer, monkeypatch):
    cache = make(allocator="tests.kvtoolkit.cache.test_cache_findings:Failing", growth="append")
    seq_ids, _ = cache.open([[]])
    monkeypatch.setattr(Failing, "allocate", lambda self, sizes, *, partial=False: answer)
    with pytest.raises(ConfigError, match=r"allocator: expected Failing.allocate to return \[1\] int32 starts, got"):
        cache.begin_step(seq_ids, 1)
    cache.check_integrity()


def test_a_row_with_one_entry_left_gets_the_one_granule_it_needs():
    cache = make(
        num_tokens=2048, growth="proportional", block_sizes=(8,), max_seq_len=520, max_seqs=300, prefix_caching=False
    )
    seq_ids, _ = cache.open([[]] * 256)
    put(cache, seq_ids, 8)
    cache.close(seq_ids[::2])
    long, _ = cache.open([[]])
    assert put(cache, long, 512)
    assert put(cache, long, 1)


def test_what_cannot_fit_anyway_evicts_nothing():
    cache = make(growth="fixed64")
    seq_ids, _ = cache.open([[]] * 8)
    put(cache, seq_ids, 64)
    cache.truncate(seq_ids, [8] * 8)
    more, _ = cache.open([[]])
    before = cache.stats()
    assert before.pinned > 64
    with cache.begin_step(more, 1) as step:
        assert not step.ok.any()
    assert cache.stats().num_evicted == before.num_evicted


def test_the_count_of_evictions_survives_a_snapshot():
    cache = cached_twice()
    seq_ids, _ = cache.open([[]])
    put(cache, seq_ids, 200)
    evicted = cache.stats().num_evicted
    assert evicted > 0
    assert KVCache.from_snapshot(cache.config, cache.snapshot()).stats().num_evicted == evicted


class Crumbs(Failing):
    """Has nothing but single granules to give."""

    def allocate(self, sizes, *, partial=False):
        starts = super().allocate(sizes, partial=partial)
        if partial and np.max(sizes, initial=0) > 1:
            super().free(starts[starts >= 0], np.asarray(sizes)[starts >= 0])
            return np.full_like(starts, -1)
        return starts


@pytest.mark.parametrize("call", range(1, 20))
def test_pieces_found_before_an_allocator_raises_go_back(call):
    Failing.countdown = 10**9
    cache = make(allocator="tests.kvtoolkit.cache.test_cache_findings:Crumbs", growth="append")
    seq_ids, _ = cache.open([[]])
    put(cache, seq_ids, 40)
    cache.preempt(seq_ids, "host")
    Failing.countdown = call
    with contextlib.suppress(OutOfBlocksError):
        cache.restore(seq_ids)
    Failing.countdown = 10**9
    cache.check_integrity()


def test_rows_that_were_well_off_are_free_again_when_a_plug_in_raises(moody):
    cache = cached_twice()
    seq_ids, _ = cache.open([[], []])
    put(cache, seq_ids[:1], 4)

    def fail(granules):
        raise ZeroDivisionError("no idea")

    moody.mood = staticmethod(fail)
    with pytest.raises(ZeroDivisionError):
        cache.begin_step(seq_ids, [1, 248])
    cache.close(seq_ids)


def test_a_row_without_entries_gives_back_what_was_found_for_it():
    cache = make(num_tokens=1024, growth="append", max_entries=2)
    seq_ids, _ = cache.open([[]])
    with cache.begin_step(seq_ids, 200) as step:
        assert step.explain()[0].endswith("row full")
    cache.check_integrity()
    assert cache.stats().free == 1024
