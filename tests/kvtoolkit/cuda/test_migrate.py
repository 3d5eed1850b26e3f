"""The kernel that chooses which tiles move, on the host, against a model that sorts all that is due."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtoolkit.cuda import migrate
from kvtoolkit.formats.entry import pack_entry, unpack_entries
from tests.kvtoolkit.cuda.host_kernels import HostLaunch, needs_compiler, on_the_host

pytestmark = needs_compiler
NEVER = 0x7FFFFFFF
HOT = 64


@pytest.fixture(autouse=True, scope="module")
def host():
    with pytest.MonkeyPatch.context() as patch:
        on_the_host(patch, migrate)
        yield


class Rows:
    """Drawn rows: first cold, then warm, then hot tiles, the hot ones in blocks of any sizes."""

    def __init__(self, rng, batch, width):
        self.batch, self.width, self.rng = batch, width, rng
        self.table, self.starts = np.full((2, batch, width), -1, np.int32)
        self.tails, self.marks = np.zeros((2, batch, 4), np.int32)
        self.lengths = np.zeros(batch, np.int32)
        self.granule = 0
        order = rng.permutation(batch)
        for row in range(batch):
            self.fill(row)
            self.marks[row, 3] = order[row]

    def fill(self, row):
        rng = self.rng
        cold, warm = rng.integers(0, 4, 2).tolist()
        hot = rng.choice(
            [[8], [4, 4], [1, 2, 5], [3, 6, 7], [6, 2], [5, 8]][int(rng.integers(6))], 1 + rng.integers(30)
        )
        if rng.random() < 0.5:
            hot = np.tile([[8], [4, 4], [1] * 8][int(rng.integers(3))], 1 + rng.integers(4))
        entries = ([(8, 2)] * cold + [(8, 1)] * warm + [(int(size), 0) for size in hot])[: self.width]
        capacity = 0
        for e, (size, tier) in enumerate(entries):
            self.table[row, e] = pack_entry(self.granule, size, tier)
            self.starts[row, e] = capacity
            capacity += size
            self.granule += size + 1
        cold, warm = (sum(tier == one for _, tier in entries) for one in (2, 1))
        length = 8 * capacity if rng.random() < 0.7 else int(rng.integers(64 * (cold + warm), 8 * capacity + 1))
        self.lengths[row] = length
        first = int(self.starts[row, len(entries) - 1])
        base = 8 * (int(self.table[row, len(entries) - 1] & 0xFFFFFF) - first)
        self.tails[row] = capacity, len(entries), 8 * first, base
        never = rng.random() < 0.1
        begin = max(0, length // 64 - int(rng.integers(3)))
        if rng.random() < 0.3:  # tiles before are pinned, or of several rows
            cold, warm = cold + warm + int(rng.integers(1, 3)), 0
        self.marks[row, :3] = NEVER if never else cold, NEVER if never else cold + warm, begin


def granules(table, starts, row, tile):
    """The 8 granules and the tier of a tile."""
    found = []
    for k in range(8 * tile, 8 * tile + 8):
        e = int(np.flatnonzero((table[row] >= 0) & (starts[row] <= k))[-1])
        granule, length, tier = (int(one[0]) for one in unpack_entries(table[row, e : e + 1]))
        assert k - starts[row, e] < length
        found.append((granule + k - int(starts[row, e]), tier))
    return found


def expected_moves(rows, warm_tokens, most, held, finished):
    """``(row, tile, list, place)`` in their order, and the rows that are given up."""
    cold_end, hot_begin = rows.marks[:, 0].astype(np.int64), rows.marks[:, 1].astype(np.int64)
    due = []
    for row in np.flatnonzero(cold_end != NEVER):
        length = int(rows.lengths[row])
        for tile in range(length // 64):
            held_in = 2 if tile < cold_end[row] else 1 if tile < hot_begin[row] else 0
            end = 64 * (tile + 1)
            goal = 0 if end > length - HOT else 1 if end > length - HOT - warm_tokens else 2
            if held_in < goal:
                due.append((-(length - 64 * tile), int(rows.marks[row, 3]), row, tile, goal))
    share, taken, moves, lost = min(most, -(-len(due) // 32)), [0, 0, 0], [], set()
    for _, _, row, tile, goal in sorted(due):
        if row in lost or share == 0:
            continue
        share -= 1
        if taken[goal] == held[goal]:
            lost.add(row)
            continue
        moves.append((row, tile, goal, taken[goal]))
        taken[goal] += 1
    num_demotions = len(moves)
    for row in range(rows.batch):
        length, tile = int(rows.lengths[row]), int(rows.lengths[row]) // 64 - 1
        if finished[row] or length == 0 or length % 64 or tile < rows.marks[row, 2]:
            continue
        inside = [e for e in range(rows.tails[row, 1]) if 8 * tile <= rows.starts[row, e] < 8 * tile + 8]
        covers = inside and rows.starts[row, inside[0]] == 8 * tile
        _, lengths, _ = unpack_entries(rows.table[row, inside])
        if len(inside) > 1 and covers and lengths.sum() == 8 and taken[0] < min(held[0], most):
            moves.append((row, tile, 0, taken[0]))
            taken[0] += 1
    return moves, num_demotions, lost


def migrated(rows, warm_tokens, most, targets, held, finished):
    """Run the kernel: the journal, the numbers of moves, and what to copy."""
    zeros, limits = np.zeros(rows.batch, np.int32), np.full(rows.batch, 1 << 20, np.int32)
    taken, journal = np.zeros(4, np.int32), np.full((3, 50, 4), 7, np.int32)
    grants = np.arange(rows.batch, dtype=np.int32)
    edits, num_moves = np.zeros((2 * most, 4), np.int32), np.zeros(2, np.int32)
    demotions, merges = np.full((2, most, 16), 7, np.int32)
    arrays = (
        finished, zeros, zeros, limits, rows.lengths, zeros, rows.table, rows.starts, rows.tails, rows.marks, targets,
        held, taken, journal, grants, np.zeros(rows.batch, np.int32), edits, num_moves, demotions, merges,
    )  # fmt: skip
    places = migrate.MigrationArrays(*(array.ctypes.data for array in arrays))
    ages = HOT, warm_tokens
    migrate.make_migration(places, rows.batch, rows.width, 50, most, 1, 1 << 20, ages, True, True, 0, 0).run()
    return journal, num_moves, demotions, merges


TARGETS = (10**6 + 8 * np.arange(150)).reshape(3, 50).astype(np.int32)


@pytest.mark.parametrize("width", [5, 6])
def test_a_row_without_entries_left_keeps_its_tile(width):
    rows = Rows(np.random.default_rng(0), 1, 6)
    sizes, rows.width = [5, 8, 8, 8, 8], width
    rows.table, rows.starts = np.full((2, 1, width), -1, np.int32)
    rows.table[0, :5] = [pack_entry(16 * i, size, 0) for i, size in enumerate(sizes)]
    rows.starts[0, :5] = np.cumsum([0, *sizes[:-1]])
    rows.tails[0], rows.marks[0], rows.lengths[0] = (37, 5, 8 * 29, 8 * 35), (1, 1, 9, 0), 296
    before = rows.table.copy()
    journal, num_moves, demotions, _ = migrated(rows, 0, 4, TARGETS, np.full(3, 50, np.int32), np.zeros(1, bool))
    assert num_moves.tolist() == [1, 0]
    if width == 5:  # the tile would cut two entries
        assert (rows.table == before).all()
        assert (demotions[0] == -1).all()
        assert journal[2, 0, 0] == -1
        assert rows.marks[0, 0] == rows.marks[0, 1] == NEVER
    else:
        assert unpack_entries(rows.table)[1].tolist() == [[5, 3, 8, 5, 8, 8]]
        assert rows.marks[0, :2].tolist() == [2, 2]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_moves_are_those_of_the_host_in_its_order(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    batch, width = draw(st.sampled_from([1, 5, 40])), draw(st.sampled_from([6, 12, 30]))
    rows = Rows(rng, batch, width)
    most, warm_tokens = draw(st.sampled_from([1, 2, 64])), draw(st.sampled_from([0, 64, 128]))
    held = np.array([draw(st.sampled_from([0, 1, 50])) for _ in range(3)], np.int32)
    finished = rng.random(batch) < 0.1
    before = rows.table.copy(), rows.starts.copy()
    HostLaunch.seed = draw(st.integers(0, 3))
    moves, num_demotions, lost = expected_moves(rows, warm_tokens, most, held, finished)
    journal, num_moves, demotions, merges = migrated(rows, warm_tokens, most, TARGETS, held, finished)
    assert num_moves.tolist() == [num_demotions, len(moves) - num_demotions]
    assert (rows.marks[list(lost), :2] == NEVER).all()
    for i, (row, tile, goal, place) in enumerate(moves):
        listed = demotions[i] if i < num_demotions else merges[i - num_demotions]
        if listed[0] < 0:  # the row would have too many entries
            assert journal[goal, place, 0] == -1
            assert rows.marks[row, 0] == NEVER
            assert rows.tails[row, 1] + 2 > width
            continue
        assert listed[:8].tolist() == [granule for granule, _ in granules(*before, row, tile)]
        assert listed[8:].tolist() == list(range(TARGETS[goal, place], TARGETS[goal, place] + 8))
        assert journal[goal, place].tolist() == [row, tile, i, row]
    done = {  # a tile that moves twice is where it went last
        (row, tile): (TARGETS[goal, place], goal)
        for row, tile, goal, place in moves if journal[goal, place, 0] >= 0
    }  # fmt: skip
    for row in range(batch):
        count = int((rows.table[row] >= 0).sum())
        assert (rows.table[row, count:] == -1).all()
        assert (rows.starts[row, count:] == -1).all()
        first, length, _ = (int(one[0]) for one in unpack_entries(rows.table[row, count - 1 : count]))
        start = int(rows.starts[row, count - 1])
        assert rows.tails[row].tolist() == [start + length, count, 8 * start, 8 * (first - start)]
        for tile in range(start + length >> 3):
            own = granules(rows.table, rows.starts, row, tile)
            if (row, tile) in done:
                target, goal = done[row, tile]
                assert own == [(target + k, goal) for k in range(8)]
            else:
                assert own == granules(*before, row, tile)
