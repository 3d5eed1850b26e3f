"""Names of dtypes and of array types, and what counts as an integer."""

import operator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

FLOAT32, FLOAT16, BFLOAT16 = range(3)
"""Codes of the dtypes that a cache may have; compiled code and kernels know them by these numbers."""
DTYPE_CODES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
ITEMSIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "uint16": 2, "int16": 2,
    "int32": 4, "int64": 8, "uint32": 4, "uint64": 8, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Uint64Array = NDArray[np.uint64]


def as_int(value: Any) -> int | None:
    """An integer of Python, NumPy or any other kind as an ``int``; None for a bool and for what is no integer."""
    if type(value) is int:
        return value
    try:
        is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")  # True is 1 for torch
        return None if is_bool else int(operator.index(value))
    except Exception:  # whatever a foreign number raises, as a tensor without memory
        return None


if TYPE_CHECKING:
    from numpy.typing import ArrayLike as ArrayLike
else:

    class ArrayLike:
        """What ``numpy.asarray`` takes: an array, a tensor, a list; type checkers see ``numpy.typing.ArrayLike``.

        NumPy's own is a union of dozens of types, which `help` would spell out at every parameter.
        """


class Array(Protocol):
    """An array that calls take: NumPy's, CuPy's, a torch tensor, or what has ``__dlpack__`` or an array interface."""

    @property
    def shape(self) -> Any:
        """The sizes of the axes."""

    @property
    def dtype(self) -> Any:
        """The type of the elements."""
