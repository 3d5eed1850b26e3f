"""One element of a quantized block: where its code is, see `kvtoolkit.formats.quantized`, and the number that it means.

    block        [nbytes] uint8, 64 tokens of one kv head; ``token`` counts in it

A lane of a warp owns 16 bytes of each piece, 32 lanes follow one another; lane ``4 g + t`` holds rows ``g`` and columns
``t`` of a product. Here one thread reads one element, wherever it is.
"""

from typing import Any

import numpy as np

from kvtoolkit.formats.quantized import BLOCK, INT8_UNIT
from kvtoolkit.numba.device import device, float32, widen


@device
def warm_key(block: Any, token: int, dim: int, head_dim: int) -> Any:
    """int8: ``scale * (code - 128)``, a scale for each token."""
    unit, token = warm_unit(token, head_dim)
    pair = token // 2 % 2
    lane = lane_of(token // 4, dim // 8 % 4)
    piece = pair * (head_dim // 32) + dim // 32
    code = np.int32(block[unit + piece_at(piece, lane) + 8 * (token % 2) + dim % 8])
    scale = half_at(block, unit + INT8_UNIT * head_dim + 2 * token)
    return scale * float32(code - 128)


@device
def warm_value(block: Any, token: int, dim: int, head_dim: int) -> Any:
    """int8: as `warm_key`; the scale is stored times 4."""
    unit, token = warm_unit(token, head_dim)
    unit += INT8_UNIT * (head_dim + 2)  # past the keys and their scales
    pair = token // 2 % 2
    lane = lane_of(dim % 8, token // 8)
    piece = pair * (head_dim // 32) + dim // 32
    word = dim // 8 % 4
    byte = 2 * (token % 2) + token // 4 % 2
    code = np.int32(block[unit + piece_at(piece, lane) + 4 * word + byte])
    scale = half_at(block, unit + INT8_UNIT * head_dim + 2 * token)
    return scale / float32(4.0) * float32(code - 128)


@device
def cold_key(block: Any, token: int, dim: int, head_dim: int) -> Any:
    """int4: ``scale * (code - 8) + zero``, both for each channel."""
    half, pair = token // 32, token // 2 % 2
    lane = lane_of(token // 4 % 8, dim // 8 % 4)
    piece = (2 * half + pair) * (head_dim // 64) + dim // 64
    word = 2 * (token % 2) + dim // 32 % 2
    code = nibble_at(block, piece_at(piece, lane) + 4 * word, dim % 8 // 2 + 4 * (dim % 2))
    scales = BLOCK * head_dim // 2
    scale = half_at(block, scales + 2 * dim) / stored_factor(dim % 4 // 2)
    zero = half_at(block, scales + 2 * head_dim + 2 * dim)
    return scale * float32(code - 8) + zero


@device
def cold_value(block: Any, token: int, dim: int, head_dim: int) -> Any:
    """int4: ``scale * (code - point)``, both for each token; the point is stored times 4 over the scale's factor."""
    codes = BLOCK * head_dim // 2 + 4 * head_dim  # past the keys, their scales and zeros
    lane = lane_of(dim % 8, token // 8 % 4)
    piece = token // 32 * (head_dim // 32) + dim // 32
    word = dim // 8 % 4
    code = nibble_at(block, codes + piece_at(piece, lane) + 4 * word, token % 8)
    scales = codes + BLOCK * head_dim // 2
    factor = stored_factor(token % 2)
    scale = half_at(block, scales + 2 * token) / factor
    point = half_at(block, scales + 2 * BLOCK + 2 * token) * factor / float32(4.0)
    return scale * (float32(code) - point)


@device
def warm_unit(token: int, head_dim: int) -> Any:
    """Where the half of an int8 block begins that holds a token, and the token's number in it."""
    return token // INT8_UNIT * 2 * INT8_UNIT * (head_dim + 2), token % INT8_UNIT


@device
def lane_of(g: int, t: int) -> Any:
    """The lane that holds rows ``g`` and columns ``t``."""
    return 4 * g + t


@device
def piece_at(piece: int, lane: int) -> Any:
    """Where a lane's 16 bytes of a piece begin, from the first piece on."""
    return (32 * piece + lane) * 16


@device
def stored_factor(is_times_16: int) -> Any:
    """A stored int4 scale over the scale: a quarter where the kernels get the nibbles times 16, else 4."""
    return float32(0.25) if is_times_16 else float32(4.0)


@device
def nibble_at(block: Any, word: int, nibble: int) -> Any:
    """One of the 8 nibbles of the word that begins at a byte; the lowest is nibble 0."""
    return np.int32(block[word + nibble // 2]) >> 4 * (nibble % 2) & 15


@device
def half_at(block: Any, at: int) -> Any:
    """The float16 that begins at a byte, as float32."""
    return widen(np.int32(block[at]) | np.int32(block[at + 1]) << 8, False)
