"""Copies of superblocks by the copy engines of a device, in one call of the driver.

cuMemcpyBatchAsync, CUDA 12.8 and later: CUDA Driver API, "Memory Management".
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.cuda.copy import Superblocks
from kvtoolkit.errors import DeviceError
from kvtoolkit.runtime.driver import library

_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: sources are read when the stream gets there, not earlier


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int), ("source_hint", ctypes.c_int * 2), ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )  # fmt: skip


_attributes, _first = _Attributes(_STREAM_ORDER), ctypes.c_size_t(0)


def has_batches() -> bool:
    """Whether the driver takes many copies in one call."""
    return _function() is not None


def _function() -> Any:
    driver = library()
    return getattr(driver, "cuMemcpyBatchAsync_v2", None) or getattr(driver, "cuMemcpyBatchAsync", None)


def transfer(held: Superblocks, sources: NDArray[np.int32], targets: NDArray[np.int32], *, stream: int) -> None:
    """Copy superblocks, asynchronously on ``stream``, which is not the legacy default stream.

    Args:
        sources, targets: numbers of superblocks. Where both go up by one, they are copied in one piece.

    Raises:
        DeviceError: the driver refuses the copies; none has been made.
    """
    breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1)) + 1
    begins = np.concatenate([[0], breaks])
    sizes = np.diff(np.concatenate([begins, [len(sources)]])).astype(np.uint64) * np.uint64(held.nbytes)
    arrays = held.address + np.arange(held.num_arrays, dtype=np.uint64)[:, None] * np.uint64(held.stride)
    places = [
        np.ascontiguousarray(arrays + one[begins].astype(np.uint64) * np.uint64(held.nbytes)).ravel()
        for one in (targets, sources)
    ]
    nbytes = np.tile(sizes, held.num_arrays)
    function, failed = _function(), ctypes.c_size_t()
    where = [] if function.__name__.endswith("_v2") else [ctypes.byref(failed)]
    status = function(
        *(ctypes.c_void_p(one.ctypes.data) for one in (*places, nbytes)), ctypes.c_size_t(len(nbytes)),
        ctypes.byref(_attributes), ctypes.byref(_first), ctypes.c_size_t(1), *where, ctypes.c_void_p(stream),
    )  # fmt: skip
    if status:
        raise DeviceError(f"cuMemcpyBatchAsync: expected success for {len(nbytes)} copies, got error {status}")
