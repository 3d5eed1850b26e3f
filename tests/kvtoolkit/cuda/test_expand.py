"""The list of granules that entries become; its kernel runs on the host, thread by thread."""

import numpy as np
import pytest

from kvtoolkit.cpu import operand
from kvtoolkit.cuda import expand, prefill, specs
from tests.kvtoolkit.cuda.host_kernels import needs_compiler, on_the_host

UNTOUCHED = 0x55555555
MOST_BEFORE = 512  # kMostBefore of expand.cu


def draw_row(rng, first, end):
    """Entries of all sizes from granule ``first`` to ``end`` or a little further, as ``(granule, length, start)``."""
    row = []
    while first < end:
        size = int(rng.integers(1, 9))
        row.append((int(rng.integers(0, 1 << 23)), size, first))
        first += size
    return row


def expanded(rows, seq_lens, width, max_entries, seed=0):
    table, starts = np.full((2, len(rows), max_entries), -1, np.int32)
    for b, row in enumerate(rows):
        for e, (granule, size, start) in enumerate(row):
            table[b, e], starts[b, e] = granule | (size - 1) << 24, start
    found = np.full((len(rows), width), UNTOUCHED, np.int32)
    described = [operand(np.array(one, np.int32), "array") for one in (table, starts, seq_lens)]
    launch = expand.make_granules(found.ctypes.data, *described, width).launch
    launch.seed = seed
    launch.run()
    return found


@needs_compiler
@pytest.mark.parametrize("seed", range(4))
def test_a_row_that_begins_late_has_its_granules_at_their_places(monkeypatch, seed):
    on_the_host(monkeypatch, expand)
    rng = np.random.default_rng(seed)
    firsts = [0, 0, 1, 7, 300, 511, 512, 513, 2000, 0]
    lengths = [int(8 * first + rng.integers(1, 4000)) for first in firsts[:-1]] + [0]
    ends = [-(-length // 8) for length in lengths]
    rows = [draw_row(rng, first, end) for first, end in zip(firsts, ends, strict=True)]
    width = max(ends) - 20 * (seed == 3)  # which need not be as long as the longest row
    found = expanded(rows, lengths, width, max(map(len, rows)) + 300, seed)
    for row, first, end, got in zip(rows, firsts, ends, found, strict=True):
        expected = np.full(width + 600, UNTOUCHED, np.int32)
        for granule, size, start in row:
            expected[start : start + size] = granule + np.arange(size)
        expected[max(0, first - MOST_BEFORE) : first] = row[0][0] if row else 0
        expected[end:] = UNTOUCHED
        np.testing.assert_array_equal(got, expected[:width])


def test_no_kernel_reads_tiles_that_begin_further_back():
    for head_dim in range(16, 257, 16):
        assert specs.prompt_keys(head_dim) <= 8 * MOST_BEFORE
        for limit in specs.SMEM_LIMITS.values():
            spec = specs.prefill(head_dim, "float16", limit, has_rules=False)
            assert spec.keys * prefill._LONG <= 8 * MOST_BEFORE


@needs_compiler
def test_the_bound_is_that_of_the_kernel(monkeypatch):
    on_the_host(monkeypatch, expand)
    (found,) = expanded([[(5, 8, 4000)]], [32_040], 4005, 1)
    assert np.flatnonzero(found == 5).tolist() == list(range(4000 - MOST_BEFORE, 4001))
