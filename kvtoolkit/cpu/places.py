"""Where the tokens of a tile are in the caches, found through the block table."""

from typing import Any

import numpy as np

from allocators._jit import jit
from kvtoolkit.cpu.dequantize import block_bytes
from kvtoolkit.cpu.problem import (
    BLOCK_SIZE,
    FIRST_HOT,
    HEAD_DIM,
    KEYS_BLOCK,
    KEYS_SLOT,
    NUM_KV_HEADS,
    STARTS,
    STARTS_ROW,
    TABLE,
    TABLE_ROW,
    TIERED,
    VALUES_BLOCK,
    VALUES_SLOT,
    WARM,
)
from kvtoolkit.cpu.tiles import TILE
from kvtoolkit.cpu.vector import prefetch, read_i32, read_i64, write_i64
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT, entry_granule, entry_length, entry_tier

_int: Any = np.int64  # a cast in compiled code


@jit
def find_entry(problem: Any, row: int, entries: int, granule: int) -> Any:
    """Find the entry of a row that holds logical ``granule``: the last one, not empty, that does not begin above it."""
    table = problem[TABLE] + 4 * row * problem[TABLE_ROW]
    starts = problem[STARTS] + 4 * row * problem[STARTS_ROW]
    low = _int(0)
    high = entries - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if read_i32(table + 4 * middle) >= 0 and read_i32(starts + 4 * middle) <= granule:
            low = middle
        else:
            high = middle - 1
    return low


@jit
def locate(problem: Any, row: int, position: int, count: int, first: int, entry: int, keys: int, values: int) -> int:
    """Write the offsets of ``count`` positions from ``position`` on to ``keys[first:]`` and ``values[first:]``.

    The offsets before and after them repeat the nearest one, so that all 64 may be read. Returns the last entry used.
    """
    block_size = problem[BLOCK_SIZE]
    table = problem[TABLE] + 4 * row * problem[TABLE_ROW]
    starts = problem[STARTS] + 4 * row * problem[STARTS_ROW]
    t = first
    end = first + count
    while t < end:
        logical = position // block_size
        slot = position - logical * block_size
        if problem[STARTS] == 0:
            block = _int(read_i32(table + 4 * logical))
        else:
            word = read_i32(table + 4 * entry)
            while read_i32(starts + 4 * entry) + entry_length(word) <= logical:
                entry += 1
                word = read_i32(table + 4 * entry)
            block = _int(entry_granule(word)) - problem[FIRST_HOT] + logical - _int(read_i32(starts + 4 * entry))
        run = min(block_size - slot, end - t)
        key = block * problem[KEYS_BLOCK] + slot * problem[KEYS_SLOT]
        value = block * problem[VALUES_BLOCK] + slot * problem[VALUES_SLOT]
        for i in range(run):
            write_i64(keys + 8 * (t + i), key + i * problem[KEYS_SLOT])
            write_i64(values + 8 * (t + i), value + i * problem[VALUES_SLOT])
        if t == first:
            for i in range(first):
                write_i64(keys + 8 * i, key)
                write_i64(values + 8 * i, value)
        t += run
        position += run
        if t == end:
            key += (run - 1) * problem[KEYS_SLOT]
            for i in range(end, TILE):
                write_i64(keys + 8 * i, key)
    return entry


@jit
def locate_block(problem: Any, row: int, head: int, granule: int, entry: int) -> Any:
    """Find the tile that holds logical ``granule``: ``(entry, tier, address)``, address 0 if it is in the hot tier.

    ``entry`` is one that does not come after it, from which the search begins; the result is the tile's own.
    """
    if problem[TIERED] == 0:
        return entry, _int(TIER_HOT), _int(0)
    table = problem[TABLE] + 4 * row * problem[TABLE_ROW]
    starts = problem[STARTS] + 4 * row * problem[STARTS_ROW]
    word = read_i32(table + 4 * entry)
    while read_i32(starts + 4 * entry) + entry_length(word) <= granule:
        entry += 1
        word = read_i32(table + 4 * entry)
    tier = _int(entry_tier(word))
    if tier == TIER_HOT:
        return entry, tier, _int(0)
    block = (_int(entry_granule(word)) - problem[FIRST_HOT + tier]) // MAX_BLOCK_GRANULES
    nbytes = block_bytes(tier, problem[HEAD_DIM])
    return entry, tier, problem[WARM + tier - 1] + (block * problem[NUM_KV_HEADS] + head) * nbytes


@jit
def prefetch_rows(base: int, offsets: int, first: int, end: int, head_dim: int, itemsize: int) -> None:
    """Ask for rows of a tile; the processor's own prefetcher does not see from one block to the next."""
    for t in range(first, end):
        address = base + itemsize * read_i64(offsets + 8 * t)
        for line in range(0, head_dim * itemsize, 64):
            prefetch(address + line)


@jit
def prefetch_block(block: int, nbytes: int, quarter: int) -> None:
    """Ask for a quarter of a quantized block."""
    for line in range(nbytes * quarter // 4, nbytes * (quarter + 1) // 4, 64):
        prefetch(block + line)
