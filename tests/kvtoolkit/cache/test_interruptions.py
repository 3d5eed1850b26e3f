"""An exception at any line of any call: as Ctrl-C, a signal handler or another thread raise it."""

import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import allocators
import kvtoolkit
from tests.kvtoolkit.cache.broken_calls import CONFIGS, DEVICE_CONFIGS, check, clean_runs, make, make_world, put

ROOTS = tuple(str(Path(module.__file__).parent) for module in (kvtoolkit, allocators))


class Interrupted(BaseException):
    """Raised in the middle of a call."""


class LineBreaker:
    """Raises at the n-th line of ours that is run, counted from `__enter__` on."""

    def __init__(self, n):
        self.left, self.fired = n, False

    def __enter__(self):
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _enter(self, frame, event, arg):
        is_finalizer = frame.f_code.co_name == "note_lost"  # Python swallows what it raises, and goes on
        return self._line if frame.f_code.co_filename.startswith(ROOTS) and not is_finalizer else None

    def _line(self, frame, event, arg):
        if event == "line" and not self.fired:
            self.left -= 1
            if self.left <= 0:
                self.fired = True
                raise Interrupted(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._line


def break_everywhere(config, every=1, first=1):
    """Break each call at every ``every``-th line, and check the world; returns how often by call."""
    counts = Counter()
    for name, call, before, after in clean_runs(**config):
        n = first
        while True:
            world = make_world(**config)
            breaker = LineBreaker(n)
            try:
                with breaker:
                    call(world)
            except Interrupted as error:
                where = str(error)
            if not breaker.fired:
                break
            try:
                check(world, before, after)
            except BaseException as error:
                raise AssertionError(f"{name}, interrupted at line {n}, {where}") from error
            counts[name] += 1
            n += every
    return counts


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exception_at_any_line_of_any_call_leaves_a_whole_cache(name):
    # `python -m tests.kvtoolkit.reliability` takes every line
    counts = break_everywhere(CONFIGS[name], every=23, first=1 + 4 * list(CONFIGS).index(name))
    assert sum(counts.values()) > 60


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEVICE_CONFIGS)
def test_an_exception_at_any_line_leaves_a_whole_cache_whose_pool_is_on_a_device(name):
    counts = break_everywhere(DEVICE_CONFIGS[name], every=41, first=1 + 20 * list(DEVICE_CONFIGS).index(name))
    assert sum(counts.values()) > 60


# a signal that comes inside a finalizer of Python's own is swallowed there, as it always is
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signals_at_random_moments_leave_a_whole_cache():
    counts = interrupt_by_signals(150, seed=1)
    assert counts["interrupted"] > 50


def interrupt_by_signals(tries, seed):
    """Let real signals come while an engine works; returns what came of it."""

    def raise_it(*_):
        raise Interrupted

    rng, counts = np.random.default_rng(seed), Counter()
    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        _work(make(growth="lazy_merge"), [], 2)  # compiled before the first signal
        for _ in range(tries):
            cache, known = make(growth="lazy_merge"), []
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0005, 0.012))
                _work(cache, known, 1000)
            except Interrupted:
                counts["interrupted"] += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            cache.check_integrity()
            counts["ids lost by the engine"] += len(cache.end_orphans(known)) > 0
            cache.close(np.intersect1d(cache.seq_ids(), known))
            stats = cache.stats()
            assert stats.num_seqs == 0
            assert stats.free + stats.cached + stats.kept_back == stats.capacity
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return counts


def _work(cache, known, rounds):
    for _ in range(rounds):
        ids, _ = cache.open([[1] * 30, [2] * 41])
        known += ids.tolist()
        for _ in range(4):
            put(cache, ids, [[3] * 9, [4] * 9])
        cache.truncate(ids, [13, 14])
        children = cache.fork(ids, 1).ravel()
        known += children.tolist()
        cache.close(children)
        with cache.pin(ids):
            cache.preempt(ids, "host")
        cache.restore(ids)
        cache.close(ids)
