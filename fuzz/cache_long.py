"""Fuzz whole caches in turn: ``python -m fuzz.cache_long [minutes] [seed]``. Prints its seed."""

import sys
import time

from hypothesis import HealthCheck, settings
from hypothesis import seed as with_seed
from hypothesis.stateful import run_state_machine_as_test

from tests.kvtoolkit.cache.test_cache_machine import CONFIGS, TIERED_CONFIGS, CacheMachine, TierMachine, tiered_fields

MACHINES = [(CacheMachine, config) for config in CONFIGS]
MACHINES += [(TierMachine, tiered_fields(config)) for config in TIERED_CONFIGS]


def main(minutes: float, seed: int) -> int:
    print(f"seed {seed}")
    options = settings(
        max_examples=200,
        stateful_step_count=60,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    deadline, rounds = time.monotonic() + 60 * minutes, 0
    while rounds == 0 or time.monotonic() < deadline:
        kind, config = MACHINES[rounds % len(MACHINES)]
        print(f"round {rounds}: {config}", flush=True)
        machine = with_seed(seed + rounds)(type("Machine", (kind,), {"config": config}))
        run_state_machine_as_test(machine, settings=options)
        rounds += 1
    print(f"{rounds} rounds of {options.max_examples} programs, nothing found")
    return 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(
        main(
            float(arguments[0]) if arguments else 10.0,
            int(arguments[1]) if len(arguments) > 1 else time.time_ns() % 1_000_000,
        )
    )
