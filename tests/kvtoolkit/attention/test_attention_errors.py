"""Every wrong argument is refused with its name, before anything is written."""

from typing import Any

import numpy as np
import pytest

from kvtoolkit.attention.calls import append, merge_states, paged_attention, variable_block_attention
from kvtoolkit.errors import ShapeError, UnsupportedError
from tests.kvtoolkit.attention.attention_cases import Case

I32 = np.int32
READ_ONLY = np.zeros((5, 6, 32), np.float32)
READ_ONLY.flags.writeable = False


def good_call() -> dict[str, Any]:
    case = Case([20, 9], [4, 1])
    k_cache, v_cache, table, starts = case.variable((1, 2))
    return {
        "q": case.q, "k_cache": k_cache, "v_cache": v_cache, "block_table": table, "block_starts": starts,
        "seq_lens": case.lengths, "cu_seqlens_q": case.cu_seqlens_q,
    }  # fmt: skip


def changed(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


class Placed:
    """Says of its place what it is told to say."""

    def __init__(self, place: Any) -> None:
        self.place = place

    def __dlpack_device__(self) -> Any:
        if isinstance(self.place, Exception):
            raise self.place
        return self.place

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("no")


class Described:
    """An array of a GPU, in words only."""

    def __init__(self, description: Any) -> None:
        self.description = description

    @property
    def __cuda_array_interface__(self) -> Any:
        if isinstance(self.description, Exception):
            raise self.description
        return self.description


# what to replace, by what, and, where it is another, the argument that the message names
WRONG: list[tuple[Any, ...]] = [
    ("q", lambda a: a["q"][0]),
    ("q", lambda a: a["q"].astype(np.float64)),
    ("q", lambda a: a["q"].astype(">f4")),
    ("q", lambda a: np.zeros((5, 7, 32), np.float32)),
    ("q", lambda a: np.zeros((5, 6, 64), np.float32)[:, :, ::2]),
    ("q", lambda a: [1.0]),
    ("q", lambda a: np.zeros((5 * 6 * 32 * 4 + 1), np.uint8)[1:].view(np.float32).reshape(5, 6, 32)),
    ("k_cache", lambda a: a["q"].astype(np.float16)),
    ("k_cache", lambda a: a["k_cache"].astype(np.float16)),
    ("k_cache", lambda a: a["k_cache"][:, :, :4], "v_cache: expected the shape of k_cache"),
    ("k_cache", lambda a: a["k_cache"][..., :16], "v_cache: expected the shape of k_cache"),
    ("k_cache", lambda a: a["k_cache"][:, :0], "v_cache: expected the shape of k_cache"),
    ("v_cache", lambda a: a["v_cache"][1:]),
    ("v_cache", lambda a: np.repeat(a["v_cache"], 2, -1)[..., ::2]),
    ("v_cache", lambda a: np.nan_to_num(a["v_cache"]).astype(np.uint16)),
    ("block_table", lambda a: a["block_table"].astype(np.int64)),
    ("block_table", lambda a: a["block_table"][0]),
    ("block_table", lambda a: np.repeat(a["block_table"], 2, 1)[:, ::2]),
    ("block_table", lambda a: changed(a["block_table"], (1, 0), a["k_cache"].shape[0])),
    ("block_table", lambda a: changed(a["block_table"], (0, 1), a["k_cache"].shape[0] - 1 | 7 << 24)),
    ("block_table", lambda a: changed(a["block_table"], (0, 0), a["block_table"][0, 0] | 1 << 27)),
    ("block_table", lambda a: changed(a["block_table"], (1, 0), -1), "seq_lens: row 1"),
    ("block_table", lambda a: changed(a["block_table"], (0, slice(1, None)), -1), "seq_lens: row 0"),
    ("max_seqlen_q", lambda a: 3, "max_seqlen_q: expected at least 4, the longest row by cu_seqlens_q, got 3"),
    ("max_seqlen_q", lambda a: 2, "max_seqlen_q: expected at least 3, because 2 rows have 5 query tokens, got 2"),
    ("max_seqlen_q", lambda a: -1, "max_seqlen_q: expected a number of tokens, got -1"),
    ("max_seqlen_q", lambda a: 4.0),
    ("max_seqlen_q", lambda a: a["cu_seqlens_q"]),
    ("block_starts", lambda a: a["block_starts"][:, :-1]),
    ("block_starts", lambda a: a["block_starts"].astype(np.int16)),
    ("block_starts", lambda a: changed(a["block_starts"], (0, 0), 1)),
    ("block_starts", lambda a: changed(a["block_starts"], (0, 1), 0)),
    ("block_starts", lambda a: changed(a["block_starts"], (0, 1), 7)),
    ("seq_lens", lambda a: np.array([20, -1], I32)),
    ("seq_lens", lambda a: np.array([20, 17], I32)),
    ("seq_lens", lambda a: np.array([2**31 - 1, 9], I32)),
    ("seq_lens", lambda a: np.array([20, 9, 1], I32)),
    ("seq_lens", lambda a: np.array([20, 9])),
    ("seq_lens", lambda a: np.array([20, 0, 9, 0], I32)[::2]),
    ("cu_seqlens_q", lambda a: np.array([0, 5, 4], I32)),
    ("cu_seqlens_q", lambda a: np.array([0, 4, 6], I32)),
    ("cu_seqlens_q", lambda a: np.array([0, 4, 4], I32)),
    ("cu_seqlens_q", lambda a: np.array([1, 4, 5], I32)),
    ("cu_seqlens_q", lambda a: np.array([0, 6, 5], I32)),
    ("cu_seqlens_q", lambda a: np.array([0, 5], I32)),
    ("cu_seqlens_q", lambda a: np.array([0, 4, 5], np.int64)),
    ("cu_seqlens_q", lambda a: None, "q"),
    ("softmax_scale", lambda a: float("nan")),
    ("softmax_scale", lambda a: float("inf")),
    ("softmax_scale", lambda a: "1"),
    ("softcap", lambda a: float("nan")),
    ("softcap", lambda a: -1.0),
    ("window_size", lambda a: (-2, 0)),
    ("window_size", lambda a: (1.5, 0)),
    ("window_size", lambda a: 3),
    ("num_splits", lambda a: -1),
    ("num_splits", lambda a: 1.5),
    ("q", lambda a: Placed(ValueError("no"))),
    ("k_cache", lambda a: Placed(None)),
    ("block_table", lambda a: Placed((1,))),
    ("seq_lens", lambda a: Placed("ab")),
    ("out", lambda a: Placed((1, None))),
    ("q", lambda a: Placed((2, 0))),
    ("k_cache", lambda a: Described(KeyError("no"))),
    ("q", lambda a: Described({})),
    ("q", lambda a: Described(7)),
    ("q", lambda a: Described({"typestr": "<f4", "data": (0, False), "shape": (5, 6, 32), "version": 3})),
    ("sinks", lambda a: np.zeros(5, np.float32)),
    ("sinks", lambda a: np.zeros(6)),
    ("sinks", lambda a: np.full(6, np.nan, np.float32)),
    ("sinks", lambda a: np.full(6, np.inf, np.float32)),
    ("sinks", lambda a: np.zeros(12, np.float32)[::2]),
    ("alibi_slopes", lambda a: np.full(6, -np.inf, np.float32)),
    ("alibi_slopes", lambda a: np.zeros((3, 6), np.float32)),
    ("alibi_slopes", lambda a: np.full((2, 6), np.nan, np.float32)),
    ("alibi_slopes", lambda a: np.zeros((2, 12), np.float32)[:, ::2]),
    ("out", lambda a: np.zeros((5, 6, 31), np.float32)),
    ("out", lambda a: np.zeros((5, 6, 32), np.float16)),
    ("out", lambda a: np.zeros((5, 6, 64), np.float32)[..., ::2]),
    ("out", lambda a: READ_ONLY),
    ("out", lambda a: np.lib.stride_tricks.as_strided(np.zeros(32, np.float32), (5, 6, 32), (0, 0, 4))),
]


@pytest.mark.parametrize("i", range(len(WRONG)), ids=lambda i: f"{i}-{WRONG[i][0]}")
def test_a_wrong_argument_is_named_and_nothing_is_written(i: int) -> None:
    argument, make, *named = WRONG[i]
    arguments = good_call()
    out = np.full_like(arguments["q"], 7.0)
    arguments["out"] = out
    arguments[argument] = make(arguments)
    with pytest.raises((ShapeError, UnsupportedError), match=f"^{named[0] if named else argument}"):
        variable_block_attention(**arguments)
    assert (out == 7.0).all()


def test_the_good_call_is_good() -> None:
    assert np.isfinite(variable_block_attention(**good_call())).all()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (np.s_[..., :24], "expected head_dim 32"),
        (np.s_[:, :, :4], "num_granules, num_kv_heads, 8, head_dim"),
        (np.s_[:, :0], "at least one head"),
        (np.s_[0], "num_blocks"),
    ],
)
def test_caches_that_fit_each_other_but_not_the_queries(index: Any, message: str) -> None:
    arguments = good_call()
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name][index]
    with pytest.raises(ShapeError, match=f"^k_cache: .*{message}"):
        variable_block_attention(**arguments)


def test_messages_say_expected_and_got() -> None:
    arguments = good_call()
    arguments["seq_lens"] = np.array([20, 300], I32)
    with pytest.raises(ShapeError, match=r"row 1 holds 300 tokens, more than its block_table covers"):
        variable_block_attention(**arguments)
    arguments["seq_lens"] = np.array([20.0, 3.0])
    with pytest.raises(ShapeError, match=r"seq_lens: expected \[2\] int32, got \(2,\) float64"):
        variable_block_attention(**arguments)


def test_paged_tables_are_checked_as_far_as_they_are_read() -> None:
    case = Case([20, 9])
    k_cache, v_cache, table = case.paged(8, "NHD")
    paged_attention(case.q, k_cache, v_cache, changed(table, (1, 2), 99), case.lengths)
    for row, entry, value in ((0, 2, 99), (1, 1, -1), (0, 0, len(k_cache))):
        with pytest.raises(ShapeError, match=f"block_table: .*got {value} in row {row}"):
            paged_attention(case.q, k_cache, v_cache, changed(table, (row, entry), value), case.lengths)
    with pytest.raises(ShapeError, match="seq_lens: row 0 holds 25 tokens"):
        paged_attention(case.q, k_cache, v_cache, table, np.array([25, 9], I32))


def test_layouts_backends_and_head_dims_that_do_not_exist() -> None:
    case = Case([20, 9])
    arrays = (case.q, *case.paged(8, "NHD"), case.lengths)
    with pytest.raises(ShapeError, match="layout: expected one of NHD, HND, got 'HDN'"):
        paged_attention(*arrays, layout="HDN")
    with pytest.raises(UnsupportedError, match="backend: expected None or one of cpu, cuda, numba, got 'tpu'"):
        paged_attention(*arrays, backend="tpu")
    for backend in ("cuda", "numba"):
        with pytest.raises(UnsupportedError, match="works on arrays on a CUDA device, got one in host memory"):
            paged_attention(*arrays, backend=backend)
    paged_attention(*arrays, backend="cpu")
    narrow = [np.ascontiguousarray(array[..., :12]) for array in arrays[:3]]
    with pytest.raises(UnsupportedError, match="head_dim 12"):
        paged_attention(*narrow, *arrays[3:])


def test_queries_must_match_rows_where_no_bounds_are_given() -> None:
    case = Case([20, 9], [4, 1])
    with pytest.raises(ShapeError, match="q: expected one token per row, 2"):
        paged_attention(case.q, *case.paged(8, "NHD"), case.lengths)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key", np.zeros((3, 2), np.float32)),
        ("key", np.zeros((3, 2, 16))),
        ("value", np.zeros((4, 2, 16), np.float32)),
        ("value", np.zeros((3, 2, 16), np.float16)),
        ("k_cache", np.zeros((4, 3, 8, 16), np.float32)),
        ("k_cache", np.zeros((4, 2, 8, 16), np.float16)),
        ("v_cache", np.zeros((4, 2, 4, 16), np.float32)),
        ("v_cache", np.broadcast_to(np.float32(0), (4, 2, 8, 16))),
        ("slot_mapping", np.array([1, 2, 32])),
        ("slot_mapping", np.array([1, -2, 3])),
        ("slot_mapping", np.array([1, 2, 3], np.int32)),
        ("slot_mapping", np.array([1, 2])),
        ("layout", "nhd"),
    ],
)
def test_append_refuses_before_it_writes(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {
        "key": np.ones((3, 2, 16), np.float32), "value": np.ones((3, 2, 16), np.float32),
        "k_cache": np.zeros((4, 2, 8, 16), np.float32), "v_cache": np.zeros((4, 2, 8, 16), np.float32),
        "slot_mapping": np.array([1, -1, 5]), "layout": "HND",
    }  # fmt: skip
    caches = arguments["k_cache"], arguments["v_cache"]
    arguments[name] = value
    with pytest.raises(ShapeError, match=name):
        append(**arguments)
    assert not np.any(caches)


def test_append_refuses_a_read_only_cache() -> None:
    cache = np.zeros((4, 2, 8, 16), np.float32)
    cache.flags.writeable = False
    new = np.ones((1, 2, 16), np.float32)
    with pytest.raises(ShapeError, match="read-only"):
        append(new, new, cache, cache, np.array([1]), layout="HND")


def test_merge_refuses_states_that_do_not_fit() -> None:
    out, lse = np.zeros((3, 2, 16), np.float32), np.zeros((3, 2), np.float32)
    with pytest.raises(ShapeError, match="out_b"):
        merge_states(out, lse, out[:2], lse)
    with pytest.raises(ShapeError, match="lse_b"):
        merge_states(out, lse, out, lse.astype(np.float64))
    with pytest.raises(ShapeError, match="lse_a"):
        merge_states(out, np.zeros((3, 4), np.float32)[:, ::2], out, lse)
    with pytest.raises(UnsupportedError, match="head_dim 12"):
        merge_states(out[..., :12], lse, out[..., :12], lse)
    with pytest.raises(ShapeError, match="out_a: expected num_q_heads .* got 0"):
        merge_states(out[:, :0], lse[:, :0], out[:, :0], lse[:, :0])


def test_states_of_one_token_must_be_contiguous_too() -> None:
    out, lse = np.zeros((1, 4, 16), np.float32), np.zeros((1, 8), np.float32)
    with pytest.raises(ShapeError, match="lse_a: expected a contiguous array"):
        merge_states(out, lse[:, ::2], out, lse[:, :4])


def test_tokens_without_rows_are_refused() -> None:
    case = Case([])
    k_cache, v_cache, _ = case.paged(8, "NHD")
    q, bounds = np.zeros((5, 6, 32), np.float32), np.zeros(1, np.int32)
    with pytest.raises(ShapeError, match="q: expected no tokens for a batch of no rows, got 5"):
        paged_attention(q, k_cache, v_cache, np.zeros((0, 4), np.int32), np.zeros(0, np.int32), cu_seqlens_q=bounds)


def test_arrays_in_two_kinds_of_memory_are_refused() -> None:
    torch = pytest.importorskip("torch")
    case = Case([20, 9])
    arrays = [*map(torch.from_numpy, (case.q, *case.paged(8, "NHD"), case.lengths))]
    meta = arrays[0].to("meta")
    with pytest.raises(UnsupportedError, match="q: expected a tensor with memory of its own, got one on meta"):
        paged_attention(meta, *arrays[1:])
    with pytest.raises(UnsupportedError, match="k_cache: expected a tensor with memory of its own, got one on meta"):
        paged_attention(arrays[0], arrays[1].to("meta"), *arrays[2:])


def test_strides_that_are_no_whole_elements_are_refused():
    q = np.zeros(3, dtype=[("x", "f4", (4, 8)), ("pad", "u1")])["x"]
    cache = np.zeros((4, 16, 2, 8), np.float32)
    with pytest.raises(ShapeError, match="q: expected strides in whole elements of 4 bytes, got"):
        paged_attention(q, cache, cache, np.zeros((3, 1), np.int32), np.ones(3, np.int32))


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (10**30, 0)},
        {"num_splits": 2**63},
        {"softmax_scale": 1e300},
        {"softcap": 1e308},
        {"softmax_scale": np.ones(2)},
        {"layout": np.array(["NHD", "HND"])},
    ],
    ids=str,
)
def test_numbers_that_the_kernels_cannot_hold_are_refused(options):
    q, cache = np.zeros((1, 2, 8), np.float32), np.zeros((1, 16, 2, 8), np.float32)
    with pytest.raises(ShapeError, match=next(iter(options))):
        paged_attention(q, cache, cache, np.zeros((1, 1), np.int32), np.ones(1, np.int32), **options)
