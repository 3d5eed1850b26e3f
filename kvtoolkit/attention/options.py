"""The options that all attention calls have in common."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

from kvtoolkit.arrays.types import Array


class Options(NamedTuple):
    """The options of a call as the caller gave them; `kvtoolkit.paged_attention` says what each one means."""

    cu_seqlens_q: Any = None
    softmax_scale: float | None = None
    causal: Any = True
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: Any = None
    alibi_slopes: Any = None
    out: Any = None
    return_lse: Any = False
    num_splits: int = 0
    backend: str | None = None
    max_seqlen_q: int | None = None
    plan: Any = None


make_options: Callable[[tuple[Any, ...]], Options] = functools.partial(tuple.__new__, Options)
"""`Options` from all of its fields, faster than its class does it."""


class AttendOptions(TypedDict, total=False):
    """What `kvtoolkit.Step.attend` takes by keyword; `kvtoolkit.paged_attention` says what each one means."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    sinks: Array | None
    alibi_slopes: Array | None
    out: Array | None
    return_lse: bool
    num_splits: int
    backend: str | None
