"""Compaction: merge small blocks into blocks of 64 tokens, and move blocks together so that there are such blocks.

Merging at the tail of a growing sequence (`kvtoolkit.growth`) never revisits a merge that failed; this does, for whole
rows, whenever the engine has time.
"""

import numpy as np

from kvtoolkit import rows
from kvtoolkit.rows import LENGTH, NUM_ENTRIES, OPEN, STATE
from kvtoolkit.sequences import Sequences

_MAX_USELESS_MOVES = 8


def compact(sequences: Sequences, max_tokens: int) -> int:
    """See `KVCache.compact`; the caller holds the lock."""
    before = sequences.counters.copied_tokens
    if 64 in sequences.pool.allocator.block_sizes:
        _merge_rows(sequences, max_tokens)
        left = max_tokens - (sequences.counters.copied_tokens - before)
        if _windows(sequences) and left >= 64:
            _gather_free_space(sequences, left)
            _merge_rows(sequences, max_tokens - (sequences.counters.copied_tokens - before))
    return sequences.counters.copied_tokens - before


def _windows(sequences: Sequences) -> list[tuple[int, int]]:
    """``(row, end)`` of every 8 full granules of an open row that lie in several entries."""
    info = sequences.rows.info
    table, granules = sequences.rows, sequences.pool.granules
    return [
        (row, end)
        for row in np.flatnonzero(info[:, STATE] == OPEN).tolist()
        for end in range(8, int(info[row, LENGTH] >> 3) + 1, 8)
        if rows.mergeable(table, row, end) >= 0 and rows.is_private(table, row, end - 8, end, granules)
    ]


def _merge_rows(sequences: Sequences, max_tokens: int) -> None:
    # one at a time: merging one window shortens its row
    for row, end in _windows(sequences)[: max_tokens // 64]:
        if not sequences.merge(np.array([row], np.int32), np.array([end], np.int32)):
            return


def _gather_free_space(sequences: Sequences, max_tokens: int) -> None:
    """Move blocks out of the emptiest superblocks into fuller ones."""
    pool, table = sequences.pool, sequences.rows
    in_use = ((pool.granules.refs > 0) | (pool.granules.node >= 0)).reshape(-1, 8).sum(axis=1)
    moves = sorted(_movable(sequences), key=lambda move: (in_use[move[2] // 8], move[2]))
    useless = 0
    for row, e, granule, length in moves:
        if useless == _MAX_USELESS_MOVES or max_tokens < 8 * length:
            return
        target = int(pool.allocate_some([length])[0])
        if target < 0:
            return
        if in_use[target // 8] < in_use[granule // 8] or target // 8 == granule // 8:
            pool.free_runs([(target, length)])
            useless += 1
            continue
        sources = np.arange(granule, granule + length, dtype=np.int32)
        sequences.copy(sources, np.arange(target, target + length, dtype=np.int32), 8 * length)
        rows.relocate(table, row, e, target, pool.nodes, pool.granules)
        pool.free_runs([(granule, length)])
        in_use[granule // 8] -= length
        in_use[target // 8] += length
        max_tokens -= 8 * length


def _movable(sequences: Sequences) -> list[tuple[int, int, int, int]]:
    """``(row, entry, granule, length)`` of the blocks below 64 tokens that one open row alone holds."""
    info, entries, refs = sequences.rows.info, sequences.rows.entries, sequences.pool.granules.refs
    offered = set(sequences.pool.offered.tolist())
    found = []
    for row in np.flatnonzero(info[:, STATE] == OPEN):
        for e in range(int(info[row, NUM_ENTRIES])):
            entry = int(entries[row, e])
            granule, length = entry & 0xFFFFFF, ((entry >> 24) & 7) + 1
            if length < 8 and length in offered and (refs[granule : granule + length] == 1).all():
                found.append((int(row), e, granule, length))
    return found
