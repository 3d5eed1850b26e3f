"""The prompt kernel where items are cut over the keys, with every option that changes what a part does."""

import numpy as np
import pytest

from kvtoolkit import reference
from kvtoolkit.attention.calls import paged_attention
from tests.kvtoolkit.attention.gpu_cases import assert_close, run, to_device, to_host
from tests.kvtoolkit.attention.pooled_cases import Pooled
from tests.kvtoolkit.attention.prompt_parts import last_wave, ragged
from tests.kvtoolkit.attention.test_attention import SINKS, SLOPES

pytestmark = pytest.mark.gpu

SHORT = (8, 20, 36, 1)  # tiles: 2, 5, 9 parts and 1
TWO_HEADS = {"num_q_heads": 6, "num_kv_heads": 2}
SHAPES = [{"head_dim": 80}, {"head_dim": 112}, {"head_dim": 256}, {"num_q_heads": 71, "queries": (2, 3, 4, 2)}]


def check(case: Pooled, **options):
    """The kernel agrees with float64, and two runs have the same bits; ``out, lse``."""
    out, lse = run(case, case.arrays, "HND", **options)
    again, lse_again = run(case, case.arrays, "HND", **options)
    assert np.array_equal(out.view(np.uint16), again.view(np.uint16))
    assert np.array_equal(lse, lse_again)
    assert_close(out, lse, *case.expected(**options), case.dtype)
    return out, lse


def test_items_of_2_to_64_parts():
    check(ragged())


def test_a_last_wave_that_is_cut():
    check(last_wave())


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window_size": (-1, 3), "causal": False},
        {"window_size": (1500, 3), "causal": False},
        {"window_size": (700, 0)},
        {"sinks": SINKS[:4]},
        {"softmax_scale": 0.0},
        {"softmax_scale": -0.1},
        {"softmax_scale": -0.05, "softcap": 5.0, "alibi_slopes": SLOPES[:4] / 100},
    ],
    ids=str,
)
def test_options_with_parts(options):
    check(ragged(SHORT), **options)


@pytest.mark.parametrize(
    "shape", [{"head_dim": 80}, {"head_dim": 112}, {"head_dim": 256}, {"num_q_heads": 71}], ids=str
)
def test_shapes_with_parts(shape):
    check(ragged(SHORT, **shape))


def test_the_output_may_be_in_place_of_the_queries():
    for case in (ragged(SHORT), last_wave(16)):
        out, lse = run(case, case.arrays, "HND")
        arrays = [to_device(array, "") for array in (case.q, *case.arrays, case.lengths)]
        found, found_lse = paged_attention(
            *arrays, layout="HND", cu_seqlens_q=to_device(case.bounds, ""), out=arrays[0], return_lse=True
        )
        assert found is arrays[0]
        assert np.array_equal(to_host(found).view(np.uint16), out.view(np.uint16))
        assert np.array_equal(to_host(found_lse), lse)


def test_strided_queries_and_outputs():
    import torch

    case = ragged(SHORT, **TWO_HEADS)
    good, _ = run(case, case.arrays, "HND")
    tokens, heads, dim = case.q.shape
    qkv = torch.full((tokens, heads + 3, dim), float("nan"), device="cuda", dtype=torch.float16)
    qkv[:, 1:-2] = to_device(case.q, "")
    out = torch.full((tokens, 2, heads, dim), float("nan"), device="cuda", dtype=torch.float16)
    caches = [to_device(array, "") for array in case.arrays]
    bounds = to_device(case.bounds, "")
    paged_attention(
        qkv[:, 1:-2], *caches, to_device(case.lengths, ""), layout="HND", cu_seqlens_q=bounds, out=out[:, 1]
    )  # fmt: skip
    assert np.array_equal(to_host(out[:, 1]).view(np.uint16), good.view(np.uint16))
    assert out[:, 0].isnan().all()


@pytest.mark.parametrize(("part", "value"), [(0, np.nan), (1, np.nan), (1, np.inf), (1, -np.inf)])
def test_numbers_that_are_none_in_one_part_reach_all_that_see_them(part, value):
    clean = ragged(SHORT)
    before, lse_before = run(clean, clean.arrays, "HND")
    case = ragged(SHORT)
    at = 3200  # of the third row: in none of its first or last parts
    case.caches[part][case.rows[2][at // 16], 0, at % 16, 3] = value
    out, lse = run(case, case.arrays, "HND")
    good, good_lse = case.expected()
    asked = slice(case.bounds[2], case.bounds[3])
    for found, wanted in ((out, good), (lse, good_lse)):
        assert np.array_equal(np.isnan(found), np.isnan(wanted))
        assert np.array_equal(np.isposinf(found), np.isposinf(wanted))
        assert np.array_equal(np.isneginf(found), np.isneginf(wanted))
    assert not np.isfinite(out[asked, :, 3]).any()
    is_finite = np.isfinite(good)
    np.testing.assert_allclose(reference.to_float64(out)[is_finite], good[is_finite], atol=1e-3, rtol=2e-3)
    others = np.ones(len(out), bool)
    others[asked] = False
    assert np.array_equal(out[others], before[others])
    assert np.array_equal(lse[others], lse_before[others])
