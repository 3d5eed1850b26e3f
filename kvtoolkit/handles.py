"""Numbers by which compiled graphs name objects of the library, since a graph takes tensors and nothing else.

The number is in a tensor, not an integer, because a graph that took an integer would be compiled anew for each one.
"""

import functools
import itertools
import sys
import weakref
from typing import Any

import numpy as np

from kvtoolkit.errors import ArgumentError
from kvtoolkit.tracing import is_dynamo_loaded

# A plain dict, since every layer looks an owner up and a WeakValueDictionary takes twice as long.
_owners: dict[int, weakref.ref[Any]] = {}
_numbers = itertools.count()


def handle_of(owner: Any) -> Any:
    """A tensor with a number of its own for ``owner``, int64 without axes, on the host.

    Returns:
        None while nothing can be compiled, because Dynamo is not loaded.
    """
    if not is_dynamo_loaded():
        return None
    number = next(_numbers)
    # pops the number, with the reference as what to return if it is gone: in one step that nothing interrupts
    _owners[number] = weakref.ref(owner, functools.partial(_owners.pop, number))
    return sys.modules["torch"].from_numpy(np.array(number))


def owner_of(handle: Any, name: str, *kinds: type) -> Any:
    """Look up the object that a handle names. ArgumentError, with ``name``, if it is gone or of none of these kinds."""
    try:
        number = handle.item()
    except RuntimeError:  # it has no or several elements
        number = None
    if type(number) is not int:
        raise ArgumentError(f"{name}: expected a handle, one integer, got {tuple(handle.shape)} {handle.dtype}")
    known = _owners.get(number)
    owner = known and known()
    if owner is None:
        raise ArgumentError(f"{name}: expected one that is still in use, got handle {number}, whose owner is gone")
    if not isinstance(owner, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ArgumentError(f"{name}: expected the handle of a {expected}, got that of a {type(owner).__name__}")
    return owner
