"""What callers of flash-attn pass: checked before anything is launched, and refused under the caller's own names."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from kvtoolkit.arrays.host import tensor_operand
from kvtoolkit.errors import KVToolkitError, ShapeError, UnsupportedError

_ALONE = {"key", "value", "sinks"}  # words that a message may use in another sense behind its first colon


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors of kvtoolkit's own calls name the caller's parameters: ``names`` maps ours to theirs."""
    try:
        yield
    except KVToolkitError as error:
        subject, colon, rest = str(error).partition(":")
        subject = _replace(subject, names)
        rest = _replace(rest, {ours: theirs for ours, theirs in names.items() if ours not in _ALONE})
        raise type(error)(subject + colon + rest) from error


def _replace(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text)


def refuse(reason: str, **arguments: Any) -> None:
    """UnsupportedError for each of ``arguments`` that is given."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise UnsupportedError(f"{name}: expected None, {reason}")


def none_if_zero(value: Any) -> Any:
    """None for the number 0."""
    return None if isinstance(value, int) and value == 0 else value


def one_of(first: tuple[str, Any], second: tuple[str, Any]) -> tuple[str, Any]:
    """The name and value of whichever of two parameters is given; the first one if none is."""
    if first[1] is not None and second[1] is not None:
        raise ShapeError(f"{first[0]}, {second[0]}: expected one of them, got both")
    return second if second[1] is not None else first


def window_of(window_size: Any) -> Any:
    """The window; None is none, as in vLLM. Its integers are checked with the other options."""
    return (-1, -1) if window_size is None else window_size


def is_local(window_size: Any) -> bool:
    """Whether a window is given, which decides how flash-attn rotates queries."""
    return any(side != -1 for side in window_size)


def check_tensor(name: str, tensor: Any, ndim: int, device: torch.device | None = None) -> None:
    """ShapeError or UnsupportedError unless it is a tensor of ``ndim`` axes on ``device``, with memory of its own."""
    if not isinstance(tensor, torch.Tensor):
        raise ShapeError(f"{name}: expected a torch tensor, got {type(tensor).__name__}")
    tensor_operand(tensor, name, tensor.is_cuda)  # refuses those without memory of their own
    if tensor.ndim != ndim:
        raise ShapeError(f"{name}: expected {ndim} axes, got shape {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ShapeError(f"{name}: expected a tensor on {device}, as q, got one on {tensor.device}")


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last axis contiguous; a copy only where it is not."""
    return tensor.contiguous() if tensor.shape[-1] > 1 and tensor.stride(-1) != 1 else tensor


def indices(name: str, tensor: Any, shape: tuple[int | None, ...], device: torch.device) -> torch.Tensor:
    """An int32 tensor of ``shape``, where None is any size, its last axis contiguous; a copy only where it is not."""
    check_tensor(name, tensor, len(shape), device)
    fits = all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != torch.int32 or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeError(f"{name}: expected [{wanted}] int32, got {tuple(tensor.shape)} {tensor.dtype}")
    return rows_of(tensor)


def refuse_dropout(dropout_p: Any) -> None:
    """UnsupportedError for anything but 0."""
    if not isinstance(dropout_p, (int, float)) or dropout_p:
        raise UnsupportedError(f"dropout_p: expected 0, got {dropout_p!r:.80}")


def slopes(alibi_slopes: Any, batch: int, device: torch.device) -> torch.Tensor | None:
    """ALiBi slopes, ``[num_q_heads]`` where all rows have the same, which a GPU needs."""
    if alibi_slopes is None:
        return None
    if not isinstance(alibi_slopes, torch.Tensor) or alibi_slopes.ndim not in (1, 2):
        got = tuple(alibi_slopes.shape) if isinstance(alibi_slopes, torch.Tensor) else type(alibi_slopes).__name__
        raise ShapeError(f"alibi_slopes: expected a tensor [num_q_heads] or [batch, num_q_heads], got {got}")
    check_tensor("alibi_slopes", alibi_slopes, alibi_slopes.ndim, device)
    if alibi_slopes.ndim == 2 and alibi_slopes.shape[0] == batch > 0 and (batch == 1 or alibi_slopes.stride(0) == 0):
        alibi_slopes = alibi_slopes[0]
    return rows_of(alibi_slopes)


def sinks(s_aux: Any, device: torch.device) -> torch.Tensor | None:
    """Sinks as the kernels take them: float32, contiguous."""
    if s_aux is None:
        return None
    check_tensor("s_aux", s_aux, 1, device)
    return s_aux.detach().float().contiguous()


def are_readable(tensor: torch.Tensor) -> bool:
    """Whether the host may read index tensors: on the CPU, and with ``KVTOOLKIT_CHECK=1``."""
    if tensor.is_cpu:
        return True
    from kvtoolkit.cuda import check

    return check.ENABLED and not torch.cuda.is_current_stream_capturing()


def check_range(name: str, tensor: torch.Tensor, low: int, high: int | torch.Tensor, reason: str) -> None:
    """ShapeError unless every element is from ``low`` to ``high``, which may be a tensor of as many limits.

    Only where `are_readable`.
    """
    if not are_readable(tensor):
        return
    numbers = tensor.detach().cpu().numpy()
    limits = high.detach().cpu().numpy() if isinstance(high, torch.Tensor) else high
    bad = (numbers < low) | (numbers > limits)
    if bad.any():
        row = int(bad.argmax())
        limit = int(np.broadcast_to(limits, numbers.shape)[row])
        raise ShapeError(f"{name}: expected {low} to {limit}, {reason}, got {int(numbers[row])} in row {row}")


def check_cumulative(name: str, sums: torch.Tensor, total: int, most: int | None, limit: str) -> None:
    """ShapeError unless cumulated lengths ascend from 0 to at most ``total``, by at most ``most`` tokens a row.

    Only where `are_readable`. ``limit`` is the parameter that says ``most``.
    """
    if not are_readable(sums):
        return
    ends = sums.detach().cpu().numpy().astype(np.int64)
    lengths = ends[1:] - ends[:-1]
    if ends[0] != 0 or ends[-1] > total or (lengths < 0).any():
        raise ShapeError(f"{name}: expected to ascend from 0 to at most {total}, got {ends.tolist()}")
    if most is not None and (lengths > most).any():
        raise ShapeError(f"{limit}: expected at least {lengths.max()}, the longest row by {name}, got {most}")
