"""The tables of one group of layers at fixed addresses, where captured graphs read them; see `GraphStep`."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.call import Hints, Sharing
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.layers.layers import LayerCalls
from kvtoolkit.cache.layers.staging import Staging
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.shared_reads import CommonBeginnings
from kvtoolkit.cache.state.step_passes import StepArrays
from kvtoolkit.cache.step import GroupTables
from kvtoolkit.cache.storage.arenas import Arenas
from kvtoolkit.cache.storage.upload import DeviceTables
from kvtoolkit.cache.tiering.sparse import ShortTables, SparseReads

Move = tuple[NDArray[Any], Any]
"""A host array, and the array on the device that it is copied to."""


class Bounds(NamedTuple):
    """What a `GraphStep` is made for."""

    batch: int
    most: int
    """New tokens of a row."""
    tokens: int
    """New tokens of all rows."""
    max_seq_len: int


def bounds_of(cu_seqlens_q: Int32Array, batch: int, num_tokens: int) -> Int32Array:
    """``[batch + 1]`` where the new tokens of each row begin, those of padding rows after all others."""
    bounds = np.full(batch + 1, num_tokens, np.int32)
    bounds[: len(cu_seqlens_q)] = cu_seqlens_q
    return bounds


class FixedTables:
    """What a `GraphStep` has for the layers of one group.

    Args:
        group: the group.
        arenas: its keys and values.
        bounds: of the `GraphStep`.
        shares_reads: whether replays look for beginnings that rows have in common.
        staging: chooses what a step copies to the device ahead of its kernels; None: it is read in place.
        sparse: what steps leave out; None: they read everything.
        cupy: with the device of the cache and its current stream.

    Attributes:
        tables: where graphs read the tables.
        is_cut: whether there is a row for each chunk, not for each row of the step.
    """

    def __init__(
        self, group: CacheGroup, arenas: Arenas, bounds: Bounds, shares_reads: bool, cupy: Any,
        staging: Staging | None = None, sparse: SparseReads | None = None,
    ) -> None:  # fmt: skip
        self._arenas, self._bounds = arenas, bounds
        self._next: CommonBeginnings | None = None
        self.is_cut = group.layers.chunk > 0
        self._begin_late = group.layers.window > 0
        self._reads = group.shared_reads if shares_reads else None
        batch, length, chunk = bounds.batch, bounds.max_seq_len, group.layers.chunk
        if chunk:  # there is a row for each chunk that a row has new tokens in
            batch *= 1 - (1 - bounds.most) // chunk
            length = min(length, chunk)
        width = min(group.config.entries_limit, -(-length // 8))
        # entries of a window begin anywhere in a row, so they bound no length
        self._max_seq_len = length if self._begin_late else min(length, 64 * width)
        is_one = bounds.most == 1
        self.tables = DeviceTables(
            cupy.full((batch, width), -1, np.int32),
            cupy.full((batch, width), -1, np.int32),
            cupy.zeros(batch, np.int32),
            cupy.arange(batch + 1, dtype=np.int32) if is_one else cupy.zeros(batch + 1, np.int32),
            cupy.full(bounds.tokens, -1, np.int64),
        )
        self._order = None if self._reads is None else cupy.arange(batch, dtype=np.int32)
        self._found: CommonBeginnings | None = None  # whose order is in `_order`
        self._width = 0  # of the widest table loaded so far; columns beyond it are empty
        self._kept: dict[Any, Any] = {}  # plans and lists, also at fixed addresses
        self._staging, self._sparse = staging, sparse
        self._pairs = None if staging is None else cupy.zeros(staging.words, np.int32)
        self._read = self.tables
        """Where graphs read what attention reads; other places if that may be less, or staged."""
        if staging is not None or sparse is not None:
            self._read = self.tables._replace(
                block_table=cupy.full((batch, width), -1, np.int32),
                block_starts=cupy.full((batch, width), -1, np.int32),
                seq_lens=cupy.zeros(batch, np.int32),
            )

    def load(self, tables: GroupTables, seq_ids: Int64Array, arrays: StepArrays) -> list[Move]:
        """The moves that bring the tables of a step here. After them `loaded` must be called."""
        batch, tokens = len(self.tables.seq_lens), self._bounds.tokens
        rows, num_tokens = len(tables.seq_lens), len(tables.slot_mapping)
        used = min(tables.block_table.shape[1], self.tables.block_table.shape[1])
        self._width = max(self._width, used)
        seq_lens, slots = np.zeros(batch, np.int32), np.full(tokens, -1, np.int64)
        seq_lens[:rows], slots[:num_tokens] = tables.seq_lens, tables.slot_mapping
        entries = np.full((2, rows, self._width), -1, np.int32)
        entries[0, :, :used], entries[1, :, :used] = tables.block_table[:, :used], tables.block_starts[:, :used]
        moves: list[Move] = [
            (slots, self.tables.slot_mapping), (seq_lens, self.tables.seq_lens),
            (entries[0], self.tables.block_table), (entries[1], self.tables.block_starts),
        ]  # fmt: skip
        if self._read is not self.tables:
            moves += self._read_moves(tables, arrays, used)
        if self._bounds.most > 1:
            moves.append((bounds_of(tables.cu_seqlens_q, batch, num_tokens), self.tables.cu_seqlens_q))
        self._next = None if self._reads is None else self._reads.find(seq_ids, arrays)
        if self._next is not None and self._next is not self._found:
            order = np.arange(batch, dtype=np.int32)
            order[:rows] = self._next.order
            moves.append((order, self._order))
            self._found = None
        return moves

    def _read_moves(self, tables: GroupTables, arrays: StepArrays, used: int) -> list[Move]:
        """The moves that bring what attention reads to its places."""
        batch, rows = len(self.tables.seq_lens), len(tables.seq_lens)
        read = ShortTables(tables.block_table[:, :used], tables.block_starts[:, :used], tables.seq_lens)
        counts, moves = arrays.counts[:rows], list[Move]()
        if self._sparse is not None and not self._sparse.is_prompt(counts):
            read = self._sparse.shorten(arrays, rows, used)
        if self._staging is not None:
            table, pairs = self._staging.choose(*read, counts)
            read = read._replace(block_table=table)
            moves.append((pairs, self._pairs))
        entries, seq_lens = np.full((2, rows, self._width), -1, np.int32), np.zeros(batch, np.int32)
        entries[0, :, :used], entries[1, :, :used], seq_lens[:rows] = read
        there = self._read.block_table, self._read.block_starts, self._read.seq_lens
        return [*moves, *zip((entries[0], entries[1], seq_lens), there, strict=True)]

    def loaded(self) -> None:
        """The moves are made, in the order of the stream."""
        self._found = self._next

    def expect_growth(self, more: int) -> None:
        """The device will append up to so many entries to rows of the tables loaded last."""
        self._width = min(self._width + more, self.tables.block_table.shape[1])

    def calls(self, tokens: Any = None) -> LayerCalls:
        """The calls of one run of the model.

        Args:
            tokens: the new tokens, for canaries; None if nobody checks them.
        """
        sharing = None if self._order is None else Sharing(self._arenas.backend.describe(self._order, "order"))
        most = self._bounds.most
        counts = (1, 1) if most == 1 else (0, most)
        hints = Hints(counts, self._max_seq_len, self._kept, sharing, counts_are_bounds=most > 1)
        staged = None if self._staging is None else self._staging.copies(self._pairs)
        options = {"is_fixed": True, "begin_late": self._begin_late, "tokens": tokens, "staged": staged}
        return LayerCalls(self._arenas, self._read, hints, is_short=self._sparse is not None, **options)
