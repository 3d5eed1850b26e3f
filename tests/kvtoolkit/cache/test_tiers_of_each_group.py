"""Groups of layers with tiers of their own: each is as a cache of its layers alone, whatever is done to sequences."""

import random

import numpy as np
import pytest

from kvtoolkit import ArgumentError, CacheConfig, KVCache

SHAPE = {"num_kv_heads": 2, "head_dim": 64, "dtype": "float32", "max_seqs": 12, "prefix_caching": False}
BOTH = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 64, "cold": "int4"}
WARM = {"hot": 128, "pinned_tokens": 64, "warm": "int8", "tier_memory": {"hot": 0.8, "warm": 0.2}}
COLD = {"hot": 64, "pinned_tokens": 64, "cold": "int4", "tier_memory": {"hot": 0.8, "cold": 0.2}}
WINDOW = 150
GROUPS = [
    {"layers": 1, "tiers": WARM, "num_tokens": 9600},
    {"layers": 0, "window": WINDOW, "num_tokens": 4096},
    {"layers": 3, "num_tokens": 12800},  # has the tiers of the cache
    {"layers": 2, "tiers": COLD, "num_tokens": 9600},
]


class Twins:
    """A cache with groups, and one for each group with its layer alone; all do the same."""

    def __init__(self, tiers, **fields):
        sizes = {group["layers"]: group["num_tokens"] for group in GROUPS}
        own = {0: None, 1: WARM, 2: COLD, 3: tiers}
        fields = SHAPE | fields
        self.grouped = KVCache(CacheConfig(**fields, num_layers=4, tiers=tiers, layer_groups=GROUPS))
        self.alone = [
            KVCache(CacheConfig(**fields, num_layers=1, num_tokens=sizes[layer], tiers=own[layer]))
            for layer in range(4)
        ]
        self.draw = np.random.default_rng(0)
        self.ids = [cache.open([[]] * 3)[0] for cache in self.caches]

    @property
    def caches(self):
        return [self.grouped, *self.alone]

    def step(self, counts):
        """Every layer computes the same in its group and alone, to the bit."""
        total = sum(counts)
        q = self.draw.standard_normal((4, total, 4, 64), np.float32)
        new = self.draw.standard_normal((2, 4, total, 2, 64), np.float32)
        found = []
        for index, (cache, ids) in enumerate(zip(self.caches, self.ids, strict=True)):
            with cache.begin_step(ids, counts) as step:
                assert step.ok.all()
                for layer in range(4) if index == 0 else [index - 1]:
                    own = layer if index == 0 else 0
                    step.append(own, *new[:, layer])
                    window = (WINDOW - 1, 0) if layer == 0 else (-1, -1)
                    found.append(step.attend(own, q[layer], window_size=window))
                cache.end_step(step)
        for layer in range(4):
            np.testing.assert_array_equal(found[layer], found[4 + layer])

    def all(self, call):
        """Do the same to all caches; False if the one with groups refuses, because a window has let go of too much."""
        for cache, ids in zip(self.caches, self.ids, strict=True):
            try:
                call(cache, ids)
            except ArgumentError:
                assert cache is self.grouped
                return False
            finally:
                cache.check_integrity()
        return True

    def check_tiers(self):
        """Each group has just the tiers, and in them what the cache of its layer alone has."""
        for group in self.grouped.stats().groups:
            (layer,) = group.layers
            if not group.window:
                assert group.tiers == self.alone[layer].stats().tiers
        figures = self.grouped.stats()
        for name in ("num_demoted_warm", "num_demoted_cold", "num_dequantized", "converted_tokens"):
            assert getattr(figures, name) == sum(getattr(cache.stats(), name) for cache in self.alone[1:])


def hold_forks(cache, ids):
    """A lease holds what forks share with sequences, while a step goes on with another one."""
    lease = cache.pin(cache.fork(ids[:2], 1).ravel())
    cache.end_step(cache.begin_step(ids[2:], 0))
    lease.abort()


def cut(cache, ids, count):
    cache.truncate(ids, np.maximum(cache.lengths(ids) - count, 0))


OPERATIONS = {
    "truncate": lambda cache, ids: cut(cache, ids, 1),
    "truncate far": lambda cache, ids: cut(cache, ids, 70),
    "reorder": lambda cache, ids: cache.reorder(ids, [1, 1, 0]),
    "preempt to host": lambda cache, ids: (cache.preempt(ids[1:], "host"), cache.restore(ids[1:])),
    "preempt to drop": lambda cache, ids: (cache.preempt(ids[2:], "drop"), cache.restore(ids[2:])),
    "pin": hold_forks,
    "fork": lambda cache, ids: cache.close(cache.fork(ids, 2).ravel()),
    "compact": lambda cache, ids: cache.compact(1 << 20),
    "repair": lambda cache, ids: cache.repair(),
}


@pytest.mark.parametrize("demote", ["age", "mass"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"growth": "lazy_merge"}, {"allocator": "slab", "growth": "append"}, {"allocator": "paged"}],
    ids=lambda fields: "-".join(fields.values()) or "buddy",
)
def test_each_group_is_as_a_cache_of_its_layers_alone(demote, fields):
    twins, rng = Twins({**BOTH, "demote": demote}, **fields), random.Random(demote + str(fields))
    for counts in ([200, 3, 64], [100, 90, 1], [60, 0, 200]):
        twins.step(counts)
    order, refused = rng.sample(sorted(OPERATIONS), k=len(OPERATIONS)), []
    for name in order:
        for _ in range(rng.choice([1, 20, 40])):
            twins.step([1, 1, 1])
        if not twins.all(OPERATIONS[name]):
            refused.append(name)
        twins.step([rng.choice([0, 1, 30, 90]) for _ in range(3)])
    assert refused in ([], ["truncate far"])
    twins.check_tiers()
    assert min(twins.grouped.stats().num_demoted_warm, twins.grouped.stats().num_demoted_cold) > 0


@pytest.mark.parametrize("others", [{"window": 50}, {"tiers": WARM}])
@pytest.mark.parametrize(("kind", "hit"), [("hot", 0), ("all", 384)])
def test_prompts_find_quantized_tiles_where_the_first_groups_own_tiers_say_so(kind, hit, others):
    groups = [{"layers": 0, "tiers": {**BOTH, "prefix_reuse_tiers": kind}}, {"layers": 1, **others}]
    shape = {**SHAPE, "prefix_caching": True, "num_layers": 2, "num_tokens": 9600}
    cache = KVCache(CacheConfig(**shape, layer_groups=groups))
    prompt = np.arange(400)
    ids, _ = cache.open([prompt])
    cache.end_step(cache.begin_step(ids, 400), prompt)
    for token in range(40):
        cache.end_step(cache.begin_step(ids, 1), [token])
    assert cache.stats().groups[0].tiers["cold"].used > 0
    found = int(cache.open([prompt[:390]])[1][0])
    # the other group with tiers gives what it has in 16 bit: what is pinned
    assert found == (min(hit, 64) if "tiers" in others else hit)
    cache.check_integrity()
