"""The online softmax of one tile: scores in, weights out, running maximum, sum and output kept per query row.

Source: Milakov & Gimelshein 2018 (arXiv:1805.02867), alg. 3. State of a row: ``peak``, the largest score so far;
``mass``, the sum of exp(score - peak); ``out``, the sum of exp(score - peak) * value.
"""

import math

import numpy as np

from allocators._jit import jit
from kvtoolkit.cpu.vector import (
    add,
    distances,
    exp,
    first_lane,
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
    """Turn the 64 scores of a row into weights exp(score - peak) and bring the row's state to the new peak."""
    s0 = load_f32(scores)
    s1 = load_f32(scores + 64)
    s2 = load_f32(scores + 128)
    s3 = load_f32(scores + 192)
    highest = largest(maximum(maximum(s0, s1), maximum(s2, s3)))
    old = read_f32(peak)
    new = old
    if highest > old:
        new = highest
    if new == -math.inf:
        # -inf - -inf is NaN: masked scores must leave the state alone. A NaN score is no maximum, but must be seen
        if math.isnan(total(add(add(s0, s1), add(s2, s3)))):
            write_f32(mass, np.float32(math.nan))
        zero = splat(np.float32(0.0))
        store_f32(scores, zero)
        store_f32(scores + 64, zero)
        store_f32(scores + 128, zero)
        store_f32(scores + 192, zero)
        return
    centre = splat(new)
    s0 = exp(subtract(s0, centre))
    s1 = exp(subtract(s1, centre))
    s2 = exp(subtract(s2, centre))
    s3 = exp(subtract(s3, centre))
    store_f32(scores, s0)
    store_f32(scores + 64, s1)
    store_f32(scores + 128, s2)
    store_f32(scores + 192, s3)
    held = read_f32(mass)
    if new > old:
        rescale = exp(splat(np.float32(old - new)))
        held = np.float32(held * first_lane(rescale))
        for d in range(0, width, 16):
            store_f32(out + 4 * d, multiply(load_f32(out + 4 * d), rescale))
        write_f32(peak, new)
    write_f32(mass, np.float32(held + total(add(add(s0, s1), add(s2, s3)))))
