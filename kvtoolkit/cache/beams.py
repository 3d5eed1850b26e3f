"""Rows of steps of the device that go on from what others hold: arrays there, and launches."""

from typing import Any

import numpy as np

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.fixed_tables import Move
from kvtoolkit.cache.sharing import copy_of_rows, copy_tails
from kvtoolkit.cache.state import growing, row_sharing
from kvtoolkit.cache.state.block_table import LENGTH, NUM_ENTRIES
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.lent_blocks import LentBlocks
from kvtoolkit.cache.state.row_sharing import Tails
from kvtoolkit.cache.storage.upload import DeviceTables
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cuda.reorder import MAX_BEAMS, make_reorder
from kvtoolkit.errors import ArgumentError, UnsupportedError

MOST_ROWS = 4096
"""Rows of a batch with beams: as many as ``cuda_src/cache/grow.cu`` can look at together."""
ROOM = 18
"""Granules of a beam from its last full one on when a turn begins, besides those of its new tokens: two blocks."""
_KEPT = ("block_table", "block_starts")


class Beams:
    """Rows that go on from one another in a turn, see ``cuda_src/cache/reorder.cu``. Its callers hold the cache's lock.

    In its tables the device has a copy of each row's last, partly filled granule, because the rows will write to it and
    take it over from one another. So if a turn is given up, the rows are as they were.

    Args:
        group: the only one.
        batch: rows.
        beams: rows of a family, of which each may go on from any other one.
        most_own: granules that a row gets in a turn, and has beyond its last token.
        tables: of the group, at fixed addresses.
        cupy: with the device of the cache.

    Attributes:
        parents: ``[batch]`` int32 on the device.
        launches: what lets rows go on from their parents, once `make` has made them.
        lent: the blocks of the copies.
        ends: ``[n, 4]`` where each row of this turn ends, as ``GrowParams`` has it.
    """

    def __init__(
        self, group: CacheGroup, batch: int, beams: int, most_own: int, tables: DeviceTables, cupy: Any
    ) -> None:
        self._group, self._batch, self._beams, self._most_own = group, batch, beams, most_own
        self._tables = tables
        self.parents, self._sources, self._scratch = cupy.zeros((3, batch), np.int32)
        self._own = cupy.zeros((batch, most_own), np.int32)
        self._first = [cupy.zeros(getattr(tables, name).shape, np.int32) for name in _KEPT]
        self._first_tails = cupy.zeros((batch, 4), np.int32)
        self.lent = LentBlocks(group.blocks, batch)
        nothing = np.empty(0, np.int32)
        self._tails = Tails(nothing, nothing, nothing)
        self._is_done = np.ones(1, np.bool_)
        self._shown = np.empty((2, 0, 0), np.int32)  # entries and starts of the rows with their copied granules
        self.ends = np.empty((0, 4), np.int32)
        self.launches: list[Any] = []

    def fill(self, rows: Int32Array, limits: Int32Array) -> None:
        """Copy the partly filled granules of the rows of a turn; CacheFullError, with nothing done, without room.

        Args:
            rows: of the block table.
            limits: tokens at which each row ends.
        """
        group = self._group
        require_equal(group.table.info[rows, LENGTH], self._beams, "seq_ids", "lengths")
        require_equal(limits, self._beams, "max_lens", "limits")
        self._tails = copy_tails(group, group.table, rows, group.table.info[rows, LENGTH], "load")
        self.lent.lend(self._tails.starts, self._tails.sizes)
        self._is_done[0] = False
        width = int(group.table.info[rows, NUM_ENTRIES].max(initial=0)) + 1
        self._shown = np.full((2, len(rows), width), -1, np.int32)
        self.ends = np.empty((len(rows), 4), np.int32)
        keeps = group.table.info[rows, LENGTH] >> 3
        entries, starts = self._shown
        row_sharing.show_with_tails(group.table, rows, keeps, self._tails, entries, starts, self.ends)

    def settle(self, rows: Int32Array, ancestors: Int32Array) -> None:
        """Make the same changes in the tables of the host. Doing it again changes nothing.

        Args:
            rows: ``[batch]`` of the block table.
            ancestors: ``[batch]`` whose full granules each row has, of those of the beginning of the turn.
        """
        table, blocks = self._group.table, self._group.blocks
        before = copy_of_rows(table, rows)
        keeps = before.info[:, LENGTH] >> 3
        count = growing.settle_beams(
            *self.lent.flags, self.lent.loan, before, ancestors, table, rows, keeps, self._tails, blocks.holdings,
            self._is_done,
        )  # fmt: skip
        blocks.free_listed(int(count))

    def bring(self, ancestors: Any, tails: Any) -> list[Move]:
        """The copies after which the rows end with the copied granules, and are their own parents and ancestors."""
        own, width = np.arange(self._batch, dtype=np.int32), self._tables.block_table.shape[1]
        entries, starts = (shown[:, :width] for shown in self._shown)
        return [
            (own, self.parents), (own, ancestors), (self.ends, tails[: len(self.ends)]),
            (entries, self._tables.block_table), (starts, self._tables.block_starts),
        ]  # fmt: skip

    def keep(self, tails: Any, cupy: Any) -> None:
        """Remember the tables as they are, asynchronously."""
        runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream().ptr
        kept = zip(self._first, (getattr(self._tables, name) for name in _KEPT), strict=True)
        for target, source in (*kept, (self._first_tails, tails)):
            runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, runtime.memcpyDeviceToDevice, stream)

    def make(self, rows: tuple[Any, ...], tails: Any, storage: Any, max_steps: int, device: int) -> None:
        """Make `launches`; nothing is launched yet.

        Args:
            rows: arrays of each row: ``ancestors``, ``finished``, ``max_lens``, ``lengths``, ``num_new``, ``history``.
            tails: ``[batch, 4]`` where each row ends.
            storage: of the group, on the device.
            max_steps: tokens of a row in the history.
            device: the current one.
        """
        ancestors, *others = (array.data.ptr for array in rows)
        parents, sources, scratch, own = (
            array.data.ptr for array in (self.parents, self._sources, self._scratch, self._own)
        )
        tables = self._tables
        arrays = (tables.block_table, tables.block_starts, tails, *self._first, self._first_tails, self._own)
        of_rows = (parents, ancestors, sources, scratch, *others)
        width, places = tables.block_table.shape[1], [array.data.ptr for array in arrays]
        choice = make_reorder(of_rows, [places], [width], self._batch, self._most_own, max_steps, self._beams, device)
        lengths, num_new = rows[3].data.ptr, rows[4].data.ptr
        copies = storage.reorder_copy(sources, own, lengths, num_new, self._batch, self._most_own, self._beams)
        self.launches = [choice, copies]


def require_beams(config: CacheConfig, batch: int, num_new_tokens: int, beams: int) -> None:
    """An error unless rows of such a cache can be reordered on the device."""
    if not 2 <= beams <= MAX_BEAMS or batch % beams or num_new_tokens != 1:
        raise ArgumentError(
            f"beams: expected 1 to {MAX_BEAMS}, a divisor of batch, and one new token in a step, got {beams}, a batch "
            f"of {batch} and {num_new_tokens} new tokens"
        )
    if batch > MOST_ROWS:
        raise ArgumentError(f"batch: expected up to {MOST_ROWS} rows with beams, got {batch}")
    if config.is_grouped or config.quantization is not None:
        raise UnsupportedError("beams: expected a cache with one group of layers and without tiers")


def require_equal(values: Int64Array | Int32Array, beams: int, name: str, what: str) -> None:
    """ArgumentError unless there is the same value for all beams of each search."""
    if len(values) % beams or (values.reshape(-1, beams) != values[::beams, None]).any():
        raise ArgumentError(
            f"{name}: expected the {beams} beams of each search one after the other, of equal {what}, got "
            f"{values.tolist()!r:.200}"
        )
