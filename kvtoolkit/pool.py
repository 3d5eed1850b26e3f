"""The cache's side of an allocator: what to do when a request does not fit, and the blocks kept back for merging.

free + held by rows + cached + kept back (+ pinned) == num_granules
"""

import inspect
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from allocators import BlockAllocator, InvalidSizeError, create, find
from kvtoolkit.config import CacheConfig
from kvtoolkit.errors import CacheFullError, ConfigError
from kvtoolkit.eviction import eviction_policy
from kvtoolkit.prefix import CACHED, Evictor, Int32Array, make_granules, make_nodes
from kvtoolkit.rows import coalesce
from kvtoolkit.tables import MAX_BLOCK_GRANULES


@dataclass
class Counters:
    """What a cache counts as it goes."""

    num_steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    copied_tokens: int = 0
    num_merges: int = 0
    num_failed_merges: int = 0
    num_stalls: int = 0
    num_preempted: int = 0
    num_evicted: int = 0
    peak_granules: int = 0


def _takes_device(allocator: str) -> bool:
    try:
        return "device" in inspect.signature(find(allocator)).parameters
    except (ValueError, TypeError):  # of some things that can be called nobody knows the arguments
        return False


Runs = list[tuple[int, int]]
"""``(first granule, granules)`` of pieces of memory."""


class Pool:
    """An allocator whose freed prefixes stay findable until their memory is needed.

    An allocator that takes a ``device`` gets that of the keys and values, where they lie on one.

    Not thread-safe by itself: the cache's lock covers it.
    """

    def __init__(self, config: CacheConfig, counters: Counters, device: int | None) -> None:
        self.counters = counters
        num_granules = config.num_granules
        self.policy = config.growth_policy
        options = {"block_sizes": config.block_sizes, **config.allocator_options}
        if device is not None and _takes_device(config.allocator):
            options.setdefault("device", device)
        try:
            self.allocator: BlockAllocator = create(config.allocator, num_granules, **options)
        except InvalidSizeError as error:
            raise ConfigError(f"allocator_options: {error}") from error
        self.num_granules = num_granules
        # sizes the cache asks for, in granules, descending
        self.offered = np.array(sorted((size // 8 for size in self.allocator.block_sizes), reverse=True), np.int32)
        self.granules = make_granules(num_granules)
        self.nodes = make_nodes(num_granules)
        self.evictor = Evictor(eviction_policy(config.eviction), self.nodes, self.granules)
        self.freed = np.empty(num_granules, np.int32)
        """Where compiled code lists granules to be freed; `free_listed` takes them from here."""
        self._run_starts = np.empty(num_granules, np.int32)
        self._run_sizes = np.empty(num_granules, np.int32)
        self.reserve = int(self.policy.reserve * (num_granules // MAX_BLOCK_GRANULES))
        self.kept_back: list[int] = []
        """First granules of the blocks of 64 tokens kept back for merging."""
        self.replenish()

    @property
    def num_cached(self) -> int:
        """Granules that no row holds but that are still findable."""
        return int(self.nodes.counts[CACHED])

    @property
    def num_used(self) -> int:
        """Granules held by rows, granules pinned inside the allocator included."""
        return self.num_granules - self.allocator.num_free - self.num_cached - MAX_BLOCK_GRANULES * len(self.kept_back)

    def allocate_some(self, sizes: ArrayLike) -> Int32Array:
        """Blocks in the order asked for, -1 from the first that does not fit."""
        starts = self.allocator.allocate(sizes, partial=True)
        if not (isinstance(starts, np.ndarray) and starts.dtype == np.int32 and starts.shape == np.shape(sizes)):
            raise ConfigError(
                f"allocator: expected {type(self.allocator).__name__}.allocate to return [{np.size(sizes)}] int32 "
                f"starts, got {starts!r:.80}"
            )
        return starts

    def allocate_tails(self, count: int, what: str) -> tuple[Int32Array, Int32Array]:
        """``count`` blocks of at least a granule, evicting if need be; ``(starts, sizes)``, or CacheFullError."""
        self.make_room(count)
        sizes = np.full(count, self.offered[-1], np.int32)
        starts = self.allocate_some(sizes)
        first = int(np.argmax(starts < 0)) if starts[-1] < 0 else count
        try:
            for i in range(first, count):
                run = self.fit(1)
                if run is None:
                    raise CacheFullError(
                        f"{what}: expected room for {count} copies of a partly filled granule, got room for {i}: "
                        f"{self.allocator.num_free} granules free, {self.num_cached} cached"
                    )
                ((starts[i], sizes[i]),) = run
                first = i + 1
        except BaseException:
            self.free_runs(list(zip(starts[:first].tolist(), sizes[:first].tolist(), strict=True)))
            raise
        return starts, sizes

    def fit(self, needed: int) -> Runs | None:
        """Runs of at least ``needed`` granules by any sizes on offer; None if there is no way.

        Evicts, and in the end gives up what is kept back for merging.
        """
        runs: Runs = []
        try:
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
        except BaseException:
            self.free_runs(runs)
            raise
        return runs

    def _eviction_may_help(self) -> bool:
        """Whether some place for the smallest block is held by no row; if not, evicting all would be in vain."""
        return bool((self.granules.refs.reshape(-1, int(self.offered[-1])) == 0).all(axis=1).any())

    def _sizes_to_try(self, needed: int) -> list[int]:
        """The best fitting size, then smaller ones, then larger ones."""
        offered = [int(size) for size in self.offered if size <= self.policy.largest]
        fitting = min((size for size in offered if size >= needed), default=offered[0])
        return [size for size in offered if size <= fitting] + [size for size in offered[::-1] if size > fitting]

    def make_room(self, wanted: int) -> None:
        """Evict until ``wanted`` granules are free or nothing is left to evict."""
        missing = wanted - self.allocator.num_free
        if missing > 0 and self.num_cached:
            self.evict(missing)

    def evict(self, wanted: int) -> int:
        """Evict about ``wanted`` cached granules; returns how many."""
        total = 0
        while total < wanted and (count := self.evictor.evict(wanted - total, self.freed)):
            self.free_listed(count)
            self.counters.num_evicted += count
            total += count
        return total

    def free_listed(self, count: int) -> None:
        """Free the first ``count`` granules of `freed`."""
        if count:
            runs = coalesce(self.freed, count, self._run_starts, self._run_sizes)
            self.allocator.free(self._run_starts[:runs], self._run_sizes[:runs])

    def free_runs(self, runs: Runs) -> None:
        """Free ``(start, size)`` runs."""
        if runs:
            self.allocator.free([start for start, _ in runs], [size for _, size in runs])

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
        self.free_runs([(start, MAX_BLOCK_GRANULES) for start in self.kept_back])
        self.kept_back = []
        return True
