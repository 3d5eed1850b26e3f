"""Every message says what was expected and what came, and every error is of the kind a caller would catch."""

import numpy as np
import pytest

from allocators import (
    AllocatorError,
    BuddyAllocator,
    InvalidFreeError,
    InvalidSizeError,
    LockFreeAllocator,
    OutOfBlocksError,
    PagedAllocator,
    SlabAllocator,
    SnapshotError,
)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1, 3], r"sizes\[1\]: expected one of 1, 2, 4, 8 or a multiple of 8 granules, got 3"),
        ([1.0], "sizes: expected integers, got float64"),
        ([True], "sizes: expected integers, got bool"),
        ([[1]], r"sizes: expected a one-dimensional array of integers, got shape \(1, 1\)"),
        ([[1], [1, 2]], r"sizes: expected a one-dimensional array of integers, got \[\[1\], \[1, 2\]\]"),
        (1, r"sizes: expected a one-dimensional array of integers, got shape \(\)"),
        ([1 << 40], "sizes: expected granules within a pool of at most 16777216, got 1099511627776"),
    ],
)
def test_wrong_sizes(sizes, message):
    with pytest.raises(InvalidSizeError, match=message):
        BuddyAllocator(24).allocate(sizes)


def test_sizes_on_offer_are_named_for_each_kind():
    with pytest.raises(InvalidSizeError, match="expected one of 2 granules, got 1"):
        PagedAllocator(24).allocate([1])
    with pytest.raises(InvalidSizeError, match="expected one of 1, 2, 4, 8 granules, got 16"):
        SlabAllocator(64).allocate([16])


def test_out_of_blocks_says_what_there_is():
    pool = BuddyAllocator(24)
    pool.allocate([8, 8, 4])
    with pytest.raises(MemoryError, match="asked for 1 x 1, 2 x 4 granules, 4 of 24 granules free, largest run 4"):
        pool.allocate([4, 1, 4])


@pytest.mark.parametrize(
    ("starts", "sizes", "error", "message"),
    [
        (
            [0, 6],
            [1, 2],
            InvalidFreeError,
            r"run 1 \(granules 6 to 7\): granule 6 is free already, or was never handed",
        ),
        ([23], [2], InvalidFreeError, r"run 0 \(granules 23 to 24\): expected granules of a pool of 24"),
        ([-1], [1], InvalidFreeError, r"run 0 \(granules -1 to -1\): expected granules of a pool of 24"),
        ([0], [0], InvalidFreeError, "run 0: expected a size of at least 1 granule, got 0"),
        ([0, 3], [4, 1], InvalidFreeError, r"run 1 \(granules 3 to 3\) overlaps another run of the same call"),
        ([0, 1], [1], InvalidSizeError, "starts and sizes: expected equal lengths, got 2 and 1"),
        ([0.5], [1], InvalidSizeError, "starts: expected integers, got float64"),
    ],
)
@pytest.mark.parametrize("make", [BuddyAllocator, SlabAllocator, LockFreeAllocator], ids=lambda cls: cls.kind)
def test_wrong_frees(make, starts, sizes, error, message):
    pool = make(24)
    pool.allocate([4])
    with pytest.raises(error, match=message):
        pool.free(starts, sizes)


@pytest.mark.parametrize("num_granules", [0, -8, 12, (1 << 24) + 8])
def test_pool_sizes(num_granules):
    with pytest.raises(InvalidSizeError, match=rf"num_granules: expected a multiple of 8 .*, got {num_granules}"):
        BuddyAllocator(num_granules)


@pytest.mark.parametrize("num_granules", [8.0, True, "8"])
def test_pool_size_types(num_granules):
    with pytest.raises(InvalidSizeError, match=rf"num_granules: expected an int, got {num_granules!r}"):
        BuddyAllocator(num_granules)


@pytest.mark.parametrize("block_sizes", [(), (8, 8), (12,), (8.0,), 8, "8", [[8], [8, 16]]])
def test_block_sizes(block_sizes):
    with pytest.raises(InvalidSizeError, match="block_sizes: expected "):
        BuddyAllocator(24, block_sizes=block_sizes)


def test_paged_takes_one_block_size():
    with pytest.raises(InvalidSizeError, match=r"expected one size for a paged pool, got \(8, 16\)"):
        PagedAllocator(24, block_sizes=(8, 16))


def test_snapshots():
    pool = BuddyAllocator(24)
    data = pool.snapshot()
    with pytest.raises(SnapshotError, match="expected bytes, got str"):
        pool.restore("text")
    with pytest.raises(SnapshotError, match="damaged or truncated"):
        pool.restore(data[:-1])
    with pytest.raises(SnapshotError, match=r"'kind': 'buddy'.*got one of.*'kind': 'slab'"):
        pool.restore(SlabAllocator(24).snapshot())
    with pytest.raises(SnapshotError, match=r"'num_granules': 24.*'num_granules': 32"):
        pool.restore(BuddyAllocator(32).snapshot())
    with pytest.raises(SnapshotError, match="layout"):
        LockFreeAllocator(24).restore(LockFreeAllocator(24, layout="slab").snapshot())


def test_errors_are_also_builtin_ones():
    pool = BuddyAllocator(8)
    for action, builtin in [
        (lambda: pool.allocate(np.full(9, 1)), MemoryError),
        (lambda: pool.allocate([3]), ValueError),
        (lambda: pool.free([0], [1]), ValueError),
        (lambda: pool.restore(b""), ValueError),
    ]:
        with pytest.raises(AllocatorError) as caught:
            action()
        assert isinstance(caught.value, builtin)
    assert issubclass(OutOfBlocksError, MemoryError)
