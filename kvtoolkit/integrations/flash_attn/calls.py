"""The calls of flash-attn that serve a KV cache, with its names, arguments and defaults.

    from kvtoolkit.integrations.flash_attn.calls import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Positional arguments are those of flash-attn 2; what FlashAttention-3 and vLLM add is taken by keyword. The calls take
torch tensors, all on one CUDA device or all on the CPU, with pages of any size, and read caches in place, whatever
their strides. Nothing is written before every argument is checked. Nothing waits for the device, so all calls can be
captured in a CUDA graph once they have run on its stream.

The last axis of caches must be contiguous. Everything else is copied where its last axis is not: ``q``, new or packed
``k`` and ``v``, and index arrays, which are small beside a cache.

A call plans its work on the device, in a kernel or two of its own, because it cannot know that the lengths are those of
the call before. Callers who know that share plans: `plan_for_step`, or `get_scheduler_metadata` of FlashAttention-3.

Differences from flash-attn: a query that sees no key has log-sum-exp -inf, not +inf; no gradient is recorded; dropout,
FP8 scales, ``qv``, chunked attention, values of another width than keys, and, on a GPU, ALiBi slopes of every row's own
raise UnsupportedError. On a GPU nobody looks at what index tensors hold, unless ``KVTOOLKIT_CHECK=1`` is set.

Source: the interfaces of flash-attn 2.8 (Dao 2023, arXiv:2307.08691), FlashAttention-3 (Shah et al. 2024,
arXiv:2407.08608) and vLLM.
"""

import functools
from typing import Any

import torch

from kvtoolkit.attention.arguments import check_flags, count
from kvtoolkit.errors import ShapeError
from kvtoolkit.integrations.flash_attn.arguments import (
    are_readable,
    check_cumulative,
    check_range,
    check_tensor,
    indices,
    none_if_zero,
    one_of,
    refuse,
    refuse_dropout,
    renamed,
    rows_of,
)
from kvtoolkit.integrations.flash_attn.cached import CacheArguments, RotationArguments, attend_to_cache
from kvtoolkit.integrations.flash_attn.caches import Blocks, batched_blocks, packed_blocks
from kvtoolkit.integrations.flash_attn.run import (
    check_width,
    common_options,
    flat,
    packed_queries,
    run,
    shaped,
)
from kvtoolkit.integrations.flash_attn.step_plan import (
    StepPlan,
    UndoneIfRefused,
    get_scheduler_metadata,
    plan_for_step,
    step_plan_of,
    worked_out,
)
from kvtoolkit.tracing import untraced

__all__ = [
    "StepPlan",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "plan_for_step",
]

_NO_FP8 = "FP8 keys and values are not supported"
_NO_QV = "queries on values (MLA) need a kernel of their own"
_NO_CHUNKS = "chunked attention needs a kernel of its own"


@untraced
def flash_attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor | None = None,
    v: torch.Tensor | None = None, rotary_cos: torch.Tensor | None = None, rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None, cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None, block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] | None = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0, return_softmax_lse: bool = False, *, out: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None, page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None, max_seqlen_q: int | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None, rotary_seqlens: torch.Tensor | None = None,
    qv: torch.Tensor | None = None, q_descale: torch.Tensor | None = None, k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None, attention_chunk: int = 0, scheduler_metadata: Any = None,
    pack_gqa: bool | None = None, sm_margin: int = 0, fa_version: int | None = None,
) -> Any:  # fmt: skip
    """Append new keys and values to a cache, if there are any, and attend to what it then holds.

    Args:
        q: ``[batch, seqlen_q, num_q_heads, head_dim]``, or with ``cu_seqlens_q`` ``[total_q, num_q_heads, head_dim]``;
            float16 or bfloat16, on the CPU also float32; the newest tokens of each sequence.
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]`` with a block table, else
            ``[batch_cache, max_len, num_kv_heads, head_dim]``; dtype of ``q``, last axis contiguous, other strides
            any; ``v_cache`` has its shape and dtype.
        k: ``[batch, seqlen_new, num_kv_heads, head_dim]`` to write to the cache from position ``cache_seqlens`` on,
            before attention; ``v`` has its shape and dtype. The cache must have room: on a GPU nobody looks.
        rotary_cos: ``[seqlen_ro, rotary_dim / 2]``, ``seqlen_ro`` at least what a row of the cache can hold: rotate
            ``k`` at positions ``cache_seqlens``, ``cache_seqlens + 1`` and so on, and ``q`` too where ``causal`` or a
            window is given, else all of ``q`` at ``cache_seqlens``. Needs ``k``. ``rotary_sin`` has its shape.
        cache_seqlens: tokens that the cache holds of each sequence, ``k`` not counted, padding on the left counted:
            ``[batch]`` int32, one int for all, or None: as many as it can.
        cache_batch_idx: ``[batch]`` int32, which sequence of a cache without a block table each row is; None = the
            first ``batch``.
        cache_leftpad: ``[batch]`` int32, the position at which each sequence of a cache without a block table begins.
        block_table: ``[batch, max_blocks_per_seq]`` int32 block ids; those past a row's end, such as -1, are not read.
            ``page_table`` is the same.
        softmax_scale: factor on q.k; default ``head_dim ** -0.5``.
        causal: a query sees no later position; bottom-right aligned.
        window_size: a query sees positions ``position - left`` to ``position + right``; -1 = unbounded; None = no
            window.
        softcap: bound of the scores; 0 = off.
        rotary_interleaved: rotate channels 0 and 1, 2 and 3, ... together; else 0 and ``rotary_dim / 2``, and so on.
        alibi_slopes: ``[num_q_heads]`` float32, on the CPU also ``[batch, num_q_heads]``.
        num_splits: as in `kvtoolkit.paged_attention`.
        out: tensor to write, shaped and typed as ``q``.
        s_aux: ``[num_q_heads]``, an extra logit in each head's denominator (a sink).
        cu_seqlens_q: ``[batch + 1]`` int32: row ``b`` asks ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]``. ``q`` may be
            longer than its last element; rows of ``out`` after it are not written.
        max_seqlen_q: most query tokens of a row, with ``cu_seqlens_q``.
        rotary_seqlens: ``[batch]`` int32, the position of the first new token for the rotation, instead of
            ``cache_seqlens``.
        cu_seqlens_k_new, qv, q_descale, k_descale, v_descale, attention_chunk: not supported.
        scheduler_metadata: what `get_scheduler_metadata` returned, or a `StepPlan`, to share its plan; anything else is
            ignored.
        pack_gqa, sm_margin, fa_version: hints to other kernels, ignored.

    Returns:
        ``out`` shaped and typed as ``q``; with ``return_softmax_lse`` also ``lse`` float32, natural log:
        ``[batch, num_q_heads, seqlen_q]``, with ``cu_seqlens_q`` ``[num_q_heads, total_q]``.

    Raises:
        ShapeError: a shape, dtype, device or stride is not as above; on the CPU also a length or a block id. Nothing
            was written.
        UnsupportedError: an argument that is not supported, or no kernel for this head_dim, dtype or device.
        ArgumentError: ``scheduler_metadata`` is for other tensors.
    """
    refuse(_NO_QV, qv=qv)
    refuse(_NO_FP8, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    refuse(_NO_CHUNKS, attention_chunk=none_if_zero(attention_chunk))
    refuse("new tokens come as [batch, seqlen_new, num_kv_heads, head_dim]", cu_seqlens_k_new=cu_seqlens_k_new)
    check_flags(return_softmax_lse=return_softmax_lse, rotary_interleaved=rotary_interleaved)
    options = functools.partial(
        common_options, softmax_scale, causal, window_size, softcap, num_splits, alibi_slopes, s_aux, return_softmax_lse
    )
    cache = CacheArguments(
        k_cache, v_cache, block_table, page_table, cache_batch_idx, cache_leftpad, cache_seqlens
    )  # fmt: skip
    rotation = RotationArguments(rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved)
    step = step_plan_of(scheduler_metadata, ("cache_seqlens", cache_seqlens), cu_seqlens_q)
    with UndoneIfRefused(step):
        return attend_to_cache(q, k, v, cache, rotation, cu_seqlens_q, max_seqlen_q, options, out, step)


@untraced
def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: torch.Tensor | None = None, *,
    out: torch.Tensor | None = None, s_aux: torch.Tensor | None = None, seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None, return_softmax_lse: bool = False, num_splits: int = 0,
    seqused_q: torch.Tensor | None = None, qv: torch.Tensor | None = None, q_v: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None, k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None, attention_chunk: int = 0, scheduler_metadata: Any = None,
    pack_gqa: bool | None = None, sm_margin: int = 0, fa_version: int | None = None,
) -> Any:  # fmt: skip
    """Attend the newest tokens of packed sequences to their keys and values, packed too or in a paged cache.

    Args:
        q: ``[total_q, num_q_heads, head_dim]`` float16 or bfloat16, on the CPU also float32; row ``b`` asks
            ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]``.
        k: ``[num_blocks, block_size, num_kv_heads, head_dim]`` with a block table, last axis contiguous, else
            ``[total_k, num_kv_heads, head_dim]``; dtype of ``q``; ``v`` has its shape and dtype.
        cu_seqlens_q: ``[batch + 1]`` int32. ``q`` may be longer than its last element; rows of ``out`` after it are
            not written.
        cu_seqlens_k: ``[batch + 1]`` int32, sums of the sequences' lengths; with a block table ``seqused_k`` may be
            given instead.
        max_seqlen_q: most query tokens of a row.
        max_seqlen_k: most keys of a row; with a block table it may be None. On a GPU both save work, and are trusted.
        dropout_p: 0.
        deterministic: ignored; no gradient is recorded.
        return_attn_probs: return what flash-attn returns without dropout: the log-sum-exp, and no probabilities.
        block_table: ``[batch, max_blocks_per_seq]`` int32 block ids, or None where keys and values are packed;
            ``page_table`` is the same.
        seqused_k: ``[batch]`` int32, keys to use of each row, from its first on; None = all.
        return_softmax_lse: return ``(out, lse)``, as vLLM's call does.
        seqused_q, qv, q_v, q_descale, k_descale, v_descale, attention_chunk: not supported.

    The others are as in `flash_attn_with_kvcache`.

    Returns:
        ``out`` shaped and typed as ``q``; with ``return_attn_probs`` ``(out, lse, empty)``, where ``lse`` is
        ``[num_q_heads, total_q]`` float32, natural log.

    Raises:
        ShapeError: a shape, dtype, device or stride is not as above; on the CPU also a length or a block id.
        UnsupportedError: an argument that is not supported, or no kernel for this head_dim, dtype or device.
    """
    refuse(_NO_QV, qv=qv, q_v=q_v)
    refuse(_NO_FP8, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    refuse(_NO_CHUNKS, attention_chunk=none_if_zero(attention_chunk))
    refuse("give the rows by cu_seqlens_q alone", seqused_q=seqused_q)
    refuse_dropout(dropout_p)
    check_flags(return_attn_probs=return_attn_probs, return_softmax_lse=return_softmax_lse)
    check_tensor("q", q, 3)
    if cu_seqlens_q is None or (cu_seqlens_k is None and seqused_k is None):
        raise ShapeError("cu_seqlens_q, cu_seqlens_k: expected both of them, or seqused_k for the latter, got None")
    bounds, query_counts = packed_queries(q, cu_seqlens_q, max_seqlen_q)
    name, table = one_of(("block_table", block_table), ("page_table", page_table))
    step = step_plan_of(scheduler_metadata, ("seqused_k", seqused_k), cu_seqlens_q)
    longest = None if max_seqlen_k is None else count("max_seqlen_k", max_seqlen_k)
    with UndoneIfRefused(step):
        blocks, lengths, length_name = _rows_of_keys(
            k, v, len(bounds) - 1, q.device, (name, table), cu_seqlens_k, seqused_k, longest, step
        )
        names = {"seq_lens": length_name, "k_cache": "k", "v_cache": "v", "sinks": "s_aux", "block_table": name}
        with renamed(names):
            options = common_options(
                softmax_scale, causal, window_size, softcap, num_splits, alibi_slopes, s_aux,
                return_attn_probs or return_softmax_lse, len(bounds) - 1, q.device,
            )  # fmt: skip
            result, lse = run(
                q, blocks, lengths, bounds, query_counts, out, options, max_seqlen_k=longest, step=step
            )  # fmt: skip
    if return_attn_probs:
        return result, lse.t().contiguous(), q.new_empty(0)
    return (result, lse.t().contiguous()) if return_softmax_lse else result


def _rows_of_keys(
    k: Any, v: Any, batch: int, device: torch.device, named_table: tuple[str, Any], cu_seqlens_k: Any, seqused_k: Any,
    longest: int | None, step: StepPlan | None,
) -> tuple[Blocks, torch.Tensor, str]:  # fmt: skip
    """The keys and values of packed or paged rows, how many of them each row uses, and the parameter that says so."""
    name, table = named_table
    begins = None if cu_seqlens_k is None else indices("cu_seqlens_k", cu_seqlens_k, (batch + 1,), device)
    used = None if seqused_k is None else indices("seqused_k", seqused_k, (batch,), device)
    for part, states in (("k", k), ("v", v)):
        check_tensor(part, states, 3 if table is None else 4, device)
    check_width("v", v, k)
    if table is not None:
        table = indices(name, table, (batch, None), device)
        blocks = Blocks(k, v, table, table.shape[1] * k.shape[1])
    else:
        if begins is None:
            raise ShapeError("cu_seqlens_k: expected where each row's keys begin, since k is packed, got None")
        longest = count("max_seqlen_k", longest)
        check_cumulative("cu_seqlens_k", begins, k.shape[0], longest, "max_seqlen_k")
        blocks = packed_blocks(rows_of(k), rows_of(v), begins[:-1], longest)
        if used is not None and are_readable(used):
            check_range("seqused_k", used, 0, begins.diff(), "the keys of the row by cu_seqlens_k")
    length_name, lengths = "seqused_k", used
    if lengths is None:
        assert begins is not None
        length_name, lengths = "cu_seqlens_k", worked_out(step, ("diff",), (begins,), device, begins.diff)
    if table is not None:
        check_range(length_name, lengths, 0, blocks.capacity, f"the keys that {name} has room for")
        if longest is not None:
            check_range(length_name, lengths, 0, longest, "max_seqlen_k")
    return blocks, lengths, length_name


@untraced
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    out: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    num_splits: int = 0,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    attention_chunk: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Any:
    """Attend to keys and values of one length for all rows; no cache.

    Args:
        q: ``[batch, seqlen_q, num_q_heads, head_dim]`` float16 or bfloat16, on the CPU also float32.
        k: ``[batch, seqlen_k, num_kv_heads, head_dim]``, dtype of ``q``; ``v`` has its shape and dtype.
        return_attn_probs: return what flash-attn returns without dropout: the log-sum-exp, and no probabilities.

    The others are as in `flash_attn_with_kvcache` and `flash_attn_varlen_func`.

    Returns:
        ``out`` shaped and typed as ``q``; with ``return_attn_probs`` ``(out, lse, empty)``, where ``lse`` is
        ``[batch, num_q_heads, seqlen_q]`` float32, natural log.

    Raises:
        ShapeError: a shape, dtype, device or stride is not as above.
        UnsupportedError: an argument that is not supported, or no kernel for this head_dim, dtype or device.
    """
    refuse(_NO_QV, qv=qv)
    refuse(_NO_FP8, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    refuse(_NO_CHUNKS, attention_chunk=none_if_zero(attention_chunk))
    refuse_dropout(dropout_p)
    check_flags(return_attn_probs=return_attn_probs)
    check_tensor("q", q, 4)
    device, (batch, seqlen_q) = q.device, q.shape[:2]
    for name, states in (("k", k), ("v", v)):
        check_tensor(name, states, 4, device)
        if states.shape[0] != batch:
            raise ShapeError(f"{name}: expected a batch of {batch} as in q, got {states.shape[0]}")
    check_width("v", v, k)
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen_q
    lengths = torch.full((batch,), k.shape[1], dtype=torch.int32, device=device)
    with renamed({"k_cache": "k", "v_cache": "v", "sinks": "s_aux"}):
        options = common_options(
            softmax_scale, causal, window_size, softcap, num_splits, alibi_slopes, s_aux, return_attn_probs, batch,
            device,
        )  # fmt: skip
        blocks = batched_blocks(rows_of(k), rows_of(v))
        result, lse = run(q.flatten(0, 1), blocks, lengths, bounds, (seqlen_q, seqlen_q), flat(out, q), options)
    result = shaped(result, q, out)
    if not return_attn_probs:
        return result
    return result, lse.view(q.shape[:3]).transpose(1, 2).contiguous(), q.new_empty(0)
