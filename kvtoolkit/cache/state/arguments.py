"""Arguments of calls, checked and turned into arrays."""

from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtoolkit.arrays.host import as_numpy_view, is_torch
from kvtoolkit.arrays.types import Int64Array
from kvtoolkit.errors import ArgumentError
from kvtoolkit.formats.entry import GRANULE, MAX_GRANULES

MAX_TOKENS = MAX_GRANULES * GRANULE
"""More than any cache can hold."""

_BOOLS = frozenset({bool, np.bool_})


def is_ids(values: Any) -> TypeGuard[Int64Array]:
    """Whether values already have the form that `as_ids` returns."""
    return type(values) is np.ndarray and values.dtype == np.int64 and values.ndim == 1 and values.flags.c_contiguous


def as_ids(seq_ids: ArrayLike) -> Int64Array:
    """Sequence ids as ``[batch]`` int64, contiguous; ArgumentError unless they are a vector of integers."""
    return _integers(seq_ids, "seq_ids", "[batch]")


def as_prompt(prompt: ArrayLike, index: int) -> Int64Array:
    """A prompt as ``[n]`` int64, contiguous; ArgumentError unless it is a vector of integers."""
    return _integers(prompt, f"prompts[{index}]", "[n]")


def as_vector(values: ArrayLike, name: str, length: int) -> Int64Array:
    """Values as ``[length]`` int64; ArgumentError unless they are a vector of that many integers."""
    array = _integers(values, name, f"[{length}]")
    if len(array) != length:
        raise ArgumentError(f"{name}: expected [{length}] integers, got [{len(array)}]")
    return array


def _integers(values: ArrayLike, name: str, shape: str) -> Int64Array:
    array = _as_array(values, name)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        got = f"{array.dtype} {list(array.shape)}" if array.ndim else f"one {type(values).__name__}: {values!r:.40}"
        raise ArgumentError(f"{name}: expected {shape} integers, got {got}")
    return _as_int64(array, name)


def as_counts(num_new_tokens: ArrayLike, batch: int) -> Int64Array:
    """A number or a vector of them as ``[batch]`` int64; ArgumentError if it is neither, or out of range."""
    counts = _as_array(num_new_tokens, "num_new_tokens")
    if counts.size and counts.dtype.kind not in "iu":
        raise ArgumentError(f"num_new_tokens: expected integers, got {counts.dtype}")
    if counts.shape not in ((batch,), ()):
        raise ArgumentError(f"num_new_tokens: expected a number or [{batch}] of them, got shape {list(counts.shape)}")
    if counts.size and not (counts.min() >= 0 and counts.max() <= MAX_TOKENS):
        raise ArgumentError(f"num_new_tokens: expected 0 to {MAX_TOKENS}, got {counts.min()} to {counts.max()}")
    return np.broadcast_to(counts, (batch,)).astype(np.int64)


def as_tokens(token_ids: ArrayLike, expected: int) -> Int64Array:
    """Token ids as ``[expected]`` int64, contiguous; ArgumentError unless they are that many integers."""
    tokens = _as_array(token_ids, "token_ids")
    if tokens.size and tokens.dtype.kind not in "iu":
        raise ArgumentError(f"token_ids: expected integers, got {tokens.dtype}")
    if tokens.ndim != 1 or len(tokens) != expected:
        raise ArgumentError(
            f"token_ids: expected {expected} integers, one for every new token, got shape {list(tokens.shape)}"
        )
    return _as_int64(tokens, "token_ids")


def _as_int64(array: NDArray[Any], name: str) -> Int64Array:
    """Integers as int64, contiguous; ArgumentError if one does not fit."""
    if array.dtype == np.uint64 and array.size and array.max() >= 1 << 63:
        raise ArgumentError(f"{name}: expected integers below 2**63, got {array.max()}")
    return np.ascontiguousarray(array, np.int64)


def _as_array(values: ArrayLike, name: str) -> NDArray[Any]:
    if isinstance(values, list | tuple) and not _BOOLS.isdisjoint(map(type, values)):
        # NumPy would make integers of them if there are integers, too
        raise ArgumentError(f"{name}: expected integers, got a bool among them")
    try:
        return as_numpy_view(values, name) if is_torch(values) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as reason:  # ragged lists, tensors on a device
        raise ArgumentError(f"{name}: expected integers, got something that is no array: {reason}") from reason
