"""The GPU attention kernels against the float64 reference, at awkward sizes, and their promises about bits."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtoolkit import ShapeError, UnsupportedError
from kvtoolkit.attention.calls import paged_attention, variable_block_attention
from tests.kvtoolkit.attention.attention_cases import Case
from tests.kvtoolkit.attention.gpu_cases import assert_close, check, run, to_device, to_host
from tests.kvtoolkit.attention.test_attention import OPTIONS, SINKS, SLOPES

pytestmark = pytest.mark.gpu

DTYPES = ("float16", "bfloat16")
BACKENDS = ("cuda", "numba")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("block_size", [1, 5, 16, 100])
def test_decode_over_paged_blocks(block_size, layout, dtype, backend):
    case = Case([1, 0, 15, 16, 17, 63, 64, 65, 1100], dtype=dtype)
    check(case, case.paged(block_size, layout), layout, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_over_variable_blocks(dtype, backend):
    case = Case([1, 0, 7, 8, 9, 63, 64, 65, 127, 129, 700], dtype=dtype)
    check(case, case.variable(), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128, 192, 256])
def test_every_head_dim(head_dim, dtype, backend):
    case = Case([70, 3, 150], [1, 2, 40], num_q_heads=4, head_dim=head_dim, dtype=dtype)
    check(case, case.variable(), backend=backend)
    check(case, case.paged(16, "NHD"), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 7, 8, 12, 16, 32, 100])
def test_every_group_size(group_size, backend):
    case = Case([70, 1, 130], [1, 1, 9], num_q_heads=2 * group_size, dtype="float16")
    check(case, case.paged(8, "HND"), "HND", backend)
    case = Case([70, 1, 300], num_q_heads=2 * group_size, dtype="float16")
    check(case, case.paged(8, "HND"), "HND", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("seq_lens", "new"),
    [
        ([40, 0, 200, 9], [4, 0, 8, 1]),  # verify
        ([300, 0, 130, 64], [70, 0, 130, 33]),  # chunked and full prefill, with an empty row
        ([0, 0], [0, 0]),
        ([0, 5], [3, 5]),  # a padding row that has queries
        ([0, 5], [30, 5]),
        ([3, 70], [6, 75]),  # more queries than tokens
        ([200], [200]),
        ([5000, 3], [8, 1]),
        ([500, 9, 100] * 20, [1, 9, 8] * 20),
    ],
)
def test_ragged_batches(seq_lens, new, backend):
    case = Case(seq_lens, new, dtype="float16")
    for options in ({}, {"sinks": SINKS}, {"causal": False}):
        check(case, case.variable(), backend=backend, **options)


@pytest.mark.parametrize("num_kv_heads", [1, 8, 12, 16, 32])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_a_batch_of_one_sequence(head_dim, num_kv_heads):
    shape = {"num_q_heads": 2 * num_kv_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": "float16"}
    for seq_len, new in ((0, None), (1, None), (130, None), (700, None), (300, [5]), (90, [8]), (40, [9])):
        case = Case([seq_len], new, **shape)
        check(case, case.variable())
        check(case, case.paged(16, "HND"), "HND", window_size=(50, 0), softcap=20.0)


@pytest.mark.parametrize("block_size", [1, 8, 16, 24, 48])
def test_sequences_longer_than_the_ids_that_a_warp_holds(block_size):
    case = Case([9000, 4500, 16], num_q_heads=2, num_kv_heads=1, dtype="float16")
    arrays = case.paged(block_size, "HND")
    for splits in (0, 1):
        check(case, arrays, "HND", num_splits=splits)
    case = Case([9000], num_q_heads=16, num_kv_heads=8, head_dim=16, dtype="float16")
    check(case, case.paged(block_size, "HND"), "HND")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_any_number_of_pieces_is_merged_in_one_round_or_two(head_dim):
    shape = {"num_q_heads": 10, "num_kv_heads": 2, "head_dim": head_dim, "dtype": "bfloat16"}
    case = Case([5000, 0, 3000], [1, 1, 5], **shape)
    arrays = case.paged(16, "HND")
    for splits in (7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 128):
        check(case, arrays, "HND", num_splits=splits)
    for seq_lens in ([5000], [9000, 3, 0, 70]):  # as many as pay, and as a plan cuts the longest of a batch
        case = Case(seq_lens, num_q_heads=8, num_kv_heads=1, head_dim=head_dim, dtype="bfloat16")
        arrays = case.paged(16, "HND")
        check(case, arrays, "HND")
        first, again = (run(case, arrays, "HND") for _ in range(2))
        assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_with_one_query_have_the_same_bits_beside_rows_with_more(head_dim):
    case = Case([200, 90, 300], [1, 1, 4], num_q_heads=8, num_kv_heads=2, head_dim=head_dim, dtype="float16")
    arrays = case.variable()
    alone = Case([200, 90], num_q_heads=8, num_kv_heads=2, head_dim=head_dim, dtype="float16")
    alone.q = case.q[:2]
    found = run(alone, (*arrays[:2], arrays[2][:2], arrays[3][:2]), num_splits=1)
    again = run(case, arrays, num_splits=1)
    for one, other in zip(found, again, strict=True):
        assert np.array_equal(one, other[:2])


def test_tables_without_columns_serve_rows_without_tokens():
    import torch

    cache = torch.zeros(2, 8, 8, 64, device="cuda").half()
    for batch in (1, 3):
        q, lengths = (
            torch.ones(batch, 8, 64, device="cuda").half(),
            torch.zeros(batch, dtype=torch.int32, device="cuda"),
        )
        table = torch.zeros(batch, 0, dtype=torch.int32, device="cuda")
        assert (paged_attention(q, cache, cache, table, lengths, layout="HND") == 0).all()
        assert (variable_block_attention(q, cache, cache, table, table, lengths) == 0).all()


def test_large_batches():
    import torch

    cache = torch.randn(64, 1, 16, 64, device="cuda").half()
    for batch in (4097, 9999, 10001, 12000):
        q = torch.randn(batch, 1, 64, device="cuda").half()
        lengths = (torch.arange(batch, device="cuda") % 17).int()
        table = (torch.arange(batch, device="cuda") % 64).int()[:, None].contiguous()
        out = paged_attention(q, cache, cache, table, lengths, layout="HND").double()
        keys = cache[table[:, 0].long(), 0].double()
        scores = torch.einsum("bd,bnd->bn", q[:, 0].double(), keys) / 8
        scores = scores.masked_fill(torch.arange(16, device="cuda") >= lengths[:, None], float("-inf"))
        good = torch.einsum("bn,bnd->bd", scores.softmax(-1).nan_to_num(), keys)
        assert (out[:, 0] - good).norm() <= 1e-3 * good.norm()


def test_late_ranges():
    # ragged, and enough of them that three CTAs of an SM leave an eighth to those that come last
    case = Case([5000, 64, 0, 3000, 1, 2000, 700, 300, 1500, 63, 4096, 65], head_dim=64, dtype="float16")
    k_cache, v_cache, table = case.paged(16, "HND")
    out, lse = case.expected((k_cache, v_cache, table), "HND")
    many = Case([], head_dim=64, dtype="float16")
    many.q, many.lengths = np.tile(case.q, (20, 1, 1)), np.tile(case.lengths, 20)
    found = run(many, (k_cache, v_cache, np.tile(table, (20, 1))), "HND")
    assert_close(*found, np.tile(out, (20, 1, 1)), np.tile(lse, (20, 1)), case.dtype)


def test_an_empty_batch_gives_an_empty_result():
    case = Case([], dtype="float16")
    out, lse = run(case, (*case.paged(8, "HND")[:2], np.zeros((0, 3), np.int32)), "HND")
    assert out.shape == (0, 6, 32)
    assert lse.shape == (0, 6)


@pytest.mark.parametrize("name", [*OPTIONS, *map("+".join, itertools.combinations(OPTIONS, 2))])
def test_every_option_alone_and_in_pairs(name):
    case = Case([100, 0, 70, 12, 530], [1, 1, 40, 15, 3], dtype="float16")
    arrays = case.variable()
    options = {key: value for part in name.split("+") for key, value in OPTIONS[part].items()}
    for backend in BACKENDS:
        check(case, arrays, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_options_together(dtype, backend):
    case = Case([100, 70, 530], [1, 40, 3], dtype=dtype)
    options = {"window_size": (60, 2), "causal": False, "softcap": 30.0, "sinks": SINKS, "alibi_slopes": SLOPES}
    check(case, case.variable(), backend=backend, num_splits=2, **options)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_shapes(data):
    seq_lens = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=5))
    new = None
    if data.draw(st.booleans()):
        new = [data.draw(st.integers(0, min(n + 2, 80))) for n in seq_lens]
    heads = data.draw(st.integers(1, 3))
    case = Case(
        seq_lens,
        new,
        num_q_heads=heads * data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16])),
        num_kv_heads=heads,
        head_dim=data.draw(st.sampled_from([32, 64, 80, 128])),
        dtype=data.draw(st.sampled_from(DTYPES)),
        seed=data.draw(st.integers(0, 1000)),
    )
    options = {
        "causal": data.draw(st.booleans()),
        "window_size": (data.draw(st.integers(-1, 100)), data.draw(st.integers(-1, 100))),
        "num_splits": data.draw(st.integers(0, 5)),
        "softcap": data.draw(st.sampled_from([0.0, 0.0, 10.0])),
    }
    if data.draw(st.booleans()):
        check(case, case.variable(), **options)
    else:
        layout = data.draw(st.sampled_from(["NHD", "HND"]))
        check(case, case.paged(data.draw(st.integers(1, 70)), layout), layout, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_the_tokens_lie_does_not_change_a_bit(dtype):
    case = Case([577, 64, 130, 9, 3000], [1, 5, 40, 9, 1], dtype=dtype)
    out, lse = run(case, case.variable())
    layouts = [(case.variable(lengths), "NHD") for lengths in ((1,), (8,), (2, 5), (1, 2, 3, 4, 5, 6, 7, 8))]
    layouts += [(case.paged(size, layout), layout) for size in (8, 16, 24, 64) for layout in ("NHD", "HND")]
    for arrays, layout in layouts:
        other, other_lse = run(case, arrays, layout)
        assert np.array_equal(out.view(np.uint16), other.view(np.uint16))
        assert np.array_equal(lse, other_lse)
    # blocks that tensor maps cannot describe have a kernel of their own, and bits of their own
    first, first_lse = run(case, case.paged(1, "NHD"), "NHD")
    assert np.allclose(first_lse, lse, atol=1e-4)
    for size, layout in ((1, "HND"), (7, "NHD"), (7, "HND")):
        other, other_lse = run(case, case.paged(size, layout), layout)
        assert np.array_equal(first.view(np.uint16), other.view(np.uint16))
        assert np.array_equal(first_lse, other_lse)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_the_batch_around_a_row_does_not_change_its_bits(num_splits):
    case = Case([1200, 30, 0, 700, 5], [1, 30, 0, 64, 1], dtype="float16")
    arrays = case.variable()
    out, lse = run(case, arrays, num_splits=num_splits)
    bounds = case.cu_seqlens_q
    tensors = [to_device(array, "float16") for array in arrays]
    q, lengths = to_device(case.q, "float16"), to_device(case.lengths, "")
    for row in range(5):
        asked = slice(bounds[row], bounds[row + 1])
        alone, alone_lse = variable_block_attention(
            q[asked], *tensors[:2], tensors[2][row : row + 1], tensors[3][row : row + 1], lengths[row : row + 1],
            cu_seqlens_q=to_device(np.array([0, bounds[row + 1] - bounds[row]], np.int32), ""), num_splits=num_splits,
            return_lse=True,
        )  # fmt: skip
        assert np.array_equal(out[asked], to_host(alone))
        assert np.array_equal(lse[asked], to_host(alone_lse))


def test_long_sequences_in_many_splits():
    import torch

    torch.manual_seed(0)
    lengths, heads, group, dim, block = [70_001, 33], 2, 4, 128, 16
    table = torch.full((2, -(-max(lengths) // block)), -1, dtype=torch.int32, device="cuda")
    ids = torch.randperm(5000, device="cuda", dtype=torch.int32)
    for row, n in enumerate(lengths):
        count = -(-n // block)
        table[row, :count], ids = ids[:count], ids[count:]
    k, v = torch.randn(2, 5000, block, heads, dim, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(2, heads * group, dim, device="cuda", dtype=torch.bfloat16)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    for splits in (0, 1, 128, 1000):
        out, lse = paged_attention(q, k, v, table, seq_lens, return_lse=True, num_splits=splits)
        for row, n in enumerate(lengths):
            places = table[row, : -(-n // block)].long()
            keys, values = (c[places].reshape(-1, heads, dim)[:n].double() for c in (k, v))
            scores = torch.einsum("hgd,nhd->hgn", q[row].double().view(heads, group, dim), keys) * dim**-0.5
            good = torch.einsum("hgn,nhd->hgd", scores.softmax(-1), values).reshape(-1, dim)
            assert (out[row].double() - good).norm() <= 4e-3 * good.norm()
            assert (lse[row] - scores.logsumexp(-1).flatten()).abs().max() < 1e-4


def test_offsets_beyond_32_bits():
    import torch

    heads, dim, block = 8, 128, 16
    num_blocks = (2**32 + 2**20) // (heads * dim * block)  # elements beyond 2^32
    k = torch.empty(num_blocks, block, heads, dim, device="cuda", dtype=torch.float16)
    v = torch.empty_like(k)
    ids = [num_blocks - 1, 0, num_blocks - 2]
    for i in ids:
        k[i].normal_()
        v[i].normal_()
    q = torch.randn(1, heads, dim, device="cuda", dtype=torch.float16)
    table = torch.tensor([ids], dtype=torch.int32, device="cuda")
    out = paged_attention(q, k, v, table, torch.tensor([41], dtype=torch.int32, device="cuda"))
    keys, values = (torch.cat([c[i] for i in ids])[:41].double() for c in (k, v))
    weights = (torch.einsum("hd,nhd->hn", q[0].double(), keys) * dim**-0.5).softmax(-1)
    good = torch.einsum("hn,nhd->hd", weights, values)
    assert (out[0].double() - good).norm() <= 1e-3 * good.norm()


def test_strided_queries_outputs_and_caches():
    import torch

    case = Case([100, 9, 65], [1, 9, 40], head_dim=64, dtype="float16")
    good, _ = run(case, case.paged(16, "NHD"))
    qkv = torch.zeros(50, 10, 64, device="cuda", dtype=torch.float16)
    qkv[:, 2:8] = to_device(case.q, "float16")
    out = torch.full((50, 2, 6, 64), float("nan"), device="cuda", dtype=torch.float16)
    k_cache, v_cache, table = case.paged(16, "NHD")
    both = torch.stack([to_device(k_cache, ""), to_device(v_cache, "")], dim=1)  # [num_blocks, 2, ...]
    result = paged_attention(
        qkv[:, 2:8], both[:, 0], both[:, 1], to_device(table, ""), to_device(case.lengths, ""),
        cu_seqlens_q=to_device(case.cu_seqlens_q, ""), out=out[:, 1],
    )  # fmt: skip
    assert np.array_equal(to_host(result), good)
    assert out[:, 0].isnan().all()


def test_cupy_arrays_and_whatever_has_the_interface_or_dlpack():
    import cupy

    case = Case([100, 9], dtype="float16")
    arrays = case.variable()
    good, good_lse = run(case, arrays)
    given_arrays = [cupy.asarray(array) for array in (case.q, *arrays, case.lengths)]

    class Interface:
        def __init__(self, array):
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    class Capsule:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    for wrap in (lambda array: array, Interface, Capsule):
        out, lse = variable_block_attention(*map(wrap, given_arrays), return_lse=True)
        assert isinstance(out, cupy.ndarray)
        assert np.array_equal(out.get(), good)
        assert np.array_equal(lse.get(), good_lse)


def test_the_callers_stream_is_used_and_a_graph_can_be_replayed():
    import torch

    case = Case([1000, 70, 9], head_dim=64, dtype="float16")
    arrays = [to_device(array, "float16") for array in case.variable()]
    lengths, q = to_device(case.lengths, ""), to_device(case.q, "float16")
    out = torch.empty_like(q)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        variable_block_attention(q, *arrays, lengths, out=out)  # compiles, and takes its scratch memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            variable_block_attention(q, *arrays, lengths, out=out)
        for seq_lens in ([1000, 70, 9], [500, 1, 0], [999, 64, 8]):
            lengths.copy_(torch.tensor(seq_lens, dtype=torch.int32))
            out.fill_(float("nan"))
            graph.replay()
            stream.synchronize()
            replayed = out.clone()
            assert torch.equal(variable_block_attention(q, *arrays, lengths), replayed)
            case.lengths = np.array(seq_lens, np.int32)
            good, _ = case.expected(tuple(to_host(array) for array in arrays))
            assert np.abs(to_host(replayed) - good).max() < 0.05


def test_host_and_device_arrays_do_not_mix():
    case = Case([20, 9], dtype="float16")
    arrays = case.variable()
    q, k, v, table, starts = (to_device(array, "float16") for array in (case.q, *arrays))
    with pytest.raises(UnsupportedError, match="seq_lens: expected an array on a CUDA device, got a ndarray in host"):
        variable_block_attention(q, k, v, table, starts, case.lengths)
    with pytest.raises(UnsupportedError, match="backend: 'cpu' works on arrays in host memory"):
        variable_block_attention(q, k, v, table, starts, to_device(case.lengths, ""), backend="cpu")
    with pytest.raises(UnsupportedError, match=r"float16 and bfloat16, got float32"):
        variable_block_attention(q.float(), k.float(), v.float(), table, starts, to_device(case.lengths, ""))
    with pytest.raises(ShapeError, match="q: expected rows that begin at multiples of 16 bytes"):
        variable_block_attention(q.repeat(1, 1, 2)[..., 1:33], k, v, table, starts, to_device(case.lengths, ""))
