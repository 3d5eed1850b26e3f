"""The calls of a step whose layers are in several groups, or have a window: each goes to the calls of its group."""

from collections.abc import Sequence
from typing import Any

from kvtoolkit.cache.layers.layers import LayerCalls
from kvtoolkit.cache.storage.arenas import Arenas
from kvtoolkit.config.groups import LayerGroup
from kvtoolkit.errors import ArgumentError, StepError


class GroupCalls:
    """What `LayerCalls` is for one group, for all layers of a model.

    Args:
        arenas: of any group.
        calls: of each group.
        groups: the layers of each.
        num_tokens: new tokens of the step.
    """

    __slots__ = ("_arenas", "_calls", "_groups", "_last", "_num_tokens", "_of")

    def __init__(self, arenas: Arenas, calls: list[LayerCalls], groups: Sequence[LayerGroup], num_tokens: int) -> None:
        self._arenas, self._calls, self._groups, self._num_tokens = arenas, calls, groups, num_tokens
        self._last = -1  # the group of the layer that was attended to last
        self._of = {layer: i for i, group in enumerate(groups) for layer in group.layers}

    @property
    def layers(self) -> int:
        """Bit ``i`` is set once layer ``i`` has been appended to."""
        layers = 0
        for calls in self._calls:
            layers |= calls.layers
        return layers

    def append(self, layer: int, key: Any, value: Any) -> None:
        """See `LayerCalls.append`."""
        layer = self._arenas.require_layer(layer)
        self._calls[self._of[layer]].append(layer, key, value)

    def attend_prepared(self, layer: int, key: int, value: int, q: int, out: int) -> bool:
        """See `LayerCalls.attend_prepared`; also False if the layer before was in another group."""
        layer = self._arenas.require_layer(layer)
        index = self._of[layer]
        return index == self._last and self._calls[index].attend_prepared(layer, key, value, q, out)

    def attend(self, layer: int, q: Any, **options: Any) -> Any:
        """See `LayerCalls.attend`; also ArgumentError unless the queries see no more than the group's window."""
        layer = self._arenas.require_layer(layer)
        if self._num_tokens and (layers := self.layers) and not layers >> layer & 1:
            raise StepError(
                f"layer: expected one that this step has appended to, got {layer}; append its keys and values"
            )
        index = self._of[layer]
        if window := self._groups[index].window:
            _require_window(layer, window, options.get("window_size", (-1, -1)))
        out = self._calls[index].attend(layer, q, **options)
        self._last = index
        return out


def _require_window(layer: int, window: int, given: Any) -> None:
    """ArgumentError unless ``given``, which the call will check in full, is within a window."""
    try:
        left = int(given[0])
    except (TypeError, ValueError, IndexError):
        return
    if not 0 <= left < window:
        raise ArgumentError(
            f"window_size: expected (0 to {window - 1}, right) for layer {layer}, which keeps {window} tokens "
            f"(layer_groups), got {given!r:.40}"
        )
