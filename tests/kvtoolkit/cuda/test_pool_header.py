"""kvt/pool.cuh built by g++ and run on real threads, plain and under ThreadSanitizer; planted faults must be found."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtoolkit import get_include

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

HERE = Path(__file__).parent


SHAKE = """
#include <sched.h>
static thread_local unsigned kvt_draws = 1;
// now and then another thread goes on here
static inline void kvt_shake() {
  kvt_draws = kvt_draws * 1664525u + 1013904223u;
  if (kvt_draws >> 28 == 0) sched_yield();
}
"""


def change_headers(include: Path, changes: Iterable[tuple[str, str]]) -> None:
    """Make changes to the headers of the pool, each of which must fit once."""
    headers = list((include / "kvt" / "pool").iterdir())
    for old, new in changes:
        assert sum(header.read_text().count(old) for header in headers) == 1, old
        for header in headers:
            header.write_text(header.read_text().replace(old, new))


def shaken(folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of the headers that gives way before atomics, with changes to it, each of which must fit once."""
    include = folder / "include"
    shutil.copytree(get_include(), include)
    change_headers(include, changes)
    header = include / "kvt" / "pool" / "atomic.cuh"
    atomics = header.read_text().replace("return __atomic_", "return kvt_shake(), __atomic_")
    atomics = atomics.replace("  __atomic_", "  kvt_shake(), __atomic_")
    header.write_text(atomics.replace("namespace kvt {", SHAKE + "namespace kvt {"))
    return include


def build(folder: Path, include: Path, *options: str, source: str = "pool_threads.cpp") -> Path:
    program = folder / f"{source}{len(options)}.out"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-tsan", "-pthread", *options]
    subprocess.run([*command, f"-I{include}", str(HERE / source), "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: object, timeout: int = 60) -> str:
    """What went wrong, or nothing."""
    command = [str(program), *map(str, arguments)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "did not end"
    return "" if finished.returncode == 0 else finished.stdout + finished.stderr or f"returned {finished.returncode}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return build(folder, shaken(folder))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    program = build(tmp_path_factory.mktemp("sanitized"), get_include(), "-fsanitize=thread")
    if "unexpected memory mapping" in run(program, 64, 1, 1, 0, "fill", "buddy"):
        pytest.skip("ThreadSanitizer cannot run here")
    return program


DRAWN = {
    "granules": st.integers(1, 40).map(lambda n: 8 * n),
    "threads": st.integers(1, 8),
    "seed": st.integers(0, 9999),
    "mode": st.sampled_from(["mix", "mix", "spare", "fill"]),
    "layout": st.sampled_from(["buddy", "slab"]),
}
SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(SLOW, max_examples=60)
@given(**DRAWN)
def test_threads_get_disjoint_blocks_and_leave_the_pool_as_it_was(plain, granules, threads, seed, mode, layout):
    assert not run(plain, max(granules, 8 * threads), threads, 5000, seed, mode, layout)


@settings(SLOW, max_examples=25)
@given(**DRAWN)
def test_orders_suffice_for_thread_sanitizer(sanitized, granules, threads, seed, mode, layout):
    assert not run(sanitized, max(granules, 8 * threads), threads, 2000, seed, mode, layout)


LANE = ('asm("mov.u32 %0, %%laneid;" : "=r"(lane));', "lane = this_lane;")


@pytest.fixture(scope="module")
def warps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warps")
    return build(folder, shaken(folder, LANE), "-Wno-unknown-pragmas", source="pool_warps.cpp")


@settings(SLOW, max_examples=25)
@given(
    granules=st.integers(1, 80).map(lambda n: 8 * n),
    singles=st.integers(0, 4),
    lanes=st.integers(1, 0xFFFFFFFF) | st.sampled_from([0xFFFFFFFF, 1, 0x80000000, 0xF]),
    seed=st.integers(0, 9999),
    layout=st.sampled_from(["buddy", "slab"]),
)
def test_a_warp_of_threads_is_served_exactly(warps, granules, singles, lanes, seed, layout):
    assert not run(warps, granules, singles, lanes, seed, layout)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_header_compiles_for_host_and_device(tmp_path):
    source = tmp_path / "user.cu"
    source.write_text(
        """
        #include <kvt/pool.cuh>
        __global__ void user(kvt::Word* memory, kvt::Word* journal, int* starts) {
          const kvt::Pool pool{memory};
          kvt::PoolWarp warp(pool, 0xFFFFFFFFu);
          const int start = warp.allocate(0, blockIdx.x);
          const kvt::PoolLease lease{pool, journal};
          lease.allocate(3, threadIdx.x);
          lease.abort(threadIdx.x, blockDim.x);
          starts[threadIdx.x] = start >= 0 ? warp.retire(start, 1) : pool.free(starts[threadIdx.x], 8);
        }
        __global__ void of_slabs(kvt::Word* memory, kvt::Word* journal, int* starts) {
          const kvt::SlabPool pool{memory};
          starts[0] = kvt::PoolLease{pool, journal}.allocate(3, threadIdx.x);
          starts[1] = kvt::PoolWarp(pool, 0xFFFFFFFFu).allocate(0, blockIdx.x);
        }
        int main() {
          user<<<1, 32>>>(nullptr, nullptr, nullptr);
          of_slabs<<<1, 32>>>(nullptr, nullptr, nullptr);
        }
        """
    )
    command = ["nvcc", "-std=c++17", "-arch=sm_90", f"-I{get_include()}", "-c", str(source), "-o", str(tmp_path / "o")]
    subprocess.run(command, check=True)


MUTANTS = {
    "claims are not acquired": ("tsan", "at, value, __ATOMIC_ACQUIRE", "at, value, __ATOMIC_RELAXED"),
    "runs are not acquired": (
        "tsan",
        "false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE",
        "false, __ATOMIC_RELAXED, __ATOMIC_RELAXED",
    ),
    "frees are not released": ("tsan", "fetch_or(at, value, __ATOMIC_RELEASE", "fetch_or(at, value, __ATOMIC_RELAXED"),
    "limbo is taken without order": ("tsan", "at, value, __ATOMIC_ACQ_REL", "at, value, __ATOMIC_RELAXED"),
    "a claim is a load and a store": (
        "plain",
        "const Word old = fetch_and_acquire(word, ~bits);",
        "const Word old = load_acquire(word); store_relaxed(word, old & ~bits);",
    ),
    "a run is claimed by fetch_and, won or not": (
        "plain",
        "const Word old = compare_exchange_acquire(word, seen, Layout::without(seen, bits, order));\n"
        "      if (old == seen) return starts;",
        "const Word old = fetch_and_acquire(word, ~bits);\n      if ((old & bits) != 0) return starts;",
    ),
    "what was lost in a claim is kept": ("plain", "won |= old & bits;", "won |= bits;"),
    "the version stands still": ("plain", "* kShardPitch, 1);", "* kShardPitch, 0);"),
    "one pass decides": (
        "plain",
        "if (version() == before) {\n        store_relaxed(memory",
        "if (true) {\n        store_relaxed(memory",
    ),
    "a slab serves any order": ("plain", "static_cast<int>(word >> 32 & 3) == order;", "true;"),
    "a slab keeps its first order": (
        "plain",
        "& ~(Word{3} << 32)) | static_cast<Word>(order) << 32",
        ")",
    ),
    "the last slab is never whole": ("plain", "8 * (word >> 34)) - 1", "8 * 4) - 1"),
    "the version comes before the bit": (
        "plain",
        "    const Word old = fetch_or_release(free_words() + w, bits & ~taken) & bits;\n"
        "    bump_version(static_cast<unsigned>(w));\n",
        "    bump_version(static_cast<unsigned>(w));\n    for (int i = 0; i < 40; ++i) load_acquire(memory);\n"
        "    const Word old = fetch_or_release(free_words() + w, bits & ~taken) & bits;\n",
    ),
    "a mask is off by one": ("plain", "~Word{0} >> (64 - count) <<", "~Word{0} >> (63 - count) <<"),
    "runs are not aligned": ("plain", "word >> 1 & 0x5555555555555555ull", "word >> 1"),
    "a run of 8 is checked as one of 4": ("plain", "if (order > 2) word &=", "if (order > 3) word &="),
    "a double free goes through": (
        "plain",
        "bump_version(static_cast<unsigned>(w));\n    return (old | taken) == 0 ?",
        "bump_version(static_cast<unsigned>(w));\n    return taken == 0 ?",
    ),
    "a block is freed out of limbo": ("plain", "const Word taken = in_limbo(w) & bits;", "const Word taken = 0;"),
    "a run may leave its word": ("plain", "count <= kGranules - start % kGranules", "count <= kGranules"),
    "an aborted lease keeps its blocks": (
        "plain",
        "pool.free_all(journal, rank, threads)",
        "commit(nullptr, rank, threads)",
    ),
    "a committed lease forgets the one around it": ("plain", "around != nullptr && bits != 0", "false"),
    "a journal is not cleared": (
        "plain",
        "const Word bits = exchange_acq_rel(bitmap + w, 0);",
        "const Word bits = load_acquire(bitmap + w);",
    ),
}
"""What is planted, and which build must find it."""


def is_found(program, warps=False, seeds=300):
    """Whether one of many runs goes wrong; most faults show within a few."""
    for seed in range(seeds):
        layout = ("buddy", "slab")[seed % 2]
        runs = [(128, 8, 6000, seed, "mix"), (128, 2, 6000, seed, "spare"), (520, 8, 6000, seed, "fill")]
        if warps:
            runs = [(512, 3, 0xF, seed), (640, 3, 1, seed), (72, 0, 0xFFFFFFFF, seed)]
        runs = [(*arguments, layout) for arguments in runs]
        if any(run(program, *arguments, timeout=10 if warps else 60) for arguments in runs):
            return True
    return False


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_faults_are_found(name, tmp_path):
    how, *change = MUTANTS[name]
    options = ("-fsanitize=thread",) if how == "tsan" else ()
    program = build(tmp_path, shaken(tmp_path, change), *options, "-Wno-error")
    if how == "tsan" and "unexpected memory mapping" in run(program, 64, 1, 1, 0, "fill", "buddy"):
        pytest.skip("ThreadSanitizer cannot run here")
    assert is_found(program)


def test_nothing_is_found_where_nothing_is_planted(plain, warps, tmp_path):
    assert not is_found(plain, seeds=5)
    assert not is_found(warps, warps=True, seeds=5)
    sanitized = build(tmp_path, shaken(tmp_path), "-fsanitize=thread")
    if "unexpected memory mapping" not in run(sanitized, 64, 1, 1, 0, "fill", "buddy"):
        assert not is_found(sanitized, seeds=3)


WARP_MUTANTS = {
    "a claim that lost a part gives up": ("if (count_bits(won) == count) return won;", "if (won != 0) return won;"),
    "slabs that serve the order are left out": ("opens_ = false;", "opens_ = false; return start_;"),
    "slabs are begun where none may be": ("opens_ = false;", ""),
    "lanes share a rank": (LANE[0], "lane = this_lane & 15;"),
    "words are left out": ("i += kAhead * wanted_", "i += (kAhead + 1) * wanted_"),
    "all take the first run": ("rank_ - granted_)", "0)"),
    "lanes begin to count anew": ("      granted_ += count;", "      granted_ = count;"),
    "the group's bits are one lane's": (
        "fetch_or_release(bitmap + w, all & ~taken)",
        "fetch_or_release(bitmap + w, bits)",
    ),
    "what is in limbo is freed": ("      taken = pool_.in_limbo(w);", "      taken = 0;"),
    "what is free is retired": ("if (is_limbo) taken |=", "if (false) taken |="),
}


@pytest.mark.parametrize("name", WARP_MUTANTS)
def test_planted_faults_of_a_warp_are_found(name, tmp_path):
    change = WARP_MUTANTS[name]
    changes = (change,) if name == "lanes share a rank" else (change, LANE)
    program = build(tmp_path, shaken(tmp_path, *changes), "-Wno-unknown-pragmas", "-Wno-error", source="pool_warps.cpp")
    assert is_found(program, warps=True, seeds=400)
