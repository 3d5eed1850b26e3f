"""Forks, beams and truncation: rows that share full granules, and copies of the last, partly filled one.

A partly filled granule is never shared but copied. So no shared granule is ever written, and kernels need no
copy-on-write check.
"""

import numpy as np

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state import block_table, row_sharing
from kvtoolkit.cache.state.block_manager import Runs
from kvtoolkit.cache.state.block_table import LENGTH, NUM_ENTRIES, BlockTable
from kvtoolkit.cache.state.cache_state import CacheState
from kvtoolkit.cache.state.row_sharing import Tails
from kvtoolkit.errors import CacheFullError
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES


def fork(state: CacheState, parents: Int32Array, what: str) -> Int32Array:
    """Open rows that hold what ``parents`` hold; CacheFullError, with nothing done, if there is no room."""
    state.require_closed_rows(len(parents), what)
    table, granules = state.group.table, state.group.blocks.granules
    tails = _copy_tails(state, table, parents, table.info[parents, LENGTH], what)
    children = state.new_rows(len(parents), what)
    keeps = table.info[parents, LENGTH] >> 3
    row_sharing.incref_all(table, parents, keeps, granules)
    row_sharing.share_all(table, parents, table, children, keeps)
    row_sharing.attach_tails(table, granules, children, tails)
    state.group.update_peak()
    return children


def reorder(state: CacheState, batch: Int32Array, origin: Int32Array) -> None:
    """Let row ``batch[i]`` hold what ``batch[origin[i]]`` holds; CacheFullError, with nothing done, without room."""
    changed = np.flatnonzero(origin != np.arange(len(batch)))
    if not len(changed):
        return
    # copies of the rows as they are now, because a parent may itself be overwritten
    before = _copy_of_rows(state.group.table, batch)
    sources, targets = origin[changed], batch[changed]
    tails = _copy_tails(state, before, sources, before.info[sources, LENGTH], "reorder")
    blocks, table = state.group.blocks, state.group.table
    state.tick()
    keeps = before.info[sources, LENGTH] >> 3
    blocks.free_listed(row_sharing.reorder_all(before, sources, table, targets, keeps, tails, blocks.holdings))
    state.group.update_peak()


def truncate(state: CacheState, batch: Int32Array, lengths: Int64Array) -> None:
    """Keep the first ``lengths[i]`` tokens of each row; CacheFullError, with nothing done, if a copy has no room."""
    blocks, table = state.group.blocks, state.group.table
    cut = np.flatnonzero(row_sharing.cuts_quantized(table, batch, lengths, np.empty(len(batch), np.bool_)))
    hot = _dequantize(state, batch, cut, lengths)
    whole = lengths.copy()
    whole[cut] = 0  # no tail to copy
    positions, partial = np.empty(len(batch), np.int32), np.empty(len(batch), np.int32)
    count = row_sharing.list_partial(table, batch, whole, positions, partial)
    shared = positions[:count][blocks.granules.refs[partial[:count]] > 1]
    try:
        tails = _copy_tails(state, table, batch[shared], lengths[shared], "truncate")
    except CacheFullError:
        blocks.free_runs(list(zip(hot.starts.tolist(), hot.sizes.tolist(), strict=True)))
        raise
    tails = Tails(
        np.concatenate([shared[tails.positions], hot.positions]),
        np.concatenate([tails.starts, hot.starts]),
        np.concatenate([tails.sizes, hot.sizes]),
    )
    keeps = np.full(len(batch), -1, np.int64)
    keeps[shared], keeps[cut] = lengths[shared] >> 3, lengths[cut] >> 6 << 3
    state.tick()
    blocks.free_listed(row_sharing.truncate_all(table, batch, lengths, keeps, tails, blocks.holdings))
    state.group.update_peak()


def _dequantize(state: CacheState, batch: Int32Array, cut: Int64Array, lengths: Int64Array) -> Tails:
    """Make hot copies of the tokens that rows keep of the quantized tiles in which they are cut; attaches nothing."""
    blocks, table = state.group.blocks, state.group.table
    sources, targets = np.empty((2, len(cut), MAX_BLOCK_GRANULES), np.int32)
    targets[:] = -1
    positions: list[int] = []
    made: Runs = []
    try:
        for i, position in enumerate(cut.tolist()):
            row, length = int(batch[position]), int(lengths[position])
            first, needed = length >> 6 << 3, -(-(length & 63) // 8)
            runs = blocks.fit(needed)
            if runs is None:
                raise CacheFullError(
                    f"truncate: expected room for {needed} granules of a quantized tile in the hot tier, "
                    f"{blocks.allocator.num_free} free, {blocks.num_cached} cached"
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
        blocks.free_runs(made)
        raise
    if len(cut):
        state.group.convert_tiles(sources, targets, int((lengths[cut] & 63).sum()))
    state.counters.num_dequantized += len(cut)
    starts, sizes = np.array(made, np.int32).reshape(-1, 2).T.copy()
    return Tails(np.array(positions, np.int32), starts, sizes)


def _copy_tails(state: CacheState, source: BlockTable, parents: Int32Array, lengths: Int64Array, what: str) -> Tails:
    """Copy the granule of each parent that would be partly filled at the given length, if there is one."""
    positions, partial = np.empty(len(parents), np.int32), np.empty(len(parents), np.int32)
    count = row_sharing.list_partial(source, parents, lengths, positions, partial)
    positions, partial = positions[:count], partial[:count]
    if not count:
        return Tails(positions, positions, positions)
    for i in positions:
        _require_entry(state, source, int(parents[i]), int(lengths[i]) >> 3, what)
    starts, sizes = state.group.blocks.allocate_tails(count, what)
    state.group.copy_granules(partial, starts, int((lengths[positions] & 7).sum()))
    return Tails(positions, starts, sizes)


def _require_entry(state: CacheState, source: BlockTable, row: int, keep: int, what: str) -> None:
    """CacheFullError unless one more entry fits after a row's first ``keep`` granules."""
    most = state.group.table.entries.shape[1]
    if keep < most:  # no entry is shorter than a granule
        return
    used = int(block_table.find_entry(source, row, keep - 1)) + 1
    if used >= most:
        raise CacheFullError(f"{what}: expected rows of at most {most - 1} entries (max_entries is {most}), got {used}")


def _copy_of_rows(table: BlockTable, which: Int32Array) -> BlockTable:
    width = int(table.info[which, NUM_ENTRIES].max(initial=0))
    return BlockTable(
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
