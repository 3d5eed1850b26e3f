"""Copies between places on the host that end late, as those of a device do."""

import numpy as np

_CALLS = 3
"""So many times a copy says that it is not done."""


class LateTransfers:
    """Takes what it copies when it begins, and writes it when somebody waits, or after some calls of `is_done`.

    A cache that names new places before they are written, gives away old ones before they are read, or moves what
    somebody still writes then reads something else than was written.
    """

    def __init__(self, transfers):
        self._transfers = transfers
        self._late = []

    def start(self, tier, sources, targets, *, beside=True):
        if not beside:
            return self._transfers.start(tier, sources, targets, beside=False)
        late = Late(self._transfers, tier, sources, targets)
        self._late.append(late)
        return late

    def join(self):
        for late in self._late:
            late.join()
        self._late = []


class Late:
    def __init__(self, transfers, tier, sources, targets):
        self._arrays = transfers.arrays(tier)
        self._targets = targets - transfers.first(tier)
        self._held = [array[..., sources - transfers.first(tier), :].copy() for array in self._arrays]
        # whoever reads a target now, or still writes to a source, is wrong
        for array in self._arrays:
            array[..., self._targets, :] = np.array(-1).astype(array.dtype)
        self._calls = 0
        self._is_written = False

    def is_done(self):
        self._calls += 1
        if self._calls > _CALLS:
            self.join()
        return self._is_written

    def join(self):
        if not self._is_written:
            for array, held in zip(self._arrays, self._held, strict=True):
                array[..., self._targets, :] = held
            self._is_written = True
