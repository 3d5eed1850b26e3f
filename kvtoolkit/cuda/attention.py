"""Launch the attention kernels on device arrays that are known to be right."""

import math
from typing import Any, NamedTuple

from kvtoolkit.arrays.call import NO_HINTS, AttentionCall, Hints
from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import prefill, prompt, shared, specs
from kvtoolkit.cuda.expand import Granules, make_granules
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.masses import UnitLse, place_unit_lse
from kvtoolkit.cuda.memory import Memory, StepLayout, lay_out_step, take_memory
from kvtoolkit.cuda.params import PARAMS, TIERED_PARAMS, UNBOUNDED, pack_attention, pack_tiers
from kvtoolkit.cuda.plan import Plan, make_plan
from kvtoolkit.cuda.prefill import PrefillAttention
from kvtoolkit.cuda.prompt import Maps, PromptAttention
from kvtoolkit.cuda.schedule import Route, Schedule, choose_route, choose_schedule
from kvtoolkit.cuda.shared import SharedAttention
from kvtoolkit.cuda.units import Units, make_units
from kvtoolkit.cuda.workspace import Sizes, workspace


class Attention(NamedTuple):
    """A call of `attend` made ready for other layers."""

    device: int
    decode: Launch | None
    """Begins with a wait for the kernel before it."""
    decode_early: Launch | None
    """May read before the kernel in front of it has ended; None if `attend` was not told to keep what it plans."""
    prefill: PrefillAttention | None
    """For the rows that ``decode`` leaves."""
    memory: Any
    """What the launches read and nobody else keeps alive."""
    prompts: PromptAttention | None = None
    """The prompt kernel, where plans on the device share out the rows between it and ``decode``."""


Prepared = Attention | PromptAttention | SharedAttention
"""A call of `attend` made ready for other layers."""


class _Prepared(NamedTuple):
    """What the kernels of a call read besides its arrays, made on the device by launches of their own."""

    memory: Memory
    granules: Granules | None
    """The list of granules, where the table has entries and no tiers."""
    units: Units | None
    """The list of units, where there are tiers."""
    plan: Plan | None
    """The ranges of the decode kernel, where it is planned."""
    unit_lse: UnitLse


def attend(call: AttentionCall, hints: Hints = NO_HINTS, *, stream: int = 0) -> Prepared | None:
    """Attend, writing to ``out`` and ``lse``, asynchronously on ``stream``.

    Args:
        call: arrays on the current device. Rows of ``q``, ``out`` and the caches begin at multiples of 16 bytes.
        hints: what the host knows. Without ``hints.kept``, and where a capture forbids to take memory, the plan and the
            list of granules are in scratch memory, until the next call on the stream.
        stream: a CUDA stream's address.

    Returns:
        What `attend_prepared` takes; None where every layer must plan anew.
    """
    if call.q.shape[0] == 0:
        if call.block_mass is not None:
            _clear(call.block_mass, stream)
        return Attention(call.q.device, None, None, None, None)
    if hints.query_counts == (1, 1) and call.cu_seqlens_q is not None:
        call = call._replace(cu_seqlens_q=None)  # row b asks q[b]
    route = choose_route(call, hints.query_counts)
    if shared.suits(call, hints):
        words = prompt.maps_of(call).words(call.q.address, call.k_cache.address, call.v_cache.address)
        sharing = None if words is None else shared.attend(call, hints, words, stream=stream)
        if sharing is not None:
            return sharing
    if prompt.suits(call, route.most, hints.max_seq_len):
        maps = prompt.maps_of(call)
        words = maps.words(call.q.address, call.k_cache.address, call.v_cache.address)
        if words is not None:
            if max(1, route.fewest) <= _most_decoded(call) and (call.tiers is not None or hints.counts_are_bounds):
                return _attend_both(call, hints, route.fewest, maps, words, stream)
            return prompt.attend(call, hints, maps, words, stream=stream)
    return _attend_by_row(call, hints, route, stream)


def _attend_by_row(call: AttentionCall, hints: Hints, route: Route, stream: int) -> Attention | None:
    """Launch the decode kernel, the prefill kernel, or both, of which each takes its rows by their query tokens."""
    schedule = choose_schedule(call, route, hints)
    step = lay_out_step(call, route, schedule, hints.max_seq_len)
    work = prefill.work_of(call, hints.max_seq_len) if route.prefills else None
    work_at = step.nbytes
    if work is not None:
        step = step._replace(nbytes=work_at + work.list_nbytes, items=work)
    memory = take_memory(call, schedule, step, hints.kept, stream)
    prepared = _prepare(call, route, schedule, step, memory)
    if step.unit_lse is not None and route.fewest == 0 and call.block_mass is not None:
        _clear(call.block_mass, stream)
    if work is not None:
        prefill.plan(call, work, memory.step + work_at, route.most_decoded, stream)
    decode, early = _launch(call, route, schedule, prepared, hints.kept is not None, stream)
    prefills = None
    if work is not None:
        ids = call.block_table if prepared.granules is None else prepared.granules.table
        prefills = prefill.attend(call, work, ids, memory.step + work_at, stream)
    if step.nbytes and memory.kept is None:
        return None
    return Attention(call.q.device, decode, early, prefills, memory.kept)


def _prepare(
    call: AttentionCall, route: Route, schedule: Schedule | None, step: StepLayout, memory: Memory,
    all_or_none: bool = False,
) -> _Prepared:  # fmt: skip
    """The launches that fill the step's memory; nothing is launched yet.

    Args:
        all_or_none: if a row has more query tokens than the decode kernel takes, that kernel takes no row.
    """
    table, starts, lengths, bounds = call.block_table, call.block_starts, call.seq_lens, call.cu_seqlens_q
    left, right = min(call.left, UNBOUNDED), min(call.right, UNBOUNDED)
    granules = units = plan = None
    if call.tiers is not None:
        assert starts is not None
        first = call.tiers.first_granules
        units = make_units(memory.step, table, starts, lengths, bounds, step.width, left, right, first)
    elif starts is not None:
        granules = make_granules(memory.step, table, starts, lengths, step.width)
    if schedule is not None and schedule.num_ranges:
        plan_lens, window = (units.plan_lens, (-1, -1)) if units else (lengths, (left, right))
        plan = make_plan(
            memory.step + step.plan_at, plan_lens, bounds, schedule.num_ranges, schedule.num_late, schedule.num_even,
            units is not None, *window, route.most_decoded, all_or_none,
        )  # fmt: skip
    unit_lse = UnitLse(call.lse.address if call.lse else 0, 0, 0)
    if step.unit_lse is not None:
        unit_lse = place_unit_lse(memory.step + step.unit_lse_at, step.unit_lse, unit_lse.lse)
    return _Prepared(memory, granules, units, plan, unit_lse)


def _launch(
    call: AttentionCall, route: Route, schedule: Schedule | None, prepared: _Prepared, is_kept: bool, stream: int
) -> tuple[Launch | None, Launch | None]:
    """Launch the lists and decode; returns the launches for decode and early decode."""
    memory, granules, units, plan, unit_lse = prepared
    ids = call.block_table if granules is None else granules.table

    def parameters(wait_first: bool) -> bytes:
        packed = pack_attention(call, route, schedule, memory, ids, plan, unit_lse, wait_first)
        return packed if units is None else packed + pack_tiers(call, units)

    decode = early = None
    if granules is not None:
        granules.launch.run(stream)
    if units is not None:
        units.launch.run(stream)
    if schedule is not None:
        spec = schedule.spec if unit_lse.unit_lse == 0 else schedule.spec.with_masses()
        kernel = load_spec(spec, call.q.device)
        decode = Launch(kernel, schedule.grid, spec.threads, spec.smem_nbytes, parameters(True))
        if is_kept:
            early = Launch(kernel, schedule.grid, spec.threads, spec.smem_nbytes, parameters(False))
        if plan is not None:
            plan.launch.run(stream)
        decode.run(stream)
    return decode, early


def _most_decoded(call: AttentionCall) -> int:
    """Query tokens of a row, or of each row of a batch, that the decode kernel takes though the prompt kernel could."""
    _, num_q_heads, head_dim = call.q.shape
    group_size = num_q_heads // call.k_cache.shape[1]
    if call.tiers is not None:
        return specs.queries_beside_prompts(group_size)
    return specs.decode_queries(head_dim, group_size)


def _attend_both(
    call: AttentionCall, hints: Hints, fewest: int, maps: Maps, words: tuple[int, ...], stream: int
) -> Attention | None:
    """Launch the decode and the prompt kernel.

    Their plans choose on the device: with tiers for each row, because decode reads codes much faster. Without tiers one
    kernel takes all, by the most query tokens of a row, as `attend` chooses where the host knows them; the other finds
    nothing to do and ends at once.

    Args:
        fewest: query tokens of a row, as far as the host knows.
        words: the maps of the call's arrays.
    """
    most = _most_decoded(call)
    route = Route(fewest, most, most)
    schedule = choose_schedule(call, route, hints)
    step = lay_out_step(call, route, schedule, hints.max_seq_len)
    sizes = prompt.sizes_of_call(call)
    work_at = step.nbytes
    step = step._replace(nbytes=work_at + sizes.list_nbytes, items=sizes)
    memory = take_memory(call, schedule, step, hints.kept, stream)
    work = memory.step + work_at
    scratch = workspace(call.q.device, stream, Sizes(sizes.partials_nbytes, sizes.counters_nbytes, 0))
    by_row = call.tiers is not None
    prepared = _prepare(call, route, schedule, step, memory, not by_row)
    # before decode, so that the prompt kernel follows it and may begin while it ends
    prompt.plan_launch(call, sizes, work, most_decoded=most, by_row=by_row).run(stream)
    decode, early = _launch(call, route, schedule, prepared, hints.kept is not None, stream)
    lists = prepared.units or prepared.granules
    ids = call.block_table if lists is None else lists.table
    launch = prompt.attention_launch(call, sizes, maps, words, ids, work, scratch, list_is_old=True)
    launch.run(stream, dependent=True)
    if memory.kept is None:
        return None
    prompts = PromptAttention(call.q.device, launch, maps, memory.kept)
    return Attention(call.q.device, decode, early, None, memory.kept, prompts)


def _clear(block_mass: Operand, stream: int) -> None:
    """Set all masses to 0, because no CTA takes rows without queries."""
    import cupy

    cupy.cuda.runtime.memsetAsync(block_mass.address, 0, 4 * math.prod(block_mass.shape), stream)


def attend_prepared(
    prepared: Prepared, q: int, k_cache: int, v_cache: int, out: int, *, warm: int = 0, cold: int = 0,
    block_mass: int = 0, stream: int = 0, overlaps: bool = False,
) -> None:  # fmt: skip
    """Attend once more where only the addresses of these arrays differ, not their shapes, strides or dtypes.

    The launches of ``prepared`` are changed for the call: one thread at a time.

    Args:
        prepared: what `attend` returned, for the same table and lengths.
        warm: 0 where that call had no such tier; ``cold`` too, and ``block_mass`` where it wanted no masses.
        overlaps: let the kernel begin while the one before it still runs. Right where the kernel before wrote nothing
            of the caches but the tokens of the present queries, and nothing of the tables: after `append`.
    """
    if isinstance(prepared, PromptAttention):
        prompt.attend_prepared(prepared, q, k_cache, v_cache, out, warm=warm, cold=cold, stream=stream)
        return
    if isinstance(prepared, SharedAttention):
        shared.attend_prepared(prepared, q, k_cache, v_cache, out, warm=warm, cold=cold, stream=stream)
        return
    decode = (prepared.decode_early or prepared.decode) if overlaps else prepared.decode
    if decode is not None:
        decode.set_addresses(PARAMS.word("q"), q, out)
        decode.set_addresses(PARAMS.word("k_cache"), k_cache, v_cache)
        if warm or cold:
            decode.set_addresses(TIERED_PARAMS.word("warm"), warm, cold)
        if block_mass:
            decode.set_addresses(PARAMS.word("masses"), block_mass)
        decode.run(stream, dependent=overlaps)
    if prepared.prefill is not None:
        prefill.attend_prepared(prepared.prefill, q, k_cache, v_cache, out, stream=stream, dependent=decode is not None)
    if prepared.prompts is not None:
        prompt.attend_prepared(
            prepared.prompts, q, k_cache, v_cache, out, warm=warm, cold=cold, stream=stream, dependent=True
        )
