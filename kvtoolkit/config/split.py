"""How slots are divided among groups of layers for sequences of expected lengths, see `CacheConfig.for_model`.

For sequences of lengths ``L`` a group has slots in proportion to what they hold there on average:

    all tokens           mean(L)
    a window or chunk    mean(min(L, window + 70)), and step_tokens beside it, once for the whole group
"""

from collections.abc import Callable, Sequence
from typing import Any

from kvtoolkit.arrays.types import as_int
from kvtoolkit.config.groups import fill_memory
from kvtoolkit.errors import ConfigError

SLACK = 70
"""Tokens beside its window that a sequence holds in a decode step: the new one, and up to 69 slots of room."""
_BLOCK = 64


def groups_of(spans: Sequence[int]) -> list[dict[str, Any]]:
    """The entries of `CacheConfig.layer_groups` for layers with these windows, chunks (as minus ``chunk``), or 0."""
    groups: dict[int, dict[str, Any]] = {}
    for layer, span in enumerate(spans):
        if span not in groups:
            groups[span] = {"layers": []} | ({"window": span} if span > 0 else {"chunk": -span} if span else {})
        groups[span]["layers"].append(layer)
    return list(groups.values())


def as_lengths(lengths: Any) -> list[int]:
    """Expected lengths as a list of ints; ConfigError unless it is a length or a sequence of them."""
    single = as_int(lengths)
    try:
        given = [single] if single is not None else [as_int(one) for one in lengths]
    except TypeError:
        given = []
    found = [one for one in given if one is not None and one > 0]
    if not found or len(found) < len(given):
        raise ConfigError(f"lengths: expected a number of tokens, or a sequence of them, got {lengths!r:.80}")
    return found


class Split:
    """The blocks of 64 tokens that each group has.

    Args:
        spans: for each group: the window, the chunk as a negative number, or 0 if it keeps all tokens.
        lengths: expected lengths of sequences.
        step_tokens: most new tokens in a step.
    """

    def __init__(self, spans: Sequence[int], lengths: Sequence[int], step_tokens: int) -> None:
        self._spans, self._step_tokens = spans, step_tokens
        bounds = [abs(span) + SLACK if span else max(lengths) for span in spans]
        self._held = [sum(min(length, bound) for length in lengths) for bound in bounds]
        self._total = sum(lengths)

    def of_tokens(self, num_tokens: int) -> list[int]:
        """Where a group that keeps all tokens has ``num_tokens`` slots."""
        slots = [-(-num_tokens * held // self._total) for held in self._held]
        steps = [self._step_tokens if span else 0 for span in self._spans]
        return [-(-(count + step) // _BLOCK) for count, step in zip(slots, steps, strict=True)]

    def of_memory(self, memory: int, nbytes_of: Callable[[list[int]], int]) -> list[int]:
        """The most in ``memory`` bytes; all 0 if nothing fits. ``nbytes_of``: bytes of so many blocks of each group."""
        return fill_memory(lambda count: self.of_tokens(_BLOCK * count), memory, nbytes_of)
