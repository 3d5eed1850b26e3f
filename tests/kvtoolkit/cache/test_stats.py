"""Figures add up, and steps that left layers out are noticed."""

import numpy as np
import pytest

from kvtoolkit import StepError
from tests.kvtoolkit.cache.broken_calls import CALLS, CONFIGS, accounted, make, make_world


@pytest.mark.parametrize("name", CONFIGS)
def test_every_slot_is_in_one_place_whatever_was_called(name):
    for call in CALLS.values():
        world = make_world(**CONFIGS[name])
        call(world)
        stats = world.cache.stats()
        groups = world.cache._state.groups
        assert stats.used == 8 * sum(np.count_nonzero(one.blocks.granules.refs) for one in groups)
        assert stats.callers == 8 * sum(np.count_nonzero(one.blocks.ledger.callers) for one in groups)
        used = {one.layers.layers: 8 * np.count_nonzero(one.blocks.granules.refs) for one in groups}
        assert {one.layers: one.used for one in stats.groups} == used
        for one in (stats, *stats.tiers.values(), *stats.groups):
            assert accounted(one) == one.capacity
        assert stats.reused_tokens <= stats.prompt_tokens
        assert stats.peak_used >= stats.used


def test_what_an_allocator_holds_back_is_not_used_by_sequences():
    cache = make(allocator="paged", block_sizes=(16,), growth="fixed16")
    seq_ids, _ = cache.open([[]])
    cache.end_step(cache.begin_step(seq_ids, 10), range(10))
    cache.close(seq_ids)
    stats = cache.stats()
    assert (stats.num_seqs, stats.used, stats.cached, stats.pinned) == (0, 0, 16, 0)  # goes with what is cached
    assert stats.peak_used == 16
    cache.open([range(10)])
    stats = cache.stats()
    assert (stats.num_seqs, stats.used, stats.cached, stats.pinned) == (1, 8, 0, 8)


def begin(cache, seq_ids, count):
    step = cache.begin_step(seq_ids, count)
    assert step.ok.all()
    cache.end_step(step, np.arange(len(step.slot_mapping)) % count)


def test_waste_counts_what_is_shared_once():
    cache = make(growth="fixed64", num_tokens=1024)
    seq_ids, _ = cache.open([[]])
    begin(cache, seq_ids, 128)
    forks = cache.fork(seq_ids, 6).ravel()
    begin(cache, forks, 1)
    stats = cache.stats()
    assert stats.used == 128 + 6 * 64
    assert stats.waste == pytest.approx(1 - (128 + 6) / stats.used)


@pytest.mark.parametrize(
    "fields",
    [
        {"allocator": "slab"},
        {"allocator": "paged", "block_sizes": (64,)},
        {"allocator": "buddy", "growth": "fixed64"},
        {"allocator": "lockfree", "allocator_options": {"layout": "slab"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("shared", [17, 40])
def test_what_counts_as_cached_can_be_had(fields, shared):
    """If a sequence holds a part of a block, nobody can get the rest: it is pinned, not cached."""
    cache = make(num_tokens=512, max_seqs=64, **fields)
    first, _ = cache.open([[]])
    begin(cache, first, 64)
    cache.close(first)
    cache.open([np.arange(64)[:shared]])
    others, _ = cache.open([[]] * 20)
    for seq_id in others:
        step = cache.begin_step([seq_id], 1)
        if step.ok[0]:
            cache.end_step(step)
        else:
            cache.abort_step(step)
    stats = cache.stats()
    assert (stats.cached, stats.used + stats.pinned + stats.free + stats.kept_back) == (0, 512)
    assert stats.pinned >= 64 - shared // 8 * 8


KV = np.ones((9, 1, 8), np.float32)


@pytest.mark.parametrize("missing", [[0], [2], [0, 1], [1, 2, 3]])
@pytest.mark.parametrize("publish", [True, False])
def test_a_step_that_left_layers_out_does_not_end(missing, publish):
    cache = make(num_layers=4)
    seq_ids, _ = cache.open([[]])
    with cache.begin_step(seq_ids, 9) as step:
        for layer in set(range(4)) - set(missing):
            step.append(layer, KV, KV)
        with pytest.raises(StepError, match=f"for layer {', '.join(map(str, missing))};"):
            cache.end_step(step, range(9) if publish else None)
        assert cache.lengths(seq_ids) == [0]
    assert cache.lengths(seq_ids) == [0]
    assert cache.open([range(9)])[1] == [0]
    with cache.begin_step(seq_ids, 9) as step:
        for layer in {*range(4)} - {*missing}:
            step.append(np.int64(layer), KV, KV)
        with pytest.raises(StepError):
            cache.end_step(step, range(9))
        for layer in missing:
            step.append(layer, KV, KV)
        cache.end_step(step, range(9))
    assert cache.lengths(seq_ids) == [9]
    assert cache.open([range(9)])[1] == [8]


def test_layers_that_are_appended_by_attend_prepared_count():
    cache = make(num_layers=3)
    q, out = np.ones((9, 1, 8), np.float32), np.empty((9, 1, 8), np.float32)
    for last in (2, 3):
        step = cache.begin_step(cache.open([[]])[0], 9)
        step.append(0, KV, KV)
        step.attend(0, q, out=out)
        for layer in range(1, last):
            assert step.attend_prepared(layer, KV.ctypes.data, KV.ctypes.data, q.ctypes.data, out.ctypes.data)
        if last == 2:
            with pytest.raises(StepError, match="for layer 2;"):
                cache.end_step(step)
        else:
            cache.end_step(step)


@pytest.mark.parametrize("num_layers", [1, 64, 65, 130])
def test_any_number_of_layers_is_noted(num_layers):
    cache = make(num_layers=num_layers)
    step = cache.begin_step(cache.open([[]])[0], 9)
    for layer in np.arange(num_layers):
        step.append(layer, KV, KV)
    cache.end_step(step)


def test_a_step_without_tokens_or_appends_ends():
    cache = make(num_layers=2)
    seq_ids, _ = cache.open([[]])
    cache.end_step(cache.begin_step(seq_ids, 9), range(9))
    with cache.begin_step(seq_ids, 0) as step:
        step.append(0, KV[:0], KV[:0])
        cache.end_step(step, [])
    assert cache.lengths(seq_ids) == [9]


@pytest.mark.parametrize("name", ["buddy", "groups"])
def test_every_row_without_memory_is_counted_where_others_get_many_blocks(name):
    cache = make(**CONFIGS[name], max_seqs=4)
    seq_ids, _ = cache.open([[]] * 3)
    step = cache.begin_step(seq_ids, [200, 1000, 100])
    assert step.ok.tolist() == [True, False, True]
    cache.end_step(step)
    assert cache.stats().num_stalls == 1
