"""Batches whose prompts are cut over the keys, into so many parts as a merge of one or of two rounds is needed for."""

import itertools

from kvtoolkit.cuda import specs
from tests.kvtoolkit.attention.pooled_cases import Pooled

BLOCK = 16
RAGGED = {1: 1, 8: 2, 20: 5, 36: 9, 52: 13, 256: 64}
"""Tiles of keys of a row, and the parts that its items have on a GPU of 132 SMs."""


def ragged(
    tiles: tuple[int, ...] = tuple(RAGGED), queries: tuple[int, ...] = (9, 6, 17, 5, 8, 7), **shape: int
) -> Pooled:
    """Rows of so many tiles, in a batch that is cut by length: into parts of about four tiles."""
    keys, ids = specs.prompt_keys(shape.get("head_dim", 64)), itertools.count()
    lengths = [count * keys - 5 - i for i, count in enumerate(tiles)]
    rows = [list(itertools.islice(ids, -(-length // BLOCK))) for length in lengths]
    return Pooled(rows, lengths, queries[: len(tiles)], block_size=BLOCK, **shape)


def last_wave(tiles: int = 36, num_rows: int = 67) -> Pooled:
    """Rows of equal lengths that make 134 items of two heads: on 132 SMs two are left for a wave of their own."""
    length, ids = tiles * specs.prompt_keys(64) - 3, itertools.count()
    different = [list(itertools.islice(ids, -(-length // BLOCK))) for _ in range(3)]
    rows = [different[i % 3] for i in range(num_rows)]
    new = [5 + i % 2 for i in range(num_rows)]
    return Pooled(rows, [length] * num_rows, new, num_q_heads=8, num_kv_heads=2, block_size=BLOCK)
