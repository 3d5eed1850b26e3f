"""What a turn of the device leaves for the host: in one piece of memory, so that one copy brings all of it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Shapes = dict[str, tuple[tuple[int, ...], Any]]
"""The shape and the NumPy dtype of each array, by name."""
_ALIGNMENT = 256  # bytes


class TurnMemory:
    """Arrays on a device that can be copied to the host together, or the first of them alone.

    Args:
        shapes: the arrays, in their order.
        first_cleared, end_cleared: `clear` begins with the former, and ends before the latter.
        end_polled: what comes before it can be copied alone.
        cupy: with the device.

    Attributes:
        arrays: on the device, by name.
    """

    def __init__(self, shapes: Shapes, first_cleared: str, end_cleared: str, end_polled: str, cupy: Any) -> None:
        self._shapes, self._places, end = shapes, {}, 0
        for name, (shape, dtype) in shapes.items():
            self._places[name] = end
            end += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        self._cleared = self._places[first_cleared], self._places[end_cleared]
        self._memory = cupy.zeros(end, np.uint8)
        self.arrays: dict[str, Any] = {
            name: cupy.ndarray(shape, dtype, self._memory.data + self._places[name])
            for name, (shape, dtype) in shapes.items()
        }
        self._all, self._polled = (
            np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
            for size in (end, self._places[end_polled])
        )

    def clear(self, cupy: Any) -> None:
        """Set some arrays to 0, asynchronously."""
        (begin, end), stream = self._cleared, cupy.cuda.get_current_stream().ptr
        cupy.cuda.runtime.memsetAsync(self._memory.data.ptr + begin, 0, end - begin, stream)

    def copy(self, cupy: Any, arrival: Any, *, is_poll: bool) -> None:
        """Copy all arrays, or those to poll, to the host, asynchronously; ``arrival`` is recorded behind the copy."""
        to, stream = self._polled if is_poll else self._all, cupy.cuda.get_current_stream()
        runtime = cupy.cuda.runtime
        kind = runtime.memcpyDeviceToHost
        runtime.memcpyAsync(to.ctypes.data, self._memory.data.ptr, to.nbytes, kind, stream.ptr)
        arrival.record(stream)

    def found(self, *, is_poll: bool) -> dict[str, NDArray[Any]]:
        """The arrays as they have arrived; the next copy of the same kind overwrites them."""
        memory, arrays = self._polled if is_poll else self._all, {}
        for name, (shape, dtype) in self._shapes.items():
            place, nbytes = self._places[name], int(np.prod(shape)) * np.dtype(dtype).itemsize
            if place < len(memory) or not is_poll:
                arrays[name] = memory[place : place + nbytes].view(dtype).reshape(shape)
        return arrays
