"""The compiled passes over the rows of a step: begin it, give blocks, complete it, end it.

If no row needs memory, a decode step is a single pass, `begin`, which reads one cache line of each row.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_merging import mergeable
from kvtoolkit.cache.state.block_table import (
    BAD_COUNT,
    BAD_ID,
    BAD_STATE,
    BAD_TWICE,
    CAPACITY,
    CHAIN_UID,
    CLOSED,
    GENERATION,
    ID_BITS,
    IN_STEP,
    LAST_MARK,
    LENGTH,
    NAMED,
    NUM_ENTRIES,
    OPEN,
    OWNER,
    STAMP,
    STATE,
    TAIL_BASE,
    TAIL_FIRST,
    AnyTable,
    BlockTable,
    RowTable,
    attach,
    find_entry,
    first_held,
    granule_at,
)
from kvtoolkit.cache.state.identity import extra_at
from kvtoolkit.cache.state.prefix_index import BROKEN, ROOT, GranuleState, Holdings, Nodes, add_twin, find_node, publish
from kvtoolkit.config.growth import split_into_blocks, tail_size
from kvtoolkit.formats.entry import entry_granule, entry_length

# values of Step.status
OK, OUT_OF_BLOCKS, ROW_FULL, AT_MAX_LEN = range(4)
STATUS_NAMES = ("ok", "out of blocks", "row full", "at max_seq_len")


class StepArrays(NamedTuple):
    """The arrays of one step. Kernels read the first five."""

    table: Int32Array
    """``[batch, width]``"""
    starts: Int32Array
    """``[batch, width]``"""
    seq_lens: Int32Array
    cu_seqlens_q: Int32Array
    slot_mapping: Int64Array
    status: NDArray[np.int8]
    rows: Int32Array
    """``[batch]`` row of the block table for each row of the step."""
    counts: Int32Array
    """``[batch]`` new tokens of each row."""
    stamps: Int64Array
    """``[batch]`` STAMP of the row when its entries were copied to `table`."""
    filled: Int32Array
    """``[batch]`` entries of `table` in use."""
    work: Int32Array
    """``[2, batch]`` rows of the step that need blocks; rows whose tail may be merged."""


@jit
def begin(table: AnyTable, step: StepArrays, ids: Int64Array, max_len: int, merges: bool, span: int) -> Any:
    """Check the ids and counts of a step, complete the rows that need no memory, and list those that do.

    Rows in ``step.work[0]`` need blocks, and `complete` afterwards. The tails of rows in ``step.work[1]`` may be
    merged. All other rows are complete, except that the entries of a row are not copied where ``step.table`` is too
    narrow for them (see `sync_tables`).

    Returns:
        ``(code, where, num_need, num_merge, width, mark, num_past)``: what is wrong with which row (code 0: nothing),
        the number of rows in either half of ``step.work``, the entries of the widest row, the mark of the rows that the
        step holds, and how many rows hold granules that no later query sees (``span`` is that of `first_seen`). If
        something is wrong, nothing has changed.
    """
    table.clock[LAST_MARK] += 1
    mark = table.clock[LAST_MARK]
    num_rows, total = len(table.info), 0
    for b in range(len(ids)):
        row, count = ids[b] & ((1 << ID_BITS) - 1), step.counts[b]
        code = 0
        if ids[b] < 0 or row >= num_rows or table.info[row, GENERATION] != ids[b] >> ID_BITS:
            code = BAD_ID
        elif table.marks[row, NAMED] == mark:
            code = BAD_TWICE
        elif table.info[row, STATE] != OPEN:
            code = BAD_ID if table.info[row, STATE] == CLOSED else BAD_STATE
        elif count < 0 or total + count > len(step.slot_mapping):
            code = BAD_COUNT
        if code != 0:
            return code, b, 0, 0, 0, mark, 0
        table.marks[row, NAMED] = mark
        step.rows[b] = row
        total += count
    num_need, num_merge, width, num_past = _begin_rows(table, step, len(ids), max_len, merges, span)
    return 0, 0, num_need, num_merge, width, mark, num_past


@jit
def begin_first(
    plain_table: tuple[Any, ...], plain_step: tuple[Any, ...], ids: Int64Array, max_len: int, merges: bool, span: int
) -> Any:
    """`begin` in the first of several groups, or in one with a window.

    ``plain_table`` and ``plain_step`` are a `RowTable` and `StepArrays` as plain tuples: when compiled code is called,
    finding the type of a tuple with names takes twice as long as for one without.
    """
    return begin(RowTable(*plain_table), StepArrays(*plain_step), ids, max_len, merges, span)


@jit
def begin_too(
    plain_table: tuple[Any, ...], plain_step: tuple[Any, ...], rows: Int32Array, counts: Int32Array, batch: int,
    max_len: int, merges: bool, span: int,
) -> Any:  # fmt: skip
    """`begin` in a further group, whose rows are those of the first one: their ids and counts are known to be right.

    Args:
        plain_table, plain_step: as for `begin_first`.
        rows, counts: of the first group's arrays.

    Returns:
        ``(num_need, num_merge, width, mark, num_past)`` as `begin`.
    """
    table, step = RowTable(*plain_table), StepArrays(*plain_step)
    table.clock[LAST_MARK] += 1
    for b in range(batch):
        step.rows[b], step.counts[b] = rows[b], counts[b]
    num_need, num_merge, width, num_past = _begin_rows(table, step, batch, max_len, merges, span)
    return num_need, num_merge, width, table.clock[LAST_MARK], num_past


@jit
def _begin_rows(table: AnyTable, step: StepArrays, batch: int, max_len: int, merges: bool, span: int) -> Any:
    """Complete the rows ``step.rows`` with ``step.counts`` new tokens that need no blocks, and list the others.

    All of it is in one function, because a call for each row would hand over all these arrays by value.

    Returns:
        ``(num_need, num_merge, width, num_past)`` as `begin`.
    """
    num_need, num_merge, total, width, num_past = 0, 0, 0, 0, 0
    step.cu_seqlens_q[0] = 0
    for b in range(batch):
        row, count, first = step.rows[b], step.counts[b], total
        total += count
        step.cu_seqlens_q[b + 1] = total
        step.status[b] = OK
        length, entries = table.info[row, LENGTH], table.info[row, NUM_ENTRIES]
        width = max(width, entries)
        if length + count > max_len:
            stall(step, b, AT_MAX_LEN)
        elif length + count > 8 * table.info[row, CAPACITY]:
            step.work[0, num_need] = b
            num_need += 1
        else:
            _take(table, row)
            step.seq_lens[b] = length + count
            if length >= table.info[row, TAIL_FIRST]:
                base = table.info[row, TAIL_BASE] + length
                for i in range(count):
                    step.slot_mapping[first + i] = base + i
            else:
                _fill_slots(table, step, row, first, count)
        if step.stamps[b] != table.info[row, STAMP] and entries <= step.table.shape[1]:
            copy_row(table, step, b, row)
        if merges and length & 63 == 0 and length > 0 and mergeable(table, row, length >> 3) >= 0:
            step.work[1, num_merge] = b
            num_merge += 1
        if span != 0 and count > 0 and first_seen(length, span) > first_held(table, row):
            num_past += 1
    return num_need, num_merge, width, num_past


@jit
def first_seen(length: int, span: int) -> Any:
    """The first granule that the token after ``length`` others may see.

    ``span`` is how many tokens it sees, itself included (a window), or minus the size of the chunk in which it sees
    all, or 0 if it sees everything.
    """
    if span < 0:
        return (length - length % -span) >> 3
    return max(length - span + 1, 0) >> 3 if span > 0 else 0


@jit
def _take(table: AnyTable, row: int) -> None:
    """Let the step that begins hold a row."""
    table.info[row, STATE] = IN_STEP
    table.marks[row, OWNER] = table.clock[LAST_MARK]


@jit
def holds(table: AnyTable, row: int, mark: int) -> Any:
    """Whether a step holds a row. It does not hold rows that stalled, so a later step or another call may use them."""
    return table.info[row, STATE] == IN_STEP and table.marks[row, OWNER] == mark


@jit
def reopen(table: AnyTable, step: StepArrays, batch: int, mark: int) -> None:
    """Release the rows that a step holds."""
    for b in range(batch):
        if holds(table, step.rows[b], mark):
            table.info[step.rows[b], STATE] = OPEN


@jit
def stall(step: StepArrays, b: int, status: int) -> None:
    """Leave row ``b`` out of a step; ``status`` says why."""
    step.status[b] = status
    step.seq_lens[b] = 0
    for i in range(step.cu_seqlens_q[b], step.cu_seqlens_q[b + 1]):
        step.slot_mapping[i] = -1


@jit
def complete(table: BlockTable, step: StepArrays, num_need: int) -> Any:
    """Complete the rows in ``step.work[0]``, which have their blocks or a status by now; returns the widest."""
    width = 0
    for k in range(num_need):
        b = step.work[0, k]
        row = step.rows[b]
        if step.status[b] != OK:
            stall(step, b, step.status[b])
        else:
            _take(table, row)
            step.seq_lens[b] = table.info[row, LENGTH] + step.counts[b]
            _fill_slots(table, step, row, step.cu_seqlens_q[b], step.counts[b])
        width = max(width, table.info[row, NUM_ENTRIES])
        if step.stamps[b] != table.info[row, STAMP] and table.info[row, NUM_ENTRIES] <= step.table.shape[1]:
            copy_row(table, step, b, row)
    return width


@jit
def _fill_slots(table: AnyTable, step: StepArrays, row: int, first: int, count: int) -> None:
    """Write the slots of a row's next ``count`` positions to ``slot_mapping[first:]``; the row has room for them."""
    if count == 0:
        return
    length = table.info[row, LENGTH]
    e = find_entry(table, row, length >> 3)
    base = (entry_granule(table.entries[row, e]) - table.starts[row, e]) * 8
    end = (table.starts[row, e] + entry_length(table.entries[row, e])) * 8
    for i in range(count):
        if length + i == end:
            e += 1
            base = (entry_granule(table.entries[row, e]) - table.starts[row, e]) * 8
            end += entry_length(table.entries[row, e]) * 8
        step.slot_mapping[first + i] = base + length + i


@jit
def sync_tables(table: BlockTable, step: StepArrays, batch: int) -> None:
    """Copy the entries of every row that has changed since they were copied last."""
    for b in range(batch):
        if step.stamps[b] != table.info[step.rows[b], STAMP]:
            copy_row(table, step, b, step.rows[b])


@jit
def widest(table: BlockTable, step: StepArrays, batch: int) -> Any:
    """The number of entries of the step's widest row."""
    width = 0
    for b in range(batch):
        width = max(width, table.info[step.rows[b], NUM_ENTRIES])
    return width


@jit
def copy_row(table: AnyTable, step: StepArrays, b: int, row: int) -> None:
    """Copy a row's entries into row ``b`` of the step; beyond them both have -1."""
    count = table.info[row, NUM_ENTRIES]
    for e in range(max(count, step.filled[b])):
        step.table[b, e] = table.entries[row, e]
        step.starts[b, e] = table.starts[row, e]
    step.filled[b] = count
    step.stamps[b] = table.info[row, STAMP]


@jit
def choose_sizes(
    table: BlockTable,
    step: StepArrays,
    num_need: int,
    available: int,
    most: int,
    num_granules: int,
    rule: int,
    tail: int,
    largest: int,
    offered: Int32Array,
    sizes: Int32Array,
    ends: Int32Array,
) -> Any:
    """Choose block sizes for the rows that need blocks, in order; those of the i-th end at ``ends[i]``.

    Args:
        available: granules that are free or cached, by which growth policies decide.
        most: upper bound of what can be had. A row that would exceed it gets status OUT_OF_BLOCKS and no sizes.

    Returns:
        ``(number of blocks, their granules, rows that would exceed most)``.
    """
    end, total, num_refused = 0, 0, 0
    for i in range(num_need):
        b = step.work[0, i]
        row = step.rows[b]
        length = table.info[row, LENGTH] + step.counts[b]
        needed = (length + 7) // 8 - table.info[row, CAPACITY]
        if needed > most:
            step.status[b] = OUT_OF_BLOCKS
            num_refused += 1
        else:
            first = end
            size = min(tail_size(rule, tail, length, available / num_granules), largest, offered[0])
            end = split_into_blocks(needed, size, largest, offered, sizes, first)
            for k in range(first, end):
                total += sizes[k]
                available -= sizes[k]
                most -= sizes[k]
            available, most = max(available, 0), max(most, 0)
        ends[i] = end
    return end, total, num_refused


@jit
def advance(table: BlockTable, step: StepArrays, batch: int, mark: int) -> None:
    """End a step whose tokens are unknown: lengths advance, and its rows cannot be published from then on."""
    for b in range(batch):
        row = step.rows[b]
        if holds(table, row, mark):
            table.info[row, LENGTH] += step.counts[b]
            table.info[row, STATE] = OPEN
            if step.counts[b] > 0:
                table.chain[row] = BROKEN


@jit
def advance_rows(
    info: Int64Array, marks: Int64Array, chain: Int32Array, rows: Int32Array, counts: Int32Array, batch: int, mark: int
) -> Any:
    """`advance` for the rows of a step in one of several groups; returns how many granules have become full.

    It takes few arrays, because each costs time at every call.
    """
    num_full = 0
    for b in range(batch):
        row = rows[b]
        if info[row, STATE] == IN_STEP and marks[row, OWNER] == mark:
            num_full += ((info[row, LENGTH] + counts[b]) >> 3) - (info[row, LENGTH] >> 3)
            info[row, LENGTH] += counts[b]
            info[row, STATE] = OPEN
            if counts[b] > 0:
                chain[row] = BROKEN
    return num_full


@jit
def advance_and_publish(
    table: BlockTable,
    step: StepArrays,
    batch: int,
    mark: int,
    tokens: Int64Array,
    extras: Int64Array,
    nodes: Nodes,
    granules: GranuleState,
    freed: Int32Array,
) -> Any:
    """End a step: lengths advance, and full granules become findable. Returns the number of ``freed`` granules.

    It takes the parts of `Holdings`, because a tuple inside a tuple costs a microsecond at every call.
    """
    holdings = Holdings(nodes, granules, freed)
    num_freed, first = 0, 0
    for b in range(batch):
        row, count = step.rows[b], step.counts[b]
        if holds(table, row, mark):
            length = table.info[row, LENGTH]
            table.info[row, LENGTH] = length + count
            table.info[row, STATE] = OPEN
            if table.chain[row] != BROKEN:
                for i in range(count):
                    place = (length + i) & 7
                    table.pending[row, place] = tokens[first + i]
                    if place == 7:
                        index = (length + i) >> 3
                        num_freed = _publish_full(table, row, index, extras, holdings, num_freed)
        first += count
    return num_freed


@jit
def _publish_full(
    table: BlockTable,
    row: int,
    index: int,
    extras: Int64Array,
    holdings: Holdings,
    num_freed: int,
) -> Any:
    """Publish the full granule ``index`` of a row, or make it a twin if the same tokens are published already.

    Returns the new length of ``freed``; see `add_twin`.
    """
    nodes, granules = holdings.nodes, holdings.granules
    parent, uid = table.chain[row], table.origin[row, CHAIN_UID]
    if parent == BROKEN:
        return num_freed
    if parent != ROOT and nodes.uid[parent] != uid:  # it was evicted meanwhile, so nothing can follow it
        table.chain[row] = BROKEN
        return num_freed
    extra = extra_at(table, extras, row, index)
    node = find_node(nodes, uid, extra, table.pending[row], 0)
    granule = granule_at(table, row, index)
    if node < 0:
        node = publish(nodes, granules, parent, uid, extra, index, table.pending[row], granule)
    elif nodes.granule[node] != granule:
        num_freed = add_twin(holdings, node, granule, num_freed)
    table.chain[row], table.origin[row, CHAIN_UID] = node, nodes.uid[node]
    return num_freed


@jit
def attach_all(
    table: BlockTable,
    granules: GranuleState,
    step: StepArrays,
    num_need: int,
    starts: Int32Array,
    sizes: Int32Array,
    ends: Int32Array,
    refused: Int32Array,
) -> Any:
    """Attach blocks to the rows that need them, up to the first that did not get all; if all did, complete them.

    Returns:
        ``(i, num_refused, width)``: the position of that first row in ``step.work[0]`` (``num_need`` if all got their
        blocks), how many granules of rows with too few entries were written to ``refused``, and the entries of the
        widest row if the rows are complete.
    """
    num_refused = 0
    for i in range(num_need):
        b = step.work[0, i]
        begin = ends[i - 1] if i > 0 else 0
        if step.status[b] != OK:
            continue
        if ends[i] > begin and starts[ends[i] - 1] < 0:
            return i, num_refused, 0
        if not attach(table, granules, step.rows[b], starts[begin : ends[i]], sizes[begin : ends[i]]):
            step.status[b] = ROW_FULL
            for k in range(begin, ends[i]):
                for granule in range(starts[k], starts[k] + sizes[k]):
                    refused[num_refused] = granule
                    num_refused += 1
    return num_need, num_refused, complete(table, step, num_need)
