"""The promises hold with several threads, and the checker of histories knows a broken one."""

import threading
import time

import pytest

from allocators import BuddyAllocator, InvalidFreeError, LockFreeAllocator
from allocators.testing import ConformanceFailure, Event, check_history, run_threads
from allocators.testing.threads import frequent_switches, in_parallel, run_program, stay_within_quotas
from tests.allocators.pools import KINDS, epoch_maker, maker
from tests.allocators.tiny import TinyAllocator


@pytest.mark.parametrize("num_granules", [24, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_allocator_conforms_with_threads(kind, num_granules):
    run_threads(maker(kind, num_granules), max_examples=10, num_ops=600)


@pytest.mark.parametrize("kind", KINDS)
def test_epoch_pool_conforms_with_threads(kind):
    run_threads(epoch_maker(kind, 200), max_examples=8, num_ops=300)


def test_allocator_of_a_user_conforms_with_threads():
    run_threads(lambda: TinyAllocator(64), num_threads=3, max_examples=10, num_ops=100)


def test_failed_batches_of_others_are_never_seen_by_the_lock_free_pool():
    with frequent_switches():
        for layout in ("buddy", "slab"):
            stay_within_quotas(lambda layout=layout: LockFreeAllocator(1024, layout=layout), num_ops=2000)


def test_one_program_can_be_run_again():
    program = [("allocate", [0, 1]), ("free_in_parts", [0]), ("allocate_partial", [3, 3, 3]), ("free", [1, 0])]
    run_program(lambda: BuddyAllocator(24), [program] * 4, one_size=False)
    run_program(lambda: BuddyAllocator(24), [program] * 4, one_size=True)


def test_history_with_two_sure_owners_is_refused():
    events = [Event(0, "grant", ((0, 8),), 1, 2), Event(1, "grant", ((4, 1),), 3, 4), Event(0, "free", ((0, 8),), 5, 6)]
    with pytest.raises(ConformanceFailure, match="granule 4 belonged to threads 0 and 1 at once") as caught:
        check_history(events)
    assert caught.value.invariant == "disjoint"


def test_history_in_which_a_granule_may_have_changed_hands_in_time_is_accepted():
    events = [
        Event(0, "grant", ((0, 1),), 1, 2),
        Event(0, "free", ((0, 1),), 3, 9),
        Event(1, "grant", ((0, 1),), 4, 5),
    ]
    check_history(events, block=1, capacity=1)


@pytest.mark.parametrize(("capacity", "wrong"), [(3, True), (2, False)])
def test_refusal_is_false_only_if_the_request_fitted_at_every_instant(capacity, wrong):
    events = [
        Event(0, "grant", ((0, 1),), 1, 2),
        Event(1, "grant", ((1, 1),), 3, 9),
        Event(0, "grant", (), 4, 5, missing=1),
    ]
    if wrong:
        with pytest.raises(ConformanceFailure, match="refused 1 blocks, at most 2 of 3") as caught:
            check_history(events, block=1, capacity=capacity)
        assert caught.value.invariant == "exact exhaustion"
    else:
        check_history(events, block=1, capacity=capacity)


def test_hung_thread_is_reported():
    never = threading.Event()
    with pytest.raises(ConformanceFailure, match="1 of 2 threads have not come back") as caught:
        in_parallel([never.wait, lambda: None], timeout_s=0.2)
    never.set()
    assert caught.value.invariant == "bounded time"


def test_error_of_a_thread_reaches_the_caller():
    def refuse():
        raise InvalidFreeError("a reason")

    with pytest.raises(ConformanceFailure, match="a reason"):
        in_parallel([refuse, time.time], timeout_s=5)
