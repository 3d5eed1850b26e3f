"""Plans that flash-attn's callers hand over: the results of other calls, planned once a step, never unasked."""

import inspect
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvtoolkit import ArgumentError, ShapeError  # noqa: E402
from kvtoolkit.compat.flash_attn import (  # noqa: E402
    StepPlan,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    plan_for_step,
)
from tests.kvtoolkit.attention.counted_kernels import counted  # noqa: E402

__all__ = ["counted"]  # a fixture

HEADS, KV_HEADS, DIM = 6, 2, 32


def int32(*numbers, device="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


class Batch:
    """Three rows of a paged cache with three layers."""

    def __init__(self, device="cpu", dtype=torch.float32):
        torch.manual_seed(1)
        self.layers = [torch.randn(2, 20, 16, KV_HEADS, DIM).to(device, dtype) for _ in range(3)]
        self.table = torch.randperm(18).view(3, 6).to(device, torch.int32)
        self.lengths = int32(96, 9, 65, device=device)
        self.q = torch.randn(3, 1, HEADS, DIM).to(device, dtype)
        self.new = torch.randn(2, 3, 1, KV_HEADS, DIM).to(device, dtype)

    def with_kvcache(self, layer, **options):
        given = {"cache_seqlens": self.lengths, "block_table": self.table, "causal": True, **options}
        return flash_attn_with_kvcache(given.pop("q", self.q), *self.layers[layer], **given)

    def varlen(self, layer, **options):
        given = {
            "cu_seqlens_q": self.bounds(), "max_seqlen_q": 2, "max_seqlen_k": 96, "seqused_k": self.lengths,
            "block_table": self.table, "causal": True, **options,
        }  # fmt: skip
        return flash_attn_varlen_func(torch.cat((self.q, self.q))[:, 0], *self.layers[layer], **given)

    def bounds(self):
        if not hasattr(self, "_bounds"):
            self._bounds = int32(0, 2, 4, 6, device=self.table.device)
        return self._bounds


def step(attend, batch, **options):
    """What all layers give."""
    return [attend(layer, **options).clone() for layer in range(len(batch.layers))]


CALLS = {
    "decode": ("with_kvcache", {}),
    "varlen": ("varlen", {}),
    "varlen, lengths as sums": ("varlen", {"seqused_k": None, "cu_seqlens_k": int32(0, 90, 99, 164)}),
    "verify": ("with_kvcache", {"q": torch.ones(3, 4, HEADS, DIM)}),
    "one length": ("with_kvcache", {"cache_seqlens": 60}),
    "rows": ("with_kvcache", {"block_table": None, "cache_seqlens": int32(16, 9, 1)}),
    "picked rows": ("with_kvcache", {"block_table": None, "cache_seqlens": int32(16, 9, 1),
                                     "cache_batch_idx": int32(5, 0, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_a_step_share_a_plan(counted, name):
    batch = Batch()
    method, options = CALLS[name]
    attend = getattr(batch, method)
    good = step(attend, batch, **options)
    assert counted == {"in full": 3, "again": 0}, "without a plan nothing is shared"
    with plan_for_step() as plan:
        assert isinstance(plan, StepPlan)
        found = step(attend, batch, **options)
        again = step(attend, batch, **options)
    assert counted == {"in full": 4, "again": 5}
    assert all(map(torch.equal, found + again, good + good))
    step(attend, batch, **options)
    assert counted == {"in full": 7, "again": 5}, "the step has ended"


def test_new_tokens_are_written_in_every_layer(counted):
    batch, other = Batch(), Batch()
    for one in (batch, other):
        one.lengths = int32(90, 9, 65)
    k, v = batch.new
    good = step(other.with_kvcache, other, k=k, v=v)
    with plan_for_step():
        found = step(batch.with_kvcache, batch, k=k, v=v)
    assert all(map(torch.equal, found + batch.layers, good + other.layers))
    assert counted["again"] == 2


def test_lengths_that_change_are_seen_without_a_plan_and_after_a_renewal():
    batch = Batch()
    first = batch.with_kvcache(0)
    with plan_for_step() as plan:
        batch.with_kvcache(0)
    batch.lengths -= 5
    good = batch.with_kvcache(0)
    assert not torch.equal(good, first)
    with plan_for_step(plan) as same:
        assert same is plan
        assert torch.equal(batch.with_kvcache(0), good)
        batch.lengths -= 1
        plan.renew()
        assert torch.equal(batch.with_kvcache(0), batch.with_kvcache(0, scheduler_metadata=StepPlan()))


def test_what_follows_from_the_callers_tensors_is_renewed_too():
    batch = Batch()
    options = {"seqused_k": None, "cu_seqlens_k": int32(0, 90, 99, 164)}
    with plan_for_step() as plan:
        first = batch.varlen(0, **options)
    options["cu_seqlens_k"][1:] -= 7
    good = batch.varlen(0, **options)
    assert not torch.equal(good, first)
    with plan_for_step(plan):
        assert torch.equal(batch.varlen(0, **options), good)


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("name", ["decode", "new tokens", "varlen", "varlen, lengths as sums"])
def test_a_call_that_is_refused_leaves_nothing_in_the_step(name, with_metadata):
    batch = Batch()
    sums = int32(0, 90, 99, 164)
    attend, options, changing = {
        "decode": (batch.with_kvcache, {}, batch.lengths),
        "new tokens": (batch.with_kvcache, {"k": batch.new[0], "v": batch.new[1]}, batch.lengths),
        "varlen": (batch.varlen, {}, batch.lengths),
        "varlen, lengths as sums": (batch.varlen, {"seqused_k": None, "cu_seqlens_k": sums}, sums),
    }[name]
    batch.lengths -= 2
    plan = plan_for_step()
    if with_metadata and changing is batch.lengths:
        plan = metadata(batch, cu_seqlens_q=batch.bounds() if attend == batch.varlen else None)
    with pytest.raises(ShapeError):
        attend(0, **options, out=batch.q[:1], scheduler_metadata=plan)
    batch.table += 100
    with pytest.raises(ShapeError):
        attend(0, **options, scheduler_metadata=plan)
    batch.table -= 100
    changing[1:] -= 3
    good = attend(0, **options)
    assert torch.equal(attend(0, **options, scheduler_metadata=plan), good)


def test_other_tensors_have_plans_of_their_own(counted):
    batch, other = Batch(), Batch()
    other.lengths = int32(50, 60, 70)
    good = step(batch.with_kvcache, batch), step(other.with_kvcache, other)
    counted.update({"in full": 0, "again": 0})
    with plan_for_step():
        found = step(batch.with_kvcache, batch), step(other.with_kvcache, other)
    assert counted == {"in full": 2, "again": 4}
    assert all(map(torch.equal, found[0] + found[1], good[0] + good[1]))


def test_a_step_is_that_of_its_thread_and_the_innermost_one(counted):
    batch = Batch()
    with plan_for_step() as outer:
        batch.with_kvcache(0)
        thread = threading.Thread(target=batch.with_kvcache, args=(0,))
        thread.start()
        thread.join()
        assert counted == {"in full": 2, "again": 0}
        with plan_for_step():
            step(batch.with_kvcache, batch)
        assert counted == {"in full": 3, "again": 2}
        batch.with_kvcache(1)
        batch.with_kvcache(1, scheduler_metadata=outer)
    assert counted == {"in full": 3, "again": 4}
    with pytest.raises(RuntimeError, match="broke off"), plan_for_step():
        raise RuntimeError("broke off")
    batch.with_kvcache(0)
    assert counted["in full"] == 4


def metadata(batch, **options):
    given = {"max_seqlen_k": 96, "cache_seqlens": batch.lengths, "page_size": 16, "causal": True, **options}
    return get_scheduler_metadata(3, 2, given.pop("max_seqlen_k"), HEADS, KV_HEADS, DIM, **given)


def test_the_metadata_of_flash_attention_3_is_such_a_plan(counted):
    batch = Batch()
    good = step(batch.with_kvcache, batch) + step(batch.varlen, batch)
    counted.update({"in full": 0, "again": 0})
    found = step(batch.with_kvcache, batch, scheduler_metadata=metadata(batch))
    found += step(batch.varlen, batch, scheduler_metadata=metadata(batch, cu_seqlens_q=batch.bounds()))
    assert counted == {"in full": 2, "again": 4}
    assert all(map(torch.equal, found, good))
    step(batch.with_kvcache, batch, scheduler_metadata=int32(1, 2, 3))  # a kernel of somebody else wants that
    assert counted == {"in full": 5, "again": 4}


def test_metadata_for_other_tensors_is_refused():
    batch = Batch()
    out = torch.full_like(batch.q, 7.0)
    made = metadata(batch)
    with pytest.raises(ArgumentError, match="scheduler_metadata: expected .* for this cache_seqlens, got that for"):
        batch.with_kvcache(0, scheduler_metadata=made, cache_seqlens=batch.lengths.clone(), out=out)
    with pytest.raises(ArgumentError, match="scheduler_metadata: expected .* for this cu_seqlens_q"):
        batch.varlen(0, scheduler_metadata=made)
    with pytest.raises(ArgumentError, match="scheduler_metadata: expected .* for this seqused_k"):
        batch.varlen(0, scheduler_metadata=made, seqused_k=None, cu_seqlens_k=int32(0, 9, 18, 27))
    assert (out == 7.0).all()
    for wrong, name in (
        ({"cache_seqlens": batch.lengths[:2]}, "cache_seqlens"), ({"cache_seqlens": 3}, "cache_seqlens"),
        ({"cu_seqlens_q": batch.lengths}, "cu_seqlens_q"), ({"max_seqlen_k": -1}, "max_seqlen_k"),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=f"{name}: expected"):
            metadata(batch, **wrong)


def test_the_signature_is_that_of_flash_attention_3():
    parameters = inspect.signature(get_scheduler_metadata).parameters
    assert list(parameters) == [
        "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim", "cache_seqlens",
        "qkv_dtype", "headdim_v", "cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad", "page_size", "max_seqlen_k_new",
        "causal", "window_size", "attention_chunk", "has_softcap", "num_splits", "pack_gqa", "sm_margin",
    ]  # fmt: skip
    assert all(one.default is not one.empty for one in list(parameters.values())[7:])


def test_a_limit_that_a_row_exceeds_is_refused():
    batch = Batch()
    with pytest.raises(ShapeError, match="seqused_k: expected 0 to 95, max_seqlen_k, got 96 in row 0"):
        batch.varlen(0, max_seqlen_k=95)
    assert torch.equal(batch.varlen(0, max_seqlen_k=None), batch.varlen(0, max_seqlen_k=np.int64(96)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode", "varlen"])
def test_a_step_with_a_plan_can_be_captured_and_sees_new_lengths_on_replay(name):
    batch = Batch("cuda", torch.bfloat16)
    attend = getattr(batch, CALLS[name][0])
    good = step(attend, batch)
    with plan_for_step() as plan:
        assert all(map(torch.equal, step(attend, batch), good))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with plan_for_step(plan):
            step(attend, batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), plan_for_step(plan):
            captured = step(attend, batch)
        for lengths in ([90, 9, 60], [1, 96, 33], [3, 0, 95]):
            batch.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
            graph.replay()
            assert all(map(torch.equal, captured, step(attend, batch)))
