"""A plan that layers share: the bits of calls without one, its arrays and no others, and nothing else checked less."""

from typing import Any

import numpy as np
import pytest

from kvtoolkit import ArgumentError, ShapeError, TierCaches, UnsupportedError, plan_attention
from kvtoolkit.attention.calls import paged_attention, tiered_attention, variable_block_attention
from tests.kvtoolkit.attention.attention_cases import Case, assert_close
from tests.kvtoolkit.attention.counted_kernels import counted
from tests.kvtoolkit.attention.test_attention import OPTIONS
from tests.kvtoolkit.attention.tiered_cases import TieredCase

__all__ = ["counted"]  # a fixture


def layers(arrays: tuple[Any, ...], count: int = 3) -> list[tuple[Any, ...]]:
    """Caches of other contents for the same tables."""
    k_cache, v_cache, *tables = arrays
    return [(k_cache * np.float32(1 - i / 4), v_cache + np.float32(i), *tables) for i in range(count)]


@pytest.mark.parametrize("name", ["none", *OPTIONS])
def test_planned_layers_have_the_bits_of_others_and_the_values_of_the_reference(counted: Any, name: str) -> None:
    case = Case([100, 0, 70, 12, 530], [1, 0, 40, 15, 3])
    options = {"cu_seqlens_q": case.cu_seqlens_q} | OPTIONS.get(name, {})
    for arrays, call in ((case.paged(16, "NHD"), paged_attention), (case.variable(), variable_block_attention)):
        starts = arrays[3] if len(arrays) == 4 else None
        plan = plan_attention(
            arrays[2], case.lengths, block_starts=starts, cu_seqlens_q=case.cu_seqlens_q, max_seqlen_q=40,
            max_seqlen_k=530,
        )  # fmt: skip
        counted.update({"in full": 0, "again": 0})
        for layer in layers(arrays):
            q = case.q * np.float32(1.5)
            planned = call(q, *layer, case.lengths, plan=plan, **options)
            good, good_lse = call(q, *layer, case.lengths, return_lse=True, **options)
            assert np.array_equal(planned, good)
        case.q = q
        assert_close(planned, good_lse, *case.expected(layer, **options), case.dtype)
        assert counted == {"in full": 1 + 3, "again": 2}


def test_tiered_calls_share_a_plan(counted: Any) -> None:
    case = TieredCase([200, 70], [2, 1], patterns=["wchh", "ch"])
    caches, table, starts = case.tiered()
    plan = plan_attention(table, case.lengths, block_starts=starts, cu_seqlens_q=case.cu_seqlens_q)
    other = TierCaches(caches.k_cache * 2, caches.v_cache, caches.warm.copy(), caches.cold[::-1].copy(), caches[4])
    for layer in (caches, other, caches):
        arguments = (case.q, layer, table, starts, case.lengths)
        out = tiered_attention(*arguments, cu_seqlens_q=case.cu_seqlens_q, plan=plan)
        assert np.array_equal(out, tiered_attention(*arguments, cu_seqlens_q=case.cu_seqlens_q))
    assert counted == {"in full": 1 + 3, "again": 2}
    with pytest.raises(ShapeError, match="cold: expected"):
        tiered_attention(
            case.q, other._replace(cold=other.cold[..., :-1]), table, starts, case.lengths,
            cu_seqlens_q=case.cu_seqlens_q, plan=plan,
        )  # fmt: skip


class Batch:
    """A decode batch and a plan for it."""

    def __init__(self) -> None:
        self.case = Case([100, 9, 65])
        self.k_cache, self.v_cache, self.table = map(np.nan_to_num, self.case.paged(16, "NHD"))
        self.lengths = self.case.lengths
        self.plan = plan_attention(self.table, self.lengths)
        self.attend()

    def attend(self, q: Any = None, **changed: Any) -> Any:
        given = {"k_cache": self.k_cache, "v_cache": self.v_cache, "block_table": self.table, "seq_lens": self.lengths}
        return paged_attention(self.case.q if q is None else q, **{**given, "plan": self.plan, **changed})


@pytest.fixture
def batch() -> Batch:
    return Batch()


def test_each_form_is_planned_once(counted: Any, batch: Batch) -> None:
    wide = np.stack([batch.case.q] * 2, 1)[:, 0]
    out = np.empty_like(batch.case.q)
    forms: list[dict[str, Any]] = [
        {}, {"q": wide}, {"out": out}, {"softcap": 3.0}, {"window_size": [7, 0]}, {"causal": False},
        {"softmax_scale": 0.5}, {"num_splits": 2}, {"sinks": np.zeros(6, np.float32)},
        {"k_cache": batch.k_cache[:, ::1], "v_cache": np.stack([batch.v_cache] * 2, 1)[:, 0]},
        {"alibi_slopes": np.ones(6, np.float32)}, {"layout": "HND", "k_cache": batch.k_cache.swapaxes(1, 2),
         "v_cache": batch.v_cache.swapaxes(1, 2)},
    ]  # fmt: skip
    for _ in range(2):
        for form in forms:
            assert np.array_equal(batch.attend(**form), batch.attend(**form, plan=None))
    # the first form has been planned when the batch was made
    assert counted == {"in full": 3 * len(forms), "again": len(forms) + 1}


def test_the_layout_is_part_of_the_form() -> None:
    case = Case([7, 3])
    k_cache, v_cache, table = case.paged(2, "NHD")  # as many slots as kv heads
    plan = plan_attention(table, case.lengths)
    for layout in ("NHD", "HND"):
        arguments = (case.q, np.nan_to_num(k_cache), np.nan_to_num(v_cache), table, case.lengths)
        planned = paged_attention(*arguments, layout=layout, plan=plan)
        assert np.array_equal(planned, paged_attention(*arguments, layout=layout))


def test_calls_that_cannot_share_are_right(counted: Any, batch: Batch) -> None:
    for _ in range(2):
        (out, lse), (good, good_lse) = batch.attend(return_lse=True), batch.attend(return_lse=True, plan=None)
        assert np.array_equal(out, good)
        assert np.array_equal(lse, good_lse)
    assert counted["again"] == 0
    case = batch.case
    arrays = case.variable()
    plan = plan_attention(arrays[2], case.lengths, block_starts=arrays[3])
    masses = [np.zeros((3, arrays[2].shape[1], 2), np.float32) for _ in range(3)]
    for mass, given in zip(masses, (plan, plan, None), strict=True):
        variable_block_attention(case.q, *arrays, case.lengths, block_mass=mass, plan=given)
        assert np.array_equal(mass, masses[0])
    assert masses[0].any()


def test_other_arrays_than_those_of_the_plan_are_refused(batch: Batch) -> None:
    out = np.full_like(batch.case.q, 7)
    bounds = np.arange(4, dtype=np.int32)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"block_table": batch.table.copy()}, "block_table: expected the array that the plan was made for, .* at 0x"),
        ({"block_table": batch.table[:, :-1]}, r"block_table: expected .*, got \(3, 6\) int32"),
        ({"block_table": batch.table[:2]}, "block_table: expected"),
        ({"seq_lens": batch.lengths.copy()}, "seq_lens: expected the array that the plan was made for"),
        ({"seq_lens": batch.lengths.view(np.float32)}, "seq_lens: expected .*, got .* float32"),
        ({"cu_seqlens_q": bounds}, "cu_seqlens_q: expected None, as in the plan, got an array"),
        ({"max_seqlen_q": 1}, "max_seqlen_q: expected None, as in the plan"),
        ({"plan": 3}, "plan: expected one of plan_attention, got int"),
        ({"plan": plan_attention(batch.table, batch.lengths, block_starts=batch.table)}, "plan: expected no plan for"),
        (
            {"plan": plan_attention(batch.table, batch.lengths, cu_seqlens_q=bounds)},
            "cu_seqlens_q: expected an array, as in the plan, got None",
        ),
    ]
    for changed, message in wrong:
        with pytest.raises(ArgumentError, match=message):
            batch.attend(out=out, **changed)
    with pytest.raises(ArgumentError, match="plan: expected a plan for block_starts, got none"):
        variable_block_attention(
            batch.case.q, batch.k_cache, batch.v_cache, batch.table, batch.table, batch.lengths, plan=batch.plan
        )
    assert (out == 7).all()
    assert np.array_equal(batch.attend(block_table=batch.table[:]), batch.attend(plan=None)), "a view is the same"


def test_further_layers_are_checked_where_they_differ(batch: Batch) -> None:
    case, before = batch.case, batch.table.copy()
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"q": case.q[:2]}, ShapeError, "q: expected one token per row"),
        ({"q": case.q.astype(np.float64)}, ShapeError, "q: expected float32, float16"),
        ({"k_cache": batch.k_cache[1:]}, ShapeError, "v_cache: expected the shape of k_cache"),
        ({"k_cache": batch.k_cache[:1], "v_cache": batch.v_cache[:1]}, ShapeError, "block_table: expected blocks"),
        ({"out": case.q[:2]}, ShapeError, "out: expected"),
        ({"out": batch.k_cache.reshape(-1, 6, 32)[:3]}, UnsupportedError, "out: expected memory of its own"),
        ({"out": batch.table.reshape(-1).view(np.float32)[:0]}, ShapeError, "out: expected"),
        ({"softcap": -1.0}, ShapeError, "softcap"),
        ({"causal": np.zeros(3)}, ShapeError, "causal"),
        ({"window_size": np.zeros(3)}, ShapeError, "window_size"),
        ({"sinks": np.full(6, np.nan, np.float32)}, ShapeError, "sinks: expected finite"),
        ({"backend": "cuda"}, UnsupportedError, "backend: 'cuda' works on arrays on a CUDA device"),
    ]
    shifted = np.zeros(case.q.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(case.q.shape)
    wrong.append(({"q": shifted}, ShapeError, "q: expected aligned elements"))
    batch.attend(out=np.empty_like(case.q))
    for changed, error, message in wrong:
        with pytest.raises(error, match=message):
            batch.attend(**changed)
    assert np.array_equal(batch.table, before)
    q = case.q.copy()
    for _ in range(2):
        assert batch.attend(q, out=q) is q, "queries may be overwritten"


def test_a_plan_stays_as_it_is_until_it_is_renewed(batch: Batch) -> None:
    before = batch.attend()
    batch.lengths -= 3
    batch.table[0, 0] = 1 << 30  # copies are read, so that nothing outside of the cache is
    assert np.array_equal(batch.attend(), before)
    assert np.array_equal(batch.attend(softcap=1e6, softmax_scale=32**-0.5), batch.attend(softcap=1e6))
    batch.plan.renew()
    with pytest.raises(ShapeError, match="block_table: expected blocks within"):
        batch.attend()
    batch.table[0, 0] = 2
    batch.plan.renew()
    assert np.array_equal(batch.attend(), batch.attend(plan=None))
    assert not np.array_equal(batch.attend(), before)


@pytest.mark.parametrize("name", ["a block", "a length", "k_cache", "q", "sinks"])
def test_a_first_call_that_is_refused_leaves_nothing_in_the_plan(batch: Batch, name: str) -> None:
    good, right = batch.attend(plan=None), (batch.table.copy(), batch.lengths.copy())
    batch.plan.renew()
    batch.table[0, 0] = 1 << 30 if name == "a block" else batch.table[0, 1]
    batch.lengths[1] = -1 if name == "a length" else 8
    changed: Any = {
        "k_cache": {"k_cache": batch.k_cache[:0]}, "q": {"q": batch.case.q[:1]}, "sinks": {"sinks": batch.lengths},
    }.get(name, {})  # fmt: skip
    with pytest.raises(ShapeError):
        batch.attend(**changed)
    batch.table[...], batch.lengths[...] = right
    assert np.array_equal(batch.attend(), good)
    batch.lengths[...] = 0  # from the first call that is not refused on, a plan stays as it is
    with pytest.raises(ShapeError):
        batch.attend(q=batch.case.q[:1])
    assert np.array_equal(batch.attend(), good)


def test_what_a_plan_is_told_is_checked(batch: Batch) -> None:
    for name, most in (("max_seqlen_q", -1), ("max_seqlen_k", 2.5)):
        with pytest.raises(ShapeError, match=f"{name}: expected a number of tokens"):
            plan_attention(batch.table, batch.lengths, **{name: most})
    plan = plan_attention(batch.table, batch.lengths, max_seqlen_k=99)
    with pytest.raises(ShapeError, match="max_seqlen_k: expected at least 100, the longest of seq_lens, got 99"):
        batch.attend(plan=plan)
    bounds = np.array([0, 2, 2, 3], np.int32)
    plan = plan_attention(batch.table, batch.lengths, cu_seqlens_q=bounds, max_seqlen_q=1)
    with pytest.raises(ShapeError, match="max_seqlen_q: expected at least 2"):
        batch.attend(plan=plan, cu_seqlens_q=bounds)
    for wrong in (
        {"block_table": batch.table[0]}, {"seq_lens": batch.lengths[1:]}, {"block_starts": batch.table[1:]},
        {"cu_seqlens_q": batch.lengths}, {"block_table": batch.table.astype(np.int64)}, {"seq_lens": [100, 9, 65]},
    ):  # fmt: skip
        (name,) = wrong
        with pytest.raises(ShapeError, match=f"{name}: expected"):
            plan_attention(**{"block_table": batch.table, "seq_lens": batch.lengths, **wrong})


def test_tensors_share_a_plan_and_those_that_moved_are_refused() -> None:
    torch = pytest.importorskip("torch")
    q, cache = torch.randn(3, 6, 32).bfloat16(), torch.randn(20, 16, 2, 32).bfloat16()
    table = torch.arange(18, dtype=torch.int32).reshape(3, 6) + 1
    lengths = torch.tensor([96, 9, 65], dtype=torch.int32)
    plan = plan_attention(table, lengths)
    for layer in (cache, cache * 2, cache * 3):
        out = paged_attention(q, layer, layer, table, lengths, plan=plan)
        assert out.dtype is torch.bfloat16
        assert torch.equal(out, paged_attention(q, layer, layer, table, lengths))
        assert torch.equal(out, paged_attention(q, layer, layer, table[:], lengths.view(3), plan=plan))
    version = out._version
    paged_attention(q, cache, cache, table, lengths, plan=plan, out=out)
    paged_attention(q, cache, cache, table, lengths, plan=plan, out=out)
    assert out._version == version + 2
    lengths.set_(lengths.clone())
    with pytest.raises(ArgumentError, match="seq_lens: expected the array that the plan was made for"):
        paged_attention(q, cache, cache, table, lengths, plan=plan)
    table.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedError, match="block_table: expected a tensor with memory"):
        paged_attention(q, cache, cache, table, lengths, plan=plan)
