"""The figures of a cache: what its memory holds, and what that has cost.

Every slot is counted in exactly one place, in each tier and in all tiers together:

    free + used + cached + kept_back + callers + pinned == capacity
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocators import AllocatorStats
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state.block_table import CLOSED, LENGTH, NUM_ENTRIES, PREEMPTED, STATE, fill_in
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.cache_state import CacheState
from kvtoolkit.cache.state.prefix_index import HELD
from kvtoolkit.config.tiers import POOL_NAMES, TIER_OF_POOL
from kvtoolkit.cuda.pool import DevicePool
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT

_PLACES = ("used", "cached", "free", "kept_back", "callers", "pinned")


@dataclass(frozen=True)
class TierStats:
    """Present figures of one tier, in token slots except ``nbytes``; see `CacheStats`.

    Attributes:
        capacity: all slots of the tier.
        used: held by sequences; a shared slot counts once.
        cached: held by no sequence, but findable by prompts.
        free: can be granted.
        kept_back: in the reserve for merging.
        callers: held by callers or kernels.
        pinned: usable by nobody at the moment.
        nbytes: bytes of keys and values that the tier has room for.
    """

    capacity: int
    used: int
    cached: int
    free: int
    kept_back: int
    callers: int
    pinned: int
    nbytes: int


@dataclass(frozen=True)
class GroupStats:
    """Present figures of one group of layers, in token slots; see `CacheStats`.

    Attributes:
        layers: numbers of its layers.
        window, chunk: as configured; 0 = none.
        capacity, used, cached, free, kept_back, callers, pinned: as in `CacheStats`, all tiers together.
        nbytes: bytes of keys and values.
        tiers: figures of each tier of the group by its name.
    """

    layers: tuple[int, ...]
    window: int
    chunk: int
    capacity: int
    used: int
    cached: int
    free: int
    kept_back: int
    callers: int
    pinned: int
    nbytes: int
    tiers: Mapping[str, TierStats]


@dataclass(frozen=True)
class CacheStats:
    """Present figures of a cache, in tokens unless the name says otherwise.

    With several groups of layers, slots, entries and copies are summed over the groups.

    Attributes:
        num_seqs: open sequences, including those that leases hold, but not preempted ones.
        num_preempted_seqs: sequences that wait for `KVCache.restore`. In a cache with host memory those that were
            preempted to the host still hold their slots, most of them there: they count in ``used``, ``waste``,
            ``blocks`` and ``entries_per_seq``.
        num_tokens: tokens that the open sequences hold; a shared token counts once for each.
        capacity: all slots of the pool.
        used: slots that sequences hold; a shared slot counts once.
        cached: slots that evicting all cached prefixes would free. Later prompts find these prefixes; if
            ``prefix_reuse_tiers`` is ``hot``, only up to the first quantized tile. If an allocator frees only whole
            blocks, a whole block counts if no sequence holds a part of it; otherwise all of it is ``pinned``.
        free: slots that the allocator can grant. If only a large block size is used, they may be in pieces that are too
            small.
        kept_back: slots in the reserve for merging.
        callers: slots that callers took from `KVCache.allocator`, or kernels from a pool on a device.
        pinned: slots that nobody can use at the moment: cached or freed ones of a block of which a sequence holds a
            part, those to which tokens are on their way from another place, and those lost in an allocator that broke
            off (`KVCache.repair`).
        waste: share of ``used`` that holds no token; this is room at the ends of sequences.
        blocks: number of entries of the block table for each length in tokens.
        entries_per_seq: mean number of entries in a row of the block table.
        peak_used: most slots that sequences have held so far.
        prompt_tokens: tokens of all prompts opened so far.
        reused_tokens: tokens of these prompts that were found in the cache; never more than ``prompt_tokens``.
        num_prefix_hits: prompts whose beginning was found.
        num_prefix_misses: prompts of which nothing was found, except those too short to be found.
        restored_tokens: tokens of dropped sequences that `KVCache.restore` found still cached.
        copied_tokens: tokens that forks, merges and compaction copied; all layers of a token count once.
        num_merges: blocks of 64 tokens that were merged from smaller ones.
        num_failed_merges: merges for which there was no free block of 64 tokens.
        num_evicted: granules evicted from the prefix index.
        num_stalls: rows of steps that got no memory.
        num_preempted: preemptions so far.
        num_steps: steps that were ended.
        metadata_nbytes: bytes of the block table, the index and the allocator.
        nbytes: bytes of keys and values.
        tiers: figures of each tier by its name; with several groups of layers, of all groups that have it.
        groups: figures of each group of layers, in the order of `CacheConfig.layer_groups`.
        num_demoted_warm: tiles of 64 tokens that went to the warm tier.
        num_demoted_cold: tiles that went to the cold tier.
        num_failed_demotions: tiles that were due, but found no room in a colder tier.
        num_unquantizable: tiles that were due, but stay in 16 bit because a token holds an infinity or NaN; counted
            each time such a tile is looked at. On a GPU these tokens become NaN instead.
        num_dequantized: tiles that became hot again because a sequence was cut inside them.
        converted_tokens: tokens in tiles that changed their tier; `copied_tokens` does not count them.
        num_offloaded: blocks of 64 tokens that were moved to host memory.
        num_prefetched: blocks of 64 tokens that were moved from host memory to the device.
        skipped_mass: with ``sparse``, the mean share of the attention that sequences gave, in the last step that read
            everything, to tokens which the steps before it had left out; else None.
    """

    num_seqs: int
    num_preempted_seqs: int
    num_tokens: int
    capacity: int
    used: int
    cached: int
    free: int
    kept_back: int
    callers: int
    pinned: int
    waste: float
    blocks: Mapping[int, int]
    entries_per_seq: float
    peak_used: int
    prompt_tokens: int
    reused_tokens: int
    num_prefix_hits: int
    num_prefix_misses: int
    restored_tokens: int
    copied_tokens: int
    num_merges: int
    num_failed_merges: int
    num_evicted: int
    num_stalls: int
    num_preempted: int
    num_steps: int
    metadata_nbytes: int
    nbytes: int
    tiers: Mapping[str, TierStats]
    groups: tuple[GroupStats, ...]
    num_demoted_warm: int
    num_demoted_cold: int
    num_failed_demotions: int
    num_unquantizable: int
    num_dequantized: int
    converted_tokens: int
    num_offloaded: int
    num_prefetched: int
    skipped_mass: float | None


def collect(state: CacheState, skipped_mass: float | None = None) -> CacheStats:
    """Collect all figures."""
    state.forget_lost()
    info = state.group.table.info
    live = np.flatnonzero((info[:, STATE] != CLOSED) & (info[:, STATE] != PREEMPTED)).astype(np.int32)
    stays = [row for row, saved in state.preempted.items() if saved.stays]
    holding = np.sort(np.concatenate([live, np.array(stays, np.int32)]))
    counters = {name: sum(getattr(group.counters, name) for group in state.groups) for name in vars(state.counters)}
    peak = counters.pop("peak_granules")
    by_group = [_tiers_of(group) for group in state.groups]
    tiers = {
        name: _sum([one[name] for one in by_group if name in one])
        for name in POOL_NAMES
        if any(name in one for one in by_group)
    }
    num_held, filled = 0, 0
    sizes: list[NDArray[np.int64]] = []
    for group in state.groups:
        num_held += group.blocks.num_used
        filled += _num_filled(group, holding)
        sizes.append(_entry_sizes(group, holding))
    everywhere = np.concatenate(sizes)
    given = [group.layers for group in state.config.groups]
    figures = [_group(*pair) for pair in zip(state.groups, by_group, strict=True)]
    return CacheStats(
        num_seqs=len(live),
        num_preempted_seqs=int(np.count_nonzero(info[:, STATE] == PREEMPTED)),
        num_tokens=int(info[live, LENGTH].sum()),
        **{name: sum(getattr(tier, name) for tier in tiers.values()) for name in ("capacity", *_PLACES, "nbytes")},
        waste=1 - filled / (8 * num_held) if num_held else 0.0,
        blocks={int(size): int(count) for size, count in zip(*np.unique(everywhere, return_counts=True), strict=True)},
        entries_per_seq=len(everywhere) / len(holding) if len(holding) else 0.0,
        peak_used=peak * 8,
        **counters,
        skipped_mass=skipped_mass,
        metadata_nbytes=sum(_metadata_nbytes(group) for group in state.groups),
        tiers=tiers,
        groups=tuple(sorted(figures, key=lambda one: given.index(one.layers))),
    )


def _num_filled(group: CacheGroup, live: Int32Array) -> int:
    """Slots of rows that hold a token; a shared one counts once."""
    filled = np.zeros(group.blocks.num_granules, np.int8)
    fill_in(group.table, live, filled)
    return int(filled.sum())


def _entry_sizes(group: CacheGroup, live: Int32Array) -> NDArray[np.int64]:
    """Tokens of each entry of some rows."""
    counts = group.table.info[live, NUM_ENTRIES]
    width = int(counts.max(initial=0))
    entries = group.table.entries[live, :width]
    found: NDArray[np.int64] = (((entries >> 24) & 7) + 1)[np.arange(width) < counts[:, None]].astype(np.int64) * 8
    return found


def _metadata_nbytes(group: CacheGroup) -> int:
    blocks = group.blocks
    arrays = sum(array.nbytes for array in (*group.table, *blocks.nodes, *blocks.granules))
    return arrays + sum(one.stats().metadata_nbytes for one in blocks.allocators if one is not None)


def _group(group: CacheGroup, tiers: Mapping[str, TierStats]) -> GroupStats:
    figures = {name: sum(getattr(tier, name) for tier in tiers.values()) for name in ("capacity", *_PLACES, "nbytes")}
    layers = group.layers
    return GroupStats(layers=layers.layers, window=layers.window, chunk=layers.chunk, tiers=tiers, **figures)


def _sum(figures: list[TierStats]) -> TierStats:
    return TierStats(**{name: sum(getattr(one, name) for one in figures) for name in vars(figures[0])})


def _tiers_of(group: CacheGroup) -> dict[str, TierStats]:
    """The figures of a group's tiers by their names."""
    allocators = enumerate(group.blocks.allocators)
    return {POOL_NAMES[i]: _tier(group, i, one.stats()) for i, one in allocators if one is not None}


def _tier(group: CacheGroup, tier: int, figures: AllocatorStats) -> TierStats:
    blocks = group.blocks
    own = slice(blocks.first[tier], blocks.first[tier] + figures.num_granules)
    granted, callers = (int(np.count_nonzero(one[own])) for one in (blocks.ledger.granted, blocks.ledger.callers))
    left = blocks.ledger.left
    num_left = int(np.count_nonzero((left >= own.start) & (left < own.stop)))
    # live in the allocator but unknown here: a kernel's, or lost when the allocator broke off
    others = figures.num_live - granted - callers
    evictable = blocks.num_evictable(tier)
    num_arriving = MAX_BLOCK_GRANULES * sum(own.start <= start < own.stop for start in blocks.arriving)
    pinned = figures.pinned + num_left + num_arriving + blocks.granules.cached[tier] - evictable
    if isinstance(blocks.allocators[tier], DevicePool):
        callers, others = callers + others, 0
    return TierStats(
        capacity=figures.num_granules * 8,
        used=int(blocks.granules.cached[HELD + tier]) * 8,
        cached=evictable * 8,
        free=figures.num_free * 8,
        kept_back=8 * MAX_BLOCK_GRANULES * len(blocks.reserve) if tier == TIER_HOT else 0,
        callers=callers * 8,
        pinned=(int(pinned) + others) * 8,
        nbytes=figures.num_granules // 8 * group.config.block_nbytes[POOL_NAMES[TIER_OF_POOL[tier]]],
    )
