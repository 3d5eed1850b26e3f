"""Any array on a CUDA device as an address, a shape, strides and the name of a dtype: torch, CuPy, Numba, DLPack."""

import sys
from typing import Any

from kvtoolkit.arrays.host import (
    DENSE_TYPES,
    Operand,
    empty_tensor,
    is_on_device,
    is_torch,
    make_operand,
    tensor_operand,
)
from kvtoolkit.errors import KVToolkitError, ShapeError, UnsupportedError

_BITS = {"int16": "bfloat16", "uint16": "bfloat16"}


def device_operand(array: Any, name: str, dtype: str | None = None) -> Operand:
    """Describe an array on a device without copying it.

    Args:
        array: a torch tensor, a CuPy array, anything with ``__cuda_array_interface__`` or ``__dlpack__``, or an
            `Operand`, which is returned as it is.
        name: what to call it in an error.
        dtype: ``"bfloat16"`` if 16-bit integers are its bits.

    Raises:
        ShapeError: it is no array.
        UnsupportedError: it is not in the memory of a CUDA device, or does not describe itself as its protocol demands.
    """
    kind = type(array)
    if kind is Operand:
        return array  # type: ignore[no-any-return]
    if kind in DENSE_TYPES or is_torch(array):
        found = tensor_operand(array, name, True)
        return found if dtype is None or found.dtype not in _BITS else found._replace(dtype=_BITS[found.dtype])
    module: Any = sys.modules.get("cupy")
    if module is not None and isinstance(array, module.ndarray):
        return _of_cupy(array, array, dtype)
    if not is_on_device(array, name):
        raise UnsupportedError(f"{name}: expected an array on a CUDA device, got a {kind.__name__} in host memory")
    try:
        if hasattr(array, "__cuda_array_interface__"):
            return _of_interface(array, name, dtype)
        if hasattr(array, "__dlpack__"):
            import cupy

            return _of_cupy(cupy.from_dlpack(array), array, dtype)
    except (KVToolkitError, ImportError):
        raise
    except Exception as error:  # of a foreign class, of CuPy, or of a driver that is not there
        raise UnsupportedError(
            f"{name}: expected an array on a CUDA device, got {kind.__name__}, which cannot be read: {error}"
        ) from error
    raise ShapeError(f"{name}: expected an array on a CUDA device, got {type(array).__name__}")


def _of_cupy(view: Any, owner: Any, dtype: str | None) -> Operand:
    found = str(view.dtype.name)
    strides = tuple(stride // view.itemsize for stride in view.strides)
    if dtype is not None:
        found = _BITS.get(found, found)
    return Operand(view.data.ptr, view.shape, strides, found, (view, owner), True, view.device.id)


def _of_interface(array: Any, name: str, dtype: str | None) -> Operand:
    import cupy
    import numpy as np

    described = array.__cuda_array_interface__
    kind = np.dtype(described["typestr"])
    address, is_read_only = described["data"]
    shape = tuple(described["shape"])
    strides = described.get("strides")
    if strides is None:
        elements = [1]
        for size in reversed(shape[1:]):
            elements.insert(0, elements[0] * size)
        strides = tuple(elements[: len(shape)])
    elif any(stride % kind.itemsize for stride in strides):
        raise ShapeError(f"{name}: expected strides in whole elements of {kind.itemsize} bytes, got {strides} bytes")
    else:
        strides = tuple(stride // kind.itemsize for stride in strides)
    found = kind.name if dtype is None else _BITS.get(kind.name, kind.name)
    if not address and 0 not in shape:
        raise UnsupportedError(f"{name}: expected an array with memory, got one at address 0")
    device = cupy.cuda.runtime.pointerGetAttributes(address).device if address else cupy.cuda.runtime.getDevice()
    return Operand(int(address or 0), shape, strides, found, array, not is_read_only, int(device))


def check_devices(operands: dict[str, Operand | None]) -> int:
    """The device that all of them are on; ShapeError if they are on several."""
    device = -1
    for name, one in operands.items():
        if one is None:
            continue
        if device < 0:
            device, first = one.device, name
        elif one.device != device:
            raise ShapeError(f"{name}: expected it on CUDA device {device}, as {first}, got one on {one.device}")
    return device


def check_alignment(operands: dict[str, Operand], nbytes: int = 16) -> None:
    """ShapeError unless every row begins at a multiple of ``nbytes``: that is how the kernels load them."""
    for name, one in operands.items():
        together = one.address
        for stride, size in zip(one.strides[:-1], one.shape, strict=False):
            if size > 1:
                together |= 2 * stride
        if together % nbytes:
            raise ShapeError(
                f"{name}: expected rows that begin at multiples of {nbytes} bytes, got address {one.address:#x} and "
                f"strides {one.strides} (elements of 2 bytes)"
            )


def empty(shape: tuple[int, ...], dtype: str, like: Any, device: int) -> tuple[Any, Operand]:
    """A new array on a device and its description: a torch tensor if ``like`` is one, else a CuPy array (bfloat16 as
    uint16)."""
    made: Any
    if type(like) in DENSE_TYPES or is_torch(like):
        torch = sys.modules["torch"]
        made = empty_tensor(torch, shape, dtype, like)
        if len(shape) == 3 and type(made) is torch.Tensor:  # not so where a mode fakes tensors
            strides = (shape[1] * shape[2], shape[2], 1)
            return made, make_operand((made.data_ptr(), shape, strides, dtype, made, True, device))
    else:
        import cupy

        with cupy.cuda.Device(device):
            made = cupy.empty(shape, "uint16" if dtype == "bfloat16" else dtype)
    return made, device_operand(made, "out", dtype)
