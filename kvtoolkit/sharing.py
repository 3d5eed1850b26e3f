"""Forks, beams and truncation: rows that share full granules, and copies of the last, partly filled one.

Because a partly filled granule is copied when it is shared, no shared granule is ever written, and kernels need no
copy-on-write check.
"""

import numpy as np

from kvtoolkit import rows
from kvtoolkit.errors import CacheFullError
from kvtoolkit.pool import Runs
from kvtoolkit.prefix import Int32Array, Int64Array, unpublish
from kvtoolkit.rows import LENGTH, NUM_ENTRIES, Rows
from kvtoolkit.sequences import Sequences


def fork(sequences: Sequences, parents: Int32Array, what: str) -> Int32Array:
    """New rows that hold what ``parents`` hold; CacheFullError, and nothing done, if there is no room."""
    sequences.require_closed_rows(len(parents), what)
    tails = _copy_tails(sequences, sequences.rows, parents, what)
    children = sequences.new_rows(len(parents), what)
    table, nodes, granules = sequences.rows, sequences.pool.nodes, sequences.pool.granules
    for parent, child, tail in zip(parents, children, tails, strict=True):
        keep = int(table.info[parent, LENGTH]) >> 3
        rows.hold_first(table, parent, keep, nodes, granules)
        rows.copy_first(table, parent, table, child, keep)
        rows.copy_tokens(table, parent, table, child)
        if tail:
            sequences.attach(int(child), tail)
    sequences.note_use()
    return children


def reorder(sequences: Sequences, batch: Int32Array, origin: Int32Array) -> None:
    """Make row ``batch[i]`` hold what ``batch[origin[i]]`` holds; CacheFullError, and nothing done, without room."""
    changed = np.flatnonzero(origin != np.arange(len(batch)))
    if not len(changed):
        return
    # copies of the rows as they are: a parent may itself be overwritten
    before = _copy_of_rows(sequences.rows, batch)
    tails = _copy_tails(sequences, before, origin[changed], "reorder")
    pool, table = sequences.pool, sequences.rows
    nodes, granules = pool.nodes, pool.granules
    sequences.tick()
    keeps = before.info[origin, LENGTH] >> 3
    for i in changed:
        rows.hold_first(before, origin[i], keeps[i], nodes, granules)
    num_freed = 0
    for i in changed:
        num_freed = rows.shrink(table, batch[i], 0, nodes, granules, pool.freed, num_freed)
    pool.free_listed(num_freed)
    for i, tail in zip(changed, tails, strict=True):
        rows.copy_first(before, origin[i], table, batch[i], keeps[i])
        rows.copy_tokens(before, origin[i], table, batch[i])
        if tail:
            sequences.attach(int(batch[i]), tail)
    sequences.note_use()


def truncate(sequences: Sequences, batch: Int32Array, lengths: Int64Array) -> None:
    """Keep the first ``lengths[i]`` tokens of each row; CacheFullError, and nothing done, if a copy has no room."""
    pool, table = sequences.pool, sequences.rows
    refs = pool.granules.refs
    shared = [
        i for i in range(len(batch)) if lengths[i] & 7 and refs[rows.granule_at(table, batch[i], lengths[i] >> 3)] > 1
    ]
    tails: dict[int, Runs] = {}
    if shared:
        for i in shared:
            _require_entry(sequences, table, int(batch[i]), int(lengths[i]) >> 3, "truncate")
        granted = pool.allocate_all([_tail_size(sequences)] * len(shared), "truncate")
        sources = [rows.granule_at(table, batch[i], lengths[i] >> 3) for i in shared]
        sequences.copy(sources, [runs[0][0] for runs in granted], int((lengths[shared] & 7).sum()))
        tails = dict(zip(shared, granted, strict=True))
    sequences.tick()
    for i in range(len(batch)):
        _truncate_row(sequences, int(batch[i]), int(lengths[i]), tails.get(i))


def _truncate_row(sequences: Sequences, row: int, length: int, tail: Runs | None) -> None:
    pool, table = sequences.pool, sequences.rows
    nodes, granules = pool.nodes, pool.granules
    if length == table.info[row, LENGTH]:
        return
    rows.walk_back(table, row, length, nodes)
    table.info[row, LENGTH] = length
    num_freed = 0
    if tail is not None:
        keep = length >> 3
    else:
        keep = (length + 7) >> 3
        if length & 7:
            # the granule will be written again: what it holds must no longer be found
            node = int(granules.node[rows.granule_at(table, row, length >> 3)])
            if node >= 0:
                num_freed = unpublish(nodes, granules, node, pool.freed, num_freed)
        keep = rows.spare_end(table, row, keep, granules)
    num_freed = rows.shrink(table, row, keep, nodes, granules, pool.freed, num_freed)
    pool.free_listed(num_freed)
    if tail is not None:
        sequences.attach(row, tail)


def _copy_tails(sequences: Sequences, source: Rows, parents: Int32Array, what: str) -> list[Runs]:
    """A copy of the partly filled granule of each parent, as the runs to attach; empty where there is none."""
    lengths = source.info[parents, LENGTH]
    partial = np.flatnonzero(lengths & 7)
    tails: list[Runs] = [[] for _ in parents]
    if len(partial):
        for i in partial:
            _require_entry(sequences, source, int(parents[i]), int(lengths[i]) >> 3, what)
        granted = sequences.pool.allocate_all([_tail_size(sequences)] * len(partial), what)
        sources = [rows.granule_at(source, int(parents[i]), int(lengths[i]) >> 3) for i in partial]
        sequences.copy(sources, [runs[0][0] for runs in granted], int((lengths[partial] & 7).sum()))
        for i, runs in zip(partial, granted, strict=True):
            tails[i] = runs
    return tails


def _tail_size(sequences: Sequences) -> int:
    """Granules of the block that receives a copied tail."""
    pool = sequences.pool
    return min(int(size) for size in pool.offered if size >= pool.policy.tail)


def _require_entry(sequences: Sequences, source: Rows, row: int, keep: int, what: str) -> None:
    """One entry more must fit after a row's first ``keep`` granules."""
    used = int(rows.find_entry(source, row, keep - 1)) + 1 if keep else 0
    most = sequences.rows.entries.shape[1]
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
    )
