"""Run the conformance machine against an allocator: as a test case for pytest, or at once."""

from collections.abc import Callable

import hypothesis
import hypothesis.errors
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from allocators.testing.epoch_machine import EpochMachine
from allocators.testing.machine import AllocatorMachine, Make, is_epoch_pool, is_own
from allocators.testing.recording import Recorder, ShrinkingIsOver


def conformance_machine(
    make: Make, *, deterministic: bool | None = None, recorder: Recorder | None = None
) -> type[AllocatorMachine]:
    """The state machine for the allocators that ``make()`` returns; ``machine.TestCase`` is a test for pytest.

    An `EpochPool`, or what has its methods, gets the rules of limbo, streams and leases too.

    Args:
        make: makes a fresh pool.
        deterministic: whether equal histories must lead to equal pools, to the last byte of `snapshot`, and an emptied
            pool equal a fresh one. The protocol does not ask for that: a pool may have a cursor, a clock, or random
            numbers. None: of the allocators of this project alone.
        recorder: of the calls.
    """
    pool = make()
    base = EpochMachine if is_epoch_pool(pool) else AllocatorMachine
    fields = {
        "make": staticmethod(make),
        "is_deterministic": is_own(pool) if deterministic is None else deterministic,
        "recorder": recorder or Recorder(),
    }
    return type(base.__name__, (base,), fields)


def run_conformance(
    make: Make,
    *,
    max_examples: int = 100,
    num_steps: int = 50,
    seed: int | None = None,
    shrink: bool = True,
    shrink_s: float = 30.0,
    deterministic: bool | None = None,
    report: Callable[[str], None] | None = None,
    opening: str = "pool = make()",
) -> None:
    """Try to break an allocator.

    Args:
        make: makes a fresh pool. Every call must return a new object of the same kind.
        max_examples: sequences of calls to try.
        num_steps: calls in a sequence, at most.
        seed: of the sequences; None for the same ones every time.
        shrink: look for the shortest sequence that fails; otherwise stop at the first.
        shrink_s: seconds after which that ends with the shortest found so far.
        deterministic: see `conformance_machine`.
        report: is told every few seconds how far the search for a shorter sequence is.
        opening: the line of the printed script that makes the pool.

    Raises:
        ConformanceFailure: it broke a promise, which ``invariant`` names; its notes hold the calls that lead there, as
            a script.
    """
    recorder = Recorder(shrink_s if shrink else 0.0, report, opening)
    machine = conformance_machine(make, deterministic=deterministic, recorder=recorder)
    if seed is not None:
        machine = hypothesis.seed(seed)(machine)
    more = ""
    try:
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
    except ShrinkingIsOver:
        pass
    except Exception as error:
        if recorder.failure is None:
            raise
        if isinstance(error, hypothesis.errors.Flaky) and not recorder.is_over:
            more = "The same calls did not fail when they were repeated: chance, a clock or threads have a part in it."
    if recorder.failure is not None:
        raise recorder.the_failure(*([more] if more else []))
