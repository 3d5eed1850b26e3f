"""The options that all attention calls have in common."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

from kvtoolkit.arrays.types import Array


class Options(NamedTuple):
    """The options of a call as the caller gave them; `kvtoolkit.paged_attention` says what each one means."""

    cu_seqlens_q: Any
    softmax_scale: float | None
    causal: Any
    window_size: tuple[int, int]
    softcap: float
    sinks: Any
    alibi_slopes: Any
    out: Any
    return_lse: Any
    num_splits: int
    backend: str | None


make_options: Callable[[tuple[Any, ...]], Options] = functools.partial(tuple.__new__, Options)
"""`Options` from all their fields, in a third of the time that the class takes."""


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
