"""One way to compile with Numba: `jit`, whose disk cache sees edits in callees and never stops a program.

Numba's own ``cache=True`` stamps only the file of the compiled function, so it misses edits of callees in other files.
It raises at import if no folder is writable, and unpickles whatever it finds, damaged or not. Here the stamp covers
every file of this project that the function's module imports directly or indirectly, entries are checked before they
are used (`allocators._disk`), and if there is no place for them there is simply no cache.

The folder is ``$KVTOOLKIT_CACHE_DIR/numba``, by default ``~/.cache/kvtoolkit/numba``; ``KVTOOLKIT_CACHE_DIR=off``
turns the cache off.
"""

import ast
import atexit
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.serialize import dumps

from allocators._disk import SUFFIX, find_place, read_entry, write_entry

F = TypeVar("F", bound=Callable[..., Any])

_OUR_PACKAGES = frozenset({"allocators", "kvtoolkit"})
_SCANS = f"imports{SUFFIX}"
_MOST_SCANS = 2048


def jit(function: F) -> F:
    """Compile ``function`` in nopython mode, without the GIL while it runs, with the cache described above.

    The function can use arrays but not make any, because Numba's reference counting is off. With it, every call of a
    helper counts the references of all arrays in its arguments atomically, which made `BuddyAllocator` three times
    slower.
    """
    dispatcher = njit(nogil=True, _nrt=False)(function)
    return _with_cache(dispatcher, function)


def _with_cache(dispatcher: Any, function: F) -> F:
    if cache_folder() is not None:
        # no source to stamp: compile in each process instead
        with contextlib.suppress(OSError, RuntimeError):
            dispatcher._cache = _Cache(function)
    compiled: F = dispatcher
    return compiled


def cache_folder(kind: str = "numba") -> Path | None:
    """The folder of compiled functions of one kind; None if none can be used."""
    return find_place(kind).folder


@functools.cache
def source_stamp(path: str) -> str:
    """A digest of the file at ``path`` and of every file of ours that it imports, directly or not."""
    digests = [_digest(source) for source in sorted(_imported_sources(path))]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


@functools.cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _imported_sources(path: str) -> set[str]:
    seen: set[str] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        waiting += _direct_imports(current)
    return seen


@functools.cache
def _direct_imports(path: str) -> tuple[str, ...]:
    """Our files that one file imports. Cached, because many files import the same ones."""
    return tuple(found for name in _imported_modules(path) if (found := _origin(name)) is not None)


def _imported_modules(path: str) -> list[str]:
    """Our modules that one file may import. Parsing takes most of the time, so the result is stored by content."""
    scans = _scans()
    if (found := scans.get(_digest(path))) is not None:
        return found
    source = Path(path).read_bytes()  # which may not be what was digested before
    found = scans[hashlib.sha256(source).hexdigest()] = _parse(source)
    _keep_scans()
    return found


def _parse(source: bytes) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names a module in the alias, `from module import name` does not
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in dict.fromkeys(names) if name.split(".")[0] in _OUR_PACKAGES]


@functools.cache
def _scans() -> dict[str, list[str]]:
    """What `_parse` has found, by the digest of the file."""
    folder = cache_folder()
    payload = None if folder is None else read_entry(folder / _SCANS)
    try:
        found = json.loads(payload or b"{}")
    except ValueError:
        return {}
    # an entry is this project's own and undamaged, so what is in each list need not be looked at
    return found if isinstance(found, dict) else {}


@functools.cache
def _keep_scans() -> None:
    """Let this process write what it has parsed when it ends; has an effect once."""
    atexit.register(_write_scans)


def _write_scans() -> None:
    own = dict(_scans())
    _scans.cache_clear()  # what other processes have written meanwhile stays
    if (folder := cache_folder()) is not None:
        newest = list((_scans() | own).items())[-_MOST_SCANS:]
        write_entry(folder / _SCANS, json.dumps(dict(newest)).encode())


@functools.cache
def _origin(module: str) -> str | None:
    """The file of a module of ours; None for a package, and for a name that is something inside a module.

    It is looked up in the package's folder: `importlib.util.find_spec` is slower, and imports the parents of a module.
    """
    package, *parts = module.split(".")
    if not parts or (folder := _folder_of(package)) is None:
        return None
    path = os.path.join(folder, *parts) + ".py"
    return path if os.path.isfile(path) else None


@functools.cache
def _folder_of(package: str) -> str | None:
    spec = importlib.util.find_spec(package)
    return None if spec is None else next(iter(spec.submodule_search_locations or ()), None)


class _Locator(_CacheLocator):  # type: ignore[misc]
    """Tells Numba's cache where our folder is, and the stamp of the sources."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        folder = cache_folder()
        if folder is None:
            raise RuntimeError("no cache folder can be used")
        self._py_file = py_file
        self._path = str(folder)
        versions = f"{numba.__version__} {llvmlite.__version__}"
        self._stamp = hashlib.sha256(f"{source_stamp(py_file)} {versions}".encode()).hexdigest()
        self._first_line = py_func.__code__.co_firstlineno

    def ensure_cache_path(self) -> None:
        """Does nothing: if the folder is gone, the next process makes it again and checks it."""

    def get_cache_path(self) -> str:
        return self._path

    def get_source_stamp(self) -> str:
        return self._stamp

    def get_disambiguator(self) -> str:
        # a part of the file name, so that two versions of the sources, or two installs, do not overwrite each other
        return f"{self._first_line}-{self._stamp[:16]}"

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> "_Locator":
        return cls(py_func, py_file)


class _CacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    def __init__(self, py_func: Any) -> None:
        # instead of the base's constructor, where NUMBA_CACHE_LOCATOR_CLASSES could name an unchecked place
        py_file = inspect.getfile(py_func)
        self._lineno = py_func.__code__.co_firstlineno
        self._locator = _Locator(py_func, py_file)
        self._filename_base = self.get_filename_base(
            f"{os.path.basename(py_file).removesuffix('.py')}.{py_func.__qualname__}", sys.abiflags
        )


class _Entries:
    """The overloads of one function, in one entry: a pickled dict from Numba's key to the pickled result."""

    def __init__(self, folder: str, name: str) -> None:
        self._place = folder, name

    @property
    def _path(self) -> Path:
        return Path(*self._place)

    def load(self, key: Any) -> Any:
        data = self._read().get(key)
        return None if data is None else pickle.loads(data)

    def save(self, key: Any, data: Any) -> None:
        write_entry(self._path, dumps({**self._read(), key: dumps(data)}))

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _read(self) -> dict[Any, bytes]:
        payload = read_entry(self._path)
        if payload is None:
            return {}
        try:
            found = pickle.loads(payload)
        except Exception:  # undamaged, but this Numba cannot read it
            return {}
        return found if isinstance(found, dict) else {}


class _Cache(FunctionCache):  # type: ignore[misc]
    _impl_class = _CacheImpl

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        self._cache_file = _Entries(self._cache_path, f"{self._impl.filename_base}{SUFFIX}")

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # as there
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError, pickle.PickleError):
            super().save_overload(sig, data)
