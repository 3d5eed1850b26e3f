"""The online softmax of one tile: scores in, weights out; a running maximum, sum and output for every query row.

Source: Milakov & Gimelshein 2018 (arXiv:1805.02867), alg. 3, with one difference. Weights are exp(score - row_max), but
``row_max`` is not the exact running maximum: scores may exceed it by up to `_HEADROOM`. It is raised, and the sums are
rescaled, only when a score exceeds that margin, because finding a maximum among the lanes costs more than the weights
themselves. State of a row: ``row_max``; ``row_sum``, 16 lanes that add up to the sum of the weights; ``out``, the sum
of weight * value.
"""

import math
from typing import Any

import numpy as np

from allocators._jit import jit
from kvtoolkit.cpu.vector import (
    add,
    any_above,
    distances,
    exp,
    keep_lanes,
    largest,
    load_f32,
    maximum,
    multiply,
    read_f32,
    splat,
    store_f32,
    subtract,
    tanh,
    total,
    write_f32,
)

_HEADROOM = 8.0  # weights up to exp(8) lose nothing in float32


@jit
def cap_scores(scores: int, cap: float) -> None:
    """``cap * tanh(score / cap)`` for the 64 scores of a row."""
    outer = splat(np.float32(cap))
    inner = splat(np.float32(1.0 / cap))
    for t in range(0, 64, 16):
        store_f32(scores + 4 * t, multiply(outer, tanh(multiply(load_f32(scores + 4 * t), inner))))


@jit
def bias_scores(scores: int, slope: float, offset: int) -> None:
    """``score - slope * |offset + t|``: ALiBi, where ``offset`` is the tile's first position minus the query's."""
    factor = splat(np.float32(slope))
    for t in range(0, 64, 16):
        bias = multiply(factor, distances(offset + t))
        store_f32(scores + 4 * t, subtract(load_f32(scores + 4 * t), bias))


@jit
def mask_scores(scores: int, first: int, last: int) -> None:
    """-inf in the scores before ``first`` and after ``last``."""
    for t in range(0, 64, 16):
        store_f32(scores + 4 * t, keep_lanes(load_f32(scores + 4 * t), first - t, last - t))


@jit
def absorb_scores(scores: int, row_max: int, row_sum: int, out: int, width: int) -> None:
    """Turn the 64 scores of a row into weights exp(score - row_max); raise ``row_max`` first where they need it."""
    s0 = load_f32(scores)
    s1 = load_f32(scores + 64)
    s2 = load_f32(scores + 128)
    s3 = load_f32(scores + 192)
    highest = maximum(maximum(s0, s1), maximum(s2, s3))
    old = read_f32(row_max)
    centre = splat(old)
    if any_above(highest, np.float32(old + _HEADROOM)):
        new = largest(highest)
        centre = splat(new)
        write_f32(row_max, new)
        if old > -math.inf:
            rescale = exp(splat(np.float32(old - new)))
            store_f32(row_sum, multiply(load_f32(row_sum), rescale))
            for d in range(0, width, 16):
                store_f32(out + 4 * d, multiply(load_f32(out + 4 * d), rescale))
    elif old == -math.inf:
        # -inf - -inf is NaN: masked scores must leave the state alone. A NaN score is no maximum but must be seen
        sums = add(add(s0, s1), add(s2, s3))
        if math.isnan(total(sums)):
            store_f32(row_sum, sums)
        zero = splat(np.float32(0.0))
        store_f32(scores, zero)
        store_f32(scores + 64, zero)
        store_f32(scores + 128, zero)
        store_f32(scores + 192, zero)
        return
    s0 = exp(subtract(s0, centre))
    s1 = exp(subtract(s1, centre))
    s2 = exp(subtract(s2, centre))
    s3 = exp(subtract(s3, centre))
    store_f32(scores, s0)
    store_f32(scores + 64, s1)
    store_f32(scores + 128, s2)
    store_f32(scores + 192, s3)
    store_f32(row_sum, add(load_f32(row_sum), add(add(s0, s1), add(s2, s3))))


@jit
def tile_lse(weights: int, row_max: int) -> Any:
    """The logarithm of the sum of exp(score), from the 64 weights exp(score - row_max) that `absorb_scores` left."""
    lanes = add(add(load_f32(weights), load_f32(weights + 64)), add(load_f32(weights + 128), load_f32(weights + 192)))
    row_sum = total(lanes)
    if row_sum == 0.0:
        return np.float32(-math.inf)
    return np.float32(read_f32(row_max) + math.log(row_sum))
