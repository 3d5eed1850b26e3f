"""Calls of an object with several pieces of state: one at a time, and only when the state is in order.

A call may break off anywhere: a plug-in raises, memory runs out, Ctrl-C arrives. Then its name stays in `Calls.name`,
and the next call puts the object in order before it does anything else. A finalizer or a signal handler may also make a
call while another call of the same thread is under way. If that call only releases something, it is done after the
outer one; otherwise it is refused.
"""

import contextlib
import functools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Container
from types import CodeType, FrameType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from allocators._forks import lock_across_forks

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Calls:
    """The calls of an object: their lock, and what is known of the one under way.

    Args:
        owner: the object; it is not kept alive.
        settle: puts the object in order after a call broke off. If it breaks off too, it is called again.
        drain: ends the handles that nothing refers to any more.
        busy_error: the error of a call inside another one.

    Attributes:
        name: name of the call under way, or of one that broke off; "" between calls.
        serial: number of that call.
        is_dirty: whether that call may have changed something.
        lost: not empty if finalizers have left something to do. Its ``append`` is the callback of weak references to
            handles, because it takes no lock and nothing interrupts it.
        refusals: errors with which a call leaves the object as it was.
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
        """Let the next call do something first. For finalizers: this takes no lock and cannot fail."""
        self._later.append(action)
        self.lost.append(None)

    def put_in_order(self) -> None:
        """Settle after a call that broke off, and do what was left for later. The caller holds the lock."""
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
            self._later.popleft()  # an interrupted action stays in the queue; one that fails is not tried again
            if not isinstance(error, self.refusals):  # after a refusal there is nothing left to release
                raise
        else:
            self._later.popleft()
        self.is_dirty = False

    def _end(self) -> None:
        self.is_dirty = False
        self.name = ""

    def is_inside(self) -> bool:
        """Whether a call of the object is on this thread's stack already."""
        return is_on_stack(sys._getframe(2), _CODES, "calls", self)


def is_on_stack(frame: FrameType | None, codes: Container[CodeType], name: str, value: Any) -> bool:
    """Whether one of some functions runs in a frame or below it, and has a variable ``name`` that is ``value``."""
    while frame is not None:
        if frame.f_code in codes and frame.f_locals.get(name) is value:
            return True
        frame = frame.f_back
    return False


class _HasCalls(Protocol):
    @property
    def _calls(self) -> Calls: ...


S = TypeVar("S", bound=_HasCalls)
_CODES: set[CodeType] = set()


def exclusive(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method a call of its object, under the lock of ``self._calls``."""
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
                with contextlib.suppress(Exception):  # the next call tries again
                    calls.put_in_order()
            return result

    _CODES.add(call.__code__)
    return functools.wraps(method)(call)


def exclusive_or_later(method: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """Like `exclusive`, for a method that only releases something: inside another call it is done after that call."""
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
