"""Which rows begin with the same granules: compared with counting in plain Python, and kept only while it is right."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtoolkit import CacheConfig, KVCache
from kvtoolkit.cache.state.shared_reads import (
    LEAST_NBYTES,
    LEAST_NBYTES_OF_CODES,
    MOST_QUERIES,
    SharedReads,
    find_common,
)
from kvtoolkit.cache.state.step_arrays import SpareArrays
from kvtoolkit.cache.state.step_passes import OK, OUT_OF_BLOCKS
from kvtoolkit.formats.entry import pack_entry, unpack_entries


def expected_of(rows):
    """``order, saved, longest`` of rows of granules, by counting the rows of every beginning."""
    counts = Counter(tuple(row[:end]) for row in rows for end in range(1, len(row) + 1))
    saved = sum(count - 1 for count in counts.values())
    longest = max((len(beginning) for beginning, count in counts.items() if count > 1), default=0)
    order = list(range(len(rows)))
    for end in range(1, longest + 1):
        firsts = {}
        for b, row in enumerate(rows):
            if len(row) >= end:
                firsts.setdefault(tuple(row[:end]), b)
        # a row is where the first row with its beginning is; sorting is stable, and longer beginnings come later
        place = {b: i for i, b in enumerate(order)}
        order.sort(key=lambda b: place[firsts[tuple(rows[b][:end])]] if len(rows[b]) >= end else place[b])
    return order, saved, longest


def granules_of_step(step):
    """For every row of a step the granules that hold only tokens from before the step."""
    rows = []
    for entries, length in zip(step.block_table, step.seq_lens - step.num_new_tokens, strict=True):
        first, sizes, _ = unpack_entries(entries)
        held = [int(g) + i for g, n in zip(first, sizes, strict=True) for i in range(n)]
        rows.append(held[: max(0, length) // 8])
    return rows


def check(reads, step):
    """What is found or was kept is right for a step; returns it."""
    found = reads.find(step.seq_ids, step._arrays)
    may_share = step.ok & (step.num_new_tokens >= 1) & (step.num_new_tokens <= 8)
    rows = [row if may else [] for row, may in zip(granules_of_step(step), may_share, strict=True)]
    order, saved, longest = expected_of(rows)
    assert (found.order.tolist(), found.saved_tokens, found.longest) == (order, 8 * saved, 8 * longest)
    assert found.is_in_place == (order == sorted(order))
    return found


# -- the search ----------------------------------------------------------------------------------------------------


@st.composite
def trees(draw):
    """Rows of granules: each begins with a part of an earlier row, and goes on with runs of its own or of others."""
    runs = [range(8 * start, 8 * start + draw(st.integers(1, 8))) for start in range(draw(st.integers(1, 12)))]
    rows = []
    for _ in range(draw(st.integers(0, 12))):
        row = []
        if rows:
            parent = draw(st.sampled_from(rows))
            row = parent[: draw(st.integers(0, len(parent)))]
        for run in draw(st.lists(st.sampled_from(runs), max_size=6)):
            row = [*row, *run]
        rows.append(row)
    return rows


@st.composite
def entries_of(draw, row):
    """A row as entries, which need not be cut where those of other rows are."""
    entries, starts = [], []
    position = 0
    while position < len(row):
        end = position + 1
        while end < min(len(row), position + 8) and row[end] == row[end - 1] + 1:
            end += 1
        end = draw(st.sampled_from([end, end, draw(st.integers(position + 1, end))]))
        entries.append(pack_entry(row[position], end - position, 0))
        starts.append(position)
        position = end
    return entries, starts


@st.composite
def steps(draw):
    """The arrays of a step, and of each row the granules that others may share."""
    rows = draw(trees())
    arrays = SpareArrays().take(len(rows), 0)
    arrays = SpareArrays().widen(arrays, max(1, *map(len, rows), 1))
    shareable = []
    for b, row in enumerate(rows):
        entries, starts = draw(entries_of(row))
        arrays.table[b, : len(entries)], arrays.starts[b, : len(entries)] = entries, starts
        arrays.filled[b] = len(entries)
        if draw(st.integers(0, 9)) == 0:
            arrays.status[b], arrays.seq_lens[b], arrays.counts[b] = OUT_OF_BLOCKS, 0, draw(st.integers(1, 9))
            shareable.append([])
            continue
        count = draw(st.sampled_from([1, 1, 8, 0, 9, 30]))
        length = draw(st.sampled_from([8 * len(row), draw(st.integers(0, 8 * len(row)))]))
        arrays.status[b], arrays.seq_lens[b], arrays.counts[b] = OK, length + count, count
        shareable.append(row[: length // 8] if 1 <= count <= MOST_QUERIES else [])
    return arrays, shareable


@settings(max_examples=600, deadline=None)
@given(steps())
def test_the_search_finds_what_counting_beginnings_finds(step):
    arrays, rows = step
    order = np.empty(len(rows), np.int32)
    work, slots = np.empty((8, len(rows)), np.int32), np.zeros((3, 1 << (2 * len(rows)).bit_length()), np.int32)
    saved, longest, is_in_place = find_common(arrays, order, work, slots)
    expected = expected_of(rows)
    assert (order.tolist(), saved, longest) == expected
    assert is_in_place == (expected[0] == list(range(len(rows))))
    # side by side: whatever beginning rows have in common, no other row is between them
    for beginning in {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}:
        places = [i for i, b in enumerate(order) if tuple(rows[b][: len(beginning)]) == beginning]
        assert places == list(range(places[0], places[-1] + 1))


def test_many_rows_and_long_beginnings():
    random = np.random.default_rng(0)
    arrays = SpareArrays().widen(SpareArrays().take(300, 0), 200)
    rows = []
    for b in range(300):
        parent = rows[random.integers(len(rows))] if rows and random.random() < 0.9 else []
        row = parent[: random.integers(0, len(parent) + 1)]
        row = [*row, *(8 * random.integers(0, 1 << 20, 200 - len(row))).tolist()]
        rows.append(row)
        arrays.table[b, :200], arrays.starts[b, :200], arrays.filled[b] = row, range(200), 200
        arrays.seq_lens[b], arrays.counts[b], arrays.status[b] = 1601, 1, OK
    order = np.empty(300, np.int32)
    saved, longest, is_in_place = find_common(
        arrays, order, np.empty((8, 300), np.int32), np.zeros((3, 1024), np.int32)
    )
    assert (order.tolist(), saved, longest) == expected_of(rows)
    assert not is_in_place


# -- when a result is kept -------------------------------------------------------------------------------------------


class Run:
    """A cache whose sequences are fed, and what is found in a step of all of them."""

    def __init__(self, **fields):
        shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_tokens": 4096, "max_seqs": 32}
        self.cache = KVCache(CacheConfig(**{**shape, **fields}))
        self.reads = SharedReads(self.cache._group.table, 4)

    def feed(self, ids, count, token=None):
        with self.cache.begin_step(ids, count) as step:
            assert step.ok.all()
            total = count * len(ids)
            tokens = np.random.default_rng(total).integers(9, size=total) if token is None else np.full(total, token)
            self.cache.end_step(step, tokens)

    def found(self, ids):
        with self.cache.begin_step(ids, 1) as step:
            return check(self.reads, step)

    def family(self, count=4, length=200):
        """Sequences that share a beginning, each with tokens of its own."""
        parents, _ = self.cache.open([[]])
        self.feed(parents, length)
        ids = np.concatenate([parents, self.cache.fork(parents, count - 1).ravel()])
        for i, seq in enumerate(ids.tolist()):
            self.feed([seq], 20, 100 + i)
        return ids


def fork_in_place_of_another(run, ids):
    """The fork gets the row of the block table that a closed sequence had."""
    run.cache.close(ids[-1:])
    (ids[-1],) = run.cache.fork(ids[:1], 1).ravel()


def open_in_place_of_another(run, ids):
    run.cache.close(ids[-1:])
    (ids[-1],), _ = run.cache.open([[1, 2, 3]])


def reorder(run, ids):
    run.cache.reorder(ids, [2, 2, 2, 3])


def truncate_to_nothing(run, ids):
    run.cache.truncate(ids[:1], [0])
    run.feed(ids[:1], 220)


def truncate_inside_a_shared_granule(run, ids):
    run.cache.truncate(ids[:1], [197])  # the granule is copied, because it will be written
    run.feed(ids[:1], 23)


def drop_what_was_forgotten(run, ids):
    run.cache.clear_prefixes()
    run.cache.preempt(ids[:1], to="drop")
    assert run.cache.restore(ids[:1]).all()
    run.feed(ids[:1], 220)


def drop_what_is_evicted(run, ids):
    run.cache.preempt(ids, to="drop")
    others, _ = run.cache.open([[]])
    run.feed(others, run.cache.stats().free + run.cache.stats().cached)
    run.cache.close(others)
    assert run.cache.restore(ids).all()
    run.feed(ids, 220)


def come_back_from_the_host(run, ids):
    """What the index has forgotten is written anew."""
    run.cache.clear_prefixes()
    run.cache.preempt(ids[:1], to="host")
    run.cache.truncate(ids[1:], [0] * 3)
    assert run.cache.restore(ids[:1]).all()
    run.feed(ids[1:], 220)


@pytest.mark.parametrize(
    "change",
    [
        fork_in_place_of_another, open_in_place_of_another, reorder, truncate_to_nothing,
        truncate_inside_a_shared_granule, drop_what_was_forgotten, drop_what_is_evicted, come_back_from_the_host,
    ],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_what_changes_common_beginnings_is_noticed(change):
    run = Run()
    ids = run.family()
    before = run.found(ids)
    assert before.saved_tokens == 600
    change(run, ids)
    assert run.found(ids).saved_tokens != before.saved_tokens


def test_sequences_that_shared_nothing_share_after_a_reorder():
    run = Run()
    ids, _ = run.cache.open([[]] * 2)
    run.feed(ids, 160)
    assert run.found(ids).saved_tokens == 0
    run.cache.reorder(ids, [1, 1])
    assert run.found(ids).saved_tokens == 160


@pytest.mark.parametrize("to", ["drop", "host"])
def test_twins_share_once_one_comes_back(to):
    run = Run()
    ids, _ = run.cache.open([[]] * 2)
    run.feed(ids, 160, token=1)  # in granules of their own, of which the index has one
    assert run.found(ids).saved_tokens == 0
    run.cache.preempt(ids[1:], to=to)
    assert run.cache.restore(ids[1:]).all()
    assert run.found(ids).saved_tokens == 160


def grow(run, ids):
    for _ in range(150):
        run.feed(ids, 1)
        run.found(ids)


def merge_small_blocks(run, ids):
    before = run.cache.stats().num_merges
    grow(run, ids)
    assert run.cache.stats().num_merges > before


def cut_draft_tokens(run, ids):
    for _ in range(20):
        run.feed(ids, 8)
        run.cache.truncate(ids, run.cache.lengths(ids) - 5)
        run.found(ids)


def serve_others(run, ids):
    for prompt in ([], range(40), range(40)):
        others, (held,) = run.cache.open([prompt])
        run.feed(others, 70 - held)
        run.cache.close(others)


def compact(run, ids):
    for _ in range(30):
        run.feed(ids, 8)
    before = run.cache.stats().num_merges
    assert run.cache.compact(1 << 20) > 0
    assert run.cache.stats().num_merges > before


@pytest.mark.parametrize(
    ("change", "growth"),
    [
        (grow, "adaptive"), (grow, "append"), (merge_small_blocks, "lazy_merge"), (cut_draft_tokens, "append"),
        (compact, "append"),
    ],
)  # fmt: skip
def test_what_changes_none_keeps_the_result(change, growth):
    run = Run(growth=growth)
    ids = run.family()
    before = run.found(ids)
    change(run, ids)
    assert run.found(ids) is before


def test_batches_that_take_turns_each_keep_their_result():
    run = Run()
    ids = run.family(4)
    halves = [run.found(ids[:2]), run.found(ids[2:])]
    for _ in range(3):
        run.feed(ids, 1)
        assert [run.found(ids[:2]), run.found(ids[2:])] == halves
    serve_others(run, ids)
    for part in (ids[:1], ids[1:], ids[:3], ids[::2], ids[1::2], ids):
        run.found(part)
    assert len(run.reads._kept) == 4


@pytest.mark.parametrize(
    ("counts", "alone"), [([1, 600, 1, 1], 1), ([1, 1, 0, 1], 2), ([2, 1, 8, 9], 3), ([9, 1, 3, 1], 0)]
)
def test_a_row_that_shares_nothing_is_not_among_those_that_do(counts, alone):
    """It stalled, or has no new tokens, or more than 8."""
    run = Run(num_tokens=512, growth="fixed8")
    ids = run.family()
    everybody = run.found(ids)
    assert everybody.is_in_place
    with run.cache.begin_step(ids, counts) as step:
        assert step.ok.tolist() == [count < 600 for count in counts]
        found = check(run.reads, step)
    assert found.saved_tokens == 400
    others = [b for b in range(4) if b != alone]
    assert found.order.tolist() == ([alone, *others] if alone == 0 else [*others, alone])
    assert run.found(ids) is everybody
    with run.cache.begin_step(ids, counts) as step:
        assert run.reads.find(step.seq_ids, step._arrays) is found


def test_numbers_of_new_tokens_that_may_share_change_nothing():
    run = Run()
    ids = run.family()
    before = run.found(ids)
    for counts in ([1, 2, 3, 4], [8, 1, 1, 5], [1, 1, 1, 1]):
        with run.cache.begin_step(ids, counts) as step:
            assert run.reads.find(step.seq_ids, step._arrays) is before


@pytest.mark.parametrize(
    ("length", "nbytes_per_token", "pays"),
    [
        (136, -(-LEAST_NBYTES // 272), True),
        (136, -(-LEAST_NBYTES // 272) - 1, False),
        (128, LEAST_NBYTES, True),
        (127, LEAST_NBYTES, False),
    ],
)
def test_only_large_savings_pay(length, nbytes_per_token, pays):
    run = Run()
    ids = run.family(3, length)
    with run.cache.begin_step(ids, 1) as step:
        reads = SharedReads(run.cache._group.table, nbytes_per_token)
        assert reads.find(step.seq_ids, step._arrays).pays is pays


@pytest.mark.parametrize(
    ("rows", "nbytes_per_token", "pays"),
    [
        (16, -(-LEAST_NBYTES_OF_CODES // (15 * 400)), True),
        (16, -(-LEAST_NBYTES_OF_CODES // (15 * 400)) - 1, False),
        (8, LEAST_NBYTES_OF_CODES, True),  # 7 * 400 of 8 * 421 tokens saved, 83 %
        (7, LEAST_NBYTES_OF_CODES, False),  # 81 %
    ],
)
def test_codes_need_larger_savings(rows, nbytes_per_token, pays):
    run = Run()
    ids = run.family(rows, 400)
    with run.cache.begin_step(ids, 1) as step:
        reads = SharedReads(run.cache._group.table, nbytes_per_token, has_codes=True)
        assert reads.find(step.seq_ids, step._arrays).pays is pays
