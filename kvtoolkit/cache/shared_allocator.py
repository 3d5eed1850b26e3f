"""The allocator of a cache, for callers who take blocks of its memory for their own use."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from allocators import AllocatorStats, BlockAllocator, InvalidFreeError
from allocators._calls import Calls, exclusive
from allocators.protocol import as_counts
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state.ledger import Ledger


class SharedAllocator(BlockAllocator):
    """A cache's allocator of hot blocks. Blocks taken here belong to the caller, and the cache leaves them alone.

    Only blocks that were taken here can be freed here. All other attributes are those of the allocator, `inner`.
    Thread-safe: calls take the cache's lock.
    """

    def __init__(self, ledger: Ledger, calls: Calls) -> None:
        inner = ledger.allocators[0]
        assert inner is not None
        self.inner = inner
        self.num_granules, self.block_sizes = inner.num_granules, inner.block_sizes
        self._ledger, self._calls = ledger, calls

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that isinstance() sees the class of the allocator
        return type(self.inner)

    @property
    def num_free(self) -> int:
        return self.inner.num_free

    @property
    def largest_free(self) -> int:
        return self.inner.largest_free

    @exclusive
    def allocate(self, sizes: ArrayLike, *, partial: bool = False) -> Int32Array:
        wanted = as_counts(sizes, "sizes")
        starts = self._ledger.take(0, wanted, partial=partial)
        self._ledger.lend(starts, wanted)
        return starts

    @exclusive
    def free(self, starts: ArrayLike, sizes: ArrayLike) -> None:
        """Free runs inside blocks that were taken here; see `BlockAllocator.free`."""
        run_starts, run_sizes = as_counts(starts, "starts"), as_counts(sizes, "sizes")
        if len(run_starts) != len(run_sizes):
            raise InvalidFreeError(f"starts, sizes: expected equal lengths, got {len(run_starts)} and {len(run_sizes)}")
        if not len(run_starts):
            return
        bad = (
            int(np.argmax(run_starts < 0)) if (run_starts < 0).any() else self._ledger.take_back(run_starts, run_sizes)
        )
        if bad >= 0:
            self._calls.is_dirty = False
            raise InvalidFreeError(
                f"run {bad} (granules {run_starts[bad]} to {run_starts[bad] + run_sizes[bad] - 1}): expected granules "
                "that were taken from this allocator and are not free yet"
            )
        runs = zip(run_starts.tolist(), run_sizes.tolist(), strict=True)
        self._ledger.give_back(np.concatenate([np.arange(start, start + size, dtype=np.int32) for start, size in runs]))

    @exclusive
    def stats(self) -> AllocatorStats:
        return self.inner.stats()

    @exclusive
    def check_integrity(self) -> None:
        self.inner.check_integrity()

    def snapshot(self) -> bytes:
        return self.inner.snapshot()

    def restore(self, data: bytes) -> None:
        """Refused, because the cache would lose its memory. `KVCache.from_snapshot` restores a whole cache."""
        raise NotImplementedError("restore: expected an allocator that no cache uses; see KVCache.from_snapshot")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return repr(self.inner)
