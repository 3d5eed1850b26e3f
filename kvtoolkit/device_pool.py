"""A pool whose state lies on a GPU: running kernels take blocks from it, the host batches and maintains it.

The device side is ``kvt/pool.cuh`` (`kvtoolkit.get_include`), which states the algorithm. Layout ``buddy``.
"""

import contextlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators.errors import ContendedError, InvalidFreeError
from allocators.lockfree import _fold_all
from allocators.protocol import (
    GRANULE,
    HostAllocator,
    Int32Array,
    require,
    unpack_snapshot,
)
from kvtoolkit.cuda.launching import Launch
from kvtoolkit.errors import StepError
from kvtoolkit.runtime import load
from kvtoolkit.runtime.kernels import current_device, num_sms, packer
from kvtoolkit.runtime.streams import cupy_on_current_stream

# as in pool.cuh
_GRANULES, _WORDS, _EPOCH = range(3)
_FREE = 16 + 32 * 8
_EPOCHS = 4
_CONTENDED = -4

_WORD = 64
_params = packer("4q2i")


class DevicePool(HostAllocator):
    """A lock-free pool in the memory of a GPU, for kernels of your own; on the host a `BlockAllocator` like any other.

    Args:
        num_granules: size of the pool, a multiple of 8.
        block_sizes: the sizes on offer to host calls, in tokens.
        device: CUDA ordinal.

    Attributes:
        memory: uint64 CuPy array, to be handed to kernels: ``kvt::Pool pool{memory}``.
        num_words: 64-bit words of a bitmap of all granules, an even number.

    Host calls launch a kernel on the current stream and wait for it, so they cannot be captured in a CUDA graph, as
    kernels that use the pool can. A host call and kernels on other streams may overlap, and a block goes to one owner
    alone; what the host frees must not be freed by a kernel at the same time. Batches are placed the same way whenever
    they meet the same pool. `snapshot`, `restore`, `stats` and `check_integrity` want a quiet pool.

    Epochs, for blocks that other kernels may still read: kernels ``retire`` into the current one. Call `advance`
    between steps, and ``complete(e)`` where the last kernel of epoch e has ended or comes before on the stream. Up
    to 4 epochs may hold blocks.

    Raises:
        UnsupportedError: no CUDA device, or no CuPy.
    """

    kind = "device"

    def __init__(self, num_granules: int, *, block_sizes: ArrayLike = (8, 16, 32, 64), device: int = 0) -> None:
        super().__init__(num_granules, block_sizes=block_sizes)
        current_device()  # says what is missing
        self.device = device
        self.num_words = -(-self.num_granules // (2 * _WORD)) * 2  # kernels load pairs
        with self._cupy() as cupy:
            self.memory: Any = cupy.zeros(_FREE + self.num_words * (2 + _EPOCHS), cupy.uint64)
        self._epoch = 0
        self._reset(self._all_free())

    def journals(self, count: int) -> Any:
        """``[count, num_words]`` uint64 zeros on the device: journals of ``kvt::PoolLease``."""
        with self._cupy() as cupy:
            return cupy.zeros((count, self.num_words), cupy.uint64)

    def _all_free(self) -> NDArray[np.uint64]:
        valid = np.arange(self.num_words * _WORD) < self.num_granules
        return np.packbits(valid, bitorder="little").view(np.uint64)

    def _reset(self, free: NDArray[np.uint64], limbo: NDArray[np.uint64] | None = None) -> None:
        """Write all of the state: the free words, and the limbo of each epoch if there is something in it."""
        state = np.zeros(self.memory.size, np.uint64)
        state[_GRANULES], state[_WORDS], state[_EPOCH] = self.num_granules, self.num_words, self._epoch
        state[_FREE : _FREE + self.num_words] = free
        if limbo is not None:
            state[_FREE + self.num_words : _FREE + (1 + _EPOCHS) * self.num_words] = limbo.reshape(-1)
        with self._cupy() as cupy:
            self.memory.set(state)
            cupy.cuda.get_current_stream().synchronize()  # any stream may use it from now on

    # -- epochs ------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that kernels launched from now on retire into."""
        return self._epoch

    def advance(self) -> int:
        """Begin the next epoch, for all kernels that are launched from now on; waits for it; returns its number.

        Raises:
            StepError: the limbo it would use still holds blocks of the epoch 4 before it; `complete` that one first.
        """
        with self._lock:
            if self._limbo(self._epoch + 1).any():
                raise StepError(
                    f"advance: expected epoch {self._epoch + 1 - _EPOCHS} to be complete before epoch "
                    f"{self._epoch + 1} begins, got granules that are still in its limbo"
                )
            self._epoch += 1
            with self._cupy() as cupy:
                self.memory[_EPOCH] = self._epoch
                cupy.cuda.get_current_stream().synchronize()
            return self._epoch

    def complete(self, epoch: int) -> None:
        """Free what was retired in an epoch: every kernel that may read it has ended, or comes before on the stream."""
        if not self._epoch - _EPOCHS < epoch <= self._epoch:
            raise StepError(f"epoch: expected one of the last {_EPOCHS}, up to {self._epoch}, got {epoch}")
        with self._lock:
            self._run("kvt_pool_complete", max(1, min(num_sms(self.device), self.num_words // 256)), 256, count=epoch)

    @property
    def num_in_limbo(self) -> int:
        """Granules retired and not freed yet, in all epochs."""
        with self._lock:
            return sum(int(np.bitwise_count(self._limbo(epoch)).sum()) for epoch in range(_EPOCHS))

    # -- what `HostAllocator` asks for -------------------------------------------------------------------------------

    def _allocate(self, sizes: Int32Array, starts: Int32Array, partial: bool) -> int:
        if not len(sizes):
            return 0
        found, (granted, code) = self._run("kvt_pool_allocate", 1, 32, starts, sizes, len(sizes), partial)
        if code == _CONTENDED:
            if partial:
                self._free(found[:granted], sizes[:granted])
            raise ContendedError(f"asked for {len(sizes)} blocks while kernels kept freeing; ask again")
        starts[:] = found
        return int(granted)

    def _free(self, starts: Int32Array, sizes: Int32Array) -> int:
        if not len(starts):
            return -1
        _, result = self._run("kvt_pool_free", 1, 1024, starts, sizes, len(starts))
        return int(result[0])

    def _run(
        self, name: str, ctas: int, threads: int, starts: Int32Array | None = None, sizes: Int32Array | None = None,
        count: int = 0, partial: bool = False,
    ) -> tuple[Int32Array, Int32Array]:  # fmt: skip
        """Run a kernel of ``pool/batch.cu``; returns ``starts`` and ``result``."""
        if starts is None or sizes is None:
            starts = sizes = np.empty(0, np.int32)
        with self._cupy() as cupy:
            batch = cupy.asarray(np.concatenate([np.zeros(2, np.int32), starts, sizes]))
            result, first = batch.data.ptr, batch.data.ptr + 8
            parameters = _params.pack(self.memory.data.ptr, first, first + 4 * len(starts), result, count, int(partial))
            kernel = load("pool/batch.cu", name, {}, self.device)
            Launch(kernel, (ctas,), threads, 0, parameters).run(cupy.cuda.get_current_stream().ptr)
            found = batch.get()
        return found[2 : 2 + len(starts)], found[:2]

    def _cupy(self) -> contextlib.AbstractContextManager[Any]:
        return cupy_on_current_stream(self.device)

    def _words(self, bitmap: int) -> NDArray[np.uint64]:
        begin = _FREE + bitmap * self.num_words
        with self._cupy():
            words: NDArray[np.uint64] = self.memory[begin : begin + self.num_words].get()
        return words

    def _free_words(self) -> NDArray[np.uint64]:
        return self._words(0)

    def _limbo(self, epoch: int) -> NDArray[np.uint64]:
        return self._words(1 + epoch % _EPOCHS)

    def _state(self) -> dict[str, NDArray[Any]]:
        """A copy."""
        limbo = np.stack([self._limbo(epoch) for epoch in range(_EPOCHS)])
        return {"free": self._free_words(), "limbo": limbo, "epoch": np.array([self._epoch])}

    def restore(self, data: bytes) -> None:
        arrays = unpack_snapshot(data, self._identity(), self._state())
        with self._lock:
            self._epoch = int(arrays["epoch"][0])
            self._reset(arrays["free"], arrays["limbo"])

    def _invalid_free(self, start: int, size: int, index: int) -> InvalidFreeError:
        self._taken = np.bitwise_or.reduce([self._free_words(), *(self._limbo(epoch) for epoch in range(_EPOCHS))])
        return super()._invalid_free(start, size, index)

    def _is_live(self, granule: int) -> bool:
        """As `_invalid_free` last saw it."""
        return not int(self._taken[granule // _WORD]) >> (granule % _WORD) & 1

    def _num_free_unlocked(self) -> int:
        return int(np.bitwise_count(self._free_words()).sum())

    def _largest_free_unlocked(self) -> int:
        return max((size // GRANULE for size, count in self._free_blocks_unlocked().items() if count), default=0)

    def _free_blocks_unlocked(self) -> dict[int, int]:
        free = self._free_words()
        return {
            size: int(np.bitwise_count(_fold_all(free, (size // GRANULE).bit_length() - 1)).sum())
            for size in self.block_sizes
        }

    def _metadata_nbytes(self) -> int:
        return int(self.memory.nbytes)

    def check_integrity(self) -> None:
        with self._lock:
            free, valid = self._free_words(), self._all_free()
            limbo = [self._limbo(epoch) for epoch in range(_EPOCHS)]
            together = free.copy()
            for words in limbo:
                require(not np.any(together & words), "device: a granule is free and in limbo, or in limbo twice")
                together |= words
            require(not np.any(together & ~valid), "device: a bit lies beyond the pool")
            require(not self._words(1 + _EPOCHS).any(), "device: a mark of a batch was left")
            with self._cupy():
                head = self.memory[:3].get().tolist()
            require(head == [self.num_granules, self.num_words, self._epoch], f"device: damaged header {head}")
