"""The pool for Numba kernels: its protocol in the simulator, word for word beside the header, and its races on a GPU.

The simulator must be chosen before Numba is imported, so `TestInSimulator` runs in a pytest of its own; by hand
``NUMBA_ENABLE_CUDASIM=1 pytest tests/kvtoolkit/numba/test_numba_pool.py::TestInSimulator``.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators.errors import ContendedError
from kvtoolkit import DevicePool, get_include
from tests.kvtoolkit.cuda.test_gpu_pool import free_granules

ROOT = Path(__file__).resolve().parents[3]
LAYOUTS = ("buddy", "slab")
FREE, EPOCHS = 16 + 32 * 8, 4
EXHAUSTED, FRAGMENTED, CONTENDED, INVALID = -2, -3, -4, -5


def test_the_pool_passes_in_the_simulator():
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            f"{Path(__file__).relative_to(ROOT)}::TestInSimulator",
        ],
        cwd=ROOT, env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


# -- in the simulator ------------------------------------------------------------------------------------------------


def width(layout):
    """Granules of a word."""
    return 64 if layout == "buddy" else 32


def words_of(num_granules, layout):
    return -(-num_granules // (2 * width(layout))) * 2


def make_memory(num_granules, layout):
    """What `DevicePool` writes, all granules free."""
    num_words = words_of(num_granules, layout)
    memory = np.zeros(FREE + num_words * (2 + EPOCHS) + 4 * (num_words // 32 + 1), np.uint64)
    sizes = 0 if layout == "buddy" else 4
    memory[sizes : sizes + 2] = num_granules, num_words
    bits = np.zeros(num_words * width(layout), np.bool_)
    bits[:num_granules] = True
    packed = np.packbits(bits, bitorder="little").view(np.uint64 if layout == "buddy" else np.uint32)
    memory[FREE : FREE + num_words] = packed
    if layout == "slab":
        superblocks = bits[::8].reshape(-1, 4).sum(1)
        memory[FREE : FREE + num_words] |= superblocks.astype(np.uint64) << np.uint64(34)
    return memory


class Simulated:
    """A pool on the host, each call a kernel of one thread."""

    def __init__(self, num_granules, layout):
        self.num_granules, self.layout = num_granules, layout
        self.memory = make_memory(num_granules, layout)
        self.num_words = words_of(num_granules, layout)
        self.journals = np.zeros((2, self.num_words), np.uint64)

    def __call__(self, what, first=0, second=0):
        from tests.kvtoolkit.numba import numba_pool_kernels as kernels

        answer = np.zeros(1, np.int64)
        kernels.call[1, 1](self.memory, self.journals, kernels.CALLS.index(what), first, second, answer)
        return int(answer[0])

    def take_all(self, order):
        """Blocks until there are none, and the code that says so."""
        starts = []
        while (start := self("allocate", order, len(starts))) >= 0:
            starts.append(start)
        return starts, start

    def free_words(self):
        """Leaves out the order of a slab that is wholly free, because it means nothing there."""
        words = self.memory[FREE : FREE + self.num_words].copy()
        if self.layout == "slab":
            whole = make_memory(self.num_granules, "slab")[FREE : FREE + self.num_words]
            kept = np.uint64(0xFFFFFFFF | 7 << 34)
            words[words & kept == whole] &= kept
        return words

    def is_fresh(self):
        fresh = make_memory(self.num_granules, self.layout)[FREE : FREE + self.num_words]
        return np.array_equal(self.free_words(), fresh)


class Model:
    """What each granule is: ``""`` free, ``"live"``, or ``"limbo"``; and the order of each slab."""

    def __init__(self, num_granules, layout):
        self.state = [""] * num_granules
        self.layout, self.width = layout, width(layout)
        self.orders = {}

    def serves(self, w, order):
        word = self.state[w * self.width : (w + 1) * self.width]
        return self.layout == "buddy" or not any(word) or self.orders.get(w) == order

    def runs(self, order):
        size = 1 << order
        return [
            start
            for start in range(0, len(self.state), size)
            if not any(self.state[start : start + size]) and self.serves(start // self.width, order)
        ]

    def took(self, start, order):
        assert start in self.runs(order)
        self.state[start : start + (1 << order)] = ["live"] * (1 << order)
        self.orders[start // self.width] = order

    def gave(self, start, count, state):
        """Whether all of it was live; the rest is as it was."""
        granules = range(start, start + count)
        was_live = all(self.state[granule] == "live" for granule in granules)
        for granule in granules:
            if self.state[granule] == "live":
                self.state[granule] = state
        return was_live


class Warp:
    """What the simulator lacks of ``cuda``, its lanes being threads: every call waits for all lanes of its mask."""

    def __init__(self):
        self.mine = threading.local()
        self.barriers, self.given = {}, {}

    @property
    def laneid(self):
        return self.mine.lane

    def _exchange(self, mask, value):
        mask = int(mask) & 0xFFFFFFFF
        self.given[mask, self.laneid] = value
        self.barriers[mask].wait()
        found = {lane: self.given[mask, lane] for lane in lanes_of(mask)}
        self.barriers[mask].wait()
        return found

    def shfl_sync(self, mask, value, source):
        assert isinstance(value, np.int64)
        return self._exchange(mask, value)[int(source)]

    def ballot_sync(self, mask, is_true):
        ballot = sum(bool(answer) << lane for lane, answer in self._exchange(mask, is_true).items())
        return np.uint32(ballot).astype(np.int32)

    def syncwarp(self, mask):
        self._exchange(mask, None)

    def run(self, mask, function):
        """``function(lane)`` in each lane of ``mask``; returns the answers by lane."""
        answers, faults = {}, []
        self.barriers[mask] = threading.Barrier(len(lanes_of(mask)), timeout=30)

        def target(lane):
            self.mine.lane = lane
            try:
                answers[lane] = int(function(lane))
            except Exception as fault:
                faults.append(fault)
                self.barriers[mask].abort()

        threads = [threading.Thread(target=target, args=(lane,)) for lane in lanes_of(mask)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults, faults
        return answers


def lanes_of(mask):
    return [lane for lane in range(32) if mask >> lane & 1]


SHIM = """
#include <kvt/pool.cuh>

template <typename AnyPool>
int answer(AnyPool pool, kvt::Word* journals, int what, int first, unsigned second) {
  const kvt::PoolLease<AnyPool> lease{pool, journals};
  switch (what) {
    case 0: return pool.allocate(first, second);
    case 1: return pool.free(first, static_cast<int>(second));
    case 2: return pool.retire(first, static_cast<int>(second));
    case 3: return lease.allocate(first, second);
    case 4: lease.commit(nullptr, 0, 1); return 0;
    case 5: lease.commit(journals + pool.num_words(), 0, 1); return 0;
    default: lease.abort(0, 1); return 0;
  }
}

extern "C" int call(kvt::Word* memory, kvt::Word* journals, int is_slab, int what, int first, unsigned second) {
  return is_slab ? answer(kvt::SlabPool{memory}, journals, what, first, second)
                 : answer(kvt::Pool{memory}, journals, what, first, second);
}
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """``call`` of the header, compiled for the host."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("header")
    (folder / "shim.cpp").write_text(SHIM)
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{get_include()}", "shim.cpp", "-o", "shim.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "shim.so")).call


SIZES = st.integers(1, 20).map(lambda n: 8 * n)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["allocate", "allocate", "lease_allocate"]), st.integers(0, 3), st.integers(-1, 99)),
        st.tuples(st.sampled_from(["free", "free", "retire"]), st.integers(0, 159), st.integers(1, 9)),
        st.tuples(st.sampled_from(["free block", "free block", "retire block"]), st.integers(0, 99), st.just(0)),
        st.tuples(st.sampled_from(["lease_commit", "lease_abort"]), st.just(0), st.just(0)),
    ),
    max_size=40,
)


class TestInSimulator:
    __test__ = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

    @pytest.fixture
    def warp(self, monkeypatch):
        from kvtoolkit.numba import pool_warp

        warp = Warp()
        monkeypatch.setattr(pool_warp, "cuda", warp)
        return warp

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("order", range(4))
    def test_all_of_a_pool_is_granted_and_no_more(self, layout, order):
        pool = Simulated(200, layout)
        starts, code = pool.take_all(order)
        assert sorted(starts) == list(range(0, 200, 1 << order))
        assert code == (EXHAUSTED if layout == "buddy" and order == 0 else FRAGMENTED)
        assert pool.memory[8 + order] == 1  # proved at version 0, for all who ask
        for start in starts:
            assert pool("free", start, 1 << order) == 0
        assert pool.is_fresh()
        assert pool("allocate", order) >= 0  # the proof is out of date

    def test_free_granules_may_be_no_run(self):
        pool = Simulated(64, "buddy")
        starts, _ = pool.take_all(0)
        for start in starts:
            if start % 2:
                assert pool("free", start, 1) == 0
        assert [pool("allocate", order) for order in (1, 2, 3)] == [FRAGMENTED] * 3
        assert pool("allocate", 0) % 2 == 1

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_misuse_is_told(self, layout):
        pool = Simulated(128, layout)
        start = pool("allocate", 1)
        for what in ("free", "retire"):
            runs = [(start, 0), (start, 65), (-1, 1), (127, 2), (width(layout) - 4, 8), (192, 1)]
            assert [pool(what, *run) for run in runs] == [INVALID] * 6
        assert pool("free", start, 1) == 0
        assert pool("free", start, 1) == INVALID
        assert pool("retire", start, 1) == INVALID
        assert pool("free", start, 2) == INVALID  # the other half was live, and is free now
        assert pool.is_fresh()

    def test_what_is_no_pool_is_refused_and_left_alone(self):
        pool = Simulated(64, "buddy")
        pool.memory[:] = 0
        calls = [("allocate", 0, 0), ("free", 0, 1), ("retire", 0, 1), ("lease_allocate", 3, 0)]
        assert [pool(*call) for call in calls] == [INVALID] * 4
        assert not pool.memory.any()

    def test_a_slab_serves_one_order_until_it_is_whole(self):
        pool = Simulated(32, "slab")
        pair = pool("allocate", 1)
        assert pool("allocate", 0) == FRAGMENTED
        assert pool("allocate", 2) == FRAGMENTED
        assert pool("free", pair, 1) == 0
        assert pool("allocate", 0) == FRAGMENTED  # half of the pair is live
        assert pool("free", pair + 1, 1) == 0
        assert pool("allocate", 3) >= 0
        assert pool("allocate", 1) == FRAGMENTED

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_leases_return_what_they_took_or_hand_it_over(self, layout):
        pool = Simulated(200, layout)
        kept = pool("allocate", 2, 7)
        before = pool.free_words()
        for order in (0, 3, 1, 2, 0):
            assert pool("lease_allocate", order, order) >= 0
        version = pool.memory[16:FREE:8].sum()
        assert pool("lease_abort") == 0
        assert np.array_equal(pool.free_words(), before)
        assert pool.memory[16:FREE:8].sum() == version + 1
        assert not pool.journals.any()

        start = pool("lease_allocate", 1, 3)
        assert pool("hand_over") == 0
        assert not pool.journals[0].any()
        pool.journals = pool.journals[::-1].copy()
        assert pool("lease_abort") == 0  # that of the lease around
        assert np.array_equal(pool.free_words(), before)

        start = pool("lease_allocate", 1, 3)
        assert pool("lease_commit") == 0
        assert pool("lease_abort") == 0
        assert not pool.journals.any()
        assert pool("free", start, 2) == 0
        assert pool("free", kept, 4) == 0
        assert pool.is_fresh()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_retired_granules_wait_in_the_limbo_of_their_epoch(self, layout):
        pool = Simulated(64, layout)
        pool.memory[2] = 6
        pool.take_all(3)
        assert pool("retire", 8, 8) == 0
        assert [pool("free", 8, 8), pool("retire", 8, 8), pool("free", 15, 1)] == [INVALID] * 3
        assert pool("allocate", 3) == FRAGMENTED
        limbo = pool.memory[FREE:][: 5 * pool.num_words].reshape(5, -1)[1:]
        assert limbo[6 % 4, 0] == 0xFF00
        assert np.count_nonzero(limbo) == 1
        assert pool("retire", 7, 2) == INVALID  # granule 7 was live, and is in limbo too
        assert limbo[6 % 4, 0] == 0xFF80

    @pytest.mark.parametrize("layout", LAYOUTS)
    @settings(deadline=None, max_examples=300)
    @given(num_granules=SIZES, steps=STEPS)
    def test_random_calls_do_what_a_set_of_granules_says(self, layout, num_granules, steps):
        pool, model = Simulated(num_granules, layout), Model(num_granules, layout)
        held, leased = [], []
        for what, first, second in steps:
            if what in ("allocate", "lease_allocate"):
                start = pool(what, first, second)
                if start >= 0:
                    model.took(start, first)
                    (held if what == "allocate" else leased).append((start, 1 << first))
                else:
                    assert start == (EXHAUSTED if layout == "buddy" and first == 0 else FRAGMENTED)
                    assert not model.runs(first)
            elif what.endswith("block"):
                if held:
                    how = what.split()[0]
                    start, count = held.pop(first % len(held))
                    is_good = model.gave(start, count, "" if how == "free" else "limbo")
                    assert pool(how, start, count) == (0 if is_good else INVALID)
            elif what in ("free", "retire"):
                is_leased = any(start < first + second and first < start + size for start, size in leased)
                is_inside = (
                    first + second <= num_granules and first // model.width == (first + second - 1) // model.width
                )
                if not is_leased:  # or the journal would still name it
                    is_good = is_inside and model.gave(first, second, "" if what == "free" else "limbo")
                    assert pool(what, first, second) == (0 if is_good else INVALID)
            else:
                pool(what)
                for start, count in leased:
                    if what == "lease_abort":
                        model.gave(start, count, "")
                    else:
                        held.append((start, count))
                leased = []
            bits = np.unpackbits(pool.free_words().view(np.uint8), bitorder="little").reshape(-1, 64)
            free = bits[:, : model.width].reshape(-1)[:num_granules]
            assert free.tolist() == [not state for state in model.state]

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("num_granules", [8, 64, 200, 4104])
    def test_every_word_is_what_the_header_writes(self, header, layout, num_granules):
        from kvtoolkit.numba import pool

        rng = np.random.default_rng(num_granules)
        is_slab = int(layout == "slab")
        ours, theirs = make_memory(num_granules, layout), make_memory(num_granules, layout)
        journals = np.zeros((2, words_of(num_granules, layout)), np.uint64)
        other_journals = journals.copy()
        for step in range(600):
            what = int(rng.choice(7, p=[0.4, 0.3, 0.08, 0.1, 0.04, 0.04, 0.04]))
            if what in (0, 3):
                first, second = int(rng.integers(4)), int(rng.integers(1 << 32)) if rng.random() < 0.5 else step
            else:
                size = 1 << int(rng.integers(4))
                first, second = int(rng.integers(-1, num_granules // size + 1)) * size, size
            if rng.random() < 0.02:
                ours[2] = theirs[2] = rng.integers(9)
            answer = [
                lambda first, second: pool.allocate(ours, first, second),
                lambda first, second: pool.free(ours, first, second),
                lambda first, second: pool.retire(ours, first, second),
                lambda first, second: pool.lease_allocate(ours, journals[0], first, second),
                lambda *_: pool.lease_commit(ours, journals[0], None, 0, 1) or 0,
                lambda *_: pool.lease_commit(ours, journals[0], journals[1], 0, 1) or 0,
                lambda *_: pool.lease_abort(ours, journals[0], 0, 1) or 0,
            ][what](first, second)
            pointers = [ctypes.c_void_p(array.ctypes.data) for array in (theirs, other_journals)]
            assert answer == header(*pointers, is_slab, what, first, ctypes.c_uint32(second)), step
            assert np.array_equal(ours, theirs), step
            assert np.array_equal(journals, other_journals), step

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(("num_granules", "order"), [(8, -1), (96, -1), (16, 0), (128, 3)])
    def test_threads_that_race_get_disjoint_blocks(self, layout, num_granules, order):
        from tests.kvtoolkit.numba import numba_pool_kernels as kernels

        pool = Simulated(num_granules, layout)
        canaries, wrong = np.zeros(num_granules, np.int64), np.zeros(1, np.int64)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            kernels.churn[1, 12](pool.memory, canaries, 1, 60, order, False, False, wrong)
        finally:
            sys.setswitchinterval(interval)
        assert wrong[0] == 0
        assert pool.is_fresh()

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("is_inner_kept", [False, True])
    @pytest.mark.parametrize("is_outer_kept", [False, True])
    def test_the_leases_of_a_group_nest(self, layout, is_inner_kept, is_outer_kept):
        from tests.kvtoolkit.numba import numba_pool_kernels as kernels

        pool = Simulated(512, layout)
        starts = np.zeros((8, 2), np.int64)
        journals = np.zeros((4, pool.num_words), np.uint64)
        kernels.speculate[2, 4](pool.memory, journals, is_inner_kept, is_outer_kept, starts)
        assert not journals.any()
        assert (starts >= 0).all()
        if is_outer_kept:
            for t, (first, second) in enumerate(starts.tolist()):
                assert pool("free", first, 1 << t % 4) == 0
                if is_inner_kept:
                    assert pool("free", second, 1) == 0
        assert pool.is_fresh()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_while_the_version_moves_nothing_is_proved(self, monkeypatch, warp, layout):
        from kvtoolkit.numba import pool, pool_warp

        there = Simulated(64, layout)
        there.take_all(0)
        there.memory[8] = 0
        versions = iter(range(100))
        for module in (pool, pool_warp):
            monkeypatch.setattr(module, "version", lambda memory: np.uint64(next(versions)))
        assert there("allocate") == CONTENDED
        assert set(warp.run(7, lambda lane: pool.warp_allocate(there.memory, 7, 0, 0)).values()) == {CONTENDED}
        assert there.memory[8] == 0
        assert next(versions) == 2 * 2 * 4  # twice in each of the passes of both

    # -- warps, of threads -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("mask", [1, 0x80000000, 0x80100005, 0xFFFFFFFF])
    @pytest.mark.parametrize("order", [0, 3])
    def test_a_warp_takes_all_of_a_pool_and_gives_it_back(self, warp, layout, mask, order):
        from kvtoolkit.numba import pool

        lanes = len(lanes_of(mask))
        num_blocks = 2 * lanes + lanes // 2 + 1  # so that two calls succeed, and one in part
        there = Simulated(num_blocks * 8 if order else -(-num_blocks // 8) * 8, layout)
        num_blocks = there.num_granules >> order
        starts, rounds = [], []
        for i in range(-(-num_blocks // lanes) + 1):
            found = warp.run(mask, lambda lane, i=i: pool.warp_allocate(there.memory, mask, order, 5 * i))
            granted = {lane: start for lane, start in found.items() if start >= 0}
            code = EXHAUSTED if layout == "buddy" and order == 0 else FRAGMENTED
            assert {start for start in found.values() if start < 0} <= {code}
            assert len(granted) == min(lanes, num_blocks - len(starts))
            starts += granted.values()
            rounds.append(granted)
        assert sorted(starts) == list(range(0, there.num_granules, 1 << order))
        assert not there("allocate", order) >= 0
        for granted in rounds:
            those = sum(1 << lane for lane in granted)
            version = there.memory[16:FREE:8].sum()
            if those:
                signed = np.uint32(those).astype(np.int32)  # as ballots give it
                codes = warp.run(
                    those, lambda lane, g=granted, m=signed: pool.warp_free(there.memory, m, g[lane], 1 << order)
                )
                assert set(codes.values()) == {0}
                assert there.memory[16:FREE:8].sum() == version + 1
        assert there.is_fresh()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_warp_is_told_of_misuse(self, warp, layout):
        from kvtoolkit.numba import pool

        there = Simulated(128, layout)
        there.take_all(0)
        live = np.array([3, 4, 70])
        runs = [live[0], live[0], live[1], live[2], -1]
        codes = warp.run(31, lambda lane: pool.warp_free(there.memory, 31, runs[lane], 1))
        assert codes == {0: INVALID, 1: INVALID, 2: INVALID, 3: 0, 4: INVALID}
        codes = warp.run(3, lambda lane: pool.warp_retire(there.memory, 3, 70 + lane, 1))
        assert codes == {0: INVALID, 1: 0}
        codes = warp.run(3, lambda lane: pool.warp_free(there.memory, 3, 71 + lane, 1))
        assert codes == {0: INVALID, 1: 0}
        assert sorted(there.take_all(0)[0]) == [3, 4, 70, 72]


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels() -> Any:
    from tests.kvtoolkit.numba import numba_pool_kernels

    return numba_pool_kernels


def launch(kernel, threads, *arguments, stream=0, cta=256):
    """In whole warps, as the lanes of one are asked together."""
    cta = min(cta, -(-threads // 32) * 32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Grid size")  # a small one is no mistake
        kernel[-(-threads // cta), cta, stream](*arguments)


def orders_of(threads, order):
    return np.arange(threads) % 4 if order < 0 else np.full(threads, order)


def granules_of(starts, orders):
    """All granules of these blocks, which must be disjoint."""
    granules = np.concatenate([starts[orders == k][:, None] + np.arange(1 << k) for k in range(4)], axis=None)
    assert len(np.unique(granules)) == len(granules)
    return np.sort(granules)


gpu = pytest.mark.gpu
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
both_ways = pytest.mark.parametrize("by_warp", [False, True], ids=["alone", "warp"])


@gpu
@both_layouts
@both_ways
@pytest.mark.parametrize("threads", [1, 33, 4096])
@pytest.mark.parametrize("order", [-1, 0, 1, 3], ids=["mixed", "8", "16", "64"])
@pytest.mark.parametrize("share", [2.0, 0.5], ids=["room for all", "room for half"])
def test_kernels_take_disjoint_blocks_and_give_back_a_fresh_pool(kernels, layout, by_warp, threads, order, share):
    import cupy

    orders = orders_of(threads, order)
    wanted = int((1 << orders).sum())
    pool = DevicePool(int(wanted * share) // 8 * 8 + (256 if share > 1 else 8), layout=layout)
    fresh = pool.snapshot()
    starts = cupy.full(threads, -9, cupy.int32)
    launch(kernels.take, threads, pool.memory, starts, order, by_warp)
    found = starts.get()
    got = found >= 0
    assert (found[got] % (1 << orders[got]) == 0).all()
    taken = granules_of(found[got], orders[got])
    assert np.array_equal(np.flatnonzero(~free_granules(pool)), taken)
    # nobody frees, so nothing is contended, and who was refused would be refused now
    codes = np.where((orders == 0) & (layout == "buddy"), EXHAUSTED, FRAGMENTED)
    assert (found[~got] == codes[~got]).all()
    for k in np.unique(orders[~got]):
        assert pool.stats().free_blocks[8 << k] == 0
    if share > 1 and order >= 0:  # sizes that mix may leave no room for the largest
        assert got.all()
    launch(kernels.give_back, threads, pool.memory, starts, order, by_warp, False)
    assert not starts.get()[got].any()
    assert pool.snapshot() == fresh
    pool.check_integrity()


@gpu
@both_layouts
@both_ways
@pytest.mark.parametrize(("num_granules", "order"), [(64, -1), (4096, -1), (4096, 0), (4 * 4096, 2)])
def test_live_blocks_are_nobody_elses_and_exhaustion_is_never_false(kernels, layout, by_warp, num_granules, order):
    import cupy

    pool = DevicePool(num_granules, layout=layout)
    fresh = pool.snapshot()
    canaries, wrong = cupy.zeros(num_granules, cupy.int64), cupy.zeros(1, cupy.int64)
    for threads in (32, 4096):
        launch(kernels.churn, threads, pool.memory, canaries, 1, 20, order, by_warp, True, wrong)
        assert int(wrong[0]) == 0
        assert pool.snapshot() == fresh
    assert sorted(pool.allocate(np.full(num_granules // 8, 8)).tolist()) == list(range(0, num_granules, 8))
    pool.check_integrity()


@gpu
@both_layouts
@pytest.mark.parametrize("is_inner_kept", [False, True])
@pytest.mark.parametrize("is_outer_kept", [False, True])
def test_leases_return_the_pool_to_the_bit_or_keep_their_blocks(kernels, layout, is_inner_kept, is_outer_kept):
    import cupy

    pool = DevicePool(4096, layout=layout)
    fresh = pool.snapshot()
    journals, starts = pool.journals(8 * 2), cupy.zeros((8 * 64, 2), cupy.int32)
    launch(kernels.speculate, 8 * 64, pool.memory, journals, is_inner_kept, is_outer_kept, starts, cta=64)
    assert not journals.get().any()
    found = starts.get()
    assert (found >= 0).all()
    if not is_outer_kept:
        assert pool.snapshot() == fresh
        return
    kept, orders = found[:, 0], orders_of(8 * 64, -1)
    if is_inner_kept:
        kept, orders = found.T.reshape(-1), np.concatenate([orders, np.zeros_like(orders)])
    assert np.array_equal(np.flatnonzero(~free_granules(pool)), granules_of(kept, orders))


@gpu
@both_layouts
@both_ways
def test_retired_blocks_wait_for_their_epoch(kernels, layout, by_warp):
    import cupy

    pool = DevicePool(256, layout=layout)
    starts = cupy.asarray(pool.allocate(np.ones(256, int)))
    for first, count in ((0, 100), (100, 50)):
        retired = starts[first : first + count].copy()
        launch(kernels.give_back, count, pool.memory, retired, 0, by_warp, True)
        assert not retired.get().any()
        pool.advance()
    assert (pool.num_free, pool.num_in_limbo) == (0, 150)
    for to_limbo in (True, False):  # once is enough
        again = starts[:33].copy()
        launch(kernels.give_back, 33, pool.memory, again, 0, by_warp, to_limbo)
        assert (again.get() == INVALID).all()
    asked = cupy.full(33, -9, cupy.int32)
    launch(kernels.take, 33, pool.memory, asked, 0, by_warp)
    assert (asked.get() < 0).all()
    pool.complete(0)
    pool.complete(1)
    assert pool.num_in_limbo == 0
    launch(kernels.take, 33, pool.memory, asked, 0, by_warp)
    assert (asked.get() >= 0).all()
    pool.check_integrity()


@gpu
@both_layouts
def test_a_warp_is_told_of_misuse(kernels, layout):
    import cupy

    pool = DevicePool(128, layout=layout)
    pool.allocate(np.ones(128, int))
    codes = cupy.zeros(5, cupy.int64)
    launch(kernels.misuse, 32, pool.memory, cupy.asarray([3, 4, 70]), codes)
    assert codes.get().tolist() == [INVALID, INVALID, INVALID, 0, INVALID]


CUDA_CHURN = r"""
#include <kvt/pool.cuh>

extern "C" __global__ void churn(kvt::Word* memory, kvt::Word* canaries, int rounds, kvt::Word* wrong) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  const kvt::KVT_POOL pool{memory};
  unsigned draw = t * 2654435761u + 1;
  for (int i = 0; i < rounds; ++i) {
    draw = draw * 1664525u + 1013904223u;
    const int order = draw >> 20 & 3;
    const int start = kvt::PoolWarp(pool, __match_any_sync(__activemask(), order)).allocate(order, draw);
    if (start < 0) continue;
    for (int g = start; g < start + (1 << order); ++g) {
      if (atomicExch(canaries + g, t + 1ull) != 0) atomicAdd(wrong, 1);
    }
    __nanosleep(draw >> 24 << 8);
    for (int g = start; g < start + (1 << order); ++g) {
      if (atomicExch(canaries + g, 0ull) != t + 1) atomicAdd(wrong, 1);
    }
    if (pool.free(start, 1 << order) != 0) atomicAdd(wrong, 1);
  }
}

extern "C" __global__ void take(kvt::Word* memory, int* starts, int count) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t < count) starts[t] = kvt::KVT_POOL{memory}.allocate(t % 4, t);
}
"""


@gpu
@both_layouts
@both_ways
def test_kernels_in_cuda_and_in_numba_share_a_pool(kernels, layout, by_warp):
    import cupy

    from kvtoolkit.numba.device import cuda

    name = "Pool" if layout == "buddy" else "SlabPool"
    module = cupy.RawModule(code=CUDA_CHURN, options=("-std=c++17", f"-I{get_include()}", f"-DKVT_POOL={name}"))
    pool = DevicePool(1 << 15, layout=layout)
    fresh = pool.snapshot()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    # of its own view and stream, since Numba would wait for the stream that CuPy names
    stream = cuda.external_stream(streams[0].ptr)
    canaries, wrong = cupy.zeros(1 << 15, cupy.int64), cupy.zeros(1, cupy.int64)
    starts = cupy.full((2, 4096), -9, cupy.int32)
    views = [cuda.as_cuda_array(array, sync=False) for array in (pool.memory, starts[0], canaries, wrong)]
    for function in (kernels.take, kernels.churn):  # compiled, so that the launches below overlap
        some = cuda.as_cuda_array(cupy.zeros(0, cupy.int32), sync=False)
        arguments = (some, -1, by_warp) if function is kernels.take else (views[2], 1, 0, -1, by_warp, True, views[3])
        launch(function, 32, views[0], *arguments, stream=stream)
    for name in ("take", "churn"):
        module.get_function(name)
    cupy.cuda.Device().synchronize()

    launch(kernels.take, 4096, *views[:2], -1, by_warp, stream=stream)
    module.get_function("take")((16,), (256,), (pool.memory, starts[1], np.int32(4096)), stream=streams[1])
    cupy.cuda.Device().synchronize()
    found, orders = starts.get().reshape(-1), np.tile(np.arange(4096) % 4, 2)
    assert (found >= 0).all()
    assert np.array_equal(np.flatnonzero(~free_granules(pool)), granules_of(found, orders))
    for both in starts:
        launch(kernels.give_back, 4096, pool.memory, both, -1, by_warp, False)
        assert not both.get().any()
    assert pool.snapshot() == fresh

    pool = DevicePool(4096, layout=layout)  # less than all want at once
    fresh = pool.snapshot()
    memory = cuda.as_cuda_array(pool.memory, sync=False)
    cupy.cuda.Device().synchronize()
    launch(kernels.churn, 4096, memory, views[2], 1 << 20, 30, -1, by_warp, True, views[3], stream=stream)
    module.get_function("churn")((16,), (256,), (pool.memory, canaries, np.int32(30), wrong), stream=streams[1])
    for _ in range(20):  # and the host, meanwhile
        with contextlib.suppress(ContendedError):
            granted = pool.allocate(np.ones(4, int), partial=True)
            granted = granted[granted >= 0]
            pool.free(granted, np.ones(len(granted), int))
    cupy.cuda.Device().synchronize()
    assert int(wrong[0]) == 0
    assert pool.snapshot() == fresh
    pool.check_integrity()
