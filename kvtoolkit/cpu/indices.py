"""Compiled checks of index arrays in host memory against what they index."""

from typing import Any

import numpy as np

from allocators._jit import jit
from kvtoolkit.cpu.arrays import Operand
from kvtoolkit.cpu.vector import read_i32
from kvtoolkit.errors import ShapeError

_int: Any = np.int64  # a cast in compiled code


def check_lengths(lengths: Operand, name: str, most: int) -> None:
    """ShapeError unless all of ``lengths`` ``[batch]`` int32 are within ``[0, most]``."""
    row = _first_outside(lengths.address, lengths.strides[0], lengths.shape[0], most + 1, 0, 0)
    if row >= 0:
        got = int(lengths.owner[row])
        raise ShapeError(f"{name}: expected lengths from 0 to {most}, which a row has room for, got {got} in row {row}")


def check_rows_of(indices: Operand, name: str, lengths: Operand, num_rows: int) -> None:
    """ShapeError unless ``indices`` ``[batch]`` int32 are within ``[0, num_rows)`` wherever ``lengths`` is not 0."""
    row = _first_outside(
        indices.address, indices.strides[0], indices.shape[0], num_rows, lengths.address, lengths.strides[0]
    )
    if row >= 0:
        got = int(indices.owner[row])
        raise ShapeError(f"{name}: expected indices from 0 to {num_rows - 1}, got {got} in row {row}")


def check_bounds(bounds: Operand, name: str, total: int) -> None:
    """ShapeError unless ``bounds`` ``[batch + 1]`` int32 ascend from at least 0 to at most ``total``."""
    row = _first_bad_bound(bounds.address, bounds.strides[0], bounds.shape[0], total)
    if row >= 0:
        got = int(bounds.owner[row])
        raise ShapeError(f"{name}: expected to ascend from 0 to at most {total}, got {got} at index {row}")


@jit
def _first_outside(address: int, stride: int, count: int, end: int, lengths: int, lengths_stride: int) -> int:
    """Index of the first number outside ``[0, end)``, -1 if there is none; rows of length 0 are skipped."""
    for i in range(count):
        if lengths != 0 and read_i32(lengths + 4 * lengths_stride * i) == 0:
            continue
        number = _int(read_i32(address + 4 * stride * i))
        if number < 0 or number >= end:
            return i
    return -1


@jit
def _first_bad_bound(address: int, stride: int, count: int, total: int) -> int:
    """Index of the first bound that is below the one before it, below 0 or above ``total``; -1 if there is none."""
    before = _int(0)
    for i in range(count):
        bound = _int(read_i32(address + 4 * stride * i))
        if bound < before or bound > total:
            return i
        before = bound
    return -1
