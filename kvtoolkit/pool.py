"""The cache's side of its allocators: what to do when a request does not fit, and the blocks kept back for merging.

free + held by rows + cached + kept back + callers' + pinned == num_granules

Every tier has an allocator of its own. Granule numbers run through the tiers; those of an allocator begin at 0.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators import BlockAllocator, InvalidSizeError, UnknownAllocatorError, create, find
from kvtoolkit.config import CacheConfig
from kvtoolkit.errors import CacheFullError, ConfigError
from kvtoolkit.eviction import eviction_policy
from kvtoolkit.ledger import Ledger, require_allocator
from kvtoolkit.prefix import HELD, Evictor, Int32Array, make_granules, make_nodes
from kvtoolkit.tables import MAX_BLOCK_GRANULES, TIER_HOT
from kvtoolkit.tier_config import TIER_NAMES


@dataclass
class Counters:
    """What a cache counts as it goes."""

    num_steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    restored_tokens: int = 0
    num_prefix_hits: int = 0
    num_prefix_misses: int = 0
    copied_tokens: int = 0
    num_merges: int = 0
    num_failed_merges: int = 0
    num_stalls: int = 0
    num_preempted: int = 0
    num_evicted: int = 0
    peak_granules: int = 0
    num_demoted_warm: int = 0
    num_demoted_cold: int = 0
    num_failed_demotions: int = 0
    num_unquantizable: int = 0
    num_dequantized: int = 0
    converted_tokens: int = 0


def _takes_device(allocator: str) -> bool:
    try:
        return "device" in inspect.signature(find(allocator)).parameters
    except (ValueError, TypeError):  # of some things that can be called nobody knows the arguments
        return False


def _make_allocator(name: str, num_granules: int, options: dict[str, Any], device: int | None) -> BlockAllocator:
    if device is not None and _takes_device(name):
        options = {"device": device, **options}
    try:
        allocator = create(name, num_granules, **options)
    except InvalidSizeError as error:
        raise ConfigError(f"allocator_options: {error}") from error
    except UnknownAllocatorError as error:
        raise ConfigError(str(error)) from error
    require_allocator(allocator, num_granules, options["block_sizes"])
    return allocator


def _quantized_allocators(config: CacheConfig, device: int | None) -> list[BlockAllocator | None]:
    """Those of the warm and the cold tier, which hold nothing but blocks of 64 tokens."""
    tiers = config.tier_config
    names = (None, None) if tiers is None else (tiers.warm_allocator, tiers.cold_allocator)
    made: list[BlockAllocator | None] = []
    for name, num_granules in zip(names, config.tier_granules[1:], strict=True):
        is_same = name in (None, config.allocator)
        options = {"block_sizes": (64,), **(config.allocator_options if is_same else {})}
        made.append(_make_allocator(name or config.allocator, num_granules, options, device) if num_granules else None)
    return made


def granules_of(blocks: Int32Array) -> Int32Array:
    """The 8 granules of each block of 64 tokens that begins at ``blocks[i]``, one after another."""
    listed: Int32Array = (blocks[:, None] + np.arange(MAX_BLOCK_GRANULES, dtype=np.int32)).ravel().astype(np.int32)
    return listed


Runs = list[tuple[int, int]]
"""``(first granule, granules)`` of pieces of memory."""


class Pool:
    """An allocator whose freed prefixes stay findable until their memory is needed.

    An allocator that takes a ``device`` gets that of the keys and values, where they lie on one.

    Not thread-safe by itself: the cache's lock covers it.
    """

    def __init__(self, config: CacheConfig, counters: Counters, device: int | None) -> None:
        self.counters = counters
        self.policy = config.growth_policy
        self.num_granules = config.num_granules
        self.num_hot = config.tier_granules[0]
        self.first = config.first_granules
        options = {"block_sizes": config.block_sizes, **config.allocator_options}
        self.allocators: list[BlockAllocator | None] = [
            _make_allocator(config.allocator, self.num_hot, options, device),
            *_quantized_allocators(config, device),
        ]
        """Of the hot, the warm and the cold tier; None where there is no such tier."""
        hot = self.allocators[0]
        assert hot is not None
        self.allocator = hot
        self.ledger = Ledger(self.allocators, self.first, self.num_granules)
        # sizes the cache asks for, in granules, descending
        self.offered = np.array(sorted((size // 8 for size in self.allocator.block_sizes), reverse=True), np.int32)
        self.granules = make_granules(self.num_granules, self.first)
        self.nodes = make_nodes(self.num_granules)
        policy = eviction_policy(config.eviction)
        self.evictors = [Evictor(policy, self.nodes, self.granules, tier) for tier in range(len(TIER_NAMES))]
        self.freed = np.empty(self.num_granules, np.int32)
        """Where compiled code lists granules to be freed; `free_listed` takes them from here."""
        self.reserve = int(self.policy.reserve * (self.num_hot // MAX_BLOCK_GRANULES))
        self.kept_back: list[int] = []
        """First granules of the blocks of 64 tokens kept back for merging."""
        self.replenish()

    @property
    def num_cached(self) -> int:
        """Hot granules that no row holds but that are still findable."""
        return int(self.granules.cached[TIER_HOT])

    @property
    def num_used(self) -> int:
        """Granules held by rows, one that several of them share counted once."""
        return int(self.granules.cached[HELD:].sum())

    def allocate_some(self, sizes: ArrayLike) -> Int32Array:
        """Hot blocks in the order asked for, -1 from the first that does not fit."""
        return self.ledger.take(TIER_HOT, sizes)

    def allocate_tails(self, count: int, what: str) -> tuple[Int32Array, Int32Array]:
        """``count`` blocks of at least a granule, evicting if need be; ``(starts, sizes)``, or CacheFullError."""
        self.make_room(count)
        sizes = np.full(count, self.offered[-1], np.int32)
        starts = self.allocate_some(sizes)
        first = int(np.argmax(starts < 0)) if starts[-1] < 0 else count
        for i in range(first, count):
            run = self.fit(1)
            if run is None:
                self.free_runs(list(zip(starts[:i].tolist(), sizes[:i].tolist(), strict=True)))
                raise CacheFullError(
                    f"{what}: expected room for {count} copies of a partly filled granule, got room for {i}: "
                    f"{self.allocator.num_free} granules free, {self.num_cached} cached"
                )
            ((starts[i], sizes[i]),) = run
        return starts, sizes

    def fit(self, needed: int) -> Runs | None:
        """Runs of at least ``needed`` granules by any sizes on offer; None if there is no way.

        Evicts, and in the end gives up what is kept back for merging.
        """
        runs: Runs = []
        while needed > 0:
            for size in self._sizes_to_try(needed):
                start = int(self.allocate_some([size])[0])
                if start >= 0:
                    runs.append((start, size))
                    needed -= size
                    break
            else:
                if not (self._eviction_may_help() and self.evict(needed)) and not self.give_up_reserve():
                    self.free_runs(runs)
                    return None
        return runs

    def _eviction_may_help(self) -> bool:
        """Whether some place for the smallest block is held by no row; if not, evicting all would be in vain."""
        refs = self.granules.refs[: self.num_hot]
        return bool((refs.reshape(-1, int(self.offered[-1])) == 0).all(axis=1).any())

    def _sizes_to_try(self, needed: int) -> list[int]:
        """The best fitting size, then smaller ones, then larger ones."""
        offered = [int(size) for size in self.offered if size <= self.policy.largest]
        fitting = min((size for size in offered if size >= needed), default=offered[0])
        return [size for size in offered if size <= fitting] + [size for size in offered[::-1] if size > fitting]

    def make_room(self, wanted: int) -> None:
        """Evict until ``wanted`` granules are free or nothing is left to evict."""
        if len(self.ledger.left):
            self.ledger.free_left()
        missing = wanted - self.allocator.num_free
        if missing > 0 and self.num_cached:
            self.evict(missing)

    def evict(self, wanted: int, tier: int = TIER_HOT) -> int:
        """Evict about ``wanted`` cached granules of a tier, and what follows them; returns how many of the tier."""
        total = 0
        while total < wanted and (count := self.evictors[tier].evict(wanted - total, self.freed)):
            total += int(np.count_nonzero(self.tiers_of(self.freed[:count]) == tier))
            self.free_listed(count)
            self.counters.num_evicted += count
        return total

    def tiers_of(self, granules: Int32Array) -> NDArray[np.int64]:
        """The tier of each granule number."""
        return np.searchsorted(self.first[1:], granules, side="right")

    def free_listed(self, count: int) -> None:
        """Free the first ``count`` granules of `freed`."""
        if count:
            self.free_granules(self.freed[:count])

    def free_granules(self, listed: Int32Array) -> None:
        """Free granules of any tiers."""
        self.ledger.give_back(listed)

    def free_runs(self, runs: Runs) -> None:
        """Free ``(start, size)`` runs of any tiers."""
        if runs:
            self.free_granules(np.concatenate([np.arange(start, start + size, dtype=np.int32) for start, size in runs]))

    # -- blocks of the quantized tiers -------------------------------------------------------------------------------

    def take_block(self, tier: int) -> int:
        """A free block of 64 tokens of a quantized tier; its first granule, or -1."""
        return int(self.ledger.take(tier, [MAX_BLOCK_GRANULES])[0])

    def allocate_block(self, tier: int) -> int:
        """As `take_block`, evicting what is cached in the tier if need be."""
        while (start := self.take_block(tier)) < 0 and self.evict(MAX_BLOCK_GRANULES, tier):
            pass
        return start

    # -- blocks for merging ------------------------------------------------------------------------------------------

    def take_targets(self, wanted: int) -> Int32Array:
        """Up to ``wanted`` blocks of 64 tokens to merge into: fresh ones, then those kept back. Never evicts."""
        fresh = self.allocate_some(np.full(wanted, MAX_BLOCK_GRANULES, np.int32))
        targets = fresh[fresh >= 0].tolist()
        while len(targets) < wanted and self.kept_back:
            targets.append(self.kept_back.pop())
        return np.array(targets, np.int32)

    def replenish(self) -> None:
        """Keep back as many blocks of 64 tokens as the policy wants, if there are that many."""
        missing = self.reserve - len(self.kept_back)
        if missing > 0 and self.allocator.largest_free >= MAX_BLOCK_GRANULES:
            starts = self.allocate_some(np.full(missing, MAX_BLOCK_GRANULES, np.int32))
            self.kept_back += starts[starts >= 0].tolist()

    def give_up_reserve(self) -> bool:
        """Free what is kept back, when the last blocks are needed; returns whether there was any."""
        if not self.kept_back:
            return False
        given_up, self.kept_back = self.kept_back, []
        self.free_runs([(start, MAX_BLOCK_GRANULES) for start in given_up])
        return True
