"""Sequences preempted to the host: what they shared is saved once, comes back once, and can be found again."""

import contextlib

import numpy as np
import pytest

from kvtoolkit import ArgumentError, KVCache
from kvtoolkit.cache.state.prefix_index import unpublish
from tests.kvtoolkit.cache.broken_calls import TIERS, make, prompt, put, seen
from tests.kvtoolkit.cache.test_interruptions import Interrupted, LineBreaker

CONFIGS = {
    "buddy": {"allocator": "buddy"},
    "paged": {"allocator": "paged", "growth": "fixed16"},
    "unpublished": {"prefix_caching": False},
    "tiers": {"num_tokens": 8192, "head_dim": 64, "tiers": TIERS},
}


def beams(name, count=8, shared=300):
    """A cache with ``count`` sequences that go on from the same prompt, each with 13 tokens of its own."""
    cache = make(**CONFIGS[name])
    (parent,), _ = cache.open([[]])
    for at in range(0, shared, 60):
        assert put(cache, [parent], [prompt(0, shared)[at : at + 60]]).all()
    ids = [int(parent), *cache.fork([parent], count - 1)[0].tolist()]
    assert put(cache, ids, [prompt(i, 13) for i in range(count)]).all()
    return cache, ids


def overwrite(cache):
    """Fill the whole hot tier with other tokens once, so that nothing stays cached there."""
    (other,), _ = cache.open([[]])
    figures = cache.stats().tiers["hot"]
    assert put(cache, [other], [[49] * (figures.free + figures.cached)]).all()
    cache.close([other])


def resume(cache):
    return KVCache.from_snapshot(cache.config, cache.snapshot())


def refs(cache):
    return cache._state.group.blocks.granules.refs


def count_written(cache, monkeypatch):
    """A list that receives the number of granules of each write to the storage."""
    written, storage = [], cache._state.group.storage
    write = storage.write

    def counting(granules, contents):
        written.append(len(granules))
        write(granules, contents)

    monkeypatch.setattr(storage, "write", counting)
    return written


@pytest.mark.parametrize("at_once", [True, False], ids=["one call", "one by one"])
@pytest.mark.parametrize("between", [lambda cache: cache, resume], ids=["stays", "snapshot"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_preempted_sequences_shared_is_saved_and_restored_once(name, between, at_once, monkeypatch):
    cache, ids = beams(name)
    before, shared, held = [seen(cache, seq) for seq in ids], np.sort(refs(cache))[::-1], cache.stats().num_tokens
    for group in [ids] if at_once else [[seq] for seq in ids]:
        cache.preempt(group, "host")
    num_granules = 300 // 8 + 8 * 3  # what they share, and two or three of each: 300 % 8 + 13 tokens
    assert sum(1 if copy.tier == 0 else 8 for copy in cache._state.group.copies._made.values()) == num_granules
    overwrite(cache)
    cache = between(cache)
    written = count_written(cache, monkeypatch)
    for group in [ids] if at_once else [[seq] for seq in ids[::-1]]:
        assert cache.restore(group).all()
    cache.check_integrity()
    assert [seen(cache, seq) for seq in ids] == before
    cache.abort_step(cache.begin_step(ids, 0))
    assert np.count_nonzero(refs(cache) == 8) == np.count_nonzero(shared == 8) == 300 // 8
    assert cache.stats().num_tokens == held
    assert name == "tiers" or sum(written) == num_granules  # cold tiles were not overwritten
    cache.close(ids)
    assert not len(cache._state.group.copies._made)


@pytest.mark.parametrize("between", [lambda cache: cache, resume], ids=["stays", "snapshot"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_another_sequence_still_holds_is_taken_back(name, between, monkeypatch):
    cache, ids = beams(name)
    before = [seen(cache, seq) for seq in ids]
    cache.preempt(ids[1:], "host")
    cache.compact(10**6)  # it may move meanwhile
    cache = between(cache)
    written = count_written(cache, monkeypatch)
    assert cache.restore(ids[1:]).all()
    cache.check_integrity()
    assert sum(written) == 7 * 3 if cache.config.prefix_caching is False else sum(written) <= 7 * 3
    assert [seen(cache, seq) for seq in ids] == before
    assert np.count_nonzero(refs(cache) == 8) == 300 // 8


def test_what_is_still_cached_of_a_sequence_is_not_evicted_for_its_own_return(monkeypatch):
    cache = make(num_tokens=512)
    (seq,), _ = cache.open([[]])
    put(cache, [seq], [prompt(0, 500)])
    cache.preempt([seq], "host")
    written = count_written(cache, monkeypatch)
    assert cache.restore([seq]).all()
    assert sum(written) == 1  # the last granule, which was not full
    assert cache.stats().num_evicted == 0
    assert seen(cache, seq) == prompt(0, 500)


@pytest.mark.parametrize("between", [lambda cache: cache, resume], ids=["stays", "snapshot"])
@pytest.mark.parametrize("evicts", [True, False])
@pytest.mark.parametrize("name", ["buddy", "paged", "tiers"])
def test_restored_granules_are_findable_and_what_follows_them_too(name, evicts, between):
    cache, (seq, *_) = beams(name, count=1, shared=120)
    cache.preempt([seq], "host")
    if evicts:
        overwrite(cache)
    cache = between(cache)
    assert cache.restore([seq]).all()
    cache.check_integrity()
    assert put(cache, [seq], [[48] * 20]).all()
    wanted = [*prompt(0, 120), *prompt(0, 13), *[48] * 20]
    assert seen(cache, seq) == wanted
    _, (found,) = cache.open([wanted])
    assert found == {"tiers": 0}.get(name, 152)  # by default quantized tokens are not found
    cache.close([seq])
    cache.check_integrity()


def test_a_sequence_that_was_computed_again_meanwhile_shares_with_the_one_on_the_host():
    cache, (seq, *_) = beams("buddy", count=1)
    cache.preempt([seq], "host")
    overwrite(cache)
    (again,), _ = cache.open([[]])
    put(cache, [again], [seen_tokens := [*prompt(0, 300), *prompt(0, 13)]])
    assert cache.restore([seq]).all()
    cache.check_integrity()
    assert np.count_nonzero(refs(cache) == 2) == 313 // 8
    assert seen(cache, seq) == seen(cache, again) == seen_tokens


def rewrite(cache, seq):
    cache.truncate([seq], [43])
    put(cache, [seq], [[47] * 30])


def demote(cache, seq):
    for _ in range(8):
        put(cache, [seq], [[46] * 64])


@pytest.mark.parametrize("evicts", [True, False])
@pytest.mark.parametrize(("name", "change"), [(name, rewrite) for name in CONFIGS] + [("tiers", demote)])
def test_what_was_written_anew_or_quantized_meanwhile_is_not_taken_back(name, change, evicts):
    cache, (seq, other) = beams(name, count=2, shared=60)
    before = seen(cache, other)
    cache.preempt([other], "host")
    change(cache, seq)
    if evicts:
        overwrite(cache)
    tiers = cache._state.group.blocks.granules.first[1]
    assert cache.restore([other]).all()
    cache.check_integrity()
    assert seen(cache, other) == before
    row = other & ((1 << 20) - 1)
    entries = cache._state.group.table.entries[row]
    assert ((entries[entries >= 0] & 0xFFFFFF) < tiers).all()  # as exact as it went
    cache.close([seq, other])
    cache.check_integrity()


@pytest.mark.parametrize("evicts", [True, False])
@pytest.mark.parametrize("to", ["drop", "host"])
@pytest.mark.parametrize("name", CONFIGS)
def test_keep_free_is_what_is_free_afterwards_or_nothing_is_done(name, to, evicts):
    cache, (seq, *_) = beams(name, count=1)
    cache.preempt([seq], to)
    if evicts:
        overwrite(cache)

    def available(cache):
        figures = cache.stats().tiers["hot"]
        return figures.free + figures.cached + cache.stats().kept_back

    again = resume(cache)
    assert again.restore([seq]).all()
    left, before = available(again), cache.stats()
    # more than it may gain by fresh blocks in place of those that it shares with what nobody can use
    assert not cache.restore([seq], keep_free=left + 64).any()
    assert cache.stats() == before
    cache.check_integrity()
    assert cache.restore([seq], keep_free=left).all()
    assert available(cache) >= left
    assert seen(cache, seq) == seen(again, seq)
    reused = {"drop": int(cache.lengths([seq])[0]), "host": 0}[to]
    assert cache.stats().restored_tokens - before.restored_tokens == reused


@pytest.mark.parametrize("evicts", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_exception_at_any_line_of_a_return_leaves_whole_sequences_that_still_share(name, evicts):
    broken, fired = 0, True
    while fired:
        cache, ids = beams(name, count=3)
        before = [seen(cache, seq) for seq in ids]
        cache.preempt(ids[1:], "host")
        cache.preempt(ids[:1], "host")
        if evicts:
            overwrite(cache)
        breaker = LineBreaker(1 + 149 * broken)
        with contextlib.suppress(Interrupted), breaker:
            cache.restore(ids)
        fired = breaker.fired
        cache.check_integrity()
        now = [seen(cache, seq) for seq in ids]
        assert all(tokens in ("preempted", wanted) for tokens, wanted in zip(now, before, strict=True))
        assert cache.restore([seq for seq, tokens in zip(ids, now, strict=True) if tokens == "preempted"]).all()
        assert [seen(cache, seq) for seq in ids] == before
        assert np.count_nonzero(refs(cache) == 3) == 300 // 8
        cache.close(ids)
        cache.check_integrity()
        broken += 1
    assert broken > 3


@pytest.mark.parametrize("keep_free", [-1, 1.5, True, "1", None])
def test_keep_free_is_a_number_of_tokens(keep_free):
    cache, ids = beams("buddy", count=1)
    cache.preempt(ids, "host")
    with pytest.raises(ArgumentError, match="keep_free: expected a number of tokens, got"):
        cache.restore(ids, keep_free=keep_free)
    assert cache.restore(ids).all()


def test_a_snapshot_holds_quantized_blocks_of_which_only_a_part_is_still_cached():
    cache, ids = beams("tiers", count=1)
    cache.close(ids)
    pool = cache._state.group.blocks
    cached = np.flatnonzero((pool.granules.node >= 0) & (np.arange(pool.num_granules) >= pool.first[1]))
    (middle,) = cached[cached % 8 == 4][:1]
    pool.free_listed(unpublish(pool.holdings, pool.granules.node[middle], 0))
    cache.check_integrity()
    again = resume(cache)
    assert again.stats().cached == cache.stats().cached
    again.check_integrity()
