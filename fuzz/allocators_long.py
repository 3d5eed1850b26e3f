"""Fuzz every allocator in turn: ``python fuzz/allocators_long.py [minutes of each] [seed]``. Prints its seed."""

import sys
import time

from allocators import names
from allocators.testing.fuzz import fuzz


def main(minutes: float, seed: int) -> int:
    print(f"seed {seed}")
    specs = [(name, {}) for name in names()] + [("lockfree", {"layout": "slab"})]
    return max(fuzz(name, minutes * 60, seed, options=options) for name, options in specs)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(
        main(
            float(arguments[0]) if arguments else 10.0,
            int(arguments[1]) if len(arguments) > 1 else time.time_ns() % 1_000_000,
        )
    )
