"""What Dynamo traces of `append` and `attend` of a `Step` and of a `GraphRun`: operators, or a break of the graph."""

from typing import Any

from kvtoolkit.attention import traced
from kvtoolkit.attention.traced import are_plain, are_tensors, outside


def append(self: Any, layer: int, key: Any, value: Any) -> None:
    """See `kvtoolkit.Step.append`."""
    import torch

    if not _is_named(self, layer) or not are_tensors(key, value):
        outside(type(self).append, self, layer, key, value)
        return
    handle, arenas = self._in_graphs
    torch.ops.kvtoolkit.step_append(arenas[layer], handle, layer, key, value)


def attend(self: Any, layer: int, q: Any, **options: Any) -> Any:
    """See `kvtoolkit.Step.attend`."""
    if not _is_named(self, layer) or not are_tensors(q) or not are_plain(options):
        return outside(type(self).attend, self, layer, q, **options)
    handle, arenas = self._in_graphs
    return traced.attend("step_attend", q, (arenas[layer], handle, layer, q), options)


def _is_named(step: Any, layer: Any) -> bool:
    """Whether a graph can name a step, and has such a layer."""
    return step._in_graphs is not None and type(layer) is int and 0 <= layer < len(step._in_graphs[1])
