"""A step takes keys, values and queries of every dtype, from NumPy and from torch, and refuses what does not fit."""

import numpy as np
import pytest

from kvtoolkit import ArgumentError, CacheConfig, KVCache, ShapeError, StepError, UnsupportedError

NUM_LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_TOKENS = 2, 4, 2, 16, 11
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # NumPy has no bfloat16, only its bits


def make(dtype="float32"):
    config = CacheConfig(
        num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, dtype=dtype, num_tokens=64
    )
    cache = KVCache(config)
    seq_ids, _ = cache.open([[]])
    return cache, cache.begin_step(seq_ids, NUM_TOKENS)


def arrays(dtype="float32", layer=0):
    """key, value ``[num_tokens, num_kv_heads, head_dim]`` and q ``[num_tokens, num_q_heads, head_dim]``."""
    random = np.random.default_rng(layer)
    heads = (NUM_KV_HEADS, NUM_KV_HEADS, NUM_Q_HEADS)
    drawn = [random.standard_normal((NUM_TOKENS, n, HEAD_DIM)).astype(np.float32) for n in heads]
    if dtype == "bfloat16":
        return [(array.view(np.uint32) >> 16).astype(np.uint16) for array in drawn]
    return [array.astype(DTYPES[dtype]) for array in drawn]


def as_float64(array):
    """An array, the words of a bfloat16 array, or a tensor, in float64."""
    if not isinstance(array, np.ndarray):
        return array.double().numpy()
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def expected(key, value, q):
    """Causal attention in float64."""
    key, value, q = (as_float64(array) for array in (key, value, q))
    key, value = (array.repeat(NUM_Q_HEADS // NUM_KV_HEADS, axis=1) for array in (key, value))
    scores = np.einsum("ihd,jhd->hij", q, key) * HEAD_DIM**-0.5
    scores[:, np.triu(np.ones((NUM_TOKENS, NUM_TOKENS), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), value)


def as_is(array):
    return array


def as_tensor(array):
    torch = pytest.importorskip("torch")
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_strided_tensor(array):
    """Heads first in memory, as projections that were transposed leave it."""
    return as_tensor(array.transpose(1, 0, 2).copy()).transpose(0, 1)


@pytest.mark.parametrize("convert", [as_is, as_tensor, as_strided_tensor])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layer_attends_to_its_own_keys_and_values(dtype, convert):
    cache, step = make(dtype)
    for layer in range(NUM_LAYERS):
        key, value, _ = (convert(array) for array in arrays(dtype, layer))
        step.append(layer, key, value)
    for layer in (0, 1, 0):
        q = convert(arrays(dtype, layer)[2])
        out = step.attend(layer, q)
        assert type(out) is type(q)
        assert out.dtype == q.dtype
        tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
        np.testing.assert_allclose(as_float64(out), expected(*arrays(dtype, layer)), atol=tolerance)
    cache.end_step(step)


def test_layers_may_come_in_other_memory_orders_and_with_other_options():
    _, step = make()
    for layer in range(NUM_LAYERS):
        step.append(layer, *arrays(layer=layer)[:2])
    q = arrays(layer=1)[2]
    plain = step.attend(1, q)
    np.testing.assert_array_equal(step.attend(1, as_strided_tensor(q)).numpy(), plain)
    windowed = step.attend(1, q, window_size=(2, 0))
    assert not np.array_equal(windowed, plain)
    np.testing.assert_array_equal(step.attend(1, q, window_size=(2, 0)), windowed)
    out, lse = step.attend(1, q, return_lse=True)
    np.testing.assert_array_equal(out, plain)
    assert lse.shape == (NUM_TOKENS, NUM_Q_HEADS)
    no_sinks = np.full(NUM_Q_HEADS, -np.inf, np.float32)
    np.testing.assert_array_equal(step.attend(1, q, sinks=no_sinks), plain)
    target = np.empty_like(q)
    assert step.attend(1, q, out=target) is target
    np.testing.assert_array_equal(target, plain)
    np.testing.assert_array_equal(step.attend(1, q), plain)


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "after a good one"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a[:-1], r"expected \[num_tokens, .*got \(10,"),
        (lambda a: a[:, :, :8], r"got \(11, \d, 8\)"),
        (lambda a: a[0], r"got \(\d, 16\)"),
        (lambda a: a.astype(np.float64), "float32, got .*float64"),
        (lambda a: a.astype(np.float16), "float32, got .*float16"),
        (lambda a: a.repeat(2, axis=2)[:, :, ::2], "last axis contiguous"),
        (lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(np.float32).reshape(a.shape), "aligned"),
    ],
)
def test_wrong_arrays_are_refused_by_name(change, match, warm):
    cache, step = make()
    key, value, q = arrays()
    if warm:
        step.append(0, key, value)
        step.attend(0, q)
    before = cache.key_cache(0).copy(), cache.value_cache(0).copy()
    for name, call in {
        "key": lambda: step.append(0, change(key), value),
        "value": lambda: step.append(0, key, change(value)),
        "q": lambda: step.attend(0, change(q)),
    }.items():
        with pytest.raises(ShapeError, match=f"^{name}: .*{match}"):
            call()
    np.testing.assert_array_equal(cache.key_cache(0), before[0])
    np.testing.assert_array_equal(cache.value_cache(0), before[1])


def test_16_bit_words_are_bfloat16_only_in_a_bfloat16_cache():
    _, step = make("float16")
    key, value, _ = arrays("float16")
    with pytest.raises(ShapeError, match="key: expected .*float16, got .*uint16"):
        step.append(0, key.view(np.uint16), value)


def test_options_are_checked_after_a_good_call_too():
    _, step = make()
    key, value, q = arrays()
    step.append(0, key, value)
    step.attend(0, q)
    with pytest.raises(ShapeError, match="window_size"):
        step.attend(0, q, window_size=(-2, 0))
    with pytest.raises(UnsupportedError, match="backend"):
        step.attend(0, q, backend="cuda")
    read_only = np.empty_like(q)
    read_only.flags.writeable = False
    with pytest.raises(ShapeError, match="out: expected a writable array"):
        step.attend(0, q, out=read_only)
    with pytest.raises(ShapeError, match="q: expected num_q_heads to be a multiple"):
        step.attend(0, q[:, :3])
    with pytest.raises(ArgumentError, match="layer: expected 0 to 1, got 2"):
        step.attend(2, q)
    with pytest.raises(ArgumentError, match="layer: expected 0 to 1, got -1"):
        step.append(-1, key, value)


def test_a_layer_is_not_attended_before_its_append():
    cache, step = make()
    key, value, q = arrays()
    step.append(0, key, value)
    out = step.attend(0, q)
    with pytest.raises(StepError, match="layer: expected one that this step has appended to, got 1"):
        step.attend(1, q)
    with pytest.raises(ArgumentError, match="layer: expected 0 to 1, got 2"):
        step.attend(2, q)
    step.append(1, key, value)
    np.testing.assert_array_equal(step.attend(1, q), out)
    cache.end_step(step)


def test_an_engine_that_writes_the_cache_itself_attends_without_appends():
    cache, step = make()
    key, value, q = arrays()
    for layer in range(NUM_LAYERS):
        for cached, new in ((cache.key_cache(layer), key), (cache.value_cache(layer), value)):
            cached[step.slot_mapping // 8, :, step.slot_mapping % 8] = new
        np.testing.assert_allclose(step.attend(layer, q), expected(key, value, q), rtol=1e-5, atol=1e-6)
    cache.end_step(step)
