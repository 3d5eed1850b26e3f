"""Steps that flash-attn's calls have in common: queries, options, the attention call itself, the result."""

from collections.abc import Callable
from typing import Any

import torch

from kvtoolkit.arrays.call import Hints
from kvtoolkit.attention.arguments import count
from kvtoolkit.attention.calls import attend
from kvtoolkit.attention.options import Options
from kvtoolkit.errors import ShapeError, UnsupportedError
from kvtoolkit.integrations.flash_attn.arguments import (
    are_readable,
    check_cumulative,
    check_tensor,
    indices,
    rows_of,
    sinks,
    slopes,
    window_of,
)
from kvtoolkit.integrations.flash_attn.caches import Blocks
from kvtoolkit.integrations.flash_attn.step_plan import StepPlan


def common_options(
    softmax_scale: float | None, causal: bool, window_size: Any, softcap: float, num_splits: int, alibi_slopes: Any,
    s_aux: Any, return_lse: bool, batch: int, device: torch.device,
) -> Options:  # fmt: skip
    """The options of a call as kvtoolkit takes them."""
    return Options(
        softmax_scale=softmax_scale, causal=causal, window_size=window_of(window_size), softcap=softcap,
        alibi_slopes=slopes(alibi_slopes, batch, device), sinks=sinks(s_aux, device), return_lse=return_lse,
        num_splits=num_splits,
    )  # fmt: skip


def run(
    q: torch.Tensor, blocks: Blocks, lengths: torch.Tensor, bounds: torch.Tensor | None,
    query_counts: tuple[int, int], out: torch.Tensor | None, options: Options,
    write: Callable[[], None] | None = None, *, max_seqlen_k: int | None = None, step: StepPlan | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Attend to blocks; returns ``(out, lse)``, lse None if it is not wanted.

    Args:
        q: ``[total_q, num_q_heads, head_dim]``; it may be longer than the last of ``bounds``. On a GPU the kernels
            ignore the rest; where the host can read ``bounds``, it is cut off.
        options: with neither ``cu_seqlens_q`` nor ``out``.
        write: called after all checks and before attention.
        max_seqlen_k: no row has more keys, as far as the caller knows.
        step: what the calls of a step share; None = this call is planned by itself.
    """
    q, total = rows_of(q), q.shape[0]
    used = total
    if bounds is not None and are_readable(bounds):
        used = min(max(int(bounds[-1]), 0), total)
    target = out
    if used < total:
        if out is not None and (out.shape != q.shape or out.dtype != q.dtype):
            raise ShapeError(f"out: expected as q, {tuple(q.shape)} {q.dtype}, got {tuple(out.shape)} {out.dtype}")
        out = torch.zeros_like(q) if out is None else out
        q, target = q[:used], out[:used]
    if step is not None:
        options = options._replace(plan=step.plan(blocks.table, lengths, bounds))
    result = attend(
        q, blocks.keys, blocks.values, blocks.table, None, lengths, options._replace(cu_seqlens_q=bounds, out=target),
        has_entries=False, layout="NHD", hints=Hints(query_counts, max_seqlen_k), before=write, memory=blocks.memory,
    )  # fmt: skip
    result, lse = result if options.return_lse else (result, None)
    if used == total:
        return result, lse
    if lse is not None:
        lse = torch.cat((lse, lse.new_full((total - used, lse.shape[1]), -torch.inf)))
    return out, lse


def packed_queries(q: torch.Tensor, cu_seqlens_q: Any, max_seqlen_q: Any) -> tuple[torch.Tensor, tuple[int, int]]:
    """``cu_seqlens_q`` checked, and the fewest and most query tokens of its rows.

    The fewest are 0: ``q`` may be padded, so the host cannot tell.
    """
    bounds = indices("cu_seqlens_q", cu_seqlens_q, (None,), q.device)
    if len(bounds) == 0:
        raise ShapeError("cu_seqlens_q: expected [batch + 1] int32, got no element")
    most = count("max_seqlen_q", max_seqlen_q)
    check_cumulative("cu_seqlens_q", bounds, q.shape[0], most, "max_seqlen_q")
    return bounds, (0, most)


def check_width(name: str, v: torch.Tensor, k: torch.Tensor) -> None:
    """UnsupportedError unless values are as wide as keys."""
    if v.shape[-1] != k.shape[-1]:
        raise UnsupportedError(
            f"{name}: expected head_dim {k.shape[-1]}, that of the keys, got {v.shape[-1]}; values of another width "
            "need a kernel of their own"
        )


def flat(out: Any, q: torch.Tensor) -> torch.Tensor | None:
    """``out`` as the kernels write it; None where there is none, or where a result must be copied to it."""
    if out is None:
        return None
    check_tensor("out", out, q.ndim, q.device)
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ShapeError(f"out: expected as q, {tuple(q.shape)} {q.dtype}, got {tuple(out.shape)} {out.dtype}")
    if q.ndim == 3:
        return out
    try:
        return out.view(-1, *out.shape[2:])
    except RuntimeError:
        return None


def shaped(result: torch.Tensor, q: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """The result as the caller wants it."""
    if out is None:
        return result.view(q.shape)
    if result.data_ptr() != out.data_ptr():
        out.copy_(result.view(q.shape))
    return out
