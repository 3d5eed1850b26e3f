"""Whole caches driven in any order, every read compared with plain Python token lists."""

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvtoolkit import ArgumentError, CacheConfig, CacheFullError, KVCache
from kvtoolkit.cache.state.shared_reads import SharedReads
from kvtoolkit.formats.entry import unpack_entries
from kvtoolkit.formats.quantized import INT4, INT8
from tests.kvtoolkit.cache.test_shared_reads import check as check_shared

NUM_LAYERS, NUM_HEADS = 2, 2

CONFIGS = [
    {"allocator": "buddy", "growth": "adaptive"},
    {"allocator": "buddy", "growth": "lazy_merge"},
    {"allocator": "buddy", "growth": "append"},
    {"allocator": "buddy", "growth": "proportional"},
    {"allocator": "buddy", "growth": "fixed32"},
    {"allocator": "slab", "growth": "adaptive"},
    {"allocator": "slab", "growth": "lazy_merge"},
    {"allocator": "lockfree", "growth": "adaptive"},
    {"allocator": "lockfree", "growth": "lazy_merge", "allocator_options": {"layout": "slab"}},
    {"allocator": "paged", "growth": "fixed8"},
    {"allocator": "paged", "growth": "fixed16"},
    {"allocator": "paged", "growth": "fixed64"},
]


def key_of(tokens: list[int], layer: int, head_dim: int) -> np.ndarray:
    """Keys that give away token, position, layer and head, exactly in any dtype; values are their negatives."""
    positions = np.arange(len(tokens))
    keys = np.ones((len(tokens), NUM_HEADS, head_dim), np.float32)
    keys[..., 0] = np.asarray(tokens, np.float32)[:, None] + 1
    keys[..., 1], keys[..., 2] = positions[:, None] // 64, positions[:, None] % 64
    keys[..., 3] = layer
    keys[..., 4] = np.arange(NUM_HEADS)
    return keys


def tokens_of(granules: np.ndarray) -> np.ndarray:
    """``[n, num_kv_heads, 8, head_dim]`` as ``[8 * n, num_kv_heads, head_dim]``."""
    return granules.transpose(0, 2, 1, 3).reshape(-1, NUM_HEADS, granules.shape[-1])


class CacheMachine(RuleBasedStateMachine):
    """Each sequence holds its own tokens, whatever happens to the others."""

    config: ClassVar[dict] = {}
    dtype: ClassVar[str] = "float32"
    head_dim: ClassVar[int] = 8
    superblocks: ClassVar[list[int]] = [2, 3, 8, 24]
    run_lengths: ClassVar = st.integers(0, 140)
    """Of a prompt: so many equal tokens."""

    def put(self, array):
        """A NumPy array where the cache takes it from."""
        return array.astype(self.dtype)

    def get(self, array):
        """An array of the cache as a NumPy array."""
        return array

    def key_of(self, tokens, layer):
        """The keys of all tokens of a sequence."""
        return key_of(tokens, layer, self.head_dim)

    def reader(self, layer):
        """A function that returns keys and values ``[num_tokens, num_kv_heads, head_dim]`` of entries."""
        caches = [self.get(cache(layer)) for cache in (self.cache.key_cache, self.cache.value_cache)]

        def read(entries):
            granules, sizes, _ = unpack_entries(entries)
            used = np.concatenate([np.arange(g, g + n) for g, n in zip(granules, sizes, strict=True) if n] or [[]])
            return [tokens_of(cache[used.astype(int)]) for cache in caches]

        return read

    def compare(self, held, expected):
        """Whether what was read is what was written."""
        np.testing.assert_array_equal(held, expected)

    @initialize(
        data=st.data(),
        max_seqs=st.sampled_from([3, 8]),
        max_entries=st.sampled_from([None, None, 6]),
        eviction=st.sampled_from(["lru", "lfu"]),
    )
    def make(self, data, max_seqs, max_entries, eviction):
        config = CacheConfig(
            num_layers=NUM_LAYERS,
            num_kv_heads=NUM_HEADS,
            head_dim=self.head_dim,
            dtype=self.dtype,
            num_tokens=64 * data.draw(st.sampled_from(self.superblocks)),
            max_seqs=max_seqs,
            max_entries=max_entries,
            eviction=eviction,
            migrate_budget=2,
            **self.config,
        )
        self.cache = KVCache(config)
        self.reads = SharedReads(self.cache._group.table, 1)
        self.tokens: dict[int, list[int]] = {}
        self.preempted: dict[int, tuple[str, list[int]]] = {}
        self.leases: list[tuple] = []
        self.steps: list[tuple] = []
        self.start(data)

    def start(self, data):
        """What every run begins with."""

    def some(self, data, pool=None, least=1, most=4):
        ids = sorted(self.tokens if pool is None else pool)
        return data.draw(st.lists(st.sampled_from(ids), min_size=least, max_size=most, unique=True))

    def run_step(self, ids, chunks, publish=True):
        """Append ``chunks`` to the sequences ``ids``; only rows that are ok take theirs."""
        step = self.begin(ids, chunks)
        self.tokens |= {seq: self.tokens[seq] + chunk for seq, chunk in self.taken(step, ids, chunks)}
        self.cache.end_step(step, [t for chunk in chunks for t in chunk] if publish else None)

    @staticmethod
    def taken(step, ids, chunks):
        """The sequences that a step holds, with their chunks."""
        return [(seq, chunk) for seq, chunk, ok in zip(ids, chunks, step.ok, strict=True) if ok]

    def begin(self, ids, chunks):
        """A step with everything appended."""
        step = self.cache.begin_step(ids, [len(chunk) for chunk in chunks])
        lengths = np.array([len(self.tokens[seq]) for seq in ids])
        total = sum(map(len, chunks))
        for layer in range(NUM_LAYERS):
            key = np.zeros((total, NUM_HEADS, self.head_dim), np.float32)
            for b, (seq, chunk) in enumerate(zip(ids, chunks, strict=True)):
                first, end = step.cu_seqlens_q[b : b + 2]
                key[first:end] = self.key_of(self.tokens[seq] + chunk, layer)[lengths[b] :]
            step.append(layer, self.put(key), self.put(-key))
        assert step.seq_lens.tolist() == [
            length + len(chunk) if ok else 0 for length, chunk, ok in zip(lengths, chunks, step.ok, strict=True)
        ]
        return step

    @precondition(lambda self: self.tokens and len(self.steps) < 3)
    @rule(data=st.data())
    def begin_and_leave_open(self, data):
        ids = self.some(data)
        chunks = [[1] * data.draw(st.sampled_from([0, 1, 9, 100, 300])) for _ in ids]
        step = self.begin(ids, chunks)
        self.steps.append((step, ids, chunks, {seq: self.tokens.pop(seq) for seq, _ in self.taken(step, ids, chunks)}))

    @precondition(lambda self: self.steps)
    @rule(data=st.data(), end=st.booleans())
    def end_one(self, data, end):
        step, ids, chunks, held = self.steps.pop(data.draw(st.integers(0, len(self.steps) - 1)))
        if end:
            self.cache.end_step(step, [t for chunk in chunks for t in chunk])
            held = {seq: held[seq] + chunk for seq, chunk in zip(ids, chunks, strict=True) if seq in held}
        else:
            self.cache.abort_step(step)
        self.tokens |= held

    @precondition(lambda self: len(self.tokens) < 8)
    @rule(data=st.data(), count=st.integers(1, 2))
    def open(self, data, count):
        # few different tokens and long runs, so that prefixes meet
        prompts = [
            [data.draw(st.integers(0, 1))] * data.draw(self.run_lengths)
            + data.draw(st.lists(st.integers(0, 2), max_size=9))
            for _ in range(count)
        ]
        try:
            ids, cached = self.cache.open(prompts)
        except CacheFullError:
            assert (
                len(self.tokens)
                + len(self.preempted)
                + sum(len(held) for _, held in self.leases)
                + sum(len(held) for *_, held in self.steps)
                + count
                > self.cache.config.max_seqs
            )
            return
        for seq, prompt, hit in zip(ids.tolist(), prompts, cached.tolist(), strict=True):
            assert hit % 8 == 0
            assert hit < max(1, len(prompt))
            self.tokens[seq] = prompt[:hit]
        if data.draw(st.booleans()):
            self.run_step(ids.tolist(), [prompt[hit:] for prompt, hit in zip(prompts, cached.tolist(), strict=True)])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), publish=st.sampled_from([True, True, True, False]))
    def step(self, data, publish):
        ids = self.some(data)
        chunks = [data.draw(st.lists(st.integers(0, 1), max_size=3) | st.just([1] * 9)) for _ in ids]
        self.run_step(ids, chunks, publish)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), rounds=st.integers(1, 40))
    def decode(self, data, rounds):
        ids = self.some(data)
        for _ in range(rounds):
            self.run_step(ids, [[1] for _ in ids])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.integers(0, 30))
    def abort_step(self, data, count):
        with self.cache.begin_step(self.some(data), count):
            pass

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), n=st.integers(0, 2))
    def fork(self, data, n):
        ids = self.some(data, most=2)
        try:
            children = self.cache.fork(ids, n)
        except CacheFullError:
            return
        for seq, row in zip(ids, children.tolist(), strict=True):
            for child in row:
                self.tokens[child] = list(self.tokens[seq])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def reorder(self, data):
        ids = self.some(data)
        parents = [data.draw(st.integers(0, len(ids) - 1)) for _ in ids]
        try:
            self.cache.reorder(ids, parents)
        except CacheFullError:
            return
        self.tokens |= {
            seq: list(tokens) for seq, tokens in zip(ids, [self.tokens[ids[p]] for p in parents], strict=True)
        }

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data):
        ids = self.some(data)
        lens = [data.draw(st.integers(0, len(self.tokens[seq]))) for seq in ids]
        try:
            self.cache.truncate(ids, lens)
        except CacheFullError:
            return
        for seq, length in zip(ids, lens, strict=True):
            self.tokens[seq] = self.tokens[seq][:length]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def close(self, data):
        ids = self.some(data)
        self.cache.close(ids)
        for seq in ids:
            del self.tokens[seq]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), to=st.sampled_from(["drop", "host"]))
    def preempt(self, data, to):
        ids = self.some(data)
        self.cache.preempt(ids, to)
        for seq in ids:
            self.preempted[seq] = (to, self.tokens.pop(seq))

    @precondition(lambda self: self.preempted)
    @rule(data=st.data())
    def restore(self, data):
        ids = self.some(data, self.preempted)
        for seq, ok in zip(ids, self.cache.restore(ids).tolist(), strict=True):
            if ok:
                to, tokens = self.preempted.pop(seq)
                held = int(self.cache.lengths([seq])[0])
                assert held == len(tokens) if to == "host" else held % 8 == 0
                self.tokens[seq] = tokens[:held]

    @rule(budget=st.sampled_from([0, 64, 1000]))
    def compact(self, budget):
        assert self.cache.compact(budget) <= budget

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def pin(self, data):
        ids = self.some(data, most=2)
        try:
            lease = self.cache.pin(ids)
        except CacheFullError:
            return
        self.leases.append((lease, [list(self.tokens[seq]) for seq in ids]))

    @precondition(lambda self: self.leases)
    @rule(keep=st.booleans())
    def end_lease(self, keep):
        lease, held = self.leases.pop(0)
        if keep:
            for seq, tokens in zip(lease.commit().tolist(), held, strict=True):
                self.tokens[seq] = tokens
        else:
            lease.abort()

    @precondition(lambda self: not self.leases and not self.steps)
    @rule()
    def snapshot(self):
        self.cache = KVCache.from_snapshot(self.cache.config, self.cache.snapshot())
        self.reads = SharedReads(self.cache._group.table, 1)

    @invariant()
    def reads_are_right(self):
        self.cache.check_integrity()
        readers = self.readers() if self.steps else []
        for step, ids, _, held in self.steps:
            for b, seq in enumerate(ids):
                if seq in held:
                    self.compare_all(readers, step, b, held[seq])
        ids = sorted(self.tokens)
        if not ids:
            return
        with self.cache.begin_step(ids, 0) as step:
            readers = self.readers()
            self.check_shared(step)
            for b, seq in enumerate(ids):
                tokens = self.tokens[seq]
                assert step.ok[b]
                assert step.seq_lens[b] == len(tokens)
                self.compare_all(readers, step, b, tokens)

    def readers(self):
        """One for each layer. A step that begins may move tokens, which a copy on the host would miss."""
        return [self.reader(layer) for layer in range(NUM_LAYERS)]

    def check_shared(self, step):
        """What rows have in common is found."""
        check_shared(self.reads, step)

    def compare_all(self, readers, step, b, tokens):
        """The keys and values behind a row of a step are those of the tokens, from the first that is held."""
        for layer, read in enumerate(readers):
            tables = self.parts_of(step, layer)
            _, sizes, _ = unpack_entries(tables.block_table[b])
            starts = tables.block_starts[b][sizes > 0].tolist()
            first = starts[0] if starts else self.first_of(layer, tokens)
            assert starts == (first + np.concatenate([[0], np.cumsum(sizes[sizes > 0])[:-1]]))[: len(starts)].tolist()
            assert first <= self.first_of(layer, tokens)
            for held, sign in zip(read(tables.block_table[b]), (1, -1), strict=True):
                self.compare(held[: len(tokens) - 8 * first] * sign, self.key_of(tokens, layer)[8 * first :])

    def parts_of(self, step, layer):
        """The arrays of a step for a layer."""
        return step.tables_of(layer)

    def first_of(self, layer, tokens):
        """The first granule of a sequence that must be there for its next token."""
        return 0

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for lease, _ in self.leases:
            lease.abort()
        for step, _, _, held in self.steps:
            self.cache.abort_step(step)
            self.tokens |= held
        self.cache.close([*self.tokens, *self.preempted])
        self.cache.check_integrity()
        stats = self.cache.stats()
        assert stats.used == stats.callers == stats.pinned == 0
        for one in (stats, *stats.tiers.values()):
            assert one.free + one.cached + one.kept_back + one.pinned == one.capacity


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def test_every_read_returns_what_the_sequence_was_given(config):
    machine = type("Machine", (CacheMachine,), {"config": config})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


GROUPS = [
    [{"layers": 0}, {"layers": 1}],
    [{"layers": 0}, {"layers": 1, "window": 20}],
    [{"layers": 1, "window": 9}, {"layers": 0, "window": 70}],
    [{"layers": range(2), "window": 33}],
    [{"layers": 1, "window": 1}, {"layers": 0}],
    [{"layers": 0, "chunk": 40}, {"layers": 1, "window": 20}],
]

GROUPED_CONFIGS = [
    *({"allocator": "buddy", "growth": "adaptive", "layer_groups": groups} for groups in GROUPS),
    {"allocator": "buddy", "growth": "append", "layer_groups": GROUPS[1]},
    {"allocator": "buddy", "growth": "adaptive", "layer_groups": GROUPS[1], "keep_prefix_windows": False},
    {"allocator": "buddy", "growth": "lazy_merge", "layer_groups": GROUPS[2]},
    {"allocator": "slab", "growth": "adaptive", "layer_groups": GROUPS[1]},
    {"allocator": "lockfree", "growth": "lazy_merge", "layer_groups": GROUPS[3]},
    {"allocator": "paged", "growth": "fixed16", "layer_groups": GROUPS[1]},
    {"allocator": "paged", "growth": "fixed64", "layer_groups": GROUPS[2]},
]


class GroupMachine(CacheMachine):
    """The machine above, with layers in groups that keep other tokens."""

    superblocks: ClassVar[list[int]] = [3, 8, 24]

    def start(self, data):
        self.groups = {layer: group for group in self.cache.config.groups for layer in group.layers}

    def first_of(self, layer, tokens):
        return self.first_seen(layer, len(tokens))

    def first_seen(self, layer, length):
        """The first granule that a query at position ``length`` sees."""
        window, chunk = self.groups[layer].window, self.groups[layer].chunk
        return max(0, length - window + 1) // 8 if window else length // chunk * chunk // 8 if chunk else 0

    def parts_of(self, step, layer):
        """The arrays of a group, of which those in chunks are cut for kernels."""
        tables = step.tables_of(layer)
        if not self.groups[layer].chunk:
            return tables
        (part,) = (one for one in step._parts if layer in one.steps.group.layers.layers)
        arrays = part.steps.arrays.shown(part.arrays)
        return tables._replace(block_table=arrays.table, block_starts=arrays.starts, seq_lens=step.seq_lens)

    def begin(self, ids, chunks):
        lengths = [len(self.tokens[seq]) for seq in ids]
        step = super().begin(ids, chunks)
        for layer in self.groups:
            tables = self.parts_of(step, layer)
            assert tables.seq_lens.tolist() == step.seq_lens.tolist()
            for b in np.flatnonzero(step.ok & (step.num_new_tokens > 0)):
                # everything is freed that no query from now on sees
                assert tables.block_starts[b, 0] == self.first_seen(layer, lengths[b])
        return step

    def check_shared(self, step):
        """It is looked for in the tables of groups that keep all tokens alone; `test_group_tables` has them."""

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), drafts=st.integers(1, 20))
    def verify(self, data, drafts):
        """Rejected tokens can always be cut off right after the step that brought them."""
        ids = self.some(data)
        before = {seq: len(self.tokens[seq]) for seq in ids}
        self.run_step(ids, [[1] * drafts for _ in ids])
        lens = [data.draw(st.integers(before[seq], len(self.tokens[seq]))) for seq in ids]
        try:
            self.cache.truncate(ids, lens)
        except CacheFullError:
            return
        self.tokens |= {seq: self.tokens[seq][:length] for seq, length in zip(ids, lens, strict=True)}

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data):
        ids = self.some(data)
        lens = [data.draw(st.integers(0, len(self.tokens[seq]))) for seq in ids]
        with self.cache.begin_step(ids, 0) as step:
            starts = {layer: self.parts_of(step, layer).block_starts[: len(ids), 0] for layer in self.groups}
            # a row that holds nothing, because the next token sees nothing else, is as long as it has tokens
            firsts = {layer: np.where(one < 0, step.seq_lens // 8, one) for layer, one in starts.items()}
        is_gone = any(
            first > self.first_of(layer, self.tokens[seq][:length]) and 0 < length < len(self.tokens[seq])
            for layer, starts in firsts.items()
            for first, seq, length in zip(starts, ids, lens, strict=True)
        )
        try:
            self.cache.truncate(ids, lens)
        except ArgumentError:
            assert is_gone
            return
        except CacheFullError:
            return
        assert not is_gone
        self.tokens |= {seq: self.tokens[seq][:length] for seq, length in zip(ids, lens, strict=True)}


def name_of(config):
    groups = config["layer_groups"]
    return "-".join(
        [config["allocator"], config["growth"], *(str(one.get("window", one.get("chunk", "all"))) for one in groups)]
        + ["freed"] * ("keep_prefix_windows" in config)
    )


@pytest.mark.parametrize("config", GROUPED_CONFIGS, ids=name_of)
def test_every_read_returns_what_the_sequence_was_given_in_each_group_of_layers(config):
    machine = type("Machine", (GroupMachine,), {"config": config})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


TIERS = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 64, "cold": "int4"}
"""As young as tiles can be quantized."""

TIERED_CONFIGS = [
    {"allocator": "buddy", "tiers": TIERS},
    {"allocator": "buddy", "growth": "append", "tiers": {**TIERS, "prefix_reuse_tiers": "all"}},
    {"allocator": "buddy", "growth": "lazy_merge", "tiers": {**TIERS, "demote": "mass"}},
    {"allocator": "buddy", "tiers": {**TIERS, "tier_memory": {"hot": 0.97, "warm": 0.01, "cold": 0.02}}},
    {"allocator": "buddy", "tiers": {**TIERS, "pinned_tokens": 64, "cold": None, "prefix_reuse_tiers": "all"}},
    {"allocator": "slab", "tiers": {**TIERS, "warm": None, "cold_allocator": "paged"}},
    {"allocator": "paged", "growth": "fixed16", "tiers": {**TIERS, "prefix_reuse_tiers": "all"}},
    {"allocator": "lockfree", "tiers": {**TIERS, "warm_tokens": 0, "warm_allocator": "buddy"}},
]


def tiered_fields(config: dict) -> dict:
    """The fields of a `CacheConfig`; most of the memory is hot where it does not say."""
    tiers = {name: value for name, value in config["tiers"].items() if value is not None}
    quantized = [name for name in ("warm", "cold") if name in tiers]
    shares = {"hot": 0.8} | dict.fromkeys(quantized, 0.2 / len(quantized))
    return {**config, "tiers": {"tier_memory": shares, **tiers}}


class TierMachine(CacheMachine):
    """The machine above, with tokens older than the last 64 quantized."""

    head_dim: ClassVar[int] = 64
    superblocks: ClassVar[list[int]] = [8, 16, 30, 60]
    run_lengths: ClassVar = st.sampled_from([0, 70, 150, 200, 260, 330])

    def key_of(self, tokens, layer):
        """Small whole numbers, which quantized and rounded are what they were."""
        positions = np.arange(len(tokens))
        keys = np.ones((len(tokens), NUM_HEADS, self.head_dim), np.float32)
        keys[..., 0] = np.asarray(tokens, np.float32)[:, None] + 1
        for bit in range(12):
            keys[..., 1 + bit] = (positions >> bit & 1)[:, None]
        keys[..., 13] = layer
        keys[..., 14] = np.arange(NUM_HEADS)
        return keys

    def reader(self, layer):
        caches = self.cache.tier_caches(layer)
        hot = [self.get(caches.k_cache), self.get(caches.v_cache)]
        blocks = {
            tier: (kind, self.get(held))
            for tier, kind, held in ((1, INT8, caches.warm), (2, INT4, caches.cold))
            if held is not None
        }

        def read(entries):
            granules, sizes, tiers = unpack_entries(entries)
            at = granules - np.take(caches.first_granules, np.maximum(tiers, 0))
            # of each tier the blocks of this row alone, because to decode all of them takes most of the time
            decoded = {
                tier: kind.decode(held[at[tiers == tier] // 8], self.head_dim)
                for tier, (kind, held) in blocks.items()
                if (tiers == tier).any()
            }
            index = {tier: iter(range(len(keys))) for tier, (keys, _) in decoded.items()}
            pieces = [[np.empty((0, NUM_HEADS, self.head_dim))] * 2]
            for first, size, tier in zip(at, sizes, tiers, strict=True):
                if tier == 0:
                    pieces.append([tokens_of(one[first : first + size]) for one in hot])
                elif tier > 0:
                    i = next(index[tier])
                    pieces.append([one[i].transpose(1, 0, 2) for one in decoded[tier]])
            return [np.concatenate(one) for one in zip(*pieces, strict=True)]

        return read

    def compare(self, held, expected):
        assert held.shape == expected.shape
        if not np.abs(held - expected).max(initial=0) <= 0.4:  # not so where it is NaN
            np.testing.assert_allclose(held, expected, rtol=0, atol=0.4)

    def start(self, data):
        ids, _ = self.cache.open([[]] * 2)
        self.tokens = {seq: [] for seq in ids.tolist()}
        for count in data.draw(st.lists(st.sampled_from([40, 64, 100]), min_size=3, max_size=8)):
            self.run_step(ids.tolist(), [[token] * count for token in (0, 1)])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.sampled_from([64, 100]))
    def extend(self, data, count):
        ids = self.some(data, most=2)
        self.run_step(ids, [[1] * count for _ in ids])

    @precondition(lambda self: any(len(tokens) > 128 for tokens in self.tokens.values()))
    @rule(data=st.data())
    def truncate_far(self, data):
        seq = data.draw(st.sampled_from(sorted(seq for seq, tokens in self.tokens.items() if len(tokens) > 128)))
        length = data.draw(st.integers(1, len(self.tokens[seq]) - 64))
        try:
            self.cache.truncate([seq], [length])
        except CacheFullError:
            return
        self.tokens[seq] = self.tokens[seq][:length]


class TieredGroupMachine(TierMachine, GroupMachine):
    """The machines above in one: of the layers that keep all tokens, older ones are quantized."""

    superblocks: ClassVar[list[int]] = [16, 30, 60]

    def start(self, data):
        GroupMachine.start(self, data)
        super().start(data)

    @precondition(lambda self: any(len(tokens) > 128 for tokens in self.tokens.values()))
    @rule(data=st.data())
    def truncate_far(self, data):
        try:
            super().truncate_far(data)
        except ArgumentError:
            assert any(group.span for group in self.groups.values())


KEEPING_CONFIGS = [
    config
    for config in GROUPED_CONFIGS
    if not all("window" in group or "chunk" in group for group in config["layer_groups"])
]  # where there is a group for tiers


def with_own(tiers, **fields):
    """A group with tiers of its own."""
    return tiered_fields({**fields, "tiers": {**TIERS, **tiers}})


TIERED_GROUP_CONFIGS = {
    **{name_of(config): with_own({}, **config) for config in KEEPING_CONFIGS[:6]},
    "own of one": {
        "allocator": "lockfree",
        "growth": "lazy_merge",
        "layer_groups": [{"layers": 1, "window": 40}, with_own({"demote": "mass"}, layers=0)],
    },
    "own of two": {
        "allocator": "slab",
        "layer_groups": [
            with_own({"cold": None, "pinned_tokens": 64}, layers=1),
            with_own({"warm": None, "cold_allocator": "paged"}, layers=0),
        ],
    },
    "own and those of the cache": with_own(
        {"demote": "mass", "tier_memory": {"hot": 0.97, "warm": 0.01, "cold": 0.02}},
        layer_groups=[{"layers": 0}, with_own({"hot": 128, "cold": None}, layers=1)],
    ),
}


@pytest.mark.parametrize("name", TIERED_GROUP_CONFIGS)
def test_every_read_returns_what_the_sequence_was_given_in_each_group_and_tier(name):
    machine = type("Machine", (TieredGroupMachine,), {"config": TIERED_GROUP_CONFIGS[name]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize(
    "config",
    TIERED_CONFIGS,
    ids=lambda c: "-".join([c["allocator"], *(str(value) for value in c["tiers"].values() if isinstance(value, str))]),
)
def test_every_read_returns_what_the_sequence_was_given_whatever_tier_it_is_in(config):
    machine = type("Machine", (TierMachine,), {"config": tiered_fields(config)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
