"""Hammer every allocator from many threads: ``python fuzz/threads_long.py [minutes] [seed]``. Prints its seed."""

import os
import sys
import time

from allocators import create, names
from allocators.testing import ConformanceFailure, run_threads


def main(minutes: float, seed: int) -> int:
    print(f"seed {seed}")
    num_threads = 2 * (os.cpu_count() or 2)
    specs = [(name, {}) for name in names()] + [("lockfree", {"layout": "slab"})]
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end:
        for name, options in specs:
            for num_granules in (64, 1024, 1 << 14):
                try:
                    run_threads(
                        lambda name=name, size=num_granules, options=options: create(name, size, **options),
                        num_threads=num_threads,
                        num_ops=5000,
                        seed=seed,
                    )
                except ConformanceFailure as failure:
                    print(f"{name} {options}, {num_granules} granules, seed {seed}: {failure}")
                    return 1
        print(f"seed {seed}: all passed", flush=True)
        seed += 1
    return 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(
        main(
            float(arguments[0]) if arguments else 10.0,
            int(arguments[1]) if len(arguments) > 1 else time.time_ns() % 1_000_000,
        )
    )
