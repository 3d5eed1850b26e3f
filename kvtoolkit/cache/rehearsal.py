"""Run every operation of a cache once, on a small cache of the same kind, so that Numba compiles all it needs.

Compiled functions take arrays and integers of the same types whatever the size of a cache and the shape of its model.
So a small cache with one layer compiles, and keeps on disk, what any cache of its allocator and tiers calls.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvtoolkit.attention.calls import merge_states
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.cache.state.block_table import find_entry
from kvtoolkit.cache.state.shared_reads import SharedReads
from kvtoolkit.config.cache import CacheConfig

Part = tuple[str, Callable[[], None]]
"""What a part of the rehearsal is called, and what runs it."""

_NUM_TOKENS = 1024
_NUMPY_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


def small_config(config: CacheConfig) -> CacheConfig:
    """A small cache on the CPU that runs the same compiled host code as ``config``."""
    tiers, fields = _richest_tiers(config), config.to_dict()
    for name in ("memory", "device", "max_seq_len", "max_entries"):
        fields.pop(name, None)
    if config.backend != "cpu" and config.allocator == "lockfree":
        # that pool is on the GPU, where `load_kernels` is in charge
        fields |= {"allocator": "buddy", "allocator_options": {}}
    if tiers is not None:
        # a sequence of a few hundred tokens reaches the coldest tier, and every tier has room for several
        kept = {name: value for name, value in tiers.items() if name not in ("hot", "tier_memory")}
        fields["tiers"] = {**kept, "hot": 64, "warm_tokens": 64, "pinned_tokens": 0}
    if config.growth_policy.merges:
        fields["growth"] = "lazy_merge"  # which merges while there is memory; the code is the same for all that merge
    fields |= {"num_layers": 1, "num_tokens": _NUM_TOKENS * (4 if tiers else 1), "max_seqs": 32, "backend": "cpu"}
    if config.is_grouped:
        # one layer of each group, the last one with a window or chunk that short sequences go beyond: a group without
        # one runs short of memory, and what is compiled does not depend on which group it is
        count, size = len(config.groups), {"num_tokens": fields.pop("num_tokens")}
        groups: list[dict[str, Any]] = [{"layers": i, **size} for i in range(count)]
        groups[-1] |= {"chunk": 40} if any(group.chunk for group in config.groups) else {"window": 24}
        groups[-1] |= {"num_tokens": _NUM_TOKENS}  # which has no tiers
        fields |= {"layer_groups": groups, "num_layers": count}
    return CacheConfig.from_dict(fields)


def _richest_tiers(config: CacheConfig) -> Mapping[str, Any] | None:
    """The tiers of the group that runs most code, because what is compiled does not depend on which group it is."""
    tables = [one.tiers for one in config.group_configs if one.tiers is not None]
    return max(tables, key=lambda tiers: (tiers["demote"] == "mass", "cold" in tiers, "warm" in tiers), default=None)


def parts_of(config: CacheConfig, num_q_heads: int) -> list[Part]:
    """The parts of the rehearsal, to be run in this order."""
    rehearsal = _Rehearsal(small_config(config), num_q_heads, with_kernels=config.backend == "cpu")
    return [
        ("pool and tables", rehearsal.make),
        ("prompts and steps", rehearsal.steps),
        ("prefix reuse", rehearsal.reuse),
        ("forks", rehearsal.forks),
        ("preemption", rehearsal.preemption),
        ("eviction", rehearsal.eviction),
        ("shortage", rehearsal.shortage),
        ("compaction", rehearsal.compaction),
        *([("quantized tiers", rehearsal.tiers)] if config.has_tiers else []),
        ("maintenance", rehearsal.maintenance),
    ]


class _Rehearsal:
    """The small cache, and the sequences that each part leaves open or closes."""

    cache: KVCache

    def __init__(self, config: CacheConfig, num_q_heads: int, with_kernels: bool) -> None:
        self.config = config
        self.num_q_heads = num_q_heads
        self.with_kernels = with_kernels
        self.draw = np.random.default_rng(0)

    def make(self) -> None:
        self.cache = KVCache(self.config)
        self.cache.stats()

    def steps(self) -> None:
        """Two prompts, and decoded tokens until blocks grow and merge."""
        ids = self.open(self.prompt(70), self.prompt(9))
        self.feed(ids, [70, 9])
        for _ in range(66):
            self.feed(ids, [1, 1])
        with self.cache.begin_step(ids, 1):
            pass  # a step that is aborted
        self.cache.close(ids)
        if self.with_kernels:
            states = [np.zeros((1, 1, 64), np.float32), np.zeros((1, 1), np.float32)]
            merge_states(*states, *states)

    def reuse(self) -> None:
        """Prompts with a beginning, a salt and an extra key in common; twins; forgetting them."""
        prompt = self.prompt(40)
        for options in ({}, {"salt": ["a"], "extra_keys": [[(8, 1)]]}):
            for _ in range(2):
                ids, (cached,) = self.cache.open([prompt], **options)
                self.feed(ids, [len(prompt) - int(cached)], prompt[int(cached) :])
                self.cache.close(ids)
        twins = self.open(self.prompt(16), self.prompt(16))
        self.feed(twins, [16, 16], np.tile(self.prompt(16), 2))
        self.cache.close(twins)
        self.cache.clear_prefixes("a")
        self.cache.clear_prefixes()

    def forks(self) -> None:
        """Copies of a sequence, cut and exchanged."""
        ids = self.open(self.prompt(30))
        self.feed(ids, [30])
        both = np.concatenate([ids, self.cache.fork(ids, 1).ravel()])
        self.feed(both, [5, 5])
        if not self.with_kernels and not self.cache._group.layers.span:  # on a GPU
            with self.cache.begin_step(both, 0) as step:  # which frees nothing
                SharedReads(self.cache._group.table, 1).find(step.seq_ids, step._arrays)
        self.cache.reorder(both, [1, 1])
        self.cache.truncate(both, [20, 13])
        self.cache.pin(both).abort()
        find_entry(self.cache._group.table, 0, 0)  # which only rows with more granules than entries need
        self.cache.close(both)

    def preemption(self) -> None:
        """Sequences that share a beginning go and come back, with their keys and values and without."""
        ids = self.open(self.prompt(40))
        self.feed(ids, [40])
        ids = np.concatenate([ids, self.cache.fork(ids, 1).ravel()])
        for place in ("host", "drop"):
            self.cache.preempt(ids, to=place)
            if not self.cache.restore(ids, keep_free=2 * _NUM_TOKENS).all():  # but windows alone need little
                self.cache.restore(ids, keep_free=8)
        self.cache.close(ids)

    def eviction(self) -> None:
        """Many prompts one after the other; one comes back again and again, and so is evicted last."""
        size, often = _NUM_TOKENS // 16, self.prompt(60)
        for number in range(200):
            prompt = often if number % 2 else self.prompt(size)
            ids, (cached,) = self.cache.open([prompt])
            self.feed(ids, [len(prompt) - int(cached)], prompt[int(cached) :])
            self.cache.close(ids)

    def shortage(self) -> None:
        """A pool that is nearly full: one row finds less than it needs, the rows after it find enough."""
        ids = self.open(*(self.prompt(9) for _ in range(4)))
        self.feed(ids, [9] * 4)
        hot = self.tightest()
        self.feed(ids[:1], [hot.free + hot.cached - 40])
        self.feed(ids[1:], [100, 9, 9])
        for _ in range(10):
            self.feed(ids[1:], [8] * 3)
        self.cache.preempt(ids[1:], to="host")
        self.feed(ids[:1], [8])
        self.cache.restore(ids[1:])
        self.cache.close(ids)

    def compaction(self) -> None:
        """Rows of 64 and 56 tokens fill the pool side by side; without the short ones blocks are moved, then merged."""
        self.cache.clear_prefixes()
        room = self.tightest().free // 8
        num_long = room // 16
        ids = self.open(*(self.prompt(8) for _ in range(num_long + (room - 8 * num_long - 1) // 7)))
        for _ in range(7):
            self.feed(ids, [8] * len(ids))
        self.feed(ids[:num_long], [8] * num_long)
        self.cache.close(ids[num_long:])
        self.cache.clear_prefixes()
        if self.config.is_grouped:  # others have met pieces of free memory between cached prefixes
            self.feed(ids[:1], [128])
        self.cache.compact(_NUM_TOKENS)
        self.cache.close(ids[:num_long])

    def tiers(self) -> None:
        """Sequences so long that they reach the coldest tier, cut inside a quantized tile."""
        ids = self.open(self.prompt(64))
        for _ in range(4):
            self.feed(ids, [64])
        for _ in range(80):
            self.feed(ids, [1])
        self.cache.preempt(ids, to="host")
        self.cache.restore(ids)
        if self.config.is_grouped:  # a window lets go of nothing while steps of others quantize what a sequence holds
            self.cache.close(ids)
            ids, other = self.open(self.prompt(64)), self.open(self.prompt(8))
            self.feed(ids, [320])
            for _ in range(80):
                self.feed(other, [1])
            self.cache.close(other)
        self.cache.truncate(ids, [100])
        self.cache.close(ids)

    def maintenance(self) -> None:
        """What keeps a cache in order, and a snapshot that is loaded again."""
        ids = self.open(self.prompt(20))
        self.feed(ids, [20])
        self.cache.repair()
        KVCache.from_snapshot(self.config, self.cache.snapshot())
        self.cache.end_orphans([])

    def tightest(self) -> Any:
        """The figures of the hot tier; with several groups of layers, of the one with least room."""
        return min((group.tiers["hot"] for group in self.cache.stats().groups), key=lambda tier: tier.free)

    def prompt(self, length: int) -> Any:
        return self.draw.integers(0, 1 << 30, length)

    def open(self, *prompts: Any) -> Any:
        return self.cache.open(list(prompts))[0]

    def feed(self, ids: Any, counts: list[int], tokens: Any = None) -> None:
        """One step; rows that find no memory are passed over, as an engine does."""
        cache, heads, head_dim = self.cache, self.config.num_kv_heads, self.config.head_dim
        total = sum(counts)
        with cache.begin_step(ids, counts) as step:
            if self.with_kernels:
                dtype = _NUMPY_DTYPES[self.config.dtype]
                new = np.zeros((total, heads, head_dim), dtype)
                queries = np.zeros((total, self.num_q_heads, head_dim), dtype)
                for group in self.config.groups:
                    (layer,), window = group.layers, (group.window - 1, 0) if group.window else (-1, -1)
                    step.append(layer, new, new)
                    step.attend(layer, queries, window_size=window)
                    step.attend(layer, queries, window_size=window, num_splits=2)
            else:
                step.tables_of(0)
                step.tables_of(self.config.num_layers - 1)  # which may have chunks
            cache.end_step(step, self.prompt(total) if tokens is None else tokens)
            if not step.ok.all():
                step.explain()
