"""The compiled passes of moves that steps of the device make: what they may move, and the same moves on the host."""

from typing import Any

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    LENGTH,
    NUM_ENTRIES,
    TAIL_FIRST,
    BlockTable,
    attach,
    first_held,
    granule_at,
)
from kvtoolkit.cache.state.growing import Loan
from kvtoolkit.cache.state.ledger import Flags, move
from kvtoolkit.cache.state.prefix_index import GranuleState, Holdings
from kvtoolkit.cache.tiering.rules import Rule
from kvtoolkit.cache.tiering.tile_moves import change_tier, more_entries
from kvtoolkit.formats.entry import TIER_COLD, TIER_HOT, TIER_WARM, entry_granule, entry_length
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
        for k in range(max(8 * tile, first_held(table, row)), min(8 * tile + 8, table.info[row, CAPACITY])):
            if granules.refs[granule_at(table, row, k)] > 1:
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
def settle_turn(
    granted: Flags, callers: Flags, loans: tuple[Loan, Loan], table: BlockTable, holdings: Holdings, rows: Int32Array,
    starts: Int32Array, sizes: Int32Array, counts: Int32Array, moves: Int32Array, is_used: Flags, scratch: Int32Array,
) -> Any:  # fmt: skip
    """Do to the rows what the device has done in its tables, in its order, and end the loans of blocks.

    A move that cannot be made is left out: what a tile would leave is still as it was.

    Args:
        loans: the supply that rows grow by, and the blocks that tiles move to.
        starts, sizes: ``[batch, most]`` blocks that each row has been granted, of which there are ``counts[b]``.
        moves: ``[n, 5]`` in their order: row of the batch, tile, tier, first granule of the block, blocks that the row
            had been granted by then.
        is_used: ``[blocks of the second loan]``.
        scratch: ``[9 + batch]``.

    Returns:
        How many granules are in ``freed`` now, for the caller to free: what rows have left, and blocks not used. If
        there is no loan, this was done before, in a call that broke off later: nothing happens.
    """
    freed = holdings.freed
    if loans[0].number[0] + loans[1].number[0] == 0:
        return 0
    num_freed = _end_loans(granted, callers, loans, holdings, starts, counts, is_used)
    sources, members, done = scratch[:8], scratch[8:9], scratch[9:]
    for b in range(len(rows)):
        done[b] = 0
    for i in range(len(moves)):
        b, tile, tier, block = moves[i, 0], moves[i, 1], moves[i, 2], moves[i, 3]
        num_freed = _attach_until(table, holdings, rows[b], starts[b], sizes[b], done[b], moves[i, 4], num_freed)
        done[b] = max(done[b], moves[i, 4])
        if not _can_move(table, rows[b], tile):
            for k in range(8):
                freed[num_freed] = block + k
                num_freed += 1
            continue
        for k in range(8):
            sources[k] = granule_at(table, rows[b], 8 * tile + k)
        members[0] = rows[b]
        num_freed = change_tier(table, members, tile, block, tier, sources, holdings, num_freed)
    for b in range(len(rows)):
        num_freed = _attach_until(table, holdings, rows[b], starts[b], sizes[b], done[b], counts[b], num_freed)
    return num_freed


@jit
def _can_move(table: BlockTable, row: int, tile: int) -> Any:
    """Whether a row holds all of a tile, and has entries enough for one of its own."""
    count = table.info[row, NUM_ENTRIES]
    if count == 0 or table.starts[row, 0] > 8 * tile or table.info[row, CAPACITY] < 8 * tile + 8:
        return False
    return count + more_entries(table, row, tile) <= table.entries.shape[1]


@jit
def _end_loans(
    granted: Flags, callers: Flags, loans: tuple[Loan, Loan], holdings: Holdings, starts: Int32Array,
    counts: Int32Array, is_used: Flags,
) -> Any:  # fmt: skip
    """List what is not used of two loans in ``freed``; returns how many granules that are."""
    granules, freed, num_freed = holdings.granules, holdings.freed, 0
    for b in range(len(counts)):
        for k in range(counts[b]):
            granules.refs[starts[b, k]] = 1
    for which in range(2):
        loan = loans[which]
        count = loan.number[0]
        loan.number[0] = 0
        move(callers, granted, loan.starts[:count], loan.sizes[:count])
        for i in range(count):
            if is_used[i] if which == 1 else granules.refs[loan.starts[i]] > 0:
                continue
            for granule in range(loan.starts[i], loan.starts[i] + loan.sizes[i]):
                freed[num_freed] = granule
                num_freed += 1
    for b in range(len(counts)):
        for k in range(counts[b]):
            granules.refs[starts[b, k]] = 0
    return num_freed


@jit
def _attach_until(
    table: BlockTable, holdings: Holdings, row: int, starts: Int32Array, sizes: Int32Array, first: int, end: int,
    num_freed: int,
) -> Any:  # fmt: skip
    """Append blocks ``[first, end)`` to a row. It has entries for them, because it had on the device."""
    for k in range(first, end):
        if not attach(table, holdings.granules, row, starts[k : k + 1], sizes[k : k + 1]):
            for granule in range(starts[k], starts[k] + sizes[k]):
                holdings.freed[num_freed] = granule
                num_freed += 1
    return num_freed
