"""What a check of lengths, tables and slots can find, as codes that compiled code returns, and the errors for them."""

import enum
from typing import NoReturn

from kvtoolkit.errors import ShapeError, UnsupportedError


class Finding(enum.IntEnum):
    """The first problem that a check met. ``cuda_src/cache/check.cu`` has the same names and numbers."""

    OK = 0
    BAD_SEQ_LEN = 1
    BAD_COVERAGE = 2
    BAD_BLOCK = 3
    BAD_CU_SEQLENS = 4
    BAD_STARTS = 5
    BAD_TIER = 6
    BAD_SLOT = 7
    NO_TIER = 8
    BAD_UNIT = 9
    BAD_PLACE = 10


def raise_finding(
    code: int,
    row: int,
    value: int,
    *,
    num_tokens: int = 0,
    block_size: int = 0,
    num_blocks: int = 0,
    max_entries: int = 0,
) -> NoReturn:
    """Raise the error for a finding other than `Finding.OK`.

    Args:
        code: the `Finding`.
        row: row of the batch; an index into ``cu_seqlens_q`` or a token of ``slot_mapping`` if one of these is wrong.
        value: what was found there.
    """
    if code == Finding.BAD_CU_SEQLENS:
        raise ShapeError(
            f"cu_seqlens_q: expected to ascend from 0 to num_tokens = {num_tokens}, got {value} at index {row}"
        )
    if code == Finding.BAD_SEQ_LEN:
        raise ShapeError(f"seq_lens: expected lengths from 0 on, got {value} in row {row}")
    if code == Finding.BAD_COVERAGE:
        raise ShapeError(
            f"seq_lens: row {row} holds {value} tokens, more than its block_table covers "
            f"({max_entries} entries at most, each of {block_size} tokens or its own length, up to the first empty one)"
        )
    if code == Finding.BAD_STARTS:
        raise ShapeError(
            f"block_starts: expected each entry to begin where the one before it ends, the first at 0; "
            f"entry {value} of row {row} does not"
        )
    if code == Finding.BAD_TIER:
        raise UnsupportedError(
            f"block_table: expected entries in the hot tier, entry {value} of row {row} is in another; "
            "use tiered_attention"
        )
    if code == Finding.NO_TIER:
        raise ShapeError(
            f"block_table: expected entries in the tiers of tier_caches, entry {value} of row {row} is in none of them"
        )
    if code == Finding.BAD_UNIT:
        raise ShapeError(
            f"block_table: expected entries in a quantized tier to be 8 granules at multiples of 8, in their tier and "
            f"in the sequence; entry {value} of row {row} is not"
        )
    if code == Finding.BAD_PLACE:
        raise ShapeError(
            f"block_table: expected entries within their tier, entry {value} of row {row} begins before it or ends "
            f"after it"
        )
    if code == Finding.BAD_SLOT:
        raise ShapeError(
            f"slot_mapping: expected slots within [0, {block_size * num_blocks}) or -1, got {value} for token {row}"
        )
    raise ShapeError(f"block_table: expected blocks within [0, {num_blocks}), got {value} in row {row}")
