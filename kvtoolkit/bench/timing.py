"""Time kernels: replay a CUDA graph with one call for each of many data sets, and take medians of CUDA events.

Many data sets make the second-level cache cold; the graph leaves out what the host costs. The share that a kernel
reaches is of what this GPU does in the same run: reading for kernels that read, copying for those that copy.
"""

import argparse
import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from allocators._command_line import number
from kvtoolkit.cuda.launching import Launch
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime import load
from kvtoolkit.runtime.kernels import num_sms
from kvtoolkit.runtime.structs import ParameterStruct

Call = Callable[[], Any]

_SM_CLOCK = 1  # NVML_CLOCK_SM
_STILL_BUSY_US = 5000


class Timing(NamedTuple):
    """Microseconds of one call, and the state of the GPU."""

    us: float
    """Median."""
    p10: float
    p90: float
    mhz: int
    """SM clock right after."""
    watts: float
    clock_moved: bool
    """Whether it was more than 2 % apart before and after: the median is of no one clock then."""


def add_sustained(parser: argparse.ArgumentParser) -> None:
    """The option that heats the GPU before each kernel is timed."""
    parser.add_argument(
        "--sustained", type=number(0), default=0.05, metavar="SECONDS",
        help="of load before a kernel is timed; default 0.05",
    )  # fmt: skip


def require_device(what: str) -> None:
    """Raise UnsupportedError if torch finds no CUDA device to measure."""
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(f"bench {what}: expected a CUDA device, found none; `kvtoolkit doctor` says more")


def time_graph(calls: Sequence[Call], replays: int = 40, warm_up: float = 0.05) -> Timing:
    """Time calls by replaying a graph of all of them. The first and the last run once before the graph is captured.

    Args:
        warm_up: seconds of replays before those that are timed; after some seconds of load the clock falls to what the
            GPU's power allows.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], calls[-1]):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    until = time.monotonic() + warm_up
    while True:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        if time.monotonic() > until:
            break
    before = gpu_state()
    times = event_times(graph.replay, replays)
    for _ in range(max(1, int(_STILL_BUSY_US / max(times)))):
        graph.replay()  # so that it is busy while it is asked
    after = gpu_state()
    torch.cuda.synchronize()
    p10, median, p90 = np.percentile(times, [10, 50, 90]) / len(calls)
    moved = abs(after.mhz - before.mhz) > 0.02 * before.mhz
    return Timing(float(median), float(p10), float(p90), after.mhz, after.watts, moved)


def event_times(call: Call, count: int) -> list[float]:
    """Microseconds of each of ``count`` calls, by CUDA events."""
    import torch

    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]


def host_us(call: Call, count: int = 50) -> float:
    """Host time of one call in microseconds: the best of five means, without waiting for the device."""
    import torch

    best = float("inf")
    for _ in range(5):
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - begin) / count * 1e6)
        torch.cuda.synchronize()
    return best


class GpuState(NamedTuple):
    """What the driver says of a GPU; zeros where it does not say."""

    mhz: int
    """SM clock."""
    watts: float


def gpu_state(device: int = 0) -> GpuState:
    """Ask the driver's management library, which comes with every driver and counts all devices of the machine."""
    library = _management()
    handle, mhz, milliwatts = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    if library is None or library.nvmlDeviceGetHandleByIndex_v2(device, ctypes.byref(handle)):
        return GpuState(0, 0.0)
    library.nvmlDeviceGetClockInfo(handle, _SM_CLOCK, ctypes.byref(mhz))
    library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts))
    return GpuState(mhz.value, milliwatts.value / 1e3)


@functools.cache
def _management() -> Any:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library


def copy_ceiling(nbytes: int = 1 << 30) -> float:
    """GB/s of a large copy on the device. Bytes read and bytes written both count."""
    import torch

    source = torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * nbytes / float(np.median(event_times(lambda: target.copy_(source), 20))) / 1e3


def read_ceiling(nbytes: int = 4 << 30) -> float:
    """GB/s of a large streaming read: the best of a few grids."""
    import torch

    source = torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device="cuda")
    total = torch.zeros(1, dtype=torch.int32, device="cuda")
    parameters = ParameterStruct("bench/read.cu", "kvt_read").pack(source.data_ptr(), total.data_ptr(), nbytes // 16)
    kernel = load("bench/read.cu", "kvt_read", {}, 0)
    stream = torch.cuda.current_stream().cuda_stream
    best = 0.0
    for per_sm in (1, 2, 4):
        launch = Launch(kernel, (per_sm * num_sms(0),), 512, 0, parameters)
        launch.run(stream)
        us = float(np.median(event_times(partial(launch.run, stream), 12)))
        best = max(best, nbytes / us / 1e3)
    return best


def device_line() -> str:
    """The GPU and the versions, for the head of a table."""
    import cupy
    import torch

    from kvtoolkit._version import __version__

    driver = cupy.cuda.runtime.driverGetVersion()
    return (
        f"kvtoolkit {__version__}, {torch.cuda.get_device_name()}, driver CUDA {driver // 1000}.{driver % 1000 // 10}, "
        f"torch {torch.__version__}, CuPy {cupy.__version__}"
    )
