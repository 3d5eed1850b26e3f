"""How compiled torch graphs name the steps of a cache, and the memory that these write to."""

from collections.abc import Sequence
from typing import Any

from kvtoolkit.cache.storage.arenas import Arenas
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.handles import handle_of


class GraphNames:
    """What a step, or a run of a captured one, has for graphs.

    Args:
        arenas: of all groups of layers.
        config: of the cache.
    """

    def __init__(self, arenas: Sequence[Arenas], config: CacheConfig) -> None:
        self._arenas, self._num_layers = arenas, config.num_layers
        self._tensors: list[Any] = []

    def of(self, owner: Any) -> tuple[Any, list[Any]] | None:
        """The handle of a step or run, and what each of its layers writes to; None while nothing can be compiled."""
        handle = handle_of(owner)
        if handle is None or not any(one.keys for one in self._arenas):  # the latter without storage
            return None
        if not self._tensors:
            layers = range(self._num_layers)
            self._tensors = [next(one.tensor() for one in self._arenas if one.has_layer(layer)) for layer in layers]
        return handle, self._tensors
