"""What ``cuda_src/cache/canary.cu`` does, for caches in host memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.formats.entry import TIER_HOT, entry_granule, entry_length, entry_tier

Words = NDArray[np.uint32]
UNKNOWN = 0xFFFFFFFF
_MASK = 0xFFFFFFFF
_int: Any = np.int64  # a cast in compiled code
_WRONG_POSITION, _WRONG_CHAIN, _WRONG_KEY, _NO_SLOT = 1, 2, 3, 4


@jit
def _mix(x: int) -> Any:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


@jit
def _next_chain(chain: int, token: int) -> Any:
    return ((chain << 4) & _MASK) ^ _mix(token & _MASK)


@jit
def _hash_of_key(keys: Words, granule: int, i: int) -> Any:
    found = 0
    for k in range(4):
        found = _mix(found ^ _int(keys[granule, 0, i, k]))
    return found


@jit
def _granule_of(table: Int32Array, starts: Int32Array, row: int, token: int) -> Any:
    """The granule that has a token of a row; -1 if it is quantized, or before the row's beginning; -2 if none has."""
    e, index = table.shape[1] - 1, token >> 3
    while e >= 0 and (table[row, e] < 0 or starts[row, e] > index):
        e -= 1
    if token < 0 or (e < 0 and table.shape[1] > 0 and table[row, 0] >= 0):
        return -1
    inside = index - starts[row, e]
    if e < 0 or inside >= entry_length(table[row, e]):
        return -2
    return entry_granule(table[row, e]) + inside if entry_tier(table[row, e]) == TIER_HOT else -1


@jit
def _chain_of(records: Words, table: Int32Array, starts: Int32Array, row: int, token: int) -> Any:
    """The chain up to a token; -1 if it has no record."""
    granule = _granule_of(table, starts, row, token)
    if granule < 0 or records[granule, 0, token & 7, 1] == UNKNOWN:
        return -1
    return _int(records[granule, 0, token & 7, 3])


@jit
def check_rows(
    keys: Words, records: Words, table: Int32Array, starts: Int32Array, seq_lens: Int32Array, bounds: Int32Array,
    tokens: Int64Array, report: Words,
) -> None:  # fmt: skip
    """Check what the slots of rows hold, and note what is new; see the kernel.

    Args:
        keys, records: ``[num_granules, num_kv_heads, 8, words]``.
        tokens: ``[num_tokens]``; empty if they are not known.
        report: ``[6]``.
    """
    for row in range(len(seq_lens)):
        length, first = seq_lens[row], bounds[row]
        num_new = min(length, bounds[row + 1] - first)
        begin = 8 * starts[row, 0] if table.shape[1] > 0 and table[row, 0] >= 0 else 0
        for token in range(begin, length - num_new):
            granule = _granule_of(table, starts, row, token)
            if granule == -2 and report[0] == 0:
                report[:] = 0
                report[0], report[1], report[2] = row + 1, token, _NO_SLOT
            if granule < 0 or records[granule, 0, token & 7, 1] == UNKNOWN:
                continue
            record, before = records[granule, 0, token & 7], _chain_of(records, table, starts, row, token - 1)
            key, chain = _hash_of_key(keys, granule, token & 7), _next_chain(max(before, 0), _int(record[0]))
            fault, found, expected = 0, 0, 0
            if record[1] != token:
                fault, found, expected = _WRONG_POSITION, _int(record[1]), token
            elif _int(record[2]) != key:
                fault, found, expected = _WRONG_KEY, key, _int(record[2])
            elif (before >= 0 or token == 0) and _int(record[3]) != chain:
                fault, found, expected = _WRONG_CHAIN, _int(record[3]), chain
            if fault and report[0] == 0:
                report[0], report[1], report[2], report[3] = row + 1, token, fault, granule
                report[4], report[5] = found, expected
        chain = max(_chain_of(records, table, starts, row, length - num_new - 1), 0)
        for i in range(num_new):
            token = length - num_new + i
            known = tokens[first + i] if len(tokens) else 0
            chain = _next_chain(chain, known)
            granule = _granule_of(table, starts, row, token)
            if granule >= 0:
                records[granule, 0, token & 7, 0] = known & _MASK
                records[granule, 0, token & 7, 1] = token
                records[granule, 0, token & 7, 2] = _hash_of_key(keys, granule, token & 7)
                records[granule, 0, token & 7, 3] = chain
