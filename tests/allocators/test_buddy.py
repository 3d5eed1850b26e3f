"""What the buddy allocator promises beyond the protocol: long runs, and the fullest superblock first."""

import numpy as np
import pytest

from allocators import BuddyAllocator, OutOfBlocksError


def test_one_long_run_is_granted():
    pool = BuddyAllocator(64)
    assert pool.allocate([24]).tolist() == [0]
    assert pool.allocate([16]).tolist() == [24]
    assert pool.largest_free == 24


def test_long_run_takes_consecutive_superblocks_at_the_lowest_address():
    pool = BuddyAllocator(64)
    starts = pool.allocate([8] * 8)
    pool.free(starts[[0, 2, 3, 5, 6, 7]], [8] * 6)
    assert pool.largest_free == 24
    assert pool.allocate([16]).tolist() == [16]
    assert pool.allocate([24]).tolist() == [40]
    with pytest.raises(OutOfBlocksError):
        pool.allocate([16])


def test_long_runs_of_a_batch_are_granted_before_what_would_break_them_up():
    pool = BuddyAllocator(24)
    starts = pool.allocate([1, 16, 4])
    assert starts[1] == 0
    assert sorted(starts[[0, 2]] // 8) == [2, 2]


def test_batch_that_fits_only_largest_first_is_granted_and_refused_in_order():
    pool = BuddyAllocator(8)
    assert sorted(pool.allocate([1, 1, 2, 4]).tolist()) == [0, 4, 6, 7]
    pool.free([0], [8])
    assert pool.allocate([1, 8], partial=True).tolist() == [pool.num_granules - 8, -1]


def test_blocks_come_from_the_fullest_superblock_that_has_one():
    pool = BuddyAllocator(24)
    starts = pool.allocate([8, 8, 8])
    pool.free(starts[:2], [8, 8])
    pool.free([starts[2]], [4])
    assert pool.allocate([2])[0] // 8 == starts[2] // 8
    assert pool.largest_free == 16
    assert pool.allocate([4])[0] // 8 != starts[2] // 8


def test_freed_parts_of_any_shape_coalesce():
    pool = BuddyAllocator(64)
    pool.allocate([64])
    for granule in np.random.default_rng(3).permutation(64):
        pool.free([granule], [1])
    assert pool.largest_free == 64


def test_long_runs_need_64_token_blocks():
    pool = BuddyAllocator(64, block_sizes=(8, 32))
    assert pool.largest_free == 4
    with pytest.raises(ValueError, match="expected one of 1, 4 granules, got 16"):
        pool.allocate([16])
