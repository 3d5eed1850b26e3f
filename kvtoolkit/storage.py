"""Where the keys and values of a cache lie: in host memory or on a CUDA device, as one array for all layers."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtoolkit.config import CacheConfig
from kvtoolkit.cpu import copy_granules
from kvtoolkit.cpu.arrays import Operand, operand
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.tables import GRANULE

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""What the arrays are made of; bfloat16 as its bits."""


class HostStorage:
    """Keys and values in host memory.

    Attributes:
        key_values: ``[num_layers, 2, num_granules, num_kv_heads, 8, head_dim]``; keys, then values of each layer.
        keys: an `Operand` of each layer's keys; ``values`` alike.
        device: CUDA ordinal; -1 = host.
    """

    device = -1

    def __init__(self, config: CacheConfig) -> None:
        # zeros, not empty: the system hands out zeroed pages only when they are touched
        self.key_values: NDArray[Any] = np.zeros(shape_of(config), DTYPES[config.dtype])
        self.keys = [operand(layer[0], "k_cache", config.dtype) for layer in self.key_values]
        self.values = [operand(layer[1], "v_cache", config.dtype) for layer in self.key_values]

    def copy(self, sources: ArrayLike, targets: ArrayLike) -> None:
        """Copy granules to others, all layers; none is in both lists."""
        copy_granules(self.key_values, sources, targets)

    def read(self, granules: ArrayLike) -> NDArray[Any]:
        """A copy of granules, ``[num_layers, 2, n, num_kv_heads, 8, head_dim]``, in host memory."""
        held: NDArray[Any] = self.key_values[:, :, np.asarray(granules)]
        return held

    def write(self, granules: ArrayLike, key_values: NDArray[Any]) -> None:
        """Fill granules with what `read` gave."""
        self.key_values[:, :, np.asarray(granules)] = key_values

    def sync(self) -> None:
        """Wait until all that was asked is done."""


class DeviceStorage:
    """As `HostStorage`, with ``key_values`` a CuPy array on a device.

    `copy` is asynchronous on the current stream (torch's where torch uses the GPU, else CuPy's); `read` and `write`
    wait. Use one stream, or order several yourself.
    """

    def __init__(self, config: CacheConfig) -> None:
        from kvtoolkit.runtime.kernels import current_device

        try:
            self.device = current_device() if config.device is None else config.device
            import cupy

            count = cupy.cuda.runtime.getDeviceCount()
        except Exception as error:  # no CuPy, no driver, no device
            raise UnsupportedError(
                f"backend: {config.backend!r} needs CuPy and a CUDA device; `kvtoolkit doctor` says what is missing, "
                f"backend='cpu' works everywhere ({error})"
            ) from error
        if self.device >= count:
            raise UnsupportedError(f"device: expected 0 to {count - 1}, got {self.device}")
        shape = shape_of(config)
        with cupy.cuda.Device(self.device):
            self.key_values: Any = cupy.zeros(shape, DTYPES[config.dtype])
            cupy.cuda.runtime.deviceSynchronize()  # other streams may use it from now on
        strides = tuple(stride // self.key_values.itemsize for stride in self.key_values.strides)
        base, half = self.key_values.data.ptr, self.key_values.strides[1]

        def described(layer: int, which: int) -> Operand:
            address = base + (2 * layer + which) * half
            return Operand(address, shape[2:], strides[2:], config.dtype, self.key_values, True, self.device)

        self.keys = [described(layer, 0) for layer in range(config.num_layers)]
        self.values = [described(layer, 1) for layer in range(config.num_layers)]
        arrays = (2 * config.num_layers, *shape[2:])
        self._arena = Operand(base, arrays, strides[1:], config.dtype, self.key_values, True, self.device)

    def copy(self, sources: ArrayLike, targets: ArrayLike) -> None:
        """See `HostStorage.copy`."""
        from kvtoolkit import cuda
        from kvtoolkit.device import using
        from kvtoolkit.runtime import current_stream

        with using(self.device):
            cuda.copy_granules(self._arena, sources, targets, stream=current_stream(self.device))

    def read(self, granules: ArrayLike) -> NDArray[Any]:
        """See `HostStorage.read`."""
        with self._on_current_stream() as cupy:
            held: NDArray[Any] = self.key_values[:, :, cupy.asarray(np.asarray(granules, np.int64))].get()
            return held

    def write(self, granules: ArrayLike, key_values: NDArray[Any]) -> None:
        """See `HostStorage.write`."""
        with self._on_current_stream() as cupy:
            self.key_values[:, :, cupy.asarray(np.asarray(granules, np.int64))] = cupy.asarray(key_values)
            cupy.cuda.get_current_stream().synchronize()

    def sync(self) -> None:
        """See `HostStorage.sync`."""
        with self._on_current_stream() as cupy:
            cupy.cuda.get_current_stream().synchronize()

    def _on_current_stream(self) -> Any:
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        return cupy_on_current_stream(self.device)


Storage = HostStorage | DeviceStorage


def make_storage(config: CacheConfig) -> Storage:
    """The storage that a config asks for; UnsupportedError where its backend cannot work."""
    return HostStorage(config) if config.backend == "cpu" else DeviceStorage(config)


def shape_of(config: CacheConfig) -> tuple[int, ...]:
    """Of ``key_values``."""
    return (config.num_layers, 2, config.tier_granules[0], config.num_kv_heads, GRANULE, config.head_dim)
