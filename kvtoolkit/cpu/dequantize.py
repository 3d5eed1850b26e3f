"""Blocks of the quantized tiers as float32 tiles: their bytes read once, put in order, widened, scaled.

`kvtoolkit.formats.quantized` says where each byte is. Its pieces of 16 bytes form lines of 64, one piece for each
``t``. Eight lines are brought to the order of a tile in four rounds, each one between lines whose numbers differ in one
bit; what moves are bytes within a piece, which is one instruction of AVX, AVX-512 or NEON. A line then holds, for each
``t``, 16 tokens of one dim (keys) or 16 dims of one token (values), of int4 those of two.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from allocators._bits import intrinsic
from allocators._jit import jit
from kvtoolkit.arrays.types import FLOAT16, FLOAT32
from kvtoolkit.cpu.tiles import TILE
from kvtoolkit.cpu.vector import (
    LANES,
    float32x16,
    fma_of,
    load_f16,
    load_of,
    multiply,
    multiply_add,
    pointer_to,
    splat,
    splat_of,
    store_f32,
    store_of,
)
from kvtoolkit.formats.entry import TIER_WARM

_PIECE, _PIECES = 16, 4
_LINE = _PIECE * _PIECES
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_BYTES = ir.VectorType(ir.IntType(8), _LINE)
_KEY_ROUNDS = ((4, 1), (2, 1), (1, 1), (4, 1))  # the bit that differs, bytes that move together
_VALUE_ROUNDS = ((4, 1), (2, 1), (1, 1), (2, 8))


_QUARTER, _MINUS_ONE, _EIGHT = np.float32(0.25), np.float32(-1), np.float32(8)


def _exchange(builder: Any, lines: list[Any], bit: int, unit: int) -> list[Any]:
    """Take ``unit`` bytes in turn of lines whose numbers differ in ``bit``; lower halves of pieces, then upper ones."""
    masks = []
    for upper in (0, _PIECE // 2):
        picks = [
            side + piece * _PIECE + upper + group + byte
            for piece in range(_PIECES)
            for group in range(0, _PIECE // 2, unit)
            for side in (0, _LINE)
            for byte in range(unit)
        ]
        masks.append(ir.Constant(ir.VectorType(_I32, _LINE), picks))
    exchanged = list(lines)
    for n in range(len(lines)):
        if not n & bit:
            pair = lines[n], lines[n | bit]
            exchanged[n], exchanged[n | bit] = (builder.shuffle_vector(*pair, mask) for mask in masks)
    return exchanged


def _ordered(builder: Any, addresses: list[Any], rounds: Any) -> list[Any]:
    """Eight lines after all rounds.

    Four bits give the place of a byte in its piece, ``P3 .. P0``. Keys come out in lines ``P0 P2 P1``, tokens in order
    within a piece; values in lines ``P3 P0 P1``, dims in order.
    """
    lines = [builder.load(pointer_to(builder, address, _BYTES), align=1) for address in addresses]
    for bit, unit in rounds:
        lines = _exchange(builder, lines, bit, unit)
    return lines


def _bytes_of(value: int) -> Any:
    return ir.Constant(_BYTES, [value] * _LINE)


def _nibbles(builder: Any, line: Any) -> tuple[Any, Any]:
    """The lower and the upper codes of an int4 line, their middle taken off."""
    low, high = builder.and_(line, _bytes_of(15)), builder.lshr(line, _bytes_of(4))
    return builder.sub(low, _bytes_of(8)), builder.sub(high, _bytes_of(8))


def _widened(builder: Any, line: Any, piece: int) -> Any:
    """The signed bytes of one piece as floats."""
    picks = ir.Constant(ir.VectorType(_I32, LANES), [piece * _PIECE + byte for byte in range(LANES)])
    codes = builder.sext(builder.shuffle_vector(line, line, picks), ir.VectorType(_I32, LANES))
    return builder.sitofp(codes, ir.VectorType(ir.FloatType(), LANES))


def _at(builder: Any, base: Any, offset: int) -> Any:
    return builder.add(base, ir.Constant(_I64, offset))


def _splat_at(builder: Any, base: Any, index: int) -> Any:
    """All lanes hold the float ``base[index]``."""
    pointer = pointer_to(builder, _at(builder, base, 4 * index), ir.FloatType())
    return splat_of(builder, builder.load(pointer, align=4))


def _key_addresses(builder: Any, source: Any, stride: Any) -> list[Any]:
    """Lines ``g1 g0 i``."""
    starts = source, builder.add(source, stride)
    return [_at(builder, starts[n & 1], _LINE * (n >> 1)) for n in range(8)]


@intrinsic
def _int8_key_lines(typingctx: Any, destination: Any, source: Any, stride: Any, scales: Any) -> Any:
    """16 tokens of 32 dims to columns; ``stride`` leads from ``i = 0`` to ``i = 1``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, source, stride, scales = args
        scale = load_of(builder, FLOAT16, scales)
        for n, line in enumerate(_ordered(builder, _key_addresses(builder, source, stride), _KEY_ROUNDS)):
            p0, p2, p1 = n >> 2, n >> 1 & 1, n & 1
            codes = builder.xor(line, _bytes_of(128))  # as signed bytes: minus 128
            for t in range(_PIECES):
                dim = 8 * t + 4 * p2 + 2 * p1 + p0
                column = builder.fmul(scale, _widened(builder, codes, t))
                store_of(builder, FLOAT32, _at(builder, target, 4 * TILE * dim), column)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 4), codegen


@intrinsic
def _int4_key_lines(typingctx: Any, destination: Any, source: Any, stride: Any, scales: Any, zeros: Any) -> Any:
    """16 tokens of 64 dims to columns; ``scales`` and ``zeros`` are floats of these dims."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, source, stride, scales, zeros = args
        for n, line in enumerate(_ordered(builder, _key_addresses(builder, source, stride), _KEY_ROUNDS)):
            p0, p2, p1 = n >> 2, n >> 1 & 1, n & 1
            for nibble, codes in enumerate(_nibbles(builder, line)):
                for t in range(_PIECES):
                    dim = 32 * p2 + 8 * t + 4 * p0 + 2 * nibble + p1
                    scale, zero = _splat_at(builder, scales, dim), _splat_at(builder, zeros, dim)
                    column = fma_of(builder, scale, _widened(builder, codes, t), zero)
                    store_of(builder, FLOAT32, _at(builder, target, 4 * TILE * dim), column)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 5), codegen


@intrinsic
def _int8_value_lines(typingctx: Any, destination: Any, row: Any, source: Any, scales: Any) -> Any:
    """32 dims of 16 tokens to rows of ``row`` bytes; ``scales`` are floats of tokens."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, row, source, scales = args
        addresses = [_at(builder, source, _LINE * g) for g in range(8)]
        for n, line in enumerate(_ordered(builder, addresses, _VALUE_ROUNDS)):
            p3, p0, p1 = n >> 2, n >> 1 & 1, n & 1
            codes = builder.xor(line, _bytes_of(128))
            for t in range(_PIECES):
                token = 8 * t + 4 * p0 + p1
                values = builder.fmul(_splat_at(builder, scales, token), _widened(builder, codes, t))
                place = builder.add(target, builder.mul(row, ir.Constant(_I64, token)))
                store_of(builder, FLOAT32, _at(builder, place, 64 * p3), values)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 4), codegen


@intrinsic
def _int4_value_lines(typingctx: Any, destination: Any, row: Any, source: Any, scales: Any, zeros: Any) -> Any:
    """32 dims of 32 tokens to rows of ``row`` bytes; ``scales`` and ``zeros`` are floats of these tokens."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, row, source, scales, zeros = args
        addresses = [_at(builder, source, _LINE * g) for g in range(8)]
        for n, line in enumerate(_ordered(builder, addresses, _VALUE_ROUNDS)):
            p3, p0, p1 = n >> 2, n >> 1 & 1, n & 1
            for nibble, codes in enumerate(_nibbles(builder, line)):
                for t in range(_PIECES):
                    token = 8 * t + 4 * p1 + 2 * p0 + nibble
                    scale, zero = _splat_at(builder, scales, token), _splat_at(builder, zeros, token)
                    values = fma_of(builder, scale, _widened(builder, codes, t), zero)
                    place = builder.add(target, builder.mul(row, ir.Constant(_I64, token)))
                    store_of(builder, FLOAT32, _at(builder, place, 64 * p3), values)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 5), codegen


def _times(factors: tuple[float, ...]) -> Any:
    @intrinsic
    def times(typingctx: Any, vector: Any) -> Any:
        """Each lane times its factor."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.fmul(args[0], ir.Constant(args[0].type, list(factors) * (LANES // len(factors))))

        return float32x16(float32x16), codegen

    return times


# scales are stored for registers in which every second pair of nibbles comes out times 16
_times_pairs, _times_alternating = _times((0.25, 0.25, 4.0, 4.0)), _times((0.25, 4.0))
_times_points = _times((1.0, 0.0625))


@jit
def block_bytes(tier: int, head_dim: int) -> int:
    """Bytes of a block of one kv head; `kvtoolkit.formats.quantized.Format.nbytes`."""
    if tier == TIER_WARM:
        return 2 * TILE * (head_dim + 2)
    return TILE * head_dim + 4 * head_dim + 4 * TILE


@jit
def dequantize_keys(tier: int, destination: int, block: int, head_dim: int, spare: int) -> None:
    """The 64 keys of a block to ``destination[d * 64 + t]``; ``spare`` is room for ``2 * head_dim`` floats."""
    if tier == TIER_WARM:
        _int8_keys(destination, block, head_dim)
    else:
        _int4_keys(destination, block, head_dim, spare)


@jit
def dequantize_values(tier: int, destination: int, block: int, head_dim: int, spare: int) -> None:
    """The 64 values of a block to ``destination[t * head_dim + d]``; ``spare`` is room for 128 floats."""
    if tier == TIER_WARM:
        _int8_values(destination, block, head_dim, spare)
    else:
        _int4_values(destination, block, head_dim, spare)


@jit
def _int8_keys(destination: int, block: int, head_dim: int) -> None:
    unit = 32 * head_dim
    for half in range(2):
        codes = block + half * (2 * unit + 128)
        for j in range(0, head_dim, 32):
            for first in (0, 16):
                target = destination + 4 * (TILE * j + 32 * half + first)
                _int8_key_lines(target, codes + 16 * j + 16 * first, unit // 2, codes + unit + 2 * first)


@jit
def _int8_values(destination: int, block: int, head_dim: int, spare: int) -> None:
    unit = 32 * head_dim
    row = 4 * head_dim
    quarter = splat(_QUARTER)
    for half in range(2):
        codes = block + half * (2 * unit + 128) + unit + 64
        for t in (0, 16):
            store_f32(spare + 4 * t, multiply(quarter, load_f16(codes + unit + 2 * t)))
        for i in range(2):
            for c in range(0, head_dim, 32):
                target = destination + (32 * half + 2 * i) * row + 4 * c
                _int8_value_lines(target, row, codes + i * (unit // 2) + 16 * c, spare + 8 * i)


@jit
def _int4_keys(destination: int, block: int, head_dim: int, spare: int) -> None:
    half = 32 * head_dim
    scales = block + half
    zeros = scales + 2 * head_dim
    for d in range(0, head_dim, 16):
        store_f32(spare + 4 * d, _times_pairs(load_f16(scales + 2 * d)))
        store_f32(spare + 4 * (head_dim + d), load_f16(zeros + 2 * d))
    for b in range(2):
        for j in range(0, head_dim, 64):
            for first in (0, 16):
                target = destination + 4 * (TILE * j + 32 * b + first)
                source = block + b * (half // 2) + 8 * j + 16 * first
                _int4_key_lines(target, source, half // 4, spare + 4 * j, spare + 4 * (head_dim + j))


@jit
def _int4_values(destination: int, block: int, head_dim: int, spare: int) -> None:
    half = 32 * head_dim
    row = 4 * head_dim
    codes = block + half + 4 * head_dim
    scales = codes + half
    points = scales + 2 * TILE
    for t in range(0, TILE, 16):
        scale = _times_alternating(load_f16(scales + 2 * t))
        point = _times_points(load_f16(points + 2 * t))
        store_f32(spare + 4 * t, scale)
        # what is left of the point once 8 is off the codes
        store_f32(spare + 4 * (TILE + t), multiply(scale, multiply_add(point, splat(_MINUS_ONE), splat(_EIGHT))))
    for b in range(2):
        for c in range(0, head_dim, 32):
            target = destination + 32 * b * row + 4 * c
            source = codes + b * (half // 2) + 16 * c
            _int4_value_lines(target, row, source, spare + 128 * b, spare + 4 * TILE + 128 * b)
