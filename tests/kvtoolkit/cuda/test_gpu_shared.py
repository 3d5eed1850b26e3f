"""Attention with shared reads on a GPU, for each kind of batch, option and shape that changes what its kernels do."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from kvtoolkit import cuda, reference
from kvtoolkit.arrays.call import Hints, Sharing, attention_call
from kvtoolkit.cuda import shared
from tests.kvtoolkit.attention.test_attention import SINKS
from tests.kvtoolkit.cuda.shared_kinds import Kind, make
from tests.kvtoolkit.cuda.test_shared import _is_hopper

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if not _is_hopper():
        pytest.skip("units are attended to by the prompt kernel of sm_90")


class Found(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    is_shared: bool


def attend(kind: Kind, *, is_strided: bool = False, in_place: bool = False, **options: Any) -> Found:
    """Attend with the hint that the rows share, into arrays of NaN."""
    import cupy

    batch = kind.pooled
    tokens, heads, dim = batch.q.shape
    if is_strided:
        q = cupy.full((tokens, heads + 3, dim), np.nan, np.float16)[:, 1:-2]
        out = cupy.full((tokens, 2, heads, dim), np.nan, np.float16)[:, 1]
    else:
        q, out = (cupy.full(batch.q.shape, np.nan, np.float16) for _ in range(2))
    q[...] = cupy.asarray(batch.q)
    out = q if in_place else out
    lse = cupy.full((tokens, heads), np.nan, np.float32)

    def described(array: Any) -> Any:
        return None if array is None else cuda.device_operand(cupy.asarray(array), "array")

    if "sinks" in options:
        options["sinks"] = described(options["sinks"])
    call = attention_call(
        described(q), *map(described, batch.caches), described(batch.table), None, described(batch.lengths),
        out=described(out), lse=described(lse), cu_seqlens_q=described(batch.cu_seqlens_q), **options,
    )  # fmt: skip
    counts = int(batch.new.min()), int(batch.new.max())
    prepared = cuda.attend(call, Hints(counts, None, {}, Sharing(described(kind.order))))
    cupy.cuda.Device().synchronize()
    return Found(cupy.asnumpy(out), cupy.asnumpy(lse), isinstance(prepared, shared.SharedAttention))


def assert_same_bits(found: Found, other: Found, rows: Any = slice(None)) -> None:
    assert np.array_equal(found.out.view(np.uint16)[rows], other.out.view(np.uint16)[rows])
    assert np.array_equal(found.lse.view(np.uint32)[rows], other.lse.view(np.uint32)[rows])


def assert_near(found: Found, good: np.ndarray, good_lse: np.ndarray) -> None:
    """Compare with what rounding to 16 bits twice may cost."""
    out = reference.to_float64(found.out)
    np.testing.assert_allclose(found.lse, good_lse, rtol=1e-5, atol=2e-4)
    np.testing.assert_array_less(np.abs(out - good), 2.0**-9 * (np.abs(good) + np.abs(good).max()) + 1e-30)
    assert np.linalg.norm(out - good) <= 1.5e-3 * np.linalg.norm(good)


def check(kind: Kind, **options: Any) -> None:
    """Reads are shared, the result is right, and a second run has the same bits."""
    found = attend(kind, **options)
    assert found.is_shared
    assert_near(found, *kind.pooled.expected(**options))
    assert_same_bits(found, attend(kind, **options))


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("name", ["rows_40", "levels_5", "many_units"])
def test_kinds(name, is_mixed):
    check(make(name, is_mixed=is_mixed))


@pytest.mark.parametrize(("name", "is_mixed"), [("rows_1023", True), ("rows_1024", False)])
def test_very_many_rows(name, is_mixed):
    check(make(name, is_mixed=is_mixed))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window_size": (-1, 3), "causal": False},
        {"softmax_scale": 0.0},
        {"softmax_scale": -0.1},
        {"softcap": 5.0},
        {"sinks": SINKS[:4]},
    ],
    ids=str,
)
def test_options(options):
    check(make("levels_5"), **options)


@pytest.mark.parametrize(
    "shape", [{"head_dim": 80}, {"head_dim": 112}, {"num_q_heads": 71}, {"num_q_heads": 1}], ids=str
)
def test_shapes(shape):
    check(make("levels_5", **shape))


@pytest.mark.parametrize("is_mixed", [False, True])
def test_strided_queries_and_outputs(is_mixed):
    kind = make("levels_5", is_mixed=is_mixed, num_q_heads=6, num_kv_heads=2)
    found = attend(kind, is_strided=True)
    assert found.is_shared
    assert_same_bits(found, attend(kind))


def test_an_output_in_place_of_the_queries_has_no_shared_reads():
    kind = make("many_units")
    found = attend(kind, in_place=True)
    assert not found.is_shared
    assert_near(found, *kind.pooled.expected())


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize(("part", "value"), [(0, np.nan), (1, np.nan), (1, np.inf), (1, -np.inf)])
def test_numbers_that_are_none_in_a_common_block_reach_its_rows_alone(part, value, at):
    kind = make("many_units")
    before = attend(kind)
    batch, row = kind.pooled, 12  # of the second family
    common = [block for block in batch.rows[row] if block in batch.rows[row + 1]]
    batch.caches[part][common[at], 0, 7, 3] = value
    sees = np.repeat([common[at] in blocks for blocks in batch.rows], batch.new)
    assert 0 < sees.sum() < len(sees) / 2
    found = attend(kind)
    assert found.is_shared
    assert_same_bits(found, before, ~sees)
    good, good_lse = batch.expected()
    assert not np.isfinite(found.out[sees, :, 3]).any()
    for one, other in ((found.out, good), (found.lse, good_lse)):
        for is_such in (np.isnan, np.isposinf, np.isneginf):
            assert np.array_equal(is_such(one), is_such(other))
    finite = np.isfinite(good)
    np.testing.assert_allclose(reference.to_float64(found.out)[finite], good[finite], atol=4e-3, rtol=4e-3)
