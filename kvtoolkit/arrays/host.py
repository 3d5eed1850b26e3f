"""Any host array as an address, a shape, strides and the name of a dtype: NumPy, torch, or whatever speaks DLPack.

A tensor is refused unless its elements are in memory at its address: fake and meta tensors, wrapper subclasses such as
DTensor, tensors whose storage was freed or shrunk, and views that torch negates only when it reads them.

NumPy has no bfloat16: it is ``torch.bfloat16``, ``ml_dtypes.bfloat16``, or raw uint16 whose owner says so. Torch is
never imported here: a torch tensor can only come from a program that has imported it.
"""

import ctypes
import functools
import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kvtoolkit.arrays.extents import EXTENTS, extent
from kvtoolkit.arrays.types import ITEMSIZES
from kvtoolkit.errors import ShapeError, UnsupportedError


class Operand(NamedTuple):
    """The place, shape and dtype of an array, which it keeps alive."""

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


make_operand: Callable[[tuple[Any, ...]], Operand] = functools.partial(tuple.__new__, Operand)
"""An `Operand` from all its fields, in a third of the time that its class takes."""

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
_ELEMENT_STRIDES: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}
"""Strides in elements by strides in bytes and the size of an element: looked up in a third of the time."""
_MOST_STRIDES = 4096
_TORCH_DTYPES: dict[Any, tuple[str, int]] = {}
DENSE_TYPES: set[type] = set()
"""Classes of tensors that are known to be memory; a look here first spares `is_torch`."""


def is_torch(array: Any) -> bool:
    """Whether ``array`` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_on_device(array: Any, name: str = "q") -> bool:
    """Whether an array is in the memory of a GPU; UnsupportedError, with its name, if it does not say where it is."""
    kind = type(array)
    if kind in DENSE_TYPES:
        return not array.is_cpu
    if isinstance(array, (np.ndarray, Operand)):
        return False
    if is_torch(array):
        return _is_dense_type(kind) and not array.is_cpu  # any other is refused when it is described
    try:
        if hasattr(array, "__cuda_array_interface__"):
            return True
        if not hasattr(array, "__dlpack_device__"):
            return False
        place, number = array.__dlpack_device__()
        operator.index(number)
        return operator.index(place) not in (1, 3, 11)  # kDLCPU, kDLCUDAHost, kDLROCMHost
    except Exception as error:  # of a foreign class
        raise UnsupportedError(
            f"{name}: expected an array whose __dlpack_device__ gives two integers, got {kind.__name__}: {error}"
        ) from error


def operand(array: Any, name: str, dtype: str | None = None) -> Operand:
    """Describe ``array`` without copying it.

    Args:
        array: a NumPy array, a torch CPU tensor, an object with ``__array_interface__`` or ``__dlpack__``, or an
            `Operand`, which is returned as it is.
        name: what to call it in an error.
        dtype: what its 16-bit words are, where the array itself cannot say it.

    Raises:
        ShapeError: it is no array.
        UnsupportedError: it is not in host memory.
    """
    kind = type(array)
    if kind is np.ndarray:
        return _numpy_operand(array, name, dtype)
    if kind is Operand:
        return array  # type: ignore[no-any-return]
    if kind in DENSE_TYPES or is_torch(array):
        return tensor_operand(array, name, False)
    return _numpy_operand(as_numpy_view(array, name), name, dtype)


def int32_view(array: Operand) -> np.ndarray:
    """The elements of a contiguous int32 vector in host memory, where they are."""
    return np.ctypeslib.as_array((ctypes.c_int32 * array.shape[0]).from_address(array.address))


def mark_written(*arrays: Any) -> None:
    """Tell autograd that tensors were changed in place: a backward pass that needs what they held then raises."""
    torch = sys.modules.get("torch")
    if torch is not None:
        tensors = [array for array in arrays if type(array) is not Operand and isinstance(array, torch.Tensor)]
        if tensors:
            torch.autograd.graph.increment_version(tensors)


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, Operand]:
    """A new contiguous array in host memory and its description: a tensor if ``like`` is one, else a NumPy array.

    ``dtype`` is ``float32``, ``float16`` or ``bfloat16``; the latter is the dtype of ``like`` in NumPy, which has none.
    """
    made: Any
    if type(like) in DENSE_TYPES or is_torch(like):
        torch = sys.modules["torch"]
        made = empty_tensor(torch, shape, dtype, like)
        if len(shape) != 3 or type(made) is not torch.Tensor:  # a mode that fakes tensors may be on
            return made, tensor_operand(made, "out", False)
        address = made.data_ptr()
    else:
        if dtype == "bfloat16":
            made = np.empty(shape, like.dtype if isinstance(like, np.ndarray) else np.uint16)
        else:
            made = np.empty(shape, dtype)
        if len(shape) != 3:
            return made, _numpy_operand(made, "out", dtype)
        address = address_of(made)
    return made, make_operand((address, shape, (shape[1] * shape[2], shape[2], 1), dtype, made, True, -1))


def empty_tensor(torch: Any, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    """A new tensor where ``like`` is, whatever torch's default device is; ``dtype`` as in `empty`."""
    wanted = getattr(torch, dtype)
    if type(like) is torch.Tensor and like.dtype is wanted:  # a fifth faster
        return like.new_empty(shape)
    return torch.empty(shape, dtype=wanted, device=like.device)


def as_numpy_view(array: Any, name: str) -> np.ndarray:
    """A NumPy view of ``array``; bfloat16 becomes uint16."""
    if isinstance(array, np.ndarray):
        return array
    if is_on_device(array, name):
        raise UnsupportedError(f"{name}: expected an array in host memory, got one on a device")
    if is_torch(array):
        torch = sys.modules["torch"]
        tensor_operand(array, name, False)
        array = array.detach()
        try:
            return (array.view(torch.uint16) if array.dtype is torch.bfloat16 else array).numpy()  # type: ignore[no-any-return]
        except (RuntimeError, TypeError) as error:  # a conjugated view, a dtype that NumPy lacks
            raise UnsupportedError(f"{name}: NumPy cannot view this tensor: {error}") from error
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
    strides = _ELEMENT_STRIDES.get((array.strides, array.itemsize))
    if strides is None:
        strides = _learn_strides(array, name)
    return make_operand((address_of(array), array.shape, strides, found, array, array.flags.writeable, -1))


def _learn_strides(array: np.ndarray, name: str) -> tuple[int, ...]:
    """The strides of an array in elements."""
    itemsize, steps = array.itemsize, array.strides
    if itemsize and not any(step % itemsize for step in steps):
        if len(_ELEMENT_STRIDES) >= _MOST_STRIDES:
            _ELEMENT_STRIDES.clear()
        learned = _ELEMENT_STRIDES[steps, itemsize] = tuple([step // itemsize for step in steps])
        return learned
    if not array.flags.c_contiguous:
        raise ShapeError(f"{name}: expected strides in whole elements of {itemsize} bytes, got {steps} bytes")
    return tuple([step // itemsize for step in steps]) if itemsize else steps


def tensor_operand(tensor: Any, name: str, on_device: bool) -> Operand:
    """Describe a torch tensor without copying it.

    Args:
        tensor: of any class and device.
        name: what to call it in an error.
        on_device: whether it must be on a CUDA device, else in host memory.

    Raises:
        UnsupportedError: it is elsewhere, is not dense, has no memory of its own, has a storage that ends before its
            last element (as after ``resize_(0)``), or is a view that torch negates when it is read.
    """
    # Every line here is paid several times a layer: a getter of a tensor takes about 0.05 us, a call in Python 0.1 us.
    try:
        if type(tensor) not in DENSE_TYPES and not _is_dense_type(type(tensor)):
            raise UnsupportedError(f"{name}: expected a tensor with memory of its own, got a {type(tensor).__name__}")
        if on_device:
            if not tensor.is_cuda:
                raise _elsewhere(tensor, name, "on a CUDA device")
            device = tensor.get_device()
        else:
            if not tensor.is_cpu:
                raise _elsewhere(tensor, name, "in host memory")
            device = -1
        dtype, itemsize = _TORCH_DTYPES.get(tensor.dtype) or _learn_dtype(tensor.dtype)
        shape, strides = tensor.shape, tensor.stride()
        shape, _, end, _ = EXTENTS.get((shape, strides)) or extent(shape, strides)
        if end and tensor.untyped_storage().nbytes() < itemsize * (tensor.storage_offset() + end):
            raise UnsupportedError(
                f"{name}: expected a tensor with memory, got a storage of {tensor.untyped_storage().nbytes()} bytes "
                f"where its last element ends at byte {itemsize * (tensor.storage_offset() + end)}"
            )
        if tensor.is_neg():
            raise UnsupportedError(
                f"{name}: expected elements as they are in memory, got a view that torch negates when it is read; "
                "resolve_neg() makes a tensor of it"
            )
        address = tensor.data_ptr()
        if end and not address:
            raise UnsupportedError(f"{name}: expected a tensor with memory, got one at address 0")
        return make_operand((address, shape, strides, dtype, tensor, True, device))
    except UnsupportedError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # sparse, nested, inside a transform such as vmap
        raise UnsupportedError(f"{name}: expected a dense tensor, got another: {error}") from error


def _elsewhere(tensor: Any, name: str, place: str) -> UnsupportedError:
    """The error for a tensor on another device."""
    if tensor.is_meta:
        place = "with memory of its own"
    return UnsupportedError(f"{name}: expected a tensor {place}, got one on {tensor.device}")


def _is_dense_type(kind: type) -> bool:
    """Whether tensors of a class are memory: not where it intercepts torch's operators, or is not initialized yet."""
    if kind in DENSE_TYPES:
        return True
    torch = sys.modules["torch"]
    is_dense = kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl and not issubclass(  # type: ignore[attr-defined]
        kind, torch.nn.parameter.UninitializedTensorMixin
    )
    if is_dense:
        DENSE_TYPES.add(kind)
    return is_dense


def _learn_dtype(dtype: Any) -> tuple[str, int]:
    """The name of a torch dtype and the bytes of an element."""
    learned = _TORCH_DTYPES[dtype] = str(dtype).removeprefix("torch."), int(dtype.itemsize)
    return learned
