"""Plans that callers hand to flash-attn's calls: `plan_for_step`, and FlashAttention-3's `get_scheduler_metadata`."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from kvtoolkit.attention.arguments import count
from kvtoolkit.attention.plan import AttentionPlan, plan_attention
from kvtoolkit.errors import ArgumentError
from kvtoolkit.integrations.flash_attn.arguments import check_tensor, indices
from kvtoolkit.runtime.streams import capture_id, current_stream
from kvtoolkit.tracing import untraced

_entered = threading.local()


@untraced
class StepPlan:
    """What flash-attn's calls of one step share; made by `plan_for_step` or `get_scheduler_metadata`.

    It keeps one `kvtoolkit.AttentionPlan` for each block table, and the index tensors that are worked out of the
    caller's. Tensors are told apart by their addresses, shapes and strides, and kept alive. One thread at a time.
    """

    def __init__(self, cache_seqlens: torch.Tensor | None = None, cu_seqlens_q: torch.Tensor | None = None) -> None:
        self._cache_seqlens, self._cu_seqlens_q = cache_seqlens, cu_seqlens_q
        self._made: dict[Any, tuple[torch.Tensor, Any]] = {}
        self._plans: dict[Any, AttentionPlan] = {}
        self._used: set[Any] = set()  # keys of the plans that were used since the last renewal
        self._captured: list[AttentionPlan] = []  # graphs refer to their memory

    def renew(self) -> None:
        """Forget what was planned, because what the index tensors hold has changed."""
        self._made.clear()
        self._plans = {key: plan for key, plan in self._plans.items() if key in self._used}
        self._used.clear()
        for plan in self._plans.values():
            plan.renew()

    def __enter__(self) -> "StepPlan":
        self.renew()
        _stack().append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _stack().remove(self)

    def once(
        self, what: tuple[Any, ...], sources: tuple[torch.Tensor, ...], device: torch.device,
        make: Callable[[], torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """The tensor that ``make`` gives for these sources: made by the first call, and anew in every capture."""
        key = (what, device, _capture(device), *map(_identity, sources))
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make(), sources
        return found[0]

    def plan(self, table: torch.Tensor, lengths: torch.Tensor, bounds: torch.Tensor | None) -> AttentionPlan:
        """The plan for these index tensors."""
        key = _identity(table), _identity(lengths), None if bounds is None else _identity(bounds)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_attention(table, lengths, cu_seqlens_q=bounds)
        self._used.add(key)
        if _capture(table.device) and plan not in self._captured:
            self._captured.append(plan)
        return plan

    def num_made(self) -> tuple[int, int]:
        """How much has been made since the last renewal; `forget_since` takes it."""
        return len(self._made), len(self._plans)

    def forget_since(self, num_made: tuple[int, int]) -> None:
        """Forget what was made after `num_made` gave this."""
        while len(self._made) > num_made[0]:
            self._made.popitem()  # the latest
        while len(self._plans) > num_made[1]:
            self._plans.popitem()

    def check(self, lengths: tuple[str, Any], cu_seqlens_q: Any) -> None:
        """ArgumentError if `get_scheduler_metadata` was given other tensors.

        Args:
            lengths: the parameter of the call that says how many tokens the cache holds, and its value.
        """
        if self._cache_seqlens is None:
            return
        name, value = lengths
        for mine, other, called in (
            (self._cache_seqlens, value, name),
            (self._cu_seqlens_q, cu_seqlens_q, "cu_seqlens_q"),
        ):
            is_same = mine is other or (
                isinstance(mine, torch.Tensor)
                and isinstance(other, torch.Tensor)
                and _identity(mine) == _identity(other)
            )
            if not is_same:
                raise ArgumentError(
                    f"scheduler_metadata: expected what get_scheduler_metadata made for this {called}, got that for "
                    "another tensor"
                )


def worked_out(
    step: StepPlan | None, what: tuple[Any, ...], sources: tuple[torch.Tensor, ...], device: torch.device,
    make: Callable[[], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """An index tensor that follows from others, ``sources``.

    Where the calls of a step share a plan it is made once, because the plan needs it at one address.
    """
    return make() if step is None else step.once(what, sources, device, make)


class UndoneIfRefused:
    """Lets a plan, if there is one, forget what a call inside has made of tensors, if it raises: they may be mended."""

    __slots__ = ("_num_made", "_step")

    def __init__(self, step: StepPlan | None) -> None:
        self._step = step

    def __enter__(self) -> None:
        if self._step is not None:
            self._num_made = self._step.num_made()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and self._step is not None:
            self._step.forget_since(self._num_made)


def _stack() -> list[StepPlan]:
    try:
        return _entered.plans  # type: ignore[no-any-return]
    except AttributeError:
        _entered.plans = []
        return _entered.plans  # type: ignore[no-any-return]


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _capture(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return capture_id(current_stream(index, True))


def step_plan_of(scheduler_metadata: Any, lengths: tuple[str, Any], cu_seqlens_q: Any) -> StepPlan | None:
    """The plan that a call uses: the one that it is given, else that of the innermost `plan_for_step` of this thread.

    What is no plan of ours is a hint to other kernels, and ignored.
    """
    if isinstance(scheduler_metadata, StepPlan):
        scheduler_metadata.check(lengths, cu_seqlens_q)
        return scheduler_metadata
    plans = _stack()
    return plans[-1] if plans else None


@untraced
def plan_for_step(plan: StepPlan | None = None) -> StepPlan:
    """Let the calls inside a ``with`` block share plans, instead of planning in every call:

        with plan_for_step():
            logits = model(tokens)       # its layers call flash_attn_varlen_func or flash_attn_with_kvcache

    Calls of this thread that are given the same block table, lengths and ``cu_seqlens_q``, which are tensors at the
    same addresses, are checked and planned once. What these tensors hold must not change inside the block. Calls with
    ``cache_leftpad`` and `flash_attn_func` are planned every time.

    Args:
        plan: an earlier one, whose memory is used again; what it has planned is forgotten. For CUDA graphs: run the
            model eagerly with a plan, then capture it with the same plan, and keep the plan as long as the graph. Every
            replay plans anew.

    Returns:
        A context manager, which gives itself.
    """
    return StepPlan() if plan is None else plan


@untraced
def get_scheduler_metadata(
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int, headdim: int,
    cache_seqlens: torch.Tensor, qkv_dtype: torch.dtype = torch.bfloat16, headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None, page_size: int | None = None, max_seqlen_k_new: int = 0,
    causal: bool = False, window_size: tuple[int, int] | None = (-1, -1), attention_chunk: int = 0,
    has_softcap: bool = False, num_splits: int = 0, pack_gqa: bool | None = None, sm_margin: int = 0,
) -> StepPlan:  # fmt: skip
    """Make what FlashAttention-3's calls take as ``scheduler_metadata``: here a plan that all layers of a step share.

    Nothing is launched: the first call that is given it plans. One plan serves layers of any shape and options. What
    the tensors hold must not change while it is in use. Make one for every step, or call `StepPlan.renew`.

    Args:
        batch_size: number of rows.
        max_seqlen_q: most query tokens of a row.
        max_seqlen_k: most keys of a row.
        cache_seqlens: ``[batch_size]`` int32, the tensor that the calls get as ``cache_seqlens`` or ``seqused_k``.
        cu_seqlens_q: ``[batch_size + 1]`` int32, the tensor that the calls get as ``cu_seqlens_q``, or None.

    The others are taken because FlashAttention-3 has them; what they say is taken from the calls.

    Returns:
        An object, no tensor: it cannot be copied to memory of a captured graph. Capture the calls instead, after they
        have run once with the same object.

    Raises:
        ShapeError: a shape, dtype, device or number is not as above.
    """
    batch = count("batch_size", batch_size)
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        count(name, most)
    check_tensor("cache_seqlens", cache_seqlens, 1)
    indices("cache_seqlens", cache_seqlens, (batch,), cache_seqlens.device)
    if cu_seqlens_q is not None:
        indices("cu_seqlens_q", cu_seqlens_q, (batch + 1,), cache_seqlens.device)
    return StepPlan(cache_seqlens, cu_seqlens_q)
