"""kvt/pool.cuh built by g++ and run on real threads, plain and under ThreadSanitizer; planted faults must be found."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtoolkit import get_include

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PROGRAM = Path(__file__).with_name("pool_threads.cpp")


SHAKE = """
#include <sched.h>
static thread_local unsigned kvt_draws = 1;
// now and then another thread goes on here
static inline void kvt_shake() {
  kvt_draws = kvt_draws * 1664525u + 1013904223u;
  if (kvt_draws >> 28 == 0) sched_yield();
}
"""


def shaken(folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of the headers that gives way before atomics, with changes to it, each of which must fit once."""
    include = folder / "include"
    shutil.copytree(get_include(), include)
    for name in ("pool.cuh", "atomic.cuh"):
        header = include / "kvt" / name
        text = header.read_text()
        for old, new in changes:
            text = text.replace(old, new)
        if name == "atomic.cuh":
            text = text.replace("return __atomic_", "return kvt_shake(), __atomic_")
            text = text.replace("  __atomic_", "  kvt_shake(), __atomic_").replace(
                "namespace kvt {", SHAKE + "namespace kvt {"
            )
        header.write_text(text)
    return include


def build(folder: Path, include: Path, *options: str) -> Path:
    program = folder / f"pool_threads{len(options)}"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-tsan", "-pthread", *options]
    subprocess.run([*command, f"-I{include}", str(PROGRAM), "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: object) -> str:
    """What went wrong, or nothing."""
    command = [str(program), *map(str, arguments)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
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
    if "unexpected memory mapping" in run(program, 64, 1, 1, 0, "fill"):
        pytest.skip("ThreadSanitizer cannot run here")
    return program


DRAWN = {
    "granules": st.integers(1, 40).map(lambda n: 8 * n),
    "threads": st.integers(1, 8),
    "seed": st.integers(0, 9999),
    "mode": st.sampled_from(["mix", "mix", "spare", "fill"]),
}
SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(SLOW, max_examples=120)
@given(**DRAWN)
def test_threads_get_disjoint_blocks_and_leave_the_pool_as_it_was(plain, granules, threads, seed, mode):
    assert not run(plain, max(granules, 8 * threads), threads, 5000, seed, mode)


@settings(SLOW, max_examples=25)
@given(**DRAWN)
def test_orders_suffice_for_thread_sanitizer(sanitized, granules, threads, seed, mode):
    assert not run(sanitized, max(granules, 8 * threads), threads, 2000, seed, mode)


MUTANTS = {
    "claims are not acquired": ("at, value, __ATOMIC_ACQUIRE", "at, value, __ATOMIC_RELAXED", "tsan"),
    "runs are not acquired": ("false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE", "false, __ATOMIC_RELAXED, __ATOMIC_RELAXED", "tsan"),
    "frees are not released": ("fetch_or(at, value, __ATOMIC_RELEASE", "fetch_or(at, value, __ATOMIC_RELAXED", "tsan"),
    "limbo is taken without order": ("at, value, __ATOMIC_ACQ_REL", "at, value, __ATOMIC_RELAXED", "tsan"),
    "a claim is a load and a store": (
        "const Word old = fetch_and_acquire(word, ~bits);",
        "const Word old = load_acquire(word); store_relaxed(word, old & ~bits);",
        "plain",
    ),
    "a run is claimed by fetch_and, won or not": (
        "const Word old = compare_exchange_acquire(word, seen, seen & ~bits);\n      if (old == seen) return starts;",
        "const Word old = fetch_and_acquire(word, ~bits);\n      if ((old & bits) != 0) return starts;",
        "plain",
    ),
    "what was lost in a claim is kept": ("return old & bits;", "return bits;", "plain"),
    "the version stands still": ("* kShardPitch, 1);", "* kShardPitch, 0);", "plain"),
    "one pass decides": ("if (version() == before) {\n        store_relaxed(memory", "if (true) {\n        store_relaxed(memory", "plain"),
    "the version comes before the bit": (
        "const int code = set_bits(free_words(), start, count);\n    bump_version(static_cast<unsigned>(start) >> 6);\n    return code;",
        "bump_version(static_cast<unsigned>(start) >> 6);\n    for (int i = 0; i < 200; ++i) load_acquire(memory);\n    return set_bits(free_words(), start, count);",
        "plain",
    ),
    "a mask is off by one": ("~Word{0} >> (64 - count) << (start & 63)", "~Word{0} >> (63 - count) << (start & 63)", "plain"),
    "runs are not aligned": ("word >> 1 & 0x5555555555555555ull", "word >> 1", "plain"),
    "a run of 8 is checked as one of 4": ("if (order > 2) word &=", "if (order > 3) word &=", "plain"),
    "a double free goes through": ("bits) & bits) == 0 ? 0 : kInvalid", "bits) & bits) == 0 ? 0 : 0", "plain"),
    "a run may leave its word": ("count <= 64 - (start & 63)", "count <= 64", "plain"),
    "an aborted lease keeps its blocks": ("pool.free_all(journal, rank, threads)", "commit(nullptr, rank, threads)", "plain"),
    "a committed lease forgets the one around it": ("around != nullptr && bits != 0", "false", "plain"),
    "a journal is not cleared": ("const Word bits = exchange_acq_rel(bitmap + w, 0);", "const Word bits = load_acquire(bitmap + w);", "plain"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_faults_are_found(name, tmp_path):
    old, new, how = MUTANTS[name]
    assert sum((get_include() / "kvt" / header).read_text().count(old) for header in ("pool.cuh", "atomic.cuh")) == 1
    include = shaken(tmp_path, (old, new))
    options = ("-fsanitize=thread",) if how == "tsan" else ()
    program = build(tmp_path, include, *options, "-Wno-error")
    if how == "tsan" and "unexpected memory mapping" in run(program, 64, 1, 1, 0, "fill"):
        pytest.skip("ThreadSanitizer cannot run here")
    for seed in range(12):
        for mode, granules, threads in (("mix", 128, 8), ("spare", 192, 3), ("fill", 512, 8)):
            if run(program, granules, threads, 20000, seed, mode):
                return
    pytest.fail("the planted fault was not found")
