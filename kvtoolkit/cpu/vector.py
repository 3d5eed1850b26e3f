"""Sixteen float32 lanes as one value in compiled code: loads that widen, arithmetic, exp, stores that round.

Numba vectorises some scalar loops and misses others, and cannot index float16 or bfloat16 at all. Here the vectors are
written out, as LLVM's ``<16 x float>``: one AVX-512 register, two of AVX2, four of NEON. Addresses are integers and
nothing is bounds-checked: the callers in this package have checked. ``dtype`` is one of the codes `FLOAT32`,
`FLOAT16`, `BFLOAT16`; memory needs no alignment.
"""

import math
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import models, register_model

from allocators._bits import intrinsic
from allocators._jit import jit
from kvtoolkit.arrays.types import BFLOAT16, FLOAT16, FLOAT32

LANES = 16
ITEMSIZE = (4, 2, 2)

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_VEC = ir.VectorType(_F32, LANES)
_VEC_I16 = ir.VectorType(_I16, LANES)
_VEC_I32 = ir.VectorType(_I32, LANES)


def _host_has(feature: str) -> bool:
    chosen = config.CPU_FEATURES  # NUMBA_CPU_FEATURES; None means those of the host
    if chosen is not None:
        return f"+{feature}" in chosen
    if config.CPU_NAME == "generic":
        return False
    return bool(llvm.get_host_cpu_features().get(feature, False))


_X86 = llvm.get_process_triple().startswith(("x86_64", "i686"))
HAS_HALF = _host_has("f16c") or not _X86
"""LLVM converts halves in hardware; elsewhere it would call a helper function that Numba does not link."""
HAS_WIDE = _host_has("avx512f")
"""32 registers hold a vector each, so a kernel may keep 24 vectors of sums."""


class Float32x16Type(types.Type):  # type: ignore[misc]
    """The Numba type of a vector."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


float32x16 = Float32x16Type()


@register_model(Float32x16Type)
class _Float32x16Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VEC)


# -- building blocks: Python functions that emit LLVM -------------------------------------------------------------


def splat_of(builder: Any, scalar: Any) -> Any:
    """The vector whose lanes all hold ``scalar``."""
    single = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(single, single, ir.Constant(_VEC_I32, [0] * LANES))


def constant(value: float) -> Any:
    return ir.Constant(_VEC, [value] * LANES)


def _int_constant(vector_type: Any, value: int) -> Any:
    return ir.Constant(vector_type, [value] * LANES)


def pointer_to(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(element))


def call_vector(builder: Any, name: str, *operands: Any) -> Any:
    """Call an LLVM intrinsic such as ``llvm.fabs`` on whole vectors."""
    function_type = ir.FunctionType(_VEC, [operand.type for operand in operands])
    function = builder.module.globals.get(f"{name}.v16f32")
    if function is None:
        function = ir.Function(builder.module, function_type, name=f"{name}.v16f32")
    return builder.call(function, operands)


def fma_of(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``: fused where the machine can, which `llvm.fma` would emulate elsewhere."""
    return call_vector(builder, "llvm.fmuladd", a, b, c)


def load_of(builder: Any, dtype: int, address: Any, lanes: int = LANES) -> Any:
    """Load ``lanes`` (16 or 8) elements of ``dtype``, widened to float32; the lanes above are zero."""
    element = _F32 if dtype == FLOAT32 else _I16
    narrow = ir.VectorType(element, lanes)
    loaded = builder.load(pointer_to(builder, address, narrow), align=ITEMSIZE[dtype])
    if lanes < LANES:
        zero = ir.Constant(narrow, [0] * lanes)
        loaded = builder.shuffle_vector(loaded, zero, ir.Constant(_VEC_I32, list(range(LANES))))
    if dtype == FLOAT32:
        return loaded
    if dtype == BFLOAT16:
        bits = builder.shl(builder.zext(loaded, _VEC_I32), _int_constant(_VEC_I32, 16))
        return builder.bitcast(bits, _VEC)
    if HAS_HALF:
        return builder.fpext(builder.bitcast(loaded, ir.VectorType(ir.HalfType(), LANES)), _VEC)
    return _widen_half_bits(builder, builder.zext(loaded, _VEC_I32))


def _widen_half_bits(builder: Any, half: Any) -> Any:
    # the exponent is rebased by a multiplication, which also normalises subnormals; infinity and NaN stay such
    magnitude = builder.shl(builder.and_(half, _int_constant(_VEC_I32, 0x7FFF)), _int_constant(_VEC_I32, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, _VEC), constant(2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, _int_constant(_VEC_I32, 0x7C00 << 13))
    bits = builder.bitcast(scaled, _VEC_I32)
    bits = builder.select(special, builder.or_(magnitude, _int_constant(_VEC_I32, 0x7F800000)), bits)
    sign = builder.shl(builder.and_(half, _int_constant(_VEC_I32, 0x8000)), _int_constant(_VEC_I32, 16))
    return builder.bitcast(builder.or_(bits, sign), _VEC)


def _narrow_bfloat_bits(builder: Any, vector: Any) -> Any:
    bits = builder.bitcast(vector, _VEC_I32)
    odd = builder.and_(builder.lshr(bits, _int_constant(_VEC_I32, 16)), _int_constant(_VEC_I32, 1))
    rounded = builder.add(bits, builder.add(odd, _int_constant(_VEC_I32, 0x7FFF)))  # half way goes to even
    quiet = builder.or_(bits, _int_constant(_VEC_I32, 0x400000))  # rounding a NaN could carry it to infinity
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    return builder.lshr(builder.select(is_nan, quiet, rounded), _int_constant(_VEC_I32, 16))


def _narrow_half_bits(builder: Any, vector: Any) -> Any:
    """Round as the hardware does: to nearest even, also among the subnormals (F. Giesen, float_to_half_fast3_rtne)."""
    bits = builder.bitcast(vector, _VEC_I32)
    sign = builder.and_(bits, _int_constant(_VEC_I32, 0x80000000))
    magnitude = builder.xor(bits, sign)
    odd = builder.and_(builder.lshr(magnitude, _int_constant(_VEC_I32, 13)), _int_constant(_VEC_I32, 1))
    rebased = builder.sub(magnitude, _int_constant(_VEC_I32, 112 << 23))
    normal = builder.add(rebased, builder.add(odd, _int_constant(_VEC_I32, 0xFFF)))
    normal = builder.lshr(normal, _int_constant(_VEC_I32, 13))
    # adding 0.5 lets the float adder shift a small number to the half's subnormal grid and round it there
    shifted = builder.fadd(builder.bitcast(magnitude, _VEC), constant(0.5))
    subnormal = builder.sub(builder.bitcast(shifted, _VEC_I32), _int_constant(_VEC_I32, 126 << 23))
    result = builder.select(
        builder.icmp_unsigned("<", magnitude, _int_constant(_VEC_I32, 113 << 23)), subnormal, normal
    )
    too_large = builder.icmp_unsigned(">=", magnitude, _int_constant(_VEC_I32, (127 + 16) << 23))
    is_nan = builder.icmp_unsigned(">", magnitude, _int_constant(_VEC_I32, 0x7F800000))
    result = builder.select(too_large, _int_constant(_VEC_I32, 0x7C00), result)
    result = builder.select(is_nan, _int_constant(_VEC_I32, 0x7E00), result)
    return builder.or_(result, builder.lshr(sign, _int_constant(_VEC_I32, 16)))


def store_of(builder: Any, dtype: int, address: Any, vector: Any, lanes: int = LANES) -> None:
    """Store the first ``lanes`` (16 or 8) lanes as ``dtype``, rounded to nearest even; a NaN stays one."""
    if dtype == FLOAT32:
        narrow, align = vector, 4
    elif dtype == FLOAT16 and HAS_HALF:
        narrow, align = builder.bitcast(builder.fptrunc(vector, ir.VectorType(ir.HalfType(), LANES)), _VEC_I16), 2
    else:
        bits = _narrow_half_bits if dtype == FLOAT16 else _narrow_bfloat_bits
        narrow, align = builder.trunc(bits(builder, vector), _VEC_I16), 2
    if lanes < LANES:
        mask = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
        narrow = builder.shuffle_vector(narrow, narrow, mask)
    builder.store(narrow, pointer_to(builder, address, narrow.type), align=align)


def fold(builder: Any, vector: Any, combine: Any) -> Any:
    """Combine the lanes of ``vector`` to one scalar, in a fixed tree: halves, quarters, pairs."""
    width = LANES
    while width > 1:
        width //= 2
        upper = ir.Constant(_VEC_I32, [(lane + width) % LANES for lane in range(LANES)])
        vector = combine(vector, builder.shuffle_vector(vector, vector, upper))
    return builder.extract_element(vector, _I32(0))


def larger_of(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


# -- what compiled code calls ---------------------------------------------------------------------------------------


def _loader(dtype: int, lanes: int) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return load_of(builder, dtype, args[0], lanes)

        return float32x16(types.int64), codegen

    return load


def _storer(dtype: int, lanes: int) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            store_of(builder, dtype, args[0], args[1], lanes)
            return context.get_dummy_value()

        return types.none(types.int64, float32x16), codegen

    return store


load_f32, load_f16, load_bf16 = (_loader(dtype, LANES) for dtype in range(3))
load8_f32, load8_f16, load8_bf16 = (_loader(dtype, 8) for dtype in range(3))
store_f32, store_f16, store_bf16 = (_storer(dtype, LANES) for dtype in range(3))
store8_f32, store8_f16, store8_bf16 = (_storer(dtype, 8) for dtype in range(3))


@jit
def load(dtype: int, address: int) -> Any:
    """Sixteen elements of ``dtype`` at ``address``, widened."""
    if dtype == FLOAT32:
        return load_f32(address)
    if dtype == FLOAT16:
        return load_f16(address)
    return load_bf16(address)


@jit
def load8(dtype: int, address: int) -> Any:
    """Eight elements of ``dtype`` at ``address``, widened; the upper lanes are zero."""
    if dtype == FLOAT32:
        return load8_f32(address)
    if dtype == FLOAT16:
        return load8_f16(address)
    return load8_bf16(address)


@jit
def store(dtype: int, address: int, vector: Any) -> None:
    """Sixteen lanes to ``address``, rounded to ``dtype``."""
    if dtype == FLOAT32:
        store_f32(address, vector)
    elif dtype == FLOAT16:
        store_f16(address, vector)
    else:
        store_bf16(address, vector)


@jit
def store8(dtype: int, address: int, vector: Any) -> None:
    """The first eight lanes to ``address``, rounded to ``dtype``."""
    if dtype == FLOAT32:
        store8_f32(address, vector)
    elif dtype == FLOAT16:
        store8_f16(address, vector)
    else:
        store8_bf16(address, vector)


def _binary(emit: Any) -> Any:
    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0], args[1])

        return float32x16(float32x16, float32x16), codegen

    return operation


add = _binary(lambda builder, a, b: builder.fadd(a, b))
subtract = _binary(lambda builder, a, b: builder.fsub(a, b))
multiply = _binary(lambda builder, a, b: builder.fmul(a, b))
divide = _binary(lambda builder, a, b: builder.fdiv(a, b))
maximum = _binary(larger_of)
"""The larger of each lane; ``b`` where either is NaN."""


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """All lanes hold ``value``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splat_of(builder, args[0])

    return float32x16(types.float32), codegen


@intrinsic
def multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return fma_of(builder, *args)

    return float32x16(float32x16, float32x16, float32x16), codegen


@intrinsic
def largest(typingctx: Any, vector: Any) -> Any:
    """The largest lane, as a scalar."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return fold(builder, args[0], lambda a, b: larger_of(builder, a, b))

    return types.float32(float32x16), codegen


@intrinsic
def total(typingctx: Any, vector: Any) -> Any:
    """The sum of the lanes, always in the same order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return fold(builder, args[0], builder.fadd)

    return types.float32(float32x16), codegen


@intrinsic
def any_above(typingctx: Any, vector: Any, bound: Any) -> Any:
    """Whether any lane is larger than ``bound``: much cheaper than `largest`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        above = builder.fcmp_ordered(">", args[0], splat_of(builder, args[1]))
        return builder.icmp_unsigned("!=", builder.bitcast(above, _I16), _I16(0))

    return types.boolean(float32x16, types.float32), codegen


def _emit_iota(builder: Any) -> Any:
    return ir.Constant(_VEC_I32, list(range(LANES)))


@intrinsic
def keep_lanes(typingctx: Any, vector: Any, first: Any, last: Any) -> Any:
    """Lanes ``first`` to ``last``, both included, of ``vector``; -inf in the others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane = _emit_iota(builder)
        first32, last32 = (splat_of(builder, builder.trunc(arg, _I32)) for arg in args[1:])
        kept = builder.and_(builder.icmp_signed(">=", lane, first32), builder.icmp_signed("<=", lane, last32))
        return builder.select(kept, args[0], constant(-math.inf))

    return float32x16(float32x16, types.int64, types.int64), codegen


@intrinsic
def distances(typingctx: Any, offset: Any) -> Any:
    """Lane ``i`` holds ``|offset + i|``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane = builder.add(_emit_iota(builder), splat_of(builder, builder.trunc(args[0], _I32)))
        return call_vector(builder, "llvm.fabs", builder.sitofp(lane, _VEC))

    return float32x16(types.int64), codegen


def exp_of(builder: Any, x: Any) -> Any:
    """exp(x) for ``x <= 88``: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf), about 1 ulp.

    Below the normal range, and at -inf, the result is exactly 0, so that a masked score adds nothing; NaN stays NaN.
    """
    tiny = constant(-87.33)
    vanishes = builder.fcmp_ordered("<", x, tiny)
    clamped = builder.select(vanishes, tiny, x)
    # adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum
    shifter = constant(12582912.0)
    shifted = fma_of(builder, clamped, constant(1.44269504088896341), shifter)
    n = builder.fsub(shifted, shifter)
    r = fma_of(builder, n, constant(-0.693359375), clamped)
    r = fma_of(builder, n, constant(2.12194440e-4), r)
    y = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = fma_of(builder, y, r, constant(coefficient))
    y = builder.fadd(fma_of(builder, y, builder.fmul(r, r), r), constant(1.0))
    exponent = builder.shl(builder.bitcast(shifted, _VEC_I32), _int_constant(_VEC_I32, 23))
    power = builder.bitcast(builder.add(exponent, _int_constant(_VEC_I32, 0x3F800000)), _VEC)
    return builder.select(vanishes, constant(0.0), builder.fmul(y, power))


def tanh_of(builder: Any, x: Any) -> Any:
    """tanh(x): an odd polynomial near zero, ``1 - 2 / (exp(2|x|) + 1)`` beyond 0.625 (Cephes tanhf)."""
    size = call_vector(builder, "llvm.fabs", x)
    square = builder.fmul(x, x)
    y = constant(-5.70498872745e-3)
    for coefficient in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        y = fma_of(builder, y, square, constant(coefficient))
    near = fma_of(builder, builder.fmul(y, square), x, x)
    capped = builder.select(builder.fcmp_ordered(">", size, constant(10.0)), constant(10.0), size)
    e = exp_of(builder, builder.fadd(capped, capped))
    far = builder.fsub(constant(1.0), builder.fdiv(constant(2.0), builder.fadd(e, constant(1.0))))
    far = call_vector(builder, "llvm.copysign", far, x)
    return builder.select(builder.fcmp_ordered("<", size, constant(0.625)), near, far)


def _unary(emit: Any) -> Any:
    @intrinsic
    def operation(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0])

        return float32x16(float32x16), codegen

    return operation


exp = _unary(exp_of)
tanh = _unary(tanh_of)


# -- scalars at an address ------------------------------------------------------------------------------------------


def _scalar_load(numba_type: Any, llvm_type: Any, align: int) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(pointer_to(builder, args[0], llvm_type), align=align)

        return numba_type(types.int64), codegen

    return load


read_f32 = _scalar_load(types.float32, _F32, 4)
read_i32 = _scalar_load(types.int32, _I32, 4)
read_i64 = _scalar_load(types.int64, _I64, 8)


def _scalar_store(numba_type: Any, llvm_type: Any, align: int) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], pointer_to(builder, args[0], llvm_type), align=align)
            return context.get_dummy_value()

        return types.none(types.int64, numba_type), codegen

    return store


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """``prefetch(address)``: ask for a cache line that will be read soon, into the second-level cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = pointer_to(builder, args[0], _I8)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
        builder.call(function, [pointer, ir.Constant(_I32, 0), ir.Constant(_I32, 2), ir.Constant(_I32, 1)])
        return context.get_dummy_value()

    return types.none(types.int64), codegen


write_f32 = _scalar_store(types.float32, _F32, 4)
write_i64 = _scalar_store(types.int64, _I64, 8)


@intrinsic
def copy_bytes(typingctx: Any, destination: Any, source: Any, nbytes: Any) -> Any:
    """Copy ``nbytes`` from ``source`` to ``destination``, which do not overlap."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = [pointer_to(builder, arg, _I8) for arg in args[:2]]
        name = "llvm.memcpy.p0.p0.i64"
        function = builder.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(_I8), ir.PointerType(_I8), _I64, _I1])
            function = ir.Function(builder.module, kind, name=name)
        builder.call(function, [*pointers, args[2], _I1(0)])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), codegen
