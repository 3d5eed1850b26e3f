"""What writing into a cache on the GPU costs: append, and the moves of forks, merges and compaction.

Shares are of a large copy in the same run, bytes read and written added. Results are compared with NumPy's before they
are timed.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit.arrays.host import Operand
from kvtoolkit.bench.timing import Timing, copy_ceiling, device_line, require_device, time_graph
from kvtoolkit.commands.json_file import add_json, write_json

_HEADS, _HEAD_DIM = 8, 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench cache``."""
    parser.add_argument(
        "--tokens", type=integer(1), nargs="+", default=[1, 256, 4096, 32768], help="tokens of an append"
    )
    parser.add_argument("--granules", type=integer(1), nargs="+", default=[8, 256, 2048], help="granules of a move")
    parser.add_argument("--layers", type=integer(1), default=8, help="layers of the arena that granules move in")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    require_device("cache")
    ceiling = copy_ceiling()
    print(f"{device_line()}\nbfloat16, {_HEADS} kv heads of {_HEAD_DIM}; a large copy: {ceiling:.0f} GB/s\n")
    print(f"{'case':<44}{'us':>10}{'p10':>9}{'p90':>9}{'GB/s':>9}{'of copy':>9}")
    rows = [_append(tokens, ceiling) for tokens in options.tokens]
    for granules in options.granules:
        rows += [_move("fork", granules, options.layers, ceiling), _move("merge", granules, options.layers, ceiling)]
    write_json(options.json, {"copy_gbps": ceiling, "rows": rows})
    return 0


def _report(name: str, timing: Timing, nbytes: int, ceiling: float) -> dict[str, Any]:
    gbps = nbytes / timing.us / 1e3
    print(
        f"{name:<44}{timing.us:>10.2f}{timing.p10:>9.2f}{timing.p90:>9.2f}{gbps:>9.0f}{gbps / ceiling:>8.1%}",
        flush=True,
    )
    return {"case": name, **timing._asdict(), "gbps": gbps, "share_of_copy": gbps / ceiling}


def _append(tokens: int, ceiling: float) -> dict[str, Any]:
    import torch

    from kvtoolkit.attention.calls import append

    num_granules = max(4096, -(-tokens // 8) * 2)
    layers = max(2, min(32, (2 << 30) // (num_granules * 8 * _HEADS * _HEAD_DIM * 4)))
    caches = torch.zeros(layers, 2, num_granules, _HEADS, 8, _HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    new = torch.randn(layers, 2, tokens, _HEADS, _HEAD_DIM, device="cuda").to(torch.bfloat16)
    slots = torch.randperm(8 * num_granules, device="cuda")[:tokens]
    if tokens > 4096:  # a prompt fills granules one after the other
        granules = torch.randperm(num_granules, device="cuda")[: tokens // 8]
        slots = (granules[:, None] * 8 + torch.arange(8, device="cuda")).ravel()
    calls = [
        partial(append, new[i, 0], new[i, 1], caches[i, 0], caches[i, 1], slots, layout="HND") for i in range(layers)
    ]
    timing = time_graph(calls)
    place = (slots // 8, slice(None), slots % 8)
    if not all(
        torch.equal(caches[layer, which][place], new[layer, which]) for layer in (0, layers - 1) for which in (0, 1)
    ):
        raise AssertionError("append: the tokens are not in their slots")
    return _report(f"append {tokens} tokens", timing, 2 * tokens * _HEADS * _HEAD_DIM * 4, ceiling)


def _move(kind: str, granules: int, layers: int, ceiling: float) -> dict[str, Any]:
    """``fork``: single granules to single places; ``merge``: eight scattered granules into a run of eight."""
    import torch

    from kvtoolkit import cuda

    num_granules, sets = 8192, 4
    arena = torch.randn(2 * layers, num_granules, _HEADS, 8, _HEAD_DIM, device="cuda").to(torch.bfloat16)
    described = Operand(arena.data_ptr(), tuple(arena.shape), arena.stride(), "bfloat16", arena, True, 0)
    rng = np.random.default_rng(0)
    lists = []
    for _ in range(sets):
        if kind == "fork":
            chosen = rng.permutation(num_granules)[: 2 * granules]
            lists.append((chosen[:granules], chosen[granules:]))
        else:
            runs = rng.permutation(num_granules // 16)[: granules // 8]  # the upper half, as targets
            targets = num_granules // 2 + (runs[:, None] * 8 + np.arange(8)).ravel()
            lists.append((rng.permutation(num_granules // 2)[:granules], targets))
    wanted = arena[:1].clone()

    def move(source: Any, target: Any) -> None:
        cuda.copy_granules(described, source, target, stream=torch.cuda.current_stream().cuda_stream)

    for source, target in lists:
        wanted[:, target] = wanted[:, source]
        move(source, target)
    if not torch.equal(arena[:1], wanted):
        raise AssertionError("move: the granules are not copies")
    calls = [partial(move, *pair) for pair in lists]
    nbytes = 2 * granules * 2 * layers * _HEADS * 8 * _HEAD_DIM * 2
    return _report(f"{kind} {granules} granules, {layers} layers", time_graph(calls), nbytes, ceiling)
