"""How much host memory the tables of a cache take, so that an impossible configuration gets a clear error."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from kvtoolkit.cache.state.block_table import make_block_table
from kvtoolkit.cache.state.prefix_index import make_granule_state, make_nodes
from kvtoolkit.errors import ConfigError

if TYPE_CHECKING:
    from kvtoolkit.config.cache import CacheConfig

_GIB = 1 << 30


def table_nbytes(config: "CacheConfig") -> tuple[int, int]:
    """Host bytes of the block table, and of the prefix index; keys and values are not included.

    Both are proportional to their sizes, so this makes and measures a few small tables.
    """

    if len(config.group_configs) > 1:
        rows, index = zip(*map(table_nbytes, config.group_configs), strict=True)
        return sum(rows), sum(index)

    def row(num_entries: int, num_tiles: int) -> int:
        return _nbytes(make_block_table(2, num_entries, num_tiles)) - _nbytes(
            make_block_table(1, num_entries, num_tiles)
        )

    empty = row(0, 0)
    entry, tile = row(1, 0) - empty, row(0, 1) - empty
    collects_mass = config.quantization is not None and config.quantization.demote == "mass"
    num_tiles = -(-config.seq_len_limit // 64) if collects_mass else 0
    granule = (_nbytes(make_nodes(64)) + _nbytes(make_granule_state(64, (0, 64, 64, 64, 64)))) // 64
    return config.max_seqs * (empty + entry * config.entries_limit + tile * num_tiles), granule * config.num_granules


def require_tables_fit(config: "CacheConfig") -> None:
    """ConfigError if the tables are larger than this machine's memory. Nothing of that size is allocated."""
    rows, index = table_nbytes(config)
    memory = _physical_memory()
    if rows + index > memory:
        raise ConfigError(
            f"max_seqs: expected tables of at most {memory / _GIB:.0f} GiB, this machine's memory, got "
            f"{(rows + index) / _GIB:,.0f} GiB: {rows / _GIB:,.0f} for {config.max_seqs} rows of "
            f"{config.entries_limit} entries, {index / _GIB:,.0f} for the index of {config.num_granules * 8} tokens; "
            "lower max_seqs, max_seq_len or max_entries"
        )


def _nbytes(arrays: Iterable[NDArray[Any]]) -> int:
    return sum(array.nbytes for array in arrays)


def _physical_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
