"""What a call looks at or keeps grows with what it is asked for, not with what the cache could hold or once held."""

import tracemalloc

import numpy as np
import pytest

from kvtoolkit import ArgumentError, CacheConfig, KVCache
from kvtoolkit.bench import costs
from kvtoolkit.cache import compaction
from kvtoolkit.cache.state import block_table
from kvtoolkit.cache.state.block_manager import BlockManager
from kvtoolkit.cache.state.ledger import Ledger
from kvtoolkit.commands import cli


def make(**fields):
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_tokens": 4096, "max_seqs": 64}
    return KVCache(CacheConfig(**{**shape, **fields}))


def step(cache, seq_ids, counts):
    cache.end_step(cache.begin_step(seq_ids, counts))


def fragmented(**fields):
    """Sequences of four tiles each, some of them in small blocks."""
    cache = make(growth="append", prefix_caching=False, **fields)
    seq_ids, _ = cache.open([[]] * 12)
    for i in range(32):
        step(cache, seq_ids[i % 3 :: 1 + i // 16], 8)
    cache.fork(seq_ids[:2], 1)
    return cache, seq_ids


def windows_of(cache):
    """Every tile that could be merged, found by looking at each."""
    table, granules = cache._state.group.table, cache._state.group.blocks.granules
    found = []
    for row in np.flatnonzero(table.info[:, 1] == 1).tolist():
        for end in range(8, int(table.info[row, 2] >> 3) + 1, 8):
            held = block_table.granule_at, table, row
            own = [held[0](held[1], held[2], index) for index in range(end - 8, end)]
            starts = [block_table.find_entry(table, row, index) for index in (end - 8, end - 1)]
            covers = table.starts[row, starts[0]] == end - 8 and (
                starts[1] + 1 == table.info[row, 4] or table.starts[row, starts[1] + 1] == end
            )
            capacity = table.info[row, 3]
            covers = covers and (starts[1] + 1 < table.info[row, 4] or capacity == end)
            if covers and starts[0] != starts[1] and (granules.refs[own] == 1).all():
                found.append((row, end))
    return found


@pytest.mark.parametrize("limit", [1, 7, 64, 10**6])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_looking_for_tiles_to_merge_goes_on_where_it_stopped_and_misses_none(limit, most):
    cache, _ = fragmented()
    expected = windows_of(cache)
    assert len(expected) > 12
    table, granules, cursor = cache._state.group.table, cache._state.group.blocks.granules, np.zeros(2, np.int64)
    found, out = [], np.empty((most, 2), np.int32)
    for _ in range(100_000):
        before = cursor.tolist()
        count = compaction.find_windows(table, granules, cursor, limit, out)
        found += [tuple(window) for window in out[:count].tolist()]
        if cursor.tolist() <= before:
            break
    assert sorted({*found}) == expected
    assert len(found) <= len(expected) + most


def test_small_budgets_merge_what_a_large_one_does():
    copied = []
    for budget in (64, 192, 10**6):
        cache, _ = fragmented()
        while windows_of(cache):
            cache.compact(budget)
            cache.check_integrity()
        copied.append(cache.stats().copied_tokens)
    assert copied[0] == copied[1] == copied[2]


@pytest.mark.parametrize("layer_groups", [None, [{"layers": 0, "window": 100}, {"layers": 1}]])
def test_an_absurd_budget_takes_no_more_memory_than_one_as_large_as_the_pool(layer_groups):
    copied, peaks = set(), []
    for budget in (None, 1 << 33, 1 << 40, 1 << 63, 1 << 70):
        cache, _ = fragmented(num_layers=2, layer_groups=layer_groups)
        pool = sum(group.capacity for group in cache.stats().groups)
        cache.compact(64)  # what is compiled is not counted
        tracemalloc.start()
        copied.add(cache.compact(budget or pool))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        cache.check_integrity()
    assert len(copied) == 1
    # arrays for such a budget would have gigabytes; what Numba notes of arguments varies by some 20 KB
    assert max(peaks) < peaks[0] + (1 << 17)


@pytest.mark.parametrize("counts", [1 << 25, [1 << 25] * 4])
def test_a_step_of_absurd_size_is_refused_before_anything_is_allocated_for_it(counts):
    cache = make()
    seq_ids, _ = cache.open([[]] * 4)
    tracemalloc.start()
    try:
        with pytest.raises(ArgumentError, match=r"num_new_tokens: expected at most 1048576 in all.*got 134217728"):
            cache.begin_step(seq_ids, counts)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    step(cache, seq_ids, 1)


def nbytes_kept(cache):
    return sum(array.nbytes for arrays in cache._arrays._spare for array in arrays)


def test_arrays_of_one_large_step_are_not_kept_for_ever():
    cache = make(num_tokens=1 << 16, max_seqs=4096, growth="append", prefix_caching=False)
    long, _ = cache.open([[]])
    step(cache, long, 1024)  # a row of many entries, unless they join
    many, _ = cache.open([[]] * 3000)
    cache._arrays.widen(cache._arrays.take(4096, 1), 128)
    for _ in range(2):
        arrays = cache._arrays.widen(cache._arrays.take(4096, 1 << 18), 128)
        cache._arrays.give_back(arrays, 4096, 1 << 18)
    large = nbytes_kept(cache)
    for _ in range(200):
        step(cache, long, 1)
    assert nbytes_kept(cache) < large // 16
    step(cache, many, 1)
    cache.check_integrity()


def test_arrays_are_kept_while_large_steps_come_now_and_then():
    cache = make()
    arrays = cache._arrays.widen(cache._arrays.take(4096, 1 << 18), 128)
    for i in range(200):
        cache._arrays.give_back(arrays, *((4096, 1 << 18) if i % 32 == 0 else (1, 1)))
        assert cache._arrays.take(1, 1) is arrays


def test_room_in_single_granules_is_asked_for_at_once(monkeypatch):
    cache = make(growth="append", prefix_caching=False)
    seq_ids, _ = cache.open([[]] * 64)
    step(cache, seq_ids, 64)
    cache.truncate(seq_ids, [32] * 64)
    cache.close(cache.fork(seq_ids[:0], 1).ravel())
    calls = []
    take = Ledger.take
    monkeypatch.setattr(Ledger, "take", lambda *arguments, **named: calls.append(1) or take(*arguments, **named))
    cache.close(seq_ids[1:])
    assert cache._state.group.blocks.fit(200) is not None
    assert len(calls) < 20


def test_rows_that_need_as_much_as_a_refused_one_are_refused_unseen_and_smaller_ones_are_not(monkeypatch):
    cache = make(growth="append", prefix_caching=False)
    long, _ = cache.open([[]])
    step(cache, long, 4096 - 8 * 20)
    waiting, _ = cache.open([[]] * 50)
    calls = []
    fit = BlockManager.fit
    monkeypatch.setattr(BlockManager, "fit", lambda pool, needed: calls.append(needed) or fit(pool, needed))
    with cache.begin_step(waiting, [8 * 30] * 20 + [8 * 21] * 20 + [8 * 6] * 10) as open_step:
        assert open_step.ok.tolist() == [False] * 40 + [True] * 3 + [False] * 7
    assert len(calls) < 10
    cache.check_integrity()


def test_the_measurement_of_costs_runs_every_case(capsys):
    assert cli.main(["bench", "costs", "--granules", "8192", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in costs.CASES)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "costs", "--repeats", "0"])
    assert "--repeats: expected at least 1, got 0" in capsys.readouterr().err
