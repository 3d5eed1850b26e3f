"""The problem that the CPU attention kernel works on: one int64 array, whose fields are named here.

The fields are addresses, strides in elements, and sizes. A single array of a single type means a single compilation for
every dtype, layout and option.
"""

from typing import Any

import numpy as np

from allocators._jit import jit
from kvtoolkit.cpu.vector import LANES, read_i32

(
    Q, Q_TOKEN, Q_HEAD,                 # address, then strides in elements
    OUT, OUT_TOKEN, OUT_HEAD,
    LSE,                                # address, [num_tokens, num_q_heads] float32; 0 = not wanted
    KEYS, KEYS_BLOCK, KEYS_HEAD, KEYS_SLOT,
    VALUES, VALUES_BLOCK, VALUES_HEAD, VALUES_SLOT,
    TABLE, TABLE_ROW,                   # address, int32 per row
    STARTS, STARTS_ROW,                 # as TABLE; address 0 = the table holds plain block ids
    SEQ_LENS,
    CU_SEQLENS,                         # address; 0 = one query per row
    SLOPES, SLOPES_ROW,                 # address, float32 per query head, 0 = none; from row to row, 0 = same for all
    SINKS,                              # address, float32 per query head; 0 = none
    PARTIALS,                           # address, one row of float32 per token, query head and split
    DTYPE, BATCH, NUM_TOKENS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM,
    BLOCK_SIZE, NUM_BLOCKS, MAX_ENTRIES,
    LEFT, RIGHT,                        # keys visible before and after a query's position; -1 = all
    NUM_SPLITS,                         # 0 = automatic
    TIERED,                             # 0 = the table knows no tiers, and the seven fields that follow are 0
    FIRST_HOT, FIRST_WARM, FIRST_COLD,  # granules, in the order of the tiers
    WARM, COLD,                         # addresses of blocks, [num_blocks, num_kv_heads, nbytes]; 0 = no such tier
    WARM_BLOCKS, COLD_BLOCKS,
    MASSES, MASS_TILES,                 # address and tiles of block_mass, [batch, tiles, num_kv_heads]; 0 = not wanted
    TILE_LSES,                          # address, float32 per token, query head and tile; with MASSES
    NUM_FIELDS,
) = range(49)  # fmt: skip

ROWS_PER_ITEM = 96
"""Query rows (queries times group) that share a gathered tile: enough to hide the gather, few enough for the L2."""
_PARTIAL_TAIL = 16  # floats after the sums of a partial result: row_max, row_sum

_int: Any = np.int64  # a cast in compiled code


@jit
def tokens_of(problem: Any, row: int) -> Any:
    """First query token of ``row`` and the one past its last."""
    if problem[CU_SEQLENS] == 0:
        return _int(row), _int(row + 1)
    first = problem[CU_SEQLENS] + 4 * row
    return _int(read_i32(first)), _int(read_i32(first + 4))


@jit
def queries_per_item(group_size: int) -> int:
    """Query tokens of one item."""
    return max(1, ROWS_PER_ITEM // group_size)


@jit
def partial_floats(head_dim: int) -> int:
    """Floats of one partial result: the sums, then row_max and row_sum in a tail that keeps the next one aligned."""
    return (head_dim + 15) // 16 * 16 + _PARTIAL_TAIL


@jit
def padded_tiles(tiles: int) -> int:
    """Floats of one query's line of tiles, rounded up to whole vectors."""
    return (tiles + LANES - 1) // LANES * LANES
