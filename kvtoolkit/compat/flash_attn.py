"""The calls of flash-attn 2 that serve a KV cache, with its names, arguments and defaults.

    from kvtoolkit.compat.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

They take torch tensors, all on one CUDA device or all on the CPU, with pages of any size, and read caches where they
lie, whatever their strides. Nothing waits for the device, so both can be captured in a CUDA graph once they have run
on its stream. What is not offered (rotary embedding, dropout, padding on the left) raises UnsupportedError; no gradient
is recorded. One difference: where a query sees no key its log-sum-exp is -inf, which flash-attn gives as +inf.

Source: the interface of flash-attn 2.7 (Dao 2023, arXiv:2307.08691).
"""

import operator
from typing import Any

import torch

from kvtoolkit.attention import _attention, append
from kvtoolkit.checks import check_options
from kvtoolkit.cpu import Operand
from kvtoolkit.cpu.arrays import is_on_device, tensor_operand
from kvtoolkit.cpu.indices import check_bounds, check_lengths, check_rows_of
from kvtoolkit.errors import ShapeError, UnsupportedError
from kvtoolkit.untraced import untraced

_MOST = (1 << 31) - 1

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache"]


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Append new keys and values to a cache, if there are any, and attend to what it then holds.

    Args:
        q: ``[batch, seqlen_q, num_q_heads, head_dim]`` float16 or bfloat16, on the CPU also float32, last axis
            contiguous; the newest tokens of each sequence.
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]`` with ``block_table``, else
            ``[batch_cache, max_len, num_kv_heads, head_dim]``; dtype of ``q``, any strides but the last axis
            contiguous; ``v_cache`` alike.
        k: ``[batch, seqlen_new, num_kv_heads, head_dim]`` to write behind what the cache holds, in place, before
            attention; ``v`` alike. The cache must have room: on a GPU nobody looks.
        rotary_cos, rotary_sin, rotary_interleaved: not offered.
        cache_seqlens: tokens that the cache holds of each sequence, ``k`` not counted: ``[batch]`` int32, one int for
            all, or None: as many as it can.
        cache_batch_idx: ``[batch]`` int32, which sequence of a cache without ``block_table`` each row is; None = the
            first ``batch``.
        cache_leftpad: not offered.
        block_table: ``[batch, max_blocks_per_seq]`` int32 block ids; those past a row's end, such as -1, are not read.
        softmax_scale: factor on q.k; default ``head_dim ** -0.5``.
        causal: a query sees no later position; bottom-right aligned.
        window_size: a query sees positions ``position - left`` to ``position + right``; -1 = unbounded.
        softcap: bound of the scores; 0 = off.
        alibi_slopes: ``[num_q_heads]`` float32.
        num_splits: as in `kvtoolkit.paged_attention`.

    Returns:
        ``out`` shaped and typed as ``q``; with ``return_softmax_lse`` also ``lse`` ``[batch, num_q_heads, seqlen_q]``
        float32, natural log.

    Raises:
        ShapeError: a shape, dtype or stride is not as above; on the CPU also a length, an index or a block id.
        UnsupportedError: an argument that is not offered, no kernel for this head_dim, dtype or device, or a tensor
            without memory of its own.
    """
    _refuse(rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_leftpad=cache_leftpad)
    _refuse_slopes_of_rows(alibi_slopes)
    on_device = _is_on_device(q)
    queries = _describe(q, "q", on_device, 4)
    keys, values = _describe(k_cache, "k_cache", on_device, 4), _describe(v_cache, "v_cache", on_device, 4)
    batch, seqlen_q = queries.shape[:2]
    table, described_table = _block_table(batch, on_device, k_cache, block_table, cache_batch_idx)
    capacity = table.shape[1] * k_cache.shape[1]
    if isinstance(cache_seqlens, torch.Tensor):
        held = _check_int32("cache_seqlens", cache_seqlens, (batch,), on_device)
        if not on_device:
            check_lengths(held, "cache_seqlens", capacity)
        lengths, described_lengths = cache_seqlens, held
    else:
        described_lengths = None
        length = capacity if cache_seqlens is None else _count("cache_seqlens", cache_seqlens)
        if length > capacity:
            raise ShapeError(f"cache_seqlens: expected up to {capacity}, which is what a row can hold, got {length}")
        lengths = torch.full((batch,), length, dtype=torch.int32, device=q.device)
    if k is not None or v is not None:
        if k is None or v is None or cache_seqlens is None:
            raise ShapeError("k, v: expected both of them and cache_seqlens, to append; got one or two of the three")
        check_options(softmax_scale, window_size, softcap, num_splits)  # before anything is written
        _append(q, k, v, k_cache, v_cache, table, lengths, capacity)
        lengths, described_lengths = lengths + k.shape[1], None
    elif cache_batch_idx is not None and not on_device:
        _check_batch_idx(cache_batch_idx, lengths, k_cache)
    out, lse = _attend(
        q.flatten(0, 1), keys, values, described_table or table, described_lengths or lengths,
        None if seqlen_q == 1 else torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen_q,
        (seqlen_q, seqlen_q), return_softmax_lse,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, num_splits=num_splits,
    )  # fmt: skip
    out = out.view(q.shape)
    return (out, lse.view(q.shape[:3]).transpose(1, 2).contiguous()) if return_softmax_lse else out


@untraced
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """Attend the newest tokens of packed sequences to their keys and values, packed alike or in a paged cache.

    Args:
        q: ``[total_q, num_q_heads, head_dim]`` float16 or bfloat16, on the CPU also float32, last axis contiguous; row
            ``b`` asks ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]``.
        k: ``[num_blocks, block_size, num_kv_heads, head_dim]`` with ``block_table``, else
            ``[total_k, num_kv_heads, head_dim]``; dtype of ``q``, any strides but the last axis contiguous; ``v``
            alike.
        cu_seqlens_q: ``[batch + 1]`` int32.
        cu_seqlens_k: ``[batch + 1]`` int32, sums of the sequences' lengths, also with ``block_table``.
        max_seqlen_q: most query tokens of a row.
        max_seqlen_k: most keys of a row.
        dropout_p: 0.
        deterministic: ignored; no gradient is recorded.
        return_attn_probs: return what flash-attn returns without dropout: the log-sum-exp, and no probabilities.
        block_table: ``[batch, max_blocks_per_seq]`` int32 block ids, or None where keys and values are packed.

    The others are as in `flash_attn_with_kvcache`.

    Returns:
        ``out`` shaped and typed as ``q``; with ``return_attn_probs`` ``(out, lse, empty)``, where ``lse`` is
        ``[num_q_heads, total_q]`` float32, natural log.

    Raises:
        ShapeError: a shape, dtype or stride is not as above; on the CPU also a length, an index or a block id.
        UnsupportedError: an argument that is not offered, no kernel for this head_dim, dtype or device, or a tensor
            without memory of its own.
    """
    if not isinstance(dropout_p, (int, float)) or dropout_p:
        raise UnsupportedError(f"dropout_p: expected 0, got {dropout_p!r}")
    _refuse_slopes_of_rows(alibi_slopes)
    on_device = _is_on_device(q)
    queries = _describe(q, "q", on_device, 3)
    bounds = _check_int32("cu_seqlens_q", cu_seqlens_q, (None,), on_device)
    batch = bounds.shape[0] - 1
    if batch < 0:
        raise ShapeError("cu_seqlens_q: expected [batch + 1] int32, got none")
    key_bounds = _check_int32("cu_seqlens_k", cu_seqlens_k, (batch + 1,), on_device)
    max_seqlen_q, max_seqlen_k = _count("max_seqlen_q", max_seqlen_q), _count("max_seqlen_k", max_seqlen_k)
    ndim = 3 if block_table is None else 4
    keys, values = _describe(k, "k", on_device, ndim), _describe(v, "v", on_device, ndim)
    if block_table is not None:
        table: Any = _check_int32("block_table", block_table, (batch, None), on_device)
        total = _MOST  # how much the tables hold is checked row by row
    else:
        keys, values = _as_blocks(keys, max_seqlen_k), _as_blocks(values, max_seqlen_k)
        table = cu_seqlens_k[:-1].unsqueeze(1)  # a row's only block has the number of its first token
        total = k.shape[0]
    if not on_device:
        check_bounds(key_bounds, "cu_seqlens_k", total)
    fewest = max(0, queries.shape[0] - (batch - 1) * max_seqlen_q)
    out, lse = _attend(
        q, keys, values, table, cu_seqlens_k.diff(), bounds, (fewest, max_seqlen_q), return_attn_probs,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, num_splits=0,
    )  # fmt: skip
    return (out, lse.t().contiguous(), q.new_empty(0)) if return_attn_probs else out


def _attend(
    q: torch.Tensor, keys: Any, values: Any, table: Any, lengths: Any, bounds: Any,
    query_counts: tuple[int, int], return_lse: bool, **options: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """``(out, lse)`` of `kvtoolkit.paged_attention`; ``query_counts`` spares a launch where it is known."""
    result = _attention(
        q, keys, values, table, None, lengths, layout="NHD", cu_seqlens_q=bounds, sinks=None, out=None,
        return_lse=return_lse, backend=None, query_counts=query_counts, **options,
    )  # fmt: skip
    return result if return_lse else (result, None)


def _block_table(
    batch: int,
    on_device: bool,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
) -> tuple[torch.Tensor, Operand | None]:
    """The table of a cache, described if the caller gave it; without one, every sequence of the cache is a block."""
    if block_table is not None:
        if cache_batch_idx is not None:
            raise UnsupportedError("cache_batch_idx: expected None beside a block_table, whose rows say as much")
        return block_table, _check_int32("block_table", block_table, (batch, None), on_device)
    if cache_batch_idx is not None:
        _check_int32("cache_batch_idx", cache_batch_idx, (batch,), on_device)
        return cache_batch_idx.unsqueeze(1), None
    if batch > k_cache.shape[0]:
        raise ShapeError(f"q: expected a batch of up to {k_cache.shape[0]}, the sequences of k_cache, got {batch}")
    return torch.arange(batch, dtype=torch.int32, device=k_cache.device).unsqueeze(1), None


def _check_batch_idx(indices: torch.Tensor, lengths: torch.Tensor, k_cache: torch.Tensor) -> None:
    """Refuse rows that the cache does not have; a row of no tokens may name any."""
    described = tensor_operand(indices, "cache_batch_idx", False), tensor_operand(lengths, "cache_seqlens", False)
    check_rows_of(described[0], "cache_batch_idx", described[1], k_cache.shape[0])


def _append(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    table: torch.Tensor, lengths: torch.Tensor, capacity: int,
) -> None:  # fmt: skip
    """Write new tokens behind the first ``lengths`` of each row."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    for name, new in (("k", k), ("v", v)):
        _describe(new, name, is_on_device(q), 4)
    expected = (q.shape[0], k.shape[1], num_kv_heads, head_dim)
    for name, new in (("k", k), ("v", v)):
        if new.shape != expected or new.dtype != q.dtype:
            raise ShapeError(f"{name}: expected {expected} {q.dtype}, got {tuple(new.shape)} {new.dtype}")
    if k.shape[1] > capacity:
        raise ShapeError(f"k: expected up to {capacity} tokens, which is what a row has room for, got {k.shape[1]}")
    positions = lengths.unsqueeze(1) + torch.arange(k.shape[1], device=k.device)
    index = positions // block_size
    # An index out of range would be a device-side assert on a GPU, after which the process cannot use the device.
    blocks = table.gather(1, index.clamp(0, table.shape[1] - 1))
    slots = torch.add(positions % block_size, blocks, alpha=block_size)
    slots = slots.masked_fill((index < 0) | (index >= table.shape[1]), -1).flatten()
    if slots.is_cpu and (slots < 0).any():  # on a GPU looking would mean to wait
        raise ShapeError("k: expected a block for every new token in block_table or in the cache, found none for some")
    append(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots, layout="NHD")


def _as_blocks(packed: Operand, longest: int) -> Operand:
    """Packed tokens as a paged cache whose block ``i`` is the ``longest`` tokens from token ``i`` on.

    So a sequence of any length is one block, the first token's, and nothing is copied. That blocks overlap matters to
    nobody who only reads, and the part of a block that lies behind its sequence is never read.
    """
    (num_tokens, num_heads, head_dim), (token, head, dim) = packed.shape, packed.strides
    return packed._replace(shape=(num_tokens, max(longest, 1), num_heads, head_dim), strides=(token, token, head, dim))


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise UnsupportedError(f"{name}: expected None, it is not offered")


def _refuse_slopes_of_rows(alibi_slopes: torch.Tensor | None) -> None:
    if isinstance(alibi_slopes, torch.Tensor) and alibi_slopes.ndim != 1:
        raise UnsupportedError(f"alibi_slopes: expected [num_q_heads], got {tuple(alibi_slopes.shape)}")


def _count(name: str, value: Any) -> int:
    """A number of tokens as an int."""
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if not 0 <= count <= _MOST:
        raise ShapeError(f"{name}: expected a number of tokens, got {value!r}")
    return count


def _is_on_device(q: Any) -> bool:
    if not isinstance(q, torch.Tensor):
        raise ShapeError(f"q: expected a torch tensor, got {type(q).__name__}")
    return is_on_device(q)


def _describe(tensor: Any, name: str, on_device: bool, ndim: int | None = None) -> Operand:
    """A tensor of ``ndim`` axes, on a device or in host memory."""
    if not isinstance(tensor, torch.Tensor):
        raise ShapeError(f"{name}: expected a torch tensor, got {type(tensor).__name__}")
    described = tensor_operand(tensor, name, on_device)
    if ndim is not None and ndim != len(described.shape):
        raise ShapeError(f"{name}: expected {ndim} axes, got shape {described.shape}")
    return described


def _check_int32(name: str, tensor: Any, shape: tuple[int | None, ...], on_device: bool) -> Operand:
    """Refuse what is not an int32 tensor of ``shape``, where None stands for any size."""
    described = _describe(tensor, name, on_device)
    good = described.dtype == "int32" and len(described.shape) == len(shape)
    if good and described.shape != shape:
        good = all(want in (None, got) for want, got in zip(shape, described.shape, strict=True))
    if not good:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeError(f"{name}: expected [{wanted}] int32, got {described.shape} {described.dtype}")
    return described
