"""Snapshots that resume elsewhere, and bytes that are no snapshots although their checksum is right."""

import contextlib
import re
from collections import Counter

import numpy as np
import pytest

from kvtoolkit import ArgumentError, CacheConfig, CacheFullError, CacheSnapshotError, KVCache, SequenceError
from kvtoolkit.cache.array_file import pack_arrays, unpack_arrays
from tests.kvtoolkit.cache.broken_calls import CONFIGS, make, make_world, prompt, put, seen

OWN = {"salt": ["tenant", 7], "extra_keys": [[(10, "image"), (30, b"other")], [(45, 5)]]}


def quiet_world(**fields):
    """A world that can be saved: sequences, preempted ones, cached prefixes; no step, lease or caller's block."""
    world = make_world(**fields)
    world.cache.abort_step(world.step)
    world.lease.abort()
    world.cache.allocator.free(world.blocks, [world.cache.allocator.block_sizes[0] // 8])
    world.open += world.in_step
    world.step, world.lease, world.in_step = None, None, []
    ids = world.cache.open([[]] * 2, **OWN)[0].tolist()
    put(world.cache, ids, [prompt(0, 50), prompt(0, 50)])
    world.cache.preempt(ids[1:], "drop")
    world.open, world.preempted = [*world.open, ids[0]], [*world.preempted, ids[1]]
    return world


def contents(cache, ids):
    return {seq: seen(cache, seq) for seq in ids}


OTHER = [
    {"allocator": "slab"},
    {"allocator": "paged", "block_sizes": (16,), "growth": "fixed16"},
    {"allocator": "lockfree", "allocator_options": {"layout": "slab"}},
    {"allocator": f"{__name__.rpartition('.')[0]}.test_failing_parts:BreakingBuddy"},
    {"num_tokens": 8192},
    {"max_seqs": 200},
    {"eviction": "lfu"},
    {"growth": "append", "allocator": "buddy"},
    {"max_seq_len": 300},
]


@pytest.mark.parametrize("name", ["buddy", "slab", "paged", "tiers", "groups", "windows", "tiers in groups"])
@pytest.mark.parametrize("other", OTHER, ids=lambda other: "-".join(map(str, other.values())))
def test_a_snapshot_resumes_in_another_cache(name, other):
    world = quiet_world(**CONFIGS[name])
    before = contents(world.cache, world.known)
    fields = {**world.cache.config.to_dict(), "allocator_options": {}, "block_sizes": None, "growth": None, **other}
    if "num_tokens" in other and name == "tiers":
        fields["num_tokens"] = 16384
    if "num_tokens" in other and "layer_groups" in fields:
        fields["num_tokens"] = None
        fields["layer_groups"] = [{**group, "num_tokens": 8192} for group in fields["layer_groups"]]
    again = KVCache.from_snapshot(CacheConfig(**fields), world.cache.snapshot())
    again.check_integrity()
    assert contents(again, world.known) == before
    assert again.open([prompt(0, 60)])[1][0] == world.cache.open([prompt(0, 60)])[1][0]
    hits, there = (one.open([prompt(0, 60)] * 2, **OWN)[1].tolist() for one in (again, world.cache))
    assert hits == there == [48, 48]
    assert put(again, world.open[:1], [[5] * 20]).all()
    assert again.restore(world.preempted).all()
    again.close(world.known)
    again.check_integrity()


@pytest.mark.parametrize("name", ["buddy", "tiers", "groups", "windows", "tiers in groups"])
def test_a_resumed_cache_gives_the_same_snapshot(name):
    cache = quiet_world(**CONFIGS[name]).cache
    data = KVCache.from_snapshot(cache.config, cache.snapshot()).snapshot()  # index nodes are numbered from 0 there
    assert KVCache.from_snapshot(cache.config, data).snapshot() == data


def test_a_snapshot_of_groups_with_tiers_of_other_formats_is_refused():
    cache = make_world(**CONFIGS["tiers in groups"]).cache
    cache.end_orphans([])
    fields, data = cache.config.to_dict(), cache.snapshot()
    first, window, own = fields["layer_groups"]
    other = {**own, "tiers": {"cold": "int4", "hot": 64}}
    for changed, group in (
        ({"layer_groups": [first, window, other]}, 2),
        ({"layer_groups": [{**first, "tiers": own["tiers"]}, window, own]}, 0),
        ({"tiers": other["tiers"]}, 0),
    ):
        message = rf"cache with tiers of .* \(warm and cold\) in layer_groups\[{group}\], got one with tiers of .* and"
        with pytest.raises(CacheSnapshotError, match=message):
            KVCache.from_snapshot(CacheConfig(**{**fields, **changed}), data)
    same = [{**first, "tiers": fields["tiers"]}, window, own]
    KVCache.from_snapshot(
        CacheConfig(**{**fields, "tiers": own["tiers"], "layer_groups": same}), data
    ).check_integrity()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_tokens": 64}, "expected a pool with granule .* of the hot tier, which is in use, got one of 8"),
        ({"max_seqs": 2}, "expected max_seqs of at least"),
        ({"max_entries": 1}, "expected max_entries of at least"),
        ({"head_dim": 16}, "expected one of a cache with head_dim 16, got one with head_dim 8"),
        ({"dtype": "float16"}, "expected one of a cache with dtype 'float16', got one with dtype 'float32'"),
    ],
)
def test_a_cache_that_has_no_place_for_a_snapshot_refuses_it(other, message):
    world = quiet_world(**CONFIGS["buddy"])
    with pytest.raises(CacheSnapshotError, match=message):
        KVCache.from_snapshot(CacheConfig(**{**world.cache.config.to_dict(), **other}), world.cache.snapshot())


def test_a_snapshot_of_other_groups_of_layers_is_refused():
    world = quiet_world(**CONFIGS["groups"])
    fields, data = world.cache.config.to_dict(), world.cache.snapshot()
    whole, window = fields["layer_groups"]
    for groups, wanted, got in (
        ([whole, {**window, "window": 92}], "a window of 92 in layer_groups[1]", "a window of 91"),
        ([{**whole, "layers": 1}, {**window, "layers": 0}], "layer 0 in layer_groups[1]", "it in layer_groups[0]"),
        ([window, whole], "layer_groups in the same order", "layer_groups[1] where here is layer_groups[0]"),
        (
            [whole, {"layers": 1, "chunk": 96, "num_tokens": 896}],
            "chunks of 96 in layer_groups[1]", "a window of 91",
        ),
        ([{"layers": [0, 1], "num_tokens": 1024}], "1 group of layers", "2"),
    ):  # fmt: skip
        message = f"snapshot: expected one of a cache with {wanted}, got one with {got}"
        with pytest.raises(CacheSnapshotError, match=f"^{re.escape(message)}$"):
            KVCache.from_snapshot(CacheConfig(**{**fields, "layer_groups": groups}), data)
    plain = make(num_layers=2).snapshot()
    with pytest.raises(CacheSnapshotError, match="with 2 groups of layers, got one with 1$"):
        KVCache.from_snapshot(world.cache.config, plain)
    smaller = [whole, {**window, "num_tokens": 192}]
    with pytest.raises(CacheSnapshotError, match="expected a pool with granule .*, got one of 24"):
        KVCache.from_snapshot(CacheConfig(**{**fields, "layer_groups": smaller}), data)


@pytest.mark.parametrize("name", ["groups", "windows"])
def test_a_snapshot_whose_rows_lack_what_their_next_token_sees_is_refused(name):
    world = quiet_world(**CONFIGS[name])
    for count in (100, 1):
        put(world.cache, world.open[:1], [[5] * count])
    good = unpack_arrays(world.cache.snapshot())
    where = next(key for key in good if key.endswith("firsts") and (good[key] > 0).any())
    firsts = good[where].copy()
    row = int(np.flatnonzero(firsts)[0])
    firsts[row] += 2
    message = f"row {good['rows'][row]} has let go of tokens that its next one sees"
    with pytest.raises(CacheSnapshotError, match=message):
        KVCache.from_snapshot(world.cache.config, pack_arrays({**good, where: firsts}))


def test_a_snapshot_with_prefixes_that_only_a_window_group_knows_is_refused():
    world = quiet_world(**CONFIGS["groups"])
    good = unpack_arrays(world.cache.snapshot())
    uids = good["group1.node.parent_uid"].copy()
    for other in (10**6, uids[-2]):
        uids[-1] = other
        tokens = good["group1.node.tokens"].copy()
        tokens[-1] = tokens[-2]
        changed = {**good, "group1.node.parent_uid": uids, "group1.node.tokens": tokens}
        with pytest.raises(CacheSnapshotError, match="nodes of another group have keys"):
            KVCache.from_snapshot(world.cache.config, pack_arrays(changed))


def test_blocks_of_callers_resume_in_the_same_pool_only():
    world = quiet_world(**CONFIGS["buddy"])
    blocks = world.cache.allocator.allocate([4, 8])
    data, fields = world.cache.snapshot(), world.cache.config.to_dict()
    again = KVCache.from_snapshot(world.cache.config, data)
    again.allocator.free(blocks, [4, 8])
    again.check_integrity()
    for other in ({"allocator": "slab"}, {"num_tokens": 2048}):
        with pytest.raises(CacheSnapshotError, match="expected no blocks of callers .*, got 12 granules"):
            KVCache.from_snapshot(CacheConfig(**{**fields, **other}), data)


def test_an_allocator_without_rebuild_resumes_by_its_own_snapshot():
    name = f"{__name__.rpartition('.')[0]}.test_failing_parts:NoRebuild"
    world = quiet_world(allocator=name, growth="append")
    before = contents(world.cache, world.known)
    again = KVCache.from_snapshot(world.cache.config, world.cache.snapshot())
    assert contents(again, world.known) == before
    again.check_integrity()
    data = quiet_world(growth="append").cache.snapshot()
    with pytest.raises(CacheSnapshotError, match="expected one taken with NoRebuild, since it cannot be rebuilt"):
        KVCache.from_snapshot(world.cache.config, data)


def test_a_snapshot_is_as_large_as_what_the_cache_holds():
    cache = KVCache(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_tokens=1 << 20, max_seqs=64))
    assert len(cache.snapshot()) < 4096


def damaged(arrays, rng):
    """One array of a snapshot with another number, size, or type."""
    arrays = {name: array.copy() for name, array in arrays.items()}
    name = str(rng.choice(sorted(arrays)))
    array = arrays[name]
    kind = rng.integers(8)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = array[:-1] if array.ndim and len(array) else np.zeros(3, array.dtype)
    elif kind == 2:
        arrays[name] = array.astype(rng.choice(["int8", "int32", "int64", "float32"]))
    elif kind == 3 and array.ndim:
        arrays[name] = np.concatenate([array, array[:1]])
    elif array.size:
        flat = array.reshape(-1)
        for _ in range(int(rng.integers(1, 4))):
            at = rng.integers(flat.size)
            value = rng.choice([-1, 0, 1, 7, 120, 255, 1 << 20, (1 << 30) + 5, (1 << 62) - 1, -(1 << 40)])
            with np.errstate(all="ignore"):
                flat[at] = flat[at] + 1 if kind == 4 else np.array(value).astype(flat.dtype)
        arrays[name] = flat.reshape(array.shape)
    return arrays, name


def is_open(cache, seq):
    try:
        with cache.begin_step([seq], 0):
            return True
    except SequenceError:
        return False


def use(cache, ids):
    """What an engine does with a resumed cache; sequences may be other ones than before, but nothing may go wrong."""
    cache.check_integrity()
    cache.open([prompt(0, 80), prompt(30, 100)])
    open_ids = [seq for seq in cache.seq_ids().tolist() if is_open(cache, seq)]
    with contextlib.suppress(CacheFullError):
        cache.fork(open_ids[:3], 1)
    put(cache, open_ids, [[5] * 30] * len(open_ids))
    lengths = cache.lengths(open_ids)
    with contextlib.suppress(CacheFullError, ArgumentError):  # where a window's past is gone
        cache.truncate(open_ids, lengths // 2)
    cache.compact(512)
    cache.preempt(open_ids[:2], "host")
    cache.restore(sorted({*cache.seq_ids().tolist()} - {*open_ids[2:]})[:0])
    cache.check_integrity()
    cache.end_orphans([])
    stats = cache.stats()
    assert stats.free + stats.cached + stats.kept_back + stats.pinned == stats.capacity


def damage_snapshots(name, tries, seed):
    """Resume from ``tries`` snapshots that are wrong somewhere; what came of it."""
    rng, counts = np.random.default_rng(seed), Counter()
    world = quiet_world(**CONFIGS[name])
    good = unpack_arrays(world.cache.snapshot())
    for _ in range(tries):
        arrays, where = damaged(good, rng)
        try:
            cache = KVCache.from_snapshot(world.cache.config, pack_arrays(arrays))
        except CacheSnapshotError:
            counts["refused"] += 1
            continue
        try:
            use(cache, world.known)
        except Exception as error:
            raise AssertionError(f"{name}: accepted with other {where}") from error
        counts["used"] += 1
    return counts


@pytest.mark.parametrize("name", ["buddy", "slab", "tiers", "groups", "windows"])
def test_a_snapshot_with_wrong_numbers_is_refused_or_harmless(name):
    counts = damage_snapshots(name, 150, seed=3)
    assert counts["refused"] > 50


def test_damaged_bytes_are_always_refused():
    world = quiet_world(**CONFIGS["buddy"])
    data, rng = world.cache.snapshot(), np.random.default_rng(5)
    for n in range(200):
        broken = bytearray(data)
        if n % 3 == 0:
            del broken[int(rng.integers(len(data))) :]
        else:
            broken[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
        with pytest.raises(CacheSnapshotError):
            KVCache.from_snapshot(world.cache.config, bytes(broken))


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b'{"a": ["float32", [1099511627776]]}', b'{"a": ["object", [1]]}', b'{"a": ["int8", [-1]]}',
     b'{"a": ["int8", [1, 1, 1, 1, 1, 1, 1, 1, 1]]}', b"[" * 100_000, b'{"a": 1}'],
)  # fmt: skip
def test_a_header_that_promises_too_much_is_refused_before_anything_is_made(header):
    good = pack_arrays({})
    magic = good[:12]
    body = header + b"\n"
    import zlib

    with pytest.raises(CacheSnapshotError):
        unpack_arrays(magic + zlib.crc32(body).to_bytes(4, "little") + body)
