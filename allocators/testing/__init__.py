"""The conformance kit: what a user's allocator must survive, and ours do.

``run_conformance(lambda: MyAllocator(64))`` tries random calls beside a set model and raises `ConformanceFailure`
with the shortest sequence that breaks a promise.
"""

from allocators.testing.conformance import conformance_machine, run_conformance
from allocators.testing.failure import ConformanceFailure
from allocators.testing.machine import AllocatorMachine, Make
from allocators.testing.model import PoolModel

__all__ = [
    "AllocatorMachine",
    "ConformanceFailure",
    "Make",
    "PoolModel",
    "conformance_machine",
    "run_conformance",
]
