"""Forks, beams and truncation: rows that share full granules, and copies of the last, partly filled one.

Because a partly filled granule is copied when it is shared, no shared granule is ever written, and kernels need no
copy-on-write check.
"""

from dataclasses import dataclass

import numpy as np

from kvtoolkit import rows
from kvtoolkit.errors import CacheFullError
from kvtoolkit.pool import Runs
from kvtoolkit.prefix import Int32Array, Int64Array
from kvtoolkit.rows import LENGTH, NUM_ENTRIES, Rows
from kvtoolkit.sequences import Sequences
from kvtoolkit.tables import MAX_BLOCK_GRANULES


def fork(sequences: Sequences, parents: Int32Array, what: str) -> Int32Array:
    """New rows that hold what ``parents`` hold; CacheFullError, and nothing done, if there is no room."""
    sequences.require_closed_rows(len(parents), what)
    table, nodes, granules = sequences.rows, sequences.pool.nodes, sequences.pool.granules
    tails = _copy_tails(sequences, table, parents, table.info[parents, LENGTH], what)
    children = sequences.new_rows(len(parents), what)
    keeps = table.info[parents, LENGTH] >> 3
    rows.hold_all(table, parents, keeps, nodes, granules)
    rows.share_all(table, parents, table, children, keeps)
    tails.attach(sequences, children)
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
    rows.hold_all(before, sources, keeps, pool.nodes, pool.granules)
    pool.free_listed(rows.empty_all(table, targets, pool.nodes, pool.granules, pool.freed))
    rows.share_all(before, sources, table, targets, keeps)
    tails.attach(sequences, targets)
    sequences.note_use()


def truncate(sequences: Sequences, batch: Int32Array, lengths: Int64Array) -> None:
    """Keep the first ``lengths[i]`` tokens of each row; CacheFullError, and nothing done, if a copy has no room."""
    pool, table = sequences.pool, sequences.rows
    cut = np.flatnonzero(rows.cuts_quantized(table, batch, lengths, np.empty(len(batch), np.bool_)))
    hot = _dequantize(sequences, batch[cut], lengths[cut])
    whole = lengths.copy()
    whole[cut] = 0  # no tail to copy
    positions, partial = np.empty(len(batch), np.int32), np.empty(len(batch), np.int32)
    count = rows.list_partial(table, batch, whole, positions, partial)
    shared = positions[:count][pool.granules.refs[partial[:count]] > 1]
    try:
        tails = _copy_tails(sequences, table, batch[shared], lengths[shared], "truncate")
    except BaseException:
        pool.free_runs([run for runs in hot for run in runs])
        raise
    keeps = np.full(len(batch), -1, np.int64)
    keeps[shared], keeps[cut] = lengths[shared] >> 3, lengths[cut] >> 6 << 3
    sequences.tick()
    pool.free_listed(rows.truncate_all(table, batch, lengths, keeps, pool.nodes, pool.granules, pool.freed))
    tails.attach(sequences, batch[shared])
    for row, runs in zip(batch[cut].tolist(), hot, strict=True):
        sequences.attach(row, runs)
    if sequences.collects_mass:
        for row, length in zip(batch.tolist(), lengths.tolist(), strict=True):
            table.masses[row, -(-length // 64) :] = 0  # what comes there next has none yet
    sequences.note_use()


def _dequantize(sequences: Sequences, which: Int32Array, lengths: Int64Array) -> list[Runs]:
    """Hot copies of the tokens that rows keep of the quantized tile that their new length lies in; not attached yet."""
    pool, table = sequences.pool, sequences.rows
    sources, targets = np.empty((2, len(which), MAX_BLOCK_GRANULES), np.int32)
    targets[:] = -1
    made: list[Runs] = []
    try:
        for i, (row, length) in enumerate(zip(which.tolist(), lengths.tolist(), strict=True)):
            first, needed = length >> 6 << 3, -(-(length & 63) // 8)
            pool.make_room(needed)
            runs = pool.fit(needed)
            if runs is None:
                raise CacheFullError(
                    f"truncate: expected room for {needed} granules of a quantized tile in the hot tier, "
                    f"{pool.allocator.num_free} free, {pool.num_cached} cached"
                )
            made.append(runs)
            used = int(rows.find_entry(table, row, first))
            if used + len(runs) > table.entries.shape[1]:
                raise CacheFullError(f"truncate: expected rows of at most {table.entries.shape[1]} entries, got more")
            block = int(rows.granule_at(table, row, first))
            sources[i] = np.arange(block, block + MAX_BLOCK_GRANULES)
            targets[i, :needed] = np.concatenate([np.arange(start, start + size) for start, size in runs])[:needed]
        if len(which):
            sequences.convert(sources, targets, int((lengths & 63).sum()))
    except BaseException:
        pool.free_runs([run for runs in made for run in runs])
        raise
    sequences.counters.num_dequantized += len(which)
    return made


@dataclass(frozen=True)
class _Tails:
    """Copies of partly filled granules, in blocks of their own, for some of a list of rows."""

    positions: Int32Array
    starts: Int32Array
    sizes: Int32Array

    def attach(self, sequences: Sequences, which: Int32Array) -> None:
        """Append them to the rows at their positions."""
        table, granules = sequences.rows, sequences.pool.granules
        rows.attach_tails(table, granules, which[self.positions], self.starts, self.sizes)


def _copy_tails(sequences: Sequences, source: Rows, parents: Int32Array, lengths: Int64Array, what: str) -> _Tails:
    """Copy the granule of each parent that is partly filled at the given length, where there is one."""
    positions, partial = np.empty(len(parents), np.int32), np.empty(len(parents), np.int32)
    count = rows.list_partial(source, parents, lengths, positions, partial)
    positions, partial = positions[:count], partial[:count]
    if not count:
        return _Tails(positions, positions, positions)
    for i in positions:
        _require_entry(sequences, source, int(parents[i]), int(lengths[i]) >> 3, what)
    starts, sizes = sequences.pool.allocate_tails(count, what)
    try:
        sequences.copy(partial, starts, int((lengths[positions] & 7).sum()))
    except BaseException:
        sequences.pool.free_runs(list(zip(starts.tolist(), sizes.tolist(), strict=True)))
        raise
    return _Tails(positions, starts, sizes)


def _require_entry(sequences: Sequences, source: Rows, row: int, keep: int, what: str) -> None:
    """One entry more must fit after a row's first ``keep`` granules."""
    most = sequences.rows.entries.shape[1]
    if keep < most:  # no entry is shorter than a granule
        return
    used = int(rows.find_entry(source, row, keep - 1)) + 1
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
        table.chain_uid[which],
        table.pending[which],
        table.clock.copy(),
        table.scanned[which],
        table.masses[which],
        table.bar[which],
    )
