"""Batches whose rows are lists of blocks of one pool: long rows and common blocks are cheap to make and to judge."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.kvtoolkit.attention.attention_cases import nan_filled


def attend_row(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, *, softmax_scale: float | None = None, causal: bool = True,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, sinks: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Attention of one sequence in float64, all queries at once: what `kvtoolkit.reference` does one by one.

    A token that some queries do not see must be a number.

    Args:
        q: ``[num_queries, num_q_heads, head_dim]``.
        keys: ``[seq_len, num_kv_heads, head_dim]``, the values too.
    """
    num_queries, num_q_heads, head_dim = q.shape
    seq_len, num_kv_heads, _ = keys.shape
    if seq_len == 0:
        return np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    group = num_q_heads // num_kv_heads
    # contiguous, one matrix for each kv head: otherwise NumPy multiplies without BLAS
    rows = np.ascontiguousarray(q.reshape(num_queries, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3), np.float64)
    keys, values = (np.ascontiguousarray(tokens.transpose(1, 0, 2), np.float64) for tokens in (keys, values))
    rows = rows.reshape(num_kv_heads, -1, head_dim)
    scores = np.stack([one @ other.T for one, other in zip(rows, keys, strict=True)])
    scores *= head_dim**-0.5 if softmax_scale is None else softmax_scale
    scores = scores.reshape(num_kv_heads, group, num_queries, seq_len)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    position = np.arange(seq_len - num_queries, seq_len)[:, None]
    key = np.arange(seq_len)
    if alibi_slopes is not None:
        scores -= alibi_slopes.reshape(num_kv_heads, group, 1, 1) * np.abs(position - key)
    left, right = window_size
    right = 0 if causal else right
    if left >= 0:
        scores[..., key < position - left] = -np.inf
    if right >= 0:
        scores[..., key > position + right] = -np.inf
    highest = scores.max(-1, keepdims=True)
    highest[np.isneginf(highest)] = 0
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks.reshape(num_kv_heads, group, 1, 1) - highest)
    flat = weights.reshape(num_kv_heads, -1, seq_len)
    out = np.stack([one @ other for one, other in zip(flat, values, strict=True)])
    out = out.reshape(num_kv_heads, group, num_queries, head_dim) / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + highest
    return (
        out.transpose(2, 0, 1, 3).reshape(q.shape),
        lse[..., 0].transpose(2, 0, 1).reshape(q.shape[:2]),
    )


class Pooled:
    """A batch over a pool in layout ``HND``; slots that no row holds are NaN.

    Args:
        rows: the blocks of each row.
        lengths: its tokens.
        new: of these, the ones that ask; None = the last one.
    """

    dtype = "float16"

    def __init__(
        self, rows: Sequence[Sequence[int]], lengths: Sequence[int], new: Sequence[int] | None = None, *,
        num_q_heads: int = 4, num_kv_heads: int = 1, head_dim: int = 64, block_size: int = 16, seed: int = 0,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.rows, self.lengths, self.block_size = rows, np.array(lengths, np.int32), block_size
        self.new = np.ones(len(rows), int) if new is None else np.array(new)
        self.bounds = np.concatenate([[0], np.cumsum(self.new)]).astype(np.int32)
        self.cu_seqlens_q = None if new is None else self.bounds
        num_blocks = 1 + max(max(row, default=0) for row in rows)
        self.table = np.full((len(rows), 1 + max(map(len, rows))), -1, np.int32)
        is_held = np.zeros((num_blocks, block_size), bool)
        for b, row in enumerate(rows):
            self.table[b, : len(row)] = row
            used = np.arange(len(row) * block_size).reshape(-1, block_size) < lengths[b]
            is_held[list(row)] |= used
        self.caches = []
        for _ in range(2):
            drawn = rng.standard_normal((num_blocks, num_kv_heads, block_size, head_dim), np.float32)
            cache = nan_filled(drawn.shape, self.dtype)
            np.copyto(cache, drawn.astype(self.dtype), where=is_held[:, None, :, None])
            self.caches.append(cache)
        self.q = rng.standard_normal((int(self.bounds[-1]), num_q_heads, head_dim), np.float32).astype(self.dtype)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """``k_cache, v_cache, block_table``."""
        return self.caches[0], self.caches[1], self.table

    def tokens(self, cache: np.ndarray, b: int) -> np.ndarray:
        """Keys or values of a row, ``[seq_len, num_kv_heads, head_dim]``."""
        blocks = cache[list(self.rows[b])].transpose(0, 2, 1, 3)
        return blocks.reshape(-1, *blocks.shape[2:])[: self.lengths[b]]

    def expected(self, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """``out, lse`` in float64."""
        out, lse = np.zeros(self.q.shape), np.zeros(self.q.shape[:2])
        for b in range(len(self.rows)):
            asked = slice(self.bounds[b], self.bounds[b + 1])
            out[asked], lse[asked] = attend_row(
                self.q[asked], *(self.tokens(cache, b) for cache in self.caches), **options
            )
        return out, lse
