"""Paged problems for the attention tests: random tokens, laid out in random blocks, everything unused poisoned."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtoolkit import reference
from kvtoolkit.arrays.call import AttentionCall, attention_call
from kvtoolkit.attention.calls import paged_attention, variable_block_attention
from kvtoolkit.cpu import attend, operand
from kvtoolkit.formats.entry import GRANULE

# unit roundoff of the output, and its relative L2 error as a multiple of what rounding alone costs
RELATIVE_L2 = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values in ``dtype``; bfloat16 as uint16 words, truncated, which is as good a random number."""
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def nan_filled(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return np.full(shape, 0x7FC1, np.uint16)
    return np.full(shape, np.nan, dtype)


def make_call(*arrays: Any, dtype: str | None = None, **options: Any) -> AttentionCall:
    """`attention_call` with NumPy arrays; ``dtype`` tells what 16-bit integers stand for."""

    def described(array: Any) -> Any:
        return operand(array, "array", dtype) if isinstance(array, np.ndarray) else array

    return attention_call(*map(described, arrays), **{name: described(value) for name, value in options.items()})


@dataclass
class Case:
    """One batch: ``seq_lens`` tokens per row, of which the last ``new`` ask; `paged` and `variable` lay them out."""

    seq_lens: list[int]
    new: list[int] | None = None
    num_q_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    dtype: str = "float32"
    seed: int = 0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        counts = [1] * len(self.seq_lens) if self.new is None else self.new
        self.cu_seqlens_q = None if self.new is None else np.cumsum([0, *counts]).astype(np.int32)
        self.lengths = np.array(self.seq_lens, np.int32)
        self.q = self._random(sum(counts), self.num_q_heads)
        self.keys = [self._random(n, self.num_kv_heads) for n in self.seq_lens]
        self.values = [self._random(n, self.num_kv_heads) for n in self.seq_lens]

    def _random(self, tokens: int, heads: int) -> np.ndarray:
        values = self.rng.standard_normal((tokens, heads, self.head_dim))
        values[..., :3] *= 3.0  # a few channels are larger, as those of real models do
        values[..., self.head_dim // 2] *= 30.0 if heads == self.num_kv_heads else 0.1
        return to_storage(values, self.dtype)

    def paged(self, block_size: int, layout: str) -> tuple[np.ndarray, ...]:
        """``k_cache, v_cache, block_table``: blocks in random order, unused slots and blocks full of NaN."""
        blocks = [-(-n // block_size) for n in self.seq_lens]
        num_blocks = sum(blocks) + 2
        ids = self.rng.permutation(num_blocks).astype(np.int32)
        table = np.full((len(blocks), max([*blocks, 1])), -1, np.int32)
        shape = (num_blocks, block_size, self.num_kv_heads, self.head_dim)
        k_cache, v_cache = nan_filled(shape, self.dtype), nan_filled(shape, self.dtype)
        for row, count in enumerate(blocks):
            table[row, :count], ids = ids[:count], ids[count:]
            for cache, tokens in ((k_cache, self.keys[row]), (v_cache, self.values[row])):
                for p in range(self.seq_lens[row]):
                    cache[table[row, p // block_size], p % block_size] = tokens[p]
        if layout == "HND":
            k_cache, v_cache = (np.ascontiguousarray(c.swapaxes(1, 2)) for c in (k_cache, v_cache))
        return k_cache, v_cache, table

    def variable(self, lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)) -> tuple[np.ndarray, ...]:
        """``k_cache, v_cache, block_table, block_starts``: a random partition into entries of these lengths."""
        rows = []
        for n in self.seq_lens:
            entries, covered = [], 0
            while covered * GRANULE < n:
                entries.append(int(self.rng.choice(lengths)))
                covered += entries[-1]
            rows.append(entries)
        flat = [(row, i, length) for row, entries in enumerate(rows) for i, length in enumerate(entries)]
        num_granules = sum(length for *_, length in flat) + 3
        shape = (num_granules, self.num_kv_heads, GRANULE, self.head_dim)
        k_cache, v_cache = nan_filled(shape, self.dtype), nan_filled(shape, self.dtype)
        table = np.full((len(rows), max([*map(len, rows), 1]) + 1), -1, np.int32)
        starts = np.full(table.shape, -1, np.int32)
        granule = 2
        for at in self.rng.permutation(len(flat)):
            row, i, length = flat[at]
            start = sum(rows[row][:i])
            table[row, i], starts[row, i] = granule | (length - 1) << 24, start
            for p in range(start * GRANULE, min((start + length) * GRANULE, self.seq_lens[row])):
                place = granule + p // GRANULE - start
                k_cache[place, :, p % GRANULE] = self.keys[row][p]
                v_cache[place, :, p % GRANULE] = self.values[row][p]
            granule += length
        return k_cache, v_cache, table, starts

    def run(self, arrays: tuple[np.ndarray, ...], layout: str = "NHD", **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """``out, lse`` of the CPU kernels, written over NaN; four ``arrays`` are entries, three a paged cache."""
        out = nan_filled(self.q.shape, self.dtype)
        options.setdefault("cu_seqlens_q", self.cu_seqlens_q)
        if self.dtype == "bfloat16":  # raw words: only the low-level call takes them
            lse = np.full(self.q.shape[:2], np.nan, np.float32)
            k_cache, v_cache, table, *starts = arrays
            call = make_call(
                self.q, k_cache, v_cache, table, starts[0] if starts else None, self.lengths, out=out, lse=lse,
                layout="HND" if starts else layout, dtype="bfloat16", **options,
            )  # fmt: skip
            attend(call, check=True)
            return out, lse
        if len(arrays) == 4:
            result = variable_block_attention(self.q, *arrays, self.lengths, out=out, return_lse=True, **options)
        else:
            result = paged_attention(
                self.q, *arrays, self.lengths, out=out, return_lse=True, layout=layout, **options
            )  # fmt: skip
        assert result[0] is out
        return result  # type: ignore[no-any-return]

    def expected(self, arrays: tuple[np.ndarray, ...], layout: str = "NHD", **options: Any) -> tuple[np.ndarray, ...]:
        """``out, lse`` of the reference."""
        options.setdefault("cu_seqlens_q", self.cu_seqlens_q)
        if len(arrays) == 4:
            return reference.variable_block_attention(self.q, *arrays, self.lengths, dtype=self.dtype, **options)
        return reference.paged_attention(self.q, *arrays, self.lengths, layout=layout, dtype=self.dtype, **options)

    def check(self, arrays: tuple[np.ndarray, ...], layout: str = "NHD", **options: Any) -> None:
        """The kernels agree with the reference."""
        out, lse = self.run(arrays, layout, **options)
        assert_close(out, lse, *self.expected(arrays, layout, **options), self.dtype)


def assert_close(out: np.ndarray, lse: np.ndarray, good: np.ndarray, good_lse: np.ndarray, dtype: str) -> None:
    """Relative L2 error within what the dtype's rounding costs; no element off by more than a few of its roundings."""
    found = reference.to_float64(out, dtype)
    assert np.array_equal(np.isneginf(lse), np.isneginf(good_lse))
    visible = ~np.isneginf(good_lse)
    # scores of a few hundred, summed in float32, carry an error of some 1e-5, and so does their logarithm
    np.testing.assert_allclose(lse[visible], good_lse[visible], rtol=3e-6, atol=3e-5)
    assert np.isfinite(found).all()
    assert (found[~visible] == 0).all()
    scale = np.abs(good).max(initial=0.0)
    np.testing.assert_array_less(np.abs(found - good), EPSILON[dtype] * np.abs(good) + 1e-4 * scale + 1e-30)
    # a weight is as far off, relatively, as its score is absolutely: some roundings of a number of that size
    tolerance = RELATIVE_L2[dtype] + 2.0**-23 * np.abs(good_lse[visible]).max(initial=0.0)
    assert np.linalg.norm(found - good) <= tolerance * np.linalg.norm(good)
