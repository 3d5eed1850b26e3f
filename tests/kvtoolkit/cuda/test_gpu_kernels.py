"""The other GPU kernels - append, merge, moves, the check of tables - against NumPy, and their refusals."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtoolkit import ShapeError, reference
from kvtoolkit.attention.calls import append, merge_states
from tests.kvtoolkit.attention.gpu_cases import to_device, to_host

pytestmark = pytest.mark.gpu

BACKENDS = ("cuda", "numba")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("layout", "block_size"), [("HND", 8), ("NHD", 16), ("NHD", 5)])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 128, 256])
def test_appended_tokens_lie_in_their_slots_and_the_rest_is_untouched(layout, block_size, head_dim, dtype, backend):
    if backend == "numba" and dtype == "float32":
        pytest.skip("the twins take what the attention kernels take")
    rng = np.random.default_rng(0)
    words = {"float32": np.uint32}.get(dtype, np.uint16)
    shape = (9, 3, block_size, head_dim) if layout == "HND" else (9, block_size, 3, head_dim)
    caches = rng.integers(0, 60000, (2, *shape)).astype(words)
    new = rng.integers(0, 60000, (2, 21, 3, head_dim)).astype(words)
    slots = rng.permutation(9 * block_size)[:21]
    slots[[3, 20]] = -1
    wanted = caches.copy()
    reference.append(*new, *wanted, slots, layout=layout)

    import torch

    kind = getattr(torch, dtype)
    tensors = [torch.from_numpy(a.view(a.dtype.str.replace("u", "i"))).cuda().view(kind) for a in (*new, *caches)]
    append(*tensors, to_device(slots, ""), layout=layout, backend=backend)
    for tensor, good in zip(tensors[2:], wanted, strict=True):
        assert np.array_equal(tensor.view(torch.int16).cpu().numpy().view(words), good)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([16, 24, 64, 128]),
    offset=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_keys_at_any_alignment_are_appended(tokens, heads, head_dim, offset, seed):
    import torch

    rng = np.random.default_rng(seed)
    slots = rng.permutation(80)[:tokens]
    wide = torch.randn(tokens, 2 * heads + 1, head_dim + 10, device="cuda", dtype=torch.float16)
    key, value = wide[:, :heads, offset : offset + head_dim], wide[:, heads : 2 * heads, offset : offset + head_dim]
    k_cache, v_cache = torch.zeros(2, 10, heads, 8, head_dim, device="cuda", dtype=torch.float16)
    append(key, value, k_cache, v_cache, to_device(slots, ""), layout="HND")
    for new, cache in ((key, k_cache), (value, v_cache)):
        wanted = np.zeros(cache.shape, np.float16)
        wanted[slots // 8, :, slots % 8] = to_host(new)
        assert np.array_equal(to_host(cache), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_merged_states_are_the_attention_over_both(dtype, backend):
    import torch

    if backend == "numba" and dtype == "float32":
        pytest.skip("the twins take what the attention kernels take")

    kind = getattr(torch, dtype)
    out_a, out_b = (torch.randn(7, 5, 40, device="cuda").to(kind) for _ in range(2))
    lse_a, lse_b = (torch.randn(7, 5, device="cuda") * 3 for _ in range(2))
    lse_a[0], lse_b[0] = float("-inf"), float("-inf")
    lse_a[1], out_a[1] = float("-inf"), float("nan")  # an empty side may hold anything
    lse_b[2], out_b[2] = float("-inf"), float("nan")
    out, lse = merge_states(out_a, lse_a, out_b, lse_b, backend=backend)
    good, good_lse = reference.merge_states(
        *(array.double().cpu() if array.dim() == 3 else array.cpu().numpy() for array in (out_a, lse_a, out_b, lse_b))
    )
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(out.double().cpu().numpy(), good, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse.cpu().numpy(), good_lse, rtol=1e-6, atol=1e-6)
    assert (out[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 1, 7, 448, 1000])
def test_moved_granules_are_copies_and_the_rest_is_untouched(count, backend):
    import cupy

    from kvtoolkit import cuda, numba
    from kvtoolkit.cpu import Operand

    rng = np.random.default_rng(count)
    arena = rng.integers(0, 60000, (4, 2100, 2, 8, 24)).astype(np.uint16)
    chosen = rng.permutation(2100).astype(np.int32)
    src, dst = chosen[:count], chosen[1000 : 1000 + count]
    wanted = arena.copy()
    wanted[:, dst] = wanted[:, src]
    there = cupy.asarray(arena)
    strides = tuple(s // 2 for s in there.strides)
    described = Operand(there.data.ptr, there.shape, strides, "float16", there, True, 0)
    if backend == "cuda":
        cuda.copy_granules(described, src, dst)
    elif count:
        lists = [cupy.asarray(one) for one in (src, dst)]
        operands = [Operand(a.data.ptr, a.shape, (1,), "int32", a, True, 0) for a in lists]
        numba.copy_granules(described, *operands)
    assert np.array_equal(there.get(), wanted)


def test_moves_that_make_no_sense_are_refused():
    import cupy

    from kvtoolkit import cuda
    from kvtoolkit.cpu import Operand

    there = cupy.zeros((2, 10, 1, 8, 16), np.uint16)
    arena = Operand(there.data.ptr, there.shape, tuple(s // 2 for s in there.strides), "float16", there, True, 0)
    with pytest.raises(ShapeError, match=r"expected granules in \[0, 10\), got 0 to 10"):
        cuda.copy_granules(arena, [0], [10])
    with pytest.raises(ShapeError, match="as many granules as src, 1, got 2"):
        cuda.copy_granules(arena, [0], [1, 2])
    with pytest.raises(ShapeError, match="no granule in both"):
        cuda.copy_granules(arena, [0, 1], [1, 2])


CHECKED = """
import numpy as np, torch, pytest
from kvtoolkit import ShapeError, UnsupportedError, append, paged_attention, variable_block_attention

def put(values, dtype=np.int32):
    return torch.from_numpy(np.asarray(values, dtype)).cuda()

q = torch.zeros(2, 4, 32, device="cuda", dtype=torch.float16)
k = torch.zeros(10, 2, 8, 32, device="cuda", dtype=torch.float16)
entries, starts = [[0 | 1 << 24, 4, -1], [5, 6, -1]], [[0, 2, -1], [0, 1, -1]]

def variable(entries=entries, starts=starts, seq_lens=(20, 9), **options):
    variable_block_attention(q, k, k, put(entries), put(starts), put(seq_lens), **options)

variable()
for wrong, message in [
    (dict(seq_lens=(20, -3)), "seq_lens: expected lengths from 0 on, got -3 in row 1"),
    (dict(seq_lens=(20, 17)), "seq_lens: row 1 holds 17 tokens, more than its block_table covers"),
    (dict(starts=[[0, 3, -1], [0, 1, -1]]), "block_starts: .*entry 1 of row 0 does not"),
    (dict(entries=[[1 << 24, 4, -1], [5, 10, -1]]), r"block_table: .* within \\[0, 10\\), got 10 in row 1"),
    (dict(cu_seqlens_q=put([0, 2, 1])), "cu_seqlens_q: expected to ascend from 0 to num_tokens = 2, got 1 at index 2"),
    (dict(cu_seqlens_q=put([0, 1, 3])), "cu_seqlens_q: expected to ascend from 0 to num_tokens = 2, got 3"),
    (dict(cu_seqlens_q=put([1, 1, 2])), "cu_seqlens_q: expected to ascend from 0 to num_tokens = 2, got 1 at index 0"),
]:
    with pytest.raises(ShapeError, match=message):
        variable(**wrong)
with pytest.raises(UnsupportedError, match="hot tier, entry 1 of row 0"):
    variable(entries=[[1 << 24, 4 | 1 << 27, -1], [5, 6, -1]])
with pytest.raises(ShapeError, match=r"blocks within \\[0, 10\\), got 11 in row 0"):
    paged_attention(q, k, k, put([[1, 11], [2, 3]]), put([9, 9]), layout="HND")
with pytest.raises(ShapeError, match="row 0 holds 17 tokens"):
    paged_attention(q, k, k, put([[1, 4], [2, 3]]), put([17, 9]), layout="HND")
new = torch.ones(2, 2, 32, device="cuda", dtype=torch.float16)
for slots in ([3, 80], [3, -2]):
    with pytest.raises(ShapeError, match=rf"slots within \\[0, 80\\) or -1, got {slots[1]} for token 1"):
        append(new, new, k, k.clone(), put(slots, np.int64), layout="HND")
assert not k.any()

from kvtoolkit import TierCaches, tiered_attention
from kvtoolkit.formats.quantized import INT8

hot = torch.zeros(10, 2, 8, 64, device="cuda", dtype=torch.float16)
warm = torch.zeros(3, 2, INT8.nbytes(64), device="cuda", dtype=torch.uint8)


def tiered(entries, starts=(0, 8)):
    caches = TierCaches(hot, hot, warm, None, (0, 16, 0))
    queries = torch.ones(1, 2, 64, device="cuda", dtype=torch.float16)
    return tiered_attention(queries, caches, put([entries]), put([starts]), put([70]))


def in_tier(granule, length=8, tier=1):
    return granule | (length - 1) << 24 | tier << 27


tiered([in_tier(16), 3])
for entries, starts, message in [
    ([in_tier(40), 3], (0, 8), "entry 0 of row 0 begins before it or ends after it"),
    ([in_tier(8), 3], (0, 8), "entry 0 of row 0 begins before it"),
    ([1 | 7 << 24, in_tier(20)], (0, 8), "8 granules at multiples of 8, .* entry 1 of row 0 is not"),
    ([in_tier(16, 4), 3], (0, 4), "8 granules at multiples of 8, .* entry 0 of row 0 is not"),
    ([3, in_tier(16)], (0, 1), "8 granules at multiples of 8, .* entry 1 of row 0 is not"),
    ([in_tier(16, tier=2), 3], (0, 8), "entry 0 of row 0 is in none of them"),
    ([in_tier(16), 10], (0, 8), "entry 1 of row 0 begins before it or ends after it"),
]:
    with pytest.raises(ShapeError, match=message):
        tiered(entries, starts)
"""


def test_with_the_check_on_a_wrong_table_is_named_before_the_launch():
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "KVTOOLKIT_CHECK": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", CHECKED], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
