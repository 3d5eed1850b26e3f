"""What Dynamo traces in place of the public calls: operators, or a break of the graph where an array is no tensor."""

from typing import Any

from kvtoolkit.attention import calls as public
from kvtoolkit.attention.options import AttendOptions, Options
from kvtoolkit.attention.plan import AttentionPlan
from kvtoolkit.tracing import untraced


@untraced
def outside(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function outside the graph, as it is."""
    return function(*arguments, **options)


def are_tensors(*arrays: Any) -> bool:
    """Whether all of them are tensors, or None."""
    import torch

    return all(array is None or isinstance(array, torch.Tensor) for array in arrays)


_DEFAULTS = {name: Options._field_defaults[name] for name in AttendOptions.__annotations__}


def are_plain(options: dict[str, Any]) -> bool:
    """Whether a schema can take the options of an attention call as they are; all others are left to the call itself.

    The call converts or refuses them, with its own words. A schema would take some for what they are not.
    """
    if any(name not in _DEFAULTS for name in options):
        return False
    given = {**_DEFAULTS, **options}
    window, scale = given["window_size"], given["softmax_scale"]
    return (
        are_tensors(given["sinks"], given["alibi_slopes"], given["out"])
        and (scale is None or type(scale) in (int, float))
        and type(given["causal"]) is bool
        and type(given["return_lse"]) is bool
        and type(window) in (tuple, list)
        and len(window) == 2
        and all(type(one) is int for one in window)
        and type(given["softcap"]) in (int, float)
        and type(given["num_splits"]) is int
        and (given["backend"] is None or type(given["backend"]) is str)
    )


def attend(
    name: str, q: Any, arguments: tuple[Any, ...], options: dict[str, Any], masses: tuple[Any, ...] = (),
    rows: tuple[Any, ...] = (),
) -> Any:  # fmt: skip
    """Run the operator of an attention call: the shortest one that takes what is asked for.

    Args:
        name: of the operator.
        q: the queries.
        arguments: of the operator, from behind its results to its options.
        options: of the call, see `are_plain`.
        masses: ``block_mass``, for a call that has it.
        rows: ``cu_seqlens_q``, ``max_seqlen_q`` and the handle of a plan, for a call that has them.
    """
    import torch

    given = {**_DEFAULTS, **options}
    out, return_lse = given["out"], given["return_lse"]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    window = tuple(given["window_size"])
    common = (*arguments, given["softmax_scale"], None if window == (-1, -1) else window)
    others = [given[name] for name in ("causal", "softcap", "sinks", "alibi_slopes", "num_splits", "backend")]
    operators = torch.ops.kvtoolkit
    if not return_lse and all(mass is None for mass in masses) and others == [True, 0, None, None, 0, None]:
        if any(one is not None for one in rows):
            getattr(operators, name + "_of_rows")(out, *common, *rows)
        else:
            getattr(operators, name)(out, *common)
        return out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    getattr(operators, name + "_with_options")(out, lse, *masses, *common, *others, *rows)
    return (out, lse) if return_lse else out


def append(
    key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, *, layout: str, backend: str | None = None
) -> None:
    """See `kvtoolkit.append`."""
    import torch

    if not are_tensors(key, value, k_cache, v_cache, slot_mapping):
        outside(public.append, key, value, k_cache, v_cache, slot_mapping, layout=layout, backend=backend)
        return
    torch.ops.kvtoolkit.append(key, value, k_cache, v_cache, slot_mapping, layout, backend)


def merge_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, backend: str | None = None) -> Any:
    """See `kvtoolkit.merge_states`."""
    import torch

    if not are_tensors(out_a, lse_a, out_b, lse_b):
        return outside(public.merge_states, out_a, lse_a, out_b, lse_b, backend=backend)
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
    torch.ops.kvtoolkit.merge_states(out, lse, out_a, lse_a, out_b, lse_b, backend)
    return out, lse


def paged_attention(
    q: Any, k_cache: Any, v_cache: Any, block_table: Any, seq_lens: Any, *, layout: str = "NHD",
    cu_seqlens_q: Any = None, max_seqlen_q: int | None = None, plan: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """See `kvtoolkit.paged_attention`."""
    arrays = (q, k_cache, v_cache, block_table, seq_lens)
    fits = are_tensors(*arrays, cu_seqlens_q) and type(layout) is str and _are_shared(max_seqlen_q, plan)
    if not fits or not are_plain(options):
        return outside(
            public.paged_attention, *arrays, layout=layout, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            plan=plan, **options,
        )  # fmt: skip
    return attend("paged_attention", q, (*arrays, layout), options, (), (cu_seqlens_q, max_seqlen_q, _handle_of(plan)))


def variable_block_attention(
    q: Any, k_cache: Any, v_cache: Any, block_table: Any, block_starts: Any, seq_lens: Any, *, block_mass: Any = None,
    cu_seqlens_q: Any = None, max_seqlen_q: int | None = None, plan: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """See `kvtoolkit.variable_block_attention`."""
    arrays = (q, k_cache, v_cache, block_table, block_starts, seq_lens)
    fits = are_tensors(*arrays, block_mass, cu_seqlens_q) and _are_shared(max_seqlen_q, plan)
    if not fits or not are_plain(options):
        return outside(
            public.variable_block_attention, *arrays, block_mass=block_mass, cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q, plan=plan, **options,
        )  # fmt: skip
    rows = (cu_seqlens_q, max_seqlen_q, _handle_of(plan))
    return attend("variable_block_attention", q, arrays, options, (block_mass,), rows)


def tiered_attention(
    q: Any, tier_caches: Any, block_table: Any, block_starts: Any, seq_lens: Any, *, block_mass: Any = None,
    cu_seqlens_q: Any = None, max_seqlen_q: int | None = None, plan: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """See `kvtoolkit.tiered_attention`."""
    tables = (block_table, block_starts, seq_lens)
    fits = are_tensors(q, *tables, block_mass, cu_seqlens_q) and _are_shared(max_seqlen_q, plan)
    fits = fits and isinstance(tier_caches, tuple) and len(tier_caches) == 5 and are_tensors(*tier_caches[:4])
    if not fits or not _are_integers(tier_caches[4]) or not are_plain(options):
        return outside(
            public.tiered_attention, q, tier_caches, *tables, block_mass=block_mass, cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q, plan=plan, **options,
        )  # fmt: skip
    rows = (cu_seqlens_q, max_seqlen_q, _handle_of(plan))
    return attend("tiered_attention", q, (q, *tier_caches, *tables), options, (block_mass,), rows)


def _are_integers(values: Any) -> bool:
    return type(values) in (tuple, list) and all(type(one) is int for one in values)


def _are_shared(max_seqlen_q: Any, plan: Any) -> bool:
    """Whether a graph can name what the layers of a step share."""
    if plan is not None and (type(plan) is not AttentionPlan or plan._handle is None):
        return False
    return max_seqlen_q is None or type(max_seqlen_q) is int


def _handle_of(plan: Any) -> Any:
    """The handle of a plan, by which a graph names it."""
    return None if plan is None else plan._handle
