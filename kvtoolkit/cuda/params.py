"""The parameters of the attention kernels, packed as ``AttentionParams`` and ``TieredParams`` have them."""

from kvtoolkit.arrays.call import AttentionCall
from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda.masses import UnitLse
from kvtoolkit.cuda.memory import Memory
from kvtoolkit.cuda.plan import Plan
from kvtoolkit.cuda.schedule import Route, Schedule
from kvtoolkit.cuda.units import Units
from kvtoolkit.runtime.structs import ParameterStruct

LOG2E = 1.4426950408889634
UNBOUNDED = 1 << 30
"""A window as wide as any sequence; sums with positions stay in 32 bits."""

PARAMS = ParameterStruct("attention/decode.cu", "kvt_decode")
TIERED_PARAMS = ParameterStruct("attention/tiered.cu", "kvt_tiered", since="warm")
"""What TieredParams adds."""


def pack_attention(
    call: AttentionCall, route: Route, schedule: Schedule | None, memory: Memory, ids: Operand, plan: Plan | None,
    unit_lse: UnitLse, wait_first: bool,
) -> bytes:  # fmt: skip
    """``AttentionParams`` of a call.

    Args:
        ids: ``[batch, width]`` int32 block ids: the block table, or the list of granules that was made from it.
        wait_first: whether the kernel waits for the one before it before it reads anything.
    """
    q, keys, values, out, bounds = call.q, call.k_cache, call.v_cache, call.out, call.cu_seqlens_q
    slopes, sinks, masses, scale, softcap = call.alibi_slopes, call.sinks, call.block_mass, call.scale, call.softcap
    num_tokens, num_q_heads, _ = q.shape
    _, num_kv_heads, block_size, _ = keys.shape
    block_shift = block_size.bit_length() - 1 if block_size & (block_size - 1) == 0 else -1
    ids_per_step = 1 if block_size % 16 == 0 else 2 if block_size == 8 else 0
    return PARAMS.pack(
        q.address, out.address, unit_lse.lse, keys.address, values.address,
        ids.address, call.seq_lens.address, bounds.address if bounds else 0,
        slopes.address if slopes else 0, sinks.address if sinks else 0,
        memory.partials, memory.counters, memory.group_counters, memory.mass_counters,
        plan.ranges if plan else 0, plan.sequences if plan else 0,
        masses.address if masses else 0, unit_lse.unit_lse,
        *q.strides[:2], *out.strides[:2], *keys.strides[:3], *values.strides[:3], ids.strides[0],
        call.block_table.shape[0], num_tokens, num_kv_heads, num_q_heads // num_kv_heads, block_size, ids.shape[1],
        block_shift, ids_per_step,
        min(call.left, UNBOUNDED), min(call.right, UNBOUNDED),
        schedule.splits if schedule else 1, int(schedule is not None and schedule.is_fixed),
        schedule.row_blocks if schedule else 1, route.most_decoded,
        masses.shape[1] if masses else 0, unit_lse.rows, int(wait_first),
        scale * LOG2E, scale / softcap if softcap else 0.0, softcap * LOG2E,
    )  # fmt: skip


def pack_tiers(call: AttentionCall, units: Units) -> bytes:
    """What ``TieredParams`` adds to `pack_attention`."""
    assert call.tiers is not None
    warm, cold = (tier.address if tier else 0 for tier in (call.tiers.warm, call.tiers.cold))
    return TIERED_PARAMS.pack(warm, cold, units.address, units.counts, units.tile_units, units.max_units)
