"""flash-attn's calls on kvtoolkit's kernels: the answers of the float64 reference, in the shapes of flash-attn."""

import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvtoolkit import ShapeError, UnsupportedError  # noqa: E402
from kvtoolkit.integrations.flash_attn.calls import (  # noqa: E402
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from tests.kvtoolkit.attention import attention_cases, gpu_cases  # noqa: E402
from tests.kvtoolkit.attention.attention_cases import Case, nan_filled  # noqa: E402

SLOPES = np.array([0.5, 0.25, 0.1, 0.0, 1.0, 0.03], np.float32)
OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "window_size": (20, 0)},
    {"window_size": (7, 3), "softmax_scale": 0.1},
    {"causal": True, "softcap": 5.0, "alibi_slopes": SLOPES},
]
PLACES = [("cpu", "float32"), ("cpu", "bfloat16")]
PLACES += [pytest.param(("cuda", dtype), marks=pytest.mark.gpu) for dtype in ("float16", "bfloat16")]


class Place:
    """The device and dtype of a test's tensors."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype

    def put(self, array):
        """A NumPy array as a tensor here; 16-bit words become bfloat16."""
        if array.dtype == np.uint16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def check(self, out, lse, expected):
        """``out`` and ``lse``, ``[num_tokens, num_q_heads, ...]``, are what the reference says."""
        judge = attention_cases if self.device == "cpu" else gpu_cases
        judge.assert_close(out.cpu(), lse.cpu().numpy(), *expected, self.dtype)


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    return Place(*request.param)


@pytest.fixture
def cpu():
    return Place("cpu", "float32")


def per_row(case):
    """The queries as ``[batch, seqlen_q, num_q_heads, head_dim]``; all rows have as many."""
    return case.q.reshape(len(case.seq_lens), -1, *case.q.shape[1:])


def flat(out, lse):
    """What `flash_attn_with_kvcache` gives, as the reference has it."""
    assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])
    assert lse.is_contiguous()
    return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def call(place, function, *tensors, **options):
    if "alibi_slopes" in options:
        options["alibi_slopes"] = place.put(options["alibi_slopes"])
    return function(*tensors, **options)


def given(options):
    """Options as the reference takes them, whose default is causal."""
    return {"causal": False, **options}


def test_arrays_that_are_no_tensors_are_refused():
    array = np.zeros((1, 1, 2, 32), np.float32)
    with pytest.raises(ShapeError, match="q: expected a torch tensor, got ndarray"):
        flash_attn_with_kvcache(array, array, array)


def positional(parameters):
    """Names and defaults of the parameters that may be given by position."""
    return [(name, p.default) for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]


def test_signatures_are_those_of_flash_attn_2():
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    assert positional(parameters)[3:] == [
        *[(name, None) for name in ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx")],
        *[(name, None) for name in ("cache_leftpad", "block_table", "softmax_scale")],
        ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0), ("rotary_interleaved", True),
        ("alibi_slopes", None), ("num_splits", 0), ("return_softmax_lse", False),
    ]  # fmt: skip
    assert list(parameters)[:3] == ["q", "k_cache", "v_cache"]
    parameters = inspect.signature(flash_attn_varlen_func).parameters
    assert list(parameters)[:7] == ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert positional(parameters)[7:] == [
        ("dropout_p", 0.0), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0),
        ("alibi_slopes", None), ("deterministic", False), ("return_attn_probs", False), ("block_table", None),
    ]  # fmt: skip
    parameters = inspect.signature(flash_attn_func).parameters
    assert list(parameters)[:3] == ["q", "k", "v"]
    assert positional(parameters)[3:] == [
        ("dropout_p", 0.0), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0),
        ("alibi_slopes", None), ("deterministic", False), ("return_attn_probs", False),
    ]  # fmt: skip


# -- flash_attn_with_kvcache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 256])
def test_decode_as_nano_vllm_calls_it(place, block_size):
    case = Case([1, 0, 16, 300, 255], dtype=place.dtype)
    arrays = case.paged(block_size, "NHD")
    k_cache, v_cache, block_tables = map(place.put, arrays)
    q = place.put(case.q)
    out = flash_attn_with_kvcache(
        q[:, None], k_cache, v_cache, cache_seqlens=place.put(case.lengths), block_table=block_tables,
        softmax_scale=0.2, causal=True,
    )  # fmt: skip
    assert out.shape == (5, 1, 6, 32)
    expected = case.expected(arrays, softmax_scale=0.2)
    place.check(out[:, 0], torch.from_numpy(expected[1]), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 4, 30])
def test_queries_of_any_number_attend_to_a_paged_cache(place, seqlen_q, options):
    case = Case([30, 100, 555], [seqlen_q] * 3, dtype=place.dtype)
    arrays = case.paged(16, "NHD")
    k_cache, v_cache, table = map(place.put, arrays)
    out, lse = call(
        place, flash_attn_with_kvcache, place.put(per_row(case)), k_cache, v_cache,
        cache_seqlens=place.put(case.lengths), block_table=table, return_softmax_lse=True, num_splits=2, **options,
    )  # fmt: skip
    place.check(*flat(out, lse), case.expected(arrays, **given(options)))


@pytest.mark.parametrize(("seqlen_new", "seqlen_q"), [(1, 1), (20, 20), (3, 1)])
def test_new_tokens_are_written_to_their_pages_before_attention(place, seqlen_new, seqlen_q):
    case = Case([20, 33, 100], [seqlen_q] * 3, dtype=place.dtype)
    arrays = case.paged(16, "NHD")
    before = [array.copy() for array in arrays]
    for row, length in enumerate(case.seq_lens):
        for position in range(length - seqlen_new, length):
            for cache in before[:2]:
                cache[arrays[2][row, position // 16], position % 16] = nan_filled((), place.dtype)
    k, v = (np.stack([tokens[len(tokens) - seqlen_new :] for tokens in new]) for new in (case.keys, case.values))
    k_cache, v_cache, table = map(place.put, before)
    held = place.put(case.lengths - seqlen_new)
    out, lse = flash_attn_with_kvcache(
        place.put(per_row(case)), k_cache, v_cache, place.put(k), place.put(v), cache_seqlens=held, block_table=table,
        causal=True, return_softmax_lse=True,
    )  # fmt: skip
    place.check(*flat(out, lse), case.expected(arrays))
    for cache, wanted in zip((k_cache, v_cache), arrays, strict=False):
        assert torch.equal(cache.nan_to_num(7.0), place.put(wanted).nan_to_num(7.0)), "other slots are as they were"
    assert held.tolist() == (case.lengths - seqlen_new).tolist()


@pytest.mark.parametrize("picked", [True, False])
def test_a_cache_without_a_table_has_a_row_for_each_sequence(place, picked):
    case = Case([40, 7, 64], [2] * 3, dtype=place.dtype)
    rows = np.array([3, 0, 2] if picked else [0, 1, 2], np.int32)
    caches = [nan_filled((4, 64, 2, 32), place.dtype) for _ in range(2)]
    for cache, tokens in zip(caches, (case.keys, case.values), strict=True):
        for row, new in zip(rows, tokens, strict=True):
            cache[row, : len(new)] = new
    expected = case.expected((*caches, rows[:, None]), causal=False)
    cache_batch_idx = place.put(rows) if picked else None
    out, lse = flash_attn_with_kvcache(
        place.put(per_row(case)), *map(place.put, caches), cache_seqlens=place.put(case.lengths),
        cache_batch_idx=cache_batch_idx, return_softmax_lse=True,
    )  # fmt: skip
    place.check(*flat(out, lse), expected)
    # the same in two calls, the last two tokens of each row being new
    empty = [place.put(cache.copy()) for cache in caches]
    for cache in empty:
        for row, length in zip(rows, case.lengths, strict=True):
            cache[int(row), length - 2 : length] = torch.nan
    k, v = (place.put(np.stack([new[-2:] for new in tokens])) for tokens in (case.keys, case.values))
    again = flash_attn_with_kvcache(
        place.put(per_row(case)), *empty, k, v, cache_seqlens=place.put(case.lengths - 2),
        cache_batch_idx=cache_batch_idx,
    )  # fmt: skip
    assert torch.equal(again, out)


def test_one_length_for_all_rows_or_none_where_the_cache_is_full(place):
    case = Case([48, 48], [3, 3], dtype=place.dtype)
    arrays = case.paged(16, "NHD")
    k_cache, v_cache, table = map(place.put, arrays)
    q = place.put(per_row(case))
    for cache_seqlens in (48, None):
        out, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, block_table=table, return_softmax_lse=True
        )
        place.check(*flat(out, lse), case.expected(arrays, causal=False))


def test_caches_are_read_where_they_lie(place):
    """Keys and values of one tensor, heads before slots: nothing but the last axis is contiguous."""
    case = Case([40, 200], [9, 9], dtype=place.dtype)
    arrays = case.paged(16, "NHD")
    together = place.put(np.stack(arrays[:2], axis=1).swapaxes(2, 3).copy())  # [num_blocks, 2, heads, slots, head_dim]
    k_cache, v_cache = (together[:, i].transpose(1, 2) for i in range(2))
    wide = place.put(np.concatenate([per_row(case)] * 2, axis=-1))  # q is half of each row, as after a fused projection
    out, lse = flash_attn_with_kvcache(
        wide[..., :32], k_cache, v_cache, cache_seqlens=place.put(case.lengths), block_table=place.put(arrays[2]),
        return_softmax_lse=True,
    )  # fmt: skip
    place.check(*flat(out, lse), case.expected(arrays, causal=False))


# -- flash_attn_varlen_func ------------------------------------------------------------------------------------------


def lengths_of(place, case):
    """``cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k``."""
    counts = np.diff(case.cu_seqlens_q)
    ends = np.cumsum([0, *case.seq_lens]).astype(np.int32)
    return place.put(case.cu_seqlens_q), place.put(ends), int(counts.max()), max(case.seq_lens)


def packed(place, case):
    """Keys and values ``[total_k, num_kv_heads, head_dim]``, halves of one tensor, with NaN before and behind."""
    rows = [np.concatenate([np.concatenate(new) for new in (case.keys, case.values)], axis=-1)]
    guard = nan_filled((3, *rows[0].shape[1:]), place.dtype)
    both = place.put(np.concatenate([guard, *rows, guard]))[3:-3]
    return both[..., :32], both[..., 32:]


BATCHES = [
    ([70, 0, 1, 300], [70, 0, 1, 300]),  # prefill
    ([70, 12, 300, 64], [5, 12, 1, 40]),  # a prefix was cached
    ([100, 17], [1, 1]),
    ([5, 40], [9, 40]),  # more queries than keys
    ([0, 30], [2, 4]),  # no keys
    ([200], [200]),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("seq_lens", "new"), BATCHES)
def test_packed_keys_are_attended_where_they_lie(place, seq_lens, new, options):
    case = Case(seq_lens, new, dtype=place.dtype)
    out, lse, probabilities = call(
        place, flash_attn_varlen_func, place.put(case.q), *packed(place, case), *lengths_of(place, case),
        return_attn_probs=True, **options,
    )  # fmt: skip
    assert probabilities.numel() == 0
    assert lse.shape == (6, len(case.q))
    assert lse.is_contiguous()
    place.check(out, lse.t(), case.expected(case.paged(16, "NHD"), **given(options)))


@pytest.mark.parametrize(("seq_lens", "new"), BATCHES)
def test_packed_queries_attend_to_a_paged_cache(place, seq_lens, new):
    case = Case(seq_lens, new, dtype=place.dtype)
    arrays = case.paged(16, "NHD")
    k_cache, v_cache, table = map(place.put, arrays)
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths_of(place, case)
    out = flash_attn_varlen_func(
        place.put(case.q), k_cache, v_cache, max_seqlen_q=max_seqlen_q, cu_seqlens_q=cu_seqlens_q,
        max_seqlen_k=max_seqlen_k, cu_seqlens_k=cu_seqlens_k, softmax_scale=0.2, causal=True, block_table=table,
    )  # fmt: skip
    expected = case.expected(arrays, softmax_scale=0.2)
    place.check(out, torch.from_numpy(expected[1]), expected)


def test_paged_and_packed_keys_give_the_same(place):
    case = Case([70, 12, 300, 64], [70, 5, 300, 1], dtype=place.dtype)
    k_cache, v_cache, table = map(place.put, case.paged(16, "NHD"))
    lengths, q = lengths_of(place, case), place.put(case.q)
    paged = flash_attn_varlen_func(q, k_cache, v_cache, *lengths, causal=True, block_table=table)
    out = flash_attn_varlen_func(q, *packed(place, case), *lengths, causal=True)
    if place.device == "cpu":
        assert torch.equal(out, paged)
    else:  # packed keys are blocks of one token, which may have another kernel
        expected = case.expected(case.paged(16, "NHD"))
        for one in (out, paged):
            place.check(one, torch.from_numpy(expected[1]), expected)


# -- the device ------------------------------------------------------------------------------------------------------


def device_calls():
    """Three calls on tensors of the GPU, the first of them with new tokens."""
    place = Place("cuda", "float16")
    case = Case([70, 300, 5], [1] * 3, dtype="float16")
    k_cache, v_cache, table = map(place.put, case.paged(16, "NHD"))
    k_cache, v_cache = k_cache.nan_to_num(), v_cache.nan_to_num()  # one call takes every slot for a token
    q, held = place.put(per_row(case)), place.put(case.lengths - 1)
    k, v = (place.put(np.stack([tokens[-1:] for tokens in new])) for new in (case.keys, case.values))
    prompts = Case([70, 12], [70, 5], dtype="float16")
    tokens, keys, lengths = place.put(prompts.q), packed(place, prompts), lengths_of(place, prompts)
    return [
        lambda: flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=held, block_table=table),
        lambda: flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=16),
        lambda: flash_attn_varlen_func(tokens, *keys, *lengths, causal=True),
    ], held


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_call_waits_for_the_device():
    calls, _ = device_calls()
    for one in calls:
        one()  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for one in calls:
            one()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_calls_can_be_captured_and_see_new_lengths_on_replay():
    calls, held = device_calls()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for one in calls:
            one()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = [one() for one in calls]
    held -= 2
    graph.replay()
    torch.cuda.synchronize()
    for one, got in zip(calls, captured, strict=True):
        assert torch.equal(one(), got)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(cpu):
    """Arguments of `flash_attn_with_kvcache` that are right: two rows of 10 and 20 tokens, one query each."""
    case = Case([10, 20], [1, 1])
    k_cache, v_cache, table = map(cpu.put, case.paged(16, "NHD"))
    return {
        "q": cpu.put(per_row(case)), "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": cpu.put(case.lengths),
        "block_table": table,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"rotary_cos": torch.ones(64, 16)}, ShapeError, "rotary_cos, rotary_sin: expected both or neither"),
        ({"cache_leftpad": torch.ones(2)}, UnsupportedError, "cache_leftpad: expected None beside block_table"),
        ({"alibi_slopes": torch.ones(3, 6)}, ShapeError, r"alibi_slopes: expected \[batch = 2, num_q_heads = 6\]"),
        ({"cache_batch_idx": torch.ones(2).int()}, UnsupportedError, "cache_batch_idx: expected None beside block_tab"),
        ({"cache_seqlens": torch.ones(2)}, ShapeError, r"cache_seqlens: expected \[2\] int32, got \(2,\)"),
        ({"cache_seqlens": 1000}, ShapeError, "cache_seqlens: expected up to 32, the room that a row"),
        ({"cache_seqlens": 1.5}, ShapeError, "cache_seqlens: expected a number of tokens, got 1.5"),
        ({"block_table": torch.ones(3, 2).int()}, ShapeError, r"block_table: expected \[2, any\] int32"),
        ({"q": torch.ones(2, 6, 32)}, ShapeError, "q: expected 4 axes"),
        ({"k": torch.ones(2, 1, 2, 32)}, ShapeError, "k, v: expected both of them and cache_seqlens"),
        (
            {"k": torch.ones(2, 1, 2, 32), "v": torch.ones(2, 1, 2, 32), "cache_seqlens": None},
            ShapeError,
            "k, v: expected both of them and cache_seqlens",
        ),
        ({"q": torch.ones(9, 1, 6, 32), "block_table": None}, ShapeError, "q: expected a batch of up to 5"),
    ],
)  # fmt: skip
def test_what_is_not_offered_or_does_not_fit_says_so(arguments, changes, error, match):
    with pytest.raises(error, match=match):
        flash_attn_with_kvcache(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"k": torch.ones(2, 13, 2, 32), "v": torch.ones(2, 13, 2, 32)}, "cache_seqlens: expected 0 to 19, the room"),
        ({"k": torch.ones(2, 40, 2, 32), "v": torch.ones(2, 40, 2, 32)}, "k: expected up to 32 tokens"),
        ({"k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 1, 2, 16)}, r"k: expected \[2, 1, 2, 32\]"),
        ({"k": torch.ones(2, 1, 2, 32), "v": torch.ones(2, 1, 2, 32).half()}, "v: expected"),
        ({"k": torch.ones(2, 1, 2, 32), "v": torch.ones(2, 1, 2, 32), "softcap": -1.0}, "softcap: expected"),
    ],
)
def test_a_refused_append_writes_nothing(arguments, changes, match):
    before = arguments["k_cache"].nan_to_num(7.0)
    with pytest.raises(ShapeError, match=match):
        flash_attn_with_kvcache(**{**arguments, **changes})
    assert torch.equal(arguments["k_cache"].nan_to_num(7.0), before)


def test_packed_calls_refuse_what_does_not_fit(cpu):
    case = Case([10, 20], [1, 2])
    q, (k, v), lengths = cpu.put(case.q), packed(cpu, case), list(lengths_of(cpu, case))
    with pytest.raises(UnsupportedError, match="dropout_p: expected 0, got 0.1"):
        flash_attn_varlen_func(q, k, v, *lengths, dropout_p=0.1)
    with pytest.raises(ShapeError, match="k: expected 3 axes"):
        flash_attn_varlen_func(q, k[None], v, *lengths)
    with pytest.raises(ShapeError, match="k: expected 4 axes"):
        flash_attn_varlen_func(q, k, v, *lengths, block_table=torch.zeros(2, 2).int())
    with pytest.raises(ShapeError, match="max_seqlen_k: expected a number of tokens, got None"):
        flash_attn_varlen_func(q, k, v, *lengths[:3], None)
    with pytest.raises(ShapeError, match=r"cu_seqlens_k: expected \[3\] int32"):
        flash_attn_varlen_func(q, k, v, lengths[0], lengths[1].long(), *lengths[2:])
    with pytest.raises(ShapeError, match="max_seqlen_k: expected at least 20, the longest row by cu_seqlens_k, got 5"):
        flash_attn_varlen_func(q, k, v, *lengths[:3], 5)
