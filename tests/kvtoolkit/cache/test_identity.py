"""What is found again, and by whom: salts, extra keys, and prefixes that were cleared."""

import numpy as np
import pytest

from kvtoolkit import ArgumentError, KVCache
from kvtoolkit.cache.state.identity import FEWEST
from tests.kvtoolkit.cache.broken_calls import make, put

TOKENS = list(range(100, 164))
OWN = {"salt": "tenant", "extra_keys": [[(20, "image")]]}
SALTS = [None, 0, 1, -1, 2**70, "1", "", "tenant", "\ud800", b"1", b"", b"\x00", b"\x00\x00"]
KEYS = [
    [],
    [(0, "a")],
    [(1, "a")],
    [(9, "a")],
    [(9, b"a")],
    [(9, 1)],
    [(9, "a"), (10, "b")],
    [(9, "a"), (9, "b")],
    [(9, "a"), (30, "b")],
    [(9, "a"), (30, "c")],
    [(9, "a"), (10, "b"), (30, "c")],
]


def begin(cache, tokens=TOKENS, **identity):
    return cache.open([tokens], **identity)


def found(cache, tokens=TOKENS, **identity):
    """Tokens of a prompt that are found, and nothing left behind."""
    seq_ids, cached_lens = begin(cache, [*tokens, 0], **identity)
    cache.close(seq_ids)
    return int(cached_lens[0])


def test_a_prompt_is_found_under_its_own_salt_only():
    cache = make(num_tokens=8192)
    for i, salt in enumerate(SALTS):
        assert [found(cache, salt=other) for other in SALTS] == [64] * i + [0] * (len(SALTS) - i)
        seq_ids, _ = begin(cache, salt=salt)
        put(cache, seq_ids, [TOKENS])
        cache.close(seq_ids)
    cache.check_integrity()


def test_each_prompt_of_a_call_has_its_own_salt():
    cache = make()
    seq_ids, _ = cache.open([TOKENS] * 3, salt=["a", None, 7])
    put(cache, seq_ids, [TOKENS] * 3)
    assert cache.open([[*TOKENS, 0]] * 4, salt=["b", np.int64(7), "a", None])[1].tolist() == [0, 64, 64, 64]
    assert cache.open([[*TOKENS, 0]] * 2, salt=7)[1].tolist() == [64, 64]


def granules_of(keys):
    return [{(position, key) for position, key in keys if position >> 3 == granule} for granule in range(8)]


@pytest.mark.parametrize("first", KEYS, ids=str)
def test_extra_keys_are_part_of_their_granule_and_of_all_after_it(first):
    cache = make()
    seq_ids, _ = begin(cache, extra_keys=[first])
    put(cache, seq_ids, [TOKENS])
    for second in KEYS:
        same = [one == other for one, other in zip(granules_of(first), granules_of(second), strict=True)]
        assert found(cache, extra_keys=[second[::-1]]) == 8 * [*same, False].index(False), second


def resumed(cache):
    return KVCache.from_snapshot(cache.config, cache.snapshot())


def reordered(cache, seq):
    (other,), _ = cache.open([[7]], salt="another", extra_keys=[[(0, "b")]])
    put(cache, [other], [[7] * 9])
    cache.reorder([other, seq], [1, 1])
    return other


def back(cache, seq, to):
    cache.preempt([seq], to)
    assert cache.restore([seq]).all()
    return seq


def cut(cache, seq, length):
    cache.truncate([seq], [length])
    return seq


CALLS = {
    "fork": lambda cache, seq: (cache, int(cache.fork([seq], 1)[0, 0])),
    "reorder": lambda cache, seq: (cache, reordered(cache, seq)),
    "truncate": lambda cache, seq: (cache, cut(cache, seq, 18)),
    "truncate to nothing": lambda cache, seq: (cache, cut(cache, seq, 0)),
    "drop": lambda cache, seq: (cache, back(cache, seq, "drop")),
    "host": lambda cache, seq: (cache, back(cache, seq, "host")),
    "commit": lambda cache, seq: (cache, int(cache.pin([seq]).commit()[0])),
    "snapshot": lambda cache, seq: (resumed(cache), seq),
    "compact": lambda cache, seq: (cache, (cache.compact(1024), seq)[1]),
}


@pytest.mark.parametrize(
    ("call", "held"), [(call, held) for call in CALLS for held in (0, 5, 19, 30) if held > 18 or call != "truncate"]
)
def test_salt_and_extra_keys_stay_with_a_sequence(call, held):
    cache = make()
    (seq,), _ = begin(cache, **OWN)
    put(cache, [seq], [TOKENS[:held]])
    cache, seq = CALLS[call](cache, seq)
    length = int(cache.lengths([seq])[0])
    put(cache, [seq], [TOKENS[length:]])
    assert found(cache, **OWN) == 64
    assert found(cache) == found(cache, salt="another") == 0
    assert found(cache, salt="tenant") == 16
    cache.check_integrity()


@pytest.mark.parametrize("salt", [None, "tenant"])
@pytest.mark.parametrize("call", [*CALLS, "step", "nothing"])
def test_nothing_is_found_of_what_was_computed_before_prefixes_were_cleared(call, salt):
    cache = make()
    ids, _ = cache.open([TOKENS] * 3, salt=["tenant", "tenant", "other"])
    put(cache, ids, [TOKENS[:40], TOKENS[:3], TOKENS])
    seq, short = ids[:2].tolist()
    step = cache.begin_step([seq], 16) if call == "step" else None
    lease = cache.pin([short])
    cache.clear_prefixes(salt)
    cache.check_integrity()
    (kept,) = lease.commit().tolist()
    if step is not None:
        kv = np.zeros((16, 1, 8), np.float32)
        step.append(0, kv, kv)
        cache.end_step(step, TOKENS[40:56])
    elif call != "nothing":
        cache, seq = CALLS[call](cache, seq)
    assert found(cache, salt="tenant") == 0
    length = int(cache.lengths([seq])[0])
    is_new = length == 0
    put(cache, [seq, short, kept], [TOKENS[length:], TOKENS[3:], TOKENS[3:]])
    assert found(cache, salt="tenant") == (64 if is_new else 0)
    assert found(cache, salt="other") == (64 if salt else 0)
    cache.check_integrity()
    cache.close([seq, short, kept])
    begun, _ = begin(cache, salt="tenant")
    put(cache, begun, [TOKENS[cache.lengths(begun)[0] :]])
    assert found(cache, salt="tenant") == 64


def test_a_step_that_was_open_when_prefixes_were_cleared_publishes_nothing():
    cache = make()
    seq_ids, _ = begin(cache)
    step = cache.begin_step(seq_ids, 64)
    cache.clear_prefixes()
    cache.end_step(step, TOKENS)
    assert found(cache) == 0


def test_salts_and_extra_keys_that_nothing_uses_are_forgotten():
    cache = make(num_tokens=64, max_seqs=2)
    identities = cache._state.identities
    for i in range(3 * FEWEST):
        seq_ids, _ = begin(cache, [1] * 8, salt=i, extra_keys=[[(0, i), (9, i)]])
        if i % 500 == 0:
            put(cache, seq_ids, [[1] * 8])
        cache.close(seq_ids)
    assert len(identities.salts.numbers) <= FEWEST + 1
    assert len(identities.keys.numbers) <= FEWEST + 2
    assert len(identities.extras) <= 64
    assert found(cache, [1] * 8, salt=3000, extra_keys=[[(0, 3000)]]) == 8
    cache.check_integrity()


@pytest.mark.parametrize("bad", [1.0, True, ["a", "b"], [["a"]], [1.5], bytearray(b"a"), {"a"}, np.zeros((1, 1), int)])
def test_what_is_no_salt_is_refused(bad):
    cache = make()
    with pytest.raises(ArgumentError, match="salt"):
        cache.open([TOKENS], salt=bad)
    assert cache.stats().num_seqs == 0


@pytest.mark.parametrize(
    "bad",
    ["a", [], [[], []], [(0, "a")], [["a"]], [[(0,)]], [[(-1, "a")]], [[(1 << 40, "a")]], [[(True, "a")]],
     [[(0.0, "a")]], [[(0, None)]], [[(0, 1.5)]]],
)  # fmt: skip
def test_what_are_no_extra_keys_is_refused(bad):
    cache = make()
    with pytest.raises(ArgumentError, match="extra_keys"):
        cache.open([TOKENS], extra_keys=bad)
    assert cache.stats().num_seqs == 0


@pytest.mark.parametrize("bad", [[1.0], [True], [2**63], [2**64], np.array([2**63], np.uint64), ["a"], [None]])
def test_tokens_are_64_bit_integers_or_refused(bad):
    cache = make()
    with pytest.raises(ArgumentError, match=r"prompts\[0\]: expected"):
        cache.open([bad])
    seq_ids, _ = cache.open([[]])
    step = cache.begin_step(seq_ids, 1)
    with pytest.raises(ArgumentError, match="token_ids: expected"):
        cache.end_step(step, bad)
    cache.abort_step(step)
    with pytest.raises(ArgumentError, match="seq_ids: expected"):
        cache.close(bad)


def test_every_64_bit_integer_is_a_token_of_its_own():
    cache = make()
    kinds = [-1, 0, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)]
    for i, token in enumerate(kinds):
        assert [found(cache, [other] * 8) for other in kinds] == [8] * i + [0] * (len(kinds) - i)
        seq_ids, _ = begin(cache, [token] * 8)
        cache.end_step(cache.begin_step(seq_ids, 8), [token] * 8)


def test_prompts_that_were_found_are_counted():
    cache = make()
    seq_ids, _ = begin(cache)
    put(cache, seq_ids, [TOKENS])
    cache.open([[*TOKENS, 0], [5] * 9, [5] * 8, []])
    for _ in range(3):
        cache.preempt(seq_ids)
        cache.restore(seq_ids)
    stats = cache.stats()
    assert (stats.num_prefix_hits, stats.num_prefix_misses) == (1, 2)
    assert (stats.prompt_tokens, stats.reused_tokens) == (64 + 65 + 9 + 8, 64)
    assert stats.restored_tokens == 3 * 64
