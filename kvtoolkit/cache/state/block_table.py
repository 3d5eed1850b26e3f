"""The block table, one row per sequence, and the compiled moves on single rows.

    info[s, CAPACITY] == starts of the last entry + its length  (granules; where the row ends)
    info[s, LENGTH] <= 8 * info[s, CAPACITY]                    (tokens)
    starts[s, e + 1] == starts[s, e] + length of entries[s, e];  starts[s, 0] == 0

In a group of layers with a window ``starts[s, 0]`` is the first granule that the row still holds; a row that holds none
has no entries, and goes on at CAPACITY.

    info[s, TAIL_FIRST] == 8 * starts of the last entry         (tokens)
    info[s, TAIL_BASE] + p == slot of position p >= TAIL_FIRST

Each row has one cache line of figures (`info`). For most rows a decode step reads nothing else, which is what keeps a
step of thousands of rows cheap.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.prefix_index import (
    HELD,
    ROOT,
    GranuleState,
    Holdings,
    Nodes,
    decref,
    incref,
    pool_of,
    tier_of,
)
from kvtoolkit.formats.entry import entry_granule, entry_length, entry_tier, pack_entry

# columns of `info`
GENERATION, STATE, LENGTH, CAPACITY, NUM_ENTRIES, STAMP, TAIL_BASE, TAIL_FIRST = range(8)
# columns of `marks`
NAMED, OWNER = range(2)
# columns of `origin`
CHAIN_UID, ROOT_OF, FIRST_EXTRA, END_EXTRA = range(4)
# columns of `clock`
LAST_STAMP, LAST_MARK, VERSION = range(3)
# values of STATE
CLOSED, OPEN, IN_STEP, PREEMPTED, PINNED = range(5)
STATE_NAMES = ("closed", "open", "in a step", "preempted", "pinned")

ID_BITS = 20
"""Low bits of a sequence id, which are its row. The generation is above them, so no id is ever used twice."""

# what `check_ids` and `step_passes.begin` may find wrong
BAD_ID, BAD_STATE, BAD_TWICE, BAD_COUNT = 1, 2, 3, 4


class BlockTable(NamedTuple):
    """The rows of all sequences: their blocks, and what is known of their tokens."""

    info: Int64Array
    """``[max_seqs, 8]``, columns above. STAMP changes whenever the entries do."""
    entries: Int32Array
    """``[max_seqs, max_entries]``, -1 beyond the last one."""
    starts: Int32Array
    """``[max_seqs, max_entries]`` first logical granule of each entry; -1 beyond the last one."""
    marks: Int64Array
    """``[max_seqs, 2]``, columns above: the last call that named the row, by which an id given twice is found; the step
    or lease that holds the row while STATE is IN_STEP or PINNED. Every call has a mark of its own."""
    chain: Int32Array
    """``[max_seqs]`` node of the last full granule in the prefix index, or ROOT or BROKEN."""
    origin: Int64Array
    """``[max_seqs, 4]``, columns above: the uid of the node in `chain`, which tells whether that is still the same node
    (at ROOT the uid of the root); the uid of the root of the row's salt; where its extra keys begin and end in
    `Identities.extras`."""
    pending: Int64Array
    """``[max_seqs, 8]`` tokens of the last, partly filled granule."""
    clock: Int64Array
    """``[3]``, columns above: the last stamp given to a changed row; the last mark given to a call; the version of what
    rows have in common, see `touch`."""
    scanned: Int32Array
    """``[max_seqs]`` full tiles of the row when all its tiles were last found in the right tier; -1 = never."""
    masses: NDArray[np.float32]
    """``[max_seqs, num_tiles]`` recent share of attention of each tile; for demotion by mass."""
    bar: NDArray[np.float64]
    """``[max_seqs, 2]`` mass and tile of the lightest tile that may stay warm; for demotion by mass."""


class RowTable(NamedTuple):
    """What beginning a step needs of a `BlockTable`, with the same names. It has few arrays, because each of them costs
    time at every call of compiled code."""

    info: Int64Array
    entries: Int32Array
    starts: Int32Array
    marks: Int64Array
    clock: Int64Array

    @classmethod
    def of(cls, table: BlockTable) -> "RowTable":
        """Views of a table's arrays."""
        return cls(table.info, table.entries, table.starts, table.marks, table.clock)


AnyTable = BlockTable | RowTable


def make_block_table(max_seqs: int, max_entries: int, num_tiles: int = 0) -> BlockTable:
    """A table of closed rows, with room for the masses of ``num_tiles`` tiles in each."""
    return BlockTable(
        info=np.zeros((max_seqs, 8), np.int64),
        entries=np.full((max_seqs, max_entries), -1, np.int32),
        starts=np.full((max_seqs, max_entries), -1, np.int32),
        marks=np.zeros((max_seqs, 2), np.int64),
        chain=np.full(max_seqs, ROOT, np.int32),
        origin=np.zeros((max_seqs, 4), np.int64),
        pending=np.zeros((max_seqs, 8), np.int64),
        clock=np.zeros(3, np.int64),
        scanned=np.full(max_seqs, -1, np.int32),
        masses=np.zeros((max_seqs, num_tiles), np.float32),
        bar=np.zeros((max_seqs, 2), np.float64),
    )


@jit
def check_ids(table: BlockTable, ids: Int64Array, states: int, out: Int32Array) -> Any:
    """Write the row of every id to ``out``; returns ``(0, 0)``, or what is wrong and where. Changes only marks.

    Bit ``s`` of ``states`` says whether rows in state ``s`` are accepted.
    """
    table.clock[LAST_MARK] += 1
    mark = table.clock[LAST_MARK]
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
def attach(table: BlockTable, granules: GranuleState, row: int, starts: Int32Array, sizes: Int32Array) -> Any:
    """Append freshly allocated blocks to a row. Returns False, with nothing changed, if it has too few entries left."""
    count, capacity = table.info[row, NUM_ENTRIES], table.info[row, CAPACITY]
    if count + _entries_needed(table, row, starts, sizes) > table.entries.shape[1]:
        return False
    for k in range(len(starts)):
        for granule in range(starts[k], starts[k] + sizes[k]):
            granules.refs[granule], granules.copy[granule] = 1, 0
        tier = tier_of(granules, starts[k])
        granules.cached[HELD + pool_of(granules, starts[k])] += sizes[k]
        count = _append_run(table, row, count, capacity, starts[k], sizes[k], tier)
        capacity += sizes[k]
    table.info[row, NUM_ENTRIES], table.info[row, CAPACITY] = count, capacity
    touch_private(table, row)
    return True


@jit
def _joins(entry: int, start: int, size: int) -> Any:
    """Whether a run continues an entry within one superblock, so that one entry can hold both."""
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
    """Add a run at logical granule ``capacity``, to the last entry if it continues it; returns the entry count."""
    if count > 0 and _joins(table.entries[row, count - 1], start, size):
        entry = table.entries[row, count - 1]
        table.entries[row, count - 1] = pack_entry(entry_granule(entry), entry_length(entry) + size, tier)
        return count
    table.entries[row, count] = pack_entry(start, size, tier)
    table.starts[row, count] = capacity
    return count + 1


@jit
def touch(table: AnyTable, row: int) -> None:
    """Give a row whose entries have changed a new stamp, update its tail, and advance the version.

    While the version stays, the same rows have the same beginnings in common; `kvtoolkit.cache.state.shared_reads`
    relies on it.
    """
    table.clock[VERSION] += 1
    touch_private(table, row)


@jit
def touch_private(table: AnyTable, row: int) -> None:
    """`touch` where only granules were added, moved or let go that no other row holds: the version stays."""
    table.clock[LAST_STAMP] += 1
    table.info[row, STAMP] = table.clock[LAST_STAMP]
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
def find_entry(table: AnyTable, row: int, granule: int) -> Any:
    """The entry that holds a logical granule below the row's capacity."""
    return entry_that_holds(table.starts, row, table.info[row, NUM_ENTRIES], granule)


@jit
def entry_that_holds(starts: Int32Array, row: int, num_entries: int, granule: int) -> Any:
    """`find_entry` in block starts ``[rows, entries]``."""
    low, high = 0, num_entries - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if starts[row, middle] <= granule:
            low = middle
        else:
            high = middle - 1
    return low


@jit
def first_held(table: AnyTable, row: int) -> Any:
    """The first logical granule that a row holds, or will hold next."""
    return table.starts[row, 0] if table.info[row, NUM_ENTRIES] > 0 else table.info[row, CAPACITY]


@jit
def granule_at(table: BlockTable, row: int, granule: int) -> Any:
    """The granule that a row holds at a logical granule."""
    e = find_entry(table, row, granule)
    return entry_granule(table.entries[row, e]) + granule - table.starts[row, e]


@jit
def list_granules(table: BlockTable, row: int, count: int, out: Int32Array) -> None:
    """Write the first ``count`` granules that a row holds to ``out``."""
    written, e = 0, 0
    while written < count:
        granule = entry_granule(table.entries[row, e])
        for i in range(min(entry_length(table.entries[row, e]), count - written)):
            out[written + i] = granule + i
        written += entry_length(table.entries[row, e])
        e += 1


@jit
def fill_in(table: BlockTable, which: Int32Array, filled: NDArray[np.int8]) -> None:
    """Write to ``filled`` how many tokens are in each granule of some rows; for a shared one, the largest number."""
    for row in which:
        left = table.info[row, LENGTH] - 8 * first_held(table, row)
        for e in range(table.info[row, NUM_ENTRIES]):
            granule = entry_granule(table.entries[row, e])
            for i in range(entry_length(table.entries[row, e])):
                filled[granule + i] = max(filled[granule + i], min(max(left, 0), 8))
                left -= 8


@jit
def attach_prefix(
    table: BlockTable, row: int, found: Int32Array, count: int, nodes: Nodes, granules: GranuleState
) -> Any:
    """Let an empty row hold the granules of the first ``count`` nodes found, or as many as fit; returns how many."""
    count = fitting(nodes, found, 0, count, table.entries.shape[1])
    hold_found(table, row, found, 0, count, nodes, granules)
    table.chain[row] = found[count - 1] if count else ROOT
    table.origin[row, CHAIN_UID] = nodes.uid[found[count - 1]] if count else table.origin[row, ROOT_OF]
    return count


@jit
def fitting(nodes: Nodes, found: Int32Array, first: int, count: int, most: int) -> Any:
    """The end, at most ``count``, up to which the granules of nodes found, from ``first`` on, fit into a row.

    ``most`` is the number of entries that a row has.
    """
    entries, previous = 0, -2
    for i in range(first, count):
        granule = nodes.granule[found[i]]
        joins = granule == previous + 1 and granule & 7 != 0
        if not joins:
            if entries == most:
                return i
            entries += 1
        previous = granule
    return count


@jit
def hold_found(
    table: BlockTable, row: int, found: Int32Array, first: int, count: int, nodes: Nodes, granules: GranuleState
) -> None:
    """Let an empty row be ``count`` granules long, and hold those of the nodes found from ``first`` on; they fit."""
    held = 0
    for i in range(first, count):
        node = found[i]
        granule = nodes.granule[node]
        incref(granules, granule)
        nodes.num_uses[node] += 1
        held = _append_run(table, row, held, i, granule, 1, tier_of(granules, granule))
    table.info[row, NUM_ENTRIES] = held
    table.info[row, CAPACITY] = count
    table.info[row, LENGTH] = 8 * count
    table.scanned[row] = -1
    touch(table, row)


@jit
def shrink(table: BlockTable, row: int, keep: int, holdings: Holdings, num_freed: int) -> Any:
    """Let go of a row's granules from ``keep`` on, last first; returns the new length of ``freed``."""
    count, was_shared = table.info[row, NUM_ENTRIES], False
    while count > 0 and table.info[row, CAPACITY] > keep:
        entry, first = table.entries[row, count - 1], table.starts[row, count - 1]
        stay = max(0, keep - first)
        for i in range(entry_length(entry) - 1, stay - 1, -1):
            num_freed = decref(holdings, entry_granule(entry) + i, num_freed)
            was_shared = was_shared or holdings.granules.refs[entry_granule(entry) + i] > 0
        if stay > 0:
            table.entries[row, count - 1] = pack_entry(entry_granule(entry), stay, entry_tier(entry))
            table.info[row, CAPACITY] = first + stay
        else:
            count -= 1
            table.entries[row, count] = -1
            table.starts[row, count] = -1
            table.info[row, CAPACITY] = first
    table.info[row, NUM_ENTRIES] = count
    if keep == 0:
        table.info[row, CAPACITY] = 0
    if was_shared:
        touch(table, row)
    else:
        touch_private(table, row)
    return num_freed


@jit
def follow(lead: BlockTable, table: BlockTable, which: Int32Array) -> None:
    """Give rows of another group the ids, states and lengths that they have in the first one."""
    for row in which:
        for column in (GENERATION, STATE, LENGTH):
            table.info[row, column] = lead.info[row, column]


@jit
def list_chain(table: BlockTable, row: int, nodes: Nodes, out_nodes: Int32Array, out_uids: Int64Array) -> Any:
    """Write the nodes of a row's full granules, in order; returns how many, or 0 if the chain is broken."""
    node, uid = table.chain[row], table.origin[row, CHAIN_UID]
    if node < 0 or nodes.uid[node] != uid:
        return 0
    count = nodes.depth[node] + 1
    for i in range(count - 1, -1, -1):
        out_nodes[i], out_uids[i] = node, nodes.uid[node]
        node = nodes.parent[node]
    return count


@jit
def close_rows(table: BlockTable, closing: Int32Array, holdings: Holdings) -> Any:
    """Let go of everything the rows hold and end their ids; returns the number of ``freed`` granules."""
    num_freed = 0
    for row in closing:
        num_freed = shrink(table, row, 0, holdings, num_freed)
        table.info[row, STATE] = CLOSED
    return num_freed


@jit
def preempt_rows(table: BlockTable, batch: Int32Array, forgets: bool, holdings: Holdings) -> Any:
    """Let go of everything the rows hold until they are restored; returns the number of ``freed`` granules.

    ``forgets`` says whether their tokens are forgotten too, so that their lengths become 0.
    """
    num_freed = 0
    for row in batch:
        num_freed = shrink(table, row, 0, holdings, num_freed)
        table.info[row, STATE] = PREEMPTED
        if forgets:
            table.info[row, LENGTH] = 0
    return num_freed


@jit
def sleep_rows(table: BlockTable, batch: Int32Array, unit: int, holdings: Holdings) -> Any:
    """Let rows be preempted that keep what they hold, except room to grow; returns the number of ``freed`` granules.

    They keep the rest of the ``unit`` aligned granules in which they end, as far as one entry has them.
    """
    num_freed = 0
    for row in batch:
        keep = (table.info[row, LENGTH] + 7) >> 3
        if keep > 0:
            e = find_entry(table, row, keep - 1)
            end = entry_granule(table.entries[row, e]) - table.starts[row, e] + keep
            room = (end + unit - 1) // unit * unit - end
            keep = min(keep + room, table.starts[row, e] + entry_length(table.entries[row, e]))
        num_freed = shrink(table, row, keep, holdings, num_freed)
        table.info[row, STATE] = PREEMPTED
    return num_freed


@jit
def wake_rows(table: BlockTable, batch: Int32Array, granules: GranuleState) -> None:
    """Open preempted rows that have kept what they hold.

    They will write their last granules again, so nothing is a copy of these any more, and no move of them that is under
    way may be finished.
    """
    for row in batch:
        for index in range(table.info[row, LENGTH] >> 3, table.info[row, CAPACITY]):
            granules.copy[granule_at(table, row, index)] = 0
        table.info[row, STATE] = OPEN
        table.scanned[row] = -1


@jit
def pin(table: BlockTable, which: Int32Array) -> Any:
    """Let a lease hold rows; returns the mark of the lease."""
    table.clock[LAST_MARK] += 1
    for row in which:
        table.info[row, STATE] = PINNED
        table.marks[row, OWNER] = table.clock[LAST_MARK]
    return table.clock[LAST_MARK]
