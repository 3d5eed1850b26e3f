"""Canaries: a record beside each slot, by which a step checks what it is going to read: ``KVTOOLKIT_CHECK=canary``.

The records are in the keys of one layer more in the storage, so all that moves keys moves them, too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from allocators.errors import IntegrityError
from kvtoolkit.arrays.host import Operand
from kvtoolkit.arrays.types import Int64Array
from kvtoolkit.cache.storage.storage import Storage
from kvtoolkit.cpu import canary as on_host
from kvtoolkit.cuda import canary as on_device
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime import current_stream
from kvtoolkit.runtime.devices import using

_FAULTS = {
    1: "a slot that was written for another position, or not by `append`",
    2: "a slot that was written after other tokens",
    3: "a slot whose key has changed since it was stored",
    4: "a block table without a place for it",
}


class Canary:
    """The records of the slots of one storage, and what was found wrong with them.

    Args:
        storage: with one layer more than the model has.
        layer: the number of its first layer in the model.
    """

    def __init__(self, storage: Storage, layer: int) -> None:
        self._device, self._layer = storage.device, layer
        self._message = ""  # of the first fault; from then on there is no telling what the cache holds
        self._keys: Operand = storage.keys[0]
        assert storage.records is not None
        self._records: Operand = storage.records
        first, last = storage.key_values[0, 0], storage.key_values[-1, 0]
        if first.shape[-1] * first.itemsize < 16:
            raise UnsupportedError(
                f"KVTOOLKIT_CHECK=canary: expected keys of 16 bytes or more, got {first.shape[-1]} dims of "
                f"{first.itemsize} bytes"
            )
        if self._device < 0:
            self._words = first.view(np.uint32), last.view(np.uint32)
            self._report: Any = np.zeros(6, np.uint32)
            return
        import cupy

        with cupy.cuda.Device(self._device):
            self._report = cupy.zeros(6, np.uint32)
            cupy.cuda.runtime.deviceSynchronize()

    def watch(self, tables: Any, described: tuple[Operand | None, ...], tokens: Any) -> Callable[[], None]:
        """What the first append of a step calls: it checks the rows of the step, and notes their new tokens.

        Args:
            tables: the first four arrays of `kvtoolkit.cache.layers.layers.StepTables`.
            described: the same as operands, without bounds where each row has one new token.
            tokens: ``[num_tokens]`` int64 where the backend works; None = not known.
        """
        if self._device < 0:
            known = np.empty(0, np.int64) if tokens is None else tokens
            keys, records = self._words
            table, starts, lengths, bounds = tables
            return lambda: on_host.check_rows(keys, records, table, starts, lengths, bounds, known, self._report)
        table, starts, lengths, bounds = described
        assert table is not None
        assert starts is not None
        assert lengths is not None

        def check() -> None:
            address = 0 if tokens is None else tokens.data.ptr  # the closure keeps the array
            with using(self._device):
                on_device.check_rows(
                    self._keys, self._records, table, starts, lengths, bounds, address, self._report.data.ptr,
                    stream=current_stream(self._device),
                )  # fmt: skip

        return check

    def require_clean(self, seq_ids: Int64Array | None) -> None:
        """Wait for the device, and raise IntegrityError if a check has found something, in this step or before.

        Args:
            seq_ids: of the rows of the step that ends; None: its rows are pieces of sequences.
        """
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        if self._device < 0:
            found = self._report
        else:
            with cupy_on_current_stream(self._device):
                found = self._report.get()
        if found[0] and not self._message:
            row, token, fault, granule, held, expected = found.tolist()
            where = f"row {row - 1} of a step"
            if seq_ids is not None and row <= len(seq_ids):
                where += f" (sequence {seq_ids[row - 1]})"
            of_fault = f"{held}, not {expected}" if fault == 1 else f"{held:#x}, not {expected:#x}"
            self._message = (
                f"canary: {where}, token {token}, layer {self._layer}: expected what it stored, got {_FAULTS[fault]}: "
                f"granule {granule} has {of_fault}"
            )
        if self._message:
            raise IntegrityError(self._message)
