"""What the Numba kernels need of a GPU, each with a stand-in for the simulator (``NUMBA_ENABLE_CUDASIM=1``).

16-bit floats travel as uint16 words, since neither NumPy nor Numba's arrays know bfloat16: one compilation serves both
formats. The kernels use shared memory and barriers alone, no shuffles or ballots, because that is what the simulator
has.
"""

import importlib
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from kvtoolkit.arrays.host import Operand
from kvtoolkit.arrays.types import ITEMSIZES
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime import launch_log

with warnings.catch_warnings():
    # of a CUDA target that moves to another package, and of NumPy types inside Numba: nothing that our caller can mend
    warnings.simplefilter("ignore", DeprecationWarning)
    from numba import config
    from numba import cuda as cuda

    if cuda.implementation == "NVIDIA" and not hasattr(np, "row_stack"):
        # numba-cuda 0.30 names it when it first compiles, NumPy 2.5 has dropped it: lend it the name for that import
        vars(np)["row_stack"] = np.vstack
        importlib.import_module("numba.cuda.np.arrayobj")
        del vars(np)["row_stack"]

F = TypeVar("F", bound=Callable[..., Any])

SIMULATED = bool(config.ENABLE_CUDASIM)
"""Whether kernels run as Python threads on host arrays."""
NUM_THREADS = 4 if SIMULATED else 128
"""Threads of a CTA; the simulator pays for each of them at every barrier."""

float32: Any = np.float32  # as a cast: a bare literal is float64, and one of those makes the whole expression so
NEG_INF = float32(-math.inf)


def kernel(function: Callable[..., None]) -> Any:
    """Compile a kernel at its first launch; see `launch`."""
    return cuda.jit(function)


def device(function: F) -> F:
    """Compile a function that kernels call.

    One that names ``cuda`` must be in the module of its kernel: the simulator swaps that name module by module.
    """
    if SIMULATED:
        return function
    compiled: F = cuda.jit(device=True)(function)
    return compiled


def device_twin(function: Any) -> Any:
    """The device form of a function that `allocators._jit.jit` has compiled for the host."""
    return device(function.py_func)


if SIMULATED:

    def _float_of(bits: Any) -> Any:
        return np.int32(bits).view(np.float32)

    def _bits_of(value: Any) -> Any:
        return int(np.float32(value).view(np.int32))

    def _float_of_half(word: Any) -> Any:
        return np.float32(np.uint16(word).view(np.float16))

    def _half_of(value: Any) -> Any:
        with np.errstate(over="ignore"):
            return np.float16(value).view(np.uint16)

else:
    from numba.cuda import libdevice

    @device
    def _float_of(bits: Any) -> Any:
        return libdevice.int_as_float(np.int32(bits))

    @device
    def _bits_of(value: Any) -> Any:
        return libdevice.float_as_int(value)

    @device
    def _float_of_half(word: Any) -> Any:
        return libdevice.half2float(np.int16(word))

    @device
    def _half_of(value: Any) -> Any:
        return np.uint16(libdevice.float2half_rn(value))


@device
def widen(word: Any, is_bfloat16: bool) -> Any:
    """The float32 that a 16-bit ``word`` stands for; exact."""
    if is_bfloat16:
        return _float_of(np.int32(word) << 16)
    return _float_of_half(word)


@device
def narrow(value: Any, is_bfloat16: bool) -> Any:
    """The 16-bit word nearest to a float32 ``value``, ties to even."""
    if not is_bfloat16:
        return _half_of(value)
    if math.isnan(value):
        return np.uint16(0x7FC0)  # rounding could carry a NaN's last bit away and leave an infinity
    bits = _bits_of(value)
    # half a unit of the last place kept, less one where that place is even
    return np.uint16(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF)


class _Described:
    """An `Operand` in the words of the CUDA Array Interface and, for the simulator, of NumPy's."""

    def __init__(self, array: Operand, dtype: np.dtype[Any]) -> None:
        self.owner = array.owner
        self.__cuda_array_interface__ = self.__array_interface__ = {
            "version": 3,
            "data": (array.address, not array.writable),
            "shape": array.shape,
            "strides": tuple(stride * dtype.itemsize for stride in array.strides),
            "typestr": dtype.str,
        }


def as_array(array: Operand) -> Any:
    """What a kernel takes for ``array``: a view of its memory, float16 and bfloat16 as uint16."""
    if array.dtype not in ITEMSIZES:
        raise UnsupportedError(f"expected an array of {', '.join(ITEMSIZES)}, got {array.dtype}")
    dtype = np.dtype(np.uint16 if array.dtype in ("float16", "bfloat16") else array.dtype)
    described = _Described(array, dtype)
    if SIMULATED:
        # a plain array would be copied to the simulated device, which refuses one with gaps, and back
        return cuda.devicearray.FakeCUDAArray(np.asarray(described))
    return cuda.as_cuda_array(described, sync=False)


def absent(dtype: str, ndim: int) -> Operand:
    """Stands for an array that the caller left out: it has no elements, which is how a kernel can tell."""
    return Operand(0, (0,) * ndim, (1,) * ndim, dtype, None)


def _launch(function: Any, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
    """Start a kernel on a raw CUDA stream (0 = default) of the current device; an empty grid starts nothing."""
    if 0 in grid:
        return
    arguments = tuple([as_array(value) if isinstance(value, Operand) else value for value in arguments])
    raw_stream = cuda.external_stream(stream) if stream and not SIMULATED else 0
    with warnings.catch_warnings():
        # a small batch is no mistake
        warnings.filterwarnings("ignore", message=".*Grid size")  # colour codes come first
        configured = function[grid, NUM_THREADS, raw_stream]
    configured(*arguments)


def _log_and_launch(function: Any, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
    """Log a launch, then do it as `_launch` does."""
    body = function.fn if SIMULATED else function.py_func
    shown = (
        f"{launch_log.Pointer(value.address)}{list(value.shape)}" if isinstance(value, Operand) else value
        for value in arguments
    )
    parameters = dict(zip(inspect.signature(body).parameters, shown, strict=True))
    launch_log.log_launch(body.__name__, grid, NUM_THREADS, stream, parameters)
    _launch(function, grid, stream, *arguments)


launch = _log_and_launch if launch_log.ENABLED else _launch
