"""A pool whose state is on a GPU: running kernels take blocks from it, the host batches and maintains it.

The device side is ``kvt/pool.cuh`` (`kvtoolkit.get_include`), which states the algorithm.
"""

import contextlib
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators.errors import ContendedError, InvalidFreeError, InvalidSizeError
from allocators.lockfree import _fold_all
from allocators.protocol import (
    GRANULE,
    SUPERBLOCK,
    AllocatorBase,
    Int32Array,
    require,
    unpack_snapshot,
)
from kvtoolkit.arrays.types import ArrayLike
from kvtoolkit.cuda.launching import Launch
from kvtoolkit.errors import StepError, UnsupportedError
from kvtoolkit.runtime import load
from kvtoolkit.runtime.kernels import current_device, num_sms
from kvtoolkit.runtime.streams import cupy_on_current_stream
from kvtoolkit.runtime.structs import ParameterStruct

# as in kvt/pool/pool.cuh
_EPOCH = 2
_SIZES = {"buddy": 0, "slab": 4}
_GRANULES_OF_A_WORD = {"buddy": 64, "slab": 32}
_FREE = 16 + 32 * 8
_EPOCHS = 4
_CONTENDED = -4

# of a word of a slab
_ORDER, _SUPERBLOCKS = np.uint64(32), np.uint64(34)
_GRANULE_BITS = np.uint64(0xFFFFFFFF)

_MAX_ATTEMPTS = 1000
_params = ParameterStruct("pool/batch.cu", "kvt_pool_allocate")


def can_be_made() -> bool:
    """Whether there is a CUDA device for a `DevicePool`."""
    try:
        current_device()
    except UnsupportedError:
        return False
    return True


class DevicePool(AllocatorBase):
    """A lock-free pool in the memory of a GPU, for kernels of your own; on the host a `BlockAllocator` like any other.

    Args:
        num_granules: size of the pool, a multiple of 8.
        block_sizes: the sizes on offer to host calls, in tokens.
        layout: ``"buddy"``: freed granules are reusable at once, sizes mix. ``"slab"``: 256 tokens serve one size at a
            time, and a block freed in parts is held (``stats().pinned``) until all of it is free.
        device: CUDA ordinal.

    Attributes:
        memory: uint64 CuPy array, to be handed to kernels: ``kvt::Pool pool{memory}``, of slabs
            ``kvt::SlabPool pool{memory}``. Calls on the wrong one return ``kInvalid``.
        num_words: words of a bitmap of all granules, an even number; 64 granules a word, 32 in slabs.

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

    def __init__(
        self,
        num_granules: int,
        *,
        block_sizes: ArrayLike = (8, 16, 32, 64),
        layout: str = "buddy",
        device: int = 0,
    ) -> None:
        super().__init__(num_granules, block_sizes=block_sizes)
        if layout not in _SIZES:
            raise InvalidSizeError(f"layout: expected 'buddy' or 'slab', got {layout!r}")
        current_device()  # says what is missing
        self.device = device
        self.layout = layout
        self._word = _GRANULES_OF_A_WORD[layout]
        self.num_words = -(-self.num_granules // (2 * self._word)) * 2  # kernels load pairs
        with self._cupy() as cupy:
            currents = 4 * (self.num_words // 32 + 1)
            self.memory: Any = cupy.zeros(_FREE + self.num_words * (2 + _EPOCHS) + currents, cupy.uint64)
        self._epoch = 0
        self._receipts: dict[int, tuple[str, Any, Int32Array]] = {}
        self._reset(self._all_free())

    def journals(self, count: int) -> Any:
        """``[count, num_words]`` uint64 zeros on the device: journals of ``kvt::PoolLease``."""
        with self._cupy() as cupy:
            return cupy.zeros((count, self.num_words), cupy.uint64)

    def return_share(self) -> None:
        """Let kernels have all free granules: those too that the host keeps for the steps of a cache.

        A cache keeps at most an eighth of a pool with ``layout="buddy"``, and takes more when it needs some again.
        """

    def _bits(self, granules: NDArray[np.bool_]) -> NDArray[np.uint64]:
        """``[num_words]`` from whether each granule is meant."""
        whole = np.zeros(self.num_words * self._word, np.bool_)
        whole[: len(granules)] = granules
        packed = np.packbits(whole, bitorder="little")
        return packed.view(np.uint64 if self._word == 64 else np.uint32).astype(np.uint64)

    def _words_with(self, free: NDArray[np.bool_], orders: int | NDArray[np.int_] = 0) -> NDArray[np.uint64]:
        """Free words in which these granules are free; ``orders``, of slabs: those that words serve."""
        words = self._bits(free)
        if self.layout == "slab":
            first = np.arange(self.num_words) * self._word
            superblocks = np.clip(self.num_granules - first, 0, self._word) // SUPERBLOCK
            words |= superblocks.astype(np.uint64) << _SUPERBLOCKS
            words |= np.asarray(orders).astype(np.uint64) << _ORDER
        return words

    def _all_free(self) -> NDArray[np.uint64]:
        return self._words_with(np.ones(self.num_granules, np.bool_))

    def _reset(self, free: NDArray[np.uint64], limbo: NDArray[np.uint64] | None = None) -> None:
        """Write all of the state: the free words, and the limbo of each epoch if there is something in it."""
        state = np.zeros(self.memory.size, np.uint64)
        sizes = _SIZES[self.layout]
        state[sizes], state[sizes + 1], state[_EPOCH] = self.num_granules, self.num_words, self._epoch
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

    # -- what `AllocatorBase` asks for -------------------------------------------------------------------------------

    def _allocate(self, sizes: Int32Array, starts: Int32Array, partial: bool) -> int:
        if not len(sizes):
            return 0
        for _ in range(_MAX_ATTEMPTS):
            found, (granted, code) = self._run("kvt_pool_allocate", 1, 32, starts, sizes, len(sizes), partial)
            if code != _CONTENDED:
                starts[:] = found
                return int(granted)
            if partial:
                DevicePool._free(self, found[:granted], sizes[:granted])  # not what a subclass makes of it
        raise ContendedError(
            f"asked for {len(sizes)} blocks while kernels kept freeing, undecided after {_MAX_ATTEMPTS} attempts"
        )

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
            self._receipts[threading.get_ident()] = name, batch, sizes
            result, first = batch.data.ptr, batch.data.ptr + 8
            parameters = _params.pack(self.memory.data.ptr, first, first + 4 * len(starts), result, count, int(partial))
            kernel = load("pool/batch.cu", name, {"KVT_SLAB": int(self.layout == "slab")}, self.device)
            Launch(kernel, (ctas,), threads, 0, parameters).run(cupy.cuda.get_current_stream().ptr)
            found = batch.get()
        return found[2 : 2 + len(starts)], found[:2]

    def forget_receipt(self) -> None:
        """Before a call that may be interrupted: have `receipt` speak of that call alone."""
        self._receipts.pop(threading.get_ident(), None)

    def receipt(self, thread: int) -> tuple[Int32Array, Int32Array, bool] | None:
        """What the last host call of a thread came to, also where it was interrupted before it returned.

        Waits for the device. Kernels take blocks too, so the pool cannot be rebuilt from what the host knows.

        Returns:
            ``(starts, sizes, are_live)``: runs, and whether that call has left them live; None if it launched nothing.
        """
        name, batch, sizes = self._receipts.get(thread, ("", None, np.empty(0, np.int32)))
        if batch is None:
            return None
        with self._cupy() as cupy:
            cupy.cuda.runtime.deviceSynchronize()
            found: Int32Array = batch.get()
        starts = found[2 : 2 + len(sizes)]
        if name == "kvt_pool_allocate":
            return starts[: found[0]], sizes[: found[0]], True
        return starts, sizes, int(found[0]) != -1

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
        free = self._free_words()
        if self.layout == "slab":  # which order a word served last means nothing once it is wholly free
            free = np.where(_is_whole(free), free & ~(np.uint64(3) << _ORDER), free)
        return {"free": free, "limbo": limbo, "epoch": np.array([self._epoch])}

    def taken(self) -> NDArray[np.bool_]:
        """``[num_granules]`` which granules are live or in limbo; waits for the device."""
        words = self._free_words()
        words = words if self.layout == "buddy" else words.astype(np.uint32)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self.num_granules]
        taken: NDArray[np.bool_] = bits == 0
        return taken

    def unit_sizes(self, granules: Int32Array) -> Int32Array:
        """See `BlockAllocator.unit_sizes`; waits for the device if the pool has slabs."""
        if self.layout == "buddy":
            return super().unit_sizes(granules)
        orders = (self._free_words()[granules // self._word] >> _ORDER) & np.uint64(3)
        return np.left_shift(1, orders.astype(np.int32), dtype=np.int32)

    def resume(self, live: NDArray[np.bool_]) -> None:
        """Make exactly these granules live; only for a pool that nobody has used yet."""
        orders: int | NDArray[np.int_] = 0
        if self.layout == "slab":
            offered = [(size // GRANULE).bit_length() - 1 for size in self.block_sizes]
            words = np.zeros(self.num_words * self._word, np.bool_)
            words[: len(live)] = live
            orders = np.full(self.num_words, offered[0])
            for order in offered:  # the largest whose slots are live or dead as a whole
                live_in_slot = words.reshape(self.num_words, -1, 1 << order).sum(axis=2)
                orders[(live_in_slot % (1 << order) == 0).all(axis=1)] = order
            orders[~words.reshape(self.num_words, -1).any(axis=1)] = 0
        with self._lock:
            self._reset(self._words_with(~live, orders))

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"layout": self.layout}

    def restore(self, data: bytes) -> None:
        arrays = unpack_snapshot(data, self._identity(), self._state())
        with self._lock:
            self._epoch = int(arrays["epoch"][0])
            self._reset(arrays["free"], arrays["limbo"])

    def _invalid_free(self, start: int, size: int, index: int) -> InvalidFreeError:
        self._taken = np.bitwise_or.reduce([self._free_words(), *(self._limbo(epoch) for epoch in range(_EPOCHS))])
        return super()._invalid_free(start, size, index)

    def _is_live(self, granule: int) -> bool:
        """The number that `_invalid_free` saw last."""
        return not int(self._taken[granule // self._word]) >> (granule % self._word) & 1

    def _set_granules(self) -> int:
        """Granules that are not live and not in limbo: free, or held back in a slab."""
        free = self._free_words()
        return int(np.bitwise_count(free if self.layout == "buddy" else free & _GRANULE_BITS).sum())

    def _num_free_unlocked(self) -> int:
        if self.layout == "buddy":
            return self._set_granules()
        words = self._free_words()
        orders = words >> _ORDER & np.uint64(3)
        granules = [
            np.where(orders == order, np.bitwise_count(_fold_all(words & _GRANULE_BITS, order)).astype(int) << order, 0)
            for order in range(4)
        ]
        whole = np.where(_is_whole(words), np.bitwise_count(words & _GRANULE_BITS), 0)
        return int(np.where(_is_whole(words), whole, sum(granules)).sum())

    def _pinned_unlocked(self) -> int:
        return self._set_granules() - self._num_free_unlocked()

    def _largest_free_unlocked(self) -> int:
        return max((size // GRANULE for size, count in self._free_blocks_unlocked().items() if count), default=0)

    def _free_blocks_unlocked(self) -> dict[int, int]:
        words, blocks = self._free_words(), {}
        for size in self.block_sizes:
            order = (size // GRANULE).bit_length() - 1
            if self.layout == "buddy":
                runs = _fold_all(words, order)
            else:
                serves = _is_whole(words) | (words >> _ORDER & np.uint64(3) == order)
                runs = np.where(serves, _fold_all(words & _GRANULE_BITS, order), np.uint64(0))
            blocks[size] = int(np.bitwise_count(runs).sum())
        return blocks

    def _metadata_nbytes(self) -> int:
        return int(self.memory.nbytes)

    def check_integrity(self) -> None:
        with self._lock:
            words, valid = self._free_words(), self._bits(np.ones(self.num_granules, np.bool_))
            free = words if self.layout == "buddy" else words & _GRANULE_BITS
            limbo = [self._limbo(epoch) for epoch in range(_EPOCHS)]
            together = free.copy()
            for bits in limbo:
                require(not np.any(together & bits), "device: a granule is free and in limbo, or in limbo twice")
                together |= bits
            require(not np.any(together & ~valid), "device: a bit lies beyond the pool")
            require(not self._words(1 + _EPOCHS).any(), "device: a mark of a batch was left")
            with self._cupy():
                head = self.memory[:8].get().tolist()
            expected = [0] * 8
            sizes = _SIZES[self.layout]
            expected[sizes : sizes + 2], expected[_EPOCH] = [self.num_granules, self.num_words], self._epoch
            require(head == expected, f"device: expected the header {expected}, found {head}")
            if self.layout == "slab":
                existing = words >> _SUPERBLOCKS == self._all_free() >> _SUPERBLOCKS
                require(bool(existing.all()), "device: a slab has lost count of its superblocks")


def _is_whole(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether all of a slab is free, so that it serves any order."""
    whole = (np.uint64(1) << (words >> _SUPERBLOCKS) * np.uint64(SUPERBLOCK)) - np.uint64(1)
    found: NDArray[np.bool_] = words & _GRANULE_BITS == whole
    return found
