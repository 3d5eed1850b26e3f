"""The conformance kit: what a user's allocator must survive, and ours do.

``run_conformance(lambda: MyAllocator(64))`` tries random calls beside a set model and raises `ConformanceFailure`
with a short script of calls that breaks a promise; `run_threads` does the same with threads, as far as chance helps.
What is deterministic is asked of the allocators of this project, of others if they say so.
The promises by name, as in `ConformanceFailure.invariant`:

    inside the pool, aligned, disjoint     where a block may be
    conserved                              free + handed out + pinned == num_granules, and stats() says so
    exact counts, partial                  as many blocks as asked for; a partial call stops at what does not fit
    exact exhaustion                       a refused batch does not fit one by one, largest first, either
    misuse is refused                      double frees, wrong sizes and types, runs out of range, ended leases ...
    a refused call changes nothing         no figure; if deterministic, to the last byte of `snapshot`
    proper use is granted                  no error where there is nothing wrong
    only AllocatorErrors                   and no other exceptions
    canaries                               what a live block holds is never overwritten
    recovery                               with all freed the pool grants what a fresh one can
    order independence                     the order of frees does not matter for what is free
    truthful figures                       largest_free and free_blocks are what can be granted
    snapshot and restore                   a restored pool has the figures of the moment, and goes on
    deterministic                          the same calls on a restored pool give the same grants
    integrity                              `check_integrity` finds nothing
    no reuse before the epoch ends, epochs, leases, speculation     of an `EpochPool`
    bounded time                           no thread hangs
"""

from allocators.testing.conformance import conformance_machine, run_conformance
from allocators.testing.failure import ConformanceFailure
from allocators.testing.history import Event, check_history
from allocators.testing.machine import AllocatorMachine, Make
from allocators.testing.model import PoolModel
from allocators.testing.threads import run_threads

__all__ = [
    "AllocatorMachine",
    "ConformanceFailure",
    "Event",
    "Make",
    "PoolModel",
    "check_history",
    "conformance_machine",
    "run_conformance",
    "run_threads",
]
