"""Epochs and leases around any allocator: blocks that kernels may still read, and blocks for futures that may not come.

    free + live + limbo + leased (+ pinned) == num_granules

`EpochPool.free` is for blocks that no kernel can still read. `EpochPool.retire` is for the others: it puts them into
the *limbo* of the current epoch, and `complete` frees them once every kernel of that epoch has finished. A `Lease` is a
journal of blocks taken ahead, for beams or draft tokens: `commit` keeps them, `abort` frees them at once.

Source: epoch-based reclamation, Fraser 2004 (Practical lock-freedom, sec. 5.2.3), with launches in place of threads.
"""

import contextlib
import weakref
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators._calls import Calls, exclusive, exclusive_or_later
from allocators._jit import jit
from allocators.errors import (
    AllocatorError,
    BusyError,
    InvalidFreeError,
    InvalidSizeError,
    LeaseError,
    SnapshotError,
    UnknownStreamError,
)
from allocators.protocol import (
    AllocatorStats,
    BlockAllocator,
    Int32Array,
    as_counts,
    live_granules,
    pack_snapshot,
    require,
    runs_of,
    unpack_snapshot,
)

_NONE, _LIVE, _LIMBO, _LEASED = 0, 1, 2, 3
_SEEN = 4  # a flag: this call has named the granule
_STATE_NAMES = ("free", "live", "in limbo", "leased")

Runs = tuple[Int32Array, Int32Array]


class EpochPool(BlockAllocator):
    """An allocator with limbo and leases; itself a `BlockAllocator`.

    Args:
        inner: the allocator that owns the granules. Nobody else may use it.
        streams: names of the streams whose kernels read the pool. An epoch is complete when all of them have said so.

    Thread-safe (one lock). Adds one byte per granule. After a call was interrupted, the next call makes sure that it
    has either happened or not, by `rebuild` of the inner pool. If the inner pool cannot be rebuilt, a free is
    completed, but what an interrupted `allocate` was granted stays live in the inner pool, and `check_integrity`
    reports that.
    """

    def __init__(self, inner: BlockAllocator, *, streams: Iterable[Hashable] = ("default",)) -> None:
        if not hasattr(inner, "num_free") or not hasattr(inner, "allocate"):
            raise InvalidSizeError(f"inner: expected an allocator, got {inner!r}")
        if inner.num_free != inner.num_granules:
            raise InvalidSizeError(
                f"inner: expected a pool with nothing handed out, got {inner.num_free} of {inner.num_granules} free"
            )
        self.inner = inner
        self.num_granules = inner.num_granules
        self.block_sizes = inner.block_sizes
        self._calls = Calls(self, EpochPool._settle, EpochPool._abort_lost, BusyError, (AllocatorError,))
        self._freeing: Runs | None = None  # what the inner pool is being asked to free
        self._states = np.zeros(inner.num_granules, np.uint8)
        self._limbo: dict[int, list[Runs]] = {}
        self._epoch = 0
        self._is_behind = False  # whether a complete epoch still has limbo because the inner pool raised
        self._completed: dict[Hashable, int] = dict.fromkeys(streams, -1)
        self._leases: dict[int, _Journal] = {}
        self._next_lease = 0
        if not self._completed:
            raise InvalidSizeError("streams: expected at least one")

    # -- the protocol ------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return self.inner.num_free

    @property
    def largest_free(self) -> int:
        return self.inner.largest_free

    @exclusive
    def allocate(self, sizes: ArrayLike, *, partial: bool = False) -> Int32Array:
        return self._take(as_counts(sizes, "sizes"), partial, _LIVE)

    @exclusive
    def free(self, starts: ArrayLike, sizes: ArrayLike) -> None:
        """Free live runs that no kernel can still read. Raises like `BlockAllocator.free`, also for leased blocks."""
        self._give_back(self._checked((starts, sizes), _LIVE))

    def unit_sizes(self, granules: Int32Array) -> Int32Array:
        return self.inner.unit_sizes(granules)

    @exclusive
    def rebuild(self, starts: ArrayLike, sizes: ArrayLike) -> None:
        """See `BlockAllocator.rebuild`. Granules in limbo or leases stay there; runs must not overlap them."""
        live = live_granules(as_counts(starts, "starts"), as_counts(sizes, "sizes"), self.num_granules)
        is_held = (self._states == _LIMBO) | (self._states == _LEASED)
        if (live & is_held).any():
            raise InvalidSizeError(f"runs: granule {int(np.argmax(live & is_held))} is in limbo or leased")
        self.inner.rebuild(*runs_of(live | is_held))
        self._states[:] = np.where(live, _LIVE, np.where(is_held, self._states, _NONE))

    @exclusive
    def stats(self) -> AllocatorStats:
        """Figures of the inner pool; its live granules include those in limbo and leased."""
        return self.inner.stats()

    @exclusive
    def check_integrity(self) -> None:
        self.inner.check_integrity()
        stats = self.inner.stats()
        owned = int(np.count_nonzero(self._states))
        require(owned == stats.num_live, f"epochs: {owned} granules owned here, {stats.num_live} live inside")
        limbo = sum(int(sizes.sum()) for runs in self._limbo.values() for _, sizes in runs)
        require(limbo == self.num_in_limbo, f"epochs: {limbo} granules listed in limbo, {self.num_in_limbo} marked")
        leased = sum(int(journal.runs[1].sum()) for journal in self._leases.values())
        require(leased == self.num_leased, f"epochs: {leased} granules listed in leases, {self.num_leased} marked")
        is_emptied = all(epoch > self._oldest_complete() for epoch in self._limbo)
        require(is_emptied or self._is_behind, "epochs: a complete epoch has limbo")

    # -- epochs ------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The current epoch, which `retire` would return now."""
        return self._epoch

    @property
    def streams(self) -> tuple[Hashable, ...]:
        """The streams that must report `complete`."""
        return tuple(self._completed)

    @property
    def num_in_limbo(self) -> int:
        """Granules that are retired and not freed yet."""
        return int(np.count_nonzero(self._states == _LIMBO))

    @property
    def num_leased(self) -> int:
        """Granules in leases that have not ended."""
        return int(np.count_nonzero(self._states == _LEASED))

    @exclusive
    def advance(self) -> int:
        """Begin the next epoch, for example before the launch of the next step; returns its number."""
        self._epoch += 1
        return self._epoch

    @exclusive
    def register_stream(self, stream: Hashable) -> None:
        """Add a stream that must report `complete` too, for the current epoch and later ones."""
        try:
            self._completed.setdefault(stream, self._epoch - 1)
        except TypeError as error:
            raise UnknownStreamError(f"stream: expected something hashable, got {stream!r}") from error

    @exclusive
    def retire(self, starts: ArrayLike, sizes: ArrayLike) -> int:
        """Put live runs into the limbo of the current epoch; they are reusable once it is `complete`.

        Returns:
            The epoch.

        Raises:
            InvalidFreeError: see `free`.
        """
        runs = self._checked((starts, sizes), _LIVE)
        if len(runs[0]):
            self._limbo.setdefault(self._epoch, []).append(runs)
        _mark(self._states, *runs, _LIMBO)
        return self._epoch

    @exclusive
    def complete(self, epoch: int, stream: Hashable | None = None) -> None:
        """Report that every kernel of ``epoch`` and of earlier epochs has finished.

        Args:
            epoch: at most the current one. Completing the current epoch begins the next.
            stream: the stream whose kernels have finished; None for all of them.

        Raises:
            InvalidSizeError: the epoch has not begun.
            UnknownStreamError: the stream is not registered.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int | np.integer) or not 0 <= epoch <= self._epoch:
            raise InvalidSizeError(f"epoch: expected an int from 0 to the current one, {self._epoch}, got {epoch!r}")
        if stream is not None and stream not in list(self._completed):
            raise UnknownStreamError(f"stream: expected one of {list(self._completed)}, got {stream!r}")
        for name in self._completed if stream is None else (stream,):
            self._completed[name] = max(self._completed[name], int(epoch))
        self._epoch = max(self._epoch, int(epoch) + 1)
        self._empty_limbo()

    def _empty_limbo(self) -> None:
        """Free what is in the limbo of complete epochs; what cannot be freed stays there."""
        self._is_behind = True
        done = self._oldest_complete()
        for past in sorted(past for past in self._limbo if past <= done):
            listed = self._limbo[past]
            while listed:
                self._give_back(listed[-1])
                listed.pop()
            del self._limbo[past]
        self._is_behind = False

    def _oldest_complete(self) -> int:
        return min(self._completed.values())

    # -- leases ------------------------------------------------------------------------------------------------------

    @exclusive
    def lease(self, sizes: ArrayLike) -> "Lease":
        """Take blocks ahead for a future that may not come. A lease is aborted when nothing refers to it any more.

        Raises:
            OutOfBlocksError: they do not all fit.
        """
        return self._lease(as_counts(sizes, "sizes"), None)

    def _lease(self, sizes: Int32Array, parent: "Lease | None") -> "Lease":
        starts = self._take(sizes, False, _LEASED)
        journal = _Journal((starts, sizes.copy()), None if parent is None else parent._number)
        lease = Lease(self, self._next_lease, journal, parent)
        journal.handle = weakref.ref(lease, self._calls.lost.append)
        self._next_lease += 1
        self._leases[lease._number] = journal
        return lease

    def _children_of(self, number: int) -> list[int]:
        return [child for child, journal in self._leases.items() if journal.parent == number]

    def _commit(self, number: int) -> None:
        journal = self._leases[number]
        journal.is_committing = True
        self._finish_commit(number, journal)

    def _finish_commit(self, number: int, journal: "_Journal") -> None:
        """Hand the blocks of a journal over; also after an attempt that broke off at any point."""
        if journal.parent is None:
            _mark(self._states, *journal.runs, _LIVE)
        else:
            parent = self._leases[journal.parent]
            if not np.isin(journal.runs[0], parent.runs[0]).all():
                (starts, sizes), (more_starts, more_sizes) = parent.runs, journal.runs
                parent.runs = np.concatenate([starts, more_starts]), np.concatenate([sizes, more_sizes])
        journal.ended = "committed"
        del self._leases[number]

    def _abort(self, number: int) -> None:
        """Free the blocks of a lease and of the leases inside it, innermost first."""
        for child in self._children_of(number):
            self._abort(child)
        journal = self._leases[number]
        self._give_back(journal.runs)
        journal.ended = "aborted"
        del self._leases[number]

    # -- calls that broke off ----------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Bring the inner pool, the limbo and the leases in line with the states of the granules."""
        try:
            self.inner.rebuild(*runs_of(self._states != _NONE))
        except NotImplementedError:
            if self._freeing is not None:
                with contextlib.suppress(InvalidFreeError):  # it had been done
                    self.inner.free(*self._freeing)
                _mark(self._states, *self._freeing, _NONE)
        self._freeing = None
        for number, journal in list(self._leases.items()):
            if journal.is_committing:
                self._finish_commit(number, journal)
            elif not _are_all(self._states, *journal.runs, _LEASED):
                journal.ended = "aborted"
                del self._leases[number]
        for epoch, listed in list(self._limbo.items()):
            listed[:] = [runs for runs in listed if _are_all(self._states, *runs, _LIMBO)]
            if not listed:
                del self._limbo[epoch]
        known = np.zeros(self.num_granules, np.uint8)
        for runs in (runs for listed in self._limbo.values() for runs in listed):
            _mark(known, *runs, _LIMBO)
        for journal in self._leases.values():
            _mark(known, *journal.runs, _LEASED)
        stray = (known == _NONE) & ((self._states == _LIMBO) | (self._states == _LEASED))
        with contextlib.suppress(Exception):  # a refusal of the inner pool must not stop every later call
            if stray.any():  # taken by a call that did not return
                self._give_back(runs_of(stray))
            self._empty_limbo()

    def _abort_lost(self) -> None:
        """Abort the leases that nothing refers to any more."""
        for number, journal in list(self._leases.items()):
            if journal.handle is not None and journal.handle() is None and number in self._leases:
                self._abort(number)

    # -- snapshots ---------------------------------------------------------------------------------------------------

    @exclusive
    def snapshot(self) -> bytes:
        """The state of the pool, its limbo and the inner allocator, as bytes.

        Raises:
            LeaseError: a lease is open; a lease cannot be saved.
        """
        if self._leases:
            raise LeaseError(f"snapshot: expected no open lease, got {len(self._leases)}; commit or abort first")
        outer = pack_snapshot(self._identity(), self._state())
        return len(outer).to_bytes(8, "little") + outer + self.inner.snapshot()

    @exclusive
    def restore(self, data: bytes) -> None:
        """Return to a snapshot; leases that are open now become void."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise SnapshotError(f"snapshot: expected bytes, got {type(data).__name__}")
        length = int.from_bytes(data[:8], "little")
        arrays = unpack_snapshot(data[8 : 8 + length], self._identity(), self._state())
        self.inner.restore(data[8 + length :])
        self._states[:] = arrays["states"]
        self._epoch = int(arrays["clock"][0])
        for stream, completed in zip(self._completed, arrays["clock"][1:], strict=True):
            self._completed[stream] = int(completed)
        self._limbo = {
            int(epoch): [runs_of(arrays["limbo"] == epoch)] for epoch in np.unique(arrays["limbo"]) if epoch >= 0
        }
        for journal in self._leases.values():
            journal.ended = "void: the pool was restored"
        self._leases.clear()

    def _identity(self) -> dict[str, Any]:
        return {"kind": "epochs", "num_granules": self.num_granules, "num_streams": len(self._completed)}

    def _state(self) -> dict[str, NDArray[Any]]:
        limbo = np.full(self.num_granules, -1, np.int64)
        for epoch, past in self._limbo.items():
            for starts, sizes in past:
                _mark(limbo, starts, sizes, epoch)
        clock = np.array([self._epoch, *self._completed.values()], np.int64)
        return {"states": self._states, "limbo": limbo, "clock": clock}

    # -- the state of each granule -----------------------------------------------------------------------------------

    def _take(self, sizes: Int32Array, partial: bool, state: int) -> Int32Array:
        starts = self.inner.allocate(sizes, partial=partial)
        _mark(self._states, starts, sizes, state)
        return starts

    def _give_back(self, runs: Runs) -> None:
        """Free runs that this pool owns. If the inner pool raises, nothing has changed."""
        self._freeing = runs
        try:
            self.inner.free(*runs)
        except Exception:
            self._freeing = None  # by the protocol nothing was freed
            raise
        _mark(self._states, *runs, _NONE)
        self._freeing = None

    def _checked(self, runs: tuple[ArrayLike, ArrayLike], expected: int) -> Runs:
        """The runs as private arrays; InvalidFreeError unless each granule is in the expected state and named once."""
        starts, sizes = (as_counts(values, name).copy() for values, name in zip(runs, ("starts", "sizes"), strict=True))
        if len(starts) != len(sizes):
            raise InvalidSizeError(f"starts and sizes: expected equal lengths, got {len(starts)} and {len(sizes)}")
        bad = int(_find_bad(self._states, starts, sizes, expected))
        if bad < 0:
            return starts, sizes
        start, size = int(starts[bad]), int(sizes[bad])
        run = f"run {bad} (granules {start} to {start + size - 1})"
        if size < 1 or start < 0 or start + size > self.num_granules:
            raise InvalidFreeError(f"{run}: expected at least 1 granule of a pool of {self.num_granules}")
        for granule in range(start, start + size):
            found = int(self._states[granule])
            if found != expected:
                raise InvalidFreeError(
                    f"{run}: expected {_STATE_NAMES[expected]} granules, got granule {granule}, {_STATE_NAMES[found]}"
                )
        raise InvalidFreeError(f"{run} overlaps another run of the same call")


@dataclass(eq=False)
class _Journal:
    """The pool's record of a lease."""

    runs: Runs
    parent: int | None
    ended: str = ""
    handle: "weakref.ref[Lease] | None" = None
    is_committing: bool = False


class Lease:
    """Blocks taken ahead; made by `EpochPool.lease` and `Lease.lease`. A ``with`` aborts it if it is open at the end.

    Attributes:
        starts: ``[n]`` int32 first granules.
        sizes: ``[n]`` int32 granules. Both grow when a nested lease commits into this one.
    """

    def __init__(self, pool: EpochPool, number: int, journal: _Journal, parent: "Lease | None") -> None:
        self._pool = pool
        self._parent = parent  # keeps the enclosing lease alive
        self._calls = pool._calls
        self._number = number
        self._journal = journal

    @property
    def starts(self) -> Int32Array:
        return self._journal.runs[0]

    @property
    def sizes(self) -> Int32Array:
        return self._journal.runs[1]

    @exclusive
    def lease(self, sizes: ArrayLike) -> "Lease":
        """A lease inside this one. Its `commit` hands its blocks to this one; aborting this one aborts it, too."""
        self._require_open()
        return self._pool._lease(as_counts(sizes, "sizes"), self)

    @exclusive
    def commit(self) -> None:
        """Keep the blocks: they are live from now on, or belong to the enclosing lease.

        Raises:
            LeaseError: the lease has ended, or one inside it has not.
        """
        self._require_open()
        if children := self._pool._children_of(self._number):
            raise LeaseError(f"commit: expected every inner lease to have ended, got {len(children)} open")
        self._pool._commit(self._number)

    @exclusive_or_later
    def abort(self) -> None:
        """Free the blocks at once, and those of the leases inside.

        Raises:
            LeaseError: the lease has ended.
        """
        self._require_open()
        self._pool._abort(self._number)

    def _require_open(self) -> None:
        if self._journal.ended:
            raise LeaseError(f"expected an open lease, got one that is {self._journal.ended}")

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._journal.ended:
            self.abort()


@jit
def _mark(states: NDArray[Any], starts: Int32Array, sizes: Int32Array, state: int) -> None:
    for i in range(len(starts)):
        if starts[i] >= 0:
            states[starts[i] : starts[i] + sizes[i]] = state


@jit
def _find_bad(states: NDArray[np.uint8], starts: Int32Array, sizes: Int32Array, expected: int) -> Any:
    """The first run that is not wholly in the expected state or overlaps one before it; -1: none. Changes nothing."""
    bad = -1
    for i in range(len(starts)):
        ok = sizes[i] >= 1 and starts[i] >= 0 and starts[i] + sizes[i] <= len(states)
        if ok:
            for granule in range(starts[i], starts[i] + sizes[i]):
                ok = ok and states[granule] == expected
        if not ok:
            bad = i
            break
        states[starts[i] : starts[i] + sizes[i]] = expected | _SEEN
    for i in range(len(starts) if bad < 0 else bad):
        states[starts[i] : starts[i] + sizes[i]] = expected
    return bad


@jit
def _are_all(states: NDArray[np.uint8], starts: Int32Array, sizes: Int32Array, expected: int) -> Any:
    """Whether all granules of all runs are in a state."""
    for i in range(len(starts)):
        for granule in range(starts[i], starts[i] + sizes[i]):
            if states[granule] != expected:
                return False
    return True
