"""Whole caches on the GPU: every read compared with token lists, and attention with that of the CPU."""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from allocators import LockFreeAllocator
from kvtoolkit import CacheConfig, DevicePool, KVCache, ShapeError, UnsupportedError
from kvtoolkit.attention.calls import append, variable_block_attention
from tests.kvtoolkit.attention.gpu_cases import to_device, to_host
from tests.kvtoolkit.cache.test_cache_machine import CONFIGS, CacheMachine

pytestmark = pytest.mark.gpu


class DeviceMachine(CacheMachine):
    """The machine of the CPU's caches, its memory on the GPU."""

    dtype = "float16"
    head_dim = 16

    def put(self, array):
        import cupy

        return cupy.asarray(array.astype(np.float16))

    def get(self, array):
        return array.get()


# with lockfree the allocator is on the GPU too
@pytest.mark.parametrize("config", [*CONFIGS[::3], *CONFIGS[7:9]], ids=lambda c: "-".join(map(str, c.values())))
def test_every_read_returns_what_the_sequence_was_given(config):
    machine = type("Machine", (DeviceMachine,), {"config": {**config, "backend": "cuda"}})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=5,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # what this machine finds, that of the CPU shrinks
        ),
    )


def make(backend, dtype="float16", **options):
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "dtype": dtype, "num_tokens": 4096}
    return KVCache(CacheConfig(**{**shape, "backend": backend, **options}))


def drive(cache, put, num_q_heads=8):
    """Prompts, verify steps, decode steps, forks and truncation, the same on every cache; yields each output."""
    rng = np.random.default_rng(0)
    dtype = cache.dtype

    def words(*shape):
        values = rng.standard_normal(shape).astype(np.float32)
        if dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(np.float16)

    def step(seq_ids, counts):
        with cache.begin_step(seq_ids, counts) as step:
            assert step.ok.all()
            total = int(np.sum(counts))
            for layer in range(2):
                key, value, q = words(total, 2, 64), words(total, 2, 64), words(total, num_q_heads, 64)
                step.append(layer, put(key), put(value))
                yield step.attend(layer, put(q))
            cache.end_step(step, np.arange(total) % 50)

    seq_ids, _ = cache.open([[1] * 200, [2] * 70, [3] * 9])
    yield from step(seq_ids, [200, 70, 9])
    for count in (1, 4, 1, 8, 1):
        yield from step(seq_ids, [count] * 3)
    children = cache.fork(seq_ids, 2).ravel()
    for _ in range(70):
        yield from step(children, [1] * 6)
    cache.truncate(children, np.array([100, 33, 5, 64, 8, 1]).clip(max=cache.lengths(children)))
    yield from step(children, [2, 1, 30, 1, 9, 1])
    cache.preempt(children[:2], to="host")
    cache.compact(1000)
    assert cache.restore(children[:2]).all()
    yield from step(children, [1] * 6)
    cache.close([*seq_ids, *children])
    cache.check_integrity()


def tensor(array):
    return to_device(array, "bfloat16" if array.dtype == np.uint16 else "float16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["cuda", "numba"])
def test_attention_of_a_cache_is_that_of_the_cpu(backend, dtype):
    from kvtoolkit.reference import to_float64

    cpu, gpu = drive(make("cpu", dtype), lambda array: array), drive(make(backend, dtype), tensor)
    for good, found in zip(cpu, gpu, strict=True):
        good, found = to_float64(good, dtype), to_float64(to_host(found), dtype)
        assert np.linalg.norm(found - good) <= {"float16": 1e-3, "bfloat16": 6e-3}[dtype] * np.linalg.norm(good)


def test_outputs_are_the_same_to_the_bit_for_every_allocator_and_growth_policy():
    outputs = None
    for config in CONFIGS:
        found = [to_host(out) for out in drive(make("cuda", **config), tensor)]
        if outputs is None:
            outputs = found
        assert all(np.array_equal(a, b) for a, b in zip(outputs, found, strict=True)), config


def test_the_tables_of_a_step_serve_other_kernels():
    import cupy

    cache = make("cuda")
    seq_ids, _ = cache.open([[1] * 30, [2] * 5])
    rng = np.random.default_rng(0)
    key, q = (cupy.asarray(rng.standard_normal((35, n, 64)).astype(np.float16)) for n in (2, 4))
    with cache.begin_step(seq_ids, [30, 5]) as step:
        there = step.on_device
        for name in ("block_table", "block_starts", "seq_lens", "cu_seqlens_q", "slot_mapping"):
            assert np.array_equal(getattr(there, name).get(), getattr(step, name))
        keys, values = cache.key_cache(1), cache.value_cache(1)
        append(key, -key, keys, values, there.slot_mapping, layout="HND")
        out = variable_block_attention(
            q, keys, values, there.block_table, there.block_starts, there.seq_lens, cu_seqlens_q=there.cu_seqlens_q
        )
        assert cupy.array_equal(step.attend(1, q), out)
        cache.end_step(step)


@pytest.mark.parametrize("layout", ["buddy", "slab"])
def test_lockfree_on_a_gpu_has_its_state_there(layout):
    cache = make("cuda", allocator="lockfree", allocator_options={"layout": layout})
    assert isinstance(cache.allocator, DevicePool)
    assert (cache.allocator.layout, cache.allocator.device) == (layout, 0)
    taken = cache.allocator.allocate([1, 8])  # as a kernel might: no row knows of it
    cache.check_integrity()
    again = KVCache.from_snapshot(cache.config, cache.snapshot())
    again.allocator.free(taken, [1, 8])
    cache.allocator.free(taken, [1, 8])
    assert again.allocator.num_free == cache.allocator.num_free
    host = make("cuda", allocator="lockfree", allocator_options={"layout": layout, "device": None})
    assert isinstance(host.allocator, LockFreeAllocator)


def test_a_snapshot_moves_between_host_and_device():
    gpu = make("cuda", num_tokens=128)
    seq_ids, _ = gpu.open([[1] * 20])
    key = np.random.default_rng(0).standard_normal((20, 2, 64)).astype(np.float16)
    with gpu.begin_step(seq_ids, 20) as step:
        for layer in range(2):
            step.append(layer, tensor(key), tensor(-key))
        gpu.end_step(step)
    host = KVCache.from_snapshot(make("cpu", num_tokens=128).config, gpu.snapshot())
    assert np.array_equal(host.key_cache(0), gpu.key_cache(0).get())
    back = KVCache.from_snapshot(gpu.config, host.snapshot())
    assert np.array_equal(back.key_cache(0).get(), host.key_cache(0))


def test_what_does_not_fit_the_cache_is_refused():
    cache = make("cuda")
    seq_ids, _ = cache.open([[]])
    key = np.zeros((3, 2, 64), np.float16)
    with cache.begin_step(seq_ids, 3) as step:
        with pytest.raises(UnsupportedError, match="key: expected an array on a CUDA device, got a ndarray in host"):
            step.append(0, key, key)
        with pytest.raises(ShapeError, match="key: expected .*float16, got .*float32"):
            step.append(0, tensor(key).float(), tensor(key).float())
        with pytest.raises(UnsupportedError, match="backend: expected None or 'cuda', that of the cache, got 'cpu'"):
            step.attend(0, tensor(key), backend="cpu")
    with pytest.raises(UnsupportedError, match="device: expected 0 to"):
        make("cuda", device=99)
