"""The compiled moves of forks, beams and truncation: rows that share full granules, and rows that are cut."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    CHAIN_UID,
    LENGTH,
    NUM_ENTRIES,
    ROOT_OF,
    BlockTable,
    attach,
    find_entry,
    granule_at,
    shrink,
    touch,
)
from kvtoolkit.cache.state.prefix_index import BROKEN, ROOT, GranuleState, Holdings, Nodes, incref, withdraw
from kvtoolkit.formats.entry import entry_granule, entry_length, entry_tier, pack_entry


@jit
def incref_first(table: BlockTable, row: int, keep: int, granules: GranuleState) -> None:
    """Count one more row that holds the first ``keep`` granules of a row."""
    e = 0
    while e < table.info[row, NUM_ENTRIES] and table.starts[row, e] < keep:
        for i in range(min(entry_length(table.entries[row, e]), keep - table.starts[row, e])):
            incref(granules, entry_granule(table.entries[row, e]) + i)
        e += 1


@jit
def copy_first(source_table: BlockTable, source: int, table: BlockTable, row: int, keep: int) -> None:
    """Copy the entries of another row's first ``keep`` granules, which are counted already, into an empty row."""
    e = 0
    while e < source_table.info[source, NUM_ENTRIES] and source_table.starts[source, e] < keep:
        entry, first = source_table.entries[source, e], source_table.starts[source, e]
        kept = min(entry_length(entry), keep - first)
        table.entries[row, e] = pack_entry(entry_granule(entry), kept, entry_tier(entry))
        table.starts[row, e] = first
        e += 1
    table.info[row, NUM_ENTRIES] = e
    table.info[row, CAPACITY] = keep
    touch(table, row)


@jit
def copy_tokens(source_table: BlockTable, source: int, table: BlockTable, row: int) -> None:
    """Copy what is known of a row's tokens: length, place in the index, extra keys, last tokens, masses."""
    table.info[row, LENGTH] = source_table.info[source, LENGTH]
    table.chain[row] = source_table.chain[source]
    for i in range(4):
        table.origin[row, i] = source_table.origin[source, i]
    table.scanned[row] = -1
    table.bar[row, 0], table.bar[row, 1] = source_table.bar[source, 0], source_table.bar[source, 1]
    for tile in range(table.masses.shape[1]):
        table.masses[row, tile] = source_table.masses[source, tile]
    for i in range(8):
        table.pending[row, i] = source_table.pending[source, i]


@jit
def rollback(table: BlockTable, row: int, length: int, nodes: Nodes) -> None:
    """Go back to what was known of a row's tokens when it held ``length`` of them; it holds at least as many now."""
    if length == 0:  # a row without tokens is at the root, even if its chain was broken
        table.chain[row], table.origin[row, CHAIN_UID] = ROOT, table.origin[row, ROOT_OF]
        return
    steps = (table.info[row, LENGTH] >> 3) - (length >> 3)
    node, uid = table.chain[row], table.origin[row, CHAIN_UID]
    for _ in range(steps):
        if node < 0 or nodes.uid[node] != uid:
            table.chain[row] = BROKEN
            return
        for i in range(8):
            table.pending[row, i] = nodes.tokens[node, i]
        node, uid = nodes.parent[node], nodes.parent_uid[node]
    table.chain[row], table.origin[row, CHAIN_UID] = node, uid


@jit
def spare_end(table: BlockTable, row: int, keep: int, granules: GranuleState) -> Any:
    """How many granules a row may keep, from ``keep`` up to the end of that entry, as room to grow.

    Those beyond ``keep`` will be overwritten, so they must not be shared or findable.
    """
    if keep == 0:
        return 0
    e = find_entry(table, row, keep - 1)
    end = table.starts[row, e] + entry_length(table.entries[row, e])
    base = entry_granule(table.entries[row, e]) - table.starts[row, e]
    while keep < end and granules.refs[base + keep] == 1 and granules.node[base + keep] < 0:
        keep += 1
    return keep


@jit
def share_all(
    source_table: BlockTable, sources: Int32Array, table: BlockTable, targets: Int32Array, keeps: Int64Array
) -> None:
    """`copy_first` and `copy_tokens` for several rows."""
    for i in range(len(sources)):
        copy_first(source_table, sources[i], table, targets[i], keeps[i])
        copy_tokens(source_table, sources[i], table, targets[i])


@jit
def incref_all(table: BlockTable, which: Int32Array, keeps: Int64Array, granules: GranuleState) -> None:
    """`incref_first` for several rows."""
    for i in range(len(which)):
        incref_first(table, which[i], keeps[i], granules)


@jit
def empty_all(table: BlockTable, which: Int32Array, holdings: Holdings) -> Any:
    """Let go of everything that some rows hold; returns the number of ``freed`` granules."""
    num_freed = 0
    for row in which:
        num_freed = shrink(table, row, 0, holdings, num_freed)
    return num_freed


class Tails(NamedTuple):
    """Freshly allocated blocks for some rows of a list: copies of granules that rows may not share."""

    positions: Int32Array
    """Positions in the list. A position may occur several times; its blocks are attached in this order."""
    starts: Int32Array
    sizes: Int32Array


@jit
def attach_tails(table: BlockTable, granules: GranuleState, which: Int32Array, tails: Tails) -> None:
    """Append each block to its row, which must have an entry left for it."""
    for i in range(len(tails.positions)):
        attach(table, granules, which[tails.positions[i]], tails.starts[i : i + 1], tails.sizes[i : i + 1])


@jit
def reorder_all(
    source_table: BlockTable,
    sources: Int32Array,
    table: BlockTable,
    targets: Int32Array,
    keeps: Int64Array,
    tails: Tails,
    holdings: Holdings,
) -> Any:
    """Let each target hold what its source held, instead of its own; returns the number of ``freed`` granules."""
    granules = holdings.granules
    incref_all(source_table, sources, keeps, granules)
    num_freed = empty_all(table, targets, holdings)
    share_all(source_table, sources, table, targets, keeps)
    attach_tails(table, granules, targets, tails)
    return num_freed


@jit
def reorder_groups(
    source_tables: Any,
    sources: Int32Array,
    tables: Any,
    targets: Int32Array,
    keeps: Int64Array,
    tails: Any,
    holdings: Any,
    num_freed: Int64Array,
) -> None:
    """`reorder_all` for all groups in one move, because no sequence may hold other tokens in one than in the other.

    Each group has an element of the tuples, and its number of freed granules goes to ``num_freed``.
    """
    for g in range(len(tables)):
        num_freed[g] = reorder_all(source_tables[g], sources, tables[g], targets, keeps, tails[g], holdings[g])


@jit
def list_partial(
    table: BlockTable, which: Int32Array, lengths: Int64Array, positions: Int32Array, out: Int32Array
) -> Any:
    """Find the granules that would be partly filled at the given lengths; returns how many.

    ``positions`` receives the positions in ``which`` of the rows that have one, and ``out`` these granules.
    """
    count = 0
    for i in range(len(which)):
        if lengths[i] & 7:
            positions[count] = i
            out[count] = granule_at(table, which[i], lengths[i] >> 3)
            count += 1
    return count


@jit
def cuts_quantized(table: BlockTable, which: Int32Array, lengths: Int64Array, out: NDArray[np.bool_]) -> Any:
    """Write to ``out`` which rows would end inside a quantized tile at the given lengths; returns ``out``."""
    for i in range(len(which)):
        out[i] = False
        if lengths[i] & 63 != 0:
            entry = table.entries[which[i], find_entry(table, which[i], lengths[i] >> 3)]
            out[i] = entry_tier(entry) != 0 and lengths[i] < table.info[which[i], LENGTH]
    return out


@jit
def truncate_all(
    table: BlockTable,
    which: Int32Array,
    lengths: Int64Array,
    keeps: Int64Array,
    tails: Tails,
    holdings: Holdings,
) -> Any:
    """Keep the first ``lengths[i]`` tokens of each row; returns the number of ``freed`` granules.

    If ``keeps[i]`` is not negative, the row keeps only so many granules, and ``tails`` has copies of the others.
    """
    nodes, granules = holdings.nodes, holdings.granules
    num_freed = 0
    for i in range(len(which)):
        row, length = which[i], lengths[i]
        if length == table.info[row, LENGTH]:
            continue
        rollback(table, row, length, nodes)
        table.info[row, LENGTH] = length
        keep = keeps[i]
        if keep < 0:
            keep = (length + 7) >> 3
            if length & 7:
                # the granule will be written again, so prompts must no longer find it
                num_freed = withdraw(holdings, granule_at(table, row, length >> 3), num_freed)
            end = spare_end(table, row, keep, granules)
            for index in range(keep, end):
                num_freed = withdraw(holdings, granule_at(table, row, index), num_freed)
            keep = end
            for index in range(length >> 3, keep):
                granules.copy[granule_at(table, row, index)] = 0  # it will be written again, too
        num_freed = shrink(table, row, keep, holdings, num_freed)
        for tile in range((length + 63) >> 6, table.masses.shape[1]):
            table.masses[row, tile] = 0  # new tokens there have no mass yet
    attach_tails(table, granules, which, tails)
    return num_freed


@jit
def truncate_groups(
    tables: Any,
    which: Int32Array,
    lengths: Int64Array,
    keeps: Int64Array,
    tails: Any,
    holdings: Any,
    num_freed: Int64Array,
) -> None:
    """`truncate_all` for all groups in one move; see `reorder_groups`. ``keeps`` has a line for each group."""
    for g in range(len(tables)):
        num_freed[g] = truncate_all(tables[g], which, lengths, keeps[g], tails[g], holdings[g])


@jit
def show_with_tails(
    table: BlockTable, which: Int32Array, keeps: Int64Array, tails: Tails, entries: Int32Array, starts: Int32Array,
    ends: Int32Array,
) -> None:  # fmt: skip
    """Write what rows would hold with their first ``keeps`` granules and the fresh blocks of ``tails``.

    Args:
        entries, starts: ``[rows, width]``, with room for it, -1 everywhere.
        ends: ``[rows, 4]`` receives where each row ends, as ``GrowParams`` has it.
    """
    block = 0
    for i in range(len(which)):
        row, e, keep = which[i], 0, keeps[i]
        while e < table.info[row, NUM_ENTRIES] and table.starts[row, e] < keep:
            entry, starts[i, e] = table.entries[row, e], table.starts[row, e]
            length = min(entry_length(entry), keep - table.starts[row, e])
            entries[i, e] = pack_entry(entry_granule(entry), length, entry_tier(entry))
            e += 1
        while block < len(tails.positions) and tails.positions[block] == i:
            entries[i, e], starts[i, e] = pack_entry(tails.starts[block], tails.sizes[block], 0), keep
            keep += tails.sizes[block]
            block += 1
            e += 1
        ends[i, 0], ends[i, 1], ends[i, 2], ends[i, 3] = keep, e, 0, 0
        if e > 0:
            ends[i, 2] = 8 * starts[i, e - 1]
            ends[i, 3] = 8 * (entry_granule(entries[i, e - 1]) - starts[i, e - 1])
