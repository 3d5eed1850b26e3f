"""Which rows of a step begin with the same granules, and whether reading these once for all of them pays.

    saved = sum over the nodes of the prefix tree of (rows below it - 1) * its granules

The tree is that of the granules: a node is a run of granules that the same rows hold at the same positions. Only full
granules are shared, so no new token of a step is in one. A row without new tokens, with more than `MOST_QUERIES` of
them, or without memory for them, shares nothing: where it has a beginning in common with others, it is not among them.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import VERSION, BlockTable, entry_that_holds
from kvtoolkit.cache.state.step_passes import OK, StepArrays
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.formats.entry import entry_granule, entry_length

MAX_ROWS = 1024
"""Steps with more rows are not searched."""
MOST_QUERIES = 8
"""A row with more new tokens shares nothing."""
LEAST_TOKENS = 128
"""A common beginning pays only if it has so many tokens,"""
LEAST_NBYTES = 32_000_000
"""and if a layer reads so many bytes less: what an H200 reads in 7 us, about as long as merging takes."""
LEAST_NBYTES_OF_CODES = 400_000_000
"""`LEAST_NBYTES` of a cache with quantized tiers, where bytes are counted as if all tokens had 16 bits."""
LEAST_SHARE_OF_CODES = 0.82
"""With quantized tiers it also pays only if so much of what is read is saved, since the kernel that shares reads is
several times slower at making numbers of codes, and takes 16 us longer to begin: see `docs/results/gpu_shared.md`."""
_GOLDEN = 2654435761  # 2**32 over the golden ratio: granules of blocks have the same low bits
_MOST_KEPT = 4  # results: batches that take turns each have one


class CommonBeginnings:
    """What the rows of a step have in common, as of one version of the block table.

    Attributes:
        order: ``[batch]`` int32 permutation: rows with a common beginning are side by side, and otherwise as they were.
        is_in_place: whether that is how they are anyway.
        saved_tokens: how many tokens fewer are read if each common one is read once.
        longest: tokens of the longest beginning that two rows have in common.
        pays: whether to read common beginnings once.
        uploaded: copies of ``order`` on a device, by the stream that they were made on.
    """

    __slots__ = ("is_in_place", "longest", "order", "pays", "saved_tokens", "uploaded")

    def __init__(
        self, order: Int32Array, is_in_place: bool, saved_tokens: int, longest: int, least_saved: float
    ) -> None:
        self.order, self.is_in_place = order, is_in_place
        self.saved_tokens, self.longest = saved_tokens, longest
        self.pays = longest >= LEAST_TOKENS and saved_tokens >= least_saved
        self.uploaded: dict[int, Any] = {}


class _Kept(NamedTuple):
    version: int
    key: tuple[bytes, bytes]
    """The ids, and which rows may share."""
    found: CommonBeginnings


class _Rows(NamedTuple):
    """The rows of a step; of the arrays' whole length."""

    batch: int
    counts: bytes
    states: bytes
    may_share: bytes


class SharedReads:
    """Finds `CommonBeginnings`, and keeps them for later steps of the same rows.

    A result is found again only when other rows are in a step, when other ones of them may share, or when what rows
    have in common may have changed since (`VERSION` of the block table's clock). Tokens that are appended change
    nothing.

    It needs no lock, because it reads only arrays of the step, and replaces what it keeps as a whole.

    Args:
        table: of the group.
        nbytes_per_token: of keys and values of 16 bits, of one layer.
        has_codes: whether the cache has quantized tiers.
    """

    def __init__(self, table: BlockTable, nbytes_per_token: int, has_codes: bool = False) -> None:
        self._clock = table.clock
        self._least_saved = -(-(LEAST_NBYTES_OF_CODES if has_codes else LEAST_NBYTES) // nbytes_per_token)
        self._least_share = LEAST_SHARE_OF_CODES if has_codes else 0.0
        self._kept: tuple[_Kept, ...] = ()
        self._last_rows = _Rows(0, b"", b"", b"")

    def find(self, ids: Int64Array, arrays: StepArrays) -> CommonBeginnings:
        """What the rows of an open step have in common.

        Args:
            ids: of its sequences; at most `MAX_ROWS`.
            arrays: of the step.
        """
        batch = len(ids)
        version, key = self._clock.item(VERSION), (ids.tobytes(), self._which_share(arrays, batch))
        for kept in self._kept:
            if kept[0] == version and kept[1] == key:
                return kept[2]
        order = np.empty(batch, np.int32)
        saved, longest, is_in_place = find_common(
            arrays, order, np.empty((8, batch), np.int32), np.zeros((3, 1 << (2 * batch).bit_length()), np.int32)
        )
        order.setflags(write=False)
        least = max(self._least_saved, self._least_share * int(arrays.seq_lens[:batch].sum()))
        found = CommonBeginnings(order, bool(is_in_place), 8 * int(saved), 8 * int(longest), least)
        others = (kept for kept in self._kept if kept[0] == version)
        self._kept = _Kept(version, key, found), *itertools.islice(others, _MOST_KEPT - 1)
        return found

    def _which_share(self, arrays: StepArrays, batch: int) -> bytes:
        """Which rows may share; found anew only where counts or states are others than in the step before."""
        last, counts, states = self._last_rows, arrays.counts.tobytes(), arrays.status.tobytes()
        if last.batch == batch and last.counts == counts and last.states == states:
            return last.may_share
        some = arrays.counts[:batch]
        found = (arrays.status[:batch] == OK) & (some >= 1) & (some <= MOST_QUERIES)
        last = _Rows(batch, counts, states, found.tobytes())
        self._last_rows = last
        return last.may_share


def make_shared_reads(config: CacheConfig, table: BlockTable) -> SharedReads | None:
    """The `SharedReads` of a cache; None if its steps never share reads."""
    if not config.shared_reads or config.backend != "cuda":
        return None
    nbytes = config.nbytes_per_token // config.num_layers
    return SharedReads(table, nbytes, config.tiers is not None)


# Index of each row of the scratch array `work`, whose columns are the rows of the step:
(
    _ENDS,  # granules of the row that others may share
    _BEGIN,  # groups to look at: where they begin in the order,
    _END,  # where they end,
    _KNOWN,  # and how many granules their rows are known to have in common
    _PART,  # in a group that is being sorted: the part that a row belongs to,
    _SIZE,  # rows of a part,
    _PLACE,  # where its next row goes,
    _MOVED,  # and the rows in their new order
) = range(8)
# rows of the hash table from granules to parts: the group that uses the slot
_USER, _GRANULE, _NUMBER = range(3)


@jit
def find_common(step: StepArrays, order: Int32Array, work: Int32Array, slots: Int32Array) -> Any:
    """Order the rows of a step so that those with a common beginning are side by side, and count what that saves.

    Where rows go apart, those that go on together keep their order, and the parts come in the order of their first
    rows. So rows that are side by side already stay where they are.

    Args:
        step: the arrays of the step.
        order: ``[batch]``, to write.
        work: ``[8, batch]``, see above.
        slots: ``[3, 2**n]`` zeros, more than ``batch``.

    Returns:
        ``(saved, longest, is_in_place)``, in granules; see `CommonBeginnings`.
    """
    batch = len(order)
    for b in range(batch):
        order[b] = b
        work[_ENDS, b] = _end_of(step, b)
    num_waiting = 0
    if batch > 1:
        work[_BEGIN, 0], work[_END, 0], work[_KNOWN, 0] = 0, batch, 0
        num_waiting = 1
    saved, longest, num_groups = 0, 0, 0
    while num_waiting > 0:
        num_waiting -= 1
        begin, end, known = work[_BEGIN, num_waiting], work[_END, num_waiting], work[_KNOWN, num_waiting]
        common = _common_end(step, order, work[_ENDS], begin, end, known)
        saved += (end - begin - 1) * (common - known)
        longest = max(longest, common)
        num_groups += 1
        num_parts = _count_parts(step, order, work, slots, begin, end, common, num_groups)
        num_waiting = _sort_parts(order, work, begin, end, common, num_parts, num_waiting)
    is_in_place = True
    for b in range(batch):
        is_in_place = is_in_place and order[b] == b
    return saved, longest, is_in_place


@jit
def _end_of(step: StepArrays, b: int) -> Any:
    """How many granules of a row others may share: the full ones before its new tokens."""
    count = step.counts[b]
    if step.status[b] != OK or count < 1 or count > MOST_QUERIES:
        return 0
    return (step.seq_lens[b] - count) >> 3


@jit
def _common_end(step: StepArrays, order: Int32Array, ends: Int32Array, begin: int, end: int, known: int) -> Any:
    """How many granules the rows ``order[begin:end]`` have in common, at least ``known``."""
    first = order[begin]
    common = ends[first]
    for i in range(begin + 1, end):
        common = min(common, ends[order[i]])
    for i in range(begin + 1, end):
        if common == known:
            break
        common = _first_difference(step, first, order[i], known, common)
    return common


@jit
def _first_difference(step: StepArrays, a: int, b: int, position: int, most: int) -> Any:
    """The first granule from ``position`` on at which two rows differ, or ``most``.

    The rows may hold the same granules in entries of other lengths.
    """
    num_a, num_b = step.filled[a], step.filled[b]
    i = entry_that_holds(step.starts, a, num_a, position)
    j = entry_that_holds(step.starts, b, num_b, position)
    while position < most:
        if step.starts[a, i] == position and step.starts[b, j] == position:
            count = _count_equal(step.table[a, i:num_a], step.table[b, j:num_b])
            i, j = i + count, j + count
            if i == num_a or j == num_b:
                return most
            position = step.starts[a, i]
            if position >= most:
                return most
        one, other = step.table[a, i], step.table[b, j]
        if entry_granule(one) - step.starts[a, i] != entry_granule(other) - step.starts[b, j]:
            return position
        end_a, end_b = step.starts[a, i] + entry_length(one), step.starts[b, j] + entry_length(other)
        position = min(end_a, end_b)
        if end_a == position:
            i += 1
        if end_b == position:
            j += 1
    return most


@jit
def _count_equal(entries: Int32Array, others: Int32Array) -> Any:
    """How many entries are the same before the first difference, rounded down to a multiple of 16."""
    count, most = 0, min(len(entries), len(others)) - 15
    while count < most:
        differs = 0
        for k in range(16):  # without a branch, so that they are compared at once
            differs |= entries[count + k] ^ others[count + k]
        if differs != 0:
            return count
        count += 16
    return count


@jit
def _count_parts(
    step: StepArrays, order: Int32Array, work: Int32Array, slots: Int32Array, begin: int, end: int, common: int,
    group: int,
) -> Any:  # fmt: skip
    """Number the parts in which the rows of a group go on, in the order of their first rows; returns how many.

    A row that ends here is a part of its own.
    """
    num_parts, mask = 0, slots.shape[1] - 1
    for i in range(begin, end):
        b = order[i]
        part = num_parts
        if common < work[_ENDS, b]:
            e = entry_that_holds(step.starts, b, step.filled[b], common)
            granule = entry_granule(step.table[b, e]) + common - step.starts[b, e]
            slot = (granule * _GOLDEN >> 20) & mask
            while slots[_USER, slot] == group and slots[_GRANULE, slot] != granule:
                slot = (slot + 1) & mask
            if slots[_USER, slot] != group:
                slots[_USER, slot], slots[_GRANULE, slot], slots[_NUMBER, slot] = group, granule, num_parts
            part = slots[_NUMBER, slot]
        if part == num_parts:
            work[_SIZE, part] = 0
            num_parts += 1
        work[_SIZE, part] += 1
        work[_PART, i] = part
    return num_parts


@jit
def _sort_parts(
    order: Int32Array, work: Int32Array, begin: int, end: int, common: int, num_parts: int, num_waiting: int
) -> Any:
    """Put the rows of each part of a group side by side; returns how many groups wait, now with its larger parts."""
    place = begin
    for part in range(num_parts):
        work[_PLACE, part] = place
        place += work[_SIZE, part]
        if work[_SIZE, part] > 1:
            work[_BEGIN, num_waiting], work[_END, num_waiting], work[_KNOWN, num_waiting] = (
                place - work[_SIZE, part],
                place,
                common,
            )
            num_waiting += 1
    for i in range(begin, end):
        part = work[_PART, i]
        work[_MOVED, work[_PLACE, part]] = order[i]
        work[_PLACE, part] += 1
    for i in range(begin, end):
        order[i] = work[_MOVED, i]
    return num_waiting
