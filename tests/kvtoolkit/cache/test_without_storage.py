"""A cache without keys and values does the same to its tables and figures as one with them."""

import numpy as np
import pytest

from kvtoolkit import CacheConfig, CacheFullError, KVCache, UnsupportedError

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16", "max_seqs": 32}
TIERS = {"hot": 64, "pinned_tokens": 64, "warm": "int8", "warm_tokens": 64, "cold": "int4"}
CONFIGS = {
    "adaptive": {"num_tokens": 2048},
    "slab that merges": {"num_tokens": 2048, "allocator": "slab", "growth": "lazy_merge"},
    "tiers": {"num_tokens": 8192, "tiers": TIERS},
    "host": {"num_tokens": 1024, "tiers": {"host": 1 << 20, "hot": 64, "pinned_tokens": 0}},
    "windows": {
        "layer_groups": [{"layers": [0], "num_tokens": 2048}, {"layers": [1], "window": 40, "num_tokens": 1024}]
    },
}


class Program:
    """Calls that engines make, drawn once and made on both caches; what they return must be equal."""

    def __init__(self, options, seed):
        config = CacheConfig(**SHAPE, **options)
        self.caches = [KVCache(config, storage=storage) for storage in (True, False)]
        self.rng = np.random.default_rng(seed)
        self.open, self.away = [], []

    def both(self, call):
        found = []
        for cache in self.caches:
            try:
                found.append(call(cache))
            except CacheFullError as error:
                found.append(str(error))
        assert str(found[0]) == str(found[1])
        assert self.caches[0].stats() == self.caches[1].stats()
        return found[0]

    def step(self, ids, counts):
        tokens = self.rng.integers(0, 5, int(np.sum(counts)))

        def call(cache):
            with cache.begin_step(ids, counts, tokens) as step:
                tables = [step.tables_of(layer) for layer in range(2)] if cache is self.caches[0] else None
                found = step.ok.tolist(), step.block_table.tolist(), step.seq_lens.tolist(), step.slot_mapping.tolist()
                del tables
                cache.end_step(step)
            return found

        return self.both(call)

    def run(self):
        rng = self.rng
        for _ in range(60):
            kind = int(rng.integers(8))
            if kind == 0 or not self.open:
                prompt = rng.integers(0, 3, int(rng.integers(1, 200))).tolist()
                found = self.both(lambda cache, prompt=prompt: [part.tolist() for part in cache.open([prompt])])
                if not isinstance(found, str):
                    (one,), (held,) = found
                    self.open.append(one)
                    self.step([one], [len(prompt) - held])
            elif kind == 1 and "host" in (self.caches[0].config.tiers or {}):
                some = rng.permutation(self.open)[: int(rng.integers(1, 5))]
                self.both(lambda cache, some=some: cache.offload(some))
            elif kind in (1, 2, 3):
                some = rng.permutation(self.open)[: int(rng.integers(1, 5))]
                self.step(some, np.ones(len(some), np.int64))
            elif kind == 4 and len(self.open) < 12:
                found = self.both(lambda cache: cache.fork(self.open[:1], 2).tolist())
                self.open += [] if isinstance(found, str) else found[0]
            elif kind == 5 and self.open:
                one = self.open.pop()
                self.both(lambda cache, one=one: cache.preempt([one], to="host"))
                self.away.append(one)
            elif kind == 6 and self.away:
                ok = self.both(lambda cache: cache.restore(self.away[:1]).tolist())
                if ok == [True]:
                    self.open.append(self.away.pop(0))
            elif kind == 7:
                self.both(lambda cache: cache.compact(128))
                one = self.open.pop(0)
                self.both(lambda cache, one=one: cache.close([one]))
        for cache in self.caches:
            cache.check_integrity()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_all_figures_are_those_of_a_cache_with_storage(name, seed):
    Program(CONFIGS[name], seed).run()


def test_it_takes_no_memory_for_keys_and_values_and_says_so():
    config = CacheConfig(num_layers=80, num_kv_heads=8, head_dim=128, dtype="float16", num_tokens=1 << 20, tiers=TIERS)
    cache = KVCache(config, storage=False)
    group = cache._state.group
    assert group.storage.key_values.nbytes == group.storage.warm.nbytes == group.storage.cold.nbytes == 0
    ids, _ = cache.open([list(range(1000))])
    x = np.zeros((1000, 8, 128), np.float16)
    with cache.begin_step(ids, 1000) as step:
        for call in (lambda: step.append(0, x, x), lambda: step.attend(0, x), lambda: cache.key_cache(0)):
            with pytest.raises(UnsupportedError, match="storage=False"):
                call()
        cache.end_step(step)
    assert cache.lengths(ids).tolist() == [1000]
