"""Configurations whose tables cannot fit in memory are refused with the figure, before anything is allocated."""

import tracemalloc

import pytest

from kvtoolkit import CacheConfig, ConfigError, KVCache
from kvtoolkit.cache.state import sizes
from kvtoolkit.cache.state.sizes import table_nbytes


def config(**fields):
    return CacheConfig(**{"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "num_tokens": 4096, **fields})


MASSES = {"hot": 64, "warm": "int8", "cold": "int4", "demote": "mass", "warm_tokens": 64, "pinned_tokens": 0}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_seqs": 1},
        {"max_seqs": 300, "max_entries": 17},
        {"max_seq_len": 100},
        {"num_tokens": 1 << 16, "tiers": MASSES},
    ],
)
def test_the_estimate_is_what_the_tables_take(fields):
    cache = KVCache(config(**fields))
    group = cache._state.group
    rows = sum(array.nbytes for array in group.table)
    index = sum(array.nbytes for array in (*group.blocks.nodes, *group.blocks.granules))
    assert table_nbytes(cache.config) == (pytest.approx(rows, rel=0.02), pytest.approx(index, rel=0.05))


@pytest.mark.parametrize(
    ("fields", "figure"),
    [
        (
            {"num_tokens": 1 << 26, "max_seqs": 1 << 20, "max_entries": 1 << 23},
            r"got 65,\d\d\d GiB: 65,\d\d\d for 1048576 rows of 8388608 entries",
        ),
        (
            {"num_tokens": 1 << 27, "max_seqs": 1 << 16, "max_entries": 1 << 24},
            r"got 8,\d\d\d GiB: 8,\d\d\d for 65536 rows of 16777216 entries",
        ),
        ({"max_seqs": 1 << 20, "max_entries": 1 << 20}, r"for 1048576 rows of 1048576 entries"),
        (
            {"num_tokens": 1 << 26, "max_seqs": 1 << 16, "max_entries": 8, "tiers": MASSES},
            r"for 65536 rows of 8 entries",
        ),
    ],
)
def test_tables_beyond_the_memory_are_refused_with_the_figure_and_without_allocating(fields, figure, monkeypatch):
    monkeypatch.setattr(sizes, "_physical_memory", lambda: 200 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=f"max_seqs: expected tables of at most 200 GiB.*{figure}"):
            KVCache(config(**fields))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_fits_is_not_refused(monkeypatch):
    needed = sum(table_nbytes(config()))
    monkeypatch.setattr(sizes, "_physical_memory", lambda: needed)
    KVCache(config())
    monkeypatch.setattr(sizes, "_physical_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match="max_seqs: expected tables"):
        KVCache(config())


@pytest.mark.parametrize("num_tokens", [1 << 10, 1 << 20, 1 << 24, 1 << 27])
@pytest.mark.parametrize("max_seqs", [1, 256, 10_000, 1 << 20])
@pytest.mark.parametrize("max_seq_len", [None, 1 << 10, 1 << 17])
def test_the_block_table_is_bounded_unless_rows_need_more(num_tokens, max_seqs, max_seq_len):
    settings = config(num_tokens=num_tokens, max_seqs=max_seqs, max_seq_len=max_seq_len)
    entries, longest = settings.entries_limit, settings.seq_len_limit
    needed = min(longest, max(64 * 64, 2 * num_tokens // max_seqs, max_seq_len or 0))
    assert 64 * entries >= needed
    assert 8 * entries * max_seqs <= 256 << 20 or 64 * (entries - 1) < max(64 * 64, needed)
    assert entries == -(-longest // 8) or 8 * (entries + 1) * max_seqs > 256 << 20
    assert config(num_tokens=num_tokens, max_entries=7).entries_limit == 7
