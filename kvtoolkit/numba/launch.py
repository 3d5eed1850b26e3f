"""Run the Numba kernels on device arrays that are known to be right.

Every array is an `Operand` whose address is on the current device (in the simulator: on the host). Nothing is
checked: a wrong shape, stride or dtype reads or writes foreign memory. The calls are asynchronous on ``stream``, a raw
CUDA stream pointer, 0 = the default stream, and allocate nothing. The first call with arrays of a kind (16 bit or of
another dtype, contiguous or not) compiles for about a second.

Numba's CUDA target is imported by the first call, not with this module.
"""

import math
from typing import Any

from kvtoolkit.arrays.call import AttentionCall
from kvtoolkit.arrays.host import Operand
from kvtoolkit.errors import UnsupportedError


def attend(call: AttentionCall, *, stream: int = 0) -> None:
    """Attend, writing to ``out``, ``lse`` and ``block_mass`` of the call; arrays may have any strides.

    ``num_splits`` is ignored, because a CTA walks the whole sequence.

    Raises:
        UnsupportedError: ``q`` is neither float16 nor bfloat16, or ``head_dim`` is above 256; nothing was launched.
    """
    from kvtoolkit.numba import attention
    from kvtoolkit.numba.device import absent, float32, launch

    num_tokens, num_q_heads, head_dim = call.q.shape
    num_kv_heads = call.k_cache.shape[1]
    is_bfloat16 = _is_bfloat16("q", call.q)
    if head_dim > attention.MAX_HEAD_DIM:
        raise UnsupportedError(f"q: no Numba kernel for head_dim {head_dim}, at most {attention.MAX_HEAD_DIM}")
    function, arguments = _kernel_and_tables(call)
    if call.block_mass is not None:
        launch(attention.clear_masses, (call.block_mass.shape[0],), stream, call.block_mass)
    launch(
        function, (num_tokens, num_kv_heads, math.ceil(num_q_heads / num_kv_heads / attention.HEADS_PER_CTA)), stream,
        call.q, *arguments, call.seq_lens, call.cu_seqlens_q or absent("int32", 1), call.sinks or absent("float32", 1),
        call.alibi_slopes or absent("float32", 1), call.out, call.lse or absent("float32", 2),
        call.block_mass or absent("float32", 3), float32(call.scale), call.left, call.right, float32(call.softcap),
        is_bfloat16,
    )  # fmt: skip


def append(
    key: Operand, value: Operand, k_cache: Operand, v_cache: Operand, slot_mapping: Operand, *, stream: int = 0
) -> None:
    """Copy each token's key and value to its slot, as `kvtoolkit.append`.

    Args:
        key: ``[num_tokens, num_kv_heads, head_dim]`` of any dtype; ``value`` has its shape and dtype.
        k_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, dtype of ``key``, any strides; ``v_cache`` has
            its shape and dtype.
        slot_mapping: ``[num_tokens]`` int64, ``block * block_size + i``; -1 = skip. No slot may be named twice.
    """
    from kvtoolkit.numba import copy
    from kvtoolkit.numba.device import launch

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
        out: ``[num_tokens, num_q_heads, head_dim]`` float16 or bfloat16; ``out_a``, ``out_b`` have its shape and dtype.
        lse: ``[num_tokens, num_q_heads]`` float32; ``lse_a`` and ``lse_b`` too. The results may be those of a side.

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
        src: ``[num_moves]`` int32 granules to read; ``dst``: as many to write. No granule may be in both.
    """
    from kvtoolkit.numba import copy
    from kvtoolkit.numba.device import launch

    n, num_granules = arena.shape[:2]
    flat = arena._replace(
        shape=(n, num_granules, math.prod(arena.shape[2:])), strides=(arena.strides[0], arena.strides[1], 1)
    )
    launch(copy.copy_granules, (src.shape[0], n), stream, flat, src, dst)


def _kernel_and_tables(call: AttentionCall) -> tuple[Any, list[Any]]:
    """The kernel, and its arguments that say where keys and values are."""
    from kvtoolkit.numba import attention
    from kvtoolkit.numba.device import absent

    caches = [call.k_cache, call.v_cache]
    if call.block_starts is None:
        return attention.paged_attention, [*caches, call.block_table]
    tables = [call.block_table, call.block_starts]
    if call.tiers is None:
        return attention.variable_block_attention, [*caches, *tables]
    warm, cold = (one or absent("uint8", 3) for one in (call.tiers.warm, call.tiers.cold))
    return attention.tiered_attention, [*caches, warm, cold, *tables, *call.tiers.first_granules]


def _is_bfloat16(name: str, array: Operand) -> bool:
    if array.dtype not in ("float16", "bfloat16"):
        raise UnsupportedError(f"{name}: expected float16 or bfloat16 for the Numba kernels, got {array.dtype}")
    return array.dtype == "bfloat16"
