"""The one exception of the kit: an invariant, by name, and what contradicted it."""

import dataclasses
from typing import Any, NoReturn


class ConformanceFailure(AssertionError):  # noqa: N818 - a finding, not an error of the program
    """An allocator broke a promise.

    Attributes:
        invariant: name of the promise, one of those in the table of `allocators.testing`.
    """

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant


def fail(invariant: str, message: str) -> NoReturn:
    """Raise `ConformanceFailure`."""
    raise ConformanceFailure(invariant, message)


def expect(condition: bool, invariant: str, message: str) -> None:
    """Raise `ConformanceFailure` unless ``condition``."""
    if not condition:
        fail(invariant, message)


def difference(was: Any, now: Any) -> str:
    """How two values differ, in few words: where bytes do, which fields or keys do."""
    if isinstance(was, bytes) and isinstance(now, bytes):
        if len(was) != len(now):
            return f"{len(was)} bytes -> {len(now)} bytes"
        places = [i for i, (before, after) in enumerate(zip(was, now, strict=True)) if before != after]
        more = f", {len(places)} bytes in all" if len(places) > 1 else ""
        return f"byte {places[0]} of {len(was)}: {was[places[0]]:#04x} -> {now[places[0]]:#04x}{more}" if places else ""
    if dataclasses.is_dataclass(was) and type(was) is type(now):
        return difference(vars(was), vars(now))
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        return ", ".join(f"{key}: {difference(was.get(key), now.get(key))}" for key in keys)
    return f"{was!r:.80} -> {now!r:.80}"
