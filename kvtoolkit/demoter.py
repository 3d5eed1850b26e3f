"""When tiles go to colder tiers: a few each step, oldest first, or as many as a step needs that is short of room."""

from typing import NamedTuple

import numpy as np

from kvtoolkit import tile_moves
from kvtoolkit.demotion import make_rule, set_bar
from kvtoolkit.passes import StepArrays
from kvtoolkit.pool import granules_of
from kvtoolkit.prefix import Int32Array, Int64Array
from kvtoolkit.rows import LENGTH
from kvtoolkit.sequences import Sequences
from kvtoolkit.tables import MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT, TIER_WARM
from kvtoolkit.tier_config import TierConfig
from kvtoolkit.tile_moves import AGE, ROW, TILE

SPREAD = 32
"""Steps over which the tiles that became due at once are spread, so that no step is much longer than another."""
_MOST_AT_ONCE = 64  # tiles that one call converts, all layers of each


class Demoter:
    """Moves tiles for one cache. The caller holds the lock."""

    def __init__(self, sequences: Sequences, config: TierConfig) -> None:
        self._sequences = sequences
        self._rule = make_rule(config)
        self._has_cold = config.cold is not None
        self._has_warm = config.warm is not None
        self._found = np.empty((256, 4), np.int64)
        self._members = np.empty(sequences.config.max_seqs, np.int32)
        # moves of rows and index that are done, whose tokens are still to be converted and whose granules to be freed
        self._sources: list[Int32Array] = []
        self._targets: list[int] = []
        self._freed = np.empty(8 * _MOST_AT_ONCE, np.int32)
        self._num_freed = 0
        self._num_freed_hot = 0

    def run(self, arrays: StepArrays, num_need: int) -> bool:
        """Move what is due now, before the rows in ``arrays.work[0]`` get their blocks; whether anything moved."""
        self.finish()
        rows, pool = self._sequences.rows, self._sequences.pool
        missing = 0
        if num_need:
            missing = int(tile_moves.count_missing(rows, arrays, num_need))
            missing -= pool.allocator.num_free + pool.num_cached + 8 * len(pool.kept_back)
        if missing <= 0 and not tile_moves.any_due(rows.info, rows.scanned):
            return False
        due = self._list_due(missing > 0)
        if not len(due):
            return False
        share = min(self._sequences.config.migrate_budget, -(-len(due) // SPREAD))
        self._num_freed_hot = 0
        moved, left = 0, []
        try:
            for row, tile, _, is_hot in due.tolist():
                # beyond its share a step moves only what makes room for it
                if moved < share or (is_hot and self._num_freed_hot < missing):
                    moved += self._demote(row, tile)
                else:
                    left.append(row)
        finally:
            self._flush()
        done = np.setdiff1d(due[:, ROW], left)
        rows.scanned[done] = rows.info[done, LENGTH] >> 6
        return moved > 0

    def finish(self) -> None:
        """Convert what an earlier call has moved and could not convert, since it raised.

        Rows name the new blocks already, so it comes before anything reads, copies or frees what rows hold.
        """
        if self._targets:
            self._flush()

    def _list_due(self, everything: bool) -> Int64Array:
        """What `list_due` finds, oldest first."""
        rows = self._sequences.rows
        if self._rule.by_mass:
            changed = tile_moves.list_changed(rows, everything, self._members)
            for row in self._members[:changed].tolist():
                set_bar(rows, self._rule, row)
        count = tile_moves.list_due(rows, self._rule, everything, self._found)
        if count > len(self._found):
            self._found = np.empty((2 * count, 4), np.int64)
            count = tile_moves.list_due(rows, self._rule, everything, self._found)
        found = self._found[:count]
        order: Int64Array = found[np.lexsort((found[:, TILE], found[:, ROW], -found[:, AGE]))]
        return order

    def _demote(self, row: int, tile: int) -> int:
        """Move a tile to where it belongs, if all rows that share it can let it go; returns how many tiles moved."""
        group = self._find_group(row, tile)
        if not len(group.members) or group.wanted <= group.held:
            return 0
        if group.held == TIER_HOT and not self._sequences.storage.all_finite(group.sources):
            self._sequences.counters.num_unquantizable += 1
            return 0
        goals = [group.wanted]
        if group.wanted == TIER_COLD and group.held == TIER_HOT and self._has_warm:
            goals.append(TIER_WARM)
        cooled = 0
        for goal in goals:
            block = self._room(goal)
            if block < 0 and goal == TIER_WARM and self._cool_one(row):
                cooled = 1
                block = self._room(goal)
            if block >= 0:
                self._move(group, tile, block, goal)
                return cooled + 1
        self._sequences.counters.num_failed_demotions += 1
        return cooled

    def _cool_one(self, row: int) -> bool:
        """Where the warm tier is full: move a warm tile of a row to the cold tier before its time."""
        if not self._has_cold:
            return False
        tile = int(tile_moves.first_to_cool(self._sequences.rows, self._rule, row))
        if tile < 0:
            return False
        group = self._find_group(row, tile)
        if not len(group.members) or (block := self._room(TIER_COLD)) < 0:
            return False
        self._move(group, tile, block, TIER_COLD)
        return True

    def _find_group(self, row: int, tile: int) -> "_Group":
        sources, members = np.empty(8, np.int32), self._members
        rows, granules = self._sequences.rows, self._sequences.pool.granules
        count, held, wanted = tile_moves.find_group(rows, granules, self._rule, row, tile, members, sources)
        return _Group(members[:count].copy(), held, wanted, sources)

    def _room(self, tier: int) -> int:
        """A block of a quantized tier, or -1."""
        block = self._sequences.pool.take_block(tier)
        if block < 0:
            self._flush()  # frees what moved out of the tier
            block = self._sequences.pool.allocate_block(tier)
        return block

    def _move(self, group: "_Group", tile: int, block: int, tier: int) -> None:
        """Change rows and index now; the tokens follow in `_flush`."""
        if len(self._targets) == _MOST_AT_ONCE:
            self._flush()
        pool, counters, before = self._sequences.pool, self._sequences.counters, self._num_freed
        self._num_freed = tile_moves.change_tier(
            self._sequences.rows, group.members, tile, block, tier, pool.nodes, pool.granules, group.sources,
            self._freed, before,
        )  # fmt: skip
        self._sources.append(group.sources)
        self._targets.append(block)
        self._num_freed_hot += int(np.count_nonzero(self._freed[before : self._num_freed] < pool.num_hot))
        if tier == TIER_WARM:
            counters.num_demoted_warm += 1
        else:
            counters.num_demoted_cold += 1

    def _flush(self) -> None:
        """Convert the tokens of the tiles that were moved, and free where they were."""
        if not self._targets:
            return
        sequences, count = self._sequences, len(self._targets)
        targets = granules_of(np.array(self._targets, np.int32)).reshape(count, MAX_BLOCK_GRANULES)
        sequences.convert(np.array(self._sources, np.int32), targets, 64 * count)
        sequences.pool.free_granules(self._freed[: self._num_freed])
        self._sources, self._targets, self._num_freed = [], [], 0


class _Group(NamedTuple):
    """Rows that hold the same 8 granules at a tile."""

    members: Int32Array
    """Empty if the tile must stay where it is."""
    held: int
    wanted: int
    """The hottest tier that the tile belongs in for any of them."""
    sources: Int32Array
