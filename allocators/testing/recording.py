"""What led to a failure: the calls of an example as a script, the shortest failing one, and an end to the search for it.

Hypothesis shrinks for minutes, in silence, and tells the rules of the machine. Here the calls of the pool are written
down as they are made, the search ends when its time is over, and what is raised is the failure with its script.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

from hypothesis.errors import HypothesisException
from hypothesis.stateful import invariant, rule

_REPORT_EVERY_S = 5.0


class ShrinkingIsOver(BaseException):
    """Ends a run of Hypothesis, which lets nothing else than an error of the tested code end one."""


class Recorder:
    """The calls of the example that runs, and of the shortest example that failed.

    Args:
        shrink_s: seconds after the first failure in which shorter examples are looked for.
        report: is told now and then how far that is.
    """

    def __init__(self, shrink_s: float = 30.0, report: Callable[[str], None] | None = None) -> None:
        self.script: list[str] = []
        self.failure: Exception | None = None
        self.failed_script: list[str] = []
        self._shrink_s = shrink_s
        self._report = report
        self._num_tries = 0
        self._failed_at = self._reported_at = 0.0

    def begin(self) -> None:
        """Another example begins."""
        self.script = ["pool = make()"]
        self._num_tries += 1
        self.look_at_the_clock()

    def look_at_the_clock(self) -> None:
        """Raise `ShrinkingIsOver` if it is; report."""
        if self.failure is None:
            return
        now = time.monotonic()
        if now - self._failed_at >= self._shrink_s:
            raise ShrinkingIsOver
        if self._report is not None and now - self._reported_at >= _REPORT_EVERY_S:
            self._reported_at = now
            self._report(
                f"shrinking: {self._num_tries} tries, {len(self.failed_script)} calls, "
                f"{now - self._failed_at:.0f} of at most {self._shrink_s:g} s"
            )

    def note(self, line: str) -> None:
        """Write a call down, as Python that can be pasted."""
        self.script.append(line)

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


def recorded_rule(**strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """As Hypothesis' ``rule``, for a machine with a ``recorder``."""
    return lambda function: rule(**strategies)(_recorded(function))


def recorded_invariant() -> Callable[[Callable[..., None]], Any]:
    """As Hypothesis' ``invariant``, likewise."""
    return lambda function: invariant()(_recorded(function))


def _recorded(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(machine: Any, *arguments: Any, **options: Any) -> None:
        machine.recorder.look_at_the_clock()
        try:
            function(machine, *arguments, **options)
        except HypothesisException:
            raise
        except Exception as failure:
            machine.recorder.failed(failure)
            raise

    return run
