"""What a `kvtoolkit.DevicePool` costs inside kernels: single granules, taken and given back by whole warps."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit.bench.timing import device_line, event_times, require_device
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cuda.launching import Launch
from kvtoolkit.cuda.pool import DevicePool
from kvtoolkit.errors import ConfigError
from kvtoolkit.runtime import Kernel, load
from kvtoolkit.runtime.structs import ParameterStruct

_FULL = 1 << 20  # granules of the pool that is exhausted
_ROUNDS = 16  # of churn, in one launch
_params = ParameterStruct("bench/alloc.cu", "kvt_take")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench alloc``."""
    parser.add_argument("--threads", type=integer(1), nargs="+", default=[1 << 10, 1 << 15, 1 << 20])
    parser.add_argument("--granules", type=integer(1), default=1 << 21, help="size of the pool")
    parser.add_argument("--layout", choices=("buddy", "slab"), default="buddy")
    parser.add_argument("--repeats", type=integer(1), default=20)
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    if max(options.threads) > options.granules:
        raise ConfigError(
            f"--threads: expected at most a thread for each of {options.granules} granules, got {max(options.threads)}"
        )
    require_device("alloc")
    print(device_line())
    print(f"a pool of {options.granules} granules, layout {options.layout}, one granule a thread, by warps; medians\n")
    print(
        f"{'threads':>9}{'':>4}{'launch us':>11}{'take us':>10}{'G/s':>8}{'cold us':>10}{'give us':>10}{'G/s':>8}",
        end="",
    )
    print(f"{'churn us':>11}{'pairs G/s':>11}")
    layout = options.layout
    rows = [_measure(threads, options.granules, layout, options.repeats) for threads in options.threads]
    for row in rows:
        threads = row["threads"]
        print(
            f"{threads:>9}{'':>4}{row['none']:>11.2f}{row['take']:>10.2f}{threads / row['take'] / 1e3:>8.2f}"
            f"{row['cold']:>10.2f}{row['give']:>10.2f}{threads / row['give'] / 1e3:>8.2f}"
            f"{row['churn']:>11.2f}{threads * _ROUNDS / row['churn'] / 1e3:>11.2f}"
        )
    alone = _alone(layout, options.repeats)
    print(f"\none thread takes one granule inside a kernel: {alone['ns']:.0f} ns (median)")
    print(
        f"a full pool of {_FULL} granules tells 32768 threads so in {alone['full']:.1f} us, the first time in ", end=""
    )
    print(f"{alone['full_first']:.1f} us")
    for name, extra in (("buddy", {}), ("lockfree", {"layout": layout})):
        plain, growing = _step_times(name, extra)
        print(
            f"begin_step and end_step of 256 sequences on the GPU, allocator {name}: {plain:.0f} us, "
            f"{growing:.0f} us where 64 rows need a block (medians)"
        )
    registers = {name: _kernel(name, layout).usage for name in ("kvt_none", "kvt_take", "kvt_give", "kvt_take_alone")}
    print("registers: " + ", ".join(f"{name} {usage.registers}" for name, usage in registers.items() if usage))
    write_json(options.json, {"rows": rows, "alone": alone})
    return 0


def _times(call: Callable[[], None], count: int) -> list[float]:
    """Times of `event_times`, with the device kept busy before each call, so that it never waits for the host."""
    import torch

    found = []
    for _ in range(count):
        torch.cuda._sleep(100_000)
        found += event_times(call, 1)
    return found


def _kernel(name: str, layout: str) -> Kernel:
    return load("bench/alloc.cu", name, {"KVT_SLAB": int(layout == "slab")}, 0)


class _Bench:
    """A pool, an array for the granules that threads get, and launches on both."""

    def __init__(self, threads: int, num_granules: int, layout: str) -> None:
        import torch

        self.pool = DevicePool(num_granules, layout=layout)
        self.threads = threads
        self.starts = torch.zeros(threads, dtype=torch.int32, device="cuda")
        self.elapsed = torch.zeros(1, dtype=torch.int64, device="cuda")

    def call(self, name: str) -> Callable[[], None]:
        import torch

        parameters = _params.pack(
            self.pool.memory.data.ptr, self.starts.data_ptr(), self.elapsed.data_ptr(), self.threads, _ROUNDS
        )
        launch = Launch(_kernel(name, self.pool.layout), (-(-self.threads // 256),), 256, 0, parameters)
        return lambda: launch.run(torch.cuda.current_stream().cuda_stream)


def _measure(threads: int, num_granules: int, layout: str, repeats: int) -> dict[str, Any]:
    import torch

    bench = _Bench(threads, num_granules, layout)
    row: dict[str, Any] = {"threads": threads}
    row["none"] = float(np.median(_times(bench.call("kvt_none"), repeats)))
    take, give, churn = bench.call("kvt_take"), bench.call("kvt_give"), bench.call("kvt_churn")
    times: dict[str, list[float]] = {"take": [], "give": [], "churn": [], "cold": []}
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(repeats + 2):  # the first two warm up
        times["take"] += _times(take, 1)
        found = bench.starts.clone()
        times["give"] += _times(give, 1)
        assert int(found.min()) >= 0
        assert len(found.unique()) == threads
        assert not bench.starts.any()
        times["churn"] += _times(churn, 1)
        assert not bench.starts.any()
        bench.pool._reset(bench.pool._all_free())
        flush.zero_()  # out of the second-level cache
        times["cold"] += _times(take, 1)
        give()
    assert bench.pool.num_free == num_granules
    return row | {name: float(np.median(found[2:])) for name, found in times.items()}


def _step_times(allocator: str, options: dict[str, Any]) -> tuple[float, float]:
    """Host time in us of decode steps of 256 sequences: where no row needs a block, and where a quarter of them do."""
    batch, num_steps = 256, 160
    cache = KVCache(
        CacheConfig(
            num_layers=1, num_kv_heads=8, head_dim=128, num_tokens=batch * 512, max_seqs=batch, growth="append",
            backend="cuda", allocator=allocator, allocator_options=options,
        )
    )  # fmt: skip
    seq_ids, _ = cache.open([[]] * batch)
    lengths = np.arange(batch) // 64 + 1
    times: dict[bool, list[float]] = {False: [], True: []}
    for i, counts in enumerate([lengths, *[np.ones(batch, np.int64)] * num_steps]):
        begin = time.perf_counter()
        with cache.begin_step(seq_ids, counts) as step:
            cache.end_step(step)
        if i > num_steps // 4:
            times[bool(((lengths + i - 1) % 8 == 0).any())].append(1e6 * (time.perf_counter() - begin))
    return float(np.median(times[False])), float(np.median(times[True]))


def _alone(layout: str, repeats: int) -> dict[str, float]:
    import torch

    one = _Bench(1, _FULL, layout)
    alone, times = one.call("kvt_take_alone"), []
    for _ in range(repeats + 2):
        alone()
        times.append(int(one.elapsed) / _ROUNDS)
        one.pool._reset(one.pool._all_free())
    full = _Bench(1 << 15, _FULL, layout)
    taken = full.pool._words_with(np.zeros(_FULL, np.bool_))
    full.pool._reset(taken)
    take = full.call("kvt_take")
    _times(full.call("kvt_none"), 3)
    first = []
    for _ in range(repeats):
        full.pool._reset(taken)
        first += _times(take, 1)
        assert bool((full.starts == (-2 if layout == "buddy" else -3)).all())
    again = _times(take, repeats)
    torch.cuda.synchronize()
    return {
        "ns": float(np.median(times[2:])),
        "full_first": float(np.median(first)),
        "full": float(np.median(again)),
    }
