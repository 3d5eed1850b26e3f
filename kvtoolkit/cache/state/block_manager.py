"""The cache's side of its allocators: what to do when a request does not fit, and the reserve for merging.

    free + held by rows + cached + reserve + callers' + pinned == num_granules

Every tier has an allocator of its own. Granule numbers count through the tiers; inside an allocator they begin at 0.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators import BlockAllocator, InvalidSizeError, UnknownAllocatorError, create, find
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state.evictor import Evictor, count_evictable
from kvtoolkit.cache.state.ledger import Ledger, require_allocator
from kvtoolkit.cache.state.prefix_index import HELD, NUM_POOLS, make_holdings, tiers_of
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.config.eviction import eviction_policy
from kvtoolkit.config.tiers import HOST_POOL_OF
from kvtoolkit.cuda.pool_share import PoolWithShare
from kvtoolkit.errors import CacheFullError, ConfigError
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT

_REPLENISHED_AT_ONCE = 64


@dataclass
class Counters:
    """Running counts of a cache; see `CacheStats`."""

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
    num_offloaded: int = 0
    num_prefetched: int = 0
    converted_tokens: int = 0


def _takes_device(allocator: str) -> bool:
    try:
        return "device" in inspect.signature(find(allocator)).parameters
    except (ValueError, TypeError):  # the arguments of some callables cannot be known
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


def _further_allocators(config: CacheConfig, device: int | None) -> list[BlockAllocator | None]:
    """The allocators of the other pools. Quantized tiers have only blocks of 64 tokens."""
    tiers = config.quantization
    names = (None, None) if tiers is None else (tiers.warm_allocator, tiers.cold_allocator)
    made: list[BlockAllocator | None] = []
    for name, num_granules in zip(names, config.tier_granules[1:], strict=True):
        is_same = name in (None, config.allocator)
        options = {"block_sizes": (64,), **(config.allocator_options if is_same else {})}
        made.append(_make_allocator(name or config.allocator, num_granules, options, device) if num_granules else None)
    hot, cold = config.host_granules
    options = {"block_sizes": config.block_sizes, **config.allocator_options}
    made.append(_make_allocator(config.allocator, hot, options, None) if hot else None)
    options = {"block_sizes": (64,)}
    made.append(_make_allocator(names[1] or config.allocator, cold, options, None) if cold else None)
    return made


def granules_of(blocks: Int32Array) -> Int32Array:
    """The 8 granules of each block of 64 tokens that begins at ``blocks[i]``, one after another."""
    listed: Int32Array = (blocks[:, None] + np.arange(MAX_BLOCK_GRANULES, dtype=np.int32)).ravel().astype(np.int32)
    return listed


Runs = list[tuple[int, int]]
"""Pieces of memory as ``(first granule, number of granules)``."""


class BlockManager:
    """Grants blocks of all tiers; cached prefixes stay findable until their memory is needed.

    If the keys and values are on a device, an allocator that takes a ``device`` gets it.

    Not thread-safe by itself; the cache's lock covers it.
    """

    def __init__(self, config: CacheConfig, counters: Counters, device: int | None) -> None:
        self.counters = counters
        self.policy = config.growth_policy
        self.num_granules = config.num_granules
        self.num_hot = config.tier_granules[0]
        """Hot granules on the device."""
        self.first = config.pool_firsts
        options = {"block_sizes": config.block_sizes, **config.allocator_options}
        self.allocators: list[BlockAllocator | None] = [
            _make_allocator(config.allocator, self.num_hot, options, device),
            *_further_allocators(config, device),
        ]
        """Allocators of the pools, in the order of `kvtoolkit.config.tiers.POOL_NAMES`; None: no such pool."""
        hot = self.allocators[0]
        assert hot is not None
        self.allocator = hot
        self.ledger = Ledger(self.allocators, self.first, self.num_granules)
        # sizes the cache asks for, in granules, descending
        self.offered = np.array(sorted((size // 8 for size in self.allocator.block_sizes), reverse=True), np.int32)
        self.holdings = make_holdings(self.num_granules, self.first)
        self.nodes, self.granules, self.freed = self.holdings
        smallest = [int(self.offered[-1]), *[MAX_BLOCK_GRANULES] * 2, int(self.offered[-1]), MAX_BLOCK_GRANULES]
        self.evictor = Evictor(eviction_policy(config.eviction), self.holdings, self.ledger, smallest)
        self.arriving: set[int] = set()
        """First granules of the blocks of 64 tokens to which tokens are being moved from another place."""
        self.wanted_reserve = int(self.policy.reserve * (self.num_hot // MAX_BLOCK_GRANULES))
        """Blocks of 64 tokens that the reserve should have."""
        self.reserve: list[int] = []
        """First granules of the blocks of 64 tokens that are reserved as targets of merges."""
        for _ in range(0, self.wanted_reserve, _REPLENISHED_AT_ONCE):
            self.replenish()

    @property
    def num_known_free(self) -> int:
        """Hot granules that are free as far as the host knows, without waiting for a device.

        Kernels may have taken blocks of a pool there, or freed some, since the host last looked.
        """
        hot = self.allocator
        return hot.num_known_free if isinstance(hot, PoolWithShare) else hot.num_free

    @property
    def num_in_reach(self) -> int:
        """Hot granules that rows could get in host memory: those that are free, or cached there."""
        host = self.allocators[HOST_POOL_OF[TIER_HOT]]
        return 0 if host is None else host.num_free + int(self.granules.cached[HOST_POOL_OF[TIER_HOT]])

    @property
    def num_cached(self) -> int:
        """Hot granules that no row holds but that are still findable."""
        return int(self.granules.cached[TIER_HOT])

    def num_evictable(self, tier: int) -> int:
        """How many granules of a tier evicting all that is cached would make free.

        This looks at the whole tier, unless each cached granule can be used again by itself.
        """
        num_cached, first = int(self.granules.cached[tier]), self.first[tier]
        if num_cached == 0 or self.evictor.is_single[tier]:
            return num_cached
        granules, ledger = self.granules, self.ledger
        own = slice(first, first + ledger.num_of(tier))
        cached = (np.flatnonzero((granules.refs[own] == 0) & (granules.node[own] >= 0)) + first).astype(np.int32)
        sizes = ledger.unit_sizes(cached)
        units = np.maximum(sizes, self.evictor.smallest[tier])
        return int(count_evictable(granules, cached, units, sizes > 1, first, ledger.granted, ledger.callers))

    @property
    def num_used(self) -> int:
        """Granules that rows hold; a shared one counts once."""
        return int(self.granules.cached[HELD : HELD + NUM_POOLS].sum())

    def allocate_some(self, sizes: ArrayLike) -> Int32Array:
        """Hot blocks in the order asked for, -1 from the first that does not fit."""
        return self.ledger.take(TIER_HOT, sizes)

    def allocate_tails(self, count: int, what: str) -> tuple[Int32Array, Int32Array]:
        """``(starts, sizes)`` of ``count`` blocks of any size, evicting if need be; else CacheFullError."""
        runs: Runs = []
        while len(runs) < count:
            for size in self.offered[::-1].tolist():
                runs += self._take_blocks(count - len(runs), size)
            if len(runs) < count and not self.make_way(int(self.offered[-1]) * (count - len(runs))):
                num_found = len(runs)
                self.free_runs(runs)
                raise CacheFullError(
                    f"{what}: expected room for {count} copies of a partly filled granule, got room for {num_found}: "
                    f"{self.allocator.num_free} granules free, {self.num_cached} cached"
                )
        starts, sizes = np.array(runs, np.int32).reshape(-1, 2).T.copy()
        return starts, sizes

    def fit(self, needed: int) -> Runs | None:
        """Runs of at least ``needed`` hot granules, in blocks of any sizes; None if that cannot be.

        It evicts no more than necessary, and takes the reserve for merging last. Where the device has no room, all of
        them are in host memory.
        """
        runs = self._fit_on_device(needed)
        return self._fit_in_host_memory(needed) if runs is None else runs

    def _fit_in_host_memory(self, needed: int) -> Runs | None:
        """`fit` in host memory: blocks of 64 tokens, and smaller ones for the rest."""
        if self.allocators[HOST_POOL_OF[TIER_HOT]] is None or not self.can_have(needed, HOST_POOL_OF[TIER_HOT]):
            return None
        runs: Runs = []
        while (left := needed - sum(size for _, size in runs)) > 0:
            for size in self._sizes_to_try(left):
                starts = self.ledger.take(HOST_POOL_OF[TIER_HOT], np.full(max(1, left // size), size, np.int32))
                if found := [(start, size) for start in starts.tolist() if start >= 0]:
                    runs += found
                    break
            else:
                if not self.evict(left, HOST_POOL_OF[TIER_HOT]):
                    self.free_runs(runs)
                    return None
        return runs

    def take_in_host_memory(self, count: int) -> Runs:
        """Up to so many blocks of 64 hot tokens in host memory."""
        pool = HOST_POOL_OF[TIER_HOT]
        starts = self.ledger.take(pool, np.full(count, MAX_BLOCK_GRANULES, np.int32))
        found = [(start, MAX_BLOCK_GRANULES) for start in starts.tolist() if start >= 0]
        while len(found) < count and (start := self.allocate_block(pool)) >= 0:
            found.append((start, MAX_BLOCK_GRANULES))
        return found

    def _fit_on_device(self, needed: int) -> Runs | None:
        if not self.can_have(needed):
            return None
        runs: Runs = []
        while (left := needed - sum(size for _, size in runs)) > 0:
            for size in self._sizes_to_try(left):
                if found := self._take_blocks(max(1, left // size), size):
                    runs += found
                    break
            else:
                if not self.make_way(left):
                    self.free_runs(runs)
                    return None
        return runs

    def can_have(self, needed: int, tier: int = TIER_HOT) -> bool:
        """Whether so many granules are free, in the reserve, or evictable. First frees what broken calls have left.

        False is certain. True is not, because an allocator may be unable to make blocks of them.
        """
        if len(self.ledger.left):
            self.ledger.free_left()
        allocator = self.allocators[tier]
        if needed <= 0 or allocator is None:
            return needed <= 0
        return self.evictor.can_free(tier, needed - allocator.num_free - self._num_reserved(tier))

    def _num_reserved(self, tier: int) -> int:
        return MAX_BLOCK_GRANULES * len(self.reserve) if tier == TIER_HOT else 0

    def _take_blocks(self, count: int, size: int) -> Runs:
        """Up to ``count`` free blocks."""
        starts = self.allocate_some(np.full(count, size, np.int32))
        return [(start, size) for start in starts.tolist() if start >= 0]

    def make_way(self, needed: int) -> bool:
        """Evict ``needed`` granules. If that is not enough, give up some reserve, too; if it never is, do nothing."""
        if self.evict(needed):
            return True
        num_reserved = self._num_reserved(TIER_HOT)
        if not num_reserved or not self.evictor.can_free(TIER_HOT, needed - num_reserved):
            return False
        if needed > num_reserved:
            self.evict(needed - num_reserved)
        self._give_up_reserve(-(-needed // MAX_BLOCK_GRANULES))
        return True

    def _sizes_to_try(self, needed: int) -> list[int]:
        """The sizes to try, in order: the best fitting one, then smaller ones, then larger ones."""
        offered = [int(size) for size in self.offered if size <= self.policy.largest]
        fitting = min((size for size in offered if size >= needed), default=offered[0])
        return [size for size in offered if size <= fitting] + [size for size in offered[::-1] if size > fitting]

    def evict(self, wanted: int, tier: int = TIER_HOT) -> bool:
        """Make ``wanted`` granules of a tier available by evicting, see `kvtoolkit.cache.state.evictor`.

        Returns False, with nothing evicted, if that cannot be.
        """
        count = self.evictor.evict(tier, wanted)
        self.free_listed(count)
        self.counters.num_evicted += count
        return count > 0

    def tiers_of(self, granules: Int32Array) -> NDArray[np.int64]:
        """The tier of each granule number."""
        return tiers_of(self.granules, granules)

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
        """Take a block as `take_block` does, evicting what is cached in the tier if need be."""
        while (start := self.take_block(tier)) < 0 and self.evict(MAX_BLOCK_GRANULES, tier):
            pass
        return start

    # -- the reserve for merging ---------------------------------------------------------------------------------------

    def take_targets(self, wanted: int) -> Int32Array:
        """Up to ``wanted`` blocks of 64 tokens to merge into: fresh ones, then some of the reserve. Never evicts."""
        fresh = self.allocate_some(np.full(wanted, MAX_BLOCK_GRANULES, np.int32))
        targets = fresh[fresh >= 0].tolist()
        while len(targets) < wanted and self.reserve:
            targets.append(self.reserve.pop())
        return np.array(targets, np.int32)

    def replenish(self) -> None:
        """Add blocks to the reserve until it has as many as the policy wants; each call adds only some."""
        missing = min(self.wanted_reserve - len(self.reserve), _REPLENISHED_AT_ONCE)
        if missing > 0:
            starts = self.allocate_some(np.full(missing, MAX_BLOCK_GRANULES, np.int32))
            self.reserve += starts[starts >= 0].tolist()

    def _give_up_reserve(self, num_blocks: int) -> None:
        """Free some blocks of the reserve, because no others are left."""
        first = max(0, len(self.reserve) - num_blocks)
        given_up, self.reserve = self.reserve[first:], self.reserve[:first]
        self.free_runs([(start, MAX_BLOCK_GRANULES) for start in given_up])
