"""Words and their atomics for Numba kernels, as ``kvt/pool/atomic.cuh`` has them for CUDA C++.

Numba's atomics are relaxed, so a fence after one makes it acquire, and a fence before one makes it release. Numba has
no volatile load; a word that others change is read by an atomic that leaves it as it is.
"""

import threading
from typing import Any

import numpy as np

from kvtoolkit.numba.device import SIMULATED, cuda, device

# casts: Numba makes float64 of an int64 and a uint64, so words must only meet words, and numbers only numbers
int32: Any = np.int32
int64: Any = np.int64
uint64: Any = np.uint64
ZERO = uint64(0)
ONE = uint64(1)
LOW_HALF = uint64(0xFFFFFFFF)

if SIMULATED:
    # the simulator's own atomics exclude only calls of the same name, and exist only in the module of the kernel
    _turn = threading.Lock()

    def load_relaxed(array: Any, at: Any) -> Any:
        return array[at]

    def store_relaxed(array: Any, at: Any, value: Any) -> None:
        with _turn:
            array[at] = value

    def fetch_and_acquire(array: Any, at: Any, value: Any) -> Any:
        with _turn:
            old = array[at]
            array[at] = old & value
        return old

    def fetch_or_release(array: Any, at: Any, value: Any) -> Any:
        with _turn:
            old = array[at]
            array[at] = old | value
        return old

    def compare_exchange_acquire(array: Any, at: Any, expected: Any, value: Any) -> Any:
        with _turn:
            old = array[at]
            if old == expected:
                array[at] = value
        return old

    def exchange_acq_rel(array: Any, at: Any, value: Any) -> Any:
        with _turn:
            old = array[at]
            array[at] = value
        return old

    def add_release(array: Any, at: Any, value: Any) -> None:
        with _turn:
            array[at] += value

    def fence_acq_rel() -> None:
        pass

else:

    @device
    def load_relaxed(array: Any, at: Any) -> Any:
        return cuda.atomic.or_(array, at, ZERO)

    @device
    def store_relaxed(array: Any, at: Any, value: Any) -> None:
        cuda.atomic.exch(array, at, value)

    @device
    def fetch_and_acquire(array: Any, at: Any, value: Any) -> Any:
        old = cuda.atomic.and_(array, at, value)
        cuda.threadfence()
        return old

    @device
    def fetch_or_release(array: Any, at: Any, value: Any) -> Any:
        cuda.threadfence()
        return cuda.atomic.or_(array, at, value)

    @device
    def compare_exchange_acquire(array: Any, at: Any, expected: Any, value: Any) -> Any:
        old = cuda.atomic.cas(array, at, expected, value)
        cuda.threadfence()
        return old

    @device
    def exchange_acq_rel(array: Any, at: Any, value: Any) -> Any:
        cuda.threadfence()
        old = cuda.atomic.exch(array, at, value)
        cuda.threadfence()
        return old

    @device
    def add_release(array: Any, at: Any, value: Any) -> None:
        cuda.threadfence()
        cuda.atomic.add(array, at, value)

    @device
    def fence_acq_rel() -> None:
        cuda.threadfence()


@device
def load_acquire(array: Any, at: Any) -> Any:
    value = load_relaxed(array, at)
    fence_acq_rel()
    return value
