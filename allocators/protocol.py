"""What every allocator promises: the abstract class `BlockAllocator`, and `AllocatorBase`, a base for implementations.

An allocator deals in *granules* (8 token slots). It hands out runs of granules; it never sees the memory behind them.

    free + live + pinned == num_granules
        free    may be granted
        live    granted and not freed yet
        pinned  freed, but unusable until the rest of its block or slab slot is freed too
"""

import abc
import json
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators._forks import lock_across_forks
from allocators._jit import jit
from allocators.errors import (
    IntegrityError,
    InvalidFreeError,
    InvalidSizeError,
    OutOfBlocksError,
    SnapshotError,
)

GRANULE = 8
"""Token slots in a granule."""
SUPERBLOCK = 8
"""Granules in a superblock (64 tokens); every pool is a whole number of them."""
MAX_GRANULES = 1 << 24
"""Largest pool: what an entry of a block table can name."""

Int32Array = NDArray[np.int32]


@dataclass(frozen=True)
class AllocatorStats:
    """Present figures of one pool; all but the last two are in granules."""

    num_granules: int
    num_free: int
    num_live: int
    pinned: int
    largest_free: int
    """Largest size that ``allocate([size])`` would grant now."""
    metadata_nbytes: int
    """Bytes of bookkeeping; they do not depend on the load."""
    free_blocks: Mapping[int, int]
    """For each block size in tokens, how many blocks could be granted if only that size were asked for."""


class BlockAllocator(abc.ABC):
    """Hands out aligned runs of granules and takes them back.

    A block of ``2**k`` granules (k = 0-3) starts at a multiple of its size. Calls are batched, and safe from several
    threads at once unless a class says otherwise. A call that raises has changed nothing. A live block is never moved.
    """

    num_granules: int
    block_sizes: tuple[int, ...]
    """Sizes of blocks on offer, in tokens, ascending; `allocate` takes them in granules."""

    @property
    @abc.abstractmethod
    def num_free(self) -> int:
        """Granules that may be granted."""

    @property
    @abc.abstractmethod
    def largest_free(self) -> int:
        """Largest size in granules that ``allocate([size])`` would grant now; 0 when exhausted."""

    @abc.abstractmethod
    def allocate(self, sizes: ArrayLike, *, partial: bool = False) -> Int32Array:
        """Take one block for each of ``sizes``.

        Args:
            sizes: ``[n]`` integers, granules, each one of ``block_sizes`` divided by 8.
            partial: grant in the order given and stop at the first size that does not fit, instead of all or nothing.

        Returns:
            ``[n]`` int32 first granules; with ``partial``, -1 from the first size that did not fit.

        Raises:
            OutOfBlocksError: not ``partial``, and the sizes do not all fit.
            InvalidSizeError: a size is not on offer, or ``sizes`` is not a one-dimensional array of integers.
        """

    @abc.abstractmethod
    def free(self, starts: ArrayLike, sizes: ArrayLike) -> None:
        """Take back granule runs; a run may be a part of a block, or span several.

        Args:
            starts: ``[n]`` integers, first granule of each run.
            sizes: ``[n]`` integers, granules, at least 1.

        Raises:
            InvalidFreeError: a run leaves the pool, holds a granule that is not live, or overlaps another of the call.
        """

    @abc.abstractmethod
    def stats(self) -> AllocatorStats:
        """The present figures of the pool."""

    @abc.abstractmethod
    def check_integrity(self) -> None:
        """Verify every invariant of the class; for tests, O(num_granules).

        Raises:
            IntegrityError: one does not hold.
        """

    @abc.abstractmethod
    def snapshot(self) -> bytes:
        """The whole state as bytes, for `restore` of an allocator that was made with the same arguments."""

    @abc.abstractmethod
    def restore(self, data: bytes) -> None:
        """Return to the state that `snapshot` saw.

        Raises:
            SnapshotError: ``data`` is damaged, or belongs to another kind or size of pool.
        """

    def unit_sizes(self, granules: Int32Array) -> Int32Array:
        """How much of a block must be free before any of it can be granted again; optional.

        A cache evicts whole units, and only units in which nobody else holds anything. By default every freed granule
        can be granted again by itself.

        Args:
            granules: ``[n]`` int32 live granules.

        Returns:
            ``[n]`` int32: the size (1, 2, 4 or 8) of the unit that each granule is in. A unit begins at a multiple of
            its size.
        """
        return np.ones(len(granules), np.int32)

    def rebuild(self, starts: ArrayLike, sizes: ArrayLike) -> None:
        """Make exactly these runs live and everything else free, whatever the present state is; optional.

        A cache calls this after a call was interrupted inside the allocator, and to resume a snapshot with another
        allocator. Runs need not be whole blocks. An allocator that cannot reuse the rest of a block holds it back, as
        it does after a part of a block was freed.

        Args:
            starts: ``[n]`` integers, first granule of each run.
            sizes: ``[n]`` integers, granules, at least 1.

        Raises:
            InvalidSizeError: a run leaves the pool, or overlaps another; nothing was changed.
            NotImplementedError: this allocator cannot be rebuilt.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be rebuilt from the blocks that are live")


def as_counts(values: ArrayLike, name: str) -> Int32Array:
    """``values`` as a contiguous int32 vector, or InvalidSizeError; floats are refused, not rounded."""
    if type(values) is np.ndarray and values.dtype == np.int32 and values.ndim == 1 and values.flags.c_contiguous:
        return values
    array = _as_array(values, name)
    if array.ndim != 1:
        raise InvalidSizeError(f"{name}: expected a one-dimensional array of integers, got shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu":
        raise InvalidSizeError(f"{name}: expected integers, got {array.dtype}")
    if int(array.max()) > MAX_GRANULES or int(array.min()) < -MAX_GRANULES:
        bad = int(array[np.argmax(np.abs(array.astype(np.float64)))])
        raise InvalidSizeError(f"{name}: expected granules within a pool of at most {MAX_GRANULES}, got {bad}")
    return np.ascontiguousarray(array, np.int32)


def _as_array(values: ArrayLike, name: str) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # lists of several lengths, tensors on a device
        raise InvalidSizeError(f"{name}: expected a one-dimensional array of integers, got {values!r}") from error


def check_num_granules(num_granules: int) -> int:
    """``num_granules`` if a pool can have that size, or InvalidSizeError."""
    if isinstance(num_granules, bool) or not isinstance(num_granules, int | np.integer):
        raise InvalidSizeError(f"num_granules: expected an int, got {num_granules!r}")
    if not 0 < num_granules <= MAX_GRANULES or num_granules % SUPERBLOCK:
        raise InvalidSizeError(
            f"num_granules: expected a multiple of {SUPERBLOCK} (whole superblocks of 64 tokens) "
            f"from {SUPERBLOCK} to {MAX_GRANULES}, got {num_granules}"
        )
    return int(num_granules)


def check_block_sizes(block_sizes: ArrayLike) -> tuple[int, ...]:
    """``block_sizes`` in tokens as an ascending tuple of some of 8, 16, 32, 64, or InvalidSizeError."""
    array = _as_array(block_sizes, "block_sizes")
    sizes = tuple(sorted(array.tolist())) if array.ndim == 1 and array.dtype.kind in "iu" else ()
    if not sizes or len(set(sizes)) != len(sizes) or not set(sizes) <= {8, 16, 32, 64}:
        raise InvalidSizeError(f"block_sizes: expected some of 8, 16, 32, 64 tokens, each once, got {block_sizes!r}")
    return sizes


class AllocatorBase(BlockAllocator):
    """A base for allocators whose state is a few NumPy arrays. It has the checks, messages, lock and snapshots.

    A subclass keeps its state in `_state` and does the work in compiled functions that run without the GIL.
    """

    kind: ClassVar[str]

    def __init__(self, num_granules: int, *, block_sizes: ArrayLike) -> None:
        self.num_granules = check_num_granules(num_granules)
        self.block_sizes = check_block_sizes(block_sizes)
        # re-entrant, because a finalizer or signal handler may call while this thread holds the lock; it finds the pool
        # in order, because compiled code does each change as a whole
        self._lock = lock_across_forks(threading.RLock())
        # is_size[n] says whether blocks of n granules are on offer
        self._is_size = np.zeros(SUPERBLOCK + 1, np.bool_)
        self._is_size[[size // GRANULE for size in self.block_sizes]] = True

    # -- what a subclass fills in ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _state(self) -> dict[str, NDArray[Any]]:
        """The arrays that are the state, by name; `restore` writes into them."""

    @abc.abstractmethod
    def _allocate(self, sizes: Int32Array, starts: Int32Array, partial: bool) -> int:
        """Fill ``starts``, under the lock. Returns how many fit; unless ``partial``, takes nothing if not all do."""

    @abc.abstractmethod
    def _free(self, starts: Int32Array, sizes: Int32Array) -> int:
        """Free the runs, under the lock. Returns -1 or, with nothing changed, the index of the run that is at fault."""

    @abc.abstractmethod
    def _is_live(self, granule: int) -> bool:
        """Whether the granule is granted and not freed yet."""

    def _check_size(self, sizes: Int32Array) -> int:
        """Index of the first size that is not on offer, or -1."""
        return int(_first_bad_size(sizes, self._is_size))

    def _wanted(self, sizes: ArrayLike) -> Int32Array:
        """The sizes of an `allocate` call, checked."""
        wanted = as_counts(sizes, "sizes")
        bad = self._check_size(wanted)
        if bad >= 0:
            raise InvalidSizeError(
                f"sizes[{bad}]: expected one of {self._sizes_on_offer()} granules, got {int(wanted[bad])}"
            )
        return wanted

    # -- the protocol ------------------------------------------------------------------------------------------------

    def allocate(self, sizes: ArrayLike, *, partial: bool = False) -> Int32Array:
        wanted = self._wanted(sizes)
        starts = np.empty(len(wanted), np.int32)
        with self._lock:
            granted = self._allocate(wanted, starts, partial)
            if granted < len(wanted) and not partial:
                raise self._out_of_blocks(wanted)
        return starts

    def free(self, starts: ArrayLike, sizes: ArrayLike) -> None:
        run_starts, run_sizes = as_counts(starts, "starts"), as_counts(sizes, "sizes")
        if len(run_starts) != len(run_sizes):
            raise InvalidSizeError(
                f"starts and sizes: expected equal lengths, got {len(run_starts)} and {len(run_sizes)}"
            )
        with self._lock:
            bad = self._free(run_starts, run_sizes)
            if bad >= 0:
                raise self._invalid_free(int(run_starts[bad]), int(run_sizes[bad]), bad)

    def snapshot(self) -> bytes:
        with self._lock:
            return pack_snapshot(self._identity(), self._state())

    def restore(self, data: bytes) -> None:
        arrays = unpack_snapshot(data, self._identity(), self._state())
        with self._lock:
            for name, array in self._state().items():
                array[...] = arrays[name]
            self._after_restore()

    def _after_restore(self) -> None:
        """Rebuild everything that is derived from the state."""

    def rebuild(self, starts: ArrayLike, sizes: ArrayLike) -> None:
        live = live_granules(as_counts(starts, "starts"), as_counts(sizes, "sizes"), self.num_granules)
        with self._lock:
            self._rebuild(live)

    def _rebuild(self, live: NDArray[np.bool_]) -> None:
        """Write the state in which exactly these granules are live. The caller holds the lock."""
        raise NotImplementedError(f"{type(self).__name__} cannot be rebuilt from the blocks that are live")

    # -- messages ----------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "num_granules": self.num_granules, "block_sizes": list(self.block_sizes)}

    def _sizes_on_offer(self) -> str:
        return ", ".join(str(size // GRANULE) for size in self.block_sizes)

    def _out_of_blocks(self, sizes: Int32Array) -> OutOfBlocksError:
        asked = ", ".join(f"{int((sizes == size).sum())} x {size}" for size in np.unique(sizes))
        return OutOfBlocksError(
            f"asked for {asked} granules, {self._num_free_unlocked()} of {self.num_granules} granules free, "
            f"largest run {self._largest_free_unlocked()}"
        )

    def _invalid_free(self, start: int, size: int, index: int) -> InvalidFreeError:
        run = f"run {index} (granules {start} to {start + size - 1})"
        if size < 1:
            return InvalidFreeError(f"run {index}: expected a size of at least 1 granule, got {size}")
        if start < 0 or start + size > self.num_granules:
            return InvalidFreeError(f"{run}: expected granules of a pool of {self.num_granules}")
        for granule in range(start, start + size):
            if not self._is_live(granule):
                return InvalidFreeError(f"{run}: granule {granule} is free already, or was never handed out")
        return InvalidFreeError(f"{run} overlaps another run of the same call")

    # -- figures -----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _num_free_unlocked(self) -> int: ...

    @abc.abstractmethod
    def _largest_free_unlocked(self) -> int: ...

    @property
    def num_free(self) -> int:
        with self._lock:
            return self._num_free_unlocked()

    @property
    def largest_free(self) -> int:
        with self._lock:
            return self._largest_free_unlocked()

    def _pinned_unlocked(self) -> int:
        return 0

    @abc.abstractmethod
    def _free_blocks_unlocked(self) -> dict[int, int]: ...

    def stats(self) -> AllocatorStats:
        with self._lock:
            num_free, pinned = self._num_free_unlocked(), self._pinned_unlocked()
            return AllocatorStats(
                num_granules=self.num_granules,
                num_free=num_free,
                num_live=self.num_granules - num_free - pinned,
                pinned=pinned,
                largest_free=self._largest_free_unlocked(),
                metadata_nbytes=self._metadata_nbytes(),
                free_blocks=self._free_blocks_unlocked(),
            )

    def _metadata_nbytes(self) -> int:
        return sum(array.nbytes for array in self._state().values())

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_granules} granules, {self.num_free} free, "
            f"blocks of {', '.join(map(str, self.block_sizes))} tokens)"
        )


def live_granules(starts: Int32Array, sizes: Int32Array, num_granules: int) -> NDArray[np.bool_]:
    """``[num_granules]`` which granules runs cover; InvalidSizeError if one leaves the pool or overlaps another."""
    if len(starts) != len(sizes):
        raise InvalidSizeError(f"starts and sizes: expected equal lengths, got {len(starts)} and {len(sizes)}")
    live = np.zeros(num_granules, np.bool_)
    for i, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        if size < 1 or start < 0 or start + size > num_granules:
            raise InvalidSizeError(
                f"run {i}: expected at least 1 granule of a pool of {num_granules}, got {size} from {start} on"
            )
        if live[start : start + size].any():
            raise InvalidSizeError(f"run {i} (granules {start} to {start + size - 1}) overlaps another run of the call")
        live[start : start + size] = True
    return live


def runs_of(flags: NDArray[np.bool_]) -> tuple[Int32Array, Int32Array]:
    """The maximal runs of set flags, as starts and sizes."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0)).astype(np.int32)
    return edges[::2].copy(), (edges[1::2] - edges[::2]).astype(np.int32)


def require(condition: bool | np.bool_, message: str) -> None:
    """Raise IntegrityError with ``message`` unless ``condition``; `assert` that ``python -O`` keeps."""
    if not condition:
        raise IntegrityError(message)


_MAGIC = b"kvt-pool-1\n"


def pack_snapshot(identity: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Identity and arrays as bytes: magic, CRC-32 of the rest, a header line in JSON, then the arrays."""
    body = json.dumps(dict(identity), sort_keys=True).encode() + b"\n"
    body += b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def unpack_snapshot(
    data: bytes, identity: Mapping[str, Any], like: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The arrays of a snapshot, shaped and typed as ``like``; SnapshotError if it is not one of this identity."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise SnapshotError(f"snapshot: expected bytes, got {type(data).__name__}")
    data = bytes(data)
    head = len(_MAGIC) + 4
    if len(data) < head or not data.startswith(_MAGIC):
        raise SnapshotError(f"snapshot: expected bytes that begin with {_MAGIC!r}, got {data[: len(_MAGIC)]!r}")
    body = data[head:]
    if zlib.crc32(body) != int.from_bytes(data[len(_MAGIC) : head], "little"):
        raise SnapshotError(
            f"snapshot: the checksum of its {len(body)} bytes does not match; it is damaged or truncated"
        )
    line, _, rest = body.partition(b"\n")
    found = json.loads(line)
    if found != dict(identity):
        raise SnapshotError(f"snapshot: expected one of {dict(identity)}, got one of {found}")
    expected_nbytes = sum(array.nbytes for array in like.values())
    if len(rest) != expected_nbytes:
        raise SnapshotError(f"snapshot: expected {expected_nbytes} bytes of state, got {len(rest)}")
    arrays, offset = {}, 0
    for name, array in like.items():
        arrays[name] = np.frombuffer(rest, array.dtype, array.size, offset).reshape(array.shape)
        offset += array.nbytes
    return arrays


@jit
def _first_bad_size(sizes: Int32Array, is_size: NDArray[np.bool_]) -> int:
    for i in range(len(sizes)):
        if sizes[i] < 1 or sizes[i] >= len(is_size) or not is_size[sizes[i]]:
            return i
    return -1
