"""Whole caches with quantized tiers on the GPU: every read compared with token lists, and attention with the judge."""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvtoolkit.reference import tiered_attention
from kvtoolkit.tiers import TierCaches
from tests.kvtoolkit.test_cache_machine import TIERED_CONFIGS, TierMachine, tiered_fields
from tests.kvtoolkit.test_tiers_cache import HEAD_DIM, NUM_HEADS, NUM_LAYERS, make, tiers_of

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


def test_steps_attend_to_all_tiers():
    import cupy

    cache = make(dtype="float16", backend="cuda")
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
