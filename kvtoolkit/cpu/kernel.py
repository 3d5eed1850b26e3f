"""Paged attention in compiled code: one problem, cut into items, each item a walk over the tiles of one sequence.

An item is one kv head, one block of a row's queries (all query heads of the group, so that K and V are read once) and
one split of its positions. Threads claim items from a counter. Tiles are 64 consecutive positions and splits begin at
multiples of a tile, so the result depends neither on where the tokens lie, nor on the batch around a row, nor on the
number of threads.

A tile that lies in a quantized tier is one block of it: the stages that fill the two tiles dequantize it instead of
gathering rows, and nothing else differs.

The problem is one int64 array, its fields named below: addresses, strides in elements, sizes. A single array of a
single type means a single compilation for every dtype, layout and option.

Source: block tables, Kwon et al. 2023 (arXiv:2309.06180), sec. 4; tiled online softmax, Dao 2023 (arXiv:2307.08691),
sec. 3; splits over the keys, Dao et al. 2023 (Flash-Decoding).
"""

import math
from typing import Any

import numpy as np
from numba import types

from allocators._bits import fetch_add_acq_rel, load_acquire
from allocators._jit import jit
from kvtoolkit.cpu.dequantize import block_bytes, dequantize_keys, dequantize_values
from kvtoolkit.cpu.softmax import absorb_scores, bias_scores, cap_scores, mask_scores, tile_lse
from kvtoolkit.cpu.tiles import TILE, all_finite, gather_rows, gather_transposed, score_rows, weigh_values
from kvtoolkit.cpu.vector import (
    ITEMSIZE,
    LANES,
    add,
    exp,
    load,
    load8,
    load_f32,
    multiply,
    multiply_add,
    prefetch,
    read_f32,
    read_i32,
    read_i64,
    splat,
    store,
    store8,
    store_f32,
    subtract,
    total,
    write_f32,
    write_i64,
)
from kvtoolkit.findings import Finding
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT, entry_granule, entry_length, entry_tier

(
    Q, Q_TOKEN, Q_HEAD,                 # address, then strides in elements
    OUT, OUT_TOKEN, OUT_HEAD,
    LSE,                                # address, [num_tokens, num_q_heads] float32; 0 = not wanted
    KEYS, KEYS_BLOCK, KEYS_HEAD, KEYS_SLOT,
    VALUES, VALUES_BLOCK, VALUES_HEAD, VALUES_SLOT,
    TABLE, TABLE_ROW,                   # address, int32 per row
    STARTS, STARTS_ROW,                 # alike; address 0 = the table holds plain block ids
    SEQ_LENS,
    CU_SEQLENS,                         # address; 0 = one query per row
    SLOPES, SLOPES_ROW,                 # address, float32 per query head, 0 = none; from row to row, 0 = same for all
    SINKS,                              # address, float32 per query head; 0 = none
    PARTIALS,                           # address, one row of float32 per token, query head and split
    DTYPE, BATCH, NUM_TOKENS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM,
    BLOCK_SIZE, NUM_BLOCKS, MAX_ENTRIES,
    LEFT, RIGHT,                        # keys visible before and after a query's position; -1 = all
    NUM_SPLITS,                         # 0 = automatic
    TIERED,                             # 0 = the table knows no tiers, and the seven fields that follow are 0
    FIRST_HOT, FIRST_WARM, FIRST_COLD,  # granules, in the order of the tiers
    WARM, COLD,                         # addresses of blocks, [num_blocks, num_kv_heads, nbytes]; 0 = no such tier
    WARM_BLOCKS, COLD_BLOCKS,
    MASSES, MASS_TILES,                 # address and tiles of block_mass, [batch, tiles, num_kv_heads]; 0 = not wanted
    TILE_LSES,                          # address, float32 per token, query head and tile; with MASSES
    NUM_FIELDS,
) = range(49)  # fmt: skip

# columns of the plan, one line per row of the batch and one more that closes the sums
FIRST_ITEM, FIRST_PARTIAL, FIRST_TILE, WORK, SPLITS, SPLIT_TILES, ENTRIES = range(7)
PLAN_COLUMNS = 7

_MOST_ROWS_TO_PREFETCH = 16  # with more, arithmetic hides the way to memory
ROWS_PER_ITEM = 96
"""Query rows (queries times group) that share a gathered tile: enough to hide the gather, few enough for the L2."""
_AUTO_SPLIT_TILES = 8
_AUTO_SPLIT_QUERIES = 16  # rows with more queries than this make enough items without splits
_PARTIAL_TAIL = 16  # floats behind the sums of a partial result: peak, mass


# Numba's casts, without the scalar types that NumPy gives them
_int: Any = np.int64
_float: Any = np.float64
_single: Any = np.float32


@jit
def _tokens(problem: Any, row: int) -> Any:
    """First query token of ``row`` and the one past its last."""
    if problem[CU_SEQLENS] == 0:
        return _int(row), _int(row + 1)
    first = problem[CU_SEQLENS] + 4 * row
    return _int(read_i32(first)), _int(read_i32(first + 4))


@jit
def queries_per_item(group_size: int) -> int:
    """Query tokens of one item."""
    return max(1, ROWS_PER_ITEM // group_size)


@jit
def partial_floats(head_dim: int) -> int:
    """Floats of one partial result: the sums, then peak and mass in a tail that keeps the next one aligned."""
    return (head_dim + 15) // 16 * 16 + _PARTIAL_TAIL


@jit
def _padded(tiles: int) -> int:
    """Floats of one query's line of tiles: whole vectors."""
    return (tiles + LANES - 1) // LANES * LANES


@jit
def scratch_bytes(group_size: int, head_dim: int) -> int:
    """Bytes that a thread's scratch needs: the arrays at the head of `_attend_item`."""
    rows = max(ROWS_PER_ITEM, group_size)
    width = (head_dim + 15) // 16 * 16
    return 8 * TILE * width + 4 * rows * (TILE + 2 * width) + 64 * rows + 4 * rows + 32 * TILE


@jit
def plan_items(problem: Any, plan: Any, check: int) -> Any:
    """Cut the problem into items and, with ``check``, look at every length and every table entry that will be read.

    Fills ``plan`` ``[batch + 1, PLAN_COLUMNS]``; the last line holds the number of items, of partial results, of
    tiles times queries, and the work in multiply-adds. Returns ``(code, row, value)``; the code is `Finding.OK` if
    all is well.
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
        if read_i32(problem[CU_SEQLENS]) != 0:
            return Finding.BAD_CU_SEQLENS, _int(0), _int(read_i32(problem[CU_SEQLENS]))
        for row in range(batch):
            begin, end = _tokens(problem, row)
            if end < begin:
                return Finding.BAD_CU_SEQLENS, _int(row + 1), end
        closing = _int(read_i32(problem[CU_SEQLENS] + 4 * batch))
        if closing != problem[NUM_TOKENS]:
            return Finding.BAD_CU_SEQLENS, batch, closing
    for row in range(batch):
        begin, end = _tokens(problem, row)
        seq_len = _int(read_i32(problem[SEQ_LENS] + 4 * row))
        plan[row, ENTRIES] = problem[MAX_ENTRIES]
        if check:
            code, value = _check_row(problem, row, seq_len)
            if code != Finding.OK:
                return code, _int(row), value
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
        lines += (end - begin) * q_heads * _padded(tiles)
        work += ((end - begin) * problem[GROUP_SIZE] + 8) * heads * seq_len * problem[HEAD_DIM]
    plan[batch, FIRST_ITEM] = items
    plan[batch, FIRST_PARTIAL] = partials
    plan[batch, FIRST_TILE] = lines
    plan[batch, WORK] = work
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
    """What is wrong with an entry outside the hot tier that begins at logical granule ``covered``."""
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


@jit
def _find_entry(problem: Any, row: int, entries: int, granule: int) -> Any:
    """Which of a row's entries holds logical ``granule``: the last one, not empty, that does not begin above it."""
    table = problem[TABLE] + 4 * row * problem[TABLE_ROW]
    starts = problem[STARTS] + 4 * row * problem[STARTS_ROW]
    low = _int(0)
    high = entries - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if read_i32(table + 4 * middle) >= 0 and read_i32(starts + 4 * middle) <= granule:
            low = middle
        else:
            high = middle - 1
    return low


@jit
def _locate(problem: Any, row: int, position: int, count: int, first: int, entry: int, keys: int, values: int) -> int:
    """Write the offsets of ``count`` positions from ``position`` on to ``keys[first:]`` and ``values[first:]``.

    The offsets before and after them repeat the nearest one, so that all 64 may be read. Returns the last entry used.
    """
    block_size = problem[BLOCK_SIZE]
    table = problem[TABLE] + 4 * row * problem[TABLE_ROW]
    starts = problem[STARTS] + 4 * row * problem[STARTS_ROW]
    t = first
    end = first + count
    while t < end:
        logical = position // block_size
        slot = position - logical * block_size
        if problem[STARTS] == 0:
            block = _int(read_i32(table + 4 * logical))
        else:
            word = read_i32(table + 4 * entry)
            while read_i32(starts + 4 * entry) + entry_length(word) <= logical:
                entry += 1
                word = read_i32(table + 4 * entry)
            block = _int(entry_granule(word)) - problem[FIRST_HOT] + logical - _int(read_i32(starts + 4 * entry))
        run = min(block_size - slot, end - t)
        key = block * problem[KEYS_BLOCK] + slot * problem[KEYS_SLOT]
        value = block * problem[VALUES_BLOCK] + slot * problem[VALUES_SLOT]
        for i in range(run):
            write_i64(keys + 8 * (t + i), key + i * problem[KEYS_SLOT])
            write_i64(values + 8 * (t + i), value + i * problem[VALUES_SLOT])
        if t == first:
            for i in range(first):
                write_i64(keys + 8 * i, key)
                write_i64(values + 8 * i, value)
        t += run
        position += run
        if t == end:
            key += (run - 1) * problem[KEYS_SLOT]
            for i in range(end, TILE):
                write_i64(keys + 8 * i, key)
    return entry


@jit
def _locate_block(problem: Any, row: int, head: int, granule: int, entry: int) -> Any:
    """``(entry, tier, address)`` of the tile that holds logical ``granule``; address 0 where it lies in the hot tier.

    ``entry`` comes in as one that is not behind it, and goes out as its own.
    """
    if problem[TIERED] == 0:
        return entry, _int(TIER_HOT), _int(0)
    table = problem[TABLE] + 4 * row * problem[TABLE_ROW]
    starts = problem[STARTS] + 4 * row * problem[STARTS_ROW]
    word = read_i32(table + 4 * entry)
    while read_i32(starts + 4 * entry) + entry_length(word) <= granule:
        entry += 1
        word = read_i32(table + 4 * entry)
    tier = _int(entry_tier(word))
    if tier == TIER_HOT:
        return entry, tier, _int(0)
    block = (_int(entry_granule(word)) - problem[FIRST_HOT + tier]) // MAX_BLOCK_GRANULES
    nbytes = block_bytes(tier, problem[HEAD_DIM])
    return entry, tier, problem[WARM + tier - 1] + (block * problem[NUM_KV_HEADS] + head) * nbytes


@jit
def _seen(problem: Any, lowest: int, highest: int, seq_len: int, start: int) -> Any:
    """The positions of the tile at ``start`` that all queries from ``lowest`` to ``highest`` see: first, one past last.

    Both count from the tile's first position and are 0 or more; the first may be beyond the tile, the last too.
    """
    first = _int(0)
    past = seq_len - start
    if problem[LEFT] >= 0:
        first = max(first, highest - problem[LEFT] - start)
    if problem[RIGHT] >= 0:
        past = min(past, lowest + problem[RIGHT] + 1 - start)
    return first, max(past, _int(0))


@jit
def _prefetch_rows(base: int, offsets: int, first: int, end: int, head_dim: int, itemsize: int) -> None:
    """Ask for rows of a tile; the processor's own prefetcher does not see from one block to the next."""
    for t in range(first, end):
        address = base + itemsize * read_i64(offsets + 8 * t)
        for line in range(0, head_dim * itemsize, 64):
            prefetch(address + line)


@jit
def _prefetch_block(block: int, nbytes: int, quarter: int) -> None:
    """Ask for a quarter of a quantized block."""
    for line in range(nbytes * quarter // 4, nbytes * (quarter + 1) // 4, 64):
        prefetch(block + line)


@jit
def _attend_item(
    problem: Any, plan: Any, scale: float, softcap: float, scratch: int, row: int, head: int, block: int, split: int
) -> None:
    group = problem[GROUP_SIZE]
    head_dim = problem[HEAD_DIM]
    dtype = problem[DTYPE]
    itemsize = ITEMSIZE[dtype]
    width = (head_dim + 15) // 16 * 16
    token, token_end = _tokens(problem, row)
    num_queries = token_end - token
    first_query = block * queries_per_item(group)
    queries = min(queries_per_item(group), num_queries - first_query)
    rows = queries * group
    seq_len = _int(read_i32(problem[SEQ_LENS] + 4 * row))

    most = max(ROWS_PER_ITEM, group)
    k_tile = scratch
    v_tile = k_tile + 4 * TILE * width
    scores = v_tile + 4 * TILE * width
    q_rows = scores + 4 * TILE * most
    out_rows = q_rows + 4 * width * most
    k_offsets = out_rows + 4 * width * most
    v_offsets = k_offsets + 8 * TILE
    next_k_offsets = v_offsets + 8 * TILE
    next_v_offsets = next_k_offsets + 8 * TILE
    masses = next_v_offsets + 8 * TILE
    peaks = masses + 64 * most

    zero = splat(_single(0.0))
    if seq_len > 0:
        factor = splat(_single(scale))
        for r in range(rows):
            i = r // group
            q_head = head * group + r - i * group
            source = problem[Q] + itemsize * ((token + first_query + i) * problem[Q_TOKEN] + q_head * problem[Q_HEAD])
            for d in range(0, head_dim & ~15, 16):
                store_f32(q_rows + 4 * (r * width + d), multiply(factor, load(dtype, source + itemsize * d)))
            if head_dim & 15:
                d = head_dim & ~15
                store_f32(q_rows + 4 * (r * width + d), multiply(factor, load8(dtype, source + itemsize * d)))
    for r in range(rows):
        write_f32(peaks + 4 * r, _single(-math.inf))
        store_f32(masses + 64 * r, zero)
        for d in range(0, width, 16):
            store_f32(out_rows + 4 * (r * width + d), zero)

    q_heads = problem[NUM_KV_HEADS] * group
    line_tiles = _padded((seq_len + TILE - 1) // TILE)
    tile_lses = problem[TILE_LSES] + 4 * plan[row, FIRST_TILE]
    left = problem[LEFT]
    right = problem[RIGHT]
    lowest = seq_len - num_queries + first_query  # position of the first query
    highest = lowest + queries - 1
    first_key = _int(0)
    if left >= 0:
        first_key = max(first_key, lowest - left)
    end_key = seq_len
    if right >= 0:
        end_key = min(end_key, highest + right + 1)
    split_tiles = plan[row, SPLIT_TILES]
    tile = max(first_key // TILE, split * split_tiles)
    end_tile = min((end_key + TILE - 1) // TILE, (split + 1) * split_tiles)
    entry = _int(0)
    if tile < end_tile and problem[STARTS] != 0:
        entry = _find_entry(problem, row, plan[row, ENTRIES], max(first_key, tile * TILE) // problem[BLOCK_SIZE])
    k_base = problem[KEYS] + itemsize * head * problem[KEYS_HEAD]
    v_base = problem[VALUES] + itemsize * head * problem[VALUES_HEAD]
    start = tile * TILE
    begin = max(_int(0), first_key - start)
    end = min(_int(TILE), end_key - start)
    tier = next_tier = _int(TIER_HOT)
    quantized = next_quantized = _int(0)  # address of the block that is the tile
    if tile < end_tile:
        entry, tier, quantized = _locate_block(problem, row, head, (start + begin) // problem[BLOCK_SIZE], entry)
        if quantized == 0:
            entry = _locate(problem, row, start + begin, end - begin, begin, entry, k_offsets, v_offsets)
    while tile < end_tile:
        next_start = start + TILE
        next_end = min(_int(TILE), end_key - next_start)
        ahead = _int(0)
        bytes_ahead = _int(0)
        if tile + 1 < end_tile:
            entry, next_tier, next_quantized = _locate_block(
                problem, row, head, next_start // problem[BLOCK_SIZE], entry
            )
            if next_quantized == 0:
                entry = _locate(problem, row, next_start, next_end, _int(0), entry, next_k_offsets, next_v_offsets)
            if rows <= _MOST_ROWS_TO_PREFETCH:
                if next_quantized == 0:
                    ahead = next_end
                else:
                    bytes_ahead = block_bytes(next_tier, head_dim)
        # between the stages, a few lines at a time: more would only wait for each other
        half = ahead // 2
        _prefetch_rows(k_base, next_k_offsets, _int(0), half, head_dim, itemsize)
        _prefetch_block(next_quantized, bytes_ahead, 0)
        if quantized == 0:
            gather_transposed(dtype, k_tile, k_base, k_offsets, head_dim)
        else:
            dequantize_keys(tier, k_tile, quantized, head_dim, v_tile)
        _prefetch_rows(k_base, next_k_offsets, half, ahead, head_dim, itemsize)
        _prefetch_block(next_quantized, bytes_ahead, 1)
        score_rows(scores, q_rows, k_tile, width, rows, head_dim)
        _prefetch_rows(v_base, next_v_offsets, _int(0), half, head_dim, itemsize)
        _prefetch_block(next_quantized, bytes_ahead, 2)
        if quantized == 0:
            gather_rows(dtype, v_tile, width, v_base, v_offsets, end, head_dim)
        else:
            dequantize_values(tier, v_tile, quantized, head_dim, k_tile)
        _prefetch_rows(v_base, next_v_offsets, half, ahead, head_dim, itemsize)
        _prefetch_block(next_quantized, bytes_ahead, 3)
        for r in range(rows):
            i = r // group
            line = scores + 4 * TILE * r
            position = lowest + i
            if softcap > 0.0:
                cap_scores(line, softcap)
            if problem[SLOPES] != 0:
                slope_index = row * problem[SLOPES_ROW] + head * group + r - i * group
                slope = read_f32(problem[SLOPES] + 4 * slope_index)
                bias_scores(line, slope, start - position)
            first, past = _seen(problem, position, position, seq_len, start)
            if first > 0 or past < TILE:
                mask_scores(line, first, past - 1)
            absorb_scores(line, peaks + 4 * r, masses + 64 * r, out_rows + 4 * width * r, width)
            if problem[MASSES] != 0:
                query = (first_query + i) * q_heads + head * group + r - i * group
                write_f32(tile_lses + 4 * (query * line_tiles + tile), tile_lse(line, peaks + 4 * r))
        first, past = _seen(problem, lowest, highest, seq_len, start)
        if all_finite(v_tile, width, _int(0), min(first, end)) and all_finite(v_tile, width, past, end):
            weigh_values(out_rows, scores, v_tile, width, rows, end)
        else:  # 0 * NaN is NaN: each query's weights meet only the values that it sees
            for r in range(rows):
                first, past = _seen(problem, lowest + r // group, lowest + r // group, seq_len, start)
                line, seen = scores + 4 * (TILE * r + first), v_tile + 4 * width * first
                weigh_values(out_rows + 4 * width * r, line, seen, width, 1, min(past, end) - first)
        tile += 1
        start, end = next_start, next_end
        tier, quantized = next_tier, next_quantized
        k_offsets, next_k_offsets = next_k_offsets, k_offsets
        v_offsets, next_v_offsets = next_v_offsets, v_offsets

    splits = plan[row, SPLITS]
    for r in range(rows):
        i = r // group
        q_head = head * group + r - i * group
        if splits == 1:
            _finish(
                problem, token + first_query + i, q_head, seq_len,
                out_rows + 4 * width * r, read_f32(peaks + 4 * r), total(load_f32(masses + 64 * r)),
            )  # fmt: skip
        else:
            index = plan[row, FIRST_PARTIAL] + ((first_query + i) * q_heads + q_head) * splits + split
            partial = problem[PARTIALS] + 4 * index * partial_floats(head_dim)
            for d in range(0, width, 16):
                store_f32(partial + 4 * d, load_f32(out_rows + 4 * (width * r + d)))
            write_f32(partial + 4 * width, read_f32(peaks + 4 * r))
            write_f32(partial + 4 * (width + 1), total(load_f32(masses + 64 * r)))


@jit
def _finish(problem: Any, token: int, q_head: int, seq_len: int, sums: int, peak: float, mass: float) -> None:
    """Divide the sums by the mass, the sink's included, and write ``out`` and ``lse`` of one query."""
    head_dim = problem[HEAD_DIM]
    dtype = problem[DTYPE]
    itemsize = ITEMSIZE[dtype]
    top = _float(peak)
    whole = _float(mass)
    share = 1.0
    if problem[SINKS] != 0 and seq_len > 0:
        sink = _float(read_f32(problem[SINKS] + 4 * q_head))
        if sink > top:
            share = math.exp(top - sink)
            whole = whole * share + 1.0
            top = sink
        elif sink > -math.inf:
            whole += math.exp(sink - top)
    factor = 0.0
    lse = -math.inf
    if whole > 0.0 or math.isnan(whole):  # an empty mass means that nothing was visible
        factor = share / whole
        lse = top + math.log(whole)
        if math.isnan(whole):
            lse = math.nan
    scale = splat(_single(factor))
    target = problem[OUT] + itemsize * (token * problem[OUT_TOKEN] + q_head * problem[OUT_HEAD])
    for d in range(0, head_dim & ~15, 16):
        store(dtype, target + itemsize * d, multiply(scale, load_f32(sums + 4 * d)))
    if head_dim & 15:
        d = head_dim & ~15
        store8(dtype, target + itemsize * d, multiply(scale, load_f32(sums + 4 * d)))
    if problem[LSE] != 0:
        q_heads = problem[NUM_KV_HEADS] * problem[GROUP_SIZE]
        write_f32(problem[LSE] + 4 * (token * q_heads + q_head), _single(lse))


@jit
def _combine_splits(problem: Any, plan: Any, scratch: int) -> None:
    """Merge the partial results of every row with several splits, in the order of the splits."""
    q_heads = problem[NUM_KV_HEADS] * problem[GROUP_SIZE]
    width = (problem[HEAD_DIM] + 15) // 16 * 16
    stride = 4 * partial_floats(problem[HEAD_DIM])
    for row in range(problem[BATCH]):
        splits = plan[row, SPLITS]
        if splits == 1:
            continue
        begin, end = _tokens(problem, row)
        seq_len = _int(read_i32(problem[SEQ_LENS] + 4 * row))
        for i in range(end - begin):
            for q_head in range(q_heads):
                index = plan[row, FIRST_PARTIAL] + (i * q_heads + q_head) * splits
                partial = problem[PARTIALS] + index * stride
                peak = _single(-math.inf)
                for s in range(splits):
                    peak = max(peak, read_f32(partial + s * stride + 4 * width))
                mass = _single(0.0)
                for d in range(0, width, 16):
                    store_f32(scratch + 4 * d, splat(_single(0.0)))
                for s in range(splits):
                    part = partial + s * stride
                    part_peak = read_f32(part + 4 * width)
                    part_mass = read_f32(part + 4 * (width + 1))
                    weight = _single(0.0)
                    if part_peak > -math.inf:
                        weight = _single(math.exp(part_peak - peak))
                    elif math.isnan(part_mass):
                        weight = _single(1.0)
                    if weight != 0.0:  # NaN, of a score of +inf, is kept
                        mass = _single(mass + weight * part_mass)
                        factor = splat(weight)
                        for d in range(0, width, 16):
                            merged = multiply_add(factor, load_f32(part + 4 * d), load_f32(scratch + 4 * d))
                            store_f32(scratch + 4 * d, merged)
                _finish(problem, begin + i, q_head, seq_len, scratch, peak, mass)


@jit
def _write_masses(problem: Any, plan: Any, scratch: int) -> None:
    """The mass of every tile: exp(lse of the tile - lse), averaged over the queries of the row and of the group."""
    heads = problem[NUM_KV_HEADS]
    group = problem[GROUP_SIZE]
    q_heads = heads * group
    for row in range(problem[BATCH]):
        begin, end = _tokens(problem, row)
        tiles = (_int(read_i32(problem[SEQ_LENS] + 4 * row)) + TILE - 1) // TILE
        if begin == end:
            tiles = _int(0)
        share = splat(_single(1.0 / max(1, (end - begin) * group)))
        lines = problem[TILE_LSES] + 4 * plan[row, FIRST_TILE]
        target = problem[MASSES] + 4 * row * problem[MASS_TILES] * heads
        for first in range(0, tiles, LANES):
            for head in range(heads):
                mass = splat(_single(0.0))
                for i in range(end - begin):
                    for q_head in range(head * group, (head + 1) * group):
                        lse = read_f32(problem[LSE] + 4 * ((begin + i) * q_heads + q_head))
                        if lse == -math.inf:  # saw nothing
                            continue
                        line = lines + 4 * ((i * q_heads + q_head) * _padded(tiles) + first)
                        mass = add(mass, exp(subtract(load_f32(line), splat(lse))))
                store_f32(scratch, multiply(share, mass))
                for t in range(min(_int(LANES), tiles - first)):
                    write_f32(target + 4 * ((first + t) * heads + head), read_f32(scratch + 4 * t))
        for place in range(tiles * heads, problem[MASS_TILES] * heads):
            write_f32(target + 4 * place, _single(0.0))


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
        low = _int(0)
        high = batch - 1
        while (
            low < high
        ):  # the last row whose first item is not above it: rows without items share theirs with the next
            middle = (low + high + 1) >> 1
            if plan[middle, FIRST_ITEM] <= item:
                low = middle
            else:
                high = middle - 1
        rest = item - plan[low, FIRST_ITEM]
        splits = plan[low, SPLITS]
        begin, end = _tokens(problem, low)
        block_size = queries_per_item(problem[GROUP_SIZE])
        blocks = (end - begin + block_size - 1) // block_size
        head = rest // (blocks * splits)
        rest -= head * blocks * splits
        block = rest // splits
        # the last queries see the most keys: long items first keeps the threads busy to the end
        _attend_item(problem, plan, scale, softcap, scratch, low, head, blocks - 1 - block, rest - block * splits)
        fetch_add_acq_rel(counters, 1, np.uint64(1))
    if is_caller:
        while _int(load_acquire(counters, 1)) < items:
            yield_core()
        if plan[batch, FIRST_PARTIAL] > 0:
            _combine_splits(problem, plan, scratch)
        if problem[MASSES] != 0:
            _write_masses(problem, plan, scratch)
