"""The end of an attention call: divide by the row sums, merge the splits of a row, write the masses of the tiles."""

import math
from typing import Any

import numpy as np

from allocators._jit import jit
from kvtoolkit.cpu.plan import FIRST_PARTIAL, FIRST_TILE, SPLITS
from kvtoolkit.cpu.problem import (
    BATCH,
    DTYPE,
    GROUP_SIZE,
    HEAD_DIM,
    LSE,
    MASS_TILES,
    MASSES,
    NUM_KV_HEADS,
    OUT,
    OUT_HEAD,
    OUT_TOKEN,
    PARTIALS,
    SEQ_LENS,
    SINKS,
    TILE_LSES,
    padded_tiles,
    partial_floats,
    tokens_of,
)
from kvtoolkit.cpu.tiles import TILE
from kvtoolkit.cpu.vector import (
    ITEMSIZE,
    LANES,
    add,
    exp,
    load_f32,
    multiply,
    multiply_add,
    read_f32,
    read_i32,
    splat,
    store,
    store8,
    store_f32,
    subtract,
    write_f32,
)

_int: Any = np.int64  # casts in compiled code, without the scalar types that NumPy gives them
_float: Any = np.float64
_single: Any = np.float32


@jit
def finish(problem: Any, token: int, q_head: int, seq_len: int, sums: int, row_max: float, row_sum: float) -> None:
    """Divide a query's sums by the sum of its weights and the sink's, and write its ``out`` and ``lse``."""
    head_dim = problem[HEAD_DIM]
    dtype = problem[DTYPE]
    itemsize = ITEMSIZE[dtype]
    top = _float(row_max)
    whole = _float(row_sum)
    share = 1.0
    if problem[SINKS] != 0 and seq_len > 0:
        sink = _float(read_f32(problem[SINKS] + 4 * q_head))
        if sink > top:
            share = math.exp(top - sink)
            whole = whole * share + 1.0
            top = sink
        elif sink > -math.inf:
            whole += math.exp(sink - top)
    factor = 0.0
    lse = -math.inf
    if whole > 0.0 or math.isnan(whole):  # 0 means that nothing was visible
        factor = share / whole
        lse = top + math.log(whole)
        if math.isnan(whole):
            lse = math.nan
    scale = splat(_single(factor))
    target = problem[OUT] + itemsize * (token * problem[OUT_TOKEN] + q_head * problem[OUT_HEAD])
    for d in range(0, head_dim & ~15, 16):
        store(dtype, target + itemsize * d, multiply(scale, load_f32(sums + 4 * d)))
    if head_dim & 15:
        d = head_dim & ~15
        store8(dtype, target + itemsize * d, multiply(scale, load_f32(sums + 4 * d)))
    if problem[LSE] != 0:
        q_heads = problem[NUM_KV_HEADS] * problem[GROUP_SIZE]
        write_f32(problem[LSE] + 4 * (token * q_heads + q_head), _single(lse))


@jit
def combine_splits(problem: Any, plan: Any, scratch: int) -> None:
    """Merge the partial results of every row with several splits, in the order of the splits."""
    q_heads = problem[NUM_KV_HEADS] * problem[GROUP_SIZE]
    width = (problem[HEAD_DIM] + 15) // 16 * 16
    stride = 4 * partial_floats(problem[HEAD_DIM])
    for row in range(problem[BATCH]):
        splits = plan[row, SPLITS]
        if splits == 1:
            continue
        begin, end = tokens_of(problem, row)
        seq_len = _int(read_i32(problem[SEQ_LENS] + 4 * row))
        for i in range(end - begin):
            for q_head in range(q_heads):
                index = plan[row, FIRST_PARTIAL] + (i * q_heads + q_head) * splits
                partial = problem[PARTIALS] + index * stride
                row_max = _single(-math.inf)
                for s in range(splits):
                    row_max = max(row_max, read_f32(partial + s * stride + 4 * width))
                row_sum = _single(0.0)
                for d in range(0, width, 16):
                    store_f32(scratch + 4 * d, splat(_single(0.0)))
                for s in range(splits):
                    part = partial + s * stride
                    part_max = read_f32(part + 4 * width)
                    part_sum = read_f32(part + 4 * (width + 1))
                    weight = _single(0.0)
                    if part_max > -math.inf:
                        weight = _single(math.exp(part_max - row_max))
                    elif math.isnan(part_sum):
                        weight = _single(1.0)
                    if weight != 0.0:  # NaN, of a score of +inf, is kept
                        row_sum = _single(row_sum + weight * part_sum)
                        factor = splat(weight)
                        for d in range(0, width, 16):
                            merged = multiply_add(factor, load_f32(part + 4 * d), load_f32(scratch + 4 * d))
                            store_f32(scratch + 4 * d, merged)
                finish(problem, begin + i, q_head, seq_len, scratch, row_max, row_sum)


@jit
def write_masses(problem: Any, plan: Any, scratch: int) -> None:
    """The mass of every tile: exp(lse of the tile - lse), averaged over the queries of the row and of the group."""
    heads = problem[NUM_KV_HEADS]
    group = problem[GROUP_SIZE]
    q_heads = heads * group
    for row in range(problem[BATCH]):
        begin, end = tokens_of(problem, row)
        tiles = (_int(read_i32(problem[SEQ_LENS] + 4 * row)) + TILE - 1) // TILE
        if begin == end:
            tiles = _int(0)
        share = splat(_single(1.0 / max(1, (end - begin) * group)))
        lines = problem[TILE_LSES] + 4 * plan[row, FIRST_TILE]
        target = problem[MASSES] + 4 * row * problem[MASS_TILES] * heads
        for first in range(0, tiles, LANES):
            for head in range(heads):
                mass = splat(_single(0.0))
                for i in range(end - begin):
                    for q_head in range(head * group, (head + 1) * group):
                        lse = read_f32(problem[LSE] + 4 * ((begin + i) * q_heads + q_head))
                        if lse == -math.inf:  # saw nothing
                            continue
                        line = lines + 4 * ((i * q_heads + q_head) * padded_tiles(tiles) + first)
                        mass = add(mass, exp(subtract(load_f32(line), splat(lse))))
                store_f32(scratch, multiply(share, mass))
                for t in range(min(_int(LANES), tiles - first)):
                    write_f32(target + 4 * ((first + t) * heads + head), read_f32(scratch + 4 * t))
        for place in range(tiles * heads, problem[MASS_TILES] * heads):
            write_f32(target + 4 * place, _single(0.0))
