"""Limbo, streams and leases of an EpochPool, example by example; the conformance machine covers the rest."""

import pytest

from allocators import (
    BuddyAllocator,
    EpochPool,
    InvalidFreeError,
    InvalidSizeError,
    LeaseError,
    OutOfBlocksError,
    SnapshotError,
    UnknownStreamError,
)


@pytest.fixture
def pool():
    return EpochPool(BuddyAllocator(24), streams=("compute", "copy"))


def test_retired_blocks_wait_for_every_stream(pool):
    starts = pool.allocate([8, 8])
    epoch = pool.retire(starts, [8, 8])
    assert (pool.num_free, pool.num_in_limbo) == (8, 16)
    pool.complete(epoch, "compute")
    assert pool.num_in_limbo == 16
    pool.complete(epoch, "copy")
    assert (pool.num_free, pool.num_in_limbo) == (24, 0)


def test_completing_a_later_epoch_completes_those_before(pool):
    first, second = pool.allocate([8, 8])
    pool.retire([first], [8])
    pool.advance()
    pool.retire([second], [8])
    pool.complete(1)
    assert pool.num_free == 24


def test_completing_the_current_epoch_begins_the_next(pool):
    pool.complete(0)
    assert pool.epoch == 1


def test_stream_registered_later_holds_only_what_is_retired_from_then_on(pool):
    first, second = pool.allocate([8, 8])
    pool.retire([first], [8])
    pool.advance()
    pool.register_stream("prefetch")
    pool.retire([second], [8])
    for stream in ("compute", "copy"):
        pool.complete(1, stream)
    assert pool.num_in_limbo == 8
    pool.complete(1, "prefetch")
    assert pool.num_in_limbo == 0


def test_nothing_in_limbo_is_granted_again(pool):
    pool.retire(pool.allocate([8, 8, 8]), [8, 8, 8])
    with pytest.raises(OutOfBlocksError):
        pool.allocate([1])


def test_unknown_stream_and_future_epoch_are_refused(pool):
    with pytest.raises(UnknownStreamError, match=r"expected one of \['compute', 'copy'\], got 'gpu'"):
        pool.complete(0, "gpu")
    with pytest.raises(InvalidSizeError, match="expected an int from 0 to the current one, 0, got 1"):
        pool.complete(1)


def test_committed_lease_is_live_and_aborted_lease_is_gone(pool):
    kept, dropped = pool.lease([4, 4]), pool.lease([8])
    kept.commit()
    dropped.abort()
    assert (pool.num_leased, pool.num_free) == (0, 16)
    pool.free(kept.starts, kept.sizes)
    assert pool.num_free == 24


def test_commit_inside_a_lease_hands_the_blocks_to_it(pool):
    outer = pool.lease([2])
    outer.lease([4]).commit()
    assert sorted(outer.sizes.tolist()) == [2, 4]
    outer.abort()
    assert pool.num_free == 24


def test_abort_ends_the_leases_inside(pool):
    outer = pool.lease([2])
    inner = outer.lease([4])
    outer.abort()
    with pytest.raises(LeaseError, match="got one that is aborted"):
        inner.commit()


def test_leaving_a_with_block_aborts_unless_committed(pool):
    with pool.lease([8]):
        assert pool.num_leased == 8
    assert pool.num_free == 24
    with pool.lease([8]) as lease:
        lease.commit()
    assert pool.num_free == 16


def test_leased_block_cannot_be_freed_or_retired(pool):
    lease = pool.lease([8])
    for take_back in (pool.free, pool.retire):
        with pytest.raises(InvalidFreeError, match="expected live granules, got granule 0, leased"):
            take_back(lease.starts, [8])


def test_snapshot_keeps_limbo_and_clock(pool):
    pool.retire(pool.allocate([8]), [8])
    pool.advance()
    data = pool.snapshot()
    other = EpochPool(BuddyAllocator(24), streams=("compute", "copy"))
    other.restore(data)
    assert (other.epoch, other.num_in_limbo, other.num_free) == (1, 8, 16)
    other.complete(0)
    assert other.num_free == 24


def test_restore_voids_open_leases(pool):
    data = pool.snapshot()
    lease = pool.lease([8])
    pool.restore(data)
    with pytest.raises(LeaseError, match="void: the pool was restored"):
        lease.abort()
    assert pool.num_free == 24


@pytest.mark.parametrize("data", ["text", None, b"", b"\xff" * 40])
def test_what_is_no_snapshot_is_refused(pool, data):
    with pytest.raises(SnapshotError):
        pool.restore(data)


def test_inner_pool_must_be_fresh_and_a_stream_named():
    inner = BuddyAllocator(24)
    inner.allocate([1])
    with pytest.raises(InvalidSizeError, match="expected a pool with nothing handed out, got 23 of 24 free"):
        EpochPool(inner)
    with pytest.raises(InvalidSizeError, match="expected at least one"):
        EpochPool(BuddyAllocator(24), streams=())
