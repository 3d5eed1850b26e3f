"""Calls of an object that keeps several pieces of state: one at a time, and never on top of one that broke off.

A call may break off anywhere: a plug-in raises, memory runs out, Ctrl-C arrives. It leaves its name in `Calls.name`
then, and the next call puts the object in order before it does anything else. A call may also come from inside another
one of the same thread, from a finalizer or a signal handler. If it only lets go of something it waits for the end of
the outer call; otherwise it is refused.
"""

import contextlib
import functools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from allocators._forks import lock_across_forks

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Calls:
    """What an object knows of its calls.

    Args:
        owner: the object; it is not kept alive.
        settle: puts the object in order after a call that broke off. It may be broken off itself, and is called again
            then.
        drain: looks for handles that are gone.
        busy_error: what a call inside another one raises.

    Attributes:
        name: of the call under way, or of one that broke off; "" between calls.
        serial: number of that call.
        is_dirty: whether that call, having broken off, may have changed something.
        lost: not empty if finalizers have left something to do. Its ``append`` is the callback of the weak references
            to handles: it takes no lock, and nothing interrupts it.
        refusals: errors that a call raises before it changes anything, or with everything undone.
    """

    __slots__ = (
        "_drain", "_later", "_owner", "_settle", "busy_error", "is_dirty", "lock", "lost", "name", "refusals",
        "serial",
    )  # fmt: skip

    def __init__(
        self,
        owner: T,
        settle: Callable[[T], object],
        drain: Callable[[T], object],
        busy_error: type[Exception],
        refusals: tuple[type[Exception], ...] = (),
    ) -> None:
        self.lock = lock_across_forks(threading.RLock())
        self.name = ""
        self.serial = 0
        self.is_dirty = False
        self.lost: deque[Any] = deque()
        self.busy_error = busy_error
        self.refusals = refusals
        self._owner: weakref.ref[Any] = weakref.ref(owner)
        self._settle: Callable[[Any], object] = settle
        self._drain: Callable[[Any], object] = drain
        self._later: deque[Callable[[], Any]] = deque()

    def do_later(self, action: Callable[[], Any]) -> None:
        """Have the next call do something first. For finalizers: it takes no lock and cannot fail."""
        self._later.append(action)
        self.lost.append(None)

    def put_in_order(self) -> None:
        """Settle a call that broke off, and do what was left for later. The caller holds the lock."""
        if self.name:
            if self.is_dirty:
                self._settle(self._owner())
            self._end()
        while self.lost:
            self.lost.clear()
            try:
                self.name = "what was left for later"
                self._drain(self._owner())
                while self._later:
                    self._do_next()
                self._end()
            except BaseException:
                self.lost.append(None)
                raise

    def _do_next(self) -> None:
        try:
            self._later[0]()
        except Exception as error:
            self._later.popleft()  # one that was interrupted stays, one that fails is not tried again and again
            if not isinstance(error, self.refusals):  # else what it would let go of is gone already
                raise
        else:
            self._later.popleft()
        self.is_dirty = False

    def _end(self) -> None:
        self.is_dirty = False
        self.name = ""

    def is_inside(self) -> bool:
        """Whether another call of the object is on this thread's stack."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code in _CODES and frame.f_locals.get("calls") is self:
                return True
            frame = frame.f_back
        return False


class _HasCalls(Protocol):
    @property
    def _calls(self) -> Calls: ...


S = TypeVar("S", bound=_HasCalls)
_CODES: set[CodeType] = set()


def exclusive(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that is one call of its object, whose `Calls` are ``self._calls``."""
    name = method.__name__

    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        calls = self._calls
        with calls.lock:
            if calls.name or calls.lost:
                if calls.is_inside():
                    raise calls.busy_error(
                        f"{name}: expected no other call of this thread under way, got one from inside "
                        f"{calls.name or 'its repair'} (from a signal handler, a finalizer or a plug-in)"
                    )
                calls.put_in_order()
            calls.serial += 1
            calls.is_dirty = True
            calls.name = name
            try:
                result = method(self, *args, **kwargs)
            except calls.refusals:
                calls.is_dirty = False
                raise
            calls.is_dirty = False
            calls.name = ""
            if calls.lost:
                with contextlib.suppress(Exception):  # the next call meets it again
                    calls.put_in_order()
            return result

    _CODES.add(call.__code__)
    return functools.wraps(method)(call)


def exclusive_or_later(method: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """As `exclusive`, of a method that only lets go of something: inside another call it waits for the end of that."""
    guarded = exclusive(method)

    @functools.wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        calls = self._calls
        with calls.lock:
            if (calls.name or calls.lost) and calls.is_inside():
                calls.do_later(lambda: method(self, *args, **kwargs))
                return
            guarded(self, *args, **kwargs)

    return call
