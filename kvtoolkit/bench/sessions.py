"""Sessions that sleep: what hints at pauses are worth, on the cache itself and beside perfect knowledge.

Sessions of a trace (`kvtoolkit.bench.session_traces`) run on one simulated clock. There is no model: the cache has no
keys and values, and what a request waits for is computed from what it found. All seeds are fixed, and no figure depends
on the machine.
"""

import argparse
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np

from allocators._command_line import integer, number
from kvtoolkit._version import __version__
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.bench.session_blocks import belady, known_pauses, lru
from kvtoolkit.bench.session_replay import POLICIES, Costs, Replay
from kvtoolkit.bench.session_schedule import Schedule, schedule
from kvtoolkit.bench.session_traces import BLOCK, read_sessions
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.errors import ArgumentError
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES

_POSITIVE = number(1e-6)
_LONGEST = 0.95
"""Requests with more blocks than this share of the smallest device are left out, for every device."""
_QUICK: dict[str, Any] = {"sessions": 30, "capacity": [0.5], "host": [2.0]}


@dataclass(frozen=True)
class Row:
    """What one policy found, in shares of all blocks of prompts, and what requests waited for, in seconds.

    Attributes:
        name: of the policy.
        on_device: found where it is needed.
        in_host: found in host memory, or still on its way.
        missing: computed, for the first time or again.
        wait: mean of a request: transfer and computation.
        wait_p99: the 99th percentile.
        refused: requests that got no memory.
        moved: blocks that moved to host memory or from there, for each block of a prompt.
        gain_found: share of the best's gain over the device alone that it keeps, counted in blocks on the device.
        gain_wait: the same, counted in mean waits.
    """

    name: str
    on_device: float
    in_host: float
    missing: float
    wait: float
    wait_p99: float
    refused: int = 0
    moved: float = 0.0
    gain_found: float | None = None
    gain_wait: float | None = None


def replayed(plan: Schedule, name: str, device_blocks: int, host_blocks: int, costs: Costs) -> Row:
    """Run one of `POLICIES` on the cache."""
    found = Replay(plan, POLICIES[name], device_blocks, host_blocks, costs).run()
    moved = MAX_BLOCK_GRANULES * (found.num_offloaded + found.num_prefetched)
    waits, total = np.array(found.waits), plan.num_blocks
    return Row(
        name,
        on_device=sum(found.on_device) / total,
        in_host=sum(found.in_host) / total,
        missing=sum(found.missing) / total,
        wait=float(waits.mean()),
        wait_p99=float(np.percentile(waits, 99)),
        refused=found.num_refused,
        moved=moved / total,
    )


def ideal(plan: Schedule, name: str, found: Int32Array, costs: Costs) -> Row:
    """The row of a simulation of blocks, all of which are on the device when they are needed."""
    lengths = np.array([len(one.blocks) for one in plan.arrivals])
    waits = costs.compute_seconds(1) * (lengths - found)
    share = float(found.sum()) / plan.num_blocks
    return Row(name, share, 0.0, 1 - share, float(waits.mean()), float(np.percentile(waits, 99)))


def with_gains(row: Row, least: Row, most: Row) -> Row:
    """A row with the share that it keeps of what ``most`` gains over ``least``."""
    found, wait = most.on_device - least.on_device, least.wait - most.wait
    values = vars(row) | {
        "gain_found": (row.on_device - least.on_device) / found if found > 0 else None,
        "gain_wait": (least.wait - row.wait) / wait if wait > 0 else None,
    }
    return Row(**values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench sessions``."""
    parser.add_argument("--trace", required=True, metavar="FILE", help="sessions of agents, JSON lines, .gz or not")
    parser.add_argument("--sessions", type=integer(1), default=120, help="so many of them, by a fixed seed")
    parser.add_argument("--spread", type=_POSITIVE, default=1.0, metavar="HOURS", help="they begin within this time")
    parser.add_argument("--capacity", type=_POSITIVE, nargs="+", default=[0.5, 1.0, 2.0], metavar="M",
                        help="tokens of the device, in units of 2**20")  # fmt: skip
    parser.add_argument("--host", type=_POSITIVE, nargs="+", default=[2.0], metavar="TIMES",
                        help="host memory, in times the device")  # fmt: skip
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), metavar="POLICY",
                        help=f"only these of {', '.join(POLICIES)}")  # fmt: skip
    parser.add_argument("--prefill", type=_POSITIVE, default=10_000.0, help="tokens that a second computes")
    parser.add_argument("--link", type=_POSITIVE, default=50.0, help="GB/s between host memory and the device")
    parser.add_argument("--token-kib", type=_POSITIVE, default=128.0, help="KiB of a token's keys and values")
    parser.add_argument("--quick", action="store_true", help="30 sessions, one device: about a minute")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Simulate and print."""
    for name, value in _QUICK.items() if options.quick else ():
        setattr(options, name, value)
    costs = Costs(int(options.token_kib * 1024), options.link * 1e9, options.prefill)
    sizes = [
        round(capacity * (1 << 20) / BLOCK / MAX_BLOCK_GRANULES) * MAX_BLOCK_GRANULES for capacity in options.capacity
    ]
    most_blocks = int(_LONGEST * min(sizes))
    plan = schedule(read_sessions(options.trace), options.sessions, options.spread * 3600, most_blocks)
    if not plan.arrivals:
        raise ArgumentError(f"--capacity: expected room for some request, got {min(options.capacity)}, room for none")
    print(f"kvtoolkit {__version__}, Python {platform.python_version()}")
    print(
        f"{len(plan.arrivals)} requests of {plan.num_blocks * BLOCK / 1e6:.0f} M tokens in all, "
        f"{plan.num_left_out} longer than {most_blocks * BLOCK} tokens left out; {options.token_kib:g} KiB a token, "
        f"{options.link:g} GB/s, {options.prefill:g} tokens/s"
    )
    records = []
    for size in sizes:
        records += _compare(plan, size, options.host, options.policy or list(POLICIES), costs)
    write_json(options.json, {"version": __version__, "rows": records})
    return 0


def _compare(plan: Schedule, size: int, hosts: list[float], names: list[str], costs: Costs) -> list[dict[str, Any]]:
    """All policies on one device: without host memory, and with each size of it."""
    tokens = size * BLOCK / (1 << 20)
    _print_head(f"device {tokens:g} M tokens")
    least = ideal(plan, "LRU, simulated", lru(plan, size), costs)
    most = ideal(plan, "Belady", belady(plan, size), costs)
    known = ideal(plan, "known pauses, simulated", known_pauses(plan, size), costs)
    records = []

    def show(row: Row, best: Row, host: float) -> None:
        row = with_gains(row, least, best)
        _print(row)
        records.append({"capacity": size * BLOCK, "host": host, **vars(row)})

    for row in (least, known, most):
        show(row, most, 0.0)
    for name in names:
        if not POLICIES[name].has_host:
            show(replayed(plan, name, size, 0, costs), most, 0.0)
    for times in hosts:
        host_blocks = round(times * size / MAX_BLOCK_GRANULES) * MAX_BLOCK_GRANULES
        together = size + host_blocks
        _print_head(f"device {tokens:g} M tokens, host {times:g} times that")
        best = ideal(plan, "Belady, as one device", belady(plan, together), costs)
        show(ideal(plan, "LRU, as one device", lru(plan, together), costs), best, times)
        show(ideal(plan, "known pauses, as one device", known_pauses(plan, together), costs), best, times)
        show(best, best, times)
        for name in names:
            if POLICIES[name].has_host:
                show(replayed(plan, name, size, host_blocks, costs), best, times)
    return records


def _print_head(title: str) -> None:
    print(f"\n{title}")
    print(
        f"{'':<33} {'device':>7} {'host':>7} {'missing':>8} {'wait':>7} {'p99':>7} {'moved':>6} {'refused':>8} "
        f"{'kept':>7} {'of wait':>8}"
    )


def _print(row: Row) -> None:
    print(
        f"{row.name:<33} {row.on_device:>7.1%} {row.in_host:>7.1%} {row.missing:>8.1%} {row.wait:>7.2f} "
        f"{row.wait_p99:>7.2f} {row.moved:>6.2f} {row.refused:>8} {_share(row.gain_found):>7} "
        f"{_share(row.gain_wait):>8}",
        flush=True,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
