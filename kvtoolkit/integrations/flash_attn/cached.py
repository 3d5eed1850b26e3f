"""What `flash_attn_with_kvcache` does: check the cache and the new tokens, rotate, write them, attend."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvtoolkit.attention.arguments import count
from kvtoolkit.attention.calls import append
from kvtoolkit.attention.options import Options
from kvtoolkit.errors import ShapeError, UnsupportedError
from kvtoolkit.integrations.flash_attn import rotary
from kvtoolkit.integrations.flash_attn.arguments import (
    are_readable,
    check_range,
    check_tensor,
    indices,
    is_local,
    one_of,
    renamed,
    rows_of,
)
from kvtoolkit.integrations.flash_attn.caches import Blocks, after_padding, cache_blocks, new_slots
from kvtoolkit.integrations.flash_attn.run import check_width, flat, packed_queries, run, shaped
from kvtoolkit.integrations.flash_attn.step_plan import StepPlan, worked_out


class CacheArguments(NamedTuple):
    """Arguments about the cache, as the caller gave them."""

    k_cache: Any
    v_cache: Any
    block_table: Any
    page_table: Any
    cache_batch_idx: Any
    cache_leftpad: Any
    cache_seqlens: Any


class RotationArguments(NamedTuple):
    """Arguments about the rotation, as the caller gave them."""

    cos: Any
    sin: Any
    rotary_seqlens: Any
    interleaved: bool


def attend_to_cache(
    q: Any, k: Any, v: Any, cache: CacheArguments, rotation: RotationArguments, cu_seqlens_q: Any, max_seqlen_q: Any,
    make_options: Callable[[int, torch.device], Options], out: Any, step: StepPlan | None,
) -> Any:  # fmt: skip
    """Append ``k`` and ``v``, if there are any, and attend; arguments as in `flash_attn_with_kvcache`.

    Args:
        make_options: gives the options for a batch size and a device.
        step: what the calls of a step share.
    """
    check_tensor("q", q, 4 if cu_seqlens_q is None else 3)
    device = q.device
    for name, states in (("k_cache", cache.k_cache), ("v_cache", cache.v_cache)):
        check_tensor(name, states, 4, device)
    check_width("v_cache", cache.v_cache, cache.k_cache)
    if cache.cache_leftpad is not None:
        step = None  # tables are worked out of the caches' strides
    batch, bounds, query_counts = _rows_of_queries(q, cu_seqlens_q, max_seqlen_q, step)
    table_name, table = one_of(("block_table", cache.block_table), ("page_table", cache.page_table))
    blocks = cache_blocks(batch, cache.k_cache, cache.v_cache, table_name, table, cache.cache_batch_idx, step)
    num_new = _check_new(k, v, cache.cache_seqlens, blocks, batch, q)
    held = _held_lengths(cache.cache_seqlens, blocks, num_new, batch, device, step)
    if cache.cache_batch_idx is not None and are_readable(blocks.table):
        in_use = torch.where(held + num_new > 0, blocks.table[:, 0], 0)  # of a padding row nothing is read
        check_range("cache_batch_idx", in_use, 0, len(cache.k_cache) - 1, "the sequences of k_cache")
    names = {
        "seq_lens": "cache_seqlens", "key": "k", "value": "v", "slot_mapping": "cache_seqlens", "sinks": "s_aux",
        "block_table": table_name if table is not None else "cache_batch_idx",
    }  # fmt: skip
    with renamed(names):
        queries = q.flatten(0, 1) if cu_seqlens_q is None else q
        options = make_options(batch, device)
        if rotation.cos is not None or rotation.sin is not None:
            is_spread = options.causal or is_local(options.window_size)
            places = _Places(held, bounds, query_counts[1], is_spread)
            queries, k = _rotate(queries, k, rotation, places, blocks.capacity)
        write = None if k is None else _writer(k, v, cache, blocks, _positions(held, num_new), table_name)
        lengths = worked_out(step, ("add", num_new), (held,), device, lambda: held + num_new) if num_new else held
        if cache.cache_leftpad is not None:
            blocks, lengths = _skip_padding(cache.cache_leftpad, blocks, lengths, table_name, table is not None)
        result, lse = run(queries, blocks, lengths, bounds, query_counts, flat(out, q), options, write, step=step)
    result = shaped(result, q, out)
    if not options.return_lse:
        return result
    return result, (lse.t() if cu_seqlens_q is not None else lse.view(q.shape[:3]).transpose(1, 2)).contiguous()


def _rows_of_queries(
    q: torch.Tensor, cu_seqlens_q: Any, max_seqlen_q: Any, step: StepPlan | None
) -> tuple[int, torch.Tensor | None, tuple[int, int]]:
    """The batch size, ``cu_seqlens_q`` (None = one query per row), and the fewest and most queries of a row."""
    if cu_seqlens_q is not None:
        given, query_counts = packed_queries(q, cu_seqlens_q, max_seqlen_q)
        return len(given) - 1, given, query_counts
    batch, seqlen_q = q.shape[:2]
    if seqlen_q == 1:
        return batch, None, (1, 1)

    def bounds() -> torch.Tensor:
        return torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen_q

    what = ("bounds", batch, seqlen_q)
    return batch, worked_out(step, what, (), q.device, bounds), (seqlen_q, seqlen_q)


def _writer(
    k: torch.Tensor, v: torch.Tensor, cache: CacheArguments, blocks: Blocks, positions: torch.Tensor, table_name: str
) -> Callable[[], None]:
    """What writes new keys and values to the cache when it is called."""
    slots = new_slots(blocks, positions)
    if are_readable(slots) and bool((slots < 0).any()):
        raise ShapeError(f"{table_name}: expected a block for every new token, found none for some")
    new = rows_of(k).flatten(0, 1), rows_of(v).flatten(0, 1)
    return functools.partial(append, *new, cache.k_cache, cache.v_cache, slots, layout="NHD")


def _skip_padding(
    cache_leftpad: Any, blocks: Blocks, lengths: torch.Tensor, table_name: str, has_table: bool
) -> tuple[Blocks, torch.Tensor]:
    """Blocks and lengths without the padding in front of each sequence."""
    if has_table:
        raise UnsupportedError(
            f"cache_leftpad: expected None beside {table_name}: a row begins at the first slot of a block"
        )
    leftpad = indices("cache_leftpad", cache_leftpad, lengths.shape, lengths.device)
    check_range("cache_leftpad", leftpad, 0, lengths, "within the sequence")
    return after_padding(blocks, leftpad), lengths - leftpad


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


def _held_lengths(
    cache_seqlens: Any, blocks: Blocks, num_new: int, batch: int, device: torch.device, step: StepPlan | None
) -> torch.Tensor:
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

    def full() -> torch.Tensor:
        return torch.full((batch,), length, dtype=torch.int32, device=device)

    return worked_out(step, ("full", batch, length), (), device, full)


class _Places(NamedTuple):
    """The positions of the queries and keys of a call that is rotated."""

    held: torch.Tensor
    """``[batch]`` tokens in the cache."""
    bounds: torch.Tensor | None
    """``[batch + 1]`` of the queries; None = one a row."""
    most_queries: int
    is_spread: bool
    """Whether each query of a row has a position of its own."""


def _rotate(
    q: torch.Tensor, k: torch.Tensor | None, rotation: RotationArguments, rows: _Places, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[total_q, ...]`` and new keys ``[batch, seqlen_new, ...]``, rotated."""
    cos, sin, rotary_seqlens, interleaved = rotation
    if cos is None or sin is None:
        raise ShapeError("rotary_cos, rotary_sin: expected both or neither, got one")
    if k is None:
        raise ShapeError("rotary_cos: expected k and v beside it, which are rotated too, got none")
    name, first = "cache_seqlens", rows.held
    if rotary_seqlens is not None:
        name, first = "rotary_seqlens", indices("rotary_seqlens", rotary_seqlens, (k.shape[0],), q.device)
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

    The results for tokens after the last of ``bounds`` are arbitrary.
    """
    if bounds is None:
        return first
    token = torch.arange(num_tokens, dtype=bounds.dtype, device=bounds.device)
    row = torch.searchsorted(bounds, token, right=True).sub(1).clamp(max=len(bounds) - 2)
    places = first[row]
    return places + (token - bounds[row]) if is_spread else places
