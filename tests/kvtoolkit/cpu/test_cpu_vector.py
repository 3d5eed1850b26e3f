"""The vector operations lane by lane, against NumPy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kvtoolkit.arrays.types import BFLOAT16, FLOAT16, FLOAT32
from kvtoolkit.cpu import vector


def _over(operation: Callable[[Any], Any], values: np.ndarray) -> np.ndarray:
    """``operation`` on every vector of float32 ``values``."""

    @njit
    def run(source: int, target: int, count: int) -> None:
        for i in range(0, 4 * count, 64):
            vector.store_f32(target + i, operation(vector.load_f32(source + i)))

    padded = np.zeros(-(-len(values) // 16) * 16, np.float32)
    padded[: len(values)] = values
    result = np.empty_like(padded)
    run(padded.ctypes.data, result.ctypes.data, len(padded))
    return result[: len(values)]


def _ulps(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(found - exact) / np.spacing(np.abs(exact).astype(np.float32))))


def test_exp_is_good_to_two_ulps_and_exact_at_the_ends() -> None:
    values = np.concatenate([np.linspace(-87.3, 0, 200_000), np.linspace(0, 88, 20_000)]).astype(np.float32)
    assert _ulps(_over(vector.exp, values), np.exp(values.astype(np.float64))) <= 2
    ends = _over(vector.exp, np.array([0.0, -0.0, -np.inf, -88.0, -1e30, np.nan], np.float32))
    assert ends[:5].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert math.isnan(ends[5])


def test_tanh_is_good_to_three_ulps() -> None:
    values = np.concatenate([np.linspace(-12, 12, 100_001), np.logspace(-20, 1, 999)]).astype(np.float32)
    assert _ulps(_over(vector.tanh, values), np.tanh(values.astype(np.float64))) <= 3
    assert _over(vector.tanh, np.array([np.inf, -np.inf, 1e30], np.float32)).tolist() == [1.0, -1.0, 1.0]
    assert np.isnan(_over(vector.tanh, np.array([np.nan], np.float32))).all()


def _convert(load: Any, store: Any, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    @njit
    def run(source: int, target: int, count: int, step_in: int, step_out: int) -> None:
        for i in range(0, count, 16):
            store(target + step_out * i, load(source + step_in * i))

    run(source.ctypes.data, target.ctypes.data, len(source), source.itemsize, target.itemsize)
    return target


def _bit_version(dtype: int, narrow: bool) -> Any:
    """The conversion by integer arithmetic that machines without half instructions use."""

    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words = builder.load(vector.pointer_to(builder, args[0], ir.VectorType(ir.IntType(16), 16)), align=2)
            return vector._widen_half_bits(builder, builder.zext(words, ir.VectorType(ir.IntType(32), 16)))

        return vector.float32x16(types.int64), codegen

    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words = vector._narrow_half_bits(builder, args[1])
            words = builder.trunc(words, ir.VectorType(ir.IntType(16), 16))
            builder.store(words, vector.pointer_to(builder, args[0], words.type), align=2)
            return context.get_dummy_value()

        return types.none(types.int64, vector.float32x16), codegen

    return store if narrow else load


ALL_WORDS = np.arange(65536, dtype=np.uint16)


@pytest.mark.parametrize("load", [vector.load_f16, _bit_version(FLOAT16, narrow=False)], ids=["hardware", "bits"])
def test_every_half_widens_exactly(load: Any) -> None:
    found = _convert(load, vector.store_f32, ALL_WORDS, np.empty(65536, np.float32))
    assert np.array_equal(found, ALL_WORDS.view(np.float16).astype(np.float32), equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(ALL_WORDS.view(np.float16)))


def test_every_bfloat16_widens_exactly() -> None:
    found = _convert(vector.load_bf16, vector.store_f32, ALL_WORDS, np.empty(65536, np.float32))
    assert np.array_equal(found.view(np.uint32) >> 16, ALL_WORDS)


def _awkward_floats() -> np.ndarray:
    """Halves, their neighbours half way between, a little beyond, and the specials, in both signs."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (halves[1:] + halves[:-1]) / 2
    near = np.concatenate([halves, middles, middles * (1 + 1e-6), middles * (1 - 1e-6)])
    values = np.concatenate([near, [65519.0, 65520.0, 1e6, 1e38, np.inf, 1e-30]]).astype(np.float32)
    values = np.concatenate([values, -values, [np.float32(np.nan)]])
    return np.concatenate([values, np.zeros(-len(values) % 16, np.float32)])


@pytest.mark.parametrize("store", [vector.store_f16, _bit_version(FLOAT16, narrow=True)], ids=["hardware", "bits"])
def test_floats_round_to_the_nearest_even_half(store: Any) -> None:
    values = _awkward_floats()
    found = _convert(vector.load_f32, store, values, np.empty(len(values), np.uint16)).view(np.float16)
    with np.errstate(over="ignore"):
        assert np.array_equal(found, values.astype(np.float16), equal_nan=True)


def test_floats_round_to_the_nearest_even_bfloat16() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 160_000, dtype=np.uint64).astype(np.uint32)
    bits[:64] = (np.arange(64, dtype=np.uint32) << 15) + 0x3F800000  # half way between neighbours
    bits[64:68] = [0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x7F800000]  # overflow, two NaNs, infinity
    values = bits.view(np.float32)
    found = _convert(vector.load_f32, vector.store_bf16, values, np.empty(len(values), np.uint16))
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    numbers = ~np.isnan(values)
    assert np.array_equal(found[numbers], wanted[numbers])
    assert np.isnan((found[~numbers].astype(np.uint32) << 16).view(np.float32)).all()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_eight_elements_are_loaded_and_stored_and_no_more(dtype: int) -> None:
    load8 = (vector.load8_f32, vector.load8_f16, vector.load8_bf16)[dtype]
    store8 = (vector.store8_f32, vector.store8_f16, vector.store8_bf16)[dtype]
    kind = (np.float32, np.float16, np.uint16)[dtype]
    source = (np.arange(16) + 1).astype(kind) if dtype != BFLOAT16 else ALL_WORDS[0x3F80:0x3F90].copy()
    target = np.full(16, 7, kind)

    @njit
    def run(source: int, target: int, wide: int) -> None:
        loaded = load8(source)
        store8(target, loaded)
        vector.store_f32(wide, loaded)

    wide = np.full(16, 5, np.float32)
    run(source.ctypes.data, target.ctypes.data, wide.ctypes.data)
    assert np.array_equal(target[:8], source[:8])
    assert (target[8:] == 7).all()
    assert (wide[8:] == 0).all()
