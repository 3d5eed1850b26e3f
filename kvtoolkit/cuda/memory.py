"""The memory of an attention call on a device: where its lists, its plan and its partial results are."""

from typing import Any, NamedTuple

from kvtoolkit.arrays.call import AttentionCall
from kvtoolkit.cuda.expand import list_width
from kvtoolkit.cuda.masses import UnitLseShape, unit_lse_nbytes, unit_lse_shape
from kvtoolkit.cuda.plan import plan_nbytes
from kvtoolkit.cuda.schedule import Route, Schedule
from kvtoolkit.cuda.units import units_nbytes
from kvtoolkit.cuda.workspace import Sizes, workspace
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime import is_capturing
from kvtoolkit.runtime.streams import on_stream

_ALIGNMENT = 256  # of each part of the step's memory
_MAX_STEP_NBYTES = 2 << 30  # scratch memory is never given back


class StepLayout(NamedTuple):
    """What the layers of a step can share: a list of granules or units, the plan, the units' log-sum-exps.

    The list is at the beginning; offsets are in bytes.
    """

    width: int
    """Granules of a row of the list."""
    plan_at: int
    unit_lse_at: int
    unit_lse: UnitLseShape | None
    """None where no masses are wanted."""
    nbytes: int
    items: Any = None
    """What the list of items of work is made for besides the rows; that list comes after everything else."""


class Memory(NamedTuple):
    """Addresses of the memory of a call; 0 where it needs none."""

    partials: int
    """Results of pieces of sequences."""
    counters: int
    """uint32 of each block of rows and kv head, 0 between kernels."""
    group_counters: int
    """uint32 of each partial result, 0 between kernels."""
    mass_counters: int
    """uint32 of each row and kv head, 0 between kernels."""
    step: int
    """A `StepLayout`."""
    kept: Any
    """What the step's memory belongs to; None if it is scratch memory, until the next call on the stream."""


def lay_out_step(call: AttentionCall, route: Route, schedule: Schedule | None, max_seq_len: int | None) -> StepLayout:
    """The parts of the step's memory that a call needs."""
    batch, max_entries = call.block_table.shape
    width = list_width(max_entries, max_seq_len)
    list_nbytes = 0
    if call.tiers is not None:
        list_nbytes = units_nbytes(batch, width)
    elif call.block_starts is not None:
        list_nbytes = 4 * batch * width
    plan_at = unit_lse_at = aligned(list_nbytes)
    if schedule is not None and schedule.num_ranges:
        unit_lse_at += aligned(plan_nbytes(batch, schedule.num_ranges))
    if call.block_mass is None or schedule is None:
        return StepLayout(width, plan_at, unit_lse_at, None, unit_lse_at)
    num_tokens, num_q_heads, _ = call.q.shape
    num_kv_heads = call.k_cache.shape[1]
    macros = dict(schedule.spec.defines)
    stride = macros["KVT_WARPS"] * macros.get("KVT_CLUSTER", 1)
    rows = num_q_heads // num_kv_heads * route.most
    shape = unit_lse_shape(batch, num_kv_heads, call.block_mass.shape[1], stride, rows)
    nbytes = unit_lse_at + unit_lse_nbytes(shape, num_tokens * num_q_heads)
    if nbytes > _MAX_STEP_NBYTES:
        raise UnsupportedError(
            f"block_mass: {batch} rows of up to {route.most} new tokens need {nbytes} bytes of scratch memory, "
            f"expected at most {_MAX_STEP_NBYTES}; ask with fewer new tokens"
        )
    return StepLayout(width, plan_at, unit_lse_at, shape, nbytes)


def take_memory(
    call: AttentionCall, schedule: Schedule | None, step: StepLayout, kept: dict[Any, Any] | None, stream: int
) -> Memory:
    """The memory of a call; the step's part in ``kept`` if there is such, else in the scratch memory of the stream."""
    owner = None
    if kept is not None and step.nbytes:
        num_ranges = schedule.num_ranges if schedule else 0
        key = (step.width, num_ranges, call.left, call.right, step.unit_lse, step.nbytes, step.items)
        owner = keep(kept, key, step.nbytes, stream)
    partials_nbytes = schedule.partials_nbytes if schedule else 0
    scratch_step = step.nbytes if owner is None else 0
    if not (partials_nbytes or step.unit_lse is not None or scratch_step):
        return Memory(0, 0, 0, 0, 0 if owner is None else owner.data.ptr, owner)
    counters_nbytes, group_nbytes = (schedule.counters_nbytes, schedule.group_counters_nbytes) if schedule else (0, 0)
    mass_nbytes = 0 if step.unit_lse is None else 4 * call.block_table.shape[0] * call.k_cache.shape[1]
    all_counters = counters_nbytes + group_nbytes + mass_nbytes
    scratch = workspace(call.q.device, stream, Sizes(partials_nbytes, all_counters, scratch_step))
    step_at = scratch.step if owner is None else owner.data.ptr
    groups_at = scratch.counters + counters_nbytes
    return Memory(scratch.partials, scratch.counters, groups_at, groups_at + group_nbytes, step_at, owner)


def keep(kept: dict[Any, Any], key: Any, nbytes: int, stream: int) -> Any:
    """Memory of a step for its plan and list; None if there is none yet and a capture forbids taking some."""
    import cupy

    if key not in kept:
        if is_capturing(stream):
            return None
        with on_stream(stream):  # it will be handed out again in the order of this stream
            kept[key] = cupy.empty(nbytes, "uint8")
    return kept[key]


def aligned(nbytes: int) -> int:
    """A size that keeps what follows aligned."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
