"""Parts around the CPU kernels: granule copies, the thread pool, machines without wide registers, trusted calls."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtoolkit import cpu
from kvtoolkit.cpu import kernel, threads
from kvtoolkit.errors import ConfigError, KVToolkitError, ShapeError
from tests.kvtoolkit.attention.attention_cases import Case, make_call


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16, np.int8])
def test_copied_granules_match_in_every_arena_and_the_rest_is_untouched(dtype: type) -> None:
    rng = np.random.default_rng(0)
    arenas = rng.integers(0, 100, (3, 2, 20, 2, 8, 24)).astype(dtype)
    single = rng.integers(0, 100, (20, 1, 8, 16)).astype(dtype)
    wanted = arenas.copy(), single.copy()
    source, target = np.array([3, 7, 9]), [0, 19, 4]
    for arena in wanted:
        arena[..., target, :, :, :] = arena[..., source, :, :, :]
    cpu.copy_granules([arenas, single], source, target)
    assert np.array_equal(arenas, wanted[0])
    assert np.array_equal(single, wanted[1])


def test_copies_happen_in_the_order_given() -> None:
    arena = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 8, 8), np.float32)
    cpu.copy_granules(arena, [1, 2, 3], [0, 1, 3])
    assert arena[:, 0, 0, 0].tolist() == [1.0, 2.0, 2.0, 3.0]


def test_strided_arenas_and_empty_copies() -> None:
    both = np.zeros((4, 2, 5, 1, 8, 8), np.float32)
    both[:, :, 1] = 3.0
    keys = both[:, 0]  # every second array of a larger one
    cpu.copy_granules(keys, [], [])
    cpu.copy_granules(keys, [1], [4])
    assert (keys[:, 4] == 3.0).all()
    assert not both[:, 1, 4].any()


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [([0], [5], "got 0 to 5"), ([-1], [0], "got -1 to 0"), ([0, 1], [2], "as many"), ([0], [1, 2], "as many")],
)
def test_copies_out_of_range_are_refused(source: list[int], target: list[int], message: str) -> None:
    arena = np.zeros((5, 1, 8, 8), np.float32)
    with pytest.raises(ShapeError, match=message):
        cpu.copy_granules(arena, source, target)
    with pytest.raises(ShapeError, match="contiguous"):
        cpu.copy_granules(arena[..., ::2], [0], [1])


def test_described_operands_give_the_same_bits_as_arrays() -> None:
    case = Case([100, 9])
    arrays = case.variable()
    good, good_lse = case.run(arrays)
    out, lse = np.full_like(good, np.nan), np.full_like(good_lse, np.nan)
    cpu.attend(make_call(case.q, *arrays, case.lengths, out=out, lse=lse))
    assert np.array_equal(out, good)
    assert np.array_equal(lse, good_lse)


def test_work_offered_to_the_pool_runs_in_other_threads() -> None:
    seen: list[int] = []
    done = threading.Barrier(3)

    def work() -> None:
        done.wait(10)
        seen.append(threading.get_ident())
        done.wait(10)

    threads.run(work, 2)
    done.wait(10)
    done.wait(10)
    assert len(set(seen)) == 2
    assert threading.get_ident() not in seen


def test_a_call_returns_only_when_items_in_other_hands_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([100])
    arrays = case.variable()
    compiled, shared = kernel.run_items, []

    def one_item_is_taken(*arguments: Any) -> None:
        *_, counters, _ = arguments
        counters[0] += 1
        shared.append(counters)
        compiled(*arguments)

    monkeypatch.setattr(kernel, "run_items", one_item_is_taken)
    caller = threading.Thread(target=case.run, args=(arrays,))
    caller.start()
    caller.join(0.2)
    assert caller.is_alive()
    shared[0][1] += 1
    caller.join(10)
    assert not caller.is_alive()


@pytest.mark.parametrize(("text", "wanted"), [("3", 3), ("", len(os.sched_getaffinity(0)))])
def test_the_environment_sets_the_number_of_threads(text: str, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTOOLKIT_NUM_THREADS", text)
    assert threads._threads_from_environment() == wanted


@pytest.mark.parametrize("text", ["0", "-1", "many", "1" * 5000, "1.5"])
def test_a_number_of_threads_that_makes_no_sense_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTOOLKIT_NUM_THREADS", text)
    with pytest.raises(ConfigError, match="KVTOOLKIT_NUM_THREADS"):
        threads._threads_from_environment()
    for count in (0, True, 1.5, None):
        with pytest.raises(KVToolkitError, match="count"):
            cpu.set_num_threads(count)


GUARDED = """
import ctypes, mmap
import numpy as np
from kvtoolkit.attention.calls import append, merge_states
from tests.kvtoolkit.attention.attention_cases import Case

kept = []

def at_the_end_of_a_page(array):
    pages = -(-array.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    offset = pages * mmap.PAGESIZE - array.nbytes
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[:] = array
    return copy

def run(dtype, head_dim):
    case = Case([100, 70, 64], [1, 70, 3], head_dim=head_dim, dtype=dtype)
    arrays = case.variable((1,))
    # the last granule in memory must be in use for its end to be read
    last = int(arrays[2].max()) & 0xFFFFFF
    arrays = (arrays[0][: last + 1], arrays[1][: last + 1], *arrays[2:])
    case.q = at_the_end_of_a_page(case.q)
    case.lengths = at_the_end_of_a_page(case.lengths)
    case.cu_seqlens_q = at_the_end_of_a_page(case.cu_seqlens_q)
    case.check(tuple(map(at_the_end_of_a_page, arrays)))

for dtype in ("float32", "float16", "bfloat16"):
    for head_dim in (40, 64):
        run(dtype, head_dim)
new = at_the_end_of_a_page(np.ones((3, 2, 40), np.float32))
cache = at_the_end_of_a_page(np.zeros((2, 2, 8, 40), np.float32))
append(new, new, cache, cache.copy(), at_the_end_of_a_page(np.array([0, 15, -1])), layout="HND")
lse = at_the_end_of_a_page(np.zeros((3, 2), np.float32))
merge_states(new, lse, new, lse)
"""


def test_nothing_is_read_past_the_end_of_an_array() -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    finished = subprocess.run(
        [sys.executable, "-c", GUARDED], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr


PORTABLE = """
from kvtoolkit.cpu import vector
from tests.kvtoolkit.attention.attention_cases import Case
assert not vector.HAS_WIDE
for dtype in ("float32", "float16", "bfloat16"):
    case = Case([130, 0, 70], [1, 0, 30], head_dim=40, dtype=dtype)
    case.check(case.variable(), softcap=20.0)
"""


def test_a_machine_without_wide_registers_or_half_instructions_agrees_with_the_reference() -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "PYTHONPATH": str(root)}
    finished = subprocess.run(
        [sys.executable, "-c", PORTABLE], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr


def test_attention_never_imports_torch() -> None:
    root = Path(__file__).parents[3]
    program = "import sys, kvtoolkit.attention.calls, kvtoolkit.reference; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(root)}, check=True, timeout=60)
