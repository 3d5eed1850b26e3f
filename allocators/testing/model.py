"""A pool as plain Python sets: who owns which granule, with alignment and disjointness asserted on every grant."""

import copy
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from allocators.protocol import SUPERBLOCK
from allocators.testing.failure import expect, fail

State = Literal["live", "limbo", "leased"]
Run = tuple[int, int]
"""First granule and number of granules."""

_REUSED = {"live": "disjoint", "limbo": "no reuse before the epoch ends", "leased": "disjoint"}


@dataclass
class PoolModel:
    """The truth about a pool: disjoint sets of granules, and nothing else.

    free = the granules in none of ``live``, ``limbo``, ``leased`` (or pinned, which only the allocator knows)
    """

    num_granules: int
    live: dict[int, int] = field(default_factory=dict)
    """Granule -> number of the block it was granted in."""
    limbo: dict[int, int] = field(default_factory=dict)
    """Granule -> epoch it was retired in."""
    leased: dict[int, int] = field(default_factory=dict)
    """Granule -> number of its block."""
    num_grants: int = 0
    storage: np.ndarray[tuple[int], np.dtype[np.int64]] = field(init=False)
    """What the blocks would hold: the number of the block, in each of its granules."""

    def __post_init__(self) -> None:
        self.storage = np.zeros(self.num_granules, np.int64)

    def copy(self) -> "PoolModel":
        return copy.deepcopy(self)

    @property
    def num_owned(self) -> int:
        """Granules that an allocator must hold to be handed out."""
        return len(self.live) + len(self.limbo) + len(self.leased)

    def take(self, start: int, size: int, into: State = "live") -> int:
        """Note a grant; returns the number of the block. Fails if it is misplaced or not free."""
        expect(
            start >= 0 and start + size <= self.num_granules,
            "inside the pool",
            f"granted {size} granules at {start} of a pool of {self.num_granules}",
        )
        alignment = min(size, SUPERBLOCK)
        expect(start % alignment == 0, "aligned", f"granted {size} granules at {start}, no multiple of {alignment}")
        for granule in range(start, start + size):
            for name, owned in (("live", self.live), ("limbo", self.limbo), ("leased", self.leased)):
                if granule in owned:
                    fail(_REUSED[name], f"granted {size} granules at {start}, but granule {granule} is {name}")
        self.num_grants += 1
        owned = self.leased if into == "leased" else self.live
        for granule in range(start, start + size):
            owned[granule] = self.num_grants
            self.storage[granule] = self.num_grants
        return self.num_grants

    def give(self, start: int, size: int) -> None:
        """Note that live granules are free again; what they hold must be what was written."""
        for granule in range(start, start + size):
            self._check_canary(granule, self.live.pop(granule))

    def retire(self, start: int, size: int, epoch: int) -> None:
        """Move live granules to the limbo of an epoch."""
        for granule in range(start, start + size):
            self._check_canary(granule, self.live.pop(granule))
            self.limbo[granule] = epoch

    def complete(self, epoch: int) -> None:
        """Free the limbo of all epochs up to this one."""
        self.limbo = {granule: retired for granule, retired in self.limbo.items() if retired > epoch}

    def keep(self, runs: list[Run]) -> None:
        """Leased granules become live."""
        for start, size in runs:
            for granule in range(start, start + size):
                self.live[granule] = self.leased.pop(granule)

    def drop(self, runs: list[Run]) -> None:
        """Leased granules are free again."""
        for start, size in runs:
            for granule in range(start, start + size):
                self._check_canary(granule, self.leased.pop(granule))

    def pieces(self) -> list[Run]:
        """What is still live of each block, as runs inside one block, by address."""
        return _runs(self.live, split_blocks=True)

    def live_runs(self) -> list[Run]:
        """The maximal runs of live granules, by address; a run may span several blocks."""
        return _runs(self.live, split_blocks=False)

    def not_live(self) -> list[int]:
        """Granules that nobody may free."""
        return [granule for granule in range(self.num_granules) if granule not in self.live]

    def _check_canary(self, granule: int, block: int) -> None:
        found = int(self.storage[granule])
        expect(found == block, "canaries", f"granule {granule} of block {block} was overwritten by block {found}")


def _runs(owned: dict[int, int], *, split_blocks: bool) -> list[Run]:
    runs: list[Run] = []
    for granule in sorted(owned):
        if runs:
            start, size = runs[-1]
            same_block = owned[granule] == owned[granule - 1] if granule == start + size else False
            if granule == start + size and (same_block or not split_blocks):
                runs[-1] = (start, size + 1)
                continue
        runs.append((granule, 1))
    return runs
