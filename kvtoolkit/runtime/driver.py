"""Launching through the driver: CuPy's own launch cannot let a kernel begin before the one in front of it has ended.

Programmatic dependent launch: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

import ctypes
import struct
from functools import cache
from typing import Any

import numpy as np

from kvtoolkit.cpu.arrays import address_of
from kvtoolkit.errors import DeviceError

_INVALID_CONTEXT = 201
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_config = struct.Struct(
    "@7IQQI4x"
)  # CUlaunchConfig: grid, CTA, dynamic shared memory, stream, attributes, their number
_pointer = struct.Struct("@Q")

# one CUlaunchAttribute: id, padding, 64 bytes of value
_dependent = np.zeros(18, np.uint32)
_dependent[0], _dependent[2] = _PROGRAMMATIC_STREAM_SERIALIZATION, 1
_dependent_address = address_of(_dependent)


@cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


def launch(
    function: int,
    grid: tuple[int, ...],
    threads: int,
    smem_nbytes: int,
    stream: int,
    parameters: bytes,
    dependent: bool,
) -> None:
    """Launch a kernel whose only parameter is a struct.

    Args:
        function: its ``CUfunction``.
        grid: CTAs, up to three axes.
        parameters: the bytes of the struct.
        dependent: let it begin while the kernel before it still runs; it must wait for it on the device.

    Raises:
        DeviceError: the driver refuses.
    """
    held = np.frombuffer(parameters, np.uint8)
    x, y, z = (*grid, 1, 1)[:3]
    config = _config.pack(
        x, y, z, threads, 1, 1, smem_nbytes, stream, _dependent_address if dependent else 0, int(dependent)
    )
    addresses = _pointer.pack(address_of(held))
    status = _library().cuLaunchKernelEx(config, function, addresses, None)
    if status == _INVALID_CONTEXT:  # a thread that has not used CUDA yet
        import cupy

        cupy.cuda.runtime.setDevice(cupy.cuda.runtime.getDevice())
        status = _library().cuLaunchKernelEx(config, function, addresses, None)
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(text))
        said = (text.value or b"unknown").decode()
        raise DeviceError(
            f"kernel launch: {said} ({status}); grid {grid}, {threads} threads, {smem_nbytes} bytes of shared memory"
        )
