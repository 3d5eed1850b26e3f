"""Steps whose new tokens the host does not know: both kernels are launched, and one of them finds nothing to do.

The plans run on the host, thread by thread, so no GPU is needed.
"""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtoolkit.arrays.call import Hints, Sharing, attention_call
from kvtoolkit.cpu import operand
from kvtoolkit.cuda import attention, memory, plan, prompt, shared, specs
from kvtoolkit.cuda.launching import Launch
from tests.kvtoolkit.cuda.host_kernels import needs_compiler, on_the_host
from tests.kvtoolkit.cuda.test_gpu_plan import check as check_ranges
from tests.kvtoolkit.cuda.test_launches import array, fake
from tests.kvtoolkit.cuda.test_prompt import cut

__all__ = ["fake"]  # a fixture
_STREAM = 0x5000
_UNLIMITED = 0x7FFFFFFF


@pytest.fixture
def host(monkeypatch):
    """Plans are made on the host."""
    on_the_host(monkeypatch, plan, prompt)


def described(values):
    return operand(np.array(values, np.int32), "array")


def ranges_of(new, lengths, num_ranges=12, most_queries=_UNLIMITED, all_or_none=False):
    """``ranges, sequences`` of the decode kernel."""
    memory = np.full(plan.plan_nbytes(len(new), num_ranges) // 4, 0x55, np.int32)
    seq_lens, bounds = described(lengths), described([0, *np.cumsum(new)])
    made = plan.make_plan(
        memory.ctypes.data, seq_lens, bounds, num_ranges, 0, num_ranges, False, -1, 0, most_queries, all_or_none
    )
    made.launch.run()
    ranges, sequences = np.split(memory, [4 * (num_ranges + 1)])
    return ranges.reshape(-1, 4), sequences.reshape(-1, 2)


def items_of(new, lengths, group_size=4, most_decoded=0, heads=2, sms=8, head_dim=128):
    """The items of the prompt kernel: ``[count, 8]``, words as ``Item`` has them."""
    sizes = prompt.sizes_of(int(sum(new)), heads * group_size, heads, head_dim, len(new), sms)
    seq_lens, bounds = described(lengths), described([0, *np.cumsum(new)])
    q, cache = array(sum(new), heads * group_size, head_dim), array(9, heads, 8, head_dim)
    table = array(len(new), 2)
    call = attention_call(q, cache, cache, table, None, seq_lens, out=q, cu_seqlens_q=bounds)
    memory = np.full(sizes.list_nbytes // 4 + 4, 0x55, np.int32)
    begin = -memory.ctypes.data % 16 // 4
    prompt.plan_launch(call, sizes, memory[begin:].ctypes.data, most_decoded=most_decoded).run()
    (count,) = memory[begin : begin + 1]
    items = memory[begin + prompt.LIST_AT // 4 :][: 8 * count].reshape(-1, 8)
    assert count < sizes.max_items
    return items, sizes


ROWS = st.lists(st.tuples(st.sampled_from([0, 0, 1, 1, 1, 2, 4, 5, 9, 40, 300]), st.integers(0, 9000)), min_size=1)


@needs_compiler
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=ROWS, limit=st.sampled_from([1, 2, 4, 8]))
def test_one_of_both_kernels_has_all_rows_by_the_most_tokens_of_one(host, rows, limit):
    new = [count for count, _ in rows]
    lengths = [count + cached for count, cached in rows]
    ranges, sequences = ranges_of(new, lengths, most_queries=limit, all_or_none=True)
    items, _ = items_of(new, lengths, most_decoded=limit)
    if max(new) > limit:
        assert (ranges == (len(new), 0, 0, 0)).all()
        assert (items == items_of(new, lengths)[0]).all()
        assert len(items)
    else:
        plain = ranges_of(new, lengths)
        assert (ranges == plain[0]).all()
        assert (sequences == plain[1]).all()
        assert ranges[0].tolist()[:2] == [0, 0]
        assert not len(items)


@needs_compiler
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=ROWS)
def test_long_rows_that_have_a_kernel_beside_leave_the_others_where_they_are(host, rows):
    new = [count for count, _ in rows]
    lengths = [count + cached for count, cached in rows]
    ranges, sequences = ranges_of(new, lengths, most_queries=8)
    decoded = [length if 0 < count <= 8 else 0 for count, length in zip(new, lengths, strict=True)]
    ranges[:-1, 2] = [decoded[sequence] if sequence < len(new) else 0 for sequence in ranges[:-1, 0]]
    check_ranges(decoded, ranges, sequences)


@needs_compiler
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=ROWS, group_size=st.sampled_from([1, 3, 4, 16, 71]), sms=st.sampled_from([1, 8, 132]))
def test_items_have_every_tile_that_their_rows_see_once(host, rows, group_size, sms):
    new = [count for count, _ in rows]
    lengths = [count + cached for count, cached in rows]
    items, sizes = items_of(new, lengths, group_size, sms=sms)
    expected = cut(new, lengths, sizes.halves, 2, sizes.ctas, specs.prompt_keys(128))
    parts = items[:, 6] >> 16
    assert (len(items), int((parts > 1).sum())) == expected
    found = {}
    for first_query, queries, half, row, length, tiles, part, slot in items.tolist():
        assert (queries, length) == (new[row], lengths[row])
        assert first_query == sum(new[:row])
        found.setdefault((row, half), []).append((part & 0xFFFF, tiles & 0xFFFF, tiles >> 16, part >> 16, slot))
    _, _, in_half, per_query, _ = sizes.halves
    for row, count in enumerate(new):
        halves = count * per_query if per_query > 1 else -(-count // in_half)
        assert sorted(half for at, half in found if at == row) == list(range(0, halves, 2))
    slots = set()
    for (row, half), pieces in found.items():
        pieces.sort()
        assert [piece[0] for piece in pieces] == list(range(pieces[0][3]))
        last = min(new[row], (half + 2) * in_half if per_query == 1 else (half + 1) // per_query + 1)
        end = max(1, -(-(lengths[row] - new[row] + last) // specs.prompt_keys(128)))
        assert [piece[1] for piece in pieces] == [0, *(piece[2] for piece in pieces[:-1])]
        assert pieces[-1][2] == end
        assert all(begin < stop for _, begin, stop, *_ in pieces)
        if len(pieces) > 1:
            (slot,) = {piece[4] for piece in pieces}
            own = set(range(slot, slot + len(pieces)))
            assert not own & slots
            slots |= own
    assert not slots or max(slots) < sizes.slots


def mixed_call(new=(40, 7), group_size=4, head_dim=128):
    heads = 2 * group_size
    q, out = (array(sum(new), heads, head_dim, dtype="bfloat16", gap=64) for _ in range(2))
    caches = [array(40, 2, 8, head_dim, dtype="bfloat16") for _ in range(2)]
    batch = len(new)
    return attention_call(
        q, *caches, array(batch, 5), array(batch, 5), array(batch), out=out, cu_seqlens_q=array(batch + 1)
    )


@pytest.fixture
def launched(fake, monkeypatch):
    """The launches, by name and whether they may begin early, on a device that is not there."""
    owner = type("Owner", (), {"data": type("Data", (), {"ptr": 0xD0000})})
    for module in (memory, prompt, shared):
        monkeypatch.setattr(module, "keep", lambda *_: owner)
    monkeypatch.setattr(prompt, "tensor_map", lambda address, *_: (address, *range(15)))
    found, run = [], Launch.run

    def record(self, stream, *, dependent=False):
        found.append((self.kernel.name, dependent))
        run(self, stream, dependent=dependent)

    monkeypatch.setattr(Launch, "run", record)
    return found


BOUNDS = Hints((0, 40), 40, {}, counts_are_bounds=True)
BOTH = ["kvt_plan_prompts", "kvt_expand", "kvt_plan", "kvt_decode", "kvt_prompt"]


def names(launched):
    return [name for name, _ in launched]


def test_both_kernels_share_lists_and_have_limits_that_meet(fake, launched):
    call = mixed_call()
    attention.attend(call, BOUNDS, stream=_STREAM)
    assert launched == [(name, name == "kvt_prompt") for name in BOTH]
    items, expand, ranges, decode, attends = (taken.parameters for taken in fake.taken)
    assert items["most_decoded"] == ranges["most_queries"] == decode["most_queries"] == 4, "of 16 rows, 4 heads each"
    assert ranges["all_or_none"] == 1
    assert decode["block_table"] == attends["block_table"] == expand["granules"]
    assert decode["table_row"] == attends["table_row"] == 5
    assert decode["ranges"] == ranges["ranges"]
    assert (attends["items"], attends["num_items"]) == (items["items"], items["num_items"])
    assert decode["out"] == attends["out"] == call.out.address
    # the parts of the memory of a step, in order
    begins = [expand["granules"], ranges["ranges"], ranges["sequences"], items["num_items"], items["items"]]
    sizes = [4 * 2 * 5, 16 * (ranges["num_ranges"] + 1), 8 * 2, 4, 0]
    assert begins[0] == 0xD0000
    assert all(one + size <= other for (one, other), size in zip(itertools.pairwise(begins), sizes, strict=False))


def test_further_layers_run_both_kernels_and_the_second_may_begin_early(fake, launched):
    prepared = attention.attend(mixed_call(), BOUNDS, stream=_STREAM)
    for overlaps in (False, True):
        del launched[:], fake.taken[:]
        attention.attend_prepared(prepared, 16, 32, 48, 64, stream=_STREAM, overlaps=overlaps)
        assert launched == [("kvt_decode", overlaps), ("kvt_prompt", True)]
        decode, attends = (taken.parameters for taken in fake.taken)
        assert [decode[name] for name in ("q", "k_cache", "v_cache", "out")] == [16, 32, 48, 64]
        assert [attends[name][0] for name in ("query_map", "key_map", "value_map")] == [16, 32, 48]
        assert attends["out"] == 64
        assert decode["wait_first"] == (not overlaps)


def test_without_memory_of_its_own_a_step_is_planned_for_each_layer(fake, launched, monkeypatch):
    monkeypatch.setattr(memory, "keep", lambda *_: None)  # a capture forbids to take some
    assert attention.attend(mixed_call(), BOUNDS, stream=_STREAM) is None
    assert names(launched) == BOTH
    assert fake.taken[1].parameters["granules"] == 0xC0000, "scratch memory"


@pytest.mark.parametrize(
    ("call", "hints", "kernels"),
    [
        ({}, {"counts_are_bounds": False}, ["kvt_prompt"]),
        ({}, {"query_counts": (5, 40)}, ["kvt_prompt"]),
        ({}, {"query_counts": (4, 40)}, ["kvt_decode", "kvt_prompt"]),
        ({"new": (3, 4)}, {"query_counts": (0, 4)}, ["kvt_decode"]),
        ({"group_size": 17}, {}, ["kvt_prompt"]),
        ({"group_size": 16}, {}, ["kvt_decode", "kvt_prompt"]),
        ({"group_size": 9, "head_dim": 256}, {}, ["kvt_prompt"]),
        ({"group_size": 8, "head_dim": 256}, {}, ["kvt_decode", "kvt_prompt"]),
        ({}, {"sharing": Sharing()}, ["kvt_prompt"]),
    ],
)
def test_both_are_launched_only_where_each_may_be_the_right_one(launched, call, hints, kernels):
    attention.attend(mixed_call(**call), BOUNDS._replace(**hints), stream=_STREAM)
    assert [name for name in names(launched) if name in ("kvt_decode", "kvt_prompt", "kvt_prefill")] == kernels


def test_without_the_prompt_kernel_nothing_changes(launched, monkeypatch):
    monkeypatch.setattr(prompt, "arch_of", lambda device: 100)
    for hints in (BOUNDS, BOUNDS._replace(counts_are_bounds=False)):
        attention.attend(mixed_call(), hints, stream=_STREAM)
    assert names(launched) == ["kvt_plan_prompts", "kvt_expand", "kvt_plan", "kvt_decode", "kvt_prefill"] * 2


@pytest.mark.parametrize("new", [8, 9, 16])
def test_one_head_to_a_kv_head_has_the_decode_kernel_for_as_many_tokens_as_rows(launched, new):
    """An eager call has one kernel for all rows, so that a captured one can have its bits."""
    attention.attend(mixed_call((new, 1), group_size=1), Hints((1, new), 40, {}), stream=_STREAM)
    assert names(launched)[-1] == ("kvt_decode" if new == 8 else "kvt_prompt")


def test_one_sequence_has_a_grid_for_the_tokens_that_are_decoded(fake, launched):
    attention.attend(mixed_call((512,)), BOUNDS._replace(query_counts=(0, 512)), stream=_STREAM)
    assert names(launched) == ["kvt_plan_prompts", "kvt_expand", "kvt_decode", "kvt_prompt"]
    decode = fake.taken[2]
    blocks = 4 * 4 // 16 + 1
    assert decode.grid[0] == 2 * blocks
    assert decode.parameters["most_queries"] == 4
