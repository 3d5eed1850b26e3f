"""Run the Numba kernels on device arrays that are known to be right.

Every array is an `Operand` whose address lies on the current device (in the simulator: on the host). Nothing is
checked: a wrong shape, stride or dtype reads or writes foreign memory. The calls are asynchronous on ``stream``, a raw
CUDA stream pointer, 0 = the default stream, and allocate nothing. The first call with arrays of a kind (16 bit or of
another dtype, contiguous or not) compiles for about a second.

Numba's CUDA target is imported by the first call, not with this module.
"""

import math
from typing import Any

from kvtoolkit.arrays.host import Operand
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.formats.tier_caches import QuantizedTiers


def attend(
    q: Operand,
    k_cache: Operand,
    v_cache: Operand,
    block_table: Operand,
    block_starts: Operand | None,
    seq_lens: Operand,
    *,
    out: Operand,
    lse: Operand | None = None,
    cu_seqlens_q: Operand | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Operand | None = None,
    alibi_slopes: Operand | None = None,
    num_splits: int = 0,
    layout: str = "HND",
    tiers: QuantizedTiers | None = None,
    block_mass: Operand | None = None,
    stream: int = 0,
) -> None:
    """Attend, writing to ``out``, ``lse`` and ``block_mass``; the meaning is that of `kvtoolkit.tiered_attention`.

    Args:
        q: ``[num_tokens, num_q_heads, head_dim]`` float16 or bfloat16; ``out`` alike, it may be ``q`` itself.
        k_cache: ``[num_granules, num_kv_heads, 8, head_dim]`` with ``block_starts``, else any block size in ``layout``;
            ``v_cache`` alike, any strides.
        block_table: ``[batch, max_entries]`` int32 entries, or block ids where ``block_starts`` is None.
        block_starts: ``[batch, max_entries]`` int32, first logical granule of each entry, or None.
        seq_lens: ``[batch]`` int32, the new tokens included; 0 = padding row.
        lse: ``[num_tokens, num_q_heads]`` float32, or None.
        cu_seqlens_q: ``[batch + 1]`` int32, or None where each row has one query.
        sinks: ``[num_q_heads]`` float32, or None; ``alibi_slopes`` alike.
        num_splits: ignored; a CTA walks the whole sequence.
        tiers: with ``block_starts``: the quantized tiers; the entries' granules count through them and ``k_cache``.
        block_mass: ``[batch, max_tiles, num_kv_heads]`` float32, any strides, or None.

    Raises:
        UnsupportedError: another dtype, or a ``head_dim`` above 256; nothing was launched.
    """
    from kvtoolkit.numba import attention
    from kvtoolkit.numba.device import absent, float32, launch

    num_tokens, num_q_heads, head_dim = q.shape
    is_bfloat16 = _is_bfloat16("q", q)
    if head_dim > attention.MAX_HEAD_DIM:
        raise UnsupportedError(f"q: no Numba kernel for head_dim {head_dim}, at most {attention.MAX_HEAD_DIM}")
    k_cache, v_cache = _heads_first(k_cache, layout), _heads_first(v_cache, layout)
    num_kv_heads = k_cache.shape[1]
    left, right = window_size
    if causal:
        right = 0
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    function, arguments = _kernel_and_tables(k_cache, v_cache, block_table, block_starts, tiers)
    if block_mass is not None:
        launch(attention.clear_masses, (block_mass.shape[0],), stream, block_mass)
    launch(
        function, (num_tokens, num_kv_heads, math.ceil(num_q_heads / num_kv_heads / attention.HEADS_PER_CTA)), stream,
        q, *arguments, seq_lens, cu_seqlens_q or absent("int32", 1), sinks or absent("float32", 1),
        alibi_slopes or absent("float32", 1), out, lse or absent("float32", 2), block_mass or absent("float32", 3),
        float32(scale), left, right, float32(softcap), is_bfloat16,
    )  # fmt: skip


def append(
    key: Operand,
    value: Operand,
    k_cache: Operand,
    v_cache: Operand,
    slot_mapping: Operand,
    *,
    layout: str,
    stream: int = 0,
) -> None:
    """Copy each token's key and value to its slot, as `kvtoolkit.append`.

    Args:
        key: ``[num_tokens, num_kv_heads, head_dim]`` of any dtype; ``value`` alike.
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]`` for layout ``"NHD"``, heads first for ``"HND"``,
            dtype of ``key``, any strides; ``v_cache`` alike.
        slot_mapping: ``[num_tokens]`` int64, ``block * block_size + i``; -1 = skip. No slot may be named twice.
    """
    from kvtoolkit.numba import copy
    from kvtoolkit.numba.device import launch

    k_cache, v_cache = _heads_first(k_cache, layout), _heads_first(v_cache, layout)
    launch(copy.append, (key.shape[0],), stream, key, value, k_cache, v_cache, slot_mapping)


def merge_states(
    out: Operand,
    lse: Operand,
    out_a: Operand,
    lse_a: Operand,
    out_b: Operand,
    lse_b: Operand,
    *,
    stream: int = 0,
) -> None:
    """Merge the attention over two disjoint sets of keys into ``out`` and ``lse``, as `kvtoolkit.merge_states`.

    Args:
        out: ``[num_tokens, num_q_heads, head_dim]`` float16 or bfloat16; ``out_a``, ``out_b`` alike.
        lse: ``[num_tokens, num_q_heads]`` float32; ``lse_a``, ``lse_b`` alike. The results may be those of a side.

    Raises:
        UnsupportedError: another dtype; nothing was launched.
    """
    from kvtoolkit.numba import merge
    from kvtoolkit.numba.device import launch

    launch(merge.merge_states, out.shape[:2], stream, out_a, lse_a, out_b, lse_b, out, lse, _is_bfloat16("out", out))


def copy_granules(arena: Operand, src: Operand, dst: Operand, *, stream: int = 0) -> None:
    """Copy granule ``src[i]`` to ``dst[i]`` for every ``i`` and every leading index, all at the same time.

    Args:
        arena: ``[n, num_granules, num_kv_heads, 8, head_dim]`` of any dtype, the last three axes contiguous.
        src: ``[num_moves]`` int32 granules to read; ``dst`` alike, to write. No granule may be in both.
    """
    from kvtoolkit.numba import copy
    from kvtoolkit.numba.device import launch

    n, num_granules = arena.shape[:2]
    flat = arena._replace(
        shape=(n, num_granules, math.prod(arena.shape[2:])), strides=(arena.strides[0], arena.strides[1], 1)
    )
    launch(copy.copy_granules, (src.shape[0], n), stream, flat, src, dst)


def _kernel_and_tables(
    k_cache: Operand, v_cache: Operand, block_table: Operand, block_starts: Operand | None, tiers: QuantizedTiers | None
) -> tuple[Any, list[Any]]:
    """The kernel, and its arguments that say where keys and values are."""
    from kvtoolkit.numba import attention
    from kvtoolkit.numba.device import absent

    if block_starts is None:
        return attention.paged_attention, [k_cache, v_cache, block_table]
    if tiers is None:
        return attention.variable_block_attention, [k_cache, v_cache, block_table, block_starts]
    warm, cold = (one or absent("uint8", 3) for one in (tiers.warm, tiers.cold))
    tables = [block_table, block_starts, *tiers.first_granules]
    return attention.tiered_attention, [k_cache, v_cache, warm, cold, *tables]


def _heads_first(cache: Operand, layout: str) -> Operand:
    """``cache`` as ``[num_blocks, num_kv_heads, block_size, head_dim]``."""
    if layout == "HND":
        return cache
    (blocks, slots, heads, dims), strides = cache.shape, cache.strides
    return cache._replace(shape=(blocks, heads, slots, dims), strides=(strides[0], strides[2], strides[1], strides[3]))


def _is_bfloat16(name: str, array: Operand) -> bool:
    if array.dtype not in ("float16", "bfloat16"):
        raise UnsupportedError(f"{name}: expected float16 or bfloat16 for the Numba kernels, got {array.dtype}")
    return array.dtype == "bfloat16"
