"""Canaries: each step checks what it is going to read, and finds slots that were written for somebody else."""

import os
import subprocess
import sys

import numpy as np
import pytest

from allocators import IntegrityError
from kvtoolkit import ArgumentError, CacheConfig, DeviceSteps, KVCache
from kvtoolkit.arrays.host import operand
from kvtoolkit.cache.state.block_table import ID_BITS, touch
from kvtoolkit.cpu import canary as on_host
from kvtoolkit.cuda import canary as on_device
from kvtoolkit.cuda import check
from tests.kvtoolkit.cache.host_device import make_cache, use_host
from tests.kvtoolkit.cuda.host_kernels import needs_compiler, on_the_host

TIERS = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "cold": "int4"}


@pytest.fixture(autouse=True)
def canaries(monkeypatch):
    monkeypatch.setattr(check, "CANARY", True)


def make(**options):
    return KVCache(CacheConfig(**{"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"} | options))


def keys_of(tokens, cache):
    rows = np.sin(np.asarray(tokens)[:, None, None] * (1.0 + np.arange(64)) + np.arange(2)[:, None])
    return rows.astype(np.float16)


def feed(cache, ids, tokens, told=True):
    """A step of tokens, row after row, of which each row has as many."""
    flat = np.ravel(tokens)
    with cache.begin_step(ids, len(flat) // len(ids), flat if told else None) as step:
        assert step.ok.all()
        for layer in range(2):
            step.append(layer, keys_of(flat, cache), keys_of(flat, cache))
        cache.end_step(step, None if told else flat)


def make_interleaved():
    """A cache with two sequences of three blocks, taken in turn: no two blocks of one are neighbours."""
    cache = make(num_tokens=512, growth="fixed8", block_sizes=[8])
    ids, _ = cache.open([[], []])
    for begin in (0, 8, 16):
        feed(cache, ids, [np.arange(8) + begin, np.arange(8) + begin + 100])
    return cache, ids


def entries_of(cache, seq_id):
    return cache._group.table.entries[int(seq_id) & ((1 << ID_BITS) - 1)]


@pytest.mark.parametrize("told", [True, False])
def test_a_key_that_was_written_over_is_found(told):
    cache = make(num_tokens=512)
    ids, _ = cache.open([[], []])
    feed(cache, ids, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], told)
    feed(cache, ids, [11, 12], told)
    granule = int(entries_of(cache, ids[1])[0]) & 0xFFFFFF
    cache.key_cache(0)[granule, 0, 2, 3] = 7
    wanted = f"row 1 of a step .sequence {ids[1]}., token 2, layer 0.*key has changed.*granule {granule}"
    for _ in range(2):  # and it stays so
        with pytest.raises(IntegrityError, match=wanted):
            feed(cache, ids, [13, 14], told)
    step = cache.begin_step(ids, 0)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=wanted):
            cache.end_step(step)
    assert cache.lengths(ids).tolist() == [6, 6]


def test_blocks_that_change_hands_too_early_are_found():
    """Another sequence writes into the last block of one that still needs it: other tokens at the same positions."""
    cache, ids = make_interleaved()
    mine, others = (entries_of(cache, one) for one in ids)
    mine[1] = others[1]  # as if it had been freed, granted again and written
    touch(cache._group.table, int(ids[0]) & ((1 << ID_BITS) - 1))
    with pytest.raises(IntegrityError, match="row 0 of a step.*token 8.*after other tokens"):
        feed(cache, ids, np.arange(len(ids)) + 50)


def test_entries_that_lead_to_another_position_are_found():
    cache, ids = make_interleaved()
    mine = entries_of(cache, ids[0])
    mine[0], mine[1] = int(mine[1]), int(mine[0])
    touch(cache._group.table, int(ids[0]) & ((1 << ID_BITS) - 1))
    with pytest.raises(IntegrityError, match="row 0 of a step.*token 0.*another position"):
        feed(cache, ids, np.arange(len(ids)) + 50)


def test_a_hole_in_a_block_table_is_found():
    cache, ids = make_interleaved()
    table, row = cache._group.table, int(ids[1]) & ((1 << ID_BITS) - 1)
    table.starts[row, 1] = 2  # the second block claims the place of the third
    touch(table, row)
    with pytest.raises(IntegrityError, match="row 1 of a step.*token 8.*without a place"):
        feed(cache, ids, [50, 51])


@pytest.mark.parametrize(
    "options",
    [
        {"growth": "lazy_merge", "num_tokens": 1024}, {"growth": "adaptive", "num_tokens": 1024},
        {"num_tokens": 2048, "tiers": TIERS, "prefix_caching": False},
        {"layer_groups": [{"layers": [0], "num_tokens": 1024}, {"layers": [1], "window": 24, "num_tokens": 1024}]},
        {"layer_groups": [{"layers": [0], "num_tokens": 1024}, {"layers": [1], "chunk": 16, "num_tokens": 1024}]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_moved_shared_and_cut_off_is_no_fault(options):
    cache = make(**options)
    rng, prompt = np.random.default_rng(0), list(range(100, 140))
    ids, _ = cache.open([prompt, []])
    feed(cache, ids[:1], prompt)
    for _ in range(60):
        feed(cache, ids, rng.integers(0, 50, 2))
    forks = cache.fork(ids[:1], 2).ravel()
    feed(cache, forks, rng.integers(0, 50, 2))
    cache.truncate(forks, cache.lengths(forks) - 5)
    feed(cache, [*ids, *forks], rng.integers(0, 50, (4, 3)))
    cache.preempt(ids[:1], to="host")
    feed(cache, forks, rng.integers(0, 50, 2))
    assert cache.restore(ids[:1]).all()
    cache.compact(1 << 20)
    feed(cache, [*ids, *forks], rng.integers(0, 50, 4))
    cache.close(ids[:1])
    again, found = cache.open([[*prompt, 1, 2]])
    rest = [*prompt, 1, 2][int(found[0]) :]
    feed(cache, again, rest)
    feed(cache, [*again, *forks], rng.integers(0, 50, 3))
    assert KVCache.from_snapshot(cache.config, cache.snapshot()).stats().num_tokens == cache.stats().num_tokens


def test_token_ids_of_a_step_serve_its_end():
    cache = make(num_tokens=512)
    ids, _ = cache.open([[]])
    feed(cache, ids, np.arange(20))
    assert cache.open([list(range(20))])[1].tolist() == [16]
    with pytest.raises(ArgumentError, match="token_ids"):
        cache.begin_step(ids, 2, [1])


@needs_compiler
def test_steps_of_the_device_are_checked(monkeypatch):
    use_host(monkeypatch)
    cache = make_cache(num_tokens=512, head_dim=8)
    ids, _ = cache.open([[]])
    steps = DeviceSteps(cache, 2, 8)
    rng = np.random.default_rng(0)

    def turn(spoil):
        steps.load(ids, [5])
        for i in range(8):
            run = steps.begin()
            key = rng.standard_normal((2, 1, 8)).astype(np.float32)
            for layer in range(2):
                run.append(layer, key, key)
            if spoil and i == 3:
                slot = int(steps._graph_step.tables.slot_mapping[0])
                cache.key_cache(0)[slot // 8, 0, slot % 8] = 0
        return steps.finish()

    assert turn(False).num_new.tolist() == [8]
    with pytest.raises(IntegrityError, match="token 11.*key has changed"):
        turn(True)


@needs_compiler
@pytest.mark.parametrize("options", [{"beams": 4}, {"tiers": TIERS}], ids=str)
def test_what_moves_in_steps_of_the_device_keeps_its_records(monkeypatch, options):
    """No false alarm, and a fault is found after moves, too."""
    use_host(monkeypatch)
    cache = make_cache(num_tokens=8192, head_dim=64, growth="lazy_merge", tiers=options.get("tiers"))
    rng = np.random.default_rng(0)
    ids, _ = cache.open([[]] * 4)
    with cache.begin_step(ids, 61, np.tile(np.arange(61), 4)) as step:
        key = rng.standard_normal((244, 1, 64)).astype(np.float32)
        for layer in range(2):
            step.append(layer, key, key)
        cache.end_step(step)
    steps = DeviceSteps(cache, 4, 64, beams=options.get("beams", 1))
    for turn in range(4):
        steps.load(ids, [5] * 4)
        for i in range(50):
            steps.tokens[:] = rng.integers(0, 99, 4)
            if "beams" in options:
                steps.parents[:] = rng.integers(0, 4, 4)
            run = steps.begin()
            key = rng.standard_normal((4, 1, 64)).astype(np.float32)
            for layer in range(2):
                run.append(layer, key, key)
            if (turn, i) == (3, 40):
                slot = int(steps._graph_step.tables.slot_mapping[0])
                cache.key_cache(0)[slot // 8, 0, slot % 8] = 0
        if turn < 3:
            assert steps.finish().num_new.tolist() == [50] * 4
    with pytest.raises(IntegrityError, match="key has changed"):
        steps.finish()


@needs_compiler
@pytest.mark.parametrize("seed", range(6))
def test_the_kernel_does_what_the_host_does(monkeypatch, seed):
    """Drawn tables, lengths, tokens and damages: the same records, and the same first fault where there is one row."""
    on_the_host(monkeypatch, on_device)
    rng = np.random.default_rng(seed)
    batch, width, granules = int(rng.integers(1, 5)), 6, 64
    keys = rng.standard_normal((granules, 2, 8, 16)).astype(np.float32)
    places = rng.permutation(granules // 8)[: batch * 2].reshape(batch, 2) * 8
    table, starts = np.full((2, batch, width), -1, np.int32)
    for row in range(batch):
        late = int(rng.integers(0, 4)) if seed % 2 else 0
        table[row, :2], starts[row, :2] = places[row] | 7 << 24, (late, late + 8)
        if rng.random() < 0.3:
            table[row, 0] |= 1 << 27  # quantized
    records = [np.full_like(keys, 0).view(np.uint32) for _ in range(2)]
    reports = np.zeros((2, 6), np.uint32)
    held = np.zeros(batch, np.int32)
    for step in range(4):
        counts = rng.integers(0, 20 if step == 0 else 4, batch)
        room = 8 * (starts[:, 1] + 8) - held
        counts = np.minimum(counts, room)
        if step == 0:
            counts = np.minimum(8 * starts[:, 0] + counts, room)
        lengths = (held + counts).astype(np.int32)
        bounds = np.cumsum([0, *counts]).astype(np.int32)
        tokens = rng.integers(0, 1 << 40, bounds[-1] + 1)[: bounds[-1]]
        on_host.check_rows(keys.view(np.uint32), records[0], table, starts, lengths, bounds, tokens, reports[0])
        described = [
            operand(array, "array") for array in (keys, records[1].view(np.float32), table, starts, lengths, bounds)
        ]
        address = tokens.ctypes.data if len(tokens) else 0
        on_device.check_rows(*described, address, reports[1].ctypes.data, stream=0)
        assert (records[0] == records[1]).all()
        held = lengths
        if step == 2:  # damage something that is held
            row = int(rng.integers(batch))
            token = int(rng.integers(8 * starts[row, 0], max(held[row], 8 * starts[row, 0] + 1)))
            index = token // 8 - starts[row, 0]
            granule = int(table[row, index // 8] & 0xFFFFFF) + index % 8
            keys[granule, 0, token % 8, 0] += 1
    assert (reports[0][0] > 0) == (reports[1][0] > 0)
    assert reports[0].tolist() == reports[1].tolist()


def test_an_unknown_kind_of_check_is_refused():
    environment = {**os.environ, "KVTOOLKIT_CHECK": "Canary"}
    ran = subprocess.run([sys.executable, "-c", "import kvtoolkit"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "ConfigError: KVTOOLKIT_CHECK: expected 0, 1 or canary, got 'Canary'" in ran.stderr
