"""The judge: attention over paged caches in dense float64 NumPy, one query at a time, written to be obviously right.

The calls have the names, the arguments and the meaning of those in `kvtoolkit.attention.calls`, and return float64
``out`` and ``lse``, always both. What cannot change the answer (``out``, ``return_lse``, ``num_splits``, ``backend``)
is accepted and ignored; `tile_masses` gives what the calls write to ``block_mass``. bfloat16 may also come as uint16
words, with ``dtype="bfloat16"``. Nothing is checked.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.formats.entry import GRANULE, MAX_BLOCK_GRANULES, unpack_entries
from kvtoolkit.formats.quantized import FORMATS

Floats = NDArray[np.float64]

TILE = 64


def to_float64(array: Any, dtype: str | None = None) -> Floats:
    """``array`` (NumPy or torch, of any float type) in float64; with ``dtype="bfloat16"`` its uint16 words are such."""
    if hasattr(array, "detach"):
        return np.asarray(array.detach().double().numpy())
    array = np.asarray(array)
    if dtype == "bfloat16" and array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, dtype=np.float64)


def paged_attention(
    q: Any, k_cache: Any, v_cache: Any, block_table: Any, seq_lens: Any, *, layout: str = "NHD",
    dtype: str | None = None, **common: Any,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Attention where ``block_table`` holds block ids of a cache in ``layout``; see `kvtoolkit.paged_attention`."""
    keys, values = to_float64(k_cache, dtype), to_float64(v_cache, dtype)
    if layout == "HND":
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    table = np.asarray(block_table)
    block_size = keys.shape[1]

    def tokens_of(row: int, seq_len: int) -> tuple[Floats, Floats]:
        places = [(table[row, p // block_size], p % block_size) for p in range(seq_len)]
        return _stack(keys, places), _stack(values, places)

    return _attend(to_float64(q, dtype), tokens_of, seq_lens, keys.shape[2], **common)


def variable_block_attention(
    q: Any, k_cache: Any, v_cache: Any, block_table: Any, block_starts: Any, seq_lens: Any, *,
    dtype: str | None = None, **common: Any,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Attention where ``block_table`` holds entries of 1-8 granules; see `kvtoolkit.variable_block_attention`."""
    keys, values = to_float64(k_cache, dtype).swapaxes(1, 2), to_float64(v_cache, dtype).swapaxes(1, 2)
    granules, lengths, _ = unpack_entries(np.asarray(block_table))
    starts = np.asarray(block_starts)

    def tokens_of(row: int, seq_len: int) -> tuple[Floats, Floats]:
        physical = {}  # logical granule -> granule of the cache
        for granule, length, start in zip(granules[row], lengths[row], starts[row], strict=True):
            for i in range(length):
                physical[start + i] = granule + i
        places = [(physical[p // GRANULE], p % GRANULE) for p in range(seq_len)]
        return _stack(keys, places), _stack(values, places)

    return _attend(to_float64(q, dtype), tokens_of, seq_lens, keys.shape[2], **common)


def tiered_attention(
    q: Any, tier_caches: Any, block_table: Any, block_starts: Any, seq_lens: Any, *, dtype: str | None = None,
    rounding: Callable[[Floats], Floats] | None = None, **common: Any,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Attention over what the codes of all tiers stand for; see `kvtoolkit.tiered_attention`.

    Args:
        rounding: of what a code stands for, as the CUDA kernel for prompts rounds it to 16 bits.
    """
    k_cache, v_cache, warm, cold, first_granules = tier_caches
    head_dim = np.shape(q)[-1]
    hot = [to_float64(cache, dtype).swapaxes(1, 2) for cache in (k_cache, v_cache)]  # [granule, slot, head, head_dim]
    tiers: list[tuple[Floats, ...]] = [tuple(hot)]
    for name, blocks in (("int8", warm), ("int4", cold)):
        if blocks is None:
            tiers.append(())
            continue
        shape = (len(blocks) * MAX_BLOCK_GRANULES, GRANULE, hot[0].shape[2], head_dim)
        with np.errstate(invalid="ignore"):  # a block that nobody uses may hold anything
            found = FORMATS[name].decode(np.asarray(blocks), head_dim)  # [block, head, token, head_dim] each
        decoded = [np.asarray(part, np.float64) for part in found]
        if rounding is not None:
            decoded = [rounding(part) for part in decoded]
        tiers.append(tuple(part.swapaxes(1, 2).reshape(shape) for part in decoded))
    granules, lengths, numbers = unpack_entries(np.asarray(block_table))
    starts = np.asarray(block_starts)

    def tokens_of(row: int, seq_len: int) -> tuple[Floats, Floats]:
        places = {}  # logical granule -> tier, granule of its arrays
        for granule, length, start, tier in zip(granules[row], lengths[row], starts[row], numbers[row], strict=True):
            for i in range(length):
                places[start + i] = (tier, granule + i - first_granules[tier])
        found: list[Floats] = []
        for part in range(2):
            tokens = []
            for p in range(seq_len):
                tier, granule = places[p // GRANULE]
                tokens.append(tiers[tier][part][granule, p % GRANULE])
            found.append(np.stack(tokens) if tokens else np.zeros((0, *hot[0].shape[2:])))
        return found[0], found[1]

    return _attend(to_float64(q, dtype), tokens_of, seq_lens, hot[0].shape[2], **common)


def tile_masses(
    q: Any, tier_caches: Any, block_table: Any, block_starts: Any, seq_lens: Any, *, dtype: str | None = None,
    **common: Any,
) -> Floats:  # fmt: skip
    """The share of the attention that goes to each tile, ``[batch, max_tiles, num_kv_heads]``.

    It is the sum of the weights of the tile's 64 positions, averaged over the queries of the row and of the group;
    a sink's share is missing from the sum over the tiles. ``max_tiles`` is the number of tiles of the longest row.
    """
    tiles = -(-int(np.max(seq_lens, initial=0)) // TILE)
    masses = np.zeros((len(seq_lens), tiles, np.shape(tier_caches[0])[1]))
    tiered_attention(
        q, tier_caches, block_table, block_starts, seq_lens, dtype=dtype, **{**common, "block_mass": masses}
    )
    return masses


def _stack(cache: Floats, places: list[tuple[int, int]]) -> Floats:
    if not places:
        return np.zeros((0, *cache.shape[2:]))
    return np.stack([cache[block, slot] for block, slot in places])


def _attend(
    q: Floats,
    tokens_of: Any,
    seq_lens: Any,
    num_kv_heads: int,
    *,
    cu_seqlens_q: Any = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    out: Any = None,
    return_lse: bool = True,
    num_splits: int = 0,
    max_seqlen_q: int | None = None,
    plan: Any = None,
    backend: str | None = None,
    block_mass: Floats | None = None,
) -> tuple[Floats, Floats]:
    num_tokens, num_q_heads, head_dim = q.shape
    group_size = num_q_heads // num_kv_heads
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    left, right = map(int, window_size)  # Python's, as all positions below: sums of NumPy's may wrap around
    bounds = list(range(num_tokens + 1)) if cu_seqlens_q is None else np.asarray(cu_seqlens_q).tolist()
    sink_logits = None if sinks is None else to_float64(sinks)
    slopes = None if alibi_slopes is None else to_float64(alibi_slopes)
    result = np.zeros((num_tokens, num_q_heads, head_dim))
    lse = np.full((num_tokens, num_q_heads), -np.inf)
    for row, seq_len in enumerate(np.asarray(seq_lens).tolist()):
        if seq_len == 0:
            continue
        keys, values = tokens_of(row, seq_len)
        j = np.arange(seq_len)
        num_queries = bounds[row + 1] - bounds[row]
        for i in range(num_queries):
            token = bounds[row] + i
            position = seq_len - num_queries + i
            visible = np.ones(seq_len, bool)
            if causal:
                visible &= j <= position
            if left >= 0:
                visible &= j >= position - left
            if right >= 0:
                visible &= j <= position + right
            for head in range(num_q_heads):
                kv_head = head // group_size
                scores = scale * (keys[visible, kv_head] @ q[token, head])
                if softcap > 0:
                    scores = softcap * np.tanh(scores / softcap)
                if slopes is not None:
                    slope = slopes[head] if slopes.ndim == 1 else slopes[row, head]
                    scores = scores - slope * np.abs(position - j[visible])
                logits = scores if sink_logits is None else np.append(scores, sink_logits[head])
                lse[token, head] = log_sum_exp(logits)
                if len(scores) and lse[token, head] != -np.inf:  # scores of -inf alone weigh as much as none
                    weights = np.exp(scores - lse[token, head])
                    result[token, head] = weights @ values[visible, kv_head]
                    if block_mass is not None:
                        np.add.at(block_mass[row, :, kv_head], j[visible] // TILE, weights / (num_queries * group_size))
    return result, lse


def log_sum_exp(logits: Floats) -> float:
    """The logarithm of the sum of exp(logits); -inf if there are none."""
    peak = np.max(logits, initial=-np.inf)
    if peak == -np.inf:
        return -np.inf
    return float(peak + np.log(np.sum(np.exp(logits - peak))))


def merge_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Floats, Floats]:
    """The attention over the keys of both sides, from the results over each; see `kvtoolkit.merge_states`."""
    outs = [to_float64(out_a), to_float64(out_b)]
    lses = [to_float64(lse_a), to_float64(lse_b)]
    result = np.zeros(outs[0].shape)
    merged = np.full(lses[0].shape, -np.inf)
    for row in np.ndindex(merged.shape):
        merged[row] = log_sum_exp(np.array([side[row] for side in lses]))
        for out, lse in zip(outs, lses, strict=True):
            if lse[row] != -np.inf:  # NaN is kept
                result[row] += np.exp(lse[row] - merged[row]) * out[row]
    return result, merged


def append(key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, *, layout: str) -> None:
    """Write each token to its slot, in place; see `kvtoolkit.append`."""
    for token, slot in enumerate(np.asarray(slot_mapping).tolist()):
        if slot >= 0:
            for new, cache in ((key, k_cache), (value, v_cache)):
                blocks = cache if layout == "NHD" else cache.swapaxes(1, 2)
                block_size = blocks.shape[1]
                blocks[slot // block_size, slot % block_size] = new[token]
