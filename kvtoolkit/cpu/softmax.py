"""The online softmax of one tile: scores in, weights out, running maximum, sum and output kept per query row.

Source: Milakov & Gimelshein 2018 (arXiv:1805.02867), alg. 3, with one difference: ``peak`` need not be the largest
score so far, only within `_HEADROOM` of it, for finding a maximum among the lanes costs more than the weights
themselves. State of a row: ``peak``; ``mass``, 16 lanes that add up to the sum of exp(score - peak); ``out``, the sum
of exp(score - peak) * value.
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
def absorb_scores(scores: int, peak: int, mass: int, out: int, width: int) -> None:
    """Turn the 64 scores of a row into weights exp(score - peak), and bring the row's state to the peak they need."""
    s0 = load_f32(scores)
    s1 = load_f32(scores + 64)
    s2 = load_f32(scores + 128)
    s3 = load_f32(scores + 192)
    highest = maximum(maximum(s0, s1), maximum(s2, s3))
    old = read_f32(peak)
    centre = splat(old)
    if any_above(highest, np.float32(old + _HEADROOM)):
        new = largest(highest)
        centre = splat(new)
        write_f32(peak, new)
        if old > -math.inf:
            rescale = exp(splat(np.float32(old - new)))
            store_f32(mass, multiply(load_f32(mass), rescale))
            for d in range(0, width, 16):
                store_f32(out + 4 * d, multiply(load_f32(out + 4 * d), rescale))
    elif old == -math.inf:
        # -inf - -inf is NaN: masked scores must leave the state alone. A NaN score is no maximum, but must be seen
        sums = add(add(s0, s1), add(s2, s3))
        if math.isnan(total(sums)):
            store_f32(mass, sums)
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
    store_f32(mass, add(load_f32(mass), add(add(s0, s1), add(s2, s3))))


@jit
def tile_lse(weights: int, peak: int) -> Any:
    """The logarithm of the sum of exp(score), from the 64 weights exp(score - peak) that `absorb_scores` left."""
    lanes = add(add(load_f32(weights), load_f32(weights + 64)), add(load_f32(weights + 128), load_f32(weights + 192)))
    mass = total(lanes)
    if mass == 0.0:
        return np.float32(-math.inf)
    return np.float32(read_f32(peak) + math.log(mass))
