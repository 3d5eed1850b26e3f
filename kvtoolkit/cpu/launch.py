"""Run the attention kernel on host arrays: fill in the problem, plan it, share the items among threads."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kvtoolkit.arrays.call import NO_HINTS, AttentionCall, Hints, QuantizedTiers
from kvtoolkit.arrays.host import Operand, address_of
from kvtoolkit.arrays.types import DTYPE_CODES
from kvtoolkit.cpu import kernel, plan, threads
from kvtoolkit.cpu import problem as fields
from kvtoolkit.findings import raise_finding

_WORK_PER_THREAD = 2_500_000  # multiply-adds: some 100 us, several times what waking a thread takes
_local = threading.local()
_NO_TIERS = (0,) * 8


class Attention(NamedTuple):
    """A call of `attend` made ready for other layers: fields and plan as `kernel` wants them."""

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
    call: AttentionCall, hints: Hints = NO_HINTS, *, check: bool = False, before: Callable[[], None] | None = None
) -> Attention:
    """Attend; see `kvtoolkit.arrays.call.Backend.attend`.

    Shapes, strides and dtypes are *not* checked; a wrong one reads or writes foreign memory.

    Args:
        call: arrays in host memory.
        hints: ignored.
        check: validate all lengths and table entries that will be read, before anything is written.
        before: called after all checks and before anything is read or written.

    Returns:
        What `attend_prepared` takes.

    Raises:
        ShapeError: with ``check``, a length or an entry is out of range, or in a tier that is not there.
        UnsupportedError: with ``check``, an entry is in a tier other than hot where there are no ``tiers``.

    May be called from several threads at once. The result does not depend on the number of threads.
    """
    problem = _make_problem(call)
    batch, max_entries = call.block_table.shape
    items = np.empty((batch + 1, plan.PLAN_COLUMNS), np.int64)
    code, row, value = plan.plan_items(problem, items, int(check))
    if code:
        block_size, num_blocks = problem[fields.BLOCK_SIZE], problem[fields.NUM_BLOCKS]
        num_tokens = call.q.shape[0]
        raise_finding(
            code, row, value, num_tokens=num_tokens, block_size=block_size, num_blocks=num_blocks,
            max_entries=max_entries,
        )  # fmt: skip
    _, num_q_heads, head_dim = call.q.shape
    num_items, num_partials, num_tile_lses, work = items[-1].tolist()[: plan.WORK + 1]
    num_floats = int(num_partials * fields.partial_floats(head_dim)) if num_partials else 0
    prepared = Attention(
        problem, items, float(call.scale), float(call.softcap), num_q_heads // call.k_cache.shape[1], head_dim,
        num_items, num_floats, num_tile_lses, work,
    )  # fmt: skip
    if before is not None:
        before()
    _run(problem, prepared)
    return prepared


def _make_problem(call: AttentionCall) -> Any:
    """The fields of `kvtoolkit.cpu.problem`, in their order."""
    (
        q, keys, values, table, starts, lengths, bounds, out, lse, sinks, slopes, tiers, masses,
        _, _, left, right, num_splits,
    ) = call  # fmt: skip
    num_tokens, num_q_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_size, _ = keys.shape
    batch, max_entries = table.shape
    return np.array(
        (
            q.address, *q.strides[:2],
            out.address, *out.strides[:2],
            0 if lse is None else lse.address,
            keys.address, *keys.strides[:3],
            values.address, *values.strides[:3],
            table.address, table.strides[0],
            *((0, 0) if starts is None else (starts.address, starts.strides[0])),
            lengths.address,
            0 if bounds is None else bounds.address,
            *((0, 0) if slopes is None else _slope_fields(slopes)),
            0 if sinks is None else sinks.address,
            0,
            DTYPE_CODES[keys.dtype], batch, num_tokens, num_kv_heads, num_q_heads // num_kv_heads, head_dim,
            block_size, num_blocks, max_entries,
            left, right, num_splits,
            *(_NO_TIERS if tiers is None else _tier_fields(tiers)),
            *((0, 0) if masses is None else (masses.address, masses.shape[1])),
            0,
        ),
        dtype=np.int64,
    )  # fmt: skip


def _slope_fields(slopes: Operand) -> tuple[int, int]:
    """Address of the slopes and the stride from row to row, 0 where all rows have the same."""
    return slopes.address, slopes.strides[0] if len(slopes.shape) == 2 else 0


def _tier_fields(tiers: QuantizedTiers) -> tuple[int, ...]:
    (warm, num_warm), (cold, num_cold) = (
        (0, 0) if one is None else (one.address, one.shape[0]) for one in (tiers.warm, tiers.cold)
    )
    return 1, *tiers.first_granules, warm, cold, num_warm, num_cold


def attend_prepared(
    prepared: Attention, q: int, k_cache: int, v_cache: int, out: int, *, warm: int = 0, cold: int = 0,
    block_mass: int = 0, overlaps: bool = False, from_torch: Any = None,
) -> None:  # fmt: skip
    """Attend once more where only the addresses of these arrays differ, not their shapes, strides or dtypes.

    Args:
        prepared: what `attend` returned for the same table and lengths, without ``lse``: the layers of a step have
            these in common. The arrays that `attend` was given must still be alive.
        warm: 0 where it had no such tier; ``cold`` too.
        block_mass: 0 where it had none or where it is not wanted now.
        overlaps: ignored; ``from_torch`` too.
    """
    problem = prepared.problem.copy()  # a thread that woke late may still look at the one before
    problem[fields.Q] = q
    problem[fields.KEYS] = k_cache
    problem[fields.VALUES] = v_cache
    problem[fields.OUT] = out
    problem[fields.WARM] = warm
    problem[fields.COLD] = cold
    problem[fields.MASSES] = block_mass
    _run(problem, prepared)


def _run(problem: Any, prepared: Attention) -> None:
    _, items, scale, softcap, group_size, head_dim, num_items, num_floats, num_tile_lses, work = prepared
    if num_floats:
        partials = np.empty(num_floats, np.float32)
        problem[fields.PARTIALS] = address_of(partials)
    own_lse = False
    if problem[fields.MASSES]:
        tile_lses = np.full(num_tile_lses, -np.inf, np.float32)  # no query sees a tile that no item visits
        problem[fields.TILE_LSES] = address_of(tile_lses)
        own_lse = problem[fields.LSE] == 0
        if own_lse:  # the masses are shares of it
            lse = np.empty(problem[fields.NUM_TOKENS] * problem[fields.NUM_KV_HEADS] * group_size, np.float32)
            problem[fields.LSE] = address_of(lse)
    counters = np.zeros(2, np.uint64)
    if work > _WORK_PER_THREAD:
        helpers = min(threads.num_threads() - 1, num_items - 1, work // _WORK_PER_THREAD)
        if helpers > 0:

            def help_out() -> None:
                kernel.run_items(problem, items, scale, softcap, _scratch(group_size, head_dim), counters, 0)

            threads.run(help_out, helpers)
    kernel.run_items(problem, items, scale, softcap, _scratch(group_size, head_dim), counters, 1)
    if own_lse:
        problem[fields.LSE] = 0


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
