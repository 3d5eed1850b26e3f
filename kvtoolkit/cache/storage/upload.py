"""Uploads the arrays of a step to the device, by one asynchronous copy."""

import itertools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.errors import UnsupportedError

_SLOTS = 4  # uploads that may be under way before the host waits
_ALIGNMENT = 256  # of each array: whole cache lines


class DeviceTables(NamedTuple):
    """The arrays of a step, as CuPy arrays on the device; see `kvtoolkit.Step`."""

    block_table: Any
    """``[batch, width]`` int32 entries"""
    block_starts: Any
    """``[batch, width]`` int32"""
    seq_lens: Any
    """``[batch]`` int32"""
    cu_seqlens_q: Any
    """``[batch + 1]`` int32"""
    slot_mapping: Any
    """``[num_tokens]`` int64"""


class PinnedRing:
    """Pinned buffers for copies to the device. A buffer is reused once the copy out of it is done."""

    def __init__(self) -> None:
        self._pinned: list[Any] = [None] * _SLOTS
        self._done: list[Any] = [None] * _SLOTS
        self._turn = 0

    def copy(self, cupy: Any, moves: list[tuple[NDArray[Any], Any]]) -> None:
        """Copy host arrays to CuPy arrays on CuPy's current stream, asynchronously.

        Args:
            moves: ``(source, target)`` of the same dtype. A target with two axes may be larger; then its first rows and
                columns are written.
        """
        offsets, end = _layout([source for source, _ in moves])
        pinned = self._take(cupy, end)
        runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream()
        for (source, target), offset in zip(moves, offsets, strict=True):
            if not source.size:
                continue
            _fill(pinned, offset, source)
            address, row = pinned.ctypes.data + offset, source.shape[-1] * source.itemsize
            if source.shape == target.shape:
                runtime.memcpyAsync(target.data.ptr, address, source.nbytes, runtime.memcpyHostToDevice, stream.ptr)
            else:
                runtime.memcpy2DAsync(
                    target.data.ptr, target.strides[0], address, row, row, len(source), runtime.memcpyHostToDevice,
                    stream.ptr,
                )  # fmt: skip
        self._give_back(stream)

    def upload(self, cupy: Any, arrays: Sequence[NDArray[Any]]) -> list[Any]:
        """New CuPy arrays with the contents of host arrays, by one copy on CuPy's current stream."""
        offsets, end = _layout(arrays)
        pinned = self._take(cupy, end)
        for array, offset in zip(arrays, offsets, strict=True):
            _fill(pinned, offset, array)
        memory = cupy.empty(max(end, 1), np.uint8)
        stream = cupy.cuda.get_current_stream()
        kind = cupy.cuda.runtime.memcpyHostToDevice
        cupy.cuda.runtime.memcpyAsync(memory.data.ptr, pinned.ctypes.data, end, kind, stream.ptr)
        self._give_back(stream)
        return [
            cupy.ndarray(array.shape, array.dtype, memory.data + offset)
            for array, offset in zip(arrays, offsets, strict=True)
        ]

    def _take(self, cupy: Any, nbytes: int) -> NDArray[np.uint8]:
        """A pinned buffer that no copy reads any more."""
        from kvtoolkit.runtime import is_capturing

        if is_capturing(cupy.cuda.get_current_stream().ptr):
            raise UnsupportedError(
                "tables of a step: expected them to be on the device before a CUDA graph is captured, which would copy "
                "the same ones at every replay; see GraphStep"
            )
        turn = self._turn
        if self._done[turn] is None:
            self._done[turn] = cupy.cuda.Event(disable_timing=True)
        else:
            self._done[turn].synchronize()
        buffer = self._pinned[turn]
        if buffer is None or buffer.nbytes < nbytes:
            size = 1 << max(16, (nbytes - 1).bit_length())
            buffer = self._pinned[turn] = np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
        taken: NDArray[np.uint8] = buffer
        return taken

    def _give_back(self, stream: Any) -> None:
        self._done[self._turn].record(stream)
        self._turn = (self._turn + 1) % _SLOTS


def _layout(arrays: Sequence[NDArray[Any]]) -> tuple[list[int], int]:
    """Where each array begins in a buffer, and the buffer's size."""
    offsets, end = [], 0
    for array in arrays:
        offsets.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _fill(buffer: NDArray[np.uint8], offset: int, array: NDArray[Any]) -> None:
    np.copyto(buffer[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape), array)


class Upload:
    """Copies the arrays of steps to a device, through pinned memory, on the current stream.

    The device memory of a step comes from CuPy's pool, which reuses it in stream order. Thread-safe.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._ring = PinnedRing()
        self._lock = threading.Lock()  # steps of one cache may be open in several threads

    def __call__(self, *arrays: NDArray[Any]) -> DeviceTables:
        """The arrays, in the order of `DeviceTables`, on the device."""
        return self.all([arrays])[0]

    def all(self, tables: Sequence[Sequence[NDArray[Any]]]) -> list[DeviceTables]:
        """The arrays of several groups of layers, each in the order of `DeviceTables`, by one copy."""
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        with self._lock, cupy_on_current_stream(self._device) as cupy:
            arrays = iter(self._ring.upload(cupy, [array for one in tables for array in one]))
        return [DeviceTables(*itertools.islice(arrays, len(one))) for one in tables]

    def one(self, array: NDArray[Any]) -> Any:
        """One array, on the device."""
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        with self._lock, cupy_on_current_stream(self._device) as cupy:
            return self._ring.upload(cupy, [array])[0]


def make_upload(backend: str, device: int) -> Upload | None:
    """The `Upload` of a backend; None on the CPU."""
    return None if backend == "cpu" else Upload(device)
