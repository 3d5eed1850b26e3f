"""Host memory of a cache: what moves there, when it comes back, and what callers may say and do."""

import numpy as np
import pytest

from kvtoolkit import ArgumentError, CacheConfig, ConfigError, DeviceSteps, KVCache, SequenceError, UnsupportedError
from kvtoolkit.cache.state.block_table import OPEN
from kvtoolkit.cache.tiering.offloader import Offloader
from tests.kvtoolkit.cache.host_device import make_cache, use_host
from tests.kvtoolkit.cache.late_transfers import LateTransfers
from tests.kvtoolkit.cache.test_device_steps import prefill, run
from tests.kvtoolkit.cuda.host_kernels import needs_compiler

BLOCK = 64 * 2 * 2 * 2 * 8 * 4
"""Bytes of 64 tokens of the cache below."""
HOST = {"hot": 64, "pinned_tokens": 0, "host": 16 * BLOCK}


def make(num_tokens=512, tiers=HOST, **options):
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32", "max_seqs": 8}
    return KVCache(CacheConfig(**shape, num_tokens=num_tokens, tiers=tiers, **options))


def extend(cache, ids, count, first=0):
    """Append tokens whose keys and values are functions of the token."""
    tokens = np.tile(np.arange(first, first + count), len(ids))
    with cache.begin_step(ids, count) as step:
        assert step.ok.all()
        for layer in range(2):
            keys = np.float32(np.ones((len(tokens), 2, 8)) * tokens[:, None, None] + layer)
            step.append(layer, keys, -keys)
        cache.end_step(step, tokens)


def places(cache, seq):
    """For each tile of a sequence, whether it is in host memory."""
    cache._places.settle_all()
    entries = cache._group.table.entries[cache._state.rows_of([seq], (OPEN,))[0]]
    granules = entries[entries >= 0] & 0xFFFFFF
    first = cache.config.pool_firsts[3]
    return [bool(granule >= first) for granule in granules]


def test_the_oldest_tokens_of_the_longest_row_go_first_and_the_newest_and_pinned_ones_stay():
    cache = make(tiers={**HOST, "pinned_tokens": 64})
    ids, _ = cache.open([[], []])
    extend(cache, ids, 64)
    extend(cache, ids[:1], 320, 64)
    extend(cache, ids[1:], 64, 64)
    assert not any(places(cache, ids[0]))
    extend(cache, ids[1:], 64, 128)
    assert places(cache, ids[0]) == [False, True, False, False, False, False]
    assert places(cache, ids[1]) == [False, False, False]
    cache.check_integrity()


def test_cached_prefixes_go_to_host_memory_before_what_sequences_hold_and_are_found_there():
    cache = make()
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 256)
    cache.close([seq])
    (other,), _ = cache.open([[7]])
    extend(cache, [other], 320, 1000)
    stats = cache.stats()
    assert (stats.num_evicted, stats.num_offloaded) == (0, 1)
    (again,), held = cache.open([[*range(256), 9]])
    assert held.tolist() == [256]
    assert sum(places(cache, again)) == 1
    cache.check_integrity()


def test_a_full_host_memory_lets_go_of_its_least_recently_used_prefix():
    cache = make(tiers={**HOST, "host": 4 * BLOCK})
    for i in range(6):
        (seq,), _ = cache.open([[]])
        extend(cache, [seq], 192, 1000 * i)
        cache.close([seq])
    found = [cache.open([[*range(1000 * i, 1000 * i + 192), 9]])[1][0] for i in range(6)]
    assert found[5] == found[4] == found[3] == 192
    assert found[0] == 0
    cache.check_integrity()


def test_an_offloaded_sequence_stays_usable_and_comes_back_by_prefetch():
    cache = make()
    ids, _ = cache.open([[], []])
    extend(cache, ids, 150)
    assert cache.offload(ids[:1]) == 2
    assert places(cache, ids[0]) == [True, True, False]
    extend(cache, ids[:1], 1, 150)
    num_away = sum(places(cache, ids[0]))  # the step may have brought some back
    assert cache.offload(ids[:1]) == 2 - num_away
    assert places(cache, ids[0]) == [True, True, False]
    assert cache.prefetch(ids[:1]) == 2
    assert places(cache, ids[0]) == [False, False, False]
    assert cache.stats().num_offloaded == cache.stats().num_prefetched
    cache.check_integrity()


def test_a_sequence_that_wakes_at_once_is_not_moved():
    cache = make()
    ids, _ = cache.open([[], []])
    extend(cache, ids, 150)
    cache._group.storage.transfers = LateTransfers(cache._group.storage.transfers)
    assert cache.offload(ids[:1]) == 2
    assert cache.prefetch(ids[:1]) == 0
    assert places(cache, ids[0]) == [False, False, False]
    assert cache.stats().num_offloaded == 0
    cache.check_integrity()


def test_what_others_hold_stays_until_they_sleep_too():
    cache = make()
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 128)
    ((child,),) = cache.fork([seq], 1)
    assert cache.offload([seq]) == 0
    assert cache.offload([child]) == 2
    assert places(cache, seq) == [True, True]


def test_sleeping_sequences_go_before_those_that_are_awake():
    cache = make(512)
    ids, _ = cache.open([[], []])
    extend(cache, ids, 192)
    transfers = cache._group.storage.transfers
    cache._group.storage.transfers = NoRoom()
    cache.offload(ids[1:])  # for which there was no room just then
    cache._group.storage.transfers = transfers
    extend(cache, ids[:1], 192, 192)
    assert not any(places(cache, ids[0]))
    assert sum(places(cache, ids[1])) == 1


class NoRoom:
    """Copies that never begin."""

    def start(self, *_, **__):
        raise StopIteration

    def join(self):
        pass


@pytest.fixture(autouse=True)
def _no_room(monkeypatch):
    start = Offloader._start

    def ask(self, *arguments, **options):
        return 0 if isinstance(self._group.storage.transfers, NoRoom) else start(self, *arguments, **options)

    monkeypatch.setattr(Offloader, "_start", ask)


def test_retained_prefixes_outlive_others_and_their_lead_melts_away():
    cache, now = make(tiers=None), [0.0]
    cache._state.now = lambda: now[0]
    cache._state.made_at = 0.0

    def run_one(first, seconds=0):
        now[0] += 1
        (seq,), _ = cache.open([[]])
        extend(cache, [seq], 128, first)
        if seconds:
            cache.retain([seq], seconds)
        cache.close([seq])

    def is_found(first):
        (seq,), held = cache.open([[*range(first, first + 128), 9]])
        cache.close([seq])
        return bool(held[0])

    run_one(0, seconds=10)
    for i in range(1, 6):
        run_one(1000 * i)
    assert is_found(0)
    assert not is_found(1000)
    run_one(50_000, seconds=4)
    for i in range(6, 20):
        run_one(1000 * i)
    assert not is_found(50_000)


@pytest.mark.parametrize("what", ["offload", "prefetch"])
def test_hints_need_host_memory_and_open_sequences(what):
    cache = make(tiers=None)
    with pytest.raises(UnsupportedError, match=f"{what}: expected a cache with host memory"):
        getattr(cache, what)([0])
    cache = make()
    with pytest.raises(SequenceError):
        getattr(cache, what)([123])


@pytest.mark.parametrize("seconds", [-1, 1e10, float("nan"), "1", True, None])
def test_seconds_are_a_number_in_bounds(seconds):
    cache = make()
    ids, _ = cache.open([[]])
    with pytest.raises(ArgumentError, match="seconds: expected a number from 0 to 10\\*\\*9"):
        cache.retain(ids, seconds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiers": {"host": 0}}, "tiers.host: expected a positive number of bytes"),
        ({"tiers": {"host": "much"}}, "tiers.host: expected bytes or a text"),
        ({"tiers": {"host": 1000}}, "tiers.host: expected room for 64 tokens of each tier"),
        ({"tiers": {"host": 1 << 20}, "allocator": "paged"}, "tiers.host: expected 64 among block_sizes"),
        ({"tiers": {"host_memory": {"hot": 1}}}, "tiers: expected some of warm"),
        ({"tiers": {"host": 1 << 20, "host_memory": {"hot": 1}}}, "host_memory: expected nothing without a cold tier"),
        ({"tiers": {"host": 1 << 20, "tier_memory": {"hot": 1}}}, "tier_memory: expected nothing without"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_a_call_that_breaks_off_during_a_move_leaves_everything_where_it_was(monkeypatch):
    cache = make()
    cache._group.storage.transfers = LateTransfers(cache._group.storage.transfers)
    ids, _ = cache.open([[], []])
    extend(cache, ids, 192)
    assert cache.offload(ids) == 6
    with monkeypatch.context() as patch:
        patch.setattr(Offloader, "settle", lambda self, wanted=0: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            cache.begin_step(ids, 1)
    cache.check_integrity()
    assert not any(places(cache, ids[0]))
    assert cache.stats().tiers["host16"].free == 1024
    assert cache.offload(ids) == 6


@needs_compiler
def test_steps_of_the_device_take_blocks_in_host_memory_where_the_device_has_none(monkeypatch):
    use_host(monkeypatch)
    fields = {"num_tokens": 256, "growth": "adaptive", "layer_groups": None, "max_seqs": 4}
    small = make_cache(**fields, tiers={"hot": 64, "pinned_tokens": 0, "host": 1 << 20})
    large = make_cache(**{**fields, "num_tokens": 4096})
    found = []
    for cache in (small, large):
        ids = prefill(cache, [[1, 2, 3] * 20, [4] * 9])
        steps = DeviceSteps(cache, 2, 64)
        tokens, outs = np.array([5, 6]), []
        for _ in range(8):
            steps.load(ids, tokens, 48, max_lens=[1000, 1000])
            for _ in range(48):
                step = steps.begin()
                assert (np.asarray(steps.status) == 0).all()
                out, tokens = run(step, np.asarray(steps.tokens), 8, (0, 0))
                steps.tokens[:2] = tokens[:2]
                outs.append(out[:2].copy())
            tokens = steps.finish().next_tokens
            cache.check_integrity()
        found.append(outs)
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))
    assert small.stats().tiers["host16"].used > 256
