"""Groups of layers on a GPU: outputs are to the bit those of a cache that frees nothing. Free memory holds NaN."""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvtoolkit import CacheConfig, GraphStep, KVCache, UnsupportedError
from kvtoolkit.cache.state.block_table import CLOSED, NUM_ENTRIES, STATE
from tests.kvtoolkit.cache.test_cache_machine import GROUPED_CONFIGS, GroupMachine, name_of
from tests.kvtoolkit.cache.test_gpu_cache import DeviceMachine

pytestmark = pytest.mark.gpu

NAN_BITS = {"float16": 0x7E00, "bfloat16": 0x7FC0}
WINDOW = [{"layers": [0, 2], "window": 20}, {"layers": 1}]


def make(groups, **fields):
    shape = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16", "num_tokens": 16384}
    return KVCache(CacheConfig(**{**shape, "backend": "cuda", "max_seqs": 16, **fields}, layer_groups=groups))


def poison(cache):
    """Fill all granules with NaN that no row holds."""
    import cupy

    for group in cache._state.groups:
        table, words = group.table, group.storage.key_values.view(np.uint16)
        is_free = np.ones(words.shape[2], bool)
        for row in np.flatnonzero(table.info[:, STATE] != CLOSED):
            for entry in table.entries[row, : table.info[row, NUM_ENTRIES]].tolist():
                is_free[entry & 0xFFFFFF : (entry & 0xFFFFFF) + (entry >> 24 & 7) + 1] = False
        words[:, :, cupy.asarray(np.flatnonzero(is_free))] = NAN_BITS[cache.dtype]
    cupy.cuda.runtime.deviceSynchronize()


class Twins:
    """A cache with groups and one without, to which the same happens."""

    def __init__(self, groups, heads=4, batch=4, num_tokens=16384, **fields):
        import torch

        torch.manual_seed(0)
        sized = [{**group, "num_tokens": 8192 if "window" in group else num_tokens} for group in groups]
        self.caches = [make(sized, num_tokens=None, **fields), make(None, num_tokens=num_tokens, **fields)]
        for cache in self.caches:
            for group in cache._state.groups:  # slots that are never written hold NaN, too
                group.storage.key_values.view(np.uint16)[:] = NAN_BITS[cache.dtype]
        self.ids = [cache.open([[]] * batch)[0] for cache in self.caches]
        self.heads, self.dtype = heads, getattr(torch, self.caches[0].dtype)
        self.windows = [(-1, -1)] * 3
        for group in groups:
            for layer in np.ravel(group["layers"]):
                self.windows[layer] = (group["window"] - 1, 0) if "window" in group else (-1, -1)

    def draw(self, total, num_heads):
        import torch

        return torch.randn(total, num_heads, self.caches[0].config.head_dim, device="cuda").to(self.dtype)

    def step(self, counts, **options):
        """All sequences get new tokens; the results are equal to the bit."""
        import torch

        steps = [cache.begin_step(ids, counts) for cache, ids in zip(self.caches, self.ids, strict=True)]
        assert all(step.ok.all() for step in steps)
        for cache in self.caches:
            poison(cache)
        total = int(np.sum(counts))
        for layer, window in enumerate(self.windows):
            key, value, q = self.draw(total, 2), self.draw(total, 2), self.draw(total, self.heads)
            found = []
            for step in steps:
                step.append(layer, key, value)
                found.append(step.attend(layer, q, window_size=window, **options))
            assert torch.isfinite(found[0]).all()
            assert torch.equal(*found)
        for cache, step in zip(self.caches, steps, strict=True):
            cache.end_step(step)

    def both(self, call):
        for cache, ids in zip(self.caches, self.ids, strict=True):
            call(cache, ids)
            cache.check_integrity()


@pytest.mark.parametrize("window", [1, 8, 20, 65, 200, 1000])
@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        ({}, 4),
        ({"head_dim": 128, "dtype": "bfloat16", "growth": "append"}, 16),
        ({"head_dim": 80, "allocator": "paged", "growth": "fixed64"}, 2),
    ],
    ids=["64", "128", "80"],
)
def test_outputs_are_to_the_bit_those_of_a_cache_that_frees_nothing(window, fields, heads):
    import torch

    twins = Twins([{"layers": [0, 2], "window": window}, {"layers": 1}], heads, **fields)
    twins.step([700, 3, 64, 1000])
    for _ in range(30):
        twins.step([1, 1, 1, 1])
    sinks = torch.linspace(-1, 1, heads, device="cuda")
    twins.step([5, 0, 300, 1], softcap=10.0, sinks=sinks)
    twins.step([5, 4, 2, 3])
    twins.both(lambda cache, ids: cache.truncate(ids, cache.lengths(ids) - [4, 0, 1, 3]))
    twins.step([1, 2, 9, 130], num_splits=2)
    twins.both(lambda cache, ids: cache.reorder(ids, [0, 0, 2, 2]))
    twins.step([17, 3, 1, 600], alibi_slopes=sinks)
    twins.both(lambda cache, ids: cache.preempt(ids[1:], "host"))
    twins.both(lambda cache, ids: cache.restore(ids[1:]))
    twins.both(lambda cache, ids: cache.compact(1 << 20))
    for _ in range(9):
        twins.step([1, 2, 3, 1])


@pytest.mark.parametrize("window", [20, 1000])
def test_one_long_sequence_is_shared_by_a_cluster_or_by_splits(window):
    for heads in (2, 16):
        twins = Twins([{"layers": [0, 2], "window": window}, {"layers": 1}], heads, batch=1, num_tokens=1 << 16)
        for _ in range(15):
            twins.step([1000])
        for _ in range(20):
            twins.step([1])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_of_other_architectures_reads_the_same_lists(monkeypatch, head_dim):
    from kvtoolkit.cuda import prompt

    monkeypatch.setattr(prompt, "arch_of", lambda device: 80)
    for window in (1, 30, 300):
        twins = Twins([{"layers": [0, 2], "window": window}, {"layers": 1}], head_dim=head_dim)
        twins.step([700, 3, 64, 1000])
        for counts in ([1, 1, 1, 1], [100, 1, 9, 40], [17, 300, 2, 1], [33, 33, 33, 33]):
            twins.step(counts)


@pytest.mark.parametrize("groups", [WINDOW, [{"layers": [0, 2], "chunk": 40}, {"layers": 1, "window": 33}]])
@pytest.mark.parametrize("backend", ["cuda", "numba"])
def test_attention_in_groups_is_that_of_the_cpu(backend, groups):
    import torch

    rng = np.random.default_rng(0)
    caches = [make(groups, backend=name, num_tokens=8192) for name in ("cpu", backend)]
    ids = [cache.open([[]] * 3)[0] for cache in caches]
    for counts in ([100, 3, 41], *[[1, 1, 1]] * 45, [5, 0, 90], [1, 2, 9]):
        total = sum(counts)
        new = rng.standard_normal((3, 3, total, 4, 64), np.float32).astype(np.float16)
        found = []
        for cache, own, put in zip(caches, ids, (lambda x: x, lambda x: torch.from_numpy(x).cuda()), strict=True):
            with cache.begin_step(own, counts) as step:
                for layer in range(3):
                    (window,) = (group.window for group in cache.config.groups if layer in group.layers)
                    step.append(layer, *(put(np.ascontiguousarray(one[layer, :, :2])) for one in new[:2]))
                    size = (window - 1, 0) if window else (-1, -1)
                    found.append(step.attend(layer, put(new[2, layer]), window_size=size))
                cache.end_step(step)
        for good, ours in zip(found[:3], found[3:], strict=True):
            good, ours = good.astype(np.float32), ours.cpu().numpy().astype(np.float32)
            assert np.linalg.norm(ours - good) <= 1e-3 * np.linalg.norm(good)
    for cache in caches:
        cache.check_integrity()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("most", "tokens"), [(1, 6), (3, 18), (100, 150)])
def test_replays_are_to_the_bit_those_of_a_cache_that_frees_nothing(most, tokens, head_dim):
    compare_replays(most, tokens, head_dim, 60)


def compare_replays(most, tokens, head_dim, replays):
    """Steps of up to ``most`` new tokens a row, by graphs of both caches."""
    import torch

    twins = Twins([{"layers": [0, 2], "window": 50}, {"layers": 1}], head_dim=head_dim, dtype="bfloat16")
    rng = np.random.default_rng(most)
    new = [[twins.draw(tokens, heads) for heads in (2, 2, twins.heads)] for _ in range(3)]
    fixed = [GraphStep(cache, 6, most, tokens, max_seq_len=4000) for cache in twins.caches]
    outs = [[torch.empty_like(one[2]) for one in new] for _ in fixed]
    graphs = [torch.cuda.CUDAGraph() for _ in fixed]

    def run(which):
        step = fixed[which].begin()
        for layer, (key, value, q) in enumerate(new):
            step.append(layer, key, value)
            step.attend(layer, q, window_size=twins.windows[layer], out=outs[which][layer])

    twins.step([700, 3, 64, 1000])
    for which, cache in enumerate(twins.caches):
        with cache.begin_step(twins.ids[which], 1) as step:
            fixed[which].load(step)
            run(which)
        with torch.cuda.graph(graphs[which]):
            run(which)
    for _ in range(replays):
        rows = rng.permutation(4)[: rng.integers(1, 5)]
        counts = np.ones(len(rows), int) if most == 1 else rng.integers(0, rng.choice([2, most + 1]), len(rows))
        while counts.sum() > tokens:
            counts //= 2
        for one in new:
            for tensor in one:
                tensor.normal_()
        for which, cache in enumerate(twins.caches):
            for out in outs[which]:
                out.fill_(float("nan"))
            with cache.begin_step(twins.ids[which][rows], counts) as step:
                assert step.ok.all()
                poison(cache)
                fixed[which].load(step)
                graphs[which].replay()
                cache.end_step(step)
        used = int(counts.sum())
        for one, other in zip(*outs, strict=True):
            assert torch.isfinite(one[:used]).all()
            assert torch.equal(one[:used], other[:used])
            assert most > 1 or (one[used:] == 0).all()
    for cache in twins.caches:
        cache.check_integrity()


def test_each_group_is_planned_once_in_a_captured_step(monkeypatch):
    import torch

    from kvtoolkit.cuda.launching import Launch

    launched = []
    run_launch = Launch.run
    monkeypatch.setattr(
        Launch, "run", lambda self, *a, **k: (launched.append(self.kernel.name), run_launch(self, *a, **k))
    )
    cache = make([{"layers": [0, 2, 3, 5], "window": 50}, {"layers": [1, 4]}], num_layers=6)
    fixed = GraphStep(cache, 3)
    ids, _ = cache.open([[]] * 3)
    key = torch.randn(3, 2, 64, device="cuda").half()

    def layers():
        run = fixed.begin()
        for layer in range(6):
            run.append(layer, key, key)
            run.attend(layer, key, window_size=(49, 0) if layer % 3 != 1 else (-1, -1))

    with cache.begin_step(ids, 1) as step:
        fixed.load(step)
        layers()
        launched.clear()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            layers()
    assert [launched.count(f"kvt_{name}") for name in ("expand", "plan", "decode")] == [2, 2, 6]


def test_layers_in_chunks_are_captured_too():
    """A row of a captured step is cut at chunks, into as many rows as it may need."""
    import torch

    groups = [{"layers": [0, 2], "chunk": 40}, {"layers": 1, "window": 33}]
    caches = [make(groups), make(groups)]
    ids = [cache.open([[]] * 3)[0] for cache in caches]
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    key, value = torch.zeros(2, 3, 120, 2, 64, device="cuda").half()
    q, out = torch.zeros(2, 3, 120, 4, 64, device="cuda").half()
    fixed = GraphStep(caches[1], 4, 100, 120, max_seq_len=6000)

    def layers(step, used=None):
        for layer in range(3):
            step.append(layer, key[layer, :used], value[layer, :used])
            size = (32, 0) if layer == 1 else (-1, -1)
            out[layer, :used] = step.attend(layer, q[layer, :used], window_size=size)

    with caches[1].begin_step(ids[1], 1) as step:
        fixed.load(step)
        layers(fixed.begin())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers(fixed.begin())
    for _ in range(40):
        counts = rng.integers(0, rng.choice([2, 101]), 3)
        while counts.sum() > 120:
            counts //= 2
        used = int(counts.sum())
        for tensor in (key, value, q):
            tensor.normal_()
        with caches[0].begin_step(ids[0], counts) as step:
            layers(step, used)
            caches[0].end_step(step)
        expected = out[:, :used].float()
        out.fill_(float("nan"))
        with caches[1].begin_step(ids[1], counts) as step:
            poison(caches[1])
            fixed.load(step)
            graph.replay()
            caches[1].end_step(step)
        torch.testing.assert_close(out[:, :used].float(), expected, rtol=2e-3, atol=4e-3)


def test_a_step_with_a_window_is_not_captured_without_a_graph_step():
    import torch

    cache = make(WINDOW)
    ids, _ = cache.open([[]])
    key = torch.ones(1, 2, 64, device="cuda").half()
    with cache.begin_step(ids, 1) as step:
        for layer in range(3):
            step.append(layer, key, key)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            key.add_(1)  # an empty graph would be warned of
            with pytest.raises(UnsupportedError, match="expected a run of a GraphStep while a CUDA graph is captured"):
                step.attend(0, key, window_size=(19, 0))


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize(("head_dim", "has_own"), [(64, False), (64, True), (128, False)])
def test_tiers_of_a_group_are_those_of_a_cache_of_its_own(head_dim, has_own, is_captured):
    import torch

    tiers = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 64, "cold": "int4"}
    groups = [{"layers": [0, 2], "window": 50, "num_tokens": 4096}, {"layers": 1, "num_tokens": 16384}]
    if has_own:
        groups[1]["tiers"] = tiers
    caches = [
        make(groups, num_tokens=None, head_dim=head_dim, tiers=None if has_own else tiers),
        make(None, num_layers=1, head_dim=head_dim, tiers=tiers),
    ]
    ids = [cache.open([[]] * 3)[0] for cache in caches]
    torch.manual_seed(0)
    key, value = torch.zeros(2, 300, 2, head_dim, device="cuda").half()
    q = torch.zeros(300, 4, head_dim, device="cuda").half()
    outs = [torch.empty_like(q) for _ in caches]
    fixed = [GraphStep(cache, 3, max_seq_len=4000) for cache in caches]
    graphs = [torch.cuda.CUDAGraph() for _ in caches]

    def layers(step, which, used):
        for layer in range(caches[which].config.num_layers):
            step.append(layer, key[:used], value[:used])
            window = (49, 0) if which == 0 and layer != 1 else (-1, -1)
            out = step.attend(layer, q[:used], window_size=window)
            if which == 1 or layer == 1:
                outs[which][:used] = out

    def run(counts, replays=False):
        for tensor in (key, value, q):
            tensor.normal_()
        used = sum(counts)
        for which, cache in enumerate(caches):
            with cache.begin_step(ids[which], counts) as step:
                assert step.ok.all()
                if replays:
                    fixed[which].load(step)
                    graphs[which].replay()
                else:
                    layers(step, which, used)
                cache.end_step(step)
        assert torch.isfinite(outs[0][:used]).all()
        assert torch.equal(outs[0][:used], outs[1][:used])

    for counts in ([100, 3, 64], [100, 90, 1], [200, 0, 90]):
        run(counts)
    if is_captured:
        for which, cache in enumerate(caches):
            with cache.begin_step(ids[which], 1) as step:
                fixed[which].load(step)
                layers(fixed[which].begin(), which, 3)
            with torch.cuda.graph(graphs[which]):
                layers(fixed[which].begin(), which, 3)
    for _ in range(100):
        run([1, 1, 1], is_captured)
    stats = caches[0].stats()
    assert min(stats.num_demoted_warm, stats.num_demoted_cold) > 0
    for cache in caches:
        cache.check_integrity()


class DeviceGroupMachine(DeviceMachine, GroupMachine):
    """The machine of caches with groups, their memory on the GPU."""


@pytest.mark.parametrize("config", GROUPED_CONFIGS[1::2], ids=name_of)
def test_every_read_returns_what_the_sequence_was_given_in_each_group_of_layers(config):
    machine = type("Machine", (DeviceGroupMachine,), {"config": {**config, "backend": "cuda"}})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=5,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # what this machine finds, that of the CPU shrinks
        ),
    )
