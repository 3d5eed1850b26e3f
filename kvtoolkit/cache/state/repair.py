"""Put a cache in order after a call that broke off: whatever it was doing, the rows hold what they held or will hold.

Rows and index change by compiled moves, which nothing interrupts, so they are the truth. All else follows from them:
reference counts, lists, and what the allocators have granted. Rows that the call had opened, and so nobody knows, are
closed; rows that it had put into a step that it did not return are open again. Steps, leases and blocks of others stay.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    CLOSED,
    IN_STEP,
    LENGTH,
    NUM_ENTRIES,
    OPEN,
    OWNER,
    PINNED,
    PREEMPTED,
    STATE,
    Rows,
    touch,
)
from kvtoolkit.cache.state.prefix_index import Granules, reindex
from kvtoolkit.cache.state.twins import find_twins
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, entry_granule, entry_length

if TYPE_CHECKING:
    from kvtoolkit.cache.state.cache_state import Sequences


@dataclass(frozen=True)
class Repairs:
    """What calls that broke off had left behind, and was put in order.

    Attributes:
        num_closed: sequences closed, since the call that opened them did not return, or their lease was lost.
        num_reopened: sequences taken out of steps that nobody can end any more, or preempted again.
        num_freed: granules that nobody held and that are free now.
        unresolved: a sentence for each allocator that was interrupted and cannot be rebuilt: what it holds for nobody
            stays lost.
    """

    num_closed: int = 0
    num_reopened: int = 0
    num_freed: int = 0
    unresolved: tuple[str, ...] = ()


def settle(sequences: "Sequences") -> None:
    """Put everything in order; may itself break off, and is done again then. The caller holds the lock.

    What it did is added to ``sequences.repairs``.
    """
    table, pool = sequences.rows, sequences.pool
    for mark, handle in list(sequences.handles.items()):
        if (found := handle()) is None or not found._is_open:
            sequences.handles.pop(mark)
    held = np.array(sorted(sequences.handles), np.int64)
    restores = sequences.calls.name == "restore"
    saved = np.array(sorted(sequences.preempted), np.int32)
    serial, opened = sequences.opened
    opened = opened if serial == sequences.calls.serial else opened[:0]
    num_closed, num_reopened = settle_rows(table, opened, held, saved, restores)
    states = table.info[:, STATE]
    sequences.preempted = {row: kept for row, kept in sequences.preempted.items() if states[row] == PREEMPTED}
    for row, kept in sequences.preempted.items():
        if kept.copies is None:
            table.info[row, LENGTH] = 0
    sequences.closed_rows = np.flatnonzero(states == CLOSED)[::-1].tolist()
    count_refs(table, pool.granules)
    reindex(pool.nodes, pool.granules)
    find_twins(table, np.flatnonzero(states != CLOSED).astype(np.int32), pool.nodes, pool.granules, pool.freed)
    owned = (pool.granules.refs > 0) | (pool.granules.node >= 0)
    pool.kept_back = [
        start for start in dict.fromkeys(pool.kept_back)
        if pool.ledger.granted[start] and not owned[start : start + MAX_BLOCK_GRANULES].any()
    ]  # fmt: skip
    for start in pool.kept_back:
        owned[start : start + MAX_BLOCK_GRANULES] = True
    num_freed = pool.ledger.settle(owned)
    pool.evictor.forget()
    before = sequences.repairs
    sequences.repairs = Repairs(
        before.num_closed + int(num_closed), before.num_reopened + int(num_reopened), before.num_freed + num_freed,
        tuple(pool.ledger.unresolved),
    )  # fmt: skip


def end_lost(sequences: "Sequences") -> None:
    """End the steps and leases that nobody refers to any more."""
    lost = [mark for mark, handle in sequences.handles.items() if handle() is None]
    if not lost:
        return
    end_handles(sequences, lost)


def end_handles(sequences: "Sequences", marks: list[int]) -> None:
    """Abort steps and leases: rows in steps are open again, those of leases are closed."""
    info = sequences.rows.info
    is_theirs = np.isin(sequences.rows.marks[:, OWNER], marks)
    pinned = np.flatnonzero(is_theirs & (info[:, STATE] == PINNED)).astype(np.int32)
    info[is_theirs & (info[:, STATE] == IN_STEP), STATE] = OPEN
    for mark in marks:
        handle = sequences.handles.pop(mark)()
        if handle is not None:
            handle._is_open = False
    if len(pinned):
        sequences.release_rows(pinned)


def close_left(sequences: "Sequences", seq_ids: Int64Array) -> None:
    """Close those of some sequences that are open or preempted still."""
    states = sequences.rows.info[:, STATE]
    which = np.flatnonzero((states == OPEN) | (states == PREEMPTED)).astype(np.int32)
    sequences.release_rows(which[np.isin(sequences.ids_of(which), seq_ids)])


def end_orphans(sequences: "Sequences", known: Int64Array) -> Int64Array:
    """See `KVCache.end_orphans`."""
    info = sequences.rows.info
    which = np.flatnonzero(info[:, STATE] != CLOSED).astype(np.int32)
    ids = sequences.ids_of(which)
    is_orphan = ~np.isin(ids, known)
    orphans = which[is_orphan]
    held = orphans[np.isin(info[orphans, STATE], (IN_STEP, PINNED))]
    end_handles(sequences, np.unique(sequences.rows.marks[held, OWNER]).tolist())
    sequences.release_rows(orphans[info[orphans, STATE] != CLOSED])
    return ids[is_orphan]


@jit
def settle_rows(rows: Rows, opened: Int32Array, held: Int64Array, saved: Int32Array, restores: bool) -> Any:
    """Bring the states of rows in line with what is known of them.

    Args:
        opened: rows of which nobody has the id.
        held: marks of the steps and leases that go on, ascending.
        saved: rows of which something is kept for their return.
        restores: whether these rows were just being brought back, if they are open; else they were just being saved.

    Returns:
        How many rows are closed now that were not, and how many are back in their state before the call.
    """
    num_closed, num_back = 0, 0
    for row in opened:
        if rows.info[row, STATE] != CLOSED:
            rows.info[row, STATE] = CLOSED
            num_closed += 1
    if restores:
        for row in saved:
            if rows.info[row, STATE] == OPEN:
                rows.info[row, STATE] = PREEMPTED
                num_back += 1
    for row in range(len(rows.info)):
        state = rows.info[row, STATE]
        if state in (IN_STEP, PINNED):
            owner = rows.marks[row, OWNER]
            at = np.searchsorted(held, owner)
            if at == len(held) or held[at] != owner:
                rows.info[row, STATE] = OPEN if state == IN_STEP else CLOSED
                num_closed += state == PINNED
                num_back += state == IN_STEP
        state = rows.info[row, STATE]
        if state in (CLOSED, PREEMPTED) and rows.info[row, NUM_ENTRIES] > 0:
            _empty(rows, row)
    return num_closed, num_back


@jit
def _empty(rows: Rows, row: int) -> None:
    """Let a row name nothing; reference counts are made anew afterwards."""
    for e in range(rows.info[row, NUM_ENTRIES]):
        rows.entries[row, e] = rows.starts[row, e] = -1
    rows.info[row, NUM_ENTRIES] = rows.info[row, CAPACITY] = 0
    touch(rows, row)


@jit
def count_refs(rows: Rows, granules: Granules) -> None:
    """Count how many rows hold each granule."""
    granules.refs[:] = 0
    for row in range(len(rows.info)):
        for e in range(rows.info[row, NUM_ENTRIES]):
            entry = rows.entries[row, e]
            for i in range(entry_length(entry)):
                granules.refs[entry_granule(entry) + i] += 1
