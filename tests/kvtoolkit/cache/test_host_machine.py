"""Whole caches with host memory driven in any order: wherever tokens are, they are those that were written."""

from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from kvtoolkit.cache.state.block_table import PREEMPTED
from tests.kvtoolkit.cache.late_transfers import LateTransfers
from tests.kvtoolkit.cache.test_cache_machine import TIERS, CacheMachine, TierMachine, tiered_fields

SMALL, LARGE = 3 << 14, 40 << 14
"""Bytes of 3 and of 40 blocks of 64 tokens at head_dim 8."""

CONFIGS = [
    {"allocator": "buddy", "tiers": {"host": LARGE, "hot": 64, "pinned_tokens": 0}},
    {"allocator": "buddy", "growth": "append", "tiers": {"host": SMALL, "hot": 64, "pinned_tokens": 64}},
    {"allocator": "buddy", "growth": "lazy_merge", "tiers": {"host": LARGE, "hot": 64}},
    {"allocator": "slab", "tiers": {"host": LARGE, "hot": 64, "pinned_tokens": 0}},
    {"allocator": "buddy", "growth": "fixed16", "block_sizes": (16, 64), "tiers": {"host": LARGE, "hot": 64}},
    {"allocator": "paged", "growth": "fixed64", "tiers": {"host": SMALL, "hot": 64, "pinned_tokens": 0}},
    {"allocator": "lockfree", "tiers": {"host": LARGE, "hot": 64, "pinned_tokens": 0}},
]

TIERED = [
    {"allocator": "buddy", "tiers": {**TIERS, "host": 1 << 20}},
    {"allocator": "buddy", "tiers": {**TIERS, "host": 3 << 19, "tier_memory": {"hot": 0.8, "warm": 0.1, "cold": 0.1}}},
    {"allocator": "slab", "tiers": {**TIERS, "warm": None, "prefix_reuse_tiers": "all", "host": 1 << 20}},
]


class Hints:
    """Rules for caches with host memory; copies end late, and in any order."""

    def start(self, data):
        self.make_late()
        super().start(data)

    def make_late(self):
        """Let copies be under way for some calls; `settle` is asked once a step."""
        storage = self.cache._group.storage
        storage.transfers = LateTransfers(storage.transfers)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def offload(self, data):
        self.cache.offload(self.some(data))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def prefetch(self, data):
        self.cache.prefetch(self.some(data))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), seconds=st.sampled_from([0, 1, 1e6]))
    def retain(self, data, seconds):
        self.cache.retain(self.some(data), seconds)

    @precondition(lambda self: self.preempted)
    @rule(data=st.data(), keep_free=st.sampled_from([0, 0, 8, 200]))
    def restore(self, data, keep_free):
        ids = self.some(data, self.preempted)
        for seq, ok in zip(ids, self.cache.restore(ids, keep_free=keep_free).tolist(), strict=True):
            to, tokens = self.preempted[seq]
            if not ok:  # a sequence for which host memory had no room was copied, and needs room again
                continue
            held = int(self.cache.lengths([seq])[0])
            assert held == len(tokens) if to == "host" else held % 8 == 0
            self.tokens[seq] = tokens[:held]
            del self.preempted[seq]

    @precondition(lambda self: len(self.tokens) > 0)
    @rule(data=st.data(), rounds=st.integers(1, 4), count=st.sampled_from([1, 7, 30]))
    def preempt_and_go_on(self, data, rounds, count):
        """What a row writes while the move of its preemption is still under way is not lost."""
        ids = self.some(data, most=2)
        for _ in range(rounds):
            self.cache.preempt(ids, "host")
            ok = self.cache.restore(ids)
            away = [seq for seq, is_back in zip(ids, ok, strict=True) if not is_back]
            ids = [seq for seq, is_back in zip(ids, ok, strict=True) if is_back]
            self.preempted |= {seq: ("host", self.tokens.pop(seq)) for seq in away}
            if not ids:
                return
            self.run_step(ids, [[1] * count for _ in ids])

    @precondition(lambda self: self.preempted)
    @rule(data=st.data())
    def close_preempted(self, data):
        ids = self.some(data, self.preempted, most=2)
        self.cache.close(ids)
        for seq in ids:
            del self.preempted[seq]

    @rule(salt=st.sampled_from([None, "other"]))
    def clear_prefixes(self, salt):
        self.cache.clear_prefixes(salt)

    @invariant()
    def preempted_rows_keep_what_they_hold(self):
        """Entries of preempted rows name the right tokens all the time, not only when they come back."""
        kept = {seq: tokens for seq, (to, tokens) in self.preempted.items() if to == "host"}
        readers = self.readers() if kept else []
        table = self.cache._group.table
        for seq, tokens in kept.items():
            (row,) = self.cache._state.rows_of([seq], (PREEMPTED,))
            if not self.cache._state.preempted[row].stays:  # host memory had no room for it, so it was copied
                continue
            for layer, read in enumerate(readers):
                keys, values = (held[: len(tokens)] for held in read(table.entries[row]))
                self.compare(keys, self.key_of(tokens, layer))
                self.compare(-values, self.key_of(tokens, layer))

    @rule()
    def repair(self):
        self.cache.repair()

    @precondition(lambda self: not self.leases and not self.steps)
    @rule()
    def snapshot(self):
        super().snapshot()
        self.make_late()

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache._places.settle_all()
        super().teardown()


class HostMachine(Hints, CacheMachine):
    superblocks: ClassVar[list[int]] = [2, 3, 8]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.sampled_from([64, 100, 300]))
    def extend(self, data, count):
        ids = self.some(data, most=2)
        self.run_step(ids, [[1] * count for _ in ids])


class TieredHostMachine(Hints, TierMachine):
    superblocks: ClassVar[list[int]] = [8, 16]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join([c["allocator"], c.get("growth", "adaptive")]))
def test_tokens_are_the_same_wherever_they_are(config):
    machine = type("Machine", (HostMachine,), {"config": config})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize("config", TIERED, ids=lambda c: "-".join([c["allocator"], *c["tiers"]]))
def test_tokens_are_the_same_wherever_they_are_and_in_whichever_tier(config):
    machine = type("Machine", (TieredHostMachine,), {"config": tiered_fields(config)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
