"""What a `kvtoolkit.DevicePool` costs inside kernels: single granules, taken and given back by whole warps."""

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from kvtoolkit.bench.timing import device_line, event_times, require_device
from kvtoolkit.cuda.launching import Launch
from kvtoolkit.device_pool import DevicePool
from kvtoolkit.runtime import Kernel, load
from kvtoolkit.runtime.kernels import packer

_NUM_GRANULES = 1 << 20
_ROUNDS = 16  # of churn, in one launch
_params = packer("3q2i")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench alloc``."""
    parser.add_argument("--threads", type=int, nargs="+", default=[1 << 10, 1 << 15, 1 << 20])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    require_device("alloc")
    print(device_line())
    print(f"a pool of {_NUM_GRANULES} granules, one granule a thread, by warps; G/s = 1e9 a second, medians\n")
    print(
        f"{'threads':>9}{'':>4}{'launch us':>11}{'take us':>10}{'G/s':>8}{'cold us':>10}{'give us':>10}{'G/s':>8}",
        end="",
    )
    print(f"{'churn us':>11}{'pairs G/s':>11}")
    rows = [_measure(threads, options.repeats) for threads in options.threads]
    for row in rows:
        threads = row["threads"]
        print(
            f"{threads:>9}{'':>4}{row['none']:>11.2f}{row['take']:>10.2f}{threads / row['take'] / 1e3:>8.2f}"
            f"{row['cold']:>10.2f}{row['give']:>10.2f}{threads / row['give'] / 1e3:>8.2f}"
            f"{row['churn']:>11.2f}{threads * _ROUNDS / row['churn'] / 1e3:>11.2f}"
        )
    alone = _alone(options.repeats)
    print(f"\none thread takes one granule inside a kernel: {alone['ns']:.0f} ns (median)")
    print(f"a full pool, 32768 threads told so: {alone['full']:.1f} us, the first time {alone['full_first']:.1f} us")
    registers = {name: _kernel(name).usage for name in ("kvt_none", "kvt_take", "kvt_give", "kvt_take_alone")}
    print("registers: " + ", ".join(f"{name} {usage.registers}" for name, usage in registers.items() if usage))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"rows": rows, "alone": alone}, file, indent=1)
    return 0


def _kernel(name: str) -> Kernel:
    return load("bench/alloc.cu", name, {}, 0)


class _Bench:
    """A pool, a place for what threads get, and launches on both."""

    def __init__(self, threads: int) -> None:
        import torch

        self.pool = DevicePool(_NUM_GRANULES)
        self.threads = threads
        self.starts = torch.zeros(threads, dtype=torch.int32, device="cuda")
        self.elapsed = torch.zeros(1, dtype=torch.int64, device="cuda")

    def call(self, name: str) -> Callable[[], None]:
        import torch

        parameters = _params.pack(
            self.pool.memory.data.ptr, self.starts.data_ptr(), self.elapsed.data_ptr(), self.threads, _ROUNDS
        )
        launch = Launch(_kernel(name), (-(-self.threads // 256),), 256, 0, parameters)
        return lambda: launch.run(torch.cuda.current_stream().cuda_stream)


def _measure(threads: int, repeats: int) -> dict[str, Any]:
    import torch

    bench = _Bench(threads)
    row: dict[str, Any] = {"threads": threads}
    row["none"] = float(np.median(event_times(bench.call("kvt_none"), repeats)))
    take, give, churn = bench.call("kvt_take"), bench.call("kvt_give"), bench.call("kvt_churn")
    times: dict[str, list[float]] = {"take": [], "give": [], "churn": [], "cold": []}
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(repeats + 2):  # the first two warm up
        times["take"] += event_times(take, 1)
        found = bench.starts.clone()
        times["give"] += event_times(give, 1)
        assert int(found.min()) >= 0
        assert len(found.unique()) == threads
        assert not bench.starts.any()
        times["churn"] += event_times(churn, 1)
        assert not bench.starts.any()
        bench.pool._reset(bench.pool._all_free())
        flush.zero_()  # out of the second-level cache
        times["cold"] += event_times(take, 1)
        give()
    assert bench.pool.num_free == _NUM_GRANULES
    return row | {name: float(np.median(found[2:])) for name, found in times.items()}


def _alone(repeats: int) -> dict[str, float]:
    import torch

    one = _Bench(1)
    alone, times = one.call("kvt_take_alone"), []
    for _ in range(repeats + 2):
        alone()
        times.append(int(one.elapsed) / _ROUNDS)
        one.pool._reset(one.pool._all_free())
    full = _Bench(1 << 15)
    full.pool._reset(np.zeros(_NUM_GRANULES // 64, np.uint64))
    take = full.call("kvt_take")
    event_times(full.call("kvt_none"), 3)
    first = []
    for _ in range(repeats):
        full.pool._reset(np.zeros(_NUM_GRANULES // 64, np.uint64))
        first += event_times(take, 1)
        assert bool((full.starts == -2).all())
    again = event_times(take, repeats)
    torch.cuda.synchronize()
    return {
        "ns": float(np.median(times[2:])),
        "full_first": float(np.median(first)),
        "full": float(np.median(again)),
    }
