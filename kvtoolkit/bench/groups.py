"""What groups of layers cost a decode step, beside one group: a captured step on a GPU, and the host.

Both caches hold the same tokens, and the results of all layers are compared, to the bit, before the steps are timed. A
captured step appends to all layers and attends in all of them, with the same windows; replays of the two graphs take
turns. The host's figure is that of ``begin_step`` and ``end_step`` alone, the best of 20 runs of 20 steps, in turns.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit import CacheConfig, GraphStep, KVCache
from kvtoolkit.bench.timing import Timing, device_line, require_device, time_graph
from kvtoolkit.commands.json_file import add_json, write_json

_STEPS = 20
_PIECE = 64  # tokens of each sequence that are fed at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench groups``."""
    parser.add_argument("--layers", type=integer(2), default=26, help="layers of the model")
    parser.add_argument("--every", type=integer(2), default=2, help="each so-many-th layer keeps all tokens")
    parser.add_argument("--window", type=integer(1), default=1024, help="tokens that queries of the other layers see")
    parser.add_argument("--batch", type=integer(1), default=64, help="sequences")
    parser.add_argument("--length", type=integer(_PIECE), default=4096, help="tokens of each")
    parser.add_argument("--heads", type=integer(8), default=32, help="query heads, a multiple of 8, the kv heads")
    parser.add_argument("--head-dim", type=integer(16), default=128, help="a multiple of 16")
    parser.add_argument("--rounds", type=integer(1), default=5, help="how often the two are timed in turn")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    require_device("groups")
    import torch

    torch.manual_seed(0)
    full = [layer for layer in range(options.layers) if layer % options.every == options.every - 1]
    caches = {"one group": _fill(options, None), "two groups": _fill(options, full)}
    steps = {name: _captured(options, cache, full) for name, cache in caches.items()}
    for call, _ in steps.values():
        call()
    torch.cuda.synchronize()
    if not torch.equal(*(out for _, out in steps.values())):
        raise AssertionError("groups: the results are not those of a cache that keeps all tokens")
    times: dict[str, list[Timing]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, (call, _) in steps.items():
            times[name].append(time_graph([call]))
    print(f"{device_line()}\nbfloat16, {options.heads} query heads and 8 kv heads of {options.head_dim}")
    print(
        f"{options.batch} sequences of {options.length} tokens; {options.layers} layers, of which {len(full)} keep all "
        f"tokens and the others see {options.window}\n"
    )
    print(f"{'us of a step, in replays':<28}{'median':>9}{'best':>9}{'worst':>9}{'GiB held':>10}")
    rows = [_report(name, times[name], caches[name]) for name in times]
    ratio = rows[1]["us"] / rows[0]["us"]
    print(f"\ntwo groups / one group: {ratio:.4f}")
    del steps, caches
    print(f"\n{'us of the host, 2 layers':<28}{'sequences':>10}{'one group':>11}{'two groups':>12}{'ratio':>8}")
    host = [_host(backend, batch) for backend in ("cuda", "cpu") for batch in (1, 256)]
    write_json(options.json, {**vars(options), "rows": rows, "ratio": ratio, "host": host})
    return 0


def _host(backend: str, batch: int) -> dict[str, Any]:
    """Host time of a step without the calls of its layers, where one of two layers has a window of 128."""
    length, runs = 512, 20
    room = length + (runs + 1) * _STEPS
    shape: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 16, "dtype": "float16"}
    shape |= {"max_seqs": batch, "max_seq_len": room, "backend": backend}
    groups: list[dict[str, Any]] = [{"layers": [0], "window": 128}, {"layers": [1]}]
    one = KVCache(CacheConfig(**shape, num_tokens=2 * batch * room))
    two = KVCache(CacheConfig(**shape, layer_groups=[{**group, "num_tokens": 2 * batch * room} for group in groups]))
    best = {}
    for cache in (one, two):
        ids, _ = cache.open([[]] * batch)
        cache.end_step(cache.begin_step(ids, length))
        best[cache] = ids, float("inf")
    for _ in range(runs):
        for cache, (ids, us) in best.items():
            start = time.perf_counter()
            for _ in range(_STEPS):
                cache.end_step(cache.begin_step(ids, 1))
            best[cache] = ids, min(us, (time.perf_counter() - start) / _STEPS * 1e6)
    of_one, of_two = (us for _, us in best.values())
    print(f"{backend:<28}{batch:>10}{of_one:>11.2f}{of_two:>12.2f}{of_two / of_one:>8.3f}")
    return {"backend": backend, "batch": batch, "one_group_us": of_one, "two_groups_us": of_two}


def _fill(options: argparse.Namespace, full: list[int] | None) -> KVCache:
    """A cache whose sequences hold the same tokens whatever its groups are; None: one group."""
    import torch

    length = -(-options.length // 64) * 64 + 128
    groups = None
    size: dict[str, Any] = {"num_tokens": options.batch * length}
    if full is not None:
        windowed = [layer for layer in range(options.layers) if layer not in full]
        held = min(length, -(-options.window // 64) * 64 + _PIECE + 128)
        groups = [
            {"layers": windowed, "window": options.window, "num_tokens": options.batch * held},
            {"layers": full, "num_tokens": options.batch * length},
        ]
        size = {}
    shape = {"num_layers": options.layers, "num_kv_heads": 8, "head_dim": options.head_dim, "dtype": "bfloat16"}
    config = {**shape, "max_seqs": options.batch, "max_seq_len": length, "backend": "cuda", **size}
    cache = KVCache(CacheConfig(**config, layer_groups=groups))
    ids, _ = cache.open([[]] * options.batch)
    draw = torch.Generator("cuda").manual_seed(1)
    left = options.length - 1
    while left:
        count = min(left, _PIECE)
        new = torch.randn(2, options.batch * count, 8, options.head_dim, device="cuda", generator=draw).bfloat16()
        with cache.begin_step(ids, count) as step:
            if not step.ok.all():
                raise AssertionError(f"groups: {step.explain()[0]}")
            for layer in range(options.layers):
                step.append(layer, *new)
            cache.end_step(step)
        left -= count
    return cache


def _captured(options: argparse.Namespace, cache: KVCache, full: list[int]) -> tuple[Callable[[], None], Any]:
    """What runs the layers of a step once, and where their results are."""
    import torch

    draw = torch.Generator("cuda").manual_seed(2)
    new = torch.randn(2, options.batch, 8, options.head_dim, device="cuda", generator=draw).bfloat16()
    q = torch.randn(options.layers, options.batch, options.heads, options.head_dim, device="cuda", generator=draw)
    q = q.bfloat16()
    out = torch.empty_like(q)
    windows = [(-1, -1) if layer in full else (options.window - 1, 0) for layer in range(options.layers)]
    fixed = GraphStep(cache, options.batch)
    with cache.begin_step(cache.seq_ids(), 1) as step:  # which keeps its blocks
        fixed.load(step)

    def call() -> None:
        run = fixed.begin()
        for layer, window in enumerate(windows):
            run.append(layer, *new)
            run.attend(layer, q[layer], window_size=window, out=out[layer])

    return call, out


def _report(name: str, timings: list[Timing], cache: KVCache) -> dict[str, Any]:
    times = [one.us for one in timings]
    stats = cache.stats()
    held = sum(group.used * group.nbytes / group.capacity for group in stats.groups) / (1 << 30)
    us = float(np.median(times))
    print(f"{name:<28}{us:>9.2f}{min(times):>9.2f}{max(times):>9.2f}{held:>10.2f}")
    return {"name": name, "us": us, "rounds": [one._asdict() for one in timings], "gib_held": held}
