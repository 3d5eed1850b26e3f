"""The compiled passes over the rows of a step in which several groups of layers, or a window, have a part."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_merging import mergeable
from kvtoolkit.cache.state.block_table import (
    LENGTH,
    NUM_ENTRIES,
    OPEN,
    STATE,
    BlockTable,
    RowTable,
    entry_that_holds,
    first_held,
    shrink,
    touch,
)
from kvtoolkit.cache.state.prefix_index import CLOCK, GranuleState, Holdings, Nodes, decref, unpublish
from kvtoolkit.cache.state.step_passes import OK, StepArrays, copy_row, first_seen, holds, stall
from kvtoolkit.formats.entry import entry_granule, entry_length, entry_tier, pack_entry


@jit
def free_past(
    plain_table: tuple[Any, ...], plain_step: tuple[Any, ...], plain_nodes: tuple[Any, ...],
    plain_granules: tuple[Any, ...], freed: Int32Array, batch: int, span: int, keeps: bool, num_merge: int,
) -> Any:  # fmt: skip
    """Let the rows of a step that get new tokens go of what no later query sees, and bring their tables up to date.

    Rows may end before what a later query sees. Granules that can be found stay findable if ``keeps``, as when a row is
    closed; otherwise they are freed, too, unless other rows hold them.

    Args:
        plain_table, plain_step, plain_nodes, plain_granules: a `RowTable`, `StepArrays`, `Nodes` and `GranuleState` as
            plain tuples, see `step_passes.begin_first`.

    Returns:
        ``(num_freed, num_merge)``: the granules in ``freed``, and how many rows of ``step.work[1]`` still hold the 64
        tokens that may be merged; they come first there.
    """
    table, step = RowTable(*plain_table), StepArrays(*plain_step)
    nodes, granules = Nodes(*plain_nodes), GranuleState(*plain_granules)
    holdings = Holdings(nodes, granules, freed)
    num_freed, num_kept = 0, 0
    nodes.counts[CLOCK] += 1  # what earlier steps have let go of is older
    for b in range(batch):  # in one loop, because a call for each row would hand over all these arrays by value
        row = step.rows[b]
        first = first_seen(table.info[row, LENGTH], span)
        if step.counts[b] == 0 or first <= first_held(table, row):
            continue
        count, gone = table.info[row, NUM_ENTRIES], 0
        while gone < count and table.starts[row, gone] < first:
            entry, start = table.entries[row, gone], table.starts[row, gone]
            length = entry_length(entry)
            passed = min(first - start, length)
            for granule in range(entry_granule(entry), entry_granule(entry) + passed):
                num_freed = decref(holdings, granule, num_freed)
                if not keeps and granules.refs[granule] == 0 and granules.node[granule] >= 0:
                    num_freed = unpublish(holdings, granules.node[granule], num_freed)
            if passed < length:
                table.entries[row, gone] = pack_entry(entry_granule(entry) + passed, length - passed, entry_tier(entry))
                table.starts[row, gone] = first
                break
            gone += 1
        for e in range(count - gone):
            table.entries[row, e], table.starts[row, e] = table.entries[row, e + gone], table.starts[row, e + gone]
        for e in range(count - gone, count):
            table.entries[row, e] = table.starts[row, e] = -1
        table.info[row, NUM_ENTRIES] = count - gone
        touch(table, row)
        if count - gone <= step.table.shape[1]:
            copy_row(table, step, b, row)
    for k in range(num_merge):
        row = step.rows[step.work[1, k]]
        if mergeable(table, row, table.info[row, LENGTH] >> 3) >= 0:
            step.work[1, num_kept] = step.work[1, k]
            num_kept += 1
    return num_freed, num_kept


@jit
def drop_stalled(step: StepArrays, num_need: int, status: NDArray[np.int8]) -> Any:
    """Leave rows that have stalled in another group out of ``step.work[0]``; returns how many rows are left there."""
    kept = 0
    for i in range(num_need):
        b = step.work[0, i]
        if status[b] == OK:
            step.work[0, kept] = b
            kept += 1
        else:
            step.status[b] = status[b]
    return kept


@jit
def stall_too(
    table: BlockTable, step: StepArrays, batch: int, mark: int, status: NDArray[np.int8], before: Int64Array,
    holdings: Holdings,
) -> Any:  # fmt: skip
    """Leave rows that have stalled in any group out of this one's part of the step, as if they had never had room.

    Args:
        status: ``[batch]`` status of each row, all groups together.
        before: ``[batch]`` CAPACITY of each row when the step began.

    Returns:
        The number of ``freed`` granules.
    """
    num_freed = 0
    for b in range(batch):
        if status[b] != OK:
            row = step.rows[b]
            if holds(table, row, mark):
                table.info[row, STATE] = OPEN
            stall(step, b, status[b])
            num_freed = shrink(table, row, before[b], holdings, num_freed)
    return num_freed


class ChunkTables(NamedTuple):
    """What kernels read for layers in chunks: a row for each chunk in which a row of the step has new tokens."""

    block_table: Int32Array
    """``[n, width]`` entries of the chunk alone."""
    block_starts: Int32Array
    """``[n, width]`` first granule of each entry, counted from the beginning of the chunk."""
    seq_lens: Int32Array
    """``[n]`` tokens of the chunk."""
    cu_seqlens_q: Int32Array
    """``[n + 1]`` where the new tokens of each chunk begin."""


@jit
def cut_chunks(step: StepArrays, batch: int, chunk: int, out: ChunkTables) -> Any:
    """Cut the rows of a step at chunks; returns how many rows that makes. ``out`` is empty, and large enough."""
    n = 0
    out.cu_seqlens_q[0] = 0
    for b in range(batch):
        end, token = step.seq_lens[b], step.cu_seqlens_q[b]
        position = end - step.counts[b]
        first = True
        while first or position < end:
            first = False
            if step.status[b] != OK:  # its tokens see nothing
                out.seq_lens[n], token = 0, step.cu_seqlens_q[b + 1]
            else:
                base = position - position % chunk
                stop = min(base + chunk, end)
                _copy_chunk(step, b, base >> 3, (stop + 7) >> 3, out, n)
                out.seq_lens[n] = stop - base
                token += stop - position
                position = stop
            n += 1
            out.cu_seqlens_q[n] = token
            if step.status[b] != OK:
                break
    return n


@jit
def _copy_chunk(step: StepArrays, b: int, begin: int, end: int, out: ChunkTables, n: int) -> None:
    """Copy what row ``b`` of a step holds of granules ``[begin, end)`` to row ``n``, counted from ``begin``."""
    if step.filled[b] == 0 or begin == end:
        return
    e, count = entry_that_holds(step.starts, b, step.filled[b], begin), 0
    while e < step.filled[b] and step.starts[b, e] < end:
        entry, start = step.table[b, e], step.starts[b, e]
        skip = max(0, begin - start)
        length = min(entry_length(entry), end - start) - skip
        out.block_table[n, count] = pack_entry(entry_granule(entry) + skip, length, entry_tier(entry))
        out.block_starts[n, count] = start + skip - begin
        count += 1
        e += 1
