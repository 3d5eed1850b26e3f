"""Bit counting and atomics on NumPy words, callable from compiled code; Numba itself offers neither on the CPU.

Every atomic names its memory order. ``words`` is a contiguous ``uint64`` array. The caller must check the index ``i``,
because nothing here is bounds-checked.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _untyped_intrinsic


def intrinsic(function: Any) -> Any:
    """Numba's decorator with a type annotation."""
    return _untyped_intrinsic(function)


@intrinsic
def count_trailing_zeros(typingctx: Any, word: Any) -> Any:
    """``count_trailing_zeros(word)``: the index of the lowest set bit of a uint64; 64 if there is none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), codegen


@intrinsic
def popcount(typingctx: Any, word: Any) -> Any:
    """``popcount(word)``: the number of set bits of a uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


def _element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    struct = context.make_array(array_type)(context, builder, array)
    return cgutils.gep_inbounds(builder, struct.data, index)


def _is_words(words: Any) -> bool:
    return isinstance(words, types.Array) and words.dtype == types.uint64 and words.layout == "C" and words.ndim == 1


def _load(ordering: str) -> Any:
    @intrinsic
    def load(typingctx: Any, words: Any, i: Any) -> Any:
        if not _is_words(words):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _element(context, builder, signature.args[0], args[0], args[1])
            return builder.load_atomic(pointer, ordering, 8)

        return types.uint64(words, types.intp), codegen

    return load


def _fetch(operation: str, ordering: str) -> Any:
    @intrinsic
    def fetch(typingctx: Any, words: Any, i: Any, operand: Any) -> Any:
        if not _is_words(words):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _element(context, builder, signature.args[0], args[0], args[1])
            return builder.atomic_rmw(operation, pointer, args[2], ordering)

        return types.uint64(words, types.intp, types.uint64), codegen

    return fetch


@intrinsic
def cas_acq_rel(typingctx: Any, words: Any, i: Any, expected: Any, desired: Any) -> Any:
    """``cas_acq_rel(words, i, expected, desired)``: store ``desired`` over ``expected``; return the old word."""
    if not _is_words(words):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element(context, builder, signature.args[0], args[0], args[1])
        pair = builder.cmpxchg(pointer, args[2], args[3], "acq_rel", "acquire")
        return builder.extract_value(pair, 0)

    return types.uint64(words, types.intp, types.uint64, types.uint64), codegen


load_acquire = _load("acquire")
load_relaxed = _load("monotonic")
fetch_or_release = _fetch("or", "release")
fetch_and_acquire = _fetch("and", "acquire")
fetch_add_acq_rel = _fetch("add", "acq_rel")


@intrinsic
def store_release(typingctx: Any, words: Any, i: Any, value: Any) -> Any:
    """``store_release(words, i, value)``."""
    if not _is_words(words):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element(context, builder, signature.args[0], args[0], args[1])
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.none(words, types.intp, types.uint64), codegen
