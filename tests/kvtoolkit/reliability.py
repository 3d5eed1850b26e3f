"""Break caches in every way the tests know, many times: ``python -m tests.kvtoolkit.reliability [--every N]``.

Prints the table of ``docs/results/reliability.md``: how often each was tried, and what came of it. The first thing that
is not as it must be ends the run with an error.
"""

import argparse
import time
from collections.abc import Iterator

from tests.kvtoolkit.cache.broken_calls import CONFIGS
from tests.kvtoolkit.cache.test_failing_parts import ALL, HERE, PARTS, fail_everywhere
from tests.kvtoolkit.cache.test_interruptions import Interrupted, break_everywhere, interrupt_by_signals
from tests.kvtoolkit.cache.test_snapshots import damage_snapshots

Row = tuple[str, int, str]


def interruptions(every: int) -> Iterator[Row]:
    for name, config in CONFIGS.items():
        counts = break_everywhere(config, every)
        yield f"exception at every {every}. line of {len(counts)} calls, `{name}`", sum(counts.values()), "all whole"


def failures(every: int) -> Iterator[Row]:
    for name, config in PARTS.items():
        for when, error in (("before", MemoryError), ("after", RuntimeError), ("before", Interrupted)):
            counts = fail_everywhere(config, ALL, when, error, every=every)
            what = f"`{error.__name__}` {when} every {every}. call of {', '.join(sorted(counts))}, `{name}`"
            yield what, sum(counts.values()), "all whole"
    config = {**PARTS["buddy"], "allocator": f"{HERE}:NoRebuild"}
    counts = fail_everywhere(config, ("allocate", "free"), "after", Interrupted, exact=False, every=every)
    yield "interrupted inside an allocator without `rebuild`", sum(counts.values()), "all whole, the loss reported"


def signals(tries: int, seed: int) -> Iterator[Row]:
    counts = interrupt_by_signals(tries, seed)
    result = (
        f"{counts['interrupted']} interrupted, all whole; ids lost by the engine {counts['ids lost by the engine']}"
    )
    yield "a signal at a random moment of an engine's work", tries, result


def snapshots(tries: int, seed: int) -> Iterator[Row]:
    for name in ("buddy", "slab", "tiers"):
        counts = damage_snapshots(name, tries, seed)
        result = f"{counts['refused']} refused, {counts['used']} resumed and used without harm"
        yield f"snapshot with wrong numbers and a right checksum, `{name}`", tries, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="break at every so many lines and calls")
    parser.add_argument("--signals", type=int, default=2000)
    parser.add_argument("--snapshots", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| what | tried | what came of it | s |\n|---|---|---|---|", flush=True)
    for rows in (
        signals(options.signals, options.seed),
        snapshots(options.snapshots, options.seed),
        failures(options.every),
        interruptions(options.every),
    ):
        begin = time.perf_counter()
        for what, tried, result in rows:
            print(f"| {what} | {tried} | {result} | {time.perf_counter() - begin:.0f} |", flush=True)
            begin = time.perf_counter()


if __name__ == "__main__":
    main()
