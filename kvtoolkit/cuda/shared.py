"""Shared reads: blocks that several rows of a batch begin with are read once for all of them.

They become sequences of their own, *units*, whose queries are those of all their rows; the prompt kernel attends to
them. The decode kernel attends to the *rest* of every row, and the two are merged by their log-sum-exp. What rows have
in common is found on the device, in the tables, once a step; so a captured graph follows its tables.

Results differ from those without shared reads by the order of sums, and by one rounding more: the attention to units
and rests is rounded to 16 bits before it is merged.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kvtoolkit.arrays.call import AttentionCall, Hints
from kvtoolkit.arrays.host import Operand, make_operand
from kvtoolkit.cuda import prompt, specs
from kvtoolkit.cuda.expand import list_width, make_granules
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.memory import aligned, keep
from kvtoolkit.cuda.prompt import Maps, PromptSizes, WorkList
from kvtoolkit.cuda.workspace import Sizes, workspace
from kvtoolkit.runtime.kernels import num_sms
from kvtoolkit.runtime.structs import ParameterStruct

_MAX_ROWS = 1024  # as in shared.cu, as the next ones
_MAX_QUERIES = 8
_MAX_LEVELS = 3
_MAX_TOKENS = 4096  # of all rows: results of units have a place for each, and for each level
_MAX_WORDS = 1 << 31  # of the table, whose places are 32 bits
_LEAST_TOKENS = 64  # of a unit
_LEAST_SAVED = 512  # tokens that a unit need not read again

FIND_PARAMS = ParameterStruct("attention/shared.cu", "kvt_find_shared")
PLAN_PARAMS = ParameterStruct("attention/shared.cu", "kvt_plan_shared")
REST_PARAMS = ParameterStruct("attention/shared.cu", "kvt_rest")
GATHER_PARAMS = ParameterStruct("attention/shared.cu", "kvt_gather")
MERGE_PARAMS = ParameterStruct("attention/merge_shared.cu", "kvt_merge_shared")


class SharedAttention(NamedTuple):
    """A call of `attend` made ready for other layers."""

    device: int
    gather: Launch | None
    gathered: int
    """Address of the queries in the order that has sharing rows side by side; 0 = they are in it."""
    units: Launch
    maps: Maps
    rest: Any
    """What `kvtoolkit.cuda.attention.attend` returned for the rest of each row."""
    merge: Launch
    memory: Any
    """What the launches read and nobody else keeps alive."""


class _Layout(NamedTuple):
    """The parts of the step's memory: their addresses, or their sizes."""

    ids: int
    """``[batch, width]`` int32, where the table has entries."""
    common: int
    begins: int
    rest_lens: int
    token_levels: int
    places: int
    units: int
    num_units: int
    rests: int
    """``[batch, width]`` int32"""
    work: int
    unit_out: int
    unit_lse: int
    rest_lse: int
    gathered: int


def suits(call: AttentionCall, hints: Hints) -> bool:
    """Whether shared reads are wanted and possible: by the shapes and options of the call alone."""
    batch, width = call.block_table.shape
    return (
        hints.sharing is not None
        and hints.kept is not None
        and 1 < batch <= _MAX_ROWS
        and call.q.shape[0] <= _MAX_TOKENS
        and call.alibi_slopes is None
        and call.left < 0
        and batch * max(8 * width, 8 * (hints.max_seq_len or 0)) < _MAX_WORDS
        and prompt.suits(call, _MAX_TOKENS)
    )


def attend(
    call: AttentionCall, hints: Hints, words: tuple[int, ...], attend_rest: Callable[..., Any], *, stream: int
) -> tuple[bool, SharedAttention | None]:
    """Attend, as `kvtoolkit.cuda.attention.attend`, which is ``attend_rest``.

    Args:
        words: the maps of the call's arrays, see `Maps.words`.

    Returns:
        Whether it was done; not, if there is no memory and a capture forbids to take some. And what `attend_prepared`
        takes; None where every layer must plan anew.
    """
    assert hints.sharing is not None
    assert hints.kept is not None
    num_tokens, num_q_heads, head_dim = call.q.shape
    num_kv_heads = call.k_cache.shape[1]
    batch, max_entries = call.block_table.shape
    device = call.q.device
    width = list_width(max_entries, hints.max_seq_len) if call.block_starts is not None else max_entries
    sizes = prompt.sizes_of(_MAX_LEVELS * num_tokens, num_q_heads, num_kv_heads, head_dim, batch, num_sms(device))
    is_ordered = hints.sharing.order is None
    parts = _parts(call, width, sizes, is_ordered)
    owner = keep(hints.kept, ("shared", width, sizes, is_ordered), sum(map(aligned, parts)), stream)
    if owner is None:
        return False, None
    at = _place(owner.data.ptr, parts)
    for launch in _plan(call, hints.sharing.order, at, width):
        launch.run(stream)
    gather = None
    queries = call.q
    if not is_ordered:
        queries = make_operand(
            (at.gathered, call.q.shape, (num_q_heads * head_dim, head_dim, 1), call.q.dtype, None, True, device)
        )
        gather = _gather_launch(call, at)
        gather.run(stream)
    unit_call = _unit_call(call, queries, at)
    maps = prompt.maps_of(unit_call)
    if not is_ordered:
        found = maps.words(queries.address, call.k_cache.address, call.v_cache.address)
        assert found is not None  # contiguous queries are described where others are
        words = found
    work = WorkList(at.work, at.units, at.num_units, num_tokens)
    scratch = workspace(device, stream, Sizes(sizes.partials_nbytes, sizes.counters_nbytes, 0))
    prompt.plan_launch(unit_call, sizes, work).run(stream)
    units = prompt.attention_launch(unit_call, sizes, maps, words, unit_call.block_table, work, scratch)
    units.run(stream)
    rest_call = _rest_call(call, at, width)
    # memory of its own: the same shapes may be planned for whole rows, too, in layers that cannot share
    rest_hints = hints._replace(kept=hints.kept.setdefault("rests", {}), sharing=None)
    rest = attend_rest(rest_call, rest_hints, stream=stream)
    merge = _merge_launch(call, rest_call, at, is_ordered)
    merge.run(stream)
    if rest is None:
        return True, None
    return True, SharedAttention(device, gather, 0 if is_ordered else at.gathered, units, maps, rest, merge, owner)


def attend_prepared(
    prepared: SharedAttention, q: int, k_cache: int, v_cache: int, out: int, attend_rest: Callable[..., None], *,
    stream: int,
) -> None:  # fmt: skip
    """Attend once more where only these addresses differ; ``attend_rest`` is the function of that name for the rest."""
    if prepared.gather is not None:
        prepared.gather.set_addresses(GATHER_PARAMS.word("q"), q)
        prepared.gather.run(stream)
    words = prepared.maps.words(prepared.gathered or q, k_cache, v_cache)
    assert words is not None  # arrays that differ in their addresses alone are described as well
    prepared.units.set_addresses(prompt.PARAMS.word("query_map"), *words)
    prepared.units.run(stream)
    attend_rest(prepared.rest, q, k_cache, v_cache, out, stream=stream)
    prepared.merge.set_addresses(MERGE_PARAMS.word("out"), out)
    prepared.merge.run(stream)


def _parts(call: AttentionCall, width: int, sizes: PromptSizes, is_ordered: bool) -> _Layout:
    """Bytes of each part."""
    num_tokens, num_q_heads, head_dim = call.q.shape
    batch = call.block_table.shape[0]
    rows, tokens, results = 4 * batch, 4 * num_tokens, num_tokens * num_q_heads
    lists = 4 * batch * width
    return _Layout(
        ids=0 if call.block_starts is None else lists, common=rows, begins=rows, rest_lens=rows, token_levels=tokens,
        places=0 if is_ordered else tokens, units=16 * batch, num_units=4, rests=lists, work=sizes.list_nbytes,
        unit_out=2 * _MAX_LEVELS * results * head_dim, unit_lse=4 * _MAX_LEVELS * results, rest_lse=4 * results,
        gathered=0 if is_ordered else 2 * results * head_dim,
    )  # fmt: skip


def _place(address: int, parts: _Layout) -> _Layout:
    """Addresses of parts of these sizes."""
    places = []
    for nbytes in parts:
        places.append(address)
        address += aligned(nbytes)
    return _Layout(*places)


def _plan(call: AttentionCall, order: Operand | None, at: _Layout, width: int) -> list[Launch]:
    """The launches that find the units and make the tables of the rests."""
    batch = call.block_table.shape[0]
    block_size, device = call.k_cache.shape[2], call.q.device
    launches = []
    ids = call.block_table
    if call.block_starts is not None:
        granules = make_granules(at.ids, call.block_table, call.block_starts, call.seq_lens, width)
        launches.append(granules.launch)
        ids = granules.table
    lengths, ids_row = call.seq_lens.address, ids.strides[0]
    rows = lengths, call.cu_seqlens_q.address if call.cu_seqlens_q else 0, order.address if order else 0

    def add(spec: specs.Spec, grid: tuple[int, ...], parameters: bytes) -> None:
        launches.append(Launch(load_spec(spec, device), grid, spec.threads, 0, parameters))

    add(specs.FIND_SHARED, (batch,), FIND_PARAMS.pack(*rows, ids.address, at.common, ids_row, block_size))
    add(
        specs.PLAN_SHARED, (1,),
        PLAN_PARAMS.pack(
            *rows, at.common, at.begins, at.token_levels, at.places, at.units, at.num_units, ids_row, batch,
            call.q.shape[0], block_size, _LEAST_TOKENS, _LEAST_SAVED,
        ),
    )  # fmt: skip
    add(
        specs.REST, (batch, min(4, -(-width // specs.REST.threads))),
        REST_PARAMS.pack(lengths, at.begins, ids.address, at.rests, at.rest_lens, ids_row, width, block_size),
    )  # fmt: skip
    return launches


def _unit_call(call: AttentionCall, queries: Operand, at: _Layout) -> AttentionCall:
    """The call that attends to the units, every query to all keys of its unit."""
    num_tokens, num_q_heads, head_dim = call.q.shape
    device = call.q.device
    out = make_operand(
        (at.unit_out, call.q.shape, (num_q_heads * head_dim, head_dim, 1), call.q.dtype, None, True, device)
    )
    lse = make_operand((at.unit_lse, (num_tokens, num_q_heads), (num_q_heads, 1), "float32", None, True, device))
    address = call.block_table.address if call.block_starts is None else at.ids
    # a unit names its first block by its place in the whole table
    table = make_operand((address, (call.block_table.shape[0], 1), (1, 1), "int32", None, False, device))
    return call._replace(
        q=queries, out=out, lse=lse, block_table=table, block_starts=None, cu_seqlens_q=None, sinks=None, left=-1,
        right=-1,
    )  # fmt: skip


def _rest_call(call: AttentionCall, at: _Layout, width: int) -> AttentionCall:
    """The call that attends to the rest of each row."""
    num_tokens, num_q_heads, _ = call.q.shape
    batch, device = call.block_table.shape[0], call.q.device
    lse = call.lse or make_operand(
        (at.rest_lse, (num_tokens, num_q_heads), (num_q_heads, 1), "float32", None, True, device)
    )
    return call._replace(
        block_table=make_operand((at.rests, (batch, width), (width, 1), "int32", None, True, device)),
        seq_lens=make_operand((at.rest_lens, (batch,), (1,), "int32", None, True, device)),
        block_starts=None, lse=lse, sinks=None,
    )  # fmt: skip


def _gather_launch(call: AttentionCall, at: _Layout) -> Launch:
    num_tokens, num_q_heads, head_dim = call.q.shape
    parameters = GATHER_PARAMS.pack(
        call.q.address, at.gathered, at.token_levels, at.places, *call.q.strides[:2], num_q_heads, head_dim
    )
    return Launch(load_spec(specs.GATHER, call.q.device), (num_tokens,), specs.GATHER.threads, 0, parameters)


def _merge_launch(call: AttentionCall, rest: AttentionCall, at: _Layout, is_ordered: bool) -> Launch:
    num_tokens, num_q_heads, head_dim = call.q.shape
    assert rest.lse is not None
    parameters = MERGE_PARAMS.pack(
        call.out.address, call.lse.address if call.lse else 0, rest.lse.address, at.unit_out, at.unit_lse,
        at.token_levels, 0 if is_ordered else at.places, call.sinks.address if call.sinks else 0,
        *call.out.strides[:2], num_tokens, num_q_heads, head_dim,
    )  # fmt: skip
    spec = specs.merge_shared(call.q.dtype)
    warps = spec.threads // 32
    grid = (math.ceil(num_tokens * num_q_heads / warps),)
    return Launch(load_spec(spec, call.q.device), grid, spec.threads, 0, parameters)
