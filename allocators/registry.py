"""Find an allocator by name, by entry point, or by ``"package.module:Class"``, and make one."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

from allocators._plugins import PluginError, load_class, load_entry_point, require_methods
from allocators.buddy import BuddyAllocator
from allocators.errors import InvalidSizeError, UnknownAllocatorError
from allocators.lockfree import LockFreeAllocator
from allocators.paged import PagedAllocator
from allocators.protocol import BlockAllocator
from allocators.slab import SlabAllocator

ENTRY_POINT_GROUP = "kvtoolkit.allocators"

METHODS = ("allocate", "free", "stats", "check_integrity", "snapshot", "restore")
"""Methods of every allocator; the rest of the protocol may be attributes that are set in the constructor."""
_ATTRIBUTES = ("num_granules", "block_sizes", "num_free", "largest_free")

Factory = type[BlockAllocator] | Callable[..., BlockAllocator]
"""A class or a function that makes an allocator, called with ``num_granules`` and keyword options."""

_registered: dict[str, Factory] = {
    "paged": PagedAllocator,
    "buddy": BuddyAllocator,
    "slab": SlabAllocator,
    "lockfree": LockFreeAllocator,
}
_BUILT_IN = frozenset(_registered)


def register(name: str, cls: Factory, *, replace: bool = False) -> None:
    """Make an allocator available under ``name``.

    Args:
        name: an identifier. An allocator that was registered under it before is replaced.
        cls: a class, or a function that makes allocators.
        replace: whether ``name`` may be that of a built-in allocator.

    Raises:
        UnknownAllocatorError: ``name`` is no identifier, or a built-in allocator's without ``replace``; or ``cls``
            cannot be called.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise UnknownAllocatorError(f"name: expected an identifier, got {name!r}")
    if not callable(cls):
        raise UnknownAllocatorError(f"cls: expected a class, got {cls!r}")
    if name in _BUILT_IN and not replace:
        raise UnknownAllocatorError(
            f"name: {name!r} is a built-in allocator; choose another name, or replace it by replace=True"
        )
    _registered[name] = cls


def names() -> tuple[str, ...]:
    """Every name that `find` knows: those registered and those of installed entry points."""
    return tuple(sorted({*_registered, *(point.name for point in _entry_points())}))


def find(spec: str | type[BlockAllocator]) -> Factory:
    """The class, or the factory, that ``spec`` names.

    Args:
        spec: a registered name, an entry point of the group ``kvtoolkit.allocators``, ``"package.module:Class"``, or
            the class itself. A path names code: its module is imported.

    Raises:
        UnknownAllocatorError: there is none, or it is not an allocator. A path must lead to a class, and a class must
            have the methods of `BlockAllocator`. Nothing is called.
    """
    try:
        found = _find(spec)
        if isinstance(found, type):
            require_methods(found, METHODS, repr(spec))
    except PluginError as error:
        raise UnknownAllocatorError(f"allocator: {error}") from error
    return found


def _find(spec: str | type[BlockAllocator]) -> Factory:
    if isinstance(spec, type):
        return spec
    if not isinstance(spec, str):
        raise UnknownAllocatorError(f"allocator: expected a name, a path or a class, got {spec!r}")
    if spec in _registered:
        return _registered[spec]
    if ":" in spec:
        return load_class(spec, METHODS)
    for point in _entry_points():
        if point.name == spec:
            loaded: Factory = load_entry_point(point)
            return loaded
    raise UnknownAllocatorError(
        f"allocator: expected one of {', '.join(names())}, or 'package.module:Class', got {spec!r}"
    )


def create(spec: str | type[BlockAllocator], num_granules: int, **options: Any) -> BlockAllocator:
    """Make the allocator that ``spec`` names (see `find`) with ``num_granules`` and the options of its class.

    Raises:
        UnknownAllocatorError: there is none of that name, or it does not make an allocator.
        InvalidSizeError: it takes no such option, or refuses a value.
    """
    cls = find(spec)
    name = getattr(cls, "__name__", repr(cls))
    try:
        made = cls(num_granules, **options)  # type: ignore[call-arg]
    except TypeError as error:
        raise InvalidSizeError(f"{name} does not take these options: {error}") from error
    except SystemExit as error:
        raise UnknownAllocatorError(f"allocator: {name} exits when one is made ({error})") from error
    lacking = [attribute for attribute in (*METHODS, *_ATTRIBUTES) if not hasattr(made, attribute)]
    if lacking:
        raise UnknownAllocatorError(
            f"allocator: expected {name} to make allocators, got {type(made).__name__} without {', '.join(lacking)}"
        )
    return made


def _entry_points() -> Any:
    return importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
