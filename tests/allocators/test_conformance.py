"""Every allocator keeps every promise of the protocol, alone and inside an EpochPool."""

import pytest
from hypothesis import settings

from allocators import BuddyAllocator
from allocators.testing import ConformanceFailure, conformance_machine, run_conformance
from tests.allocators.pools import KINDS, POOL_SIZES, epoch_maker, maker
from tests.allocators.tiny import TinyAllocator


@pytest.mark.parametrize("num_granules", POOL_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_allocator_conforms(kind, num_granules):
    # a call of a large pool takes longer, and no more states of it are worth a visit
    run_conformance(maker(kind, num_granules), max_examples=15 if num_granules < 200 else 8, num_steps=40)


@pytest.mark.parametrize("num_granules", [24, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_allocator_conforms_inside_an_epoch_pool(kind, num_granules):
    run_conformance(epoch_maker(kind, num_granules), max_examples=20, num_steps=40)


@pytest.mark.parametrize("num_granules", [8, 24, 64, 200])
def test_allocator_of_a_user_conforms(num_granules):
    run_conformance(lambda: TinyAllocator(num_granules), max_examples=10, num_steps=20)


def test_failure_names_the_promise_and_the_calls():
    class Leaky(BuddyAllocator):
        def free(self, starts, sizes):
            super().free(starts[:1], sizes[:1])

    with pytest.raises(ConformanceFailure) as caught:
        run_conformance(lambda: Leaky(24), max_examples=3000)
    assert caught.value.invariant
    notes = "\n".join(caught.value.__notes__)
    assert "    pool = make()\n    pool.allocate(" in notes


class TestBuddyAsTestCase(conformance_machine(maker("buddy", 64)).TestCase):
    """The other way to use the kit."""

    settings = settings(max_examples=10, deadline=None)
