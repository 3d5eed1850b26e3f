"""Shared reads: blocks that several rows of a batch begin with are read once for all of them.

They become sequences of their own, *units*, whose queries are those of all their rows. The prompt kernel attends to
units and to what they leave of each row, its *rest*, and what it finds is merged by its log-sum-exp. What rows have in
common is found on the device, in the tables, once a step; so a captured graph follows its tables.

Results differ from those without shared reads by the order of sums, and by one rounding more: the attention to units
and rests is rounded to 16 bits before it is merged.
"""

import math
from typing import Any, NamedTuple

from kvtoolkit.arrays.call import AttentionCall, Hints
from kvtoolkit.arrays.host import Operand, make_operand
from kvtoolkit.cuda import prompt, specs
from kvtoolkit.cuda.expand import list_width, make_granules
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.memory import aligned, keep
from kvtoolkit.cuda.prompt import Maps, PromptSizes, UnitLists
from kvtoolkit.cuda.workspace import Sizes, workspace
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES
from kvtoolkit.runtime.kernels import num_sms
from kvtoolkit.runtime.structs import ParameterStruct

_MAX_ROWS = 1024  # as in shared.cu, as the next two
_MOST_QUERIES = 8
_MAX_LEVELS = 3
_MAX_TOKENS = 4096  # new tokens of a step: a unit's results have a place for each token at each level
_MAX_WORDS = 1 << 31  # of the table, whose places are 32 bits
_LEAST_TOKENS = 64  # of a unit
_LEAST_SAVED = 512  # tokens that a unit need not read again

FIND_PARAMS = ParameterStruct("attention/shared.cu", "kvt_find_shared")
PLAN_PARAMS = ParameterStruct("attention/shared.cu", "kvt_plan_shared")
GATHER_PARAMS = ParameterStruct("attention/shared.cu", "kvt_gather")
MERGE_PARAMS = ParameterStruct("attention/merge_shared.cu", "kvt_merge_shared")


class SharedAttention(NamedTuple):
    """A call of `attend` made ready for other layers."""

    device: int
    gather: Launch | None
    """Brings the queries into the order that has sharing rows side by side; None where they are in it."""
    gathered: int
    """Where to."""
    attention: Launch
    maps: Maps
    merge: Launch
    memory: Any
    """What the launches read and nobody else keeps alive."""


class _Layout(NamedTuple):
    """The parts of the step's memory: their addresses, or their sizes."""

    ids: int
    """``[batch, width]`` int32, where the table has entries."""
    common: int
    begins: int
    token_levels: int
    places: int
    units: int
    num_units: int
    work: int
    unit_out: int
    unit_lse: int
    rest_out: int
    rest_lse: int
    gathered: int


def suits(call: AttentionCall, hints: Hints) -> bool:
    """Whether shared reads are wanted and possible, by the shapes and options of the call and what the host knows.

    Not where the output is written over the queries: a row's rest may be done before a unit has read its query.
    """
    batch, width = call.block_table.shape
    fewest = 0 if hints.query_counts is None else hints.query_counts[0]
    return (
        hints.sharing is not None
        and hints.kept is not None
        and 1 < batch <= _MAX_ROWS
        and call.q.shape[0] <= _MAX_TOKENS
        and fewest <= _MOST_QUERIES
        and call.q.address != call.out.address
        and call.alibi_slopes is None
        and call.left < 0
        and batch * max(call.block_table.strides[0], 8 * width, hints.max_seq_len or 0) < _MAX_WORDS
        and prompt.suits(call, _MAX_TOKENS, hints.max_seq_len)
    )


def attend(call: AttentionCall, hints: Hints, words: tuple[int, ...], *, stream: int) -> SharedAttention | None:
    """Attend, as `kvtoolkit.cuda.attention.attend`.

    Args:
        words: the maps of the call's arrays, see `Maps.words`.

    Returns:
        None, with nothing launched, if there is no memory, or a capture forbids to take some.
    """
    assert hints.sharing is not None
    assert hints.kept is not None
    num_tokens, num_q_heads, head_dim = call.q.shape
    num_kv_heads = call.k_cache.shape[1]
    batch, max_entries = call.block_table.shape
    device, order = call.q.device, hints.sharing.order
    width = list_width(max_entries, hints.max_seq_len) if call.block_starts is not None else max_entries
    # queries of rows, and of units at each level
    num_queries, num_sequences = (1 + _MAX_LEVELS) * num_tokens, 2 * batch
    sizes = prompt.sizes_of(num_queries, num_q_heads, num_kv_heads, head_dim, num_sequences, num_sms(device))
    parts = _parts(call, width, sizes, order is not None)
    key = ("shared", width, sizes, order is not None, call.right)
    owner = _memory(hints.kept, key, sum(map(aligned, parts)), stream)
    if owner is None:
        return None
    at = _place(owner.data.ptr, parts)
    ids, plan = _plan(call, order, at, width)
    for launch in plan:
        launch.run(stream)
    gather = None
    ours = _gathered(call, at, order is not None)
    if order is not None:
        gather = _gather_launch(call, at)
        gather.run(stream, dependent=True)
        found = prompt.maps_of(ours).words(at.gathered, call.k_cache.address, call.v_cache.address)
        assert found is not None  # contiguous queries are described where others are
        words = found
    maps = prompt.maps_of(ours)
    units = UnitLists(
        at.units, at.num_units, at.begins, 0 if order is None else at.places, ids.strides[0], at.unit_out, at.unit_lse
    )
    scratch = workspace(device, stream, Sizes(sizes.partials_nbytes, sizes.counters_nbytes, 0))
    prompt.plan_launch(ours, sizes, at.work, units).run(stream)
    attention = prompt.attention_launch(ours, sizes, maps, words, ids, at.work, scratch, units)
    attention.run(stream, dependent=True)
    merge = _merge_launch(call, ours, at, order is not None)
    merge.run(stream, dependent=True)
    return SharedAttention(device, gather, at.gathered, attention, maps, merge, owner)


def attend_prepared(
    prepared: SharedAttention, q: int, k_cache: int, v_cache: int, out: int, *, warm: int = 0, cold: int = 0,
    stream: int,
) -> None:  # fmt: skip
    """Attend once more where only these addresses differ; see `kvtoolkit.cuda.attention.attend_prepared`."""
    attention, merge = prepared.attention, prepared.merge
    if prepared.gather is not None:
        prepared.gather.set_addresses(GATHER_PARAMS.word("q"), q)
        prepared.gather.run(stream, dependent=True)
        q = prepared.gathered
    else:
        attention.set_addresses(prompt.PARAMS.word("out"), out)
        merge.set_addresses(MERGE_PARAMS.word("rest_out"), out)
    words = prepared.maps.words(q, k_cache, v_cache)
    assert words is not None  # arrays that differ in their addresses alone are described as well
    attention.set_addresses(prompt.PARAMS.word("query_map"), *words)
    if warm or cold:
        attention.set_addresses(prompt.PARAMS.word("warm"), warm, cold)
    attention.run(stream, dependent=True)
    merge.set_addresses(MERGE_PARAMS.word("out"), out)
    merge.run(stream, dependent=True)


def _memory(kept: dict[Any, Any], key: Any, nbytes: int, stream: int) -> Any:
    import cupy

    try:
        return keep(kept, key, nbytes, stream)
    except cupy.cuda.memory.OutOfMemoryError:  # attention can do without
        return None


def _parts(call: AttentionCall, width: int, sizes: PromptSizes, is_gathered: bool) -> _Layout:
    """Bytes of each part."""
    num_tokens, num_q_heads, head_dim = call.q.shape
    batch = call.block_table.shape[0]
    tokens, results = 4 * num_tokens, num_tokens * num_q_heads
    return _Layout(
        ids=0 if call.block_starts is None else 4 * batch * width, common=4 * batch, begins=4 * batch,
        token_levels=tokens, places=tokens if is_gathered else 0, units=16 * batch, num_units=4, work=sizes.list_nbytes,
        unit_out=2 * _MAX_LEVELS * results * head_dim, unit_lse=4 * _MAX_LEVELS * results,
        rest_out=2 * results * head_dim if is_gathered else 0, rest_lse=4 * results,
        gathered=2 * results * head_dim if is_gathered else 0,
    )  # fmt: skip


def _place(address: int, parts: _Layout) -> _Layout:
    """Addresses of parts of these sizes."""
    places = []
    for nbytes in parts:
        places.append(address)
        address += aligned(nbytes)
    return _Layout(*places)


def _plan(call: AttentionCall, order: Operand | None, at: _Layout, width: int) -> tuple[Operand, list[Launch]]:
    """The blocks of each row, and the launches that find the units."""
    batch = call.block_table.shape[0]
    block_size, device = call.k_cache.shape[2], call.q.device
    launches = []
    ids = call.block_table
    if call.block_starts is not None:
        granules = make_granules(at.ids, call.block_table, call.block_starts, call.seq_lens, width, call.tiers)
        launches.append(granules.launch)
        ids = granules.table
    ids_row, multiple = ids.strides[0], 1 if call.tiers is None else MAX_BLOCK_GRANULES
    rows = (
        call.seq_lens.address, call.cu_seqlens_q.address if call.cu_seqlens_q else 0, order.address if order else 0
    )  # fmt: skip

    def add(spec: specs.Spec, ctas: int, parameters: bytes) -> None:
        launches.append(Launch(load_spec(spec, device), (ctas,), spec.threads, 0, parameters))

    add(specs.FIND_SHARED, batch, FIND_PARAMS.pack(*rows, ids.address, at.common, ids_row, block_size, multiple))
    parameters = PLAN_PARAMS.pack(
        *rows, at.common, at.begins, at.token_levels, at.places, at.units, at.num_units, ids_row, batch,
        call.q.shape[0], block_size, _LEAST_TOKENS, _LEAST_SAVED,
    )  # fmt: skip
    add(specs.PLAN_SHARED, 1, parameters)
    return ids, launches


def _gathered(call: AttentionCall, at: _Layout, is_gathered: bool) -> AttentionCall:
    """The call as the prompt kernel has it: it writes what is not merged yet, and counts no sinks."""
    shape = num_tokens, num_q_heads, head_dim = call.q.shape
    device, dtype = call.q.device, call.q.dtype

    def contiguous(address: int) -> Operand:
        return make_operand((address, shape, (num_q_heads * head_dim, head_dim, 1), dtype, None, True, device))

    lse = call.lse
    if is_gathered or lse is None:
        lse = make_operand((at.rest_lse, (num_tokens, num_q_heads), (num_q_heads, 1), "float32", None, True, device))
    ours = call._replace(lse=lse, sinks=None)
    if is_gathered:
        ours = ours._replace(q=contiguous(at.gathered), out=contiguous(at.rest_out))
    return ours


def _gather_launch(call: AttentionCall, at: _Layout) -> Launch:
    num_tokens, num_q_heads, head_dim = call.q.shape
    parameters = GATHER_PARAMS.pack(
        call.q.address, at.gathered, at.places, *call.q.strides[:2], num_q_heads, head_dim
    )  # fmt: skip
    return Launch(load_spec(specs.GATHER, call.q.device), (num_tokens,), specs.GATHER.threads, 0, parameters)


def _merge_launch(call: AttentionCall, ours: AttentionCall, at: _Layout, is_gathered: bool) -> Launch:
    num_tokens, num_q_heads, head_dim = call.q.shape
    assert ours.lse is not None
    parameters = MERGE_PARAMS.pack(
        call.out.address, call.lse.address if call.lse else 0, ours.out.address, ours.lse.address, at.unit_out,
        at.unit_lse, at.token_levels, at.places if is_gathered else 0, call.sinks.address if call.sinks else 0,
        *call.out.strides[:2], *ours.out.strides[:2], num_tokens, num_q_heads, head_dim,
    )  # fmt: skip
    spec = specs.merge_shared(call.q.dtype)
    grid = (math.ceil(num_tokens * num_q_heads / (spec.threads // 32)),)
    return Launch(load_spec(spec, call.q.device), grid, spec.threads, 0, parameters)
