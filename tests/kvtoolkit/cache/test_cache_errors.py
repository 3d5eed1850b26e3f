"""Every misuse of a cache is refused by name, and leaves the cache as it was."""

import copy
import pickle

import numpy as np
import pytest

from kvtoolkit import (
    ArgumentError,
    CacheConfig,
    CacheFullError,
    CacheSnapshotError,
    KVCache,
    SequenceError,
    ShapeError,
    StepError,
)


def make(**fields):
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "dtype": "float32", "num_tokens": 128, "max_seqs": 4}
    return KVCache(CacheConfig(**{**shape, **fields}))


@pytest.fixture
def cache():
    """Two sequences of 20 tokens, one of them preempted to the host, and one that is closed."""
    cache = make()
    seq_ids, _ = cache.open([[1] * 21, [2] * 21, [3]])
    with cache.begin_step(seq_ids, 20) as step:
        key = np.ones((60, 2, 16), np.float32)
        for layer in range(2):
            step.append(layer, key, key)
        cache.end_step(step, np.repeat([1, 2, 3], 20))
    cache.close(seq_ids[2:])
    cache.preempt(seq_ids[1:2], "host")
    cache.ids = seq_ids
    return cache


CALLS = [
    (lambda c: c.begin_step([99], 1), SequenceError, "got 99, unknown or closed"),
    (lambda c: c.begin_step([-1], 1), SequenceError, "got -1, unknown or closed"),
    (lambda c: c.begin_step([c.ids[2]], 1), SequenceError, "unknown or closed"),
    (lambda c: c.begin_step([c.ids[0], c.ids[0]], 1), SequenceError, "expected every sequence once, got .* twice"),
    (lambda c: c.begin_step([c.ids[1]], 1), SequenceError, "expected sequences that are open, got .* preempted"),
    (lambda c: c.begin_step([0.5], 1), ArgumentError, r"seq_ids: expected \[batch\] integers, got float64 \[1\]"),
    (
        lambda c: c.begin_step([[c.ids[0]]], 1),
        ArgumentError,
        r"seq_ids: expected \[batch\] integers, got int64 \[1, 1\]",
    ),
    (lambda c: c.begin_step(c.ids[:1], -1), ArgumentError, "num_new_tokens: expected 0 to .*, got -1"),
    (lambda c: c.begin_step(c.ids[:1], [-3]), ArgumentError, "num_new_tokens: expected 0 to .*, got -3"),
    (lambda c: c.begin_step(c.ids[:1], [1, 2]), ArgumentError, r"expected a number or \[1\] of them, got shape \[2\]"),
    (lambda c: c.begin_step(c.ids[:1], 1.5), ArgumentError, "num_new_tokens: expected integers, got float64"),
    (lambda c: c.begin_step(c.ids[:1], 10**12), ArgumentError, "num_new_tokens: expected 0 to .*, got 1000000000000"),
    (lambda c: c.open([[1.5]]), ArgumentError, r"prompts\[0\]: expected \[n\] integers, got float64"),
    (
        lambda c: c.open([[1], [[2]]]),
        ArgumentError,
        r"prompts\[1\]: expected \[n\] integers, got int64 \[1, 1\]",
    ),
    (lambda c: c.open([[1]] * 9), CacheFullError, r"open: expected at most 2 new sequences \(max_seqs is 4\), got 9"),
    (lambda c: c.close([c.ids[2]]), SequenceError, "expected sequences that are open or preempted, got"),
    (lambda c: c.close([c.ids[0], c.ids[0]]), SequenceError, "twice"),
    (lambda c: c.fork(c.ids[:1], -1), ArgumentError, "n: expected a number of copies, got -1"),
    (lambda c: c.fork(c.ids[:1], 9), CacheFullError, "fork: expected at most 2 new sequences"),
    (lambda c: c.fork(c.ids[1:2], 1), SequenceError, "preempted"),
    (lambda c: c.reorder(c.ids[:1], [1]), ArgumentError, r"parents: expected 0 to 0, got \[1\]"),
    (lambda c: c.reorder(c.ids[:1], [0, 0]), ArgumentError, r"parents: expected \[1\] integers"),
    (lambda c: c.reorder(c.ids[:1], [0.0]), ArgumentError, "parents: expected .* integers, got float64"),
    (
        lambda c: c.truncate(c.ids[:1], [21]),
        ArgumentError,
        r"new_lens\[0\]: expected 0 to 20, the present length, got 21",
    ),
    (lambda c: c.truncate(c.ids[:1], [-1]), ArgumentError, r"new_lens\[0\]: expected 0 to 20"),
    (lambda c: c.truncate(c.ids[:1], [1.0]), ArgumentError, "new_lens: expected .* integers, got float64"),
    (lambda c: c.preempt(c.ids[:1], "disk"), ArgumentError, "to: expected 'drop' or 'host', got 'disk'"),
    (lambda c: c.preempt(c.ids[1:2]), SequenceError, "expected sequences that are open, got .* preempted"),
    (lambda c: c.restore(c.ids[:1]), SequenceError, "expected sequences that are preempted, got .* open"),
    (lambda c: c.pin(c.ids[1:2]), SequenceError, "preempted"),
    (lambda c: c.compact(-1), ArgumentError, "max_tokens: expected a number of tokens, got -1"),
    (lambda c: c.compact(1.5), ArgumentError, "max_tokens: expected a number of tokens, got 1.5"),
    (lambda c: c.end_step("step"), StepError, "step: expected one of this cache, got 'step'"),
    (lambda c: c.end_step(make().begin_step([], 1)), StepError, "step: expected one of this cache, got one of another"),
    (lambda c: c.open(None), ArgumentError, "prompts: expected a sequence of prompts, got None"),
    (lambda c: c.fork(c.ids[:1], 10**11), CacheFullError, "fork: expected at most 2 new sequences"),
    (lambda c: c.lengths([[1], [2, 3]]), ArgumentError, "seq_ids: expected integers, got something that is no array"),
    (lambda c: c.preempt(c.ids[:1], np.array(["drop", "host"])), ArgumentError, "to: expected 'drop' or 'host'"),
    (lambda c: c.key_cache(None), ArgumentError, "layer: expected 0 to 1, got None"),
    (lambda c: c.key_cache(0.5), ArgumentError, "layer: expected 0 to 1, got 0.5"),
    (lambda c: c.key_cache(True), ArgumentError, "layer: expected 0 to 1, got True"),
    (lambda c: c.key_cache(2), ArgumentError, "layer: expected 0 to 1, got 2"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_a_wrong_call_is_refused_and_changes_nothing(cache, call, error, message):
    before = cache.snapshot()
    with pytest.raises(error, match=message):
        call(cache)
    cache.check_integrity()
    assert cache.snapshot() == before


STEP_CALLS = [
    (lambda s, k: s.append(True, k, k), ArgumentError, "layer: expected 0 to 1, got True"),
    (lambda s, k: s.attend(np.True_, k), ArgumentError, "layer: expected 0 to 1, got "),
    (lambda s, k: s.append(2, k, k), ArgumentError, "layer: expected 0 to 1, got 2"),
    (lambda s, k: s.append(0, k[:1], k), ShapeError, "expected .* got"),
    (lambda s, k: s.append(0, k[:, :1], k[:, :1]), ShapeError, "expected .* got"),
    (lambda s, k: s.append(0, k[:, :, :8], k[:, :, :8]), ShapeError, "expected .* got"),
    (lambda s, k: s.append(0, k.astype(np.float64), k), ShapeError, "float64"),
    (lambda s, k: s.append(0, k.astype(np.float16), k.astype(np.float16)), ShapeError, "float16"),
    (lambda s, k: s.attend(-1, k), ArgumentError, "layer: expected 0 to 1, got -1"),
    (lambda s, k: s.attend(0, k[:1]), ShapeError, "expected .* got"),
    (lambda s, k: s.attend(0, k[:, :, :8]), ShapeError, "expected .* got"),
    (lambda s, k: s.attend(0, k.repeat(2, 1)[:, :3]), ShapeError, "expected .* got"),
    (lambda s, k: s.attend(0, k.astype(np.float16)), ShapeError, "float16"),
    (lambda s, k: s.attend(0, k, softmax_scale=float("nan")), ShapeError, "softmax_scale"),
    (lambda s, k: s.attend(0, k, softcap=float("nan")), ShapeError, "softcap"),
]


@pytest.mark.parametrize(("call", "error", "message"), STEP_CALLS)
def test_wrong_arrays_are_refused_and_nothing_is_written(cache, call, error, message):
    with cache.begin_step(cache.ids[:1], 2) as step:
        before = cache.key_cache(0).copy()
        with pytest.raises(error, match=message):
            call(step, np.full((2, 2, 16), 7, np.float32))
        assert np.array_equal(cache.key_cache(0), before)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1], r"token_ids: expected 2 integers, one for every new token, got shape \[1\]"),
        ([[1, 2]], r"token_ids: expected 2 integers, .* got shape \[1, 2\]"),
        ([1.0, 2.0], "token_ids: expected integers, got float64"),
        ([1, True], "token_ids: expected integers, got a bool among them"),
    ],
)
def test_wrong_token_ids_leave_the_step_open(cache, tokens, message):
    step = cache.begin_step(cache.ids[:1], 2)
    with pytest.raises(ArgumentError, match=message):
        cache.end_step(step, tokens)
    cache.end_step(step, [1, 2])
    assert cache.lengths(cache.ids[:1]).tolist() == [22]


def test_a_step_cannot_be_used_after_its_end(cache):
    step = cache.begin_step(cache.ids[:1], 1)
    cache.end_step(step)
    key = np.ones((1, 2, 16), np.float32)
    for call in (
        lambda: step.append(0, key, key),
        lambda: step.attend(0, key),
        lambda: cache.end_step(step),
        lambda: cache.abort_step(step),
    ):
        with pytest.raises(StepError, match="expected an open step, got one that has ended"):
            call()


def test_a_sequence_in_a_step_is_left_alone_until_it_ends(cache):
    seq = cache.ids[:1]
    with cache.begin_step(seq, 1):
        for call in (
            lambda: cache.begin_step(seq, 1),
            lambda: cache.close(seq),
            lambda: cache.fork(seq, 1),
            lambda: cache.truncate(seq, [0]),
            lambda: cache.preempt(seq),
        ):
            with pytest.raises(SequenceError, match="in a step"):
                call()
        with pytest.raises(StepError, match=f"snapshot: expected no open step, got sequences {seq[0]} in one; end it"):
            cache.snapshot()
    cache.close(seq)


def test_a_full_pool_stalls_rows_and_names_the_reason():
    cache = make(num_tokens=64)
    seq_ids, _ = cache.open([[1], [2]])
    step = cache.begin_step(seq_ids, [60, 60])
    assert step.ok.tolist() == [True, False]
    (text,) = step.explain()
    assert text.startswith(f"sequence {seq_ids[1]}: out of blocks: ")
    assert step.seq_lens.tolist() == [60, 0]
    assert (step.slot_mapping[60:] == -1).all()
    cache.end_step(step)
    assert cache.lengths(seq_ids).tolist() == [60, 0]


def test_a_full_row_and_the_longest_sequence_stall_with_their_own_reasons():
    cache = make(num_tokens=1024, growth="append", max_entries=2, max_seq_len=512)
    seq_ids, _ = cache.open([[1], [2]])
    with cache.begin_step(seq_ids, [200, 513]) as step:
        assert [reason.partition(": ")[2] for reason in step.explain()] == ["row full", "at max_seq_len"]
    cache.check_integrity()


def test_a_fork_that_does_not_fit_forks_nothing():
    cache = make(num_tokens=64)
    seq_ids, _ = cache.open([[1]])
    cache.end_step(cache.begin_step(seq_ids, 60))
    with pytest.raises(CacheFullError, match="fork: expected room for 1 copies of a partly filled granule"):
        cache.fork(seq_ids, 1)
    cache.check_integrity()
    assert cache.stats().num_seqs == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:100],
        lambda data: b"",
        lambda data: data[: len(data) // 2] + b"\x5a" * 64 + data[len(data) // 2 + 64 :],
        lambda data: b"not a snapshot",
        lambda data: "text",
        lambda data: data[:-1],
        lambda data: data + b"\0",
    ],
)
def test_a_damaged_snapshot_is_refused(cache, damage):
    data = damage(cache.snapshot())
    with pytest.raises(CacheSnapshotError):
        KVCache.from_snapshot(cache.config, data)


def test_an_ended_lease_is_refused(cache):
    lease = cache.pin(cache.ids[:1])
    message = f"snapshot: expected no open lease, got sequences {lease.seq_ids[0]} in one; end it first"
    with pytest.raises(StepError, match=message):
        cache.snapshot()
    lease.abort()
    with pytest.raises(SequenceError, match="expected an open lease, got one that has ended"):
        lease.commit()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_cannot_be_copied_and_says_what_can(cache, duplicate):
    with pytest.raises(
        TypeError, match=r"KVCache: cannot be copied or pickled; KVCache\.from_snapshot\(.*snapshot\(\)"
    ):
        duplicate(cache)
    cache.check_integrity()


@pytest.mark.parametrize("tokens", [[1, True], (True, 2), [1, np.True_]])
def test_bools_among_integers_are_refused(cache, tokens):
    with pytest.raises(ArgumentError, match=r"prompts\[0\]: expected integers, got a bool"):
        cache.open([tokens])
    with pytest.raises(ArgumentError, match="num_new_tokens: expected integers, got a bool"):
        cache.begin_step(cache.open([[], []])[0], tokens)
