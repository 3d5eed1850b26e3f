"""Paged attention in compiled code: a problem is cut into items, and each item walks over the tiles of one sequence.

An item is one kv head, one block of a row's queries (all query heads of the group, so that K and V are read once) and
one split of its positions. Threads claim items from a counter. Tiles are 64 consecutive positions and splits begin at
multiples of a tile, so the result depends neither on where the tokens are, nor on the batch around a row, nor on the
number of threads.

A tile in a quantized tier is one block of that tier: the stages that fetch keys and values dequantize it instead of
gathering rows, and nothing else differs.

Source: block tables, Kwon et al. 2023 (arXiv:2309.06180), sec. 4; tiled online softmax, Dao 2023 (arXiv:2307.08691),
sec. 3; splits over the keys, Dao et al. 2023 (Flash-Decoding).
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import types

from allocators._bits import fetch_add_acq_rel, load_acquire
from allocators._jit import jit
from kvtoolkit.cpu.dequantize import block_bytes, dequantize_keys, dequantize_values
from kvtoolkit.cpu.finish import combine_splits, finish, write_masses
from kvtoolkit.cpu.places import find_entry, locate, locate_block, prefetch_block, prefetch_rows
from kvtoolkit.cpu.plan import ENTRIES, FIRST_ITEM, FIRST_PARTIAL, FIRST_TILE, SPLIT_TILES, SPLITS
from kvtoolkit.cpu.problem import (
    BATCH,
    BLOCK_SIZE,
    DTYPE,
    GROUP_SIZE,
    HEAD_DIM,
    KEYS,
    KEYS_HEAD,
    LEFT,
    MASSES,
    NUM_KV_HEADS,
    PARTIALS,
    Q_HEAD,
    Q_TOKEN,
    RIGHT,
    ROWS_PER_ITEM,
    SEQ_LENS,
    SLOPES,
    SLOPES_ROW,
    STARTS,
    TILE_LSES,
    VALUES,
    VALUES_HEAD,
    Q,
    padded_tiles,
    partial_floats,
    queries_per_item,
    tokens_of,
)
from kvtoolkit.cpu.softmax import absorb_scores, bias_scores, cap_scores, mask_scores, tile_lse
from kvtoolkit.cpu.tiles import TILE, all_finite, gather_rows, gather_transposed, score_rows, weigh_values
from kvtoolkit.cpu.vector import (
    ITEMSIZE,
    load,
    load8,
    load_f32,
    multiply,
    read_f32,
    read_i32,
    splat,
    store_f32,
    total,
    write_f32,
)
from kvtoolkit.formats.entry import TIER_HOT

_MOST_ROWS_TO_PREFETCH = 16  # with more, arithmetic hides the way to memory

_int: Any = np.int64  # casts in compiled code, without the scalar types that NumPy gives them
_single: Any = np.float32


class Scratch(NamedTuple):
    """Addresses of the arrays of a thread. Rows of queries and results are ``width`` floats."""

    width: int
    """``head_dim`` rounded up to 16."""
    k_tile: int
    """Keys of a tile, transposed, ``[width, 64]`` float32; scratch for the dequantization of values."""
    v_tile: int
    """Values of a tile, ``[64, width]`` float32; scratch for the dequantization of keys."""
    scores: int
    """``[rows, 64]`` float32: scores of a tile, then its weights exp(score - row_max)."""
    q_rows: int
    """``[rows, width]`` float32: queries times the scale."""
    out_rows: int
    """``[rows, width]`` float32: sums of weight * value."""
    k_offsets: int
    """``[64]`` int64: where the keys of the tile are, in elements. Values, and the next tile's, follow."""
    row_sums: int
    """``[rows, 16]`` float32: lanes that add up to the sum of the weights."""
    row_maxima: int
    """``[rows]`` float32: what the weights are relative to."""


class Item(NamedTuple):
    """One item: its place in the batch, and what its queries see."""

    row: int
    head: int
    split: int
    token: int
    """The first query token of the item."""
    query: int
    """The number of that query in its row."""
    rows: int
    """Query rows: the item's queries times the heads of the group."""
    seq_len: int
    lowest: int
    """Position of the first query."""
    highest: int
    """Position of the last one."""
    first_key: int
    """First position that any of the queries sees."""
    end_key: int
    """One past the last."""


@jit
def scratch_bytes(group_size: int, head_dim: int) -> int:
    """Bytes of the arrays of `Scratch`."""
    rows = max(ROWS_PER_ITEM, group_size)
    width = (head_dim + 15) // 16 * 16
    return 8 * TILE * width + 4 * rows * (TILE + 2 * width) + 64 * rows + 4 * rows + 32 * TILE


@jit
def _cut_scratch(problem: Any, address: int) -> Any:
    most = max(ROWS_PER_ITEM, problem[GROUP_SIZE])
    width = (problem[HEAD_DIM] + 15) // 16 * 16
    v_tile = address + 4 * TILE * width
    scores = v_tile + 4 * TILE * width
    q_rows = scores + 4 * TILE * most
    out_rows = q_rows + 4 * width * most
    k_offsets = out_rows + 4 * width * most
    row_sums = k_offsets + 32 * TILE
    return Scratch(width, address, v_tile, scores, q_rows, out_rows, k_offsets, row_sums, row_sums + 64 * most)


@jit
def _make_item(problem: Any, row: int, head: int, block: int, split: int) -> Any:
    token, token_end = tokens_of(problem, row)
    first_query = block * queries_per_item(problem[GROUP_SIZE])
    queries = min(queries_per_item(problem[GROUP_SIZE]), token_end - token - first_query)
    seq_len = _int(read_i32(problem[SEQ_LENS] + 4 * row))
    lowest = seq_len - (token_end - token) + first_query
    highest = lowest + queries - 1
    first_key = _int(0)
    if problem[LEFT] >= 0:
        first_key = max(first_key, lowest - problem[LEFT])
    end_key = seq_len
    if problem[RIGHT] >= 0:
        end_key = min(end_key, highest + problem[RIGHT] + 1)
    rows = queries * problem[GROUP_SIZE]
    return Item(
        _int(row), head, split, token + first_query, first_query, rows, seq_len, lowest, highest, first_key, end_key
    )  # fmt: skip


@jit
def _begin_rows(problem: Any, scale: float, scratch: Any, item: Any) -> None:
    """Load the queries, times the scale, and clear the softmax state of their rows."""
    group, head_dim, dtype, width = problem[GROUP_SIZE], problem[HEAD_DIM], problem[DTYPE], scratch.width
    itemsize = ITEMSIZE[dtype]
    zero = splat(_single(0.0))
    if item.seq_len > 0:
        factor = splat(_single(scale))
        for r in range(item.rows):
            i = r // group
            q_head = item.head * group + r - i * group
            source = problem[Q] + itemsize * ((item.token + i) * problem[Q_TOKEN] + q_head * problem[Q_HEAD])
            target = scratch.q_rows + 4 * r * width
            for d in range(0, head_dim & ~15, 16):
                store_f32(target + 4 * d, multiply(factor, load(dtype, source + itemsize * d)))
            if head_dim & 15:
                d = head_dim & ~15
                store_f32(target + 4 * d, multiply(factor, load8(dtype, source + itemsize * d)))
    for r in range(item.rows):
        write_f32(scratch.row_maxima + 4 * r, _single(-math.inf))
        store_f32(scratch.row_sums + 64 * r, zero)
        for d in range(0, width, 16):
            store_f32(scratch.out_rows + 4 * (r * width + d), zero)


@jit
def _seen(problem: Any, lowest: int, highest: int, seq_len: int, start: int) -> Any:
    """The positions of the tile at ``start`` that all queries from ``lowest`` to ``highest`` see: first, one past last.

    Both count from the tile's first position and are 0 or more; both may be beyond the end of the tile.
    """
    first = _int(0)
    past = seq_len - start
    if problem[LEFT] >= 0:
        first = max(first, highest - problem[LEFT] - start)
    if problem[RIGHT] >= 0:
        past = min(past, lowest + problem[RIGHT] + 1 - start)
    return first, max(past, _int(0))


@jit
def _absorb_tile(problem: Any, softcap: float, scratch: Any, item: Any, tile: int, tile_lses: int) -> None:
    """Turn the scores of a tile into weights: cap, bias and mask them, and bring every row's state up to them."""
    group, width, start = problem[GROUP_SIZE], scratch.width, tile * TILE
    q_heads = problem[NUM_KV_HEADS] * group
    line_tiles = padded_tiles((item.seq_len + TILE - 1) // TILE)
    for r in range(item.rows):
        i = r // group
        q_head = item.head * group + r - i * group
        line = scratch.scores + 4 * TILE * r
        position = item.lowest + i
        if softcap > 0.0:
            cap_scores(line, softcap)
        if problem[SLOPES] != 0:
            slope = read_f32(problem[SLOPES] + 4 * (item.row * problem[SLOPES_ROW] + q_head))
            bias_scores(line, slope, start - position)
        first, past = _seen(problem, position, position, item.seq_len, start)
        if first > 0 or past < TILE:
            mask_scores(line, first, past - 1)
        row_max = scratch.row_maxima + 4 * r
        absorb_scores(line, row_max, scratch.row_sums + 64 * r, scratch.out_rows + 4 * width * r, width)
        if problem[MASSES] != 0:
            query = (item.query + i) * q_heads + q_head
            write_f32(tile_lses + 4 * (query * line_tiles + tile), tile_lse(line, row_max))


@jit
def _weigh_tile(problem: Any, scratch: Any, item: Any, start: int, end: int) -> None:
    """Add the weighted values of a tile to the rows; ``end`` is one past the last position with values."""
    width = scratch.width
    first, past = _seen(problem, item.lowest, item.highest, item.seq_len, start)
    v_tile = scratch.v_tile
    if all_finite(v_tile, width, _int(0), min(first, end)) and all_finite(v_tile, width, past, end):
        weigh_values(scratch.out_rows, scratch.scores, v_tile, width, item.rows, end)
        return
    # 0 * NaN is NaN: each query's weights meet only the values that it sees
    for r in range(item.rows):
        position = item.lowest + r // problem[GROUP_SIZE]
        first, past = _seen(problem, position, position, item.seq_len, start)
        line, seen = scratch.scores + 4 * (TILE * r + first), v_tile + 4 * width * first
        weigh_values(scratch.out_rows + 4 * width * r, line, seen, width, 1, min(past, end) - first)


@jit
def _end_rows(problem: Any, plan: Any, scratch: Any, item: Any) -> None:
    """Write the results of an item; partial results if other items have the row's other splits."""
    group, head_dim, width = problem[GROUP_SIZE], problem[HEAD_DIM], scratch.width
    q_heads = problem[NUM_KV_HEADS] * group
    splits = plan[item.row, SPLITS]
    for r in range(item.rows):
        i = r // group
        q_head = item.head * group + r - i * group
        out_row = scratch.out_rows + 4 * width * r
        row_max, row_sum = read_f32(scratch.row_maxima + 4 * r), total(load_f32(scratch.row_sums + 64 * r))
        if splits == 1:
            finish(problem, item.token + i, q_head, item.seq_len, out_row, row_max, row_sum)
        else:
            index = plan[item.row, FIRST_PARTIAL] + ((item.query + i) * q_heads + q_head) * splits + item.split
            partial = problem[PARTIALS] + 4 * index * partial_floats(head_dim)
            for d in range(0, width, 16):
                store_f32(partial + 4 * d, load_f32(out_row + 4 * d))
            write_f32(partial + 4 * width, row_max)
            write_f32(partial + 4 * (width + 1), row_sum)


@jit
def _attend_tiles(
    problem: Any, plan: Any, softcap: float, scratch: Any, item: Any, tile: int, end_tile: int, entry: int
) -> None:
    """Walk over the tiles of an item. ``entry`` holds the first position; all offsets are one tile ahead."""
    head_dim, dtype, block_size = problem[HEAD_DIM], problem[DTYPE], problem[BLOCK_SIZE]
    row, rows, width, itemsize = item.row, item.rows, scratch.width, ITEMSIZE[dtype]
    k_base = problem[KEYS] + itemsize * item.head * problem[KEYS_HEAD]
    v_base = problem[VALUES] + itemsize * item.head * problem[VALUES_HEAD]
    k_offsets = scratch.k_offsets
    v_offsets = k_offsets + 8 * TILE
    next_k_offsets = v_offsets + 8 * TILE
    next_v_offsets = next_k_offsets + 8 * TILE
    tile_lses = problem[TILE_LSES] + 4 * plan[row, FIRST_TILE]
    start = tile * TILE
    begin = max(_int(0), item.first_key - start)
    end = min(_int(TILE), item.end_key - start)
    next_tier = _int(TIER_HOT)
    next_quantized = _int(0)
    # quantized: the address of the block that is the tile, 0 in the hot tier
    entry, tier, quantized = locate_block(problem, row, item.head, (start + begin) // block_size, entry)
    if quantized == 0:
        entry = locate(problem, row, start + begin, end - begin, begin, entry, k_offsets, v_offsets)
    while tile < end_tile:
        next_start = start + TILE
        next_end = min(_int(TILE), item.end_key - next_start)
        ahead = _int(0)
        bytes_ahead = _int(0)
        if tile + 1 < end_tile:
            entry, next_tier, next_quantized = locate_block(problem, row, item.head, next_start // block_size, entry)
            if next_quantized == 0:
                entry = locate(problem, row, next_start, next_end, _int(0), entry, next_k_offsets, next_v_offsets)
            if rows <= _MOST_ROWS_TO_PREFETCH:
                if next_quantized == 0:
                    ahead = next_end
                else:
                    bytes_ahead = block_bytes(next_tier, head_dim)
        # between the stages, a few lines at a time: more would only wait for each other
        half = ahead // 2
        prefetch_rows(k_base, next_k_offsets, _int(0), half, head_dim, itemsize)
        prefetch_block(next_quantized, bytes_ahead, 0)
        if quantized == 0:
            gather_transposed(dtype, scratch.k_tile, k_base, k_offsets, head_dim)
        else:
            dequantize_keys(tier, scratch.k_tile, quantized, head_dim, scratch.v_tile)
        prefetch_rows(k_base, next_k_offsets, half, ahead, head_dim, itemsize)
        prefetch_block(next_quantized, bytes_ahead, 1)
        score_rows(scratch.scores, scratch.q_rows, scratch.k_tile, width, rows, head_dim)
        prefetch_rows(v_base, next_v_offsets, _int(0), half, head_dim, itemsize)
        prefetch_block(next_quantized, bytes_ahead, 2)
        if quantized == 0:
            gather_rows(dtype, scratch.v_tile, width, v_base, v_offsets, end, head_dim)
        else:
            dequantize_values(tier, scratch.v_tile, quantized, head_dim, scratch.k_tile)
        prefetch_rows(v_base, next_v_offsets, half, ahead, head_dim, itemsize)
        prefetch_block(next_quantized, bytes_ahead, 3)
        _absorb_tile(problem, softcap, scratch, item, tile, tile_lses)
        _weigh_tile(problem, scratch, item, start, end)
        tile += 1
        start, end = next_start, next_end
        tier, quantized = next_tier, next_quantized
        k_offsets, next_k_offsets = next_k_offsets, k_offsets
        v_offsets, next_v_offsets = next_v_offsets, v_offsets


@jit
def _attend_item(
    problem: Any, plan: Any, scale: float, softcap: float, scratch: int, row: int, head: int, block: int, split: int
) -> None:
    arrays = _cut_scratch(problem, scratch)
    item = _make_item(problem, row, head, block, split)
    _begin_rows(problem, scale, arrays, item)
    split_tiles = plan[row, SPLIT_TILES]
    tile = max(item.first_key // TILE, split * split_tiles)
    end_tile = min((item.end_key + TILE - 1) // TILE, (split + 1) * split_tiles)
    if tile < end_tile:
        entry = _int(0)
        if problem[STARTS] != 0:
            first_granule = max(item.first_key, tile * TILE) // problem[BLOCK_SIZE]
            entry = find_entry(problem, row, plan[row, ENTRIES], first_granule)
        _attend_tiles(problem, plan, softcap, arrays, item, tile, end_tile, entry)
    _end_rows(problem, plan, arrays, item)


@jit
def _row_of(plan: Any, batch: int, item: int) -> Any:
    """The row that an item belongs to: the last one whose first item is not above it, because a row without items has
    the same first item as the next."""
    low = _int(0)
    high = batch - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if plan[middle, FIRST_ITEM] <= item:
            low = middle
        else:
            high = middle - 1
    return low


yield_core = types.ExternalFunction("sched_yield", types.int32())


@jit
def run_items(
    problem: Any, plan: Any, scale: float, softcap: float, scratch: int, counters: Any, is_caller: int
) -> None:
    """Attend items until none is left; the calling thread then waits for those in other hands and merges the splits.

    ``counters`` is uint64: the next item, the number of items done. A thread that comes after the caller has returned
    finds no item and touches nothing but ``plan`` and ``counters``.
    """
    batch = problem[BATCH]
    items = plan[batch, FIRST_ITEM]
    while True:
        item = _int(fetch_add_acq_rel(counters, 0, np.uint64(1)))
        if item >= items:
            break
        row = _row_of(plan, batch, item)
        rest = item - plan[row, FIRST_ITEM]
        splits = plan[row, SPLITS]
        begin, end = tokens_of(problem, row)
        queries = queries_per_item(problem[GROUP_SIZE])
        blocks = (end - begin + queries - 1) // queries
        head = rest // (blocks * splits)
        rest -= head * blocks * splits
        block = rest // splits
        # the last queries see the most keys: long items first keeps the threads busy to the end
        _attend_item(problem, plan, scale, softcap, scratch, row, head, blocks - 1 - block, rest - block * splits)
        fetch_add_acq_rel(counters, 1, np.uint64(1))
    if is_caller:
        while _int(load_acquire(counters, 1)) < items:
            yield_core()
        if plan[batch, FIRST_PARTIAL] > 0:
            combine_splits(problem, plan, scratch)
        if problem[MASSES] != 0:
            write_masses(problem, plan, scratch)
