"""The Numba kernels in Numba's CUDA simulator, against the float64 reference: their arithmetic, not their races.

The simulator must be chosen before Numba is imported, so the tests of `TestInSimulator` run in a pytest of their own:
``NUMBA_ENABLE_CUDASIM=1 pytest tests/kvtoolkit/numba/test_numba_sim.py::TestInSimulator`` by hand. It takes 0.1 s for
each query token and kv head, so there are few of them.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtoolkit import backends, reference
from kvtoolkit import numba as twins
from kvtoolkit.arrays.call import attention_call, heads_first
from kvtoolkit.cpu import Operand, operand
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.formats.quantized import FORMATS
from kvtoolkit.formats.tier_caches import TierCaches
from tests.kvtoolkit.attention import tiered_cases
from tests.kvtoolkit.attention.attention_cases import Case, assert_close, make_call, nan_filled, to_storage
from tests.kvtoolkit.attention.tiered_cases import TieredCase

ROOT = Path(__file__).resolve().parents[3]
SLOPES = np.array([0.5, 0.25, 0.0], np.float32)
SINKS = np.array([-2.0, 30.0, -np.inf], np.float32)
DTYPES = ("float16", "bfloat16")


def run(*command: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_twins_pass_in_the_simulator() -> None:
    run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{Path(__file__).relative_to(ROOT)}::TestInSimulator",
        NUMBA_ENABLE_CUDASIM="1",
    )  # fmt: skip


def test_importing_the_twins_leaves_cuda_alone() -> None:
    run("-c", "import sys, kvtoolkit.numba; assert not any(name.startswith('numba.cuda') for name in sys.modules)")


def described(array: Any, dtype: str) -> Any:
    """An array as an `Operand`, its 16-bit words read as ``dtype``; anything else as it is."""
    return operand(array, "array", dtype) if isinstance(array, np.ndarray) else array


def attend(case: Case, arrays: tuple[np.ndarray, ...], layout: str = "HND", **options: Any) -> None:
    """The twin agrees with the reference; three ``arrays`` are a paged cache, four hold entries."""
    k_cache, v_cache, table, starts = arrays if len(arrays) == 4 else (*arrays, None)
    out, lse = run_twin(case, k_cache, v_cache, table, starts, layout=layout, **options)
    assert_close(out, lse, *case.expected(arrays, layout, **options), case.dtype)


def attend_tiers(case: TieredCase, **options: Any) -> None:
    """Over tiers, the results agree, and so do the masses."""
    arrays = case.tiered()
    caches, table, starts = arrays
    masses = case.no_masses(arrays)
    out, lse = run_twin(
        case, caches.k_cache, caches.v_cache, table, starts, tiers=tiered_cases.described(caches), block_mass=masses,
        **options,
    )  # fmt: skip
    assert_close(out, lse, *case.expected(arrays, **options), case.dtype)
    case.check_masses(arrays, masses, **options)


def run_twin(case: Case, *cache: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """``out, lse``, written over NaN; ``cache`` is the caches and the tables."""
    out, lse = nan_filled(case.q.shape, case.dtype), np.full(case.q.shape[:2], np.nan, np.float32)
    call = make_call(
        case.q, *cache, case.lengths, out=out, lse=lse, cu_seqlens_q=case.cu_seqlens_q, dtype=case.dtype, **options
    )
    twins.attend(call)
    return out, lse


class TestInSimulator:
    __test__ = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

    def test_a_launch_is_logged_by_the_names_of_its_kernel(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kvtoolkit.numba import device

        assert device.launch is device._launch  # without the variable nothing is added
        monkeypatch.setattr(device, "launch", device._log_and_launch)
        key, cache, slots = np.ones((2, 1, 16), np.float16), np.zeros((4, 1, 8, 16), np.float16), np.array([3, 9])
        with caplog.at_level("INFO", "kvtoolkit"):
            twins.append(*(operand(one, "array") for one in (key, key, cache, cache.copy(), slots)), stream=0)
        (message,) = (record.getMessage() for record in caplog.records)
        assert message.startswith(f"append grid=2 block=4 stream=0x0 key={key.ctypes.data:#x}[2, 1, 16] value=")
        assert message.endswith(f"slot_mapping={slots.ctypes.data:#x}[2]")
        assert cache[0, 0, 3].all()

    @pytest.mark.parametrize(("dtype", "layout"), [("float16", "NHD"), ("bfloat16", "HND")])
    def test_decode_over_paged_blocks(self, dtype: str, layout: str) -> None:
        case = Case([65, 0, 5], num_q_heads=4, head_dim=8, dtype=dtype)
        attend(case, case.paged(5, layout), layout)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_decode_over_variable_blocks(self, dtype: str) -> None:
        case = Case([130, 9], num_q_heads=3, num_kv_heads=1, head_dim=8, dtype=dtype)
        attend(case, case.variable())

    def test_rows_of_many_queries_with_sinks_and_slopes(self) -> None:
        # a padding row that has a query, and queries before position 0
        case = Case([66, 0, 2], [2, 1, 3], num_q_heads=3, num_kv_heads=1, head_dim=8, dtype="bfloat16")
        attend(case, case.variable(), sinks=SINKS, alibi_slopes=SLOPES)

    def test_an_acausal_window_and_a_softcap(self) -> None:
        case = Case([90, 0, 70], [1, 0, 1], num_q_heads=3, num_kv_heads=1, head_dim=8, dtype="float16")
        options = {"causal": False, "window_size": (20, 5), "softcap": 5.0, "softmax_scale": 0.1, "num_splits": 3}
        attend(case, case.paged(16, "HND"), **options)

    def test_a_row_whose_past_is_gone(self) -> None:
        case = Case([90, 0, 70], [1, 0, 2], num_q_heads=3, num_kv_heads=1, head_dim=8, dtype="float16")
        arrays = case.variable((1, 2))
        whole = run_twin(case, *arrays, window_size=(20, 0))
        k_cache, v_cache, table, starts = arrays
        for row, length in ((0, 89), (2, 68)):  # before its new tokens
            first = (length - 20) // 8
            gone = np.count_nonzero((starts[row] >= 0) & (starts[row] + (table[row] >> 24 & 7) < first))
            assert gone > 0
            for entry in table[row, :gone].tolist():
                for cache in (k_cache, v_cache):
                    cache[entry & 0xFFFFFF : (entry & 0xFFFFFF) + (entry >> 24 & 7) + 1] = np.nan
            for array in (table, starts):
                array[row] = [*array[row, gone:], *[-1] * gone]
        for found, expected in zip(run_twin(case, *arrays, window_size=(20, 0)), whole, strict=True):
            np.testing.assert_array_equal(found, expected)

    def test_a_group_of_more_heads_than_a_cta_takes(self) -> None:
        case = Case([9], num_q_heads=10, num_kv_heads=1, head_dim=8, dtype="float16")
        attend(case, case.variable())

    def test_the_output_may_be_the_queries(self) -> None:
        case = Case([9], num_q_heads=2, num_kv_heads=1, head_dim=8, dtype="float16")
        arrays = case.paged(4, "HND")
        expected, lse = case.expected(arrays, "HND")
        twins.attend(make_call(case.q, *arrays, None, case.lengths, out=case.q))
        assert_close(case.q, lse, expected, lse, "float16")

    def test_a_prepared_call_runs_on_other_arrays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "using", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(backends, "current_stream", lambda *device: 0)
        numba = backends.BACKENDS["numba"]
        first, second = (
            TieredCase([70], num_q_heads=2, num_kv_heads=1, dtype="float16", patterns=["hc"], seed=seed)
            for seed in (0, 1)
        )
        second.rng = np.random.default_rng(7)
        first.rng = np.random.default_rng(7)  # other tokens in the same places
        arrays, others = first.tiered(), second.tiered()
        assert np.array_equal(arrays[1], others[1])
        masses, other_masses = first.no_masses(arrays), second.no_masses(others)
        call = make_call(
            first.q, *arrays[0][:2], *arrays[1:], first.lengths, out=np.empty_like(first.q),
            tiers=tiered_cases.described(arrays[0]), block_mass=masses,
        )  # fmt: skip
        prepared = numba.attend(call)
        out = nan_filled(second.q.shape, "float16")
        places = [operand(array, "array").address for array in (second.q, *others[0][:2], out)]
        warm, cold = (operand(blocks, "blocks").address for blocks in others[0][2:4])
        block_mass = operand(other_masses, "masses").address
        numba.attend_prepared(prepared, *places, warm=warm, cold=cold, block_mass=block_mass)
        good, good_lse = second.expected(others)
        assert_close(out, good_lse, good, good_lse, "float16")
        second.check_masses(others, other_masses)

    def test_a_prepared_append_writes_other_arrays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "using", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(backends, "current_stream", lambda *device: 0)
        numba = backends.BACKENDS["numba"]
        new, cache = np.ones((2, 2, 8), np.float16), np.zeros((3, 2, 5, 8), np.float16)
        slots = operand(np.array([4, 12]), "slots")
        arrays = [operand(array, "array") for array in (new, new, cache.copy(), cache.copy())]
        prepared = numba.append(*arrays, slots)
        key, value, k_cache, v_cache = 2 * new, 3 * new, cache.copy(), cache.copy()
        addresses = [operand(array, "array").address for array in (key, value, k_cache, v_cache)]
        numba.append_prepared(prepared, *addresses)
        for found, number in ((k_cache, 2), (v_cache, 3)):
            wanted = cache.copy()
            wanted[0, :, 4], wanted[2, :, 2] = number, number
            assert np.array_equal(found, wanted)

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_every_element_of_a_block_is_that_of_the_judge(self, head_dim: int) -> None:
        from kvtoolkit.numba import quantized

        keys, values = np.random.default_rng(0).standard_normal((2, 64, head_dim)).astype(np.float32)
        readers = {
            "int8": (quantized.warm_key, quantized.warm_value),
            "int4": (quantized.cold_key, quantized.cold_value),
        }
        for name, pair in readers.items():
            block = FORMATS[name].encode(keys, values)
            for read, good in zip(pair, FORMATS[name].decode(block, head_dim), strict=True):
                found = [[read(block, token, dim, head_dim) for dim in range(head_dim)] for token in range(64)]
                np.testing.assert_array_equal(np.array(found), good)

    @pytest.mark.parametrize(
        ("dtype", "seq_len", "pattern"),
        [("float16", 150, "hwc"), ("bfloat16", 130, "wch"), ("float16", 70, "cw"), ("float16", 66, "hh")],
    )
    def test_decode_over_tiers(self, dtype: str, seq_len: int, pattern: str) -> None:
        attend_tiers(TieredCase([seq_len], num_q_heads=2, num_kv_heads=1, dtype=dtype, patterns=[pattern]))

    def test_rows_of_many_queries_over_tiers_with_every_option(self) -> None:
        # a padding row, a row without queries, and two kv heads
        case = TieredCase([68, 0, 9, 5], [2, 1, 0, 1], num_q_heads=2, dtype="float16", patterns=["cw", "", "h", "w"])
        options = {"causal": False, "window_size": (30, 1), "softcap": 5.0, "softmax_scale": 0.1}
        attend_tiers(case, sinks=SINKS[:2], alibi_slopes=SLOPES[:2], **options)

    def test_masses_of_a_group_of_more_heads_than_a_cta_takes_where_the_output_is_the_queries(self) -> None:
        case = TieredCase([70], num_q_heads=10, num_kv_heads=1, dtype="float16", patterns=["hh"])
        arrays = case.tiered()
        caches, table, starts = arrays
        queries, masses = case.q.copy(), case.no_masses(arrays)
        call = make_call(
            queries, *caches[:2], table, starts, case.lengths, out=queries, tiers=tiered_cases.described(caches),
            block_mass=masses,
        )  # fmt: skip
        twins.attend(call)
        expected, lse = case.expected(arrays)
        assert_close(queries, lse, expected, lse, "float16")
        case.check_masses(arrays, masses)

    def test_masses_over_variable_blocks(self) -> None:
        case = Case([130, 0, 9], num_q_heads=2, head_dim=8, dtype="float16")
        k_cache, v_cache, table, starts = case.variable()
        masses = np.full((3, table.shape[1], 2), np.nan, np.float32)
        run_twin(case, k_cache, v_cache, table, starts, block_mass=masses)
        good = reference.tile_masses(case.q, TierCaches(k_cache, v_cache), table, starts, case.lengths)
        np.testing.assert_allclose(masses[:, : good.shape[1]], good, rtol=1e-3, atol=1e-6)
        assert (masses[:, good.shape[1] :] == 0).all()

    def test_tiers_that_a_cache_does_not_have_are_not_read(self) -> None:
        case = TieredCase([9], num_q_heads=2, num_kv_heads=1, dtype="float16", patterns=["h"])
        caches, table, starts = case.tiered()
        arrays = caches._replace(warm=None, cold=None), table, starts
        tiers = tiered_cases.described(arrays[0])
        out, lse = run_twin(case, caches.k_cache, caches.v_cache, table, starts, tiers=tiers)
        assert_close(out, lse, *case.expected(arrays), case.dtype)

    @pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 8), ("float16", 264)])
    def test_what_has_no_kernel_is_refused(self, dtype: str, head_dim: int) -> None:
        case = Case([1], head_dim=head_dim, dtype=dtype)
        with pytest.raises(UnsupportedError, match="Numba kernel"):
            attend(case, case.variable())

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # inf - inf, where a query sees it
    def test_what_a_query_does_not_see_does_not_reach_it(self) -> None:
        from tests.kvtoolkit.attention import unseen_cases

        def make() -> Case:
            return Case([67], [3], num_q_heads=1, num_kv_heads=1, head_dim=8, dtype="float16")

        def run_case(case: Case, arrays: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
            return run_twin(case, *arrays, **options)

        assert unseen_cases.check(make, Case.variable, run_case, window_size=(20, 0)) == 8

    @pytest.mark.parametrize("layout", ["NHD", "HND"])
    def test_append_writes_named_slots_and_nothing_else(self, layout: str) -> None:
        rng = np.random.default_rng(0)
        key, value = rng.standard_normal((2, 4, 2, 8)).astype(np.float16)
        shape = (3, 5, 2, 8) if layout == "NHD" else (3, 2, 5, 8)
        caches = rng.standard_normal((2, *shape)).astype(np.float16)
        slots = np.array([14, -1, 0, 7], np.int64)
        expected = caches.copy()
        reference.append(key, value, *expected, slots, layout=layout)
        new_keys, new_values, *both, where = (operand(array, "array") for array in (key, value, *caches, slots))
        twins.append(new_keys, new_values, *(heads_first(cache, layout) for cache in both), where)
        np.testing.assert_array_equal(caches, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_merged_states_are_those_of_both_sides(self, dtype: str) -> None:
        rng = np.random.default_rng(0)
        sides = [to_storage(rng.standard_normal((4, 2, 8)), dtype) for _ in "ab"]
        lses = [(40 * rng.standard_normal((4, 2))).astype(np.float32) for _ in "ab"]
        for side, empty in ((0, [1, 3]), (1, [2, 3])):
            lses[side][empty] = -np.inf
            sides[side][empty] = nan_filled((2, 2, 8), dtype)  # never to be read
        out, lse = nan_filled((4, 2, 8), dtype), np.full((4, 2), np.nan, np.float32)
        good = reference.merge_states(
            reference.to_float64(sides[0], dtype), lses[0], reference.to_float64(sides[1], dtype), lses[1]
        )
        operands = [described(array, dtype) for array in (out, lse, sides[0], lses[0], sides[1], lses[1])]
        twins.merge_states(*operands)
        assert_close(out, lse, *good, dtype)
        twins.merge_states(*operands[2:4], *operands[2:])  # in place
        assert_close(sides[0], lses[0], *good, dtype)

    def test_granules_are_copied_in_every_layer(self) -> None:
        storage = np.random.default_rng(0).standard_normal((2, 7, 2, 8, 4)).astype(np.float16)
        arena = storage[:, 1:6]  # layers do not touch
        moves = np.array([[4, 0], [1, 3]], np.int32)
        expected = storage.copy()
        expected[:, 1:6][:, moves[1]] = arena[:, moves[0]]
        twins.copy_granules(*[operand(array, "array") for array in (arena, *moves)])
        np.testing.assert_array_equal(storage, expected)

    def test_no_tokens_and_no_moves_are_no_work(self) -> None:
        none = operand(np.zeros((0, 2, 8), np.float16), "key")
        cache = operand(np.zeros((1, 2, 8, 8), np.float16), "cache")
        twins.append(none, none, cache, cache, operand(np.zeros(0, np.int64), "slots"))
        table, lengths = operand(np.zeros((0, 1), np.int32), "table"), operand(np.zeros(0, np.int32), "seq_lens")
        twins.attend(attention_call(none, cache, cache, table, None, lengths, out=none))
        twins.copy_granules(Operand(0, (2, 3, 2, 8, 8), (384, 128, 64, 8, 1), "float16", None), lengths, lengths)

    def test_bfloat16_rounds_to_nearest_even(self) -> None:
        from kvtoolkit.numba.device import narrow, widen

        # exact; two ties; just off a tie; the largest float32; infinities
        floats = np.array(
            [-1.5, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4028234e38, np.inf, -np.inf], np.float32
        )
        words = [narrow(value, True) for value in floats]
        assert words == [0xBFC0, 0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7F80, 0xFF80]
        assert [widen(word, True) for word in words[:3]] == [-1.5, 1.0, 1.015625]
        assert np.isnan(widen(narrow(np.uint32(0x7F800001).view(np.float32), True), True))
