"""Turns of the device between the calls of any other order, every read compared with plain Python token lists."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from kvtoolkit import DeviceSteps, SequenceError, StepError
from kvtoolkit.formats.entry import unpack_entries
from tests.kvtoolkit.cache.host_device import use_host
from tests.kvtoolkit.cache.test_cache_machine import (
    NUM_HEADS,
    NUM_LAYERS,
    TIERS,
    CacheMachine,
    GroupMachine,
    TierMachine,
    tiered_fields,
)
from tests.kvtoolkit.cuda.host_kernels import needs_compiler

pytestmark = needs_compiler
BATCH, MAX_STEPS = 3, 20


@pytest.fixture(autouse=True, scope="module")
def host():
    with pytest.MonkeyPatch.context() as patch:
        use_host(patch)
        yield


class DeviceMachine(CacheMachine):
    """The machine of all calls, with two `DeviceSteps` beside each other."""

    superblocks: ClassVar[list[int]] = [2, 3, 8, 24]

    def start(self, data):
        super().start(data)
        self.turns: dict[int, SimpleNamespace] = {}
        self.longest = [1 << 20, data.draw(st.sampled_from([16, 100]))]
        self.make_devices()

    def make_devices(self):
        object.__setattr__(self.cache.config, "backend", "cuda")
        self.devices = [DeviceSteps(self.cache, BATCH, MAX_STEPS, max_seq_len=longest) for longest in self.longest]

    @precondition(lambda self: self.tokens and len(self.turns) < 2)
    @rule(data=st.data(), num_steps=st.integers(1, MAX_STEPS), is_bounded=st.booleans())
    def load_turn(self, data, num_steps, is_bounded):
        ids = self.some(data, most=BATCH)
        which = data.draw(st.sampled_from([i for i in (0, 1) if i not in self.turns]))
        lengths = [len(self.tokens[seq]) for seq in ids]
        limit = self.devices[which]._graph_step._max_seq_len
        max_lens = (
            [data.draw(st.integers(0, 12)) + length for length in lengths] if is_bounded else [1 << 30] * len(ids)
        )
        first = data.draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
        self.devices[which].load(ids, first, num_steps, max_lens=max_lens if is_bounded else None)
        self.turns[which] = SimpleNamespace(
            ids=ids, held=[self.tokens.pop(seq) for seq in ids], new=[[] for _ in ids], next=first,
            finished=[False] * len(ids), max_lens=np.minimum(max_lens, limit).tolist(), status=[0] * len(ids),
        )  # fmt: skip

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), count=st.integers(1, MAX_STEPS + 3))
    def replay(self, data, count):
        which = data.draw(st.sampled_from(sorted(self.turns)))
        steps, turn = self.devices[which], self.turns[which]
        for _ in range(count):
            run = steps.begin()
            given, status = steps.tokens.tolist(), steps.status.tolist()
            assert status[len(turn.ids) :] == [4] * (BATCH - len(turn.ids))
            keys = np.zeros((NUM_LAYERS, BATCH, NUM_HEADS, self.head_dim), np.float32)
            for b, seq in enumerate(turn.ids):
                self.require_status(turn, b, status[b])
                if status[b] == 0:
                    tokens = [*turn.held[b], *turn.new[b]]
                    assert given[b] == turn.next[b], seq
                    assert steps.positions[b] == len(tokens)
                    turn.new[b].append(given[b])
                    for layer in range(NUM_LAYERS):
                        keys[layer, b] = self.key_of([*tokens, given[b]], layer)[-1]
                    turn.next[b] = (given[b] + len(tokens)) % 2
            for layer in range(NUM_LAYERS):
                run.append(layer, self.put(keys[layer]), self.put(-keys[layer]))
            turn.status = status[: len(turn.ids)]
            steps.tokens[: len(turn.ids)] = turn.next
        if data.draw(st.integers(0, 3)) == 0:
            b = data.draw(st.integers(0, len(turn.ids) - 1))
            turn.finished[b] = steps.finished[b] = True

    def require_status(self, turn, b, status):
        """A row has a token unless there is a reason; that memory is short is not known here."""
        length = len(turn.held[b]) + len(turn.new[b])
        if turn.finished[b]:
            assert status == 4
        elif length >= turn.max_lens[b]:
            assert status == 3
        elif len(turn.new[b]) == MAX_STEPS:
            assert status == 5
        else:
            assert status in ((0, 1, 2) if self.cache.config.max_entries else (0, 1))

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), how=st.sampled_from(["finish", "finish", "finish", "abort", "drop"]))
    def end_turn(self, data, how):
        which = data.draw(st.sampled_from(sorted(self.turns)))
        turn = self.turns.pop(which)
        if how == "finish":
            found = self.devices[which].finish()
            assert found.num_new.tolist() == [len(new) for new in turn.new]
            assert [row[: len(new)].tolist() for row, new in zip(found.history, turn.new, strict=True)] == turn.new
            assert found.next_tokens.tolist() == turn.next
            assert found.finished.tolist() == turn.finished
            assert found.status.tolist() == turn.status
        elif how == "abort":
            self.devices[which].abort()
        else:
            self.devices[which] = DeviceSteps(self.cache, BATCH, MAX_STEPS, max_seq_len=self.longest[which])
        for seq, held, new in zip(turn.ids, turn.held, turn.new, strict=True):
            self.tokens[seq] = [*held, *new] if how == "finish" else held

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def lose_one(self, data):
        which = data.draw(st.sampled_from(sorted(self.turns)))
        turn = self.turns.pop(which)
        lost = data.draw(st.sampled_from(turn.ids))
        assert self.cache.end_orphans(np.setdiff1d(self.cache.seq_ids(), [lost])).tolist() == [lost]
        if data.draw(st.booleans()):
            with pytest.raises(StepError, match="end_orphans"):
                self.devices[which].finish()
        else:
            self.devices[which].abort()
        self.tokens |= {seq: held for seq, held in zip(turn.ids, turn.held, strict=True) if seq != lost}

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def use_in_other_calls(self, data):
        turn = self.turns[data.draw(st.sampled_from(sorted(self.turns)))]
        seq = [data.draw(st.sampled_from(turn.ids))]
        cache = self.cache
        calls = [
            lambda: cache.begin_step(seq, 1), lambda: cache.close(seq), lambda: cache.fork(seq, 1),
            lambda: cache.pin(seq), lambda: cache.preempt(seq, "host"), lambda: cache.truncate(seq, [0]),
            lambda: cache.reorder(seq, [0]), lambda: cache.restore(seq), lambda: self.devices[0].load(seq, [1]),
            lambda: self.devices[1].load(seq, [1]), cache.snapshot,
        ]  # fmt: skip
        with pytest.raises((SequenceError, StepError)):
            data.draw(st.sampled_from(calls))()
        assert cache.lengths(turn.ids).tolist() == [len(held) for held in turn.held]

    @rule()
    def repair(self):
        self.cache.repair()

    @rule()
    def clear_prefixes(self):
        self.cache.clear_prefixes()

    @precondition(lambda self: len(self.tokens) < 8)
    @rule(data=st.data(), count=st.integers(1, 2))
    def open(self, data, count):
        if len(self.cache.seq_ids()) + count <= self.cache.config.max_seqs:
            super().open(data, count)

    @precondition(lambda self: not self.leases and not self.steps and not self.turns)
    @rule()
    def snapshot(self):
        object.__setattr__(self.cache.config, "backend", "cpu")
        super().snapshot()
        self.make_devices()

    @invariant()
    def devices_read_what_is_there(self):
        stats = self.cache.stats()
        parts = stats.free, stats.used, stats.cached, stats.kept_back, stats.callers, stats.pinned
        assert sum(parts) == stats.capacity
        for which, turn in self.turns.items():
            readers = self.readers()
            for b, (held, new) in enumerate(zip(turn.held, turn.new, strict=True)):
                tokens = [*held, *new]
                if len(tokens) <= self.devices[which]._graph_step._max_seq_len:
                    self.compare_on_device(readers, which, b, tokens)

    def compare_on_device(self, readers, which, b, tokens):
        for layer, read in enumerate(readers):
            (tables,) = (
                fixed.tables
                for fixed, group in zip(self.devices[which]._graph_step._fixed, self.cache._state.groups, strict=True)
                if layer in group.layers.layers
            )
            entries = np.asarray(tables.block_table[b])
            _, sizes, _ = unpack_entries(entries)
            starts = np.asarray(tables.block_starts[b])[sizes > 0]
            first = int(starts[0]) if len(starts) else self.first_of(layer, tokens)
            assert first <= self.first_of(layer, tokens)
            assert starts.tolist() == (first + np.cumsum(sizes[sizes > 0]) - sizes[sizes > 0]).tolist()
            for held, sign in zip(read(entries), (1, -1), strict=True):
                self.compare(held[: len(tokens) - 8 * first] * sign, self.key_of(tokens, layer)[8 * first :])

    def teardown(self):
        if hasattr(self, "turns"):
            for which, turn in self.turns.items():
                self.devices[which].abort()
                self.tokens |= dict(zip(turn.ids, turn.held, strict=True))
        super().teardown()


class GroupedDeviceMachine(DeviceMachine, GroupMachine):
    """With layers in groups that keep other tokens."""

    superblocks: ClassVar[list[int]] = [3, 8, 24]


class TieredDeviceMachine(DeviceMachine, TierMachine):
    """With tokens older than the last 64 quantized."""

    superblocks: ClassVar[list[int]] = [8, 16, 30]


CONFIGS = {
    "adaptive": {"allocator": "buddy", "growth": "adaptive"},
    "gap": {"allocator": "buddy", "growth": "proportional", "block_sizes": [8, 64]},
    "slab": {"allocator": "slab", "growth": "lazy_merge"},
    "paged": {"allocator": "paged", "growth": "fixed16", "block_sizes": [16]},
    "lockfree": {"allocator": "lockfree", "growth": "append"},
    "windows": {"allocator": "buddy", "layer_groups": [{"layers": 0}, {"layers": 1, "window": 20}]},
    "two windows": {
        "allocator": "slab",
        "growth": "lazy_merge",
        "layer_groups": [{"layers": 1, "window": 9}, {"layers": 0, "window": 70}],
    },
    "tiers": tiered_fields({"allocator": "buddy", "growth": "lazy_merge", "tiers": TIERS}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_read_returns_what_the_sequence_was_given_between_turns_of_the_device(name):
    config = CONFIGS[name]
    grouped = GroupedDeviceMachine if "layer_groups" in config else DeviceMachine
    base = TieredDeviceMachine if "tiers" in config else grouped
    machine = type("Machine", (base,), {"config": config})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=10, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
