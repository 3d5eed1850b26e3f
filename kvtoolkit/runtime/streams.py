"""The stream that a call runs on: the caller's current one, read at every call because graph capture changes it."""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kvtoolkit.errors import DeviceError
from kvtoolkit.runtime.driver import library


def current_stream(device: int, from_torch: bool | None = None) -> int:
    """The address of the current stream of a device; 0 is the legacy default stream.

    Args:
        device: CUDA ordinal.
        from_torch: whether torch's or CuPy's current stream is meant. None = torch's if the program uses torch on a
            GPU.
    """
    if from_torch is None:
        torch = sys.modules.get("torch")
        from_torch = torch is not None and torch.cuda.is_initialized()
    if from_torch:
        return _torch_stream()(device)
    import cupy

    return int(cupy.cuda.get_current_stream(device).ptr)


@functools.cache
def _torch_stream() -> Callable[[int], int]:
    import torch

    # what the public call uses, without making its objects
    raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw or (lambda device: int(torch.cuda.current_stream(device).cuda_stream))


def is_capturing(stream: int) -> bool:
    """Whether a stream is being captured into a CUDA graph; nothing may be allocated, loaded or awaited then."""
    if stream == 0:
        return False
    import cupy

    status: Any = cupy.cuda.runtime.streamIsCapturing(stream)
    return bool(status)


def capture_id(stream: int) -> int:
    """The number of the capture that a stream is in. Every capture has its own; 0 = the stream is not captured."""
    if stream == 0:
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    failure = library().cuStreamGetCaptureInfo_v2(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    if failure:
        raise DeviceError(f"cuStreamGetCaptureInfo: expected the state of stream {stream:#x}, got error {failure}")
    return number.value if status.value else 0


class _Foreign:
    """Wraps a stream that is not CuPy's, in the form that CuPy accepts."""

    def __init__(self, ptr: int) -> None:
        self._ptr = ptr

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._ptr


@contextlib.contextmanager
def on_stream(stream: int) -> Iterator[None]:
    """Make a stream, given by its address, CuPy's current one."""
    import cupy

    with cupy.cuda.Stream.from_external(_Foreign(stream)) if stream else cupy.cuda.Stream.null:
        yield


@contextlib.contextmanager
def cupy_on_current_stream(device: int) -> Iterator[Any]:
    """The module CuPy, with `current_stream` of a device as its current stream."""
    import cupy

    with cupy.cuda.Device(device), on_stream(current_stream(device)):
        yield cupy
