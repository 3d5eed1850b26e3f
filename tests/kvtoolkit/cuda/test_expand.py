"""The list of granules that entries become; its kernel runs on the host, thread by thread."""

import numpy as np
import pytest

from kvtoolkit.arrays.call import attention_call
from kvtoolkit.cpu import operand
from kvtoolkit.cuda import expand, prefill, prompt, specs
from tests.kvtoolkit.cuda.host_kernels import needs_compiler, on_the_host
from tests.kvtoolkit.cuda.test_launches import array

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


@needs_compiler
@pytest.mark.parametrize("window", [1, 20, 64, 129, 3000])
@pytest.mark.parametrize("keys", [64, 96, 128, 64 * prefill._LONG])
def test_all_tiles_of_work_are_in_the_list(monkeypatch, window, keys):
    """A row holds what its new tokens see, from a whole granule on. Tiles begin before that."""
    on_the_host(monkeypatch, expand, prompt)
    rng = np.random.default_rng(window)
    new = rng.choice([1, 2, 9, 40, 700], 12)
    before = rng.integers(0, 40_000, 12)
    lengths = new + before
    rows = [draw_row(rng, first, -(-end // 8)) for first, end in zip(first_held(before, window), lengths, strict=True)]
    found = expanded(rows, lengths, -(-lengths.max() // 8), max(map(len, rows)))
    listed = found != UNTOUCHED

    bounds, seq_lens = (operand(np.array(one, np.int32), "array") for one in ([0, *np.cumsum(new)], lengths))
    q, cache = array(sum(new), 8, 128), array(9, 2, 8, 128)
    call = attention_call(
        q, cache, cache, array(12, 2), None, seq_lens, out=q, cu_seqlens_q=bounds, window_size=(window - 1, 0)
    )
    sizes = prompt.sizes_of(int(sum(new)), 8, 2, 128, 12, 132)
    memory = np.full(sizes.list_nbytes // 4 + 4, 0x55, np.int32)
    begin = -memory.ctypes.data % 16 // 4
    prompt.plan_launch(call, sizes, memory[begin:].ctypes.data, keys=keys).run()
    items = memory[begin + prompt.LIST_AT // 4 :][: 8 * memory[begin]].reshape(-1, 8)
    assert set(items[:, 3]) == set(range(12))
    begins_before = 0
    for row, length, tiles in items[:, 3:6]:
        begin, end = (tiles & 0xFFFF) * keys // 8, -(-min((tiles >> 16) * keys, length) // 8)
        assert listed[row, begin:end].all()
        begins_before += begin < rows[row][0][2]
    assert begins_before > 0
    for row, (count, length) in enumerate(zip(new, lengths, strict=True)):  # decode takes steps of 16 tokens
        first = max(0, length - count - window + 1) // 16 * 2
        assert listed[row, first : -(-length // 8)].all()


def first_held(length, window):
    """The first granule of what a token at position ``length`` sees."""
    return np.maximum(0, length - window + 1) // 8
