"""Steps that the device drives, in host memory: kernels of ``cuda_src`` by g++, attention of the CPU."""

import contextlib
import gc
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtoolkit import ArgumentError, CacheFullError, DeviceSteps, SequenceError, StepError, UnsupportedError
from kvtoolkit.cache.state import growing
from kvtoolkit.config.growth import names
from kvtoolkit.formats.entry import unpack_entries
from tests.kvtoolkit.cache.forms import cut, form_of
from tests.kvtoolkit.cache.host_device import make_cache, use_host
from tests.kvtoolkit.cache.test_interruptions import Interrupted, LineBreaker
from tests.kvtoolkit.cuda.host_kernels import HostLaunch, needs_compiler

pytestmark = needs_compiler
LAYERS = 2
TIERS = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 64, "cold": "int4"}
WINDOW = [{"layers": [0], "num_tokens": 2048}, {"layers": [1], "window": 24, "num_tokens": 2048}]


@pytest.fixture(autouse=True, scope="module")
def host():
    with pytest.MonkeyPatch.context() as patch:
        use_host(patch)
        yield


def prefill(cache, prompts, ids=None):
    """Open sequences with these prompts, of tokens whose keys and values are functions of token and layer."""
    if ids is None:
        ids, held = cache.open(prompts)
        assert not held.any()
    with cache.begin_step(ids, [len(prompt) for prompt in prompts]) as step:
        assert step.ok.all()
        tokens = np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])
        for layer in range(LAYERS):
            step.append(layer, *keys_of(tokens, layer, cache.config.head_dim))
        cache.end_step(step, tokens)
    return ids


def keys_of(tokens, layer, head_dim=8):
    grid = np.sin(tokens[:, None, None] * (1 + np.arange(head_dim)) + layer)
    return grid.astype(np.float32), np.cos(3 * grid).astype(np.float32)


def run(step, tokens, head_dim=8, windows=(0, 24)):
    """A model of two layers: results of the last one, and the next token of each row."""
    x = keys_of(tokens, 7, head_dim)[0]
    for layer, window in enumerate(windows):
        step.append(layer, *keys_of(tokens, layer, head_dim))
        x = x + step.attend(layer, x, window_size=(window - 1, 0) if window else (-1, -1))
    return x, (np.abs(x[:, 0, 0]) * 1000).astype(np.int64) % 97


def tails_of(tables, rows):
    """Where rows end by their entries: granules, entries, first token of the last entry, its slot minus its number."""
    found = []
    for row in rows:
        entries, starts = np.asarray(tables.block_table[row]), np.asarray(tables.block_starts[row])
        count = int((entries >= 0).sum())
        assert (entries[count:] == -1).all()
        granules, lengths, _ = unpack_entries(entries[count - 1 : count])
        first = starts[count - 1]
        found.append([first + lengths[0], count, 8 * first, 8 * (granules[0] - first)])
    return found


class Twins:
    """Two equal caches, of which one is driven by the host and the other by the device."""

    def __init__(self, prompts, max_steps=16, window=24, **options):
        groups = options.get("layer_groups", WINDOW)
        self.windows = (groups[0].get("window", 0), window)
        self.caches = [make_cache(**options) for _ in range(2)]
        self.ids = [prefill(cache, prompts) for cache in self.caches]
        self.steps = DeviceSteps(self.caches[1], len(prompts) + 1, max_steps)
        self.tokens = np.arange(len(prompts)) + 5
        # the host uses what rows have left again at once, so its free memory is in other places
        has_moves = options.get("growth") == "lazy_merge" or {"tiers", "layer_groups"} & set(options)
        self.may_join = bool(has_moves) or options.get("allocator") == "paged"

    def turn(self, num_steps, stops, max_lens):
        """Run both; everything must be equal at every step."""
        by_host, by_device = self.caches
        num, head_dim = len(self.tokens), by_host.config.head_dim
        self.steps.load(self.ids[1], self.tokens, num_steps, max_lens=max_lens)
        tokens, finished, history = self.tokens.copy(), np.zeros(num, bool), [[] for _ in range(num)]
        for i in range(num_steps):
            run_of_device = self.steps.begin()
            padded = np.asarray(self.steps.tokens)
            out, chosen = run(run_of_device, padded, head_dim, self.windows)
            is_ok = np.asarray(self.steps.status) == 0
            assert not is_ok[num:].any()
            wanted = ~finished & (by_host.lengths(self.ids[0]) < max_lens)
            assert is_ok[:num].tolist() == wanted.tolist()
            some = np.flatnonzero(wanted)
            if len(some):
                with by_host.begin_step(self.ids[0][some], 1) as step:
                    assert step.ok.all()
                    expected, _ = run(step, tokens[some], head_dim, self.windows)
                    assert (out[some] == expected).all()
                    fixed = [one.tables for one in self.steps._graph_step._fixed]
                    for group, (own, layer) in enumerate(zip(fixed, range(LAYERS), strict=False)):
                        theirs = step.tables_of(layer)
                        assert np.asarray(own.seq_lens)[some].tolist() == theirs.seq_lens.tolist()
                        assert np.asarray(self.steps._of_groups[group][0])[some].tolist() == tails_of(own, some)
                        found, expected_forms = form_of(own, num), form_of(theirs, len(some))
                        found = [found[row] for row in some]
                        if self.may_join:
                            found, expected_forms = map(cut, (found, expected_forms))
                        assert found == expected_forms
                    by_host.end_step(step, tokens[some])
            for row in some:
                history[row].append(int(tokens[row]))
            tokens[some] = chosen[some]
            self.steps.tokens[:] = np.where(is_ok, chosen, padded)
            finished |= stops[:, i]
            self.steps.finished[:num] |= stops[:, i]
        turn = self.steps.finish()
        assert turn.next_tokens.tolist() == tokens.tolist()
        assert turn.num_new.tolist() == list(map(len, history))
        for row, own in enumerate(history):
            assert turn.history[row, : len(own)].tolist() == own
        assert turn.finished.tolist() == finished.tolist()
        self.tokens = tokens
        assert by_host.lengths(self.ids[0]).tolist() == by_device.lengths(self.ids[1]).tolist()
        for cache in self.caches:
            cache.check_integrity()
        stats = by_device.stats()
        assert stats.callers == 0
        assert stats.num_tokens == by_host.stats().num_tokens


@pytest.mark.parametrize("growth", sorted(set(names()) & {"fixed8", "fixed16", "fixed64", "append", "proportional",
                                                          "lazy_merge", "adaptive"}))  # fmt: skip
@pytest.mark.parametrize("allocator", ["buddy", "slab"])
def test_policies_grow_as_they_do_by_the_host(growth, allocator):
    sizes = [8 * abs(int(growth[5:]) // 8)] if growth.startswith("fixed") else [8, 16, 32, 64]
    rng = np.random.default_rng(len(growth))
    prompts = [rng.integers(0, 97, n).tolist() for n in (1, 8, 63, 120, 250)]
    twins = Twins(prompts, num_tokens=4096, growth=growth, allocator=allocator, block_sizes=sizes)
    for _ in range(4):
        stops = rng.random((5, 16)) < 0.03
        twins.turn(16, stops, np.full(5, 1 << 20))
    # and later prompts find the same
    found = [cache.open([prompt + [5, 6, 7] * 20 for prompt in prompts])[1].tolist() for cache in twins.caches]
    assert found[0] == found[1]
    assert max(found[0]) > 0


@pytest.mark.parametrize("growth", ["fixed8", "fixed64", "proportional", "lazy_merge", "adaptive"])
@pytest.mark.parametrize(
    "tiers",
    [
        TIERS, TIERS | {"pinned_tokens": 64, "hot": 128}, TIERS | {"warm_tokens": 0},
        {"hot": 64, "pinned_tokens": 0, "warm": "int8"}, {"hot": 64, "pinned_tokens": 64, "cold": "int4"},
    ],
    ids=str,
)  # fmt: skip
def test_tiles_move_at_the_steps_at_which_the_host_moves_them(growth, tiers):
    """Old tiles of a long prompt a few at a time, those of several rows by age, and new ones when they are due."""
    prompts = [[(7 * i + 3 * k) % 97 for k in range(n)] for i, n in enumerate((1, 63, 64, 900, 1400))]
    twins = Twins(prompts, 64, num_tokens=1 << 15, head_dim=64, growth=growth, tiers=tiers, prefix_caching=False)
    for i in range(4):
        held = twins.caches[0].lengths(twins.ids[0])
        twins.turn(64, np.zeros((5, 64), bool), held + (1 << 20 if i < 3 else np.array([64, 64, 64, 9, 0])))
    by_host, by_device = (cache.stats() for cache in twins.caches)
    assert by_device.converted_tokens == by_host.converted_tokens > 0
    assert by_device.num_merges == by_host.num_merges
    assert (by_device.num_merges > 0) == (growth == "lazy_merge")


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_drawn_turns_equal_steps_of_the_host(data):
    options = data.draw(
        st.sampled_from(
            [
                {"growth": "adaptive", "num_tokens": 1536},  # thresholds of free memory are passed
                {"growth": "proportional", "num_tokens": 2048, "block_sizes": [8, 64]},
                {"growth": "fixed16", "num_tokens": 2048, "allocator": "paged", "block_sizes": [16]},
                {"growth": "lazy_merge", "layer_groups": WINDOW},
                {"growth": "fixed8", "layer_groups": WINDOW},
                {"growth": "fixed8", "num_tokens": 8192, "head_dim": 64, "tiers": TIERS},
                {"growth": "lazy_merge", "num_tokens": 8192, "head_dim": 64, "tiers": TIERS | {"pinned_tokens": 64}},
            ]
        )
    )
    num = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=num, max_size=num))
    prompts = [[(7 * i + 3 * k) % 97 for k in range(n)] for i, n in enumerate(lengths)]
    HostLaunch.seed = data.draw(st.integers(0, 3))
    twins = Twins(prompts, **options)
    for _ in range(data.draw(st.integers(1, 3))):
        num_steps = data.draw(st.integers(1, 16))
        stops = np.array([[data.draw(st.integers(0, 19)) == 0 for _ in range(num_steps)] for _ in prompts])
        held = twins.caches[0].lengths(twins.ids[0])
        max_lens = held + data.draw(st.lists(st.integers(0, 20), min_size=num, max_size=num))
        twins.turn(num_steps, stops, max_lens)


@pytest.mark.parametrize("growth", ["adaptive", "fixed8", "proportional"])
def test_refilled_turns_equal_one_long_turn(growth):
    """And what was polled is how far the device was by then."""
    found = []
    for pieces in ([64], [16, 8, 40], [1] * 64):
        cache = make_cache(num_tokens=1024, growth=growth)
        ids = prefill(cache, [[1] * 20, [2] * 64, [3]])
        steps = DeviceSteps(cache, 4, 64)
        assert steps.load(ids, [1, 2, 3], pieces[0], max_lens=[500, 90, 500]) is None
        assert steps.poll() is None
        num_new = []
        for i, piece in enumerate(pieces):
            if i:
                steps.refill(piece)
            for _ in range(piece):
                _, chosen = run(steps.begin(), np.asarray(steps.tokens))
                steps.tokens[:] = np.where(np.asarray(steps.status) == 0, chosen, steps.tokens)
            num_new.append(steps.poll().num_new.tolist())
        assert cache.stats().callers > 0
        turn = steps.finish()
        assert num_new[0] == [0, 0, 0]  # asked for before the first step
        ends = np.cumsum([0, *pieces])[:-1]
        assert num_new == [[end, min(end, 26), end] for end in ends.tolist()]
        cache.check_integrity()
        assert cache.stats().callers == 0
        found.append([part.tolist() for part in turn] + [cache.stats().blocks, cache.stats().used])
    assert found[0] == found[1] == found[2]


def test_refill_and_poll_refuse_what_they_cannot_do():
    cache = make_cache(num_tokens=512)
    ids = prefill(cache, [[1] * 8])
    steps = DeviceSteps(cache, 1, 8)
    for call in (lambda: steps.refill(1), steps.poll):
        with pytest.raises(StepError, match="load"):
            call()
    steps.load(ids, [1], 5)
    for wrong in (0, 4, True, 1.0):
        with pytest.raises(ArgumentError, match="max_steps"):
            steps.refill(wrong)
    steps.refill(3)
    steps.abort()
    cache.check_integrity()
    assert cache.stats().callers == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_tokens": 4096, "growth": "adaptive"}, {"num_tokens": 4096, "growth": "fixed8"},
        {"num_tokens": 4096, "growth": "proportional", "block_sizes": [8, 64]}, {"layer_groups": WINDOW},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("each", [2, 5, 9])
def test_tokens_that_are_not_kept_are_as_truncated_ones(options, each):
    """Steps of several tokens, some of which stay, equal steps of the host that are truncated."""
    rng, num = np.random.default_rng(each), 5
    prompts = [rng.integers(0, 97, n).tolist() for n in (1, 8, 23, 62, 100)]
    by_host, by_device = (make_cache(**options) for _ in range(2))
    ids = [prefill(cache, prompts) for cache in (by_host, by_device)]
    steps = DeviceSteps(by_device, num + 1, 8, num_new_tokens=each)
    first = rng.integers(0, 97, num)
    for _ in range(3):
        steps.load(ids[1], first)
        fed = [[] for _ in range(num)]
        for _ in range(8):
            tokens = np.asarray(steps.tokens).reshape(num + 1, each)
            tokens[:, 1:] = (tokens[:, :1] + 7 * np.arange(1, each)) % 97  # drafts
            out, chosen = run(steps.begin(), tokens.ravel())
            assert (np.asarray(steps.status) == [0] * num + [4]).all()
            kept = rng.integers(1, each + 1, num)
            held = by_host.lengths(ids[0])
            own = tokens[:num].ravel().copy()
            with by_host.begin_step(ids[0], each) as step:
                expected, _ = run(step, own)
                by_host.end_step(step, own)
            by_host.truncate(ids[0], held + kept)
            assert (out[: num * each] == expected).all()
            assert (
                np.asarray(steps.positions)[: num * each].tolist() == (held[:, None] + np.arange(each)).ravel().tolist()
            )
            for row in range(num):
                fed[row] += tokens[row, : kept[row]].tolist()
                tokens[row, 0] = chosen.reshape(num + 1, each)[row, kept[row] - 1]
            steps.kept[:num] = kept
        first = np.asarray(steps.tokens).reshape(num + 1, each)[:num, 0].copy()
        turn = steps.finish()
        assert turn.next_tokens.tolist() == first.tolist()
        assert [turn.history[row, :n].tolist() for row, n in enumerate(turn.num_new)] == fed
        assert by_device.lengths(ids[1]).tolist() == by_host.lengths(ids[0]).tolist()
        by_device.check_integrity()
        assert by_device.stats().callers == 0


def test_what_is_kept_is_said_in_each_step():
    cache = make_cache(num_tokens=512)
    ids = prefill(cache, [[1] * 8])
    steps = DeviceSteps(cache, 1, 8, num_new_tokens=4)
    steps.load(ids, [1])
    for kept in (3, None, 2):
        run(steps.begin(), np.asarray(steps.tokens))
        if kept is not None:
            steps.kept[:] = kept
    assert steps.finish().num_new.tolist() == [5]
    cache.check_integrity()


def test_a_row_without_room_for_all_its_tokens_ends():
    cache = make_cache(num_tokens=512)
    ids = prefill(cache, [[1] * 8, [2] * 8])
    steps = DeviceSteps(cache, 2, 4, num_new_tokens=4)
    steps.load(ids, [1, 2], max_lens=[19, 100])
    for _ in range(5):
        run(steps.begin(), np.asarray(steps.tokens))
        steps.kept[:] = 4
    turn = steps.finish()
    assert turn.num_new.tolist() == [8, 16]
    assert turn.status.tolist() == [3, 5]
    cache.check_integrity()


def test_tiers_move_between_turns():
    tiers = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "cold": "int4"}
    cache = make_cache(num_tokens=4096, head_dim=64, tiers=tiers)
    ids, _ = cache.open([[], []])
    with cache.begin_step(ids, 300) as step:
        x = np.random.default_rng(0).standard_normal((600, 1, 64)).astype(np.float32)
        for layer in range(LAYERS):
            step.append(layer, x, x)
        cache.end_step(step)
    steps = DeviceSteps(cache, 2, 32)
    before = cache.stats().converted_tokens
    for _ in range(4):
        steps.load(ids, [1, 2])
        for _ in range(32):
            run_of_device = steps.begin()
            for layer in range(LAYERS):
                run_of_device.append(layer, x[:2], x[:2])
                assert np.isfinite(run_of_device.attend(layer, x[:2])).all()
        assert steps.finish().num_new.tolist() == [32, 32]
        cache.check_integrity()
    assert cache.lengths(ids).tolist() == [428, 428]
    assert cache.stats().converted_tokens > before


def test_rows_without_memory_stall_and_go_on_later():
    cache = make_cache(num_tokens=64, growth="fixed8", block_sizes=[8])
    ids = prefill(cache, [[1] * 16, [2] * 16, [3] * 16])
    steps = DeviceSteps(cache, 3, 16)
    steps.load(ids, [1, 2, 3], 16)  # 16 slots are free, and 48 are wanted
    for _ in range(16):
        _, chosen = run(steps.begin(), np.asarray(steps.tokens))
        is_ok = np.asarray(steps.status) == 0
        steps.tokens[:] = np.where(is_ok, chosen, steps.tokens)
    assert cache.stats().callers == 16
    turn = steps.finish()
    assert turn.num_new.tolist() == [8, 8, 0]
    assert turn.status.tolist() == [1, 1, 1]
    assert cache.stats().callers == 0
    cache.check_integrity()
    cache.close(ids[:1])
    steps.load(ids[1:], turn.next_tokens[1:], 16)
    for _ in range(16):
        _, chosen = run(steps.begin(), np.asarray(steps.tokens))
        steps.tokens[:] = np.where(np.asarray(steps.status) == 0, chosen, steps.tokens)
    assert steps.finish().num_new.tolist() == [16, 8]
    cache.check_integrity()


def test_cached_prefixes_make_way():
    cache = make_cache(num_tokens=64, growth="fixed8", block_sizes=[8])
    cache.close(prefill(cache, [list(range(48))]))
    assert cache.stats().cached == 48
    ids = prefill(cache, [[1] * 8])
    steps = DeviceSteps(cache, 1, 32)
    steps.load(ids, [1], 32)
    for _ in range(32):
        run(steps.begin(), np.asarray(steps.tokens))
    assert steps.finish().num_new.tolist() == [32]
    cache.check_integrity()


def test_rows_with_more_entries_than_the_tables_write_to_their_own_slots():
    cache = make_cache(num_tokens=512, growth="fixed8", block_sizes=[8])
    ids = prefill(cache, [[1] * 4, [2] * 4])
    for length in range(16, 130, 8):  # room in turn, so that each granule is an entry
        for seq in ids:
            cache.abort_step(cache.begin_step([seq], length - 4))
    steps = DeviceSteps(cache, 2, 16, max_seq_len=16)
    steps.load(ids, [1, 2])
    for i in range(12):
        run(steps.begin(), np.asarray(steps.tokens))
        with_granules = cache._group.table.entries[:2, (4 + i) // 8] & 0xFFFFFF
        assert steps._graph_step.tables.slot_mapping.tolist() == (8 * with_granules + (4 + i) % 8).tolist()
    run(steps.begin(), np.asarray(steps.tokens))
    turn = steps.finish()
    assert (turn.num_new.tolist(), turn.status.tolist()) == ([12, 12], [3, 3])
    cache.check_integrity()


def replay(steps, count):
    """Run the model some times, as replays of a graph do."""
    for _ in range(count):
        _, chosen = run(steps.begin(), np.asarray(steps.tokens), steps._cache.config.head_dim)
        steps.tokens[:] = np.where(np.asarray(steps.status) == 0, chosen, steps.tokens)


@pytest.mark.parametrize(("growth", "length"), [("fixed8", 8), ("proportional", 136)])  # one block at once, and two
def test_full_rows_leave_blocks_to_others(growth, length):
    cache = make_cache(num_tokens=2048, growth=growth, block_sizes=[8], max_entries=6)
    ids = prefill(cache, [[1] * length, [2] * length, [3] * 8])
    steps = DeviceSteps(cache, 3, 128)
    steps.load(ids, [1, 2, 3], 120, max_lens=[1000, 1000, 25])
    replay(steps, 120)
    turn = steps.finish()
    assert turn.status.tolist() == [2, 2, 3]
    assert turn.num_new[2] == 17
    cache.check_integrity()


def test_entries_are_used_up_as_by_the_host():
    options = {"num_tokens": 2048, "growth": "fixed8", "block_sizes": [8], "max_entries": 3}
    found = []
    for by_device in (False, True):
        cache = make_cache(**options)
        ids = prefill(cache, [[1] * 8])
        if by_device:
            steps = DeviceSteps(cache, 1, 256)
            steps.load(ids, [1])
            replay(steps, 256)
            turn = steps.finish()
            assert turn.status.tolist() == [2]
            found.append(int(turn.num_new[0]))
            continue
        for count in range(256):
            with cache.begin_step(ids, 1) as step:
                if not step.ok[0]:
                    found.append(count)
                    break
                cache.end_step(step, [1])
    assert found == [184, 184]  # three entries of eight granules that follow each other


@pytest.mark.parametrize(
    "options",
    [
        {"growth": "fixed64"},
        {"growth": "proportional"},
        {"growth": "proportional", "block_sizes": [8, 64]},
        {"growth": "adaptive"},
        {"growth": "adaptive", "num_tokens": 25600},  # with a reserve for merging
        {"growth": "lazy_merge", "allocator": "slab"},
        {"growth": "fixed32", "allocator": "slab"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_rows_go_on_for_as_long_as_the_host_would(options):
    cache = make_cache(**{"num_tokens": 2048} | options)
    ids = prefill(cache, [[1] * 576])
    cache.close(prefill(cache, [[2] * 64]))
    smallest, taken = cache.allocator.block_sizes[0] // 8, []
    while (start := cache.allocator.allocate([smallest], partial=True)[0]) >= 0:
        taken.append(start)
    cache.allocator.free(taken[-3:], [smallest] * 3)  # less than most policies want at once
    steps, total = DeviceSteps(cache, 1, 32), 0
    while True:
        steps.load(ids, [1])
        replay(steps, 32)
        turn = steps.finish()
        cache.check_integrity()
        total += int(turn.num_new[0])
        if turn.status[0]:
            break
    assert turn.status[0] == 1
    assert cache.stats().cached == cache.stats().kept_back == 0
    assert total >= 64 + 24 * smallest
    with cache.begin_step(ids, 1) as step:
        assert not step.ok[0]


def test_each_row_gets_one_of_the_larger_blocks_that_are_left():
    cache = make_cache(num_tokens=1024, growth="append", allocator="slab")
    ids = prefill(cache, [[1] * 8, [2] * 8, [3] * 8])
    while (single := cache.allocator.allocate([1], partial=True)[0]) >= 0 and cache.stats().free > 512:
        pass
    taken = []
    while (start := cache.allocator.allocate([4], partial=True)[0]) >= 0:
        taken.append(start)
    while single >= 0:
        single = cache.allocator.allocate([1], partial=True)[0]
    cache.allocator.free(taken[::2], [4] * len(taken[::2]))  # now slabs have room for blocks of 32 tokens alone
    steps = DeviceSteps(cache, 3, 8)
    steps.load(ids, [1, 2, 3])
    replay(steps, 8)
    assert steps.finish().num_new.tolist() == [8, 8, 8]
    cache.check_integrity()


def test_choosing_blocks_ahead_stays_inside_its_array(monkeypatch):
    cache = make_cache(num_tokens=64, max_seqs=16, growth="fixed8", block_sizes=[8])
    ids, _ = cache.open([[]] * 16)
    steps, choose, lengths = DeviceSteps(cache, 16, 8), growing.choose_ahead, []

    def note(*arguments):
        sizes = arguments[-1]
        wide = np.full(len(sizes) + 64, -7, np.int32)
        found = choose(*arguments[:-1], wide)
        lengths.append((np.count_nonzero(wide != -7), len(sizes)))
        sizes[: found[0]] = wide[: found[0]]
        return found

    monkeypatch.setattr(growing, "choose_ahead", note)
    steps.load(ids, np.arange(16))  # the pool has room for 8 of them
    ((written, length),) = lengths
    assert 8 < written <= length
    steps.abort()


def test_many_rows_are_grown_in_turn():
    num = 1100  # a CTA has 1024 threads
    cache = make_cache(num_tokens=num * 16, max_seqs=num, growth="fixed8", block_sizes=[8], num_layers=LAYERS)
    ids, _ = cache.open([[]] * num)
    steps = DeviceSteps(cache, num, 2)
    steps.load(ids, np.arange(num), 2)
    run(steps.begin(), np.asarray(steps.tokens))
    granted = steps._there["grants"][0, 1]
    assert (steps._there["grants"][0, 0] == 1).all()
    assert len(np.unique(granted)) == num
    assert granted[1024] == steps._of_groups[0][1][0, 1024]  # rows take what the supply lists, in their order
    turn = steps.finish()
    assert turn.history[:, 0].tolist() == list(range(num))
    cache.check_integrity()


@pytest.mark.parametrize("how", ["abort", "drop"])
def test_turns_that_are_given_up_lose_nothing(how):
    cache = make_cache(num_tokens=1024)
    ids = prefill(cache, [[1] * 20, [2] * 64])
    before = cache.stats()
    steps = DeviceSteps(cache, 2, 16)
    steps.load(ids, [1, 2])
    run(steps.begin(), np.asarray(steps.tokens))
    assert cache.stats().callers > 0
    if how == "abort":
        steps.abort()
    else:
        del steps
        gc.collect()
    after = cache.stats()
    assert (after.free, after.used, after.callers) == (before.free, before.used, 0)
    cache.check_integrity()
    assert cache.lengths(ids).tolist() == [20, 64]
    prefill(cache, [[3], [4]], ids)  # the rows are open


def test_a_turn_that_breaks_off_in_the_allocator_loses_nothing(monkeypatch):
    cache = make_cache(num_tokens=1024, growth="fixed8", block_sizes=[8])
    ids = prefill(cache, [[1] * 8])
    steps = DeviceSteps(cache, 1, 16)
    allocator = cache._group.blocks.allocator
    monkeypatch.setattr(type(allocator), "allocate", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        steps.load(ids, [1])
    monkeypatch.undo()
    cache.repair()
    cache.check_integrity()
    assert cache.stats().callers == 0
    steps.load(ids, [1])
    steps.abort()


@pytest.mark.parametrize("how", ["finish", "abort", "load", "drop"])
def test_turns_of_which_a_sequence_was_an_orphan_are_over(how):
    cache = make_cache(num_tokens=1024, growth="fixed8", block_sizes=[8])
    ids = prefill(cache, [[1] * 8, [2] * 16])
    steps = DeviceSteps(cache, 2, 16)
    steps.load(ids, [1, 2])
    replay(steps, 9)
    assert cache.end_orphans(ids[1:]).tolist() == ids[:1].tolist()
    new = prefill(cache, [[3] * 24])  # in the row of the one that was closed
    if how == "finish":
        with pytest.raises(StepError, match="end_orphans"):
            steps.finish()
    elif how == "abort":
        steps.abort()
    elif how == "drop":
        del steps
        gc.collect()
    if how != "drop":
        steps.load([*ids[1:], *new], [1, 2])
        replay(steps, 16)
        assert steps.finish().num_new.tolist() == [16, 16]
    cache.check_integrity()
    assert cache.stats().callers == 0
    assert cache.lengths([*ids[1:], *new]).tolist() == ([16, 24] if how == "drop" else [32, 40])


def test_other_threads_cannot_take_sequences_while_a_turn_ends(monkeypatch):
    cache = make_cache(num_tokens=1024)
    ids = prefill(cache, [[1] * 8])
    steps = DeviceSteps(cache, 1, 8)
    steps.load(ids, [1])
    replay(steps, 8)
    abort, taken = cache.abort_step, []

    def end_hold(step):
        abort(step)
        thief = threading.Thread(target=lambda: taken.append(cache.truncate(ids, [0])))
        thief.start()
        thief.join(0.1)
        assert not taken

    monkeypatch.setattr(cache, "abort_step", end_hold)
    assert steps.finish().num_new.tolist() == [8]
    monkeypatch.undo()
    cache.check_integrity()


def world_in_a_turn(options):
    """A cache in the middle of a turn of two sequences that share, with others beside it."""
    cache = make_cache(max_seqs=8, **options)
    ids = prefill(cache, [[7] * 60, [8] * 20])
    ids = np.array([ids[0], cache.fork(ids[:1], 1)[0, 0], ids[1]])
    cache.close(prefill(cache, [[9] * 40]))
    steps = DeviceSteps(cache, 2, 32)
    return cache, ids, steps


def tokens_in(cache, ids):
    """The keys of the first layer of each sequence."""
    with cache.begin_step(ids, 0) as step:
        return [keys_held(cache, step.block_table[b], length) for b, length in enumerate(step.seq_lens.tolist())]


def keys_held(cache, entries, length):
    starts, sizes, _ = unpack_entries(entries[entries >= 0])
    held = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    granules = cache.key_cache(0)[np.concatenate(held)]
    return granules.transpose(0, 2, 1, 3).reshape(-1, 8)[:length].tobytes()


@pytest.mark.parametrize("call", ["load", "finish", "abort"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_tokens": 512, "growth": "fixed8", "block_sizes": [8]},
        {"num_tokens": 12800, "growth": "adaptive", "allocator": "slab"},
        {"growth": "lazy_merge", "layer_groups": WINDOW},
    ],
    ids=["buddy", "slab", "groups"],
)
def test_turns_can_break_off_at_any_line(call, options):
    def prepare():
        cache, ids, steps = world_in_a_turn(options)
        if call != "load":
            steps.load(ids[:2], [1, 2])
            replay(steps, 30)
        return cache, ids, steps

    def work(steps, ids):
        steps.load(ids[:2], [1, 2]) if call == "load" else getattr(steps, call)()

    cache, ids, steps = prepare()
    if call != "load":
        work(steps, ids)
    after = tokens_in(cache, ids)
    num_lines = 0
    for n in itertools.count(1 + len(options), 17):
        cache, ids, steps = prepare()
        breaker = LineBreaker(n)
        with contextlib.suppress(Interrupted), breaker:
            work(steps, ids)
        if not breaker.fired:
            break
        num_lines += 1
        cache.check_integrity()
        again = None
        if steps._step is not None:  # the turn is under way, and can be ended again
            again = steps.abort if call == "load" else getattr(steps, call)
            again()
        cache.check_integrity()
        assert cache.stats().callers == 0
        found = tokens_in(cache, ids)
        assert found[2:] == after[2:]
        for own, whole in zip(found, after, strict=True):
            assert whole.startswith(own)
        assert cache.lengths(ids)[0] in (60, 90 if call == "finish" else 60)
        if call == "finish" and again is not None:
            assert found == after
        steps.load(ids[:2], [3, 4])
        replay(steps, 4)
        steps.finish()
        cache.close(ids)
        cache.check_integrity()
        assert cache.stats().used == cache.stats().callers == 0
    assert num_lines > 5


@pytest.mark.parametrize("call", ["load", "refill", "finish", "abort"])
@pytest.mark.parametrize("beams", [1, 3])
def test_turns_that_change_rows_can_break_off_at_any_line(call, beams):
    """Then they can be ended, or are over; no block is lost, and tables and index agree."""

    def prepare():
        tiers = TIERS if beams == 1 else None
        cache = make_cache(num_tokens=8192, head_dim=64, growth="lazy_merge", tiers=tiers)
        lengths = (200, 130, 60) if beams == 1 else (60, 60, 60)
        ids = prefill(cache, [[i] * length for i, length in enumerate(lengths)])
        steps = DeviceSteps(cache, 3, 48, beams=beams)
        if call != "load":
            steps.load(ids, [1, 2, 3], 40)
            for _ in range(5):
                if beams > 1:
                    steps.parents[:] = [1, 2, 2]
                replay(steps, 8)
        return cache, ids, steps, np.array(lengths)

    num_lines = 0
    for n in itertools.count(1, 23):
        cache, ids, steps, lengths = prepare()
        breaker = LineBreaker(n)
        arguments = {"load": (ids, [1, 2, 3]), "refill": (8,)}.get(call, ())
        with contextlib.suppress(Interrupted), breaker:
            getattr(steps, call)(*arguments)
        if not breaker.fired:
            break
        num_lines += 1
        cache.check_integrity()
        if steps._step is not None:
            steps.finish() if call == "finish" else steps.abort()
        cache.check_integrity()
        stats = cache.stats()
        assert stats.callers == 0
        more = cache.lengths(ids) - lengths
        assert more.tolist() in ([0, 0, 0], [40, 40, 40] if call == "finish" else [])
        steps.load(ids, [3, 4, 5])
        replay(steps, 48)
        assert steps.finish().num_new.tolist() == [48] * 3
        cache.check_integrity()
        cache.close(ids)
        cache.clear_prefixes()
        stats = cache.stats()
        assert stats.used == stats.callers == stats.cached == 0
    assert num_lines > 5


@pytest.mark.parametrize("allocator", ["buddy", "slab"])
@pytest.mark.parametrize("before", [0, 8, 40, 56])
def test_a_tile_is_merged_whatever_follows_it(allocator, before):
    """The next block may join the last small one of a tile, on the host, which gives blocks before it merges."""
    prompts = [[7] * (before + 1), [1], [2, 3]]
    twins = Twins(prompts, 128, num_tokens=4096, growth="lazy_merge", allocator=allocator)
    for _ in range(2):
        twins.turn(100, np.zeros((3, 100), bool), np.full(3, 1000))
    stats = [cache.stats() for cache in twins.caches]
    assert stats[0].num_merges == stats[1].num_merges > 0


@pytest.mark.parametrize("window", [1, 7, 60, 72])
def test_windows_of_any_width_and_merges(window):
    groups = [{"layers": [0], "num_tokens": 2048}, {"layers": [1], "window": window, "num_tokens": 2048}]
    twins = Twins([[3] * 8, [4] * 200, [5] * 61], 64, window=window, growth="lazy_merge", layer_groups=groups)
    for _ in range(3):
        twins.turn(50, np.zeros((3, 50), bool), np.full(3, 1000))


@pytest.mark.parametrize("ends", ["before", "after"])
def test_prompts_that_find_tiles_of_a_turn_keep_them(ends):
    """A prefix hit may hold granules of a row while the device moves the row's tile."""
    for options in ({"growth": "lazy_merge"}, {"growth": "fixed8", "tiers": TIERS}):
        cache = make_cache(num_tokens=8192, head_dim=64, **options)
        ids, _ = cache.open([[], []])
        for i in range(120):  # in turn, so that each granule is an entry
            tokens = np.array([i, i + 1]) % 50
            with cache.begin_step(ids, 1) as step:
                for layer in range(LAYERS):
                    step.append(layer, *keys_of(tokens, layer, 64))
                cache.end_step(step, tokens)
        steps = DeviceSteps(cache, 2, 64)
        steps.load(ids, [0, 1])
        replay(steps, 2)
        (found,), held = cache.open([[i % 50 for i in range(118)]])
        assert held[0] == 112
        replay(steps, 40)
        if ends == "before":
            cache.close([found])
        assert steps.finish().num_new.tolist() == [42, 42]
        cache.check_integrity()
        if ends == "after":
            with cache.begin_step([found], 0) as step:
                _, _, tiers = unpack_entries(step.block_table[0])
                assert (tiers <= 0).all()
                cache.abort_step(step)
            cache.close([found])
        cache.close(ids)
        cache.clear_prefixes()
        cache.check_integrity()
        assert cache.stats().used == cache.stats().callers == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_tokens": 4096, "growth": "lazy_merge", "max_entries": 12},
        {"num_tokens": 8192, "growth": "fixed8", "max_entries": 20, "head_dim": 64, "tiers": TIERS},
    ],
    ids=["merges", "tiers"],
)  # fmt: skip
def test_entries_that_moves_make_free_are_used_as_by_the_host(options):
    """Rows have fewer entries than all granules of a turn would need."""
    twins = Twins([[3], [4] * 2, [5] * 5], 128, **options)
    for _ in range(3):
        twins.turn(90, np.zeros((3, 90), bool), np.full(3, 900))


def test_entries_that_windows_make_free_are_used_after_the_turn():
    """The host lets go of them then, so inside the turn a row that needs them is full."""
    groups = [{"layers": [0], "window": 24, "num_tokens": 4096}, {"layers": [1], "window": 16, "num_tokens": 4096}]
    options = {"growth": "fixed8", "max_entries": 8, "max_seq_len": 1000, "layer_groups": groups}
    found = []
    for by_device in (False, True):
        cache = make_cache(**options)
        ids = prefill(cache, [[3], [4] * 2])
        tokens, steps = np.array([5, 6]), DeviceSteps(cache, 2, 128)
        while by_device and (left := 150 - cache.lengths(ids)).any():
            steps.load(ids, tokens, max_lens=cache.lengths(ids) + left)
            for _ in range(90):
                padded = np.asarray(steps.tokens)
                _, chosen = run(steps.begin(), padded, windows=(24, 16))
                steps.tokens[:] = np.where(np.asarray(steps.status) == 0, chosen, padded)
            turn = steps.finish()
            assert (turn.num_new > 0).any()
            cache.check_integrity()
            tokens = turn.next_tokens
        while not by_device and (rows := np.flatnonzero(cache.lengths(ids) < 150)).size:
            with cache.begin_step(ids[rows], 1) as step:
                assert step.ok.all()
                _, chosen = run(step, tokens[rows], windows=(24, 16))
                cache.end_step(step, tokens[rows])
            tokens[rows] = chosen
        found.append(tokens.tolist())
        cache.check_integrity()
    assert found[0] == found[1]


def test_tiles_of_several_rows_are_left_to_the_host():
    """The device moves only what one row holds; the host moves the rest in its turns, for all that share it."""
    cache = make_cache(num_tokens=8192, head_dim=64, growth="fixed8", tiers=TIERS)
    (parent,) = prefill(cache, [[5] * 300])
    ids = np.array([parent, *cache.fork([parent], 2)[0]])
    steps, shared = DeviceSteps(cache, 3, 64), []
    for _ in range(4):
        steps.load(ids, [1, 2, 3])
        before = cache.stats().converted_tokens
        replay(steps, 64)
        assert steps.finish().num_new.tolist() == [64] * 3
        shared.append((before, cache.stats().converted_tokens))
        cache.check_integrity()
    entries = [cache._group.table.entries[row, :4] for row in range(3)]
    assert (unpack_entries(np.array(entries))[2] > 0).all()  # shared, and moved once
    assert (np.array(entries) == entries[0]).all()
    assert shared[0][0] > 0  # by the host
    assert shared[-1][1] > shared[-1][0]  # by the device
    cache.close(ids)
    cache.clear_prefixes()
    assert cache.stats().used == cache.stats().callers == 0


def test_a_full_tier_keeps_no_row_from_growing():
    tiers = TIERS | {"tier_memory": {"hot": 0.98, "warm": 0.01, "cold": 0.01}}
    cache = make_cache(num_tokens=8192, head_dim=64, growth="fixed8", tiers=tiers)
    ids = prefill(cache, [[5] * 300, [6] * 200])
    steps = DeviceSteps(cache, 2, 64)
    for _ in range(10):
        steps.load(ids, [1, 2])
        replay(steps, 64)
        assert steps.finish().num_new.tolist() == [64, 64]
        cache.check_integrity()
    assert cache.stats().tiers["cold"].free == 0


def test_bad_input_is_refused():
    cache = make_cache(num_tokens=512)
    ids = prefill(cache, [[1] * 8, [2] * 8])
    steps = DeviceSteps(cache, 2, 8)
    for arguments, error in (
        ((ids, [1]), ArgumentError),
        ((ids, [1.0, 2.0]), ArgumentError),
        ((ids, [1, 2], 0), ArgumentError),
        ((ids, [1, 2], 9), ArgumentError),
        ((ids, [1, 2], True), ArgumentError),
        (([*ids, ids[0] + 1], [1, 2, 3]), ArgumentError),
        (([ids[0], ids[0]], [1, 2]), SequenceError),
        (([123456789, ids[0]], [1, 2]), SequenceError),
    ):
        with pytest.raises(error):
            steps.load(*arguments)
    for max_lens in ([1], [9, -1], [9, 7], [9, 20 - 2**32], [1.5, 2], 9):
        with pytest.raises(ArgumentError, match="max_lens"):
            steps.load(ids, [1, 2], max_lens=max_lens)
    for call in (steps.finish, steps.abort):
        with pytest.raises(StepError, match="load"):
            call()
    steps.load(ids, [1, 2])
    with pytest.raises(StepError, match="ended"):
        steps.load(ids, [1, 2])
    with pytest.raises(SequenceError):
        cache.begin_step(ids, 1)
    steps.begin().append(0, *keys_of(np.arange(2), 0))
    with pytest.raises(StepError, match="layer"):
        steps.finish()
    run(steps.begin(), np.arange(2))
    assert steps.finish().num_new.tolist() == [2, 2]
    with pytest.raises(StepError, match="max_steps"):
        DeviceSteps(cache, 2, 0)
    for arguments in ((True, 4), (1.0, 4), ("2", 4), (2, 2.5), (2, None), (2, "3")):
        with pytest.raises(ArgumentError, match="expected a number"):
            DeviceSteps(cache, *arguments)
    with pytest.raises(ArgumentError, match="max_seq_len"):
        DeviceSteps(cache, 2, 4, max_seq_len=1.5)
    for arguments in ((1 << 40, 4), (2, 1 << 40), (60_000, 60_000)):
        with pytest.raises(ArgumentError, match="rows, and 8 bytes"):
            DeviceSteps(cache, *arguments)
    with pytest.raises(UnsupportedError, match="chunks"):
        DeviceSteps(make_cache(num_tokens=512, layer_groups=[{"layers": [0]}, {"layers": [1], "chunk": 64}]), 1)
    with pytest.raises(CacheFullError):
        cache.open([[]] * 10_000)


def test_refused_turns_move_no_tiles():
    cache = make_cache(num_tokens=4096, head_dim=64, tiers={"hot": 64, "pinned_tokens": 0, "warm": "int8"})
    ids, _ = cache.open([[], []])
    x = np.ones((600, 1, 64), np.float32)
    with cache.begin_step(ids, 300) as step:
        for layer in range(LAYERS):
            step.append(layer, x, x)
        cache.end_step(step)
    steps, before = DeviceSteps(cache, 2, 32), cache.stats().converted_tokens
    with pytest.raises(SequenceError):
        steps.load([*ids[:1], 12345], [1, 2])
    assert cache.stats().converted_tokens == before


def test_windows_let_go_of_their_past_in_each_turn():
    cache = make_cache(growth="fixed8", layer_groups=WINDOW)
    ids = prefill(cache, [[1] * 100, [2] * 64])
    steps = DeviceSteps(cache, 2, 32)
    for _ in range(4):
        steps.load(ids, [1, 2], max_lens=[10_000, 64])
        replay(steps, 32)
        held = cache.stats().groups[1]
        # the window of 24 and 32 new tokens, each in whole granules, and a sequence that is at its end as it was
        assert held.used + held.callers <= 24 + 32 + 8 + 64
        steps.finish()
        cache.check_integrity()


@pytest.mark.parametrize("growth", ["fixed8", "fixed64", "proportional", "lazy_merge", "adaptive"])
@pytest.mark.parametrize("beams", [2, 5])
def test_beams_that_the_device_reorders_equal_those_of_the_host(growth, beams):
    """Whatever the beams were before the turn, and however often they change in it."""
    rng = np.random.default_rng(beams)
    caches = [make_cache(num_tokens=1 << 14, growth=growth) for _ in range(2)]
    prompts = [rng.integers(0, 97, n).tolist() for n in (61, 8, 203)]
    num = len(prompts) * beams
    ids = []
    for cache in caches:
        first = prefill(cache, prompts)
        ids.append(np.concatenate([[one, *cache.fork([one], beams - 1)[0]] for one in first]))
    steps = DeviceSteps(caches[1], num + beams, 32, beams=beams)
    tokens = rng.integers(0, 97, num)
    for turn in range(4):
        steps.load(ids[1], tokens)
        history = np.empty((num, 0), np.int64)
        for i in range(24):
            parents = np.arange(num)
            if i % 3 or turn == 1:
                families = np.arange(num).reshape(-1, beams)
                parents = np.concatenate([rng.choice(family, beams) for family in families])
                if i % 5 == 0:
                    parents[:beams] = families[0]
            steps.parents[:num] = parents
            caches[0].reorder(ids[0], parents)
            history = np.concatenate([history[parents], tokens[:, None]], 1)
            out, _ = run(steps.begin(), np.asarray(steps.tokens))
            with caches[0].begin_step(ids[0], 1) as step:
                expected, chosen = run(step, tokens)
                caches[0].end_step(step, tokens)
            assert (np.asarray(steps.status) == [0] * num + [4] * beams).all()
            assert (out[:num] == expected).all()
            tails = np.asarray(steps._of_groups[0][0])[:num]
            assert tails.tolist() == tails_of(steps._graph_step.tables, range(num))
            tokens = (chosen + np.arange(num)) % 97
            steps.tokens[:num] = tokens
        if turn != 2:  # the tokens that were chosen last may be of other rows, too
            parents = np.concatenate([rng.choice(family, beams) for family in np.arange(num).reshape(-1, beams)])
            steps.parents[:num] = parents
            caches[0].reorder(ids[0], parents)
            history = history[parents]
        turn_of_device = steps.finish()
        assert turn_of_device.num_new.tolist() == [24] * num
        assert turn_of_device.history.tolist() == history.tolist()
        for cache in caches:
            cache.check_integrity()
            assert cache.stats().callers == 0
        assert tokens_in(caches[0], ids[0]) == tokens_in(caches[1], ids[1])
    # and later prompts find the same
    found = [cache.open([prompt + list(range(50)) for prompt in prompts])[1].tolist() for cache in caches]
    assert found[0] == found[1]
    for cache, own in zip(caches, ids, strict=True):
        cache.close(own)
        cache.check_integrity()


@pytest.mark.parametrize("how", ["finish", "abort"])
def test_reordering_after_a_turn_writes_to_nobody(how):
    cache = make_cache(num_tokens=512, growth="fixed8", block_sizes=[8])
    (first,) = prefill(cache, [[1] * 20])
    steps, ids = DeviceSteps(cache, 2, 32, beams=2), [first, *cache.fork([first], 1)[0]]
    steps.load(ids, [1, 2])
    replay(steps, 12)
    getattr(steps, how)()
    cache.close(ids)
    prefill(cache, [[5] * 400])
    before, table = cache.key_cache(0).copy(), steps._graph_step.tables.block_table.copy()
    steps.parents[:] = [1, 0]
    replay(steps, 1)
    assert (cache.key_cache(0) == before).all()
    assert (steps._graph_step.tables.block_table == table).all()


def test_beams_of_a_search_stall_together_and_go_on_together():
    cache = make_cache(num_tokens=128, growth="fixed8", block_sizes=[8])
    ids = prefill(cache, [[1] * 16, [2] * 16, [3] * 16, [4] * 16, [5]])[:4]
    steps = DeviceSteps(cache, 4, 32, beams=2)
    steps.load(ids, [1, 2, 3, 4])  # there is room for 7 blocks more, so one of a search gets less
    found = []
    for _ in range(20):
        steps.parents[:] = [1, 0, 3, 2]
        replay(steps, 1)
        found.append(steps.status.tolist())
    assert [0, 0, 1, 1] in found
    assert all(first == second and third == fourth for first, second, third, fourth in found)
    assert not any(status in (2, 3, 4, 5) for one in found for status in one)
    turn = steps.finish()
    assert turn.num_new.tolist() == [16, 16, 8, 8]
    cache.check_integrity()
    cache.close(ids[:2])
    steps.load(ids[2:], turn.next_tokens[2:])
    replay(steps, 20)
    assert steps.finish().num_new.tolist() == [20, 20]
    cache.check_integrity()


@pytest.mark.parametrize("how", ["abort", "drop"])
def test_beams_of_a_turn_that_is_given_up_are_as_before(how):
    cache = make_cache(num_tokens=1024, growth="fixed16", block_sizes=[8, 16])
    ids = prefill(cache, [[i] * 21 for i in range(4)])
    before, stats = tokens_in(cache, ids), cache.stats()
    steps = DeviceSteps(cache, 4, 32, beams=4)
    steps.load(ids, [1, 2, 3, 4])
    for _ in range(20):
        steps.parents[:] = [1, 2, 3, 0]
        replay(steps, 1)
    if how == "abort":
        steps.abort()
    else:
        del steps
        gc.collect()
    assert tokens_in(cache, ids) == before
    cache.check_integrity()
    assert (cache.stats().used, cache.stats().callers) == (stats.used, 0)


def test_a_row_whose_parent_has_other_tokens_ends():
    cache = make_cache(num_tokens=1024, growth="fixed8")
    (first,) = prefill(cache, [[1] * 20])
    ids = np.array([first, *cache.fork([first], 3)[0]])
    steps = DeviceSteps(cache, 4, 16, beams=2)
    with pytest.raises(ArgumentError, match="max_lens"):
        steps.load(ids, [1, 2, 3, 4], max_lens=[30, 30, 22, 30])
    steps.load(ids, [1, 2, 3, 4])
    replay(steps, 2)
    steps.finished[2] = True
    replay(steps, 1)
    steps.parents[:] = [1, 0, 3, 2]  # the third has ended by now, and its neighbour has one token more
    replay(steps, 1)
    assert steps.status.tolist() == [0, 0, 4, 4]
    steps.parents[:] = [2, 1, 2, 3]
    replay(steps, 1)
    assert steps.status.tolist() == [4, 0, 4, 4]
    assert steps.finish().num_new.tolist() == [4, 5, 2, 3]
    cache.check_integrity()


def test_beams_are_refused_where_they_cannot_work():
    cache = make_cache(num_tokens=1024)
    for arguments in ({"beams": 3}, {"beams": 17}, {"beams": 0}, {"beams": 2, "num_new_tokens": 2}):
        with pytest.raises(ArgumentError, match="beams"):
            DeviceSteps(cache, 4, 8, **arguments)
    with pytest.raises(UnsupportedError, match="beams"):
        DeviceSteps(make_cache(layer_groups=WINDOW), 4, 8, beams=2)
    steps, ids = DeviceSteps(cache, 4, 8, beams=2), prefill(cache, [[1] * 8, [2] * 9, [3] * 9])
    for wrong in (ids[:2], ids[1:2], ids):
        with pytest.raises(ArgumentError, match="beams"):
            steps.load(wrong, [1] * len(wrong))
    steps.load(ids[1:], [1, 2])
    steps.abort()
    cache.check_integrity()


def test_a_collected_turn_can_be_ended_later():
    found = []
    for collects in (False, True):
        cache = make_cache(num_tokens=2048, growth="lazy_merge")
        ids = prefill(cache, [[1] * 20, [2] * 64, [3]])
        steps = DeviceSteps(cache, 4, 16)
        for call in (steps.collect, steps.finish):
            with pytest.raises(StepError, match="load"):
                call()
        steps.load(ids, [1, 2, 3])
        replay(steps, 11)
        if collects:
            steps.collect()
            steps.collect()
            with pytest.raises(StepError, match="collect"):
                steps.refill(1)
            other = prefill(cache, [[4] * 100])  # others may have work meanwhile
            replay(steps, 5)
            cache.close(other)
        turn = steps.finish()
        assert turn.num_new.tolist() == [11] * 3
        found.append([part.tolist() for part in turn[:3]] + [cache.lengths(ids).tolist(), tokens_in(cache, ids)])
        cache.check_integrity()
    assert found[0] == found[1]


@pytest.mark.parametrize("how", ["finish", "abort"])
def test_replays_after_a_turn_write_to_nobody(how):
    cache = make_cache(num_tokens=512, growth="fixed8", block_sizes=[8])
    ids = prefill(cache, [[1] * 8])
    steps = DeviceSteps(cache, 1, 32)
    steps.load(ids, [1])
    replay(steps, 4)
    getattr(steps, how)()
    prefill(cache, [[5] * 400])  # in blocks that the turn had taken ahead
    before = cache.key_cache(0).copy()
    replay(steps, 20)
    assert steps.status.tolist() == [3]
    assert (cache.key_cache(0) == before).all()


@pytest.mark.parametrize("how", ["finish", "abort"])
def test_replays_after_a_turn_move_no_tiles(how):
    cache = make_cache(num_tokens=1 << 14, head_dim=64, growth="lazy_merge", tiers=TIERS)
    ids = prefill(cache, [[1] * 1400, [2] * 60])
    steps = DeviceSteps(cache, 2, 32)
    steps.load(ids, [1, 2])
    replay(steps, 2)
    getattr(steps, how)()
    storage = cache._group.storage
    before = [array.copy() for array in (storage.key_values, storage.warm, storage.cold)]
    table = steps._graph_step.tables.block_table.copy()
    replay(steps, 20)
    for array, old in zip((storage.key_values, storage.warm, storage.cold), before, strict=True):
        assert (array == old).all()
    assert (steps._graph_step.tables.block_table == table).all()
    cache.check_integrity()


def test_replays_beyond_the_turn_change_nothing():
    cache = make_cache(num_tokens=512)
    ids = prefill(cache, [[1] * 8])
    steps = DeviceSteps(cache, 1, 4)
    steps.load(ids, [1])
    for _ in range(6):
        run(steps.begin(), np.asarray(steps.tokens))
    turn = steps.finish()
    assert turn.num_new.tolist() == [4]
    assert turn.status.tolist() == [5]
    cache.check_integrity()
