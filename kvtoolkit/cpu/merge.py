"""Merge two attention results over disjoint keys into the result over all of them, by their log-sum-exp.

Source: FlashInfer, Ye et al. 2025 (arXiv:2501.01005), sec. 2.2 (attention states and their composition).
"""

import math
from typing import Any

import numpy as np

from allocators._jit import jit
from kvtoolkit.arrays.host import Operand
from kvtoolkit.arrays.types import DTYPE_CODES
from kvtoolkit.cpu.vector import (
    ITEMSIZE,
    load,
    load8,
    multiply,
    multiply_add,
    read_f32,
    splat,
    store,
    store8,
    write_f32,
)


@jit
def _merge_rows(
    dtype: int, tokens: int, heads: int, head_dim: int, out: int, lse: int,
    out_a: int, a_token: int, a_head: int, lse_a: int, out_b: int, b_token: int, b_head: int, lse_b: int,
) -> None:  # fmt: skip
    itemsize = ITEMSIZE[dtype]
    whole = head_dim & ~15
    for token in range(tokens):
        for head in range(heads):
            row = token * heads + head
            a = np.float64(read_f32(lse_a + 4 * row))
            b = np.float64(read_f32(lse_b + 4 * row))
            row_max = max(a, b)
            weight_a = 0.0
            weight_b = 0.0
            merged = -math.inf
            if row_max > -math.inf:  # -inf - -inf is NaN: two empty sides merge to an empty one
                weight_a = math.exp(a - row_max)
                weight_b = math.exp(b - row_max)
                row_sum = weight_a + weight_b
                weight_a /= row_sum
                weight_b /= row_sum
                merged = row_max + math.log(row_sum)
            if math.isnan(a) or math.isnan(b):
                merged = math.nan
                weight_a = math.nan
                weight_b = math.nan
            factor_a = splat(np.float32(weight_a))
            factor_b = splat(np.float32(weight_b))
            source_a = out_a + itemsize * (token * a_token + head * a_head)
            source_b = out_b + itemsize * (token * b_token + head * b_head)
            target = out + itemsize * row * head_dim
            for d in range(0, whole, 16):
                part_a = load(dtype, source_a + itemsize * d)
                part_b = load(dtype, source_b + itemsize * d)
                store(dtype, target + itemsize * d, _weighted(factor_a, weight_a, part_a, factor_b, weight_b, part_b))
            if whole < head_dim:
                part_a = load8(dtype, source_a + itemsize * whole)
                part_b = load8(dtype, source_b + itemsize * whole)
                both = _weighted(factor_a, weight_a, part_a, factor_b, weight_b, part_b)
                store8(dtype, target + itemsize * whole, both)
            write_f32(lse + 4 * row, np.float32(merged))


@jit
def _weighted(factor_a: Any, weight_a: float, a: Any, factor_b: Any, weight_b: float, b: Any) -> Any:
    # an empty side may hold anything, and 0 * NaN is NaN
    if weight_b == 0.0:
        if weight_a == 0.0:
            return splat(np.float32(0.0))
        return multiply(factor_a, a)
    if weight_a == 0.0:
        return multiply(factor_b, b)
    return multiply_add(factor_a, a, multiply(factor_b, b))


def merge_states(
    out: Operand, lse: Operand, out_a: Operand, lse_a: Operand, out_b: Operand, lse_b: Operand, *,
    from_torch: bool | None = None,
) -> None:  # fmt: skip
    """Merge into contiguous ``out`` and ``lse``; shapes, dtypes and strides are not checked."""
    tokens, heads, head_dim = out_a.shape
    _merge_rows(
        DTYPE_CODES[out_a.dtype], tokens, heads, head_dim, out.address, lse.address,
        out_a.address, out_a.strides[0], out_a.strides[1], lse_a.address,
        out_b.address, out_b.strides[0], out_b.strides[1], lse_b.address,
    )  # fmt: skip
