"""Quantized tiers of the layers that keep all tokens, beside layers with a window: each as in a cache of its own."""

import numpy as np
import pytest

from kvtoolkit import CacheConfig, KVCache

SHAPE = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float32", "max_seqs": 16}
GROUPS = [
    {"layers": [0, 2], "window": 20, "num_tokens": 4096},
    {"layers": 1, "num_tokens": 8192},
    {"layers": 3, "chunk": 64, "num_tokens": 4096},
]
TIERS = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 64, "cold": "int4"}


def make(groups, **fields):
    sizes = {} if groups else {"num_tokens": 8192}
    return KVCache(CacheConfig(**{**SHAPE, **sizes, **fields}, layer_groups=groups))


class Caches:
    """A cache with groups and tiers, one with the same groups alone, and one with layer 1 and the same tiers alone."""

    def __init__(self, tiers, groups=GROUPS, **fields):
        self.rng = np.random.default_rng(0)
        alone = {**fields, "tiers": tiers, "num_layers": 1}
        self.caches = make(groups, tiers=tiers, **fields), make(groups, **fields), make(None, **alone)
        self.windows = [(-1, -1)] * 4
        for group in groups:
            for layer in np.ravel(group["layers"]):
                self.windows[layer] = (group["window"] - 1, 0) if "window" in group else (-1, -1)
        self.ids = [cache.open([[]] * 3)[0] for cache in self.caches]

    def step(self, counts):
        """All compute the same tokens, to the bit."""
        total = int(np.sum(counts))
        q = self.rng.standard_normal((4, total, 4, 64), np.float32)
        new = self.rng.standard_normal((2, 4, total, 2, 64), np.float32)
        found = []
        for cache, ids, layers in zip(self.caches, self.ids, (range(4), range(4), [1]), strict=True):
            with cache.begin_step(ids, counts) as step:
                assert step.ok.all()
                for layer in layers:
                    own = layer if len(layers) == 4 else 0
                    step.append(own, *new[:, layer])
                    found.append(step.attend(own, q[layer], window_size=self.windows[layer]))
                cache.end_step(step)
        for layer in range(4):
            np.testing.assert_array_equal(found[layer], found[8] if layer == 1 else found[4 + layer])

    def all(self, call):
        for cache, ids in zip(self.caches, self.ids, strict=True):
            call(cache, ids)
            cache.check_integrity()


@pytest.mark.parametrize("demote", ["age", "mass"])
@pytest.mark.parametrize("fields", [{}, {"growth": "append"}, {"growth": "lazy_merge"}])
def test_each_group_is_as_in_a_cache_of_its_own(demote, fields):
    caches = Caches({**TIERS, "demote": demote}, **fields)
    for counts in ([300, 3, 64], [200, 100, 1], [90, 0, 200]):
        caches.step(counts)
    for _ in range(140):
        caches.step([1, 1, 1])
    grouped, alone = caches.caches[0].stats(), caches.caches[2].stats()
    for name in ("num_demoted_warm", "num_demoted_cold", "converted_tokens"):
        assert getattr(grouped, name) == getattr(alone, name) > 0
    assert {name: one.used for name, one in grouped.tiers.items() if name != "hot"} == {
        name: one.used for name, one in alone.tiers.items() if name != "hot"
    }
    assert grouped.tiers["warm"].nbytes == alone.tiers["warm"].nbytes
    assert [list(group.tiers) for group in grouped.groups] == [["hot"], ["hot", "warm", "cold"], ["hot"]]
    assert grouped.groups[1].tiers == alone.tiers
    tiers = caches.caches[0].tier_caches(1)
    assert tiers.warm.shape == caches.caches[2].tier_caches(0).warm.shape
    assert caches.caches[0].tier_caches(2).warm is None
    caches.step([5, 1, 10])
    caches.all(lambda cache, ids: cache.truncate(ids, cache.lengths(ids) - [4, 0, 9]))
    caches.step([1, 2, 9])
    caches.all(lambda cache, ids: cache.reorder(ids, [0, 0, 2]))
    for _ in range(70):
        caches.step([2, 1, 1])
    caches.all(lambda cache, ids: cache.preempt(ids[1:], "host"))
    caches.all(lambda cache, ids: cache.restore(ids[1:]))
    caches.step([1, 2, 3])
    caches.all(lambda cache, ids: cache.compact(1 << 20))
    caches.step([100, 2, 64])
    caches.all(lambda cache, ids: cache.close(ids))
    assert caches.caches[0].stats().used == 0


def test_a_sequence_is_cut_inside_a_quantized_tile_in_all_groups():
    caches = Caches(TIERS, [{**GROUPS[0], "layers": [0, 2, 3], "window": 1000}, GROUPS[1]])
    for counts in ([300, 3, 64], [200, 100, 1], [1, 1, 1]):
        caches.step(counts)
    caches.all(lambda cache, ids: cache.truncate(ids, [100, 30, 64]))
    assert [cache.stats().num_dequantized for cache in caches.caches] == [1, 0, 1]
    caches.step([1, 2, 100])


def test_masses_are_those_of_the_layers_with_tiers():
    caches = Caches({**TIERS, "demote": "mass"})
    tables = {group.layers.layers: group.table for group in caches.caches[0]._state.groups}
    assert tables[0, 2].masses.size == tables[3,].masses.size == 0
    for _ in range(2):  # rows that are opened again know nothing of what was there
        for counts in ([300, 3, 64], [200, 100, 1], [1, 1, 1]):
            caches.step(counts)
        np.testing.assert_array_equal(tables[1,].masses, caches.caches[2]._state.group.table.masses)
        assert tables[1,].masses.any()
        caches.all(lambda cache, ids: cache.close(ids))
        caches.ids = [cache.open([[]] * 3)[0] for cache in caches.caches]


def test_a_row_that_stalls_in_another_group_keeps_its_quantized_tiles():
    groups = [{**GROUPS[0], "layers": [0, 2, 3], "num_tokens": 640}, GROUPS[1]]
    cache = make(groups, tiers=TIERS)
    ids, _ = cache.open([[]] * 2)
    for _ in range(6):
        cache.end_step(cache.begin_step(ids, 64))
    before = cache.stats().tiers
    step = cache.begin_step(ids, [600, 1])
    assert step.ok.tolist() == [False, True]
    cache.end_step(step)
    cache.check_integrity()
    assert cache.lengths(ids).tolist() == [384, 385]
    after = cache.stats().tiers
    assert after["warm"].used + after["cold"].used >= before["warm"].used + before["cold"].used > 0
