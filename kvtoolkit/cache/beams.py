"""Rows of steps of the device that go on from what others hold: arrays there, and launches."""

from typing import Any

import numpy as np

from kvtoolkit.arrays.types import Int64Array
from kvtoolkit.cache.fixed_tables import Move
from kvtoolkit.cache.state.block_table import CAPACITY, LENGTH
from kvtoolkit.cache.storage.upload import DeviceTables
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cuda.reorder import MAX_BEAMS, make_reorder
from kvtoolkit.errors import ArgumentError, UnsupportedError

ROOM = 20
"""Granules that a beam may have beyond its last token: what it had when the turn began, and of its last block."""
_KEPT = ("block_table", "block_starts")


class Beams:
    """The device's side of reordered rows, see ``cuda_src/cache/reorder.cu``.

    Args:
        batch: rows.
        beams: rows of a family, of which each may go on from any other one.
        most_own: granules that a row gets in a turn.
        tables: of the only group of layers, at fixed addresses.
        cupy: with the device of the cache.

    Attributes:
        parents: ``[batch]`` int32 on the device.
    """

    def __init__(self, batch: int, beams: int, most_own: int, tables: DeviceTables, cupy: Any) -> None:
        self._batch, self._beams, self._most_own, self._tables = batch, beams, most_own, tables
        self.parents, self._sources, self._scratch = cupy.zeros((3, batch), np.int32)
        self._own = cupy.zeros((batch, most_own), np.int32)
        self._first = [cupy.zeros(getattr(tables, name).shape, np.int32) for name in _KEPT]
        self._first_tails = cupy.zeros((batch, 4), np.int32)

    def bring(self, ancestors: Any) -> list[Move]:
        """The copies after which every row is its own parent and ancestor."""
        own = np.arange(self._batch, dtype=np.int32)
        return [(own, self.parents), (own, ancestors)]

    def keep(self, tails: Any, cupy: Any) -> None:
        """Remember the tables as they are, asynchronously."""
        runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream().ptr
        kept = zip(self._first, (getattr(self._tables, name) for name in _KEPT), strict=True)
        for target, source in (*kept, (self._first_tails, tails)):
            runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, runtime.memcpyDeviceToDevice, stream)

    def make(self, rows: tuple[Any, ...], tails: Any, storage: Any, max_steps: int, device: int) -> list[Any]:
        """The launches, in their order; nothing is launched yet.

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
        return [
            choice,
            storage.reorder_copy(sources, own, lengths, num_new, self._batch, self._most_own, self._beams),
        ]


def require_beams(config: CacheConfig, batch: int, num_new_tokens: int, beams: int) -> None:
    """An error unless rows of such a cache can be reordered on the device."""
    if not 2 <= beams <= MAX_BEAMS or batch % beams or num_new_tokens != 1:
        raise ArgumentError(
            f"beams: expected 1 to {MAX_BEAMS}, a divisor of batch, and one new token in a step, got {beams}, a batch "
            f"of {batch} and {num_new_tokens} new tokens"
        )
    if config.is_grouped or config.tier_config is not None:
        raise UnsupportedError("beams: expected a cache with one group of layers and without tiers")


def require_equal(info: Int64Array, beams: int) -> None:
    """ArgumentError unless the beams of each search have equally many tokens, and little room beyond them.

    Args:
        info: of their rows, as `kvtoolkit.cache.state.block_table.BlockTable` has it.
    """
    lengths = info[:, LENGTH]
    if len(lengths) % beams or (lengths.reshape(-1, beams) != lengths[::beams, None]).any():
        raise ArgumentError(
            f"seq_ids: expected the {beams} beams of each search one after the other, of equal lengths, got lengths "
            f"{lengths.tolist()!r:.200}"
        )
    if (info[:, CAPACITY] - lengths // 8 > ROOM - 9).any():
        raise ArgumentError(f"seq_ids: expected beams with room for up to {8 * (ROOM - 9)} tokens more, got more")
