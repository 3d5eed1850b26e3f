"""What Dynamo traces in place of the public calls: operators, or a break of the graph where an array is no tensor."""

from typing import Any

from kvtoolkit.attention import calls as public
from kvtoolkit.tracing import untraced


@untraced
def outside(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function outside the graph, as it is."""
    return function(*arguments, **options)


def are_tensors(*arrays: Any) -> bool:
    """Whether all of them are tensors, or None."""
    import torch

    return all(array is None or isinstance(array, torch.Tensor) for array in arrays)


def attend(
    name: str, q: Any, arguments: tuple[Any, ...], *, softmax_scale: float | None = None, causal: bool = True,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, sinks: Any = None, alibi_slopes: Any = None,
    out: Any = None, return_lse: bool = False, num_splits: int = 0, backend: str | None = None,
    **mass: Any,
) -> Any:  # fmt: skip
    """Run the operator of an attention call: the short one, unless an option asks for more.

    Args:
        name: of the operator.
        q: the queries.
        arguments: of the operator, from behind its results to its options.
        mass: ``block_mass``, for a call that has it.
    """
    import torch

    operators = torch.ops.kvtoolkit
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    common = (*arguments, softmax_scale, window_size[0], window_size[1])
    is_plain = causal is True and softcap == 0 and sinks is None and alibi_slopes is None and num_splits == 0
    if is_plain and not return_lse and backend is None and mass.get("block_mass") is None:
        getattr(operators, name)(out, *common)
        return out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    getattr(operators, name + "_with_options")(
        out, lse, *mass.values(), *common, causal, softcap, sinks, alibi_slopes, num_splits, backend
    )
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
    if not are_tensors(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *_arrays_of(options)):
        return outside(
            public.paged_attention, q, k_cache, v_cache, block_table, seq_lens, layout=layout,
            cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, plan=plan, **options,
        )  # fmt: skip
    arguments = (q, k_cache, v_cache, block_table, seq_lens, layout, cu_seqlens_q, max_seqlen_q, _handle_of(plan))
    return attend("paged_attention", q, arguments, **options)


def variable_block_attention(
    q: Any, k_cache: Any, v_cache: Any, block_table: Any, block_starts: Any, seq_lens: Any, *, block_mass: Any = None,
    cu_seqlens_q: Any = None, max_seqlen_q: int | None = None, plan: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """See `kvtoolkit.variable_block_attention`."""
    arrays = (q, k_cache, v_cache, block_table, block_starts, seq_lens)
    if not are_tensors(*arrays, block_mass, cu_seqlens_q, *_arrays_of(options)):
        return outside(
            public.variable_block_attention, *arrays, block_mass=block_mass, cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q, plan=plan, **options,
        )  # fmt: skip
    arguments = (*arrays, cu_seqlens_q, max_seqlen_q, _handle_of(plan))
    return attend("variable_block_attention", q, arguments, block_mass=block_mass, **options)


def tiered_attention(
    q: Any, tier_caches: Any, block_table: Any, block_starts: Any, seq_lens: Any, *, block_mass: Any = None,
    cu_seqlens_q: Any = None, max_seqlen_q: int | None = None, plan: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """See `kvtoolkit.tiered_attention`."""
    tables = (block_table, block_starts, seq_lens)
    *caches, first_granules = tier_caches
    if not are_tensors(q, *caches, *tables, block_mass, cu_seqlens_q, *_arrays_of(options)):
        return outside(
            public.tiered_attention, q, tier_caches, *tables, block_mass=block_mass, cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q, plan=plan, **options,
        )  # fmt: skip
    arguments = (q, *caches, first_granules, *tables, cu_seqlens_q, max_seqlen_q, _handle_of(plan))
    return attend("tiered_attention", q, arguments, block_mass=block_mass, **options)


def _arrays_of(options: dict[str, Any]) -> list[Any]:
    return [options.get(name) for name in ("sinks", "alibi_slopes", "out")]


def _handle_of(plan: Any) -> Any:
    """The tensor that stands for a plan in a graph."""
    return None if plan is None else plan._handle
