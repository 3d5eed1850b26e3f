"""The quantized formats: how far a decoded value may be off, awkward data, and the order of the bytes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtoolkit.errors import ShapeError, UnsupportedError
from kvtoolkit.formats.quantized import BLOCK, FORMATS, INT4, INT8, Format, check_head_dim

BOTH = pytest.mark.parametrize("form", [INT8, INT4], ids=lambda form: form.name)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 128])
HALF = 2.0**-11  # unit roundoff of float16
TINY = 2.0**-24  # the smallest number of float16


def tokens(head_dim: int, *lead: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys with a few large channels, as those of real models have; values without."""
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, *lead, BLOCK, head_dim)).astype(np.float32)
    keys[..., 3] = 20.0 + 4.0 * keys[..., 3]
    keys[..., head_dim // 2] *= 30.0
    return keys, values


def bounds(form: Format, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest error that each element may have: half a step, and what rounding of scales, zeros and points adds."""
    result = []
    for x, axis in ((keys, -2 if form is INT4 else -1), (values, -1)):
        x = x.astype(np.float64)
        low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
        if axis == -1 and form is INT4:  # a value's codes always reach 0
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        if form is INT8:
            largest = np.maximum(-low, high)
            # a scale rounded down leaves the largest value outside the codes by up to 127 roundings of it
            step, edge = largest / 127, largest * HALF + 127 * TINY
        else:
            step = (high - low) / 15
            edge = HALF * np.maximum(np.maximum(abs(low + 8 * step), 8 * step), abs(high)) + 64 * TINY
        result.append(np.broadcast_to(step / 2 * (1 + HALF) + edge, x.shape) + 1e-6 * abs(x))
    return result[0], result[1]


def check_error(form: Format, keys: np.ndarray, values: np.ndarray) -> None:
    decoded = form.decode(form.encode(keys, values), keys.shape[-1])
    for found, wanted, bound in zip(decoded, (keys, values), bounds(form, keys, values), strict=True):
        assert found.dtype == np.float32
        assert found.shape == wanted.shape
        np.testing.assert_array_less(np.abs(found.astype(np.float64) - wanted), bound + 1e-30)


@BOTH
@HEAD_DIMS
def test_an_element_is_off_by_half_a_step_at_most(head_dim: int, form: Format) -> None:
    for seed in range(5):
        check_error(form, *tokens(head_dim, seed=seed))


@BOTH
def test_leading_axes_are_blocks_of_their_own(form: Format) -> None:
    keys, values = tokens(64, 3, 2)
    blocks = form.encode(keys, values)
    assert blocks.shape == (3, 2, form.nbytes(64))
    assert blocks.dtype == np.uint8
    for i in np.ndindex(3, 2):
        assert np.array_equal(blocks[i], form.encode(keys[i], values[i]))
        for whole, alone in zip(form.decode(blocks, 64), form.decode(blocks[i], 64), strict=True):
            assert np.array_equal(whole[i], alone)


@settings(max_examples=100, deadline=None)
@given(
    form=st.sampled_from([INT8, INT4]),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    seed=st.integers(0, 1000),
)
def test_errors_at_every_magnitude(form: Format, size: float, offset: float, seed: int) -> None:
    keys, values = tokens(64, seed=seed)
    check_error(form, keys * np.float32(size) + np.float32(offset), values * np.float32(size) - np.float32(offset))


@BOTH
def test_zeros_stay_zeros(form: Format) -> None:
    nothing = np.zeros((BLOCK, 64), np.float32)
    for part in form.decode(form.encode(nothing, nothing), 64):
        assert (part == 0).all()


def test_a_constant_channel_of_keys_keeps_its_value_in_int4() -> None:
    keys, values = tokens(64)
    keys[:, 5], keys[:, 6], values[9] = 0.75, -1000.0, 3.5
    found_keys, found_values = INT4.decode(INT4.encode(keys, values), 64)
    assert (found_keys[:, 5] == 0.75).all()
    assert (found_keys[:, 6] == -1000.0).all()
    np.testing.assert_allclose(found_values[9], 3.5, rtol=2.0**-11)


@BOTH
def test_a_huge_outlier_stays_finite_and_spoils_only_what_shares_its_scale(form: Format) -> None:
    keys, values = tokens(128)
    keys[10, 7], values[20, 9] = 3e4, -6e4
    check_error(form, keys, values)
    plain_keys, plain_values = tokens(128)
    good_keys, good_values = form.decode(form.encode(plain_keys, plain_values), 128)
    keys[10, 7], values[20, 9] = 1e9, -1e9  # past float16: the nearest that can be said
    found_keys, found_values = form.decode(form.encode(keys, values), 128)
    assert np.isfinite(found_keys).all()
    assert np.isfinite(found_values).all()
    assert found_keys[10, 7] > 6e4
    assert found_values[20, 9] < -6e4
    others = np.ones((BLOCK, 128), bool)
    others[:, 7] = form is INT8
    others[10] &= form is INT4
    assert np.array_equal(found_keys[others], good_keys[others])
    others = np.arange(BLOCK) != 20
    assert np.array_equal(found_values[others], good_values[others])


@BOTH
@HEAD_DIMS
def test_encoding_what_was_decoded_gives_the_same_values(head_dim: int, form: Format) -> None:
    # scales of powers of two and rows that use their first and last code: nothing is lost on the way
    rng = np.random.default_rng(0)
    middle, low, high = (128, 1, 255) if form is INT8 else (8, 0, 15)
    codes = rng.integers(low, high + 1, (2, BLOCK, head_dim))
    for axis_of_one in (codes[0], codes[0].T, codes[1], codes[1].T):
        axis_of_one[:, 0], axis_of_one[:, 1] = low, high
    scale = np.float32(2.0**-3)
    keys, values = ((part - middle).astype(np.float32) * scale for part in codes)
    blocks = form.encode(keys, values)
    decoded = form.decode(blocks, head_dim)
    assert np.array_equal(decoded[0], keys)
    if form is INT8:
        assert np.array_equal(decoded[1], values)
        assert np.array_equal(form.encode(*decoded), blocks)
    else:  # a token whose values have one sign spans other codes: its scale is rounded
        np.testing.assert_allclose(decoded[1], values, atol=2.0**-11)


@BOTH
@HEAD_DIMS
def test_what_was_decoded_keeps_its_codes(head_dim: int, form: Format) -> None:
    blocks = form.encode(*tokens(head_dim))
    again = form.encode(*form.decode(blocks, head_dim))
    found, wanted = (slow_decode(form, block, head_dim)[2:] for block in (again, blocks))
    for after, before in zip(found, wanted, strict=True):
        assert np.array_equal(after, before)


# -- the order of the bytes, read as the docstring of formats says it -------------------------------------------------


def half_at(block: np.ndarray, at: int) -> float:
    return float(block[at : at + 2].view(np.float16)[0])


def slow_decode(form: Format, block: np.ndarray, head_dim: int) -> tuple[Any, ...]:
    """``keys, values, key codes, value codes`` of one block, lane by lane."""
    return (slow_int8 if form is INT8 else slow_int4)(block, head_dim)


def slow_int8(block: np.ndarray, head_dim: int) -> tuple[Any, ...]:
    keys, values, key_codes, value_codes = np.zeros((4, BLOCK, head_dim))
    part = 32 * head_dim + 64
    for half in range(2):
        keys_at, values_at = 2 * half * part, (2 * half + 1) * part
        for i in range(2):
            for chunk in range(head_dim // 32):
                for lane in range(32):
                    g, t = lane // 4, lane % 4
                    piece = ((i * (head_dim // 32) + chunk) * 32 + lane) * 16
                    for n in range(16):
                        h, byte = n // 8, n % 8
                        token = 4 * g + 2 * i + h
                        code = int(block[keys_at + piece + n])
                        place = 32 * half + token, 32 * chunk + 8 * t + byte
                        key_codes[place] = code
                        keys[place] = half_at(block, keys_at + 32 * head_dim + 2 * token) * (code - 128)
                        word, byte = n // 4, n % 4
                        token = 8 * t + 2 * i + (0, 4, 1, 5)[byte]
                        code = int(block[values_at + piece + n])
                        place = 32 * half + token, 32 * chunk + 8 * word + g
                        value_codes[place] = code
                        values[place] = half_at(block, values_at + 32 * head_dim + 2 * token) / 4 * (code - 128)
    return keys, values, key_codes, value_codes


def slow_int4(block: np.ndarray, head_dim: int) -> tuple[Any, ...]:
    keys, values, key_codes, value_codes = np.zeros((4, BLOCK, head_dim))
    packed = 32 * head_dim
    scales_at, zeros_at, values_at = packed, packed + 2 * head_dim, packed + 4 * head_dim
    value_scales_at, value_points_at = values_at + packed, values_at + packed + 2 * BLOCK

    def nibble(at: int, n: int) -> int:
        return int(block[at + n // 2]) >> 4 * (n % 2) & 15

    for b in range(2):
        for i in range(2):
            for jj in range(head_dim // 64):
                for lane in range(32):
                    g, t = lane // 4, lane % 4
                    piece = (((b * 2 + i) * (head_dim // 64) + jj) * 32 + lane) * 16
                    for word in range(4):
                        h, j = word // 2, 2 * jj + word % 2
                        token = 32 * b + 4 * g + 2 * i + h
                        for n in range(8):
                            dim = 32 * j + 8 * t + (2 * n if n < 4 else 2 * (n - 4) + 1)
                            code = nibble(piece + 4 * word, n)
                            stored = half_at(block, scales_at + 2 * dim)
                            scale = stored * 4 if dim % 8 in (2, 3, 6, 7) else stored / 4
                            key_codes[token, dim] = code
                            keys[token, dim] = scale * (code - 8) + half_at(block, zeros_at + 2 * dim)
        for c in range(head_dim // 32):
            for lane in range(32):
                g, t = lane // 4, lane % 4
                piece = values_at + ((b * (head_dim // 32) + c) * 32 + lane) * 16
                for word in range(4):
                    dim = 32 * c + 8 * word + g
                    for n in range(8):
                        token = 32 * b + 8 * t + n
                        code = nibble(piece + 4 * word, n)
                        stored = half_at(block, value_scales_at + 2 * token)
                        scale = stored * 4 if token % 2 else stored / 4
                        value_codes[token, dim] = code
                        point = half_at(block, value_points_at + 2 * token) / (16 if token % 2 else 1)
                        values[token, dim] = scale * (code - point)
    return keys, values, key_codes, value_codes


@BOTH
@HEAD_DIMS
def test_the_bytes_lie_as_the_docstring_says(head_dim: int, form: Format) -> None:
    keys, values = tokens(head_dim)
    block = form.encode(keys, values)
    decoded = form.decode(block, head_dim)
    slow = slow_decode(form, block, head_dim)
    for fast, found in zip(decoded, slow[:2], strict=True):
        np.testing.assert_allclose(fast, found, rtol=1e-6, atol=1e-6)
    for found, wanted, bound in zip(slow[:2], (keys, values), bounds(form, keys, values), strict=True):
        np.testing.assert_array_less(np.abs(found - wanted), bound)


@BOTH
def test_random_bytes_mean_what_the_docstring_says(form: Format) -> None:
    block = np.random.default_rng(1).integers(0, 256, form.nbytes(64)).astype(np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        decoded, slow = form.decode(block, 64), slow_decode(form, block, 64)
    for fast, found in zip(decoded, slow[:2], strict=True):
        np.testing.assert_allclose(fast, found, rtol=1e-5, atol=1e-2)


def test_sizes() -> None:
    assert {name: form.nbytes(128) / BLOCK for name, form in FORMATS.items()} == {"int8": 260, "int4": 140}
    assert {name: form.nbytes(64) / BLOCK for name, form in FORMATS.items()} == {"int8": 132, "int4": 72}
    for head_dim in (32, 80, 96, 256):
        with pytest.raises(UnsupportedError, match=f"head_dim: .*got {head_dim}"):
            check_head_dim(head_dim)
        with pytest.raises(UnsupportedError):
            INT4.nbytes(head_dim)


@BOTH
@pytest.mark.parametrize("shapes", [((60, 64), (60, 64)), ((64, 96), (64, 96)), ((64, 64), (64, 128)), ((64,), (64,))])
def test_blocks_of_another_shape_are_refused(shapes: tuple[tuple[int, ...], ...], form: Format) -> None:
    with pytest.raises(
        ShapeError, match=r"keys, values: expected \[..., 64 tokens, head_dim 64 or 128\], both alike, got"
    ):
        form.encode(*(np.ones(shape) for shape in shapes))


@BOTH
def test_bytes_of_another_format_are_refused(form: Format) -> None:
    blocks = form.encode(np.ones((2, 64, 64)), np.ones((2, 64, 64)))
    for wrong in (blocks[:, 1:], blocks.astype(np.int64), form.encode(np.ones((64, 128)), np.ones((64, 128)))):
        with pytest.raises(ShapeError, match=rf"blocks: expected \[..., {form.nbytes(64)}\] uint8 of {form.name}"):
            form.decode(wrong, 64)
    with pytest.raises(UnsupportedError, match="got 96"):
        form.decode(blocks, 96)


@BOTH
def test_tensors_are_encoded_too(form: Format) -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 64, 64).to(torch.bfloat16)
    assert np.array_equal(form.encode(x, x), form.encode(x.float().numpy(), x.float().numpy()))


# -- the bounds that the docstring gives -----------------------------------------------------------------------------


def filled(value: float) -> np.ndarray:
    """Tokens whose first two dims are ``value`` and whose others are 0."""
    x = np.zeros((BLOCK, 64), np.float32)
    x[:, :2] = value
    return x


@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_are_kept_up_to_the_bound_and_clipped_beyond(sign: int) -> None:
    for form, part, bound in ((INT8, 0, 8.3e6), (INT8, 1, 2.08e6), (INT4, 0, 1.8e5), (INT4, 1, 2.45e5)):
        kept, clipped = (
            form.decode(form.encode(*[filled(factor * sign * bound)] * 2), 64)[part] for factor in (1.0, 10.0)
        )
        np.testing.assert_allclose(kept[:, :2], sign * bound, rtol=1e-2)  # the scale's rounding
        # other int4 tokens and channels go further
        assert 0.99 * bound <= np.abs(clipped[:, :2]).min() <= 1.1 * bound
        assert (clipped[:, 2:] == 0).all()


@pytest.mark.parametrize("middle", [0.0, 6e4, 7e4, 1e5, -7e4, -1.2e5, 1.7e5])
@pytest.mark.parametrize("width", [0.0, 10.0, 5e3])
def test_int4_keys_are_off_by_half_a_step_also_where_the_middle_is_out_of_reach(middle: float, width: float) -> None:
    keys = np.float32(middle) + np.float32(width) * np.random.default_rng(0).random((BLOCK, 64), np.float32)
    found, _ = INT4.decode(INT4.encode(keys, np.zeros_like(keys)), 64)
    step = max(width / 15, (keys.max() - 65504) / 7, (-65504 - keys.min()) / 8, 0.0)
    assert np.abs(found - keys).max() <= 0.51 * step + 2 * HALF * (abs(middle) + width)


@pytest.mark.parametrize("size", [1e-8, 1e-7, 1e-6, 1e-5, 1e-4])
def test_small_numbers_are_off_by_half_a_step_of_the_smallest_scale(size: float) -> None:
    keys, values = np.random.default_rng(0).uniform(-size, size, (2, BLOCK, 64)).astype(np.float32)
    for form, smallest in ((INT8, (1.0, 0.25)), (INT4, (4.0, 4.0))):
        decoded = form.decode(form.encode(keys, values), 64)
        for x, found, factor in zip((keys, values), decoded, smallest, strict=True):
            step = (size / 127 if form is INT8 else 2 * size / 15) + factor * TINY
            zero = 2 * TINY if form is INT4 else 0.0  # of a channel; of a token it is rounded relative to its step
            assert np.abs(x - found).max() <= 0.51 * step + zero + 2 * HALF * size, form.name


@BOTH
@HEAD_DIMS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_no_number_is_nan_and_spoils_no_other(value: float, head_dim: int, form: Format) -> None:
    keys, values = tokens(head_dim)
    good = keys.copy(), values.copy()
    keys[7, 3], values[40, 9] = value, value
    decoded = form.decode(form.encode(keys, values), head_dim)
    others = np.arange(BLOCK)[:, None] != [7, 40]
    for part, was, bound in zip(decoded, good, bounds(form, *good), strict=True):
        np.testing.assert_array_less(np.abs(part - was)[others.all(1)], bound[others.all(1)])
    assert np.isnan(decoded[1][40]).all()
    if form is INT8:
        assert np.isnan(decoded[0][7]).all()
        assert np.isfinite(decoded[1][7]).all()
    else:  # keys share their scales: the value says it
        assert np.isfinite(decoded[0]).all()
        assert np.isnan(decoded[1][7]).all()
    keys[:], values[:] = value, value
    assert np.isnan(form.decode(form.encode(keys, values), head_dim)[1]).all()
