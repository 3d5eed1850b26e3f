"""What calls with one plan launch on a device: one plan for all layers, in each capture anew. Needs no GPU."""

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from kvtoolkit import ArgumentError, ShapeError, backends, plan_attention
from kvtoolkit.attention import calls, plan
from kvtoolkit.attention.calls import paged_attention, variable_block_attention
from kvtoolkit.backends import BACKENDS
from kvtoolkit.cuda import check, memory, prompt
from tests.kvtoolkit.cuda.test_launches import array, fake

__all__ = ["fake"]  # a fixture

PLANNED, AGAIN = ["kvt_plan", "kvt_decode"], ["kvt_decode"]


class Stream:
    """The current stream: its address and the capture that it is in."""

    def __init__(self):
        self.address, self.capture = 0x5000, 0


@pytest.fixture
def stream(fake, monkeypatch):
    """A device whose arrays are operands."""
    current = Stream()
    places = iter(range(1 << 40, 1 << 41, 1 << 24))
    for module in (calls, plan):
        monkeypatch.setattr(module, "is_on_device", lambda array: True)
    for module in (backends, plan):
        monkeypatch.setattr(module, "current_stream", lambda device, from_torch=None: current.address)
    monkeypatch.setattr(plan, "capture_id", lambda stream: current.capture)
    monkeypatch.setattr(memory, "is_capturing", lambda stream: bool(current.capture))
    monkeypatch.setattr(memory, "on_stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(prompt, "tensor_map", lambda address, *_: (address, *range(15)))
    monkeypatch.setattr(backends, "using", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        type(BACKENDS["cuda"]), "empty", staticmethod(lambda shape, dtype, *_: (None, array(*shape, dtype=dtype)))
    )
    taken = SimpleNamespace(empty=lambda nbytes, dtype: SimpleNamespace(data=SimpleNamespace(ptr=next(places))))
    monkeypatch.setitem(sys.modules, "cupy", taken)
    return current


class Layers:
    """A decode batch of 16 rows with bounds, and calls of its layers."""

    def __init__(self, fake, has_bounds=True, **told):
        self.fake = fake
        self.table, self.lengths = array(16, 12), array(16)
        self.bounds = array(17) if has_bounds else None
        self.plan = plan_attention(self.table, self.lengths, cu_seqlens_q=self.bounds, **told)

    def attend(self, **options):
        """The kernels that a layer launches, by name; the launches are in ``taken``."""
        before = len(self.fake.taken)
        self.q, *self.caches = (array(*shape, dtype="float16") for shape in ((16, 8, 128), *[(99, 16, 2, 128)] * 2))
        given = {"plan": self.plan, "cu_seqlens_q": self.bounds, **options}
        paged_attention(given.pop("q", self.q), *self.caches, self.table, self.lengths, **given)
        self.taken = self.fake.taken[before:]
        return [one.kernel for one in self.taken]


def test_layers_are_planned_once_and_have_their_own_addresses(fake, stream):
    layers = Layers(fake, max_seqlen_q=1)
    assert layers.attend() == PLANNED
    planned, first = layers.taken
    assert planned.parameters["seq_lens"] == layers.lengths.address
    for _ in range(2):
        assert layers.attend() == AGAIN
        (again,) = layers.taken
        changed = {name for name in first.parameters if first.parameters[name] != again.parameters[name]}
        assert changed == {"q", "k_cache", "v_cache", "out"}
        assert again.parameters["q"] == layers.q.address
        assert (again.parameters["k_cache"], again.parameters["v_cache"]) == tuple(c.address for c in layers.caches)
        assert again.stream == first.stream == stream.address


def test_the_most_queries_decide_what_is_launched(fake, stream):
    unknown = Layers(fake)  # a row of 16 tokens is possible
    assert unknown.attend() == ["kvt_plan_prompts", "kvt_prompt"]
    assert [unknown.attend() for _ in range(2)] == [["kvt_prompt"]] * 2
    assert unknown.taken[0].parameters["out"] not in (0, unknown.q.address)
    with_bounds = Layers(fake, max_seqlen_q=1)
    assert with_bounds.attend() == PLANNED
    assert with_bounds.taken[1].parameters["cu_seqlens_q"] == 0
    assert Layers(fake, has_bounds=False).attend() == PLANNED
    assert Layers(fake).attend(plan=None, max_seqlen_q=1) == PLANNED
    several = Layers(fake, max_seqlen_q=4)
    assert several.attend() == PLANNED
    assert several.taken[1].parameters["cu_seqlens_q"] == several.bounds.address


def test_without_a_plan_every_layer_is_planned(fake, stream):
    layers = Layers(fake, has_bounds=False)
    assert [layers.attend(plan=None) for _ in range(3)] == [PLANNED] * 3


def test_after_a_renewal_the_plan_is_made_anew_in_its_place(fake, stream):
    layers = Layers(fake, has_bounds=False)
    assert layers.attend() == PLANNED
    place = layers.taken[0].parameters["ranges"]
    assert layers.attend() == AGAIN
    layers.plan.renew()
    assert layers.attend() == PLANNED
    assert layers.taken[0].parameters["ranges"] == place
    assert layers.attend() == AGAIN


def test_each_form_has_a_plan_of_its_own(fake, stream):
    layers = Layers(fake, has_bounds=False)
    forms = [{}, {"window_size": (64, 0)}, {"softcap": 3.0}, {"num_splits": 2}]
    first = [layers.attend(**form) for form in forms]
    assert first == [PLANNED, PLANNED, PLANNED, AGAIN]  # fixed splits need no plan
    assert [layers.attend(**form) for form in forms] == [AGAIN] * 4
    places = []
    layers.plan.renew()
    for form in forms[:3]:
        layers.attend(**form)
        places.append(layers.taken[0].parameters["ranges"])
    assert places[0] == places[2] != places[1], "what is planned the same way shares its memory"


def test_each_capture_has_a_plan_in_its_graph(fake, stream):
    layers = Layers(fake, has_bounds=False)
    assert layers.attend() == PLANNED
    place = layers.taken[0].parameters["ranges"]
    for capture in (7, 8, 0):
        stream.capture = capture
        assert [layers.attend() for _ in range(3)] == [PLANNED, AGAIN, AGAIN]
    assert layers.taken[0].parameters["ranges"] == place
    stream.address = 0x6000
    assert [layers.attend() for _ in range(2)] == [PLANNED, AGAIN], "another stream has other scratch memory"
    assert layers.taken[0].stream == 0x6000


def test_a_plan_that_has_no_memory_at_its_capture_is_made_in_every_layer(fake, stream):
    layers = Layers(fake, has_bounds=False)
    stream.capture = 1
    assert [layers.attend() for _ in range(2)] == [PLANNED] * 2
    assert layers.taken[0].parameters["ranges"] == 0xC0000, "scratch memory"


def test_entries_are_listed_once(fake, stream):
    table, starts, lengths = array(16, 12), array(16, 12), array(16)
    shared = plan_attention(table, lengths, block_starts=starts, max_seqlen_k=640)
    for names in (["kvt_expand", *PLANNED], AGAIN):
        fake.taken.clear()
        q, *caches = (array(*shape, dtype="float16") for shape in ((16, 8, 128), *[(99, 2, 8, 128)] * 2))
        variable_block_attention(q, *caches, table, starts, lengths, plan=shared)
        assert [one.kernel for one in fake.taken] == names
        assert fake.taken[-1].parameters["table_row"] == 80, "granules of the longest row"


def test_tables_on_a_device_that_are_others_are_refused(fake, stream):
    layers = Layers(fake, has_bounds=False)
    layers.lengths = layers.lengths._replace(address=layers.lengths.address + 4)
    with pytest.raises(
        ArgumentError, match="seq_lens: expected the array that the plan was made for, .* CUDA device 0"
    ):
        layers.attend()
    assert not fake.taken


def test_misaligned_layers_are_refused(fake, stream):
    layers = Layers(fake, has_bounds=False)
    layers.attend()
    good = array(16, 8, 128, dtype="float16")
    with pytest.raises(ValueError, match="q: expected rows that begin at multiples of 16 bytes"):
        layers.attend(q=good._replace(address=good.address + 8))


def test_with_the_variable_what_the_host_is_told_is_checked_on_the_device(fake, stream, monkeypatch):
    layers = Layers(fake, max_seqlen_q=1, max_seqlen_k=50)
    held = {layers.lengths.address: np.full(16, 50, np.int32), layers.bounds.address: np.arange(17, dtype=np.int32)}
    monkeypatch.setattr(check, "ENABLED", True)
    monkeypatch.setattr(check, "check_tables", lambda call, stream: None)
    monkeypatch.setattr(check, "_to_host", lambda array, stream: held[array.address])
    assert layers.attend() == PLANNED
    layers.plan.renew()
    held[layers.bounds.address][1] = 2
    with pytest.raises(ShapeError, match="max_seqlen_q: expected at least 2, the longest row by cu_seqlens_q, got 1"):
        layers.attend()
    held[layers.bounds.address][1] = 1
    held[layers.lengths.address][3] = 51
    with pytest.raises(ShapeError, match="max_seqlen_k: expected at least 51, the longest of seq_lens, got 50"):
        layers.attend()
    monkeypatch.setattr(check, "is_capturing", lambda stream: True)
    assert layers.attend() == PLANNED
