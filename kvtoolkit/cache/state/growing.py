"""The compiled passes of steps that the device drives: which blocks they will want, and what they have taken."""

from typing import Any, NamedTuple

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    LENGTH,
    NUM_ENTRIES,
    TAIL_BASE,
    TAIL_FIRST,
    BlockTable,
)
from kvtoolkit.cache.state.ledger import Flags, move
from kvtoolkit.cache.state.prefix_index import Holdings
from kvtoolkit.cache.state.row_sharing import Tails, reorder_all
from kvtoolkit.config.growth import split_into_blocks, tail_size


@jit
def choose_ahead(
    info: Int64Array, rows: Int32Array, limits: Int32Array, first: int, end: int, available: int, most: int,
    num_granules: int, rule: int, tail: int, largest: int, offered: Int32Array, capacities: Int64Array,
    sizes: Int32Array,
) -> Any:  # fmt: skip
    """Choose blocks as steps of one token for each row would, in the order in which they would ask.

    Args:
        limits: ``[batch]`` tokens at which a row ends.
        first, end: which steps, if no row has ended before.
        available: granules that are free or cached, by which growth policies decide.
        most: granules that can be had; it stops there, also in the middle of a row.
        capacities: ``[batch]`` granules that each row has room for by then; kept up to date.
        sizes: receives the sizes, in granules; it has room for 8 more than ``most``.

    Returns:
        ``(number of blocks, granules wanted)``. That is ``most`` if there is more to ask for, even where the next block
        would be larger than what is left: rows take smaller ones then.
    """
    count, total = 0, 0
    for step in range(first, end):
        for b in range(len(rows)):
            length = info[rows[b], LENGTH] + step
            if length >= limits[b] or length < 8 * capacities[b]:
                continue
            size = min(tail_size(rule, tail, length + 1, available / num_granules), largest, offered[0])
            end = split_into_blocks(1, size, largest, offered, sizes, count)
            for k in range(count, end):
                if total + sizes[k] > most:
                    return k, most
                total += sizes[k]
                available = max(available - sizes[k], 0)
                capacities[b] += sizes[k]
            count = end
    return count, total


@jit
def list_tails(info: Int64Array, rows: Int32Array, out: Int32Array) -> None:
    """Write granules, entries, first token of the last entry, and its slot minus its number, of each row."""
    for b in range(len(rows)):
        out[b, 0], out[b, 1] = info[rows[b], CAPACITY], info[rows[b], NUM_ENTRIES]
        out[b, 2], out[b, 3] = info[rows[b], TAIL_FIRST], info[rows[b], TAIL_BASE]


class Loan(NamedTuple):
    """The blocks that the device may take.

    Blocks come and go in compiled moves, together with the ledger's flags. So whenever a call breaks off, the blocks
    here are just those that the ledger counts as lent.
    """

    starts: Int32Array
    """``[most]`` first granules."""
    sizes: Int32Array
    """``[most]`` in granules."""
    number: Int64Array
    """``[1]`` how many there are."""


@jit
def lend(granted: Flags, callers: Flags, loan: Loan, starts: Int32Array, sizes: Int32Array) -> None:
    """Lend blocks that were just taken."""
    move(granted, callers, starts, sizes)
    count = loan.number[0]
    for i in range(len(starts)):
        loan.starts[count + i], loan.sizes[count + i] = starts[i], sizes[i]
    loan.number[0] = count + len(starts)


@jit
def take_back(granted: Flags, callers: Flags, loan: Loan, refs: Int32Array, out: Int32Array) -> Any:
    """End a loan; returns how many granules of it no row holds, and writes these to ``out``, for the caller to free."""
    count = loan.number[0]
    loan.number[0] = 0
    move(callers, granted, loan.starts[:count], loan.sizes[:count])
    num_left = 0
    for i in range(count):
        if refs[loan.starts[i]] == 0:
            for granule in range(loan.starts[i], loan.starts[i] + loan.sizes[i]):
                out[num_left] = granule
                num_left += 1
    return num_left


@jit
def settle_beams(
    granted: Flags, callers: Flags, loan: Loan, before: BlockTable, ancestors: Int32Array, table: BlockTable,
    rows: Int32Array, keeps: Int64Array, tails: Tails, holdings: Holdings, is_done: Flags,
) -> Any:  # fmt: skip
    """Let each row have the full granules of its ancestor, and then the copy that was lent for its last one.

    Args:
        before: copies of the rows, see `row_sharing.reorder_all`.
        ancestors: ``[batch]`` rows in ``before``.
        is_done: ``[1]``; if it is true, this was done before, in a call that broke off later: nothing happens. Nor
            does it if the copies were freed.

    Returns:
        The number of ``freed`` granules.
    """
    if is_done[0] or loan.number[0] < len(tails.starts):
        return 0
    is_done[0] = True
    move(callers, granted, loan.starts[: loan.number[0]], loan.sizes[: loan.number[0]])
    loan.number[0] = 0
    return reorder_all(before, ancestors, table, rows, keeps, tails, holdings)
