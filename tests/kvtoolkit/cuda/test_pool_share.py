"""The host's share of a pool on a device: what a cache gets, what is left for kernels, and calls that break off."""

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from allocators import ContendedError, IntegrityError, InvalidFreeError, OutOfBlocksError, SnapshotError, create
from allocators.testing import run_conformance
from kvtoolkit import BusyError, DevicePool
from kvtoolkit.cuda import pool as pool_module
from kvtoolkit.cuda.pool_share import PoolWithShare
from tests.kvtoolkit.cache.test_interruptions import Interrupted, LineBreaker
from tests.kvtoolkit.cuda.host_pool import Words, use_host

FREE, CACHE, CALLER, KERNEL = range(4)
SIZES = st.lists(st.sampled_from([1, 1, 2, 4, 8]), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    return use_host(monkeypatch)


def words_of(pool):
    return Words(pool.memory.ctypes.data)


def ones(count):
    return np.ones(count, np.int32)


def has_run(free, size):
    return bool(free.reshape(-1, size).all(axis=1).any())


class ShareMachine(RuleBasedStateMachine):
    """No granule has two owners, none is lost, and nobody is refused what is free."""

    device: ClassVar = None

    @initialize(num_superblocks=st.sampled_from([2, 9, 40, 150]))
    def make(self, num_superblocks):
        self.device.before_launch = lambda name: None
        self.pool = PoolWithShare(8 * num_superblocks)
        self.owners = np.zeros(8 * num_superblocks, int)
        self.saved = self.pool.snapshot(), self.pool.taken()
        self.is_unseen = False  # whether kernels have acted since the host looked

    @property
    def free(self):
        return self.owners == FREE

    def claim(self, starts, sizes, owner):
        """Note what was granted, up to the first -1; returns the size that was refused, or 0."""
        for start, size in zip(starts.tolist(), sizes, strict=True):
            if start < 0:
                assert (starts[list(starts).index(-1) :] == -1).all()
                return size
            assert start % size == 0
            assert self.free[start : start + size].all()
            self.owners[start : start + size] = owner
        return 0

    def some(self, data, owner):
        """Some granules of an owner, as runs of one."""
        mine = np.flatnonzero(self.owners == owner).astype(np.int32)
        kept = data.draw(st.integers(1, len(mine)))
        first = data.draw(st.integers(0, len(mine) - kept))
        return mine[first : first + kept]

    def kernel(self, data, name=""):
        """A kernel takes some blocks, or gives back some of its own."""
        self.is_unseen = True
        words = words_of(self.pool)
        if data.draw(st.booleans()) and (self.owners == KERNEL).any():
            for granule in self.some(data, KERNEL):
                assert words.give_back(int(granule), 1)
                self.owners[granule] = FREE
            return
        for size in data.draw(SIZES):
            if (start := words.take(size)) >= 0:
                self.claim(np.array([start]), [size], KERNEL)

    @rule(data=st.data())
    def kernels_run(self, data):
        self.kernel(data)

    @rule(data=st.data(), sizes=SIZES, times=st.sampled_from([1, 1, 8]), is_raced=st.booleans())
    def take(self, data, sizes, times, is_raced):
        if is_raced:
            self.device.before_launch = lambda name: self.kernel(data, name)
        before = self.pool.share.num_free
        starts = self.pool.take(np.array(sizes * times, np.int32))
        self.device.before_launch = lambda name: None
        refused = self.claim(starts, sizes * times, CACHE)
        assert not refused or not has_run(self.free, refused)
        assert self.pool.share.num_free <= max(before, len(self.owners) // 8 + 7)

    @precondition(lambda self: (self.owners == CACHE).any())
    @rule(data=st.data(), stream=st.sampled_from([0, 0, 7]))
    def give_back(self, data, stream):
        self.device.stream = stream
        mine = self.some(data, CACHE)
        self.pool.give_back(mine, ones(len(mine)))
        self.owners[mine] = FREE
        assert self.pool.share.num_free <= len(self.owners) // 8

    @rule(sizes=SIZES, partial=st.booleans(), times=st.sampled_from([1, 8]))
    def allocate(self, sizes, partial, times):
        sizes = sizes * times if partial else sizes[:1]
        try:
            starts = self.pool.allocate(sizes, partial=partial)
        except OutOfBlocksError:
            assert not partial
            assert not has_run(self.free, sizes[0])
            return
        refused = self.claim(starts, sizes, CALLER)
        assert not refused or not has_run(self.free, refused)

    @precondition(lambda self: (self.owners == CALLER).any())
    @rule(data=st.data())
    def free_some(self, data):
        mine = self.some(data, CALLER)
        self.pool.free(mine, ones(len(mine)))
        self.owners[mine] = FREE

    @rule(data=st.data(), owner=st.sampled_from([FREE, CACHE]))
    def free_what_is_not_a_callers(self, data, owner):
        if (self.owners == owner).any():
            with pytest.raises(InvalidFreeError, match="is free already, or was never handed out"):
                self.pool.free(self.some(data, owner)[:1], [1])

    @rule()
    def return_share(self):
        self.pool.return_share()
        assert np.array_equal(Words.bits(words_of(self.pool).free)[: len(self.owners)], self.free)

    @rule()
    def look(self):
        """Look at the figures, so that the host knows what kernels did."""
        assert self.pool.num_free == self.pool.num_known_free == self.free.sum()
        sizes = [size for size in (8, 4, 2, 1) if has_run(self.free, size)]
        assert self.pool.largest_free == max(sizes, default=0)

    @rule()
    def save(self):
        self.saved = self.pool.snapshot(), self.pool.taken()

    @rule()
    def restore(self):
        data, taken = self.saved
        self.pool.restore(data)
        assert self.pool.snapshot() == data
        self.owners[~taken] = FREE
        self.owners[taken & self.free] = CALLER

    @rule(data=st.data(), sizes=SIZES, line=st.integers(1, 60), what=st.sampled_from(["take", "return", "allocate"]))
    def break_off(self, data, sizes, line, what):
        """Whatever was done: nothing has two owners, and the cache gets back what nobody has."""
        call = {
            "take": lambda: self.pool.take(np.array(sizes * 4, np.int32)),
            "return": self.pool.return_share,
            "allocate": lambda: self.pool.allocate(sizes),
        }[what]
        starts = None
        try:
            with LineBreaker(line) as breaker:
                starts = call()
        except (Interrupted, OutOfBlocksError):
            pass
        if data.draw(st.booleans()):  # as before the next call of the cache
            self.pool.forget_receipt()
        if what == "take":
            if breaker.fired or data.draw(st.booleans()):  # the cache forgets what it got
                self.pool.settle(self.owners == CACHE)
            else:
                self.claim(starts, sizes * 4, CACHE)
        elif what == "allocate":
            # nobody knows what a call has got that did not return, as when a pool has no share
            self.owners[self.pool.taken() & self.free] = CALLER

    @precondition(lambda self: (self.owners == CACHE).any())
    @rule(data=st.data(), line=st.integers(1, 60))
    def break_off_a_free(self, data, line):
        mine = self.some(data, CACHE)
        try:
            with LineBreaker(line):
                self.pool.give_back(mine, ones(len(mine)))
        except Interrupted:
            pass
        self.owners[mine] = FREE
        self.pool.settle(self.owners == CACHE)

    @invariant()
    def whole(self):
        if not hasattr(self, "pool"):
            return
        known = self.pool._num_in_pool  # looking must not tell the pool what kernels did
        self.is_unseen = self.is_unseen and known is not None
        assert known is None or self.is_unseen or known + self.pool.share.num_free == self.free.sum()
        assert np.array_equal(self.pool.taken(), ~self.free)
        held, free = self.pool.held, self.pool.share.free_flags
        assert np.array_equal(held & ~free, self.owners == CACHE)
        self.pool.check_integrity()
        self.pool._num_in_pool = known


def test_no_granule_has_two_owners_none_is_lost_and_nobody_is_refused_what_is_free(device):
    machine = type("Machine", (ShareMachine,), {"device": device})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_callers_find_an_allocator_like_any_other():
    run_conformance(lambda: create("lockfree", 128, device=0), max_examples=12, num_steps=25)


def test_steps_that_take_few_blocks_seldom_wait_for_the_device(device):
    pool = PoolWithShare(16384)
    for _ in range(100):
        assert (pool.take(ones(64)) >= 0).all()
    assert device.launches == ["kvt_pool_allocate"] * 4  # 64 and an eighth of the pool each time
    taken = pool.take(ones(600))
    del device.launches[:]
    pool.give_back(taken, ones(600))
    assert not device.launches


def test_kernels_are_left_most_of_the_pool(device):
    pool = PoolWithShare(4096)
    pool.take(ones(200))
    in_pool = int(Words.bits(words_of(pool).free).sum())
    assert in_pool >= 4096 * 7 // 8 - 200
    blocks = pool.take(ones(1500))
    pool.give_back(blocks, ones(1500))  # far too many for a share
    assert int(Words.bits(words_of(pool).free).sum()) >= 4096 * 7 // 8 - 200
    # the share is no larger than is of use where the cache asks for little
    pool = PoolWithShare(1 << 16)
    pool.take(ones(2))
    assert pool.share.num_free <= 128 * 2 + 8


def test_fragments_that_are_of_no_use_do_not_let_the_share_grow():
    pool = PoolWithShare(1024)
    blocks = np.sort(pool.take(ones(260)))
    pool.return_share()
    pool.give_back(blocks[::2][:125], ones(125))
    assert pool.take(np.array([8] * 4, np.int32)).min() >= 0
    assert pool.share.num_free <= 1024 // 8 + 7


def test_a_run_is_found_of_which_the_share_has_one_part_and_the_pool_the_other():
    pool = PoolWithShare(64)
    half = pool.allocate([4])
    rest = pool.take(np.array([4, *[8] * 7], np.int32))
    pool.give_back(rest[:1], np.array([4], np.int32))
    pool.free(half, [4])
    assert pool.share.num_free == 4
    assert pool.take(np.array([8], np.int32)).tolist() == [0]


@pytest.mark.parametrize("is_partial", [False, True])
def test_a_caller_gets_what_the_share_has_if_nothing_else_is_left(is_partial):
    pool = PoolWithShare(128)
    blocks = pool.take(np.full(16, 8, np.int32))
    pool.give_back(blocks[:2], np.array([8, 8], np.int32))
    assert (pool.num_free, pool.largest_free, pool.share.num_free) == (16, 8, 16)
    assert sorted(pool.allocate([8, 8], partial=is_partial)) == sorted(blocks[:2])


def test_what_is_freed_reaches_kernels_only_after_what_other_streams_still_do(device):
    pool = PoolWithShare(256)
    blocks = pool.take(ones(20))
    pool.return_share()
    pool.give_back(blocks[:10], ones(10))
    pool.return_share()
    assert device.num_waits == 0  # the pool's kernel comes after those of its own stream
    pool.give_back(blocks[10:], ones(10))
    device.stream = 5
    pool.return_share()
    assert device.num_waits == 1


def test_the_same_calls_give_the_same_blocks():
    rng = np.random.default_rng(0)
    pools, held = [PoolWithShare(1024), PoolWithShare(1024)], []
    for _ in range(300):
        sizes = rng.choice([1, 2, 4, 8], rng.integers(1, 20)).astype(np.int32)
        one, other = (pool.take(sizes) for pool in pools)
        assert np.array_equal(one, other)
        held += [(start, size) for start, size in zip(one, sizes, strict=True) if start >= 0]
        rng.shuffle(held)
        gone, held = held[: len(held) // 3], held[len(held) // 3 :]
        for pool in pools:
            for start, size in gone:
                pool.give_back(np.array([start]), np.array([size], np.int32))


def test_a_fragmented_pool_still_gives_blocks_ahead(device):
    pool = PoolWithShare(4096)
    everything = pool.allocate(np.full(512, 8))
    pool.free(everything, np.full(512, 4))  # no run of 8 is left
    for _ in range(20):
        assert (pool.take(ones(16)) >= 0).all()
    assert device.launches[2:].count("kvt_pool_allocate") <= 6
    assert (pool.take(np.array([4], np.int32)) >= 0).all()


def test_blocks_that_kernels_freed_are_found_although_the_host_has_not_looked():
    pool = PoolWithShare(64)
    words = words_of(pool)
    assert all(words.take(8) >= 0 for _ in range(8))
    assert pool.num_known_free == 0
    words.give_back(8, 8)
    assert pool.num_known_free == 0
    assert pool.take(np.array([8], np.int32)).tolist() == [8]


def test_once_kernels_have_freed_much_the_share_is_filled_again(device):
    pool = PoolWithShare(1024)
    words = words_of(pool)
    assert all(words.take(8) >= 0 for _ in range(120))
    assert (pool.take(ones(60)) >= 0).all()
    assert all(words.give_back(8 * i, 8) for i in range(120))
    del device.launches[:]
    for _ in range(20):
        assert (pool.take(ones(4)) >= 0).all()
    assert len(device.launches) <= 4


def test_a_pool_that_stays_contended_says_so_and_is_whole(device, monkeypatch):
    pool = PoolWithShare(1024)
    pool.take(ones(4))
    pool.return_share()
    monkeypatch.setattr(pool_module, "_MAX_ATTEMPTS", 2)
    run = DevicePool._run

    def contended(self, name, *arguments):
        found, result = run(self, name, *arguments)
        return found, (np.array([result[0], -4]) if name == "kvt_pool_allocate" else result)

    monkeypatch.setattr(DevicePool, "_run", contended)
    with pytest.raises(ContendedError):
        pool.take(ones(3))
    monkeypatch.undo()
    use_host(monkeypatch)
    assert pool.num_free == 1020
    pool.check_integrity()


def test_a_call_out_of_a_signal_handler_does_not_disturb_the_one_under_way(device):
    pool = PoolWithShare(1024)
    seen = []

    def handler(name):
        seen.append(pool.num_free)
        with pytest.raises(BusyError, match="expected no other call of this thread"):
            pool.allocate([1])

    device.before_launch = handler
    blocks = pool.take(ones(8))
    device.before_launch = lambda name: None
    assert seen == [1024]
    assert pool.num_free == 1016
    pool.give_back(blocks, ones(8))
    pool.check_integrity()


@pytest.mark.parametrize("after", ["complete", "forget_receipt", "allocate", "free", "take", "num_free"])
def test_a_move_that_broke_off_after_its_kernel_is_noted_by_the_next_call(after, monkeypatch):
    pool = PoolWithShare(1024)
    (caller,) = pool.allocate([1])
    pool.take(ones(8))
    monkeypatch.setattr(pool, "_note_moved", _interrupt)
    with pytest.raises(Interrupted):
        pool.return_share()
    monkeypatch.undo()
    use_host(monkeypatch)
    what = {
        "complete": lambda: pool.complete(0),
        "allocate": lambda: pool.allocate([8]),
        "free": lambda: pool.free([caller], [1]),
        "take": lambda: pool.take(ones(8)),
    }
    what.get(after, lambda: getattr(pool, after)() if after != "num_free" else pool.num_free)()
    pool.check_integrity()
    assert pool.share.num_free == 0 or after == "take"


def _interrupt(*_, **__):
    raise Interrupted


def test_a_damaged_snapshot_changes_nothing_and_a_share_without_its_granules_is_noticed():
    pool = PoolWithShare(1024)
    pool.take(ones(8))
    saved = pool.snapshot()
    with pytest.raises(SnapshotError):
        pool.restore(saved[:-1])
    assert pool.snapshot() == saved
    pool.take(ones(8))
    pool.held[int(np.flatnonzero(pool.share.free_flags)[0])] = False
    with pytest.raises(IntegrityError, match="the share has a granule that is not held"):
        pool.check_integrity()
    pool.held[1000] = True
    pool.share.set_free(np.zeros(1024, bool))
    with pytest.raises(IntegrityError, match="that the host holds is free in the pool"):
        pool.check_integrity()
