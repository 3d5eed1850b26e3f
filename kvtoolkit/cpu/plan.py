"""Cut an attention problem into items, and check the lengths and table entries that it will read."""

from typing import Any

import numpy as np

from allocators._jit import jit
from kvtoolkit.cpu.problem import (
    BATCH,
    BLOCK_SIZE,
    CU_SEQLENS,
    FIRST_HOT,
    GROUP_SIZE,
    HEAD_DIM,
    MAX_ENTRIES,
    NUM_BLOCKS,
    NUM_KV_HEADS,
    NUM_SPLITS,
    NUM_TOKENS,
    SEQ_LENS,
    STARTS,
    STARTS_ROW,
    TABLE,
    TABLE_ROW,
    TIERED,
    WARM,
    WARM_BLOCKS,
    padded_tiles,
    queries_per_item,
    tokens_of,
)
from kvtoolkit.cpu.tiles import TILE
from kvtoolkit.cpu.vector import read_i32
from kvtoolkit.findings import Finding
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT, entry_granule, entry_length, entry_tier

# columns of the plan, one line per row of the batch and one more that closes the sums
FIRST_ITEM, FIRST_PARTIAL, FIRST_TILE, WORK, SPLITS, SPLIT_TILES, ENTRIES = range(7)
PLAN_COLUMNS = 7

_AUTO_SPLIT_TILES = 8
_AUTO_SPLIT_QUERIES = 16  # rows with more queries than this make enough items without splits

_int: Any = np.int64  # a cast in compiled code


@jit
def plan_items(problem: Any, plan: Any, check: int) -> Any:
    """Cut the problem into items and, with ``check``, validate every length and every table entry that will be read.

    Fills ``plan`` ``[batch + 1, PLAN_COLUMNS]``; the last line holds the number of items, of partial results, of
    tiles times queries, and the work in multiply-adds. Returns ``(code, row, value)``; the code is the number of a
    `Finding`, 0 if all is well: a member would take longer to make than a small plan.
    """
    batch = problem[BATCH]
    block = queries_per_item(problem[GROUP_SIZE])
    heads = problem[NUM_KV_HEADS]
    q_heads = heads * problem[GROUP_SIZE]
    items = _int(0)
    partials = _int(0)
    lines = _int(0)
    work = _int(0)
    if check and problem[CU_SEQLENS] != 0:
        code, index, value = _check_bounds(problem)
        if code != Finding.OK:
            return _int(code.value), index, value
    for row in range(batch):
        begin, end = tokens_of(problem, row)
        seq_len = _int(read_i32(problem[SEQ_LENS] + 4 * row))
        plan[row, ENTRIES] = problem[MAX_ENTRIES]
        if check:
            code, value = _check_row(problem, row, seq_len)
            if code != Finding.OK:
                return _int(code.value), _int(row), value
            plan[row, ENTRIES] = value
        tiles = (seq_len + TILE - 1) // TILE
        split_tiles = max(1, tiles)
        if problem[NUM_SPLITS] > 0:
            split_tiles = max(1, (tiles + problem[NUM_SPLITS] - 1) // problem[NUM_SPLITS])
        elif end - begin <= _AUTO_SPLIT_QUERIES:
            split_tiles = _AUTO_SPLIT_TILES
        splits = max(1, (tiles + split_tiles - 1) // split_tiles)
        plan[row, FIRST_ITEM] = items
        plan[row, FIRST_PARTIAL] = partials
        plan[row, FIRST_TILE] = lines
        plan[row, SPLITS] = splits
        plan[row, SPLIT_TILES] = split_tiles
        items += (end - begin + block - 1) // block * splits * heads
        if splits > 1:
            partials += (end - begin) * q_heads * splits
        lines += (end - begin) * q_heads * padded_tiles(tiles)
        work += ((end - begin) * problem[GROUP_SIZE] + 8) * heads * seq_len * problem[HEAD_DIM]
    plan[batch, FIRST_ITEM] = items
    plan[batch, FIRST_PARTIAL] = partials
    plan[batch, FIRST_TILE] = lines
    plan[batch, WORK] = work
    return _int(Finding.OK.value), _int(0), _int(0)


@jit
def _check_bounds(problem: Any) -> Any:
    """Validate ``cu_seqlens_q``; returns ``(code, index, value)``."""
    batch = problem[BATCH]
    if read_i32(problem[CU_SEQLENS]) != 0:
        return Finding.BAD_CU_SEQLENS, _int(0), _int(read_i32(problem[CU_SEQLENS]))
    for row in range(batch):
        begin, end = tokens_of(problem, row)
        if end < begin:
            return Finding.BAD_CU_SEQLENS, _int(row + 1), end
    closing = _int(read_i32(problem[CU_SEQLENS] + 4 * batch))
    if closing != problem[NUM_TOKENS]:
        return Finding.BAD_CU_SEQLENS, batch, closing
    return Finding.OK, _int(0), _int(0)


@jit
def _check_row(problem: Any, row: int, seq_len: int) -> Any:
    """Validate one row.

    Returns ``(OK, n)``, where the first ``n`` entries hold the row's tokens (later entries are ignored), or the code
    and value of the first problem.
    """
    if seq_len < 0:
        return Finding.BAD_SEQ_LEN, seq_len
    block_size = problem[BLOCK_SIZE]
    blocks = (seq_len + block_size - 1) // block_size
    table = problem[TABLE] + 4 * row * problem[TABLE_ROW]
    if problem[STARTS] == 0:
        if blocks > problem[MAX_ENTRIES]:
            return Finding.BAD_COVERAGE, seq_len
        for i in range(blocks):
            block = _int(read_i32(table + 4 * i))
            if block < 0 or block >= problem[NUM_BLOCKS]:
                return Finding.BAD_BLOCK, block
        return Finding.OK, blocks
    starts = problem[STARTS] + 4 * row * problem[STARTS_ROW]
    covered = _int(0)
    i = 0
    while covered < blocks:
        if i == problem[MAX_ENTRIES] or read_i32(table + 4 * i) < 0:
            return Finding.BAD_COVERAGE, seq_len
        entry = read_i32(table + 4 * i)
        if read_i32(starts + 4 * i) != covered:
            return Finding.BAD_STARTS, _int(i)
        tier = entry_tier(entry)
        granule = _int(entry_granule(entry)) - problem[FIRST_HOT]
        if tier != TIER_HOT:
            code = _check_block(problem, entry, covered)
            if code != Finding.OK:
                return code, _int(i)
        elif problem[TIERED] != 0 and (granule < 0 or granule + entry_length(entry) > problem[NUM_BLOCKS]):
            return Finding.BAD_PLACE, _int(i)
        elif granule + entry_length(entry) > problem[NUM_BLOCKS]:
            return Finding.BAD_BLOCK, granule
        covered += entry_length(entry)
        i += 1
    return Finding.OK, _int(i)


@jit
def _check_block(problem: Any, entry: int, covered: int) -> int:
    """Validate an entry outside the hot tier that begins at logical granule ``covered``; returns a code."""
    tier = _int(entry_tier(entry))
    if problem[TIERED] == 0:
        return Finding.BAD_TIER
    if tier > TIER_COLD or problem[WARM + tier - 1] == 0:
        return Finding.NO_TIER
    granule = _int(entry_granule(entry)) - problem[FIRST_HOT + tier]
    if entry_length(entry) != MAX_BLOCK_GRANULES or covered % MAX_BLOCK_GRANULES or granule % MAX_BLOCK_GRANULES:
        return Finding.BAD_UNIT
    if granule < 0 or granule // MAX_BLOCK_GRANULES >= problem[WARM_BLOCKS + tier - 1]:
        return Finding.BAD_PLACE
    return Finding.OK
