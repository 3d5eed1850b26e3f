"""Compaction: merge small blocks into blocks of 64 tokens, and move blocks together to make room for these.

A growing sequence tries each merge at its tail once (`kvtoolkit.config.growth`). Compaction tries whole rows again,
whenever the engine has time. A call looks at a part of the block table whose size depends on its budget alone, and the
next call continues there. So a call with nothing to do costs the same however much the cache holds.
"""

from typing import Any

import numpy as np

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state import block_merging
from kvtoolkit.cache.state.block_table import LENGTH, NUM_ENTRIES, OPEN, STATE, BlockTable
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.prefix_index import GranuleState
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT, entry_granule, entry_length, entry_tier

_MAX_USELESS_MOVES = 8
_LEAST_LOOKED_AT = 4096
"""Entries of the block table that every call looks at; a larger budget adds more."""


def compact_all(groups: list[CacheGroup], max_tokens: int) -> int:
    """`compact` in each group, until ``max_tokens`` are copied, or as many as all groups have slots."""
    # a budget decides how much is allocated, and no pool has use for more than its size
    max_tokens = min(max_tokens, sum(8 * group.config.num_granules for group in groups))
    copied = 0
    for group in groups:
        copied += compact(group, max_tokens - copied)
    return copied


def compact(group: CacheGroup, max_tokens: int) -> int:
    """Compact one group; see `KVCache.compact`. The caller holds the lock."""
    before = group.counters.copied_tokens
    if 64 not in group.blocks.allocator.block_sizes or max_tokens < 64:
        return 0
    begin = group.compacted.copy()
    limit = _LEAST_LOOKED_AT + max_tokens // 8
    windows = _windows(group, limit, max_tokens // 64)
    merged = _merge(group, windows)
    left = max_tokens - (group.counters.copied_tokens - before)
    if merged < len(windows) and left >= 64:
        _gather_free_space(group, left, begin, limit)
        _merge(group, windows[merged : merged + (max_tokens - (group.counters.copied_tokens - before)) // 64])
    return group.counters.copied_tokens - before


def _windows(group: CacheGroup, limit: int, most: int) -> Int32Array:
    """``[n, 2]`` row and end of windows: 8 full granules of an open row, private and in several entries."""
    found = np.empty((min(most, limit), 2), np.int32)
    count = find_windows(group.table, group.blocks.granules, group.compacted, limit, found)
    return found[:count]


def _merge(group: CacheGroup, windows: Int32Array) -> int:
    """Merge windows until there is no room; returns how many."""
    for i, (row, end) in enumerate(windows):  # one at a time, because merging a window shortens its row
        if not group.merge_blocks(np.array([row], np.int32), np.array([end], np.int32)):
            return i
    return len(windows)


def _gather_free_space(group: CacheGroup, max_tokens: int, begin: Int64Array, limit: int) -> None:
    """Move blocks out of the emptiest superblocks into fuller ones."""
    blocks, table = group.blocks, group.table
    is_offered = np.zeros(MAX_BLOCK_GRANULES + 1, np.bool_)
    is_offered[blocks.offered] = True
    found = np.empty((limit, 5), np.int32)
    count = find_movable(table, blocks.granules, begin, limit, is_offered, found)
    moves = found[:count]
    useless = 0
    for _, granule, row, e, length in moves[np.lexsort((moves[:, 1], moves[:, 0]))].tolist():
        if useless == _MAX_USELESS_MOVES or max_tokens < 8 * length:
            return
        target = int(blocks.allocate_some([length])[0])
        if target < 0:
            return
        in_use = [int(count_in_use(blocks.granules, start // MAX_BLOCK_GRANULES)) for start in (target, granule)]
        if in_use[0] < in_use[1] or target // MAX_BLOCK_GRANULES == granule // MAX_BLOCK_GRANULES:
            blocks.free_runs([(target, length)])
            useless += 1
            continue
        sources = np.arange(granule, granule + length, dtype=np.int32)
        group.copy_granules(sources, np.arange(target, target + length, dtype=np.int32), 8 * length)
        block_merging.relocate(table, row, e, target, blocks.nodes, blocks.granules)
        blocks.free_runs([(granule, length)])
        max_tokens -= 8 * length


@jit
def count_in_use(granules: GranuleState, superblock: int) -> Any:
    """How many granules of a superblock rows or the index hold."""
    count = 0
    for granule in range(MAX_BLOCK_GRANULES * superblock, MAX_BLOCK_GRANULES * (superblock + 1)):
        count += granules.refs[granule] > 0 or granules.node[granule] >= 0
    return count


@jit
def _is_private(granules: GranuleState, entry: int) -> Any:
    """Whether only one row holds the granules of an entry."""
    private = True
    for granule in range(entry_granule(entry), entry_granule(entry) + entry_length(entry)):
        private = private and granules.refs[granule] == 1
    return private


@jit
def find_windows(table: BlockTable, granules: GranuleState, cursor: Int64Array, limit: int, out: Int32Array) -> Any:
    """Look for windows: the 8 full granules of a tile of an open row, private and in several entries.

    Args:
        cursor: ``[2]`` row and logical granule to begin at; receives those at which the next call begins.
        limit: number of entries and rows to look at.
        out: ``[n, 2]`` receives row and end of each window.

    Returns:
        How many were found.
    """
    count, looked_at, num_rows = 0, 0, len(table.info)
    begin = cursor[1]
    for i in range(num_rows + 1):
        row = cursor[0]
        if i == num_rows and begin == 0:
            return count
        e = 0
        if table.info[row, STATE] == OPEN and table.info[row, NUM_ENTRIES] > 0:
            if cursor[1] > 0:
                e = _entry_from(table, row, cursor[1])
            while e < table.info[row, NUM_ENTRIES]:
                if i == num_rows and table.starts[row, e] >= begin:  # once round
                    cursor[1] = begin
                    return count
                if count == len(out) or looked_at >= limit:
                    cursor[1] = table.starts[row, e]
                    return count
                first, end = e, table.starts[row, e] + 8
                private = True
                while e < table.info[row, NUM_ENTRIES] and table.starts[row, e] < end:
                    private = private and _is_private(granules, table.entries[row, e])
                    e += 1
                    looked_at += 1
                last = e - 1
                covered = table.starts[row, last] + entry_length(table.entries[row, last])
                if end & 7 != 0 or covered != end:  # no tile begins here, or its end is inside an entry
                    e = first + 1
                elif last > first and private and 8 * end <= table.info[row, LENGTH]:
                    out[count, 0], out[count, 1] = row, end
                    count += 1
        looked_at += 1
        cursor[0], cursor[1] = (row + 1) % num_rows, 0
        if looked_at >= limit:
            return count
    return count


@jit
def _entry_from(table: BlockTable, row: int, granule: int) -> Any:
    """The first entry that begins at a logical granule or after it."""
    low, high = 0, table.info[row, NUM_ENTRIES]
    while low < high:
        middle = (low + high) >> 1
        if table.starts[row, middle] < granule:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def find_movable(
    table: BlockTable, granules: GranuleState, begin: Int64Array, limit: int, is_offered: Any, out: Int32Array
) -> Any:
    """Look, from ``begin`` on, for blocks of less than 64 tokens that only one row holds, an open one.

    For each, ``out`` receives the number of used granules in its superblock, its granule, row, entry and length.
    Returns how many were found.
    """
    count, looked_at, num_rows = 0, 0, len(table.info)
    row, e = begin[0], 0
    if table.info[row, NUM_ENTRIES] > 0:
        e = _entry_from(table, row, begin[1])
    for _ in range(num_rows):
        while table.info[row, STATE] == OPEN and e < table.info[row, NUM_ENTRIES]:
            if looked_at >= limit:
                return count
            looked_at += 1
            entry = table.entries[row, e]
            granule, length = entry_granule(entry), entry_length(entry)
            if length < 8 and is_offered[length] and entry_tier(entry) == TIER_HOT and _is_private(granules, entry):
                out[count, 0], out[count, 1] = count_in_use(granules, granule >> 3), granule
                out[count, 2], out[count, 3], out[count, 4] = row, e, length
                count += 1
            e += 1
        looked_at += 1
        row, e = (row + 1) % num_rows, 0
        if looked_at >= limit:
            return count
    return count
