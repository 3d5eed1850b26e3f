"""Allocators of users, right and wrong: what the kit asks of them, and what it prints."""

import contextlib
import itertools
import threading
import time

import numpy as np
import pytest

from allocators import AllocatorError, BuddyAllocator, InvalidFreeError, OutOfBlocksError
from allocators.testing import ConformanceFailure, run_conformance, run_threads
from allocators.testing.failure import difference
from allocators.testing.recording import Recorder, ShrinkingIsOver, literal
from tests.allocators.tiny import TinyAllocator

# A search ends at the first failure. How long it takes depends on which modules are imported, because Hypothesis also
# draws the constants of their sources.
_MANY = 3000


class Wandering(TinyAllocator):
    """Right, but not first fit: where it looks first depends on what subclasses keep."""

    def _places(self, size):
        places = super()._places(size)
        first = self.turn() % len(places) if places else 0
        return places[first:] + places[:first]


class Cursor(Wandering):
    """Looks on from call to call, even from one that is refused, and forgets where it was when it is restored."""

    def __init__(self, num_granules, **options):
        super().__init__(num_granules, **options)
        self._cursor = 0

    def turn(self):
        self._cursor += 1
        return self._cursor

    def snapshot(self):
        self._cursor += 1
        return super().snapshot()

    def restore(self, data):
        super().restore(data)
        self._cursor = 0


class Random(Wandering):
    """Takes any place."""

    _draw = np.random.default_rng(1)

    def turn(self):
        return int(self._draw.integers(1000))


class Clock(Wandering):
    """Time goes on between any two calls, and its books grow with it."""

    _now = itertools.count()

    def turn(self):
        return next(self._now)

    def stats(self):
        found = super().stats()
        return type(found)(**{**vars(found), "metadata_nbytes": next(self._now)})


@pytest.mark.parametrize("kind", [Cursor, Random, Clock])
def test_a_correct_allocator_with_a_state_of_its_own_conforms(kind):
    run_conformance(lambda: kind(24), max_examples=15, num_steps=25)
    run_threads(lambda: kind(24), num_threads=2, max_examples=3, num_ops=40)


@pytest.mark.parametrize("kind", [Cursor, Random, Clock])
def test_determinism_is_asked_for_where_it_is_promised(kind):
    with pytest.raises(ConformanceFailure):
        run_conformance(lambda: kind(24), max_examples=_MANY, num_steps=25, deterministic=True, shrink=False)


class KeepsOne(BuddyAllocator):
    """Keeps a granule when all is freed: an emptied pool cannot grant what a fresh one can."""

    def free(self, starts, sizes):
        super().free(starts, sizes)
        if self.num_free == self.num_granules:
            super().allocate([1])


class FreesHalf(BuddyAllocator):
    """Frees the first runs of a call that it then refuses."""

    def free(self, starts, sizes):
        try:
            runs = list(zip(starts, sizes, strict=True))
        except (TypeError, ValueError):
            super().free(starts, sizes)  # says what is wrong
            raise
        for start, size in runs:
            super().free([start], [size])


class SkipsWhatDoesNotFit(BuddyAllocator):
    def allocate(self, sizes, *, partial=False):
        if not partial:
            return super().allocate(sizes)
        starts = super().allocate(sizes, partial=True)
        for i in np.flatnonzero(starts < 0):
            starts[i] = super().allocate(np.array(sizes)[i : i + 1], partial=True)[0]
        return starts


@pytest.mark.parametrize(
    ("kind", "invariants"),
    [
        (KeepsOne, {"conserved", "recovery"}),
        (FreesHalf, {"a refused call changes nothing"}),
        (SkipsWhatDoesNotFit, {"partial"}),
    ],
)
def test_a_wrong_plug_in_is_still_found(kind, invariants):
    with pytest.raises(ConformanceFailure) as caught:
        run_conformance(lambda: kind(24), max_examples=_MANY, num_steps=25, shrink_s=1.0)
    assert caught.value.invariant in invariants


def test_the_script_can_be_pasted_and_leads_to_the_failure():
    with pytest.raises(ConformanceFailure) as caught:
        run_conformance(lambda: FreesHalf(24), max_examples=_MANY, shrink_s=2.0, opening="pool = FreesHalf(24)")
    (note,) = caught.value.__notes__
    title, *script = note.splitlines()
    assert title == "the calls that lead there:"
    names = {"FreesHalf": FreesHalf}
    for line in script[:-1]:
        with contextlib.suppress(AllocatorError):  # of calls that were rightly refused
            exec(line.strip(), names)
    before = names["pool"].stats()
    with pytest.raises(InvalidFreeError):
        exec(script[-1].strip(), names)
    changed = difference(before, names["pool"].stats())
    assert changed.startswith("num_free: ")
    assert "num_free: " in str(caught.value)
    assert len(script) < 30
    assert len(str(caught.value)) < 300


def test_differences_are_told_in_few_words():
    pool = BuddyAllocator(24)
    before, data = pool.stats(), pool.snapshot()
    pool.allocate([8] * 3)
    assert difference(before, pool.stats()) == (
        "num_free: 24 -> 0, num_live: 0 -> 24, largest_free: 24 -> 0, "
        "free_blocks: 8: 24 -> 0, 16: 12 -> 0, 32: 6 -> 0, 64: 3 -> 0"
    )
    assert difference(data, data[:-1]) == f"{len(data)} bytes -> {len(data) - 1} bytes"
    assert difference(bytes(9), bytes(4) + b"\x07" + bytes(4)) == "byte 4 of 9: 0x00 -> 0x07"
    assert difference(bytes(9), b"\x01" * 9) == "byte 0 of 9: 0x00 -> 0x01, 9 bytes in all"
    assert difference(before, before) == difference(data, data) == difference({}, {}) == ""
    assert difference(1, 2) == "1 -> 2"
    assert literal(np.full(40, 2, np.int32)) == "[2] * 40"


def test_shrinking_ends_when_its_time_is_over_and_says_how_far_it_is(monkeypatch):
    told, now = [], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    recorder = Recorder(30.0, told.append)
    recorder.begin()
    recorder.script += ["pool.allocate([1])"] * 3
    now[0] = 1000.0
    recorder.begin()  # however long it took to find something
    recorder.script += ["pool.allocate([1])"] * 3
    recorder.failed(ValueError("first"))
    now[0] += 6
    recorder.begin()
    recorder.script += ["pool.allocate([1])"]
    recorder.failed(ValueError("shorter"))
    recorder.begin()
    recorder.script += ["pool.allocate([1])"] * 9
    recorder.failed(ValueError("longer"))
    now[0] += 23
    recorder.begin()
    now[0] += 1
    with pytest.raises(ShrinkingIsOver):
        recorder.begin()
    assert str(recorder.the_failure()) == "shorter"
    assert told == [
        "found after 4 calls: first; looking for fewer",
        "shrinking: 1 tries, 4 calls, 6 of at most 30 s",
        "shrinking: 3 tries, 2 calls, 29 of at most 30 s",
    ]


def test_an_allocator_that_takes_its_time_cannot_hold_a_run_up():
    class Slow(FreesHalf):
        def check_integrity(self):
            time.sleep(0.01)

    with pytest.raises(ConformanceFailure) as caught:
        run_conformance(lambda: Slow(24), max_examples=_MANY, num_steps=25, shrink_s=0.2)
    assert len(caught.value.__notes__) == 1


def test_a_failure_that_does_not_come_back_is_a_finding_and_not_an_error_of_the_kit():
    calls = itertools.count()

    class Once(BuddyAllocator):
        def allocate(self, sizes, *, partial=False):
            if next(calls) == 50:
                raise RuntimeError("once")
            return super().allocate(sizes, partial=partial)

    with pytest.raises(ConformanceFailure, match="only AllocatorErrors: RuntimeError: once") as caught:
        run_conformance(lambda: Once(24))
    assert "did not fail when they were repeated" in caught.value.__notes__[-1]


# -- threads -----------------------------------------------------------------------------------------------------------


def breaking(method, error):
    """A pool whose ``method`` raises once its main thread has made a few calls."""

    class Breaks(BuddyAllocator):
        calls = itertools.count()

    def broken(self, *arguments, **options):
        if next(Breaks.calls) > 20:
            raise error
        return getattr(BuddyAllocator, method)(self, *arguments, **options)

    setattr(Breaks, method, broken)
    return Breaks


@pytest.mark.parametrize("error", [OutOfBlocksError("no"), InvalidFreeError("no"), RuntimeError("no"), SystemExit(3)])
@pytest.mark.parametrize("method", ["allocate", "free", "stats", "check_integrity"])
def test_threads_raise_nothing_but_what_is_documented(method, error):
    kind = breaking(method, error)
    with pytest.raises(ConformanceFailure):
        run_threads(lambda: kind(64), num_threads=2, max_examples=2, num_ops=30, timeout_s=10)


@pytest.mark.parametrize("answer", [None, [0], np.zeros(1, np.int64), np.zeros((1, 1), np.int32)])
def test_threads_name_an_answer_of_the_wrong_kind(answer):
    class Answers(BuddyAllocator):
        def allocate(self, sizes, *, partial=False):
            return answer

    with pytest.raises(ConformanceFailure):
        run_threads(lambda: Answers(64), num_threads=2, max_examples=2, num_ops=30, timeout_s=10)


def test_a_lock_that_is_left_behind_is_a_failure_in_bounded_time():
    pools = []

    class LeavesItsLock(BuddyAllocator):
        def __init__(self, num_granules):
            super().__init__(num_granules)
            self._lock = threading.Lock()  # which any thread may release
            pools.append(self)

        def free(self, starts, sizes):
            super().free(starts, sizes)
            self._lock.acquire()

    with pytest.raises(ConformanceFailure, match="bounded time"):
        run_threads(lambda: LeavesItsLock(64), num_threads=2, max_examples=5, num_ops=30, timeout_s=0.5)
    for pool in pools:  # the threads that wait come back
        while pool._lock.locked():
            with contextlib.suppress(RuntimeError):  # a thread has just released it
                pool._lock.release()
            time.sleep(0.01)
