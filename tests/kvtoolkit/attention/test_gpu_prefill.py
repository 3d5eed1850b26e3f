"""The prefill kernel on any GPU, also one that has the prompt kernel: options, shapes, parts of rows, and bits."""

import itertools

import numpy as np
import pytest

from kvtoolkit import cuda
from kvtoolkit.arrays.call import Hints, attention_call
from kvtoolkit.attention.calls import paged_attention
from kvtoolkit.cuda import prompt, specs
from kvtoolkit.cuda.launching import Launch
from tests.kvtoolkit.attention import unseen_cases
from tests.kvtoolkit.attention.attention_cases import RELATIVE_L2, Case
from tests.kvtoolkit.attention.gpu_cases import assert_close, check, run, to_device, to_host
from tests.kvtoolkit.attention.test_attention import OPTIONS, SINKS, SLOPES
from tests.kvtoolkit.cache.test_gpu_mixtures import Mixtures

pytestmark = pytest.mark.gpu

MIXED = ([100, 0, 70, 12, 530, 300], [1, 0, 40, 12, 3, 300])  # rows for decode, too
LONG = ([300, 530], [70, 45])


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The names of the kernels launched, on a device without the prompt kernel; the prefill kernel is among them."""
    names, launch = [], Launch.run
    monkeypatch.setattr(prompt, "arch_of", lambda device: 80)
    monkeypatch.setattr(Launch, "run", lambda self, *a, **k: (names.append(self.kernel.name), launch(self, *a, **k)))
    yield names
    assert "kvt_prefill" in names
    assert "kvt_prompt" not in names


@pytest.mark.parametrize("batch", [MIXED, LONG])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [*OPTIONS, *map("+".join, itertools.combinations(OPTIONS, 2))])
def test_every_option_alone_and_in_pairs(name, dtype, batch):
    case = Case(*batch, head_dim=64, dtype=dtype)
    options = {key: value for part in name.split("+") for key, value in OPTIONS[part].items()}
    check(case, case.variable(), **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_options_together(dtype, head_dim):
    case = Case(*MIXED, head_dim=head_dim, dtype=dtype)
    options = {"window_size": (60, 2), "causal": False, "softcap": 30.0, "sinks": SINKS, "alibi_slopes": SLOPES}
    check(case, case.paged(24, "HND"), "HND", **options)


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_every_head_dim(head_dim):
    for dtype, (group_size, heads) in itertools.product(("float16", "bfloat16"), ((1, 3), (4, 2))):
        case = Case(*LONG, num_q_heads=group_size * heads, num_kv_heads=heads, head_dim=head_dim, dtype=dtype)
        check(case, case.paged(16, "NHD"))
        check(case, case.paged(16, "NHD"), softcap=20.0)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 32, 63, 64, 65, 71, 100, 128, 130])
def test_every_group_size(group_size):
    for new in ([40, 9, 1, 20], [1, 1, 1, 0] if group_size > 16 else [17, 33, 20, 0]):
        case = Case([200, 9, 130, 64], new, num_q_heads=2 * group_size, head_dim=64, dtype="float16")
        check(case, case.variable())
        check(case, case.paged(12, "HND"), "HND", window_size=(50, 0))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7, 8, 12, 16, 24, 48, 63, 64, 65, 100, 256, 1000])
def test_every_block_size(block_size, layout):
    case = Case([700, 0, 129, 70], [40, 0, 129, 9], num_q_heads=8, head_dim=64, dtype="float16")
    check(case, case.paged(block_size, layout), layout)


@pytest.mark.parametrize(
    ("seq_lens", "new"),
    [
        ([0, 5], [30, 5]),  # a padding row that has queries
        ([3, 70], [6, 75]),  # more queries than tokens
        ([200], [200]),
        ([64, 128, 192, 63, 65, 127], [64, 128, 100, 63, 65, 127]),
        ([500, 9, 100] * 20, [17, 9, 8] * 20),
    ],
)
def test_ragged_batches(seq_lens, new):
    for head_dim in (64, 128, 192):
        case = Case(seq_lens, new, num_q_heads=8, head_dim=head_dim, dtype="bfloat16")
        for options in ({}, {"sinks": np.resize(SINKS, 8)}, {"causal": False}):
            check(case, case.variable(), **options)


def test_strides_that_no_tensor_map_describes():
    import torch

    case = Case([100, 9, 65, 300], [1, 9, 40, 70], head_dim=64, dtype="float16")
    good, _ = run(case, case.paged(12, "NHD"))
    k_cache, v_cache, table = (to_device(array, "") for array in case.paged(12, "NHD"))
    q = torch.zeros(len(case.q), 10, 72, device="cuda").half()
    q[:, 2:8, :64] = to_device(case.q, "")
    out = torch.full((len(case.q), 2, 6, 64), float("nan"), device="cuda").half()
    blocks, size, heads, dim = k_cache.shape
    # slots 8 elements apart more than tokens are long, keys and values each in an order of their own
    keys = torch.full((blocks, size, heads, dim + 8), float("nan"), device="cuda").half()
    values = torch.full((heads, size, blocks, dim + 24), float("nan"), device="cuda").half()
    keys[..., :dim], values[..., :dim] = k_cache, v_cache.permute(2, 1, 0, 3)
    result = paged_attention(
        q[:, 2:8, :64], keys[..., :dim], values.permute(2, 1, 0, 3)[..., :dim], table, to_device(case.lengths, ""),
        cu_seqlens_q=to_device(case.cu_seqlens_q, ""), out=out[:, 1],
    )  # fmt: skip
    assert np.array_equal(to_host(result), good)
    assert out[:, 0].isnan().all()


def attend(case, arrays, hints):
    """``out, lse``, what `cuda.attend` gives, and the call with its tensors; in ``hints.kept``, the step's memory."""
    import torch

    q, lengths, bounds = to_device(case.q, case.dtype), to_device(case.lengths, ""), to_device(case.cu_seqlens_q, "")
    caches, table = [to_device(cache, case.dtype) for cache in arrays[:2]], to_device(arrays[2], "")
    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:2], float("nan"), device="cuda")
    tensors = {"q": q, "k": caches[0], "v": caches[1], "table": table, "lengths": lengths, "out": out, "lse": lse}
    given = {name: cuda.device_operand(tensor, name) for name, tensor in tensors.items()}
    call = attention_call(
        given["q"], given["k"], given["v"], given["table"], None, given["lengths"], out=given["out"], lse=given["lse"],
        cu_seqlens_q=cuda.device_operand(bounds, "bounds"), layout="HND",
    )  # fmt: skip
    prepared = cuda.attend(call, hints, stream=torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return out, lse, prepared, (call, bounds, *tensors.values())


@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("parts", [2, 3, 4, 5, 7, 16, 17, 33, 64])
def test_rows_are_cut_into_parts_that_are_merged(monkeypatch, parts, head_dim):
    monkeypatch.setattr(prompt, "MAX_PARTS", parts)
    tiles = 5 * parts if parts < 64 else 20 * parts  # merging is worth it
    case = Case([64 * tiles], [12], num_q_heads=8, head_dim=head_dim, dtype="float16")
    arrays = case.paged(16, "HND")
    kept = {}
    out, lse, prepared, (call, *_) = attend(case, arrays, Hints((12, 12), None, kept))
    (memory,) = kept.values()
    words = memory.get().view(np.int32)
    items = words[prompt.LIST_AT // 4 :][: 8 * words[0]].reshape(-1, 8)
    assert (items[:, 6] >> 16).tolist() == [parts] * parts
    assert_close(to_host(out), to_host(lse), *case.expected(arrays, "HND"), case.dtype)
    first = out.clone()
    for _ in range(20):
        out.fill_(float("nan"))
        cuda.attend_prepared(prepared, call.q.address, call.k_cache.address, call.v_cache.address, call.out.address)
        assert (out == first).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ragged_rows_are_cut_where_they_are_long(dtype):
    case = Case([20_000, 300, 40, 9000], [20, 300, 40, 5], num_q_heads=8, head_dim=128, dtype=dtype)
    arrays = case.paged(24, "HND")
    found = [run(case, arrays, "HND", max_seqlen_q=300) for _ in range(6)]
    assert_close(*found[0], *case.expected(arrays, "HND"), dtype)
    for out, lse in found[1:]:
        assert np.array_equal(out.view(np.uint16), found[0][0].view(np.uint16))
        assert np.array_equal(lse, found[0][1])


@pytest.mark.parametrize("name", unseen_cases.OPTIONS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_no_query_sees_changes_no_bit(head_dim, name):
    def make():
        return Case([130, 300, 64], [40, 9, 64], num_q_heads=8, head_dim=head_dim, dtype="float16")

    options = unseen_cases.options_of(name, 8)
    assert unseen_cases.check(make, lambda case: case.paged(12, "NHD"), run, **options) or name == "acausal"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_unseen_infinities_in_rows_that_are_cut(head_dim):
    def make():
        return Case([6000], [30], num_q_heads=8, head_dim=head_dim, dtype="bfloat16")

    assert unseen_cases.check(make, lambda case: case.paged(16, "NHD"), run)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_the_batch_around_a_row_does_not_change_its_bits(num_splits):
    case = Case([1200, 30, 0, 700], [9, 30, 0, 64], head_dim=64, dtype="float16")
    arrays = case.paged(12, "NHD")
    out, lse = run(case, arrays, num_splits=num_splits)
    for row in (0, 1, 3):
        asked = slice(case.cu_seqlens_q[row], case.cu_seqlens_q[row + 1])
        alone = Case([case.seq_lens[row]], [case.new[row]], head_dim=64, dtype="float16")
        alone.q = case.q[asked]
        found, found_lse = run(alone, (*arrays[:2], arrays[2][row : row + 1]), num_splits=num_splits)
        assert np.array_equal(found, out[asked])
        assert np.array_equal(found_lse, lse[asked])


class Replays(Mixtures):
    """Rows that decode have a kernel of their own, whose splits depend on the most tokens a row may have."""

    def compare(self, eager, replayed):
        """They agree, and another replay has the bits of the first."""
        assert (eager - replayed).norm() <= 2 * RELATIVE_L2["float16"] * eager.norm()
        first = replayed.clone()
        self.out.fill_(float("nan"))
        self.graph.replay()
        self.torch.cuda.synchronize()
        assert self.torch.equal(self.out[:, : first.shape[1]], first)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_replays_serve_any_mixture(launched, head_dim):
    mixtures = Replays(6, 60, 150, num_kv_heads=2, head_dim=head_dim)
    for counts in ([1] * 6, [0, 0, 0, 0, 0, 1], [1, 1, 60, 1, 1, 1], [0, 4, 1, 1, 5, 0], [0, 0, 60, 0, 60, 30]):
        mixtures.check(counts)
    rng = np.random.default_rng(head_dim)
    for _ in range(20):
        mixtures.check(rng.integers(0, int(rng.choice([1, 4, 5, 25])) + 1, 6))
    mixtures.cache.check_integrity()
    assert {"kvt_decode", "kvt_prefill"} <= set(launched)


def test_more_rows_than_a_plan_may_have():
    import torch

    batch, new, dim = 10_003, 9, 64
    cache = torch.randn(64, 1, 16, dim, device="cuda").half()
    q = torch.randn(batch * new, 1, dim, device="cuda").half()
    lengths = (torch.arange(batch, device="cuda") % 8 + 9).int()
    table = (torch.arange(batch, device="cuda") % 64).int()[:, None].contiguous()
    bounds = (torch.arange(batch + 1, device="cuda") * new).int()
    out = paged_attention(q, cache, cache, table, lengths, layout="HND", cu_seqlens_q=bounds, max_seqlen_q=new)
    keys = cache[table[:, 0].long(), 0].double()
    scores = torch.einsum("bqd,bnd->bqn", q.view(batch, new, dim).double(), keys) / 8
    last = lengths[:, None] - new + torch.arange(new, device="cuda")
    scores = scores.masked_fill(torch.arange(16, device="cuda") > last[..., None], float("-inf"))
    good = torch.einsum("bqn,bnd->bqd", scores.softmax(-1), keys)
    assert (out.view(batch, new, dim).double() - good).norm() <= 1e-3 * good.norm()


def test_a_sequence_longer_than_items_count_tiles():
    import torch

    block, dim, new = 16, 16, 9
    length = 65535 * specs.prefill(dim, "float16", 1 << 18, has_rules=False).keys + 1000
    blocks = -(-length // block)
    k, v = torch.randn(2, blocks, block, 1, dim, device="cuda").half()
    table = torch.randperm(blocks, device="cuda").int()[None]
    q = torch.randn(new, 2, dim, device="cuda").half()
    lengths = torch.tensor([length], dtype=torch.int32, device="cuda")
    bounds = torch.tensor([0, new], dtype=torch.int32, device="cuda")
    out = paged_attention(q, k, v, table, lengths, cu_seqlens_q=bounds, max_seqlen_q=new)
    keys, values = (cache[table[0].long()].reshape(-1, dim)[:length].double() for cache in (k, v))
    for i in range(new):
        seen = length - new + i + 1
        weights = (q[i].double() @ keys[:seen].T * dim**-0.5).softmax(-1)
        good = weights @ values[:seen]
        assert (out[i].double() - good).norm() <= 2e-3 * good.norm()
