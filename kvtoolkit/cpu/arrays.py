"""Any host array as an address, a shape, strides and the name of a dtype: NumPy, torch, or whatever speaks DLPack.

NumPy has no bfloat16: it is ``torch.bfloat16``, ``ml_dtypes.bfloat16``, or raw uint16 whose owner says so. Torch is
never imported here: a torch tensor can only come from a program that has imported it.
"""

import ctypes
import sys
from typing import Any, NamedTuple

import numpy as np

from kvtoolkit.cpu.vector import BFLOAT16, FLOAT16, FLOAT32
from kvtoolkit.errors import ShapeError, UnsupportedError

DTYPE_CODES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
ITEMSIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "uint16": 2, "int16": 2,
    "int32": 4, "int64": 8, "uint32": 4, "uint64": 8, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


class Operand(NamedTuple):
    """Where an array lies; it keeps the array alive."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    dtype: str
    """NumPy's name, or ``"bfloat16"``."""
    owner: Any
    writable: bool = True
    device: int = -1
    """CUDA ordinal; -1 = host memory."""


_read_pointer = ctypes.c_size_t.from_address
_DATA_FIELD = object.__basicsize__


def _slow_address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _fast_address(array: np.ndarray) -> int:
    # the data pointer is the first field behind the object header: a tenth of the time of the official way,
    # which builds a dict, and there are nine arrays to a call
    return _read_pointer(id(array) + _DATA_FIELD).value


def _knows_layout() -> bool:
    probe = np.arange(4)[1:]
    return sys.implementation.name == "cpython" and _fast_address(probe) == _slow_address(probe)


address_of = _fast_address if _knows_layout() else _slow_address
"""The address of an array's first element."""

_NUMPY_NAMES: dict[Any, str] = {}
_TORCH_NAMES: dict[Any, str] = {}


def is_torch(array: Any) -> bool:
    """Whether ``array`` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_on_device(array: Any) -> bool:
    """Whether ``array`` lies in the memory of a GPU."""
    if isinstance(array, (np.ndarray, Operand)):
        return False
    if is_torch(array):
        return not array.is_cpu
    if hasattr(array, "__cuda_array_interface__"):
        return True
    if hasattr(array, "__dlpack_device__"):
        return bool(array.__dlpack_device__()[0] not in (1, 3, 11))  # kDLCPU, kDLCUDAHost, kDLROCMHost
    return False


def operand(array: Any, name: str, dtype: str | None = None) -> Operand:
    """Describe ``array`` without copying it.

    Args:
        array: a NumPy array, a torch CPU tensor, an object with ``__array_interface__`` or ``__dlpack__``, or an
            `Operand`, which is returned as it is.
        name: what to call it in an error.
        dtype: what its 16-bit words are, where the array itself cannot say it.

    Raises:
        ShapeError: it is no array.
        UnsupportedError: it does not lie in host memory.
    """
    kind = type(array)
    if kind is np.ndarray:
        return _numpy_operand(array, name, dtype)
    if kind is Operand:
        return array  # type: ignore[no-any-return]
    if is_torch(array):
        return _torch_operand(array, name)
    return _numpy_operand(as_numpy_view(array, name), name, dtype)


def as_numpy_view(array: Any, name: str) -> np.ndarray:
    """A NumPy view of ``array``; bfloat16 becomes uint16."""
    if isinstance(array, np.ndarray):
        return array
    if is_on_device(array):
        raise UnsupportedError(f"{name}: expected an array in host memory, got one on a device")
    if is_torch(array):
        torch = sys.modules["torch"]
        array = array.detach()
        return (array.view(torch.uint16) if array.dtype is torch.bfloat16 else array).numpy()  # type: ignore[no-any-return]
    try:
        if hasattr(array, "__array_interface__"):
            return np.asarray(array)
        if hasattr(array, "__dlpack__"):
            return np.from_dlpack(array)
    except Exception as error:
        raise UnsupportedError(f"{name}: NumPy cannot view this {type(array).__name__}: {error}") from error
    raise ShapeError(
        f"{name}: expected a NumPy array, a torch tensor, or an object with __dlpack__ or __array_interface__, "
        f"got {type(array).__name__}"
    )


def dtype_name(array: Any) -> str:
    """The name of the dtype of a NumPy array or torch tensor."""
    if is_torch(array):
        return str(array.dtype).removeprefix("torch.")
    return str(array.dtype.name)


def _numpy_operand(array: np.ndarray, name: str, dtype: str | None) -> Operand:
    found = _NUMPY_NAMES.get(array.dtype)
    if found is None:
        found = array.dtype.name if array.dtype.isnative else f"{array.dtype.name} (byte-swapped)"
        _NUMPY_NAMES[array.dtype] = found
    if dtype is not None and array.itemsize == ITEMSIZES[dtype] and found in ("uint16", "int16"):
        found = dtype
    itemsize = array.itemsize
    if not array.flags.c_contiguous and (not itemsize or any(stride % itemsize for stride in array.strides)):
        raise ShapeError(f"{name}: expected strides in whole elements of {itemsize} bytes, got {array.strides} bytes")
    strides = tuple([stride // itemsize for stride in array.strides]) if itemsize else array.strides
    return Operand(address_of(array), array.shape, strides, found, array, array.flags.writeable)


def _torch_operand(tensor: Any, name: str) -> Operand:
    if not tensor.is_cpu:
        raise UnsupportedError(f"{name}: expected a tensor in host memory, got one on {tensor.device}")
    found = _TORCH_NAMES.get(tensor.dtype)
    if found is None:
        found = str(tensor.dtype).removeprefix("torch.")
        _TORCH_NAMES[tensor.dtype] = found
    try:
        return Operand(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), found, tensor)
    except RuntimeError as error:  # sparse, or without storage
        raise UnsupportedError(f"{name}: expected a dense tensor, got a {tensor.layout} one: {error}") from error
