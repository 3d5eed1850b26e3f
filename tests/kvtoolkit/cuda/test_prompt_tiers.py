"""Prompts over quantized tiers: which kernels are launched, what they are given, and the list of granules they share.

Launches are taken by a fake driver, and lists are made on the host, so no GPU is needed.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtoolkit.arrays.call import Hints, QuantizedTiers, Sharing, attention_call
from kvtoolkit.cuda import attention, expand, prompt, specs, units
from kvtoolkit.formats.entry import pack_entry
from tests.kvtoolkit.cuda.host_kernels import needs_compiler, on_the_host
from tests.kvtoolkit.cuda.test_launches import array, fake
from tests.kvtoolkit.cuda.test_mixtures import described, launched, names

__all__ = ["fake", "launched"]  # fixtures
_STREAM = 0x5000
FIRST = (0, 40, 88)
DECODE = ["kvt_units", "kvt_plan", "kvt_tiered"]
BOTH = ["kvt_plan_prompts", *DECODE, "kvt_prompt"]
PROMPTS = ["kvt_expand", "kvt_plan_prompts", "kvt_prompt"]


def tiered_call(new=(40, 1, 0), group_size=4, head_dim=128, granules=40, **options):
    q, out = (array(sum(new), 2 * group_size, head_dim, dtype="bfloat16", gap=64) for _ in range(2))
    caches = [array(granules, 2, 8, head_dim, dtype="bfloat16") for _ in range(2)]
    tiers = QuantizedTiers(array(6, 2, 8320, dtype="uint8"), array(4, 2, 8960, dtype="uint8"), FIRST)
    batch = len(new)
    return attention_call(
        q, *caches, array(batch, 5, gap=2), array(batch, 5, gap=3), array(batch), out=out, tiers=tiers,
        cu_seqlens_q=array(batch + 1), **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "counts", "kernels"),
    [
        ({}, (0, 40), BOTH),
        ({}, (2, 40), BOTH),
        ({}, (3, 40), PROMPTS),
        ({}, None, BOTH),
        ({"new": (8, 1)}, (1, 8), DECODE),
        ({"new": (9, 1)}, (1, 9), BOTH),
        ({"new": (9, 1), "group_size": 1}, (1, 9), BOTH),
        ({"new": (4, 1), "group_size": 8}, (1, 4), DECODE),
        ({"new": (5, 2), "group_size": 8}, (2, 5), PROMPTS),
        ({"new": (1, 1), "group_size": 33}, (1, 1), DECODE),
        ({"new": (2, 1), "group_size": 33}, (1, 2), BOTH),
        ({"num_splits": 2}, (0, 40), ["kvt_units", "kvt_tiered"]),
        ({"block_mass": array(3, 5, 2, dtype="float32")}, (1, 40), DECODE),
        ({"window_size": (9, 0), "softcap": 3.0}, (0, 40), BOTH),
    ],
)
def test_each_row_has_the_kernel_of_its_new_tokens(launched, options, counts, kernels):
    attention.attend(tiered_call(**options), Hints(counts, 40, {}), stream=_STREAM)
    assert names(launched) == kernels


def test_without_the_prompt_kernel_decode_takes_all(launched, monkeypatch):
    hints = Hints((0, 40), 40, {})
    with monkeypatch.context() as patched:
        patched.setattr(prompt, "arch_of", lambda device: 100)
        attention.attend(tiered_call(), hints, stream=_STREAM)
    monkeypatch.setattr(prompt, "tensor_map", lambda *_: None)  # of no granules
    attention.attend(tiered_call(granules=0), hints, stream=_STREAM)
    assert names(launched) == DECODE * 2


@pytest.mark.parametrize("is_captured", [False, True])
def test_both_kernels_share_a_list_and_have_limits_that_meet(fake, launched, is_captured):
    call = tiered_call()
    hints = Hints((0, 40), 40, {}, counts_are_bounds=is_captured)
    prepared = attention.attend(call, hints, stream=_STREAM)
    assert launched == [(name, name == "kvt_prompt") for name in BOTH]
    items, lists, ranges, decode, attends = (taken.parameters for taken in fake.taken)
    assert items["most_decoded"] == ranges["most_queries"] == decode["most_queries"] == 2, "of 8 rows, 4 heads each"
    assert (items["by_row"], ranges["all_or_none"]) == (1, 0)
    assert attends["block_table"] == lists["granules"]
    assert (attends["table_row"], attends["granules_per_block"], attends["block_pitch"]) == (5, 1, 1)
    assert (attends["num_map_blocks"], attends["coordinate_shift"]) == (40, 0)
    assert (attends["items"], attends["num_items"]) == (items["items"], items["num_items"])
    assert fake.taken[-1].block == 512
    tiers = (call.tiers.warm.address, call.tiers.cold.address)
    assert (attends["warm"], attends["cold"]) == (decode["warm"], decode["cold"]) == tiers
    # the parts of the memory of a step, in order
    parts = {
        lists["units"]: 16 * 3 * 4, lists["num_units"]: 4 * 3, lists["plan_lens"]: 4 * 3, lists["granules"]: 4 * 3 * 5,
        lists["tile_units"]: 4 * 3 * 2, ranges["ranges"]: 16 * (ranges["num_ranges"] + 1), ranges["sequences"]: 8 * 3,
        items["num_items"]: 4, items["items"]: 0,
    }  # fmt: skip
    assert len(parts) == 9
    assert min(parts) == 0xD0000
    ends = [begin + size for begin, size in sorted(parts.items())]
    assert all(end <= begin for end, begin in zip(ends, sorted(parts)[1:], strict=False))
    fake.taken.clear()
    attention.attend_prepared(prepared, 16, 32, 48, 64, warm=80, cold=96, stream=_STREAM, overlaps=True)
    again, second = (taken.parameters for taken in fake.taken)
    assert again == decode | {
        "q": 16, "k_cache": 32, "v_cache": 48, "out": 64, "warm": 80, "cold": 96, "wait_first": 0,
    }  # fmt: skip
    maps = {name: (at, *range(15)) for name, at in (("query_map", 16), ("key_map", 32), ("value_map", 48))}
    assert second == attends | maps | {"out": 64, "warm": 80, "cold": 96}


def test_prompts_alone_have_the_list_of_granules(fake, launched):
    call = tiered_call((40, 9))
    prepared = attention.attend(call, Hints((9, 40), 40, {}), stream=_STREAM)
    lists, items, attends = (taken.parameters for taken in fake.taken)
    assert lists["first_granules"] == FIRST
    assert attends["block_table"] == lists["granules"]
    assert items["most_decoded"] == 0
    fake.taken.clear()
    attention.attend_prepared(prepared, 16, 32, 48, 64, warm=80, cold=96, stream=_STREAM)
    ((_, _, _, _, again),) = fake.taken
    assert (again["warm"], again["cold"], again["out"]) == (80, 96, 64)


def test_shared_reads_of_tiers_begin_and_end_with_tiles(fake, launched):
    call = tiered_call((1, 1, 1), softcap=2.0)
    prepared = attention.attend(call, Hints((1, 1), 40, {}, Sharing()), stream=_STREAM)
    finds = ["kvt_expand", "kvt_find_shared", "kvt_plan_shared"]
    assert names(launched) == [*finds, "kvt_plan_prompts", "kvt_prompt", "kvt_merge_shared"]
    taken = {one.kernel: one.parameters for one in fake.taken}
    assert taken["kvt_expand"]["first_granules"] == FIRST
    assert taken["kvt_find_shared"]["multiple"] == 8
    assert taken["kvt_prompt"]["warm"] == call.tiers.warm.address
    fake.taken.clear()
    attention.attend_prepared(prepared, 16, 32, 48, 64, warm=80, cold=96, stream=_STREAM)
    assert (fake.taken[0].parameters["warm"], fake.taken[0].parameters["cold"]) == (80, 96)


def test_the_kernel_over_tiers_has_the_shared_memory_that_it_lays_out():
    for head_dim in (64, 128):
        plain, tiered = (specs.prompt(head_dim, "float16", rules=0, tiers=tiers) for tiers in (False, True))
        row = specs.row_bytes(head_dim)
        slots = 7 * max(64 * head_dim + 4 * head_dim + 256, 2 * 32 * head_dim + 128)
        assert tiered.smem_nbytes == (128 + 4 * 128) * row + slots + 256 + 4 * 64 + 16 <= specs.SMEM_LIMITS["90"]
        assert plain.smem_nbytes == (256 + 4 * 128) * row + 256 + 4 * 64 + 16


# -- the list of granules ------------------------------------------------------------------------------------------

# entries of a row: tier, and granules of a hot one; a quantized block has 8
ENTRIES = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 2, 4, 8])), max_size=12)


@needs_compiler
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.tuples(ENTRIES, st.integers(0, 70)), min_size=1, max_size=4), data=st.data())
def test_both_ways_to_list_granules_name_the_same(monkeypatch, rows, data):
    on_the_host(monkeypatch, expand, units)
    first, next_granule = (0, 4096, 8192), [8, 4096, 8192]
    batch, most = len(rows), 1 + max(len(entries) for entries, _ in rows)
    table, starts = np.full((2, batch, most), -1, np.int32)
    expected, lengths = [], []
    for b, (entries, missing) in enumerate(rows):
        of_row = []
        for e, (tier, hot) in enumerate(entries):
            count = 8 if tier else hot
            while tier and len(of_row) % 8:  # a quantized block begins a tile
                tier, count = 0, 1
            begin = next_granule[tier] = -(-next_granule[tier] // count) * count
            next_granule[tier] += count
            table[b, e], starts[b, e] = pack_entry(begin, count, tier), len(of_row)
            of_row += [begin - first[tier] + i | tier << 27 for i in range(count)]
        lengths.append(max(0, 8 * len(of_row) - missing))
        expected.append(of_row[: -(-lengths[-1] // 8)])
    width = expand.list_width(most, data.draw(st.sampled_from([None, max(lengths)])))
    arrays = described(table), described(starts), described(lengths)
    memory = np.full(units.units_nbytes(batch, width) // 4 + 8, -7, np.int32)
    address = memory.ctypes.data + -memory.ctypes.data % 16
    found = []
    for made in (
        expand.make_granules(address, *arrays, width, QuantizedTiers(None, None, first)),
        units.make_units(address, *arrays, None, width, -1, 0, first),
    ):
        memory[:] = -7
        made.launch.run()
        begin = (made.table.address - memory.ctypes.data) // 4
        found.append(memory[begin : begin + batch * width].reshape(batch, width).copy())
    for b, granules in enumerate(expected):
        for listed in found:
            assert listed[b, : len(granules)].tolist() == granules
