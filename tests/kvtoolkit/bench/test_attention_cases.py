"""The batches that attention is measured on: which blocks their sequences have, and what is asked of a GPU's state."""

import itertools

import pytest

from kvtoolkit.bench import timing
from kvtoolkit.bench.attention import summary
from kvtoolkit.bench.attention_cases import KINDS, SHAPES, Shape


@pytest.mark.parametrize("name", sorted({name for kind, names in KINDS.items() if kind != "sweep" for name in names}))
def test_bytes_are_those_of_different_blocks(name):
    shape = SHAPES[name]
    rows = shape.places(16)
    places = {place for row in rows for place in row}
    assert sorted(places) == list(range(len(places)))
    assert [len(row) for row in rows] == [-(-n // 16) for n in shape.lengths]
    if all(n % 16 == 0 for n in shape.lengths):
        assert len(places) * 16 * shape.num_kv_heads * shape.head_dim * 4 == shape.kv_nbytes


def test_beginnings_are_shared_by_so_many_rows_at_each_level():
    rows = Shape("", (96,) * 8, beginnings=((4, 32), (2, 16))).places(16)
    for a, b in itertools.combinations(range(8), 2):
        in_common = len(set(rows[a]) & set(rows[b]))
        assert in_common == (3 if a // 2 == b // 2 else 2 if a // 4 == b // 4 else 0)


def test_the_summary_has_means_and_the_worst_of_each_kernel_of_ours():
    rows = [
        {"shape": shape, "kernel": kernel, "ratio": ratio}
        for shape, kernel, ratio in (
            ("a", "peer", None), ("a", "kvtoolkit", 2.0), ("b", "kvtoolkit", 0.5), ("b", "kvtoolkit, dependent", 1.5),
        )
    ]  # fmt: skip
    assert summary(rows) == [
        "kvtoolkit: 2 shapes, geometric mean 1.000, lowest 0.500 (b)",
        "kvtoolkit, dependent: 1 shapes, geometric mean 1.500, lowest 1.500 (b)",
    ]
    assert summary([]) == []


def test_a_gpu_that_is_not_there_has_no_state(monkeypatch):
    monkeypatch.setattr(timing, "_management", lambda: None)
    assert timing.gpu_state() == (0, 0.0)
