"""The attention masses of a step: which share of the attention each tile got, summed over the layers."""

import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.backends import BACKENDS
from kvtoolkit.runtime.streams import cupy_on_current_stream


class MassSum:
    """The attention masses of a step's tiles, summed over the layers that have attended.

    On a device everything but `mean`, which waits, is asynchronous on the current stream.

    Args:
        batch: rows.
        num_tiles: of the longest of them.
        num_kv_heads: of the cache.
        backend: name of the cache's backend.
        device: CUDA ordinal; -1 = host memory.
        keeps_peaks: whether `peaks` are wanted, too.
    """

    def __init__(
        self, batch: int, num_tiles: int, num_kv_heads: int, backend: str, device: int, *, keeps_peaks: bool = False
    ) -> None:  # fmt: skip
        self._device = device
        self._count = 0
        shape = (batch, num_tiles, num_kv_heads)
        with self._library() as library:
            self._last: Any = library.zeros(shape, np.float32)
            # on a device the heads are averaged at the end, because a kernel for each layer would cost more
            self._sum: Any = library.zeros(shape, np.float32) if device >= 0 else np.zeros(shape[:2])
            self._peaks: Any = library.zeros(shape, np.float32) if keeps_peaks else None
        self.operand = BACKENDS[backend].describe(self._last, "block_mass")
        """Where the next layer writes its masses; `add` has them counted."""

    def add(self) -> None:
        """Count what a layer has written."""
        with self._library() as library:
            self._sum += self._last if self._device >= 0 else self._last.mean(axis=2)
            if self._peaks is not None:
                library.maximum(self._peaks, self._last, out=self._peaks)
        self._count += 1

    @property
    def mean(self) -> NDArray[np.float64] | None:
        """``[batch, num_tiles]`` mean over layers and kv heads; None if no layer has attended."""
        if not self._count:
            return None
        summed = self._sum
        if self._device >= 0:
            with self._library():
                summed = summed.mean(axis=2).get().astype(np.float64)
        found: NDArray[np.float64] = summed / self._count
        return found

    @property
    def peaks(self) -> NDArray[np.float64]:
        """``[batch, num_tiles]`` the greatest of all layers and kv heads; waits."""
        with self._library():
            greatest = self._peaks.max(axis=2)
            found: NDArray[np.float64] = (greatest.get() if self._device >= 0 else greatest).astype(np.float64)
        return found

    def _library(self) -> contextlib.AbstractContextManager[Any]:
        """NumPy, or CuPy on the current stream of the device."""
        return cupy_on_current_stream(self._device) if self._device >= 0 else contextlib.nullcontext(np)
