"""Run the conformance machine against an allocator: as a test case for pytest, or at once."""

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from allocators.testing.epoch_machine import EpochMachine
from allocators.testing.machine import AllocatorMachine, Make, is_epoch_pool


def conformance_machine(make: Make) -> type[AllocatorMachine]:
    """The state machine for the allocators that ``make()`` returns; ``machine.TestCase`` is a test for pytest.

    An `EpochPool`, or what has its methods, gets the rules of limbo, streams and leases too.
    """
    base = EpochMachine if is_epoch_pool(make()) else AllocatorMachine
    return type(base.__name__, (base,), {"make": staticmethod(make)})


def run_conformance(
    make: Make, *, max_examples: int = 100, num_steps: int = 50, seed: int | None = None, shrink: bool = True
) -> None:
    """Try to break an allocator.

    Args:
        make: makes a fresh pool; every call another object, and all of them alike.
        max_examples: sequences of calls to try.
        num_steps: calls in a sequence, at most.
        seed: of the sequences; None for the same ones every time.
        shrink: look for the shortest sequence that fails; otherwise stop at the first.

    Raises:
        ConformanceFailure: it broke a promise, which ``invariant`` names; the notes hold the calls that lead there.
    """
    machine = conformance_machine(make)
    if seed is not None:
        machine = hypothesis.seed(seed)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=num_steps,
            derandomize=seed is None,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            print_blob=False,
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
