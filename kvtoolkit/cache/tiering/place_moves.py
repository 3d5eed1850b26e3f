"""The compiled passes of moves between places: device memory and pinned host memory.

What moves is a superblock, 8 aligned granules, with all that is held or cached in it. Entries never reach over the end
of a superblock, so a move changes the granule numbers in entries and nothing else: no entry is cut, and the rows that
share a granule need not be looked for. The tokens keep their format, so where they are changes no result.

    heat of a superblock == the highest one of what it holds; the coldest moves first
    heat of a cached granule == when a row last let go of it, by the clock of the index
    heat of what a sleeping or preempted row holds == since when it sleeps, by the same clock
    heat of what any other row holds == 2 * AWAKE - tokens between it and the row's end, or where a predictor has scored
                                        its tile, AWAKE * (1 + score), the score cut to [0, 1]
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import (
    CLOSED,
    IN_STEP,
    LAST_MARK,
    LENGTH,
    NUM_ENTRIES,
    OPEN,
    OWNER,
    PREEMPTED,
    STATE,
    BlockTable,
    touch,
)
from kvtoolkit.cache.state.ledger import Flags
from kvtoolkit.cache.state.prefix_index import GranuleState, Holdings, move_granule, note_let_go
from kvtoolkit.formats.entry import entry_granule, entry_length, entry_tier, pack_entry

AWAKE = 2.0**51
"""Above every heat of what no row that is awake holds, and below every other one."""
EMPTY, FIXED = -np.inf, np.inf
"""Heats of a superblock in which there is nothing to move, and of one that must stay where it is."""


class Span(NamedTuple):
    """The superblocks of a pool, and what is known of them."""

    first: int
    """The pool's first superblock: its granule number / 8."""
    heat: NDArray[np.float64]
    """``[n]`` see above."""
    num_owned: Int32Array
    """``[n]`` granules that are held or cached."""


@jit
def measure(
    table: BlockTable, holdings: Holdings, granted: Flags, callers: Flags, asleep: NDArray[np.float64],
    scores: NDArray[np.float32], pinned: int, hot: int, span: Span,
) -> None:  # fmt: skip
    """Fill in the heat of every superblock of a pool.

    Args:
        asleep: ``[max_seqs]`` when each row fell asleep, by the clock of the index; negative: it is awake.
        scores: ``[max_seqs, num_tiles]`` of a predictor, NaN where it knows nothing; or ``[0, 0]``.
        pinned, hot: tokens at the beginning and at the end of a row that is awake which stay where they are.
    """
    nodes, granules, _ = holdings
    for i in range(len(span.heat)):
        heat, count = EMPTY, 0
        for granule in range(8 * (span.first + i), 8 * (span.first + i) + 8):
            if granules.refs[granule] > 0:
                count += 1
            elif granules.node[granule] >= 0:
                count += 1
                heat = max(heat, float(nodes.last_used[granules.node[granule]]))
            elif granted[granule] or callers[granule]:
                heat = FIXED  # kept back, lent, or on its way
        span.heat[i], span.num_owned[i] = heat, count
    for row in range(len(table.info)):
        if table.info[row, STATE] != CLOSED:
            _warm_up(table, row, asleep[row], scores, pinned, hot, span)


@jit
def _warm_up(
    table: BlockTable, row: int, asleep: float, scores: NDArray[np.float32], pinned: int, hot: int, span: Span
) -> None:  # fmt: skip
    """Raise the heat of the superblocks that a row holds to what it needs."""
    length, may_move = table.info[row, LENGTH], may_be_moved(table, row)
    is_preempted = table.info[row, STATE] == PREEMPTED
    for e in range(table.info[row, NUM_ENTRIES]):
        i = (entry_granule(table.entries[row, e]) >> 3) - span.first
        if i < 0 or i >= len(span.heat):
            continue
        begin = 8 * table.starts[row, e]
        end = begin + 8 * entry_length(table.entries[row, e])
        if not may_move or (end > length and not is_preempted):  # what is not full will be written
            heat = FIXED
        elif asleep >= 0 or is_preempted:  # if it does not sleep, its preemption broke off: it is colder than all
            heat = asleep
        elif begin < pinned or length - end < hot:
            heat = FIXED
        elif len(scores) > 0 and not np.isnan(scores[row, begin >> 6]):
            heat = AWAKE * (1 + min(max(float(scores[row, begin >> 6]), 0.0), 1.0))
        else:
            heat = 2 * AWAKE - (length - end)
        span.heat[i] = max(span.heat[i], heat)


@jit
def may_be_moved(table: BlockTable, row: int) -> Any:
    """Whether a row is in no step and no lease, or in the step that begins just now, whose table nobody has read."""
    state = table.info[row, STATE]
    if state in (OPEN, PREEMPTED):
        return True
    return state == IN_STEP and table.marks[row, OWNER] == table.clock[LAST_MARK]


@jit
def list_superblocks(table: BlockTable, rows: Int32Array, first: int, seen: NDArray[np.bool_], out: Int32Array) -> Any:
    """List the superblocks of a pool that rows hold, each once, the oldest tokens of each row first.

    Args:
        first: first superblock of the pool; ``seen``: ``[n]`` False, one for each of them.

    Returns:
        How many there are.
    """
    count = 0
    for row in rows:
        for e in range(table.info[row, NUM_ENTRIES]):
            i = (entry_granule(table.entries[row, e]) >> 3) - first
            if 0 <= i < len(seen) and not seen[i]:
                seen[i] = True
                out[count] = first + i
                count += 1
    return count


@jit
def stamp(granules: GranuleState, sources: Int32Array, next_number: int, stamps: Int64Array) -> Any:
    """Note what is in superblocks now: ``stamps[i, k]`` is -1 where nothing is, else `GranuleState.copy`.

    That number says for as long as it stays that the tokens are the same; granules without one get the next one.
    Returns the number after the last.
    """
    for i in range(len(sources)):
        for k in range(8):
            granule = 8 * sources[i] + k
            stamps[i, k] = -1
            if granules.refs[granule] > 0 or granules.node[granule] >= 0:
                if granules.copy[granule] == 0:
                    granules.copy[granule] = next_number
                    next_number += 1
                stamps[i, k] = granules.copy[granule]
    return next_number


@jit
def are_unchanged(granules: GranuleState, sources: Int32Array, stamps: Int64Array, out: NDArray[np.bool_]) -> None:
    """Say of which superblocks all that is in them now is what was in them when `stamp` was called."""
    for i in range(len(sources)):
        out[i] = True
        for k in range(8):
            granule = 8 * sources[i] + k
            if granules.refs[granule] > 0 or granules.node[granule] >= 0:
                out[i] = out[i] and stamps[i, k] == granules.copy[granule]


@jit
def relocate(
    table: BlockTable, holdings: Holdings, sources: Int32Array, targets: Int32Array, places: Int32Array
) -> Any:
    """Let everything that is held or cached in superblocks be in others, to which the caller has copied the tokens.

    Args:
        targets: all granules of them are granted, and nobody holds any.
        places: scratch, ``[num_superblocks]`` -1, and so again afterwards.

    Returns:
        The number of ``freed`` granules: those of the sources, and those of targets that nothing came to.
    """
    nodes, granules, freed = holdings
    for i in range(len(sources)):
        places[sources[i]] = targets[i]
    for row in range(len(table.info)):
        has_changed = False
        for e in range(table.info[row, NUM_ENTRIES]):
            entry = table.entries[row, e]
            granule = entry_granule(entry)
            place = places[granule >> 3]
            if place >= 0:
                table.entries[row, e] = pack_entry(8 * place + (granule & 7), entry_length(entry), entry_tier(entry))
                has_changed = True
        if has_changed:
            touch(table, row)
    num_freed = 0
    for i in range(len(sources)):
        places[sources[i]] = -1
        for k in range(8):
            source, target = 8 * sources[i] + k, 8 * targets[i] + k
            is_held, is_cached = granules.refs[source] > 0, granules.node[source] >= 0
            freed[num_freed] = source if is_held or is_cached else target
            num_freed += 1
            if is_held or is_cached:
                move_granule(nodes, granules, source, target)
            if is_cached and not is_held:
                note_let_go(granules, target)
    return num_freed
