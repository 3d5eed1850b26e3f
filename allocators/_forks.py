"""Locks that a forked child finds free.

A thread that holds a lock while another one forks does not exist in the child, where the lock would stay held. So a
fork waits until nobody is in the middle of a call, and the child begins with state that is in order. The wait is
bounded, because a plug-in that hangs must not stop its process from forking; what its call holds stays locked in the
child.
"""

import os
import threading
import time
import warnings
import weakref

from numba.core.compiler_lock import global_compiler_lock

WAIT_S = 10.0
"""How long a fork waits, in seconds, for all the calls under way together."""

_locks: "dict[weakref.ref[threading.RLock], None]" = {}
"""In the order in which they were made: whoever holds one may be waiting for one made before it, never the reverse."""
_held: "list[threading.RLock]" = []


def lock_across_forks(lock: "threading.RLock") -> "threading.RLock":
    """The lock, which every fork of this process holds from now on."""
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


# Numba compiles under a lock of its own, which is the last that a call comes to
_compiler_lock: "threading.RLock | None" = getattr(global_compiler_lock, "_lock", None)
if _compiler_lock is not None:
    lock_across_forks(_compiler_lock)

os.register_at_fork(before=_acquire_all, after_in_parent=_release_all, after_in_child=_release_all)
