"""The calls of flash-attn that serve a KV cache, with its names, arguments and defaults.

    from kvtoolkit.integrations.flash_attn.calls import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Positional arguments are those of flash-attn 2; what FlashAttention-3 and vLLM add is taken by keyword. The calls take
torch tensors, all on one CUDA device or all on the CPU, with pages of any size, and read caches in place, whatever
their strides. Nothing is written before every argument is checked. Nothing waits for the device, so all calls can be
captured in a CUDA graph once they have run on its stream.

The last axis of caches must be contiguous. Everything else is copied where its last axis is not: ``q``, new or packed
``k`` and ``v``, and index arrays, which are small beside a cache.

Differences from flash-attn: a query that sees no key has log-sum-exp -inf, not +inf; no gradient is recorded; dropout,
FP8 scales, ``qv``, chunked attention, values of another width than keys, and, on a GPU, ALiBi slopes of every row's own
raise UnsupportedError. On a GPU nobody looks at what index tensors hold, unless ``KVTOOLKIT_CHECK=1`` is set.

Source: the interfaces of flash-attn 2.8 (Dao 2023, arXiv:2307.08691), FlashAttention-3 (Shah et al. 2024,
arXiv:2407.08608) and vLLM.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvtoolkit.attention.calls import _attention, append
from kvtoolkit.errors import ShapeError, UnsupportedError
from kvtoolkit.integrations.flash_attn import rotary
from kvtoolkit.integrations.flash_attn.arguments import (
    are_readable,
    check_cumulative,
    check_flags,
    check_range,
    check_tensor,
    count,
    indices,
    is_local,
    none_if_zero,
    one_of,
    refuse,
    refuse_dropout,
    renamed,
    rows_of,
    sinks,
    slopes,
    window_of,
)
from kvtoolkit.integrations.flash_attn.caches import (
    Blocks,
    after_padding,
    batched_blocks,
    cache_blocks,
    new_slots,
    packed_blocks,
)
from kvtoolkit.untraced import untraced

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

_NO_FP8 = "FP8 keys and values are not supported"
_NO_QV = "queries on values (MLA) need a kernel of their own"
_NO_CHUNKS = "chunked attention needs a kernel of its own"


@untraced
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    out: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    attention_chunk: int = 0,
    scheduler_metadata: Any = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    fa_version: int | None = None,
) -> Any:
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
            longer than its last element; rows of ``out`` behind it are not written.
        max_seqlen_q: most query tokens of a row, with ``cu_seqlens_q``.
        rotary_seqlens: ``[batch]`` int32, the position of the first new token for the rotation, instead of
            ``cache_seqlens``.
        cu_seqlens_k_new, qv, q_descale, k_descale, v_descale, attention_chunk: not supported.
        scheduler_metadata, pack_gqa, sm_margin, fa_version: hints to other kernels, ignored.

    Returns:
        ``out`` shaped and typed as ``q``; with ``return_softmax_lse`` also ``lse`` float32, natural log:
        ``[batch, num_q_heads, seqlen_q]``, with ``cu_seqlens_q`` ``[num_q_heads, total_q]``.

    Raises:
        ShapeError: a shape, dtype, device or stride is not as above; on the CPU also a length or a block id. Nothing
            was written.
        UnsupportedError: an argument that is not supported, or no kernel for this head_dim, dtype or device.
    """
    refuse(_NO_QV, qv=qv)
    refuse(_NO_FP8, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    refuse(_NO_CHUNKS, attention_chunk=none_if_zero(attention_chunk))
    refuse("new tokens come as [batch, seqlen_new, num_kv_heads, head_dim]", cu_seqlens_k_new=cu_seqlens_k_new)
    check_flags(return_softmax_lse=return_softmax_lse, rotary_interleaved=rotary_interleaved)
    check_tensor("q", q, 4 if cu_seqlens_q is None else 3)
    device, window = q.device, window_of(window_size)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, 4, device)
    _check_width("v_cache", v_cache, k_cache)
    if cu_seqlens_q is None:
        batch, seqlen_q = q.shape[:2]
        bounds = None
        if seqlen_q != 1:
            bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen_q
        query_counts = seqlen_q, seqlen_q
    else:
        bounds, query_counts = _packed_queries(q, cu_seqlens_q, max_seqlen_q)
        batch = len(bounds) - 1
    table_name, table = one_of(("block_table", block_table), ("page_table", page_table))
    blocks = cache_blocks(batch, k_cache, v_cache, table_name, table, cache_batch_idx)
    num_new = _check_new(k, v, cache_seqlens, blocks, batch, q)
    held = _held_lengths(cache_seqlens, blocks, num_new, batch, device)
    if cache_batch_idx is not None and are_readable(blocks.table):
        in_use = torch.where(held + num_new > 0, blocks.table[:, 0], 0)  # of a padding row nothing is read
        check_range("cache_batch_idx", in_use, 0, len(k_cache) - 1, "the sequences of k_cache")
    names = {
        "seq_lens": "cache_seqlens", "key": "k", "value": "v", "slot_mapping": "cache_seqlens", "sinks": "s_aux",
        "block_table": table_name if table is not None else "cache_batch_idx",
    }  # fmt: skip
    with renamed(names):
        queries = q.flatten(0, 1) if cu_seqlens_q is None else q
        if rotary_cos is not None or rotary_sin is not None:
            rows = _Rotation(held, rotary_seqlens, bounds, query_counts[1], causal or is_local(window))
            queries, k = _rotate(queries, k, rotary_cos, rotary_sin, rows, blocks.capacity, rotary_interleaved)
        write = None
        if k is not None and v is not None:
            new = rows_of(k).flatten(0, 1), rows_of(v).flatten(0, 1)
            slots = new_slots(blocks, _positions(held, num_new))
            if are_readable(slots) and bool((slots < 0).any()):
                raise ShapeError(f"{table_name}: expected a block for every new token, found none for some")
            write = functools.partial(append, *new, k_cache, v_cache, slots, layout="NHD")
        lengths = held + num_new if num_new else held
        if cache_leftpad is not None:
            if table is not None:
                raise UnsupportedError(
                    f"cache_leftpad: expected None beside {table_name}: a row begins at the first slot of a block"
                )
            leftpad = indices("cache_leftpad", cache_leftpad, (batch,), device)
            check_range("cache_leftpad", leftpad, 0, lengths, "within the sequence")
            blocks, lengths = after_padding(blocks, leftpad), lengths - leftpad
        result, lse = _attend(
            queries, blocks, lengths, bounds, query_counts, return_softmax_lse, _flat(out, q), write,
            softmax_scale=softmax_scale, causal=causal, window_size=window, softcap=softcap, num_splits=num_splits,
            alibi_slopes=slopes(alibi_slopes, batch, device), sinks=sinks(s_aux, device),
        )  # fmt: skip
    result = _shaped(result, q, out)
    if not return_softmax_lse:
        return result
    return result, (lse.t() if cu_seqlens_q is not None else lse.view(q.shape[:3]).transpose(1, 2)).contiguous()


@untraced
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    num_splits: int = 0,
    seqused_q: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    q_v: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    attention_chunk: int = 0,
    scheduler_metadata: Any = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    fa_version: int | None = None,
) -> Any:
    """Attend the newest tokens of packed sequences to their keys and values, packed too or in a paged cache.

    Args:
        q: ``[total_q, num_q_heads, head_dim]`` float16 or bfloat16, on the CPU also float32; row ``b`` asks
            ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]``.
        k: ``[num_blocks, block_size, num_kv_heads, head_dim]`` with a block table, last axis contiguous, else
            ``[total_k, num_kv_heads, head_dim]``; dtype of ``q``; ``v`` has its shape and dtype.
        cu_seqlens_q: ``[batch + 1]`` int32. ``q`` may be longer than its last element; rows of ``out`` behind it are
            not written.
        cu_seqlens_k: ``[batch + 1]`` int32, sums of the sequences' lengths; with a block table ``seqused_k`` may be
            given instead.
        max_seqlen_q: most query tokens of a row.
        max_seqlen_k: most keys of a row; with a block table it may be None.
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
    device = q.device
    bounds, query_counts = _packed_queries(q, cu_seqlens_q, max_seqlen_q)
    batch = len(bounds) - 1
    name, table = one_of(("block_table", block_table), ("page_table", page_table))
    begins = None if cu_seqlens_k is None else indices("cu_seqlens_k", cu_seqlens_k, (batch + 1,), device)
    used = None if seqused_k is None else indices("seqused_k", seqused_k, (batch,), device)
    for part, states in (("k", k), ("v", v)):
        check_tensor(part, states, 3 if table is None else 4, device)
    _check_width("v", v, k)
    length_name = "cu_seqlens_k" if used is None else "seqused_k"
    if table is not None:
        table = indices(name, table, (batch, None), device)
        blocks = Blocks(k, v, table, table.shape[1] * k.shape[1])
    else:
        if begins is None:
            raise ShapeError("cu_seqlens_k: expected where each row's keys begin, since k is packed, got None")
        longest = count("max_seqlen_k", max_seqlen_k)
        check_cumulative("cu_seqlens_k", begins, k.shape[0], longest, "max_seqlen_k")
        blocks = packed_blocks(rows_of(k), rows_of(v), begins[:-1], longest)
        if used is not None and are_readable(used):
            check_range("seqused_k", used, 0, begins.diff(), "the keys of the row by cu_seqlens_k")
    lengths = used
    if lengths is None:
        assert begins is not None
        lengths = begins.diff()
    if table is not None:
        check_range(length_name, lengths, 0, blocks.capacity, f"the keys that {name} has room for")
    names = {"seq_lens": length_name, "k_cache": "k", "v_cache": "v", "sinks": "s_aux", "block_table": name}
    with renamed(names):
        result, lse = _attend(
            q, blocks, lengths, bounds, query_counts, return_attn_probs or return_softmax_lse, out, None,
            softmax_scale=softmax_scale, causal=causal, window_size=window_of(window_size), softcap=softcap,
            num_splits=num_splits, alibi_slopes=slopes(alibi_slopes, batch, device), sinks=sinks(s_aux, device),
        )  # fmt: skip
    if return_attn_probs:
        return result, lse.t().contiguous(), q.new_empty(0)
    return (result, lse.t().contiguous()) if return_softmax_lse else result


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
    _check_width("v", v, k)
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen_q
    lengths = torch.full((batch,), k.shape[1], dtype=torch.int32, device=device)
    with renamed({"k_cache": "k", "v_cache": "v", "sinks": "s_aux"}):
        result, lse = _attend(
            q.flatten(0, 1), batched_blocks(rows_of(k), rows_of(v)), lengths, bounds, (seqlen_q, seqlen_q),
            return_attn_probs, _flat(out, q), None,
            softmax_scale=softmax_scale, causal=causal, window_size=window_of(window_size), softcap=softcap,
            num_splits=num_splits, alibi_slopes=slopes(alibi_slopes, batch, device), sinks=sinks(s_aux, device),
        )  # fmt: skip
    result = _shaped(result, q, out)
    if not return_attn_probs:
        return result
    return result, lse.view(q.shape[:3]).transpose(1, 2).contiguous(), q.new_empty(0)


def _attend(
    q: torch.Tensor, blocks: Blocks, lengths: torch.Tensor, bounds: torch.Tensor | None,
    query_counts: tuple[int, int], return_lse: bool, out: torch.Tensor | None, write: Callable[[], None] | None,
    **options: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """``(out, lse)`` of `kvtoolkit.paged_attention`; ``write`` is called after all checks and before attention.

    ``q`` may be longer than the last of ``bounds``. On a GPU the kernels take no row behind it; where the host can
    look, it is cut off.
    """
    q, total = rows_of(q), q.shape[0]
    used = total
    if bounds is not None and are_readable(bounds):
        used = min(max(int(bounds[-1]), 0), total)
    target = out
    if used < total:
        if out is not None and (out.shape != q.shape or out.dtype != q.dtype):
            raise ShapeError(f"out: expected as q, {tuple(q.shape)} {q.dtype}, got {tuple(out.shape)} {out.dtype}")
        out = torch.zeros_like(q) if out is None else out
        q, target = q[:used], out[:used]
    result = _attention(
        q, blocks.keys, blocks.values, blocks.table, None, lengths, layout="NHD", cu_seqlens_q=bounds, out=target,
        return_lse=return_lse, backend=None, query_counts=query_counts, before=write, memory=blocks.memory,
        **options,
    )  # fmt: skip
    result, lse = result if return_lse else (result, None)
    if used == total:
        return result, lse
    if lse is not None:
        lse = torch.cat((lse, lse.new_full((total - used, lse.shape[1]), -torch.inf)))
    return out, lse


def _packed_queries(q: torch.Tensor, cu_seqlens_q: Any, max_seqlen_q: Any) -> tuple[torch.Tensor, tuple[int, int]]:
    """``cu_seqlens_q`` checked, and the fewest and most query tokens of its rows.

    The fewest are 0: ``q`` may be padded, so the host cannot tell.
    """
    bounds = indices("cu_seqlens_q", cu_seqlens_q, (None,), q.device)
    if len(bounds) == 0:
        raise ShapeError("cu_seqlens_q: expected [batch + 1] int32, got no element")
    most = count("max_seqlen_q", max_seqlen_q)
    check_cumulative("cu_seqlens_q", bounds, q.shape[0], most, "max_seqlen_q")
    return bounds, (0, most)


def _check_width(name: str, v: torch.Tensor, k: torch.Tensor) -> None:
    if v.shape[-1] != k.shape[-1]:
        raise UnsupportedError(
            f"{name}: expected head_dim {k.shape[-1]}, that of the keys, got {v.shape[-1]}; values of another width "
            "need a kernel of their own"
        )


def _check_new(k: Any, v: Any, cache_seqlens: Any, blocks: Blocks, batch: int, q: torch.Tensor) -> int:
    """Check new keys and values; returns how many tokens a row has, 0 without any."""
    if k is None and v is None:
        return 0
    if k is None or v is None or cache_seqlens is None:
        raise ShapeError("k, v: expected both of them and cache_seqlens, to append; got one or two of the three")
    expected = (batch, *blocks.keys.shape[2:])
    for name, new in (("k", k), ("v", v)):
        check_tensor(name, new, 4, q.device)
        found = (new.shape[0], *new.shape[2:])
        if found != expected or new.shape[1] != k.shape[1] or new.dtype != q.dtype:
            wanted = f"[{batch}, {k.shape[1]}, {expected[1]}, {expected[2]}]"
            raise ShapeError(f"{name}: expected {wanted} {q.dtype}, got {list(new.shape)} {new.dtype}")
    if k.shape[1] > blocks.capacity:
        raise ShapeError(
            f"k: expected up to {blocks.capacity} tokens, which is what a row has room for, got {k.shape[1]}"
        )
    return int(k.shape[1])


def _held_lengths(cache_seqlens: Any, blocks: Blocks, num_new: int, batch: int, device: torch.device) -> torch.Tensor:
    """``[batch]`` int32 tokens that the cache holds."""
    room, reason = blocks.capacity - num_new, "the room that a row has"
    if num_new:
        reason += f" before {num_new} new tokens"
    if isinstance(cache_seqlens, torch.Tensor):
        held = indices("cache_seqlens", cache_seqlens, (batch,), device)
        check_range("cache_seqlens", held, 0, room, reason)
        return held
    length = blocks.capacity if cache_seqlens is None else count("cache_seqlens", cache_seqlens)
    if length > room:
        raise ShapeError(f"cache_seqlens: expected up to {room}, {reason}, got {length}")
    return torch.full((batch,), length, dtype=torch.int32, device=device)


class _Rotation(NamedTuple):
    """Where the rows of a call stand that is rotated."""

    held: torch.Tensor
    """``[batch]`` tokens in the cache."""
    rotary_seqlens: torch.Tensor | None
    """``[batch]`` positions to begin at instead."""
    bounds: torch.Tensor | None
    """``[batch + 1]`` of the queries; None = one a row."""
    most_queries: int
    is_spread: bool
    """Whether each query of a row has a position of its own."""


def _rotate(
    q: torch.Tensor, k: torch.Tensor | None, cos: Any, sin: Any, rows: _Rotation, capacity: int, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[total_q, ...]`` and new keys ``[batch, seqlen_new, ...]``, rotated."""
    if cos is None or sin is None:
        raise ShapeError("rotary_cos, rotary_sin: expected both or neither, got one")
    if k is None:
        raise ShapeError("rotary_cos: expected k and v beside it, which are rotated too, got none")
    name, first = "cache_seqlens", rows.held
    if rows.rotary_seqlens is not None:
        name, first = "rotary_seqlens", indices("rotary_seqlens", rows.rotary_seqlens, (k.shape[0],), q.device)
    tables = rotary.check_tables(cos, sin, q.shape[-1], capacity, q.device)
    num_positions, num_new = tables[0].shape[0], k.shape[1]
    farthest = max(num_new, rows.most_queries if rows.is_spread else 1)
    check_range(name, first, 0, num_positions - farthest, f"where rotary_cos has {farthest} more rows")
    places = _query_positions(first, rows.bounds, q.shape[0], rows.is_spread).clamp(0, num_positions - 1)
    return (
        rotary.rotate(q, *tables, places, interleaved=interleaved),
        rotary.rotate(k, *tables, _positions(first, num_new), interleaved=interleaved),
    )


def _positions(first: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """``[batch, num_tokens]`` int64 positions from ``first`` ``[batch]`` on."""
    return first.unsqueeze(1) + torch.arange(num_tokens, device=first.device)


def _query_positions(
    first: torch.Tensor, bounds: torch.Tensor | None, num_tokens: int, is_spread: bool
) -> torch.Tensor:
    """``[num_tokens]`` positions to rotate queries at: from ``first`` of their row on, or all of them at ``first``.

    What is said of tokens behind the last of ``bounds`` does not matter.
    """
    if bounds is None:
        return first
    token = torch.arange(num_tokens, dtype=bounds.dtype, device=bounds.device)
    row = torch.searchsorted(bounds, token, right=True).sub(1).clamp(max=len(bounds) - 2)
    places = first[row]
    return places + (token - bounds[row]) if is_spread else places


def _flat(out: Any, q: torch.Tensor) -> torch.Tensor | None:
    """``out`` as the kernels write it; None where there is none, or where a result must be copied to it."""
    if out is None:
        return None
    check_tensor("out", out, q.ndim, q.device)
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ShapeError(f"out: expected as q, {tuple(q.shape)} {q.dtype}, got {tuple(out.shape)} {out.dtype}")
    if q.ndim == 3:
        return out
    try:
        return out.view(-1, *out.shape[2:])
    except RuntimeError:
        return None


def _shaped(result: torch.Tensor, q: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """The result as the caller wants it."""
    if out is None:
        return result.view(q.shape)
    if result.data_ptr() != out.data_ptr():
        out.copy_(result.view(q.shape))
    return out
