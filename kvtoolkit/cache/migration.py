"""What steps of the device do to tiles that rows have, in one group of layers, besides adding tokens to them.

Old tiles move to colder tiers, small blocks become one, and windows leave their past behind.
"""

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state.block_table import CAPACITY, LENGTH
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.lent_blocks import LentBlocks
from kvtoolkit.cache.supply import Supply
from kvtoolkit.cache.tiering import device_moves
from kvtoolkit.cache.tiering.rules import Rule, make_rule
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT, TIER_WARM

MOST_IN_A_STEP = 4096
_NO_TIERS = Rule(1 << 40, 0, 0, False)


class Migration:
    """Blocks of 64 tokens that tiles of some rows will move to, and what is known of these moves.

    The device decides by the same rules as the host, see ``cuda_src/cache/migrate.cu``. The host takes the blocks
    ahead, lends them as a `Supply` does, and makes the same moves in its own tables afterwards. The caller of all
    methods holds the lock of the cache.

    Args:
        group: of layers; its tiers are demoted by age.
        batch: rows, at most.
        max_steps: of a turn.
        width: entries that a row has room for on the device.
        max_seq_len: tokens of the longest sequence.
        is_off: nothing is to move.

    Attributes:
        rule: when tiles move to which tier.
        demotes, merges: whether the group has tiers; whether its growth policy merges small blocks.
        most: tiles of either kind that move in one step, at most.
        most_targets: blocks of each kind that are taken, at most; 0 if nothing ever moves.
        most_of_a_row: moves of one row in this turn, at most.
        window: tokens that a query sees; 0 = all.
        lent: the blocks.
    """

    def __init__(
        self, group: CacheGroup, batch: int, max_steps: int, width: int, max_seq_len: int, is_off: bool
    ) -> None:
        self._group, self._width = group, width
        config, blocks = group.config, group.blocks
        tiers = config.quantization
        self.demotes = tiers is not None
        self.merges = blocks.policy.merges and int(blocks.offered[-1]) < MAX_BLOCK_GRANULES and not is_off
        self.rule = _NO_TIERS if tiers is None else make_rule(tiers)
        self.most = min(config.migrate_budget, MOST_IN_A_STEP) if self.demotes or self.merges else 0
        num_blocks = max(map(blocks.ledger.num_of, range(3))) // MAX_BLOCK_GRANULES
        self.most_targets = min(num_blocks, self.most * max_steps, batch * (max_seq_len // 64))
        self.lent = LentBlocks(blocks, 3 * self.most_targets)
        self.window = group.layers.window
        self.marks: Int32Array = np.empty((0, 4), np.int32)  # of the rows of this turn
        self.most_of_a_row = 0

    @property
    def is_needed(self) -> bool:
        """Whether steps of the device move anything at all, or let go of it."""
        return self.most_targets > 0 or self.window > 0

    def leave_to_device(self, rows: Int32Array, limits: Int32Array, steps: int) -> None:
        """Keep the host's own passes from moving what the device will move, until `leave_to_host`.

        Tiles that the device may not move are still theirs. All are if memory is short, because what the device moves
        makes room only afterwards.

        Args:
            limits: ``[batch]`` tokens at which a row ends.
            steps: tokens of each row that there should be room for.
        """
        group, blocks = self._group, self._group.blocks
        if not self.demotes:
            return
        lengths, held = group.table.info[rows, LENGTH], group.table.info[rows, CAPACITY]
        more = np.maximum(-(-np.minimum(lengths + steps, limits) // 8) - held, 0) + MAX_BLOCK_GRANULES
        if more.sum() > blocks.num_known_free + blocks.num_cached + MAX_BLOCK_GRANULES * len(blocks.reserve):
            return
        left = np.empty(len(rows), np.int32)
        count = device_moves.are_left(group.table, self.rule, rows, self._marks_of(rows), left)
        own = np.setdiff1d(rows, left[:count])
        group.table.scanned[own] = group.table.info[own, LENGTH] >> 6

    def leave_to_host(self, rows: Int32Array) -> None:
        """Let the host's own passes look at the rows again."""
        if self.demotes:
            self._group.table.scanned[rows] = -1

    def fill(self, rows: Int32Array, limits: Int32Array, steps: int, supply: Supply) -> None:
        """Mark what may move, and take the blocks that ``steps`` tokens more of each row will move to.

        Args:
            limits: ``[batch]`` tokens at which a row ends.
            supply: what the rows grow by; filled before.
        """
        self.marks = self._marks_of(rows)
        self.extend(rows, limits, steps, supply)

    def extend(self, rows: Int32Array, limits: Int32Array, steps: int, supply: Supply) -> None:
        """Take what is missing where ``steps`` tokens in all are expected of each row in this turn."""
        if not self.most_targets:
            return
        wanted, are_small = np.zeros(3, np.int64), bool((supply.lent.sizes < MAX_BLOCK_GRANULES).any())
        self.most_of_a_row = device_moves.count_targets(
            self._group.table, self.rule, self.demotes, rows, limits, steps, self.marks, are_small, wanted
        )
        missing = np.minimum(wanted, self.most * steps) - [len(one) for one in self._by_tier()]
        if self.merges and missing[TIER_HOT] > 0:
            self._lend(self._group.blocks.take_targets(self._fitting(TIER_HOT, missing)))
        for tier in (TIER_WARM, TIER_COLD):
            if missing[tier] > 0:
                self._take(tier, self._fitting(tier, missing))

    def _fitting(self, tier: int, missing: NDArray[np.int64]) -> int:
        return int(min(missing[tier], self.most_targets - len(self._by_tier()[tier])))

    def _take(self, tier: int, wanted: int) -> None:
        """Take blocks of a quantized tier, evicting what is cached where that is needed."""
        blocks = self._group.blocks
        while wanted > 0:
            starts = blocks.ledger.take(tier, np.full(wanted, MAX_BLOCK_GRANULES, np.int32))
            starts = starts[starts >= 0]
            self._lend(starts)
            wanted -= len(starts)
            missing = wanted * MAX_BLOCK_GRANULES
            while missing > 0 and not blocks.evict(missing, tier):
                missing //= 2
            if missing < MAX_BLOCK_GRANULES:
                break

    def _lend(self, starts: Int32Array) -> None:
        self.lent.lend(starts, np.full(len(starts), MAX_BLOCK_GRANULES, np.int32))

    def _marks_of(self, rows: Int32Array) -> Int32Array:
        marks = np.empty((len(rows), 4), np.int32)
        device_moves.mark_rows(
            self._group.table, self._group.blocks.granules, self.rule, self.demotes, self._width, rows, marks
        )
        return marks

    def _by_tier(self) -> list[Int32Array]:
        starts = self.lent.starts
        tiers = self._group.blocks.tiers_of(starts)
        return [starts[tiers == tier] for tier in range(3)]

    def lists(self) -> tuple[Int32Array, Int32Array]:
        """``([3, most_targets], [3])``: for each tier the first granules of its blocks, and how many there are."""
        listed, counts = np.zeros((3, self.most_targets), np.int32), np.zeros(3, np.int32)
        for tier, starts in enumerate(self._by_tier()):
            listed[tier, : len(starts)], counts[tier] = starts, len(starts)
        return listed, counts

    def settle(
        self, supply: Supply, rows: Int32Array, grants: Int32Array, taken: Int32Array, journal: Int32Array
    ) -> None:
        """Do to the rows what the device has done, and free what they have left and what was not used.

        Doing it again changes nothing.

        Args:
            supply: the blocks that rows were granted.
            rows: ``[batch]`` of the block table.
            grants: ``[1 + most, batch]`` int32, the number of blocks of a row, then their first granule | code of the
                size << 24.
            taken: ``[4]`` blocks of each list that are gone, then moves.
            journal: ``[3, most_targets, 4]``; see ``MigrateParams``.
        """
        if not len(supply.lent.starts) + len(self.lent.starts):
            return
        group, counts = self._group, grants[0].copy()
        words = np.ascontiguousarray(grants[1 : 1 + counts.max(initial=0)].T)
        blocks_of_rows = (words & 0xFFFFFF).astype(np.int32), (1 << (words >> 24 & 3)).astype(np.int32), counts
        moves, is_used = self._moves(taken, journal)
        scratch, blocks = np.empty(9 + len(rows), np.int32), group.blocks
        count = device_moves.settle_turn(
            *self.lent.flags, (supply.lent.loan, self.lent.loan), group.table, blocks.holdings, rows, *blocks_of_rows,
            moves, is_used, scratch,
        )  # fmt: skip
        if count:
            blocks.free_granules(np.sort(blocks.freed[:count]))
        for tier in range(3):
            self._count(tier, int(np.count_nonzero(moves[:, 2] == tier)))
        group.update_peak()

    def _moves(self, taken: Int32Array, journal: Int32Array) -> tuple[Int32Array, NDArray[np.bool_]]:
        """The moves in their order, as `device_moves.settle_turn` takes them, and which blocks they use."""
        tiers = self._group.blocks.tiers_of(self.lent.starts)
        is_used, found = np.zeros(len(tiers), np.bool_), []
        for tier, starts in enumerate(self._by_tier()):
            noted = journal[tier, : taken[tier]]
            done = noted[:, 0] >= 0
            is_used[np.flatnonzero(tiers == tier)[: len(noted)][done]] = True
            row, tile, number, granted = noted[done].T
            blocks = starts[: len(noted)][done]
            found.append(np.stack([number, row, tile, np.full_like(row, tier), blocks, granted], 1))
        moves = np.concatenate(found)
        return np.ascontiguousarray(moves[moves[:, 0].argsort(kind="stable"), 1:]), is_used

    def _count(self, tier: int, number: int) -> None:
        counters = self._group.counters
        if tier == TIER_HOT:
            counters.num_merges += number
            counters.copied_tokens += 64 * number
            return
        counters.converted_tokens += 64 * number
        if tier == TIER_WARM:
            counters.num_demoted_warm += number
        else:
            counters.num_demoted_cold += number
