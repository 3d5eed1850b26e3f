"""The attention masses of a step of a cache on a device; see `kvtoolkit.cache.layers.layers.MassSum`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.device import device_operand
from kvtoolkit.arrays.host import Operand
from kvtoolkit.runtime.streams import cupy_on_current_stream


class DeviceMassSum:
    """As `MassSum`, with arrays on a device; `mean` waits for it."""

    def __init__(self, batch: int, num_tiles: int, num_kv_heads: int, device: int) -> None:
        self._device = device
        self._count = 0
        with cupy_on_current_stream(device) as cupy:
            self._last: Any = cupy.zeros((batch, num_tiles, num_kv_heads), np.float32)
            self._sum: Any = cupy.zeros((batch, num_tiles, num_kv_heads), np.float32)
        self.operand: Operand = device_operand(self._last, "block_mass")

    def add(self) -> None:
        """See `MassSum.add`; asynchronous on the current stream."""
        with cupy_on_current_stream(self._device):
            self._sum += self._last
        self._count += 1

    @property
    def mean(self) -> NDArray[np.float64] | None:
        """See `MassSum.mean`."""
        if not self._count:
            return None
        with cupy_on_current_stream(self._device):
            summed: NDArray[np.float32] = self._sum.mean(axis=2).get()
        return summed.astype(np.float64) / self._count
