"""Steps and captured steps of caches with groups, on a device that is faked: its kernels are those of the CPU."""

import contextlib

import numpy as np
import pytest

from kvtoolkit import ArgumentError, CacheConfig, GraphStep, KVCache, StepError, UnsupportedError
from kvtoolkit.arrays import host
from kvtoolkit.arrays.call import Sharing, check_hints
from kvtoolkit.cache import graph
from kvtoolkit.cache import step as step_module
from kvtoolkit.cache.layers import layers as layers_module
from kvtoolkit.cache.state import shared_reads
from kvtoolkit.cache.storage.upload import Upload
from kvtoolkit.cpu import append, attend
from kvtoolkit.runtime import streams

LAYERS, HEADS, DIM = 6, 2, 16
SHAPE = {
    "num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "dtype": "float32", "num_tokens": 8192,
    "max_seqs": 16,
}  # fmt: skip
GROUPS = [{"layers": [0, 3], "window": 20}, {"layers": [1, 4]}, {"layers": [2, 5], "chunk": 40}]
WINDOWS = [(19, 0), (-1, -1), (-1, -1)] * 2


class Device:
    """A backend that runs the kernels of the CPU, and records them while it is captured, as a CUDA graph does."""

    name = "cuda"
    describe = staticmethod(host.operand)

    def __init__(self):
        self.calls, self.recorded, self.is_capturing, self.copies = [], [], False, []

    def can_overlap(self, device):
        return False

    def empty(self, shape, dtype, like, device):
        return host.empty(shape, dtype, like)

    def append(self, *arrays):
        self._run(lambda: append(*arrays))

    def attend(self, call, hints):
        self.calls.append((call, hints))

        def run():
            lengths, bounds = (None if one is None else np.asarray(one.owner) for one in (call.seq_lens, call[6]))
            check_hints(hints, lengths, bounds)
            attend(call)

        self._run(run)

    def _run(self, run):
        if self.is_capturing:
            self.recorded.append(run)
        else:
            run()

    def replay(self):
        for run in self.recorded:
            run()


@pytest.fixture
def device(monkeypatch):
    found = Device()
    for module in (step_module, layers_module):
        monkeypatch.setattr(module, "current_stream", lambda device: 1)
        monkeypatch.setattr(module, "is_capturing", lambda stream: found.is_capturing)

    @contextlib.contextmanager
    def cupy(device):
        yield np

    def copy(ring, cupy, moves):
        found.copies.append(len(moves))
        for source, target in moves:
            target[tuple(map(slice, source.shape))] = source

    def upload(ring, cupy, arrays):
        found.copies.append(len(arrays))
        return [array.copy() for array in arrays]

    monkeypatch.setattr(streams, "cupy_on_current_stream", cupy)
    monkeypatch.setattr(graph.PinnedRing, "copy", copy)
    monkeypatch.setattr(graph.PinnedRing, "upload", upload)
    return found


def make(device=None, groups=GROUPS, **fields):
    """A cache; its keys and values are on the host, but with a ``device`` it takes them to be on that."""
    cache = KVCache(CacheConfig(**{**SHAPE, **fields}, layer_groups=groups))
    if device is not None:
        object.__setattr__(cache.config, "backend", "cuda")
        cache._upload = Upload(0)
        for steps in cache._group_steps:
            steps.arenas.backend, steps.arenas.device = device, 0
    return cache


class Pair:
    """A cache on the device and one on the CPU, to which the same happens."""

    def __init__(self, device, **fields):
        self.device, self.rng = device, np.random.default_rng(0)
        self.caches = make(device, **fields), make(**fields)
        self.ids = [cache.open([[]] * 4)[0] for cache in self.caches]

    def draw(self, total, tokens=None):
        """Keys, values and queries of all layers; those beyond ``total`` are of no row."""
        tokens = total if tokens is None else tokens
        new = self.rng.standard_normal((3, LAYERS, tokens, 2 * HEADS, DIM), np.float32)
        new[:, :, total:] = np.nan
        return new[0, :, :, :HEADS].copy(), new[1, :, :, :HEADS].copy(), new[2].copy()

    def expected(self, rows, counts, new, total):
        """What the CPU computes, ``[layers, total, heads, dim]``."""
        with self.caches[1].begin_step(self.ids[1][rows], counts) as step:
            results = np.stack(run_layers(step, new, total))
            self.caches[1].end_step(step)
        return results

    def check(self):
        for cache in self.caches:
            cache.check_integrity()


def run_layers(step, new, total=None, **options):
    key, value, q = new
    results = []
    for layer in range(LAYERS):
        step.append(layer, key[layer, :total], value[layer, :total])
        results.append(step.attend(layer, q[layer, :total], window_size=WINDOWS[layer], **options))
    return results


def test_steps_on_a_device_are_those_of_the_cpu(device):
    pair = Pair(device)
    for counts in ([100, 3, 41, 0], *[[1, 1, 1, 1]] * 45, [5, 0, 90, 1], [1, 2, 9, 300]):
        total = sum(counts)
        new = pair.draw(total)
        device.calls, device.copies = [], []
        with pair.caches[0].begin_step(pair.ids[0], counts) as step:
            found = np.stack(run_layers(step, new))
            tables = [step.tables_of(layer) for layer in range(LAYERS)]
            there = [step.tables_on_device(layer) for layer in range(LAYERS)]
            pair.caches[0].end_step(step)
        np.testing.assert_array_equal(found, pair.expected(np.arange(4), counts, new, total))
        assert device.copies == [15]
        for one, other in zip(tables, there, strict=True):
            for ours, theirs in zip(one, other, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        # layers of a group keep their plan and list at one place, and no two groups at the same
        kept = [id(hints.kept) for _, hints in device.calls]
        assert kept == kept[:3] * 2
        assert len(set(kept)) == 3
        lengths = [hints.max_seq_len for _, hints in device.calls]
        assert lengths[0] == lengths[1] == max(tables[0].seq_lens)
        assert lengths[2] == max(tables[2].seq_lens) <= 40
    pair.check()


@pytest.mark.parametrize(("most", "tokens"), [(1, 5), (3, 12), (100, 150)])
@pytest.mark.parametrize("chunk", [16, 40])
def test_replays_are_the_steps_of_a_cache_on_the_cpu(device, most, tokens, chunk):
    pair = Pair(device, groups=[*GROUPS[:2], {**GROUPS[2], "chunk": chunk}], growth="lazy_merge")
    fixed = GraphStep(pair.caches[0], 5, most, tokens, max_seq_len=3000)
    # prompts come without a graph
    new = pair.draw(170)
    pair.expected(np.arange(4), [50, 0, 80, 40], new, 170)
    with pair.caches[0].begin_step(pair.ids[0], [50, 0, 80, 40]) as step:
        run_layers(step, new)
        pair.caches[0].end_step(step)
    inputs = pair.draw(0, tokens)
    outputs = np.empty((LAYERS, tokens, 2 * HEADS, DIM), np.float32)
    device.is_capturing, device.calls = True, []
    run = fixed.begin()
    for layer in range(LAYERS):
        run.append(layer, inputs[0][layer], inputs[1][layer])
        run.attend(layer, inputs[2][layer], window_size=WINDOWS[layer], out=outputs[layer])
    device.is_capturing = False
    assert len({id(hints.kept) for _, hints in device.calls}) == 3
    assert [hints.max_seq_len for _, hints in device.calls] == [3000, 3000, chunk] * 2
    for _ in range(60):
        rows = pair.rng.permutation(4)[: pair.rng.integers(1, 5)]
        counts = np.ones(len(rows), int) if most == 1 else pair.rng.integers(0, most + 1, len(rows))
        while counts.sum() > tokens:
            counts //= 2
        total = int(counts.sum())
        new = pair.draw(total, tokens)
        for ours, theirs in zip(inputs, new, strict=True):
            ours[:] = theirs
        outputs[:] = np.nan
        with pair.caches[0].begin_step(pair.ids[0][rows], counts) as step:
            assert step.ok.all()
            fixed.load(step)
            device.replay()
            if most > 1:
                assert run.cu_seqlens_q.tolist() == [*step.cu_seqlens_q, *[total] * (5 - len(rows))]
            pair.caches[0].end_step(step)
        expected = pair.expected(rows, counts, new, total)
        np.testing.assert_allclose(outputs[:, :total], expected, rtol=2e-5, atol=2e-6)
        if most == 1:
            assert (outputs[:, total:] == 0).all()
    pair.check()


def test_only_layers_that_keep_all_tokens_share_reads(device, monkeypatch):
    monkeypatch.setattr(shared_reads, "LEAST_NBYTES", 1)
    cache = make(device)
    for group in cache._state.groups:
        expected = group.layers.span == 0
        made = shared_reads.make_shared_reads(cache.config, group.table)
        group.shared_reads = made if expected else group.shared_reads
        assert (group.shared_reads is not None) == expected
    parents, _ = cache.open([[]])
    for _ in range(4):
        cache.end_step(cache.begin_step(parents, 150))
    assert cache.lengths(parents) == 600
    ids = np.concatenate([parents, cache.fork(parents, 3).ravel()])
    new = np.zeros((3, LAYERS, 4, HEADS, DIM), np.float32)
    fixed = GraphStep(cache, 4, shared_reads=True)
    with cache.begin_step(ids, 1) as step:
        fixed.load(step)
        run_layers(fixed.begin(), new)
    with cache.begin_step(ids, 1) as step:
        run_layers(step, new)
    shares = [hints.sharing is not None for _, hints in device.calls]
    assert shares == [False, True, False] * 4
    assert device.calls[-2][1].sharing == Sharing()


def test_a_window_group_is_captured_by_a_graph_step_alone(device):
    cache = make(device)
    ids, _ = cache.open([[]])
    x = np.zeros((1, HEADS, DIM), np.float32)
    with cache.begin_step(ids, 1) as step:
        for layer in range(3):
            step.append(layer, x, x)
        device.is_capturing = True
        for layer in (1, 2):
            step.attend(layer, x)
        with pytest.raises(UnsupportedError, match="expected a run of a GraphStep while a CUDA graph is captured"):
            step.attend(0, x, window_size=(19, 0))


def test_runs_have_the_rules_of_steps(device):
    cache = make(device)
    ids, _ = cache.open([[]])
    x = np.zeros((1, HEADS, DIM), np.float32)
    fixed = GraphStep(cache, 1)
    with cache.begin_step(ids, 1) as step:
        fixed.load(step)
        run = fixed.begin()
        run.append(0, x, x)
        with pytest.raises(ArgumentError, match=r"window_size: expected \(0 to 19, right\) for layer 0"):
            run.attend(0, x)
        with pytest.raises(StepError, match="layer: expected one that this step has appended to, got 1"):
            run.attend(1, x)
        with pytest.raises(StepError, match="layer: expected one that this run has not appended to, got 0"):
            run.append(0, x, x)
        with pytest.raises(StepError, match="none for layer 1, 2, 3, 4, 5;"):
            cache.end_step(step)


def test_a_graph_over_windows_alone_needs_a_limit(device):
    groups = [{"layers": range(3), "window": 50}, {"layers": range(3, 6), "chunk": 64}]
    with pytest.raises(StepError, match="max_seq_len: expected a number of tokens, here or in the cache's config"):
        GraphStep(make(device, groups), 2)
    GraphStep(make(device, groups, max_seq_len=500), 2)
    fixed = GraphStep(make(device, groups), 2, 4, max_seq_len=500)
    assert sorted(one.calls()._hints.max_seq_len for one in fixed._fixed) == [64, 500]
    groups = [{"layers": range(6), "chunk": 64}]
    cache = make(device, groups)
    fixed = GraphStep(cache, 3, 70, max_seq_len=500)
    ids, _ = cache.open([[]] * 2)
    with cache.begin_step(ids, [70, 2]) as step:
        fixed.load(step)
    assert fixed.begin().cu_seqlens_q.tolist() == [0, 70, 72, 72]
    assert fixed.tables.cu_seqlens_q.tolist() == [0, 64, 70, *[72] * 7]
