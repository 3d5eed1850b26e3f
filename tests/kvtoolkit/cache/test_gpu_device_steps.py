"""Steps that the device drives: the slots, entries and bits of steps of the host, in replays of one graph."""

import numpy as np
import pytest

from kvtoolkit import CacheConfig, DeviceSteps, GraphStep, KVCache
from tests.kvtoolkit.cache.forms import cut, form_of

pytestmark = pytest.mark.gpu
LAYERS = 2
WINDOW = [{"layers": [0], "num_tokens": 65536}, {"layers": [1], "window": 40, "num_tokens": 65536}]
TIERS = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 128, "cold": "int4"}
PINNED = {"hot": 128, "pinned_tokens": 64, "warm": "int8"}


def make(**options):
    shape = {"num_layers": LAYERS, "num_kv_heads": 2, "head_dim": 64, "dtype": "bfloat16"}
    if "layer_groups" not in options:
        shape["num_tokens"] = 65536
    return KVCache(CacheConfig(**{**shape, "backend": "cuda", **options}))


class Model:
    """Two layers whose next token depends on all that was attended to."""

    def __init__(self):
        import torch

        torch.manual_seed(0)
        self.weights = torch.randn(3, 512, 8, 64, device="cuda").bfloat16()

    def __call__(self, tokens, step):
        q, keys, values = (one[tokens] for one in self.weights)
        for layer in range(LAYERS):
            step.append(layer, keys[:, 2 * layer : 2 * layer + 2], values[:, 2 * layer : 2 * layer + 2])
            q = q + step.attend(layer, q, window_size=(39, 0) if layer else (-1, -1))
        return q, q.float().sum((1, 2)).mul(100).long().remainder(512)


class ByHost:
    """Captured steps, for each of which the host makes room."""

    def __init__(self, cache, model, batch):
        import torch

        self.cache, self.fixed = cache, GraphStep(cache, batch)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device="cuda")
        self.model, self.graph, self.out = model, None, None

    def compute(self):
        self.out, chosen = self.model(self.tokens, self.fixed.begin())
        self.tokens.copy_(chosen)

    def step(self, ids):
        fed = self.tokens[: len(ids)].clone()
        with self.cache.begin_step(ids, 1) as step:
            assert step.ok.all()
            self.fixed.load(step)
            if self.graph is None:
                saved = self.tokens.clone()
                from examples.steps import capture

                self.graph = capture(self.compute)
                self.tokens.copy_(saved)
            self.graph.replay()
            form = [form_of(step.tables_of(layer)) for layer in range(LAYERS)]
            self.cache.end_step(step, fed.cpu().numpy())
        return self.out[: len(ids)].clone(), form


class ByDevice:
    def __init__(self, cache, model, batch, max_steps=32, beams=1):
        from examples.steps import capture

        self.cache, self.steps, self.model = cache, DeviceSteps(cache, batch, max_steps, beams=beams), model
        self.graph = capture(self.compute)

    def compute(self):
        import torch

        steps = self.steps
        self.out, chosen = self.model(steps.tokens, steps.begin())
        steps.tokens.copy_(torch.where(steps.status == 0, chosen, steps.tokens))

    def tables(self):
        return [fixed.tables for fixed in self.steps._graph_step._fixed]


def prefill(cache, model, lengths, ids=None, *, tell=False):
    """Feed prompts of these lengths; ``tell``: their tokens are known when the step begins."""
    import torch

    prompts = [[(7 * i + 3 * k) % 512 for k in range(n)] for i, n in enumerate(lengths)]
    if ids is None:
        ids, _ = cache.open(prompts)
    tokens = np.concatenate([np.array(prompt, np.int64) for prompt in prompts])
    with cache.begin_step(ids, lengths, tokens if tell else None) as step:
        assert step.ok.all()
        model(torch.from_numpy(tokens).cuda(), step)
        cache.end_step(step, tokens)
    return ids


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"growth": "fixed8"}, {"growth": "fixed64"}, {"growth": "append"}, {"growth": "proportional"},
        {"growth": "lazy_merge"}, {"growth": "adaptive"}, {"growth": "adaptive", "allocator": "slab"},
        {"allocator": "lockfree"}, {"layer_groups": WINDOW}, {"layer_groups": WINDOW, "growth": "lazy_merge"},
        {"layer_groups": WINDOW, "growth": "fixed8"},
        {"tiers": TIERS}, {"tiers": TIERS, "growth": "fixed8"},
        {"tiers": PINNED, "growth": "lazy_merge", "allocator": "lockfree"},
    ],
    ids=str,
)  # fmt: skip
def test_a_thousand_replays_give_the_bits_of_steps_of_the_host(options, batch):
    compare(options, batch, num_turns=32 if batch == 7 else 4)


@pytest.mark.parametrize("options", [{"growth": "adaptive"}, {"growth": "lazy_merge", "tiers": TIERS}], ids=str)
def test_large_batches_give_the_bits_of_steps_of_the_host(options):
    compare({**options, "max_seqs": 1024, "num_tokens": 1 << 20}, 1024, num_turns=3)


def compare(options, batch, num_turns):
    """Drive two equal caches, one by the host and one by the device; all must be equal at every step."""
    import torch

    model, rng = Model(), np.random.default_rng(batch)
    lengths = rng.integers(1, 200, batch)
    lengths[0] = 1500  # with tiers, more tiles than one step moves
    by_host, by_device = ByHost(make(**options), model, batch), ByDevice(make(**options), model, batch)
    ids = [prefill(one.cache, model, lengths) for one in (by_host, by_device)]
    tokens = np.arange(batch) % 512
    # the host uses what rows have left again at once, so its free memory is in other places, and other blocks join
    may_join = options.get("growth") == "lazy_merge" or bool({"tiers", "layer_groups"} & set(options))
    for _ in range(num_turns):
        by_host.tokens[:] = torch.from_numpy(tokens)
        by_device.steps.load(ids[1], tokens)
        for _ in range(32):
            by_device.graph.replay()
            expected, forms = by_host.step(ids[0])
            assert torch.equal(by_device.out, expected)
            found = [form_of(one, batch) for one in by_device.tables()], forms[: len(by_device.tables())]
            if may_join:
                found = [[cut(form) for form in side] for side in found]
            assert found[0] == found[1]
        turn = by_device.steps.finish()
        assert turn.num_new.tolist() == [32] * batch
        assert turn.next_tokens.tolist() == by_host.tokens.tolist()
        tokens = turn.next_tokens
        assert by_device.cache.lengths(ids[1]).tolist() == by_host.cache.lengths(ids[0]).tolist()
        by_device.cache.check_integrity()
    stats = [one.cache.stats() for one in (by_host, by_device)]
    assert stats[1].callers == 0
    assert stats[0].converted_tokens == stats[1].converted_tokens
    if "layer_groups" not in options:  # when a turn begins, the host may merge what a window is about to pass
        assert stats[0].num_merges == stats[1].num_merges
    assert (stats[1].converted_tokens > 0) == ("tiers" in options)


@pytest.mark.parametrize("options", [{}, {"allocator": "lockfree", "growth": "fixed8"}], ids=str)
def test_beams_that_the_device_reorders_give_the_bits_of_the_host(options):
    import torch

    model, rng, num, beams = Model(), np.random.default_rng(0), 24, 8
    by_host, by_device = ByHost(make(**options), model, num), ByDevice(make(**options), model, num, beams=beams)
    ids = []
    for one in (by_host, by_device):
        first = prefill(one.cache, model, [61, 8, 203])
        ids.append(np.concatenate([[root, *one.cache.fork([root], beams - 1)[0]] for root in first]))
    tokens = np.arange(num)
    for _ in range(4):
        by_host.tokens[:] = torch.from_numpy(tokens)
        by_device.steps.load(ids[1], tokens)
        for _ in range(32):
            parents = np.concatenate([rng.choice(family, beams) for family in np.arange(num).reshape(-1, beams)])
            by_device.steps.parents[:] = torch.from_numpy(parents).cuda()
            by_host.cache.reorder(ids[0], parents)
            by_device.graph.replay()
            expected, _ = by_host.step(ids[0])
            assert torch.equal(by_device.out, expected)
        by_device.steps.parents[:] = torch.from_numpy(parents).cuda()
        by_host.cache.reorder(ids[0], parents)
        turn = by_device.steps.finish()
        assert turn.num_new.tolist() == [32] * num
        tokens = turn.next_tokens
        assert tokens.tolist() == by_host.tokens.tolist()
        by_device.cache.check_integrity()
    assert by_device.cache.stats().callers == 0


def test_two_runs_are_equal_in_everything():
    model, found = Model(), []
    for _ in range(2):
        one = ByDevice(make(num_tokens=8192), model, 40)
        ids = prefill(one.cache, model, np.arange(1, 41))
        seen, tokens = [], np.arange(40)
        for _ in range(8):  # memory runs out
            one.steps.load(ids, tokens)
            for _ in range(32):
                one.graph.replay()
                seen += [array.get() for array in one.tables()[0]] + [one.out.float().cpu().numpy()]
            turn = one.steps.finish()
            seen += list(turn)
            tokens = turn.next_tokens
        assert (turn.status == 1).any()
        one.cache.check_integrity()
        found.append(seen)
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


def test_rows_end_at_the_step_that_the_mask_says():
    import torch

    model, batch = Model(), 5
    one = ByDevice(make(), model, 8)
    ids = prefill(one.cache, model, [9, 30, 64, 65, 100])
    held = one.cache.lengths(ids)
    one.steps.load(ids, [1] * batch, 32, max_lens=held + np.array([32, 0, 9, 32, 40]))
    for i in range(32):
        if i == 11:
            one.steps.finished[3] = True
        one.graph.replay()
        assert (one.steps.status[:batch] == 0).tolist() == [True, False, i < 9, i < 11, True]
    turn = one.steps.finish()
    assert turn.num_new.tolist() == [32, 0, 9, 11, 32]
    assert turn.status.tolist() == [0, 3, 3, 4, 0]
    assert torch.equal(one.steps.finished.cpu(), torch.tensor([False, False, False, True, False, True, True, True]))
    one.cache.check_integrity()


def test_a_turn_needs_no_copies_and_waits_for_nothing():
    import torch

    model = Model()
    one = ByDevice(make(num_tokens=1 << 18), model, 64, max_steps=1000)
    ids = prefill(one.cache, model, [50] * 64)
    one.steps.load(ids, [1] * 64)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(1000):
            one.graph.replay()
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    assert any("kvt_grow" in name for name in names)
    assert not any("HtoD" in name or "DtoH" in name for name in names), names
    assert one.steps.finish().num_new.tolist() == [1000] * 64
    one.cache.check_integrity()


def test_the_host_ends_a_turn_while_the_device_has_other_work():
    import torch

    model = Model()
    one = ByDevice(make(), model, 8)
    ids = prefill(one.cache, model, [30, 70, 9])
    one.steps.load(ids, [1, 2, 3])
    for _ in range(32):
        one.graph.replay()
    one.steps.collect()
    torch.cuda._sleep(1 << 31)  # a second or so
    done = torch.cuda.Event()
    done.record()
    assert one.steps.finish().num_new.tolist() == [32] * 3
    assert not done.query()
    torch.cuda.synchronize()
    one.cache.check_integrity()


def test_refilling_beside_replays_changes_nothing():
    model, found = Model(), []
    for piece in (512, 32):
        one = ByDevice(make(num_tokens=1 << 17), model, 40, max_steps=512)
        ids = prefill(one.cache, model, np.arange(1, 41))
        one.steps.load(ids, np.arange(40), piece)
        polled = []
        for step in range(512):
            if step and step % piece == 0:
                one.steps.refill(piece)
                polled.append(one.steps.poll())
            one.graph.replay()
        known = [turn.num_new.max() for turn in polled if turn is not None]
        assert known == sorted(known)
        turn = one.steps.finish()
        assert turn.num_new.tolist() == [512] * 40
        one.cache.check_integrity()
        found.append(turn)
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("batch", [1024, 2500])
def test_large_batches(batch):
    model = Model()
    one = ByDevice(make(num_tokens=batch * 128, max_seqs=batch, growth="fixed8", block_sizes=[8]), model, batch)
    ids = prefill(one.cache, model, [5 + i % 9 for i in range(batch)])
    one.steps.load(ids, np.arange(batch) % 512)
    for _ in range(32):
        one.graph.replay()
    assert (one.steps.finish().num_new == 32).all()
    one.cache.check_integrity()
