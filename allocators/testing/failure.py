"""The one exception of the kit: an invariant, by name, and what contradicted it."""

from typing import NoReturn


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
