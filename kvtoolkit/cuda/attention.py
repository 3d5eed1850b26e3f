"""Launch the attention kernels on device arrays that are known to be right."""

import functools
import math
from typing import Any, NamedTuple

from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.expand import list_width, make_granules
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.masses import Notes, notes_nbytes, notes_shape, place_notes
from kvtoolkit.cuda.plan import MAX_RANGES, make_plan, most_late, plan_nbytes
from kvtoolkit.cuda.units import make_units, units_nbytes
from kvtoolkit.cuda.workspace import Sizes, workspace
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.formats.tier_caches import QuantizedTiers
from kvtoolkit.runtime import is_capturing, smem_limit
from kvtoolkit.runtime.kernels import arch_of, num_sms
from kvtoolkit.runtime.streams import on_stream
from kvtoolkit.runtime.structs import ParameterStruct

MAX_DECODE_QUERIES = 8  # as in kvt/attention/rows.cuh
MAX_SPLITS = 128
_UNBOUNDED = 1 << 30  # a window as wide as any sequence; sums with positions stay in 32 bits
_MAX_ROW_BLOCKS = 65535  # CTAs along the second axis of a grid
_MAX_STEP_NBYTES = 2 << 30  # it is kept for ever
_LOG2E = 1.4426950408889634
_params = ParameterStruct("attention/decode.cu", "kvt_decode")
_tiered_params = ParameterStruct("attention/tiered.cu", "kvt_tiered", since="warm")  # what TieredParams adds


class Attention(NamedTuple):
    """A call of `attend` made ready for other layers."""

    decode: Launch | None
    """Begins with a wait for the kernel before it."""
    decode_early: Launch | None
    """May read before the kernel in front of it has ended; None if `attend` was not told to keep what it plans."""
    prefill: Launch | None
    memory: Any
    """What the launches read and nobody else keeps alive."""


class _Schedule(NamedTuple):
    """How the decode kernel shares its work among CTAs."""

    spec: specs.Spec
    grid: tuple[int, ...]
    splits: int
    is_fixed: bool
    row_blocks: int
    num_ranges: int
    """0 = even, not planned."""
    num_late: int
    """Of the ranges: those that begin when others have ended."""
    num_even: int
    """As many ranges, or fewer, so that they cut sequences of equal lengths evenly or not at all."""
    partials_nbytes: int
    counters_nbytes: int


def attend(
    q: Operand, k_cache: Operand, v_cache: Operand, block_table: Operand, block_starts: Operand | None,
    seq_lens: Operand, *, out: Operand, lse: Operand | None = None, cu_seqlens_q: Operand | None = None,
    softmax_scale: float | None = None, causal: bool = True, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, sinks: Operand | None = None, alibi_slopes: Operand | None = None, num_splits: int = 0,
    layout: str = "HND", query_counts: tuple[int, int] | None = None, max_seq_len: int | None = None,
    tiers: QuantizedTiers | None = None, block_mass: Operand | None = None, kept: dict[Any, Any] | None = None,
    stream: int = 0,
) -> Attention | None:  # fmt: skip
    """Attend, writing to ``out`` and ``lse``, asynchronously on ``stream``.

    The arguments are those of `kvtoolkit.cpu.attend`, on the device. Rows of ``q``, ``out`` and the caches begin at
    multiples of 16 bytes.

    Args:
        tiers: the quantized tiers, where entries may name them; ``block_starts`` is given then.
        block_mass: ``[batch, max_tiles, num_kv_heads]`` float32 to write the masses to, contiguous.
        query_counts: fewest and most query tokens of the rows, where the host knows them: it spares a launch.
        max_seq_len: what no row is longer than, now or in a replay, where the host knows: it spares memory.
        kept: where the plan and the list of granules of a step are kept for its other layers. Without it, and where a
            capture forbids to take memory, they lie in scratch memory, until the next call on the stream.
        stream: a CUDA stream's address.

    Returns:
        What `attend_alike` takes; None where every layer must plan anew.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    head_axis, slot_axis = (1, 2) if layout == "HND" else (2, 1)
    num_kv_heads, block_size = k_cache.shape[head_axis], k_cache.shape[slot_axis]
    batch, group_size = block_table.shape[0], num_q_heads // num_kv_heads
    device = q.device
    if num_tokens == 0:
        if block_mass is not None:
            _clear(block_mass, stream)
        return Attention(None, None, None, None)
    fewest, most = (1, 1) if cu_seqlens_q is None else query_counts or (0, num_tokens)
    if batch == 1 and cu_seqlens_q is not None and query_counts is None:
        fewest = most = num_tokens
    decodes, prefills = fewest <= MAX_DECODE_QUERIES, most > MAX_DECODE_QUERIES
    if tiers is not None or block_mass is not None:
        decodes, prefills = True, False
    left, right = (min(side, _UNBOUNDED) for side in window_size)
    if causal:
        right = 0
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    block_shift = block_size.bit_length() - 1 if block_size & (block_size - 1) == 0 else -1

    ids_per_step = 1 if block_size % 16 == 0 else 2 if block_size == 8 else 0

    schedule = None
    if decodes:
        rows = group_size * (most if not prefills else min(most, MAX_DECODE_QUERIES))
        longest = max_seq_len or block_table.shape[1] * (block_size if block_starts is None else 64)
        schedule = _schedule(
            q.shape, q.dtype, device, num_kv_heads, batch, cu_seqlens_q is not None, rows, num_splits,
            tiers is not None, most_late(batch, longest),
        )  # fmt: skip
    num_ranges = schedule.num_ranges if schedule else 0
    width = list_width(block_table.shape[1], max_seq_len)
    list_nbytes = 0
    if tiers is not None:
        list_nbytes = units_nbytes(batch, width)
    elif block_starts is not None:
        list_nbytes = 4 * batch * width
    plan_at = -(-list_nbytes // 256) * 256
    notes_at = plan_at + (-(-plan_nbytes(batch, num_ranges) // 256) * 256 if num_ranges else 0)
    step_nbytes, shape = notes_at, None
    if block_mass is not None and schedule is not None:
        macros = dict(schedule.spec.defines)
        stride = macros["KVT_WARPS"] * macros.get("KVT_CLUSTER", 1)
        shape = notes_shape(batch, num_kv_heads, block_mass.shape[1], stride, group_size * most)
        step_nbytes += notes_nbytes(shape, num_tokens * num_q_heads)
        if step_nbytes > _MAX_STEP_NBYTES:
            raise UnsupportedError(
                f"block_mass: {batch} rows of up to {most} new tokens need {step_nbytes} bytes of scratch memory, "
                f"expected at most {_MAX_STEP_NBYTES}; ask with fewer new tokens"
            )
    partials, counters, step_at = schedule.partials_nbytes if schedule else 0, 0, 0
    memory = None
    if kept is not None and step_nbytes:
        key = (width, num_ranges, left, right, shape, step_nbytes)
        memory = _keep(kept, key, step_nbytes, stream)
    mass_counters = 0
    if partials or shape is not None or (step_nbytes and memory is None):
        counters = schedule.counters_nbytes if schedule else 0
        mass_counters = 4 * batch * num_kv_heads if shape is not None else 0
        scratch = workspace(
            device, stream, Sizes(partials, counters + mass_counters, 0 if memory is not None else step_nbytes)
        )
        mass_counters = scratch.counters + counters
        partials, counters, step_at = scratch.partials, scratch.counters, scratch.step
    if memory is not None:
        step_at = memory.data.ptr
    granules = units = plan = None
    notes = Notes(lse.address if lse else 0, 0, 0)
    if tiers is not None:
        assert block_starts is not None
        units = make_units(
            step_at, block_table, block_starts, seq_lens, cu_seqlens_q, width, left, right, tiers.first_granules
        )
    elif block_starts is not None:
        granules = make_granules(step_at, block_table, block_starts, seq_lens, width)
    ids = block_table if granules is None else granules.table
    if schedule is not None and num_ranges:
        plan_lens, window = (units.plan_lens, (-1, -1)) if units else (seq_lens, (left, right))
        late, even = schedule.num_late, schedule.num_even
        plan = make_plan(
            step_at + plan_at, plan_lens, cu_seqlens_q, num_ranges, late, even, tiers is not None, *window, prefills
        )
    if shape is not None:
        notes = place_notes(step_at + notes_at, shape, notes.lse)
        if fewest == 0 and block_mass is not None:
            _clear(block_mass, stream)

    def parameters(wait_first: bool) -> bytes:
        packed = _params.pack(
            q.address, out.address, notes.lse, k_cache.address, v_cache.address,
            ids.address, seq_lens.address, cu_seqlens_q.address if cu_seqlens_q else 0,
            alibi_slopes.address if alibi_slopes else 0, sinks.address if sinks else 0,
            partials, counters, mass_counters, plan.ranges if plan else 0, plan.sequences if plan else 0,
            block_mass.address if block_mass else 0, notes.unit_lse,
            *q.strides[:2], *out.strides[:2],
            k_cache.strides[0], k_cache.strides[head_axis], k_cache.strides[slot_axis],
            v_cache.strides[0], v_cache.strides[head_axis], v_cache.strides[slot_axis],
            ids.strides[0],
            batch, num_tokens, num_kv_heads, group_size, block_size, ids.shape[1], block_shift, ids_per_step,
            left, right,
            schedule.splits if schedule else 1, int(schedule is not None and schedule.is_fixed),
            schedule.row_blocks if schedule else 1, int(prefills),
            block_mass.shape[1] if block_mass else 0, notes.rows, int(wait_first),
            scale * _LOG2E, scale / softcap if softcap else 0.0, softcap * _LOG2E,
        )  # fmt: skip
        if tiers is None:
            return packed
        assert units is not None
        addresses = (tier.address if tier else 0 for tier in (tiers.warm, tiers.cold))
        return packed + _tiered_params.pack(*addresses, units.address, units.counts, units.tile_units, units.max_units)

    decode = early = prefill = None
    if granules is not None:
        granules.launch.run(stream)
    if units is not None:
        units.launch.run(stream)
    if schedule is not None:
        spec = schedule.spec if shape is None else schedule.spec.with_masses()
        kernel = load_spec(spec, device)
        decode = Launch(kernel, schedule.grid, spec.threads, spec.smem_nbytes, parameters(True))
        if kept is not None:
            early = Launch(kernel, schedule.grid, spec.threads, spec.smem_nbytes, parameters(False))
        if plan is not None:
            plan.launch.run(stream)
        decode.run(stream)
    if prefills:
        spec = specs.prefill(head_dim, k_cache.dtype)
        grid = (num_tokens * group_size // spec.rows + batch, num_kv_heads)
        prefill = Launch(load_spec(spec, device), grid, spec.threads, spec.smem_nbytes, parameters(True))
        prefill.run(stream)
    if step_nbytes and memory is None:
        return None
    return Attention(decode, early, prefill, memory)


def _clear(block_mass: Operand, stream: int) -> None:
    """Set all masses to 0, for rows without queries, which no CTA takes."""
    import cupy

    cupy.cuda.runtime.memsetAsync(block_mass.address, 0, 4 * math.prod(block_mass.shape), stream)


def _keep(kept: dict[Any, Any], key: Any, nbytes: int, stream: int) -> Any:
    """Memory of a step for its plan and list; None if there is none yet and a capture forbids to take some."""
    import cupy

    if key not in kept:
        if is_capturing(stream):
            return None
        with on_stream(stream):  # it will be handed out again in the order of this stream
            kept[key] = cupy.empty(nbytes, "uint8")
    return kept[key]


@functools.lru_cache(4096)
def _schedule(
    shape: tuple[int, int, int], dtype: str, device: int, num_kv_heads: int, batch: int, has_bounds: bool,
    most_rows: int, num_splits: int, is_tiered: bool, most_late: int,
) -> _Schedule:  # fmt: skip
    """Choose a schedule, by what the host knows: never by what lies in the tables, so that a graph stays right."""
    num_tokens, num_q_heads, head_dim = shape
    group_size = num_q_heads // num_kv_heads
    limit = smem_limit(device)
    if is_tiered:
        pairs = batch * num_kv_heads * -(-most_rows // specs.TIERED_ROWS)
        # whether there is a whole sequence for nearly every CTA of two to an SM
        spec = specs.tiered(head_dim, dtype, most_rows, limit, shares_sm=10 * pairs >= 18 * num_sms(device))
    else:
        spec = specs.decode(head_dim, dtype, most_rows, limit)
    rows = spec.rows
    row_blocks = -(-most_rows // rows)
    partial = rows * (head_dim + 2) * 4
    if num_splits == 0 and (batch > 1 or is_tiered) and batch <= specs.MAX_PLANNED:
        if row_blocks > _MAX_ROW_BLOCKS:
            raise UnsupportedError(
                f"q: expected at most {_MAX_ROW_BLOCKS * rows} query rows of a kv head (new tokens times heads of its "
                f"group), got {most_rows}; feed the prompt in chunks"
            )
        heads = num_kv_heads * row_blocks
        ranges = max(1, spec.per_sm * num_sms(device) // heads)
        may_be_late = spec.per_sm > 1 and 1 < ranges <= MAX_RANGES // 2
        late = ranges if may_be_late and ranges <= most_late else 0
        even = whole_sequences(ranges, batch) if is_tiered else ranges
        # a single range cuts nothing; others as if with late ones, so that a call on short sequences can be captured
        slots = 2 * ranges * (1 + may_be_late) if ranges > 1 else 0
        ranges += late
        grid = (num_kv_heads, row_blocks, ranges)
        partials = slots * heads * partial
        return _Schedule(spec, grid, 1, False, row_blocks, ranges, late, even, partials, 4 * batch * heads)
    # every sequence in even splits, and a block of rows found by its number
    num_blocks = num_tokens * group_size // rows + batch if has_bounds else batch * -(-group_size // rows)
    cluster, splits = 1, min(num_splits, MAX_SPLITS)
    if num_splits == 0:
        alone = batch == 1 and not is_tiered
        cluster = specs.cluster_size(arch_of(device), row_blocks * num_kv_heads) if alone else 1
        splits = cluster
        if cluster == 1:
            splits = max(1, min(MAX_SPLITS, spec.per_sm * num_sms(device) // (batch * row_blocks * num_kv_heads)))
    if is_tiered:
        spec = specs.tiered(head_dim, dtype, most_rows, limit, planned=False)
    else:
        spec = specs.decode(head_dim, dtype, most_rows, limit, planned=False, cluster=cluster)
    groups = num_blocks * num_kv_heads
    nbytes = groups * splits * partial if cluster == 1 and splits > 1 else 0
    grid = (groups, splits, 1) if cluster == 1 else (cluster, num_kv_heads, num_blocks)
    return _Schedule(spec, grid, splits, num_splits > 0, row_blocks, 0, 0, 0, nbytes, 4 * groups)


def whole_sequences(ranges: int, batch: int) -> int:
    """``ranges``, or up to a tenth fewer, if so many cut ``batch`` sequences of equal lengths evenly or not at all."""
    good = (count for count in range(ranges, 0, -1) if count % batch == 0 or batch % count == 0)
    best = next(good)
    return best if 10 * best >= 9 * ranges else ranges


def attend_alike(
    prepared: Attention, q: int, k_cache: int, v_cache: int, out: int, *, warm: int = 0, cold: int = 0,
    block_mass: int = 0, stream: int = 0, dependent: bool = False,
) -> None:  # fmt: skip
    """Attend once more where only the addresses of these arrays differ; see `kvtoolkit.cpu.attend_alike`.

    The launches of ``prepared`` are changed for the call: one thread at a time.

    Args:
        warm: where the call made ready had quantized tiers; ``cold`` alike, ``block_mass`` where it wanted masses.
        dependent: let the kernel begin while the one before it still runs. Right where the kernel before wrote nothing
            of the caches but the tokens of the present queries, and nothing of the tables: after `append`.
    """
    decode = (prepared.decode_early or prepared.decode) if dependent else prepared.decode
    for launch, is_early in ((decode, dependent), (prepared.prefill, False)):
        if launch is not None:
            launch.set_addresses(_params.word("q"), q, out)
            launch.set_addresses(_params.word("k_cache"), k_cache, v_cache)
            if warm or cold:
                launch.set_addresses(_tiered_params.word("warm"), warm, cold)
            if block_mass:
                launch.set_addresses(_params.word("masses"), block_mass)
            launch.run(stream, dependent=is_early)
