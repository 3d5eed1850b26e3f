"""Caches whose pool is "on a device" in host memory: the host's share of it under every call, broken off or not."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from kvtoolkit import CacheConfig, CacheSnapshotError, DevicePool, KVCache
from kvtoolkit.cuda.pool_share import PoolWithShare
from tests.kvtoolkit.cache import broken_calls, host_device
from tests.kvtoolkit.cache.test_cache_machine import (
    GROUPED_CONFIGS,
    TIERS,
    CacheMachine,
    GroupMachine,
    TierMachine,
    tiered_fields,
)
from tests.kvtoolkit.cache.test_device_steps_machine import DeviceMachine
from tests.kvtoolkit.cache.test_failing_parts import Trap, fail_everywhere, trapped
from tests.kvtoolkit.cache.test_interruptions import Interrupted, break_everywhere
from tests.kvtoolkit.cuda.host_kernels import needs_compiler
from tests.kvtoolkit.cuda.host_pool import Words, use_host

SHARE = {"allocator": "lockfree", "allocator_options": {"device": 0}}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    return use_host(monkeypatch)


def make(**fields):
    return KVCache(
        CacheConfig(**{"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_tokens": 1024, **SHARE, **fields})
    )


def words_of(cache):
    return Words(cache.allocator.memory.ctypes.data)


class KernelsBeside:
    """Kernels of a caller take and free granules of the pool between the calls."""

    def start(self, data):
        super().start(data)
        self.of_kernels: list[int] = []

    @rule(count=st.integers(1, 12))
    def kernel_takes(self, count):
        found = [words_of(self.cache).take(1) for _ in range(count)]
        self.of_kernels += [start for start in found if start >= 0]

    @rule(count=st.integers(1, 12))
    def kernel_frees(self, count):
        gone, self.of_kernels = self.of_kernels[:count], self.of_kernels[count:]
        assert all(words_of(self.cache).give_back(start, 1) for start in gone)

    @rule()
    def return_share(self):
        self.cache.allocator.return_share()

    def teardown(self):
        if hasattr(self, "of_kernels"):
            self.kernel_frees(len(self.of_kernels))
        super().teardown()

    @invariant()
    def accounted(self):
        if hasattr(self, "of_kernels"):
            assert self.cache.stats().callers == 8 * len(self.of_kernels)


MACHINES = {
    "append": (CacheMachine, {"growth": "append"}),
    "adaptive": (CacheMachine, {"growth": "adaptive"}),
    "merge": (CacheMachine, {"growth": "lazy_merge"}),
    "tiers": (TierMachine, tiered_fields({"tiers": TIERS})),
    "groups": (GroupMachine, {**GROUPED_CONFIGS[0]}),
}


@pytest.mark.parametrize("name", MACHINES)
def test_every_read_returns_what_the_sequence_was_given(name):
    base, config = MACHINES[name]
    beside = () if name == "groups" else (KernelsBeside,)
    machine = type("Machine", (*beside, base), {"config": {**config, **SHARE}})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


BROKEN = {
    "append": {**SHARE, "growth": "append"},
    "adaptive": {**SHARE, "growth": "adaptive"},
    "tiers": {**broken_calls.CONFIGS["tiers"], **SHARE},
    "groups": {**broken_calls.CONFIGS["groups"], **SHARE},
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_exception_at_any_line_of_any_call_leaves_a_whole_cache(name):
    counts = break_everywhere(BROKEN[name], every=29, first=1 + 7 * list(BROKEN).index(name))
    assert sum(counts.values()) > 60


class BreakingShare(PoolWithShare):
    def take(self, sizes):
        return trapped(super().take, "allocate")(sizes)

    def give_back(self, starts, sizes):
        trapped(super().give_back, "free")(starts, sizes)


@pytest.mark.parametrize(("when", "error"), [("before", MemoryError), ("after", RuntimeError), ("after", Interrupted)])
@pytest.mark.parametrize("name", ["adaptive", "tiers"])
def test_a_pool_that_fails_anywhere_in_any_call_leaves_a_whole_cache(name, when, error):
    config = {**BROKEN[name], "allocator": f"{__name__}:BreakingShare"}
    counts = fail_everywhere(config, ("allocate", "free"), when, error, every=2)
    assert counts["allocate"] > 5
    assert counts["free"] > 2


@pytest.mark.parametrize("name", ["append", "tiers"])
def test_a_kernel_that_cannot_be_launched_leaves_a_whole_cache(name, device):
    device.before_launch = lambda kernel: Trap.passed("launch", "before")
    assert fail_everywhere(BROKEN[name], ("launch",), "before", MemoryError)["launch"] > 5
    Trap.arm("", 0, "before", MemoryError)


def steps(cache, seq_ids, count):
    """Steps of one token for each sequence."""
    for _ in range(count):
        with cache.begin_step(seq_ids, 1) as step:
            cache.end_step(step)


def test_steps_of_a_full_pool_go_on_without_kernels(device):
    cache = make(growth="append", num_tokens=4096)
    for first in range(32):  # cached prefixes fill the pool
        ids, _ = cache.open([[]])
        with cache.begin_step(ids, 128) as step:
            cache.end_step(step, [1000 * first + i for i in range(128)])
        cache.close(ids)
    ids, _ = cache.open([[]] * 4)
    steps(cache, ids, 16)
    assert cache.stats().free <= 64
    num_evicted = cache.stats().num_evicted
    del device.launches[:]
    steps(cache, ids, 64)
    assert cache.stats().num_evicted >= num_evicted + 32
    assert len(device.launches) <= 2


def test_nothing_is_evicted_for_what_kernels_have_freed():
    cache = make(growth="append", num_tokens=4096)
    ids, _ = cache.open([[]])
    with cache.begin_step(ids, 512) as step:
        cache.end_step(step, range(512))
    cache.close(ids)
    words = words_of(cache)
    taken = [words.take(1) for _ in range(360)]
    num_free = cache.allocator.num_free  # what the host knows
    assert all(words.give_back(start, 1) for start in taken)
    ids, _ = cache.open([[]])
    with cache.begin_step(ids, 8 * (num_free + 40)) as step:  # what is cached would make up for the rest
        assert step.ok.all()
        cache.end_step(step)
    assert cache.stats().num_evicted == 0


def drive(cache, seed):
    """Open, extend and close at random, and return what became of it; single granules alone, so none is in the way."""
    rng, ids = np.random.default_rng(seed), []
    for _ in range(120):
        if len(ids) < 12:
            prompt = [int(rng.integers(3))] * int(rng.integers(1, 80))
            new, _ = cache.open([prompt])
            ids += new.tolist()
        with cache.begin_step(ids, counts := rng.integers(1, 30, len(ids))) as step:
            cache.end_step(step, rng.integers(0, 3, counts.sum()))
        stalled = [seq for seq, ok in zip(ids, step.ok, strict=True) if not ok]
        cache.close(stalled)
        ids = [seq for seq in ids if seq not in stalled]
        cache.check_integrity()
    stats = cache.stats()
    return stats.num_evicted, stats.num_stalls, stats.free, stats.cached, stats.used


@pytest.mark.parametrize("seed", range(3))
def test_as_much_is_evicted_and_as_many_rows_stall_as_with_a_pool_on_the_host(seed):
    shared, plain = make(growth="fixed8"), make(growth="fixed8", allocator="buddy", allocator_options={})
    found = drive(shared, seed)
    assert found[0] > 100
    assert found[1] > 10
    assert found == drive(plain, seed)


def test_a_snapshot_counts_the_share_as_free_and_goes_on_with_the_blocks_of_kernels():
    cache = make()
    ids, _ = cache.open([[]] * 3)
    steps(cache, ids, 20)
    assert cache.allocator.share.num_free > 0
    held = [words_of(cache).take(1) for _ in range(3)]
    again = KVCache.from_snapshot(cache.config, cache.snapshot())
    assert again.stats().free == cache.stats().free
    assert again.stats().callers == 24
    again.check_integrity()
    again.allocator.free(held, [1, 1, 1])
    again.close(ids)
    assert again.allocator.num_free * 8 + again.stats().kept_back == again.stats().capacity
    again.check_integrity()


def test_snapshots_of_other_allocators_go_on_with_a_share():
    buddy = make(allocator="buddy", allocator_options={})
    ids, _ = buddy.open([[]] * 3)
    steps(buddy, ids, 20)
    cache = KVCache.from_snapshot(make().config, buddy.snapshot())
    steps(cache, ids, 30)
    cache.check_integrity()
    with pytest.raises(CacheSnapshotError):
        KVCache.from_snapshot(cache.config, cache.snapshot()[:-1])


def test_pools_of_slabs_have_no_share():
    cache = make(allocator_options={"device": 0, "layout": "slab"}, growth="fixed8")
    assert type(cache.allocator) is DevicePool


@pytest.fixture(scope="module")
def steps_on_host():
    with pytest.MonkeyPatch.context() as patch:
        host_device.use_host(patch)
        yield


@needs_compiler
def test_the_supply_of_steps_on_the_device_comes_out_of_the_share(steps_on_host):
    machine = type("Machine", (DeviceMachine,), {"config": {"growth": "adaptive", **SHARE}})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
