"""The attention calls against the float64 reference, at awkward sizes, and their promises about bits."""

import itertools
import multiprocessing
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtoolkit import reference
from kvtoolkit.attention.calls import append, merge_states, paged_attention, variable_block_attention
from kvtoolkit.cpu import num_threads, set_num_threads
from kvtoolkit.cpu import threads as pool
from tests.kvtoolkit.attention.attention_cases import Case, assert_close, nan_filled, to_storage

DTYPES = ("float32", "float16", "bfloat16")
SLOPES = np.array([0.5, 0.25, 0.1, 0.0, 1.0, 0.03], np.float32)
SINKS = np.array([-2.0, 0.0, 3.0, 30.0, -np.inf, 1.0], np.float32)
OPTIONS = {
    "acausal": {"causal": False},
    "window": {"window_size": (20, 5)},
    "left": {"window_size": (0, -1)},
    "right": {"window_size": (-1, 3)},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": SINKS},
    "alibi": {"alibi_slopes": SLOPES},
    "splits": {"num_splits": 3},
    "scale": {"softmax_scale": 0.02},
}


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = num_threads()
    yield
    set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("block_size", [1, 5, 16, 100])
def test_decode_over_paged_blocks(block_size: int, layout: str, dtype: str) -> None:
    case = Case([1, 0, 15, 16, 17, 63, 64, 65, 1100], dtype=dtype)
    case.check(case.paged(block_size, layout), layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_over_variable_blocks(dtype: str) -> None:
    case = Case([1, 0, 7, 8, 9, 63, 64, 65, 127, 129, 700], dtype=dtype)
    case.check(case.variable())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 80, 96, 128, 192, 256])
def test_every_head_dim(head_dim: int, dtype: str) -> None:
    case = Case([70, 3, 150], [1, 2, 40], num_q_heads=4, head_dim=head_dim, dtype=dtype)
    case.check(case.variable())


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 7, 8, 16, 100])
def test_every_group_size(group_size: int) -> None:
    case = Case([70, 1, 130], [1, 1, 9], num_q_heads=2 * group_size)
    case.check(case.paged(8, "HND"), "HND")


@pytest.mark.parametrize(
    ("seq_lens", "new"),
    [
        ([40, 0, 200, 9], [4, 0, 8, 1]),  # verify
        ([300, 0, 130, 64], [70, 0, 130, 33]),  # chunked and full prefill, with an empty row
        ([0, 0], [0, 0]),
        ([0, 5], [3, 5]),  # a padding row that has queries
        ([3, 70], [6, 75]),  # more queries than tokens
        ([200], [200]),
    ],
)
def test_ragged_batches(seq_lens: list[int], new: list[int]) -> None:
    case = Case(seq_lens, new)
    for options in ({}, {"sinks": SINKS}, {"causal": False}):
        case.check(case.variable(), **options)


@pytest.mark.parametrize("new", [[4, 0, 8, 1], [1, 1, 1, 1], [5, 5, 5, 5]])
def test_the_most_queries_of_a_row_change_no_bit(new: list[int]) -> None:
    case = Case([40, 9, 200, 9], new)
    arrays = case.variable()
    good, good_lse = case.run(arrays)
    for most in (max(new), max(new) + 1, 1000):
        out, lse = case.run(arrays, max_seqlen_q=most)
        assert np.array_equal(out, good)
        assert np.array_equal(lse, good_lse)
    assert_close(*case.run(arrays, max_seqlen_q=max(new)), *case.expected(arrays), case.dtype)


def test_an_empty_batch_gives_an_empty_result() -> None:
    case = Case([])
    out, lse = case.run((*case.paged(8, "HND")[:2], np.zeros((0, 3), np.int32)), "HND")
    assert out.shape == (0, 6, 32)
    assert lse.shape == (0, 6)


def test_slopes_may_differ_from_row_to_row() -> None:
    case = Case([100, 0, 70, 12, 530], [1, 1, 40, 15, 3])
    slopes = np.outer([1.0, 2.0, 0.5, 0.0, 0.1], SLOPES).astype(np.float32)
    case.check(case.variable(), alibi_slopes=slopes, causal=False)


@pytest.mark.parametrize("name", [*OPTIONS, *map("+".join, itertools.combinations(OPTIONS, 2))])
def test_every_option_alone_and_in_pairs(name: str) -> None:
    case = Case([100, 0, 70, 12, 530], [1, 1, 40, 15, 3])
    options = {key: value for part in name.split("+") for key, value in OPTIONS[part].items()}
    case.check(case.variable(), **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_options_together_in_half_precision(dtype: str) -> None:
    case = Case([100, 70, 530], [1, 40, 3], dtype=dtype)
    case.check(
        case.variable(), window_size=(60, 2), causal=False, softcap=30.0, sinks=SINKS, alibi_slopes=SLOPES, num_splits=2
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_drawn_shapes(data: st.DataObject) -> None:
    seq_lens = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=4))
    new = [data.draw(st.integers(0, min(n + 2, 80))) for n in seq_lens]
    heads = data.draw(st.integers(1, 3))
    case = Case(
        seq_lens,
        new,
        num_q_heads=heads * data.draw(st.sampled_from([1, 2, 3])),
        num_kv_heads=heads,
        head_dim=8 * data.draw(st.integers(1, 9)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        seed=data.draw(st.integers(0, 1000)),
    )
    options = {
        "causal": data.draw(st.booleans()),
        "window_size": (data.draw(st.integers(-1, 100)), data.draw(st.integers(-1, 100))),
        "num_splits": data.draw(st.integers(0, 5)),
    }
    if data.draw(st.booleans()):
        case.check(case.variable(), **options)
    else:
        case.check(case.paged(data.draw(st.integers(1, 70)), "NHD"), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_the_tokens_lie_does_not_change_a_bit(dtype: str) -> None:
    case = Case([577, 64, 130, 9], [1, 5, 40, 9], dtype=dtype)
    out, lse = case.run(case.variable())
    layouts = [(case.variable(lengths), "NHD") for lengths in ((1,), (8,), (2, 5), (1, 2, 3, 4, 5, 6, 7, 8))]
    layouts += [(case.paged(size, layout), layout) for size in (1, 7, 8, 64) for layout in ("NHD", "HND")]
    for arrays, layout in layouts:
        other, other_lse = case.run(arrays, layout)
        assert np.array_equal(out.view(np.uint8), other.view(np.uint8))
        assert np.array_equal(lse, other_lse)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_the_batch_around_a_row_does_not_change_its_bits(num_splits: int) -> None:
    case = Case([1200, 30, 0, 700, 5], [1, 30, 0, 64, 1])
    arrays = case.variable()
    out, lse = case.run(arrays, num_splits=num_splits)
    bounds = case.cu_seqlens_q
    for row in range(5):
        asked = slice(bounds[row], bounds[row + 1])
        alone, alone_lse = variable_block_attention(
            case.q[asked], *arrays[:2], arrays[2][row : row + 1], arrays[3][row : row + 1], case.lengths[row : row + 1],
            cu_seqlens_q=np.array([0, bounds[row + 1] - bounds[row]], np.int32), num_splits=num_splits, return_lse=True,
        )  # fmt: skip
        assert np.array_equal(out[asked], alone)
        assert np.array_equal(lse[asked], alone_lse)


@pytest.mark.parametrize("window", [(-1, -1), (70, -1)])
def test_chunked_prefill_gives_the_bits_of_one_prefill(window: tuple[int, int]) -> None:
    case = Case([200], [200])
    arrays = case.variable()
    out, _ = case.run(arrays, window_size=window)
    for begin, end in ((0, 64), (64, 101), (101, 200)):
        chunk = variable_block_attention(
            case.q[begin:end], *arrays, np.array([end], np.int32), cu_seqlens_q=np.array([0, end - begin], np.int32),
            window_size=window,
        )  # fmt: skip
        assert np.array_equal(out[begin:end], chunk)


def test_splits_agree_with_each_other() -> None:
    case = Case([1500, 3], num_q_heads=2, num_kv_heads=1)
    arrays = case.variable()
    whole, _ = case.run(arrays, num_splits=1)
    for num_splits in (0, 2, 5, 1000):
        out, _ = case.run(arrays, num_splits=num_splits)
        np.testing.assert_allclose(out, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    case = Case([3000, 900, 64], [1, 300, 64], num_q_heads=8)
    arrays = case.variable()
    set_num_threads(1)
    out, lse = case.run(arrays)
    for count in (2, 3, 8):
        set_num_threads(count)
        for _ in range(5):
            other, other_lse = case.run(arrays)
            assert np.array_equal(out, other)
            assert np.array_equal(lse, other_lse)


@pytest.mark.usefixtures("threads")
def test_several_python_threads_may_call_at_once() -> None:
    set_num_threads(4)
    cases = [Case([900, 400], [200, 100], num_q_heads=4, seed=seed) for seed in range(4)]
    arrays = [case.variable() for case in cases]
    good = [case.run(array)[0] for case, array in zip(cases, arrays, strict=True)]
    failures = []

    def work(i: int) -> None:
        same = all(np.array_equal(cases[i].run(arrays[i])[0], good[i]) for _ in range(10))
        if not same:
            failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def _attend_in_child(case: Case, arrays: tuple[np.ndarray, ...], good: np.ndarray) -> None:
    started = threading.Event()
    pool.run(started.set, 1)
    raise SystemExit(0 if np.array_equal(case.run(arrays)[0], good) and started.wait(20) else 1)


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_attends_with_threads_of_its_own() -> None:
    set_num_threads(3)
    case = Case([2000], [300])
    arrays = case.variable()
    good, _ = case.run(arrays)
    child = multiprocessing.get_context("fork").Process(target=_attend_in_child, args=(case, arrays, good))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_nan_that_a_query_sees_reaches_its_output_and_no_other() -> None:
    case = Case([100, 100], num_q_heads=2)
    arrays = case.variable()
    for broken in range(2):
        caches = [arrays[0].copy(), arrays[1].copy()]
        granule = arrays[2][1, 0] & 0xFFFFFF
        caches[broken][granule, 0, 3, 5] = np.nan  # row 1, kv head 0
        out, _ = case.run((*caches, *arrays[2:]))
        assert np.isnan(out[1, 0, 5])
        assert np.isfinite(out[0]).all()
        assert np.isfinite(out[1, 1]).all()
    case.q[0, 1] = np.nan
    out, lse = case.run(arrays)
    assert np.isnan(out[0, 1]).all()
    assert np.isnan(lse[0, 1])


def test_scores_of_minus_infinity_weigh_nothing() -> None:
    case = Case([20], num_q_heads=1, num_kv_heads=1)
    k_cache, v_cache, table = case.paged(32, "NHD")
    case.q[:] = np.abs(case.q)
    k_cache[table[0, 0], :5] = -np.inf
    case.check((k_cache, v_cache, table))


def test_strided_views_are_read_and_written_in_place() -> None:
    case = Case([50, 9], num_q_heads=4)
    k_cache, v_cache, table = case.paged(4, "NHD")
    wide_q = np.zeros((2, 8, 64), np.float32)
    q = wide_q[:, ::2, :32]
    q[:] = case.q
    fused = np.stack([k_cache, v_cache], axis=1)  # [num_blocks, 2, ...]: one array for both, as other engines keep it
    wide_out = np.full((4, 4, 40), np.nan, np.float32)
    wide_table = np.full((2, 30), -1, np.int32)
    wide_table[:, : table.shape[1]] = table
    out = wide_out[::2, :, :32]
    paged_attention(q, fused[:, 0], fused[:, 1], wide_table[:, :20], case.lengths, out=out)
    assert np.array_equal(out, case.run((k_cache, v_cache, table))[0])
    assert np.isnan(wide_out[1]).all()
    assert np.isnan(wide_out[..., 32:]).all()


def test_out_may_be_the_queries_themselves() -> None:
    case = Case([1200, 40], [1, 30])
    arrays = case.variable()
    good, _ = case.run(arrays)
    variable_block_attention(case.q, *arrays, case.lengths, cu_seqlens_q=case.cu_seqlens_q, out=case.q)
    assert np.array_equal(case.q, good)


def test_arguments_keep_their_values() -> None:
    case = Case([100, 30], [3, 30])
    arrays = case.variable()
    before = [array.copy() for array in (case.q, *arrays)]
    case.run(arrays, sinks=SINKS)
    for array, kept in zip((case.q, *arrays), before, strict=True):
        assert np.array_equal(array, kept, equal_nan=array.dtype == np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors_give_torch_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    case = Case([100, 0, 30], [3, 1, 30], dtype=dtype)
    arrays = case.variable()
    good, good_lse = case.run(arrays)

    def tensor(array: np.ndarray) -> object:
        found = torch.from_numpy(array)
        return found.view(torch.bfloat16) if array.dtype == np.uint16 else found

    q, *rest = map(tensor, (case.q, *arrays, case.lengths))
    bounds = tensor(case.cu_seqlens_q)
    out, lse = variable_block_attention(q, *rest, cu_seqlens_q=bounds, return_lse=True)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert np.array_equal(out.view(torch.uint8).numpy(), good.view(np.uint8))
    assert np.array_equal(lse.numpy(), good_lse)
    given = torch.full_like(q, float("nan"))
    assert variable_block_attention(q, *rest, cu_seqlens_q=bounds, out=given) is given
    assert torch.equal(given, out)
    assert torch.equal(merge_states(out, lse, out, torch.full_like(lse, -torch.inf))[0], out)


class _Interface:
    """An array that only speaks ``__array_interface__``."""

    def __init__(self, array: np.ndarray) -> None:
        self.__array_interface__ = array.__array_interface__
        self.kept = array


class _Capsule:
    """An array that only speaks DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrap", [_Interface, _Capsule])
def test_foreign_arrays_are_viewed(wrap: type) -> None:
    case = Case([100, 30])
    arrays = case.variable()
    good, _ = case.run(arrays)
    out = variable_block_attention(*map(wrap, (case.q, *arrays, case.lengths)))
    assert isinstance(out, np.ndarray)
    assert np.array_equal(out, good)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append_writes_its_slots_and_nothing_else(layout: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    shape = (40, 8, 3, 24) if layout == "NHD" else (40, 3, 8, 24)
    for tokens in (0, 1, 7, 300):
        caches = [rng.standard_normal(shape).astype(dtype) for _ in range(2)]
        wanted = [cache.copy() for cache in caches]
        new = rng.standard_normal((2, tokens, 6, 48)).astype(dtype)[:, :, ::2, :24]
        slots = rng.permutation(320)[:tokens]
        slots[::5] = -1
        append(new[0], new[1], *caches, slots, layout=layout)
        reference.append(new[0], new[1], *wanted, slots, layout=layout)
        assert np.array_equal(caches[0], wanted[0])
        assert np.array_equal(caches[1], wanted[1])


@pytest.mark.usefixtures("threads")
def test_a_large_append_is_shared_among_threads() -> None:
    set_num_threads(4)
    rng = np.random.default_rng(0)
    new = rng.standard_normal((2, 8000, 2, 64)).astype(np.float32)
    caches = np.zeros((2, 1000, 2, 8, 64), np.float32)
    slots = rng.permutation(8000)
    append(new[0], new[1], caches[0], caches[1], slots, layout="HND")
    for written, tokens in zip(caches, new, strict=True):
        assert np.array_equal(written[slots // 8, :, slots % 8], tokens)


def test_append_then_attend_sees_the_new_token() -> None:
    case = Case([17])
    k_cache, v_cache, table, starts = case.variable()
    slot = np.array([(table[0, 0] & 0xFFFFFF) * 8 + 16], np.int64)
    if (table[0, 0] >> 24) + 1 < 3:
        pytest.fail("the seed must give an entry of three granules or more")
    new = to_storage(case.rng.standard_normal((2, 1, 2, 32)), "float32")
    append(new[0], new[1], k_cache, v_cache, slot, layout="HND")
    case.check((k_cache, v_cache, table, starts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_the_halves_gives_the_whole(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    case = Case([90, 40, 0], dtype=dtype, head_dim=40)
    k_cache, v_cache, table = case.paged(8, "HND")
    good, good_lse = case.expected((k_cache, v_cache, table), "HND", causal=False)
    firsts, seconds = np.minimum(case.lengths, 48), np.maximum(case.lengths - 48, 0)
    parts = []
    for lengths, blocks in ((firsts, table), (seconds, np.ascontiguousarray(table[:, 6:]))):
        half = Case([0, 0, 0], dtype=dtype, head_dim=40)
        half.q, half.lengths = case.q, lengths.astype(np.int32)
        out, lse = half.run((k_cache, v_cache, blocks), "HND")
        parts += [torch.from_numpy(out.view(np.int16)).view(torch.bfloat16) if dtype == "bfloat16" else out, lse]
    out, lse = merge_states(*parts)
    found = out.view(torch.uint16).numpy() if dtype == "bfloat16" else out
    # two roundings, one of each half and one of the sum, instead of one
    assert_close(found, lse, good, good_lse, dtype) if dtype == "float32" else np.testing.assert_allclose(
        reference.to_float64(found, dtype), good, rtol=0.02, atol=0.02 * np.abs(good).max()
    )


def test_merge_ignores_what_lies_in_an_empty_side() -> None:
    out = np.ones((2, 1, 8), np.float32)
    poison = nan_filled((2, 1, 8), "float32")
    lse = np.array([[1.5], [-np.inf]], np.float32)
    empty = np.full((2, 1), -np.inf, np.float32)
    for sides in ((out, lse, poison, empty), (poison, empty, out, lse)):
        merged, merged_lse = merge_states(*sides)
        assert (merged[0] == 1).all()
        assert (merged[1] == 0).all()
        assert np.array_equal(merged_lse, lse)
