"""What two tables must have in common where granule numbers may differ: entries, tiers, and where they begin."""

import numpy as np

from kvtoolkit.formats.entry import unpack_entries


def form_of(tables, rows=None):
    """The lengths of the entries of rows, their tiers, and where they begin."""
    table, starts = (
        array if isinstance(array, np.ndarray) else array.get() for array in (tables.block_table, tables.block_starts)
    )
    found = []
    for entries, begins in zip(table[:rows], starts[:rows], strict=True):
        used = np.asarray(entries[entries >= 0])
        _, lengths, tiers = unpack_entries(used)
        found.append((lengths.tolist(), tiers.tolist(), np.asarray(begins[: len(used)]).tolist()))
    return found


def cut(forms):
    """Where rows begin, and their entries, those of less than 64 tokens in pieces of 8: neighbours happen to join."""
    found = []
    for lengths, tiers, starts in forms:
        pieces = [[length] if length == 8 else [1] * length for length in lengths]
        listed = [(piece, tier) for some, tier in zip(pieces, tiers, strict=True) for piece in some]
        found.append((starts[:1], listed))
    return found
