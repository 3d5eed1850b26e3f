"""Leases: granules that stay as they are while somebody reads them."""

import numpy as np

from allocators._calls import exclusive, exclusive_or_later
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import NUM_ENTRIES, OPEN, STATE, pin
from kvtoolkit.cache.state.cache_state import CacheState
from kvtoolkit.errors import SequenceError
from kvtoolkit.formats.entry import unpack_entries


class Lease:
    """Granules that nothing writes, moves or frees. `KVCache.pin` makes leases.

    At the end of a ``with``, and when nothing refers to it any more, a lease that was not committed is aborted.

    Attributes:
        seq_ids: ``[batch]`` int64 ids of the rows that hold them. Until `commit` makes ordinary sequences of these,
            only `KVCache.lengths` accepts the ids.
        starts: ``[n]`` int32 first granule of each run held, row after row.
        sizes: ``[n]`` int32 granules of each run.

    With several groups of layers, all are held, and the runs are those of the first.
    """

    def __init__(self, state: CacheState, held: Int32Array) -> None:
        self.seq_ids: Int64Array = state.ids_of(held)
        self._state, self._calls = state, state.calls
        self._rows = held
        self._is_open = True
        table = state.group.table
        entries = [table.entries[row, : table.info[row, NUM_ENTRIES]] for row in held]
        self.starts, self.sizes, _ = unpack_entries(np.concatenate([np.empty(0, np.int32), *entries]))
        self._mark = pin(table, held)
        state.follow(held)

    @exclusive
    def commit(self) -> Int64Array:
        """Make open sequences of what is held, as a fork would have; returns ``seq_ids``."""
        self._end()
        self._state.group.table.info[self._rows, STATE] = OPEN
        self._state.follow(self._rows)
        return self.seq_ids

    @exclusive_or_later
    def abort(self) -> None:
        """Let go of everything."""
        self._end()
        self._state.release_rows(self._rows)

    release = abort

    def _end(self) -> None:
        if not self._is_open:
            raise SequenceError("expected an open lease, got one that has ended")
        self._is_open = False
        self._state.handles.pop(self._mark, None)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_open:
            self.abort()
