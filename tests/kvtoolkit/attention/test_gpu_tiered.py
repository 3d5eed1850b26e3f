"""The tiered kernel on a GPU against the float64 reference, its masses, and conversions to the bit."""

import itertools

import numpy as np
import pytest

from kvtoolkit import ShapeError, cuda, reference
from kvtoolkit.attention.calls import tiered_attention, variable_block_attention
from kvtoolkit.cuda import specs
from kvtoolkit.formats.quantized import INT4, INT8
from kvtoolkit.formats.tier_caches import TierCaches
from tests.kvtoolkit.attention.attention_cases import Case, nan_filled, to_storage
from tests.kvtoolkit.attention.gpu_cases import assert_close, to_device, to_host
from tests.kvtoolkit.attention.test_attention import SINKS, SLOPES
from tests.kvtoolkit.attention.tiered_cases import TieredArrays, TieredCase

pytestmark = pytest.mark.gpu

DTYPES = ("float16", "bfloat16")
HEAD_DIMS = (64, 128)

OPTIONS = [
    {},
    {"window_size": (100, -1)},
    {"window_size": (60, 2), "causal": False},
    {"causal": False},
    {"softcap": 30.0},
    {"sinks": SINKS},
    {"alibi_slopes": SLOPES},
    {"num_splits": 1},
    {"num_splits": 3},
    {"softmax_scale": 0.3},
    {"window_size": (200, 0), "softcap": 20.0, "sinks": SINKS, "alibi_slopes": SLOPES, "num_splits": 2},
]

SHORT = [(7 * i) % 200 for i in range(67)]
RAGGED = [5000, 64, 0, 3000, 1, 2000, 700, 300, 1500, 63, 4096, 65, 128, 2500, 900, 4000]


def run(case: TieredCase, arrays: TieredArrays, **options):
    """``out, lse`` of the GPU kernels, written over NaN."""
    caches, table, starts = arrays
    options.setdefault("cu_seqlens_q", case.cu_seqlens_q)
    for name in ("cu_seqlens_q", "sinks", "alibi_slopes"):
        if options.get(name) is not None:
            options[name] = to_device(options[name], "")
    on_device = TierCaches(
        to_device(caches.k_cache, case.dtype), to_device(caches.v_cache, case.dtype), to_device(caches.warm, ""),
        to_device(caches.cold, ""), caches.first_granules,
    )  # fmt: skip
    out = to_device(nan_filled(case.q.shape, case.dtype), case.dtype)
    result = tiered_attention(
        to_device(case.q, case.dtype), on_device, to_device(table, ""), to_device(starts, ""),
        to_device(case.lengths, ""), out=out, return_lse=True, **options,
    )  # fmt: skip
    assert result[0] is out
    return to_host(result[0]), to_host(result[1])


def check(case: TieredCase, **options) -> None:
    """The kernels agree with the reference on the same codes, for prompts on what these are in 16 bits."""
    arrays = case.tiered()
    out, lse = run(case, arrays, **options)
    good, good_lse = case.expected(arrays, **options)
    prompts = of_prompts(case, options)
    if not prompts.all():
        kept = ~prompts
        assert_close(out[kept], lse[kept], good[kept], good_lse[kept], case.dtype)
    if prompts.any():

        def rounding(x):
            with np.errstate(over="ignore"):  # a block that nobody uses may hold anything
                return reference.to_float64(to_storage(x, case.dtype), case.dtype)

        rounded, rounded_lse = case.expected(arrays, rounding=rounding, **options)
        # in bfloat16 what a code stands for is rounded twice, and keys are so large that scores are hundreds
        off = np.abs(rounded_lse - good_lse)[prompts & np.isfinite(good_lse).all(axis=1)].max(initial=0.0)
        slack = 6.0 if case.dtype == "bfloat16" else 2.0
        expected = rounded[prompts], rounded_lse[prompts]
        assert_close(out[prompts], lse[prompts], *expected, case.dtype, lse_tolerance=1e-4 + 3 * off, slack=slack)


def of_prompts(case: TieredCase, options) -> np.ndarray:
    """Which queries the prompt kernel has: where some row may have many, those of rows that decode leaves to it."""
    from kvtoolkit.runtime.kernels import arch_of

    counts = np.diff(case.cu_seqlens_q) if case.cu_seqlens_q is not None else np.ones(len(case.q), np.int32)
    group_size = case.num_q_heads // case.num_kv_heads
    most = len(case.q) if len(counts) > 1 else counts.max(initial=0)  # without a hint, a row may have all
    is_decode = case.cu_seqlens_q is None or most <= specs.decode_queries(case.head_dim, group_size, tiers=True)
    if is_decode or arch_of(0) != 90 or options.get("num_splits") or options.get("backend") == "numba":
        return np.zeros(len(case.q), bool)
    return np.repeat(counts > specs.queries_beside_prompts(group_size), counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("pattern", [None, "h", "w", "c"])
def test_decode_at_every_kind_of_length(pattern, head_dim, dtype):
    lengths = [1, 0, 7, 8, 63, 64, 65, 127, 128, 129, 1000, 4096]
    patterns = None if pattern is None else [pattern * -(-n // 64) for n in lengths]
    check(TieredCase(lengths, head_dim=head_dim, dtype=dtype, patterns=patterns))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_pattern_of_tiers_at_every_length(head_dim):
    patterns = ["".join(letters) for letters in itertools.product("hwc", repeat=3)]
    for last in (129, 150, 191, 192):
        check(TieredCase([last] * len(patterns), head_dim=head_dim, dtype="float16", patterns=patterns))
    lengths = list(range(1, 193))
    check(TieredCase(lengths, head_dim=head_dim, dtype="float16", seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("options", [{}, {"window_size": (60, 2), "causal": False}, {"sinks": SINKS, "softcap": 30.0}])
def test_the_numba_twin(options, head_dim, dtype):
    case = TieredCase([70, 0, 64, 130, 600], [4, 0, 8, 1, 3], head_dim=head_dim, dtype=dtype)
    check(case, backend="numba", **options)
    arrays = case.tiered()
    masses = to_device(case.no_masses(arrays), "")
    run(case, arrays, block_mass=masses, backend="numba", **options)
    case.check_masses(arrays, to_host(masses), **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_numba_twin_with_every_option(options):
    check(TieredCase([70, 0, 64, 130, 1000], [4, 0, 8, 1, 3], dtype="float16"), backend="numba", **options)


@pytest.mark.parametrize("pattern", ["h", "w", "c"])
def test_the_numba_twin_in_one_tier(pattern):
    lengths = [1, 0, 63, 64, 65, 1000]
    check(TieredCase(lengths, dtype="float16", patterns=[pattern * -(-n // 64) for n in lengths]), backend="numba")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("options", OPTIONS)
def test_verify_with_every_option(options, head_dim, dtype):
    check(TieredCase([70, 0, 64, 130, 1000], [4, 0, 8, 1, 3], head_dim=head_dim, dtype=dtype), **options)


@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_group_size(head_dim, group_size):
    # with one head to a group the cases' queries are large where their keys are: scores of hundreds
    options = {"softmax_scale": 1e-3} if group_size == 1 else {}
    for new in (None, [8, 1, 5]):
        check(TieredCase([70, 1, 300], new, num_q_heads=2 * group_size, head_dim=head_dim, dtype="float16"), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_over_tiers(dtype):
    check(TieredCase([300, 150, 0, 64], [100, 150, 0, 9], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("options", [one for one in OPTIONS if "num_splits" not in one] + [{"softmax_scale": -0.1}])
def test_prompts_with_every_option(options, head_dim, dtype):
    # parts of items, decode rows beside prompts, rows of every tier alone, and a length in the middle of a tile
    lengths, new = [1000, 0, 300, 64, 470, 130], [40, 0, 300, 1, 17, 2]
    check(TieredCase(lengths, new, head_dim=head_dim, dtype=dtype), **options)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("pattern", ["h", "w", "c", "hc", "cw", "wh", "ch"])
def test_prompts_where_a_tile_has_any_two_tiers(pattern, head_dim):
    lengths = [640, 193, 129, 64]
    patterns = [(pattern * 10)[: -(-n // 64)] for n in lengths]
    check(TieredCase(lengths, [30, 64, 100, 20], head_dim=head_dim, dtype="float16", patterns=patterns))


def test_codes_that_stand_for_nan_reach_only_the_queries_that_see_them():
    case = TieredCase([200, 200], [60, 60], head_dim=64, dtype="float16", patterns=["cccc", "wwww"])
    for row in range(2):
        case.values[row][150] = to_storage(np.full(case.values[row][150].shape, np.nan), case.dtype)
    out, _ = run(case, case.tiered())
    for row in range(2):
        first = case.cu_seqlens_q[row]
        found = np.isnan(out[first : first + 60]).any(axis=(1, 2))
        assert (found == (140 + np.arange(60) >= 150)).all()


def test_one_long_sequence_and_many():
    check(TieredCase([9000], dtype="float16"))
    check(TieredCase([9000], [5], head_dim=128, dtype="float16"))
    check(TieredCase([500, 9, 100] * 20, [1, 9, 8] * 20, dtype="float16"))


# 4087, 6700 and 10050 short sequences, the last more than a plan holds; ragged ones that fill late ranges
@pytest.mark.parametrize(("lengths", "copies"), [*((SHORT, n) for n in (61, 100, 150)), (RAGGED, 15)])
def test_large_batches(lengths, copies):
    case = TieredCase(lengths, head_dim=64, dtype="float16")
    arrays = case.tiered()
    masses = case.no_masses(arrays)
    out, lse = case.expected(arrays)
    many = TieredCase([], head_dim=64, dtype="float16")
    many.q, many.lengths = np.tile(case.q, (copies, 1, 1)), np.tile(case.lengths, copies)
    tables = tuple(np.tile(one, (copies, 1)) for one in arrays[1:])
    for has_masses in (False, True):
        on_device = to_device(np.tile(masses, (copies, 1, 1)), "")
        found, found_lse = run(many, (arrays[0], *tables), block_mass=on_device if has_masses else None)
        assert_close(found, found_lse, np.tile(out, (copies, 1, 1)), np.tile(lse, (copies, 1)), case.dtype)
        if has_masses:
            for of_copy in to_host(on_device).reshape(copies, *masses.shape):
                case.check_masses(arrays, of_copy)


@pytest.mark.parametrize("pattern", ["w", "c"])
def test_the_error_does_not_grow_with_the_length(pattern):
    for n in (64, 1024, 32768):
        check(TieredCase([n], num_q_heads=4, head_dim=128, dtype="float16", patterns=[pattern * (n // 64)]))


def test_weights_that_differ_by_far_more_than_a_half_can_hold():
    # one token of weight 1 in front of many that weigh as much only together: nothing may be flushed
    case = TieredCase([8192], num_q_heads=2, head_dim=128, dtype="float16", patterns=["c" * 64 + "w" * 64])
    case.keys[0][...] *= np.float16(0.01)
    case.keys[0][100] = case.q[0, :1] * np.float16(9 * 128**0.5 / np.square(case.q[0, 0].astype(np.float32)).sum())
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window_size": (300, -1)}, {"sinks": SINKS}, {"num_splits": 3}])
def test_masses_agree_with_the_reference_and_change_no_bit(options, dtype):
    several = [70, 0, 64, 130, 300, 3000]
    for lengths, new in ((several, [4, 0, 8, 1, 0, 3]), ([600], [300]), ([5000], None), ([200, 70, 0] * 50, None)):
        case = TieredCase(lengths, new, head_dim=128, dtype=dtype)
        arrays = case.tiered()
        plain = run(case, arrays, **options)
        masses = to_device(case.no_masses(arrays), "")
        with_mass = run(case, arrays, block_mass=masses, **options)
        kept = ~of_prompts(case, options)  # the kernel for prompts tells no masses
        for one, other in zip(plain, with_mass, strict=True):
            assert np.array_equal(one[kept].view(np.uint8), other[kept].view(np.uint8))
        found = to_host(masses)
        case.check_masses(arrays, found, **options)
        if "sinks" not in options:
            asked = np.array([n > 0 and (new is None or new[row] > 0) for row, n in enumerate(lengths)])
            np.testing.assert_allclose(found.sum(axis=1)[asked], 1.0, atol=1e-3)


@pytest.mark.parametrize("backend", ["cuda", "numba"])
@pytest.mark.parametrize("heads", [2, 8])  # from 8 on one sequence is shared by a cluster
@pytest.mark.parametrize(("lengths", "new"), [([70, 1000, 5000], None), ([70, 1000, 5000], [4, 1, 8]), ([3000], None)])
def test_masses_of_the_16_bit_kernel(lengths, new, heads, backend):
    case = Case(lengths, new, head_dim=64, dtype="float16", num_q_heads=3 * heads, num_kv_heads=heads)
    arrays = case.variable()
    k_cache, v_cache, table, starts = arrays
    devices = [to_device(k_cache, ""), to_device(v_cache, ""), to_device(table, ""), to_device(starts, "")]
    options = {"cu_seqlens_q": None if new is None else to_device(case.cu_seqlens_q, "")}
    options |= {"return_lse": True, "backend": backend}
    masses = to_device(np.full((len(lengths), table.shape[1], heads), np.nan, np.float32), "")
    q, seq_lens = to_device(case.q, ""), to_device(case.lengths, "")
    plain = variable_block_attention(q, *devices, seq_lens, **options)
    with_mass = variable_block_attention(q, *devices, seq_lens, block_mass=masses, **options)
    for one, other in zip(map(to_host, plain), map(to_host, with_mass), strict=True):
        if new is None:
            assert np.array_equal(one.view(np.uint8), other.view(np.uint8))
        else:  # the host does not know how many new tokens rows have, and plans for as many as it has to expect
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)
    found = to_host(masses)
    good = reference.tile_masses(
        case.q, TierCaches(k_cache, v_cache), table, starts, case.lengths, cu_seqlens_q=case.cu_seqlens_q
    )
    np.testing.assert_allclose(found[:, : good.shape[1]], good, rtol=2e-3, atol=1e-6)
    assert (found[:, good.shape[1] :] == 0).all()


def test_the_order_of_blocks_does_not_change_a_bit():
    case = TieredCase([704, 64, 2048], head_dim=128, dtype="float16")
    first, second = (run(case, case.tiered()) for _ in range(2))  # laid out anew, in other places
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.view(np.uint8), other.view(np.uint8))


def test_the_cpu_and_the_gpu_agree():
    case = TieredCase([300, 64, 1000], [3, 1, 8], head_dim=128, dtype="float16")
    arrays = case.tiered()
    out, lse = run(case, arrays)
    assert_close(out, lse, *(one.astype(np.float64) for one in case.run(arrays)), case.dtype)


def test_masses_of_another_dtype_are_refused():
    case = TieredCase([100], dtype="float16")
    arrays = case.tiered()
    masses = to_device(case.no_masses(arrays), "")
    with pytest.raises(ShapeError, match="block_mass: expected"):
        run(case, arrays, block_mass=masses.half())


def tile(block: int, first: int = 0) -> list[int]:
    return list(range(first + 8 * block, first + 8 * block + 8))


@pytest.mark.parametrize("at_the_edge", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_conversions_give_the_codes_of_the_judge(head_dim, dtype, at_the_edge):
    import torch

    layers, heads, blocks = 2, 3, 6
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    hot = torch.randn(2 * layers, 8 * blocks, heads, 8, head_dim).to(kind)
    hot[..., 3] *= 30
    hot[:, :8] = 0.5  # nothing but one value
    hot[:, 8:10] = 0.0
    if at_the_edge:
        hot[:, 11:13] *= 1e-6
        hot[:, 3, :, 2, 5], hot[::2, 9, 1, 7, 0], hot[1::2, 17, 2, 1, 1] = np.nan, -np.inf, np.inf
        hot[:, 24:32, 0, :, 3] = np.nan  # all tokens of a tile
        hot[..., 7] += 60000.0 if dtype == "float16" else 1e5
    hot = hot.cuda()
    warm = torch.zeros(layers, blocks, heads, INT8.nbytes(head_dim), dtype=torch.uint8, device="cuda")
    cold = torch.zeros(layers, blocks, heads, INT4.nbytes(head_dim), dtype=torch.uint8, device="cuda")
    first = (0, 8 * blocks, 16 * blocks)
    arenas = [cuda.device_operand(one, "arena") for one in (hot, warm, cold)]
    stream = torch.cuda.current_stream().cuda_stream
    scattered = [5, 9, 17, 16, 30, 31, 8, 47]
    before = hot.float().cpu().numpy()
    sources = [tile(0), tile(1), scattered, tile(3), scattered]
    targets = [tile(2, first[1]), tile(0, first[1]), tile(1, first[1]), tile(5, first[2]), tile(4, first[2])]
    cuda.convert(*arenas, first, sources, targets, stream=stream)
    cuda.convert(*arenas, first, [tile(0, first[1])], [tile(1, first[2])], stream=stream)
    for source, target in zip(sources, targets, strict=True):
        form, arena, start = (INT8, warm, first[1]) if target[0] < first[2] else (INT4, cold, first[2])
        for layer in range(layers):
            keys, values = (
                before[2 * layer + which][source].transpose(1, 0, 2, 3).reshape(heads, 64, head_dim)
                for which in range(2)
            )
            found = arena[layer, (target[0] - start) // 8].cpu().numpy()
            assert np.array_equal(found, form.encode(keys, values)), form.name
    for layer in range(layers):
        requantized = INT4.encode(*INT8.decode(warm[layer, 0].cpu().numpy(), head_dim))
        assert np.array_equal(cold[layer, 1].cpu().numpy(), requantized)
    back = [40, -1, 2, 3, -1, 5, 6, 7]
    for form, arena, block in ((INT4, cold, 5), (INT8, warm, 1)):
        cuda.convert(*arenas, first, [tile(block, first[1 if form is INT8 else 2])], [back], stream=stream)
        for layer, which in itertools.product(range(layers), range(2)):
            decoded = torch.from_numpy(form.decode(arena[layer, block].cpu().numpy(), head_dim)[which]).to(kind)
            for i, granule in enumerate(back):
                if granule >= 0:
                    found = hot[2 * layer + which, granule].cpu()
                    torch.testing.assert_close(found, decoded[:, 8 * i : 8 * i + 8], rtol=0, atol=0, equal_nan=True)
    untouched = sorted(set(range(8 * blocks)) - set(back))
    np.testing.assert_array_equal(hot.float().cpu().numpy()[:, untouched], before[:, untouched])


def at_the_bound(pattern: str, value: float) -> TieredCase:
    """A long row whose later half has weights of nearly 64, the most there is; the first two dims hold ``value``."""
    case = TieredCase([1024], num_q_heads=1, num_kv_heads=1, dtype="bfloat16", patterns=[16 * pattern])
    q, keys, values = np.zeros((1, 1, 64)), np.zeros((1024, 1, 64)), np.zeros((1024, 1, 64))
    q[..., 0], keys[512:, :, 0], values[..., :2] = 1.0, 3.95, value
    case.q, case.keys, case.values = (
        to_storage(q, "bfloat16"), [to_storage(keys, "bfloat16")], [to_storage(values, "bfloat16")]
    )  # fmt: skip
    return case


@pytest.mark.parametrize(("pattern", "bound"), [("w", 3.2e4), ("c", 3.8e3)])
def test_values_may_be_as_large_as_the_formats_say(pattern, bound):
    options = {"num_splits": 1, "softmax_scale": np.log(2.0)}
    case = at_the_bound(pattern, bound)
    arrays = case.tiered()
    out, lse = run(case, arrays, **options)
    assert_close(out, lse, *case.expected(arrays, **options), case.dtype)
    case = at_the_bound(pattern, 1.2 * bound)
    out, _ = run(case, case.tiered(), **options)
    assert not np.isfinite(reference.to_float64(out, case.dtype)).all()


@pytest.mark.parametrize("new", [None, [3]])  # with the rounding of a scaled query in free columns, and in products
def test_queries_times_steps_of_int4_keys_may_be_as_large_as_the_formats_say(new):
    for size, is_finite in ((1.5e4, True), (1.8e4, False)):
        case = TieredCase([200], new, num_q_heads=8, dtype="float16", patterns=["cccc"])
        case.keys[0][::2, :, 0], case.keys[0][1::2, :, 0] = 750, -750  # a step of 100
        case.q[..., 0] = size / 100
        arrays = case.tiered()
        out, lse = run(case, arrays, softmax_scale=1e-5)
        if is_finite:
            assert_close(out, lse, *case.expected(arrays, softmax_scale=1e-5), case.dtype)
        else:
            assert not np.isfinite(out).all()
