"""Find an allocator by name, by entry point, or by ``"package.module:Class"``, and make one."""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

from allocators.buddy import BuddyAllocator
from allocators.errors import InvalidSizeError, UnknownAllocatorError
from allocators.lockfree import LockFreeAllocator
from allocators.paged import PagedAllocator
from allocators.protocol import BlockAllocator
from allocators.slab import SlabAllocator

ENTRY_POINT_GROUP = "kvtoolkit.allocators"

Factory = type[BlockAllocator] | Callable[..., BlockAllocator]
"""A class, or what makes one: called with ``num_granules`` and keyword options."""

_registered: dict[str, Factory] = {
    "paged": PagedAllocator,
    "buddy": BuddyAllocator,
    "slab": SlabAllocator,
    "lockfree": LockFreeAllocator,
}


def register(name: str, cls: Factory) -> None:
    """Make ``cls`` available under ``name``; a name that is taken is replaced."""
    if not isinstance(name, str) or not name.isidentifier():
        raise UnknownAllocatorError(f"name: expected an identifier, got {name!r}")
    if not callable(cls):
        raise UnknownAllocatorError(f"cls: expected a class, got {cls!r}")
    _registered[name] = cls


def names() -> tuple[str, ...]:
    """Every name that `find` knows: those registered and those of installed entry points."""
    return tuple(sorted({*_registered, *(point.name for point in _entry_points())}))


def find(spec: str | type[BlockAllocator]) -> Factory:
    """The class, or the factory, that ``spec`` names.

    Args:
        spec: a registered name, an entry point of the group ``kvtoolkit.allocators``, ``"package.module:Class"``, or
            the class itself.

    Raises:
        UnknownAllocatorError: there is none, or what is found is not callable.
    """
    if isinstance(spec, type):
        return spec
    if not isinstance(spec, str):
        raise UnknownAllocatorError(f"allocator: expected a name, a path or a class, got {spec!r}")
    if spec in _registered:
        return _registered[spec]
    if ":" in spec:
        return _load_path(spec)
    for point in _entry_points():
        if point.name == spec:
            loaded: Factory = point.load()
            return loaded
    raise UnknownAllocatorError(
        f"allocator: expected one of {', '.join(names())}, or 'package.module:Class', got {spec!r}"
    )


def create(spec: str | type[BlockAllocator], num_granules: int, **options: Any) -> BlockAllocator:
    """Make the allocator that ``spec`` names (see `find`) with ``num_granules`` and the options of its class.

    Raises:
        UnknownAllocatorError: there is none of that name.
        InvalidSizeError: it takes no such option, or refuses a value.
    """
    cls = find(spec)
    try:
        return cls(num_granules, **options)  # type: ignore[call-arg]
    except TypeError as error:
        raise InvalidSizeError(f"{cls.__name__} does not take these options: {error}") from error


def _entry_points() -> Any:
    return importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)


def _load_path(path: str) -> Factory:
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a plug-in does when it is imported
        raise UnknownAllocatorError(f"allocator: {path!r} cannot be imported: {error}") from error
    if not callable(found):
        raise UnknownAllocatorError(f"allocator: expected {path!r} to be a class, got {type(found).__name__}")
    cls: Factory = found
    return cls
