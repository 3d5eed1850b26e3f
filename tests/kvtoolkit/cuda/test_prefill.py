"""The prefill kernel's host side: shapes, what it is given, its lists for many rows, its memory. Needs no GPU."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtoolkit.arrays.call import Hints, attention_call
from kvtoolkit.cuda import attention, memory, prefill, prompt, specs
from kvtoolkit.errors import UnsupportedError
from tests.kvtoolkit.cuda.host_kernels import needs_compiler, on_the_host
from tests.kvtoolkit.cuda.test_launches import array, fake
from tests.kvtoolkit.cuda.test_mixtures import ROWS, described
from tests.kvtoolkit.cuda.test_prompt import cut

__all__ = ["fake"]  # a fixture
_STREAM = 0x5000


def test_every_shape_fits_as_often_as_it_says_on_every_architecture():
    for (arch, limit), head_dim in itertools.product(specs.SMEM_LIMITS.items(), range(16, 257, 16)):
        spec = specs.prefill(head_dim, "float16", limit, has_rules=False)
        stages = dict(spec.defines)["KVT_STAGES"]
        # queries, tiles of keys and values, two items of 64 bytes and two numbers, as in prefill/shape.cuh
        assert spec.smem_nbytes == (128 + 2 * spec.keys * stages) * specs.row_bytes(head_dim) + 144
        assert spec.smem_nbytes <= limit
        assert spec.per_sm * (spec.smem_nbytes + 1024) <= limit + 1024, (arch, head_dim)
        assert spec.per_sm * spec.threads <= 512
    assert [specs.prefill(d, "float16", specs.SMEM_LIMITS["90"], has_rules=False).per_sm for d in (64, 128, 256)] == [
        3, 2, 1,
    ]  # fmt: skip


def call_of(new=(40, 7), *, block_size=8, entries=True, head_dim=128, group_size=4, heads=2, **options):
    num_tokens, batch = int(sum(new)), len(new)
    q, out = (array(num_tokens, heads * group_size, head_dim, dtype="bfloat16", gap=64) for _ in range(2))
    caches = [array(40, heads, block_size, head_dim, dtype="bfloat16", gap=16 * i) for i in (1, 2)]
    bounds = None if set(new) == {1} else array(batch + 1)
    return attention_call(
        q, *caches, array(batch, 5, gap=2), array(batch, 5) if entries else None, array(batch), out=out,
        cu_seqlens_q=bounds, **options,
    )  # fmt: skip


@pytest.fixture
def alone(fake, monkeypatch):
    """The launches on a device without the prompt kernel."""
    monkeypatch.setattr(prompt, "arch_of", lambda device: 80)
    return fake.taken


@pytest.mark.parametrize("block_size", [*range(1, 70), 100, 128, 1000, 1 << 20])
def test_blocks_of_any_size_are_found_by_a_product(alone, block_size):
    attention.attend(call_of(block_size=block_size, entries=False), stream=_STREAM)
    given_ = alone[-1].parameters
    inverse, shift = given_["block_inverse"], given_["block_shift"]
    assert inverse < 1 << 32
    last = (1 << 31) - 1
    places = {0, block_size - 1, block_size, last, last // block_size * block_size - 1, last // block_size * block_size}
    places |= {int(n) for n in np.random.default_rng(1).integers(0, 1 << 31, 2000)}
    for position in places:
        assert (2 * position * inverse >> 32) >> shift == position // block_size


def test_the_kernel_is_given_every_field(alone):
    options = {"softmax_scale": 0.5, "softcap": 30.0, "window_size": (100, 7), "causal": False}
    arrays = {name: array(8, dtype="float32") for name in ("sinks", "alibi_slopes")}
    call = call_of(block_size=12, entries=False, lse=array(47, 8, dtype="float32"), **arrays, **options)
    attention.attend(call, Hints((7, 40)), stream=_STREAM)
    plan, kernel = alone
    assert (plan.kernel, kernel.kernel) == ("kvt_plan_prompts", "kvt_prefill")
    assert (kernel.grid, kernel.block) == ((2 * 132, 1, 1), 128)
    log2e = float(np.float32(1.4426950408889634))
    given_ = dict(kernel.parameters)
    assert given_.pop("scale_log2") == pytest.approx(0.5 * log2e)
    assert given_.pop("cap_inner") == pytest.approx(0.5 / 30)
    assert given_.pop("cap_outer") == pytest.approx(30 * log2e)
    assert given_ == {
        "q": call.q.address, "out": call.out.address, "k_cache": call.k_cache.address,
        "v_cache": call.v_cache.address, "lse": call.lse.address, "block_table": call.block_table.address,
        "alibi_slopes": call.alibi_slopes.address, "sinks": call.sinks.address,
        "items": plan.parameters["items"], "num_items": plan.parameters["num_items"],
        "next_item": 0xB0000, "arrivals": 0xB0004, "partials": 0xA0000,
        "q_token": 8 * 128 + 64, "q_head": 128, "out_token": 8 * 128 + 64, "out_head": 128,
        "k_block": 2 * 12 * 128 + 16, "k_head": 12 * 128, "k_slot": 128,
        "v_block": 2 * 12 * 128 + 32, "v_head": 12 * 128, "v_slot": 128, "table_row": 7,
        "half_sizes": (4, 4, 16, 1, 16384), "num_kv_heads": 2, "block_size": 12,
        "block_inverse": -(-(1 << 35) // 12), "block_shift": 4, "tiles_per_planned": 1, "left": 100, "right": 7,
    }  # fmt: skip
    assert (plan.parameters["most_decoded"], plan.parameters["by_row"], plan.parameters["max_parts"]) == (4, 1, 64)
    assert (plan.parameters["first_row"], plan.parameters["batch"], plan.parameters["num_ctas"]) == (0, 2, 2 * 132)


@pytest.mark.parametrize(
    ("options", "has_rules"),
    [
        ({}, 0), ({"softcap": 5.0}, 1), ({"alibi_slopes": array(8, dtype="float32")}, 1), ({"softmax_scale": -1.0}, 1),
        ({"softmax_scale": 0.0}, 1), ({"sinks": array(8, dtype="float32")}, 0), ({"window_size": (9, 0)}, 0),
    ],
)  # fmt: skip
def test_only_options_that_change_scores_have_the_slower_form(options, has_rules):
    spec = specs.prefill(128, "bfloat16", specs.SMEM_LIMITS["90"], has_rules=bool(has_rules))
    call = call_of(**options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prefill, "smem_limit", lambda device: specs.SMEM_LIMITS["90"])
        patched.setattr(prefill, "num_sms", lambda device: 132)
        assert prefill.work_of(call, None).spec == spec


def test_decode_and_prefill_have_limits_that_meet(alone):
    for options, limit, parts in (({}, 4, 64), ({"num_splits": 2}, 8, 1), ({"group_size": 2}, 8, 64)):
        alone.clear()
        attention.attend(call_of((40, 7, 1), **options), stream=_STREAM)
        names = [taken.kernel for taken in alone]
        assert {"kvt_decode", "kvt_prefill"} < set(names)
        plan, decode = alone[0].parameters, alone[names.index("kvt_decode")].parameters
        assert plan["most_decoded"] == decode["most_queries"] == limit
        assert (plan["by_row"], plan["max_parts"]) == (1, parts)
        if "kvt_plan" in names:
            ranges = alone[names.index("kvt_plan")].parameters
            assert (ranges["most_queries"], ranges["all_or_none"]) == (limit, 0)
        assert decode["block_table"] == alone[-1].parameters["block_table"]


@pytest.mark.parametrize("new", [(1,) * 20_001, (7,) * 20_001])
def test_more_rows_than_a_plan_may_have_are_planned_in_turn(alone, monkeypatch, new):
    owner = type("Owner", (), {"data": type("Data", (), {"ptr": 0xD0000})})
    asked = []
    monkeypatch.setattr(memory, "keep", lambda kept, key, nbytes, stream: asked.append(nbytes) or owner)
    call = call_of(new, group_size=32, head_dim=64)
    prepared = attention.attend(call, Hints((new[0], new[0]), 40, {}), stream=_STREAM)
    by_name = {name: [t.parameters for t in alone if t.kernel == name] for name in ("kvt_plan_prompts", "kvt_prefill")}
    plans, kernels = by_name.values()
    assert [(plan["first_row"], plan["batch"]) for plan in plans] == [(0, 10_000), (10_000, 10_000), (20_000, 1)]
    assert [(one["items"], one["num_items"]) for one in kernels] == [(one["items"], one["num_items"]) for one in plans]
    begins = [plan["num_items"] for plan in plans]
    room = prefill.work_of(call, 40).sizes.list_nbytes
    assert all(one + room <= other for one, other in itertools.pairwise(begins))
    assert begins[-1] + room <= 0xD0000 + asked[0]
    alone.clear()
    attention.attend_prepared(prepared, 16, 32, 48, 64, stream=_STREAM)
    again = [taken.parameters for taken in alone if taken.kernel == "kvt_prefill"]
    changed = {"q": 16, "k_cache": 32, "v_cache": 48, "out": 64}
    assert again == [one | changed for one in kernels]


def test_more_new_tokens_than_an_item_can_count_are_refused(alone):
    with pytest.raises(UnsupportedError, match="expected fewer than 16777216 new tokens, got 16777216"):
        attention.attend(call_of((1 << 23, 1 << 23), heads=1, group_size=1), stream=_STREAM)


def test_layers_of_other_shapes_keep_lists_of_their_own(alone, monkeypatch):
    keys, owner = [], type("Owner", (), {"data": type("Data", (), {"ptr": 0xD0000})})
    monkeypatch.setattr(memory, "keep", lambda kept, key, nbytes, stream: keys.append(key) or owner)
    for shape in ({}, {"head_dim": 64}, {"group_size": 2}, {"softcap": 3.0}, {}):
        attention.attend(call_of(**shape), Hints((7, 40), 40, {}), stream=_STREAM)
    assert len(set(keys)) == 4
    assert keys[0] == keys[-1]


def test_memory_of_parts_is_as_the_documents_say(alone):
    """Four parts for each CTA that runs at once, fewer for a call of few rows, none where rows are not cut."""
    many = prefill.work_of(call_of((4096,), heads=8), None).sizes
    assert many.partials_nbytes == (4 * 264 // 8 + 1) * 8 * 128 * (128 + 8) * 4 == 74_088_448
    few = prefill.work_of(call_of((12,), heads=8), None).sizes
    assert few.slots == 64
    assert prefill.work_of(call_of((4096,), heads=8, num_splits=1), None).sizes.partials_nbytes == 0


def items_of(new, lengths, *, heads=2, group_size=4, most_decoded=0, sms=8, max_parts=64, rows=None):
    """The items of rows, by the planner on the host: ``[count, 8]``, words as ``Item`` has them."""
    spec = specs.prefill(128, "float16", specs.SMEM_LIMITS["80"], has_rules=False)
    sizes = prefill._sizes(int(sum(new)), heads * group_size, heads, 128, len(new), spec.per_sm * sms, max_parts)
    seq_lens, bounds = described(lengths), described([0, *np.cumsum(new)])
    q, cache, table = array(sum(new), heads * group_size, 128), array(9, heads, 8, 128), array(len(new), 2)
    call = attention_call(q, cache, cache, table, None, seq_lens, out=q, cu_seqlens_q=bounds)
    words = np.full(sizes.list_nbytes // 4 + 4, 0x55, np.int32)
    begin = -words.ctypes.data % 16 // 4
    prompt.plan_launch(
        call, sizes, words[begin:].ctypes.data, most_decoded=most_decoded, by_row=True, max_parts=max_parts,
        keys=spec.keys, rows=rows,
    ).run()  # fmt: skip
    (count,) = words[begin : begin + 1]
    assert count <= sizes.max_items
    return words[begin + prompt.LIST_AT // 4 :][: 8 * count].reshape(-1, 8).tolist(), sizes, spec.keys


@needs_compiler
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=ROWS, limit=st.sampled_from([0, 1, 4, 8]), max_parts=st.sampled_from([1, 3, 64]), data=st.data())
def test_items_are_those_of_rows_that_decode_leaves(monkeypatch, rows, limit, max_parts, data):
    on_the_host(monkeypatch, prompt)
    new = [count for count, _ in rows]
    lengths = [count + cached for count, cached in rows]
    first = data.draw(st.integers(0, len(new) - 1))
    count = data.draw(st.integers(1, len(new) - first))
    items, sizes, keys = items_of(new, lengths, most_decoded=limit, max_parts=max_parts, rows=(first, count))
    ours = [row for row in range(first, first + count) if new[row] > limit]
    assert {item[3] for item in items} == set(ours)
    per_half = sizes.halves[2]
    for row in ours:
        of_row = [item for item in items if item[3] == row]
        assert all(item[:2] == [sum(new[:row]), new[row]] and item[4] == lengths[row] for item in of_row)
        halves = sorted({item[2] for item in of_row})
        assert halves == list(range(0, -(-new[row] // per_half), 2))
        for half in halves:
            parts = sorted((item[6] & 0xFFFF, item[5] & 0xFFFF, item[5] >> 16) for item in of_row if item[2] == half)
            assert [part for part, _, _ in parts] == list(range(len(parts)))
            assert len(parts) <= max_parts
            last = min(new[row], (half + 2) * per_half)
            ends = [end for _, _, end in parts]
            assert [begin for _, begin, _ in parts] == [0, *ends[:-1]]
            assert ends[-1] == max(1, -(-(lengths[row] - new[row] + last) // keys))
    slots = [item[7] + (item[6] & 0xFFFF) for item in items if item[6] >> 16 > 1]
    assert len(set(slots)) == len(slots)
    assert max(slots, default=-1) < sizes.slots
    if limit == 0 and max_parts == 64 and count == len(new):
        assert (len(items), len(slots)) == cut(new, lengths, sizes.halves, 2, sizes.ctas, keys)
