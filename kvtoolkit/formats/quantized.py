"""The quantized formats of a tier: 64 consecutive tokens of one kv head as one run of bytes, and back. The judge.

| format | keys | values | bytes a token and kv head at head_dim 128 (16 bit: 512) |
|---|---|---|---|
| ``int8`` | symmetric, a scale for each token | a scale for each token | 260 |
| ``int4`` | a scale and a zero for each channel over the 64 tokens | a scale and a point for each token | 140 |

A number is ``scale * (code - 128)`` of int8; of int4 a key is ``scale * (code - 8) + zero``, a value
``scale * (code - point)``. A key's zero is in the middle of the codes, which halves what the rounding of a scaled
query costs; a value's point, between 0 and 15, lets the rounding of a weight times a scale act on the value itself, not
on the distance to a zero far from it. Scales, zeros and points are float16; codes are chosen for them as stored.

Bytes are in the order in which a warp's lanes want them for m16n8k16 products (lane = 4 * g + t, g in 0..7, t in
0..3), so that a lane's next 16 bytes are a piece, and pieces follow one another, 32 lanes each:

    int8, twice (32 tokens each):  key codes | key scales [32] | value codes | value scales [32]
        keys     piece (i, j): token 4g + 2i + h, dims 32j + 8t ..+7; bytes h, dim
        values   piece (i, c): dim 32c + 8j + g in word j; bytes tokens 8t + 2i + (0, 4, 1, 5)
    int4:  key codes | key scales [D] | key zeros [D] | value codes | value scales [64] | value points [64]
        keys     piece (b, i, jj): token 32b + 4g + 2i + h; words h, j = 2jj, 2jj + 1: dims 32j + 8t ..+7, of which
                 nibble p is dim 2p, nibble p + 4 dim 2p + 1
        values   piece (b, c): dim 32c + 8j + g in word j; nibble n is token 32b + 8t + n

Numbers that float16 scales cannot express are clipped: int8 keys beyond 8.3e6, int8 values beyond 2.08e6, int4 keys
beyond 1.8e5 or whose channel spans more than 2.45e5, int4 values whose token spans more than 2.45e5. The middle of an
int4 channel is at most 65504; beyond it the step grows so that the channel's last codes still reach. Scales below
float16's normal range are rounded up, so that nothing is clipped: steps are multiples of 2^-24 (int8 keys), 2^-26 (int8
values), 2^-26 or 2^-22 (int4).

Attention on a GPU multiplies in float16, and gives infinities or NaN where a product exceeds 65504: int8 values beyond
3.2e4 and int4 values whose token spans more than 3.8e3 (a weight of up to 64 times the scale as stored), int4 keys
where |q| times the channel's step exceeds 1.6e4 (so |q| times its range 2.4e5), and any bfloat16 query beyond 65504.
Attention on the CPU has no such bounds.

A token that holds an infinity or NaN becomes NaN, and no other token changes. Its scale is NaN; int4 keys share their
scales, so that there the value's scale is NaN for either, and the key counts for nothing.

In registers every second pair of nibbles comes out times 16 (dims 2, 3, 6, 7 of 8 for keys, odd tokens for values).
Scales are stored so that this needs no instruction: divided by 4 there, times 4 elsewhere, and points times 16 there.
The scales of int8 values are stored times 4 as well.

Source: scales per channel for keys and per token for values, Liu et al. 2024 (KIVI, arXiv:2402.02750), sec. 3; zeros
in the middle, points and the bytes' order are our own.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.host import as_numpy_view, is_torch, tensor_operand
from kvtoolkit.errors import ShapeError, UnsupportedError

HEAD_DIMS = (64, 128)
BLOCK = 64
"""Tokens that are quantized together."""
INT8_UNIT = 32
"""Tokens of one of the two halves of an int8 block."""

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_LARGEST = np.float32(65504.0)  # float16
_SMALLEST_NORMAL = np.float32(2.0**-14)
_NAN = np.float16(np.nan)
_INT8_VALUE_FACTOR = np.float32(4.0)


class Format(NamedTuple):
    """A quantized format."""

    name: str
    bits: int

    def nbytes(self, head_dim: int) -> int:
        """Bytes of a block of 64 tokens of one kv head, keys and values."""
        check_head_dim(head_dim)
        if self.bits == 8:
            return 2 * BLOCK * (head_dim + 2)
        return BLOCK * head_dim + 4 * head_dim + 4 * BLOCK

    def encode(self, keys: Any, values: Any) -> Bytes:
        """Quantize blocks of 64 tokens.

        Args:
            keys: ``[..., 64, head_dim]`` float16, float32 or float64, NumPy arrays or CPU tensors, of a tensor also
                bfloat16; head_dim 64 or 128. The module's docstring says how large numbers may be.
            values: as ``keys``.

        Returns:
            ``[..., nbytes]`` uint8.

        Raises:
            ShapeError: a shape is not as above.
        """
        keys, values = _as_float32(keys, "keys"), _as_float32(values, "values")
        if keys.ndim < 2 or keys.shape[-2] != BLOCK or keys.shape[-1] not in HEAD_DIMS or keys.shape != values.shape:
            raise ShapeError(
                f"keys, values: expected [..., {BLOCK} tokens, head_dim 64 or 128], both alike, got {keys.shape} and "
                f"{values.shape}"
            )
        with np.errstate(all="ignore"):  # whatever the caller does about rounding to float16, it is meant here
            blocks: Bytes = (_encode_int8 if self.bits == 8 else _encode_int4)(keys, values)
        return blocks

    def decode(self, blocks: Bytes, head_dim: int) -> tuple[Floats, Floats]:
        """The keys and values, ``[..., 64, head_dim]`` float32 each, of ``[..., nbytes]`` uint8 of the CPU.

        Raises:
            ShapeError: ``blocks`` is of another dtype, or not of this format at this head_dim.
            UnsupportedError: head_dim is neither 64 nor 128.
        """
        nbytes = self.nbytes(head_dim)
        try:
            blocks = as_numpy_view(blocks, "blocks") if is_torch(blocks) else np.asarray(blocks)
        except ValueError as error:
            raise ShapeError(f"blocks: expected an array of uint8, got none: {error}") from error
        if blocks.dtype != np.uint8 or blocks.ndim < 1 or blocks.shape[-1] != nbytes:
            raise ShapeError(
                f"blocks: expected [..., {nbytes}] uint8 of {self.name} at head_dim {head_dim}, got {blocks.shape} "
                f"{blocks.dtype}"
            )
        if not blocks.size:
            nothing = np.zeros((*blocks.shape[:-1], BLOCK, head_dim), np.float32)
            return nothing, nothing.copy()
        with np.errstate(all="ignore"):
            return (_decode_int8 if self.bits == 8 else _decode_int4)(blocks, head_dim)


INT8, INT4 = Format("int8", 8), Format("int4", 4)
FORMATS = {"int8": INT8, "int4": INT4}


def check_head_dim(head_dim: int) -> None:
    """UnsupportedError unless there are quantized formats for it."""
    if not isinstance(head_dim, (int, np.integer)) or head_dim not in HEAD_DIMS:
        raise UnsupportedError(f"head_dim: quantized tiers expect 64 or 128, got {head_dim!r}")


def _as_float32(x: Any, name: str) -> Floats:
    """An array of numbers; of a tensor, which may have a dtype that NumPy lacks, by its own conversion."""
    if is_torch(x):
        tensor_operand(x, name, False)
        x = x.detach()
    try:
        return np.asarray(x.float() if hasattr(x, "float") else x, np.float32)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{name}: expected an array of numbers, got {type(x).__name__}: {error}") from error


def _as_half(values: Floats) -> NDArray[np.float16]:
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float16)


def _as_scale(values: Floats) -> NDArray[np.float16]:
    """Scales as they are stored; below the normal range rounded up, for rounded down they would clip."""
    nearest = _as_half(values)
    is_low = (values < _SMALLEST_NORMAL) & (nearest < values)
    rounded: NDArray[np.float16] = np.where(is_low, np.nextafter(nearest, np.float16(np.inf)), nearest)
    return rounded


def _without_nonfinite(x: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """``x`` with zeros for every token that has an infinity or NaN, and ``[..., 64, 1]`` which those are."""
    bad = np.asarray(~np.isfinite(x).all(axis=-1, keepdims=True))
    return np.where(bad, np.float32(0), x) if bad.any() else x, bad


def _code(x: Floats, scale: Floats, zero: Floats | np.float32, middle: int, low: int, high: int) -> Bytes:
    """Codes of values; where the scale is 0 the middle one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(scale > 0, np.rint((x - zero) / scale), np.float32(0))
    codes: Bytes = np.clip(steps + middle, low, high).astype(np.uint8)
    return codes


# -- int8 --------------------------------------------------------------------------------------------------------------

# axes of codes as they come, and as they are stored; (token axes), (dim axes)
_INT8_KEYS = ("gih", "jtb", "ijgthb", {"g": 8, "i": 2, "h": 2, "t": 4, "b": 8})
_INT8_VALUES = ("tqir", "cjg", "icgtjrq", {"t": 4, "q": 2, "i": 2, "r": 2, "j": 4, "g": 8})
_INT4_KEYS = ("bgih", "Jjtpe", "biJgthjep", {"b": 2, "g": 8, "i": 2, "h": 2, "j": 2, "t": 4, "p": 4, "e": 2})
_INT4_VALUES = ("btn", "cjg", "bcgtjn", {"b": 2, "t": 4, "n": 8, "j": 4, "g": 8})

_Order = tuple[str, str, str, dict[str, int]]


def _arrange(codes: Bytes, order: _Order) -> Bytes:
    """``[..., tokens, head_dim]`` codes in the order they are stored in, ``[..., tokens * head_dim]``."""
    tokens, dims, stored, sizes = order
    lead = codes.shape[:-2]
    axes = tokens + dims
    split = codes.reshape(*lead, *_sizes(tokens, codes.shape[-2], sizes), *_sizes(dims, codes.shape[-1], sizes))
    moved = split.transpose(*range(len(lead)), *(len(lead) + axes.index(axis) for axis in stored))
    return np.ascontiguousarray(moved).reshape(*lead, -1)


def _restore(codes: Bytes, order: _Order, num_tokens: int, head_dim: int) -> Bytes:
    """The inverse of `_arrange`."""
    tokens, dims, stored, sizes = order
    lead = codes.shape[:-1]
    axes = tokens + dims
    known = dict(zip(axes, _sizes(tokens, num_tokens, sizes) + _sizes(dims, head_dim, sizes), strict=True))
    split = codes.reshape(*lead, *(known[axis] for axis in stored))
    moved = split.transpose(*range(len(lead)), *(len(lead) + stored.index(axis) for axis in axes))
    return np.ascontiguousarray(moved).reshape(*lead, num_tokens, head_dim)


def _sizes(axes: str, total: int, sizes: dict[str, int]) -> tuple[int, ...]:
    known = int(np.prod([sizes[axis] for axis in axes if axis in sizes]))
    return tuple(sizes.get(axis, total // known) for axis in axes)


def _encode_int8(keys: Floats, values: Floats) -> Bytes:
    keys, bad_keys = _without_nonfinite(keys)
    values, bad_values = _without_nonfinite(values)
    parts = []
    for half in range(2):
        tokens = slice(half * INT8_UNIT, (half + 1) * INT8_UNIT)
        for x, bad, factor, order in (
            (keys, bad_keys, np.float32(1), _INT8_KEYS),
            (values, bad_values, _INT8_VALUE_FACTOR, _INT8_VALUES),
        ):
            x, bad = x[..., tokens, :], bad[..., tokens, :]
            largest = np.abs(x).max(axis=-1, keepdims=True)
            stored = _as_scale(largest / np.float32(127) * factor)
            codes = _code(x, stored.astype(np.float32) / factor, np.float32(0), 128, 1, 255)
            parts += [_arrange(codes, order), _raw(np.where(bad, _NAN, stored)[..., 0])]
    return np.concatenate(parts, axis=-1)


def _decode_int8(blocks: Bytes, head_dim: int) -> tuple[Floats, Floats]:
    unit = INT8_UNIT * head_dim
    halves: tuple[list[Floats], list[Floats]] = ([], [])
    at = 0
    for _ in range(2):
        for out, factor, order in ((halves[0], np.float32(1), _INT8_KEYS), (halves[1], np.float32(4), _INT8_VALUES)):
            codes = _restore(blocks[..., at : at + unit], order, INT8_UNIT, head_dim).astype(np.float32)
            stored = _halves(blocks[..., at + unit : at + unit + 2 * INT8_UNIT])
            out.append((stored / factor)[..., None] * (codes - np.float32(128)))
            at += unit + 2 * INT8_UNIT
    return np.concatenate(halves[0], axis=-2), np.concatenate(halves[1], axis=-2)


# -- int4 --------------------------------------------------------------------------------------------------------------


def _factors(count: int, period: int) -> Floats:
    """4 for the first half of every ``period`` numbers, a quarter for the second."""
    first = np.arange(count) % period < period // 2
    return np.where(first, np.float32(4), np.float32(0.25)).astype(np.float32)


def _encode_int4(keys: Floats, values: Floats) -> Bytes:
    fifteen, eight = np.float32(15), np.float32(8)
    keys, bad_keys = _without_nonfinite(keys)
    values, bad = _without_nonfinite(values)
    bad = bad | bad_keys
    # a key's channel: the range of its 64 tokens, the zero in its middle
    factors = _factors(keys.shape[-1], 4)
    low, high = _range_of_channels(keys, bad_keys)
    # a zero of more than a float16 is clipped, and the step such that the codes around it reach both ends
    reach = np.maximum((high - _LARGEST) / np.float32(7), (-_LARGEST - low) / eight)
    key_scales = _as_scale(np.maximum((high - low) / fifteen, reach) * factors)
    scale = key_scales.astype(np.float32) / factors
    key_zeros = _as_half(low + eight * scale)
    key_codes = _code(keys, scale, key_zeros.astype(np.float32), 8, 0, 15)
    # a value's token: the range of its dims and 0
    factors, zero = _factors(BLOCK, 2)[:, None], np.float32(0)
    low = np.minimum(values.min(axis=-1, keepdims=True), zero)
    high = np.maximum(values.max(axis=-1, keepdims=True), zero)
    value_scales = _as_scale((high - low) / fifteen * factors)
    scale = value_scales.astype(np.float32) / factors
    with np.errstate(divide="ignore", invalid="ignore"):
        # at most 15, also where the scale is clipped, so that 0 keeps a code
        points: Floats = np.where(scale > 0, np.minimum(-low / scale, fifteen), zero).astype(np.float32)
        value_points = _as_half(points / factors * np.float32(4))
        point = value_points.astype(np.float32) * factors / np.float32(4)
        steps = np.where(scale > 0, np.rint(values / scale + point), zero)
    value_codes = np.clip(steps, 0, 15).astype(np.uint8)
    return np.concatenate(
        [
            _pack(_arrange(key_codes, _INT4_KEYS)), _raw(key_scales[..., 0, :]), _raw(key_zeros[..., 0, :]),
            _pack(_arrange(value_codes, _INT4_VALUES)), _raw(np.where(bad, _NAN, value_scales)[..., 0]),
            _raw(value_points[..., 0]),
        ],
        axis=-1,
    )  # fmt: skip


def _range_of_channels(keys: Floats, bad: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Lowest and highest key of each channel, without the tokens that are not finite; 0 where there are no others."""
    if not bad.any():
        return keys.min(axis=-2, keepdims=True), keys.max(axis=-2, keepdims=True)
    infinity, zero = np.float32(np.inf), np.float32(0)
    low = np.where(bad, infinity, keys).min(axis=-2, keepdims=True)
    high = np.where(bad, -infinity, keys).max(axis=-2, keepdims=True)
    is_any = low <= high
    return np.where(is_any, low, zero), np.where(is_any, high, zero)


def _decode_int4(blocks: Bytes, head_dim: int) -> tuple[Floats, Floats]:
    half = BLOCK * head_dim // 2
    values_at = half + 4 * head_dim
    key_codes = _restore(_unpack(blocks[..., :half]), _INT4_KEYS, BLOCK, head_dim)
    value_codes = _restore(_unpack(blocks[..., values_at : values_at + half]), _INT4_VALUES, BLOCK, head_dim)
    key_scales = _halves(blocks[..., half : half + 2 * head_dim]) / _factors(head_dim, 4)
    key_zeros = _halves(blocks[..., half + 2 * head_dim : values_at])
    tail = values_at + half
    value_scales = _halves(blocks[..., tail : tail + 2 * BLOCK]) / _factors(BLOCK, 2)
    value_points = _halves(blocks[..., tail + 2 * BLOCK :]) * _factors(BLOCK, 2) / np.float32(4)
    eight = np.float32(8)
    keys = key_scales[..., None, :] * (key_codes - eight) + key_zeros[..., None, :]
    values = value_scales[..., None] * (value_codes - value_points[..., None])
    return keys, values


# -- bytes -------------------------------------------------------------------------------------------------------------


def _raw(halves: NDArray[np.float16]) -> Bytes:
    return np.ascontiguousarray(halves).view(np.uint8)


def _halves(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _pack(nibbles: Bytes) -> Bytes:
    packed: Bytes = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4).astype(np.uint8)
    return packed


def _unpack(packed: Bytes) -> Bytes:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
