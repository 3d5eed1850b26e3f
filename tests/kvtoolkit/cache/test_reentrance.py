"""Calls from inside calls, forks in the middle of calls, and handles that nobody refers to any more."""

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from allocators import BusyError as AllocatorBusyError
from allocators import EpochPool, create
from kvtoolkit import BusyError
from kvtoolkit.cache.state.repair import Repairs
from kvtoolkit.integrations.padded import PaddedBatch
from tests.kvtoolkit.cache.broken_calls import CALLS, make, make_world, put

LETS_GO = ("close", "abort_step", "abort")


class Nested:
    """An eviction policy that makes a call of the cache it is asked by."""

    action = None

    def score(self, granules):
        if Nested.action is not None:
            action, Nested.action = Nested.action, None
            action()
        return granules.last_used.astype(np.float64)


@pytest.fixture
def world():
    world = make_world(eviction=f"{__name__}:Nested", growth="append")
    yield world
    Nested.action = None


def evict(world):
    """A call in whose middle the policy is asked."""
    return put(world.cache, world.open[:1], [[1] * more_than_free(world)])


def more_than_free(world):
    """Tokens for which something cached must be evicted."""
    return world.cache.stats().free + 40


@pytest.mark.parametrize("name", [name for name in CALLS if name not in LETS_GO])
def test_a_call_inside_another_is_refused_and_harms_neither(world, name):
    refused = []

    def call():
        with pytest.raises(BusyError, match="expected no other call of this thread under way, got one from inside"):
            CALLS[name](world)
        refused.append(name)

    Nested.action = call
    assert evict(world).all()
    assert refused == [name]
    world.cache.check_integrity()


@pytest.mark.parametrize("name", LETS_GO)
def test_what_only_lets_go_inside_another_call_is_done_at_its_end(world, name):
    open_before = world.cache.stats().num_seqs
    world.open = [world.open[2], *world.open[:2]]
    seq = world.open[1]
    Nested.action = lambda: CALLS[name](world)
    assert put(world.cache, [seq], [[1] * more_than_free(world)]).all()
    world.cache.check_integrity()
    gone = {"close": 1, "abort_step": 0, "abort": 1}[name]  # of close one was preempted
    assert world.cache.stats().num_seqs == open_before - gone
    assert name != "abort_step" or not world.step._is_open


def test_signal_handlers_may_close_sequences():
    cache, victims, rounds = make(num_tokens=4096, growth="append", max_seqs=128), [], 0

    def close_one(*_):
        if victims:
            cache.close([victims.pop()])

    before = signal.signal(signal.SIGALRM, close_one)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
        while rounds < 150:
            ids = cache.open([[]] * 4)[0]
            put(cache, ids, [[rounds] * 20] * 4)
            cache.close(ids[2:])
            victims += ids[:2].tolist()
            rounds += 1
            while len(victims) > 50:
                time.sleep(1e-4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    cache.check_integrity()
    assert cache.stats().num_seqs == len(victims)


def test_finalizers_may_free_blocks_of_allocators_and_abort_leases():
    pool = EpochPool(create("buddy", 64))
    lease, freed = pool.lease([8]), []

    class Handle:
        def __del__(self):
            freed.append(1)
            lease.abort()

    class Inner(type(pool.inner)):
        def allocate(self, sizes, *, partial=False):
            handles.clear()
            with pytest.raises(AllocatorBusyError):
                pool.free([0], [1])
            return super().allocate(sizes, partial=partial)

    handles = [Handle()]
    pool.inner.__class__ = Inner
    pool.allocate([1])
    assert freed == [1]
    assert pool.num_leased == 0
    pool.check_integrity()


@pytest.mark.parametrize("make_handle", ["step", "lease", "pool lease"])
def test_a_handle_that_nobody_refers_to_ends(make_handle):
    cache = make(max_seqs=4)
    ids = cache.open([[1] * 20])[0]
    put(cache, ids, [[1] * 20])
    pool = EpochPool(create("slab", 192))
    if make_handle == "step":
        handle = cache.begin_step(ids, 20)
    elif make_handle == "lease":
        handle = cache.pin(ids)
    else:
        handle = pool.lease([2, 4])
    reference = weakref.ref(handle)
    del handle
    assert reference() is None  # at once: there is no cycle
    assert cache.stats().num_seqs == 1
    cache.close(ids)
    assert cache.stats().num_seqs == 0
    cache.check_integrity()
    pool.allocate([1])
    assert (pool.num_leased, pool.num_free) == (0, 191)


def test_a_padded_batch_that_nobody_refers_to_closes_its_rows():
    cache = make()
    batch = PaddedBatch(cache)
    batch.open([[0, 5, 6], [1, 2, 3]], [[0, 1, 1], [1, 1, 1]])
    batch.begin(2, 3)
    fork = PaddedBatch(cache)
    fork.open([[1, 2, 3]])
    assert cache.stats().num_seqs == 3
    del batch
    assert cache.stats().num_seqs == 1
    cache.check_integrity()


def test_orphans_are_listed_and_ended():
    world = make_world()
    cache, kept = world.cache, world.open[:1]
    assert sorted(cache.seq_ids()) == sorted([*world.known, *world.lease.seq_ids])
    ended = cache.end_orphans(kept)
    assert sorted([*ended, *kept]) == sorted([*world.known, *world.lease.seq_ids])
    assert cache.seq_ids().tolist() == kept
    cache.check_integrity()
    with pytest.raises(Exception, match="expected"):
        world.step.append(0, *np.zeros((2, 9, 1, 8), np.float32))


def test_a_cache_has_no_cycle_that_keeps_its_memory():
    cache = make()
    put(cache, cache.open([[]])[0], [[1] * 9])
    gc.disable()
    try:
        reference = weakref.ref(cache._state.group.storage)
        del cache
        assert reference() is None
    finally:
        gc.enable()


FORK = """
import os, sys, threading, time
import numpy as np
from kvtoolkit import CacheConfig, KVCache

cache = KVCache(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", num_tokens=4096, max_seqs=64))
stop = False

def work(rounds=1 << 30):
    kv = np.ones((40, 1, 8), np.float32)
    for _ in range(rounds):
        if stop:
            return
        ids, _ = cache.open([[1] * 30] * 2)
        with cache.begin_step(ids, 20) as step:
            step.append(0, kv, kv)
            step.attend(0, kv)
            cache.end_step(step, [1] * 40)
        cache.close(ids)

work(2)  # compiled before the first fork
cache.end_orphans([])
cache.check_integrity()
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
time.sleep(0.2)
for n in range(12):
    child = os.fork()
    if child == 0:
        cache.check_integrity()
        ids, _ = cache.open([[2] * 30])
        kv = np.ones((30, 1, 8), np.float32)
        with cache.begin_step(ids, 30) as step:
            step.append(0, kv, kv)
            out = step.attend(0, kv)
            cache.end_step(step, [2] * 30)
        cache.end_orphans([])
        cache.check_integrity()
        os._exit(0 if (out == 1).all() else 3)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    time.sleep(0.003 * n)
stop = True
for thread in threads:
    thread.join()
cache.check_integrity()
print("fine", flush=True)
"""


def test_a_child_forked_while_threads_are_in_calls_works():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=400, check=False
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


COMPILING = """
import os, threading, time
import allocators
from numba import njit
from numba.core.compiler_lock import global_compiler_lock

def compile_one(n):
    assert njit(lambda x: x + n)(1) == 1 + n

def compile_on():
    while not stop:
        compile_one(len(compiled))
        compiled.append(1)

stop, compiled, lock = False, [], global_compiler_lock._lock
compile_one(0)
thread = threading.Thread(target=compile_on, daemon=True)
thread.start()
amid = 0
for n in range(8):
    time.sleep(0.01 * n)
    if lock.acquire(blocking=False):
        lock.release()
    else:
        amid += 1
    child = os.fork()
    if child == 0:
        compile_one(100)
        os._exit(0)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        raise SystemExit("the child hangs")
    assert status == 0, status
stop = True
thread.join()
assert amid, "no fork came while something was compiled"
print("fine")
"""


def test_a_child_forked_while_a_thread_compiles_can_compile():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILING], capture_output=True, text=True, timeout=400, check=False
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


HUNG = """
import os, threading, time, warnings
import allocators._forks
from allocators import create

allocators._forks.WAIT_S = 0.3
hung, other = create("buddy", 64), create("slab", 64)
def hang():
    with hung._lock:
        started.set()
        time.sleep(600)
started = threading.Event()
threading.Thread(target=hang, daemon=True).start()
started.wait()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    child = os.fork()
    if child == 0:
        os._exit(0 if len(other.allocate([1])) == 1 else 3)
    assert os.waitpid(child, 0)[1] == 0
assert ["1 calls" in str(warning.message) for warning in caught if warning.category is RuntimeWarning] == [True]
assert len(other.allocate([1])) == 1
print("fine", flush=True)
os._exit(0)
"""


def test_a_call_that_never_ends_does_not_stop_a_fork():
    done = subprocess.run([sys.executable, "-c", HUNG], capture_output=True, text=True, timeout=400, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_repair_says_what_other_calls_have_put_in_order(monkeypatch):
    cache = make()
    seq_ids, _ = cache.open([[]])
    put(cache, seq_ids, [[1] * 9])
    pool = cache._state.group.blocks.allocator

    def grant_and_give_up(*arguments, **options):
        type(pool).allocate(pool, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "allocate", grant_and_give_up)
    with pytest.raises(KeyboardInterrupt):
        cache.begin_step(seq_ids, 200)
    monkeypatch.undo()
    assert cache.lengths(seq_ids) == [9]  # the call that puts the cache in order
    found = cache.repair()
    assert found.num_freed >= 24
    assert cache.repair() == Repairs()


def test_a_plug_in_may_use_another_cache():
    other = make()

    def use_other():
        ids = other.open([[]])[0]
        put(other, ids, [[1] * 9])
        other.close(ids)

    world = make_world(eviction=f"{__name__}:Nested", growth="append")
    Nested.action = use_other
    assert evict(world).all()
    assert Nested.action is None
    other.check_integrity()


def test_other_threads_wait_for_a_call_under_way():
    world = make_world(eviction=f"{__name__}:Nested", growth="append")
    seen = []
    other = threading.Thread(target=lambda: seen.append(world.cache.stats().num_seqs))

    def start_other():
        other.start()
        other.join(0.05)
        seen.append("inside")

    Nested.action = start_other
    evict(world)
    other.join()
    assert seen[0] == "inside"
