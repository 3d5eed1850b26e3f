"""The compiled moves that put a block of 64 tokens in place of small ones, or move a block elsewhere."""

from typing import Any

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state.block_table import NUM_ENTRIES, AnyTable, BlockTable, granule_at, touch_private
from kvtoolkit.cache.state.prefix_index import GranuleState, Nodes, move_granule
from kvtoolkit.formats.entry import entry_granule, entry_length, pack_entry


@jit
def mergeable(table: AnyTable, row: int, end: int) -> Any:
    """The first of several entries that together cover exactly the granules ``[end - 8, end)``, or -1."""
    e = table.info[row, NUM_ENTRIES] - 1
    while e >= 0 and table.starts[row, e] >= end:
        e -= 1
    last = e
    while e > 0 and table.starts[row, e] > end - 8:
        e -= 1
    if last < 0 or last == e or table.starts[row, e] != end - 8:
        return -1
    if table.starts[row, last] + entry_length(table.entries[row, last]) != end:
        return -1
    return e


@jit
def is_private(table: BlockTable, row: int, first: int, end: int, granules: GranuleState) -> Any:
    """Whether no other row holds any of a row's granules ``[first, end)``."""
    private = True
    for index in range(first, end):
        private = private and granules.refs[granule_at(table, row, index)] == 1
    return private


@jit
def list_windows(table: BlockTable, candidates: Int32Array, ends: Int32Array, count: int, out: Int32Array) -> None:
    """Write the granules ``[ends[i] - 8, ends[i])`` of the first ``count`` candidates to ``out``, 8 of each."""
    for i in range(count):
        for k in range(8):
            out[8 * i + k] = granule_at(table, candidates[i], ends[i] - 8 + k)


@jit
def merge_blocks(table: BlockTable, row: int, end: int, target: int, nodes: Nodes, granules: GranuleState) -> None:
    """Replace a row's granules ``[end - 8, end)``, which are private, by the block ``target`` of 8 granules.

    The caller has copied them before, and frees them afterwards.
    """
    first = mergeable(table, row, end)
    last = first
    index = 0
    while last < table.info[row, NUM_ENTRIES] and table.starts[row, last] < end:
        for i in range(entry_length(table.entries[row, last])):
            move_granule(nodes, granules, entry_granule(table.entries[row, last]) + i, target + index)
            index += 1
        last += 1
    table.entries[row, first] = pack_entry(target, 8, 0)
    removed = last - first - 1
    count = table.info[row, NUM_ENTRIES]
    for e in range(first + 1, count - removed):
        table.entries[row, e] = table.entries[row, e + removed]
        table.starts[row, e] = table.starts[row, e + removed]
    for e in range(count - removed, count):
        table.entries[row, e] = -1
        table.starts[row, e] = -1
    table.info[row, NUM_ENTRIES] = count - removed
    touch_private(table, row)


@jit
def keep_private_merges(table: BlockTable, candidates: Int32Array, ends: Int32Array, granules: GranuleState) -> Any:
    """Move the candidates whose 8 granules no other row holds to the front; returns how many there are."""
    kept = 0
    for i in range(len(candidates)):
        if is_private(table, candidates[i], ends[i] - 8, ends[i], granules):
            candidates[kept], ends[kept] = candidates[i], ends[i]
            kept += 1
    return kept


@jit
def merge_blocks_all(
    table: BlockTable,
    candidates: Int32Array,
    ends: Int32Array,
    targets: Int32Array,
    nodes: Nodes,
    granules: GranuleState,
) -> None:
    """`merge_blocks` for as many candidates as there are targets."""
    for i in range(len(targets)):
        merge_blocks(table, candidates[i], ends[i], targets[i], nodes, granules)


@jit
def relocate(table: BlockTable, row: int, e: int, target: int, nodes: Nodes, granules: GranuleState) -> None:
    """Point an entry, whose granules are private, to their copies, which begin at ``target``."""
    entry = table.entries[row, e]
    for i in range(entry_length(entry)):
        move_granule(nodes, granules, entry_granule(entry) + i, target + i)
    table.entries[row, e] = pack_entry(target, entry_length(entry), 0)
    touch_private(table, row)
