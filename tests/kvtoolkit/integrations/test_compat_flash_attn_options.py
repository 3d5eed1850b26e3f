"""What flash-attn's callers may add to a call: every option gives what dense torch math in float64 gives."""

import inspect
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvtoolkit import KVToolkitError, UnsupportedError  # noqa: E402
from kvtoolkit.integrations.flash_attn.calls import (  # noqa: E402
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

HEADS, KV_HEADS, DIM = 6, 2, 32
PLACES = [("cpu", "float32"), ("cpu", "bfloat16"), pytest.param(("cuda", "bfloat16"), marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=PLACES, ids="-".join)
def make(request):
    """Makes tensors of a test: random numbers of a shape, or the int32 tensor of a list."""
    device, dtype = request.param
    rng = torch.Generator().manual_seed(5)

    def tensor(*shape):
        if isinstance(shape[0], list):
            return torch.tensor(shape[0], dtype=torch.int32, device=device)
        return torch.randn(shape, generator=rng).to(getattr(torch, dtype)).to(device)

    return tensor


def dense(q, k, v, *, causal=False, window=(-1, -1), softcap=0.0, slopes=None, sinks=None):
    """``out, lse`` ``[n, heads, ...]`` in float64 of queries ``[n, heads, dim]``, the last of ``k`` ``[m, ...]``."""
    q, k, v = (states.double() for states in (q, k, v))
    k, v = (states.repeat_interleave(q.shape[1] // states.shape[1], 1) for states in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(k), device=q.device) - torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, len(q), 1)), 2)
    lse = scores.logsumexp(2)
    weights = (scores - lse.unsqueeze(2)).exp().nan_to_num(0.0)[:, :, : len(k)]
    return torch.einsum("hnm,mhd->nhd", weights, v), lse.t()


def turned(x, cos, sin, positions, interleaved):
    """``x`` ``[n, heads, dim]`` rotated in float64, pair by pair."""
    x, half = x.double().clone(), cos.shape[1]
    for i in range(half):
        one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = (table.double()[positions.long(), i, None] for table in (cos, sin))
        x[..., one], x[..., two] = x[..., one] * c - x[..., two] * s, x[..., one] * s + x[..., two] * c
    return x


def assert_close(got, expected, dtype):
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def paged(make, lengths, block_size=16, spare=0):
    """``k_cache, v_cache, table`` with room for ``spare`` more tokens a row; blocks in a mixed order."""
    per_row = -(-(max(lengths) + spare) // block_size)
    ids = np.random.default_rng(2).permutation(len(lengths) * per_row).reshape(len(lengths), per_row).tolist()
    shape = (len(lengths) * per_row, block_size, KV_HEADS, DIM)
    return make(*shape), make(*shape), make(ids)


def row_of(cache, table, row, length):
    """The first ``length`` tokens of a row of a paged cache."""
    return cache[table[row].long()].flatten(0, 1)[:length]


# -- rotary embedding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (9, 2)}], ids=str)
@pytest.mark.parametrize(("interleaved", "rotary_dim"), [(True, DIM), (False, DIM), (False, 16), (True, 16)])
@pytest.mark.parametrize("offsets", [False, True])
def test_queries_and_new_keys_are_rotated_at_their_positions(make, interleaved, rotary_dim, options, offsets):
    held, new = [5, 20], 3
    k_cache, v_cache, table = paged(make, held, spare=new)
    q, k, v = make(2, new, HEADS, DIM), make(2, new, KV_HEADS, DIM), make(2, new, KV_HEADS, DIM)
    angles = make(64, rotary_dim // 2).double()
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    first = [11, 40] if offsets else held
    before = k_cache.clone()
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, make(held), block_table=table, rotary_interleaved=interleaved,
        rotary_seqlens=make(first) if offsets else None, return_softmax_lse=True, **options,
    )  # fmt: skip
    for row, length in enumerate(held):
        places = first[row] + torch.arange(new, device=q.device)
        keys = turned(k[row], cos, sin, places, interleaved).to(q.dtype)
        assert_close(row_of(k_cache, table, row, length + new)[length:], keys.double(), q.dtype)
        spread = places if options else torch.full_like(places, first[row])
        queries = turned(q[row], cos, sin, spread, interleaved).to(q.dtype)
        keys = torch.cat((row_of(before, table, row, length), keys))
        named = {"causal": options.get("causal", False), "window": options.get("window_size", (-1, -1))}
        expected, expected_lse = dense(queries, keys, row_of(v_cache, table, row, length + new), **named)
        assert_close(out[row], expected, q.dtype)
        assert_close(lse[row].t(), expected_lse, q.dtype)


def test_packed_queries_are_rotated_at_their_positions(make):
    held, counts, new = [4, 30], [2, 1], 2
    k_cache, v_cache, table = paged(make, held, spare=new)
    q, k, v = make(5, HEADS, DIM), make(2, new, KV_HEADS, DIM), make(2, new, KV_HEADS, DIM)
    angles = make(48, 8).double()
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, make(held), page_table=table, cu_seqlens_q=make([0, 2, 3]),
        max_seqlen_q=2, causal=True,
    )  # fmt: skip
    for row, begin in ((0, 0), (1, 2)):
        places = held[row] + torch.arange(counts[row], device=q.device)
        queries = turned(q[begin : begin + counts[row]], cos, sin, places, True).to(q.dtype)
        keys, values = (row_of(cache, table, row, held[row] + new) for cache in (k_cache, v_cache))
        assert_close(out[begin : begin + counts[row]], dense(queries, keys, values, causal=True)[0], q.dtype)


# -- padding on the left ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "heads first", "joined"])
@pytest.mark.parametrize("picked", [None, [3, 0, 2]])
@pytest.mark.parametrize("appends", [False, True])
def test_sequences_may_begin_behind_padding(make, layout, picked, appends):
    """``joined``: keys and values are halves of a tensor with room between its rows."""
    held, pads, new, rows = [40, 7, 63], [0, 7, 13], int(appends), picked or [0, 1, 2]
    if layout == "heads first":
        k_cache, v_cache = (make(4, KV_HEADS, 64, DIM).transpose(1, 2) for _ in range(2))
    elif layout == "joined":
        whole = make(4, 70, KV_HEADS, 2 * DIM)[:, 3:67]
        k_cache, v_cache = whole[..., :DIM], whole[..., DIM:]
    else:
        k_cache, v_cache = make(4, 64, KV_HEADS, DIM), make(4, 64, KV_HEADS, DIM)
    for row, pad in zip(rows, pads, strict=True):
        k_cache[row, :pad] = v_cache[row, :pad] = torch.nan
    q, options = make(3, 2, HEADS, DIM), {"causal": True, "window_size": (30, 0)}
    k, v = (make(3, 1, KV_HEADS, DIM) if appends else None for _ in range(2))
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=make(held), cache_leftpad=make(pads),
        cache_batch_idx=None if picked is None else make(picked), **options,
    )  # fmt: skip
    for i, row in enumerate(rows):
        if appends:
            assert torch.equal(k_cache[row, held[i]], k[i, 0])
        keys, values = (cache[row, pads[i] : held[i] + new] for cache in (k_cache, v_cache))
        assert_close(out[i], dense(q[i], keys, values, causal=True, window=(30, 0))[0], q.dtype)


# -- ALiBi and sinks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_slopes_may_differ_from_row_to_row(make, causal):
    lengths = [90, 17, 33]
    k_cache, v_cache, table = paged(make, lengths)
    q, slopes = make(3, 4, HEADS, DIM), make(3, HEADS).abs().float()
    calls = {
        "with_kvcache": lambda one: flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=make(lengths), block_table=table, causal=causal, alibi_slopes=one
        ),
        "varlen": lambda one: flash_attn_varlen_func(
            q.flatten(0, 1), k_cache, v_cache, make([0, 4, 8, 12]), max_seqlen_q=4, seqused_k=make(lengths),
            block_table=table, causal=causal, alibi_slopes=one,
        ).view(q.shape),
    }  # fmt: skip
    for call in calls.values():
        same = slopes[:1].expand(3, -1)
        assert torch.equal(call(same), call(slopes[0])), "rows that share their slopes are one call anywhere"
        if q.is_cuda:
            with pytest.raises(UnsupportedError, match="alibi_slopes: .* need kernels of their own on a GPU"):
                call(slopes)
            continue
        out = call(slopes.repeat_interleave(2, 1)[:, ::2])  # the last axis strided
        for row, length in enumerate(lengths):
            keys, values = (row_of(cache, table, row, length) for cache in (k_cache, v_cache))
            expected, _ = dense(q[row], keys, values, causal=causal, slopes=slopes[row])
            assert_close(out[row], expected, q.dtype)


def test_sinks_of_any_dtype_take_their_share(make):
    lengths = [50, 9]
    k_cache, v_cache, table = paged(make, lengths)
    q, s_aux = make(2, 1, HEADS, DIM), make(HEADS)
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=make(lengths), page_table=table, s_aux=s_aux, return_softmax_lse=True
    )
    packed = flash_attn_varlen_func(
        q[:, 0], k_cache, v_cache, make([0, 1, 2]), None, 1, None, seqused_k=make(lengths), block_table=table,
        s_aux=s_aux,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        keys, values = (row_of(cache, table, row, length) for cache in (k_cache, v_cache))
        expected, expected_lse = dense(q[row], keys, values, sinks=s_aux)
        assert_close(out[row], expected, q.dtype)
        assert_close(packed[row, None], expected, q.dtype)
        assert_close(lse[row].t(), expected_lse, q.dtype)


# -- what FlashAttention-3 and vLLM add ------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[3, 0, 1], [20, 5, 1], [30], [2]])
@pytest.mark.parametrize("given", [True, False])
def test_rows_behind_the_last_query_are_left_alone(make, counts, given):
    """On a CPU and a GPU, in a decode and in a prefill, with one row and with several."""
    lengths = [40, 7, 33][: len(counts)]
    k_cache, v_cache, table = paged(make, lengths)
    total = sum(counts)
    q, bounds = make(total + 5, HEADS, DIM), make(np.cumsum([0, *counts]).tolist())
    outs = [torch.full_like(q, 7.0) if given else None for _ in range(2)]
    got = [
        flash_attn_varlen_func(
            q, k_cache, v_cache, bounds, None, 30, 48, seqused_k=make(lengths), block_table=table, causal=True,
            out=outs[0], return_softmax_lse=True,
        ),
        flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=make(lengths), block_table=table, cu_seqlens_q=bounds, max_seqlen_q=30,
            causal=True, out=outs[1], return_softmax_lse=True,
        ),
    ]  # fmt: skip
    for (out, lse), mine in zip(got, outs, strict=True):
        assert out.shape == q.shape
        assert lse.shape == (HEADS, len(q))
        if given:
            assert out is mine
            assert (out[total:] == 7.0).all()
        for row, length in enumerate(lengths):
            asked = slice(int(bounds[row]), int(bounds[row + 1]))
            keys, values = (row_of(cache, table, row, length) for cache in (k_cache, v_cache))
            expected, expected_lse = dense(q[asked], keys, values, causal=True)
            assert_close(out[asked], expected, q.dtype)
            assert_close(lse.t()[asked], expected_lse, q.dtype)


@pytest.mark.parametrize("strided", [False, True])
def test_results_are_written_to_out(make, strided):
    lengths = [50, 9]
    k_cache, v_cache, table = paged(make, lengths)
    q = make(2, 3, HEADS, DIM)
    whole = torch.full((2, 5, HEADS, DIM), 7.0, dtype=q.dtype, device=q.device)
    mine = whole[:, 1:4] if strided else torch.empty_like(q)
    arguments = {"cache_seqlens": make(lengths), "block_table": table}
    out = flash_attn_with_kvcache(q, k_cache, v_cache, out=mine, **arguments)
    assert out is mine
    assert torch.equal(out, flash_attn_with_kvcache(q, k_cache, v_cache, **arguments))
    assert not strided or (whole[:, [0, 4]] == 7.0).all()


def test_seqused_k_takes_the_first_keys_of_a_row(make):
    k, v, q = make(60, KV_HEADS, DIM), make(60, KV_HEADS, DIM), make(2, HEADS, DIM)
    out = flash_attn_varlen_func(
        q, k, v, make([0, 1, 2]), make([0, 25, 60]), 1, 35, seqused_k=make([11, 20]), causal=True
    )
    for row, keys in enumerate((slice(0, 11), slice(25, 45))):
        assert_close(out[row, None], dense(q[row, None], k[keys], v[keys])[0], q.dtype)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 50), (7, 7), (70, 90), (5, 2), (3, 0)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 4.0, "window_size": [9, 3]}], ids=str)
def test_flash_attn_func_attends_without_a_cache(make, seqlen_q, seqlen_k, options):
    q, k, v = make(2, seqlen_q, HEADS, DIM), make(2, seqlen_k, KV_HEADS, DIM), make(2, seqlen_k, KV_HEADS, DIM)
    out, lse, probabilities = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert probabilities.numel() == 0
    assert torch.equal(flash_attn_func(q, k, v, **options), out)
    options = {"window" if name == "window_size" else name: value for name, value in options.items()}
    for row in range(2):
        expected, expected_lse = dense(q[row], k[row], v[row], **options)
        assert_close(out[row], expected, q.dtype)
        assert_close(lse[row].t(), expected_lse, q.dtype)


def spread(tensor):
    """The same numbers with a last axis that is not contiguous."""
    return torch.stack((tensor, tensor), -1)[..., 0]


def test_strided_last_axes_are_copied_except_those_of_caches(make):
    held, new = [5, 20], 3
    k_cache, v_cache, table = paged(make, held, spare=new)
    q, k, v = make(2, new, HEADS, DIM), make(2, new, KV_HEADS, DIM), make(2, new, KV_HEADS, DIM)
    cos, sin, slopes = make(32, 8), make(32, 8), make(HEADS).abs().float()
    small = {
        "q": q, "k": k, "v": v, "rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": make(held),
        "block_table": table, "alibi_slopes": slopes, "s_aux": make(HEADS),
    }  # fmt: skip
    expected = flash_attn_with_kvcache(k_cache=k_cache.clone(), v_cache=v_cache.clone(), causal=True, **small)
    strided = {name: spread(tensor) for name, tensor in small.items()}
    assert torch.equal(flash_attn_with_kvcache(k_cache=k_cache, v_cache=v_cache, causal=True, **strided), expected)
    with pytest.raises(KVToolkitError, match="v_cache: expected the last axis contiguous"):
        flash_attn_with_kvcache(k_cache=k_cache, v_cache=spread(v_cache), **small)


# -- refusals --------------------------------------------------------------------------------------------------------


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


def states(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


CACHE = states(4, 16, KV_HEADS, DIM)
REFUSED = {
    flash_attn_with_kvcache: (
        {
            "q": states(2, 1, HEADS, DIM), "k": states(2, 1, KV_HEADS, DIM), "v": states(2, 1, KV_HEADS, DIM),
            "cache_seqlens": integers(3, 20), "block_table": integers(1, 0, 2, 3).view(2, 2),
            "out": states(2, 1, HEADS, DIM),
        },
        [
            {"q": states(2, 1, 7, DIM)},
            {"q": states(2, 1, HEADS, DIM).half()},
            {"q": states(2, 1, HEADS, 30)},
            {"k": states(2, 1, KV_HEADS, DIM).half()},
            {"k": states(2, 1, 3, DIM), "v": states(2, 1, 3, DIM)},
            {"v": None},
            {"v": np.ones(3)},
            {"alibi_slopes": states(3)},
            {"alibi_slopes": states(3, HEADS)},
            {"alibi_slopes": torch.full((2, HEADS), torch.nan)},
            {"alibi_slopes": torch.full((HEADS,), torch.inf)},
            {"alibi_slopes": 0.5},
            {"s_aux": states(3)},
            {"s_aux": torch.full((HEADS,), torch.nan)},
            {"softcap": -1.0},
            {"softmax_scale": float("nan")},
            {"window_size": (1.5, 0)},
            {"num_splits": -2},
            {"out": states(2, 1, HEADS, DIM).half()},
            {"out": states(2, 2, HEADS, DIM)},
            {"cache_seqlens": integers(3, 32)},
            {"cache_seqlens": integers(-1, 20)},
            {"cache_seqlens": integers(3, 20).long()},
            {"cache_seqlens": 32},
            {"cache_seqlens": None},
            {"block_table": integers(1, 0, 2, 9).view(2, 2)},
            {"block_table": integers(1, 0, -1, 3).view(2, 2)},
            {"block_table": integers(1, 0, 2, -1).view(2, 2)},
            {"block_table": integers(1, 0, 2, 3).view(2, 2), "page_table": integers(1, 0, 2, 3).view(2, 2)},
            {"block_table": integers(1, 0, 2, 3)},
            {"block_table": None, "cache_batch_idx": integers(1, 4), "cache_seqlens": 2},
            {"block_table": None, "cache_batch_idx": integers(1), "cache_seqlens": 2},
            {"cache_batch_idx": integers(0, 1)},
            {"cache_leftpad": integers(0, 1)},
            {"block_table": None, "cache_seqlens": 2, "cache_leftpad": integers(0, 4)},
            {"block_table": None, "cache_seqlens": 2, "cache_leftpad": integers(-1, 0)},
            {"rotary_cos": states(64, 8)},
            {"rotary_cos": states(64, 8), "rotary_sin": states(64, 4)},
            {"rotary_cos": states(31, 8), "rotary_sin": states(31, 8)},
            {"rotary_cos": states(64, 17), "rotary_sin": states(64, 17)},
            {"rotary_cos": states(64, 8).long(), "rotary_sin": states(64, 8).long()},
            {"rotary_cos": states(64, 8), "rotary_sin": states(64, 8), "rotary_seqlens": integers(0, 64)},
            {"rotary_cos": states(64, 8), "rotary_sin": states(64, 8), "k": None, "v": None},
            {"cu_seqlens_q": integers(0, 1, 2)},
            {"q": states(2, HEADS, DIM), "cu_seqlens_q": integers(0, 1, 2)},
            {"q": states(2, HEADS, DIM), "cu_seqlens_q": integers(0, 1, 3), "max_seqlen_q": 2},
            {"q": states(2, HEADS, DIM), "cu_seqlens_q": integers(0, 2, 1), "max_seqlen_q": 2},
            {"q": states(2, HEADS, DIM), "cu_seqlens_q": integers(0, 2, 2), "max_seqlen_q": 1},
            {"cu_seqlens_k_new": integers(0, 1, 2)},
            {"qv": states(1)},
            {"q_descale": states(1)},
            {"attention_chunk": 4},
        ],
    ),
    flash_attn_varlen_func: (
        {
            "q": states(4, HEADS, DIM), "k": states(30, KV_HEADS, DIM), "v": states(30, KV_HEADS, DIM),
            "cu_seqlens_q": integers(0, 2, 4), "cu_seqlens_k": integers(0, 10, 30), "max_seqlen_q": 2,
            "max_seqlen_k": 20, "out": states(4, HEADS, DIM),
        },
        [
            {"cu_seqlens_k": integers(0, 10, 31), "max_seqlen_k": 30},
            {"cu_seqlens_k": integers(0, 10, 2**30), "max_seqlen_k": 2**30},
            {"cu_seqlens_k": integers(0, 20, 10)},
            {"cu_seqlens_k": integers(1, 20, 30)},
            {"cu_seqlens_k": None},
            {"cu_seqlens_k": None, "seqused_k": integers(3, 4)},
            {"seqused_k": integers(11, 3)},
            {"seqused_k": integers(-1, 3)},
            {"max_seqlen_k": 19},
            {"max_seqlen_q": 1},
            {"max_seqlen_q": None},
            {"cu_seqlens_q": None},
            {"cu_seqlens_q": integers(0, 2, 5), "max_seqlen_q": 3},
            {"cu_seqlens_q": integers()},
            {"k": states(30, KV_HEADS, DIM).half()},
            {"k": states(30, 4, DIM), "v": states(30, 4, DIM)},
            {"v": states(29, KV_HEADS, DIM)},
            {"v": states(30, KV_HEADS, 16)},
            {"dropout_p": 0.1},
            {"out": states(4, HEADS, 16)},
            {"block_table": integers(0, 1).view(2, 1)},
            {"k": CACHE, "v": CACHE, "block_table": integers(0, 1).view(2, 1)},
            {"k": CACHE, "v": CACHE, "block_table": integers(0, 1, 2, 7).view(2, 2)},
            {"k": spread(CACHE), "v": CACHE, "block_table": integers(0, 1, 2, 3).view(2, 2)},
            {"seqused_q": integers(1, 1)},
            {"q_v": states(1)},
        ],
    ),
    flash_attn_func: (
        {
            "q": states(2, 4, HEADS, DIM), "k": states(2, 9, KV_HEADS, DIM), "v": states(2, 9, KV_HEADS, DIM),
            "out": states(2, 4, HEADS, DIM),
        },
        [
            {"k": states(3, 9, KV_HEADS, DIM)},
            {"v": states(2, 8, KV_HEADS, DIM)},
            {"q": states(2, 4, 7, DIM)},
            {"q": states(8, HEADS, DIM)},
            {"dropout_p": 0.5},
            {"out": states(2, 4, HEADS, DIM).half()},
            {"k_descale": states(1)},
        ],
    ),
}  # fmt: skip
CASES = [(function, changes) for function, (_, all_changes) in REFUSED.items() for changes in all_changes]


def shown(value):
    return ",".join(value) if isinstance(value, dict) else value.__name__.removeprefix("flash_attn_")


@pytest.mark.parametrize(("function", "changes"), CASES, ids=shown)
def test_a_refused_call_writes_nothing_and_names_the_callers_parameter(function, changes):
    good = {name: value.clone() if torch.is_tensor(value) else value for name, value in REFUSED[function][0].items()}
    if function is flash_attn_with_kvcache:
        good |= {"k_cache": torch.zeros_like(CACHE), "v_cache": torch.zeros_like(CACHE)}
    arguments = {**good, **changes}
    with pytest.raises(KVToolkitError) as refused:
        function(**arguments)
    for name in ("k_cache", "v_cache"):
        assert not arguments.get(name, torch.zeros(1)).any(), f"{name} was written"
    assert (arguments["out"] == 1).all(), "out was written"
    subjects = re.match(r"(\w+(?:, \w+)*): ", str(refused.value))
    assert subjects, refused.value
    assert set(subjects[1].split(", ")) <= set(inspect.signature(function).parameters)
    assert not re.search(r"\b(seq_lens|slot_mapping|query|key)\b", str(refused.value))


@pytest.mark.parametrize("function", REFUSED, ids=shown)
def test_the_call_that_the_refusals_change_is_right(function):
    good = dict(REFUSED[function][0])
    if function is flash_attn_with_kvcache:
        good |= {"k_cache": torch.zeros_like(CACHE), "v_cache": torch.zeros_like(CACHE)}
    function(**good)


def test_an_output_right_after_the_keys_and_values_is_no_overlap():
    """Rows of packed tokens are read as blocks that reach beyond the last token."""
    num_keys, num_queries = 30 * KV_HEADS * DIM, 4 * HEADS * DIM
    memory = torch.zeros(2 * (num_keys + num_queries))
    k, first, v, second = torch.split(memory, [num_keys, num_queries, num_keys, num_queries])
    k, v = (part.view(30, KV_HEADS, DIM) for part in (k, v))
    k += states(30, KV_HEADS, DIM)
    v += states(30, KV_HEADS, DIM)
    good = {
        "q": states(4, HEADS, DIM), "k": k, "v": v, "cu_seqlens_q": integers(0, 2, 4),
        "cu_seqlens_k": integers(0, 20, 30), "max_seqlen_q": 2, "max_seqlen_k": 20,
    }  # fmt: skip
    expected = flash_attn_varlen_func(**good)
    for out in (first, second):
        out = out.view(4, HEADS, DIM)
        assert torch.equal(flash_attn_varlen_func(**good, out=out), expected)
    with pytest.raises(UnsupportedError, match="out: expected memory of its own, got some that v uses"):
        flash_attn_varlen_func(**good, out=memory[-num_queries - 8 : -8].view(4, HEADS, DIM))


def test_hints_to_other_kernels_are_ignored():
    hints = {"pack_gqa": True, "sm_margin": 2}
    q, k = states(2, 1, HEADS, DIM), states(2, 16, KV_HEADS, DIM)
    expected = flash_attn_func(q, k, k)
    assert torch.equal(flash_attn_func(q, k, k, deterministic=True, **hints), expected)
    hints |= {"scheduler_metadata": states(3), "fa_version": 3}
    assert torch.equal(flash_attn_with_kvcache(q, k, k, **hints), expected)
