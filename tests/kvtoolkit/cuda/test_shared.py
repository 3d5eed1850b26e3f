"""Shared reads on the device: which units are found, and that attention with them is attention."""

import itertools

import numpy as np
import pytest

from kvtoolkit import cuda, reference
from kvtoolkit.arrays.call import Hints, Sharing, attention_call
from kvtoolkit.cuda import attention, prompt, shared
from tests.kvtoolkit.cuda.test_launches import array, fake

__all__ = ["fake"]  # a fixture
_STREAM = 0x5000


def drawn_rows(rng, block_size, num_blocks):
    """Block ids of some rows whose beginnings form a tree: ``(rows, blocks before what is their own)``."""
    ids = iter(rng.permutation(num_blocks).tolist())
    rows, stack = [], [([], int(rng.integers(2, 7)))]
    while stack:
        prefix, members = stack.pop()
        if members == 0:
            continue
        if members == 1 or len(prefix) * block_size > 900:
            rows += [prefix + [next(ids) for _ in range(int(rng.integers(1, 5)))] for _ in range(members)]
            continue
        longer = prefix + [next(ids) for _ in range(int(rng.integers(0, 60 // block_size * 8)))]
        cut = int(rng.integers(0, members + 1))
        stack += [(longer, cut), (longer, members - cut)] if cut not in (0, members) else [(longer, 1)] * members
    return rows


def model_units(rows, block_size):
    """Units of rows side by side, ``{(first row, end, first block, end block)}``, found one boundary at a time."""

    def in_common(a, b):
        count = 0
        while count < min(len(a), len(b)) and a[count] == b[count]:
            count += 1
        return count

    common = [0, *(in_common(a, b) for a, b in itertools.pairwise(rows)), 0]
    nodes = set()
    for at in range(1, len(rows)):
        if common[at]:
            begin = max(i for i in range(at) if common[i] < common[at])
            end = min(i for i in range(at + 1, len(rows) + 1) if common[i] < common[at])
            nodes.add((begin, end, common[at]))
    kept = []
    for begin, end, blocks in sorted(nodes, key=lambda node: node[2]):
        above = [unit for unit in kept if unit[0] <= begin and end <= unit[1]]
        first = max((unit[3] for unit in above), default=0)
        tokens = (blocks - first) * block_size
        if len(above) < 3 and tokens >= shared._LEAST_TOKENS and (end - begin - 1) * tokens >= shared._LEAST_SAVED:
            kept.append((begin, end, first, blocks))
    return set(kept)


class Batch:
    """A batch of rows with a tree of beginnings, on the device; rows with 8 queries and more share nothing."""

    def __init__(self, seed, *, has_entries, has_bounds, is_mixed, head_dim=64, group_size=4, num_kv_heads=2):
        import cupy

        rng = np.random.default_rng(seed)
        self.block_size = 8 if has_entries else int(rng.choice([8, 16, 32]))
        num_blocks = 12000 // self.block_size
        rows = drawn_rows(rng, self.block_size, num_blocks)
        batch = len(rows)
        new = rng.integers(1, 5, batch) if has_bounds else np.ones(batch, int)
        if has_bounds:
            new[rng.integers(batch)] = rng.choice([0, 9, 30])
        lengths = np.array([len(row) * self.block_size - int(rng.integers(0, self.block_size)) for row in rows])
        lengths = np.maximum(lengths, new)
        lengths[new == 0] = 0
        if not has_bounds and batch > 2:
            lengths[rng.integers(batch)] = 0
        self.seen = [
            [] if not 1 <= new[i] <= 8 else row[: max(0, lengths[i] - new[i]) // self.block_size]
            for i, row in enumerate(rows)
        ]
        self.order = np.arange(batch, dtype=np.int32)
        if is_mixed:  # rows anywhere, and an order that brings them together
            places = rng.permutation(batch)
            rows = [rows[i] for i in places]
            lengths, new = lengths[places], new[places]
            self.order = np.argsort(places).astype(np.int32)
        width = max(map(len, rows)) + 3
        table = rng.integers(0, num_blocks, (batch, width)).astype(np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        self.starts = None
        if has_entries:
            self.starts = np.tile(np.arange(width, dtype=np.int32), (batch, 1))
            for i, row in enumerate(rows):
                table[i, len(row) :] = self.starts[i, len(row) :] = -1
        self.table, self.lengths = table, lengths.astype(np.int32)
        self.bounds = np.concatenate([[0], np.cumsum(new)]).astype(np.int32) if has_bounds else None
        shape = (num_blocks, num_kv_heads, self.block_size, head_dim)
        self.keys, self.values = (rng.normal(size=shape).astype(np.float16) for _ in range(2))
        self.q = rng.normal(size=(int(new.sum()), num_kv_heads * group_size, head_dim)).astype(np.float16)
        self.new, self.cupy = new, cupy

    def attend(self, is_shared, layers=1, **options):
        """``out`` and ``lse`` of each layer, whose queries are others each time, and the memory of the step."""
        cupy = self.cupy
        describe = cuda.device_operand
        kept, found, prepared = {}, [], None
        on_device = {
            name: None if one is None else cupy.asarray(one)
            for name, one in (
                ("table", self.table), ("starts", self.starts), ("lengths", self.lengths), ("bounds", self.bounds),
                ("k", self.keys), ("v", self.values), ("order", self.order),
            )
        }  # fmt: skip
        arrays = {name: None if one is None else describe(one, name) for name, one in on_device.items()}
        is_plain = (self.order == np.arange(len(self.order))).all()
        sharing = Sharing(None if is_plain else arrays["order"]) if is_shared else None
        if "sinks" in options:
            options["sinks"] = describe(cupy.asarray(options["sinks"]), "sinks")
        counts = (int(self.new.min()), int(self.new.max()))
        for layer in range(layers):
            q = cupy.asarray(self.q * (1 + layer))
            out, lse = cupy.full_like(q, np.nan), cupy.full(q.shape[:2], np.nan, np.float32)
            if prepared is None:
                call = attention_call(
                    describe(q, "q"), arrays["k"], arrays["v"], arrays["table"], arrays["starts"], arrays["lengths"],
                    out=describe(out, "out"), lse=describe(lse, "lse") if layers == 1 else None,
                    cu_seqlens_q=arrays["bounds"], **options,
                )  # fmt: skip
                prepared = cuda.attend(call, Hints(counts, None, kept, sharing))
            else:
                cuda.attend_prepared(prepared, q.data.ptr, arrays["k"].address, arrays["v"].address, out.data.ptr)
            cupy.cuda.Device().synchronize()
            found.append((cupy.asnumpy(out), cupy.asnumpy(lse)))
        return found, kept, prepared, call

    def expected(self, factor=1, **options):
        arguments = [self.q * factor, self.keys, self.values, self.table]
        if self.starts is None:
            return reference.paged_attention(
                *arguments, self.lengths, layout="HND", cu_seqlens_q=self.bounds, **options
            )
        return reference.variable_block_attention(
            *arguments, self.starts, self.lengths, cu_seqlens_q=self.bounds, **options
        )

    def found_units(self, prepared, call):
        """What the device found, as `model_units` has it."""
        cupy = self.cupy
        width = call.block_table.shape[1] * (1 if self.starts is None else 8)
        sizes = prompt.sizes_of(
            4 * call.q.shape[0], call.q.shape[1], call.k_cache.shape[1], call.q.shape[2], 2 * len(self.order),
            cupy.cuda.runtime.getDeviceProperties(0)["multiProcessorCount"],
        )  # fmt: skip
        is_gathered = prepared.gather is not None
        at = shared._place(prepared.memory.data.ptr, shared._parts(call, width, sizes, is_gathered))

        def read(address, count):
            memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, 4 * count, prepared.memory), 0)
            return cupy.asnumpy(cupy.ndarray((count,), np.int32, memory)).tolist()

        (count,) = read(at.num_units, 1)
        places = np.concatenate([[0], np.cumsum(self.new[self.order])]).tolist()
        units = set()
        for i in range(count):
            first, queries, tokens, place = read(at.units + 16 * i, 4)
            first &= (1 << 24) - 1
            begin, end = places.index(first), places.index(first + queries)
            while self.new[self.order[begin]] == 0:  # a row without queries is in no unit
                begin += 1
            block = place - int(self.order[begin]) * width
            units.add((begin, end, block, block + tokens // self.block_size))
        return units


KINDS = [
    {"has_entries": entries, "has_bounds": bounds, "is_mixed": mixed}
    for entries in (False, True)
    for bounds in (False, True)
    for mixed in (False, True)
]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(name for name, on in kind.items() if on) or "plain")
def test_units_are_those_of_the_tree_and_attention_is_right(kind, monkeypatch):
    monkeypatch.setattr(shared, "_LEAST_TOKENS", 16)
    monkeypatch.setattr(shared, "_LEAST_SAVED", 16)
    if not _is_hopper():
        pytest.skip("units are attended to by the prompt kernel of sm_90")
    seen = 0
    for seed in range(12):
        shape = {"head_dim": (64, 128, 96, 256)[seed % 4], "group_size": (4, 1, 7, 16)[seed // 3]}
        batch = Batch(seed, **kind, **shape)
        if len(batch.order) < 2:
            continue
        heads = batch.q.shape[1]
        options = ({}, {"sinks": np.linspace(-1, 2, heads, dtype=np.float32)}, {"softcap": 3.0})[seed % 3]
        ((out, lse),), _, prepared, call = batch.attend(True, **options)
        assert isinstance(prepared, shared.SharedAttention)
        units = model_units(batch.seen, batch.block_size)
        assert batch.found_units(prepared, call) == units
        seen += len(units)
        expected, expected_lse = batch.expected(**options)
        np.testing.assert_allclose(out, expected, atol=4e-3, rtol=4e-3)
        np.testing.assert_allclose(lse, expected_lse, atol=2e-3, rtol=1e-3)
    assert seen > 12


@pytest.mark.gpu
@pytest.mark.parametrize("is_mixed", [False, True])
def test_further_layers_share_what_was_found(is_mixed, monkeypatch):
    monkeypatch.setattr(shared, "_LEAST_TOKENS", 16)
    monkeypatch.setattr(shared, "_LEAST_SAVED", 16)
    if not _is_hopper():
        pytest.skip("units are attended to by the prompt kernel of sm_90")
    batch = Batch(11, has_entries=True, has_bounds=True, is_mixed=is_mixed)
    assert model_units(batch.seen, batch.block_size)
    results, _, prepared, _ = batch.attend(True, layers=3)
    assert isinstance(prepared, shared.SharedAttention)
    for layer, (out, _) in enumerate(results):
        expected, _ = batch.expected(1 + layer)
        np.testing.assert_allclose(out, expected, atol=6e-3, rtol=4e-3)


def _is_hopper():
    from kvtoolkit.runtime.kernels import arch_of

    return arch_of(0) == 90


def shared_call(new=(1, 1, 1), in_place=False, **options):
    num_tokens, batch = sum(new), len(new)
    arrays = {name: array(num_tokens, 8, 128, dtype="bfloat16", gap=64) for name in ("q", "out")}
    caches = [array(40, 2, 8, 128, dtype="bfloat16") for _ in range(2)]
    bounds = None if num_tokens == batch else array(batch + 1)
    options = {"cu_seqlens_q": bounds} | options
    return attention_call(
        arrays["q"], *caches, array(batch, 5), array(batch, 5), array(batch),
        out=arrays["q" if in_place else "out"], **options,
    )  # fmt: skip


@pytest.fixture
def kept(monkeypatch):
    """The place of a step's memory, on a device that is not there; maps that show what they were made of."""
    owner = type("Owner", (), {"data": type("Data", (), {"ptr": 0xD0000})})
    for module in (prompt, shared):
        monkeypatch.setattr(module, "keep", lambda *_: owner)
    monkeypatch.setattr("kvtoolkit.cuda.memory.keep", lambda *_: owner)
    monkeypatch.setattr(prompt, "tensor_map", lambda address, *_: (address, *range(15)))


@pytest.mark.parametrize("is_ordered", [True, False])
def test_what_is_launched(fake, kept, is_ordered):
    sinks = array(8, dtype="float32")
    call = shared_call(sinks=sinks)
    hints = Hints((1, 1), 40, {}, Sharing(None if is_ordered else array(3)))
    prepared = attention.attend(call, hints, stream=_STREAM)
    gather = [] if is_ordered else ["kvt_gather"]
    plan = ["kvt_expand", "kvt_find_shared", "kvt_plan_shared"]
    names = [taken.kernel for taken in fake.taken]
    assert names == [*plan, *gather, "kvt_plan_prompts", "kvt_prompt", "kvt_merge_shared"]
    first = {taken.kernel: taken.parameters for taken in fake.taken}
    units, items, attends, merges = (
        first[name] for name in ("kvt_plan_shared", "kvt_plan_prompts", "kvt_prompt", "kvt_merge_shared")
    )
    gathered = call.q.address if is_ordered else first["kvt_gather"]["to"]
    assert attends["query_map"][0] == gathered
    assert (attends["out"] == call.out.address) is is_ordered
    assert (merges["rest_out"], merges["rest_lse"]) == (attends["out"], attends["lse"])
    assert (merges["unit_out"], merges["unit_lse"]) == (attends["unit_out"], attends["unit_lse"])
    assert (merges["out"], merges["sinks"], attends["sinks"]) == (call.out.address, sinks.address, 0)
    assert merges["token_levels"] == units["token_levels"]
    assert {items[name] for name in ("units", "num_units", "begins")} == {
        units[name] for name in ("units", "num_units", "begins")
    }
    assert merges["places"] == items["places"] == (0 if is_ordered else units["places"])
    assert attends["block_table"] == first["kvt_find_shared"]["ids"]
    assert attends["table_row"] == 1
    attention.attend_prepared(prepared, 16, 32, 48, 64, stream=_STREAM)
    again = fake.taken[len(names) :]
    assert [taken.kernel for taken in again] == [*gather, "kvt_prompt", "kvt_merge_shared"]
    second = {taken.kernel: taken.parameters for taken in again}
    attends, merges = second["kvt_prompt"], second["kvt_merge_shared"]
    assert attends["query_map"][0] == (16 if is_ordered else gathered)
    assert (attends["key_map"][0], attends["value_map"][0]) == (32, 48)
    assert merges["out"] == 64
    assert merges["rest_out"] == attends["out"] == (64 if is_ordered else first["kvt_prompt"]["out"])
    if not is_ordered:
        assert second["kvt_gather"]["q"] == 16


@pytest.mark.parametrize(
    ("options", "hints"),
    [
        ({}, {"sharing": None}),
        ({}, {"kept": None}),
        ({}, {"query_counts": (9, 40)}),
        ({"in_place": True}, {}),
        ({"new": (1,)}, {}),
        ({"alibi_slopes": array(8, dtype="float32")}, {}),
        ({"window_size": (100, 0)}, {}),
        ({"num_splits": 2}, {}),
    ],
)
def test_calls_without_shared_reads(fake, kept, options, hints):
    chosen = Hints((1, 1), 40, {}, Sharing())._replace(**hints)
    attention.attend(shared_call(**options), chosen, stream=_STREAM)
    assert "kvt_find_shared" not in [taken.kernel for taken in fake.taken]


def test_layers_that_see_other_keys_keep_lists_of_their_own(fake, kept, monkeypatch):
    """The list of a causal layer leaves out tiles that a layer without a mask reads."""
    keys, owner = [], type("Owner", (), {"data": type("Data", (), {"ptr": 0xD0000})})
    monkeypatch.setattr(shared, "keep", lambda kept, key, nbytes, stream: keys.append(key) or owner)
    for causal in (True, False, True):
        call = shared_call((400, 1, 1), causal=causal)
        attention.attend(call, Hints((1, 400), 40, {}, Sharing()), stream=_STREAM)
    assert keys[0] == keys[2] != keys[1]


def test_attention_does_without_where_memory_is_short(fake, kept, monkeypatch):
    cupy = pytest.importorskip("cupy")

    def keep(*_):
        raise cupy.cuda.memory.OutOfMemoryError(1, 1)

    monkeypatch.setattr(shared, "keep", keep)
    attention.attend(shared_call(), Hints((1, 1), 40, {}, Sharing()), stream=_STREAM)
    assert [taken.kernel for taken in fake.taken] == ["kvt_expand", "kvt_plan", "kvt_decode"]
