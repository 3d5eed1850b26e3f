"""Whole caches with quantized tiers on the GPU: every read compared with token lists, and attention with the judge."""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvtoolkit.cache.tiering.rules import DEVICE_PERIOD
from kvtoolkit.formats.tier_caches import TierCaches
from kvtoolkit.reference import tiered_attention, tile_masses
from tests.kvtoolkit.cache.test_cache_machine import TIERED_CONFIGS, TierMachine, tiered_fields
from tests.kvtoolkit.cache.test_tiers_cache import HEAD_DIM, NUM_HEADS, NUM_LAYERS, TIERS, make, tiers_of

pytestmark = pytest.mark.gpu


class DeviceTierMachine(TierMachine):
    """The machine of the CPU's caches, its memory on the GPU."""

    dtype = "float16"

    def put(self, array):
        import cupy

        return cupy.asarray(array.astype(np.float16))

    def get(self, array):
        return array.get()


@pytest.mark.parametrize("config", [config for config in TIERED_CONFIGS if "demote" not in config["tiers"]])
def test_every_read_returns_what_the_sequence_was_given_whatever_tier_it_is_in(config):
    fields = {"config": {**tiered_fields(config), "backend": "cuda"}}
    run_state_machine_as_test(
        type("Machine", (DeviceTierMachine,), fields),
        settings=settings(
            max_examples=5,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        ),
    )


@pytest.mark.parametrize("backend", ["cuda", "numba"])
def test_steps_attend_to_all_tiers(backend):
    import cupy

    cache = make(dtype="float16", backend=backend)
    random = np.random.default_rng(0)
    seq_ids, _ = cache.open([[]] * 3)
    for counts in ([700, 300, 90], [1, 1, 1], [64, 0, 3], *[[1, 1, 1]] * 20):
        step = cache.begin_step(seq_ids, counts)
        for layer in range(NUM_LAYERS):
            key, value = random.standard_normal((2, sum(counts), NUM_HEADS, HEAD_DIM)).astype(np.float16)
            step.append(layer, cupy.asarray(key), cupy.asarray(value))
        for layer in range(NUM_LAYERS):
            q = random.standard_normal((sum(counts), 2 * NUM_HEADS, HEAD_DIM)).astype(np.float16)
            out = step.attend(layer, cupy.asarray(q)).get()
            *caches, first = cache.tier_caches(layer)
            expected, _ = tiered_attention(
                q, TierCaches(*(one.get() for one in caches), first), step.block_table, step.block_starts,
                step.seq_lens, cu_seqlens_q=step.cu_seqlens_q,
            )  # fmt: skip
            np.testing.assert_allclose(out, expected, atol=4e-3)
        cache.end_step(step)
    assert {"w", "c"} <= set(tiers_of(cache, seq_ids[0]))


def on_host(caches):
    *arrays, first = caches
    return TierCaches(*(one.get() for one in arrays), first)


def fill(cache, step, random, num_tokens):
    import cupy

    for layer in range(NUM_LAYERS):
        key, value = random.standard_normal((2, num_tokens, NUM_HEADS, HEAD_DIM)).astype(np.float16)
        step.append(layer, cupy.asarray(key), cupy.asarray(value))


def test_masses_are_collected_every_few_steps_of_decoding():
    import cupy

    cache = make({**TIERS, "demote": "mass"}, dtype="float16", backend="cuda")
    random = np.random.default_rng(0)
    seq_ids, _ = cache.open([[]] * 2)
    masses = cache._state.group.table.masses
    for number in range(DEVICE_PERIOD + 1):
        step = cache.begin_step(seq_ids, [500, 200] if number == 0 else 1)
        fill(cache, step, random, len(step.slot_mapping))
        q = random.standard_normal((len(step.slot_mapping), 2 * NUM_HEADS, HEAD_DIM)).astype(np.float16)
        for layer in range(NUM_LAYERS):
            step.attend(layer, cupy.asarray(q))
        good = [
            tile_masses(q, on_host(cache.tier_caches(layer)), step.block_table, step.block_starts, step.seq_lens)
            for layer in range(NUM_LAYERS if number == DEVICE_PERIOD else 0)
        ]
        assert (masses == 0).all()
        cache.end_step(step)
    found = masses[seq_ids & 0xFFFFF]
    expected = np.mean(good, axis=(0, 3))
    kept = 0.95**DEVICE_PERIOD
    np.testing.assert_allclose(found[:, : expected.shape[1]], (1 - kept) * expected, rtol=2e-3, atol=1e-6)
