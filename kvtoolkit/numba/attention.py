"""Paged attention as Numba kernels: the readable twins of the CUDA kernels, over plain blocks, entries and tiers.

    q            [num_tokens, num_q_heads, head_dim]               uint16 words of float16 or bfloat16; out too
    k_cache      [num_blocks, num_kv_heads, block_size, head_dim]  as q, any strides, so NHD comes transposed
    v_cache      as k_cache
    warm, cold   [num_blocks, num_kv_heads, nbytes] uint8, see `kvtoolkit.formats.quantized`; empty = no such tier
    block_table  [batch, max_entries] int32 ids or entries;        block_starts [batch, max_entries] int32, granules
    seq_lens     [batch] int32, tokens, the new ones included;     0 = padding row, nothing of it is read
    cu_seqlens_q [batch + 1] int32;                                [0] = one query per row
    sinks        [num_q_heads] float32;                            [0] = none; alibi_slopes too
    lse          [num_tokens, num_q_heads] float32, natural log;   [0, 0] = not wanted
    block_mass   [batch, max_tiles, num_kv_heads] float32, zeros;  [0, 0, 0] = not wanted

Launch:   grid (num_tokens, num_kv_heads, ceil(group_size / 8)), any number of threads, 19 KiB static shared memory.
Numerics: scores and running state in float32; a query that sees nothing gives out = 0, lse = -inf or the sink's logit.
Source:   online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867), alg. 3; block tables, Kwon et al. 2023
          (arXiv:2309.06180), sec. 4.

One CTA walks all tiles of one query, for up to eight query heads that share a kv head. A query sees one run of
positions, so that masks are the bounds of loops, and slots outside it, which may hold NaN, are never touched. Where
masses are wanted it walks once more, since what share of the attention a score is, only the last tile tells.
"""

import math
from typing import Any

import numpy as np

from kvtoolkit.formats import entry as tables
from kvtoolkit.formats.entry import GRANULE, MAX_BLOCK_GRANULES, TIER_COLD, TIER_WARM
from kvtoolkit.numba.device import NEG_INF, cuda, device, device_twin, float32, kernel, narrow, widen
from kvtoolkit.numba.quantized import cold_key, cold_value, warm_key, warm_value

TILE = 64
"""Consecutive positions between two updates of the softmax state."""
MAX_HEAD_DIM = 256
HEADS_PER_CTA = 8

entry_granule = device_twin(tables.entry_granule)
entry_tier = device_twin(tables.entry_tier)
pack_entry = device_twin(tables.pack_entry)


@kernel
def paged_attention(
    q: Any, k_cache: Any, v_cache: Any, block_table: Any, seq_lens: Any, cu_seqlens_q: Any, sinks: Any,
    alibi_slopes: Any, out: Any, lse: Any, block_mass: Any, softmax_scale: float, left: int, right: int,
    softcap: float, is_bfloat16: bool,
) -> None:  # fmt: skip
    """``block_table`` holds the id of each block; ``left`` and ``right`` bound what a query sees, -1 = unbounded."""
    attend_query(
        block_by_id, (block_table,), read_key, read_value, (k_cache, v_cache), q, seq_lens, cu_seqlens_q, sinks,
        alibi_slopes, out, lse, block_mass, softmax_scale, left, right, softcap, is_bfloat16,
    )  # fmt: skip


@kernel
def variable_block_attention(
    q: Any, k_cache: Any, v_cache: Any, block_table: Any, block_starts: Any, seq_lens: Any, cu_seqlens_q: Any,
    sinks: Any, alibi_slopes: Any, out: Any, lse: Any, block_mass: Any, softmax_scale: float, left: int, right: int,
    softcap: float, is_bfloat16: bool,
) -> None:  # fmt: skip
    """``block_table`` holds entries of 1-8 granules, ``block_starts`` the logical granule where each begins."""
    attend_query(
        block_by_entry, (block_table, block_starts), read_key, read_value, (k_cache, v_cache), q, seq_lens,
        cu_seqlens_q, sinks, alibi_slopes, out, lse, block_mass, softmax_scale, left, right, softcap, is_bfloat16,
    )  # fmt: skip


@kernel
def tiered_attention(
    q: Any, k_cache: Any, v_cache: Any, warm: Any, cold: Any, block_table: Any, block_starts: Any, first_hot: int,
    first_warm: int, first_cold: int, seq_lens: Any, cu_seqlens_q: Any, sinks: Any, alibi_slopes: Any, out: Any,
    lse: Any, block_mass: Any, softmax_scale: float, left: int, right: int, softcap: float, is_bfloat16: bool,
) -> None:  # fmt: skip
    """Granules count through the tiers; those of the hot one begin at ``first_hot``."""
    attend_query(
        block_by_tier, (block_table, block_starts, first_hot, first_warm, first_cold), read_tiered_key,
        read_tiered_value, (k_cache, v_cache, warm, cold), q, seq_lens, cu_seqlens_q, sinks, alibi_slopes, out, lse,
        block_mass, softmax_scale, left, right, softcap, is_bfloat16,
    )  # fmt: skip


@kernel
def clear_masses(block_mass: Any) -> None:
    """One CTA clears one row's masses, to which `tiered_attention` and the others add."""
    row = cuda.blockIdx.x
    max_tiles, num_kv_heads = block_mass.shape[1], block_mass.shape[2]
    for i in range(cuda.threadIdx.x, max_tiles * num_kv_heads, cuda.blockDim.x):
        block_mass[row, i // num_kv_heads, i % num_kv_heads] = float32(0.0)


# -- where a position is -----------------------------------------------------------------------------------------------


@device
def block_by_id(block_tables: Any, row: int, block: int) -> Any:
    """The block of the cache that is the row's ``block``-th."""
    (block_table,) = block_tables
    return block_table[row, block]


@device
def block_by_entry(block_tables: Any, row: int, granule: int) -> Any:
    """The granule of the cache that is the row's ``granule``-th."""
    block_table, block_starts = block_tables
    i = find_entry(block_table, block_starts, row, granule)
    return entry_granule(block_table[row, i]) + granule - block_starts[row, i]


@device
def block_by_tier(block_tables: Any, row: int, granule: int) -> Any:
    """The row's ``granule``-th granule as an entry of its own, whose granules count from 0 in each tier."""
    block_table, block_starts, first_hot, first_warm, first_cold = block_tables
    i = find_entry(block_table, block_starts, row, granule)
    tier = entry_tier(block_table[row, i])
    first = first_hot
    if tier == TIER_WARM:
        first = first_warm
    elif tier == TIER_COLD:
        first = first_cold
    return pack_entry(entry_granule(block_table[row, i]) + granule - block_starts[row, i] - first, 1, tier)


@device
def find_entry(block_table: Any, block_starts: Any, row: int, granule: int) -> Any:
    """Which entry of the row has its ``granule``-th granule: the last one whose start is not above it."""
    low = 0
    high = block_table.shape[1] - 1
    while low < high:
        middle = (low + high + 1) // 2
        if block_table[row, middle] >= 0 and block_starts[row, middle] <= granule:
            low = middle
        else:
            high = middle - 1
    return low


# -- what is there -----------------------------------------------------------------------------------------------------


@device
def read_key(caches: Any, block: int, kv_head: int, slot: int, dim: int, is_bfloat16: bool) -> Any:
    """An element of a key; ``block`` is what `block_by_id` or `block_by_entry` has found."""
    return widen(caches[0][block, kv_head, slot, dim], is_bfloat16)


@device
def read_value(caches: Any, block: int, kv_head: int, slot: int, dim: int, is_bfloat16: bool) -> Any:
    """An element of a value."""
    return widen(caches[1][block, kv_head, slot, dim], is_bfloat16)


@device
def read_tiered_key(caches: Any, entry: int, kv_head: int, slot: int, dim: int, is_bfloat16: bool) -> Any:
    """An element of a key in any tier; ``entry`` is what `block_by_tier` has found."""
    tier, granule = entry_tier(entry), entry_granule(entry)
    if tier == TIER_WARM:
        block, token = block_and_token(granule, slot)
        return warm_key(caches[2][block, kv_head], token, dim, caches[0].shape[3])
    if tier == TIER_COLD:
        block, token = block_and_token(granule, slot)
        return cold_key(caches[3][block, kv_head], token, dim, caches[0].shape[3])
    return read_key(caches, granule, kv_head, slot, dim, is_bfloat16)


@device
def read_tiered_value(caches: Any, entry: int, kv_head: int, slot: int, dim: int, is_bfloat16: bool) -> Any:
    """An element of a value in any tier."""
    tier, granule = entry_tier(entry), entry_granule(entry)
    if tier == TIER_WARM:
        block, token = block_and_token(granule, slot)
        return warm_value(caches[2][block, kv_head], token, dim, caches[1].shape[3])
    if tier == TIER_COLD:
        block, token = block_and_token(granule, slot)
        return cold_value(caches[3][block, kv_head], token, dim, caches[1].shape[3])
    return read_value(caches, granule, kv_head, slot, dim, is_bfloat16)


@device
def block_and_token(granule: int, slot: int) -> Any:
    """The block of 64 tokens that a granule of a quantized tier is part of, and which of them a slot is."""
    return granule // MAX_BLOCK_GRANULES, granule % MAX_BLOCK_GRANULES * GRANULE + slot


# -- attention ---------------------------------------------------------------------------------------------------------


@device
def attend_query(
    find_block: Any, block_tables: Any, key_of: Any, value_of: Any, caches: Any, q: Any, seq_lens: Any,
    cu_seqlens_q: Any, sinks: Any, alibi_slopes: Any, out: Any, lse: Any, block_mass: Any, softmax_scale: float,
    left: int, right: int, softcap: float, is_bfloat16: bool,
) -> None:  # fmt: skip
    token, kv_head = cuda.blockIdx.x, cuda.blockIdx.y
    group_size = q.shape[1] // caches[0].shape[1]
    first_row = cuda.blockIdx.z * HEADS_PER_CTA
    rows = min(HEADS_PER_CTA, group_size - first_row)
    q_head = kv_head * group_size + first_row  # of the first row; the state has one row per query head
    head_dim = q.shape[2]

    q_rows = cuda.shared.array((HEADS_PER_CTA, MAX_HEAD_DIM), np.float32)
    sums = cuda.shared.array((HEADS_PER_CTA, MAX_HEAD_DIM), np.float32)  # of exp(score - row_max) * value
    scores = cuda.shared.array((HEADS_PER_CTA, TILE), np.float32)  # then exp(score - row_max)
    row_max = cuda.shared.array(HEADS_PER_CTA, np.float32)  # largest score so far
    row_sum = cuda.shared.array(HEADS_PER_CTA, np.float32)  # sum of exp(score - row_max)
    rescale = cuda.shared.array(HEADS_PER_CTA, np.float32)  # exp(row_max before this tile - row_max)
    blocks = cuda.shared.array(TILE, np.int64)  # where each position of the tile is in the cache
    slots = cuda.shared.array(TILE, np.int64)

    row, num_queries, position, first_key, end_key = visible_keys(token, seq_lens, cu_seqlens_q, left, right)
    for i in range(cuda.threadIdx.x, rows * head_dim, cuda.blockDim.x):
        r, d = i // head_dim, i % head_dim
        q_rows[r, d] = softmax_scale * widen(q[token, q_head + r, d], is_bfloat16)
        sums[r, d] = float32(0.0)
    for r in range(cuda.threadIdx.x, rows, cuda.blockDim.x):
        row_max[r] = NEG_INF
        row_sum[r] = float32(0.0)

    first_tile, end_tile = first_key // TILE, (end_key + TILE - 1) // TILE
    for tile in range(first_tile, end_tile):
        begin, end = score_tile(
            scores, blocks, slots, find_block, block_tables, key_of, caches, kv_head, row, tile, first_key, end_key,
            position, q_rows, rows, head_dim, softcap, alibi_slopes, q_head, is_bfloat16,
        )  # fmt: skip
        absorb_scores(scores, row_max, row_sum, rescale, rows, begin, end)
        cuda.syncthreads()
        weigh_values(
            sums, scores, rescale, rows, value_of, caches, kv_head, blocks, slots, begin, end, head_dim, is_bfloat16
        )
        cuda.syncthreads()

    cuda.syncthreads()  # the only one where there was no tile
    for r in range(rows):
        factor, log_sum = finish(row_max[r], row_sum[r], sinks, q_head + r, seq_lens[row])
        for d in range(cuda.threadIdx.x, head_dim, cuda.blockDim.x):
            out[token, q_head + r, d] = narrow(factor * sums[r, d], is_bfloat16)
        if cuda.threadIdx.x == 0 and lse.size > 0:
            lse[token, q_head + r] = log_sum

    if block_mass.size > 0:
        for tile in range(first_tile, end_tile):
            begin, end = score_tile(
                scores, blocks, slots, find_block, block_tables, key_of, caches, kv_head, row, tile, first_key, end_key,
                position, q_rows, rows, head_dim, softcap, alibi_slopes, q_head, is_bfloat16,
            )  # fmt: skip
            for r in range(cuda.threadIdx.x, rows, cuda.blockDim.x):
                _, log_sum = finish(row_max[r], row_sum[r], sinks, q_head + r, seq_lens[row])
                share = share_of(scores, r, begin, end, log_sum)
                cuda.atomic.add(block_mass, (row, tile, kv_head), share / float32(num_queries * group_size))
            cuda.syncthreads()


@device
def visible_keys(token: int, seq_lens: Any, cu_seqlens_q: Any, left: int, right: int) -> Any:
    """Row of a query, how many queries that has, its position, and the run it sees: first and one past last."""
    row = token
    num_queries = 1
    queries_left = 1  # this one and those after it in its row
    if cu_seqlens_q.size > 0:
        low = 0
        high = seq_lens.size - 1
        while low < high:  # the last row that begins at or before the token: one without queries begins with the next
            middle = (low + high + 1) // 2
            if cu_seqlens_q[middle] <= token:
                low = middle
            else:
                high = middle - 1
        row = low
        num_queries = cu_seqlens_q[row + 1] - cu_seqlens_q[row]
        queries_left = cu_seqlens_q[row + 1] - token
    seq_len = seq_lens[row]
    position = seq_len - queries_left
    first_key = 0
    end_key = seq_len
    if left >= 0:
        first_key = max(first_key, position - left)
    if right >= 0:
        end_key = min(end_key, position + right + 1)
    return row, num_queries, position, first_key, end_key


@device
def score_tile(
    scores: Any, blocks: Any, slots: Any, find_block: Any, block_tables: Any, key_of: Any, caches: Any, kv_head: int,
    row: int, tile: int, first_key: int, end_key: int, position: int, q_rows: Any, rows: int, head_dim: int,
    softcap: float, alibi_slopes: Any, q_head: int, is_bfloat16: bool,
) -> Any:  # fmt: skip
    """Find a tile's positions, one thread each, and score them, one thread per score; returns which ones are seen."""
    block_size = caches[0].shape[2]
    start = tile * TILE
    begin, end = max(first_key - start, 0), min(end_key - start, TILE)
    for t in range(begin + cuda.threadIdx.x, end, cuda.blockDim.x):
        blocks[t] = find_block(block_tables, row, (start + t) // block_size)
        slots[t] = (start + t) % block_size
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, rows * TILE, cuda.blockDim.x):
        r, t = i // TILE, i % TILE
        if begin <= t < end:
            score = float32(0.0)
            for d in range(head_dim):
                score += q_rows[r, d] * key_of(caches, blocks[t], kv_head, slots[t], d, is_bfloat16)
            if softcap > 0:
                score = softcap * math.tanh(score / softcap)
            if alibi_slopes.size > 0:
                score -= alibi_slopes[q_head + r] * float32(abs(start + t - position))
            scores[r, t] = score
    cuda.syncthreads()
    return begin, end


@device
def absorb_scores(scores: Any, row_max: Any, row_sum: Any, rescale: Any, rows: int, begin: int, end: int) -> None:
    """One thread per row: raise its row_max to that of the tile, turn the scores into exp(score - row_max)."""
    for r in range(cuda.threadIdx.x, rows, cuda.blockDim.x):
        new_max = row_max[r]
        for t in range(begin, end):
            new_max = max(new_max, scores[r, t])
        # -inf - -inf is NaN: an empty state has nothing to rescale, and a score of -inf no weight
        rescale[r] = float32(0.0) if row_max[r] == NEG_INF else math.exp(row_max[r] - new_max)
        total = row_sum[r] * rescale[r]
        for t in range(begin, end):
            weight = float32(0.0) if scores[r, t] == NEG_INF else math.exp(scores[r, t] - new_max)
            scores[r, t] = weight
            total += weight
        row_max[r] = new_max
        row_sum[r] = total


@device
def weigh_values(
    sums: Any, weights: Any, rescale: Any, rows: int, value_of: Any, caches: Any, kv_head: int, blocks: Any,
    slots: Any, begin: int, end: int, head_dim: int, is_bfloat16: bool,
) -> None:  # fmt: skip
    """One thread per element of the output."""
    for i in range(cuda.threadIdx.x, rows * head_dim, cuda.blockDim.x):
        r, d = i // head_dim, i % head_dim
        total = sums[r, d] * rescale[r]
        for t in range(begin, end):
            total += weights[r, t] * value_of(caches, blocks[t], kv_head, slots[t], d, is_bfloat16)
        sums[r, d] = total


@device
def finish(row_max: float, row_sum: float, sinks: Any, q_head: int, seq_len: int) -> Any:
    """What to multiply the sums by, and the log-sum-exp, both with the sink's share; 0 and -inf if nothing was seen."""
    top = row_max
    total = row_sum
    share = float32(1.0)  # exp(row_max - top)
    if sinks.size > 0 and seq_len > 0 and sinks[q_head] > NEG_INF:
        top = max(row_max, sinks[q_head])
        share = float32(0.0) if row_max == NEG_INF else math.exp(row_max - top)
        total = row_sum * share + math.exp(sinks[q_head] - top)
    if total == 0:
        return float32(0.0), NEG_INF
    return share / total, top + math.log(total)


@device
def share_of(scores: Any, r: int, begin: int, end: int, log_sum: float) -> Any:
    """How much of a row's attention goes to a tile, without the sink's share."""
    share = float32(0.0)
    for t in range(begin, end):
        if scores[r, t] > NEG_INF:  # then so is log_sum
            share += math.exp(scores[r, t] - log_sum)
    return share
