"""Find the class that a configuration names as ``"package.module:Class"``, without calling anything on the way."""

import importlib
from collections.abc import Sequence
from typing import Any


class PluginError(Exception):
    """A name does not lead to a class that could be a plug-in; the message says why."""


def load_class(path: str, methods: Sequence[str]) -> type:
    """The class at ``"package.module:Class"``, or ``"package.module:Class.Inner"``.

    The module is imported, so a path is code: whoever can write a configuration can run anything that can be imported.
    But this returns nothing except a class with ``methods``, and calls nothing.

    Raises:
        PluginError: the module cannot be imported, exits while it is imported, or holds no such class.
    """
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a plug-in may raise anything when it is imported
        raise PluginError(f"{path!r} cannot be imported: {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        try:
            found = vars(found)[name] if isinstance(found, type) else getattr(found, name)
        except (AttributeError, KeyError) as error:
            raise PluginError(f"{path!r} cannot be imported: there is no {name!r} in it") from error
        # a path must not lead through modules or objects
        if not isinstance(found, type):
            raise PluginError(f"expected {path!r} to be a class, got {type(found).__name__} {name!r}")
    require_methods(found, methods, repr(path))
    cls: type = found
    return cls


def require_methods(cls: type, methods: Sequence[str], what: str) -> None:
    """PluginError unless instances of ``cls`` have all ``methods`` and nothing abstract is left."""
    missing = [name for name in methods if not callable(getattr(cls, name, None))]
    missing += sorted(set(getattr(cls, "__abstractmethods__", ())) - set(missing))
    if missing:
        raise PluginError(f"expected {what} to have {', '.join(missing)}, which {cls.__name__} lacks")


def load_entry_point(point: Any) -> Any:
    """Load an installed entry point: a class or a factory.

    Raises:
        PluginError: it cannot be imported, or cannot be called.
    """
    try:
        found = point.load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"the entry point {point.name!r} ({point.value}) cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise PluginError(
            f"expected the entry point {point.name!r} ({point.value}) to be a class, got {type(found).__name__}"
        )
    return found
