"""Put a cache in order after a call that broke off.

Rows and index change only by compiled moves, which nothing interrupts. So each row holds what it held before the call
or after it, and rows and index can be trusted. Everything else is derived from them: reference counts, lists, and what
the allocators have granted. Rows that the call had opened are closed, because nobody knows their ids. Rows that it had
put into a step without returning the step are open again. Steps, leases and blocks of others stay as they are.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state import prefix_windows
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    CLOSED,
    GENERATION,
    IN_STEP,
    LENGTH,
    NUM_ENTRIES,
    OPEN,
    OWNER,
    PINNED,
    PREEMPTED,
    STATE,
    BlockTable,
    touch,
)
from kvtoolkit.cache.state.prefix_index import NUM_SPARE, GranuleState, reindex
from kvtoolkit.cache.state.twins import find_twins
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, entry_granule, entry_length

if TYPE_CHECKING:
    from kvtoolkit.cache.state.cache_group import CacheGroup
    from kvtoolkit.cache.state.cache_state import CacheState


@dataclass(frozen=True)
class Repairs:
    """What was put in order after calls that broke off.

    Attributes:
        num_closed: sequences that were closed because the call that opened them did not return, or because nobody
            refers to their lease any more.
        num_reopened: sequences that were taken out of steps that nobody can end any more, or preempted again.
        num_freed: granules that nobody held, and that were freed.
        unresolved: a sentence for each allocator that was interrupted and cannot be rebuilt. The blocks that it granted
            to nobody stay lost.
    """

    num_closed: int = 0
    num_reopened: int = 0
    num_freed: int = 0
    unresolved: tuple[str, ...] = ()


def settle(state: "CacheState") -> None:
    """Put everything in order. If this breaks off too, it is done again. The caller holds the lock.

    What was done is added to ``state.repairs``.
    """
    table = state.group.table
    for mark, handle in list(state.handles.items()):
        if (found := handle()) is None or not found._is_open:
            state.handles.pop(mark)
    held = np.array(sorted(state.handles), np.int64)
    restores = state.calls.name == "restore"
    saved = np.array(sorted(state.preempted), np.int32)
    stays = np.zeros(len(table.info), np.bool_)
    stays[[row for row, kept in state.preempted.items() if kept.stays]] = True
    serial, opened = state.opened
    opened = opened if serial == state.calls.serial else opened[:0]
    num_closed, num_reopened = settle_rows(table, opened, held, saved, stays, restores)
    states = table.info[:, STATE]
    state.preempted = {row: kept for row, kept in state.preempted.items() if states[row] == PREEMPTED}
    for row, kept in state.preempted.items():
        if kept.copies is None and not kept.stays:
            table.info[row, LENGTH] = 0
    state.closed_rows = np.flatnonzero(states == CLOSED)[::-1].tolist()
    state.retained = {row: until for row, until in state.retained.items() if states[row] != CLOSED}
    for group in state.others:
        follow_all(table, group.table)
    num_freed = sum(_settle_group(group, state.group) for group in state.groups)
    state.num_spare = int(state.group.blocks.nodes.counts[NUM_SPARE])
    unresolved = [sentence for group in state.groups for sentence in group.blocks.ledger.unresolved]
    before = state.repairs
    state.repairs = Repairs(
        before.num_closed + int(num_closed), before.num_reopened + int(num_reopened), before.num_freed + num_freed,
        tuple(unresolved),
    )  # fmt: skip


def _settle_group(group: "CacheGroup", lead: "CacheGroup") -> int:
    """Derive from its rows what a group knows of its granules; returns how many granules were freed."""
    blocks = group.blocks
    for forget in group.forgets:
        forget()
    blocks.arriving = set()
    rebuild_index(group, lead)
    owned = (blocks.granules.refs > 0) | (blocks.granules.node >= 0)
    blocks.reserve = [
        start for start in dict.fromkeys(blocks.reserve)
        if blocks.ledger.granted[start] and not owned[start : start + MAX_BLOCK_GRANULES].any()
    ]  # fmt: skip
    for start in blocks.reserve:
        owned[start : start + MAX_BLOCK_GRANULES] = True
    num_freed = blocks.ledger.settle(owned)
    blocks.evictor.forget()
    return num_freed


def rebuild_index(group: "CacheGroup", lead: "CacheGroup") -> None:
    """Rebuild what follows from a group's rows and the nodes of its index; that of the first group, ``lead``, first."""
    blocks = group.blocks
    count_refs(group.table, blocks.granules)
    if group is not lead:
        prefix_windows.drop_lost(lead.blocks.nodes, blocks.nodes)
    reindex(blocks.nodes, blocks.granules)
    publish_again(group, lead)


def publish_again(group: "CacheGroup", lead: "CacheGroup") -> None:
    """After `reindex` find the twins in a group, and publish what its rows hold of prefixes that ``lead`` knows."""
    rows = np.flatnonzero(group.table.info[:, STATE] != CLOSED).astype(np.int32)
    if group is lead:
        find_twins(group.table, rows, group.blocks.holdings)
    else:
        prefix_windows.publish_chain(lead.table, lead.blocks.nodes, rows, group.table, group.blocks.holdings)


def end_lost(state: "CacheState") -> None:
    """End the steps and leases that nobody refers to any more."""
    lost = [mark for mark, handle in state.handles.items() if handle() is None]
    if not lost:
        return
    end_handles(state, lost)


def end_handles(state: "CacheState", marks: list[int]) -> None:
    """Abort steps and leases: rows in steps are open again, those of leases are closed."""
    info = state.group.table.info
    is_theirs = np.isin(state.group.table.marks[:, OWNER], marks)
    pinned = np.flatnonzero(is_theirs & (info[:, STATE] == PINNED)).astype(np.int32)
    info[is_theirs & (info[:, STATE] == IN_STEP), STATE] = OPEN
    state.follow(np.flatnonzero(is_theirs).astype(np.int32))
    for mark in marks:
        handle = state.handles.pop(mark)()
        if handle is not None:
            handle._is_open = False
    if len(pinned):
        state.release_rows(pinned)


def close_left(state: "CacheState", seq_ids: Int64Array) -> None:
    """Close those of the sequences that are still open or preempted."""
    states = state.group.table.info[:, STATE]
    which = np.flatnonzero((states == OPEN) | (states == PREEMPTED)).astype(np.int32)
    state.release_rows(which[np.isin(state.ids_of(which), seq_ids)])


def end_orphans(state: "CacheState", known: Int64Array) -> Int64Array:
    """See `KVCache.end_orphans`."""
    info = state.group.table.info
    which = np.flatnonzero(info[:, STATE] != CLOSED).astype(np.int32)
    ids = state.ids_of(which)
    is_orphan = ~np.isin(ids, known)
    orphans = which[is_orphan]
    held = orphans[np.isin(info[orphans, STATE], (IN_STEP, PINNED))]
    end_handles(state, np.unique(state.group.table.marks[held, OWNER]).tolist())
    state.release_rows(orphans[info[orphans, STATE] != CLOSED])
    return ids[is_orphan]


@jit
def settle_rows(
    table: BlockTable, opened: Int32Array, held: Int64Array, saved: Int32Array, stays: NDArray[np.bool_], restores: bool
) -> Any:
    """Bring the states of rows in line with what is known of them.

    Args:
        opened: rows whose ids nobody has.
        held: marks of the steps and leases that go on, ascending.
        saved: rows for which `CacheState.preempted` has something.
        stays: ``[max_seqs]`` which of them keep their entries while they are preempted.
        restores: whether the call that broke off was `restore`. Then open rows among ``saved`` become preempted again;
            otherwise they were being preempted, and stay open.

    Returns:
        How many rows were closed, and how many went back to their state before the call.
    """
    num_closed, num_back = 0, 0
    for row in opened:
        if table.info[row, STATE] != CLOSED:
            table.info[row, STATE] = CLOSED
            num_closed += 1
    if restores:
        for row in saved:
            if table.info[row, STATE] == OPEN:
                table.info[row, STATE] = PREEMPTED
                num_back += 1
    for row in range(len(table.info)):
        state = table.info[row, STATE]
        if state in (IN_STEP, PINNED):
            owner = table.marks[row, OWNER]
            at = np.searchsorted(held, owner)
            if at == len(held) or held[at] != owner:
                table.info[row, STATE] = OPEN if state == IN_STEP else CLOSED
                num_closed += state == PINNED
                num_back += state == IN_STEP
        state = table.info[row, STATE]
        is_empty = state == CLOSED or (state == PREEMPTED and not stays[row])
        if is_empty and table.info[row, CAPACITY] > 0:
            _empty(table, row)
    return num_closed, num_back


@jit
def follow_all(lead: BlockTable, table: BlockTable) -> None:
    """Bring the rows of another group in line with those of the first one.

    A call may have broken off when only some groups had changed. No row then has more tokens than room here, because
    room is made before lengths advance, and rows that become shorter do so in all groups at once.
    """
    for row in range(len(table.info)):
        for column in (GENERATION, STATE, LENGTH):
            table.info[row, column] = lead.info[row, column]
        if table.info[row, STATE] in (CLOSED, PREEMPTED) and table.info[row, CAPACITY] > 0:
            _empty(table, row)


@jit
def _empty(table: BlockTable, row: int) -> None:
    """Remove all entries of a row; the caller counts references again afterwards."""
    for e in range(table.info[row, NUM_ENTRIES]):
        table.entries[row, e] = table.starts[row, e] = -1
    table.info[row, NUM_ENTRIES] = table.info[row, CAPACITY] = 0
    touch(table, row)


@jit
def count_refs(table: BlockTable, granules: GranuleState) -> None:
    """Count how many rows hold each granule."""
    granules.refs[:] = 0
    for row in range(len(table.info)):
        for e in range(table.info[row, NUM_ENTRIES]):
            entry = table.entries[row, e]
            for i in range(entry_length(entry)):
                granules.refs[entry_granule(entry) + i] += 1
