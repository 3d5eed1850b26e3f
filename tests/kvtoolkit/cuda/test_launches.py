"""What kernels are given: launches that a fake driver takes are decoded field by field. Needs no GPU."""

import contextlib
import ctypes
import itertools
import logging
import struct
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from kvtoolkit.arrays.call import Hints, QuantizedTiers, attention_call
from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import attention, check, copy, launching, memory, merge, prefill, prompt, schedule, shared, specs
from kvtoolkit.runtime import driver, kernels, launch_log
from kvtoolkit.runtime.compiler import Build
from kvtoolkit.runtime.structs import ParameterStruct

_STREAM = 0x5000


class Taken(NamedTuple):
    """One launch as the driver has got it."""

    kernel: str
    grid: tuple[int, int, int]
    block: int
    stream: int
    parameters: dict[str, object]


class FakeDriver:
    """Takes launches instead of libcuda."""

    def __init__(self):
        self.kernels, self.taken = {}, []

    def load(self, built, source, name, smem_nbytes):
        self.kernels[len(self.kernels) + 1] = source, name
        kind = kernels.LoggedKernel if launch_log.ENABLED else kernels.Kernel
        arguments = (source,) if launch_log.ENABLED else ()
        return kind(*arguments, name, len(self.kernels), None)

    def cuLaunchKernelEx(self, config, function, arguments, extra):  # noqa: N802
        assert extra is None
        source, name = self.kernels[function]
        fields = ParameterStruct(source, name)
        x, y, z, block, *_, stream, _, _ = struct.unpack("@7I4x3Q", ctypes.string_at(config, 56))
        parameters = ctypes.string_at(ctypes.c_void_p.from_address(arguments).value, fields.nbytes)
        self.taken.append(Taken(name, (x, y, z), block, stream, fields.unpack(parameters)))
        return 0


@pytest.fixture
def fake(monkeypatch):
    """A device with the numbers of an H100 that launches nothing."""
    found = FakeDriver()
    monkeypatch.setattr(driver, "library", lambda: found)
    monkeypatch.setattr(kernels, "_devices", {0: ("90", specs.SMEM_LIMITS["90"], 132)})
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setattr(kernels, "build", lambda *_, **__: Build(b"", (), None, 0.0))
    monkeypatch.setattr(kernels, "_load", found.load)
    scratch = SimpleNamespace(partials=0xA0000, counters=0xB0000, step=0xC0000)
    for module in (attention, memory, prefill, prompt, shared):
        monkeypatch.setattr(module, "workspace", lambda device, stream, sizes: scratch)
    monkeypatch.setattr(check, "is_capturing", lambda stream: False)
    launching.load_spec.cache_clear()
    schedule._schedule.cache_clear()
    yield found
    launching.load_spec.cache_clear()
    schedule._schedule.cache_clear()


_addresses = itertools.count(1)


def array(*shape, dtype="int32", gap=0):
    """An array at an address of its own, with rows of the first axis ``gap`` elements apart."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    strides[0] += gap
    return Operand(next(_addresses) << 20, shape, tuple(strides), dtype, None, True, 0)


def test_append_is_given_bytes_in_its_order(fake):
    key, value = array(3, 2, 64, dtype="float16", gap=8), array(3, 2, 64, dtype="float16", gap=16)
    k_cache, v_cache = array(5, 2, 8, 64, dtype="float16", gap=64), array(5, 2, 8, 64, dtype="float16")
    slots = array(3, dtype="int64")
    prepared = copy.append(key, value, k_cache, v_cache, slots, stream=_STREAM)
    copy.append_prepared(prepared, 0x10, 0x20, 0x30, 0x40, stream=_STREAM + 1)
    first, second = fake.taken
    assert (first.kernel, first.block, first.stream) == ("kvt_append", 256, _STREAM)
    assert first.parameters == {
        "key": key.address, "value": value.address, "k_cache": k_cache.address, "v_cache": v_cache.address,
        "slot_mapping": slots.address, "key_token": 272, "key_head": 128, "value_token": 288, "value_head": 128,
        "k_block": 2176, "k_head": 1024, "k_slot": 128, "v_block": 2048, "v_head": 1024, "v_slot": 128,
        "num_tokens": 3, "num_heads": 2, "row_vectors": 8, "block_size": 8,
    }  # fmt: skip
    assert second.stream == _STREAM + 1
    assert second.parameters == first.parameters | {"key": 0x10, "value": 0x20, "k_cache": 0x30, "v_cache": 0x40}


def test_moves_and_conversions_are_given_their_lists(fake):
    arena = array(4, 32, 2, 8, 64, dtype="float16", gap=128)
    copy.copy_granules(arena, [3, 5], [7, 9], stream=_STREAM)
    warm, cold = array(2, 6, 2, 4096, dtype="uint8", gap=64), array(2, 4, 2, 4096, dtype="uint8")
    copy.convert(arena, warm, cold, (0, 32, 80), np.arange(8).reshape(1, 8), np.arange(32, 40), stream=_STREAM)
    moves, conversion = fake.taken
    moved = moves.parameters
    assert (moved.pop("sources")[:3], moved.pop("targets")[:3]) == ((3, 5, 0), (7, 9, 0))
    assert moved == {
        "arena": arena.address, "array_stride": 65792, "granule_stride": 2048, "granule_vectors": 128, "num_moves": 2,
    }  # fmt: skip
    converted = conversion.parameters
    assert converted.pop("sources")[:9] == (0, 1, 2, 3, 4, 5, 6, 7, 0)
    assert converted.pop("targets")[:9] == (32, 33, 34, 35, 36, 37, 38, 39, 0)
    assert converted == {
        "hot": arena.address, "warm": warm.address, "cold": cold.address, "hot_array": 32896, "hot_granule": 1024,
        "warm_layer": 49216, "cold_layer": 32768, "num_kv_heads": 2, "first_granules": (0, 32, 80),
    }  # fmt: skip
    assert conversion.grid == (1, 2, 2)


def test_merge_is_given_both_sides(fake):
    out, lse, lse_a, lse_b = array(3, 4, 64, dtype="float16"), *(array(3, 4, dtype="float32") for _ in range(3))
    out_a, out_b = array(3, 4, 64, dtype="float16", gap=32), array(3, 4, 64, dtype="float16", gap=64)
    merge.merge_states(out, lse, out_a, lse_a, out_b, lse_b, stream=_STREAM)
    (taken,) = fake.taken
    assert taken.parameters == {
        "out": out.address, "lse": lse.address, "out_a": out_a.address, "lse_a": lse_a.address,
        "out_b": out_b.address, "lse_b": lse_b.address, "a_token": 288, "a_head": 64, "b_token": 320, "b_head": 64,
        "num_rows": 12, "num_heads": 4, "head_pairs": 32,
    }  # fmt: skip


def attention_arrays():
    """Arrays of 6 tokens in 3 rows, every one at an address and with strides of its own."""
    return {
        "q": array(6, 8, 64, dtype="float16", gap=8), "k_cache": array(40, 2, 8, 64, dtype="float16", gap=16),
        "v_cache": array(40, 2, 8, 64, dtype="float16", gap=24), "block_table": array(3, 5, gap=2),
        "block_starts": array(3, 5, gap=3), "seq_lens": array(3), "cu_seqlens_q": array(4),
        "out": array(6, 8, 64, dtype="float16", gap=32), "lse": array(6, 8, dtype="float32"),
        "sinks": array(8, dtype="float32"), "alibi_slopes": array(8, dtype="float32"),
    }  # fmt: skip


def test_attention_over_entries_is_given_every_field(fake):
    arrays = attention_arrays()
    options = {"softmax_scale": 0.5, "softcap": 30.0, "window_size": (100, 7), "causal": False, "num_splits": 3}
    call = attention_call(**arrays, **options)
    prepared = attention.attend(call, Hints(query_counts=(1, 3)), stream=_STREAM)
    assert prepared is None  # its list is in scratch memory
    expand, decode = fake.taken
    place = {name: one.address for name, one in arrays.items()}
    assert expand.parameters == {
        "block_table": place["block_table"], "block_starts": place["block_starts"], "seq_lens": place["seq_lens"],
        "granules": 0xC0000, "table_row": 7, "starts_row": 8, "max_entries": 5, "width": 40,
        "first_granules": (0, 0, 0),
    }  # fmt: skip
    log2e = float(np.float32(1.4426950408889634))
    groups = decode.grid[0]
    assert (decode.kernel, decode.grid[1]) == ("kvt_decode", 3)
    assert {name: decode.parameters[name] for name in place if name not in ("block_table", "block_starts")} == {
        name: place[name] for name in place if name not in ("block_table", "block_starts")
    }
    assert {name: value for name, value in decode.parameters.items() if name not in place} == {
        "partials": 0xA0000, "counters": 0xB0000, "group_counters": 0xB0000 + 4 * groups,
        "mass_counters": 0xB0000 + 4 * groups * (1 + 3), "ranges": 0, "sequences": 0,
        "masses": 0, "unit_lse": 0, "q_token": 520, "q_head": 64, "out_token": 544, "out_head": 64,
        "k_block": 1040, "k_head": 512, "k_slot": 64, "v_block": 1048, "v_head": 512, "v_slot": 64, "table_row": 40,
        "batch": 3, "num_tokens": 6, "num_kv_heads": 2, "group_size": 4, "block_size": 8, "max_blocks": 40,
        "block_shift": 3, "ids_per_step": 2, "left": 100, "right": 7, "max_splits": 3, "fixed_splits": 1,
        "num_row_blocks": 1, "most_queries": 8, "max_tiles": 0, "unit_rows": 0, "wait_first": 1,
        "scale_log2": pytest.approx(0.5 * log2e), "cap_inner": pytest.approx(0.5 / 30),
        "cap_outer": pytest.approx(30 * log2e),
    }  # fmt: skip
    assert decode.parameters["block_table"] == 0xC0000


def test_attention_over_tiers_is_given_its_lists_and_plan(fake):
    arrays = attention_arrays()
    warm, cold = array(6, 2, 4160, dtype="uint8"), array(4, 2, 4864, dtype="uint8")
    masses = array(3, 5, 2, dtype="float32")
    call = attention_call(**arrays, tiers=QuantizedTiers(warm, cold, (0, 40, 88)), block_mass=masses)
    attention.attend(call, Hints(query_counts=(1, 3)), stream=_STREAM)
    units, plan, tiered = (taken.parameters for taken in fake.taken)
    assert [taken.kernel for taken in fake.taken] == ["kvt_units", "kvt_plan", "kvt_tiered"]
    batch, most = 3, 4 * 5
    counts = 0xC0000 + 16 * batch * most
    assert units == {
        "block_table": arrays["block_table"].address, "block_starts": arrays["block_starts"].address,
        "seq_lens": arrays["seq_lens"].address, "cu_seqlens_q": arrays["cu_seqlens_q"].address,
        "granules": counts + 8 * batch, "units": 0xC0000, "num_units": counts, "plan_lens": counts + 4 * batch,
        "tile_units": counts + 8 * batch + 4 * batch * 40, "table_row": 7, "starts_row": 8, "max_entries": 5,
        "width": 40, "max_units": most, "left": -1, "right": 0,
        "first_granules": (0, 40, 88),
    }  # fmt: skip
    assert (plan["seq_lens"], plan["cu_seqlens_q"]) == (units["plan_lens"], units["cu_seqlens_q"])
    assert (plan["batch"], plan["left"], plan["right"], plan["most_queries"]) == (3, -1, -1, 0x7FFFFFFF)
    assert plan["sequences"] == plan["ranges"] + 16 * (plan["num_ranges"] + 1)
    assert (plan["overhead"], plan["min_steps"], plan["min_cost"], plan["min_late"]) == (12, 8, 12, 12)
    assert (plan["long_cost"], plan["ragged_percent"]) == (350, 125)
    expected = {
        "warm": warm.address, "cold": cold.address, "units": 0xC0000, "num_units": counts,
        "tile_units": units["tile_units"], "max_units": most, "masses": masses.address, "max_tiles": 5,
        "unit_rows": 12, "ranges": plan["ranges"], "sequences": plan["sequences"], "lse": arrays["lse"].address,
        "q": arrays["q"].address, "cap_outer": 0.0,
    }  # fmt: skip
    assert {name: tiered[name] for name in expected} == expected
    assert tiered["unit_lse"] > plan["sequences"]


def test_further_layers_change_only_their_addresses(fake):
    arrays = attention_arrays() | {"block_starts": None}
    call = attention_call(**arrays, num_splits=1)
    prepared = attention.attend(call, Hints(query_counts=(1, 3), kept={}), stream=_STREAM)
    attention.attend_prepared(prepared, 0x10, 0x20, 0x30, 0x40, stream=_STREAM)
    attention.attend_prepared(prepared, 0x10, 0x20, 0x30, 0x40, stream=_STREAM, overlaps=True)
    first, second, third = (taken.parameters for taken in fake.taken)
    assert second == first | {"q": 0x10, "k_cache": 0x20, "v_cache": 0x30, "out": 0x40}
    assert third == second | {"wait_first": 0}


def test_tiers_and_masses_of_a_further_layer_are_changed(fake):
    warm, cold = array(6, 2, 4160, dtype="uint8"), array(4, 2, 4864, dtype="uint8")
    tiers = QuantizedTiers(warm, cold, (0, 40, 88))
    call = attention_call(**attention_arrays(), tiers=tiers, block_mass=array(3, 5, 2, dtype="float32"), num_splits=1)
    owner = SimpleNamespace(data=SimpleNamespace(ptr=0xD0000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "keep", lambda *_: owner)
        prepared = attention.attend(call, Hints(query_counts=(1, 3), kept={}), stream=_STREAM)
    attention.attend_prepared(prepared, 1, 2, 3, 4, warm=5, cold=6, block_mass=7, stream=_STREAM)
    first, second = (taken.parameters for taken in fake.taken[-2:])
    changed = {"q": 1, "k_cache": 2, "v_cache": 3, "out": 4, "warm": 5, "cold": 6, "masses": 7}
    assert second == first | changed
    assert first["units"] == 0xD0000


def test_checks_are_given_tables_tiers_or_slots(fake, monkeypatch):
    finding = SimpleNamespace(data=SimpleNamespace(ptr=0xE0000), get=lambda: np.zeros(3, np.int32))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(zeros=lambda *_: finding))
    monkeypatch.setattr(check, "on_stream", lambda stream: contextlib.nullcontext())
    arrays = attention_arrays()
    tables = [arrays[name] for name in ("block_table", "block_starts", "seq_lens", "cu_seqlens_q")]
    warm, cold = array(6, 2, 4160, dtype="uint8"), array(4, 2, 4864, dtype="uint8")
    check.check_tables(attention_call(**arrays, tiers=QuantizedTiers(warm, cold, (0, 40, 88))), _STREAM)
    slots = array(9, dtype="int64")
    check.check_slots(slots, 8, 40, _STREAM)
    of_tables, of_slots = (taken.parameters for taken in fake.taken)
    assert of_tables == {
        "finding": 0xE0000, "block_table": tables[0].address, "block_starts": tables[1].address,
        "seq_lens": tables[2].address, "cu_seqlens_q": tables[3].address, "slot_mapping": 0, "table_row": 7,
        "starts_row": 8, "num_slots": 0, "batch": 3, "num_tokens": 6, "block_size": 8, "num_blocks": 40,
        "max_entries": 5, "has_tiers": 1, "first_granules": (0, 40, 88), "quantized_blocks": (6, 4),
    }  # fmt: skip
    some = {"slot_mapping": slots.address, "num_slots": 320, "num_tokens": 9, "batch": 0, "has_tiers": 0}
    assert {name: of_slots[name] for name in some} == some


def test_without_the_variable_nothing_is_logged(fake, caplog):
    assert not launch_log.ENABLED
    with caplog.at_level(logging.INFO, "kvtoolkit"):
        test_merge_is_given_both_sides(fake)
    assert not caplog.records
    assert type(kernels.Kernel("kvt_move", 1, None).prepare((1,), 32, b"")) is driver.PreparedLaunch


def test_with_the_variable_every_launch_is_logged_by_name(fake, caplog, monkeypatch):
    monkeypatch.setattr(launch_log, "ENABLED", True)
    with caplog.at_level(logging.INFO, "kvtoolkit"):
        test_append_is_given_bytes_in_its_order(fake)
        test_moves_and_conversions_are_given_their_lists(SimpleNamespace(taken=TakenFrom(fake, 2)))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in lines] == ["kvt_append", "kvt_append", "kvt_move", "kvt_convert"]
    assert lines[0].startswith("kvt_append grid=1 block=256 stream=0x5000 key=0x")
    assert "num_tokens=3 num_heads=2 row_vectors=8 block_size=8" in lines[0]
    assert "stream=0x5001 key=0x10 value=0x20 k_cache=0x30 v_cache=0x40 " in lines[1]
    assert "num_moves=2 sources=[3,5,0,0,0,0,0,0,...] targets=[7,9," in lines[2]
    assert "first_granules=[0,32,80]" in lines[3]


class TakenFrom:
    """What a fake driver takes after the first ``count`` launches."""

    def __init__(self, fake, count):
        self.fake, self.count = fake, count

    def __iter__(self):
        return iter(self.fake.taken[self.count :])
