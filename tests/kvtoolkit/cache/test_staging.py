"""What a step copies from host memory ahead of its layers, and what it reads in place."""

from types import SimpleNamespace

import numpy as np

from kvtoolkit.cache.layers.staging import Staging
from kvtoolkit.cache.storage.storage import Stage
from kvtoolkit.formats.entry import pack_entry

FIRST, END = 4, 12
"""Superblocks in host memory."""


def make(num):
    return Staging(SimpleNamespace(stage=Stage(20, num)), FIRST, END)


def table(*rows):
    """Entries ``(superblock, offset, length)`` of each row, and where they begin."""
    width = max(map(len, rows)) + 1
    entries, starts = np.full((2, len(rows), width), -1, np.int32)
    for b, row in enumerate(rows):
        at = 0
        for e, (superblock, offset, length) in enumerate(row):
            entries[b, e], starts[b, e] = pack_entry(8 * superblock + offset, length, 0), at
            at += length
    return entries, starts


def choose(num, rows, lens, counts):
    entries, starts = table(*rows)
    before = entries.copy()
    out, pairs = make(num).choose(entries, starts, np.array(lens, np.int32), np.array(counts, np.int32))
    assert (entries == before).all()
    return out, pairs[2 : 2 + 2 * pairs[0]].reshape(-1, 2).tolist()


def test_full_blocks_in_host_memory_are_staged_and_the_rest_is_read_where_it_is():
    rows = [[(1, 0, 8), (5, 0, 8), (6, 0, 8)], [(5, 0, 4), (7, 2, 3)]]
    out, pairs = choose(8, rows, [64 * 3, 56], [1, 1])
    assert pairs == [[5, 20]]
    expected, _ = table([(1, 0, 8), (20, 0, 8), (6, 0, 8)], [(20, 0, 4), (7, 2, 3)])
    assert (out == expected).all()


def test_a_block_that_any_row_may_write_is_read_in_place_by_all():
    rows = [[(5, 0, 4), (6, 0, 4)], [(5, 4, 4)]]
    _, pairs = choose(8, rows, [64, 30], [1, 1])
    assert pairs == []
    _, pairs = choose(8, rows, [65, 33], [1, 1])
    assert pairs == [[5, 20], [6, 21]]


def test_what_the_stage_has_no_room_for_is_read_in_place():
    rows = [[(5, 0, 8), (6, 0, 8), (7, 0, 8), (8, 0, 8)]]
    out, pairs = choose(2, rows, [257], [1])
    assert pairs == [[5, 20], [6, 21]]
    expected, _ = table([(20, 0, 8), (21, 0, 8), (7, 0, 8), (8, 0, 8)])
    assert (out == expected).all()


def test_rows_that_take_no_part_are_not_staged():
    _, pairs = choose(4, [[(5, 0, 8)], [(6, 0, 8)]], [0, 65], [1, 1])
    assert pairs == [[6, 20]]
