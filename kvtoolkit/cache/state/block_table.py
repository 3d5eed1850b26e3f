"""The rows of the block table, one per sequence, and the compiled moves on them.

    info[s, CAPACITY] == sum of the entry lengths of row s      (granules)
    info[s, LENGTH] <= 8 * info[s, CAPACITY]                    (tokens)
    starts[s, e + 1] == starts[s, e] + length of entries[s, e];  starts[s, 0] == 0

    info[s, TAIL_FIRST] == 8 * starts of the last entry         (tokens)
    info[s, TAIL_BASE] + p == slot of position p >= TAIL_FIRST

Every sequence has one cache line of figures (`info`), and a decode step reads nothing else of most of them: that
is what keeps a step of thousands of rows cheap.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.prefix_index import (
    BROKEN,
    HELD,
    ROOT,
    GranuleState,
    Nodes,
    decref,
    incref,
    move_granule,
    tier_of,
    withdraw,
)
from kvtoolkit.formats.entry import entry_granule, entry_length, entry_tier, pack_entry

# columns of `info`
GENERATION, STATE, LENGTH, CAPACITY, NUM_ENTRIES, STAMP, TAIL_BASE, TAIL_FIRST = range(8)
# columns of `marks`
NAMED, OWNER = range(2)
# columns of `origin`
CHAIN_UID, ROOT_OF, FIRST_EXTRA, END_EXTRA = range(4)
# values of STATE
CLOSED, OPEN, IN_STEP, PREEMPTED, PINNED = range(5)
STATE_NAMES = ("closed", "open", "in a step", "preempted", "pinned")

ID_BITS = 20
"""A sequence id is its generation above its row, so that the id of a closed sequence never comes back."""

# what `check_ids` and `begin` may find wrong
BAD_ID, BAD_STATE, BAD_TWICE, BAD_COUNT = 1, 2, 3, 4


class BlockTable(NamedTuple):
    """State of all rows."""

    info: Int64Array
    """``[max_seqs, 8]``, columns above: STAMP changes whenever the entries do."""
    entries: Int32Array
    """``[max_seqs, max_entries]``"""
    starts: Int32Array
    """``[max_seqs, max_entries]`` first logical granule of each entry."""
    marks: Int64Array
    """``[max_seqs, 2]``, columns above: the last call that named the row, to find an id that stands twice; the step or
    lease that holds the row, while STATE is IN_STEP or PINNED. No two calls have the same mark."""
    chain: Int32Array
    """``[max_seqs]`` index node of the last full granule, ROOT or BROKEN."""
    origin: Int64Array
    """``[max_seqs, 4]``, columns above: the uid of `chain`, which tells whether that still is what it was, at ROOT the
    next column; uid of the root of the row's salt; where its extra keys are among all of them."""
    pending: Int64Array
    """``[max_seqs, 8]`` tokens of the granule that is being filled."""
    clock: Int64Array
    """``[2]``: the last stamp of a changed row, the last mark."""
    scanned: Int32Array
    """``[max_seqs]`` full tiles of the row when all of them were in the tier they belong to; -1 = not known."""
    masses: NDArray[np.float32]
    """``[max_seqs, num_tiles]`` share of the attention that went to each tile of late; of demotion by mass."""
    bar: NDArray[np.float64]
    """``[max_seqs, 2]`` mass and tile of the lightest tile that may stay warm; of demotion by mass."""


def make_block_table(max_seqs: int, max_entries: int, num_tiles: int = 0) -> BlockTable:
    """All rows closed; ``num_tiles`` of each have a mass."""
    return BlockTable(
        info=np.zeros((max_seqs, 8), np.int64),
        entries=np.full((max_seqs, max_entries), -1, np.int32),
        starts=np.full((max_seqs, max_entries), -1, np.int32),
        marks=np.zeros((max_seqs, 2), np.int64),
        chain=np.full(max_seqs, ROOT, np.int32),
        origin=np.zeros((max_seqs, 4), np.int64),
        pending=np.zeros((max_seqs, 8), np.int64),
        clock=np.zeros(2, np.int64),
        scanned=np.full(max_seqs, -1, np.int32),
        masses=np.zeros((max_seqs, num_tiles), np.float32),
        bar=np.zeros((max_seqs, 2), np.float64),
    )


@jit
def check_ids(table: BlockTable, ids: Int64Array, states: int, out: Int32Array) -> Any:
    """Write the row of every id to ``out``; returns ``(0, 0)`` or what is wrong and where. Changes only marks.

    ``states`` has bit ``s`` set if rows in state ``s`` are welcome.
    """
    table.clock[1] += 1
    mark = table.clock[1]
    for i in range(len(ids)):
        row = ids[i] & ((1 << ID_BITS) - 1)
        if ids[i] < 0 or row >= len(table.info) or table.info[row, GENERATION] != ids[i] >> ID_BITS:
            return BAD_ID, i
        found = table.info[row, STATE]
        if not (states >> found) & 1:
            return BAD_ID if found == CLOSED else BAD_STATE, i
        if table.marks[row, NAMED] == mark:
            return BAD_TWICE, i
        table.marks[row, NAMED] = mark
        out[i] = row
    return 0, 0


@jit
def mergeable(table: BlockTable, row: int, end: int) -> Any:
    """The first entry of those that cover exactly granules ``[end - 8, end)`` if they are several; else -1."""
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
def attach(table: BlockTable, granules: GranuleState, row: int, starts: Int32Array, sizes: Int32Array) -> Any:
    """Append freshly allocated blocks to a row. Returns False, and changes nothing, if the row has too few entries."""
    count, capacity = table.info[row, NUM_ENTRIES], table.info[row, CAPACITY]
    if count + _entries_needed(table, row, starts, sizes) > table.entries.shape[1]:
        return False
    for k in range(len(starts)):
        for granule in range(starts[k], starts[k] + sizes[k]):
            granules.refs[granule], granules.copy[granule] = 1, 0
        tier = tier_of(granules, starts[k])
        granules.cached[HELD + tier] += sizes[k]
        count = _append_run(table, row, count, capacity, starts[k], sizes[k], tier)
        capacity += sizes[k]
    table.info[row, NUM_ENTRIES], table.info[row, CAPACITY] = count, capacity
    touch(table, row)
    return True


@jit
def _joins(entry: int, start: int, size: int) -> Any:
    """Whether a run continues an entry within one superblock, so that both can be one entry."""
    granule, length = entry_granule(entry), entry_length(entry)
    return granule + length == start and granule >> 3 == (start + size - 1) >> 3


@jit
def _entries_needed(table: BlockTable, row: int, starts: Int32Array, sizes: Int32Array) -> Any:
    count = table.info[row, NUM_ENTRIES]
    granule, length, needed = -1, 0, 0
    if count > 0:
        granule, length = entry_granule(table.entries[row, count - 1]), entry_length(table.entries[row, count - 1])
    for k in range(len(starts)):
        if granule >= 0 and granule + length == starts[k] and granule >> 3 == (starts[k] + sizes[k] - 1) >> 3:
            length += sizes[k]
        else:
            granule, length, needed = starts[k], sizes[k], needed + 1
    return needed


@jit
def _append_run(table: BlockTable, row: int, count: int, capacity: int, start: int, size: int, tier: int) -> Any:
    """Add a run at logical granule ``capacity``, as a part of the last entry if it continues it; the new count."""
    if count > 0 and _joins(table.entries[row, count - 1], start, size):
        entry = table.entries[row, count - 1]
        table.entries[row, count - 1] = pack_entry(entry_granule(entry), entry_length(entry) + size, tier)
        return count
    table.entries[row, count] = pack_entry(start, size, tier)
    table.starts[row, count] = capacity
    return count + 1


@jit
def touch(table: BlockTable, row: int) -> None:
    """Note that the entries of a row have changed."""
    table.clock[0] += 1
    table.info[row, STAMP] = table.clock[0]
    last = table.info[row, NUM_ENTRIES] - 1
    if last < 0:
        table.info[row, TAIL_FIRST] = table.info[row, TAIL_BASE] = 0
    else:
        table.info[row, TAIL_FIRST] = 8 * table.starts[row, last]
        table.info[row, TAIL_BASE] = 8 * (entry_granule(table.entries[row, last]) - table.starts[row, last])


@jit
def touch_all(table: BlockTable, which: Int32Array) -> None:
    """`touch` for many rows."""
    for row in which:
        touch(table, row)


@jit
def find_entry(table: BlockTable, row: int, granule: int) -> Any:
    """The entry that holds a logical granule below the row's capacity."""
    low, high = 0, table.info[row, NUM_ENTRIES] - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if table.starts[row, middle] <= granule:
            low = middle
        else:
            high = middle - 1
    return low


@jit
def granule_at(table: BlockTable, row: int, granule: int) -> Any:
    """The granule of the pool at a logical granule of a row."""
    e = find_entry(table, row, granule)
    return entry_granule(table.entries[row, e]) + granule - table.starts[row, e]


@jit
def list_granules(table: BlockTable, row: int, count: int, out: Int32Array) -> None:
    """Write the first ``count`` granules of a row to ``out``."""
    written, e = 0, 0
    while written < count:
        granule = entry_granule(table.entries[row, e])
        for i in range(min(entry_length(table.entries[row, e]), count - written)):
            out[written + i] = granule + i
        written += entry_length(table.entries[row, e])
        e += 1


@jit
def fill_in(table: BlockTable, which: Int32Array, filled: NDArray[np.int8]) -> None:
    """Write to each granule of some rows how many tokens are in it; in one that rows share, of the fullest."""
    for row in which:
        left = table.info[row, LENGTH]
        for e in range(table.info[row, NUM_ENTRIES]):
            granule = entry_granule(table.entries[row, e])
            for i in range(entry_length(table.entries[row, e])):
                filled[granule + i] = max(filled[granule + i], min(max(left, 0), 8))
                left -= 8


@jit
def attach_prefix(
    table: BlockTable, row: int, found: Int32Array, count: int, nodes: Nodes, granules: GranuleState
) -> Any:
    """Make an empty row hold the granules of the first ``count`` nodes found; returns how many its entries can name."""
    entries, previous = 0, -2
    for i in range(count):
        granule = nodes.granule[found[i]]
        joins = granule == previous + 1 and granule & 7 != 0
        if not joins:
            if entries == table.entries.shape[1]:
                count = i
                break
            entries += 1
        previous = granule
    held = 0
    for i in range(count):
        node = found[i]
        granule = nodes.granule[node]
        incref(nodes, granules, granule)
        nodes.num_uses[node] += 1
        held = _append_run(table, row, held, i, granule, 1, tier_of(granules, granule))
    table.info[row, NUM_ENTRIES] = held
    table.info[row, CAPACITY] = count
    table.info[row, LENGTH] = 8 * count
    table.chain[row] = found[count - 1] if count else ROOT
    table.origin[row, CHAIN_UID] = nodes.uid[found[count - 1]] if count else table.origin[row, ROOT_OF]
    table.scanned[row] = -1
    touch(table, row)
    return count


@jit
def shrink(
    table: BlockTable, row: int, keep: int, nodes: Nodes, granules: GranuleState, freed: Int32Array, num_freed: int
) -> Any:
    """Let go of a row's granules from ``keep`` on, last first. Returns the new number of ``freed`` granules."""
    count = table.info[row, NUM_ENTRIES]
    while count > 0 and table.info[row, CAPACITY] > keep:
        entry, first = table.entries[row, count - 1], table.starts[row, count - 1]
        stay = max(0, keep - first)
        for i in range(entry_length(entry) - 1, stay - 1, -1):
            num_freed = decref(nodes, granules, entry_granule(entry) + i, freed, num_freed)
        if stay > 0:
            table.entries[row, count - 1] = pack_entry(entry_granule(entry), stay, entry_tier(entry))
            table.info[row, CAPACITY] = first + stay
        else:
            count -= 1
            table.entries[row, count] = -1
            table.starts[row, count] = -1
            table.info[row, CAPACITY] = first
    table.info[row, NUM_ENTRIES] = count
    touch(table, row)
    return num_freed


@jit
def incref_first(table: BlockTable, row: int, keep: int, nodes: Nodes, granules: GranuleState) -> None:
    """Hold the first ``keep`` granules of a row once more."""
    e = 0
    while e < table.info[row, NUM_ENTRIES] and table.starts[row, e] < keep:
        for i in range(min(entry_length(table.entries[row, e]), keep - table.starts[row, e])):
            incref(nodes, granules, entry_granule(table.entries[row, e]) + i)
        e += 1


@jit
def copy_first(source_table: BlockTable, source: int, table: BlockTable, row: int, keep: int) -> None:
    """Copy the entries of another row's first ``keep`` granules, which are held already, into an empty row."""
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
    """Copy what a row knows of its tokens: length, place in the index, extra keys, tokens of the last granule."""
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
    """Take back what a row knows of its tokens to its first ``length``, which is not above what it holds."""
    if length == 0:  # whatever it held before
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
def list_chain(table: BlockTable, row: int, nodes: Nodes, out_nodes: Int32Array, out_uids: Int64Array) -> Any:
    """Write the index nodes of a row's full granules, in order; returns how many, 0 where the chain is broken."""
    node, uid = table.chain[row], table.origin[row, CHAIN_UID]
    if node < 0 or nodes.uid[node] != uid:
        return 0
    count = nodes.depth[node] + 1
    for i in range(count - 1, -1, -1):
        out_nodes[i], out_uids[i] = node, nodes.uid[node]
        node = nodes.parent[node]
    return count


@jit
def spare_end(table: BlockTable, row: int, keep: int, granules: GranuleState) -> Any:
    """How far the entry that ends a row's first ``keep`` granules may stay whole, as room to grow.

    Only over granules that no other row holds and that are not findable, since they will be overwritten.
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
    """`copy_first` and `copy_tokens` for many rows."""
    for i in range(len(sources)):
        copy_first(source_table, sources[i], table, targets[i], keeps[i])
        copy_tokens(source_table, sources[i], table, targets[i])


@jit
def incref_all(table: BlockTable, which: Int32Array, keeps: Int64Array, nodes: Nodes, granules: GranuleState) -> None:
    """`hold_first` for many rows."""
    for i in range(len(which)):
        incref_first(table, which[i], keeps[i], nodes, granules)


@jit
def empty_all(table: BlockTable, which: Int32Array, nodes: Nodes, granules: GranuleState, freed: Int32Array) -> Any:
    """Let go of everything that many rows hold; returns the number of ``freed`` granules."""
    num_freed = 0
    for row in which:
        num_freed = shrink(table, row, 0, nodes, granules, freed, num_freed)
    return num_freed


class Tails(NamedTuple):
    """Freshly allocated blocks for some of a list of rows: copies of what these rows may not share."""

    positions: Int32Array
    """Places in the list; one that stands several times gets its blocks in this order."""
    starts: Int32Array
    sizes: Int32Array


@jit
def attach_tails(table: BlockTable, granules: GranuleState, which: Int32Array, tails: Tails) -> None:
    """Append each block to its row, which has an entry left for it."""
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
    nodes: Nodes,
    granules: GranuleState,
    freed: Int32Array,
) -> Any:
    """Let each target hold what its source held instead of its own; returns the number of ``freed`` granules."""
    incref_all(source_table, sources, keeps, nodes, granules)
    num_freed = empty_all(table, targets, nodes, granules, freed)
    share_all(source_table, sources, table, targets, keeps)
    attach_tails(table, granules, targets, tails)
    return num_freed


@jit
def list_partial(
    table: BlockTable, which: Int32Array, lengths: Int64Array, positions: Int32Array, out: Int32Array
) -> Any:
    """Find the granules that would be partly filled at the given lengths.

    ``positions`` receives the places in ``which`` of the rows that have one, ``out`` the granules; returns how many.
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
    """Which rows would end inside a quantized tile at the given lengths; ``out``, filled in."""
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
    nodes: Nodes,
    granules: GranuleState,
    freed: Int32Array,
) -> Any:
    """Keep the first ``lengths[i]`` tokens of each row; returns the number of ``freed`` granules.

    Of a row with ``keeps[i]`` of at least 0 only so many granules stay; ``tails`` are copies of the others.
    """
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
                # the granule will be written again: what it holds must no longer be found
                num_freed = withdraw(nodes, granules, granule_at(table, row, length >> 3), freed, num_freed)
            end = spare_end(table, row, keep, granules)
            for index in range(keep, end):
                num_freed = withdraw(nodes, granules, granule_at(table, row, index), freed, num_freed)
            keep = end
            for index in range(length >> 3, keep):
                granules.copy[granule_at(table, row, index)] = 0  # written again, too
        num_freed = shrink(table, row, keep, nodes, granules, freed, num_freed)
        for tile in range((length + 63) >> 6, table.masses.shape[1]):
            table.masses[row, tile] = 0  # what comes there next has none yet
    attach_tails(table, granules, which, tails)
    return num_freed


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
    """Put the block ``target`` of 8 granules in place of a row's granules ``[end - 8, end)``, which are private.

    The caller has copied them, and frees them.
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
    touch(table, row)


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
    """`merge` for as many candidates as there are targets."""
    for i in range(len(targets)):
        merge_blocks(table, candidates[i], ends[i], targets[i], nodes, granules)


@jit
def close_rows(table: BlockTable, closing: Int32Array, nodes: Nodes, granules: GranuleState, freed: Int32Array) -> Any:
    """Let go of everything the rows hold and end their ids; returns the number of ``freed`` granules."""
    num_freed = 0
    for row in closing:
        num_freed = shrink(table, row, 0, nodes, granules, freed, num_freed)
        table.info[row, STATE] = CLOSED
    return num_freed


@jit
def preempt_rows(
    table: BlockTable, batch: Int32Array, forgets: bool, nodes: Nodes, granules: GranuleState, freed: Int32Array
) -> Any:
    """Let go of everything the rows hold until they are restored; returns the number of ``freed`` granules.

    ``forgets``: their tokens are gone, too, so that they have none.
    """
    num_freed = 0
    for row in batch:
        num_freed = shrink(table, row, 0, nodes, granules, freed, num_freed)
        table.info[row, STATE] = PREEMPTED
        if forgets:
            table.info[row, LENGTH] = 0
    return num_freed


@jit
def pin(table: BlockTable, which: Int32Array) -> Any:
    """Let a lease hold rows; returns its mark."""
    table.clock[1] += 1
    for row in which:
        table.info[row, STATE] = PINNED
        table.marks[row, OWNER] = table.clock[1]
    return table.clock[1]


@jit
def relocate(table: BlockTable, row: int, e: int, target: int, nodes: Nodes, granules: GranuleState) -> None:
    """Point an entry, whose granules are private, at a copy of them that begins at ``target``."""
    entry = table.entries[row, e]
    for i in range(entry_length(entry)):
        move_granule(nodes, granules, entry_granule(entry) + i, target + i)
    table.entries[row, e] = pack_entry(target, entry_length(entry), 0)
    touch(table, row)
