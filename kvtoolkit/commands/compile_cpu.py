"""`kvtoolkit compile --backend cpu`: what a cache on the CPU runs, compiled and kept on disk before it is needed."""

import argparse
import time
from typing import Any

from numba.core import event

from allocators._jit import cache_folder
from kvtoolkit.cache.rehearsal import parts_of
from kvtoolkit.commands.json_file import write_json
from kvtoolkit.config.cache import CacheConfig

TIERS = {"warm": "int8", "cold": "int4", "demote": "mass"}


def main(options: argparse.Namespace) -> int:
    """Compile for each allocator and print a table."""
    configs = [
        CacheConfig(
            num_layers=1, num_kv_heads=1, head_dim=64, num_tokens=8192, allocator=name,
            tiers=TIERS if options.tiers else None,
        )
        for name in options.allocator
    ]  # fmt: skip
    print(f"{'allocator':<12}{'part':<20}{'functions':>10}{'s':>8}")
    rows: list[dict[str, Any]] = []
    for config in configs:
        for part, run in parts_of(config, num_q_heads=1):
            counter, began = Counter(), time.perf_counter()
            with event.install_listener("numba:compile", counter):
                run()
            rows.append(
                {
                    "allocator": config.allocator,
                    "part": part,
                    "functions": counter.num_functions,
                    "seconds": time.perf_counter() - began,
                }
            )
            print(f"{config.allocator:<12}{part:<20}{counter.num_functions:>10}{rows[-1]['seconds']:>8.1f}", flush=True)
    folder = cache_folder()
    where = f"kept in {folder}" if folder else "not kept: no folder can be used, see `kvtoolkit doctor`"
    total = sum(row["functions"] for row in rows)
    print(f"{total} functions compiled, {sum(row['seconds'] for row in rows):.1f} s; {where}")
    write_json(options.json, rows)
    return 0


class Counter(event.Listener):  # type: ignore[misc]
    """Counts our functions that Numba compiles: not those of its own that they call, nor what the disk cache has."""

    def __init__(self) -> None:
        self.num_functions = 0

    def on_start(self, event: Any) -> None:
        """A function begins to be compiled."""

    def on_end(self, event: Any) -> None:
        """A function was compiled."""
        module = event.data["dispatcher"].py_func.__module__
        self.num_functions += module.split(".")[0] in ("allocators", "kvtoolkit")
