"""Where a cache with host memory keeps what: on the device while there is room, the coldest in host memory."""

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state.block_table import CAPACITY, LAST_STAMP, LENGTH, NUM_ENTRIES
from kvtoolkit.cache.state.cache_group import NOT_ASLEEP, CacheGroup
from kvtoolkit.cache.state.prefix_index import CLOCK
from kvtoolkit.cache.state.step_passes import StepArrays
from kvtoolkit.cache.tiering import tile_moves
from kvtoolkit.cache.tiering.offloader import Offloader
from kvtoolkit.config.tiers import HOST_POOL_OF, TierConfig
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT

_SHARE_LEFT = 16
"""What comes back unasked leaves this part of the device's blocks free, or it would soon have to go again."""


class Places:
    """The places of a group's blocks. The caller holds the cache's lock.

    Args:
        group: of layers; its storage has host memory.
        config: of the tiers.

    Attributes:
        hot, cold: move the blocks of a tier; None: no host memory for it.
    """

    def __init__(self, group: CacheGroup, config: TierConfig) -> None:
        self._group = group
        pools = group.blocks.allocators
        self.hot, self.cold = (
            None if pools[HOST_POOL_OF[tier]] is None else Offloader(group, tier, config)
            for tier in (TIER_HOT, TIER_COLD)
        )
        self._movers = [one for one in (self.hot, self.cold) if one is not None]
        self._most_at_once = group.config.migrate_budget
        self._num_asleep = 0
        self.may_exchange = False
        """Set when there are new scores: the next step may exchange what is read little for what is read more."""
        self._num_owed = 0  # superblocks that have made room for others

    @property
    def is_away(self) -> bool:
        """Whether rows hold hot blocks in host memory."""
        return self.hot is not None and self.hot.num_away > 0

    def run(self, arrays: StepArrays, batch: int, num_need: int) -> bool:
        """Finish and make the moves that a step which begins needs; returns whether a row has changed.

        Args:
            arrays: of the step, of which ``work[0]`` has the ``num_need`` rows that need blocks.
        """
        table = self._group.table
        before, rows = int(table.clock[LAST_STAMP]), arrays.rows[:batch]
        if self._num_asleep:
            self.wake(rows)
        self.settle()
        missing = int(tile_moves.count_missing(table, arrays, num_need)) if num_need else 0
        self.make_room(missing)
        if self.hot is not None and (self.may_exchange or self._num_owed):
            self._exchange(self.hot, rows)
        self._bring_back(rows, missing)
        return int(table.clock[LAST_STAMP]) != before

    def prepare(self, rows: Int32Array, limits: Int32Array, num_tokens: int) -> None:
        """Make room for so many tokens more of each row, up to its limit, before steps that the device drives."""
        info = self._group.table.info[rows]
        ends = np.minimum(info[:, LENGTH] + num_tokens, np.maximum(limits, info[:, LENGTH]))
        # each may get a block of 64 tokens for its last ones
        wanted = np.maximum(0, -(-ends // 8) - info[:, CAPACITY]) + MAX_BLOCK_GRANULES
        self.wake(rows)
        self.settle()
        self.make_room(int(wanted.sum()))

    def make_room(self, wanted: int) -> None:
        """Move the coldest hot blocks to host memory until so many granules are free, as far as some may move."""
        blocks = self._group.blocks
        if (
            self.hot is not None
            and wanted > blocks.num_known_free
            and (lacking := wanted - blocks.allocator.num_free) > 0
        ):
            self.hot.make_room(lacking)

    def has_room(self, wanted: int) -> bool:
        """Whether rows can get so many hot granules, on the device or in host memory. Finishes moves if need be."""
        blocks = self._group.blocks
        if self.hot is not None and wanted > blocks.num_known_free:
            self.hot.settle(wanted - blocks.num_known_free)
        return blocks.can_have(wanted - blocks.num_in_reach)

    def make_cold_room(self) -> bool:
        """Make room for a block in the cold tier; False if that cannot be."""
        return self.cold is not None and self.cold.make_room(MAX_BLOCK_GRANULES) >= MAX_BLOCK_GRANULES

    def _exchange(self, hot: Offloader, rows: Int32Array) -> None:
        """Bring back what has room now, or make room by what is read less."""
        if hot.num_moves:
            return
        if self._num_owed:  # also where some have not moved after all
            free = self._group.blocks.num_known_free // MAX_BLOCK_GRANULES
            hot.prefetch(rows, min(self._num_owed, free), evicts=False)
            self._num_owed = 0
        elif self.may_exchange:
            self._num_owed = hot.exchange(rows, self._most_at_once)
            self.may_exchange = False

    def _bring_back(self, rows: Int32Array, missing: int) -> None:
        """Begin to move what the rows of a step hold in host memory to the device, if there is room to spare.

        Args:
            missing: granules that the rows will take for their new tokens.
        """
        blocks = self._group.blocks
        if self.hot is not None and self.hot.num_away and not self.hot.num_moves:
            spare = blocks.num_known_free - missing - max(blocks.num_hot // _SHARE_LEFT, MAX_BLOCK_GRANULES * len(rows))
            if spare >= MAX_BLOCK_GRANULES:
                self.hot.prefetch(rows, min(spare // MAX_BLOCK_GRANULES, self._most_at_once), evicts=False)
            elif blocks.num_cached or self._num_asleep:  # which have no better claim to the device
                self._num_owed = self.hot.displace(rows, self._most_at_once)

    # -- what callers say --------------------------------------------------------------------------------------------

    def offload(self, rows: Int32Array) -> int:
        """Let rows fall asleep, and begin to move what they hold to host memory; returns how many superblocks."""
        self.settle()
        asleep = self._group.asleep
        asleep[rows] = float(self._group.blocks.nodes.counts[CLOCK])
        self._num_asleep = int((asleep != NOT_ASLEEP).sum())
        return sum(mover.offload(rows) for mover in self._movers)

    def can_stay(self, rows: Int32Array) -> NDArray[np.bool_]:
        """Which rows host memory has room for, one after the other; none once it is full."""
        blocks, table = self._group.blocks, self._group.table
        room, fits = blocks.num_in_reach if self.hot is not None else 0, np.zeros(len(rows), np.bool_)
        for i, row in enumerate(rows.tolist()):
            entries = table.entries[row, : table.info[row, NUM_ENTRIES]]
            here = np.unique((entries & 0xFFFFFF)[entries & 0xFFFFFF < blocks.num_hot] >> 3)
            needed = MAX_BLOCK_GRANULES * len(here)
            fits[i] = room >= max(needed, MAX_BLOCK_GRANULES)
            room -= needed if fits[i] else 0
        return fits

    def prefetch(self, rows: Int32Array, keep_free: int = 0) -> int:
        """Wake rows, and begin to move what they hold to the device; returns how many superblocks.

        A superblock on its way takes memory in both places. If ``keep_free`` is given, only so many set out that this
        many hot granules can still be had meanwhile.
        """
        self.settle()
        self.wake(rows)
        blocks = self._group.blocks
        most = len(blocks.granules.refs) // MAX_BLOCK_GRANULES
        mosts = [most] * len(self._movers)
        if keep_free and self.hot is not None:
            left = blocks.num_known_free + MAX_BLOCK_GRANULES * len(blocks.reserve) + blocks.num_evictable(TIER_HOT)
            mosts[0] = max(0, (left + blocks.num_in_reach - keep_free) // MAX_BLOCK_GRANULES)
        return sum(one.prefetch(rows, most, evicts=True) for one, most in zip(self._movers, mosts, strict=True))

    def wake(self, rows: Int32Array) -> None:
        """Let rows be awake."""
        asleep = self._group.asleep
        asleep[rows] = NOT_ASLEEP
        self._num_asleep = int((asleep != NOT_ASLEEP).sum())

    def settle(self) -> None:
        """Finish the moves whose copies are done."""
        for mover in self._movers:
            mover.settle()

    def settle_all(self) -> None:
        """Finish all moves; the current stream waits for their copies."""
        for mover in self._movers:
            mover.settle_all()
