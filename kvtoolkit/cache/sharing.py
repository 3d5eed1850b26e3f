"""Forks, beams and truncation: rows that share full granules, and copies of the last, partly filled one.

A partly filled granule is never shared but copied. So no shared granule is ever written, and kernels need no
copy-on-write check.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state import block_table, row_sharing
from kvtoolkit.cache.state.block_manager import Runs
from kvtoolkit.cache.state.block_table import CAPACITY, LENGTH, NUM_ENTRIES, BlockTable
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.cache_state import CacheState
from kvtoolkit.cache.state.row_sharing import Tails
from kvtoolkit.errors import ArgumentError, CacheFullError
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES

_Made = TypeVar("_Made", "Tails", "_Cut")


def fork(state: CacheState, parents: Int32Array, what: str) -> Int32Array:
    """Open rows that hold what ``parents`` hold; CacheFullError, with nothing done, if there is no room."""
    state.require_closed_rows(len(parents), what)
    lengths = state.group.table.info[parents, LENGTH]
    made = _in_all(state.groups, lambda group: copy_tails(group, group.table, parents, lengths, what))
    children = state.new_rows(len(parents), what)
    keeps = lengths >> 3
    for group, tails in zip(state.groups, made, strict=True):
        table, granules = group.table, group.blocks.granules
        row_sharing.incref_all(table, parents, keeps, granules)
        row_sharing.share_all(table, parents, table, children, keeps)
        row_sharing.attach_tails(table, granules, children, tails)
        group.update_peak()
    return children


def reorder(state: CacheState, batch: Int32Array, origin: Int32Array) -> None:
    """Let row ``batch[i]`` hold what ``batch[origin[i]]`` holds; CacheFullError, with nothing done, without room."""
    changed = np.flatnonzero(origin != np.arange(len(batch)))
    if not len(changed):
        return
    # copies of the rows as they are now, because a parent may itself be overwritten
    before = [copy_of_rows(group.table, batch) for group in state.groups]
    sources, targets = origin[changed], batch[changed]
    lengths = before[0].info[sources, LENGTH]
    tables = iter(before)
    made = _in_all(state.groups, lambda group: copy_tails(group, next(tables), sources, lengths, "reorder"))
    state.tick()
    keeps = lengths >> 3
    num_freed: Any
    if state.others:
        num_freed = np.zeros(len(made), np.int64)
        made_all, held = tuple(made), state.holdings
        row_sharing.reorder_groups(tuple(before), sources, state.tables, targets, keeps, made_all, held, num_freed)
    else:
        table, holdings = state.group.table, state.group.blocks.holdings
        num_freed = [row_sharing.reorder_all(before[0], sources, table, targets, keeps, made[0], holdings)]
    _free(state, num_freed)


def require_past(state: CacheState, batch: Int32Array, lengths: Int64Array) -> None:
    """ArgumentError if a row cut to its new length would miss tokens of a window, because they are gone."""
    windowed = [group for group in state.groups if group.layers.span]
    if not windowed:
        return
    leasts = np.stack([_least_lengths(group, batch) for group in windowed])
    misses = (lengths < leasts.max(0)) & (lengths != 0) & (lengths != state.group.table.info[batch, LENGTH])
    if not misses.any():
        return
    i = int(misses.argmax())
    group = windowed[int(leasts[:, i].argmax())]
    first = int(block_table.first_held(group.table, int(batch[i])))
    raise ArgumentError(
        f"new_lens[{i}]: expected 0 or at least {leasts[:, i].max()}, since layers with {group.layers} hold nothing "
        f"before token {8 * first} any more, got {lengths[i]}; truncate to 0 and compute the sequence again from there"
    )


def _least_lengths(group: CacheGroup, batch: Int32Array) -> Int64Array:
    """The least length of each row at which the next token sees only what it still holds, with a window or chunks."""
    table, layers = group.table, group.layers
    is_empty = table.info[batch, NUM_ENTRIES] == 0
    first = 8 * np.where(is_empty, table.info[batch, CAPACITY], table.starts[batch, 0]).astype(np.int64)
    if layers.chunk:
        found: Int64Array = -(-first // layers.chunk) * layers.chunk
        return found
    return np.where(first > 0, first + layers.window - 1, 0)


def truncate(state: CacheState, batch: Int32Array, lengths: Int64Array) -> None:
    """Keep the first ``lengths[i]`` tokens of each row; CacheFullError, with nothing done, if a copy has no room."""
    cuts = _in_all(state.groups, lambda group: _prepare_cut(group, batch, lengths))
    state.tick()
    num_freed: Any
    if state.others:
        num_freed = np.zeros(len(cuts), np.int64)
        keeps, tails = np.stack([cut.keeps for cut in cuts]), tuple(cut.tails for cut in cuts)
        row_sharing.truncate_groups(state.tables, batch, lengths, keeps, tails, state.holdings, num_freed)
    else:
        table, holdings = state.group.table, state.group.blocks.holdings
        num_freed = [row_sharing.truncate_all(table, batch, lengths, cuts[0].keeps, cuts[0].tails, holdings)]
    _free(state, num_freed)
    state.forget_lost()


class _Cut(NamedTuple):
    """What `row_sharing.truncate_all` needs to cut the rows of a group."""

    keeps: Int64Array
    tails: Tails


def _prepare_cut(group: CacheGroup, batch: Int32Array, lengths: Int64Array) -> _Cut:
    """Copy what rows keep of granules that are shared or quantized; the rows stay as they are."""
    blocks, table = group.blocks, group.table
    cut = np.flatnonzero(row_sharing.cuts_quantized(table, batch, lengths, np.empty(len(batch), np.bool_)))
    hot = _dequantize(group, batch, cut, lengths)
    whole = lengths.copy()
    whole[cut] = 0  # no tail to copy
    positions, partial = np.empty(len(batch), np.int32), np.empty(len(batch), np.int32)
    count = row_sharing.list_partial(table, batch, whole, positions, partial)
    shared = positions[:count][blocks.granules.refs[partial[:count]] > 1]
    try:
        tails = copy_tails(group, table, batch[shared], lengths[shared], "truncate")
    except CacheFullError:
        _give_back(group, hot)
        raise
    tails = Tails(
        np.concatenate([shared[tails.positions], hot.positions]),
        np.concatenate([tails.starts, hot.starts]),
        np.concatenate([tails.sizes, hot.sizes]),
    )
    keeps = np.full(len(batch), -1, np.int64)
    keeps[shared], keeps[cut] = lengths[shared] >> 3, lengths[cut] >> 6 << 3
    return _Cut(keeps, tails)


def _in_all(groups: list[CacheGroup], make: Callable[[CacheGroup], _Made]) -> list[_Made]:
    """Make copies for all groups; CacheFullError, with nothing kept of them, if one of the groups has no room."""
    made: list[_Made] = []
    try:
        for group in groups:
            made += [make(group)]  # one by one, so that those made are known if the next one fails
    except CacheFullError:
        for group, one in zip(groups, made, strict=False):
            _give_back(group, one.tails if isinstance(one, _Cut) else one)
        raise
    return made


def _give_back(group: CacheGroup, tails: Tails) -> None:
    group.blocks.free_runs(list(zip(tails.starts.tolist(), tails.sizes.tolist(), strict=True)))


def _free(state: CacheState, num_freed: Iterable[int]) -> None:
    """Free what each group has listed, and note how much is held now."""
    for group, count in zip(state.groups, num_freed, strict=True):
        group.blocks.free_listed(count)
        group.update_peak()


def _dequantize(group: CacheGroup, batch: Int32Array, cut: Int64Array, lengths: Int64Array) -> Tails:
    """Make hot copies of the tokens that rows keep of the quantized tiles in which they are cut; attaches nothing."""
    blocks, table = group.blocks, group.table
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
        group.convert_tiles(sources, targets, int((lengths[cut] & 63).sum()))
    group.counters.num_dequantized += len(cut)
    starts, sizes = np.array(made, np.int32).reshape(-1, 2).T.copy()
    return Tails(np.array(positions, np.int32), starts, sizes)


def copy_tails(group: CacheGroup, source: BlockTable, parents: Int32Array, lengths: Int64Array, what: str) -> Tails:
    """Copy the granule of each parent that would be partly filled at the given length, if there is one."""
    positions, partial = np.empty(len(parents), np.int32), np.empty(len(parents), np.int32)
    count = row_sharing.list_partial(source, parents, lengths, positions, partial)
    positions, partial = positions[:count], partial[:count]
    if not count:
        return Tails(positions, positions, positions)
    most = group.table.entries.shape[1]
    for i in positions:
        _require_entry(source, int(parents[i]), int(lengths[i]) >> 3, most, what)
    starts, sizes = group.blocks.allocate_tails(count, what)
    group.copy_granules(partial, starts, int((lengths[positions] & 7).sum()))
    return Tails(positions, starts, sizes)


def _require_entry(source: BlockTable, row: int, keep: int, most: int, what: str) -> None:
    """CacheFullError unless an entry fits after a row's first ``keep`` granules; it has at most ``most`` entries."""
    if keep < most:  # no entry is shorter than a granule
        return
    used = int(block_table.find_entry(source, row, keep - 1)) + 1
    if used >= most:
        raise CacheFullError(f"{what}: expected rows of at most {most - 1} entries (max_entries is {most}), got {used}")


def copy_of_rows(table: BlockTable, which: Int32Array) -> BlockTable:
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
