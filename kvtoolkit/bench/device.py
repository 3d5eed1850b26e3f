"""What it costs to grow the sequences of a batch: on the device in a captured step, and on the host.

On the device: nodes of a graph, one after the other, in us. "Few" is a step in which no row needs a block, "all" one in
which every row does. The ring is one thread that does the same without policies, sizes, limits or checks. On the host:
`begin_step`, the copy of the tables and `end_step`, by allocator; "rebuilt" also makes and copies the whole tables in
every step. The host's turn is `DeviceSteps.load` and `finish`, without what the device does between them.

Moves: what a step pays where tiles may move but none does, and where some do, of 32 layers with 8 kv heads of 128.
"""

import argparse
import time
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit.bench.timing import device_line, event_times, require_device
from kvtoolkit.cache.device_steps import DeviceSteps
from kvtoolkit.cache.graph import GraphStep
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cuda.launching import Launch
from kvtoolkit.runtime import load
from kvtoolkit.runtime.structs import ParameterStruct

_NODES = 48  # of a graph; a multiple of 8
_CONTEXT = 1024
_params = ParameterStruct("bench/ring.cu", "kvt_ring")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench device``."""
    parser.add_argument("--batch", type=integer(1), nargs="+", default=[64, 256, 1024, 4096], help="sequences")
    parser.add_argument("--repeats", type=integer(1), default=20)
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    require_device("device")
    print(device_line())
    print(f"\n{'us of a node':<12}{'few':>9}{'all':>9}{'ring, few':>12}{'ring, all':>12}{'turn of the host':>20}")
    rows = []
    for batch in options.batch:
        few, turn = _growth(batch, "fixed64", options.repeats)
        mixed, _ = _growth(batch, "fixed8", options.repeats)
        ring_few, ring_all = _ring(batch, options.repeats)
        row = {"batch": batch, "few": few, "all": 8 * mixed - 7 * few, "ring_few": ring_few, "ring_all": ring_all}
        rows.append(row | {"turn": turn})
        print(f"{batch:<12}{few:>9.2f}{row['all']:>9.2f}{ring_few:>12.2f}{ring_all:>12.2f}{turn:>20.0f}", flush=True)
    print(f"\n{'us of a step of the host, 256 sequences':<42}{'few':>9}{'64 rows':>9}{'(mean)':>9}{'rebuilt':>9}")
    steps: dict[str, list[tuple[float, ...]]] = {"buddy": [], "lockfree": []}
    for _ in range(options.repeats):  # in turns, because host times differ from one moment to the next
        for name in steps:
            steps[name].append(_steps(name))
    for name, times in steps.items():
        for what, us in (("median", np.median(times, axis=0)), ("best", np.min(times, axis=0))):
            print(f"{f'{name}, {what} of {options.repeats} runs':<42}" + "".join(f"{one:>9.0f}" for one in us))
    idle, moving = _idle(options.repeats), [_moving(name, options.repeats) for name in _MOVES]
    print("\nus of a node in which no tile moves, 256 sequences")
    for what, us in idle.items():
        print(f"{what:<42}{us:>9.2f}")
    print(f"\n{'a step in which tiles move':<26}{'tiles':>7}{'MB':>9}{'us':>9}{'us more':>9}{'GB/s':>9}")
    for one in moving:
        speed = 1e3 * one["mb"] / one["more"]
        print(
            f"{one['what']:<26}{one['tiles']:>7.1f}{one['mb']:>9.1f}{one['us']:>9.1f}{one['more']:>9.1f}{speed:>9.0f}"
        )
    write_json(options.json, {"rows": rows, "steps": steps, "idle": idle, "moving": moving})
    return 0


def _growth(batch: int, growth: str, repeats: int, beams: int = 1, **options: Any) -> tuple[float, float]:
    """``(us of a node, us of the host's turn)``."""
    import torch

    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 16, "num_tokens": 2 * batch * (_CONTEXT + 192)}
    limits = {"max_seqs": batch, "max_seq_len": _CONTEXT + 128}
    cache = KVCache(CacheConfig(**{**shape, **limits, "growth": growth, "backend": "cuda", **options}))
    seq_ids, _ = cache.open([[]] * batch)
    with cache.begin_step(seq_ids, _CONTEXT) as step:
        cache.end_step(step)
    steps = DeviceSteps(cache, batch, 64, beams=beams)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        steps.begin()
    torch.cuda.synchronize()
    first, graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first, stream=stream):
        steps.begin()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(_NODES):
            steps.begin()
    times, turns, tokens = [], [], np.zeros(batch, np.int64)
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        steps.load(seq_ids, tokens)
        loaded = time.perf_counter()
        first.replay()  # every row gets a block
        torch.cuda.synchronize()
        times += event_times(graph.replay, 1)
        ran = time.perf_counter()
        steps.finish()
        turns.append(1e6 * (time.perf_counter() - ran + loaded - begin))
        cache.truncate(seq_ids, np.full(batch, _CONTEXT))
    return float(np.median(times[2:])) / _NODES, float(np.median(turns[2:]))


_ALL_HOT = {"hot": 2048, "warm": "int8", "tier_memory": {"hot": 0.9, "warm": 0.1}}
_MOVES = ("16 bit to int8", "16 bit to int4", "small blocks to one", "beams of 8, 32 tokens each")


def _idle(repeats: int) -> dict[str, float]:
    """Microseconds of a node, by what might move in it."""
    return {
        "nothing can": _growth(256, "fixed64", repeats)[0],
        "merges": _growth(256, "adaptive", repeats)[0],
        "beams of 8": _growth(256, "fixed64", repeats, beams=8)[0],
        "tiers": _growth(256, "fixed64", repeats, head_dim=64, tiers=_ALL_HOT)[0],
    }


def _moving(what: str, repeats: int) -> dict[str, Any]:
    """Steps of 64 sequences whose old tiles go to another tier, or whose last ones are merged."""
    import torch

    batch, context, num_steps = 64, 1024, 16
    options: dict[str, Any] = {"growth": "fixed64", "tiers": {"hot": 256, "warm": "int8"}}
    nbytes = 64 * 128 * 2 * 8 * 32  # of a tile in 8 bits
    if what == _MOVES[0]:
        moved = 3 * nbytes
    elif what == _MOVES[1]:
        options["tiers"], moved = {"hot": 256, "cold": "int4"}, nbytes * 5 // 2
    elif what == _MOVES[3]:
        return _reordering(batch, repeats)
    else:
        options, context, num_steps, moved = {"growth": "lazy_merge"}, 1024 - 56, 64, 4 * nbytes
    shape: dict[str, Any] = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128}
    shape |= {"max_seqs": batch, "max_seq_len": 1280}
    cache = KVCache(CacheConfig(**{**shape, "num_tokens": batch * 5120, "backend": "cuda", **options}))
    seq_ids, _ = cache.open([[]] * batch)
    for count in (context, *([8] * 6 if "tiers" not in options else [])):
        with cache.begin_step(seq_ids, count) as step:
            cache.end_step(step)
    steps, graph, stream = DeviceSteps(cache, batch, num_steps), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        steps.begin()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        steps.begin()
    before = cache.stats()
    steps.load(seq_ids, np.zeros(batch, np.int64))
    torch.cuda.synchronize()
    times = np.array(event_times(graph.replay, num_steps))
    steps.finish()
    after = cache.stats()
    tiles = (after.converted_tokens - before.converted_tokens) // 64 + after.num_merges - before.num_merges
    idle = float(np.median(event_times(graph.replay, max(repeats, 3))))  # the turn is over: nothing moves
    is_moving = np.argsort(times)[::-1][: num_steps if "tiers" in options else 1]
    each, us = tiles / len(is_moving), float(times[is_moving].mean())
    return {"what": what, "tiles": each, "mb": each * moved / 1e6, "us": us, "more": us - idle}


def _reordering(batch: int, repeats: int) -> dict[str, Any]:
    """A step in which every row of a batch goes on from its neighbour, after 32 tokens of the turn."""
    import torch

    shape: dict[str, Any] = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128}
    shape |= {"max_seqs": batch, "max_seq_len": 1280}
    cache = KVCache(CacheConfig(**{**shape, "num_tokens": batch * 2048, "backend": "cuda"}))
    seq_ids, _ = cache.open([[]] * batch)
    with cache.begin_step(seq_ids, _CONTEXT) as step:
        cache.end_step(step)
    steps = DeviceSteps(cache, batch, 64, beams=8)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        steps.begin()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        steps.begin()
    steps.load(seq_ids, np.zeros(batch, np.int64))
    idle = float(np.median(event_times(graph.replay, 32)))
    others = torch.arange(batch, device="cuda", dtype=torch.int32).view(-1, 8).roll(1, 1).flatten()

    def reordered() -> float:
        parents: Any = steps.parents
        parents.copy_(others)
        torch.cuda.synchronize()
        return event_times(graph.replay, 1)[0]

    us = float(np.median([reordered() for _ in range(min(repeats, 8))]))
    steps.abort()
    mb = 2 * batch * 36 * 2 * 2 * 128 * 8 * 32 / 1e6  # 36 tokens by then, read and written
    return {"what": _MOVES[3], "tiles": 0.0, "mb": mb, "us": us, "more": us - idle}


def _ring(batch: int, repeats: int) -> tuple[float, float]:
    import torch

    width, size = 2, max(batch, 8)
    zeros = [torch.zeros(batch * n, dtype=torch.int32, device="cuda") for n in (1, width, width, 1)]
    slots = torch.zeros(batch, dtype=torch.int64, device="cuda")
    ring = torch.randperm(size, device="cuda", dtype=torch.int32)
    head = torch.zeros(1, dtype=torch.int32, device="cuda")
    addresses = [array.data_ptr() for array in (*zeros, slots, ring, head)]
    launch = Launch(load("bench/ring.cu", "kvt_ring", {}, 0), (1,), 32, 0, _params.pack(*addresses, batch, width, size))

    def us(length: int) -> float:
        def step() -> None:
            zeros[0].fill_(length)
            torch.cuda.synchronize()
            times.extend(event_times(lambda: launch.run(torch.cuda.current_stream().cuda_stream), 1))

        times: list[float] = []
        for _ in range(repeats + 2):
            step()
        return float(np.median(times[2:]))

    return us(9), us(8)


def _steps(allocator: str) -> tuple[float, float, float, float]:
    """Host time of steps: where no row needs a block, where a quarter of them do, and with tables made anew.

    Of the second, also the mean, because a pool on a device is asked only now and then.
    """
    batch, num_steps = 256, 160
    cache = KVCache(
        CacheConfig(
            num_layers=1, num_kv_heads=8, head_dim=128, num_tokens=batch * 512, max_seqs=batch, growth="append",
            backend="cuda", allocator=allocator,
        )
    )  # fmt: skip
    seq_ids, _ = cache.open([[]] * batch)
    fixed, lengths = GraphStep(cache, batch, max_seq_len=512), np.arange(batch) // 64 + 1
    times: dict[Any, list[float]] = {False: [], True: [], "rebuilt": []}
    lists: list[list[int]] = []
    for i, counts in enumerate([lengths, *[np.ones(batch, np.int64)] * num_steps]):
        is_rebuilt = i > num_steps // 2
        needs = bool(((lengths + i - 1) % 8 == 0).any())
        begin = time.perf_counter()
        with cache.begin_step(seq_ids, counts) as step:
            if is_rebuilt:
                _rebuild(lists, step.block_table.shape[1])
            if i > 0:
                fixed.load(step)
            cache.end_step(step)
        spent = 1e6 * (time.perf_counter() - begin)
        lists = [row[row >= 0].tolist() for row in step.block_table]
        if i > num_steps // 4 and not (is_rebuilt and needs):
            times["rebuilt" if is_rebuilt else needs].append(spent)
    few, some, rebuilt = (float(np.median(times[kind])) for kind in (False, True, "rebuilt"))
    return few, some, float(np.mean(times[True])), rebuilt


def _rebuild(lists: list[list[int]], width: int) -> None:
    """Make the tables of a step from lists of blocks, as engines do that keep a list for each request."""
    for _ in range(2):  # entries, and where they begin
        made = np.full((len(lists), width), -1, np.int32)
        for row, values in enumerate(lists):
            made[row, : len(values)] = values
