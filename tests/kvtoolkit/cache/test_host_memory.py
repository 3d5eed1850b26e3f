"""Host memory of a cache: what moves there, when it comes back, and what callers may say and do."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest

from allocators import IntegrityError
from kvtoolkit import ArgumentError, CacheConfig, ConfigError, DeviceSteps, KVCache, SequenceError, UnsupportedError
from kvtoolkit.cache import preemption
from kvtoolkit.cache.state.block_table import LENGTH, OPEN, PREEMPTED
from kvtoolkit.cache.tiering.offloader import Offloader
from kvtoolkit.formats.entry import unpack_entries
from tests.kvtoolkit.cache.broken_calls import check, make_world, outcome, put
from tests.kvtoolkit.cache.host_device import make_cache, use_host
from tests.kvtoolkit.cache.late_transfers import LateTransfers
from tests.kvtoolkit.cache.test_device_steps import prefill, run
from tests.kvtoolkit.cache.test_interruptions import Interrupted, LineBreaker
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


def test_what_an_awake_sequence_holds_comes_back_in_place_of_what_nobody_holds():
    cache = make()
    ids, _ = cache.open([[], []])
    extend(cache, ids[:1], 192)
    assert cache.offload(ids[:1]) == 3
    extend(cache, ids[1:], 512, 1000)
    cache.close(ids[1:])
    assert cache.stats().tiers["hot"].free == 0
    assert places(cache, ids[0]) == [True, True, True]
    for i in range(8):
        extend(cache, ids[:1], 1, 192 + i)
    assert places(cache, ids[0])[:3] == [False, False, False]
    assert cache.stats().num_evicted == 0
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


def test_looking_at_a_retained_prefix_does_not_shorten_its_stay():
    cache, now = make(tiers=None), [1.0]
    cache._state.now, cache._state.made_at = lambda: now[0], 0.0
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 128)
    cache.retain([seq], 1000)
    cache.close([seq])
    cache.close(cache.open([[*range(128), 9]])[0])
    for i in range(1, 7):
        (seq,), _ = cache.open([[]])
        extend(cache, [seq], 128, 1000 * i)
        cache.close([seq])
    assert cache.open([[*range(128), 9]])[1].tolist() == [128]


@pytest.mark.parametrize("call", ["open", "offload", "prefetch", "begin_step"])
def test_calls_finish_the_moves_whose_copies_are_done(call):
    cache = make()
    ids, _ = cache.open([[], []])
    extend(cache, ids, 150)
    assert cache.offload(ids[:1]) == 2
    assert cache.stats().num_offloaded == 0
    argument = {"open": ([[1, 2]],), "begin_step": (ids[1:], 0)}.get(call, (ids[1:],))
    getattr(cache, call)(*argument)
    assert cache.stats().num_offloaded == 2


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


def make_late(cache):
    """Let copies be under way until somebody waits for them, or asks often."""
    cache._group.storage.transfers = LateTransfers(cache._group.storage.transfers)


def held(cache, seq, state=OPEN):
    """The tokens that a sequence holds, as `extend` has written them, in both layers."""
    (row,) = cache._state.rows_of([seq], (state,))
    entries, length = cache._group.table.entries[row], int(cache.lengths([seq])[0])
    granules, sizes, _ = unpack_entries(entries[entries >= 0])
    listed = np.concatenate([[], *(np.arange(g, g + n) for g, n in zip(granules, sizes, strict=True))]).astype(int)
    found = [cache.key_cache(layer)[listed, 0, :, 0].ravel()[:length] - layer for layer in range(2)]
    assert np.array_equal(*found)
    return found[0].tolist()


def test_preemption_to_the_host_begins_to_move_and_returns():
    cache = make()
    ids, _ = cache.open([[], []])
    extend(cache, ids, 150)
    make_late(cache)
    cache.preempt(ids[:1], to="host")
    stats = cache.stats()
    assert (stats.num_preempted_seqs, stats.num_preempted, stats.num_offloaded) == (1, 1, 0)
    assert stats.tiers["host16"].used == 0
    assert not cache._group.copies._made
    cache._places.settle_all()  # three blocks, of which the last is not full
    stats = cache.stats()
    assert stats.num_offloaded == 3
    assert stats.tiers["host16"].used == 152
    assert stats.tiers["hot"].used == 192
    assert held(cache, ids[0], PREEMPTED) == list(range(150))
    cache.check_integrity()


def test_a_restored_sequence_begins_to_move_back_and_its_end_follows_when_it_is_full():
    cache = make()
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 150)
    cache.preempt([seq], to="host")
    cache._places.settle_all()
    make_late(cache)
    assert cache.restore([seq]).all()
    assert cache.stats().num_prefetched == 0
    assert places(cache, seq) == [False, False, True]
    for i in range(8):
        extend(cache, [seq], 1, 150 + i)
    assert not any(places(cache, seq))
    assert held(cache, seq) == list(range(158))


def test_what_is_on_its_way_is_free_at_once_when_it_is_needed():
    cache = make(256)
    ids, _ = cache.open([[], []])
    extend(cache, ids, 120)
    make_late(cache)
    cache.preempt(ids[:1], to="host")
    extend(cache, ids[1:], 100, 120)
    assert not any(places(cache, ids[1]))
    assert held(cache, ids[0], PREEMPTED) == list(range(120))
    assert cache.restore(ids[:1]).all()
    extend(cache, ids[:1], 3, 120)
    assert held(cache, ids[0]) == list(range(123))


@pytest.mark.parametrize("length", [0, 1, 8, 64, 100, 128])
def test_a_sequence_comes_back_while_it_still_moves_and_writes_on(length):
    cache = make()
    ids, _ = cache.open([[], []])
    extend(cache, ids, length)
    make_late(cache)
    for i in range(20):  # so that copies end at every moment
        cache.preempt(ids[:1], to="host")
        cache.check_integrity()
        assert cache.restore(ids[:1]).tolist() == [True]
        extend(cache, ids[:1], 3, length + 3 * i)
        cache.check_integrity()
        assert held(cache, ids[0]) == list(range(length + 3 * i + 3))
    cache._places.settle_all()
    assert held(cache, ids[0]) == list(range(length + 60))
    assert held(cache, ids[1]) == list(range(length))


def test_a_move_back_is_given_up_where_its_row_writes_meanwhile():
    cache = make()
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 100)
    ((child,),) = cache.fork([seq], 1)
    cache.preempt([seq, child], to="host")
    cache._places.settle_all()
    make_late(cache)
    assert cache.restore([child]).all()
    cache.prefetch([child])  # what the two share, and what else is there
    assert cache.restore([seq]).all()
    extend(cache, [seq], 20, 100)
    cache._places.settle_all()
    assert held(cache, seq) == list(range(120))
    assert held(cache, child) == list(range(100))
    cache.check_integrity()


def test_a_row_keeps_no_room_to_grow_while_it_is_preempted():
    cache = make()
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 70)
    with cache.begin_step([seq], 200):
        pass  # aborted: it keeps the blocks
    assert cache.stats().used >= 264
    cache.preempt([seq], to="host")
    assert cache.stats().used == 72
    assert cache.stats().waste == pytest.approx(1 - 70 / 72)


def test_a_row_keeps_the_rest_of_a_block_that_nobody_else_can_have():
    cache = make(growth="fixed64", allocator="paged")
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 70)
    cache.preempt([seq], to="host")
    cache._places.settle_all()
    assert (cache.stats().used, cache.stats().pinned) == (128, 0)
    for i in range(20):
        assert cache.restore([seq]).all()
        extend(cache, [seq], 1, 70 + i)
        cache.preempt([seq], to="host")
    assert cache.stats().used == 128


def test_figures_count_what_preempted_sequences_hold():
    cache = make()
    ids, _ = cache.open([[], []])
    extend(cache, ids, 100)
    cache.preempt(ids[:1], to="host")
    cache._places.settle_all()
    stats = cache.stats()
    assert (stats.num_seqs, stats.num_preempted_seqs, stats.num_tokens) == (1, 1, 100)
    assert stats.used == sum(size * count for size, count in stats.blocks.items())
    assert stats.waste == pytest.approx(1 - 200 / stats.used)
    assert stats.entries_per_seq == sum(stats.blocks.values()) / 2
    cache.preempt(ids[1:], to="drop")
    stats = cache.stats()
    assert (stats.num_seqs, stats.num_preempted_seqs, stats.used) == (0, 2, 104)
    assert stats.waste == pytest.approx(1 - 100 / 104)
    assert stats.entries_per_seq == sum(stats.blocks.values()) == 2
    cache.close(ids)
    assert (cache.stats().used, cache.stats().num_preempted_seqs, cache.stats().entries_per_seq) == (0, 0, 0)


def test_what_finds_no_place_in_host_memory_is_copied_so_that_preempting_always_frees_memory():
    cache = make(512, {**HOST, "host": 4 * BLOCK})
    ids, _ = cache.open([[], [], []])
    extend(cache, ids[:2], 192)
    cache.preempt(ids[:2], to="host")  # three blocks each, of which four find a place
    cache._places.settle_all()
    assert cache.stats().tiers["host16"].used == 192
    assert cache.stats().tiers["hot"].used == 0
    extend(cache, ids[2:], 512, 1000)
    cache.preempt(ids[2:], to="host")
    assert cache.stats().tiers["hot"].used == 0
    for seq, first, count in zip(ids, (0, 0, 1000), (192, 192, 512), strict=True):
        assert cache.restore([seq]).all()
        assert held(cache, seq) == list(range(first, first + count))
        cache.close([seq])
    cache.check_integrity()


def test_preempting_goes_on_freeing_memory_when_host_memory_is_full_of_preempted_sequences():
    cache = make(512, {**HOST, "host": 8 * BLOCK})
    kept = []
    for i in range(6):
        (seq,), _ = cache.open([[]])
        extend(cache, [seq], 512, 1000 * i)
        kept.append(seq)
        cache.preempt([seq], to="host")
    for i, seq in enumerate(kept):
        assert cache.restore([seq]).all()
        assert held(cache, seq) == list(range(1000 * i, 1000 * i + 512))
        cache.close([seq])


def test_room_that_is_asked_for_beside_a_restored_sequence_may_be_anywhere():
    cache = make(256, {**HOST, "host": 2 * BLOCK})
    ids, _ = cache.open([[], []])
    extend(cache, ids, 120)
    make_late(cache)
    cache.preempt(ids[:1], to="host")
    cache.close(ids[1:])
    cache.clear_prefixes()  # 15 granules are on their way to 16
    assert cache.restore(ids[:1], keep_free=265).tolist() == [False]
    assert cache.stats().num_preempted_seqs == 1
    cache.check_integrity()
    assert cache.restore(ids[:1], keep_free=256).tolist() == [True]
    extend(cache, ids[:1], 256, 120)  # which asserts that there is room: nothing has begun to come back and takes it
    assert held(cache, ids[0]) == list(range(376))
    cache.check_integrity()


def test_a_sequence_comes_back_to_a_full_device_if_its_next_tokens_have_room_in_host_memory():
    cache = make(256, {**HOST, "host": 5 * BLOCK})
    ids, _ = cache.open([[], []])
    extend(cache, ids, 120)
    cache.preempt(ids[:1], to="host")
    extend(cache, ids[1:], 136, 120)
    assert cache.stats().tiers["hot"].free == 0
    assert cache.restore(ids[:1], keep_free=1000).tolist() == [False]
    assert cache.restore(ids[:1], keep_free=100).tolist() == [True]
    extend(cache, ids[:1], 100, 120)
    assert (held(cache, ids[0]), held(cache, ids[1])) == (list(range(220)), list(range(256)))
    cache.check_integrity()


def test_prompts_find_what_a_preempted_sequence_holds():
    cache = make()
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 150)
    make_late(cache)
    cache.preempt([seq], to="host")
    (other,), hit = cache.open([[*range(150), 7]])
    assert hit.tolist() == [144]
    assert held(cache, other) == list(range(144))
    assert not any(places(cache, other)[:2])  # it is awake, so the move is given up
    assert held(cache, seq, PREEMPTED) == list(range(150))
    cache.close([seq])
    assert held(cache, other) == list(range(144))
    cache.check_integrity()


def test_a_lease_keeps_what_a_preempted_sequence_holds_where_it_is():
    cache = make()
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 128)
    with cache.pin([seq]) as lease:
        before = lease.starts.copy()
        cache.preempt([seq], to="host")
        cache._places.settle_all()
        entries = cache._group.table.entries[cache._state.rows_of([seq], (PREEMPTED,))[0]]
        assert unpack_entries(entries[entries >= 0])[0].tolist() == before.tolist()
        cache.check_integrity()
    assert cache.restore([seq]).all()
    assert held(cache, seq) == list(range(128))


def test_cleared_prefixes_are_not_found_again_when_a_sequence_comes_back():
    cache = make()
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 100)
    cache.preempt([seq], to="host")
    cache.clear_prefixes()
    assert cache.restore([seq]).all()
    extend(cache, [seq], 50, 100)
    assert held(cache, seq) == list(range(150))
    assert cache.open([[*range(150), 7]])[1].tolist() == [0]


@pytest.mark.parametrize(
    ("num_tokens", "tiers"), [(512, HOST), (1024, {**HOST, "host": 40 * BLOCK}), (384, {**HOST, "host": 5 * BLOCK})]
)
def test_preempted_sequences_come_back_from_a_snapshot(num_tokens, tiers):
    cache = make()
    ids, _ = cache.open([[]] * 4)
    extend(cache, ids[:2], 100)
    extend(cache, ids[2:3], 40)
    make_late(cache)
    cache.preempt(ids[[0, 3]], to="host")
    cache.preempt(ids[2:3], to="drop")
    data = cache.snapshot()
    fields = {**cache.config.to_dict(), "num_tokens": num_tokens, "tiers": {**cache.config.to_dict()["tiers"], **tiers}}
    again = KVCache.from_snapshot(CacheConfig.from_dict(fields), data)
    assert again.stats().num_preempted_seqs == 3
    assert held(again, ids[0], PREEMPTED) == list(range(100))
    with pytest.raises(SequenceError, match="is preempted"):
        again.begin_step(ids[:1], 1)
    assert again.restore(ids[[0, 2, 3]]).all()
    assert again.lengths(ids).tolist() == [100, 100, 40, 0]
    extend(again, ids[:1], 50, 100)
    assert held(again, ids[0]) == list(range(150))
    again.check_integrity()


def test_a_snapshot_with_preempted_rows_on_the_device_needs_no_host_memory():
    cache = make(512, {**HOST, "host": BLOCK})
    ids, _ = cache.open([[], []])
    extend(cache, ids, 60)
    cache.offload(ids[1:])
    cache._group.storage.transfers = NoRoom()
    cache.preempt(ids[:1], to="host")
    fields = {**cache.config.to_dict(), "tiers": None}
    again = KVCache.from_snapshot(CacheConfig.from_dict(fields), cache.snapshot())
    assert again.restore(ids[:1], keep_free=10_000).tolist() == [False]
    assert again.restore(ids[:1], keep_free=100).tolist() == [True]
    extend(again, ids[:1], 9, 60)
    assert held(again, ids[0]) == list(range(69))
    again.check_integrity()


def test_preempted_rows_of_a_snapshot_go_to_host_memory_before_what_is_awake():
    cache = make()
    ids, _ = cache.open([[], []])
    extend(cache, ids, 180)
    cache._group.storage.transfers = NoRoom()
    cache.preempt(ids[1:], to="host")
    again = KVCache.from_snapshot(cache.config, cache.snapshot())
    extend(again, ids[:1], 300, 180)
    assert not any(places(again, ids[0]))
    assert again.stats().tiers["host16"].used == 184  # with its newest tokens, and a block that is not full
    assert held(again, ids[1], PREEMPTED) == list(range(180))
    again.check_integrity()


def test_copies_of_a_cache_without_host_memory_come_back_in_one_that_has_some():
    cache = make(tiers=None)
    (seq,), _ = cache.open([[]])
    extend(cache, [seq], 100)
    cache.preempt([seq], to="host")
    fields = {**cache.config.to_dict(), "tiers": HOST}
    again = KVCache.from_snapshot(CacheConfig.from_dict(fields), cache.snapshot())
    assert again.restore([seq]).all()
    assert held(again, seq) == list(range(100))
    again.preempt([seq], to="host")
    assert not again._state.preempted[int(cache._state.rows_of([seq], (PREEMPTED,))[0])].copies


def test_checks_know_which_preempted_rows_hold_memory():
    cache = make()
    ids, _ = cache.open([[], []])
    extend(cache, ids, 100)
    cache.preempt(ids[:1], to="host")
    state, row = cache._state, int(cache._state.rows_of(ids[:1], (PREEMPTED,))[0])
    kept = state.preempted[row]
    state.preempted[row] = replace(kept, stays=False)
    with pytest.raises(IntegrityError, match="a preempted row holds memory although it was copied or dropped"):
        cache.check_integrity()
    state.preempted[row] = kept
    cache.preempt(ids[1:], to="drop")
    other = int(cache._state.rows_of(ids[1:], (PREEMPTED,))[0])
    dropped = state.preempted[other]
    state.preempted[other] = replace(dropped, stays=True)
    cache.check_integrity()  # one without tokens
    state.group.table.info[other, LENGTH] = 8
    with pytest.raises(IntegrityError, match="or holds none although it stays"):
        cache.check_integrity()


BROKEN = {
    "num_tokens": 2048,
    "growth": "append",
    "tiers": {"hot": 64, "pinned_tokens": 0, "host": 24 * 4096},
}
"""A cache for worlds of `broken_calls`, with host memory of 24 blocks."""


def make_late_world():
    world = make_world(**BROKEN)
    make_late(world.cache)
    world.cache.preempt(world.open[1:2], "host")
    world.preempted.append(world.open.pop(1))
    return world


def clean(call):
    world = make_late_world()
    before = outcome(world)
    world = make_late_world()
    call(world)
    return before, outcome(world)


MOVING = {
    "preempt": lambda world: world.cache.preempt(world.open, "host"),
    "restore": lambda world: world.cache.restore(world.preempted),
    "close": lambda world: world.cache.close(world.preempted),
    "step": lambda world: put(world.cache, world.open, [[7] * 300, [8] * 9]),
}


@pytest.mark.parametrize("name", MOVING)
def test_a_call_that_breaks_off_anywhere_leaves_preempted_rows_as_before_or_as_after_it(name):
    call, count = MOVING[name], 0
    before, after = clean(call)
    assert before != after
    while True:
        world, breaker = make_late_world(), LineBreaker(1 + 5 * count)
        with contextlib.suppress(Interrupted), breaker:
            call(world)
        if not breaker.fired:
            break
        check(world, before, after)
        count += 1
    assert count > 10


@pytest.mark.parametrize("name", ["preempt", "restore"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_copy_that_fails_leaves_preempted_rows_as_before_or_as_after_the_call(name, when, monkeypatch):
    before, after = clean(MOVING[name])
    world = make_late_world()
    world.cache._places.settle_all()
    start = LateTransfers.start

    def fail(self, *arguments, **options):
        if when == "after":
            start(self, *arguments, **options)
        raise OSError("no copy today")

    with monkeypatch.context() as patch:
        patch.setattr(LateTransfers, "start", fail)
        with pytest.raises(OSError, match="no copy today"):
            MOVING[name](world)
    world.cache.check_integrity()
    assert outcome(world) == after  # all but the moves had been done
    check(world, before, after)


def test_a_restore_that_breaks_off_leaves_rows_preempted_with_all_that_they_hold(monkeypatch):
    cache = make()
    ids, _ = cache.open([[], []])
    extend(cache, ids, 100)
    cache.preempt(ids, to="host")
    with monkeypatch.context() as patch:
        count = iter(range(2))
        wake = preemption._wake
        patch.setattr(preemption, "_wake", lambda *args: wake(*args) if next(count) == 0 else 1 // 0)
        with pytest.raises(ZeroDivisionError):
            cache.restore(ids)
    cache.check_integrity()
    assert cache.stats().num_preempted_seqs == 2
    assert held(cache, ids[0], PREEMPTED) == held(cache, ids[1], PREEMPTED) == list(range(100))
    assert cache.repair().num_reopened == 1
    assert cache.restore(ids).all()
    assert held(cache, ids[0]) == list(range(100))


def test_a_superblock_is_in_one_move_at_a_time():
    cache = make()
    cache._group.storage.transfers = LateTransfers(cache._group.storage.transfers)
    ids, _ = cache.open([[], []])
    extend(cache, ids, 192)
    assert cache.offload(ids[:1]) == 3
    assert cache.offload(ids[:1]) == 0
    extend(cache, ids[1:], 192, 192)  # for which what is on its way already makes room
    cache._places.settle_all()
    cache.check_integrity()
    assert cache.stats().num_offloaded == 3


def test_a_sequence_that_is_in_a_step_is_awake():
    cache = make()
    cache._group.storage.transfers = LateTransfers(cache._group.storage.transfers)
    ids, _ = cache.open([[], []])
    extend(cache, ids, 150)
    assert cache.offload(ids[:1]) == 2
    extend(cache, ids[:1], 1, 150)
    assert places(cache, ids[0]) == [False, False, False]


def test_copies_of_a_move_that_was_forgotten_write_over_nobody(monkeypatch):
    cache = make()
    transfers = cache._group.storage.transfers = LateTransfers(cache._group.storage.transfers)
    ids, _ = cache.open([[], []])
    extend(cache, ids, 192)
    assert cache.offload(ids) == 6
    with monkeypatch.context() as patch:
        patch.setattr(Offloader, "settle", lambda self, wanted=0: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            cache.begin_step(ids, 1)
    extend(cache, ids[:1], 320, 192)  # what was to be moved gets other places
    assert sum(places(cache, ids[0])) + sum(places(cache, ids[1])) > 2
    transfers.join()
    with cache.begin_step(ids, 0) as step:
        for entries, length in zip(step.block_table, (512, 192), strict=True):
            keys = [cache.key_cache(0)[entry & 0xFFFFFF :][:8, 0, :, 0].ravel() for entry in entries if entry >= 0]
            assert np.concatenate(keys)[:length].tolist() == list(range(length))
