"""Prefix hits in caches with several groups of layers, or with a window."""

import numpy as np
import pytest

from allocators import IntegrityError
from kvtoolkit import CacheConfig, ConfigError, KVCache
from kvtoolkit.cache.state.block_table import NUM_ENTRIES, first_held
from kvtoolkit.config.groups import lead_of

SHAPE = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "dtype": "float32", "num_tokens": 8192, "max_seqs": 16}
MIXED = [{"layers": [0, 2], "window": 20}, {"layers": 1}]
WINDOWS = {"all": (-1, -1), "window": (19, 0)}


def make(groups=MIXED, **fields):
    return KVCache(CacheConfig(**{**SHAPE, **fields}, layer_groups=groups))


def sized(window_tokens, full_tokens, **fields):
    """A cache whose groups have these sizes."""
    groups = [{**group, "num_tokens": size} for group, size in zip(MIXED, (window_tokens, full_tokens), strict=True)]
    return make(groups, **{"num_tokens": None, "growth": "append", **fields})


def feed(cache, seq, tokens, piece=30):
    """Append tokens to a sequence in steps, of which each token gets keys and values of its own."""
    for at in range(0, len(tokens), piece):
        part = list(tokens[at : at + piece])
        with cache.begin_step([seq], len(part)) as step:
            assert step.ok.all()
            for layer in range(3):
                x = np.broadcast_to(np.array(part, np.float32)[:, None, None] + layer, (len(part), 2, 16))
                step.append(layer, x.copy(), -x)
            cache.end_step(step, part)
        cache.check_integrity()


def run(cache, tokens, piece=30, **options):
    """Open a sequence, feed what is not cached and close it; returns how many tokens were."""
    (seq,), (cached,) = cache.open([tokens], **options)
    cache.check_integrity()
    feed(cache, seq, tokens[cached:], piece)
    cache.close([seq])
    cache.check_integrity()
    return int(cached)


def held_of(cache, seq):
    """First and last granule that a sequence holds in the window group, the one after the first in the state."""
    table = cache._state.others[0].table
    row = int(cache._state.rows_of([seq], (1,))[0])
    return int(first_held(table, row)), int(table.info[row, 3])


def test_a_prompt_begins_with_a_cached_prefix_of_which_a_window_group_holds_the_last_window():
    cache = make()
    assert run(cache, range(100)) == 0
    (seq,), (cached,) = cache.open([range(120)])
    assert cached == 96
    assert held_of(cache, seq) == ((96 - 19) // 8, 12)
    stats = cache.stats()
    window, full = stats.groups
    assert (window.used, full.used) == (24, 96)
    assert (window.cached, full.cached) == (72, 0)  # what no window sees is kept for other prompts
    assert (stats.num_prefix_hits, stats.reused_tokens) == (1, 96)
    feed(cache, seq, range(96, 120))
    assert cache.open([range(120)])[1].tolist() == [112]


@pytest.mark.parametrize(("length", "expected"), [(9, 8), (40, 32), (41, 40), (57, 56), (500, 200)])
def test_a_prompt_may_begin_at_any_point_of_an_earlier_one(length, expected):
    cache = make()
    run(cache, range(201))
    assert run(cache, [*range(min(length, 201)), *[7] * max(0, length - 201)]) == expected


@pytest.mark.parametrize("piece", [1, 8, 30, 201])
@pytest.mark.parametrize(
    "groups",
    [
        MIXED,
        [{"layers": 0, "window": 1}, {"layers": 1, "window": 64}, {"layers": 2}],
        [{"layers": [0, 1], "chunk": 40}, {"layers": 2}],
        [{"layers": [0, 1]}, {"layers": 2}],
        [{"layers": [0, 1], "window": 9}, {"layers": 2, "window": 33}],
        [{"layers": range(3), "window": 20}],
        [{"layers": range(3), "chunk": 40}],
    ],
)
def test_outputs_after_a_hit_are_to_the_bit_those_of_a_cache_that_keeps_everything(groups, piece):
    draw = np.random.default_rng(piece)
    keys, values = draw.standard_normal((2, 3, 260, 2, 16), np.float32)
    queries = draw.standard_normal((3, 260, 4, 16), np.float32)
    spans = {layer: group for group in groups for layer in np.ravel(group["layers"]).tolist()}
    outs = []
    for cache in (make(groups), make(None)):
        out = np.zeros((3, 260, 4, 16), np.float32)
        hits = []
        for end in (201, 130, 260):
            (seq,), (cached,) = cache.open([range(end)])
            hits.append(int(cached))
            for at in range(cached, end, piece):
                to = min(at + piece, end)
                with cache.begin_step([seq], to - at) as step:
                    for layer in range(3):
                        step.append(layer, keys[layer, at:to], values[layer, at:to])
                        window = spans[layer].get("window")
                        options = {"window_size": (window - 1, 0)} if window else {}
                        if not spans[layer].get("chunk"):
                            out[layer, at:to] = step.attend(layer, queries[layer, at:to], **options)
                        elif cache.config.is_grouped:
                            out[layer, at:to] = step.attend(layer, queries[layer, at:to])
                        else:  # a cache without groups knows no chunks: each token by itself
                            out[layer, at:to] = chunked(queries, keys, values, layer, at, to, spans[layer]["chunk"])
                    cache.end_step(step, range(at, to))
            cache.close([seq])
            cache.check_integrity()
        assert hits == [0, 128, 200]
        outs.append(out)
    if any("chunk" in group for group in groups):  # which is another order of additions
        np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(*outs)


def chunked(queries, keys, values, layer, begin, end, chunk):
    """Attention of positions ``[begin, end)`` of a layer in chunks, in float64."""
    out = np.zeros((end - begin, 4, 16), np.float32)
    for position in range(begin, end):
        seen = slice(position - position % chunk, position + 1)
        for head in range(4):
            scores = keys[layer, seen, head // 2].astype(np.float64) @ queries[layer, position, head] / 4
            weights = np.exp(scores - scores.max())
            out[position - begin, head] = weights @ values[layer, seen, head // 2] / weights.sum()
    return out


def test_where_the_last_window_is_gone_a_shorter_prefix_is_found_or_none():
    cache = sized(128, 2048)
    run(cache, range(1000, 1100))
    run(cache, range(100), piece=10)
    # the oldest goes first: the first sequence, then what the second one saw first
    (seq,), _ = cache.open([[]])
    feed(cache, seq, range(2000, 2030))
    assert cache.open([range(1000, 1100)])[1].tolist() == [0]
    ids, cached = cache.open([range(100)])
    assert cached.tolist() == [96]
    cache.close(ids)
    feed(cache, seq, range(2030, 2042))
    for length in (96, 88, 40):
        prompt = range(length + 1)
        ids, cached = cache.open([prompt])
        own = cache._state.others[0].blocks.nodes
        present = {int(depth) for depth, uid, first in zip(own.depth, own.uid, own.tokens[:, 0], strict=True)
                   if uid and first < 100}  # fmt: skip
        usable = [p for p in range(8, length + 1, 8) if set(range(max(0, p - 19) // 8, p // 8)) <= present]
        assert cached.tolist() == [max(usable, default=0)]
        cache.close(ids)
        cache.check_integrity()


def test_without_keep_prefix_windows_what_no_query_sees_is_freed_at_once():
    kept, freed = (make(keep_prefix_windows=keep, growth="append") for keep in (True, False))
    for cache in (kept, freed):
        (seq,), _ = cache.open([[]])
        feed(cache, seq, range(200), piece=10)
        window, full = cache.stats().groups
        assert (window.used, full.used) == (32, 200)
        assert window.cached == (168 if cache is kept else 0)
        assert cache.open([range(100)])[1].tolist() == [96 if cache is kept else 0]
    assert run(freed, range(300, 315)) == 0
    assert run(freed, range(300, 315)) == 8  # which has outgrown no window
    with pytest.raises(ConfigError, match="keep_prefix_windows: expected true or false, got 1"):
        make(keep_prefix_windows=1)


def test_what_the_first_group_evicts_is_freed_in_the_others():
    cache = sized(1024, 256)
    run(cache, range(100))
    assert [group.cached for group in cache.stats().groups] == [96, 96]
    (seq,), _ = cache.open([[]])
    feed(cache, seq, range(1000, 1200))
    window, full = cache.stats().groups
    assert full.cached == 56
    assert window.cached == 56 + 200 - window.used
    assert cache.open([range(100)])[1].tolist() == [56]
    cache.clear_prefixes()
    cache.check_integrity()
    assert sum(group.cached for group in cache.stats().groups) == 0
    assert cache.open([range(100)])[1].tolist() == [0]


def test_salts_and_extra_keys_hold_in_all_groups():
    cache = make()
    options = {"salt": "a", "extra_keys": [[(50, "image")]]}
    assert run(cache, range(100), **options) == 0
    assert run(cache, range(100)) == 0
    assert run(cache, range(100), salt="a", extra_keys=[[(50, "other")]]) == 48
    assert run(cache, range(100), **options) == 96
    cache.clear_prefixes("a")
    cache.check_integrity()
    assert run(cache, range(100), **options) == 0
    assert run(cache, range(100)) == 96


@pytest.mark.parametrize("to", ["drop", "host"])
@pytest.mark.parametrize("groups", [MIXED, MIXED[::-1], [{"layers": range(3), "window": 20}]])
def test_preempted_sequences_come_back_through_hits_and_can_be_found_again(to, groups):
    cache = make(groups, num_tokens=4096)
    (seq,), _ = cache.open([[]])
    feed(cache, seq, range(201))
    cache.preempt([seq], to)
    cache.check_integrity()
    assert cache.restore([seq]).all()
    cache.check_integrity()
    length = int(cache.lengths([seq])[0])
    assert length == (201 if to == "host" else 200)
    feed(cache, seq, range(length, 230))
    if to == "host" and len(groups) > 1:
        assert cache.open([range(230)])[1].tolist() == [224]
    cache.preempt([seq], to)
    cache.clear_prefixes()
    assert cache.restore([seq]).all()
    cache.check_integrity()
    assert cache.lengths([seq]).tolist() == [230 if to == "host" else 0]
    assert cache.open([range(230)])[1].tolist() == [0]


def test_a_sequence_that_was_copied_back_is_published_in_all_groups():
    cache = make()
    (seq,), _ = cache.open([[]])
    feed(cache, seq, range(201))
    cache.preempt([seq], "host")
    for group in cache._state.groups:  # so that nothing of it is found in the pool
        group.blocks.evict(int(group.blocks.granules.cached[0]))
    cache.check_integrity()
    assert cache.restore([seq]).all()
    cache.check_integrity()
    assert cache.open([range(201)])[1].tolist() == [200]


def test_what_is_evicted_for_a_sequence_that_comes_back_is_freed_in_all_groups():
    cache = sized(1024, 256)
    (seq,), _ = cache.open([[]])
    feed(cache, seq, range(150))
    cache.preempt([seq], "host")
    for first in (1000, 2000, 3000):
        run(cache, range(first, first + 100))
    assert cache.restore([seq]).all()
    cache.check_integrity()
    window, full = cache.stats().groups
    assert (full.used, full.cached) == (152, 104)
    # of the sequence, what was published again, and of the others what the first group still has
    assert window.cached + window.used <= full.used + full.cached


def test_restore_counts_what_a_hit_takes_in_every_group():
    cache = sized(128, 2048)
    (seq,), _ = cache.open([[]])
    feed(cache, seq, range(90))
    cache.preempt([seq])
    assert not cache.restore([seq], keep_free=2048 - 80).any()
    (other,), _ = cache.open([[]])
    feed(cache, other, range(1000, 1090), piece=90)
    assert not cache.restore([seq], keep_free=20).any()  # 96 slots are the other's, and 24 are the last window
    assert cache.restore([seq], keep_free=8).all()
    cache.preempt([seq])
    cache.close([other])
    assert cache.restore([seq], keep_free=20).all()
    cache.check_integrity()


def test_rows_with_few_entries_hold_shorter_prefixes():
    cache = make(max_entries=3, growth="append")
    (a, b), _ = cache.open([[]] * 2)
    for at in range(0, 40, 8):  # so that no two granules of a sequence are next to each other
        feed(cache, a, range(at, at + 8))
        feed(cache, b, range(100 + at, 108 + at)) if at < 24 else None
        if at == 16:
            cache.close([b])
            break
    tokens = range(24)
    assert cache.open([[*tokens, 9]])[1].tolist() == [24]


def test_what_no_window_sees_any_more_is_evicted_in_whole_blocks():
    groups = [{**MIXED[0], "window": 128, "num_tokens": 8 * 384}, {**MIXED[1], "num_tokens": 8 * 1024}]
    cache = make(groups, num_tokens=None, growth="adaptive")
    ids, _ = cache.open([[]] * 8)
    rows, (window,) = cache._state.rows_of(ids, (1,)), cache._state.others
    for i in range(300):
        count = 100 if i < 6 else 1
        step = cache.begin_step(ids, count)
        assert step.ok.all()
        cache.end_step(step, range(8000 * i, 8000 * i + 8 * count))
        if i > 100:
            assert window.table.info[rows, NUM_ENTRIES].max() <= 4  # 128 tokens, in blocks of 64
    assert cache.stats().groups[0].cached > 8 * 64
    cache.check_integrity()


def test_twins_in_a_window_group_take_over_from_each_other():
    cache = make(growth="append")
    ids, _ = cache.open([[]] * 2)
    for at in range(0, 40, 10):
        step = cache.begin_step(ids, 10)
        cache.end_step(step, [*range(at, at + 10)] * 2)
        cache.check_integrity()
    window = cache.stats().groups[0]
    cache.close(ids[:1])
    cache.check_integrity()
    (seq,), (cached,) = cache.open([range(41)])
    assert cached == 40
    assert window.used > cache.stats().groups[0].used
    cache.close([*ids[1:], seq])
    cache.check_integrity()
    assert cache.open([range(41)])[1].tolist() == [40]


@pytest.mark.parametrize("groups", [MIXED, [{"layers": range(3), "window": 33}]])
def test_a_repair_finds_the_twins_among_what_rows_still_hold(groups):
    cache = make(groups, growth="append")
    ids, _ = cache.open([[]] * 2)
    for at, counts in ((0, [40, 8]), (40, [1, 0])):
        step = cache.begin_step(ids, counts)
        cache.end_step(step, [*range(at, at + counts[0]), *range(counts[1])])
    before = cache.stats()
    rings = [group.blocks.granules.links[:, :2].copy() for group in cache._state.groups]
    cache.repair()
    cache.check_integrity()
    assert cache.stats() == before
    for group, ring in zip(cache._state.groups, rings, strict=True):
        np.testing.assert_array_equal(group.blocks.granules.links[:, :2], ring)
    assert cache.open([range(41)])[1].tolist() == [40]


def test_truncating_into_a_findable_granule_makes_it_findable_no_more_in_any_group():
    cache = make()
    (seq,), _ = cache.open([[]])
    feed(cache, seq, range(200))
    cache.truncate([seq], [187])
    cache.check_integrity()
    assert cache.open([range(200)])[1].tolist() == [184]
    feed(cache, seq, range(500, 520))
    assert cache.open([range(200)])[1].tolist() == [184]
    assert cache.open([[*range(187), *range(500, 520)]])[1].tolist() == [200]


def test_the_first_group_that_keeps_all_tokens_leads_or_else_the_largest_window():
    for spans, lead in (([20, 0, 0], 1), ([20, 64, -40], 1), ([20, -40], 1), ([5], 0)):
        groups = [
            {"layers": i, **({"window": span} if span > 0 else {"chunk": -span} if span else {})}
            for i, span in enumerate(spans)
        ]
        cache = make(groups, num_layers=len(spans))
        assert lead_of(cache.config.groups) == lead
        assert cache._state.group.layers.layers == (lead,)
        assert [group.layers for group in cache.stats().groups] == [(i,) for i in range(len(spans))]


def test_integrity_finds_what_no_prompt_could_find():
    cache = make()
    run(cache, range(100))
    nodes = cache._state.others[0].blocks.nodes
    nodes.parent_uid[np.flatnonzero(nodes.uid)[3]] += 1000
    with pytest.raises(IntegrityError, match="keys that the first group's index lacks"):
        cache.check_integrity()
