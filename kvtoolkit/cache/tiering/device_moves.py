"""The compiled passes of moves that steps of the device make: what they may move, and the same moves on the host."""

from typing import Any

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_merging import merge_blocks, mergeable
from kvtoolkit.cache.state.block_table import CAPACITY, LENGTH, NUM_ENTRIES, TAIL_FIRST, BlockTable, granule_at
from kvtoolkit.cache.state.growing import Loan
from kvtoolkit.cache.state.ledger import Flags, move
from kvtoolkit.cache.state.prefix_index import GranuleState, Holdings
from kvtoolkit.cache.tiering.rules import Rule
from kvtoolkit.cache.tiering.tile_moves import change_tier
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT, TIER_WARM, entry_granule, entry_length
from kvtoolkit.formats.entry import entry_tier as tier_of

NEVER = 0x7FFFFFFF  # kNever of migrate.cu
COLD_END, HOT_BEGIN, MERGE_BEGIN, ORDER = range(4)  # columns of marks, RowMarks of migrate.cu


@jit
def mark_rows(
    table: BlockTable, granules: GranuleState, rule: Rule, demotes: bool, width: int, rows: Int32Array,
    marks: Int32Array,
) -> None:  # fmt: skip
    """Say which tiles of each row the device may move.

    Args:
        demotes: whether there are tiers.
        width: entries that a row has room for on the device.
        marks: ``[batch, 4]`` receives ``RowMarks``.
    """
    for b in range(len(rows)):
        row = rows[b]
        tile = table.info[row, LENGTH] >> 6
        marks[b, MERGE_BEGIN], marks[b, ORDER] = tile, row
        for k in range(8 * tile, table.info[row, CAPACITY]):
            if k < 8 * tile + 8 and granules.refs[granule_at(table, row, k)] > 1:
                marks[b, MERGE_BEGIN] = tile + 1
        marks[b, COLD_END] = marks[b, HOT_BEGIN] = NEVER
        if demotes and table.info[row, NUM_ENTRIES] <= width:
            marks[b, COLD_END], marks[b, HOT_BEGIN] = _bounds_of(table, granules, rule, row)


@jit
def _bounds_of(table: BlockTable, granules: GranuleState, rule: Rule, row: int) -> Any:
    """The first tile that is warm or hot, and the first hot one, of those at a row's end that it alone holds."""
    pinned, e = rule.pinned >> 6, table.info[row, NUM_ENTRIES] - 1
    hot_begin = table.info[row, CAPACITY] >> 3
    while e >= 0 and tier_of(table.entries[row, e]) == TIER_HOT and hot_begin > pinned:
        start, first = table.starts[row, e], entry_granule(table.entries[row, e])
        for i in range(entry_length(table.entries[row, e]) - 1, -1, -1):
            if granules.refs[first + i] > 1:
                hot_begin = max((start + i >> 3) + 1, pinned)
                return hot_begin, hot_begin
        hot_begin = start + 7 >> 3
        e -= 1
    hot_begin = max(hot_begin, pinned)
    cold_end = hot_begin
    while e >= 0 and cold_end > pinned and tier_of(table.entries[row, e]) == TIER_WARM:
        if granules.refs[entry_granule(table.entries[row, e])] > 1:
            break
        cold_end -= 1
        e -= 1
    return cold_end, hot_begin


@jit
def are_left(table: BlockTable, rule: Rule, rows: Int32Array, marks: Int32Array, out: Int32Array) -> Any:
    """List the rows with tiles due that only the host may move; returns how many there are."""
    count = 0
    for b in range(len(rows)):
        row, e = rows[b], table.info[rows[b], NUM_ENTRIES] - 1
        end = table.info[row, LENGTH] - rule.hot >> 6
        begin = min(marks[b, COLD_END], end)
        while e >= 0 and table.starts[row, e] >= 8 * begin:
            e -= 1
        # it comes before all that the device moves, so it should be cold by now if anything is there
        is_left = e >= 0 and 8 * begin > table.starts[row, e] and begin > rule.pinned >> 6
        if is_left and tier_of(table.entries[row, e]) < _coldest(rule, table.info[row, LENGTH], begin - 1):
            out[count] = row
            count += 1
    return count


@jit
def _coldest(rule: Rule, length: int, tile: int) -> Any:
    """The tier that a tile belongs in, which is not among the hot ones, by age."""
    return TIER_WARM if 64 * (tile + 1) > length - rule.hot - rule.warm else TIER_COLD


@jit
def count_targets(
    table: BlockTable, rule: Rule, demotes: bool, rows: Int32Array, limits: Int32Array, more: int, marks: Int32Array,
    are_small: bool, out: Int64Array,
) -> Any:  # fmt: skip
    """Count the blocks that ``more`` tokens of each row will move to.

    Args:
        limits: ``[batch]`` tokens at which a row ends.
        are_small: whether rows get blocks of less than 64 tokens.
        out: ``[3]`` receives how many for merges, for the warm and for the cold tier.

    Returns:
        The most moves of one row.
    """
    out[:], most = 0, 0
    for b in range(len(rows)):
        length = table.info[rows[b], LENGTH]
        end = max(length, min(length + more, limits[b]))
        num_merges = max(0, (end - 1 >> 6) - marks[b, MERGE_BEGIN])
        if not are_small:  # only the tile that is partly full may be in several blocks
            num_merges = min(num_merges, 1 if table.info[rows[b], TAIL_FIRST] > length & ~63 else 0)
        num_warm, num_cold = 0, 0
        if demotes and marks[b, COLD_END] != NEVER:
            num_warm = max(0, (end - rule.hot >> 6) - marks[b, HOT_BEGIN]) if rule.warm > 0 else 0
            num_cold = max(0, (end - rule.hot - rule.warm >> 6) - marks[b, COLD_END])
        out[TIER_HOT] += num_merges
        out[TIER_WARM] += num_warm
        out[TIER_COLD] += num_cold
        most = max(most, num_merges + num_warm + num_cold)
    return most


@jit
def settle_moves(
    granted: Flags, callers: Flags, loan: Loan, table: BlockTable, holdings: Holdings, rows: Int32Array,
    moves: Int32Array, is_used: Flags, scratch: Int32Array,
) -> Any:  # fmt: skip
    """Make the moves that the device has made in its tables, and end the loan of their blocks.

    Args:
        moves: ``[n, 4]`` in their order: row of the batch, tile, tier, first granule of the block.
        is_used: ``[blocks of the loan]``.
        scratch: ``[9]``.

    Returns:
        How many granules are in ``freed`` now, for the caller to free: what rows have left, and blocks not used. If
        there is no loan, this was done before, in a call that broke off later: nothing happens.
    """
    nodes, granules, freed = holdings
    count, num_freed = loan.number[0], 0
    if count == 0:
        return 0
    loan.number[0] = 0
    move(callers, granted, loan.starts[:count], loan.sizes[:count])
    for i in range(count):
        if not is_used[i]:
            for granule in range(loan.starts[i], loan.starts[i] + MAX_BLOCK_GRANULES):
                freed[num_freed] = granule
                num_freed += 1
    members, sources = scratch[:1], scratch[1:9]
    for i in range(len(moves)):
        row, tile, tier, block = rows[moves[i, 0]], moves[i, 1], moves[i, 2], moves[i, 3]
        for k in range(8):
            sources[k] = granule_at(table, row, 8 * tile + k)
        if tier == TIER_HOT and mergeable(table, row, 8 * tile + 8) < 0:  # then the row goes on with its own granules
            for k in range(8):
                freed[num_freed] = block + k
                num_freed += 1
        elif tier == TIER_HOT:
            merge_blocks(table, row, 8 * tile + 8, block, nodes, granules)
            for k in range(8):
                freed[num_freed] = sources[k]
                num_freed += 1
        else:
            members[0] = row
            num_freed = change_tier(table, members, tile, block, tier, sources, holdings, num_freed)
    return num_freed
