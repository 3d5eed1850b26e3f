"""The inner loops of attention on one tile: gather keys and values to contiguous float32, multiply, dot.

A tile is 64 consecutive positions of one sequence. Its rows may be anywhere: ``offsets`` is the address of 64 int64,
the place of each position in elements from ``base``. Scratch rows are ``width`` floats, ``head_dim`` rounded up to 16,
and begin on a 64-byte boundary. The sums of one element always run in the same order, whatever the number of rows that
go through a loop together, so that a query's result does not depend on its neighbours.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from allocators._bits import intrinsic
from allocators._jit import jit
from kvtoolkit.arrays.types import BFLOAT16, FLOAT16, FLOAT32
from kvtoolkit.cpu.vector import (
    HAS_WIDE,
    ITEMSIZE,
    LANES,
    constant,
    fma_of,
    load,
    load8,
    load_f32,
    load_of,
    multiply_add,
    pointer_to,
    read_i64,
    splat,
    splat_of,
    store_f32,
    store_of,
    total,
)

TILE = 64
_I64 = ir.IntType(64)
_VECTOR_BYTES = 4 * LANES


@jit
def gather_rows(dtype: int, destination: int, width: int, base: int, offsets: int, count: int, head_dim: int) -> None:
    """Copy ``count`` rows to ``destination[t * width + d]``, widened; columns from ``head_dim`` on become zero."""
    if dtype == FLOAT32:
        _gather_rows_f32(destination, width, base, offsets, count, head_dim)
    elif dtype == FLOAT16:
        _gather_rows_f16(destination, width, base, offsets, count, head_dim)
    else:
        _gather_rows_bf16(destination, width, base, offsets, count, head_dim)


def _row_gatherer(dtype: int) -> Any:
    itemsize = ITEMSIZE[dtype]

    @jit
    def gather(destination: int, width: int, base: int, offsets: int, count: int, head_dim: int) -> None:
        whole = head_dim & ~15
        for t in range(count):
            source = base + read_i64(offsets + 8 * t) * itemsize
            row = destination + 4 * t * width
            for d in range(0, whole, 16):
                store_f32(row + 4 * d, load(dtype, source + itemsize * d))
            if whole < head_dim:
                store_f32(row + 4 * whole, load8(dtype, source + itemsize * whole))

    return gather


_gather_rows_f32, _gather_rows_f16, _gather_rows_bf16 = (_row_gatherer(d) for d in (FLOAT32, FLOAT16, BFLOAT16))


def _transposer(dtype: int, lanes: int) -> Any:
    @intrinsic
    def transpose(typingctx: Any, destination: Any, base: Any, offsets: Any) -> Any:
        """Rows at ``base + offsets[0:16]``, their first ``lanes`` columns, to columns of ``destination[d * TILE]``."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            target, source, where = args
            rows = []
            for t in range(LANES):
                slot = builder.add(where, ir.Constant(_I64, 8 * t))
                offset = builder.load(pointer_to(builder, slot, _I64), align=8)
                address = builder.add(source, builder.mul(offset, ir.Constant(_I64, ITEMSIZE[dtype])))
                rows.append(load_of(builder, dtype, address, lanes))
            for d, column in enumerate(_transposed(builder, rows)[:lanes]):
                store_of(builder, FLOAT32, builder.add(target, ir.Constant(_I64, 4 * TILE * d)), column)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.int64), codegen

    return transpose


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Four rounds of exchanges, each one between rows whose numbers differ in one bit."""
    for step in (8, 4, 2, 1):
        low = [lane if not lane & step else LANES + (lane ^ step) for lane in range(LANES)]
        high = [(lane | step) if not lane & step else LANES + lane for lane in range(LANES)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), mask) for mask in (low, high)]
        exchanged = list(rows)
        for i in range(LANES):
            if not i & step:
                pair = rows[i], rows[i + step]
                exchanged[i], exchanged[i + step] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        rows = exchanged
    return rows


_transpose_f32, _transpose_f16, _transpose_bf16 = (_transposer(d, LANES) for d in (FLOAT32, FLOAT16, BFLOAT16))
_transpose8_f32, _transpose8_f16, _transpose8_bf16 = (_transposer(d, 8) for d in (FLOAT32, FLOAT16, BFLOAT16))


@jit
def gather_transposed(dtype: int, destination: int, base: int, offsets: int, head_dim: int) -> None:
    """Copy 64 rows to ``destination[d * 64 + t]``, widened. All 64 offsets must name readable rows."""
    itemsize = 4 if dtype == FLOAT32 else 2
    whole = head_dim & ~15
    for t in range(0, TILE, 16):
        where = offsets + 8 * t
        for d in range(0, whole, 16):
            target = destination + 4 * (TILE * d + t)
            source = base + itemsize * d
            if dtype == FLOAT32:
                _transpose_f32(target, source, where)
            elif dtype == FLOAT16:
                _transpose_f16(target, source, where)
            else:
                _transpose_bf16(target, source, where)
        if whole < head_dim:
            target = destination + 4 * (TILE * whole + t)
            source = base + itemsize * whole
            if dtype == FLOAT32:
                _transpose8_f32(target, source, where)
            elif dtype == FLOAT16:
                _transpose8_f16(target, source, where)
            else:
                _transpose8_bf16(target, source, where)


def _product(rows: int, vectors: int, accumulate: bool) -> Any:
    """A matrix product whose ``rows * vectors`` sums stay in registers: with 6 * 4 of 32, FMAs are the only limit."""

    @intrinsic
    def product(typingctx: Any, c: Any, c_stride: Any, a: Any, a_stride: Any, b: Any, b_stride: Any, depth: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            c, c_stride, a, a_stride, b, b_stride, depth = args
            floats = ir.Constant(_I64, 4)

            def row_of(start: Any, stride: Any, row: int) -> Any:
                step = builder.mul(stride, floats)
                return builder.add(start, builder.mul(step, ir.Constant(_I64, row)))

            def part(start: Any, vector: int) -> Any:
                return builder.add(start, ir.Constant(_I64, vector * _VECTOR_BYTES))

            c_rows = [row_of(c, c_stride, r) for r in range(rows)]
            a_rows = [row_of(a, a_stride, r) for r in range(rows)]
            b_step = builder.mul(b_stride, floats)
            cells = [(r, v) for r in range(rows) for v in range(vectors)]
            if accumulate:
                start = [load_of(builder, FLOAT32, part(c_rows[r], v)) for r, v in cells]
            else:
                start = [constant(0.0) for _ in cells]
            before = builder.block
            body = builder.append_basic_block("product.body")
            after = builder.append_basic_block("product.end")
            builder.cbranch(builder.icmp_signed(">", depth, ir.Constant(_I64, 0)), body, after)
            builder.position_at_end(body)
            k = builder.phi(_I64)
            sums = [builder.phi(value.type) for value in start]
            b_row = builder.add(b, builder.mul(k, b_step))
            b_parts = [load_of(builder, FLOAT32, part(b_row, v)) for v in range(vectors)]
            column = builder.mul(k, floats)
            updated = []
            for r in range(rows):
                address = builder.add(a_rows[r], column)
                value = builder.load(pointer_to(builder, address, ir.FloatType()), align=4)
                factor = splat_of(builder, value)
                updated += [fma_of(builder, factor, b_parts[v], sums[r * vectors + v]) for v in range(vectors)]
            following = builder.add(k, ir.Constant(_I64, 1))
            builder.cbranch(builder.icmp_signed("<", following, depth), body, after)
            k.add_incoming(ir.Constant(_I64, 0), before)
            k.add_incoming(following, body)
            for phi, first, value in zip(sums, start, updated, strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(value, body)
            builder.position_at_end(after)
            results = [builder.phi(value.type) for value in start]
            for result, first, value in zip(results, start, updated, strict=True):
                result.add_incoming(first, before)
                result.add_incoming(value, body)
            for (r, v), result in zip(cells, results, strict=True):
                store_of(builder, FLOAT32, part(c_rows[r], v), result)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 7), codegen

    return product


_COLUMNS = 4 if HAS_WIDE else 1  # vectors that one pass covers
_PRODUCTS = {
    (rows, vectors, accumulate): _product(rows, vectors, accumulate)
    for rows in (6, 3, 2, 1)
    for vectors in (1, 2, 4)
    for accumulate in (False, True)
}


def _row_blocks(vectors: int, accumulate: bool) -> Any:
    six, three, two, one = (_PRODUCTS[rows, vectors, accumulate] for rows in (6, 3, 2, 1))

    @jit
    def product(c: int, c_stride: int, a: int, a_stride: int, b: int, b_stride: int, rows: int, depth: int) -> None:
        r = 0
        while rows - r >= 6:
            six(c + 4 * r * c_stride, c_stride, a + 4 * r * a_stride, a_stride, b, b_stride, depth)
            r += 6
        if rows - r >= 3:
            three(c + 4 * r * c_stride, c_stride, a + 4 * r * a_stride, a_stride, b, b_stride, depth)
            r += 3
        if rows - r == 2:
            two(c + 4 * r * c_stride, c_stride, a + 4 * r * a_stride, a_stride, b, b_stride, depth)
        elif rows - r == 1:
            one(c + 4 * r * c_stride, c_stride, a + 4 * r * a_stride, a_stride, b, b_stride, depth)

    return product


_scores_block = _row_blocks(_COLUMNS, False)
_weigh_block4, _weigh_block2, _weigh_block1 = (_row_blocks(min(_COLUMNS, n), True) for n in (4, 2, 1))


@jit
def score_rows(scores: int, q: int, keys: int, width: int, rows: int, head_dim: int) -> None:
    """``scores[r, t] = sum_d q[r, d] * keys[d, t]`` for the 64 columns of a transposed tile."""
    for t in range(0, TILE, 16 * _COLUMNS):
        _scores_block(scores + 4 * t, TILE, q, width, keys + 4 * t, TILE, rows, head_dim)


@jit
def weigh_values(out: int, weights: int, values: int, width: int, rows: int, count: int) -> None:
    """``out[r, d] += sum_t weights[r, t] * values[t, d]`` over ``count`` positions."""
    d = 0
    while d < width:
        left = width - d
        if _COLUMNS == 4 and left >= 64:
            _weigh_block4(out + 4 * d, width, weights, TILE, values + 4 * d, width, rows, count)
            d += 64
        elif _COLUMNS == 4 and left >= 32:
            _weigh_block2(out + 4 * d, width, weights, TILE, values + 4 * d, width, rows, count)
            d += 32
        else:
            _weigh_block1(out + 4 * d, width, weights, TILE, values + 4 * d, width, rows, count)
            d += 16


@jit
def all_finite(tile: int, width: int, first: int, end: int) -> bool:
    """Whether the rows ``first`` to ``end - 1`` of a tile hold neither infinities nor NaN."""
    zero = splat(np.float32(0.0))
    products = zero
    for i in range(first * width, end * width, 16):
        products = multiply_add(load_f32(tile + 4 * i), zero, products)
    return bool(total(products) == 0.0)
