"""What led to a failure: the calls of an example as a script, of the shortest that fails, and an end to the search.

Hypothesis shrinks for minutes, in silence, and tells the rules of the machine. Here the calls of the pool are written
down as they are made, the search ends when its time is over, and what is raised is the failure with its script.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis.errors import HypothesisException
from hypothesis.stateful import invariant, rule

from allocators.errors import AllocatorError
from allocators.testing.failure import ConformanceFailure

_REPORT_EVERY_S = 5.0


class ShrinkingIsOver(BaseException):
    """Ends a run of Hypothesis, which lets nothing else than an error of the tested code end one."""


class Recorder:
    """The calls of the example that runs, and of the shortest example that failed.

    Args:
        shrink_s: seconds after the first failure in which shorter examples are looked for.
        report: is told now and then how far that is.
        opening: the line that makes the pool.
    """

    def __init__(
        self, shrink_s: float = math.inf, report: Callable[[str], None] | None = None, opening: str = "pool = make()"
    ) -> None:
        self.opening = opening
        self.script: list[str] = []
        self.failure: Exception | None = None
        self.failed_script: list[str] = []
        self.is_over = False
        """Whether the search was cut short."""
        self._shrink_s = shrink_s
        self._report = report
        self._num_tries = 0
        self._failed_at = self._reported_at = 0.0

    def begin(self) -> None:
        """Another example begins."""
        self.script = [self.opening]
        self._num_tries += 1
        self.look_at_the_clock()

    def look_at_the_clock(self) -> None:
        """Raise `ShrinkingIsOver` if it is; report."""
        if self.failure is None:
            return
        now = time.monotonic()
        if now - self._failed_at >= self._shrink_s:
            self.is_over = True
            raise ShrinkingIsOver
        if self._report is not None and now - self._reported_at >= _REPORT_EVERY_S:
            self._reported_at = now
            self._report(
                f"shrinking: {self._num_tries} tries, {len(self.failed_script)} calls, "
                f"{now - self._failed_at:.0f} of at most {self._shrink_s:g} s"
            )

    def call(self, line: str, action: Callable[[], Any]) -> Any:
        """Write a call down, as Python that can be pasted, make it, and write down what came of it."""
        self.script.append(line)
        try:
            outcome = action()
        except Exception as error:
            self.script[-1] += f"  # {type(error).__name__}"
            raise
        if outcome is not None:
            self.script[-1] += f"  # {brief(outcome)}"
        return outcome

    def failed(self, failure: Exception) -> None:
        """The example that runs has failed."""
        if self.failure is None:
            self._failed_at = self._reported_at = time.monotonic()
            self._num_tries = 0
            if self._report is not None and self._shrink_s > 0:
                self._report(f"found after {len(self.script)} calls: {failure!s:.200}; looking for fewer")
        elif len(self.script) > len(self.failed_script):
            return
        self.failure, self.failed_script = failure, list(self.script)

    def the_failure(self, *more: str) -> Exception:
        """The failure of the shortest example, with its script and ``more`` as its only notes."""
        assert self.failure is not None
        self.failure.__notes__ = []
        for note in ("the calls that lead there:\n    " + "\n    ".join(self.failed_script), *more):
            self.failure.add_note(note)
        return self.failure


def literal(values: Any) -> str:
    """Python for a list of numbers, short if all are the same; of anything else what `repr` says."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list) and len(values) > 8 and len(set(map(repr, values))) == 1:
        return f"[{values[0]!r}] * {len(values)}"
    return repr(values)


def brief(outcome: Any) -> str:
    """An outcome for a comment."""
    text = literal(outcome)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def recorded_rule(**strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """Hypothesis' ``rule`` for a machine with a ``recorder``."""
    return lambda function: rule(**strategies)(_recorded(function))  # type: ignore[no-untyped-call]


def recorded_invariant() -> Callable[[Callable[..., None]], Any]:
    """Hypothesis' ``invariant`` for a machine with a ``recorder``."""
    return lambda function: invariant()(_recorded(function))


def _recorded(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(machine: Any, *arguments: Any, **options: Any) -> None:
        machine.recorder.look_at_the_clock()
        try:
            function(machine, *arguments, **options)
        except HypothesisException:
            raise
        except ConformanceFailure as failure:
            machine.recorder.failed(failure)
            raise
        except (Exception, SystemExit) as error:  # of a call that the machine makes besides those it draws
            promise = "proper use is granted" if isinstance(error, AllocatorError) else "only AllocatorErrors"
            broken = ConformanceFailure(promise, f"{type(error).__name__}: {error}")
            machine.recorder.failed(broken)
            raise broken from error

    return run
