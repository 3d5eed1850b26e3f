"""What host memory costs and brings on a GPU: the link alone, beside a decode step, and steps that need it.

The link: blocks of 64 tokens, all layers, between a device and pinned host memory, by the kernel with so many CTAs and
by the copy engines, beside one large copy of the driver.

Beside a decode step: a captured step of a model of the size of Llama 3 8B (its matrix products, appends and attention,
random weights) repeated while blocks move. Overlap is (copies + step - both) / the shorter of the two, each alone and
both together, so that 1 is all of it.

Steps that need it: the same step where a part of what it reads is in host memory: read in place, and copied ahead of
the layers, beside a cache that has all of it on the device.

Also: how long calibration takes and what it picks, and what host memory costs the host in a step.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit.bench.timing import device_line, event_times, require_device
from kvtoolkit.cache.graph import GraphStep
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.cache.storage.calibration import Ways
from kvtoolkit.cache.storage.device_transfers import DeviceTransfers
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cuda import copy, copy_engine
from kvtoolkit.formats.entry import TIER_HOT

_LLAMA: dict[str, Any] = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
_SMALL: dict[str, Any] = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64, "dtype": "bfloat16"}
_CTAS = (1, 2, 4, 8, 12, 16, 32)
_HOST: dict[str, Any] = {"host": "1 GiB", "hot": 64}
_HIDDEN, _INNER, _Q_HEADS = 4096, 14336, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench transfers``."""
    parser.add_argument("--batch", type=integer(1), default=64, help="sequences of the decode step")
    parser.add_argument("--tokens", type=integer(64), default=4096, help="of each sequence")
    parser.add_argument("--percent", type=integer(1, 90), nargs="+", default=[1, 2, 5, 10], help="in host memory")
    parser.add_argument("--long", type=integer(256), default=65536, help="tokens of the one long sequence")
    parser.add_argument("--repeats", type=integer(3), default=15)
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    require_device("transfers")
    print(device_line())
    rows: list[dict[str, Any]] = []
    for name, shape in (("8B model, 128 KiB a piece", _LLAMA), ("SmolLM2-135M, 24 KiB a piece", _SMALL)):
        rows += _link(name, shape)
    print()
    rows.append(_host(options.batch, options.tokens))
    model = _Model()
    rows += _beside(model, options.batch, options.tokens, options.repeats)
    _forget()
    rows += _needed(model, options.batch, options.tokens, options.percent, options.repeats)
    rows += _needed(model, 1, options.long, [75], options.repeats)
    write_json(options.json, rows)
    return 0


# -- the link alone --------------------------------------------------------------------------------------------------


def _link(name: str, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """GB/s of copies alone, both ways."""
    import cupy

    cache = KVCache(CacheConfig(**shape, num_tokens=1 << 14, tiers={"host": "4 GiB"}, backend="cuda"))
    held: Any = cache._group.storage.superblocks  # type: ignore[union-attr]
    first, count = cache.config.pool_firsts[3] // 8, cache.config.host_granules[0] // 8
    rng, rows = np.random.default_rng(0), [_calibration(cache, name)]
    nbytes = held.nbytes * held.num_arrays
    print(
        f"\n{name + ', GB/s':<32}" + "".join(f"{f'{ctas} CTAs':>9}" for ctas in _CTAS) + f"{'engines':>9}{'driver':>9}"
    )
    for way in ("to the device", "to the host"):
        for number in (16, 256):
            on_device = rng.permutation(256)[:number].astype(np.int32)
            in_host = (first + rng.permutation(count)[:number]).astype(np.int32)
            pair = (in_host, on_device) if way == "to the device" else (on_device, in_host)
            stream = cupy.cuda.Stream(non_blocking=True)

            def by_kernel(ctas: int, pair: Any = pair, stream: Any = stream) -> float:
                call = partial(copy.transfer, held, *pair, ctas=ctas, stream=stream.ptr, device=0)
                return _gbps(stream, call, len(pair[0]) * nbytes)

            found = [by_kernel(ctas) for ctas in _CTAS]
            engines = _gbps(stream, partial(copy_engine.transfer, held, *pair, stream=stream.ptr), number * nbytes)
            driver = _driver(stream, held, first, way)
            rows.append(
                {"what": name, "way": way, "blocks": number, "kernel": found, "engines": engines, "driver": driver}
            )
            line = "".join(f"{one:>9.1f}" for one in (*found, engines, driver))
            print(f"{f'{way}, {number} blocks':<32}{line}", flush=True)
    return rows


def _calibration(cache: KVCache, name: str) -> dict[str, Any]:
    """How long the calibration of a cache takes, and what it picks."""
    storage: Any = cache._group.storage
    tiers, times = storage.transfers._tiers, []
    for _ in range(5):
        begin = time.perf_counter()
        made = DeviceTransfers(0, tiers)
        times.append((time.perf_counter() - begin) * 1e3)
    ways = made.ways[TIER_HOT]
    print(f"\n{name}: calibrated in {np.median(times):.0f} ms, CTAs (0 = engines) {ways._asdict()}")
    return {"what": name, "calibration_ms": float(np.median(times)), **ways._asdict()}


def _host(batch: int, tokens: int) -> dict[str, Any]:
    """Host time of a decode step: without host memory, with some that is not used, and with a part away."""
    total = batch * (tokens + 256)
    cases: dict[str, tuple[int, dict[str, Any] | None]] = {
        "without": (total, None), "with, all on the device": (total, _HOST),
        "with, a tenth away": (total - batch * tokens // 10, _HOST),
        "and copied ahead": (total - batch * tokens // 10, {**_HOST, "staging": 32768}),
    }  # fmt: skip
    found = {name: min(_host_us(batch, tokens, *case) for _ in range(3)) for name, case in cases.items()}
    for name, us in found.items():
        print(f"host time of a step of {batch}, {name}: {us:.0f} us", flush=True)
    return {"what": "host time of a step", "batch": batch, **found}


def _host_us(batch: int, tokens: int, pool: int, tiers: dict[str, Any] | None) -> float:
    """Microseconds of `begin_step`, the tables of a captured step and `end_step`: the best of 60."""
    shape = {**_LLAMA, "num_layers": 1, "max_seqs": batch, "max_seq_len": tokens + 256}
    cache = KVCache(CacheConfig(**shape, num_tokens=pool, backend="cuda", tiers=tiers, growth="fixed64"))
    ids, _ = cache.open([[]] * batch)
    for seq in ids:
        with cache.begin_step([seq], tokens) as step:
            cache.end_step(step)
    times, fixed = [], GraphStep(cache, batch)
    for _ in range(60):
        begin = time.perf_counter()
        step = cache.begin_step(ids, 1)
        fixed.load(step)
        cache.end_step(step)
        times.append((time.perf_counter() - begin) * 1e6)
        cache.sync()
    return min(times)


def _gbps(stream: Any, call: Callable[[], Any], nbytes: int) -> float:
    """GB/s of a call on a stream: the median of some."""
    import cupy

    times = []
    for _ in range(7):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end))
    return nbytes / float(np.median(times)) / 1e6


def _driver(stream: Any, held: Any, first: int, way: str) -> float:
    """GB/s of one copy of the driver, as large as an array has room for in host memory."""
    import cupy

    host, nbytes = held.address + first * held.nbytes, min(64 << 20, held.stride // 2)
    device = cupy.empty(nbytes, np.uint8)
    pair = (device.data.ptr, host) if way == "to the device" else (host, device.data.ptr)
    return _gbps(stream, lambda: cupy.cuda.runtime.memcpyAsync(*pair, nbytes, 4, stream.ptr), nbytes)


# -- a decode step ---------------------------------------------------------------------------------------------------


class _Model:
    """The matrix products of a model, with random weights."""

    def __init__(self) -> None:
        import torch

        def weights(rows: int, columns: int) -> Any:
            return torch.empty(_LLAMA["num_layers"], rows, columns, dtype=torch.bfloat16, device="cuda").normal_(
                0, 0.02
            )

        self.qkv = weights(_HIDDEN, _HIDDEN + 2 * 8 * 128)
        self.out, self.up, self.down = weights(_HIDDEN, _HIDDEN), weights(_HIDDEN, 2 * _INNER), weights(_INNER, _HIDDEN)

    def run(self, x: Any, calls: Any) -> Any:
        """One step over what a cache holds."""
        import torch

        batch = len(x)
        for layer in range(_LLAMA["num_layers"]):
            q, key, value = (x @ self.qkv[layer]).split([_HIDDEN, 1024, 1024], dim=1)
            calls.append(layer, key.reshape(batch, 8, 128), value.reshape(batch, 8, 128))
            x = x + calls.attend(layer, q.reshape(batch, _Q_HEADS, 128).contiguous()).view(batch, -1) @ self.out[layer]
            gate, up = (x @ self.up[layer]).chunk(2, dim=1)
            x = torch.nn.functional.rms_norm(x + (torch.nn.functional.silu(gate) * up) @ self.down[layer], (_HIDDEN,))
        return x


class _Steps:
    """A cache with a batch in it, and its captured decode step."""

    def __init__(self, model: _Model, batch: int, tokens: int, pool: int, tiers: dict[str, Any] | None) -> None:
        import torch

        config = CacheConfig(
            **_LLAMA, num_tokens=pool, max_seqs=batch, max_seq_len=tokens + 256, backend="cuda", tiers=tiers,
            growth="fixed64", block_sizes=(64,), prefix_caching=False,
        )  # fmt: skip
        self.cache, self.batch, self.tokens = KVCache(config), batch, tokens
        self.ids, _ = self.cache.open([[]] * batch)
        for at in range(0, tokens, 1024):
            for seq in self.ids:
                with self.cache.begin_step([seq], min(1024, tokens - at)) as step:
                    assert step.ok.all(), step.explain()
                    self.cache.end_step(step)
        self.cache.sync()
        self.fixed = GraphStep(self.cache, batch)
        self.x = torch.randn(batch, _HIDDEN, device="cuda").bfloat16()
        self.stream: Any = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            self.load()
            model.run(self.x, self.fixed.begin())
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                model.run(self.x, self.fixed.begin())
        torch.cuda.synchronize()

    def load(self) -> None:
        """Bring the tables of a step that reads everything."""
        step = self.cache.begin_step(self.ids, 1)
        assert step.ok.all()
        self.fixed.load(step)
        self.cache.abort_step(step)

    @property
    def tokens_away(self) -> int:
        """Tokens that a step reads in host memory."""
        group, total = self.cache._group, 0
        first = self.cache.config.pool_firsts[3]
        for row in range(self.batch):
            entries, starts = group.table.entries[row], group.table.starts[row]
            away = starts[(entries >= 0) & (entries & 0xFFFFFF >= first)]
            total += int(np.clip(self.tokens - 8 * away, 0, 64).sum())
        return total

    def ms(self, repeats: int) -> float:
        """Milliseconds of a step."""
        import torch

        with torch.cuda.stream(self.stream):
            self.graph.replay()
            return float(np.median(event_times(self.graph.replay, repeats))) / 1e3


def _beside(model: _Model, batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Steps while blocks move that they do not read."""
    import torch

    events: Any = torch.cuda.Event
    steps = _Steps(model, batch, tokens, batch * (tokens + 256) + (1 << 15), {"host": "12 GiB", "hot": 64})
    cache, rows = steps.cache, []
    storage: Any = cache._group.storage
    transfers, held = storage.transfers, storage.superblocks
    first, free = cache.config.pool_firsts[3] // 8, cache.config.tier_granules[0] // 8 - 448
    alone = steps.ms(repeats)
    print(f"\nstep of {batch} x {tokens} tokens: {alone:.2f} ms alone")
    print(f"{'while blocks move':<32}{'GB/s':>9}{'slower':>9}{'overlap':>9}{'GB/s alone':>12}")
    on_device, in_host = (np.arange(448, dtype=np.int32) + at for at in (free, first))
    nbytes = 448 * held.nbytes * held.num_arrays
    for way, pair in (("to the device", (in_host, on_device)), ("to the host", (on_device, in_host))):
        for ctas in (0, 2, 4, 8, 12):
            transfers.ways[TIER_HOT] = Ways(ctas, ctas)
            number = max(1, int(alone * 8e-3 * 50e9 / nbytes))
            copies = partial(_start, transfers, pair, number)
            with torch.cuda.stream(steps.stream):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                copies()
                torch.cuda.synchronize()
                copy_ms = (time.perf_counter() - begin) * 1e3
                count = max(1, round(copy_ms / alone))
                begin = time.perf_counter()
                for _ in range(count):
                    steps.graph.replay()
                torch.cuda.synchronize()
                step_ms = (time.perf_counter() - begin) * 1e3
                marks = [events(enable_timing=True) for _ in range(2)]
                begin = time.perf_counter()
                copies()
                marks[0].record()
                for _ in range(count):
                    steps.graph.replay()
                marks[1].record()
                transfers.join()
                marks[1].synchronize()
                while not steps.stream.query():
                    pass
                both_ms = (time.perf_counter() - begin) * 1e3
            slower = marks[0].elapsed_time(marks[1]) / step_ms - 1
            overlap = (copy_ms + step_ms - both_ms) / min(copy_ms, step_ms)
            row = {"way": way, "ctas": ctas, "gbps": number * nbytes / max(both_ms, 1e-9) / 1e6, "slower": slower}
            row |= {"overlap": overlap, "alone": number * nbytes / copy_ms / 1e6, "step_ms": alone, "batch": batch}
            rows.append(row)
            name = f"{way}, " + (f"{ctas} CTAs" if ctas else "engines")
            print(f"{name:<32}{row['gbps']:>9.1f}{slower:>9.1%}{overlap:>9.2f}{row['alone']:>12.1f}", flush=True)
    return rows


def _start(transfers: Any, pair: Any, number: int) -> None:
    for _ in range(number):
        transfers.start(TIER_HOT, *pair)


def _needed(model: _Model, batch: int, tokens: int, percents: list[int], repeats: int) -> list[dict[str, Any]]:
    """Steps of a batch of which a part is in host memory."""
    total, rows = batch * (tokens + 256), []
    steps = _Steps(model, batch, tokens, total, None)
    on_device = steps.ms(repeats)
    del steps
    _forget()
    print(f"\nstep of {batch} x {tokens} tokens, all on the device: {on_device:.2f} ms")
    print(f"{'of them in host memory':<32}{'GiB':>9}{'in place':>10}{'ahead':>10}{'link alone':>12}   ms")
    for percent in percents:
        away = batch * tokens * percent // 100
        row = {"batch": batch, "tokens": tokens, "percent": percent, "on_device_ms": on_device}
        for name, staging in (("in_place", 0), ("ahead", -(-away // 64) * 64 + 1024)):
            tiers = {"host": (away + 64 * batch + 4096) * 131072, "hot": 64, "pinned_tokens": 0, "staging": staging}
            steps = _Steps(model, batch, tokens, max(total - away - 256 * batch, 4096), tiers)
            row[name + "_ms"] = steps.ms(repeats)
            row["gib"] = steps.tokens_away * 131072 / 2**30
            del steps
            _forget()
        row["link_ms"] = row["gib"] * 2**30 / 51e9 * 1e3
        rows.append(row)
        figures = f"{row['gib']:>9.2f}{row['in_place_ms']:>10.2f}{row['ahead_ms']:>10.2f}{row['link_ms']:>12.2f}"
        print(f"{f'{percent} %':<32}{figures}", flush=True)
    return rows


def _forget() -> None:
    """Give memory back before the next cache is made."""
    import gc

    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
