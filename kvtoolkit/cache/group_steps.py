"""Steps of a cache with several groups of layers, or with a window: room in all groups for a row, or in none."""

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int64Array
from kvtoolkit.cache.grants import BlockGranter
from kvtoolkit.cache.layers.canary import Canary
from kvtoolkit.cache.layers.masses import MassSum
from kvtoolkit.cache.state import group_passes, prefix_windows, step_passes
from kvtoolkit.cache.state.block_table import CAPACITY, OPEN, RowTable
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.cache_state import CacheState
from kvtoolkit.cache.state.group_passes import ChunkTables
from kvtoolkit.cache.state.step_arrays import SpareArrays
from kvtoolkit.cache.state.step_passes import OK, StepArrays
from kvtoolkit.cache.storage.arenas import Arenas
from kvtoolkit.cache.tiering.demoter import Demoter
from kvtoolkit.config.cache import CacheConfig


class StepPart:
    """What a step has of one group.

    Attributes:
        steps: of the group.
        arrays, mark: as a `kvtoolkit.Step` has them for the first group.
        num_need, num_merge, width: what `step_passes.begin` has returned.
        mass: where attention masses are summed up; None: none are wanted, or no layer has been called.
    """

    __slots__ = ("arrays", "mark", "mass", "num_merge", "num_need", "steps", "width")

    def __init__(
        self, steps: "GroupSteps", arrays: StepArrays, num_need: int, num_merge: int, width: int, mark: int
    ) -> None:
        self.steps, self.arrays, self.mark = steps, arrays, mark
        self.num_need, self.num_merge, self.width = num_need, num_merge, width
        self.mass: MassSum | None = None


class GroupSteps:
    """The part that a group has in steps.

    Args:
        group: the group.
        arenas: its keys and values.
        granter: of its blocks.
        arrays: for its parts of steps.
    """

    def __init__(self, group: CacheGroup, arenas: Arenas, granter: BlockGranter, arrays: SpareArrays) -> None:
        self.group, self.arenas, self.granter, self.arrays = group, arenas, granter, arrays
        self.table, self.blocks, self.span = group.table, group.blocks, group.layers.span
        self.plain_table = tuple(RowTable.of(group.table))
        self.plain_holdings = tuple(self.blocks.nodes), tuple(self.blocks.granules), self.blocks.freed
        tiers = group.config.quantization
        self.demoter = None if tiers is None else Demoter(group, tiers)
        self.merges, self.keeps = group.blocks.policy.merges, group.config.keep_prefix_windows

    def free_past(self, arrays: StepArrays, batch: int, num_merge: int) -> int:
        """Free what no later query sees; returns how many rows still hold a tile that may be merged."""
        num_freed, num_merge = group_passes.free_past(
            self.plain_table, tuple(arrays), *self.plain_holdings, batch, self.span, self.keeps, num_merge
        )
        self.blocks.free_listed(num_freed)
        return num_merge

    def cut_chunks(self, arrays: StepArrays, batch: int) -> ChunkTables:
        """The tables of a step for layers in chunks."""
        chunk = self.group.layers.chunk
        counts = arrays.counts[:batch].astype(np.int64)
        most = int((counts // chunk + 2).sum())
        width = int(arrays.filled[:batch].max(initial=1))
        tables = np.full((2, most, width), -1, np.int32)
        out = ChunkTables(tables[0], tables[1], np.zeros(most, np.int32), np.zeros(most + 1, np.int32))
        n = group_passes.cut_chunks(arrays, batch, chunk, out)
        for array in out:
            array.setflags(write=False)
        return ChunkTables(out.block_table[:n], out.block_starts[:n], out.seq_lens[:n], out.cu_seqlens_q[: n + 1])

    def make_room(self, part: StepPart, status: NDArray[np.int8] | None) -> None:
        """Merge tails, and grant blocks to the rows that need some, unless ``status`` says that they have stalled."""
        if part.num_merge:
            self.granter.merge_tails(part.arrays, part.num_merge)
        if part.num_need and status is not None:
            part.num_need = group_passes.drop_stalled(part.arrays, part.num_need, status)
        if part.num_need:
            part.width = max(part.width, self.granter.grow(part.arrays, part.num_need))


def arenas_of(config: CacheConfig, group: CacheGroup) -> Arenas:
    """The keys and values of a group, by the numbers that its layers have in the model."""
    layers = group.layers.layers if config.is_grouped else None
    arenas = Arenas(group.storage, config.dtype, config.backend, layers, config.num_layers)
    if group.storage.records is not None:
        arenas.canary = Canary(group.storage, group.layers.layers[0])
    return arenas


def make(config: CacheConfig, group: CacheGroup) -> GroupSteps:
    """The part that a group besides the first has in steps."""
    return GroupSteps(group, arenas_of(config, group), BlockGranter(group), SpareArrays())


def begin(
    state: CacheState, groups: list[GroupSteps], ids: Int64Array, counts: int | Int64Array, total: int, limit: int
) -> list[StepPart]:
    """Begin a step: each row gets room for its new tokens in all groups, or in none; see `KVCache.begin_step`."""
    state.forget_lost()
    batch, is_done = len(ids), True
    parts: list[StepPart] = []
    for steps in groups:
        arrays = steps.arrays.take(batch, total)
        if parts:
            lead = parts[0].arrays
            num_need, num_merge, width, mark, num_past = step_passes.begin_too(
                steps.plain_table, tuple(arrays), lead.rows, lead.counts, batch, limit, steps.merges, steps.span
            )
        else:
            arrays.counts[:batch] = counts
            code, where, num_need, num_merge, width, mark, num_past = step_passes.begin_first(
                steps.plain_table, tuple(arrays), ids, limit, steps.merges, steps.span
            )
            if code:
                steps.arrays.give_back(arrays, batch, total)
                raise state.bad_id(code, int(ids[where]), (OPEN,))
        if num_past:
            num_merge = steps.free_past(arrays, batch, num_merge)
        has_moved = steps.demoter is not None and steps.demoter.run(arrays, num_need)
        if has_moved:
            width = step_passes.widest(steps.table, arrays, batch)
        is_done = is_done and not (num_need or num_merge or has_moved or width > arrays.table.shape[1])
        parts.append(StepPart(steps, arrays, num_need, num_merge, width, mark))
    if not is_done:
        _make_room(parts, batch)
        for part in parts:
            if part.width > part.arrays.table.shape[1]:
                part.arrays = part.steps.arrays.widen(part.arrays, part.width)
            step_passes.sync_tables(part.steps.table, part.arrays, batch)
    return parts


def _make_room(parts: list[StepPart], batch: int) -> None:
    """Grant blocks group by group; a row that gets none in one of them gives back what it has in the others."""
    before = [part.steps.table.info[part.arrays.rows[:batch], CAPACITY] for part in parts]
    status = parts[0].arrays.status[:batch].copy()
    for part in parts:
        part.steps.make_room(part, None if part is parts[0] else status)
        status = np.where(status == OK, part.arrays.status[:batch], status)
    if not status.any():
        return
    for part, capacities in zip(parts, before, strict=True):
        blocks = part.steps.blocks
        num_freed = group_passes.stall_too(
            part.steps.table, part.arrays, batch, part.mark, status, capacities, blocks.holdings
        )
        blocks.free_listed(num_freed)


def end(parts: list[StepPart], batch: int, total: int) -> None:
    """Advance the lengths of the rows of a step in all groups; its tokens are unknown."""
    for part in parts:
        _advance(part, batch)
        part.steps.arrays.give_back(part.arrays, batch, total)


def _advance(part: StepPart, batch: int) -> int:
    """Advance the lengths of the rows of a step in one group; returns how many granules have become full."""
    table, arrays = part.steps.table, part.arrays
    num_full: int = step_passes.advance_rows(
        table.info, table.marks, table.chain, arrays.rows, arrays.counts, batch, part.mark
    )
    return num_full


def end_and_publish(state: CacheState, parts: list[StepPart], batch: int, total: int, tokens: Int64Array) -> None:
    """Advance the lengths of the rows of a step in all groups, and let prompts find what has become full there."""
    state.forget_lost()
    lead, extras = parts[0], state.identities.extras
    table, (nodes, granules, freed) = lead.steps.table, lead.steps.blocks.holdings
    num_freed = [
        step_passes.advance_and_publish(table, lead.arrays, batch, lead.mark, tokens, extras, nodes, granules, freed)
    ]
    for part in parts[1:]:
        arrays, own = part.arrays, part.steps.blocks.holdings
        num_freed.append(
            prefix_windows.publish_step(
                table.chain, table.origin, nodes, part.steps.table, arrays.rows, arrays.counts, batch,
                own.nodes, own.granules, own.freed,
            ) if _advance(part, batch) else 0
        )  # fmt: skip
    for part, count in zip(parts, num_freed, strict=True):
        part.steps.blocks.free_listed(count)
        part.steps.arrays.give_back(part.arrays, batch, total)
    state.forget_lost()


def abort(parts: list[StepPart], batch: int, total: int) -> None:
    """Open the rows of a step again in all groups."""
    for part in parts:
        step_passes.reopen(part.steps.table, part.arrays, batch, part.mark)
        part.steps.arrays.give_back(part.arrays, batch, total)
