"""A small pool of Python threads that share the items of one compiled call, without a lock while they work.

Every thread runs the same compiled function; the function claims its next item from an atomic counter, so a thread
that wakes late finds less to do, and one that never wakes costs nothing. The calling thread takes part and returns
when all items are done: only an item in hand is waited for. A pool thread holds the GIL only to pick up a call.

``KVTOOLKIT_NUM_THREADS`` sets the number of threads, the caller included; the default is the number of cores. Several
Python threads may call at once. A forked child makes itself a new pool when it first needs one.
"""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

from kvtoolkit.arrays.types import as_int
from kvtoolkit.errors import ArgumentError, ConfigError

Work = Callable[[], object]

_MOST_DIGITS = 6

_lock = threading.Lock()
_queue: SimpleQueue[Work] | None = None
_num_workers = 0
_num_threads: int | None = None


def num_threads() -> int:
    """Threads that one call may use, the calling one included.

    Raises:
        ConfigError: ``KVTOOLKIT_NUM_THREADS`` is no such number.
    """
    global _num_threads
    if _num_threads is None:
        _num_threads = _threads_from_environment()
    return _num_threads


def set_num_threads(count: int) -> None:
    """Let calls use ``count`` threads from now on, the calling one included.

    Raises:
        ArgumentError: ``count`` is no integer from 1 on.
    """
    global _num_threads
    found = as_int(count)
    if found is None or found < 1:
        raise ArgumentError(f"count: expected a number of threads from 1 on, got {count!r}")
    _num_threads = found


def _threads_from_environment() -> int:
    text = os.environ.get("KVTOOLKIT_NUM_THREADS", "").strip()
    if not text:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) < 1:
        raise ConfigError(f"KVTOOLKIT_NUM_THREADS: expected a number of threads from 1 on, got {text!r:.80}")
    return int(text)


def run(work: Work, helpers: int) -> None:
    """Offer ``work`` to ``helpers`` pool threads without waiting for them; the caller then does its own share.

    ``work`` may start at any later time, even after the caller's call has returned: it must keep alive what it needs
    and find out by itself that nothing is left.
    """
    queue = _queue
    if queue is None or _num_workers < helpers:
        queue = _grow(helpers)
    for _ in range(helpers):
        queue.put(work)


def _grow(workers: int) -> "SimpleQueue[Work]":
    global _queue, _num_workers
    with _lock:
        if _queue is None:
            _queue = SimpleQueue()
        while _num_workers < workers:
            threading.Thread(target=_serve, args=(_queue,), name="kvtoolkit", daemon=True).start()
            _num_workers += 1
        return _queue


def _serve(queue: "SimpleQueue[Work]") -> None:
    while True:
        work = queue.get()
        work()
        del work  # it holds arrays of the caller


def _forget_threads() -> None:
    global _lock, _queue, _num_workers
    _lock = threading.Lock()  # another thread may have held it at the fork
    _queue = None
    _num_workers = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
