"""Captured graphs: any lengths, tables and batches in a replay, the bits of an eager call."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtoolkit import CacheConfig, GraphStep, KVCache, StepError, UnsupportedError, variable_block_attention
from kvtoolkit.attention.calls import append

ROOT = Path(__file__).parents[3]
TIERS = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 64, "cold": "int4"}


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_a_thousand_replays_with_changing_lengths_give_the_bits_of_eager_calls(batch):
    import torch

    torch.manual_seed(batch)
    rng = np.random.default_rng(batch)
    heads, group, dim, most = 2, 4, 64, 3000
    granules, width = 4096, -(-most // 8)
    k_cache, v_cache = torch.randn(2, granules, heads, 8, dim, device="cuda").half()
    table = torch.full((batch, width), -1, dtype=torch.int32, device="cuda")
    starts, seq_lens = table.clone(), torch.zeros(batch, dtype=torch.int32, device="cuda")
    q = torch.randn(batch, heads * group, dim, device="cuda").half()
    out = torch.empty_like(q)
    calls = {"cu_seqlens_q": None, "window_size": (-1, -1)}

    def draw():
        """New lengths, some of them 0, and new entries of all sizes anywhere."""
        lengths = rng.integers(0, most, batch) * (rng.random(batch) < 0.8)
        rows = np.full((2, batch, width), -1, np.int32)
        for row, length in enumerate(lengths):
            sizes = rng.integers(1, 9, width)
            ends = sizes.cumsum()
            used = int(np.searchsorted(ends, -(-length // 8))) + 1 if length else 0
            first = rng.integers(0, granules - 8, used)
            rows[0, row, :used] = first | (sizes[:used] - 1) << 24
            rows[1, row, :used] = (ends - sizes)[:used]
        table.copy_(torch.from_numpy(rows[0]))
        starts.copy_(torch.from_numpy(rows[1]))
        seq_lens.copy_(torch.from_numpy(lengths.astype(np.int32)))
        q.normal_()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        draw()
        variable_block_attention(q, k_cache, v_cache, table, starts, seq_lens, **calls)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            variable_block_attention(q, k_cache, v_cache, table, starts, seq_lens, out=out, **calls)
        for _ in range(334):  # of each of three batches
            draw()
            out.fill_(float("nan"))
            graph.replay()
            expected = variable_block_attention(q, k_cache, v_cache, table, starts, seq_lens, **calls)
            assert torch.equal(out, expected)


def make(**options):
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16", "num_tokens": 4096}
    return KVCache(CacheConfig(**{**shape, "backend": "cuda", **options}))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [{"growth": "lazy_merge"}, {"allocator": "slab"}, {"growth": "append"}, {"tiers": TIERS, "prefix_caching": False}],
    ids=str,
)
def test_steps_of_a_cache_by_replays_are_the_steps_of_a_cache_without_a_graph(config):
    import torch

    eager, captured = make(**config), make(**config)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    batch = 6
    key, value = torch.zeros(2, 2, batch, 2, 64, device="cuda").half()  # of the two layers
    q, out = torch.zeros(2, 2, batch, 8, 64, device="cuda").half()
    fixed = GraphStep(captured, batch)

    def layers(step, rows=None):
        for layer in range(2):
            step.append(layer, key[layer, :rows], value[layer, :rows])
            out[layer, :rows] = step.attend(layer, q[layer, :rows])

    def draw():
        for tensor in (key, value, q):
            tensor.normal_()
        out.fill_(float("nan"))

    ids = {}
    for cache in (eager, captured):
        ids[cache], _ = cache.open([[]] * 5)
        with cache.begin_step(ids[cache], 90) as step:
            for layer in range(2):
                new = torch.arange(450 * 2 * 64, device="cuda").view(450, 2, 64).remainder(7).half()
                step.append(layer, new, new)
            cache.end_step(step)
    with captured.begin_step(ids[captured], 1) as step:
        fixed.load(step)
        layers(fixed.begin())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers(fixed.begin())
    for turn in range(150):
        if turn == 50:  # a sequence ends, another begins
            for cache in (eager, captured):
                cache.close(ids[cache][1:2])
                opened, _ = cache.open([[]])
                ids[cache] = np.concatenate([ids[cache][:1], ids[cache][2:], opened])
        if turn == 100:
            cut = eager.lengths(ids[eager]) // 2
            for cache in (eager, captured):
                cache.truncate(ids[cache], cut)
        chosen = rng.permutation(5)[: rng.integers(1, 6)]
        draw()
        with eager.begin_step(ids[eager][chosen], 1) as step:
            layers(step, len(chosen))
            eager.end_step(step)
        wanted = out.clone()
        out.fill_(float("nan"))
        with captured.begin_step(ids[captured][chosen], 1) as step:
            fixed.load(step)
            graph.replay()
            captured.end_step(step)
        found = out[:, : len(chosen)].float()
        # not the same bits: what is planned depends on the rows of the batch, padding included
        torch.testing.assert_close(found, wanted[:, : len(chosen)].float(), rtol=2e-3, atol=2e-3)
        assert (out[:, len(chosen) :] == 0).all()
    captured.check_integrity()


@pytest.mark.gpu
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("num_kv_heads", [2, 8])
def test_every_run_of_the_model_makes_its_own_plan(num_kv_heads, order, monkeypatch):
    import torch

    from kvtoolkit.cuda.launching import Launch

    launched = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, *a, **k: (launched.append(self.kernel.name), run(self, *a, **k)))
    cache = make(num_kv_heads=num_kv_heads)
    batch = 1 if num_kv_heads == 8 else 3  # one sequence and many heads: a cluster, which needs no plan
    fixed = GraphStep(cache, batch)
    ids, _ = cache.open([[]] * batch)
    key = torch.randn(batch, num_kv_heads, 64, device="cuda").half()

    def layers():
        run = fixed.begin()
        for layer in order:
            run.append(layer, key, key)
            run.attend(layer, key)

    with cache.begin_step(ids, 1) as step:
        fixed.load(step)
        layers()
        for _ in range(2):
            launched.clear()
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                layers()
            assert launched.count("kvt_expand") == 1
            assert launched.count("kvt_plan") == (batch > 1)
            assert launched.count("kvt_decode") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("most", [3, 40])
@pytest.mark.parametrize("shared_reads", [False, True])
def test_one_graph_serves_every_mixture_of_new_tokens(most, shared_reads):
    """3 new tokens are the decode kernel's work, 40 may be either kernel's, and shared reads the prompt kernel's."""
    import torch

    cache = make(growth="lazy_merge")
    torch.manual_seed(1)
    rng = np.random.default_rng(most)
    batch, tokens = 6, 90
    key, value = torch.zeros(2, 2, tokens, 2, 64, device="cuda").half()
    q, out = torch.zeros(2, 2, tokens, 8, 64, device="cuda").half()
    fixed = GraphStep(cache, batch, most, tokens, shared_reads=shared_reads)

    def layers(step, used=None):
        for layer in range(2):
            step.append(layer, key[layer, :used], value[layer, :used])
            out[layer, :used] = step.attend(layer, q[layer, :used])

    ids, _ = cache.open([[]])
    with cache.begin_step(ids, 80) as step:  # what all of them begin with
        for layer in range(2):
            new = torch.randn(80, 2, 64, device="cuda").half()
            step.append(layer, new, new)
        cache.end_step(step)
    ids = np.concatenate([ids, cache.fork(ids, 4).reshape(-1)])
    with cache.begin_step(ids[:1], 1) as step:
        fixed.load(step)
        layers(fixed.begin())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers(fixed.begin())
    for _ in range(30):
        chosen = rng.permutation(5)[: rng.integers(1, 6)]
        counts = rng.integers(0, rng.choice([2, most + 1]), len(chosen))
        while counts.sum() > tokens or cache.lengths(ids[chosen]).max() + most > 700:
            cache.truncate(ids, np.minimum(cache.lengths(ids), 90))
            counts //= 2
        used = int(counts.sum())
        for tensor in (key, value, q):
            tensor.normal_()
        found = []
        for how in ("eager step", "eager run", "replay"):
            out.fill_(float("nan"))
            with cache.begin_step(ids[chosen], counts) as step:
                assert step.ok.all()
                if how == "eager step":
                    layers(step, used)
                else:
                    fixed.load(step)
                    if how == "replay":
                        graph.replay()
                    else:
                        layers(fixed.begin())
                if how == "replay":
                    cache.end_step(step)
                else:
                    torch.cuda.synchronize()
            found.append(out[:, :used].clone())
        assert torch.equal(found[1], found[2])
        torch.testing.assert_close(found[0].float(), found[2].float(), rtol=2e-3, atol=4e-3)
    cache.check_integrity()


@pytest.mark.gpu
def test_a_step_that_a_graph_was_not_made_for_is_refused():
    cache = make()
    ids, _ = cache.open([[]] * 3)
    fixed = GraphStep(cache, 2, 4, 6)
    for rows, counts, expected in ((3, 1, "up to 2 rows"), (2, 5, "up to 4 new tokens"), (2, 4, "6 in all")):
        with cache.begin_step(ids[:rows], counts) as step, pytest.raises(StepError, match=expected):
            fixed.load(step)
    with cache.begin_step(ids[:2], [4, 2]) as step:
        fixed.load(step)
    for arguments in ((0, None), (1, 3), (2, 0)):
        with pytest.raises(StepError, match="max_new_tokens"):
            GraphStep(cache, 2, *arguments)


@pytest.mark.gpu
def test_a_graph_that_leaves_a_layer_out_is_noticed_at_the_end_of_each_step():
    import torch

    cache = make()
    fixed = GraphStep(cache, 1)
    ids, _ = cache.open([[]])
    key = torch.ones(1, 2, 64, device="cuda").half()

    def layers(count):
        run = fixed.begin()
        for layer in range(count):
            run.append(layer, key, key)
            run.attend(layer, key)

    for count in (1, 2):
        with cache.begin_step(ids, 1) as step:
            fixed.load(step)
            layers(count)  # eagerly, so that nothing is compiled while it is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layers(count)
        for _ in range(2):
            with cache.begin_step(ids, 1) as step:
                fixed.load(step)
                graph.replay()
                if count == 1:
                    with pytest.raises(StepError, match="all 2 layers .* none for layer 1;"):
                        cache.end_step(step)
                else:
                    cache.end_step(step)
    assert cache.lengths(ids).tolist() == [2]


@pytest.mark.gpu
def test_other_attention_may_run_between_the_layers_of_a_captured_step():
    import torch

    torch.manual_seed(0)
    cache, other = make(), make()
    ids = {}
    for one, counts in ((cache, [300, 20, 7]), (other, [9, 500, 41])):
        ids[one], _ = one.open([[]] * 3)
        with one.begin_step(ids[one], counts) as step:
            for layer in range(2):
                tokens = torch.randn(sum(counts), 2, 64, device="cuda").half()
                step.append(layer, tokens, tokens)
            one.end_step(step)
    new, q = torch.randn(3, 2, 64, device="cuda").half(), torch.randn(3, 8, 64, device="cuda").half()

    def begin(one):
        step = one.begin_step(ids[one], 1)
        for layer in range(2):
            step.append(layer, new, new)
        return step

    with begin(cache) as step:
        expected = [step.attend(layer, q) for layer in range(2)]
    captured, between = begin(cache), begin(other)
    stream, graph, found = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for layer in range(2):
            found.append(captured.attend(layer, q))
            between.attend(layer, q)
    graph.replay()
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
def test_tables_are_not_uploaded_inside_a_capture():
    import torch

    cache = make()
    ids, _ = cache.open([[]])
    with cache.begin_step(ids, 1) as step:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            torch.zeros(1, device="cuda").add_(1)  # an empty graph would be warned of
            with pytest.raises(UnsupportedError, match="before a CUDA graph is captured"):
                step.on_device  # noqa: B018


@pytest.mark.gpu
def test_steps_that_do_not_fit_are_refused():
    cache = make()
    fixed = GraphStep(cache, 2, max_seq_len=100)
    ids, _ = cache.open([[]] * 3)
    with cache.begin_step(ids, 1) as step, pytest.raises(StepError, match="up to 2 rows of one new token, got 3 rows"):
        fixed.load(step)
    with cache.begin_step(ids[:2], 2) as step, pytest.raises(StepError, match="got 2 rows and 4 tokens"):
        fixed.load(step)
    with cache.begin_step(ids[:1], 101) as step:
        cache.end_step(step)
    with cache.begin_step(ids[:1], 1) as step, pytest.raises(StepError, match="up to 100 tokens, got 102"):
        fixed.load(step)
    with pytest.raises(StepError, match="open step"):
        fixed.load(step)
    with make().begin_step([], 1) as other, pytest.raises(StepError, match="of the cache that this was made for"):
        fixed.load(other)


@pytest.mark.gpu
def test_a_run_that_is_over_or_a_layer_that_comes_twice_is_refused():
    import torch

    cache = make()
    fixed = GraphStep(cache, 1)
    ids, _ = cache.open([[]])
    key = torch.ones(1, 2, 64, device="cuda").half()
    with cache.begin_step(ids, 1) as step:
        fixed.load(step)
        run = fixed.begin()
        run.append(0, key, key)
        with pytest.raises(StepError, match="layer: expected one that this run has not appended to, got 0"):
            run.append(0, key, key)
        run.append(1, key, key)
        fixed.begin()
        for call in (lambda: run.append(1, key, key), lambda: run.attend(1, key)):
            with pytest.raises(StepError, match="expected the run that `GraphStep.begin` returned last"):
                call()


def test_a_cache_on_the_cpu_has_no_graphs():
    cache = KVCache(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=16, num_tokens=64))
    with pytest.raises(UnsupportedError, match="cache: expected one with backend 'cuda', got 'cpu'"):
        GraphStep(cache, 1)


@pytest.mark.gpu
def test_a_stream_first_seen_in_a_capture_is_served():
    import torch

    cache = torch.randn(64, 2, 8, 64, device="cuda").half()
    slots = torch.arange(4, device="cuda")
    q = torch.randn(4, 8, 64, device="cuda").half()
    table, starts = (
        torch.arange(4, dtype=torch.int32, device="cuda")[:, None] * 8 | 7 << 24,
        torch.zeros(4, 1).int().cuda(),
    )
    lengths = torch.full((4,), 50, dtype=torch.int32, device="cuda")
    expected = variable_block_attention(q, cache, cache, table, starts, lengths)
    append(q[:, :2], q[:, :2], cache.clone(), cache.clone(), slots, layout="HND")
    for _ in range(2):  # a second one too, once the call has run again
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            out = variable_block_attention(q, cache, cache, table, starts, lengths)
        graph.replay()
        assert torch.equal(out, expected)
        variable_block_attention(q, cache, cache, table, starts, lengths)


@pytest.mark.gpu
def test_the_example_decodes_the_same_tokens_with_a_graph():
    pytest.importorskip("transformers")
    finished = subprocess.run(
        [sys.executable, "-m", "examples.graph_decode"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "1024 of 1024 tokens are the same" in finished.stdout
