"""Damaged arguments of every public call are refused or harmless: no crash, no other error, nothing written."""

import subprocess
import sys
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvtoolkit import CacheConfig, KVCache, ShapeError, UnsupportedError, append, paged_attention  # noqa: E402
from kvtoolkit.cpu import copy_granules  # noqa: E402
from kvtoolkit.integrations.flash_attn.calls import flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: E402
from tests.kvtoolkit import bad_input  # noqa: E402
from tests.kvtoolkit.attention.attention_cases import Case  # noqa: E402
from tests.kvtoolkit.attention.bad_input_calls import CALLS, Call, with_tensors  # noqa: E402

OF_TENSORS = [call for call in CALLS if not call.numpy_only]
KERNELS = [call for call in OF_TENSORS if not call.name.startswith(("KVCache", "Format"))]


def in_child(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-3000:])
    return done.stdout


def test_random_damages_are_refused_or_do_no_harm():
    counts, findings = bad_input.run_cases(seed=20, first=0, num_cases=250)
    assert not findings
    assert sum(n for (_, outcome), n in counts.items() if outcome == "refused") > 125


def test_tensors_without_memory_are_refused_for_every_argument():
    assert "tensors refused" in in_child("tests.kvtoolkit.bad_input", "--memory")


def test_compiled_programs_give_what_they_give_as_they_are():
    printed = in_child("tests.kvtoolkit.attention.torch_compile_cases")
    assert printed.count("good") == 20, printed


@pytest.mark.parametrize("call", KERNELS, ids=lambda call: call.name)
def test_results_are_where_the_queries_are_whatever_the_default_device(call: Call):
    arguments, function = call.make()
    good = function(**with_tensors(arguments))
    new = with_tensors(arguments)
    with torch.device("meta"):
        made = function(**new)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (made, good)), strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("call", KERNELS, ids=lambda call: call.name)
def test_autocast_changes_nothing(call: Call):
    arguments, function = call.make()
    good = function(**with_tensors(arguments))
    with torch.autocast("cpu", torch.bfloat16):
        made = function(**with_tensors(arguments))
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (made, good)), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_a_dtype_that_autocast_changed_is_refused_with_the_reason():
    case = Case([20, 9])
    q, *others = map(torch.from_numpy, (case.q, *case.paged(8, "NHD"), case.lengths))
    cache = KVCache(CacheConfig(num_layers=1, num_kv_heads=2, head_dim=32, dtype="float32", num_tokens=64))
    new = torch.zeros(1, 2, 32)
    with torch.autocast("cpu", torch.bfloat16), cache.begin_step(cache.open([[1]])[0], 1) as step:
        with pytest.raises(ShapeError, match="bfloat16.*torch.autocast is on"):
            paged_attention(q @ torch.eye(32), *others)
        with pytest.raises(ShapeError, match="got .* bfloat16; torch.autocast is on"):
            step.append(0, new @ torch.eye(32), new)
        with pytest.raises(ShapeError, match="got .* bfloat16; torch.autocast is on"):
            step.attend(0, new @ torch.eye(32))


CACHED = ("k_cache", "v_cache")


@pytest.mark.parametrize("call", KERNELS, ids=lambda call: call.name)
def test_autograd_learns_what_a_call_wrote(call: Call):
    arguments, function = call.make()
    arguments = with_tensors(arguments)
    written = CACHED if "k" in arguments and "k_cache" in arguments else call.written
    versions = {name: x._version for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    function(**arguments)
    assert {name for name, version in versions.items() if arguments[name]._version != version} == set(written)


def test_a_backward_pass_over_an_appended_cache_raises():
    k_cache, weight = torch.zeros(2, 8, 2, 16), torch.ones(2, 8, 2, 16, requires_grad=True)
    product = (k_cache * weight).sum()
    append(torch.ones(1, 2, 16), torch.ones(1, 2, 16), k_cache, k_cache.clone(), torch.tensor([3]), layout="NHD")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# -- arrays to write to ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_torch", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("call", [call for call in KERNELS if call.written], ids=lambda call: call.name)
def test_memory_of_other_arguments_is_not_written_to(call: Call, use_torch: bool):
    tried = 0
    for name in call.written:
        for other in call.make()[0]:
            arguments, function = call.make()
            x, y = arguments[name], arguments[other]
            if other == name or not isinstance(y, np.ndarray) or x.dtype != y.dtype:
                continue
            if call.name.startswith("Step") and other != "q":  # keys and values have been stored by then
                continue
            both = np.zeros(x.size + y.size, x.dtype)
            both[x.size // 2 : x.size // 2 + y.size] = y.reshape(-1)
            arguments[other] = both[x.size // 2 : x.size // 2 + y.size].reshape(y.shape)
            arguments[name] = both[: x.size].reshape(x.shape)
            if use_torch:
                memory = torch.from_numpy(both)
                arguments = {n: torch.from_numpy(z) if isinstance(z, np.ndarray) else z for n, z in arguments.items()}
                assert memory.data_ptr() == arguments[name].data_ptr()
            before = both.copy()
            with pytest.raises(UnsupportedError, match="memory of its own"):
                function(**arguments)
            assert both.tobytes() == before.tobytes()
            tried += 1
    assert tried


def test_outputs_that_overlap_themselves_are_refused():
    arguments, function = CALLS[0].make()
    shape = arguments["out"].shape
    for strides in ((0, 128, 4), (64, 128, 4), (4, 8, 4)):
        overlapping = np.lib.stride_tricks.as_strided(np.zeros(5000, np.float32), shape, strides)
        for out in (overlapping, torch.from_numpy(overlapping)):
            with pytest.raises(UnsupportedError, match="out: expected every element in a place of its own"):
                function(**arguments | {"q": torch.from_numpy(arguments["q"]), "out": out})


def test_interleaved_arrays_and_a_result_in_place_are_no_overlap():
    case = Case([20, 9])
    k_cache, v_cache, *tables = case.paged(8, "NHD")
    good = paged_attention(case.q, k_cache, v_cache, *tables, case.lengths)
    both = np.concatenate([case.q, np.zeros_like(case.q)], axis=-1)  # as in a fused projection
    q, out = both[..., :32], both[..., 32:]
    pairs = np.stack([k_cache, v_cache], axis=1)  # keys and values of each block side by side
    assert np.array_equal(paged_attention(q, pairs[:, 0], pairs[:, 1], *tables, case.lengths, out=out), good)
    append(np.ones((1, 2, 32), np.float32), np.ones((1, 2, 32), np.float32), pairs[:, 0], pairs[:, 1],
           np.array([3]), layout="NHD")  # fmt: skip
    paged_attention(q, k_cache, v_cache, *tables, case.lengths, out=q)
    assert np.array_equal(q, good)


def test_layers_of_a_step_do_not_write_to_the_cache_or_half_of_their_queries():
    cache = KVCache(CacheConfig(num_layers=3, num_kv_heads=2, head_dim=32, dtype="float32", num_tokens=64))
    with cache.begin_step(cache.open([[1, 2]])[0], 2) as step:
        new, q = np.ones((2, 2, 32), np.float32), np.ones((4, 6, 32), np.float32)
        for layer in range(2):  # the first plans, others take the short way
            step.append(layer, new, new)
            good = step.attend(layer, q[:2].copy(), out=np.zeros_like(q[:2]))
            inside = cache.key_cache(layer).reshape(-1)[: q[:2].size].reshape(q[:2].shape)
            with pytest.raises(UnsupportedError, match="out: expected memory of its own, got some that k_cache uses"):
                step.attend(layer, q[:2], out=inside)
            with pytest.raises(UnsupportedError, match="key: expected memory of its own"):
                step.append(layer, inside[:, :2], new)
            with pytest.raises(UnsupportedError, match="out: expected memory of its own, got some that q uses"):
                step.attend(layer, q[:2], out=q[1:3])
            assert np.array_equal(step.attend(layer, q[:2], out=q[:2]), good)
            q[:] = 1.0


# -- indices -----------------------------------------------------------------------------------------------------------


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("bounds", [(0, 20, 30), (0, 20, 2**31 - 1), (0, 30, 29), (-1, 20, 29), (20, 9, 29)])
def test_bounds_of_keys_are_within_the_keys(bounds: tuple[int, ...]):
    q, keys = torch.zeros(2, 6, 32), torch.zeros(29, 2, 32)
    with pytest.raises(ShapeError, match="cu_seqlens_k: expected to ascend from 0 to at most 29"):
        flash_attn_varlen_func(q, keys, keys, ints(0, 1, 2), ints(*bounds), 1, 2**31 - 1)


def test_rows_and_lengths_of_a_cache_without_a_table_are_within_it():
    q, cache, new = torch.zeros(2, 1, 6, 32), torch.zeros(4, 24, 2, 32), torch.ones(2, 1, 2, 32)
    for rows in (ints(0, 4), ints(-1, 0)):
        with pytest.raises(ShapeError, match="cache_batch_idx: expected 0 to 3"):
            flash_attn_with_kvcache(q, cache, cache, cache_seqlens=ints(3, 3), cache_batch_idx=rows)
    flash_attn_with_kvcache(q, cache, cache, cache_seqlens=ints(3, 0), cache_batch_idx=ints(1, -1))  # a padding row
    for lengths in (ints(-1, 3), ints(25, 3)):
        for k in (None, new):
            with pytest.raises(ShapeError, match="cache_seqlens: expected 0 to "):
                flash_attn_with_kvcache(q, cache, cache.clone(), k, k, cache_seqlens=lengths)
    assert not cache.any()


@pytest.mark.parametrize("indices", [[0.0], [True], ["0"], [[0], [1, 2]], np.array([2**64 - 1], np.uint64)])
def test_copies_of_granules_take_integers(indices):
    arena = np.zeros((3, 1, 8, 8), np.float32)
    with pytest.raises(ShapeError):
        copy_granules(arena, indices, [0])
    with pytest.raises(ShapeError):
        copy_granules(arena, [0], indices)


def test_copies_of_granules_refuse_arenas_that_bytes_do_not_copy():
    arena = np.zeros((3, 1, 8, 8), np.float32)
    with pytest.raises(UnsupportedError, match="object"):
        copy_granules(arena.astype(object), [0], [1])
    with pytest.raises(UnsupportedError, match="references"):
        copy_granules(np.zeros((3, 1, 8, 8), [("a", "f4"), ("b", "O")]), [0], [1])
    with pytest.raises(UnsupportedError, match="place of its own"):
        copy_granules(np.lib.stride_tricks.as_strided(arena, (3, 1, 8, 8), (4, 256, 32, 4)), [0], [1])
    with pytest.raises(ShapeError, match="writable"):
        copy_granules(np.frombuffer(arena.tobytes(), np.float32).reshape(arena.shape), [0], [1])
    with pytest.raises(ShapeError, match="NumPy arrays"):
        copy_granules([arena, None], [0], [1])


def test_the_arrays_of_a_step_are_read_only_and_serve_it_without_a_warning():
    cache = KVCache(CacheConfig(num_layers=2, num_kv_heads=2, head_dim=32, dtype="float32", num_tokens=64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with cache.begin_step(cache.open([[1, 2]])[0], 2) as step:
            names = ("seq_ids", "status", "num_new_tokens", "block_table", "block_starts", "seq_lens", "cu_seqlens_q",
                     "slot_mapping")  # fmt: skip
            for name in names:
                with pytest.raises(ValueError, match="read-only"):
                    getattr(step, name)[...] = 1
            for layer in range(2):
                step.append(layer, torch.ones(2, 2, 32), torch.ones(2, 2, 32))
                step.attend(layer, torch.ones(2, 6, 32))
            cache.end_step(step)
    assert cache.lengths([int(step.seq_ids[0])]).tolist() == [2]
