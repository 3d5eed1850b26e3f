"""The block-table entry: one int32 that says where a run of granules is, how long it is and in which tier.

    bits  0-23   granule, in units of 8 token slots (2**24 granules = 134 M tokens)
    bits 24-26   length in granules, minus one (1 to 8, so a trimmed block of 24 or 40 tokens is legal)
    bits 27-29   tier (hot, warm, cold, host16, host_cold)
    bit  30      spare, zero
    bit  31      zero; an empty entry is -1

The same layout is in ``cuda_src/include/kvt/entry.cuh``; a test compiles that header and compares.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit

GRANULE = 8
"""Token slots in a granule, the unit of every offset and length."""
MAX_BLOCK_GRANULES = 8
"""Granules in the largest block: 64 tokens."""
MAX_GRANULES = 1 << 24
EMPTY_ENTRY = -1

TIER_HOT, TIER_WARM, TIER_COLD, TIER_HOST16, TIER_HOST_COLD = range(5)


@jit
def pack_entry(granule: int, num_granules: int, tier: int) -> Any:
    """The entry of ``num_granules`` (1-8) granules that begin at ``granule``; compiled code may call it too."""
    return np.int32(granule | ((num_granules - 1) << 24) | (tier << 27))


@jit
def entry_granule(entry: int) -> Any:
    """First granule of an entry that is not empty."""
    return entry & 0xFFFFFF


@jit
def entry_length(entry: int) -> Any:
    """Length in granules (1-8) of an entry that is not empty."""
    return ((entry >> 24) & 7) + 1


@jit
def entry_tier(entry: int) -> Any:
    """Tier of an entry that is not empty."""
    return (entry >> 27) & 7


def unpack_entries(entries: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Split entries into ``(granule, num_granules, tier)``, each shaped as ``entries``; -1, 0, -1 where empty."""
    empty = entries < 0
    granule = np.where(empty, -1, entries & 0xFFFFFF)
    length = np.where(empty, 0, ((entries >> 24) & 7) + 1)
    tier = np.where(empty, -1, (entries >> 27) & 7)
    return granule.astype(np.int32), length.astype(np.int32), tier.astype(np.int32)
