"""Moves tiles to colder tiers: a few in each step, oldest first, or as many as are needed to make room."""

from typing import NamedTuple

import numpy as np

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_manager import granules_of
from kvtoolkit.cache.state.block_table import LENGTH, NUM_ENTRIES
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.step_passes import StepArrays
from kvtoolkit.cache.tiering import tile_moves
from kvtoolkit.cache.tiering.places import Places
from kvtoolkit.cache.tiering.rules import make_rule, set_bar
from kvtoolkit.cache.tiering.tile_moves import AGE, ROW, TILE
from kvtoolkit.config.tiers import TierConfig
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT, TIER_WARM

SPREAD = 32
"""Tiles that became due together are spread over this many steps, so that all steps take about equally long."""
_MOST_AT_ONCE = 64  # tiles that one call converts, all layers of each


class Demoter:
    """Moves the tiles of one group. The caller holds the lock."""

    def __init__(self, group: CacheGroup, config: TierConfig, places: Places | None = None) -> None:
        self._group, self._places = group, places
        self._rule = make_rule(config)
        self._has_cold = config.cold is not None
        self._has_warm = config.warm is not None
        self._found = np.empty((256, 4), np.int64)
        self._members = np.empty(group.config.max_seqs, np.int32)
        self._planned: list[_Move] = []
        self._moving = np.zeros(group.config.num_granules, np.bool_)
        """``[num_granules]`` which granules the planned moves will leave."""
        self._num_freed_hot = 0

    def run(self, arrays: StepArrays, num_need: int) -> bool:
        """Move what is due, before the rows in ``arrays.work[0]`` get their blocks; returns whether anything moved."""
        self._forget()
        table, blocks = self._group.table, self._group.blocks
        missing = 0
        if num_need:
            lacking = int(tile_moves.count_missing(table, arrays, num_need))
            lacking -= blocks.num_cached + 8 * len(blocks.reserve)
            missing = lacking - blocks.num_known_free
            if missing > 0:  # kernels may have freed some since the host last looked
                missing = lacking - blocks.allocator.num_free
        if missing <= 0 and not tile_moves.any_due(table.info, table.scanned):
            return False
        due = self._list_due(missing > 0)
        if not len(due):
            return False
        share = min(self._group.config.migrate_budget, -(-len(due) // SPREAD))
        self._num_freed_hot = 0
        moved, left = 0, []
        for row, tile, _, is_hot in due.tolist():
            # beyond its share, a step moves only what makes room for itself
            if moved < share or (is_hot and self._num_freed_hot < missing):
                moved += self._demote(row, tile)
            else:
                left.append(row)
        self._flush()
        done = np.setdiff1d(due[:, ROW], left)
        table.scanned[done] = table.info[done, LENGTH] >> 6
        return moved > 0

    def _list_due(self, everything: bool) -> Int64Array:
        """What `list_due` finds, oldest first."""
        table = self._group.table
        if self._rule.by_mass:
            changed = tile_moves.list_changed(table, everything, self._members)
            for row in self._members[:changed].tolist():
                set_bar(table, self._rule, row)
        count = tile_moves.list_due(table, self._rule, everything, self._found)
        if count > len(self._found):
            self._found = np.empty((2 * count, 4), np.int64)
            count = tile_moves.list_due(table, self._rule, everything, self._found)
        found = self._found[:count]
        order: Int64Array = found[np.lexsort((found[:, TILE], found[:, ROW], -found[:, AGE]))]
        return order

    def _demote(self, row: int, tile: int) -> int:
        """Move a tile to its tier, if all its sharers permit that; returns how many tiles moved."""
        sharers = self._find_sharers(row, tile)
        if not len(sharers.members) or sharers.wanted <= sharers.held:
            return 0
        if sharers.held == TIER_HOT and not self._group.storage.all_finite(sharers.sources):
            self._group.counters.num_unquantizable += 1
            return 0
        goals = [sharers.wanted]
        if sharers.wanted == TIER_COLD and sharers.held == TIER_HOT and self._has_warm:
            goals.append(TIER_WARM)
        cooled = 0
        for goal in goals:
            block = self._room(goal)
            if block < 0 and goal == TIER_WARM and self._cool_one(row):
                cooled = 1
                block = self._room(goal)
            if block >= 0:
                self._plan(sharers, tile, block, goal)
                return cooled + 1
        self._group.counters.num_failed_demotions += 1
        return cooled

    def _cool_one(self, row: int) -> bool:
        """Make room in the full warm tier: move a warm tile of a row to the cold tier early."""
        if not self._has_cold:
            return False
        tile = int(tile_moves.first_to_cool(self._group.table, self._rule, row))
        if tile < 0:
            return False
        sharers = self._find_sharers(row, tile)
        if not len(sharers.members) or (block := self._room(TIER_COLD)) < 0:
            return False
        self._plan(sharers, tile, block, TIER_COLD)
        return True

    def _find_sharers(self, row: int, tile: int) -> "_Sharers":
        """The sharers of a tile; without members if it must stay, or if a planned move has it already."""
        sources, members = np.empty(8, np.int32), self._members
        table, granules = self._group.table, self._group.blocks.granules
        count, held, wanted = tile_moves.find_sharers(table, granules, self._rule, row, tile, members, sources)
        if count and self._planned:
            if self._moving[sources].all():  # for this row too, because its sharers are known
                count = 0
            elif self._may_clash(members[:count], sources):
                self._flush()
                count, held, wanted = tile_moves.find_sharers(table, granules, self._rule, row, tile, members, sources)
        return _Sharers(members[:count].copy(), held, wanted, sources)

    def _may_clash(self, members: Int32Array, sources: Int32Array) -> bool:
        """Whether planned moves take some of the granules, or may leave too few entries to one of the table."""
        table = self._group.table
        most = table.info[members, NUM_ENTRIES].max() + 2 * (len(self._planned) + 1)  # a move adds at most 2
        return bool(self._moving[sources].any() or most > table.entries.shape[1])

    def _room(self, tier: int) -> int:
        """Take a block of a quantized tier; -1 if there is none."""
        block = self._group.blocks.take_block(tier)
        if block < 0:
            self._flush()  # which frees what moves out of the tier
            if tier == TIER_COLD and self._places is not None and self._places.make_cold_room():
                block = self._group.blocks.take_block(tier)
            if block < 0:
                block = self._group.blocks.allocate_block(tier)
        return block

    def _plan(self, sharers: "_Sharers", tile: int, block: int, tier: int) -> None:
        """Let the next `_flush` move a tile."""
        if len(self._planned) == _MOST_AT_ONCE:
            self._flush()
        blocks = self._group.blocks
        self._planned.append(_Move(sharers, tile, block, tier))
        self._moving[sharers.sources] = True
        leaves = blocks.granules.refs[sharers.sources] == len(sharers.members)
        self._num_freed_hot += int(np.count_nonzero(leaves & (sharers.sources < blocks.num_hot)))

    def _flush(self) -> None:
        """Do the planned moves: convert the tokens, then change rows and index, then free the granules left.

        If the conversion raises, nothing has moved.
        """
        moves, group = self._planned, self._group
        if not moves:
            return
        sources = np.array([move.sharers.sources for move in moves], np.int32)
        targets = granules_of(np.array([move.block for move in moves], np.int32)).reshape(-1, MAX_BLOCK_GRANULES)
        group.convert_tiles(sources, targets, 64 * len(moves))
        blocks, num_freed = group.blocks, 0
        for move in moves:
            num_freed = tile_moves.change_tier(
                group.table, move.sharers.members, move.tile, move.block, move.tier, move.sharers.sources,
                blocks.holdings, num_freed,
            )  # fmt: skip
        for move in moves:
            if move.tier == TIER_WARM:
                group.counters.num_demoted_warm += 1
            else:
                group.counters.num_demoted_cold += 1
        self._forget()
        blocks.free_listed(num_freed)

    def _forget(self) -> None:
        """Drop all plans, also those of a call that broke off."""
        if self._planned:
            self._planned = []
            self._moving[:] = False


class _Sharers(NamedTuple):
    """The rows that hold the same 8 granules at a tile."""

    members: Int32Array
    """The rows; empty if the tile must stay where it is."""
    held: int
    wanted: int
    """The hottest tier that any of them wants the tile in."""
    sources: Int32Array


class _Move(NamedTuple):
    """A planned move of a tile to a fresh block of a colder tier."""

    sharers: _Sharers
    tile: int
    block: int
    tier: int
