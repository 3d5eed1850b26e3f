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
    """Entries, small ones in pieces of 8 tokens, because small blocks join where they happen to be neighbours."""
    found = []
    for lengths, tiers, _ in forms:
        pieces = [
            ([length] if length == 8 else [1] * length, tier) for length, tier in zip(lengths, tiers, strict=True)
        ]
        found.append([(length, tier) for all_of_one, tier in pieces for length in all_of_one])
    return found
