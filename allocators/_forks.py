"""Locks that are free in a forked child.

If a thread holds a lock while another one forks, the lock would stay held in the child, where the thread does not
exist. So a fork waits until no call is under way, and the child begins with state that is in order. The wait is
bounded, because a plug-in that hangs must not keep its process from forking; the lock of such a call stays held in the
child.
"""

import os
import threading
import time
import warnings
import weakref

from numba.core.compiler_lock import global_compiler_lock

WAIT_S = 10.0
"""Seconds that a fork waits for calls under way, all together."""

_locks: "dict[weakref.ref[threading.RLock], None]" = {}
"""In the order in which they were made. The holder of a lock may wait for an older one, never for a newer one."""
_held: "list[threading.RLock]" = []


def lock_across_forks(lock: "threading.RLock") -> "threading.RLock":
    """Let every later fork of this process hold a lock; returns the lock."""
    _locks[weakref.ref(lock, lambda gone: _locks.pop(gone, None))] = None
    return lock


def _acquire_all() -> None:
    deadline = time.monotonic() + WAIT_S
    missed = 0
    for reference in reversed(list(_locks)):
        if (lock := reference()) is not None:
            if lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                _held.append(lock)
            else:
                missed += 1
    if missed:
        warnings.warn(
            f"forked while {missed} calls of allocators or caches had not ended after {WAIT_S:g} s; "
            "what they hold stays locked in the child",
            RuntimeWarning,
            stacklevel=2,
        )


def _release_all() -> None:
    while _held:
        _held.pop().release()


# Numba compiles under a lock of its own, which a call takes last
_compiler_lock: "threading.RLock | None" = getattr(global_compiler_lock, "_lock", None)
if _compiler_lock is not None:
    lock_across_forks(_compiler_lock)

os.register_at_fork(before=_acquire_all, after_in_parent=_release_all, after_in_child=_release_all)
