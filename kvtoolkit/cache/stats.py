"""The figures of a cache: what its memory holds, and what keeping it cost.

Every slot is in one place, in each tier and in all of them together:

    free + used + cached + kept_back + callers + pinned == capacity
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from allocators import AllocatorStats
from kvtoolkit.cache.state.block_table import CLOSED, LENGTH, NUM_ENTRIES, PREEMPTED, STATE, fill_in
from kvtoolkit.cache.state.cache_state import CacheState
from kvtoolkit.cache.state.prefix_index import HELD
from kvtoolkit.config.tiers import TIER_NAMES
from kvtoolkit.cuda.pool import DevicePool
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT

_PLACES = ("used", "cached", "free", "kept_back", "callers", "pinned")


@dataclass(frozen=True)
class TierStats:
    """A moment's figures of one tier. Token slots, but for the last; they mean what they mean in `CacheStats`.

    Attributes:
        capacity: of the tier.
        used: held by sequences, a shared one counted once.
        cached: held by no sequence, but not forgotten yet.
        free: can be granted.
        kept_back: kept back as targets for merging.
        callers: held by callers or kernels.
        pinned: of no use to anybody at the moment.
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
class CacheStats:
    """A moment's figures of one cache. Tokens unless the name says otherwise.

    Attributes:
        num_seqs: open sequences, pinned copies included, preempted ones not.
        num_preempted_seqs: sequences that wait for `KVCache.restore`.
        num_tokens: held by the open sequences; a token that two of them share counts twice.
        capacity: slots in the pool.
        used: slots that sequences hold, a shared one counted once.
        cached: slots that evicting all cached prefixes would make free. Later prompts find these prefixes, but for what
            comes after the first quantized tile where ``prefix_reuse_tiers`` is ``hot``. Where only whole blocks can be
            freed, the rest of a block counts if no sequence holds a part of it; else all of it is ``pinned``.
        free: slots that the allocator has to grant. Where one large block size is used, they may be in pieces that are
            too small.
        kept_back: slots kept back as targets for merging.
        callers: slots that callers took from `KVCache.allocator`, or kernels from a pool on a device.
        pinned: slots of no use at the moment: cached or given back, but of a block of which a sequence holds a part; or
            left behind where an allocator broke off (`KVCache.repair`).
        waste: share of ``used`` that holds no token: room at the ends of sequences.
        blocks: entries of the block table by their length in tokens.
        entries_per_seq: mean number of entries in a row of the block table.
        peak_used: most slots that sequences ever held.
        prompt_tokens: tokens of all prompts opened so far.
        reused_tokens: those of them that were found in the cache; never more than ``prompt_tokens``.
        num_prefix_hits: prompts of which a beginning was found.
        num_prefix_misses: prompts of which nothing was found, those apart that are too short to be found.
        restored_tokens: tokens of dropped sequences that `KVCache.restore` found still cached.
        copied_tokens: tokens copied by forks, merges and compaction, all layers of one token counted once.
        num_merges: blocks copied together into larger ones.
        num_failed_merges: merges that found no free block of 64 tokens.
        num_evicted: granules evicted from the prefix index.
        num_stalls: rows of steps that got no memory.
        num_preempted: preemptions so far.
        num_steps: steps that ended.
        metadata_nbytes: bytes of the block table, the index and the allocator.
        nbytes: bytes of keys and values.
        tiers: figures of each tier by its name; all of them together are above.
        num_demoted_warm: tiles of 64 tokens that went to the warm tier.
        num_demoted_cold: tiles that went to the cold tier.
        num_failed_demotions: tiles that were old enough and found no room in a colder tier.
        num_unquantizable: tiles that were old enough and stay in 16 bit, since a token of theirs holds an infinity or
            NaN. One counts whenever it is looked at. On a GPU such tokens become NaN instead.
        num_dequantized: tiles made hot again, since a sequence was cut inside them.
        converted_tokens: tokens of these tiles, which `copied_tokens` does not count.
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
    num_demoted_warm: int
    num_demoted_cold: int
    num_failed_demotions: int
    num_unquantizable: int
    num_dequantized: int
    converted_tokens: int


def collect(state: CacheState) -> CacheStats:
    """Count everything up."""
    table, blocks, counters = state.group.table, state.group.blocks, state.counters
    info = table.info
    live = np.flatnonzero((info[:, STATE] != CLOSED) & (info[:, STATE] != PREEMPTED))
    lengths, counts = info[live, LENGTH], info[live, NUM_ENTRIES]
    num_held = blocks.num_used
    filled = np.zeros(blocks.num_granules, np.int8)
    fill_in(table, live.astype(np.int32), filled)
    width = int(counts.max(initial=0))
    entries = table.entries[live, :width]
    sizes = (((entries >> 24) & 7) + 1)[np.arange(width) < counts[:, None]] * 8
    allocators = [None if allocator is None else allocator.stats() for allocator in blocks.allocators]
    tiers = {TIER_NAMES[i]: _tier(state, i, one) for i, one in enumerate(allocators) if one is not None}
    everywhere = {name: sum(getattr(tier, name) for tier in tiers.values()) for name in _PLACES}
    return CacheStats(
        num_seqs=len(live),
        num_preempted_seqs=int(np.count_nonzero(info[:, STATE] == PREEMPTED)),
        num_tokens=int(lengths.sum()),
        capacity=blocks.num_granules * 8,
        **everywhere,
        waste=1 - int(filled.sum()) / (8 * num_held) if num_held else 0.0,
        blocks={int(size): int(count) for size, count in zip(*np.unique(sizes, return_counts=True), strict=True)},
        entries_per_seq=float(counts.mean()) if len(live) else 0.0,
        peak_used=counters.peak_granules * 8,
        prompt_tokens=counters.prompt_tokens,
        reused_tokens=counters.reused_tokens,
        num_prefix_hits=counters.num_prefix_hits,
        num_prefix_misses=counters.num_prefix_misses,
        restored_tokens=counters.restored_tokens,
        copied_tokens=counters.copied_tokens,
        num_merges=counters.num_merges,
        num_failed_merges=counters.num_failed_merges,
        num_evicted=counters.num_evicted,
        num_stalls=counters.num_stalls,
        num_preempted=counters.num_preempted,
        num_steps=counters.num_steps,
        metadata_nbytes=sum(one.metadata_nbytes for one in allocators if one is not None)
        + sum(array.nbytes for array in (*table, *blocks.nodes, *blocks.granules)),
        nbytes=sum(one.nbytes for one in tiers.values()),
        tiers=tiers,
        num_demoted_warm=counters.num_demoted_warm,
        num_demoted_cold=counters.num_demoted_cold,
        num_failed_demotions=counters.num_failed_demotions,
        num_unquantizable=counters.num_unquantizable,
        num_dequantized=counters.num_dequantized,
        converted_tokens=counters.converted_tokens,
    )


def _tier(state: CacheState, tier: int, figures: AllocatorStats) -> TierStats:
    blocks = state.group.blocks
    own = slice(blocks.first[tier], blocks.first[tier] + figures.num_granules)
    granted, callers = (int(np.count_nonzero(one[own])) for one in (blocks.ledger.granted, blocks.ledger.callers))
    left = blocks.ledger.left
    num_left = int(np.count_nonzero((left >= own.start) & (left < own.stop)))
    # live in the allocator, but of nobody here: a kernel's, or lost where the allocator broke off
    others = figures.num_live - granted - callers
    evictable = blocks.num_evictable(tier)
    pinned = figures.pinned + num_left + blocks.granules.cached[tier] - evictable
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
        nbytes=figures.num_granules // 8 * state.config.block_nbytes[TIER_NAMES[tier]],
    )
