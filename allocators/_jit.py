"""One way to compile with Numba: `jit`, whose disk cache sees edits in callees and never needs a writable place.

Numba's own ``cache=True`` stamps only the file of the compiled function, so an edit in a callee of another file goes
unseen, and it raises at import where no folder is writable. Here the stamp covers every file of this project that the
function's module imports, directly or not, and where nothing is writable there is simply no cache.

The folder is ``$KVTOOLKIT_CACHE_DIR/numba``, by default ``~/.cache/kvtoolkit/numba``; ``KVTOOLKIT_CACHE_DIR=off``
turns the cache off.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

F = TypeVar("F", bound=Callable[..., Any])

_OUR_PACKAGES = frozenset({"allocators", "kvtoolkit"})


def jit(function: F) -> F:
    """Compile ``function`` in nopython mode, without the GIL while it runs, with the cache described above.

    The function cannot make arrays, only use those it is given: Numba's reference counting is off. With it every call
    of a helper counts the references of every array in its arguments, atomically, which made `BuddyAllocator` three
    times slower.
    """
    dispatcher = njit(nogil=True, _nrt=False)(function)
    return _with_cache(dispatcher, function)


def jit_fastmath(function: F) -> F:
    """As `jit`, and let LLVM reorder float arithmetic, but keep the meaning of NaN and infinities."""
    dispatcher = njit(nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})(function)
    return _with_cache(dispatcher, function)


def _with_cache(dispatcher: Any, function: F) -> F:
    if cache_folder() is not None:
        # no place to write, or no source to stamp: compile in each process instead
        with contextlib.suppress(OSError, RuntimeError):
            dispatcher._cache = _Cache(function)
    compiled: F = dispatcher
    return compiled


@functools.cache
def cache_folder(kind: str = "numba") -> Path | None:
    """The folder that compiled functions of a kind are kept in, or None where none is writable."""
    chosen = os.environ.get("KVTOOLKIT_CACHE_DIR", "")
    if chosen.lower() == "off":
        return None
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvtoolkit"
    folder = base / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


@functools.cache
def source_stamp(path: str) -> str:
    """A digest of the file at ``path`` and of every file of ours that it imports, directly or not."""
    digest = hashlib.sha256()
    for source in sorted(_imported_sources(path)):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()


def _imported_sources(path: str) -> set[str]:
    seen: set[str] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        waiting += [found for name in _imported_modules(current) if (found := _origin(name)) is not None]
    return seen


def _imported_modules(path: str) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(Path(path).read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names a module in the alias, `from module import name` does not
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] in _OUR_PACKAGES]


def _origin(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return spec.origin if not spec.origin.endswith("__init__.py") else None


class _Locator(_CacheLocator):  # type: ignore[misc]
    """Tells Numba's cache where our folder is and what a change of source looks like."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        folder = cache_folder()
        if folder is None:
            raise RuntimeError("no cache folder is writable")
        self._path = str(folder)
        self._stamp = source_stamp(py_file)
        self._first_line = py_func.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return self._path

    def get_source_stamp(self) -> str:
        return self._stamp

    def get_disambiguator(self) -> str:
        # part of the file name: two states of the sources, or two installs, keep apart instead of evicting each other
        return f"{self._first_line}-{self._stamp[:16]}"

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> "_Locator":
        return cls(py_func, py_file)


class _CacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Cache(FunctionCache):  # type: ignore[misc]
    _impl_class = _CacheImpl
