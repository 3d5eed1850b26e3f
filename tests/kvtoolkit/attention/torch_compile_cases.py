"""Run every public call inside a compiled function, in a process of its own: prints ``name backend result`` lines.

The library is imported before torch, which is the order in which it cannot know that torch will be there.
"""

import sys
from typing import Any

import kvtoolkit

assert "torch" not in sys.modules, "import kvtoolkit must not import torch"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from kvtoolkit import CacheConfig, KVCache  # noqa: E402
from tests.kvtoolkit.attention.bad_input_calls import CALLS, with_tensors  # noqa: E402

BACKENDS = ("eager", "aot_eager")


def _outcome(made: Any) -> list[Any]:
    return [np.asarray(one).tolist() for one in (made if isinstance(made, tuple) else (made,)) if one is not None]


def compiled_calls(backend: str) -> None:
    """Each call of torch tensors between two operations that are compiled, three times."""
    for call in CALLS[:5] + CALLS[7:10]:
        arguments, function = call.make()
        arguments = with_tensors(arguments)
        first = next(iter(arguments))

        def run(x: Any, function: Any = function, arguments: Any = arguments, first: str = first) -> Any:
            return function(**{**arguments, first: x * 0.5})

        torch._dynamo.reset()
        compiled = torch.compile(run, backend=backend)
        for i in range(3):
            new = arguments[first] + i  # at another address
            good = _outcome(run(new))
            assert str(_outcome(compiled(new))) == str(good), call.name
        print("good", backend, call.name, flush=True)


def compiled_steps(backend: str) -> None:
    """A model's loop over the layers of a cache, its methods and those of its steps included."""
    config = CacheConfig(num_layers=2, num_kv_heads=2, head_dim=32, dtype="float32", num_tokens=512)

    def run(cache: KVCache, seq_ids: Any, n: int, w: torch.Tensor) -> torch.Tensor:
        with cache.begin_step(seq_ids, n) as step:
            x = w * torch.ones(n, 4, 32)
            for layer in range(2):
                step.append(layer, x[:, :2] * 2, x[:, 2:] * 3)
                x = x + step.attend(layer, x)
            assert step.ok.all()
            cache.end_step(step)
        assert cache.stats().num_seqs == 1
        return x * 2

    compiled = torch.compile(run, backend=backend)
    caches = [KVCache(config) for _ in range(2)]
    ids = [cache.open([[1, 2, 3]])[0] for cache in caches]
    for n in (3, 1, 1, 1):
        w = torch.randn(n, 4, 32)
        assert torch.equal(compiled(caches[1], ids[1], n, w), run(caches[0], ids[0], n, w))
    print("good", backend, "a cache and its steps", flush=True)


def steps_from_before() -> None:
    """A step that began before Dynamo was there breaks the graph, and is right."""
    assert "torch._dynamo" not in sys.modules
    cache = KVCache(CacheConfig(num_layers=1, num_kv_heads=2, head_dim=32, dtype="float32", num_tokens=512))
    ids, _ = cache.open([[]])

    def run(x: torch.Tensor, step: Any) -> torch.Tensor:
        step.append(0, x * 2, x * 3)
        return step.attend(0, x) * 2

    x = torch.randn(5, 2, 32)
    keys = torch.zeros(4, 8, 2, 32)
    table, lengths = torch.zeros(5, 1, dtype=torch.int32), torch.full((5,), 8, dtype=torch.int32)
    plan = kvtoolkit.plan_attention(table, lengths)
    with cache.begin_step(ids, 5) as step:
        good = run(x, step)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="works on the addresses of arrays"):
            torch.compile(
                lambda x, plan: kvtoolkit.paged_attention(x, keys, keys, table, lengths, plan=plan), backend="eager",
                fullgraph=True,
            )(x, plan)  # fmt: skip
        with pytest.raises(torch._dynamo.exc.Unsupported, match="works on the addresses of arrays"):
            torch.compile(run, backend="eager", fullgraph=True)(x, step)
        assert torch.equal(torch.compile(run, backend="eager")(x, step), good)
    print("good", "a step from before", flush=True)


def refused_whole_graphs() -> None:
    """``fullgraph=True`` gives Dynamo's own error, which says why, for calls that are no operators."""
    for call in CALLS[7:10]:
        arguments, function = call.make()
        arguments = with_tensors(arguments)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="works on the addresses of arrays"):
            torch.compile(lambda f=function, a=arguments: f(**a), backend="eager", fullgraph=True)()
    print("good fullgraph", flush=True)


if __name__ == "__main__":
    assert kvtoolkit.__version__
    steps_from_before()
    for name in BACKENDS:
        compiled_calls(name)
        compiled_steps(name)
    refused_whole_graphs()
