"""Calls on a GPU whose layers share a plan: the bits of calls without one, eagerly and in captured graphs."""

from typing import Any

import numpy as np
import pytest

from kvtoolkit import ArgumentError, plan_attention
from kvtoolkit.attention.calls import paged_attention, variable_block_attention
from kvtoolkit.runtime.driver import PreparedLaunch
from tests.kvtoolkit.attention.attention_cases import Case
from tests.kvtoolkit.attention.gpu_cases import assert_close, to_device, to_host
from tests.kvtoolkit.attention.test_attention import OPTIONS

pytestmark = pytest.mark.gpu

BATCHES = {
    "decode": ([1000, 70, 0, 9, 64], None),
    "verify": ([1000, 70, 9], [4, 4, 4]),
    "ragged": ([500, 0, 130, 64], [1, 0, 40, 3]),
    "prompts": ([300, 130, 64], [300, 70, 64]),
    "one row": ([3000], None),
}


class Layers:
    """A batch on the device, and calls of its layers."""

    def __init__(self, case: Case, arrays: tuple[np.ndarray, ...], **told: Any) -> None:
        self.case, self.arrays = case, arrays
        k_cache, v_cache, *tables = arrays
        self.caches = [to_device(cache, case.dtype) for cache in (k_cache, v_cache)]
        self.tables = [to_device(table, "") for table in tables]
        self.lengths = to_device(case.lengths, "")
        self.bounds = None if case.cu_seqlens_q is None else to_device(case.cu_seqlens_q, "")
        self.plan = plan_attention(
            self.tables[0], self.lengths, block_starts=self.tables[1] if len(tables) == 2 else None,
            cu_seqlens_q=self.bounds, **told,
        )  # fmt: skip
        self.q = to_device(case.q, case.dtype)

    def attend(self, layer: int = 0, **options: Any) -> Any:
        """A layer with queries and caches of its own, with the plan unless told otherwise."""
        call = variable_block_attention if len(self.tables) == 2 else paged_attention
        k_cache, v_cache = (cache * (1 + layer) for cache in self.caches)
        given = {"plan": self.plan, "cu_seqlens_q": self.bounds, **options}
        return call(self.q * (1 - layer / 8), k_cache, v_cache, *self.tables, self.lengths, **given)

    def check(self, **options: Any) -> None:
        """Layers with the plan have the bits of layers without it."""
        import torch

        for layer in (0, 1, 2, 0):
            planned, good = self.attend(layer, **options), self.attend(layer, plan=None, **options)
            assert torch.equal(planned.view(torch.int16), good.view(torch.int16))


def told(case: Case) -> dict[str, int]:
    """What the host may say of a batch."""
    most = 1 if case.cu_seqlens_q is None else int(np.diff(case.cu_seqlens_q).max())
    return {"max_seqlen_q": most, "max_seqlen_k": int(case.lengths.max())}


@pytest.mark.parametrize("backend", ["cuda", "numba"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", BATCHES)
def test_planned_layers_have_the_bits_of_others(name, dtype, backend):
    case = Case(*BATCHES[name], head_dim=64, dtype=dtype)
    for arrays in (case.paged(16, "NHD"), case.variable()):
        layers = Layers(case, arrays, max_seqlen_q=told(case)["max_seqlen_q"])
        for one in range(3):
            same = {"backend": backend, "max_seqlen_q": told(case)["max_seqlen_q"]}
            planned, good = layers.attend(one, **same), layers.attend(one, plan=None, **same)
            assert (planned == good).all()


@pytest.mark.parametrize("name", BATCHES)
def test_hints_change_no_value_beyond_rounding(name):
    case = Case(*BATCHES[name], head_dim=64, dtype="float16")
    arrays = case.variable()
    expected = case.expected(arrays)
    for options in ({}, {"max_seqlen_q": told(case)["max_seqlen_q"]}, {"max_seqlen_q": 2000}):
        layers = Layers(case, arrays)
        out, lse = layers.attend(plan=None, return_lse=True, **options)
        assert_close(to_host(out), to_host(lse), *expected, case.dtype)
    layers = Layers(case, arrays, **told(case))
    for _ in range(2):
        assert_close(to_host(layers.attend()), to_host(lse), *expected, case.dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_has_a_form_of_its_own(name):
    case = Case([1000, 70, 9], head_dim=64, dtype="float16")
    layers = Layers(case, case.paged(16, "NHD"))
    options = {key: to_device(one, "") if isinstance(one, np.ndarray) else one for key, one in OPTIONS[name].items()}
    layers.check()
    layers.check(**options)
    layers.check()


def test_a_decode_batch_with_bounds_has_the_bits_of_one_without():
    import torch

    case = Case([1000, 70, 9, 640], head_dim=64, dtype="float16")
    layers = Layers(case, case.paged(16, "NHD"))
    bounds = torch.arange(5, dtype=torch.int32, device="cuda")
    with_bounds = layers.attend(plan=None, cu_seqlens_q=bounds, max_seqlen_q=1)
    assert torch.equal(with_bounds, layers.attend(plan=None))


def test_lengths_that_change_are_seen_after_a_renewal():
    case = Case([1000, 70, 9], head_dim=64, dtype="float16")
    layers = Layers(case, case.variable())
    layers.check()
    for lengths in ([500, 1, 0], [999, 64, 8]):
        layers.lengths.copy_(to_device(np.array(lengths, np.int32), ""))
        layers.plan.renew()
        layers.check()


@pytest.mark.parametrize("own_stream", [True, False])
def test_a_graph_plans_anew_at_each_replay(own_stream):
    import torch

    case = Case([1000, 70, 9], head_dim=64, dtype="float16")
    layers = Layers(case, case.variable())
    stream = torch.cuda.Stream()
    for one in range(3):
        layers.attend(one)  # compiles, and takes the plan's memory
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        layers.attend()  # takes scratch memory
    torch.cuda.synchronize()
    graphs, results = [], []
    for _ in range(2):  # the second is captured while the plan of the first is known
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream if own_stream else None):
            results.append([layers.attend(one) for one in range(3)])
    for lengths in ([1000, 70, 9], [500, 1, 0], [999, 64, 8]):
        layers.lengths.copy_(to_device(np.array(lengths, np.int32), ""))
        good = [layers.attend(one, plan=None) for one in range(3)]
        for graph, found in zip(graphs, results, strict=True):
            for out in found:
                out.fill_(float("nan"))
            graph.replay()
            assert all(map(torch.equal, found, good))
        layers.plan.renew()
        layers.check()


def test_one_kernel_is_launched_for_each_further_layer(monkeypatch):
    case = Case([1000, 70, 9], head_dim=64, dtype="float16")
    layers = Layers(case, case.variable())
    layers.attend()
    launches, run = [], PreparedLaunch.run
    monkeypatch.setattr(PreparedLaunch, "run", lambda self, *given: (launches.append(self), run(self, *given)))
    for one in range(3):
        layers.attend(one)
    assert len(launches) == 3
    layers.attend(plan=None)
    assert len(launches) == 3 + 3  # a list of granules, a plan, and attention


def test_tables_that_are_others_are_refused():
    case = Case([100, 9], head_dim=64, dtype="float16")
    layers = Layers(case, case.paged(16, "NHD"))
    layers.attend()
    table, lengths = layers.tables[0], layers.lengths
    for name, other in (("block_table", table.clone()), ("seq_lens", lengths.clone()), ("seq_lens", lengths[1:])):
        layers.tables, layers.lengths = [table], lengths
        if name == "block_table":
            layers.tables = [other]
        else:
            layers.lengths = other
        with pytest.raises(ArgumentError, match=f"{name}: expected the array that the plan was made for"):
            layers.attend()
    layers.tables, layers.lengths = [table], lengths
    with pytest.raises(ArgumentError, match="cu_seqlens_q: expected None"):
        layers.attend(cu_seqlens_q=to_device(np.arange(3, dtype=np.int32), ""))


def test_cupy_arrays_share_a_plan_on_cupys_stream():
    import cupy

    case = Case([100, 9], head_dim=64, dtype="float16")
    q, *arrays, lengths = (cupy.asarray(array) for array in (case.q, *case.variable(), case.lengths))
    plan = plan_attention(arrays[2], lengths, block_starts=arrays[3])
    with cupy.cuda.Stream(non_blocking=True) as stream:
        good = variable_block_attention(q, *arrays, lengths)
        for _ in range(3):
            out = variable_block_attention(q, *arrays, lengths, plan=plan)
            stream.synchronize()
            assert (out == good).all()
