"""Promotion inside device memory: after how many reads it has paid, and the whole bench on small batches."""

import json

import numpy as np
import pytest

from kvtoolkit.bench.promotion import PromotionCase, parse_shape, pays_after, promotions_table, reads_table
from kvtoolkit.bench.timing import Timing
from kvtoolkit.commands import cli


def timing(us, scatter=0.0):
    return Timing(us, us - scatter, us + scatter, 1500, 300.0, False)


@pytest.mark.parametrize(
    ("promotion", "read", "hot", "expected"),
    [
        (100.0, 30.0, 20.0, 10),
        (101.0, 30.0, 20.0, 11),
        (5.0, 30.0, 20.0, 1),
        (100.0, 20.0, 30.0, None),
        (100.0, 20.0, 20.0, None),
    ],
)
def test_a_promotion_has_paid_when_it_has_saved_what_it_took(promotion, read, hot, expected):
    assert pays_after(timing(promotion), timing(read), timing(hot)) == expected


def test_a_gain_within_the_scatter_is_none():
    assert pays_after(timing(100.0), timing(30.0, 6.0), timing(20.0, 5.0)) is None
    assert pays_after(timing(100.0), timing(30.0, 4.0), timing(20.0, 5.0)) == 10


def test_the_tables_say_what_is_slower_and_what_never_pays():
    row = {
        "shape": "64x8192+8", "tiers": "int8", "layers": 8, "read": timing(20.0)._asdict(),
        "hot_read": timing(30.0)._asdict(), "hot_alone": timing(29.0)._asdict(), "promotion": timing(50.0)._asdict(),
        "nbytes_before": 1 << 20, "nbytes_after": 3 << 20, "gbps": 1500.0, "error": 1e-2, "error_promoted": 2e-2,
        "pays_after": None,
    }  # fmt: skip
    assert reads_table([row]).splitlines()[2:] == ["| 64 x 8192 + 8 | 8 | 29.0 | 30.0 | 20.0 |"]
    assert promotions_table([row, {**row, "pays_after": 7}], 3000.0).splitlines()[2:] == [
        "| 64 x 8192 + 8 | int8 | 50.0 | 1500 | 50% | +10.0 | never | 2.0 | 1.0e-02, 2.0e-02 |",
        "| 64 x 8192 + 8 | int8 | 50.0 | 1500 | 50% | +10.0 | 7 reads | 2.0 | 1.0e-02, 2.0e-02 |",
    ]


def test_the_newest_tokens_and_all_new_ones_are_16_bit():
    for text, old in (("2x448", 3), ("2x448+8", 3), ("1x384+512", 6)):
        case = PromotionCase(parse_shape(text), "cpu", 1)
        assert case.num_old == old
        assert [len(np.unique(tiles)) for tiles in case._granules.values()] == [
            case.shape.batch * -(-case.shape.lengths[0] // 64)
        ] * 3


def test_bytes_before_and_after_are_those_of_the_formats():
    case = PromotionCase(parse_shape("2x512"), "cpu", 1)  # 4 old tiles of each sequence, 8 kv heads
    tokens = 2 * 4 * 64 * 8
    assert case.promoted_nbytes((1,)) == (260 * tokens, 512 * tokens)
    assert case.promoted_nbytes((2,)) == (140 * tokens, 512 * tokens)
    assert case.promoted_nbytes((1, 2)) == (200 * tokens, 512 * tokens)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_command_measures_prints_and_writes(backend, tmp_path, capsys):
    found = tmp_path / "found.json"
    arguments = ["--shape", "1x448", "2x448+3", "--layers", "2", "--replays", "2", "--backend", backend]
    assert cli.main(["bench", "promotion", *arguments, "--json", str(found)]) == 0
    assert "| 2 x 448 + 3 | half of each |" in capsys.readouterr().out
    rows = json.loads(found.read_text())["rows"]
    assert [(row["shape"], row["tiers"]) for row in rows] == [
        (shape, tiers) for shape in ("1x448", "2x448+3") for tiers in ("int8", "int4", "half of each")
    ]
    for row in rows:  # promotion brings no accuracy back
        assert row["error_promoted"] == pytest.approx(row["error"], rel=0.2)


@pytest.mark.parametrize("text", ["64", "0x512", "1x256", "1x512+0", "1x512+", "x512"])
def test_a_shape_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "promotion", "--backend", "cpu", "--shape", text])
    assert "--shape: expected" in capsys.readouterr().err
