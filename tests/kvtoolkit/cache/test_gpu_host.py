"""Caches with host memory on a GPU: where blocks are changes no bit, and moves are safe while kernels run."""

import gc
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvtoolkit import CacheConfig, GraphStep, KVCache, variable_block_attention
from kvtoolkit.cache.storage import device_transfers
from kvtoolkit.cache.storage.calibration import ENGINES, Ways
from kvtoolkit.cache.storage.upload import PinnedRing, make_upload
from kvtoolkit.errors import DeviceError
from kvtoolkit.formats.entry import TIER_HOT, unpack_entries
from tests.kvtoolkit.attention.gpu_cases import to_device, to_host
from tests.kvtoolkit.cache.test_cache_machine import TierMachine, tiered_fields
from tests.kvtoolkit.cache.test_host_machine import CONFIGS, TIERED, Hints
from tests.kvtoolkit.cache.test_host_machine import HostMachine as HostMachineOfCpu

pytestmark = pytest.mark.gpu

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16", "max_seqs": 16}
HOST = {"host": "64 MiB", "hot": 64, "pinned_tokens": 64}


class OnDevice:
    """What a machine needs to have its memory on the GPU."""

    dtype = "float16"

    def put(self, array):
        import cupy

        return cupy.asarray(array.astype(np.float16))

    def get(self, array):
        return array.get()

    def make_late(self):
        """Copies of a device end late by themselves."""


class DeviceHostMachine(OnDevice, HostMachineOfCpu):
    head_dim = 16


class DeviceTieredMachine(OnDevice, Hints, TierMachine):
    superblocks: ClassVar[list[int]] = [8, 16]


def run(machine, examples):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # what this machine finds, that of the CPU shrinks
        ),
    )


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[3], CONFIGS[6]], ids=lambda c: c["allocator"])
def test_tokens_are_the_same_wherever_they_are(config):
    run(type("Machine", (DeviceHostMachine,), {"config": {**config, "backend": "cuda"}}), 6)


@pytest.mark.parametrize("config", TIERED[:2], ids=["cold", "small tiers"])
def test_tokens_are_the_same_wherever_they_are_and_in_whichever_tier(config):
    fields = tiered_fields(config)
    run(type("Machine", (DeviceTieredMachine,), {"config": {**fields, "backend": "cuda"}}), 4)


class Pair:
    """A small cache with host memory, and a large one without; both get the same calls."""

    def __init__(self, backend="cuda", num_tokens=2048, seed=0, tiers=HOST, **options):
        shape = {**SHAPE, "backend": backend, **options}
        self.caches = [
            KVCache(CacheConfig(**shape, num_tokens=num_tokens, tiers=tiers)),
            KVCache(CacheConfig(**shape, num_tokens=1 << 16)),
        ]
        self.rng = np.random.default_rng(seed)
        self.num_layers = shape["num_layers"]

    def open(self, count):
        ids = [cache.open([[]] * count)[0] for cache in self.caches]
        assert np.array_equal(*ids)
        return ids[0]

    def step(self, ids, counts, num_q_heads=8):
        total = int(np.sum(counts) if np.ndim(counts) else counts * len(ids))
        tokens = self.rng.integers(0, 1000, total)
        words = [
            [
                to_device(self.rng.standard_normal((total, heads, 64)).astype(np.float16), "float16")
                for heads in (2, 2, num_q_heads)
            ]
            for _ in range(self.num_layers)
        ]
        found = []
        for cache in self.caches:
            with cache.begin_step(ids, counts) as step:
                assert step.ok.all()
                found.append([])
                for layer, (key, value, q) in enumerate(words):
                    step.append(layer, key, value)
                    found[-1].append(step.attend(layer, q))
                cache.end_step(step, tokens)
        return found

    def check(self, found):
        for one, other in zip(*found, strict=True):
            assert np.array_equal(to_host(one), to_host(other))


@pytest.mark.parametrize("backend", ["cuda", "numba"])
@pytest.mark.parametrize("allocator", ["buddy", "lockfree"])
def test_a_sequence_four_times_as_long_as_the_device_pool_gives_the_same_bits(backend, allocator):
    pair = Pair(backend, 1024, allocator=allocator, max_seq_len=4600)
    (seq,) = pair.open(1)
    for _ in range(18 if backend == "cuda" else 9):
        pair.check(pair.step([seq], [240]))  # prompts in pieces
        for _ in range(3):
            pair.check(pair.step([seq], [1]))
    stats = pair.caches[0].stats()
    assert stats.num_tokens > (4 if backend == "cuda" else 2) * 1024
    assert stats.tiers["host16"].used >= stats.num_tokens - 1024
    pair.caches[0].check_integrity()


STAGED = {**HOST, "staging": 1024}


def test_blocks_copied_ahead_of_the_layers_give_the_same_bits():
    pair = Pair(num_tokens=1024, max_seq_len=4600, num_layers=5, tiers=STAGED)
    (seq, other) = pair.open(2)
    for _ in range(9):
        pair.check(pair.step([seq, other], [230, 100]))
        for _ in range(3):
            pair.check(pair.step([other, seq], [1, 1]))
    assert pair.caches[0].stats().tiers["host16"].used > 1024  # more than there is room for ahead


def test_captured_steps_copy_ahead_what_each_replay_reads_of_host_memory():
    import torch

    pair = Pair(num_tokens=2048, num_layers=5, tiers=STAGED, max_seq_len=2048)
    ids = pair.open(6)
    pair.step(ids, [200, 500, 300, 600, 100, 250])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        held, graphs = [GraphStep(cache, 6) for cache in pair.caches], []
        words = [[torch.zeros(6, heads, 64, device="cuda").half() for heads in (2, 2, 8)] for _ in range(5)]
        outs = [[torch.zeros(6, 8, 64, device="cuda").half() for _ in range(5)] for _ in pair.caches]

        def run(fixed, results):
            calls = fixed.begin()
            for layer, (key, value, q) in enumerate(words):
                calls.append(layer, key, value)
                calls.attend(layer, q, out=results[layer])

        for i, (cache, fixed) in enumerate(zip(pair.caches, held, strict=True)):
            with cache.begin_step(ids, 1) as step:
                fixed.load(step)
                run(fixed, outs[i])
                cache.end_step(step, np.zeros(6, np.int64))
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[i], stream=stream):
                run(fixed, outs[i])
        rng = np.random.default_rng(0)
        for _ in range(200):
            for one in words:
                for array in one:
                    array.normal_()
            for cache, fixed, graph in zip(pair.caches, held, graphs, strict=True):
                with cache.begin_step(ids, 1) as step:
                    assert step.ok.all()
                    fixed.load(step)
                    graph.replay()
                    cache.end_step(step, np.ones(6, np.int64))
            for one, other in zip(*outs, strict=True):
                assert torch.equal(one, other)
            pair.caches[0].offload(rng.permutation(ids)[:1])
            pair.caches[0]._places.settle_all()
    assert pair.caches[0].stats().num_offloaded > 50


SPARSE = {**HOST, "sparse": 256}


def test_steps_that_leave_out_tokens_read_the_rest_eager_captured_and_copied_ahead():
    import torch

    caches = [
        KVCache(CacheConfig(**SHAPE, num_tokens=1024, max_seq_len=2048, tiers=tiers, backend="cuda"))
        for tiers in (SPARSE, {**SPARSE, "staging": 512})
    ]
    torch.manual_seed(0)
    ids = [cache.open([[]] * 3)[0] for cache in caches]
    counts = [900, 700, 1200]
    words = [[torch.randn(sum(counts), heads, 64, device="cuda").half() for heads in (2, 2, 8)] for _ in range(2)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for at in range(0, 1200, 60):  # in pieces, so that the oldest goes to host memory
            for cache, own in zip(caches, ids, strict=True):
                some = [seq for seq, count in zip(own, counts, strict=True) if at < count]
                with cache.begin_step(some, 60) as step:
                    assert step.ok.all()
                    for layer, (key, value, _) in enumerate(words):
                        step.append(layer, key[: 60 * len(some)], value[: 60 * len(some)])
                    cache.end_step(step, np.arange(60 * len(some)))
        left_out = []
        for i in range(40):
            outs = []
            for cache, own in zip(caches, ids, strict=True):
                fixed = GraphStep(cache, 3) if i % 16 == 15 else None
                is_full = cache._state.counters.num_steps % 16 == 0
                with cache.begin_step(own, 1) as step:
                    for layer, (key, value, q) in enumerate(words):
                        place = slice(3 * i, 3 * i + 3)
                        step.append(layer, key[place], value[place])
                        outs.append(step.attend(layer, q[place]))
                    if fixed is not None and not is_full:
                        fixed.load(step)
                        run = fixed.begin()
                        for layer, (key, value, q) in enumerate(words):
                            run.append(layer, key[place], value[place])
                            assert torch.equal(run.attend(layer, q[place]), outs[layer - 2])
                    if not is_full:
                        short = step._short_tables()
                        tables = [torch.from_numpy(np.ascontiguousarray(one)).cuda() for one in short]
                        keys, values = (torch.from_dlpack(one(1)) for one in (cache.key_cache, cache.value_cache))
                        expected = variable_block_attention(words[1][2][place], keys, values, *tables)
                        torch.testing.assert_close(outs[-1], expected, rtol=2e-3, atol=2e-3)
                        left_out.append(int((step.seq_lens - short.seq_lens).sum()))
                    cache.end_step(step, np.arange(3))
            for one, other in zip(outs[:2], outs[2:], strict=True):
                assert torch.equal(one, other)
    assert max(left_out) > 500
    assert 0 < caches[0].stats().skipped_mass < 1


def test_a_prompt_larger_than_the_device_pool_goes_to_host_memory():
    pair = Pair(num_tokens=1024, max_seq_len=4600)
    (seq,) = pair.open(1)
    pair.check(pair.step([seq], [4000]))
    pair.check(pair.step([seq], [1]))


def test_blocks_move_while_kernels_read_them_and_no_bit_changes():
    rounds, pair = 60, Pair(tiers={**HOST, "staging": 256}, num_layers=3)
    ids = pair.open(8)
    pair.step(ids, [300] * 8)
    cache, rng = pair.caches[0], np.random.default_rng(1)
    for i in range(rounds):
        asleep = rng.permutation(ids)[:3]
        awake = np.setdiff1d(ids, asleep)
        cache.offload(asleep)
        for _ in range(4):
            found = pair.step(awake, 1)
        cache.prefetch(asleep)
        pair.step(ids, 1)
        if i % 10 == 0:
            pair.check(found)
    pair.check(pair.step(ids, 1))
    stats = cache.stats()
    assert stats.num_offloaded > rounds
    assert stats.num_prefetched > rounds
    cache.check_integrity()


def slow():
    """Keep the current stream busy for about 0.1 s."""
    import torch

    torch.cuda._sleep(200_000_000)


def granules_of(cache, seq):
    """The granules of a sequence, in order."""
    with cache.begin_step([seq], 0) as step:
        starts, sizes, _ = unpack_entries(step.block_table[0])
    return np.concatenate([np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True) if n])


def read(cache, seq):
    """The keys of a sequence, as they are once everything is done."""
    granules = granules_of(cache, seq)
    cache.sync()
    return cache.key_cache(0).get()[granules]


def fill(cache, seq, value, count):
    """Append ``count`` tokens whose keys are all ``value``."""
    import torch

    with cache.begin_step([seq], count) as step:
        for layer in range(2):
            key = torch.full((count, 2, 64), value, dtype=torch.float16, device="cuda")
            step.append(layer, key, key)
        cache.end_step(step, np.full(count, int(value)))


def written_then_offloaded():
    """What is read of tokens that moved to host memory right after slow kernels had been given their keys."""
    cache = KVCache(CacheConfig(**SHAPE, num_tokens=4096, tiers=HOST, backend="cuda"))
    seq = cache.open([[]])[0][0]
    slow()
    fill(cache, seq, 2, 1024)
    cache.offload([seq])
    cache._places.settle_all()
    return read(cache, seq)


def read_while_others_come_back():
    """What slow kernels read of blocks that were freed after their launch, and that others come back to."""
    import torch

    cache = KVCache(CacheConfig(**SHAPE, num_tokens=1024, tiers=HOST, backend="cuda"))
    away, here = cache.open([[], []])[0]
    fill(cache, away, 1, 1024)
    cache.offload([away])
    cache._places.settle_all()
    fill(cache, here, 2, 1024)
    granules = torch.as_tensor(granules_of(cache, here), device="cuda")
    keys = torch.from_dlpack(cache.key_cache(0))
    slow()
    found = keys[granules].clone()
    cache.close([here])  # its kernels have not run yet
    cache.clear_prefixes()
    cache.prefetch([away])
    cache._places.settle_all()
    torch.cuda.synchronize()
    return found


def read_in_new_places():
    """What is read of tokens in host memory while their copies are slow."""
    import torch

    cache = KVCache(CacheConfig(**SHAPE, num_tokens=1024, tiers=HOST, backend="cuda"))
    seq = cache.open([[]])[0][0]
    fill(cache, seq, 2, 1024)
    cache.sync()
    with torch.cuda.stream(torch.cuda.ExternalStream(cache._group.storage.transfers._stream.ptr)):
        slow()
    cache.offload([seq])
    cache._places.settle_all()
    return read(cache, seq)


def uploaded_in_turn():
    """What arrives on the device of tables that were given to a slow stream one after the other."""
    import torch

    upload = make_upload("cuda", 0)
    slow()
    held = [torch.from_dlpack(upload.one(np.full(1 << 12, 2 + i, np.int32))) for i in range(12)]
    torch.cuda.synchronize()
    return torch.stack([one - i for i, one in enumerate(held)])


RULES = {
    "nobody writes to a pinned buffer before it is copied": (
        uploaded_in_turn, PinnedRing, "_give_back",
        lambda self, stream: setattr(self, "_turn", (self._turn + 1) % len(self._done)),
    ),
    "copies wait for the kernels that write the source": (
        written_then_offloaded, device_transfers.DeviceTransfers, "_follow", lambda self, current: None
    ),
    "copies wait for the kernels that read what was in the target": (
        read_while_others_come_back, device_transfers.DeviceTransfers, "_follow", lambda self, current: None
    ),
    "nobody reads a new place before it is written": (
        read_in_new_places, device_transfers._UnderWay, "join", lambda self: None
    ),
}  # fmt: skip


@pytest.mark.parametrize("has_barrier", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_kept_and_without_its_barrier_something_else_is_read(rule, has_barrier, monkeypatch):
    import torch

    scenario, owner, name, nothing = RULES[rule]
    with torch.cuda.stream(torch.cuda.Stream()):
        scenario()  # everything is compiled and loaded
        if not has_barrier:
            monkeypatch.setattr(owner, name, nothing)
        # on a busy device something else may keep the order now and then, but not each time
        found = [scenario() for _ in range(2 if has_barrier else 6)]
    torch.cuda.synchronize()
    assert all(bool((one == 2).all()) for one in found) == has_barrier


def test_host_memory_that_is_not_there_is_a_clear_error_and_nothing_is_lost():
    shape = {**SHAPE, "num_layers": 1, "num_kv_heads": 64, "head_dim": 256, "max_seq_len": 4096}
    config = CacheConfig(**shape, num_tokens=1 << 19, tiers={"host": "900 GiB"}, backend="cuda")
    for _ in range(6):  # together more than any device has
        with pytest.raises(DeviceError, match="expected .* bytes of pinned host memory"):
            KVCache(config)


def test_a_copy_that_fails_changes_nothing(monkeypatch):
    pair = Pair()
    ids = pair.open(4)
    pair.step(ids, [200] * 4)
    cache = pair.caches[0]

    def fails(*arguments, **options):
        raise DeviceError("no")

    before = cache.stats()
    with monkeypatch.context() as patch:
        patch.setattr(device_transfers.copy, "transfer", fails)
        patch.setattr(device_transfers.copy_engine, "transfer", fails)
        with pytest.raises(DeviceError, match="no"):
            cache.offload(ids[:1])
    cache.check_integrity()
    assert cache.stats() == before
    assert cache.offload(ids[:1]) > 0
    pair.check(pair.step(ids, 1))


def test_a_cache_that_goes_away_during_a_move_ends_in_order():
    import cupy

    for _ in range(5):
        pair = Pair()
        ids = pair.open(4)
        pair.step(ids, [400] * 4)
        pair.caches[0].offload(ids)
        del pair
        gc.collect()
    cupy.cuda.runtime.deviceSynchronize()


@pytest.mark.parametrize("ctas", [ENGINES, 1, 4])
def test_all_ways_of_copying_copy_the_same(ctas):
    pair = Pair()
    pair.caches[0]._group.storage.transfers.ways[TIER_HOT] = Ways(ctas, ctas)
    ids = pair.open(4)
    pair.step(ids, [450] * 4)
    for _ in range(6):
        pair.caches[0].offload(ids)
        pair.caches[0]._places.settle_all()
        pair.check(pair.step(ids, 1))
        pair.caches[0].prefetch(ids)
        pair.caches[0]._places.settle_all()
        pair.check(pair.step(ids, 1))
    assert pair.caches[0].stats().num_prefetched > 20
