"""Canaries on a GPU: in eager steps, in captured ones, and in steps that the device drives."""

import numpy as np
import pytest

from allocators import IntegrityError
from kvtoolkit import CacheConfig, DeviceSteps, GraphStep, KVCache
from kvtoolkit.cache.state.block_table import ID_BITS, granule_at
from kvtoolkit.cuda import check
from tests.kvtoolkit.cache.test_gpu_device_steps import Model, prefill

pytestmark = pytest.mark.gpu
TIERS = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "cold": "int4"}
WINDOW = [{"layers": [0], "num_tokens": 8192}, {"layers": [1], "window": 40, "num_tokens": 8192}]


@pytest.fixture(autouse=True)
def canaries(monkeypatch):
    monkeypatch.setattr(check, "CANARY", True)


def make(**options):
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "dtype": "bfloat16", "backend": "cuda"}
    return KVCache(CacheConfig(**{**shape, **({} if "layer_groups" in options else {"num_tokens": 8192}), **options}))


def spoil(cache, seq_id, token=3):
    """Write over a key of a sequence."""
    granule = granule_at(cache._group.table, int(seq_id) & ((1 << ID_BITS) - 1), token // 8)
    cache.key_cache(0)[granule, 0, token % 8, 1] = 12345


class Captured:
    def __init__(self, cache, batch):
        import torch

        self.cache, self.fixed, self.model, self.graph = cache, GraphStep(cache, batch), Model(), None
        self.tokens = torch.zeros(batch, dtype=torch.int64, device="cuda")

    def compute(self):
        self.model(self.tokens, self.fixed.begin())

    def step(self, ids, tokens):
        import torch

        self.tokens[: len(tokens)] = torch.as_tensor(tokens, device="cuda")
        with self.cache.begin_step(ids, 1, tokens) as step:
            self.fixed.load(step)
            if self.graph is None:
                from examples.steps import capture

                self.graph = capture(self.compute)
            self.graph.replay()
            self.cache.end_step(step)


@pytest.mark.parametrize("options", [{}, {"growth": "lazy_merge"}, {"tiers": TIERS}, {"layer_groups": WINDOW}], ids=str)
def test_captured_steps_find_what_was_written_over(options):
    cache, rng = make(**options), np.random.default_rng(0)
    ids = prefill(cache, Model(), [30, 70, 9], tell=True)
    captured = Captured(cache, 4)
    for _ in range(100):
        captured.step(ids, rng.integers(0, 512, 3))
    spoil(cache, int(ids[2]), 105)
    with pytest.raises(IntegrityError, match="row 2 of a step.*token 105.*key has changed"):
        captured.step(ids, rng.integers(0, 512, 3))


def test_replays_of_the_device_find_a_block_that_changed_hands_too_early():
    import torch

    cache, model = make(growth="fixed8", block_sizes=[8]), Model()
    steps = DeviceSteps(cache, 3, 32)

    def compute():
        _, chosen = model(steps.tokens, steps.begin())
        steps.tokens.copy_(torch.where(steps.status == 0, chosen, steps.tokens))

    from examples.steps import capture

    graph = capture(compute)
    ids = prefill(cache, model, [30, 70, 9], tell=True)
    for early in (False, True):
        steps.load(ids, [1, 2, 3])
        for i in range(32):
            if early and i == 16:  # a block of the first row is what the second one is given next
                tables = steps._graph_step.tables
                tables.block_table[1, :2] = tables.block_table[0, :2]
            graph.replay()
        if not early:
            assert steps.finish().num_new.tolist() == [32] * 3
    with pytest.raises(IntegrityError, match="row 1 of a step"):
        steps.finish()


def test_eager_steps_with_prompts_find_what_was_written_over():
    cache, model = make(), Model()
    ids = prefill(cache, model, [300, 20], tell=True)
    prefill(cache, model, [50, 60], ids, tell=True)
    spoil(cache, int(ids[0]))
    with pytest.raises(IntegrityError, match="row 0 of a step.*token 3.*key has changed"):
        prefill(cache, model, [5, 6], ids, tell=True)
