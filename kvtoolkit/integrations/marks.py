"""Tensors that go through a model's own code and come out at our attention: whoever else touches them is told so.

A model that computes with the keys that a cache gives back, or with its mask, does something that our attention would
not know of. Both are tensors that refuse to be computed with, so such a model raises instead of being wrong.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

_HARMLESS = {"dtype", "device", "layout", "is_cuda", "is_cpu", "requires_grad", "is_nested"}


class _Untouchable(torch.Tensor):  # type: ignore[misc]
    """A tensor that nothing may be computed with; ``reason`` is what is raised."""

    reason = ""
    harmless: frozenset[str] = frozenset(_HARMLESS)
    """Names of attributes that may be read."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        name = getattr(getattr(function, "__self__", None), "__name__", "") if name == "__get__" else name
        if name in cls.harmless:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        if name == "to":
            return args[0]  # what moves a layer's arguments to its device
        raise NotImplementedError(f"{cls.reason} (by {name})")


class NewKeys(_Untouchable):
    """The new keys of a layer, on their way from `Cache.update` to the attention function.

    Attributes:
        layer: the cache's layer.
        states: the tensor itself.
    """

    reason = (
        "the cache's keys were used by something else than kvtoolkit's attention: call use_kvtoolkit(model) first; "
        "models that attend by code of their own, and torch.compile, are not supported"
    )
    layer: Any
    states: torch.Tensor


class Mask(_Untouchable):
    """Which keys a query sees: the columns up to its own, without padding, within a window or chunk if there is one.

    Attributes:
        padding: ``[batch, columns]`` bool on the host, False where there is padding; None if nothing is padded.
        span: columns a query sees, its own included; or minus the size of the chunks, counted from the first column
            without padding, of which a query sees its own; 0 = all.
    """

    reason = "the model changes the attention mask, of which kvtoolkit only knows padding, windows and chunks"
    padding: torch.Tensor | None
    span: int


def mark_keys(states: torch.Tensor, layer: Any) -> NewKeys:
    """New keys that lead `attention_forward` to their layer of a cache."""
    marked: NewKeys = states.as_subclass(NewKeys)
    marked.layer, marked.states = layer, states
    return marked


def make_mask(padding: torch.Tensor | None, span: int) -> Mask:
    """A `Mask`; it holds no elements of its own."""
    mask: Mask = torch.empty(0, device="cpu").as_subclass(Mask)
    mask.padding, mask.span = padding, span
    return mask


def span_of(
    mask_function: Callable[..., Any], local_size: int | None, padding: torch.Tensor | None, device: Any = "cpu"
) -> int:
    """What a mask function of transformers shows a query; see `Mask`.

    Args:
        mask_function: of ``(batch, head, query column, key column)``.
        local_size: what it was made with.
        padding: ``[batch, columns]`` bool, False where there is padding.
        device: where the function can be called.

    Raises:
        NotImplementedError: it is not causal, with or without a window or chunks.
    """
    if mask_function is causal_mask_function:
        return 0
    size = local_size or 0
    near = {0, 1, *(place + offset for place in (size, 2 * size, 3 * size) for offset in (-1, 0, 1))}
    places = torch.tensor(sorted(place for place in near if place >= 0), device=device)
    query, key = places[:, None], places[None, :]
    causal, zero = key <= query, torch.tensor(0, device=device)
    shown = torch.as_tensor(mask_function(zero, zero, query, key))
    if torch.equal(shown, causal & (key > query - size) if size else causal):
        return size
    if size:
        first = torch.zeros(1) if padding is None else _first_columns(padding)
        first = first.to(device, torch.long)[:, None, None]
        rows = torch.arange(len(first), device=device)[:, None, None]
        shown = torch.as_tensor(mask_function(rows, zero, query + first, key + first))
        if (shown == (causal & (key // size == query // size))).all():
            return -size
    raise NotImplementedError("kvtoolkit masks padding, windows and chunks, causally; got a custom mask function")


def _first_columns(padding: torch.Tensor) -> torch.Tensor:
    """``[batch]``, the first column of each row that is not padding; the number of columns if all are."""
    return torch.where(padding.any(1), padding.to(torch.uint8).argmax(1), padding.shape[1])
