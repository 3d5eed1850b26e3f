"""Groups of layers: outputs are those of a cache that frees nothing, and a window bounds what a sequence holds."""

import re

import numpy as np
import pytest

from kvtoolkit import (
    ArgumentError,
    CacheConfig,
    KVCache,
    ShapeError,
    StepError,
    variable_block_attention,
)
from kvtoolkit.cache.layers.group_calls import GroupCalls
from kvtoolkit.cache.state.block_table import first_held

SHAPE = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "dtype": "float32", "num_tokens": 8192, "max_seqs": 16}
MIXED = [{"layers": [0, 2], "window": 20}, {"layers": 1}]


def make(groups, **fields):
    return KVCache(CacheConfig(**{**SHAPE, **fields}, layer_groups=groups))


def windows_of(groups, num_layers=3):
    """The `window_size` of each layer; all layers keep all tokens if there are no ``groups``."""
    windows = [(-1, -1)] * num_layers
    for group in groups:
        for layer in np.ravel(group["layers"]):
            windows[layer] = (group["window"] - 1, 0) if "window" in group else (-1, -1)
    return windows


def held_of(cache, seq, layer):
    """Slots that a sequence holds for a layer."""
    (group,) = (one for one in cache._state.groups if layer in one.layers.layers)
    row = int(cache._state.rows_of([seq], (1,))[0])
    return 8 * int(group.table.info[row, 3] - first_held(group.table, row))


class Twins:
    """A cache with groups and one without, to which the same happens."""

    def __init__(self, groups, **fields):
        self.rng = np.random.default_rng(0)
        self.windows = windows_of(groups)
        self.caches = [make(groups, **fields), make(None, **fields)]
        self.ids = [cache.open([[]] * 3)[0] for cache in self.caches]

    def step(self, counts, **options):
        """Both compute the same tokens, to the bit; all three sequences have part in it."""
        steps = [cache.begin_step(ids, counts) for cache, ids in zip(self.caches, self.ids, strict=True)]
        assert all(step.ok.all() for step in steps)
        total = sum(counts)
        for layer, window in enumerate(self.windows):
            q = self.rng.standard_normal((total, 4, 16), np.float32)
            key, value = self.rng.standard_normal((2, total, 2, 16), np.float32)
            results = []
            for step in steps:
                step.append(layer, key, value)
                results.append(step.attend(layer, q, window_size=window, **options))
            np.testing.assert_array_equal(*results)
        for cache, step in zip(self.caches, steps, strict=True):
            cache.end_step(step)

    def both(self, call):
        for cache, ids in zip(self.caches, self.ids, strict=True):
            call(cache, ids)
            cache.check_integrity()


@pytest.mark.parametrize("window", [1, 7, 8, 9, 20, 63, 64, 65, 200])
@pytest.mark.parametrize("fields", [{}, {"growth": "append"}, {"allocator": "paged", "growth": "fixed64"}])
def test_outputs_are_to_the_bit_those_of_a_cache_that_frees_nothing(window, fields):
    twins = Twins([{"layers": [0, 2], "window": window}, {"layers": 1}], **fields)
    twins.step([100, 3, 64])
    for _ in range(40):
        twins.step([1, 1, 1])
    twins.step([5, 0, 300], softcap=10.0, sinks=np.linspace(-1, 1, 4, dtype=np.float32))
    twins.both(lambda cache, ids: cache.truncate(ids, cache.lengths(ids) - [4, 0, 299]))
    twins.step([1, 2, 9], num_splits=2)
    twins.both(lambda cache, ids: cache.reorder(ids, [0, 0, 2]))
    twins.step([17, 3, 1], alibi_slopes=np.linspace(0.1, 1, 4, dtype=np.float32))
    twins.both(lambda cache, ids: cache.preempt(ids[1:], "host"))
    twins.both(lambda cache, ids: cache.restore(ids[1:]))
    twins.both(lambda cache, ids: cache.compact(1 << 20))
    for _ in range(9):
        twins.step([1, 2, 3])


@pytest.mark.parametrize("window", [1, 20, 64])
@pytest.mark.parametrize(("growth", "slack"), [("append", 13), ("fixed8", 13), ("adaptive", 69), ("fixed64", 69)])
def test_a_window_bounds_what_a_sequence_holds_at_every_step(window, growth, slack):
    cache = make([{"layers": [0, 2], "window": window}, {"layers": 1}], growth=growth)
    (seq,), _ = cache.open([[]])
    rng = np.random.default_rng(window)
    for _ in range(200):
        count = int(rng.choice([1, 1, 1, 2, 9, 30]))
        length = int(cache.lengths([seq])[0])
        step = cache.begin_step([seq], count)
        assert step.ok.all()
        cache.end_step(step)
        assert held_of(cache, seq, 0) == cache.stats().groups[0].used
        assert held_of(cache, seq, 0) <= min(window + count + slack, length + count + slack)
    assert held_of(cache, seq, 1) >= cache.lengths([seq])[0] > 500


def test_a_cache_with_a_window_alone_goes_on_after_its_pool_has_been_written_many_times():
    cache = make([{"layers": range(3), "window": 50}], num_tokens=256)
    ids, _ = cache.open([[]] * 2)
    for _ in range(300):
        step = cache.begin_step(ids, 7)
        assert step.ok.all()
        cache.end_step(step)
    assert cache.lengths(ids).tolist() == [2100, 2100]
    cache.check_integrity()


def test_a_row_without_room_in_one_group_gets_none_in_any():
    own = [{**group, "num_tokens": size} for group, size in zip(MIXED, (192, 2048), strict=True)]
    cache = make(own, num_tokens=None, growth="append")
    ids, _ = cache.open([[]] * 3)
    step = cache.begin_step(ids, [100, 500, 60])
    assert step.ok.tolist() == [True, False, True]
    assert step.seq_lens.tolist() == [100, 0, 60]
    assert "192" in step.explain()[0]
    for layer in range(3):
        tables = step.tables_of(layer)
        assert tables.seq_lens.tolist() == [100, 0, 60]
        assert (tables.slot_mapping[100:600] == -1).all()
        assert (tables.slot_mapping[:100] >= 0).all()
    assert [group.used for group in cache.stats().groups] == [168, 168]  # nothing is kept for the second row
    cache.end_step(step)
    assert cache.lengths(ids).tolist() == [100, 0, 60]
    cache.check_integrity()
    # the other way round: the second group is the full one
    own = [{**group, "num_tokens": size} for group, size in zip(MIXED, (2048, 192), strict=True)]
    cache = make(own, num_tokens=None, growth="append", max_seq_len=192)
    ids, _ = cache.open([[]] * 3)
    step = cache.begin_step(ids, [100, 150, 60])
    assert step.ok.tolist() == [True, False, True]
    assert [group.used for group in cache.stats().groups] == [168, 168]
    cache.abort_step(step)
    cache.check_integrity()


def test_rejected_tokens_are_cut_off_right_after_their_step_but_never_below_what_was_freed():
    cache = make(MIXED)
    (seq,), _ = cache.open([[]])
    for count in (100, 30):
        cache.end_step(cache.begin_step([seq], count))
    cache.truncate([seq], [100])  # the next step would have freed more
    held = held_of(cache, seq, 0)
    message = (
        r"new_lens\[0\]: expected 0 or at least 99, since layers with a window of 20 hold nothing before token 80 any "
        r"more, got 98; truncate to 0"
    )
    with pytest.raises(ArgumentError, match=message):
        cache.truncate([seq], [98])
    assert (cache.lengths([seq]), held_of(cache, seq, 0)) == ([100], held)
    cache.truncate([seq], [99])
    cache.check_integrity()
    cache.truncate([seq], [0])
    assert held_of(cache, seq, 0) == held_of(cache, seq, 1) == 0
    cache.end_step(cache.begin_step([seq], 100))
    cache.check_integrity()


@pytest.mark.parametrize(
    "groups",
    [
        [{"layers": 0, "window": 64}, {"layers": [1, 2], "window": 1}],
        [{"layers": 0, "window": 1}, {"layers": 1}, {"layers": 2, "window": 64}],
        [{"layers": 0, "chunk": 48}, {"layers": [1, 2], "window": 40}],
        [{"layers": 0, "chunk": 48}, {"layers": [1, 2], "chunk": 64}],
    ],
)
@pytest.mark.parametrize("num_steps", [70, 97, 151])
def test_a_refused_length_comes_with_the_least_that_all_groups_accept(groups, num_steps):
    cache = make(groups)
    seq_ids, _ = cache.open([[]])
    for _ in range(num_steps):
        cache.end_step(cache.begin_step(seq_ids, 1))
    named, accepted = set(), set()
    for length in range(1, num_steps + 1):
        child = cache.fork(seq_ids, 1).ravel()
        try:
            cache.truncate(child, [length])
            accepted.add(length)
        except ArgumentError as error:
            named.add(int(re.search(r"at least (\d+)", str(error))[1]))
        cache.close(child)
    assert named == {min(accepted)}
    assert accepted == set(range(min(accepted), num_steps + 1))


def test_reading_frees_nothing():
    cache = make(MIXED)
    (seq,), _ = cache.open([[]])
    cache.end_step(cache.begin_step([seq], 100))
    before = held_of(cache, seq, 0)
    cache.end_step(cache.begin_step([seq], 0))
    assert held_of(cache, seq, 0) == before
    cache.truncate([seq], [3])


def test_what_a_fork_or_a_lease_still_sees_is_not_freed():
    cache = make(MIXED, growth="append")
    (seq,), _ = cache.open([[]])
    cache.end_step(cache.begin_step([seq], 96))
    child = cache.fork([seq], 1).ravel()
    lease = cache.pin([seq])
    for _ in range(5):
        cache.end_step(cache.begin_step([seq], 30))
    assert held_of(cache, int(child[0]), 0) == 96
    used = cache.stats().groups[0].used
    cache.check_integrity()
    cache.close(child)
    assert cache.stats().groups[0].used == used  # the lease holds the same
    lease.abort()
    assert cache.stats().groups[0].used == held_of(cache, seq, 0)
    cache.check_integrity()


def test_only_what_a_window_holds_is_copied_to_the_host():
    cache = make(MIXED, growth="append")
    (seq,), _ = cache.open([[]])
    for _ in range(10):
        cache.end_step(cache.begin_step([seq], 30))
    held = [held_of(cache, seq, layer) for layer in (0, 1)]
    cache.preempt([seq], "host")
    (saved,) = cache._state.preempted.values()
    assert 8 * len(saved.copies) == held[1]  # the group that keeps all tokens leads
    assert 8 * len(saved.others[0].copies) == held[0]
    assert cache.stats().used == 0
    assert not cache.restore([seq], keep_free=8192).all()  # too much for the group without a window
    cache.check_integrity()
    assert cache.stats().used == 0
    assert cache.restore([seq], keep_free=4096).all()  # for the window group that is a window
    for layer in (0, 1):
        assert held[layer] <= held_of(cache, seq, layer) < held[layer] + 64  # in blocks of any size
    cache.check_integrity()


def test_figures_are_by_group_and_in_sum():
    cache = make(MIXED)
    ids, _ = cache.open([[]] * 2)
    cache.end_step(cache.begin_step(ids, [64, 128]))
    stats = cache.stats()
    window, full = stats.groups
    assert (window.layers, window.window, full.layers, full.window) == ((0, 2), 20, (1,), 0)
    assert full.capacity == 8192
    assert window.used == full.used == 192
    assert stats.used == 384
    assert stats.num_tokens == 192
    assert stats.waste == 0
    assert (stats.entries_per_seq, stats.blocks) == (3, {64: 6})
    assert window.nbytes == 2 * stats.groups[0].capacity * 2 * 2 * 16 * 4
    assert stats.nbytes == window.nbytes + full.nbytes
    (only,) = make(None).stats().groups
    assert (only.layers, only.window, only.capacity) == ((0, 1, 2), 0, 8192)


def test_attention_beyond_the_window_of_a_layer_is_refused():
    cache = make(MIXED)
    ids, _ = cache.open([[]])
    x, q = np.zeros((4, 2, 16), np.float32), np.zeros((4, 4, 16), np.float32)
    with cache.begin_step(ids, 4) as step:
        for layer in (0, 1):
            step.append(layer, x, x)
        step.attend(1, q)
        step.attend(0, q, window_size=(19, 0))
        step.attend(0, q, window_size=(3, 0))
        expected = r"window_size: expected \(0 to 19, right\) for layer 0, which keeps 20 tokens \(layer_groups\), got "
        for options, got in (({}, r"\(-1, -1\)"), ({"window_size": (20, 0)}, r"\(20, 0\)")):
            with pytest.raises(ArgumentError, match=expected + got):
                step.attend(0, q, **options)
        with pytest.raises(ShapeError, match="window_size: expected .* two integers"):
            step.attend(0, q, window_size=5)
        with pytest.raises(StepError, match="layer: expected one that this step has appended to, got 2"):
            step.attend(2, q, window_size=(19, 0))
        with pytest.raises(ArgumentError, match="layer: expected 0 to 2, got 3"):
            step.append(3, x, x)
        with pytest.raises(StepError, match="got none for layer 2"):
            cache.end_step(step)
        step.append(2, x, x)
        cache.end_step(step)
    assert cache.lengths(ids).tolist() == [4]


def test_layers_of_a_group_repeat_what_the_layer_before_did():
    cache = make(MIXED)
    ids, _ = cache.open([[]] * 2)
    x = np.random.default_rng(0).standard_normal((3, 6, 2, 16), np.float32)
    q, out = np.random.default_rng(1).standard_normal((3, 6, 4, 16), np.float32), np.zeros((3, 6, 4, 16), np.float32)
    with cache.begin_step(ids, 3) as step:
        step.append(0, x[0], x[0])
        step.attend(0, q[0], window_size=(19, 0), out=out[0])
        at = [one[2].ctypes.data for one in (x, x, q, out)]
        assert not step.attend_prepared(1, *at)  # which is in another group
        assert step.attend_prepared(2, *at)
        step.append(1, x[1], x[1])
        step.attend(1, q[1], out=out[1])
        assert not step.attend_prepared(2, *at)  # the layer before had no window
        step.attend(0, q[0], window_size=(19, 0), out=out[0])
        assert step.attend_prepared(2, *at)
        assert isinstance(step._calls, GroupCalls)
        assert step._calls.layers == 0b111
        np.testing.assert_array_equal(step.attend(2, q[2], window_size=(19, 0)), out[2])


def test_kernels_of_ones_own_find_the_tables_of_each_layer():
    cache = make(MIXED, growth="append")
    (seq,), _ = cache.open([[]])
    rng = np.random.default_rng(0)
    for _ in range(4):
        with cache.begin_step([seq], 30) as step:
            for layer in range(3):
                x, q = rng.standard_normal((2, 30, 2, 16), np.float32)
                step.append(layer, x, x)
            cache.end_step(step)
    with cache.begin_step([seq], 1) as step:
        q = np.zeros((1, 4, 16), np.float32)
        full, window = step.tables_of(1), step.tables_of(2)
        caches = cache.key_cache(1), cache.value_cache(1)
        variable_block_attention(q, *caches, full.block_table, full.block_starts, full.seq_lens)
        assert window.block_starts[0, 0] == (120 - 19) // 8
        with pytest.raises(ShapeError, match="block_starts"):  # which begin with the first granule held
            variable_block_attention(q, *caches, window.block_table, window.block_starts, window.seq_lens)
    assert cache.key_cache(0).shape[0] < cache.key_cache(1).shape[0]


def test_a_cache_with_one_group_of_all_layers_has_the_snapshots_of_one_without_groups():
    data = make(None).snapshot()
    one = make([{"layers": range(3)}])
    KVCache.from_snapshot(one.config, data).check_integrity()
    KVCache.from_snapshot(make(None).config, one.snapshot()).check_integrity()


# -- chunks ----------------------------------------------------------------------------------------------------------

CHUNKED = [{"layers": [0, 2], "chunk": 40}, {"layers": 1}]


@pytest.mark.parametrize("fields", [{}, {"growth": "append"}, {"allocator": "paged", "growth": "fixed64"}])
def test_layers_in_chunks_attend_as_if_each_chunk_were_a_sequence(fields):
    cache, rng = make(CHUNKED, **fields), np.random.default_rng(0)
    ids, _ = cache.open([[]] * 3)
    chunks = [make(None) for _ in ids]  # a sequence for each chunk, in a cache for each sequence
    places = [list(one.open([[]] * 12)[0]) for one in chunks]
    lengths = [0, 0, 0]
    for counts in ([39, 5, 100], [1, 0, 20], [1, 40, 1], [0, 35, 41], [3, 1, 90], *[[1, 1, 1]] * 45, [7, 80, 2]):
        total = sum(counts)
        q, (key, value) = (
            rng.standard_normal((total, 4, 16), np.float32),
            rng.standard_normal((2, total, 2, 16), np.float32),
        )
        expected = np.zeros_like(q)
        first = 0
        for i, count in enumerate(counts):
            position = lengths[i]
            while position < lengths[i] + count:
                stop = min(position - position % 40 + 40, lengths[i] + count)
                at = slice(first + position - lengths[i], first + stop - lengths[i])
                with chunks[i].begin_step([places[i][position // 40]], stop - position) as step:
                    for layer in range(3):
                        step.append(layer, key[at], value[at])
                    expected[at] = step.attend(0, q[at], softcap=5.0)
                    chunks[i].end_step(step)
                position = stop
            first += count
            lengths[i] += count
        with cache.begin_step(ids, counts) as step:
            assert step.ok.all()
            for layer in range(3):
                step.append(layer, key, value)
            np.testing.assert_array_equal(step.attend(0, q, softcap=5.0), expected)
            np.testing.assert_array_equal(step.attend(2, q, softcap=5.0), expected)
            step.attend(1, q)
            cache.end_step(step)
        cache.check_integrity()
        assert all(held_of(cache, int(seq), 0) <= 40 + max(counts) + 63 for seq in ids)
    assert lengths[2] > 280


def test_rows_without_room_have_no_keys_in_their_chunk():
    own = [{**group, "num_tokens": size} for group, size in zip(CHUNKED, (128, 2048), strict=True)]
    cache = make(own, num_tokens=None, growth="append")
    ids, _ = cache.open([[]] * 2)
    with cache.begin_step(ids, [200, 50]) as step:
        assert step.ok.tolist() == [False, True]
        x, q = np.ones((250, 2, 16), np.float32), np.ones((250, 4, 16), np.float32)
        step.append(0, x, x)
        out = step.attend(0, q)
        assert (out[:200] == 0).all()
        assert (out[200:] == 1).all()
        tables = step.tables_of(0)
        assert tables.seq_lens.tolist() == [0, 40, 10]
        assert tables.cu_seqlens_q.tolist() == [0, 200, 240, 250]


def test_a_chunk_is_cut_only_where_it_is_still_held():
    cache = make(CHUNKED)
    (seq,), _ = cache.open([[]])
    for count in (100, 1):
        cache.end_step(cache.begin_step([seq], count))
    cache.truncate([seq], [80])
    with pytest.raises(
        ArgumentError, match=r"at least 80, since layers with chunks of 40 hold nothing before token 80"
    ):
        cache.truncate([seq], [79])
    cache.preempt([seq], "host")
    assert cache.restore([seq]).all()
    cache.check_integrity()
