"""Epochs and leases around any allocator: blocks that kernels may still read, and blocks for futures that may not come.

    free + live + limbo + leased (+ pinned) == num_granules

`EpochPool.free` is for blocks that no kernel can still read. `EpochPool.retire` is for the others: it puts them into
the *limbo* of the current epoch, from which `complete` frees them once every kernel of that epoch has finished. A
`Lease` is a journal of blocks taken ahead, for beams or draft tokens: `commit` keeps them, `abort` frees them at once.

Source: epoch-based reclamation, Fraser 2004 (Practical lock-freedom, sec. 5.2.3), with launches in place of threads.
"""

import threading
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators._jit import jit
from allocators.errors import InvalidFreeError, InvalidSizeError, LeaseError, SnapshotError, UnknownStreamError
from allocators.protocol import (
    AllocatorStats,
    BlockAllocator,
    Int32Array,
    as_counts,
    pack_snapshot,
    require,
    unpack_snapshot,
)

_NONE, _LIVE, _LIMBO, _LEASED = 0, 1, 2, 3
_STATE_NAMES = ("free", "live", "in limbo", "leased")

Runs = tuple[Int32Array, Int32Array]


class EpochPool(BlockAllocator):
    """An allocator with limbo and leases; itself a `BlockAllocator`.

    Args:
        inner: the allocator that owns the granules. Nobody else may use it meanwhile.
        streams: names of the streams whose kernels read the pool; an epoch is complete when all of them say so.

    Thread-safe (one lock). Adds one byte a granule.
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
        self._lock = threading.RLock()
        self._states = np.zeros(inner.num_granules, np.uint8)
        self._limbo: dict[int, list[Runs]] = {}
        self._epoch = 0
        self._completed: dict[Hashable, int] = dict.fromkeys(streams, -1)
        self._leases: set[Lease] = set()
        if not self._completed:
            raise InvalidSizeError("streams: expected at least one")

    # -- the protocol ------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return self.inner.num_free

    @property
    def largest_free(self) -> int:
        return self.inner.largest_free

    def allocate(self, sizes: ArrayLike, *, partial: bool = False) -> Int32Array:
        with self._lock:
            return self._take(as_counts(sizes, "sizes"), partial, _LIVE)

    def free(self, starts: ArrayLike, sizes: ArrayLike) -> None:
        """Free live runs that no kernel can still read. Raises as `BlockAllocator.free`, also for leased blocks."""
        with self._lock:
            runs = self._change((starts, sizes), _LIVE, _NONE)
            self.inner.free(*runs)

    def stats(self) -> AllocatorStats:
        """Figures of the inner pool; its live granules include those in limbo and leased."""
        return self.inner.stats()

    def check_integrity(self) -> None:
        with self._lock:
            self.inner.check_integrity()
            stats = self.inner.stats()
            owned = int(np.count_nonzero(self._states))
            require(owned == stats.num_live, f"epochs: {owned} granules owned here, {stats.num_live} live inside")
            limbo = sum(int(sizes.sum()) for runs in self._limbo.values() for _, sizes in runs)
            require(limbo == self.num_in_limbo, f"epochs: {limbo} granules listed in limbo, {self.num_in_limbo} marked")
            leased = sum(int(lease.sizes.sum()) for lease in self._leases)
            require(leased == self.num_leased, f"epochs: {leased} granules listed in leases, {self.num_leased} marked")
            require(all(epoch > self._oldest_complete() for epoch in self._limbo), "epochs: a complete epoch has limbo")

    # -- epochs ------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The current epoch: what `retire` would return now."""
        return self._epoch

    @property
    def streams(self) -> tuple[Hashable, ...]:
        """The streams that must report `complete`."""
        return tuple(self._completed)

    @property
    def num_in_limbo(self) -> int:
        """Granules retired and not freed yet."""
        return int(np.count_nonzero(self._states == _LIMBO))

    @property
    def num_leased(self) -> int:
        """Granules in leases that have not ended."""
        return int(np.count_nonzero(self._states == _LEASED))

    def advance(self) -> int:
        """Begin the next epoch, as for the launch of the next step; returns its number."""
        with self._lock:
            self._epoch += 1
            return self._epoch

    def register_stream(self, stream: Hashable) -> None:
        """Add a stream that must report `complete` too, for the current epoch and later ones."""
        with self._lock:
            try:
                self._completed.setdefault(stream, self._epoch - 1)
            except TypeError as error:
                raise UnknownStreamError(f"stream: expected something hashable, got {stream!r}") from error

    def retire(self, starts: ArrayLike, sizes: ArrayLike) -> int:
        """Put live runs into the limbo of the current epoch; they are reusable once it is `complete`.

        Returns:
            The epoch.

        Raises:
            InvalidFreeError: as `free`.
        """
        with self._lock:
            runs = self._change((starts, sizes), _LIVE, _LIMBO)
            if len(runs[0]):
                self._limbo.setdefault(self._epoch, []).append(runs)
            return self._epoch

    def complete(self, epoch: int, stream: Hashable | None = None) -> None:
        """Say that every kernel of ``epoch`` and of those before it has finished.

        Args:
            epoch: at most the current one. Completing the current epoch begins the next.
            stream: the stream whose kernels have finished; None for all of them.

        Raises:
            InvalidSizeError: the epoch has not begun.
            UnknownStreamError: nobody registered it.
        """
        with self._lock:
            if isinstance(epoch, bool) or not isinstance(epoch, int | np.integer) or not 0 <= epoch <= self._epoch:
                raise InvalidSizeError(
                    f"epoch: expected an int from 0 to the current one, {self._epoch}, got {epoch!r}"
                )
            if stream is not None and stream not in list(self._completed):
                raise UnknownStreamError(f"stream: expected one of {list(self._completed)}, got {stream!r}")
            for name in self._completed if stream is None else (stream,):
                self._completed[name] = max(self._completed[name], int(epoch))
            if epoch == self._epoch:
                self._epoch += 1
            done = self._oldest_complete()
            for past in sorted(past for past in self._limbo if past <= done):
                for runs in self._limbo.pop(past):
                    self._change(runs, _LIMBO, _NONE)
                    self.inner.free(*runs)

    def _oldest_complete(self) -> int:
        return min(self._completed.values())

    # -- leases ------------------------------------------------------------------------------------------------------

    def lease(self, sizes: ArrayLike) -> "Lease":
        """Take blocks ahead for a future that may not come.

        Raises:
            OutOfBlocksError: they do not all fit.
        """
        return self._lease(as_counts(sizes, "sizes"), None)

    def _lease(self, sizes: Int32Array, parent: "Lease | None") -> "Lease":
        with self._lock:
            lease = Lease(self, self._take(sizes, False, _LEASED), sizes.copy(), parent)
            self._leases.add(lease)
            return lease

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """State of the pool, its limbo and the inner allocator.

        Raises:
            LeaseError: a lease is open; a journal cannot outlive its object.
        """
        with self._lock:
            if self._leases:
                raise LeaseError(f"snapshot: expected no open lease, got {len(self._leases)}; commit or abort first")
            outer = pack_snapshot(self._identity(), self._state())
            return len(outer).to_bytes(8, "little") + outer + self.inner.snapshot()

    def restore(self, data: bytes) -> None:
        """Return to a snapshot; leases that are open now are void afterwards."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise SnapshotError(f"snapshot: expected bytes, got {type(data).__name__}")
        with self._lock:
            length = int.from_bytes(data[:8], "little")
            arrays = unpack_snapshot(data[8 : 8 + length], self._identity(), self._state())
            self.inner.restore(data[8 + length :])
            self._states[:] = arrays["states"]
            self._epoch = int(arrays["clock"][0])
            for stream, completed in zip(self._completed, arrays["clock"][1:], strict=True):
                self._completed[stream] = int(completed)
            self._limbo = {
                int(epoch): [_runs_of(arrays["limbo"] == epoch)] for epoch in np.unique(arrays["limbo"]) if epoch >= 0
            }
            for lease in self._leases:
                lease._ended = "void: the pool was restored"
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

    def _change(self, runs: tuple[ArrayLike, ArrayLike], expected: int, state: int) -> Runs:
        """Move runs from one state to another, or raise and move none. Returns them as private arrays."""
        starts, sizes = (as_counts(values, name).copy() for values, name in zip(runs, ("starts", "sizes"), strict=True))
        if len(starts) != len(sizes):
            raise InvalidSizeError(f"starts and sizes: expected equal lengths, got {len(starts)} and {len(sizes)}")
        bad = int(_move(self._states, starts, sizes, expected, state))
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


class Lease:
    """Blocks taken ahead; made by `EpochPool.lease` and `Lease.lease`. Usable in a ``with``: aborts unless committed.

    Attributes:
        starts: ``[n]`` int32 first granules.
        sizes: ``[n]`` int32 granules. Both grow when a nested lease commits into this one.
    """

    def __init__(self, pool: EpochPool, starts: Int32Array, sizes: Int32Array, parent: "Lease | None") -> None:
        self.starts = starts
        self.sizes = sizes
        self._pool = pool
        self._parent = parent
        self._children: set[Lease] = set()
        self._ended = ""
        if parent is not None:
            parent._children.add(self)

    def lease(self, sizes: ArrayLike) -> "Lease":
        """A lease inside this one: its `commit` hands its blocks to this one, and aborting this one aborts it."""
        with self._pool._lock:
            self._require_open()
            return self._pool._lease(as_counts(sizes, "sizes"), self)

    def commit(self) -> None:
        """Keep the blocks: they are live from now on, or belong to the enclosing lease.

        Raises:
            LeaseError: the lease has ended, or one inside it has not.
        """
        with self._pool._lock:
            self._require_open()
            if self._children:
                raise LeaseError(f"commit: expected every inner lease to have ended, got {len(self._children)} open")
            if self._parent is None:
                self._pool._change((self.starts, self.sizes), _LEASED, _LIVE)
            else:
                self._parent.starts = np.concatenate([self._parent.starts, self.starts])
                self._parent.sizes = np.concatenate([self._parent.sizes, self.sizes])
            self._end("committed")

    def abort(self) -> None:
        """Give the blocks back at once, and those of the leases inside.

        Raises:
            LeaseError: the lease has ended.
        """
        with self._pool._lock:
            self._require_open()
            for child in list(self._children):
                child.abort()
            runs = self._pool._change((self.starts, self.sizes), _LEASED, _NONE)
            self._pool.inner.free(*runs)
            self._end("aborted")

    def _require_open(self) -> None:
        if self._ended:
            raise LeaseError(f"expected an open lease, got one that is {self._ended}")

    def _end(self, how: str) -> None:
        self._ended = how
        self._pool._leases.discard(self)
        if self._parent is not None:
            self._parent._children.discard(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._ended:
            self.abort()


def _runs_of(flags: NDArray[np.bool_]) -> Runs:
    """The maximal runs of set flags, as starts and sizes."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0)).astype(np.int32)
    return edges[::2].copy(), (edges[1::2] - edges[::2]).astype(np.int32)


@jit
def _mark(states: NDArray[Any], starts: Int32Array, sizes: Int32Array, state: int) -> None:
    for i in range(len(starts)):
        if starts[i] >= 0:
            states[starts[i] : starts[i] + sizes[i]] = state


@jit
def _move(states: NDArray[np.uint8], starts: Int32Array, sizes: Int32Array, expected: int, state: int) -> Any:
    """Move all runs, or none: -1, or the index of the first run that is not wholly in the expected state."""
    for i in range(len(starts)):
        ok = sizes[i] >= 1 and starts[i] >= 0 and starts[i] + sizes[i] <= len(states)
        if ok:
            for granule in range(starts[i], starts[i] + sizes[i]):
                ok = ok and states[granule] == expected
        if not ok:
            for j in range(i):
                states[starts[j] : starts[j] + sizes[j]] = expected
            return i
        states[starts[i] : starts[i] + sizes[i]] = state
    return -1
