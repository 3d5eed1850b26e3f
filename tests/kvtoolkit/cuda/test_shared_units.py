"""The units that shared.cu plans, and the items that they become; its kernels run on the host, thread by thread."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from kvtoolkit.arrays.call import AttentionCall, attention_call
from kvtoolkit.cache.state import shared_reads
from kvtoolkit.cpu import operand
from kvtoolkit.cuda import prompt, shared
from tests.kvtoolkit.cuda.host_kernels import needs_compiler, on_the_host
from tests.kvtoolkit.cuda.shared_kinds import BLOCK, KINDS, Kind, make
from tests.kvtoolkit.cuda.test_launches import array
from tests.kvtoolkit.cuda.test_shared import model_units

pytestmark = needs_compiler
SMS = 132


@pytest.fixture
def host(monkeypatch):
    """Plans are made on the host."""
    on_the_host(monkeypatch, shared, prompt)


class Planned(NamedTuple):
    """What the plans of a step left in its memory."""

    units: np.ndarray
    """``[num_units, 4]``, words as shared.cu has them."""
    begins: np.ndarray
    levels: np.ndarray
    """Of each token."""
    items: np.ndarray
    """``[num_items, 8]``, words as ``Item`` has them."""


def described(values: Any) -> Any:
    return operand(np.ascontiguousarray(values, np.int32), "array")


def call_of(kind: Kind) -> AttentionCall:
    """A call with tables on the host, whose other arrays are nowhere."""
    batch = kind.pooled
    q, cache = array(*batch.q.shape, dtype="float16"), array(*batch.caches[0].shape, dtype="float16")
    bounds = None if batch.cu_seqlens_q is None else described(batch.bounds)
    tables = described(batch.table), None, described(batch.lengths)
    out = array(*batch.q.shape, dtype="float16")
    return attention_call(q, cache, cache, *tables, out=out, cu_seqlens_q=bounds)


def plan(kind: Kind, seed: int = 0) -> Planned:
    """Run the plans of a step."""
    call, order = call_of(kind), kind.order
    num_tokens, num_q_heads, head_dim = call.q.shape
    batch, width = call.block_table.shape
    sizes = prompt.sizes_of(4 * num_tokens, num_q_heads, call.k_cache.shape[1], head_dim, 2 * batch, SMS)
    parts = shared._parts(call, width, sizes, False)._replace(places=4 * num_tokens, unit_out=0, unit_lse=0, rest_lse=0)
    memory = np.full(sum(map(shared.aligned, parts)) // 4 + 64, 0x55555555, np.int32)
    first = memory.ctypes.data + -memory.ctypes.data % 256
    at = shared._place(first, parts)

    def read(address: int, count: int) -> np.ndarray:
        begin = (address - memory.ctypes.data) // 4
        return memory[begin : begin + count]

    ordered = None if order is None else described(order)
    ids, launches = shared._plan(call, ordered, at, width)
    places = 0 if order is None else at.places
    lists = prompt.UnitLists(at.units, at.num_units, at.begins, places, ids.strides[0], 0, 0)
    for launch in (*launches, prompt.plan_launch(call, sizes, at.work, lists)):
        launch.seed = seed
        launch.run()
    (num_units,), (num_items,) = read(at.num_units, 1), read(at.work, 1)
    assert num_items < sizes.max_items
    items = read(at.work + prompt.LIST_AT, 8 * num_items).reshape(-1, 8)
    return Planned(
        read(at.units, 4 * num_units).reshape(-1, 4), read(at.begins, batch), read(at.token_levels, num_tokens), items
    )


def units_of(kind: Kind, planned: Planned) -> list[tuple[int, int, int, int]]:
    """The units as `model_units` has them, in their order."""
    order = np.arange(len(kind.seen)) if kind.order is None else kind.order
    places = np.concatenate([[0], np.cumsum(kind.pooled.new[order])]).tolist()
    units = []
    for first, queries, tokens, place in planned.units.tolist():
        first &= (1 << 24) - 1
        row, block = divmod(place, kind.pooled.table.shape[1])
        begin, end = order.tolist().index(row), places.index(first + queries)
        assert places[begin] == first
        units.append((begin, end, block, block + tokens // BLOCK))
    return units


def test_the_host_and_the_device_agree_on_which_rows_share():
    assert shared_reads.MOST_QUERIES == shared._MOST_QUERIES
    assert shared_reads.MAX_ROWS == shared._MAX_ROWS


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_units_and_what_they_leave_of_rows(host, name, is_mixed):
    kind = make(name, is_mixed=is_mixed)
    planned = plan(kind)
    expected = model_units(kind.seen, BLOCK)
    units = units_of(kind, planned)
    assert len(units) == len(set(units)) == len(expected)
    assert set(units) == expected
    order = range(len(kind.seen)) if kind.order is None else kind.order
    for position, row in enumerate(order):
        own = [unit for unit in units if unit[0] <= position < unit[1]]
        assert planned.begins[row] == max((end for *_, end in own), default=0)
        asked = slice(kind.pooled.bounds[row], kind.pooled.bounds[row + 1])
        assert (planned.levels[asked] == len(own)).all()


@pytest.mark.parametrize("name", KINDS)
def test_the_order_in_which_threads_run_changes_no_unit_and_no_cut(host, name):
    """Where items are cut decides about last bits; the slots of their parts do not."""
    kind = make(name)
    first = plan(kind)
    for seed in (1, 2):
        again = plan(kind, seed)
        assert np.array_equal(first.units, again.units)
        ordered = [sorted(planned.items[:, :7].tolist()) for planned in (first, again)]
        assert ordered[0] == ordered[1]


@pytest.mark.parametrize(("name", "parts"), [("rows_40", [9, 9]), ("many_units", [2, 2, 2, 3, 6])])
def test_some_units_are_cut_and_others_are_not(host, name, parts):
    """So that the tests on a GPU meet both."""
    planned = plan(make(name))
    is_unit = planned.items[:, 0] >> 24 > 0
    counts = planned.items[is_unit & (planned.items[:, 6] & 0xFFFF == 0), 6] >> 16
    assert sorted(counts[counts > 1].tolist()) == parts
    assert name == "rows_40" or (counts == 1).any()
