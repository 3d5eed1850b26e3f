"""Steps whose rows share beginnings give what steps give that read each row by itself, eagerly and in replays."""

import numpy as np
import pytest

from kvtoolkit import CacheConfig, GraphStep, KVCache
from kvtoolkit.cache.state import shared_reads

LAYERS, HEADS, GROUP, DIM, MEMBERS = 2, 2, 4, 64, 4
SHAPE = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "dtype": "float16", "num_tokens": 1 << 14}


def feed(step, seed, rows=None):
    """Append and attend in all layers with drawn arrays, equal for equal seeds; returns the results."""
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    num_tokens = len(step.slot_mapping) if rows is None else rows
    outs = []
    for layer in range(LAYERS):
        shape = {"device": "cuda", "dtype": torch.float16, "generator": generator}
        key, value = (torch.randn(num_tokens, HEADS, DIM, **shape) for _ in range(2))
        step.append(layer, key, value)
        outs.append(step.attend(layer, torch.randn(num_tokens, HEADS * GROUP, DIM, **shape)))
    return torch.stack(outs)


def interleaved_families(cache):
    """Two families of sequences that share 700 tokens, each with a smaller one inside, in turns."""
    parents, _ = cache.open([[]] * 2)
    for seed, count in enumerate((700, 1)):
        with cache.begin_step(parents, count) as step:
            feed(step, seed)
            cache.end_step(step)
    ids = np.concatenate([parents[:, None], cache.fork(parents, MEMBERS // 2 - 1)], axis=1)
    with cache.begin_step(ids.ravel(), 150) as step:
        feed(step, 2)
        cache.end_step(step)
    ids = np.concatenate([ids, cache.fork(ids.ravel(), 1).reshape(ids.shape)], axis=1)
    return ids.T.ravel()


@pytest.fixture
def caches(monkeypatch):
    """A cache that shares reads of whatever is common, and one that never does, in the same state."""
    monkeypatch.setattr(shared_reads, "LEAST_NBYTES", 1)
    both = [KVCache(CacheConfig(**SHAPE, backend="cuda", shared_reads=shares)) for shares in (True, False)]
    return both, [interleaved_families(cache) for cache in both]


def assert_near(out, expected):
    # one more rounding to 16 bit of values that are means of normal ones
    assert (out.float() - expected.float()).abs().max().item() < 4e-3


@pytest.mark.gpu
def test_eager_steps_give_what_they_give_without_shared_reads(caches):
    both, ids = caches
    for turn in range(30):
        if turn == 10:
            for cache, held in zip(both, ids, strict=True):
                cache.reorder(held, [1, 1, 2, 3, 5, 5, 7, 6])
        if turn == 20:
            for cache, held in zip(both, ids, strict=True):
                cache.truncate(held, cache.lengths(held) // 2)
        outs = []
        for cache, held in zip(both, ids, strict=True):
            with cache.begin_step(held, 1) as step:
                outs.append(feed(step, 100 + turn))
                sharing = step._find_sharing(cache._group.shared_reads, step._arrays)
                assert (sharing is not None) is cache.config.shared_reads
                cache.end_step(step)
        assert_near(*outs)


@pytest.mark.gpu
def test_rows_that_share_nothing_may_be_among_others(caches):
    """They have no new tokens, more than 8, or no room."""
    both, ids = caches
    for cache in both:  # so that 600 tokens find no room, and a few do
        (filler,), _ = cache.open([[]])
        with cache.begin_step([filler], cache.stats().free) as step:
            feed(step, 3)
            cache.end_step(step)
    for counts in ([1, 1, 12, 1, 1, 0, 1, 1], [2, 1, 1, 600, 8, 1, 9, 1], [1] * 8):
        outs = []
        for cache, held in zip(both, ids, strict=True):
            with cache.begin_step(held, counts) as step:
                assert step.ok.tolist() == [count <= 12 for count in counts]
                outs.append(feed(step, 7))
                cache.abort_step(step)
        assert_near(*outs)


@pytest.mark.gpu
def test_replays_give_what_eager_steps_give_without_shared_reads(caches):
    import torch

    (shares, plain), ids = caches
    batch = 2 * MEMBERS + 1  # the last row is padding
    fixed = GraphStep(shares, batch, shared_reads=True)
    new = torch.zeros(LAYERS, 2, batch, HEADS, DIM, device="cuda", dtype=torch.float16)
    q = torch.zeros(LAYERS, batch, HEADS * GROUP, DIM, device="cuda", dtype=torch.float16)
    out = torch.zeros_like(q)

    def model(run):
        for layer in range(LAYERS):
            run.append(layer, new[layer, 0], new[layer, 1])
            out[layer] = run.attend(layer, q[layer])

    with shares.begin_step(ids[0], 1) as step:
        fixed.load(step)
        model(fixed.begin())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(fixed.begin())
    random = np.random.default_rng(0)
    for turn in range(60):
        if turn == 30:
            for cache, held in zip((shares, plain), ids, strict=True):
                cache.reorder(held, [1, 1, 2, 3, 5, 5, 7, 6])
        chosen = random.permutation(2 * MEMBERS)[: random.integers(1, 2 * MEMBERS + 1)]
        new.normal_()
        q.normal_()
        with shares.begin_step(ids[0][chosen], 1) as step:
            fixed.load(step)
            graph.replay()
            shares.end_step(step)
        rows = len(chosen)
        with plain.begin_step(ids[1][chosen], 1) as step:
            for layer in range(LAYERS):
                step.append(layer, new[layer, 0, :rows], new[layer, 1, :rows])
                assert_near(out[layer, :rows], step.attend(layer, q[layer, :rows]))
            plain.end_step(step)
        assert not out[:, rows:].any()


@pytest.mark.gpu
def test_codes_that_rows_share_are_read_once(monkeypatch):
    """Steps over tiers: the codes of a beginning are made numbers once for all rows, and again in a replay."""
    import torch

    from kvtoolkit.cuda.launching import Launch

    monkeypatch.setattr(shared_reads, "LEAST_NBYTES_OF_CODES", 1)
    monkeypatch.setattr(shared_reads, "LEAST_SHARE_OF_CODES", 0.3)
    tiers = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 128, "cold": "int4"}
    both = [KVCache(CacheConfig(**SHAPE, backend="cuda", tiers=tiers, shared_reads=shares)) for shares in (True, False)]
    ids = [interleaved_families(cache) for cache in both]
    launched, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, *a, **k: (launched.append(self.kernel.name), run(self, *a, **k)))
    for turn in range(90):
        outs = []
        for cache, held in zip(both, ids, strict=True):
            with cache.begin_step(held, 1) as step:
                launched.clear()
                outs.append(feed(step, 100 + turn))
                assert ("kvt_merge_shared" in launched) is cache.config.shared_reads
                cache.end_step(step)
        assert_near(*outs)
    assert both[0].stats().tiers["cold"].used > 0
    fixed = GraphStep(both[0], len(ids[0]), shared_reads=True)
    with both[0].begin_step(ids[0], 1) as step:
        fixed.load(step)
        found = feed(fixed.begin(), 7, len(ids[0]))
        torch.cuda.synchronize()
    with both[1].begin_step(ids[1], 1) as step:
        assert_near(found, feed(step, 7))
