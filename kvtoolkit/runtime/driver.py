"""Launches through the driver, because CuPy cannot let a kernel begin before the previous one has ended.

Programmatic dependent launch: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

import ctypes
import struct
from functools import cache
from typing import Any

import numpy as np

from kvtoolkit.arrays.host import address_of
from kvtoolkit.errors import DeviceError

_INVALID_CONTEXT = 201
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_config = struct.Struct("@7I4x3Q")  # CUlaunchConfig: grid, CTA, dynamic shared memory; stream, attributes, their number
_Config = ctypes.c_uint64 * (_config.size // 8)
_STREAM, _ATTRIBUTES, _NUM_ATTRIBUTES = 4, 5, 6  # indices of its last 8-byte words

# one CUlaunchAttribute: id, padding, 64 bytes of value
_dependent = np.zeros(18, np.uint32)
_dependent[0], _dependent[2] = _PROGRAMMATIC_STREAM_SERIALIZATION, 1
_dependent_address = address_of(_dependent)


@cache
def library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    library.cuStreamGetCaptureInfo_v2.argtypes = [ctypes.c_void_p] * 6
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


class PreparedLaunch:
    """A launch of a kernel whose only parameter is a struct; prepared once, launched often.

    Args:
        function: its ``CUfunction``.
        grid: CTAs, up to three axes.
        threads: of a CTA.
        smem_nbytes: dynamic shared memory of a CTA.
        parameters: the bytes of the struct, a multiple of 8.

    Attributes:
        words: the struct as 8-byte words, which may be changed between launches. Only one thread at a time may do so.
    """

    __slots__ = ("_arguments", "_config", "_parameters", "words")

    def __init__(
        self, function: int, grid: tuple[int, ...], threads: int, smem_nbytes: int, parameters: bytes
    ) -> None:  # fmt: skip
        self.words = (ctypes.c_int64 * (len(parameters) // 8)).from_buffer_copy(parameters)
        self._parameters = ctypes.c_void_p(ctypes.addressof(self.words))
        x, y, z = (*grid, 1, 1)[:3]
        self._config = _Config.from_buffer_copy(_config.pack(x, y, z, threads, 1, 1, smem_nbytes, 0, 0, 0))
        self._arguments = ctypes.addressof(self._config), function, ctypes.addressof(self._parameters), None

    def run(self, stream: int, dependent: bool) -> None:
        """Launch the kernel on a stream, which is given by its address.

        Args:
            dependent: whether the kernel may begin while the previous one still runs. It must then wait on the device.

        Raises:
            DeviceError: the driver refuses the launch.
        """
        config = self._config
        config[_STREAM] = stream
        config[_ATTRIBUTES], config[_NUM_ATTRIBUTES] = (_dependent_address, 1) if dependent else (0, 0)
        status = library().cuLaunchKernelEx(*self._arguments)
        if status == _INVALID_CONTEXT:  # a thread that has not used CUDA yet
            import cupy

            cupy.cuda.runtime.setDevice(cupy.cuda.runtime.getDevice())
            status = library().cuLaunchKernelEx(*self._arguments)
        if status:
            text = ctypes.c_char_p()
            library().cuGetErrorString(status, ctypes.byref(text))
            said = (text.value or b"unknown").decode()
            x, y, z, threads, _, _, smem_nbytes, *_ = _config.unpack(bytes(config))
            raise DeviceError(
                f"kernel launch: {said} ({status}); grid {x, y, z}, {threads} threads, {smem_nbytes} bytes of shared "
                "memory"
            )
