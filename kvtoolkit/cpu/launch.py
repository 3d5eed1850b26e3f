"""Run the attention kernel on host arrays: fill in the problem, plan it, share the items among threads."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kvtoolkit.arrays.host import Operand, address_of, operand
from kvtoolkit.arrays.types import DTYPE_CODES
from kvtoolkit.cpu import kernel, threads
from kvtoolkit.findings import Finding, raise_finding
from kvtoolkit.formats.tier_caches import QuantizedTiers

_WORK_PER_THREAD = 2_500_000  # multiply-adds: some 100 us, several times what waking a thread takes
_local = threading.local()
_ABSENT = Operand(0, (0, 0), (0, 0), "", None)


class Attention(NamedTuple):
    """A call of `attend` made ready: fields and plan as `kernel` wants them."""

    problem: Any
    plan: Any
    scale: float
    softcap: float
    group_size: int
    head_dim: int
    num_items: int
    num_floats: int
    """Of partial results."""
    num_tile_lses: int
    """Tiles times queries: what a ``block_mass`` takes to compute."""
    work: int
    """Multiply-adds."""


def attend(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    block_starts: Any,
    seq_lens: Any,
    *,
    out: Any,
    lse: Any = None,
    cu_seqlens_q: Any = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    layout: str = "HND",
    dtype: str | None = None,
    tiers: QuantizedTiers | None = None,
    block_mass: Operand | None = None,
    check: bool = False,
    before: Callable[[], None] | None = None,
) -> Attention:
    """Attend, writing to ``out`` and ``lse``, with arguments that are known to be right.

    The calls of `kvtoolkit.attention.calls` come here after their checks; kvtoolkit's own cache, whose arrays cannot be
    wrong, comes directly. Shapes, strides and dtypes are *not* checked; a wrong one reads or writes foreign memory.

    Args:
        q: ``[num_tokens, num_q_heads, head_dim]``, last axis contiguous; ``out`` alike.
        k_cache: ``[num_granules, num_kv_heads, 8, head_dim]`` with ``block_starts``, else any block size in ``layout``;
            ``v_cache`` alike. Every array may also be an `Operand` made once by `kvtoolkit.cpu.operand`, which saves
            about a microsecond each.
        block_table: ``[batch, max_entries]`` int32 entries, or block ids where ``block_starts`` is None.
        block_starts: ``[batch, max_entries]`` int32, first logical granule of each entry, or None.
        seq_lens: ``[batch]`` int32, contiguous, the new tokens included; 0 = padding row.
        lse: ``[num_tokens, num_q_heads]`` float32, contiguous, or None.
        cu_seqlens_q: ``[batch + 1]`` int32, contiguous, or None where each row has one query.
        dtype: ``"bfloat16"`` if 16-bit integer arrays hold bfloat16.
        tiers: the quantized tiers that entries may lie in, or None where all are hot; with ``block_starts``.
        block_mass: ``[batch, max_tiles, num_kv_heads]`` float32, contiguous, no fewer tiles than the longest row has;
            written as in `kvtoolkit.tiered_attention`.
        alibi_slopes: ``[num_q_heads]`` or ``[batch, num_q_heads]`` float32, last axis contiguous, or None.
        check: look at all lengths and table entries that will be read, before anything is written.
        before: called after all checks and before anything is read or written.

    Returns:
        What `attend_alike` takes.

    Raises:
        ShapeError: with ``check``, a length or an entry is out of range, or in a tier that is not there.
        UnsupportedError: with ``check``, an entry lies in a tier other than hot where there are no ``tiers``.

    May be called from several threads at once. The result does not depend on the number of threads.
    """
    q = operand(q, "q", dtype)
    keys = operand(k_cache, "k_cache", dtype)
    values = operand(v_cache, "v_cache", dtype)
    out = operand(out, "out", dtype)
    table = operand(block_table, "block_table")
    starts = _ABSENT if block_starts is None else operand(block_starts, "block_starts")
    lengths = operand(seq_lens, "seq_lens")
    head_axis, slot_axis = (1, 2) if layout == "HND" else (2, 1)
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = keys.shape[head_axis]
    batch, max_entries = table.shape
    group_size = num_q_heads // num_kv_heads
    left, right = window_size
    if causal:
        right = 0
    q_strides, out_strides, k_strides, v_strides = q.strides, out.strides, keys.strides, values.strides
    # in the order of the names in `kernel`
    problem = np.array(
        (
            q.address, q_strides[0], q_strides[1],
            out.address, out_strides[0], out_strides[1],
            0 if lse is None else operand(lse, "lse").address,
            keys.address, k_strides[0], k_strides[head_axis], k_strides[slot_axis],
            values.address, v_strides[0], v_strides[head_axis], v_strides[slot_axis],
            table.address, table.strides[0],
            starts.address, starts.strides[0],
            lengths.address,
            0 if cu_seqlens_q is None else operand(cu_seqlens_q, "cu_seqlens_q").address,
            *_slope_fields(alibi_slopes),
            0 if sinks is None else operand(sinks, "sinks").address,
            0,
            DTYPE_CODES[keys.dtype], batch, num_tokens, num_kv_heads, group_size, head_dim,
            keys.shape[slot_axis], keys.shape[0], max_entries,
            left, right, num_splits,
            *_tier_fields(tiers),
            0 if block_mass is None else block_mass.address, 0 if block_mass is None else block_mass.shape[1],
            0,
        ),
        dtype=np.int64,
    )  # fmt: skip
    plan = np.empty((batch + 1, kernel.PLAN_COLUMNS), np.int64)
    code, row, value = kernel.plan_items(problem, plan, int(check))
    if code != Finding.OK:
        block_size, num_blocks, entries = problem[kernel.BLOCK_SIZE], problem[kernel.NUM_BLOCKS], max_entries
        raise_finding(
            code, row, value, num_tokens=num_tokens, block_size=block_size, num_blocks=num_blocks, max_entries=entries
        )
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    items, num_partials, num_tile_lses, work = plan[-1].tolist()[: kernel.WORK + 1]
    num_floats = num_partials * kernel.partial_floats(head_dim) if num_partials else 0
    prepared = Attention(
        problem, plan, float(scale), float(softcap), group_size, head_dim, items, int(num_floats), num_tile_lses, work
    )
    if before is not None:
        before()
    _run(problem, prepared)
    return prepared


def _slope_fields(alibi_slopes: Any) -> tuple[int, int]:
    """Address of the slopes and the stride from row to row, 0 where all rows have the same."""
    if alibi_slopes is None:
        return 0, 0
    slopes = operand(alibi_slopes, "alibi_slopes")
    return slopes.address, slopes.strides[0] if len(slopes.shape) == 2 else 0


def _tier_fields(tiers: QuantizedTiers | None) -> tuple[int, ...]:
    if tiers is None:
        return (0,) * 8
    warm, cold = tiers.warm or _ABSENT, tiers.cold or _ABSENT
    return 1, *tiers.first_granules, warm.address, cold.address, warm.shape[0], cold.shape[0]


def attend_alike(
    prepared: Attention, q: int, k_cache: int, v_cache: int, out: int, *, warm: int = 0, cold: int = 0,
    block_mass: int = 0,
) -> None:  # fmt: skip
    """Attend once more where only the addresses of these arrays differ, not their shapes, strides or dtypes.

    ``prepared`` is what `attend` returned for the same table and lengths, without ``lse``: that is what the layers of
    a step have in common. The arrays that `attend` was given must still be alive. ``warm`` and ``cold`` are 0 where it
    had no such tier; ``block_mass`` is 0 where it had none or where it is not wanted now.
    """
    problem = prepared.problem.copy()  # a thread that woke late may still look at the one before
    problem[kernel.Q] = q
    problem[kernel.KEYS] = k_cache
    problem[kernel.VALUES] = v_cache
    problem[kernel.OUT] = out
    problem[kernel.WARM] = warm
    problem[kernel.COLD] = cold
    problem[kernel.MASSES] = block_mass
    _run(problem, prepared)


def _run(problem: Any, prepared: Attention) -> None:
    _, plan, scale, softcap, group_size, head_dim, num_items, num_floats, num_tile_lses, work = prepared
    if num_floats:
        partials = np.empty(num_floats, np.float32)
        problem[kernel.PARTIALS] = address_of(partials)
    own_lse = False
    if problem[kernel.MASSES]:
        tile_lses = np.full(num_tile_lses, -np.inf, np.float32)  # no query sees a tile that no item comes to
        problem[kernel.TILE_LSES] = address_of(tile_lses)
        own_lse = problem[kernel.LSE] == 0
        if own_lse:  # the masses are shares of it
            lse = np.empty(problem[kernel.NUM_TOKENS] * problem[kernel.NUM_KV_HEADS] * group_size, np.float32)
            problem[kernel.LSE] = address_of(lse)
    counters = np.zeros(2, np.uint64)
    if work > _WORK_PER_THREAD:
        helpers = min(threads.num_threads() - 1, num_items - 1, work // _WORK_PER_THREAD)
        if helpers > 0:

            def help_out() -> None:
                kernel.run_items(problem, plan, scale, softcap, _scratch(group_size, head_dim), counters, 0)

            threads.run(help_out, helpers)
    kernel.run_items(problem, plan, scale, softcap, _scratch(group_size, head_dim), counters, 1)
    if own_lse:
        problem[kernel.LSE] = 0


def _scratch(group_size: int, head_dim: int) -> int:
    """Address of this thread's scratch, on a cache line; a thread keeps the largest it ever needed."""
    kept: dict[tuple[int, int], int] | None = getattr(_local, "addresses", None)
    if kept is not None and (address := kept.get((group_size, head_dim))) is not None:
        return address
    nbytes = int(kernel.scratch_bytes(group_size, head_dim)) + 64
    if kept is None or _local.buffer.nbytes < nbytes:
        _local.buffer = np.empty(nbytes, np.uint8)
        _local.addresses = {}
    address = int(_local.buffer.ctypes.data) + 63 & ~63
    _local.addresses[group_size, head_dim] = address
    return address
