"""What moves tiles in steps of the device: arrays there, and the launches of a group of layers."""

from typing import Any

import numpy as np

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.fixed_tables import Move
from kvtoolkit.cache.migration import Migration
from kvtoolkit.cache.storage.upload import DeviceTables
from kvtoolkit.cuda.migrate import MigrationArrays, make_migration


class MigrationLaunches:
    """The device's side of a `Migration`.

    Args:
        migration: the host's side.
        storage: of the group, on the device.
        batch: rows.
        cupy: with the device of the cache.

    Attributes:
        gone: ``[batch]`` entries that each row has let go of in this turn, which the host still has.
    """

    def __init__(self, migration: Migration, storage: Any, batch: int, cupy: Any) -> None:
        self._migration, self._storage, self._batch = migration, storage, batch
        most, most_targets = migration.most, migration.most_targets
        self._marks, self.gone = cupy.zeros((batch, 4), "int32"), cupy.zeros(batch, "int32")
        self._targets, self._held = cupy.zeros((3, most_targets), "int32"), cupy.zeros(3, "int32")
        self._edits, self._num_moves = cupy.zeros((2 * most, 4), "int32"), cupy.zeros(2, "int32")
        self._demotions, self._merges = cupy.zeros((2, most, 16), "int32")

    def marks(self) -> list[Move]:
        """The copies that bring what the host knows of the rows of a turn."""
        marks: Int32Array = self._migration.marks
        return [(marks, self._marks[: len(marks)]), (np.zeros(self._batch, np.int32), self.gone)]

    def blocks(self) -> list[Move]:
        """The copies that bring the blocks."""
        if not self._migration.most_targets:
            return []
        listed, counts = self._migration.lists()
        used = max(1, int(counts.max()))
        return [(listed[:, :used], self._targets), (counts, self._held)]

    def make(
        self, rows: tuple[int, ...], tables: DeviceTables, tails: Any, taken: Any, journal: Any, grants: Any,
        most_new: int, max_steps: int, device: int,
    ) -> list[Any]:  # fmt: skip
        """The launches, in their order; nothing is launched yet.

        Args:
            rows: the first addresses of `MigrationArrays`, up to ``num_new``.
            tables: of the group, at fixed addresses.
            tails: ``[batch, 4]`` where each row ends.
            taken, journal, grants: see ``MigrateParams``.
            most_new: new tokens of a row in a step.
            max_steps: tokens of a row in a turn.
            device: the current one.
        """
        migration = self._migration
        arrays = (
            tables.block_table, tables.block_starts, tails, self._marks, self._targets, self._held, taken, journal,
            grants, self.gone, self._edits, self._num_moves, self._demotions, self._merges,
        )  # fmt: skip
        places = MigrationArrays(*rows, *(array.data.ptr for array in arrays))
        rule, width = migration.rule, tables.block_table.shape[1]
        choice = make_migration(
            places, self._batch, width, migration.most_targets, migration.most, most_new, max_steps,
            (rule.hot, rule.warm), migration.demotes, migration.merges, migration.window, device,
        )  # fmt: skip
        moves = self._storage.listed_moves(
            places.num_moves, places.demotions if migration.demotes else 0, places.merges if migration.merges else 0
        )
        return [choice, *moves]
