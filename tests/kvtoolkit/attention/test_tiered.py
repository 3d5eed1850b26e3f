"""Attention over hot, int8 and int4 tiles on the CPU against the float64 reference, the masses, and the refusals."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtoolkit
from kvtoolkit import cpu, reference
from kvtoolkit.attention.calls import tiered_attention, variable_block_attention
from kvtoolkit.cpu import problem
from kvtoolkit.errors import ShapeError, UnsupportedError
from kvtoolkit.formats.entry import TIER_COLD, TIER_HOT, TIER_WARM, pack_entry, unpack_entries
from kvtoolkit.formats.quantized import INT4, INT8
from kvtoolkit.formats.tier_caches import TierCaches
from tests.kvtoolkit.attention.attention_cases import assert_close, make_call
from tests.kvtoolkit.attention.tiered_cases import TILE, TieredCase, described

DTYPES = ("float32", "float16", "bfloat16")
PATTERNS = ["".join(letters) for count in (1, 2, 3) for letters in itertools.product("hwc", repeat=count)]
SLOPES = np.array([0.5, 0.25, 0.1, 0.0, 1.0, 0.03], np.float32)
SINKS = np.array([-2.0, 0.0, 3.0, 30.0, -np.inf, 1.0], np.float32)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "acausal": {"causal": False},
    "window": {"window_size": (70, 5)},
    "left": {"window_size": (64, -1)},
    "right": {"window_size": (-1, 3), "causal": False},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": SINKS},
    "alibi": {"alibi_slopes": SLOPES},
    "splits": {"num_splits": 3},
    "scale": {"softmax_scale": 0.02},
    "all": {
        "causal": False, "window_size": (150, 2), "softcap": 30.0, "sinks": SINKS, "alibi_slopes": SLOPES,
        "num_splits": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pattern", ["h", "w", "c", "mixed"])
def test_every_kind_of_length(pattern: str, head_dim: int, dtype: str) -> None:
    seq_lens = [0, 1, 7, 8, 63, 64, 65, 127, 128, 129, 191, 1000]
    patterns = None if pattern == "mixed" else [pattern * (-(-n // TILE)) for n in seq_lens]
    case = TieredCase(seq_lens, head_dim=head_dim, dtype=dtype, patterns=patterns)
    case.check(case.tiered())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("last", [1, 40, 64])
def test_every_pattern_of_tiers(last: int, head_dim: int, dtype: str) -> None:
    seq_lens = [TILE * (len(pattern) - 1) + last for pattern in PATTERNS]
    case = TieredCase(seq_lens, head_dim=head_dim, dtype=dtype, patterns=PATTERNS)
    case.check(case.tiered())


@pytest.mark.parametrize("new", [None, [3, 1, 8, 2, 5, 7], [70, 4, 33, 64, 150, 1]], ids=["decode", "verify", "chunk"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_across_the_boundaries_of_tiers(name: str, new: list[int] | None) -> None:
    patterns = ["hwc", "wch", "chw", "cwhh", "wwcch", "c"]
    case = TieredCase([190, 129, 192, 200, 301, 50], new, patterns=patterns)
    case.check(case.tiered(), **OPTIONS[name])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_splits(num_splits: int, head_dim: int) -> None:
    case = TieredCase([1000, 1, 65, 640], [1, 1, 5, 70], head_dim=head_dim)
    case.check(case.tiered(), num_splits=num_splits)


@pytest.mark.parametrize("group_size", [1, 2, 7, 8, 100])
def test_every_group_size(group_size: int) -> None:
    case = TieredCase([70, 1, 130], [1, 1, 9], num_q_heads=2 * group_size)
    case.check(case.tiered())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_drawn_shapes(data: st.DataObject) -> None:
    seq_lens = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=4))
    new = [data.draw(st.integers(0, min(n + 2, 80))) for n in seq_lens]
    heads = data.draw(st.integers(1, 3))
    case = TieredCase(
        seq_lens,
        new,
        num_q_heads=heads * data.draw(st.sampled_from([1, 2, 3])),
        num_kv_heads=heads,
        head_dim=data.draw(st.sampled_from([64, 128])),
        dtype=data.draw(st.sampled_from(DTYPES)),
        seed=data.draw(st.integers(0, 1000)),
    )
    options = {
        "causal": data.draw(st.booleans()),
        "window_size": (data.draw(st.integers(-1, 150)), data.draw(st.integers(-1, 150))),
        "num_splits": data.draw(st.integers(0, 5)),
    }
    arrays = case.tiered()
    masses = case.no_masses(arrays)
    out, lse = case.run(arrays, block_mass=masses, **options)
    assert_close(out, lse, *case.expected(arrays, **options), case.dtype)
    case.check_masses(arrays, masses, **options)


@pytest.mark.parametrize("letter", ["w", "c"])
def test_the_error_does_not_grow_with_the_length(letter: str) -> None:
    errors = []
    for n in (64, 8192):
        case = TieredCase([n], num_q_heads=4, num_kv_heads=1, head_dim=128, patterns=[letter * (n // TILE)])
        arrays = case.tiered()
        out, _ = case.run(arrays)
        good, _ = case.expected(arrays)
        errors.append(np.linalg.norm(out - good) / np.linalg.norm(good))
    assert max(errors) <= 1e-5
    assert errors[1] <= 4 * max(errors[0], 1e-6)


def test_rows_without_quantized_tiles_keep_their_bits() -> None:
    seq_lens = [577, 64, 130, 9, 300]
    hot = ["h" * (-(-n // TILE)) for n in seq_lens]
    case = TieredCase(seq_lens, [1, 5, 40, 9, 2], patterns=[*hot[:-1], "hwchw"])
    caches, table, starts = case.tiered()
    masses, plain_masses = case.no_masses((caches, table, starts)), case.no_masses((caches, table, starts))
    out, lse = case.run((caches, table, starts), block_mass=masses)
    first = caches.first_granules[0]
    plain = table[:4] - np.where(table[:4] >= 0, first, 0).astype(np.int32)
    good, good_lse = variable_block_attention(
        case.q[:55], *caches[:2], plain, starts[:4], case.lengths[:4], cu_seqlens_q=case.cu_seqlens_q[:5],
        block_mass=plain_masses[:4], return_lse=True,
    )  # fmt: skip
    assert np.array_equal(out[:55], good)
    assert np.array_equal(lse[:55], good_lse)
    assert np.array_equal(masses[:4], plain_masses[:4])


def test_neither_the_batch_nor_the_threads_around_a_row_change_its_bits() -> None:
    case = TieredCase([1200, 30, 0, 700, 5], [1, 30, 0, 64, 1])
    caches, table, starts = case.tiered()
    out, lse = case.run((caches, table, starts))
    bounds, before = case.cu_seqlens_q, cpu.num_threads()
    try:
        cpu.set_num_threads(1)
        for row in range(5):
            asked = slice(bounds[row], bounds[row + 1])
            alone, alone_lse = tiered_attention(
                case.q[asked], caches, table[row : row + 1], starts[row : row + 1], case.lengths[row : row + 1],
                cu_seqlens_q=np.array([0, bounds[row + 1] - bounds[row]], np.int32), return_lse=True,
            )  # fmt: skip
            assert np.array_equal(out[asked], alone)
            assert np.array_equal(lse[asked], alone_lse)
    finally:
        cpu.set_num_threads(before)


def test_tiers_that_a_table_does_not_use_may_be_missing() -> None:
    for letters, missing in (("hw", "cold"), ("hc", "warm"), ("h", "warm")):
        case = TieredCase([200], patterns=[(letters * 4)[:4]])
        caches, table, starts = case.tiered()
        arrays = (caches._replace(**{missing: None}), table, starts)
        case.check(arrays)


@pytest.mark.parametrize("head_dim", [32, 80])
def test_head_dims_without_formats_have_a_hot_tier(head_dim: int) -> None:
    case = TieredCase([100], head_dim=64, patterns=["hh"])
    caches, table, starts = case.tiered()
    k_cache, v_cache = (np.resize(np.nan_to_num(cache), (*cache.shape[:3], head_dim)) for cache in caches[:2])
    q = np.resize(case.q, (1, 6, head_dim))
    arrays = (q, TierCaches(k_cache, v_cache, first_granules=caches.first_granules), table, starts, case.lengths)
    out, lse = tiered_attention(*arrays, return_lse=True)
    assert_close(out, lse, *reference.tiered_attention(*arrays), "float32")


# -- masses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("new", [None, [1, 0, 4, 130, 2]], ids=["decode", "ragged"])
def test_masses(new: list[int] | None, num_splits: int, dtype: str) -> None:
    case = TieredCase([1500, 0, 64, 190, 65], new, dtype=dtype)
    arrays = case.tiered()
    good, good_lse = case.run(arrays, num_splits=num_splits)
    masses = case.no_masses(arrays)
    out, lse = case.run(arrays, num_splits=num_splits, block_mass=masses)
    assert np.array_equal(out.view(np.uint8), good.view(np.uint8))
    assert np.array_equal(lse, good_lse)
    case.check_masses(arrays, masses)
    for row, n in enumerate(case.seq_lens):
        asks = new is None or new[row] > 0
        np.testing.assert_allclose(masses[row].sum(axis=0), 1.0 if n and asks else 0.0, atol=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_masses_with_every_option(name: str) -> None:
    case = TieredCase([190, 129, 700], [3, 1, 100])
    arrays = case.tiered()
    masses = case.no_masses(arrays)
    good, _ = case.run(arrays, **OPTIONS[name])
    out, _ = case.run(arrays, block_mass=masses, **OPTIONS[name])
    assert np.array_equal(out, good)
    case.check_masses(arrays, masses, **OPTIONS[name])


def test_masses_without_a_request_for_lse() -> None:
    case = TieredCase([700, 64])
    caches, table, starts = case.tiered()
    masses = case.no_masses((caches, table, starts))
    tiered_attention(case.q, caches, table, starts, case.lengths, block_mass=masses)
    case.check_masses((caches, table, starts), masses)


def test_a_query_that_sees_nothing_counts_as_no_mass() -> None:
    case = TieredCase([3, 70], [6, 75], patterns=["w", "cw"])
    arrays = case.tiered()
    masses = case.no_masses(arrays)
    case.run(arrays, block_mass=masses)
    case.check_masses(arrays, masses)
    np.testing.assert_allclose(masses.sum(axis=1), [[3 / 6] * 2, [70 / 75] * 2], atol=1e-3)


def test_the_masses_of_the_reference_by_hand() -> None:
    head_dim = 64
    cache = np.zeros((16, 1, 8, head_dim))
    entries = np.array([[pack_entry(0, 8, TIER_HOT), pack_entry(8, 8, TIER_HOT)]])
    masses = reference.tile_masses(
        np.ones((1, 2, head_dim)), TierCaches(cache, cache), entries, np.array([[0, 8]]), np.array([96]),
        sinks=np.array([-np.inf, np.log(32.0)]),
    )  # fmt: skip
    wanted = [(64 / 96 + 64 / 128) / 2, (32 / 96 + 32 / 128) / 2]
    np.testing.assert_allclose(masses, np.reshape(wanted, (1, 2, 1)))


# -- another layer -----------------------------------------------------------------------------------------------------


def test_another_layer_differs_in_addresses_only() -> None:
    cases = [TieredCase([300, 64, 9], [4, 1, 2], seed=seed, patterns=["hwchw", "c", "w"]) for seed in (0, 1)]
    for case in cases:
        case.rng = np.random.default_rng(7)  # other tokens in the same places
    layers = [case.tiered() for case in cases]
    first, second = layers[0][0], layers[1][0]
    assert np.array_equal(layers[0][1], layers[1][1])
    outs = [np.full_like(case.q, np.nan) for case in cases]
    masses = [case.no_masses(arrays) for case, arrays in zip(cases, layers, strict=True)]
    call = make_call(
        cases[0].q, *first[:2], *layers[0][1:], cases[0].lengths, cu_seqlens_q=cases[0].cu_seqlens_q, out=outs[0],
        tiers=described(first), block_mass=masses[0],
    )  # fmt: skip
    prepared = cpu.attend(call)
    assert prepared.problem[problem.LSE] == 0  # not that of an array which is gone
    addresses = [cpu.operand(a, "a").address for a in (cases[1].q, *second[:2], outs[1], *second[2:4], masses[1])]
    cpu.attend_prepared(
        prepared, *addresses[:4], warm=addresses[4], cold=addresses[5], block_mass=addresses[6]
    )  # fmt: skip
    for case, arrays, out, mass in zip(cases, layers, outs, masses, strict=True):
        good_mass = case.no_masses(arrays)
        good, _ = case.run(arrays, block_mass=good_mass)
        assert np.array_equal(out, good)
        assert np.array_equal(mass, good_mass)
    masses[1][:] = np.nan
    cpu.attend_prepared(prepared, *addresses[:4], warm=addresses[4], cold=addresses[5])
    assert np.isnan(masses[1]).all()
    assert np.array_equal(outs[1], cases[1].run(layers[1])[0])


# -- refusals ----------------------------------------------------------------------------------------------------------


def entry_of(table: np.ndarray, tier: int) -> tuple[int, int]:
    """Where the table has its first entry in a tier."""
    rows, columns = np.nonzero(unpack_entries(table)[2] == tier)
    return int(rows[0]), int(columns[0])


def changed_entry(table: np.ndarray, tier: int, change: Any) -> np.ndarray:
    table = table.copy()
    place = entry_of(table, tier)
    table[place] = change(int(table[place]))
    return table


# tier of the entry, what becomes of it, what the message says
WRONG_ENTRIES: list[tuple[int, Any, str]] = [
    (TIER_WARM, lambda e: e & ~(7 << 27) | 3 << 27, "in none of them"),
    (TIER_HOT, lambda e: e | 4 << 27, "in none of them"),
    (TIER_WARM, lambda e: e & ~(7 << 24) | 6 << 24, "8 granules at multiples of 8"),
    (TIER_COLD, lambda e: e + 1, "8 granules at multiples of 8"),
    (TIER_COLD, lambda e: e + (1 << 20), "within their tier"),
    (TIER_WARM, lambda e: e + 8 * 1000, "within their tier"),
    (TIER_WARM, lambda e: e & ~0xFFFFFF, "within their tier"),
    (TIER_COLD, lambda e: e & ~0xFFFFFF, "within their tier"),
    (TIER_HOT, lambda e: e & ~0xFFFFFF, "within their tier"),
    (TIER_HOT, lambda e: e | 0xFFFFFF, "within their tier"),
    (TIER_HOT, lambda e: e & ~(7 << 27) | 1 << 27, "8 granules at multiples of 8|within their tier"),
]


@pytest.mark.parametrize("i", range(len(WRONG_ENTRIES)))
def test_entries_that_no_tier_holds_are_refused_before_anything_is_written(i: int) -> None:
    tier, change, message = WRONG_ENTRIES[i]
    case = TieredCase([300, 64], patterns=["hwchw", "c"])
    caches, table, starts = case.tiered()
    out, masses = np.full_like(case.q, 7.0), np.full_like(case.no_masses((caches, table, starts)), 7.0)
    with pytest.raises(ShapeError, match=f"^block_table: .*({message})"):
        tiered_attention(
            case.q, caches, changed_entry(table, tier, change), starts, case.lengths, out=out, block_mass=masses
        )
    assert (out == 7.0).all()
    assert (masses == 7.0).all()


@pytest.mark.parametrize("missing", ["warm", "cold"])
def test_a_tier_that_is_not_there_is_refused(missing: str) -> None:
    case = TieredCase([300], patterns=["wchhw"])
    caches, table, starts = case.tiered()
    out = np.full_like(case.q, 7.0)
    with pytest.raises(ShapeError, match="^block_table: .* in none of them"):
        tiered_attention(case.q, caches._replace(**{missing: None}), table, starts, case.lengths, out=out)
    assert (out == 7.0).all()
    with pytest.raises(UnsupportedError, match="use tiered_attention"):
        variable_block_attention(case.q, *caches[:2], table, starts, case.lengths, out=out)
    assert (out == 7.0).all()


def test_a_quantized_entry_that_begins_within_a_tile_is_refused() -> None:
    case = TieredCase([200], patterns=["hwhh"])
    caches, _, _ = case.tiered()
    hot, warm = caches.first_granules[0] + 2, caches.first_granules[1] + 8
    lengths = (4, 8, 8, 5)
    entries = [
        pack_entry(warm, n, TIER_WARM) if i == 1 else pack_entry(hot + sum(lengths[:i]), n, TIER_HOT)
        for i, n in enumerate(lengths)
    ]
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int32)[None]
    k_cache, v_cache = (np.zeros((40, *cache.shape[1:]), np.float32) for cache in caches[:2])
    with pytest.raises(ShapeError, match="8 granules at multiples of 8.*entry 1 of row 0"):
        tiered_attention(
            case.q, caches._replace(k_cache=k_cache, v_cache=v_cache), np.array([entries], np.int32), starts,
            case.lengths,
        )  # fmt: skip


def _strided(blocks: np.ndarray) -> np.ndarray:
    return np.repeat(blocks, 2, axis=0)[::2]


def _read_only(masses: np.ndarray) -> np.ndarray:
    masses.flags.writeable = False
    return masses


WRONG: list[tuple[str, Any]] = [
    ("warm", lambda c, m: {"warm": c.warm[..., :-1].copy()}),
    ("warm", lambda c, m: {"warm": c.cold}),
    ("warm", lambda c, m: {"warm": c.warm.astype(np.int8)}),
    ("warm", lambda c, m: {"warm": c.warm[:, :1].copy()}),
    ("warm", lambda c, m: {"warm": c.warm[0]}),
    ("warm", lambda c, m: {"warm": _strided(c.warm)}),
    ("cold", lambda c, m: {"cold": c.warm}),
    ("cold", lambda c, m: {"cold": _strided(c.cold)}),
    ("cold", lambda c, m: {"cold": [1]}),
    ("first_granules", lambda c, m: {"first_granules": (1, 8, 16)}),
    ("first_granules", lambda c, m: {"first_granules": (0, -8, 16)}),
    ("first_granules", lambda c, m: {"first_granules": (0, 8)}),
    ("first_granules", lambda c, m: {"first_granules": (0, 8, 1.5)}),
    ("first_granules", lambda c, m: {"first_granules": None}),
    ("k_cache", lambda c, m: {"k_cache": c.k_cache[:, :, :4], "v_cache": c.v_cache[:, :, :4]}),
    ("v_cache", lambda c, m: {"v_cache": c.v_cache[1:]}),
    ("block_mass", lambda c, m: m[:, :-1].copy()),
    ("block_mass", lambda c, m: m[1:]),
    ("block_mass", lambda c, m: m.astype(np.float64)),
    ("block_mass", lambda c, m: m[..., :1].copy()),
    ("block_mass", lambda c, m: np.repeat(m, 2, axis=0)[::2]),
    ("block_mass", lambda c, m: m[0]),
    ("block_mass", lambda c, m: _read_only(m)),
]


@pytest.mark.parametrize("i", range(len(WRONG)), ids=lambda i: f"{i}-{WRONG[i][0]}")
def test_a_wrong_argument_is_named_and_nothing_is_written(i: int) -> None:
    name, make = WRONG[i]
    case = TieredCase([300, 64], patterns=["hwchw", "c"])
    caches, table, starts = case.tiered()
    out, masses = np.full_like(case.q, 7.0), case.no_masses((caches, table, starts))
    wrong = make(caches, masses)
    if isinstance(wrong, dict):
        caches = caches._replace(**wrong)
    else:
        masses = wrong
    with pytest.raises((ShapeError, UnsupportedError), match=f"^{name}: expected"):
        tiered_attention(case.q, caches, table, starts, case.lengths, out=out, block_mass=masses)
    assert (out == 7.0).all()


def test_what_is_no_tier_caches_and_head_dims_without_formats_are_refused() -> None:
    case = TieredCase([64])
    caches, table, starts = case.tiered()
    for wrong in (None, caches.k_cache[:1], (1, 2, 3, 4, 5, 6)):
        with pytest.raises(ShapeError, match="^tier_caches: expected"):
            tiered_attention(case.q, wrong, table, starts, case.lengths)
    narrow = caches._replace(k_cache=caches.k_cache[..., :32].copy(), v_cache=caches.v_cache[..., :32].copy())
    with pytest.raises(UnsupportedError, match="head_dim: quantized tiers expect 64 or 128, got 32"):
        tiered_attention(case.q[..., :32].copy(), narrow, table, starts, case.lengths)


# -- around ------------------------------------------------------------------------------------------------------------


def test_torch_tensors_in_bfloat16() -> None:
    torch = pytest.importorskip("torch")
    case = TieredCase([300, 64, 130], dtype="bfloat16")
    arrays = case.tiered()
    good, _ = case.run(arrays)
    halves = [torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for a in (case.q, *arrays[0][:2])]
    others = [torch.from_numpy(array) for array in (*arrays[0][2:4], *arrays[1:], case.lengths)]
    caches = TierCaches(*halves[1:], *others[:2], first_granules=arrays[0].first_granules)
    masses = torch.from_numpy(case.no_masses(arrays))
    out = tiered_attention(halves[0], caches, *others[2:], block_mass=masses)
    assert np.array_equal(out.view(torch.uint16).numpy(), good)
    case.check_masses(arrays, masses.numpy())


def test_unused_places_are_poison() -> None:
    case = TieredCase([100, 64], patterns=["hw", "c"])
    caches, _, _ = case.tiered()
    assert np.isnan(caches.k_cache[:2]).all()
    with np.errstate(invalid="ignore"):
        for blocks, form in ((caches.warm, INT8), (caches.cold, INT4)):
            assert all(np.isnan(part).all() for part in form.decode(blocks[:1], 64))


PORTABLE = """
from kvtoolkit.cpu import vector
from tests.kvtoolkit.attention.tiered_cases import TieredCase
assert not vector.HAS_WIDE
for dtype in ("float32", "bfloat16"):
    for head_dim in (64, 128):
        case = TieredCase([330, 0, 70], [1, 0, 30], head_dim=head_dim, dtype=dtype, patterns=["hwchwc", "", "cw"])
        case.check(case.tiered())
"""


def test_a_machine_without_wide_registers_agrees_with_the_reference() -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "PYTHONPATH": str(root)}
    finished = subprocess.run(
        [sys.executable, "-c", PORTABLE], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr


def test_the_call_and_its_caches_are_public() -> None:
    assert kvtoolkit.tiered_attention is tiered_attention
    assert kvtoolkit.TierCaches is TierCaches


def test_what_stands_behind_a_rows_entries_is_not_looked_at():
    """A search among the entries once found one behind the first empty one, and read wherever it pointed."""
    case = TieredCase([250, 119, 47, 128], [0, 4, 7, 3], dtype="float16")
    caches, table, starts = case.tiered()
    table, starts = (np.pad(one, ((0, 0), (0, 8)), constant_values=-1) for one in (table, starts))
    expected = case.run((caches, table, starts))
    for row, n in enumerate(case.seq_lens):
        used = int(np.count_nonzero(table[row] >= 0))
        for entry, start in ((0, -1), (pack_entry(1 << 20, 8, TIER_HOT), 0), (pack_entry(40, 8, TIER_COLD), 8)):
            stale = table.copy(), starts.copy()
            stale[0][row, used + 1 :], stale[1][row, used + 1 :] = entry, start
            for one, other in zip(expected, case.run((caches, *stale)), strict=True):
                assert np.array_equal(one, other), (row, n)


@pytest.mark.parametrize("pattern", ["hhh", "www", "ccc"])
def test_values_in_front_of_the_window_do_not_come_in(pattern):
    case = TieredCase([180], dtype="float16", patterns=[pattern])
    case.values[0][70] = np.nan
    out, lse = case.run(arrays := case.tiered(), window_size=(100, 0))
    assert np.isfinite(out).all()
    assert_close(out, lse, *case.expected(arrays, window_size=(100, 0)), case.dtype)
