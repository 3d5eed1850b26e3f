"""The caches of flash-attn's callers as blocks that kvtoolkit's kernels read, and where new tokens go in them."""

import math
from typing import Any, NamedTuple

import torch

from kvtoolkit.cpu import Operand, operand
from kvtoolkit.cuda import device_operand
from kvtoolkit.errors import ShapeError, UnsupportedError
from kvtoolkit.integrations.flash_attn.arguments import indices
from kvtoolkit.integrations.flash_attn.step_plan import StepPlan, worked_out

_MOST_BLOCKS = 2**31 - 1  # block ids are int32


class Blocks(NamedTuple):
    """Keys and values as a paged cache."""

    keys: Any
    values: Any
    table: torch.Tensor
    """``[batch, max_blocks]`` int32."""
    capacity: int
    """Tokens that a row has room for."""
    memory: tuple[Operand, Operand] | None = None
    """The arrays that keys and values are views of, where blocks reach beyond their end; nothing is read there."""


def cache_blocks(
    batch: int, k_cache: torch.Tensor, v_cache: torch.Tensor, name: str, block_table: Any, cache_batch_idx: Any,
    step: StepPlan | None,
) -> Blocks:  # fmt: skip
    """The blocks of a cache; without a table, every sequence of the cache is a block. ``name`` is the table's."""
    if block_table is not None:
        if cache_batch_idx is not None:
            raise UnsupportedError(f"cache_batch_idx: expected None beside {name}, whose rows say as much")
        table = indices(name, block_table, (batch, None), k_cache.device)
    elif cache_batch_idx is not None:
        table = indices("cache_batch_idx", cache_batch_idx, (batch,), k_cache.device).unsqueeze(1)
    else:
        if batch > k_cache.shape[0]:
            raise ShapeError(f"q: expected a batch of up to {k_cache.shape[0]}, the sequences of k_cache, got {batch}")

        def rows() -> torch.Tensor:
            return torch.arange(batch, dtype=torch.int32, device=k_cache.device).unsqueeze(1)

        table = worked_out(step, ("rows", batch), (), k_cache.device, rows)
    return Blocks(k_cache, v_cache, table, table.shape[1] * k_cache.shape[1])


def after_padding(blocks: Blocks, leftpad: torch.Tensor) -> Blocks:
    """A cache without a block table, each of whose sequences begins at a token of its own.

    A block begins at every token, so that a row's only block is the one of its first token; the blocks overlap, which
    does not matter to those who only read, and the part of a block behind its sequence is never read.

    Args:
        blocks: as `cache_blocks` made them without a table.
        leftpad: ``[batch]`` int32, tokens in front of each sequence.
    """
    views, steps = [], []
    memory = _describe(blocks.keys, "k_cache"), _describe(blocks.values, "v_cache")
    for described in memory:
        (num_rows, max_len, num_heads, head_dim), (row, token, head, dim) = described.shape, described.strides
        row = row if num_rows > 1 else 0
        unit = math.gcd(row, token) or 1  # what both the next sequence and the next token are multiples of
        num_blocks = ((num_rows - 1) * row + (max_len - 1) * token) // unit + 1
        shape, strides = (num_blocks, max_len, num_heads, head_dim), (unit, token, head, dim)
        views.append(described._replace(shape=shape, strides=strides))
        steps.append((row // unit, token // unit, num_blocks))
    if steps[0] != steps[1] or steps[0][2] > _MOST_BLOCKS:
        raise UnsupportedError(
            "cache_leftpad: expected k_cache and v_cache of the same strides and fewer than 2**31 tokens, got strides "
            f"{blocks.keys.stride()} and {blocks.values.stride()}"
        )
    row_step, token_step, _ = steps[0]
    table = blocks.table * row_step + leftpad.unsqueeze(1) * token_step
    return Blocks(views[0], views[1], table, blocks.capacity, memory)


def packed_blocks(k: torch.Tensor, v: torch.Tensor, first_tokens: torch.Tensor, max_len: int) -> Blocks:
    """Packed tokens ``[total_k, num_kv_heads, head_dim]`` as a cache whose block ``i`` begins at token ``i``.

    So a sequence of up to ``max_len`` tokens is one block, that of its first token, and nothing is copied.
    """
    views, memory = [], (_describe(k, "k"), _describe(v, "v"))
    for packed in memory:
        (num_tokens, num_heads, head_dim), (token, head, dim) = packed.shape, packed.strides
        shape, strides = (num_tokens, max(max_len, 1), num_heads, head_dim), (token, token, head, dim)
        views.append(packed._replace(shape=shape, strides=strides))
    return Blocks(views[0], views[1], first_tokens.unsqueeze(1), max_len, memory)


def batched_blocks(k: torch.Tensor, v: torch.Tensor) -> Blocks:
    """Keys and values ``[batch, seqlen_k, num_kv_heads, head_dim]`` as one block a row, also where there are none."""
    views, memory = [], (_describe(k, "k"), _describe(v, "v"))
    for described in memory:
        batch, seqlen, num_heads, head_dim = described.shape
        views.append(described._replace(shape=(batch, max(seqlen, 1), num_heads, head_dim)))
    table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device).unsqueeze(1)
    return Blocks(views[0], views[1], table, k.shape[1], memory)


def new_slots(blocks: Blocks, positions: torch.Tensor) -> torch.Tensor:
    """``[batch * seqlen_new]`` int64 slots of the tokens at ``positions``, ``[batch, seqlen_new]``; -1 = no room."""
    block_size, table = blocks.keys.shape[1], blocks.table
    index = positions // block_size
    ids = table.gather(1, index.clamp(min=0, max=table.shape[1] - 1))
    ids = ids.masked_fill(index >= table.shape[1], -1)
    return torch.add(positions % block_size, ids, alpha=block_size).clamp(min=-1).flatten()


def _describe(states: torch.Tensor, name: str) -> Operand:
    return (operand if states.is_cpu else device_operand)(states, name)
