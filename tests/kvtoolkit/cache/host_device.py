"""A device made of host memory: what `DeviceSteps` and `GraphStep` use of CuPy, and a cache that seems to be there.

Kernels of ``cuda_src`` run on the host, see `tests.kvtoolkit.cuda.host_kernels`; attention is that of the CPU.
"""

import contextlib
import ctypes
from types import SimpleNamespace

import numpy as np

from kvtoolkit import CacheConfig, KVCache
from kvtoolkit.arrays.host import operand
from kvtoolkit.cache import device_steps
from kvtoolkit.cache.storage.storage import HostStorage
from kvtoolkit.cuda import grow, migrate, reorder
from kvtoolkit.runtime import streams
from tests.kvtoolkit.cuda.host_kernels import on_the_host


class Pointer:
    def __init__(self, ptr):
        self.ptr = ptr

    def __add__(self, offset):
        return Pointer(self.ptr + offset)


class Array(np.ndarray):
    """A NumPy array that has its address where CuPy has it."""

    @property
    def data(self):
        return Pointer(self.ctypes.data)


def _array(shape, dtype, pointer):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_char * size).from_address(pointer.ptr)
    return np.frombuffer(memory, dtype).reshape(shape).view(Array)


def _copy(target, source, nbytes, *_):
    ctypes.memmove(target, source, nbytes)


def _copy_rows(target, target_row, source, source_row, nbytes, rows, *_):
    for i in range(rows):
        ctypes.memmove(target + i * target_row, source + i * source_row, nbytes)


_nothing = SimpleNamespace(ptr=0, synchronize=lambda: None, record=lambda stream: None, done=True)
CUPY = SimpleNamespace(
    zeros=lambda shape, dtype: np.zeros(shape, dtype).view(Array),
    full=lambda shape, value, dtype: np.full(shape, value, dtype).view(Array),
    arange=lambda n, dtype: np.arange(n, dtype=dtype).view(Array),
    asarray=lambda array: array,
    ndarray=_array,
    cuda=SimpleNamespace(
        Event=lambda disable_timing: _nothing,
        get_current_stream=lambda: _nothing,
        alloc_pinned_memory=lambda size: bytearray(size),
        runtime=SimpleNamespace(
            memcpyAsync=_copy, memcpy2DAsync=_copy_rows, memcpyHostToDevice=1, memcpyDeviceToHost=2,
            memcpyDeviceToDevice=3,
            memsetAsync=lambda address, value, nbytes, stream: ctypes.memset(address, value, nbytes),
        ),
    ),
)  # fmt: skip


def use_host(monkeypatch):
    """Let `DeviceSteps` work in host memory."""
    monkeypatch.setattr(streams, "cupy_on_current_stream", lambda device: contextlib.nullcontext(CUPY))
    monkeypatch.setattr(device_steps, "current_stream", lambda device: 0)
    monkeypatch.setattr(device_steps, "using", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(device_steps, "_as_tensor", lambda array: array)
    on_the_host(monkeypatch, grow, migrate, reorder)
    monkeypatch.setattr(HostStorage, "reorder_copy", _reorder_copy, raising=False)
    monkeypatch.setattr(HostStorage, "listed_moves", _listed_moves, raising=False)


def _reorder_copy(storage, *places):
    """What `DeviceStorage.reorder_copy` returns, for a cache on the CPU."""
    keys_and_values = storage.key_values
    arena = operand(keys_and_values.reshape(-1, *keys_and_values.shape[2:]), "arena")
    return reorder.make_reorder_copy(arena, *places)


def _listed_moves(storage, num_moves, demotions, merges):
    """What `DeviceStorage.listed_moves` returns, for a cache on the CPU."""

    def run(stream, *, dependent):
        counts = _array((2,), np.int32, Pointer(num_moves))
        for address, count, move in zip(
            (demotions, merges), counts, (storage.convert_tiles, storage.copy_granules), strict=True
        ):
            if address and count:
                listed = np.asarray(_array((int(count), 2, 8), np.int32, Pointer(address)))
                listed = listed[listed[:, 0, 0] >= 0]
                sources, targets = (np.ascontiguousarray(listed[:, side]) for side in (0, 1))
                if move == storage.copy_granules:
                    sources, targets = sources.ravel(), targets.ravel()
                move(sources, targets)

    return [SimpleNamespace(run=run)]


def make_cache(**options):
    """A cache on the CPU that says it is on a GPU."""
    cache = KVCache(CacheConfig(**{"num_layers": 2, "num_kv_heads": 1, "head_dim": 8, "dtype": "float32"} | options))
    object.__setattr__(cache.config, "backend", "cuda")
    return cache
