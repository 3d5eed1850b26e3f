"""What Dynamo traces of `append` and `attend` of a `Step` and of a `GraphRun`: operators, or a break of the graph."""

from typing import Any

from kvtoolkit.attention import traced
from kvtoolkit.attention.traced import are_tensors, outside


def append(self: Any, layer: int, key: Any, value: Any) -> None:
    """See `kvtoolkit.Step.append`."""
    import torch

    if self._in_graphs is None or not are_tensors(key, value):
        outside(type(self).append, self, layer, key, value)
        return
    handle, arenas = self._in_graphs
    torch.ops.kvtoolkit.step_append(arenas[layer], handle, layer, key, value)


def attend(self: Any, layer: int, q: Any, **options: Any) -> Any:
    """See `kvtoolkit.Step.attend`."""
    arrays = [options.get(name) for name in ("sinks", "alibi_slopes", "out")]
    if self._in_graphs is None or not are_tensors(q, *arrays):
        return outside(type(self).attend, self, layer, q, **options)
    handle, arenas = self._in_graphs
    return traced.attend("step_attend", q, (arenas[layer], handle, layer, q), **options)
