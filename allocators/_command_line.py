"""What command lines have in common: numbers with bounds, errors of one line, and a quiet end."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130
CLOSED_PIPE = 141
"""Exit statuses, as a shell reports a process that SIGINT or SIGPIPE ended."""


class Parser(argparse.ArgumentParser):
    """A parser that says in one line which option is wrong, without the usage of all others."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        option = message.removeprefix("argument ")
        if option == message:
            super().error(message)
        self.exit(2, f"{self.prog}: {option}\n")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """The ``type`` of an option: an integer from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r:.80}") from None
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {bounds}, got {text:.80}")
        return value

    return parse


def number(low: float, *, infinite: bool = False) -> Callable[[str], float]:
    """The ``type`` of an option: a finite number from ``low`` on; with ``infinite`` also ``inf``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r:.80}") from None
        if not value >= low or (value == math.inf and not infinite):
            kind = "number" if infinite else "finite number"
            raise argparse.ArgumentTypeError(f"expected a {kind} of at least {low:g}, got {text:.80}")
        return value

    return parse


def quietly(command: Callable[[], int]) -> int:
    """Run a command, and return its exit status; Ctrl-C and a reader that has gone end it without a traceback."""
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, because the interpreter would report a failure of its own flush
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, BrokenPipeError):
            _drop_output()
            return CLOSED_PIPE
        if not _is_interrupt(error):
            raise
        return INTERRUPTED


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or one that Ctrl-C has caused, as in the middle of a compilation."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _drop_output() -> None:
    """Let what is still buffered go nowhere."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # of a stream that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
