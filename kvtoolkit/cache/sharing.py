"""Forks, beams and truncation: rows that share full granules, and copies of the last, partly filled one.

Because a partly filled granule is copied when it is shared, no shared granule is ever written, and kernels need no
copy-on-write check.
"""

import numpy as np

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state import block_table
from kvtoolkit.cache.state.block_manager import Runs
from kvtoolkit.cache.state.block_table import LENGTH, NUM_ENTRIES, Rows, Tails
from kvtoolkit.cache.state.cache_state import Sequences
from kvtoolkit.errors import CacheFullError
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES


def fork(sequences: Sequences, parents: Int32Array, what: str) -> Int32Array:
    """New rows that hold what ``parents`` hold; CacheFullError, and nothing done, if there is no room."""
    sequences.require_closed_rows(len(parents), what)
    table, nodes, granules = sequences.rows, sequences.pool.nodes, sequences.pool.granules
    tails = _copy_tails(sequences, table, parents, table.info[parents, LENGTH], what)
    children = sequences.new_rows(len(parents), what)
    keeps = table.info[parents, LENGTH] >> 3
    block_table.hold_all(table, parents, keeps, nodes, granules)
    block_table.share_all(table, parents, table, children, keeps)
    block_table.attach_tails(table, granules, children, tails)
    sequences.note_use()
    return children


def reorder(sequences: Sequences, batch: Int32Array, origin: Int32Array) -> None:
    """Make row ``batch[i]`` hold what ``batch[origin[i]]`` holds; CacheFullError, and nothing done, without room."""
    changed = np.flatnonzero(origin != np.arange(len(batch)))
    if not len(changed):
        return
    # copies of the rows as they are: a parent may itself be overwritten
    before = _copy_of_rows(sequences.rows, batch)
    sources, targets = origin[changed], batch[changed]
    tails = _copy_tails(sequences, before, sources, before.info[sources, LENGTH], "reorder")
    pool, table = sequences.pool, sequences.rows
    sequences.tick()
    keeps = before.info[sources, LENGTH] >> 3
    pool.free_listed(
        block_table.reorder_all(before, sources, table, targets, keeps, tails, pool.nodes, pool.granules, pool.freed)
    )
    sequences.note_use()


def truncate(sequences: Sequences, batch: Int32Array, lengths: Int64Array) -> None:
    """Keep the first ``lengths[i]`` tokens of each row; CacheFullError, and nothing done, if a copy has no room."""
    pool, table = sequences.pool, sequences.rows
    cut = np.flatnonzero(block_table.cuts_quantized(table, batch, lengths, np.empty(len(batch), np.bool_)))
    hot = _dequantize(sequences, batch, cut, lengths)
    whole = lengths.copy()
    whole[cut] = 0  # no tail to copy
    positions, partial = np.empty(len(batch), np.int32), np.empty(len(batch), np.int32)
    count = block_table.list_partial(table, batch, whole, positions, partial)
    shared = positions[:count][pool.granules.refs[partial[:count]] > 1]
    try:
        tails = _copy_tails(sequences, table, batch[shared], lengths[shared], "truncate")
    except CacheFullError:
        pool.free_runs(list(zip(hot.starts.tolist(), hot.sizes.tolist(), strict=True)))
        raise
    tails = Tails(
        np.concatenate([shared[tails.positions], hot.positions]),
        np.concatenate([tails.starts, hot.starts]),
        np.concatenate([tails.sizes, hot.sizes]),
    )
    keeps = np.full(len(batch), -1, np.int64)
    keeps[shared], keeps[cut] = lengths[shared] >> 3, lengths[cut] >> 6 << 3
    sequences.tick()
    pool.free_listed(
        block_table.truncate_all(table, batch, lengths, keeps, tails, pool.nodes, pool.granules, pool.freed)
    )
    sequences.note_use()


def _dequantize(sequences: Sequences, batch: Int32Array, cut: Int64Array, lengths: Int64Array) -> Tails:
    """Hot copies of the tokens that rows keep of the quantized tile that their new length lies in; not attached yet."""
    pool, table = sequences.pool, sequences.rows
    sources, targets = np.empty((2, len(cut), MAX_BLOCK_GRANULES), np.int32)
    targets[:] = -1
    positions: list[int] = []
    made: Runs = []
    try:
        for i, position in enumerate(cut.tolist()):
            row, length = int(batch[position]), int(lengths[position])
            first, needed = length >> 6 << 3, -(-(length & 63) // 8)
            runs = pool.fit(needed)
            if runs is None:
                raise CacheFullError(
                    f"truncate: expected room for {needed} granules of a quantized tile in the hot tier, "
                    f"{pool.allocator.num_free} free, {pool.num_cached} cached"
                )
            made += runs
            positions += [position] * len(runs)
            used = int(block_table.find_entry(table, row, first))
            if used + len(runs) > table.entries.shape[1]:
                raise CacheFullError(f"truncate: expected rows of at most {table.entries.shape[1]} entries, got more")
            block = int(block_table.granule_at(table, row, first))
            sources[i] = np.arange(block, block + MAX_BLOCK_GRANULES)
            targets[i, :needed] = np.concatenate([np.arange(start, start + size) for start, size in runs])[:needed]
    except CacheFullError:
        pool.free_runs(made)
        raise
    if len(cut):
        sequences.convert(sources, targets, int((lengths[cut] & 63).sum()))
    sequences.counters.num_dequantized += len(cut)
    starts, sizes = np.array(made, np.int32).reshape(-1, 2).T.copy()
    return Tails(np.array(positions, np.int32), starts, sizes)


def _copy_tails(sequences: Sequences, source: Rows, parents: Int32Array, lengths: Int64Array, what: str) -> Tails:
    """Copy the granule of each parent that is partly filled at the given length, where there is one."""
    positions, partial = np.empty(len(parents), np.int32), np.empty(len(parents), np.int32)
    count = block_table.list_partial(source, parents, lengths, positions, partial)
    positions, partial = positions[:count], partial[:count]
    if not count:
        return Tails(positions, positions, positions)
    for i in positions:
        _require_entry(sequences, source, int(parents[i]), int(lengths[i]) >> 3, what)
    starts, sizes = sequences.pool.allocate_tails(count, what)
    sequences.copy(partial, starts, int((lengths[positions] & 7).sum()))
    return Tails(positions, starts, sizes)


def _require_entry(sequences: Sequences, source: Rows, row: int, keep: int, what: str) -> None:
    """One entry more must fit after a row's first ``keep`` granules."""
    most = sequences.rows.entries.shape[1]
    if keep < most:  # no entry is shorter than a granule
        return
    used = int(block_table.find_entry(source, row, keep - 1)) + 1
    if used >= most:
        raise CacheFullError(f"{what}: expected rows of at most {most - 1} entries (max_entries is {most}), got {used}")


def _copy_of_rows(table: Rows, which: Int32Array) -> Rows:
    width = int(table.info[which, NUM_ENTRIES].max(initial=0))
    return Rows(
        table.info[which],
        table.entries[which, :width],
        table.starts[which, :width],
        table.marks[which],
        table.chain[which],
        table.origin[which],
        table.pending[which],
        table.clock.copy(),
        table.scanned[which],
        table.masses[which],
        table.bar[which],
    )
