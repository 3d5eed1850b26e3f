"""Calls of a cache that break off: a small world to break them in, and what must hold in it afterwards.

Values of the keys and values are the token's own number, so that every token can be read back, whatever its tier.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtoolkit import CacheConfig, KVCache, Lease, SequenceError, Step
from kvtoolkit.formats.entry import unpack_entries
from kvtoolkit.formats.quantized import INT4, INT8

TIERS = {"hot": 64, "warm": "int8", "warm_tokens": 64, "cold": "int4", "pinned_tokens": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "buddy": {"allocator": "buddy", "growth": "adaptive"},
    "slab": {"allocator": "slab", "growth": "lazy_merge", "num_tokens": 2048},
    "paged": {"allocator": "paged", "growth": "fixed16"},
    "lockfree": {"allocator": "lockfree", "growth": "append"},
    "tiers": {"num_tokens": 6144, "head_dim": 64, "tiers": TIERS},
    "groups": {
        "num_layers": 2,
        "num_tokens": None,
        "layer_groups": [{"layers": 0, "num_tokens": 1024}, {"layers": 1, "window": 91, "num_tokens": 896}],
    },
    "tiers in groups": {
        "num_layers": 3,
        "num_tokens": None,
        "head_dim": 64,
        "tiers": TIERS,
        "layer_groups": [
            {"layers": 0, "num_tokens": 6144},
            {"layers": 1, "window": 91, "num_tokens": 896},
            {"layers": 2, "num_tokens": 4608, "tiers": {"hot": 64, "warm": "int8", "pinned_tokens": 64}},
        ],
    },
    "windows": {
        "num_layers": 2,
        "num_tokens": None,
        "layer_groups": [{"layers": i, "window": (100, 91)[i], "num_tokens": (1024, 896)[i]} for i in (1, 0)],
    },
}
_DEVICE = {"backend": "cuda", "dtype": "float16", "head_dim": 16, "growth": "append", "allocator": "lockfree"}
DEVICE_CONFIGS: dict[str, dict[str, Any]] = {
    "device buddy": {**_DEVICE, "num_tokens": 1024},
    "device slab": {**_DEVICE, "num_tokens": 2048, "allocator_options": {"layout": "slab"}},
}


def make(**fields: Any) -> KVCache:
    config = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "dtype": "float32", "num_tokens": 1024, "max_seqs": 24}
    return KVCache(CacheConfig(**(config | fields)))


def put(cache: KVCache, seq_ids: Any, chunks: list[list[int]], *, publish: bool = True) -> np.ndarray:
    """One step that appends to sequences."""
    with cache.begin_step(seq_ids, [len(chunk) for chunk in chunks]) as step:
        ok = step.ok.copy()
        finish(cache, step, [token for chunk in chunks for token in chunk], publish=publish)
    return ok


def finish(cache: KVCache, step: Step, tokens: list[int], *, publish: bool = True) -> None:
    shape = (len(tokens), cache.config.num_kv_heads, cache.config.head_dim)
    kv = np.broadcast_to(np.array(tokens, cache.dtype)[:, None, None], shape).copy()
    if cache.config.backend != "cpu":
        import cupy

        kv = cupy.asarray(kv)
    for layer in range(cache.config.num_layers):
        step.append(layer, kv, kv)
    cache.end_step(step, tokens if publish else None)


def read(cache: KVCache, entries: np.ndarray, length: int, layer: int = 0) -> list[int]:
    """The tokens behind the entries of a row."""
    tiers, out = cache.tier_caches(layer), []
    values = tiers.v_cache
    values = np.asarray(values if isinstance(values, np.ndarray) else values.get(), np.float32)
    for granule, size, tier in zip(*(column.tolist() for column in unpack_entries(entries[entries >= 0])), strict=True):
        if tier == 0:
            out.append(values[granule : granule + size, 0, :, 0].reshape(-1))
        else:
            blocks, form = (tiers.warm, INT8) if tier == 1 else (tiers.cold, INT4)
            block = (granule - tiers.first_granules[tier]) // 8
            out.append(form.decode(blocks[block], cache.config.head_dim)[1][0, :, 0])
    return np.rint(np.concatenate([np.empty(0), *out])[:length]).astype(int).tolist()


def seen(cache: KVCache, seq: int) -> Any:
    """What a sequence holds, from outside."""
    try:
        with cache.begin_step([seq], 0) as step:
            length = int(step.seq_lens[0])
            begin = 8 * max(0, int(step.block_starts[0, 0]))
            held = read(cache, step.block_table[0], length - begin)
            for layer in range(1, cache.config.num_layers):
                tables = step.tables_of(layer)
                first = 8 * max(0, int(tables.block_starts[0, 0]))
                assert read(cache, tables.block_table[0], length - first, layer) == held[first - begin :]
            span = cache._state.group.layers.span
            return held[-span:] if span else held  # what is further back may be freed whatever comes of a call
    except SequenceError as error:
        return "preempted" if "is preempted" in str(error) else "closed" if "closed" in str(error) else str(error)


@dataclass
class World:
    """A cache in the middle of its work, and what its engine knows of it."""

    cache: KVCache
    open: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    in_step: list[int] = field(default_factory=list)
    step: Step | None = None
    lease: Lease | None = None
    blocks: Any = None

    @property
    def known(self) -> list[int]:
        """All ids, those of the lease apart."""
        return [*self.open, *self.preempted, *self.in_step]


def prompt(first: int, count: int) -> list[int]:
    return [1 + (first + i) % 50 for i in range(count)]


def make_world(**fields: Any) -> World:
    """Sequences that share, wait, are in a step and under a lease, cached prefixes, and blocks of a caller."""
    cache = make(**fields)
    world = World(cache)
    gone = cache.open([[]])[0]
    put(cache, gone, [prompt(30, 140)])
    cache.close(gone)
    ids = cache.open([[]] * 5)[0].tolist()
    for seq, (first, count) in zip(ids, [(0, 90), (0, 63), (7, 130), (11, 40), (13, 20)], strict=True):
        for at in range(0, count, 20):
            put(cache, [seq], [prompt(first, count)[at : at + 20]])
    fork = int(cache.fork(ids[:1], 1)[0, 0])
    # with tiers so long that a call finds a quantized tile in it, and one that is due
    put(cache, [fork], [[3, 4, 5] * (64 if cache.config.has_tiers else 1)])
    a, b, c, d, e = ids
    world.open, world.preempted, world.in_step = [a, b, fork], [c, d], [e]
    world.lease = cache.pin([b])
    cache.preempt([c], "host")
    cache.preempt([d], "drop")
    world.blocks = cache.allocator.allocate([cache.allocator.block_sizes[0] // 8])
    world.step = cache.begin_step([e], 9)
    return world


Call = Callable[[World], Any]


def _end_step(world: World) -> None:
    assert world.step is not None
    finish(world.cache, world.step, [9] * 9)


def _free(world: World) -> None:
    world.cache.allocator.free(world.blocks, [world.cache.allocator.block_sizes[0] // 8])


CALLS: dict[str, Call] = {
    "open": lambda w: w.cache.open([prompt(0, 80), prompt(30, 100), []]),
    "open with a salt": lambda w: w.cache.open([prompt(0, 80)] * 2, salt=["a", None], extra_keys=[[(9, "b")], None]),
    "clear_prefixes": lambda w: w.cache.clear_prefixes(),
    "close": lambda w: w.cache.close([w.open[0], w.preempted[0]]),
    "step": lambda w: put(w.cache, w.open, [[8], [7] * 30, [6] * 70]),
    "large step": lambda w: put(w.cache, w.open, [[8] * 200, [7] * 100, [6] * 300]),
    "end_step": _end_step,
    "abort_step": lambda w: w.cache.abort_step(w.step),
    "fork": lambda w: w.cache.fork(w.open, 2),
    "reorder": lambda w: w.cache.reorder(w.open, [1, 2, 1]),
    "truncate": lambda w: w.cache.truncate(w.open, [13, 50, 70]),
    "pin": lambda w: w.cache.pin(w.open),
    "commit": lambda w: w.lease.commit(),
    "abort": lambda w: w.lease.abort(),
    "preempt to host": lambda w: w.cache.preempt(w.open[:2], "host"),
    "preempt to drop": lambda w: w.cache.preempt(w.open[:2], "drop"),
    "restore": lambda w: w.cache.restore(w.preempted),
    "compact": lambda w: w.cache.compact(4096),
    "allocate": lambda w: w.cache.allocator.allocate([w.cache.allocator.block_sizes[0] // 8] * 3, partial=True),
    "free": _free,
    "repair": lambda w: w.cache.repair(),
    "snapshot": lambda w: w.cache.stats(),
}


def outcome(world: World) -> dict[int, Any]:
    return {seq: seen(world.cache, seq) for seq in world.known if seq not in world.in_step}


def check(world: World, before: dict[int, Any], after: dict[int, Any], *, exact: bool = True) -> None:
    """Every sequence is as before the call or as after it, others' steps and leases go on, and nothing is lost."""
    cache = world.cache
    cache.check_integrity()
    for seq, now in outcome(world).items():
        assert now in (before[seq], after[seq]), (seq, now, before[seq], after[seq])
    assert world.step is not None
    if world.step._is_open:
        finish(cache, world.step, [9] * 9)
    assert seen(cache, world.in_step[0]) in ([*prompt(13, 20), *[9] * 9], prompt(13, 20))
    cache.check_integrity()
    if world.lease is not None and world.lease._is_open:
        world.lease.abort()
    cache.end_orphans([])
    with contextlib.suppress(ValueError):
        _free(world)
    cache.check_integrity()
    stats = cache.stats()
    assert stats.num_seqs == 0
    assert stats.num_preempted_seqs == 0
    assert stats.used == 0
    # callers: blocks that the broken call took for its caller, who never saw them
    assert not exact or accounted(stats) == stats.capacity


def accounted(stats: Any) -> int:
    return int(stats.free + stats.used + stats.cached + stats.kept_back + stats.callers + stats.pinned)


def clean_runs(**fields: Any) -> Iterator[tuple[str, Call, dict[int, Any], dict[int, Any]]]:
    """Each call, with what it finds and what it leaves if nothing disturbs it."""
    for name, call in CALLS.items():
        before = outcome(make_world(**fields))
        world = make_world(**fields)
        call(world)
        yield name, call, before, outcome(world)
