"""Run the conformance kit for as long as you like: the engine of ``kvtoolkit fuzz``."""

import argparse
import ast
import importlib.util
import random
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from allocators._command_line import Parser, quietly
from allocators._fuzz_arguments import add_arguments
from allocators.epochs import EpochPool
from allocators.errors import AllocatorError
from allocators.protocol import BlockAllocator
from allocators.registry import create
from allocators.testing.conformance import run_conformance
from allocators.testing.machine import Make
from allocators.testing.threads import run_threads

Round = Callable[[Make, int, bool], int]

_POOL_SIZES = (8, 24, 64, 200, 512, 1024)
_KINDS = ("calls", "epochs", "threads")
"""What rounds try: first a short one of each, then in turn."""


def fuzz(
    spec: str,
    seconds: float = 60.0,
    seed: int = 0,
    num_granules: int | None = None,
    options: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
    *,
    first_round: int = 0,
    more: Mapping[str, Round] | None = None,
) -> int:
    """Try to break an allocator until the time is over. The same seed tries the same calls in the same order.

    The first rounds are short, one of each kind, so that a run of seconds has tried a little of everything.

    Args:
        spec: name or ``"package.module:Class"``, as for `allocators.create`.
        seconds: after which no new round begins; the first is always run.
        seed: of everything that is drawn. What threads do to each other is not drawn.
        num_granules: size of the pool; None for several in turn.
        options: of the allocator.
        stream: where to report; None for standard output.
        first_round: where to begin, to come back to a failure at once.
        more: further kinds of rounds, which come first, by name: called with what makes a fresh pool, a seed and
            whether the round is a short one, they raise what they find and return how many operations they did.

    Returns:
        0, or 1 after a failure, which has been printed with the calls that lead there and the command to repeat it.
    """
    out = sys.stdout if stream is None else stream
    options = dict(options or {})
    try:
        create(spec, num_granules or _POOL_SIZES[0], **options)
    except AllocatorError as error:
        print(f"fuzz: {error}", file=out)
        return 1
    print(f"fuzz: {spec}, seed {seed}, {seconds:g} s", file=out, flush=True)
    began = time.monotonic()
    number = first_round
    operations = 0
    more = dict(more or {})
    kinds = [*more, *_KINDS]
    tried: set[str] = set()
    with _Progress(out, seconds) as progress:
        while number == first_round or time.monotonic() - began < seconds:
            size = num_granules or random.Random(f"{seed} {number}").choice(_POOL_SIZES)
            kind = kinds[number % len(kinds)]
            is_short = number < len(kinds)
            progress.begin(kind, size)
            found = _run_round(spec, kind, size, options, seed, number, more, is_short, progress.tell)
            tried.add(kind)
            if not isinstance(found, int):
                progress.stop()
                again = replay_command(spec, seed, num_granules, options, number)
                _report(found, f"round {number}, {kind}, {size} granules", again, out)
                return 1
            operations += found
            number += 1
            progress.show(time.monotonic() - began, number - first_round, kind, size)
    counted = f", {operations} operations of kernels" if operations else ""
    print(f"fuzz: {number - first_round} rounds{counted}, nothing found", file=out)
    if missed := [kind for kind in kinds if kind not in tried]:
        print(f"fuzz: no round of {', '.join(missed)} was reached; give it more --seconds", file=out)
    out.flush()
    return 0


def replay_command(spec: str, seed: int, num_granules: int | None, options: Mapping[str, Any], first_round: int) -> str:
    """The command line that runs one round again."""
    words = ["kvtoolkit", "fuzz", "--allocator", spec, "--seconds", "0", "--seed", str(seed)]
    if num_granules is not None:
        words += ["--num-granules", str(num_granules)]
    for key, value in options.items():
        words += ["--option", f"{key}={value}"]
    return shlex.join([*words, "--first-round", str(first_round)])


def main(args: argparse.Namespace, more: Mapping[str, Round] | None = None) -> int:
    """Run `fuzz` with parsed arguments; returns the exit status: that of `fuzz`, or 2 for wrong arguments."""
    look_in_current_folder()
    try:
        options = parse_options(args.option)
        create(args.allocator, args.num_granules or _POOL_SIZES[0], **options)
    except (ValueError, AllocatorError) as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 2
    return fuzz(
        args.allocator, args.seconds, args.seed, args.num_granules, options, sys.stdout,
        first_round=args.first_round, more=more,
    )  # fmt: skip


def look_in_current_folder() -> None:
    """Find modules of plug-ins in the current folder, where a console script does not look by itself."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["layout=slab", "block_sizes=[8, 16]"]`` as a dict; a value that is no Python literal is a string.

    Raises:
        ValueError: a pair has no equals sign.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--option: expected KEY=VALUE, got {pair!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def _run_round(
    spec: str, kind: str, num_granules: int, options: dict[str, Any], seed: int, number: int,
    more: Mapping[str, Round], is_short: bool, report: Callable[[str], None],
) -> Exception | SystemExit | int:  # fmt: skip
    """What was found, or how many operations a kind of ``more`` did."""

    def make() -> BlockAllocator:
        return create(spec, num_granules, **options)

    round_seed = seed * 1_000_003 + number
    made = (
        f"create({spec!r}, {', '.join([str(num_granules), *(f'{key}={value!r}' for key, value in options.items())])})"
    )
    examples = 5 if is_short else 50
    try:
        if kind in more:
            return more[kind](make, round_seed, is_short)
        if kind == "threads":
            run_threads(make, max_examples=1 if is_short else 10, num_ops=100 if is_short else 500, seed=round_seed)
        elif kind == "epochs":
            run_conformance(
                lambda: EpochPool(make()), max_examples=examples, seed=round_seed, report=report,
                opening=f"from allocators import EpochPool, create; pool = EpochPool({made})",
            )  # fmt: skip
        else:
            run_conformance(
                make, max_examples=examples, seed=round_seed, report=report,
                opening=f"from allocators import create; pool = {made}",
            )  # fmt: skip
    except (Exception, SystemExit) as failure:  # of a plug-in
        return failure
    return 0


def _report(failure: BaseException, where: str, command: str, out: TextIO) -> None:
    print(f"fuzz: FAILED in {where}", file=out)
    print("".join(traceback.format_exception_only(failure)), file=out)
    print(f"again: {command}", file=out, flush=True)


class _Progress:
    """A line that is rewritten where rich is installed and somebody watches, else a line every ten seconds."""

    def __init__(self, out: TextIO, seconds: float) -> None:
        self._out = out
        self._seconds = seconds
        self._shown = 0.0
        self._where = ""
        self._status: Any = None
        if out.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.console import Console

            self._status = Console(file=out).status("round 0")

    def begin(self, kind: str, num_granules: int) -> None:
        self._where = f"{kind}, {num_granules} granules"

    def tell(self, line: str) -> None:
        """What a round says while it runs."""
        if self._status is not None:
            self._status.update(f"{self._where}: {line}")
        else:
            print(f"{self._where}: {line}", file=self._out, flush=True)

    def show(self, elapsed: float, rounds: int, kind: str, num_granules: int) -> None:
        line = f"{elapsed:.0f} of {self._seconds:g} s, {rounds} rounds, last: {kind}, {num_granules} granules"
        if self._status is not None:
            self._status.update(line)
        elif elapsed - self._shown >= 10:
            self._shown = elapsed
            print(line, file=self._out, flush=True)

    def stop(self) -> None:
        if self._status is not None:
            self._status.stop()

    def __enter__(self) -> "_Progress":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


if __name__ == "__main__":
    _parser = Parser("python -m allocators.testing.fuzz", description=__doc__)
    add_arguments(_parser)
    sys.exit(quietly(lambda: main(_parser.parse_args())))
