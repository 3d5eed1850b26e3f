"""`attention_call` settles what callers may leave out or say in several ways."""

import numpy as np
import pytest

from kvtoolkit.arrays.call import AttentionCall, Hints, attention_call, check_hints, heads_first
from kvtoolkit.arrays.host import Operand, operand
from kvtoolkit.attention.arguments import count_queries
from kvtoolkit.errors import ShapeError

Q = operand(np.zeros((3, 8, 64), np.float32), "q")
HND = operand(np.zeros((5, 2, 16, 64), np.float32), "cache")
NHD = operand(np.zeros((5, 16, 2, 64), np.float32), "cache")
TABLE, LENGTHS = operand(np.zeros((3, 4), np.int32), "table"), operand(np.zeros(3, np.int32), "lengths")


def call_of(cache=HND, **options) -> AttentionCall:
    return attention_call(Q, cache, cache, TABLE, None, LENGTHS, out=Q, **options)


def test_the_scale_has_a_default():
    assert call_of().scale == 64**-0.5
    assert call_of(softmax_scale=0.25).scale == 0.25


@pytest.mark.parametrize(
    ("causal", "window", "bounds"),
    [(True, (-1, -1), (-1, 0)), (True, (7, 3), (7, 0)), (False, (-1, -1), (-1, -1)), (False, (7, 3), (7, 3))],
)
def test_causal_is_a_bound_on_the_right(causal, window, bounds):
    call = call_of(causal=causal, window_size=window)
    assert (call.left, call.right) == bounds


def test_a_layout_is_a_view():
    call = call_of(NHD, layout="NHD")
    assert call.k_cache.shape == call.v_cache.shape == HND.shape
    assert call.k_cache.strides == (16 * 2 * 64, 64, 2 * 64, 1)
    assert (call.k_cache.address, call.k_cache.owner is NHD.owner) == (NHD.address, True)
    assert heads_first(HND, "HND") is HND


def test_every_field_has_its_own_place():
    arrays = {
        name: operand(np.zeros(1, np.float32), name)
        for name in ("out", "lse", "cu_seqlens_q", "sinks", "alibi_slopes", "tiers", "block_mass")
    }
    call = attention_call(Q, HND, NHD, TABLE, LENGTHS, Q, **arrays, softcap=3.0, num_splits=5)
    for name, array in arrays.items():
        assert getattr(call, name) is array
    assert (call.q, call.k_cache, call.v_cache, call.block_table) == (Q, HND, NHD, TABLE)
    assert (call.block_starts, call.seq_lens, call.softcap, call.num_splits) == (LENGTHS, Q, 3.0, 5)


@pytest.mark.parametrize(
    ("most", "num_tokens", "batch", "counts"),
    [(1, 4, 4, (1, 1)), (3, 9, 3, (3, 3)), (3, 11, 4, (2, 3)), (4, 4, 4, (0, 4)), (9, 5, 1, (5, 5)), (2, 0, 3, (0, 0))],
)
def test_the_fewest_queries_of_a_row_are_what_the_others_cannot_hold(most, num_tokens, batch, counts):
    lengths = Operand(64, (batch,), (1,), "int32", None, True, 0)
    assert count_queries(most, num_tokens, lengths, None) == counts


def test_hints_that_rows_contradict_are_refused():
    lengths, bounds = np.array([5, 9], np.int32), np.array([0, 1, 5], np.int32)
    check_hints(Hints((0, 4), 9), lengths, bounds)
    check_hints(Hints((0, 3)), lengths, None)
    with pytest.raises(ShapeError, match="max_seqlen_q: expected at least 4, the longest row by cu_seqlens_q, got 3"):
        check_hints(Hints((0, 3)), lengths, bounds)
    with pytest.raises(ShapeError, match="max_seqlen_k: expected at least 9, the longest of seq_lens, got 8"):
        check_hints(Hints(None, 8), lengths, bounds)
