"""`attention_call` settles what callers may leave out or say in several ways."""

import numpy as np
import pytest

from kvtoolkit.arrays.call import AttentionCall, attention_call, heads_first
from kvtoolkit.arrays.host import operand

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
