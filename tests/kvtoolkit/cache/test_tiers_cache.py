"""Caches whose older tokens are quantized, one promise a test; `test_cache_machine.py` checks them in all orders."""

import contextlib

import numpy as np
import pytest

from allocators import OutOfBlocksError
from kvtoolkit import ArgumentError, CacheConfig, CacheFullError, KVCache
from kvtoolkit.formats.entry import unpack_entries
from kvtoolkit.formats.quantized import INT4, INT8
from kvtoolkit.reference import tiered_attention
from tests.kvtoolkit.cache.test_cache_findings import Failing

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 2, 64
TIERS = {"hot": 128, "warm": "int8", "warm_tokens": 128, "cold": "int4", "pinned_tokens": 64}


def make(tiers=TIERS, **fields):
    shape = {"num_layers": NUM_LAYERS, "num_kv_heads": NUM_HEADS, "head_dim": HEAD_DIM, "dtype": "float32"}
    return KVCache(CacheConfig(**{**shape, "num_tokens": 8192, "max_seqs": 16, "tiers": {**tiers}} | fields))


def keys_of(tokens, first=0):
    """Keys that give away token and position, a bit a channel: what is quantized and rounded is what it was."""
    keys = np.zeros((len(tokens), NUM_HEADS, HEAD_DIM), np.float32)
    for at, numbers in ((0, np.asarray(tokens, np.int64)), (32, first + np.arange(len(tokens)))):
        for bit in range(16):
            keys[:, :, at + bit] = (numbers >> bit & 1)[:, None]
    return keys


def feed(cache, seq_ids, chunks, positions=None):
    """Append tokens; values are the negative of keys. Returns which rows were ok."""
    lengths = cache.lengths(seq_ids)
    with cache.begin_step(seq_ids, [len(chunk) for chunk in chunks]) as step:
        keys = np.concatenate([keys_of(chunk, first) for chunk, first in zip(chunks, lengths, strict=True)])
        for layer in range(NUM_LAYERS):
            step.append(layer, keys, -keys)
        ok = step.ok.copy()
        cache.end_step(step, np.concatenate([np.asarray(chunk, np.int64) for chunk in chunks]))
    cache.check_integrity()
    return ok


def settle(cache, seq_ids):
    """Steps without tokens until nothing moves any more."""
    before = -1
    while cache.stats().converted_tokens != before:
        before = cache.stats().converted_tokens
        cache.abort_step(cache.begin_step(seq_ids, 0))
    cache.check_integrity()


def tiers_of(cache, seq_id):
    """The tier of each granule of a sequence, those of one tile as one letter (h, w, c)."""
    row = seq_id & 0xFFFFF
    entries = cache._state.group.table.entries[row]
    _, sizes, tiers = unpack_entries(entries[entries >= 0])
    granules = "".join("hwc"[tier] * size for tier, size in zip(tiers, sizes, strict=True))
    length = int(cache.lengths([seq_id])[0])
    return "".join(granules[8 * tile] for tile in range(-(-length // 64)))


def read(cache, seq_id):
    """The tokens of a sequence as its keys tell them; positions and values are checked."""
    row = seq_id & 0xFFFFF
    entries = cache._state.group.table.entries[row]
    length = int(cache.lengths([seq_id])[0])
    caches = cache.tier_caches(NUM_LAYERS - 1)
    pieces = [np.zeros((2, 0, HEAD_DIM))]
    for granule, size, tier in zip(*unpack_entries(entries[entries >= 0]), strict=True):
        at = granule - caches.first_granules[tier]
        if tier == 0:
            held = [one[at : at + size, 1].reshape(-1, HEAD_DIM) for one in (caches.k_cache, caches.v_cache)]
        else:
            kind, blocks = ((INT8, caches.warm), (INT4, caches.cold))[tier - 1]
            held = [one[1] for one in kind.decode(blocks[at // 8], HEAD_DIM)]
        pieces.append(np.stack(held))
    keys, values = np.concatenate(pieces, axis=1)[:, :length]
    np.testing.assert_allclose(keys, -values, atol=0.3)
    bits = np.rint(keys).astype(np.int64)
    numbers = bits.reshape(length, 2, 32) @ (1 << np.arange(32))
    assert numbers[:, 1].tolist() == list(range(length))
    return numbers[:, 0].tolist()


def expected_tiers(length, hot=128, warm=128, pinned=64):
    """One letter a tile, by the rule."""
    letters = ""
    for tile in range(-(-length // 64)):
        age = length - 64 * (tile + 1)
        letters += "h" if 64 * tile < pinned or age < hot else "w" if age < hot + warm else "c"
    return letters


@pytest.mark.parametrize(("quantized", "letters"), [(("warm", "cold"), "hwc"), (("warm",), "hww"), (("cold",), "hcc")])
def test_tiles_are_in_the_tier_of_their_age_at_every_length(quantized, letters):
    tiers = {name: value for name, value in TIERS.items() if name not in ("warm", "cold") or name in quantized}
    cache = make(tiers, growth="append")
    (seq,), _ = cache.open([[]])
    tokens = []
    for step in range(600):
        feed(cache, [seq], [[step]])
        tokens.append(step)
        if len(tokens) % 64 == 0:
            settle(cache, [seq])
        assert tiers_of(cache, seq) == expected_tiers(len(tokens)).translate(str.maketrans("hwc", letters))
    assert read(cache, seq) == tokens


def test_what_becomes_due_at_once_is_spread_over_the_next_steps():
    cache = make(num_tokens=65536)
    seq_ids, _ = cache.open([[]] * 8)
    feed(cache, seq_ids, [range(1024)] * 8)
    due = sum(expected_tiers(1024).count(letter) for letter in "wc") * 8
    steps = 0
    while due:
        before = cache.stats().converted_tokens
        cache.abort_step(cache.begin_step(seq_ids, 0))
        moved = (cache.stats().converted_tokens - before) // 64
        assert moved == -(-due // 32)
        due -= moved
        steps += 1
    assert steps > 32
    assert [tiers_of(cache, seq) for seq in seq_ids] == [expected_tiers(1024)] * 8
    assert all(read(cache, seq) == list(range(1024)) for seq in seq_ids)


def test_the_oldest_tiles_go_first():
    cache = make()
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(1024)])
    for moved in range(1, 5):
        cache.abort_step(cache.begin_step([seq], 0))
        assert tiers_of(cache, seq) == "h" + "c" * moved + "h" * (15 - moved)


def test_the_budget_bounds_what_a_step_converts():
    cache = make(num_tokens=65536, migrate_budget=2)
    seq_ids, _ = cache.open([[]] * 8)
    feed(cache, seq_ids, [range(2048)] * 8)
    cache.abort_step(cache.begin_step(seq_ids, 0))
    assert cache.stats().converted_tokens == 2 * 64


def test_a_step_that_is_short_of_room_converts_as_much_as_it_needs():
    cache = make(migrate_budget=1)
    hot = cache.stats().tiers["hot"].capacity
    (seq,), _ = cache.open([[]])
    assert feed(cache, [seq], [range(hot - 64)]).all()
    assert feed(cache, [seq], [range(640)]).all()
    assert cache.stats().converted_tokens == 640 - 64
    assert read(cache, seq) == [*range(hot - 64), *range(640)]


def test_forks_share_quantized_tiles_and_move_them_once():
    cache = make()
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(500)])
    children = cache.fork([seq], 3)[0].tolist()
    settle(cache, [seq, *children])
    assert [tiers_of(cache, one) for one in (seq, *children)] == [expected_tiers(500)] * 4
    assert cache.stats().converted_tokens == 64 * sum(expected_tiers(500).count(letter) for letter in "wc")
    for number, child in enumerate(children):
        feed(cache, [child], [[1000 + number] * 50])
    assert all(read(cache, child) == [*range(500), *[1000 + n] * 50] for n, child in enumerate(children))
    cache.close([seq, *children])
    stats = cache.stats()
    assert stats.used == 0


def test_a_shared_tile_stays_as_hot_as_its_youngest_sequence_needs_it():
    cache = make(growth="append")
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(256)])
    child = int(cache.fork([seq], 1)[0, 0])
    feed(cache, [child], [range(256, 640)])
    settle(cache, [seq, child])
    assert tiers_of(cache, seq) == expected_tiers(256) == "hwhh"
    assert tiers_of(cache, child) == "hwhhwwccwwhh"[:4] + expected_tiers(640)[4:]
    cache.close([seq])
    feed(cache, [child], [range(64)])
    settle(cache, [child])
    assert tiers_of(cache, child) == expected_tiers(704)


def test_a_fork_inside_a_tile_gets_a_quantized_copy_of_its_own():
    cache = make({**TIERS, "pinned_tokens": 0}, growth="append")
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(40)])
    child = int(cache.fork([seq], 1)[0, 0])
    feed(cache, [child], [range(40, 300)])
    settle(cache, [seq, child])
    assert (tiers_of(cache, seq), tiers_of(cache, child)) == ("h", expected_tiers(300, pinned=0))
    assert read(cache, seq) == list(range(40))
    assert read(cache, child) == list(range(300))
    feed(cache, [seq], [range(40, 64)])
    assert read(cache, seq) == list(range(64))


def test_what_another_sequence_still_holds_stays_findable_hot():
    cache = make({**TIERS, "pinned_tokens": 0}, growth="append")
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(40)])
    child = int(cache.fork([seq], 1)[0, 0])
    feed(cache, [child], [range(40, 300)])
    settle(cache, [seq, child])
    assert tiers_of(cache, child)[0] == "w"
    assert cache.open([list(range(41))])[1][0] == 40


def test_a_reordered_sequence_settles_what_it_took_over():
    cache = make()
    seq_ids, _ = cache.open([[]] * 2)
    feed(cache, seq_ids[:1], [range(640)])
    settle(cache, seq_ids[:1])
    feed(cache, seq_ids[1:], [range(1000, 1640)])
    cache.reorder(seq_ids, [1, 1])
    cache.close(seq_ids[1:])
    settle(cache, seq_ids[:1])
    assert tiers_of(cache, seq_ids[0]) == expected_tiers(640)
    assert read(cache, seq_ids[0]) == list(range(1000, 1640))


@pytest.mark.parametrize(("max_entries", "letters"), [(6, "hhhhhh"), (7, "hwwhhh")])
def test_a_row_without_entries_for_a_split_keeps_its_tile_hot(max_entries, letters):
    cache = make(growth="fixed64", max_entries=max_entries)
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(40)])
    child = int(cache.fork([seq], 1)[0, 0])
    assert feed(cache, [child], [range(40, 360)]).all()  # 6 entries, of which all but the first span two tiles
    settle(cache, [seq, child])
    assert tiers_of(cache, child) == letters
    assert read(cache, child) == list(range(360))


def test_tables_grow_with_the_entries_of_a_split():
    cache = make(growth="fixed64")
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(40)])
    child = int(cache.fork([seq], 1)[0, 0])
    feed(cache, [child], [range(40, 1000)])
    with cache.begin_step([child], 0) as step:
        entries = cache._state.group.table.entries[child & 0xFFFFF]
        held = entries[entries >= 0]
        assert len(held) == 17  # one more than the tables of the step before were wide
        assert step.block_table[0, :17].tolist() == held.tolist()


def test_pinned_sequences_hold_what_they_hold():
    cache = make(growth="append")
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(256)])
    with cache.pin([seq]):
        feed(cache, [seq], [range(256, 640)])
        settle(cache, [seq])
        assert tiers_of(cache, seq) == "hhhh" + expected_tiers(640)[4:]
    feed(cache, [seq], [range(64)])
    settle(cache, [seq])
    assert tiers_of(cache, seq) == expected_tiers(704)


def test_rows_of_another_open_step_are_left_alone():
    cache = make(growth="append")
    seq_ids, _ = cache.open([[]] * 2)
    feed(cache, seq_ids, [range(640)] * 2)
    with cache.begin_step(seq_ids[:1], 0) as step:
        before = step.block_table.copy()
        shape = tiers_of(cache, seq_ids[0])
        settle(cache, seq_ids[1:])
        assert (step.block_table == before).all()
        assert tiers_of(cache, seq_ids[0]) == shape
        assert tiers_of(cache, seq_ids[1]) == expected_tiers(640)


@pytest.mark.parametrize("kept", [*range(1, 64)])
@pytest.mark.parametrize("tile", [1, 4])
def test_truncating_into_a_quantized_tile_makes_its_tokens_hot(tile, kept):
    cache = make()
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(500)])
    settle(cache, [seq])
    before = tiers_of(cache, seq)
    assert before[1] + before[4] == "cw"
    length = 64 * tile + kept
    cache.truncate([seq], [length])
    cache.check_integrity()
    assert tiers_of(cache, seq) == before[:tile] + "h"
    assert read(cache, seq) == list(range(length))
    assert cache.stats().num_dequantized == 1
    feed(cache, [seq], [range(9)])
    assert read(cache, seq) == [*range(length), *range(9)]


def test_truncating_without_room_changes_nothing():
    cache = make(num_tokens=4096, prefix_caching=False)
    (seq,), _ = cache.open([[]])
    assert feed(cache, [seq], [range(400)]).all()
    settle(cache, [seq])
    (other,), _ = cache.open([[]])
    while feed(cache, [other], [[0] * 8]).all():
        pass
    before = tiers_of(cache, seq)
    assert cache.stats().tiers["hot"].free < 64
    with pytest.raises(CacheFullError, match="truncate"):
        cache.truncate([seq], [190])
    cache.check_integrity()
    assert tiers_of(cache, seq) == before
    assert read(cache, seq) == list(range(400))


def test_a_truncation_that_fails_half_way_gives_back_what_it_took():
    cache = make(num_tokens=4096, growth="append", prefix_caching=False)
    seq_ids, _ = cache.open([[]] * 2)
    for begin in range(0, 448, 64):
        assert feed(cache, seq_ids, [range(begin, begin + 64)] * 2).all()
    settle(cache, seq_ids)
    child = cache.fork(seq_ids[1:], 1)[0]
    (other,), _ = cache.open([[]])
    free = cache.stats().tiers["hot"].free
    assert feed(cache, [other], [[0] * (free - 16)]).all()  # leaves room for the quantized tile, none for the tail
    with pytest.raises(CacheFullError, match="truncate"):
        cache.truncate([seq_ids[0], child[0]], [64 + 16, 444])
    assert cache.stats().tiers["hot"].free == 16
    cache.check_integrity()


def test_preempted_sequences_come_back_from_the_host_as_they_were():
    cache = make()
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(700)])
    settle(cache, [seq])
    before = tiers_of(cache, seq)
    cache.preempt([seq], "host")
    cache.check_integrity()
    cache = KVCache.from_snapshot(cache.config, cache.snapshot())
    assert cache.restore([seq]).all()
    cache.check_integrity()
    assert tiers_of(cache, seq) == before == expected_tiers(700)
    assert read(cache, seq) == list(range(700))


def test_what_finds_no_room_in_its_tier_stays_preempted():
    cache = make(num_tokens=4096, prefix_caching=False)
    seq_ids, _ = cache.open([[]] * 2)
    for begin in range(0, 640, 64):
        feed(cache, seq_ids[:1], [range(begin, begin + 64)])
    settle(cache, seq_ids[:1])
    before = tiers_of(cache, seq_ids[0])
    cache.preempt(seq_ids[:1], "host")
    taken = cache._state.group.blocks.allocators[2].allocate([8] * (cache.stats().tiers["cold"].free // 64))
    free = cache.stats().tiers["hot"].free, cache.stats().tiers["warm"].free
    assert not cache.restore(seq_ids[:1]).any()
    assert (cache.stats().tiers["hot"].free, cache.stats().tiers["warm"].free) == free
    cache._state.group.blocks.allocators[2].free(taken, [8] * len(taken))
    assert cache.restore(seq_ids[:1]).all()
    cache.check_integrity()
    assert tiers_of(cache, seq_ids[0]) == before
    assert read(cache, seq_ids[0]) == list(range(640))


@pytest.mark.parametrize("call", range(1, 6))
@pytest.mark.parametrize("tier", ["warm", "cold"])
@pytest.mark.parametrize("what", ["restore", "step", "truncate"])
def test_a_raising_allocator_of_a_tier_loses_nothing(what, tier, call):
    Failing.countdown = 10**9
    cache = make({**TIERS, f"{tier}_allocator": "tests.kvtoolkit.cache.test_cache_findings:Failing"}, num_tokens=16384)
    (seq, other), _ = cache.open([[]] * 2)
    assert feed(cache, [seq, other], [range(700), range(700)]).all()
    settle(cache, [seq])
    cache.preempt([other], "host")
    calls = {
        "restore": lambda: cache.restore([other]),
        "step": lambda: [feed(cache, [seq], [range(begin, begin + 64)]) for begin in range(700, 1020, 64)],
        "truncate": lambda: cache.truncate([seq], [300]),
    }
    Failing.countdown = call
    with contextlib.suppress(OutOfBlocksError):
        calls[what]()
    Failing.countdown = 10**9
    cache.check_integrity()
    assert what == "restore" or cache.restore([other]).all()
    cache.close([seq, other])
    cache.check_integrity()
    assert sum(one.used for one in cache.stats().tiers.values()) == 0


@contextlib.contextmanager
def no_conversions(cache, monkeypatch):
    """Conversions raise MemoryError."""

    def fail(*arguments):
        raise MemoryError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(cache._state.group.storage, "convert_tiles", fail)
        yield


@pytest.mark.parametrize("then", ["step", "truncate", "close", "preempt", "fork", "snapshot"])
def test_a_conversion_that_raised_is_made_up_for(then, monkeypatch):
    cache = make(num_tokens=16384)
    (seq, other), _ = cache.open([[]] * 2)
    assert feed(cache, [seq, other], [range(700), range(700)]).all()

    with no_conversions(cache, monkeypatch):
        for _ in range(3):
            with pytest.raises(MemoryError):
                cache.begin_step([seq], 0)
    calls = {
        "step": lambda: settle(cache, [seq]),
        "truncate": lambda: cache.truncate([seq, other], [100, 100]),  # inside what is moved first
        "close": lambda: cache.close([seq]),
        "preempt": lambda: (cache.preempt([seq], "host"), cache.restore([seq])),
        "fork": lambda: cache.fork([seq], 1),
        "snapshot": cache.snapshot,
    }
    result = calls[then]()
    if then == "snapshot":
        cache = KVCache.from_snapshot(cache.config, result)
    cache.check_integrity()
    for one in (seq, other)[then == "close" :]:
        assert read(cache, one) == list(range(int(cache.lengths([one])[0])))


def test_what_the_caller_does_about_rounding_does_not_matter():
    old = np.seterr(all="raise")
    try:
        for form in (INT8, INT4):
            form.decode(form.encode(np.full((64, 64), 1e-9, "f4"), np.full((64, 64), 3e38, "f4")), 64)
    finally:
        np.seterr(**old)


def attended_step(cache, seq, queries):
    """An open step in which all layers have attended by these queries, one for each new token."""
    keys = keys_of(range(len(queries)))
    step = cache.begin_step([seq], len(queries))
    for layer in range(NUM_LAYERS):
        step.append(layer, keys, -keys)
        step.attend(layer, queries)
    return step


def test_a_refused_end_of_a_step_counts_no_masses():
    cache = make({**TIERS, "demote": "mass"})
    (seq,), _ = cache.open([[]])
    with attended_step(cache, seq, keys_of(range(100))) as step:
        for _ in range(2):
            with pytest.raises(ArgumentError):
                cache.end_step(step, [1, 2])
            assert (cache._state.group.table.masses == 0).all()
        cache.end_step(step)
    masses = cache._state.group.table.masses[seq & 0xFFFFF]
    assert (masses[:2] > 0).all()
    cache.truncate([seq], [64])
    assert masses[0] > 0
    assert masses[1] == 0


def test_masses_that_are_no_numbers_do_not_stay():
    cache = make({**TIERS, "demote": "mass"})
    (seq,), _ = cache.open([[]])
    with attended_step(cache, seq, np.full_like(keys_of(range(100)), np.nan)) as step:
        cache.end_step(step)
    assert np.isfinite(cache._state.group.table.masses).all()


def test_a_truncation_whose_conversion_raised_loses_nothing(monkeypatch):
    cache = make(num_tokens=16384)
    (seq,), _ = cache.open([[]])
    assert feed(cache, [seq], [range(700)]).all()
    settle(cache, [seq])

    with no_conversions(cache, monkeypatch), pytest.raises(MemoryError):
        cache.truncate([seq], [300])
    cache.check_integrity()
    assert read(cache, seq) == list(range(700))


@pytest.mark.parametrize("reuse", ["hot", "all"])
def test_dropped_sequences_come_back_with_what_prompts_may_find(reuse):
    cache = make({**TIERS, "prefix_reuse_tiers": reuse})
    (seq,), _ = cache.open([list(range(701))])
    feed(cache, [seq], [range(700)])
    settle(cache, [seq])
    cache.preempt([seq], "drop")
    assert cache.restore([seq]).all()
    assert cache.lengths([seq])[0] == (64 if reuse == "hot" else 696)
    assert read(cache, seq) == list(range(64 if reuse == "hot" else 696))


@pytest.mark.parametrize(("reuse", "found"), [("hot", 64), ("all", 696)])
def test_later_prompts_find_quantized_tiles_only_if_they_may(reuse, found):
    cache = make({**TIERS, "prefix_reuse_tiers": reuse})
    (seq,), _ = cache.open([list(range(700))])
    feed(cache, [seq], [range(700)])
    settle(cache, [seq])
    (other,), cached = cache.open([list(range(701))])
    assert cached[0] == found
    cache.check_integrity()
    assert read(cache, other) == list(range(found))
    # inside a tile that is quantized nothing can be shared
    _, cached = cache.open([list(range(100))])
    assert cached[0] == 64


def test_what_is_computed_anew_is_found_hot():
    cache = make()
    (seq,), _ = cache.open([list(range(700))])
    feed(cache, [seq], [range(700)])
    settle(cache, [seq])
    cache.close([seq])
    cold = cache.stats().tiers["cold"].cached
    assert cold > 0
    (other,), cached = cache.open([list(range(400))])
    feed(cache, [other], [range(cached[0], 400)])
    assert cache.open([list(range(401))])[1][0] == 400
    # nobody holds the quantized copies any more
    assert cache.stats().tiers["cold"].cached == max(0, cold - 400 + 64)


def test_a_snapshot_holds_all_tiers():
    cache = make()
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(700)])
    settle(cache, [seq])
    other = KVCache.from_snapshot(cache.config, cache.snapshot())
    other.check_integrity()
    assert tiers_of(other, seq) == expected_tiers(700)
    assert read(other, seq) == list(range(700))
    feed(other, [seq], [range(200)])
    settle(other, [seq])
    assert read(other, seq) == [*range(700), *range(200)]


@pytest.mark.parametrize("warm_tokens", [1024, 0])  # what is old enough belongs in the warm tier, or in the cold one
def test_where_a_tier_is_full_tiles_take_the_other_one_or_stay_hot(warm_tokens):
    probe = make()
    nbytes = {name: count * probe.config.block_nbytes[name] for name, count in (("hot", 30), ("warm", 2), ("cold", 3))}
    total = sum(nbytes.values())
    shares = {name: one / total for name, one in nbytes.items()}
    tiers = {**TIERS, "warm_tokens": warm_tokens, "tier_memory": shares}
    cache = make(tiers, num_tokens=None, memory=total + 1000)
    assert [one.capacity // 64 for one in cache.stats().tiers.values()] == [30, 2, 3]
    (seq,), _ = cache.open([[]])
    for begin in range(0, 640, 64):
        assert feed(cache, [seq], [range(begin, begin + 64)]).all()
        settle(cache, [seq])
    assert tiers_of(cache, seq) == "hcccwwhhhh"
    # the last three scans: 0 + 1 + 2 hot tiles find no room, and where warm ones want to be cold 1 + 2 + 2 of those
    assert cache.stats().num_failed_demotions == {1024: 3, 0: 8}[warm_tokens]
    assert read(cache, seq) == list(range(640))


def test_cached_tiles_make_room_in_their_tier():
    cache = make(num_tokens=4096, tiers={**TIERS, "tier_memory": {"hot": 0.9, "warm": 0.05, "cold": 0.05}})
    for number in range(8):
        (seq,), _ = cache.open([[]])
        tokens = [number * 1000 + i for i in range(640)]
        feed(cache, [seq], [tokens])
        settle(cache, [seq])
        assert tiers_of(cache, seq) == expected_tiers(640)
        assert read(cache, seq) == tokens
        cache.close([seq])
    assert cache.stats().num_failed_demotions == 0
    assert cache.stats().num_evicted > 0


def test_room_in_the_hot_tier_is_made_of_what_is_cached_there():
    cache = make({**TIERS, "pinned_tokens": 0}, num_tokens=4096, growth="append")
    for number in range(2):
        (seq,), _ = cache.open([[]])
        feed(cache, [seq], [range(1000 * number, 1000 * number + 400)])
        settle(cache, [seq])
        cache.close([seq])
    tiers = cache.stats().tiers
    (seq,), _ = cache.open([[]])
    assert feed(cache, [seq], [[0] * (tiers["hot"].free + tiers["hot"].cached - 64)]).all()
    after = cache.stats().tiers
    assert after["hot"].cached == 64
    assert [after[name].cached for name in ("warm", "cold")] == [tiers[name].cached for name in ("warm", "cold")]


def test_a_step_reads_tiles_where_they_are_now():
    cache = make()
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(640)])
    for _ in range(5):
        with cache.begin_step([seq], 1) as step:
            entries = cache._state.group.table.entries[seq & 0xFFFFF]
            held = entries[entries >= 0]
            assert step.block_table[0, : len(held)].tolist() == held.tolist()
    assert cache.stats().converted_tokens == 5 * 64


def test_the_figures_of_the_tiers_add_up():
    cache = make()
    (seq,), _ = cache.open([[]])
    feed(cache, [seq], [range(700)])
    settle(cache, [seq])
    stats = cache.stats()
    letters = expected_tiers(700)
    assert [stats.tiers[name].used for name in ("warm", "cold")] == [64 * letters.count(one) for one in "wc"]
    assert sum(one.used for one in stats.tiers.values()) == stats.used
    assert sum(one.capacity for one in stats.tiers.values()) == stats.capacity
    assert sum(one.free for one in stats.tiers.values()) == stats.free
    assert sum(one.nbytes for one in stats.tiers.values()) == stats.nbytes
    assert stats.num_demoted_warm + stats.num_demoted_cold == stats.converted_tokens // 64
    assert KVCache(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_tokens=64)).stats().tiers.keys() == {"hot"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_steps_attend_to_all_tiers(dtype):
    cache = make(dtype=dtype)
    random = np.random.default_rng(0)

    def draw(*shape):
        drawn = random.standard_normal(shape).astype(np.float32)
        return (drawn.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else drawn.astype(dtype)

    seq_ids, _ = cache.open([[]] * 3)
    for counts in ([700, 300, 90], [1, 1, 1], [64, 0, 3], *[[1, 1, 1]] * 20):
        step = cache.begin_step(seq_ids, counts)
        for layer in range(NUM_LAYERS):
            step.append(layer, draw(sum(counts), NUM_HEADS, HEAD_DIM), draw(sum(counts), NUM_HEADS, HEAD_DIM))
        outs = []
        for layer in range(NUM_LAYERS):
            q = draw(sum(counts), 2 * NUM_HEADS, HEAD_DIM)
            outs.append((q, step.attend(layer, q)))
        for layer, (q, out) in enumerate(outs):
            expected, _ = tiered_attention(
                q, cache.tier_caches(layer), step.block_table, step.block_starts, step.seq_lens,
                cu_seqlens_q=step.cu_seqlens_q, dtype="bfloat16" if dtype == "bfloat16" else None,
            )  # fmt: skip
            if dtype == "bfloat16":
                out = (out.astype(np.uint32) << 16).view(np.float32)
            tolerance = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
            np.testing.assert_allclose(out, expected, atol=tolerance)
        cache.end_step(step)
    assert {"w", "c"} <= set(tiers_of(cache, seq_ids[0]))


def attend_steps(cache, seq_ids, count, read_tile=None, chunk=1):
    """Steps of ``chunk`` random tokens each, whose queries look at the tokens of one tile, if they are told which."""
    random = np.random.default_rng(count)
    for _ in range(count):
        first = cache.lengths(seq_ids)
        with cache.begin_step(seq_ids, chunk) as step:
            key, value = random.standard_normal((2, chunk * len(seq_ids), NUM_HEADS, HEAD_DIM)).astype(np.float32)
            tiles = (first[:, None] + np.arange(chunk)) // 64
            key[tiles.ravel() == 3, :, 0] = 30  # the tile that queries look at
            q = np.zeros((chunk * len(seq_ids), NUM_HEADS, HEAD_DIM), np.float32)
            q[..., 0] = 0 if read_tile is None else 10
            for layer in range(NUM_LAYERS):
                step.append(layer, key, value)
                step.attend(layer, q)
            cache.end_step(step)
        cache.check_integrity()


def test_by_mass_what_is_read_most_stays_warm_in_the_room_that_age_would_use():
    cache = make({**TIERS, "demote": "mass"})
    (seq,), _ = cache.open([[]])
    for _ in range(900):
        attend_steps(cache, [seq], 1, read_tile=3)
        length = int(cache.lengths([seq])[0])
        if length % 64 == 0:
            settle(cache, [seq])
            letters = tiers_of(cache, seq)
            assert sorted(letters) == sorted(expected_tiers(length)), length
            if length > 128 + 4 * 64:
                assert letters[3] == "w", length
    assert expected_tiers(900)[3] == "c"


def test_by_mass_rows_that_share_a_tile_keep_it_as_warm_as_one_of_them_wants_it():
    cache = make({**TIERS, "demote": "mass"}, prefix_caching=False)
    (seq,), _ = cache.open([[]])
    attend_steps(cache, [seq], 10, read_tile=3, chunk=64)
    child = int(cache.fork([seq], 1)[0, 0])
    attend_steps(cache, [child], 256)  # looks at all tokens equally
    attend_steps(cache, [seq], 256, read_tile=3)
    settle(cache, [seq, child])
    assert tiers_of(cache, seq)[3] == tiers_of(cache, child)[3] == "w"
    cache.close([seq])
    attend_steps(cache, [child], 64)
    settle(cache, [child])
    assert sorted(tiers_of(cache, child)) == sorted(expected_tiers(int(cache.lengths([child])[0])))


def test_masses_travel_with_snapshots_and_reordered_rows():
    cache = make({**TIERS, "demote": "mass"})
    seq_ids, _ = cache.open([[], []])
    attend_steps(cache, seq_ids[:1], 6, read_tile=3, chunk=64)
    cache.reorder(seq_ids, [0, 0])
    masses = cache._state.group.table.masses
    assert (masses[seq_ids & 0xFFFFF, 3] > 0).all()
    cache = KVCache.from_snapshot(cache.config, cache.snapshot())
    attend_steps(cache, seq_ids[1:], 6, read_tile=3, chunk=64)
    masses = cache._state.group.table.masses
    assert masses[seq_ids[0] & 0xFFFFF].argmax() == 3
    assert masses[seq_ids[1] & 0xFFFFF].argmax() == 3
    settle(cache, seq_ids)
    assert tiers_of(cache, seq_ids[1])[3] == "w"


@pytest.mark.parametrize("tiers", [TIERS, {**TIERS, "warm": None}], ids=["warm", "cold"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("part", "value"), [("key", np.nan), ("value", -np.inf)])
def test_tiles_with_a_token_that_is_no_number_stay_in_16_bit(part, value, dtype, tiers):
    cache = make(tiers, dtype=dtype)
    (seq,), _ = cache.open([[]])
    with cache.begin_step([seq], 700) as step:
        for layer in range(NUM_LAYERS):
            pair = [np.ones((700, NUM_HEADS, HEAD_DIM), np.float32) for _ in range(2)]
            if layer == 1:
                pair[part == "value"][[130, 600], 1, 9] = value  # of tiles 2, and 9, which is hot anyway
            stored = [x.view(np.uint32) >> 16 if dtype == "bfloat16" else x for x in pair]
            step.append(layer, *(x.astype(np.uint16 if dtype == "bfloat16" else dtype) for x in stored))
        cache.end_step(step)
    settle(cache, [seq])
    assert cache.stats().num_unquantizable >= 1
    found = tiers_of(cache, seq)
    assert found[2] == "h"
    assert [letter for tile, letter in enumerate(found[:8]) if tile not in (0, 2)].count("h") == 0
