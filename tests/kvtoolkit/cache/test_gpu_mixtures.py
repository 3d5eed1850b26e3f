"""Replays of one graph give the bits of eager steps, whichever of the two kernels the new tokens call for."""

import numpy as np
import pytest

from kvtoolkit import CacheConfig, GraphStep, KVCache
from tests.kvtoolkit.cache.test_tiers_cache import TIERS

pytestmark = pytest.mark.gpu
LAYERS, GROUP = 2, 4


@pytest.fixture(autouse=True)
def _hopper():
    from kvtoolkit.cuda import prompt

    if prompt.arch_of(0) != 90:
        pytest.skip("other architectures have no prompt kernel, and choose a kernel for each row")


class Mixtures:
    """A cache with open sequences, and a graph of a model's layers that serves any new tokens of all of them."""

    def __init__(self, batch, most, tokens, **shape):
        import torch

        torch.manual_seed(0)
        self.torch, self.tokens = torch, tokens
        config = {"num_layers": LAYERS, "dtype": "float16", "num_tokens": 1 << 14, "backend": "cuda", **shape}
        self.cache = KVCache(CacheConfig(**config, shared_reads=False))
        heads, dim = shape["num_kv_heads"], shape["head_dim"]
        self.new = torch.zeros(LAYERS, 2, tokens, heads, dim, device="cuda").half()
        self.q = torch.zeros(LAYERS, tokens, heads * GROUP, dim, device="cuda").half()
        self.out = torch.zeros_like(self.q)
        self.ids, _ = self.cache.open([[]] * batch)
        with self.cache.begin_step(self.ids, np.arange(batch) * 150 % 700 + 20) as step:
            for layer in range(LAYERS):
                cached = torch.randn(len(step.slot_mapping), heads, dim, device="cuda").half()
                step.append(layer, cached, cached.flip(0))
            self.cache.end_step(step)
        # an eager step knows its lengths, and a single sequence of up to 12288 tokens has a plan of its own
        self.fixed = GraphStep(self.cache, batch, most, tokens, max_seq_len=4096)
        with self.cache.begin_step(self.ids, 1) as step:
            self.fixed.load(step)
            self.run(self.fixed.begin())
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run(self.fixed.begin())

    def run(self, step, used=None):
        """The layers of the model."""
        for layer in range(LAYERS):
            step.append(layer, self.new[layer, 0, :used], self.new[layer, 1, :used])
            step.attend(layer, self.q[layer, :used], out=self.out[layer, :used])

    def check(self, counts):
        """The new tokens of one step, run eagerly and by a replay. In another step tokens might be in other tiers."""
        used = int(np.sum(counts))
        assert used <= self.tokens
        self.new.normal_()
        self.q.normal_()
        found = []
        with self.cache.begin_step(self.ids, counts) as step:
            assert step.ok.all()
            for is_replayed in (False, True):
                self.out.fill_(float("nan"))
                if is_replayed:
                    self.fixed.load(step)
                    self.graph.replay()
                else:
                    self.run(step, used)
                    self.torch.cuda.synchronize()
                found.append(self.out[:, :used].clone())
            self.cache.end_step(step)
        assert not found[1].isnan().any()
        self.compare(*found)

    def compare(self, eager, replayed):
        """They have the same bits."""
        assert self.torch.equal(eager, replayed)


@pytest.mark.parametrize(("head_dim", "most_decoded"), [(128, 4), (256, 2)])
def test_replays_with_any_mixture_have_the_bits_of_eager_steps(head_dim, most_decoded):
    mixtures = Mixtures(6, 60, 150, num_kv_heads=2, head_dim=head_dim)
    rng = np.random.default_rng(head_dim)
    mixtures.check([1, 1, 1, 1, 1, 1])
    mixtures.check([1, 0, 1, 0, 0, 1])
    mixtures.check([0, 0, 0, 0, 0, 1])
    mixtures.check([1, 1, 60, 1, 1, 1])
    mixtures.check([0, most_decoded, 1, 1, most_decoded, 0])
    mixtures.check([0, most_decoded, 1, 1, most_decoded + 1, 0])
    mixtures.check([0, 0, 60, 0, 60, 30])
    for _ in range(30):
        most = int(rng.choice([1, most_decoded, most_decoded + 1, 25]))
        mixtures.check(rng.integers(0, most + 1, 6))
    mixtures.cache.check_integrity()


class TieredMixtures(Mixtures):
    """Each row has its kernel, and an eager step without long rows has decode for all: so bits may differ."""

    def compare(self, eager, replayed):
        self.torch.testing.assert_close(replayed, eager, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_replays_over_tiers_are_as_eager_steps(head_dim):
    mixtures = TieredMixtures(6, 60, 150, num_kv_heads=2, head_dim=head_dim, tiers=TIERS)
    rng = np.random.default_rng(head_dim)
    mixtures.check([1, 1, 1, 1, 1, 1])
    mixtures.check([0, 0, 0, 0, 0, 1])
    mixtures.check([1, 1, 60, 1, 1, 1])
    mixtures.check([2, 3, 1, 8, 0, 9])
    mixtures.check([0, 0, 60, 0, 60, 30])
    for _ in range(10):
        mixtures.check(rng.integers(0, 1 + int(rng.choice([1, 2, 8, 25])), 6))
    assert all(tier.used for tier in mixtures.cache.stats().tiers.values())
    mixtures.cache.check_integrity()


def test_one_sequence_has_the_bits_of_eager_steps():
    """Its decode kernel is a cluster, or splits, without a plan."""
    for heads in (8, 2):
        mixtures = Mixtures(1, 200, 200, num_kv_heads=heads, head_dim=128)
        for count in (1, 1, 4, 5, 200, 1, 3, 60, 2, 1):
            mixtures.check([count])


def test_a_replay_without_new_tokens_writes_nothing():
    mixtures = Mixtures(3, 40, 40, num_kv_heads=2, head_dim=128)
    mixtures.check([0, 0, 0])
    assert mixtures.out.isnan().all()
    mixtures.check([1, 1, 1])


def test_a_graph_holds_both_kernels_and_plans_once():
    mixtures = Mixtures(3, 40, 40, num_kv_heads=2, head_dim=128)
    from kvtoolkit.cuda.launching import Launch

    launched, run = [], Launch.run
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Launch, "run", lambda self, *a, **k: (launched.append(self.kernel.name), run(self, *a, **k)))
        with mixtures.torch.cuda.graph(mixtures.torch.cuda.CUDAGraph()):
            mixtures.run(mixtures.fixed.begin())
    attention = [name for name in launched if name != "kvt_append"]
    each = ["kvt_decode", "kvt_prompt"]
    assert attention == ["kvt_plan_prompts", "kvt_expand", "kvt_plan", *each * LAYERS]
