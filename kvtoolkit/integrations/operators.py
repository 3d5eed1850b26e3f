"""kvtoolkit in compiled torch programs: its calls as operators, ``torch.ops.kvtoolkit``.

Inside ``torch.compile``, also with ``fullgraph=True``, `append`, the attention calls, `merge_states`, and `append` and
`attend` of a `Step` or of a `GraphRun`, become nodes of the graph; results are those of the same calls outside.
Everything else, such as `KVCache.begin_step`, stays outside: pass the step to the compiled function. The operators are
defined as soon as Dynamo is imported.

They return nothing and write to tensors that the graph has made: ``out`` and, where it is wanted, ``lse``. So a schema
says all that torch has to know of a call, which is what it writes to. A graph without a backward pass is expected.
"""

from typing import Any

from kvtoolkit.attention import calls, traced
from kvtoolkit.attention.arguments import check_layout
from kvtoolkit.attention.options import make_options
from kvtoolkit.attention.plan import AttentionPlan
from kvtoolkit.cache.graph import GraphRun
from kvtoolkit.cache.step import Step
from kvtoolkit.errors import ArgumentError
from kvtoolkit.formats.tier_caches import TierCaches
from kvtoolkit.handles import owner_of
from kvtoolkit.tracing import traced_as, when_dynamo_loads

_COMMON = "float? softmax_scale, int[]? window_size"
_OTHERS = "bool causal, float softcap, Tensor? sinks, Tensor? alibi_slopes, int num_splits, str? backend"
_ROWS = ", Tensor? cu_seqlens_q, SymInt? max_seqlen_q, Tensor? plan"

_library: Any = None  # operators are defined as long as it lives


def install() -> None:
    """Let compiled functions use the operators in place of the public calls."""
    for name in ("append", "merge_states", "paged_attention", "tiered_attention", "variable_block_attention"):
        traced_as(getattr(calls, name), getattr(traced, name))
    when_dynamo_loads(define)


def define() -> None:
    """Define the operators, once."""
    import torch

    global _library
    if _library is not None:
        return
    library = torch.library.Library("kvtoolkit", "DEF")
    # kernels take strided queries, but not every order of axes that a compiler may choose
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for name, (parameters, function) in _OPERATORS.items():
        library.define(f"{name}({parameters}) -> ()", tags=tags)
        for place in ("CPU", "CUDA"):
            library.impl(name, function, place)
        torch.library.register_fake(f"kvtoolkit::{name}", _make_nothing, lib=library)
    _library = library


def _make_nothing(*arguments: Any) -> None:
    """What an operator does to tensors without memory."""


def _append(key: Any, value: Any, k_cache: Any, v_cache: Any, slots: Any, layout: str, backend: Any) -> None:
    calls.append(key, value, k_cache, v_cache, slots, layout=layout, backend=backend)


def _merge_states(out: Any, lse: Any, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, backend: Any) -> None:
    made = calls.merge_states(out_a, lse_a, out_b, lse_b, backend=backend)
    out.copy_(made[0])
    lse.copy_(made[1])


def _step_append(arena: Any, step: Any, layer: int, key: Any, value: Any) -> None:
    owner = owner_of(step, "step", Step, GraphRun)
    own = owner._in_graphs[1][layer]
    if arena is own:
        owner.append(layer, key, value)
        return
    if arena.shape != own.shape or arena.dtype != own.dtype:
        raise ArgumentError(
            f"arena: expected that of the step, {tuple(own.shape)} {own.dtype}, got {tuple(arena.shape)} {arena.dtype}"
        )
    owner.append(layer, key, value)
    if arena.data_ptr() != own.data_ptr():
        arena.copy_(own)  # a copy that a compiler without in-place operators has made, and writes back afterwards


def _step_attend(out: Any, arena: Any, step: Any, layer: int, q: Any, scale: Any, window: Any) -> None:
    owner_of(step, "step", Step, GraphRun).attend(layer, q, softmax_scale=scale, window_size=_window(window), out=out)


def _step_attend_with_options(out: Any, lse: Any, arena: Any, step: Any, layer: int, q: Any, *options: Any) -> None:
    _store(
        lse,
        owner_of(step, "step", Step, GraphRun).attend(
            layer, q, out=out, return_lse=lse is not None, **_options(*options)
        ),
    )


def _paged_attention(
    out: Any, q: Any, k_cache: Any, v_cache: Any, table: Any, seq_lens: Any, layout: str, scale: Any,
    window: Any, bounds: Any = None, most: Any = None, plan: Any = None,
) -> None:  # fmt: skip
    check_layout(layout)
    options = make_options(
        (bounds, scale, True, _window(window), 0.0, None, None, out, False, 0, None, most, _plan(plan))
    )
    calls.attend(q, k_cache, v_cache, table, None, seq_lens, options, has_entries=False, layout=layout)


def _paged_attention_with_options(
    out: Any, lse: Any, q: Any, k_cache: Any, v_cache: Any, table: Any, seq_lens: Any, layout: str, *options: Any
) -> None:
    made = calls.paged_attention(
        q, k_cache, v_cache, table, seq_lens, layout=layout, out=out, return_lse=lse is not None, **_options(*options)
    )
    _store(lse, made)


def _variable_block_attention(
    out: Any, q: Any, k_cache: Any, v_cache: Any, table: Any, starts: Any, seq_lens: Any, scale: Any, window: Any,
    bounds: Any = None, most: Any = None, plan: Any = None,
) -> None:  # fmt: skip
    options = make_options(
        (bounds, scale, True, _window(window), 0.0, None, None, out, False, 0, None, most, _plan(plan))
    )
    calls.attend(q, k_cache, v_cache, table, starts, seq_lens, options, has_entries=True)


def _variable_block_attention_with_options(
    out: Any, lse: Any, mass: Any, q: Any, k_cache: Any, v_cache: Any, table: Any, starts: Any, seq_lens: Any,
    *options: Any,
) -> None:  # fmt: skip
    made = calls.variable_block_attention(
        q, k_cache, v_cache, table, starts, seq_lens, block_mass=mass, out=out, return_lse=lse is not None,
        **_options(*options),
    )  # fmt: skip
    _store(lse, made)


def _tiered_attention(
    out: Any, q: Any, k_cache: Any, v_cache: Any, warm: Any, cold: Any, first_granules: Any, table: Any, starts: Any,
    seq_lens: Any, scale: Any, window: Any, bounds: Any = None, most: Any = None, plan: Any = None,
) -> None:  # fmt: skip
    caches = TierCaches(k_cache, v_cache, warm, cold, tuple(first_granules))
    calls.tiered_attention(
        q, caches, table, starts, seq_lens, cu_seqlens_q=bounds, max_seqlen_q=most, plan=_plan(plan),
        softmax_scale=scale, window_size=_window(window), out=out,
    )  # fmt: skip


def _tiered_attention_with_options(
    out: Any, lse: Any, mass: Any, q: Any, k_cache: Any, v_cache: Any, warm: Any, cold: Any, first_granules: Any,
    table: Any, starts: Any, seq_lens: Any, *options: Any,
) -> None:  # fmt: skip
    caches = TierCaches(k_cache, v_cache, warm, cold, tuple(first_granules))
    made = calls.tiered_attention(
        q, caches, table, starts, seq_lens, block_mass=mass, out=out, return_lse=lse is not None, **_options(*options)
    )
    _store(lse, made)


def _plan(handle: Any) -> Any:
    return None if handle is None else owner_of(handle, "plan", AttentionPlan)


def _window(given: Any) -> tuple[int, int]:
    """The window of a call. None is unbounded, which most calls are, because two integers cost the host 0.5 us."""
    return (-1, -1) if given is None else tuple(given)


def _options(
    scale: Any, window: Any, causal: bool, softcap: float, sinks: Any, slopes: Any, num_splits: int, backend: Any,
    *rows: Any,
) -> dict[str, Any]:  # fmt: skip
    """All options but those for results, by their public names; a step has no ``rows``, see `_ROWS`."""
    options = {
        "softmax_scale": scale, "window_size": _window(window), "causal": causal, "softcap": softcap, "sinks": sinks,
        "alibi_slopes": slopes, "num_splits": num_splits, "backend": backend,
    }  # fmt: skip
    if rows:
        options |= {"cu_seqlens_q": rows[0], "max_seqlen_q": rows[1], "plan": _plan(rows[2])}
    return options


def _store(lse: Any, made: Any) -> None:
    """Keep the log-sum-exp of a call, where it was wanted."""
    if lse is not None:
        lse.copy_(made[1])


def _forms(
    name: str, arrays: str, short: Any, full: Any, *, mass: str = "", rows: str = ""
) -> dict[str, tuple[str, Any]]:
    """A call as several operators, of which most layers need a short one, because each argument costs some 0.3 us."""
    forms = {
        name: (f"Tensor(a!) out, {arrays}, {_COMMON}", short),
        f"{name}_with_options": (f"Tensor(a!) out, Tensor(b!)? lse, {mass}{arrays}, {_COMMON}, {_OTHERS}{rows}", full),
    }
    if rows:
        forms[f"{name}_of_rows"] = f"Tensor(a!) out, {arrays}, {_COMMON}{rows}", short
    return forms


_MASS = "Tensor(c!)? block_mass, "
_CACHES = "Tensor q, Tensor k_cache, Tensor v_cache"
_TABLES = "Tensor block_table, Tensor block_starts, Tensor seq_lens"
_OPERATORS: dict[str, tuple[str, Any]] = {
    "append": (
        "Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, str layout, "
        "str? backend",
        _append,
    ),
    "merge_states": (
        "Tensor(a!) out, Tensor(b!) lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str? backend",
        _merge_states,
    ),
    # the arena says that what one of them writes the other reads
    "step_append": ("Tensor(a!) arena, Tensor step, int layer, Tensor key, Tensor value", _step_append),
    **_forms("step_attend", "Tensor arena, Tensor step, int layer, Tensor q", _step_attend, _step_attend_with_options),
    **_forms(
        "paged_attention",
        f"{_CACHES}, Tensor block_table, Tensor seq_lens, str layout",
        _paged_attention,
        _paged_attention_with_options,
        rows=_ROWS,
    ),
    **_forms(
        "variable_block_attention",
        f"{_CACHES}, {_TABLES}",
        _variable_block_attention,
        _variable_block_attention_with_options,
        mass=_MASS,
        rows=_ROWS,
    ),
    **_forms(
        "tiered_attention",
        f"{_CACHES}, Tensor? warm, Tensor? cold, SymInt[] first_granules, {_TABLES}",
        _tiered_attention,
        _tiered_attention_with_options,
        mass=_MASS,
        rows=_ROWS,
    ),
}
"""The parameters of each operator, and what it runs."""
