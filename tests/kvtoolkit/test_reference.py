"""The reference against attention written another way: dense torch, and sums small enough to do by hand."""

import math

import numpy as np
import pytest

from kvtoolkit import reference, variable_block_attention
from tests.kvtoolkit.attention.attention_cases import Case


def test_one_key_is_returned_whatever_its_score() -> None:
    case = Case([1, 1])
    arrays = case.paged(4, "NHD")
    out, lse = case.expected(arrays)
    for row in range(2):
        for head in range(6):
            np.testing.assert_allclose(out[row, head], case.values[row][0, head // 3])
            score = 32**-0.5 * (case.q[row, head].astype(float) @ case.keys[row][0, head // 3])
            assert lse[row, head] == pytest.approx(score, rel=1e-6)


def test_a_sink_takes_its_share_of_the_weight() -> None:
    k_cache = np.zeros((1, 4, 1, 8))
    v_cache = np.ones((1, 4, 1, 8))
    q = np.ones((1, 1, 8))
    out, lse = reference.paged_attention(q, k_cache, v_cache, [[0]], [3], sinks=np.array([math.log(5.0)]))
    np.testing.assert_allclose(out, 3 / 8)
    np.testing.assert_allclose(lse, math.log(8))


def test_alibi_and_softcap_by_hand() -> None:
    k_cache = np.array([2.0, 4.0]).reshape(1, 2, 1, 1)
    v_cache = np.array([10.0, 20.0]).reshape(1, 2, 1, 1)
    scores = [3 * math.tanh(2 / 3) - 0.5, 3 * math.tanh(4 / 3)]
    weights = np.exp(scores) / np.sum(np.exp(scores))
    out, lse = reference.paged_attention(
        np.ones((1, 1, 1)), k_cache, v_cache, [[0]], [2], softmax_scale=1.0, softcap=3.0, alibi_slopes=np.array([0.5])
    )
    np.testing.assert_allclose(out, (weights @ [10.0, 20.0]).reshape(1, 1, 1))
    np.testing.assert_allclose(lse, math.log(np.sum(np.exp(scores))))


def test_rows_that_see_nothing() -> None:
    case = Case([0, 2], [1, 3])
    out, lse = case.expected(case.paged(4, "NHD"))
    assert (out[:2] == 0).all()
    assert np.isneginf(lse[:2]).all()
    assert (out[2:] != 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (9, 4)])
def test_the_reference_agrees_with_dense_torch(causal: bool, window: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    case = Case([50], [20])
    out, _ = case.expected(case.variable(), causal=causal, window_size=window)
    q, keys, values = (torch.from_numpy(x).double().transpose(0, 1) for x in (case.q, case.keys[0], case.values[0]))
    position = torch.arange(30, 50)[:, None]
    j = torch.arange(50)[None]
    mask = (j <= position) if causal else torch.ones(20, 50, dtype=torch.bool)
    if window[0] >= 0:
        mask = mask & (j >= position - window[0]) & (j <= position + window[1])
    dense = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    np.testing.assert_allclose(out, dense.transpose(0, 1).numpy(), rtol=1e-9, atol=1e-9)


def test_paged_and_variable_tables_name_the_same_tokens() -> None:
    case = Case([90, 0, 7], [20, 0, 7])
    wanted = case.expected(case.variable())
    for size, layout in ((1, "NHD"), (7, "HND"), (64, "NHD")):
        found = case.expected(case.paged(size, layout), layout)
        np.testing.assert_allclose(found[0], wanted[0])
        np.testing.assert_allclose(found[1], wanted[1])


def test_merging_the_halves_gives_the_whole() -> None:
    case = Case([40, 9])
    arrays = case.paged(8, "NHD")
    whole = case.expected(arrays)
    halves = []
    for lengths, table in (([16, 9], arrays[2]), ([24, 0], arrays[2][:, 2:])):
        halves += reference.paged_attention(case.q, *arrays[:2], table, lengths, causal=False)
    out, lse = reference.merge_states(*halves)
    np.testing.assert_allclose(out, whole[0])
    np.testing.assert_allclose(lse, whole[1])


def test_append_follows_the_slot_mapping() -> None:
    for layout, shape in (("NHD", (3, 4, 1, 2)), ("HND", (3, 1, 4, 2))):
        k_cache, v_cache = np.zeros(shape), np.zeros(shape)
        new = np.arange(6.0).reshape(3, 1, 2)
        reference.append(new, -new, k_cache, v_cache, [9, -1, 0], layout=layout)
        tokens = k_cache if layout == "NHD" else k_cache.swapaxes(1, 2)
        assert (tokens[2, 1, 0] == [0, 1]).all()
        assert (tokens[0, 0, 0] == [4, 5]).all()
        assert np.count_nonzero(k_cache) == 3
        assert (v_cache == -k_cache).all()


def test_bfloat16_words_widen_exactly() -> None:
    words = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], np.uint16)
    assert reference.to_float64(words, "bfloat16").tolist() == [1.0, -2.0, math.inf, 2.0**-133]


@pytest.mark.parametrize("window", [(2**31 - 1, 2**31 - 1), (-1, 2**31 - 1), (2**31 - 1, 0)])
@pytest.mark.parametrize("kind", [int, np.int32])
def test_the_widest_window_is_no_window(window: tuple[int, int], kind: type) -> None:
    case = Case([50, 9], [20, 9])
    arrays = case.variable()
    good, _ = case.expected(arrays, causal=window[1] == 0)
    wide = {"causal": False, "window_size": tuple(map(kind, window))}
    assert case.cu_seqlens_q.dtype == np.int32
    np.testing.assert_array_equal(case.expected(arrays, **wide)[0], good)
    out = variable_block_attention(case.q, *arrays, case.lengths, cu_seqlens_q=case.cu_seqlens_q, **wide)
    np.testing.assert_allclose(out, good, rtol=1e-4, atol=1e-4)
