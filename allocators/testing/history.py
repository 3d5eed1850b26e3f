"""What threads did to a pool, by the clock, and what follows from it.

A granule is *surely* owned from the response of the grant to the invocation of its free, and *maybe* owned from the
invocation of the grant to the response of the free. Two sure owners at one time are a proof of overlap; a refusal while
all maybe-owned blocks and the request would have fitted, at every instant of the call, is a proof of false exhaustion.
"""

import itertools
import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from allocators.testing.failure import expect, fail
from allocators.testing.model import Run


@dataclass(frozen=True)
class Event:
    """One call of one thread."""

    thread: int
    kind: Literal["grant", "free"]
    runs: tuple[Run, ...]
    """What was granted or freed."""
    invoked: int
    """Nanoseconds, as ``responded``."""
    responded: int
    missing: int = 0
    """Blocks that a grant refused, 0 if it was contended and refused nothing for certain."""


def check_history(events: list[Event], *, block: int | None = None, capacity: int = 0) -> None:
    """Prove what can be proved wrong in a history.

    Args:
        events: of all threads, in each thread's order.
        block: the one size in granules that all calls granted and freed, if there was one.
        capacity: blocks of that size in the pool; False exhaustion is looked for only if ``block`` is given.

    Raises:
        ConformanceFailure: "disjoint" or "exact exhaustion".
    """
    _check_disjoint(events)
    if block is not None:
        _check_exhaustion(events, block, capacity)


def _check_disjoint(events: list[Event]) -> None:
    owned: dict[int, list[tuple[int, float, int]]] = {}
    since: dict[tuple[int, int], int] = {}
    for event in events:
        for start, size in event.runs:
            for granule in range(start, start + size):
                if event.kind == "grant":
                    if (event.thread, granule) in since:
                        fail("disjoint", f"granule {granule} was granted to thread {event.thread}, which held it")
                    since[event.thread, granule] = event.responded
                else:
                    begin = since.pop((event.thread, granule))
                    owned.setdefault(granule, []).append((begin, event.invoked, event.thread))
    for (thread, granule), begin in since.items():
        owned.setdefault(granule, []).append((begin, math.inf, thread))
    for granule, intervals in owned.items():
        intervals.sort()
        for (_, end, first), (begin, _, second) in itertools.pairwise(intervals):
            if begin < end:
                fail("disjoint", f"granule {granule} belonged to threads {first} and {second} at once")


def _check_exhaustion(events: list[Event], block: int, capacity: int) -> None:
    changes: list[tuple[int, int]] = []
    for event in events:
        count = sum(size for _, size in event.runs) // block
        changes.append((event.invoked, count) if event.kind == "grant" else (event.responded, -count))
    # at one instant, what may have been granted counts before what may have been freed
    changes.sort(key=lambda change: (change[0], -change[1]))
    times = [time for time, _ in changes]
    held, most = 0, [0]
    for _, count in changes:
        held += count
        most.append(held)
    for event in events:
        if event.missing:
            # from just before the call on; what the call itself was granted is in the count
            first, last = bisect_left(times, event.invoked), bisect_left(times, event.responded + 1)
            peak = max(most[first : last + 1])
            expect(
                peak + event.missing > capacity,
                "exact exhaustion",
                f"thread {event.thread} was refused {event.missing} blocks, at most {peak} of {capacity} being held",
            )
