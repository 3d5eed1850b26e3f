"""The arrays of steps. They are kept from step to step, so that only entries that changed need to be copied."""

from typing import Any

import numpy as np

from kvtoolkit.cache.state.step_passes import StepArrays

_LARGE = 1 << 17
"""Arrays with more elements are dropped after many steps that needed far fewer."""
_PATIENCE = 64
"""How many steps that is."""


class SpareArrays:
    """The arrays that no open step uses."""

    def __init__(self) -> None:
        self._spare: list[StepArrays] = []
        self._num_small = 0  # steps since one that needed an eighth of large arrays
        self._has_large = False
        self._shown: tuple[StepArrays | None, StepArrays | None] = (None, None)

    def take(self, batch: int, num_tokens: int) -> StepArrays:
        """Arrays for this many rows and new tokens; those of an earlier step if they are large enough."""
        arrays = None
        while self._spare and arrays is None:
            arrays = self._spare.pop()
            if len(arrays.rows) < batch:
                arrays = None
        if arrays is None:
            arrays = _make(max(8, 1 << (batch - 1).bit_length()), 16)
        if num_tokens > len(arrays.slot_mapping):
            arrays = arrays._replace(slot_mapping=np.empty(1 << (num_tokens - 1).bit_length(), np.int64))
            self._has_large |= num_tokens > _LARGE // 2
        return arrays

    def shown(self, arrays: StepArrays) -> StepArrays:
        """Read-only views of arrays, made once."""
        known, views = self._shown
        if views is None or known is not arrays:
            views = StepArrays(*map(_read_only, arrays))
            self._shown = arrays, views
        return views

    def widen(self, arrays: StepArrays, width: int) -> StepArrays:
        """The arrays with wider tables, empty, for rows of ``width`` entries."""
        table = np.full((len(arrays.rows), 1 << (width - 1).bit_length()), -1, np.int32)
        self._has_large |= table.size > _LARGE
        arrays.stamps[:] = -1
        arrays.filled[:] = 0
        return arrays._replace(table=table, starts=table.copy())

    def give_back(self, arrays: StepArrays, batch: int, num_tokens: int) -> None:
        """Take back the arrays of a step that had this many rows and new tokens."""
        if self._has_large:
            arrays = self._fitting(arrays, batch, num_tokens)
        self._spare.append(arrays)

    def _fitting(self, arrays: StepArrays, batch: int, num_tokens: int) -> StepArrays:
        """The arrays, or smaller ones if steps have not needed most of them for a long time."""
        width = int(arrays.filled[:batch].max(initial=16))
        is_large = (8 * batch * width >= arrays.table.size > _LARGE) or (
            8 * num_tokens >= len(arrays.slot_mapping) > _LARGE
        )
        self._num_small = 0 if is_large else self._num_small + 1
        if self._num_small <= _PATIENCE:
            return arrays
        self._num_small, self._has_large = 0, False
        self._spare.clear()
        return _make(max(8, 1 << (batch - 1).bit_length()), 1 << (width - 1).bit_length())


def _read_only(array: Any) -> Any:
    view = array.view()
    view.setflags(write=False)
    return view


def _make(batch: int, width: int) -> StepArrays:
    table = np.full((batch, width), -1, np.int32)
    return StepArrays(
        table=table,
        starts=table.copy(),
        seq_lens=np.zeros(batch, np.int32),
        cu_seqlens_q=np.zeros(batch + 1, np.int32),
        slot_mapping=np.empty(batch, np.int64),
        status=np.zeros(batch, np.int8),
        rows=np.zeros(batch, np.int32),
        counts=np.zeros(batch, np.int32),
        stamps=np.full(batch, -1, np.int64),
        filled=np.zeros(batch, np.int32),
        work=np.zeros((2, batch), np.int32),
    )
