"""The same promises with several threads: drawn programs with recorded histories, tight loops, and races to free."""

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from allocators.errors import AllocatorError, ContendedError, IntegrityError, InvalidFreeError, OutOfBlocksError
from allocators.protocol import GRANULE, AllocatorStats, BlockAllocator, Int32Array
from allocators.testing.failure import ConformanceFailure, expect, fail
from allocators.testing.history import Event, check_history
from allocators.testing.machine import Make, check_as_fresh, is_own
from allocators.testing.model import Run

Tags = NDArray[np.int64]
Step = tuple[str, list[int]]
"""What a thread does, and the picks that say with which sizes or blocks."""

_STEP = st.tuples(
    st.sampled_from(["allocate", "allocate", "allocate_partial", "free", "free", "free_in_parts"]),
    st.lists(st.integers(0, 99), min_size=1, max_size=6),
)
_PROGRAMS = st.lists(st.lists(_STEP, min_size=1, max_size=15), min_size=2, max_size=4)


def run_threads(
    make: Make,
    *,
    num_threads: int = 4,
    max_examples: int = 30,
    num_ops: int = 2000,
    seed: int | None = None,
    timeout_s: float = 60.0,
) -> None:
    """Try to break an allocator from several threads.

    Args:
        make: makes a fresh pool. Every call must return a new object of the same kind.
        num_threads: threads of the tight loops; drawn programs have 2 to 4.
        max_examples: programs to draw.
        num_ops: calls of each thread in a tight loop.
        seed: of programs and loops; interleavings are the machine's.
        timeout_s: after which a thread counts as hung.

    Raises:
        ConformanceFailure: it broke a promise, which ``invariant`` names; nothing else, whatever the allocator raises.
    """
    with frequent_switches(), _only_failures():
        run_programs(make, max_examples=max_examples, seed=seed, timeout_s=timeout_s)
        race_to_free(make, num_threads=num_threads, seed=seed or 0, timeout_s=timeout_s)
        hammer(make, num_threads=num_threads, num_ops=num_ops, seed=seed or 0, timeout_s=timeout_s)
        for fill in (False, True):
            stay_within_quotas(
                make, num_threads=num_threads, num_ops=num_ops, fill=fill, seed=seed or 0, timeout_s=timeout_s
            )


@contextlib.contextmanager
def _only_failures() -> Iterator[None]:
    """Raise what an allocator raised as the promise that it broke."""
    try:
        yield
    except ConformanceFailure:
        raise
    except (Exception, SystemExit) as error:
        raise _as_failure(error, "the calls after the threads") from error


# -- drawn programs ----------------------------------------------------------------------------------------------------


def run_programs(make: Make, *, max_examples: int = 30, seed: int | None = None, timeout_s: float = 60.0) -> None:
    """Hypothesis draws a program for each of 2-4 threads; what they did is recorded and checked.

    Raises:
        ConformanceFailure: with the programs in its notes. They are not shrunk: a race does not come back on demand.
    """
    failures: list[ConformanceFailure] = []

    @settings(
        max_examples=max_examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(programs=_PROGRAMS, one_size=st.booleans())
    def run(programs: list[list[Step]], one_size: bool) -> None:
        if failures:
            return
        try:
            run_program(make, programs, one_size=one_size, timeout_s=timeout_s)
        except ConformanceFailure as failure:
            failure.add_note(f"run_program(make, {programs}, {one_size=})")
            failures.append(failure)

    if seed is not None:
        run = hypothesis.seed(seed)(run)
    run()
    if failures:
        raise failures[0]


def run_program(make: Make, programs: Sequence[Sequence[Step]], *, one_size: bool, timeout_s: float = 60.0) -> None:
    """Run one program on each thread, starting together, and check the history and what is left.

    Args:
        make: makes a fresh pool.
        programs: steps of each thread.
        one_size: ask for the smallest size alone, and free whole blocks; then exhaustion is checked as well.
        timeout_s: after which a thread counts as hung.
    """
    pool = make()
    fresh = pool.stats()
    sizes = [size // GRANULE for size in pool.block_sizes][: 1 if one_size else None]
    threads = [_Recorder(pool, number, sizes) for number in range(len(programs))]
    in_parallel(
        [partial(thread.run, program, not one_size) for thread, program in zip(threads, programs, strict=True)],
        timeout_s,
    )
    events = [event for thread in threads for event in thread.events]
    check_history(events, block=sizes[0] if one_size else None, capacity=fresh.free_blocks[pool.block_sizes[0]])
    held = [run for thread in threads for run in thread.held]
    check_end(pool, held, fresh, timeout_s)


@dataclass
class _Recorder:
    """A thread's blocks and its part of the history."""

    pool: BlockAllocator
    number: int
    sizes: list[int]
    held: list[Run] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def run(self, program: Sequence[Step], parts: bool) -> None:
        for name, picks in program:
            if name.startswith("allocate"):
                sizes = [self.sizes[pick % len(self.sizes)] for pick in picks]
                self.allocate(sizes, name == "allocate_partial")
            else:
                chosen = [self.held.pop(pick % len(self.held)) for pick in picks[: len(self.held)]]
                if parts and name == "free_in_parts":
                    for start, size in chosen:
                        half = (size + 1) // 2
                        self.free([(start, half)])
                        self.free([(start + half, size - half)] if size > half else [])
                else:
                    self.free(chosen)

    def allocate(self, sizes: list[int], only_part: bool) -> None:
        invoked = time.perf_counter_ns()
        try:
            starts, missing = self.pool.allocate(sizes, partial=only_part).tolist(), 0
        except ContendedError:
            return
        except OutOfBlocksError:
            starts, missing = [], len(sizes)
        responded = time.perf_counter_ns()
        runs = [(start, size) for start, size in zip(starts, sizes, strict=False) if start >= 0]
        if only_part and len(runs) < len(sizes):
            missing = 1
        self.held += runs
        self.events.append(Event(self.number, "grant", tuple(runs), invoked, responded, missing))

    def free(self, runs: list[Run]) -> None:
        invoked = time.perf_counter_ns()
        free_all(self.pool, runs)
        self.events.append(Event(self.number, "free", tuple(runs), invoked, time.perf_counter_ns()))


# -- tight loops -------------------------------------------------------------------------------------------------------


def hammer(make: Make, *, num_threads: int = 4, num_ops: int = 2000, seed: int = 0, timeout_s: float = 60.0) -> None:
    """Threads allocate and free at random; each writes its tag on what it holds, and finds it there when it frees."""
    pool = make()
    fresh = pool.stats()
    storage = np.zeros(pool.num_granules, np.int64)
    sizes = [size // GRANULE for size in pool.block_sizes]
    most = max(4, min(256, pool.num_granules // (2 * num_threads * sizes[-1])))
    left: list[Run] = []

    def work(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        held: list[Run] = []
        for _ in range(num_ops):
            if held and rng.random() < 0.45:
                rng.shuffle(held)
                count = rng.randint(1, len(held) if rng.random() < 0.3 else min(4, len(held)))
                chosen, held = held[:count], held[count:]
                clear_tags(storage, chosen, number + 1)
                free_all(pool, chosen)
                continue
            # now and then a long batch, in which a thread without the GIL is long enough to be met by another
            count = rng.randint(1, 4) if rng.random() < 0.8 else rng.randint(1, most)
            wanted = rng.choices(sizes, k=count)
            try:
                starts = pool.allocate(wanted, partial=rng.random() < 0.3)
            except OutOfBlocksError:
                continue
            granted = [(start, size) for start, size in zip(starts.tolist(), wanted, strict=True) if start >= 0]
            write_tags(storage, granted, number + 1)
            held += granted
        left.extend(held)

    in_parallel([partial(work, number) for number in range(num_threads)], timeout_s)
    check_end(pool, left, fresh, timeout_s)


def stay_within_quotas(
    make: Make,
    *,
    num_threads: int = 4,
    num_ops: int = 2000,
    fill: bool = False,
    share: int | None = None,
    greedy: bool = True,
    seed: int = 0,
    timeout_s: float = 60.0,
) -> None:
    """Threads that never hold more than their share are never refused, whatever others ask for in vain.

    All ask for the smallest size.

    Args:
        make: makes a fresh pool.
        num_threads: threads, the greedy one included.
        num_ops: calls of each thread.
        fill: take most of the pool before.
        share: blocks that a thread may hold; by default all that there are, divided.
        greedy: let one thread ask for more than the pool has, again and again. An allocator that takes part of that and
            gives it back must not let the others see it.
        seed: of the calls.
        timeout_s: after which a thread counts as hung.
    """
    pool = make()
    fresh = pool.stats()
    size, largest = pool.block_sizes[0] // GRANULE, pool.block_sizes[-1] // GRANULE
    filling: list[Run] = []
    if fill:
        starts = pool.allocate([largest] * fresh.free_blocks[pool.block_sizes[-1]])
        filling = [(start, largest) for start in starts.tolist()]
        room = max(1, 64 // largest)
        free_all(pool, filling[-room:])
        del filling[-room:]
    capacity = pool.stats().free_blocks[pool.block_sizes[0]]
    num_workers = max(1, num_threads - greedy)
    share = capacity // num_workers if share is None else min(share, capacity // num_workers)
    storage = np.zeros(pool.num_granules, np.int64)
    running = threading.Event()

    def work(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        held: list[Run] = []
        for _ in range(num_ops):
            if held and (len(held) == share or rng.random() < 0.5):
                chosen = [held.pop(rng.randrange(len(held))) for _ in range(rng.randint(1, min(3, len(held))))]
                clear_tags(storage, chosen, number + 1)
                free_all(pool, chosen)
            elif share:
                count = rng.randint(1, min(3, share - len(held)))
                granted = [(start, size) for start in take_share(pool, size, count).tolist()]
                write_tags(storage, granted, number + 1)
                held += granted
        clear_tags(storage, held, number + 1)
        free_all(pool, held)

    def ask_for_too_much() -> None:
        while running.is_set():
            for count in (capacity + 1, pool.num_granules + 1):
                try:
                    pool.allocate(np.full(count, size, np.int32))
                except OutOfBlocksError:
                    continue
                fail("exact exhaustion", f"{count} blocks were granted of a pool with room for {capacity}")

    running.set()
    workers = [partial(work, number) for number in range(num_workers)]
    in_parallel(workers, timeout_s, meanwhile=ask_for_too_much if greedy else None, running=running)
    check_end(pool, filling, fresh, timeout_s)


def take_share(pool: BlockAllocator, size: int, count: int) -> Int32Array:
    """Blocks that must be granted."""
    while True:
        try:
            return pool.allocate([size] * count)
        except ContendedError:  # says itself that it does not know
            continue
        except OutOfBlocksError as error:
            fail("exact exhaustion", f"refused {count} blocks of a thread's own share: {error}")


def race_to_free(
    make: Make, *, num_threads: int = 4, num_rounds: int = 20, seed: int = 0, timeout_s: float = 60.0
) -> None:
    """Every thread frees every block: one a call, all in one call, or as one run. One call for each block succeeds."""
    pool = make()
    fresh = pool.stats()
    size = pool.block_sizes[-1] // GRANULE
    for number in range(num_rounds):
        starts = pool.allocate([size] * fresh.free_blocks[pool.block_sizes[-1]]).tolist()
        order = random.Random(seed * 1000 + number).sample(starts, len(starts))
        calls = [
            [([start], [size]) for start in order[:256]],
            [(order, [size] * len(order))],
            [([0], [pool.num_granules])],
        ][number % 3]
        expected = granules_of([run for call in calls for run in zip(*call, strict=True)]).tolist()
        freed: list[int] = []

        def work(calls: list[tuple[list[int], list[int]]] = calls, freed: list[int] = freed) -> None:
            for call in calls:
                try:
                    pool.free(*call)
                except InvalidFreeError:
                    continue
                freed += granules_of(list(zip(*call, strict=True))).tolist()

        in_parallel([work] * num_threads, timeout_s)
        expect(
            sorted(freed) == sorted(expected),
            "misuse is refused",
            f"{num_threads} threads freed the same {len(expected)} granules, {len(freed)} in all were accepted",
        )
        gone = set(expected)
        check_end(pool, [(start, size) for start in order if start not in gone], fresh, timeout_s)


# -- what they share ---------------------------------------------------------------------------------------------------


def in_parallel(
    bodies: Sequence[Callable[[], Any]],
    timeout_s: float,
    *,
    meanwhile: Callable[[], None] | None = None,
    running: threading.Event | None = None,
) -> None:
    """Run every body on a thread of its own, starting together; ``meanwhile`` until the others end, too.

    Raises:
        ConformanceFailure: of the first body that failed, or "bounded time" if one does not come back.
    """
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(bodies) + (meanwhile is not None))

    def guarded(body: Callable[[], Any]) -> None:
        try:
            barrier.wait(timeout_s)
            body()
        except BaseException as error:
            failures.append(error)

    # daemons: a hung one must not keep the process
    threads = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in bodies]
    aside = threading.Thread(target=guarded, args=(meanwhile,), daemon=True) if meanwhile else None
    for thread in [*threads, aside] if aside else threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    hung = sum(thread.is_alive() for thread in threads)
    if aside and running:
        running.clear()
        aside.join(timeout_s)
        hung += aside.is_alive()
    if failures:
        raise _as_failure(failures[0], "a thread")
    expect(not hung, "bounded time", f"{hung} of {len(bodies)} threads have not come back after {timeout_s} s")


def _as_failure(error: BaseException, who: str) -> BaseException:
    if isinstance(error, ConformanceFailure) or not isinstance(error, Exception | SystemExit):
        return error
    if isinstance(error, AllocatorError):
        return ConformanceFailure("proper use is granted", f"{who} got {error!r}")
    return ConformanceFailure("only AllocatorErrors", f"{who} got {error!r}")


@contextlib.contextmanager
def frequent_switches() -> Iterator[None]:
    """Let Python change threads every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def write_tags(storage: Tags, runs: list[Run], tag: int) -> None:
    """Mark what was granted; it must be nobody's."""
    granules = granules_of(runs)
    outside = granules[(granules < 0) | (granules >= len(storage))].tolist()
    expect(not outside, "inside the pool", f"granted granules {outside[:8]} of a pool of {len(storage)}")
    taken = granules[storage[granules] != 0].tolist()
    expect(not taken, "disjoint", f"granted to thread {tag}, but held by another: granules {taken[:8]}")
    storage[granules] = tag
    expect(len(np.unique(granules)) == len(granules), "disjoint", "a granule was granted twice in one call")


def clear_tags(storage: Tags, runs: list[Run], tag: int) -> None:
    """Unmark what is about to be freed; it must be marked still."""
    granules = granules_of(runs)
    lost = granules[storage[granules] != tag].tolist()
    expect(not lost, "canaries", f"of thread {tag}, but overwritten by another: granules {lost[:8]}")
    storage[granules] = 0


def granules_of(runs: list[Run]) -> Tags:
    """Every granule of every run."""
    if not runs:
        return np.empty(0, np.int64)
    starts, sizes = np.array(runs, np.int64).T
    within: Tags = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(starts, sizes) + within


def free_all(pool: BlockAllocator, runs: list[Run]) -> None:
    """Free the runs in one call."""
    pool.free([start for start, _ in runs], [size for _, size in runs])


def check_left(pool: BlockAllocator, num_held: int) -> None:
    """After the threads have ended: counts agree and the allocator finds nothing wrong with itself."""
    stats = pool.stats()
    expect(stats.num_live == num_held, "conserved", f"{num_held} granules are held, {stats.num_live} by stats()")
    expect(
        stats.num_free + stats.num_live + stats.pinned == stats.num_granules, "conserved", f"does not add up: {stats}"
    )
    try:
        pool.check_integrity()
    except IntegrityError as error:
        fail("integrity", str(error))


def check_end(pool: BlockAllocator, held: list[Run], fresh: AllocatorStats, timeout_s: float) -> None:
    """What must hold once the threads have ended: counts, and with ``held`` freed all is granted again.

    On a thread of its own, because one of those that ended may have left a lock behind.
    """

    def check() -> None:
        check_left(pool, sum(size for _, size in held))
        free_all(pool, held)
        check_fresh(pool, fresh)

    in_parallel([check], timeout_s)


def check_fresh(pool: BlockAllocator, fresh: AllocatorStats) -> None:
    """With all freed, nothing is in use, and the pool grants all that a fresh one does."""
    check_as_fresh(pool.stats(), fresh, is_own(pool))
    size = pool.block_sizes[0] // GRANULE
    count = fresh.free_blocks[pool.block_sizes[0]]
    try:
        starts = pool.allocate([size] * count).tolist()
    except OutOfBlocksError as error:
        fail("recovery", f"all is free, and {count} blocks of {size} granules are not granted: {error}")
    expect(len(set(starts)) == count, "disjoint", "a block was granted twice after all had been freed")
    pool.free(starts, [size] * count)
