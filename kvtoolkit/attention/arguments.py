"""Checks of the arguments of attention calls, made before anything is written; errors say name, expected, got."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kvtoolkit.arrays.call import Hints, check_hints
from kvtoolkit.arrays.extents import EXTENTS, extent, share_bytes
from kvtoolkit.arrays.host import Operand, as_numpy_view, int32_view
from kvtoolkit.arrays.types import DTYPE_CODES, ITEMSIZES, as_int
from kvtoolkit.errors import ShapeError, UnsupportedError

BACKENDS = ("cpu", "cuda", "numba")
LAYOUTS = ("NHD", "HND")
_MOST = 1 << 31
_PAST_MEMORY = 1 << 64
_LARGEST_FLOAT32 = 3.4028234e38  # the kernels compute in float32


def choose_backend(backend: str | None, on_device: bool) -> str:
    """The backend that was asked for, or the fast one for where the arrays are.

    Raises:
        UnsupportedError: there is no such backend, or it does not work where the arrays are.
    """
    if backend is None:
        return "cuda" if on_device else "cpu"
    if not (isinstance(backend, str) and backend in BACKENDS):
        raise UnsupportedError(f"backend: expected None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if on_device and backend == "cpu":
        raise UnsupportedError("backend: 'cpu' works on arrays in host memory, got one on a device")
    if not on_device and backend != "cpu":
        raise UnsupportedError(
            f"backend: {backend!r} works on arrays on a CUDA device, got one in host memory; move it, or use 'cpu'"
        )
    return backend


def check_layout(layout: str) -> None:
    if not (isinstance(layout, str) and layout in LAYOUTS):
        raise ShapeError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


def check_rows(array: Operand, name: str, shape: str, ndim: int) -> None:
    """ShapeError unless an array has ``ndim`` axes, the last one contiguous, and a dtype that a cache may have."""
    if len(array.shape) != ndim:
        raise ShapeError(f"{name}: expected {shape}, got shape {array.shape}")
    if array.dtype not in DTYPE_CODES:
        raise ShapeError(f"{name}: expected float32, float16 or bfloat16, got {array.dtype}")
    if array.strides[-1] != 1 and _is_scattered(array):
        raise ShapeError(f"{name}: expected the last axis contiguous, got strides {array.strides} (elements)")
    if array.address % ITEMSIZES[array.dtype]:
        raise ShapeError(f"{name}: expected aligned elements, got address {array.address:#x}")


def check_caches(keys: Operand, values: Operand, dtype: str, layout: str, head_dim: int, num_heads: int | None) -> None:
    """ShapeError for caches that differ from each other or from the tokens; ``num_heads`` None = any number."""
    shape = "[num_blocks, block_size, num_kv_heads, head_dim]"
    if layout == "HND":
        shape = "[num_blocks, num_kv_heads, block_size, head_dim]"
    check_rows(keys, "k_cache", shape, 4)
    check_rows(values, "v_cache", shape, 4)
    if keys.shape != values.shape:
        raise ShapeError(f"v_cache: expected the shape of k_cache, {keys.shape}, got {values.shape}")
    for name, cache in (("k_cache", keys), ("v_cache", values)):
        if cache.dtype != dtype:
            raise ShapeError(f"{name}: expected the dtype of the tokens, {dtype}, got {cache.dtype}{autocast_note()}")
    found = keys.shape[1 if layout == "HND" else 2]
    if keys.shape[3] != head_dim:
        raise ShapeError(f"k_cache: expected head_dim {head_dim} as in the tokens, got {keys.shape[3]}")
    if num_heads is not None and found != num_heads:
        raise ShapeError(f"k_cache: expected {num_heads} kv heads as in the tokens, got {found}")
    if found < 1 or keys.shape[1] < 1 or keys.shape[2] < 1:
        raise ShapeError(f"k_cache: expected {shape} with at least one head and slot, got {keys.shape}")


def autocast_note() -> str:
    """The end of a message about a wrong dtype: says so if torch.autocast may be the reason."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return ""
    return "; torch.autocast is on, under which layers change dtypes: cast to one first"


def check_heads(num_q_heads: int, num_kv_heads: int, head_dim: int, name: str = "q") -> None:
    """Raise unless the heads of the array called ``name`` can be computed."""
    if num_q_heads < 1 or num_q_heads % num_kv_heads:
        raise ShapeError(
            f"{name}: expected num_q_heads to be a multiple of num_kv_heads {num_kv_heads}, got {num_q_heads}"
        )
    if head_dim < 8 or head_dim % 8:
        raise UnsupportedError(f"{name}: no kernel for head_dim {head_dim}; it must be a multiple of 8")


def check_indices(array: Operand, name: str, shape: tuple[int | str, ...], dtype: str = "int32") -> None:
    """ShapeError unless an array is an index array of ``shape``, where a string stands for any size."""
    good = array.dtype == dtype and len(array.shape) == len(shape)
    for want, got in zip(shape, array.shape, strict=False):
        good = good and (want == got or type(want) is str)
    if not good:
        raise ShapeError(f"{name}: expected [{', '.join(map(str, shape))}] {dtype}, got {array.shape} {array.dtype}")
    if array.strides[-1] != 1 and _is_scattered(array):
        raise ShapeError(f"{name}: expected the last axis contiguous, got strides {array.strides} (elements)")


def _is_scattered(array: Operand) -> bool:
    """Whether the stride of the last axis matters: not where there is no second element."""
    return array.shape[-1] > 1 and 0 not in array.shape


def check_per_head(array: Operand, name: str, num_q_heads: int, infinite: bool) -> None:
    """ShapeError unless an array is ``[num_q_heads]`` float32 and holds finite numbers; with ``infinite`` also -inf.

    On a device the numbers are not checked.
    """
    if array.shape != (num_q_heads,) or array.dtype != "float32" or (array.strides[0] != 1 and num_q_heads > 1):
        raise ShapeError(
            f"{name}: expected [num_q_heads = {num_q_heads}] float32, contiguous, got {array.shape} {array.dtype}"
        )
    if array.device >= 0:
        return
    for value in array.owner.tolist():
        if not (math.isfinite(value) or (infinite and value == -math.inf)):
            raise ShapeError(f"{name}: expected finite values{' or -inf' if infinite else ''}, got {value}")


def check_slopes(array: Operand, num_q_heads: int, batch: int, backend: str) -> None:
    """Raise unless ALiBi slopes are ``[num_q_heads]`` float32 or, on the CPU, ``[batch, num_q_heads]``."""
    if len(array.shape) != 2:
        check_per_head(array, "alibi_slopes", num_q_heads, infinite=False)
        return
    if backend != "cpu":
        raise UnsupportedError(
            "alibi_slopes: expected [num_q_heads], one slope for all rows; slopes of every row's own, "
            f"[batch, num_q_heads], need kernels of their own on a GPU; got {array.shape}"
        )
    scattered = array.strides[1] != 1 and num_q_heads > 1
    if array.shape != (batch, num_q_heads) or array.dtype != "float32" or scattered:
        raise ShapeError(
            f"alibi_slopes: expected [batch = {batch}, num_q_heads = {num_q_heads}] float32, last axis contiguous, "
            f"got {array.shape} {array.dtype}"
        )
    if not np.isfinite(as_numpy_view(array.owner, "alibi_slopes")).all():
        raise ShapeError("alibi_slopes: expected finite values, got one that is not")


def check_output(out: Operand, name: str, shape: tuple[int, ...], dtype: str) -> None:
    if out.shape != shape or out.dtype != dtype:
        raise ShapeError(f"{name}: expected {shape} {dtype}, got {out.shape} {out.dtype}")
    if not out.writable:
        raise ShapeError(f"{name}: expected a writable array, got a read-only one")
    if out.strides[-1] != 1 and _is_scattered(out):
        raise ShapeError(f"{name}: expected the last axis contiguous, got strides {out.strides} (elements)")
    check_places(out, name)


def describe_per_head(
    describe: Callable[[Any, str], Operand],
    given_sinks: Any,
    given_slopes: Any,
    num_q_heads: int,
    batch: int,
    backend: str,
) -> tuple[Operand | None, Operand | None]:
    """``sinks, alibi_slopes``, checked."""
    sinks = slopes = None
    if given_sinks is not None:
        sinks = describe(given_sinks, "sinks")
        check_per_head(sinks, "sinks", num_q_heads, infinite=True)
    if given_slopes is not None:
        slopes = describe(given_slopes, "alibi_slopes")
        check_slopes(slopes, num_q_heads, batch, backend)
    return sinks, slopes


def check_places(written: Operand, name: str) -> None:
    """UnsupportedError for an array to write to in which two elements share a place, as after a broadcast."""
    if extent(written.shape, written.strides).repeats:
        raise UnsupportedError(
            f"{name}: expected every element in a place of its own, got shape {written.shape} and strides "
            f"{written.strides} (elements)"
        )


def check_apart(
    written: Sequence[tuple[str, Operand]],
    read: Iterable[tuple[str, Operand | None]],
    in_place: tuple[str, str] | None = None,
) -> None:
    """UnsupportedError if arrays to write to share memory with each other or with another argument of the call.

    Extents are looked up without a call, because `append` checks five arrays in every layer.

    Args:
        written: name and array where the call writes; in each array every element has a place of its own.
        read: name and array of the other arguments.
        in_place: ``(written, read)``, names of two arrays that may be one, with the same shape and strides.
    """
    spans: list[tuple[int, int, str, Operand]] = []
    lowest, highest = _PAST_MEMORY, 0
    for name, array in written:
        address, shape, strides, dtype, _, _, _ = array
        _, low, end, repeats = EXTENTS.get((shape, strides)) or extent(shape, strides)
        if repeats:
            check_places(array, name)
        size = ITEMSIZES[dtype]
        begin, stop = address + size * low, address + size * end
        for at, past, other_name, other in spans:
            if begin < past and at < stop:
                _require_apart(name, array, other_name, other)
        spans.append((begin, stop, name, array))
        if begin < lowest:
            lowest = begin
        if stop > highest:
            highest = stop
    for read_name, source in read:
        if source is None:
            continue
        address, shape, strides, dtype, _, _, _ = source
        _, low, end, _ = EXTENTS.get((shape, strides)) or extent(shape, strides)
        size = ITEMSIZES[dtype]
        if address + size * low >= highest or address + size * end <= lowest:
            continue
        for at, past, name, array in spans:
            overlaps = address + size * low < past and at < address + size * end
            if overlaps and ((name, read_name) != in_place or source[:3] != array[:3]):
                _require_apart(name, array, read_name, source)


def _require_apart(name: str, written: Operand, other_name: str, other: Operand) -> None:
    """UnsupportedError if an array to write to has a byte in common with another: exact, but slow."""
    one, two = ((array.shape, array.strides, ITEMSIZES[array.dtype]) for array in (written, other))
    if share_bytes(other.address - written.address, one, two):
        raise UnsupportedError(f"{name}: expected memory of its own, got some that {other_name} uses, too")


def check_options(
    softmax_scale: float | None, window_size: tuple[int, int], softcap: float, num_splits: int
) -> tuple[int, int]:
    """ShapeError for numbers that make no sense; returns the window as two integers."""
    if softmax_scale is not None and not _is_finite(softmax_scale):
        raise ShapeError(f"softmax_scale: expected a finite number or None, got {softmax_scale!r}")
    if not _is_finite(softcap) or softcap < 0:
        raise ShapeError(f"softcap: expected a finite number from 0 (off) on, got {softcap!r}")
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ShapeError(f"window_size: expected (left, right), two integers, got {window_size!r}") from None
    if type(left) is not int or type(right) is not int:
        left, right = as_integers("window_size", "(left, right), two integers", window_size)
    if min(left, right) < -1 or max(left, right) >= _MOST:
        raise ShapeError(f"window_size: expected integers from -1 (unbounded) to {_MOST - 1}, got {window_size!r}")
    splits = num_splits if type(num_splits) is int else as_int(num_splits)
    if splits is None or not 0 <= splits < _MOST:
        raise ShapeError(f"num_splits: expected an integer from 0 (automatic) to {_MOST - 1}, got {num_splits!r}")
    return left, right


def as_integers(name: str, expected: str, values: Iterable[Any]) -> list[int]:
    """Values as ints; ShapeError, with what was expected in words, unless all are integers."""
    found = [as_int(value) for value in values]
    integers = [value for value in found if value is not None]
    if len(integers) != len(found):
        raise ShapeError(f"{name}: expected {expected}, got {values!r}")
    return integers


def count_queries(
    max_seqlen_q: int, num_tokens: int, seq_lens: Operand, cu_seqlens_q: Operand | None
) -> tuple[int, int]:
    """The fewest and the most query tokens of a row, where none has more than ``max_seqlen_q``.

    Raises:
        ShapeError: the rows cannot hold all tokens then, or, in host memory, a row has more.
    """
    (batch,) = seq_lens.shape
    given = count("max_seqlen_q", max_seqlen_q)
    if num_tokens > batch * given:
        raise ShapeError(
            f"max_seqlen_q: expected at least {-(-num_tokens // batch)}, because {batch} rows have {num_tokens} query "
            f"tokens, got {given}"
        )
    most = min(given, num_tokens)
    counts = max(0, num_tokens - (batch - 1) * most), most  # what the other rows cannot hold is a row's
    if cu_seqlens_q is not None and cu_seqlens_q.device < 0:
        check_hints(Hints((0, given)), int32_view(seq_lens), int32_view(cu_seqlens_q))
    return counts


def count(name: str, value: Any) -> int:
    """A number of tokens as an int; ShapeError if it is none."""
    number = as_int(value)
    if number is None or not 0 <= number < _MOST:
        raise ShapeError(f"{name}: expected a number of tokens, got {value!r:.80}")
    return number


def check_flags(**flags: Any) -> None:
    """ShapeError for what is no truth value, such as an array."""
    for name, value in flags.items():
        if not isinstance(value, (bool, int, np.bool_)):
            raise ShapeError(f"{name}: expected True or False, got {value!r:.80}")


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number) and abs(float(number)) <= _LARGEST_FLOAT32
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
