"""A record of what the allocators of a cache have granted, granule by granule, so that no call can lose blocks.

    granted[g]  the cache has it: rows hold it, it is cached or in the reserve, or a call under way has just got it
    callers[g]  somebody took it from `KVCache.allocator`, and the cache leaves it alone
    never both;  granted + callers == what is live in the allocator, except what kernels took from a pool on a device

If a call breaks off, granules may be granted that nothing in the cache refers to; `settle` frees them. If it breaks off
inside an allocator, nobody knows whether that has done its work, so the allocator is rebuilt.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators import BlockAllocator, EpochPool, InvalidFreeError
from allocators._jit import jit
from allocators.protocol import AllocatorBase, runs_of
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state.prefix_index import pools_of
from kvtoolkit.config.tiers import POOL_NAMES
from kvtoolkit.cuda.pool import DevicePool
from kvtoolkit.cuda.pool_share import PoolWithShare
from kvtoolkit.errors import CacheSnapshotError, ConfigError

Flags = NDArray[np.bool_]

_NOBODY = -1
# what may be wrong with a block that an allocator has granted
_OK, _OUTSIDE, _MISALIGNED, _HELD, _TWICE, _AFTER_REFUSAL = range(6)


class Ledger:
    """The record of what the allocators of all pools have granted.

    Granule numbers count through the pools; inside an allocator they begin at 0.

    Attributes:
        allocators: of each pool, in the order of `kvtoolkit.config.tiers.POOL_NAMES`; None if there is no such pool.
        left: granules that a call which broke off has left, and that an allocator has refused to free so far.
        unresolved: a sentence for each call that broke off inside an allocator which cannot be rebuilt.
    """

    def __init__(self, allocators: list[BlockAllocator | None], first: tuple[int, ...], num_granules: int) -> None:
        self.allocators = allocators
        self.first = first
        self.granted = np.zeros(num_granules, np.bool_)
        self.callers = np.zeros(num_granules, np.bool_)
        self.left = np.empty(0, np.int32)
        self.unresolved: list[str] = []
        self._asked = _NOBODY  # the pool whose allocator a call is in, or broke off in
        self._asked_by = 0  # the thread that called it
        self._kept_its_word = False  # whether it raised an Exception, which by its protocol changes nothing
        self._freeing: tuple[Int32Array, Int32Array] | None = None
        self._run_starts = np.empty(num_granules, np.int32)
        self._run_sizes = np.empty(num_granules, np.int32)

    def take(self, pool: int, sizes: ArrayLike, *, partial: bool = True) -> Int32Array:
        """Take blocks of a pool, numbered through the pools; with ``partial``, -1 from the first that does not fit.

        Raises:
            ConfigError: the allocator has granted something that it must not.
            OutOfBlocksError: not ``partial``, and they do not all fit.
        """
        allocator, wanted = self._of(pool), np.array(sizes, np.int32)
        self._freeing, self._kept_its_word = None, False
        self._ask(pool, allocator)
        try:
            if isinstance(allocator, PoolWithShare) and partial:
                answer = allocator.take(wanted)
            else:
                answer = allocator.allocate(wanted.copy(), partial=partial)  # a plug-in may sort what it is given
        except Exception:
            self._kept_its_word = True
            raise
        starts = self._note(pool, allocator, wanted, answer)
        self._asked = _NOBODY
        return starts

    def _ask(self, pool: int, allocator: BlockAllocator) -> None:
        """Note that a call enters an allocator: if it breaks off, that may have happened inside."""
        if isinstance(allocator, DevicePool):
            allocator.forget_receipt()
        self._asked_by = threading.get_ident()
        self._asked = pool

    def _note(self, pool: int, allocator: BlockAllocator, sizes: Int32Array, answer: Int32Array) -> Int32Array:
        """Note what an allocator has granted; returns it numbered through the pools. ConfigError if that cannot be."""
        name = type(allocator).__name__
        if not (isinstance(answer, np.ndarray) and answer.dtype == np.int32 and answer.shape == sizes.shape):
            raise ConfigError(
                f"allocator: expected {name}.allocate to return [{sizes.size}] int32 starts, got {answer!r:.80}"
            )
        first = self.first[pool]
        # a copy, because a plug-in may keep and change its answer
        starts = np.where(answer == -1, answer, answer + np.int32(first)).astype(np.int32)
        code, i = _note_granted(self.granted, self.callers, first, allocator.num_granules, starts, sizes)
        if code:
            problem = {
                _OUTSIDE: "outside the pool",
                _MISALIGNED: f"no multiple of {sizes[i]}",
                _HELD: "held by the cache or a caller already",
                _TWICE: "granted twice in one call",
                _AFTER_REFUSAL: "granted after a size that did not fit",
            }[code]
            raise ConfigError(
                f"allocator: expected {name}.allocate to return free blocks, got {sizes[i]} granules at {answer[i]}, "
                f"{problem}; `kvtoolkit fuzz` tests an allocator"
            )
        return starts

    def give_back(self, listed: Int32Array) -> None:
        """Free granules of any pools."""
        if len(self.granted) == self.num_of(0):
            self._give_back(0, listed)
            return
        pools = pools_of(self.first, listed)
        for pool, allocator in enumerate(self.allocators):
            if allocator is not None and len(own := listed[pools == pool]):
                self._give_back(pool, own)

    def _give_back(self, pool: int, listed: Int32Array) -> None:
        count = coalesce(listed, len(listed), self._run_starts, self._run_sizes)
        starts, sizes = self._run_starts[:count], self._run_sizes[:count]
        own = starts - np.int32(self.first[pool]) if pool else starts
        allocator = self._of(pool)
        self._freeing, self._kept_its_word = (starts, sizes), False
        self._ask(pool, allocator)
        try:
            if isinstance(allocator, PoolWithShare):
                allocator.give_back(own, sizes)
            else:
                allocator.free(own, sizes)
        except Exception:
            self._kept_its_word = True
            raise
        _set(self.granted, starts, sizes, False)
        self._asked = _NOBODY

    def lend(self, starts: Int32Array, sizes: Int32Array) -> None:
        """Hand hot blocks that were just taken to a caller."""
        move(self.granted, self.callers, starts, sizes)

    def take_back(self, starts: Int32Array, sizes: Int32Array) -> int:
        """Undo `lend` for any runs. Returns -1 or, with nothing done, the index of a run that is not all a caller's."""
        return int(move(self.callers, self.granted, starts, sizes))

    def unit_sizes(self, granules: Int32Array) -> Int32Array:
        """`BlockAllocator.unit_sizes` for granules of any pools that the cache has."""
        sizes = np.ones(len(granules), np.int32)
        pools = pools_of(self.first, granules)
        for pool, allocator in enumerate(self.allocators):
            own = pools == pool
            if self.frees_singly(pool) or allocator is None or not own.any():
                continue
            count = int(np.count_nonzero(own))
            answer = allocator.unit_sizes(granules[own] - np.int32(self.first[pool]))
            fits = isinstance(answer, np.ndarray) and answer.shape == (count,) and np.isin(answer, (1, 2, 4, 8)).all()
            if not fits:
                raise ConfigError(
                    f"allocator: expected {type(allocator).__name__}.unit_sizes to return [{count}] of 1, 2, 4, 8, got "
                    f"{answer!r:.80}"
                )
            sizes[own] = answer
        return sizes

    def frees_singly(self, pool: int) -> bool:
        """Whether the allocator of a pool can grant each freed granule again, whatever else of its block is free."""
        method = getattr(type(self.allocators[pool]), "unit_sizes", BlockAllocator.unit_sizes)
        return method is BlockAllocator.unit_sizes

    def settle(self, owned: Flags) -> int:
        """After a call broke off, free all that is granted but not owned; returns how many granules that were.

        If an allocator refuses to free some, they are offered to it again the next time.
        """
        num_freed = 0
        if self._asked != _NOBODY:
            num_freed = self._settle_asked(self._asked, owned)
            self._asked, self._kept_its_word = _NOBODY, False
        self.left = np.flatnonzero(self.granted & ~owned).astype(np.int32)
        return num_freed + self.free_left()

    def free_left(self) -> int:
        """Free what calls that broke off have left, as far as the allocators accept it."""
        left, num_freed = self.left, 0
        for pool, allocator in enumerate(self.allocators):
            if allocator is not None:
                mine = left[(left >= self.first[pool]) & (left < self.first[pool] + allocator.num_granules)]
                num_freed += self._free_left(pool, mine)
        self.left = left[self.granted[left]]
        return num_freed

    def _settle_asked(self, pool: int, owned: Flags) -> int:
        """Rebuild an allocator in which a call broke off, if that is possible, so that just what is owned is granted.

        Returns how many more granules are free afterwards.
        """
        allocator, own = self._of(pool), self._slice(pool)
        if isinstance(allocator, PoolWithShare):
            num_freed = allocator.settle(owned[own] | self.callers[own])
            self.granted[own] = owned[own]
            return num_freed
        if isinstance(allocator, DevicePool):
            receipt = allocator.receipt(self._asked_by)
            if receipt is not None:
                starts, sizes, are_live = receipt
                _set(self.granted, starts + np.int32(self.first[pool]), sizes, are_live)
            return 0
        try:
            starts, sizes = runs_of(owned[own] | self.callers[own])
            num_free = allocator.num_free
            allocator.rebuild(starts, sizes)
            self.granted[own] = owned[own]
            return max(0, allocator.num_free - num_free)
        except Exception:  # it cannot, or fails to
            if not self._kept_its_word:
                self._give_up(pool, allocator, owned)
            return 0

    def _give_up(self, pool: int, allocator: BlockAllocator, owned: Flags) -> None:
        """Record that nobody can know what an allocator did in the call that broke off."""
        what = "allocate: blocks that it granted may be lost"
        if self._freeing is not None:
            starts, sizes = self._freeing
            _set(self.granted, starts, sizes, False)
            self.granted |= owned
            what = f"free: {int(sizes.sum())} granules may be lost"
        self.unresolved.append(
            f"{type(allocator).__name__} of the {POOL_NAMES[pool]} tier cannot be rebuilt and was interrupted inside "
            f"{what}"
        )

    def _free_left(self, pool: int, left: Int32Array) -> int:
        if not len(left):
            return 0
        try:
            self._give_back(pool, left)
        except InvalidFreeError:  # some are free already, so free each run by itself
            return sum(self._free_run(pool, start, size) for start, size in zip(*runs_of_list(left), strict=True))
        except Exception:
            return 0
        return len(left)

    def _free_run(self, pool: int, start: int, size: int) -> int:
        run = np.arange(start, start + size, dtype=np.int32)
        try:
            self._give_back(pool, run)
        except InvalidFreeError:
            _set(self.granted, run[:1], np.array([size], np.int32), False)
        except Exception:
            return 0
        return size

    def snapshots(self) -> dict[str, NDArray[Any]]:
        """What a snapshot needs besides ``granted`` and ``callers`` to restore the allocators."""
        arrays: dict[str, NDArray[Any]] = {}
        for pool, allocator in enumerate(self.allocators):
            if allocator is None or _is_rebuilt(allocator):
                continue
            arrays[f"allocator.{pool}"] = np.frombuffer(allocator.snapshot(), np.uint8)
            if isinstance(allocator, DevicePool):
                own = self._slice(pool)
                arrays[f"kernels.{pool}"] = np.flatnonzero(
                    allocator.taken() & ~self.granted[own] & ~self.callers[own]
                ).astype(np.int64)
        return arrays

    def resume(self, owned: Flags, arrays: dict[str, NDArray[Any]]) -> None:
        """Bring fresh allocators to the state in which what is owned, and what callers have, is granted.

        Raises:
            CacheSnapshotError: an allocator can neither be rebuilt nor restored from what `snapshots` returned, or
                kernels held blocks when the snapshot was taken and this is no pool on a device.
        """
        for pool, allocator in enumerate(self.allocators):
            if allocator is None:
                continue
            own = self._slice(pool)
            live = owned[own] | self.callers[own]
            state, held = arrays.get(f"allocator.{pool}"), arrays.get(f"kernels.{pool}")
            num_held = 0 if held is None else len(held)
            if num_held and not isinstance(allocator, DevicePool):
                raise CacheSnapshotError(
                    f"snapshot: expected a pool on a device, since kernels hold {num_held} granules, got {allocator!r}"
                )
            if _is_rebuilt(allocator):
                allocator.rebuild(*runs_of(live))
            elif isinstance(allocator, DevicePool) and not num_held:
                allocator.resume(live)
            else:
                self._restore(pool, allocator, state, live)
            self.granted[own] = owned[own]

    def _restore(self, pool: int, allocator: BlockAllocator, state: NDArray[Any] | None, live: Flags) -> None:
        if state is None:
            raise CacheSnapshotError(
                f"snapshot: expected one taken with {type(allocator).__name__}, since it cannot be rebuilt"
            )
        allocator.restore(state.tobytes())
        allocator.check_integrity()
        if isinstance(allocator, DevicePool):
            fits = not (live & ~allocator.taken()).any()
        else:
            fits = allocator.stats().num_live == int(live.sum())
        if isinstance(allocator, PoolWithShare):
            allocator.hold(live)
        if not fits:
            raise CacheSnapshotError(
                f"snapshot: expected the {POOL_NAMES[pool]} allocator to have granted what is held"
            )

    def num_of(self, pool: int) -> int:
        """Granules of a pool."""
        allocator = self.allocators[pool]
        return 0 if allocator is None else allocator.num_granules

    def _slice(self, pool: int) -> slice:
        return slice(self.first[pool], self.first[pool] + self.num_of(pool))

    def _of(self, pool: int) -> BlockAllocator:
        allocator = self.allocators[pool]
        assert allocator is not None
        return allocator


def _is_rebuilt(allocator: BlockAllocator) -> bool:
    """Whether an allocator can be restored from the granules that are live in it."""
    if isinstance(allocator, DevicePool | EpochPool):
        return False
    rebuild = getattr(type(allocator), "rebuild", BlockAllocator.rebuild)
    if rebuild is AllocatorBase.rebuild and isinstance(allocator, AllocatorBase):
        return type(allocator)._rebuild is not AllocatorBase._rebuild
    return rebuild is not BlockAllocator.rebuild


def require_allocator(allocator: BlockAllocator, num_granules: int, block_sizes: tuple[int, ...]) -> None:
    """ConfigError unless a new allocator has this size, is wholly free, and offers some of the block sizes."""
    name = type(allocator).__name__
    figures = {"num_granules": allocator.num_granules, "num_free of a fresh one": allocator.num_free}
    for what, got in figures.items():
        if isinstance(got, bool) or not isinstance(got, int | np.integer) or got != num_granules:
            raise ConfigError(f"allocator: expected {name} to have {what} {num_granules}, got {got!r:.80}")
    sizes: Any = allocator.block_sizes
    if not isinstance(sizes, tuple | list) or not sizes or not set(sizes) <= set(block_sizes):
        expected = ", ".join(map(str, block_sizes))
        raise ConfigError(f"allocator: expected {name} to have block_sizes among {expected}, got {sizes!r:.80}")


def runs_of_list(listed: Int32Array) -> tuple[list[int], list[int]]:
    """The maximal runs in an ascending list of granules, as starts and sizes."""
    breaks = np.flatnonzero(np.diff(listed) != 1) + 1
    pieces = np.split(listed, breaks)
    return [int(piece[0]) for piece in pieces], [len(piece) for piece in pieces]


@jit
def _note_granted(granted: Flags, callers: Flags, first: int, count: int, starts: Int32Array, sizes: Int32Array) -> Any:
    """Note blocks as granted, up to the first -1; returns ``(_OK, 0)``, or what is wrong with which block."""
    for i in range(len(starts)):
        start, size = starts[i], sizes[i]
        if start == -1:
            for k in range(i, len(starts)):
                if starts[k] != -1:
                    return _AFTER_REFUSAL, k
            return _OK, 0
        if start < first or start > first + count - size:
            return _OUTSIDE, i
        if start & (min(size, 8) - 1) != 0:
            return _MISALIGNED, i
        for granule in range(start, start + size):
            if granted[granule] or callers[granule]:
                for k in range(i):
                    if starts[k] <= granule and granule < starts[k] + sizes[k]:
                        return _TWICE, i
                return _HELD, i
        for granule in range(start, start + size):
            granted[granule] = True
    return _OK, 0


@jit
def move(source: Flags, target: Flags, starts: Int32Array, sizes: Int32Array) -> Any:
    """Move runs from one set to another, and return -1; or the first run that is not wholly in it. Skips starts < 0."""
    for i in range(len(starts)):
        fits = starts[i] < 0 or (sizes[i] >= 1 and starts[i] + sizes[i] <= len(source))
        for granule in range(starts[i], starts[i] + sizes[i] if fits and starts[i] >= 0 else starts[i]):
            fits = fits and source[granule]
        if fits and starts[i] >= 0:
            for granule in range(starts[i], starts[i] + sizes[i]):
                source[granule] = False  # so that a run that overlaps it is noticed
        if not fits:
            for k in range(i):
                for granule in range(starts[k], starts[k] + sizes[k] if starts[k] >= 0 else starts[k]):
                    source[granule] = True
            return i
    for i in range(len(starts)):
        for granule in range(starts[i], starts[i] + sizes[i] if starts[i] >= 0 else starts[i]):
            target[granule] = True
    return -1


@jit
def _set(granted: Flags, starts: Int32Array, sizes: Int32Array, value: bool) -> None:
    for i in range(len(starts)):
        for granule in range(starts[i], starts[i] + sizes[i]):
            granted[granule] = value


@jit
def coalesce(freed: Int32Array, count: int, starts: Int32Array, sizes: Int32Array) -> Any:
    """Join neighbours in a list of granules into runs; returns how many there are."""
    num_runs = 0
    for i in range(count):
        granule = freed[i]
        if num_runs > 0 and granule == starts[num_runs - 1] - 1:
            starts[num_runs - 1] = granule
            sizes[num_runs - 1] += 1
        elif num_runs > 0 and granule == starts[num_runs - 1] + sizes[num_runs - 1]:
            sizes[num_runs - 1] += 1
        else:
            starts[num_runs], sizes[num_runs] = granule, 1
            num_runs += 1
    return num_runs
