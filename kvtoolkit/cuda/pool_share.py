"""A pool on a GPU of which the host keeps a share, so that a cache seldom waits for the device.

    held[g]   the host has taken granule g out of the pool: it is free in the share, or the cache has it
    free in the share <= held;   no granule that is held is free in the pool

The cache takes its blocks from the share and frees them into it. Free granules count as free wherever they are. Blocks
of callers and of kernels never pass through the share, because kernels may free them in the pool.
"""

import contextlib
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators._calls import is_on_stack
from allocators._jit import jit
from allocators.buddy import BuddyAllocator, _set_mask
from allocators.errors import ContendedError
from allocators.lockfree import LockFreeAllocator
from allocators.protocol import GRANULE, BlockAllocator, Int32Array, require
from kvtoolkit.cuda.pool import DevicePool
from kvtoolkit.errors import BusyError
from kvtoolkit.runtime.streams import current_stream

_AHEAD = 128
"""How many calls like the one that found the share too small it is filled for."""
_PARTS = 8
"""A share of more than one part in so many of the pool gives back half of that."""


def lockfree(num_granules: int, *, device: int | None = None, layout: str = "buddy", **options: Any) -> BlockAllocator:
    """What the name ``lockfree`` makes: with a ``device`` a pool there, else `LockFreeAllocator` on the host.

    A cache on a GPU gives its own device, so that running kernels can take blocks of its pool. A slab serves one size,
    which a share of free granules would have to know; so pools of slabs have none.
    """
    if device is None:
        return LockFreeAllocator(num_granules, layout=layout, **options)
    if layout == "buddy":
        return PoolWithShare(num_granules, device=device, **options)
    return DevicePool(num_granules, device=device, layout=layout, **options)


class HostShare(BuddyAllocator):
    """The free granules that the host keeps: a buddy allocator for which all others are live."""

    def __init__(self, num_granules: int, *, block_sizes: Any) -> None:
        super().__init__(num_granules, block_sizes=block_sizes)
        self._starts, self._sizes = np.empty((2, num_granules // 2), np.int32)  # scratch: no pool has more runs
        self.set_runs(*self.runs(num_granules), are_free=False)

    @property
    def num_free(self) -> int:
        return self._num_free_unlocked()  # the pool's lock covers it

    @property
    def free_flags(self) -> NDArray[np.bool_]:
        """``[num_granules]`` a copy."""
        return np.unpackbits(self._pool.masks, bitorder="little").view(np.bool_)

    def set_free(self, free: NDArray[np.bool_]) -> None:
        """Keep exactly these granules."""
        self._rebuild(~free)

    def set_runs(self, starts: Int32Array, sizes: Int32Array, *, are_free: bool) -> None:
        """Make runs free or live, whatever their granules have been."""
        _set_runs(self._pool, starts, sizes, are_free)

    def runs(self, count: int) -> tuple[Int32Array, Int32Array]:
        """Starts and sizes of runs of at least ``count`` free granules, or all: whole superblocks first."""
        number = _list_runs(self._pool.masks, count, self._starts, self._sizes)
        return self._starts[:number].copy(), self._sizes[:number].copy()

    def words(self, num_words: int) -> NDArray[np.uint64]:
        """``[num_words]`` the bits of free granules, 64 a word."""
        words = np.zeros(num_words, np.uint64)
        words.view(np.uint8)[: len(self._pool.masks)] = self._pool.masks
        return words


class PoolWithShare(DevicePool):
    """A `DevicePool` for a cache, which calls `take` and `give_back` and waits for the device only now and then.

    Everybody else finds a `DevicePool`, except that kernels miss what the share has: at most an eighth of the pool.
    `return_share` gives them all of it. A host call that finds too little in the pool returns the share by itself.

    A call may break off while blocks move between the pool and the share. The next call then asks the pool's receipt
    what was done, and makes the share fit it. All of that can be done again, so it may break off, too.
    """

    def __init__(self, num_granules: int, **options: Any) -> None:
        super().__init__(num_granules, **options)
        self.held: NDArray[np.bool_] = np.zeros(self.num_granules, np.bool_)
        self.share = HostShare(self.num_granules, block_sizes=self.block_sizes)
        self._sizes_descending = [size // GRANULE for size in reversed(self.block_sizes)]
        self._mover: int | None = None  # the thread that moves blocks between the pool and the share, or broke off
        self._num_in_pool: int | None = None  # granules free there, where that has not changed since the host looked
        self._streams: set[int] = set()  # on which earlier kernels may still read what is free in the share

    # -- what the cache calls ----------------------------------------------------------------------------------------

    @property
    def num_known_free(self) -> int:
        """Granules that are free as far as the host knows: kernels may have taken or freed some since it looked."""
        with self._lock:
            if self._num_in_pool is None:
                self._free_words()
            assert self._num_in_pool is not None
            return self._num_in_pool + self.share.num_free

    def take(self, sizes: Int32Array) -> Int32Array:
        """Take blocks for the cache, in the order asked for; -1 from the first that does not fit."""
        wanted = self._wanted(sizes)
        starts = np.empty(len(wanted), np.int32)
        with self._lock:
            if self._mover is not None:
                self._enter()
            count = self.share._allocate(wanted, starts, True)
            if count < len(wanted) and self._fetch(wanted[count:]):
                count += self.share._allocate(wanted[count:], starts[count:], True)
            if count < len(wanted):
                # of a run that is free the share may have one part, and the pool the other
                self.return_share()
                starts[count:] = self._pop(wanted[count:])
                self._num_in_pool = None  # if kernels have freed much since the host looked, the next call shall see it
        return starts

    def give_back(self, starts: Int32Array, sizes: Int32Array) -> None:
        """Free runs of the cache. Kernels can take them once the share has given them back to the pool.

        Raises:
            InvalidFreeError: a granule is free already.
        """
        with self._lock:
            if self._mover is not None:
                self._enter()
            self._streams.add(current_stream(self.device))
            bad = self.share._free(starts, sizes)
            if bad >= 0:
                raise self.share._invalid_free(int(starts[bad]), int(sizes[bad]), bad)
            most = self.num_granules // _PARTS
            if self.share.num_free > most:
                self._push(self.share.num_free - most // 2)

    def settle(self, live: NDArray[np.bool_]) -> int:
        """After a call of the cache broke off, keep as free all that is held and not ``live``.

        Returns how many granules that made free.
        """
        with self._lock:
            self._recover()
            self._streams.add(current_stream(self.device))
            before = self.share.num_free
            self.share.set_free(self.held & ~live)
            return max(0, self.share.num_free - before)

    def hold(self, live: NDArray[np.bool_]) -> None:
        """Let the cache have exactly these granules, which are live in the pool, and the share nothing."""
        with self._lock:
            self._mover = None
            self.held[:] = live
            self.share.set_free(np.zeros(self.num_granules, np.bool_))

    # -- between the pool and the share ------------------------------------------------------------------------------

    def return_share(self) -> None:
        """Give back to the pool all that the share has, so that kernels can take it; waits for the device."""
        with self._lock:
            self._enter()
            if self.share.num_free:
                self._push(self.share.num_free)

    def _fetch(self, wanted: Int32Array) -> bool:
        """Take blocks for many calls like this one, if the pool has plenty; returns whether the share has grown."""
        missing = int(wanted.sum())
        in_pool, room = self.num_known_free - self.share.num_free, self.num_granules // _PARTS - self.share.num_free
        ahead = min(_AHEAD * missing, room, (in_pool - missing) // 4)
        if ahead <= 0:
            return False
        left = missing = missing + ahead
        for size in self._sizes_descending:
            if size < wanted[0] or left <= 0:  # smaller ones would be of no use to this call
                break
            sizes = np.full(-(-left // size), size, np.int32)
            with contextlib.suppress(ContendedError):  # if need be, the call itself meets it
                starts = self._pop(sizes)
                granted = starts >= 0
                self.share._free(starts[granted], sizes[granted])
                left -= size * int(np.count_nonzero(granted))
        return left < missing

    def _pop(self, sizes: Int32Array) -> Int32Array:
        """Take blocks out of the pool itself, in order, -1 from the first that does not fit."""
        starts = np.empty(len(sizes), np.int32)
        in_pool = self._num_in_pool
        self._begin_move()
        count = super()._allocate(sizes, starts, True)
        granules = _granules_of(starts[:count], sizes[:count])
        self.held[granules] = True
        if in_pool is not None and count == len(sizes):  # else kernels have taken what the host believed to be there
            self._num_in_pool = in_pool - len(granules)
        self._mover = None
        return starts

    def _push(self, count: int) -> None:
        """Free about so many granules in the pool itself, after all that was launched before the cache freed them."""
        starts, sizes = self.share.runs(count)
        if self._streams - {current_stream(self.device)}:  # the pool's kernel waits for its own stream alone
            with self._cupy() as cupy:
                cupy.cuda.runtime.deviceSynchronize()
        self._begin_move()
        bad = super()._free(starts, sizes)
        if bad >= 0:
            raise self._invalid_free(int(starts[bad]), int(sizes[bad]), bad)
        self._note_moved(starts, sizes, are_held=False)
        self._streams = {current_stream(self.device)} if self.share.num_free else set()
        self._mover = None

    def _begin_move(self) -> None:
        super().forget_receipt()  # from here on it speaks of this move
        self._num_in_pool = None
        self._mover = threading.get_ident()

    def _note_moved(self, starts: Int32Array, sizes: Int32Array, *, are_held: bool) -> None:
        """Note that runs are free in the share, or in the pool. Doing it again changes nothing."""
        self.held[_granules_of(starts, sizes)] = are_held
        self.share.set_runs(starts, sizes, are_free=are_held)

    def _enter(self) -> None:
        """Before anything changes: finish what a call that broke off has left; BusyError if it is still under way."""
        self._recover()
        if self._mover is not None:
            raise BusyError(
                "pool: expected no other call of this thread under way, got one from inside it (from a signal handler "
                "or a finalizer)"
            )

    def _recover(self) -> None:
        """Note what a move that broke off has done. Nothing is done while a move of this thread is under way."""
        if self._mover is None:
            return
        with self._lock:  # so that no other thread's move is under way
            if self._mover is None or self._is_moving():
                return
            receipt = self.receipt(self._mover)
            if receipt is not None:
                starts, sizes, are_held = receipt
                self._note_moved(starts, sizes, are_held=are_held)
            self._num_in_pool = self._mover = None

    def _is_moving(self) -> bool:
        """Whether a move of this pool is on this thread's stack."""
        return is_on_stack(sys._getframe(1), _MOVES, "self", self)

    # -- what callers and kernels see --------------------------------------------------------------------------------

    def _allocate(self, sizes: Int32Array, starts: Int32Array, partial: bool) -> int:
        self._enter()
        self._num_in_pool = None
        count = super()._allocate(sizes, starts, partial)
        if count < len(sizes) and self.share.num_free:
            self.return_share()
            self._num_in_pool = None
            count += super()._allocate(sizes[count:], starts[count:], partial)
        return count

    def _free(self, starts: Int32Array, sizes: Int32Array) -> int:
        self._enter()
        self._num_in_pool = None
        bad = self._first_held(starts, sizes)
        return bad if bad >= 0 else super()._free(starts, sizes)

    def _first_held(self, starts: Int32Array, sizes: Int32Array) -> int:
        """Index of the first run with a granule of the share or of the cache, or -1."""
        if not self.held.any():
            return -1
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.held)])
        first, size = starts.astype(np.int64), sizes.astype(np.int64)
        is_inside = (first >= 0) & (size >= 1) & (first + size <= self.num_granules)
        first, end = np.where(is_inside, first, 0), np.where(is_inside, first + size, 0)
        found = np.flatnonzero(before[end] > before[first])
        return int(found[0]) if len(found) else -1

    def _is_live(self, granule: int) -> bool:
        return super()._is_live(granule) and not self.held[granule]

    def _free_words(self) -> NDArray[np.uint64]:
        """Those of the pool, with what the share has."""
        with self._lock:
            self._recover()
            words = super()._free_words()
            self._num_in_pool = int(np.bitwise_count(words).sum())
            return words | self.share.words(self.num_words)

    def complete(self, epoch: int) -> None:
        with self._lock:
            self._enter()
            self._num_in_pool = None
            super().complete(epoch)

    def forget_receipt(self) -> None:
        self._recover()  # which may still need it
        super().forget_receipt()

    def restore(self, data: bytes) -> None:
        with self._lock:
            self.return_share()
            super().restore(data)
            self._num_in_pool = None
            self.held &= self.taken()

    def resume(self, live: NDArray[np.bool_]) -> None:
        with self._lock:
            super().resume(live)
            self._num_in_pool = None
            self.hold(live)

    def check_integrity(self) -> None:
        with self._lock:
            super().check_integrity()
            self.share.check_integrity()
            require(not (self.share.free_flags & ~self.held).any(), "device: the share has a granule that is not held")
            words = DevicePool._free_words(self)
            held = self._bits(self.held)
            require(not (held & words).any(), "device: a granule that the host holds is free in the pool")


_MOVES = (PoolWithShare._pop.__code__, PoolWithShare._push.__code__)


@jit
def _set_runs(pool: Any, starts: Int32Array, sizes: Int32Array, are_free: bool) -> None:
    for i in range(len(starts)):
        granule, end = starts[i], starts[i] + sizes[i]
        while granule < end:
            first = granule & 7
            count = min(8 - first, end - granule)
            bits, mask = ((1 << count) - 1) << first, pool.masks[granule >> 3]
            _set_mask(pool, granule >> 3, mask | bits if are_free else mask & ~bits & 0xFF)
            granule += count


@jit
def _list_runs(masks: NDArray[np.uint8], count: int, starts: Int32Array, sizes: Int32Array) -> Any:
    """List runs until they have ``count`` granules; returns their number."""
    number, total = 0, 0
    for are_whole in (True, False):
        for i in range(len(masks)):
            mask = masks[i]
            if total >= count or mask == 0 or (mask == 0xFF) != are_whole:
                continue
            for granule in range(8 * i, 8 * i + 8):
                if mask >> (granule & 7) & 1:
                    if number > 0 and starts[number - 1] + sizes[number - 1] == granule:
                        sizes[number - 1] += 1
                    else:
                        starts[number], sizes[number] = granule, 1
                        number += 1
                    total += 1
    return number


def _granules_of(starts: Int32Array, sizes: Int32Array) -> NDArray[np.int64]:
    """The granules of runs, one after another."""
    ends = np.cumsum(sizes, dtype=np.int64)
    granules: NDArray[np.int64] = np.arange(int(sizes.sum())) + np.repeat(starts - (ends - sizes), sizes)
    return granules
