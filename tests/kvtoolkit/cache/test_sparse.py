"""Steps that leave out what is in host memory and receives little attention."""

import numpy as np
import pytest

from kvtoolkit import CacheConfig, ConfigError, KVCache, UnsupportedError
from kvtoolkit.config import prediction

BLOCK = 64 * 2 * 2 * 2 * 8 * 4
"""Bytes of 64 tokens of the cache below."""


def make(sparse=128, num_tokens=512, **tiers):
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32", "max_seqs": 8}
    tiers = {"hot": 64, "pinned_tokens": 64, "host": 64 * BLOCK, "sparse": sparse, **tiers}
    return KVCache(CacheConfig(**shape, num_tokens=num_tokens, tiers={k: v for k, v in tiers.items() if v is not None}))


class Sequence:
    """One sequence whose queries look at some of its tiles."""

    def __init__(self, cache, seed=0):
        self.cache, self.rng = cache, np.random.default_rng(seed)
        (self.seq,), _ = cache.open([[]])
        self.keys, self.values = (np.empty((2, 0, 2, 8), np.float32) for _ in range(2))

    def append(self, count):
        """Tokens that no query looks at in particular."""
        keys, values = self.rng.standard_normal((2, 2, count, 2, 8)).astype(np.float32)
        keys *= 0.1
        self.keys = np.concatenate([self.keys, keys], axis=1)
        self.values = np.concatenate([self.values, values], axis=1)
        return keys, values

    def prefill(self, count):
        for _ in range(count // 64):
            keys, values = self.append(64)
            self.run(keys, values, self.rng.standard_normal((2, 64, 4, 8)).astype(np.float32))

    def decode(self, tiles, strength=6.0):
        """A step whose query looks at the keys in the middle of some tiles; returns what attention gave."""
        query = self.rng.standard_normal((2, 1, 4, 8)).astype(np.float32)
        for tile in tiles:
            for layer in range(2):
                for head in range(2):
                    query[layer, 0, 2 * head : 2 * head + 2] += strength * self.marks[tile][layer, head]
        keys, values = self.append(1)
        return query, self.run(keys, values, query)

    def mark(self, tiles):
        """Choose a key for each of these tiles that queries can look for."""
        self.marks = {}
        for tile in tiles:
            mark = self.rng.standard_normal((2, 2, 8)).astype(np.float32)
            self.marks[tile] = mark / np.linalg.norm(mark, axis=-1, keepdims=True) * 3
        return self.marks

    def run(self, keys, values, query):
        with self.cache.begin_step([self.seq], keys.shape[1]) as step:
            assert step.ok.all()
            found = []
            for layer in range(2):
                step.append(layer, keys[layer], values[layer])
                found.append(step.attend(layer, query[layer]))
            self.cache.end_step(step, np.zeros(keys.shape[1], np.int64))
        return np.stack(found)

    def expected(self, query, is_kept):
        """Attention to the tokens that are kept."""
        out = np.empty((2, 1, 4, 8))
        for layer in range(2):
            for head in range(4):
                keys, values = (one[layer, is_kept, head // 2] for one in (self.keys, self.values))
                weights = np.exp(keys.astype(np.float64) @ query[layer, 0, head] / np.sqrt(8))
                out[layer, 0, head] = weights @ values / weights.sum()
        return out

    def masses(self, query):
        """The share of the attention that each token gets, the mean over layers and heads."""
        total = np.zeros(self.keys.shape[1])
        for layer in range(2):
            for head in range(4):
                weights = np.exp(self.keys[layer, :, head // 2].astype(np.float64) @ query[layer, 0, head] / np.sqrt(8))
                total += weights / weights.sum() / 8
        return total


def looked_up(cache, tiles, length=1024):
    """A sequence with marked tiles, after its first full step whose query looks at them."""
    one = Sequence(cache)
    one.mark(tiles)
    for tile in range(length // 64):
        keys, values = one.append(64)
        if tile in tiles:
            keys[:, 32] = one.marks[tile]
            one.keys[:, 64 * tile + 32] = one.marks[tile]
        one.run(keys, values, one.rng.standard_normal((2, 64, 4, 8)).astype(np.float32))
    while cache._state.counters.num_steps % 16:
        one.decode([])
    one.full = one.decode(tiles)[0]  # a full step
    return one


def kept(cache, one):
    """Which tokens the next step reads."""
    left_out = np.repeat(cache._sparse._left_out[0], 64)[: one.keys.shape[1]]
    return ~left_out


def test_a_step_reads_the_tiles_that_the_last_full_one_looked_at_and_leaves_out_the_rest():
    cache = make(sparse=128)
    one = looked_up(cache, [3, 7])
    before = kept(cache, one)
    assert before[3 * 64] and before[7 * 64]  # noqa: PT018
    num_away = cache.stats().tiers["host16"].used
    assert (~before).sum() == num_away - 128
    for _ in range(5):
        query, out = one.decode([3, 7])
        is_kept = np.concatenate([before, np.ones(one.keys.shape[1] - len(before), bool)])
        np.testing.assert_allclose(out, one.expected(query, is_kept), rtol=2e-4, atol=2e-5)
        assert np.abs(out - one.expected(query, np.ones(len(is_kept), bool))).max() < 0.1


def test_the_mass_skipped_is_measured_by_the_next_full_step():
    cache = make(sparse=64)
    one = looked_up(cache, [3, 7])
    assert cache.stats().skipped_mass == 0.0
    left_out = ~kept(cache, one)
    while cache._state.counters.num_steps % 16:
        one.decode([3])
    query, _ = one.decode([7])
    share = one.masses(query)[: len(left_out)][left_out].sum()
    assert cache.stats().skipped_mass == pytest.approx(share, abs=1e-4)


def test_full_steps_and_prompts_give_exact_results():
    cache, exact = make(sparse=64), make(sparse=None)
    pair = [looked_up(one, [3, 7]) for one in (cache, exact)]
    assert (~kept(cache, pair[0])).any()
    for one in pair:
        one.prefill(128)
    while cache._state.counters.num_steps % 16:
        for one in pair:
            one.decode([3])
    outs = [one.decode([3])[1] for one in pair]
    np.testing.assert_array_equal(*outs)


def test_a_budget_for_everything_leaves_out_nothing():
    cache, exact = make(sparse=1 << 16), make(sparse=None)
    pair = [looked_up(one, [3, 7]) for one in (cache, exact)]
    for _ in range(20):
        outs = [one.decode([3])[1] for one in pair]
        np.testing.assert_array_equal(*outs)


def test_tiles_that_are_read_more_take_the_places_of_those_that_are_read_less():
    cache = make(sparse=256, num_tokens=768)
    one = looked_up(cache, [1, 2, 3], length=1024)
    first = cache.config.pool_firsts[3]

    def are_away():
        entries, starts = cache._group.table.entries[0], cache._group.table.starts[0]
        return [
            int(start) // 8
            for entry, start in zip(entries, starts, strict=True)
            if entry & 0xFFFFFF >= first and entry >= 0
        ]

    assert {1, 2, 3} <= set(are_away())
    for _ in range(48):
        one.decode([1, 2, 3])
    assert not {1, 2, 3} & set(are_away())
    assert cache.stats().num_prefetched >= 3
    cache.check_integrity()


def test_what_was_known_of_a_row_is_forgotten_with_its_sequence():
    cache = make(sparse=64)
    one = looked_up(cache, [3])
    assert cache._sparse._left_out[0].any()
    cache.close([one.seq])
    other = Sequence(cache, seed=1)
    other.prefill(64)
    other.run(*other.append(1), np.ones((2, 1, 4, 8), np.float32))
    assert not cache._sparse._left_out[0].any()


@pytest.mark.parametrize("options", [{"window_size": (10, 0)}, {"alibi_slopes": np.ones(4, np.float32)}])
def test_options_that_need_positions_are_refused_where_tokens_are_left_out(options):
    cache = make(sparse=64)
    one = looked_up(cache, [3])
    with cache.begin_step([one.seq], 1) as step:
        step.append(0, *np.zeros((2, 1, 2, 8), np.float32))
        with pytest.raises(UnsupportedError, match="expected no window_size, alibi_slopes or causal=False"):
            step.attend(0, np.zeros((1, 4, 8), np.float32), **options)


class Fails:
    state_size, needs_keys, is_broken = 1, False, True

    def observe(self, state, step):
        state[0] = step.mass
        if self.is_broken:
            raise RuntimeError("broken")

    def score(self, state, step):
        return state[0]


def test_a_predictor_that_fails_is_named_and_the_step_can_be_ended_again(monkeypatch):
    monkeypatch.setitem(prediction._PREDICTORS, "fails", Fails)
    cache = make(sparse=64, prefetch="fails")
    one = Sequence(cache)
    one.prefill(512)
    while cache._state.counters.num_steps % 16:
        keys, values = one.append(1)
        one.run(keys, values, np.ones((2, 1, 4, 8), np.float32))
    keys, values = one.append(1)
    with cache.begin_step([one.seq], 1) as step:
        for layer in range(2):
            step.append(layer, keys[layer], values[layer])
            step.attend(layer, np.ones((1, 4, 8), np.float32))
        with pytest.raises(ConfigError, match="Fails failed: RuntimeError: broken"):
            cache.end_step(step)
        cache.end_step(step)  # without the predictor
    cache.check_integrity()
    assert cache.lengths([one.seq])[0] == one.keys.shape[1]


@pytest.mark.parametrize("name", [name for name in prediction.names() if name != "bound"])
def test_all_predictors_that_need_no_queries_work(name):
    cache = make(sparse=128, prefetch=name)
    one = looked_up(cache, [3, 7])
    for _ in range(40):
        one.decode([3])
    assert 0 <= cache.stats().skipped_mass <= 1


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ({"sparse": 100}, "tiers.sparse: expected a multiple of 64"),
        ({"sparse": -64}, "tiers.sparse: expected an int"),
        ({"prefetch": "bound"}, "tiers.prefetch: expected a predictor that needs no queries"),
        ({"prefetch": "luck"}, "tiers.prefetch: predictor: expected one of mass"),
        ({"sparse": 0}, "tiers.sparse: expected an int from 64"),
        ({"sparse": None, "prefetch": "last"}, "tiers.prefetch: expected nothing without sparse"),
        ({"warm": "int8"}, "tiers.sparse: expected nothing with a warm or cold tier"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(tiers, message):
    with pytest.raises(ConfigError, match=message):
        make(**{"sparse": 64, **tiers})
