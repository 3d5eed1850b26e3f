"""Buddy: one free bit per granule, blocks of 1, 2, 4 or 8 granules, and longer runs of whole superblocks.

The whole state is one byte per superblock (8 granules = 64 tokens). A block of ``2**k`` granules is an aligned run of
set bits, so splitting clears bits, freeing sets them, and buddies coalesce because they are neighbours. There are no
lists to keep consistent. A request goes to the *fullest* superblock that still has room for it, and among equals to the
lowest (best fit). This keeps whole superblocks free.

    bit set <=> granule free;    popcount(masks) == num_free

The place of the next block depends only on the set of live granules, not on the order of past calls.

Source: binary buddies, Knuth, The Art of Computer Programming 1, sec. 2.5; the bit folding in place of free lists is
this project's.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators import _bitset
from allocators._bits import count_trailing_zeros
from allocators._bitset import BitSets
from allocators._jit import jit
from allocators.protocol import GRANULE, SUPERBLOCK, AllocatorBase, Int32Array, require

_FULL = np.uint8(0xFF)
_ONE = np.uint64(1)
_NUM_ORDERS = 4


@functools.cache
def _aligned_runs(mask: int, order: int) -> list[int]:
    size = 1 << order
    run = (1 << size) - 1
    return [start for start in range(0, SUPERBLOCK, size) if (mask >> start) & run == run]


@functools.cache
def _largest_order(mask: int) -> int:
    return max((order for order in range(_NUM_ORDERS) if _aligned_runs(mask, order)), default=-1)


def _best_start(mask: int, order: int) -> int:
    """The aligned run whose removal breaks up the smallest larger run; -1 if there is none."""

    def order_of_surrounding_run(start: int) -> int:
        return max(k for k in range(order, _NUM_ORDERS) if (start >> k << k) in _aligned_runs(mask, k))

    return min(_aligned_runs(mask, order), key=lambda start: (order_of_surrounding_run(start), start), default=-1)


# tables for all 256 values of a byte of the mask
_POPCOUNT = np.array([mask.bit_count() for mask in range(256)], np.int64)
_NUM_RUNS = np.array(
    [[len(_aligned_runs(mask, order)) for mask in range(256)] for order in range(_NUM_ORDERS)], np.int64
)
_BEST_START = np.array([[_best_start(mask, order) for mask in range(256)] for order in range(_NUM_ORDERS)], np.int64)
# Superblocks are kept in sets by (free granules, largest free order), so the fullest that fits is in the first set
# of its order's search path that has a member. Set of a mask, -1 for a full superblock:
_KINDS = sorted({(mask.bit_count(), _largest_order(mask)) for mask in range(1, 256)})
_SET_OF_MASK = np.array([-1] + [_KINDS.index((m.bit_count(), _largest_order(m))) for m in range(1, 256)], np.int64)
# The sets that hold blocks of an order, as a bit mask over set numbers:
_SETS_WITH_ORDER = np.array(
    [sum(1 << s for s, (_, largest) in enumerate(_KINDS) if largest >= order) for order in range(_NUM_ORDERS)],
    np.uint64,
)


class _Buddy(NamedTuple):
    masks: NDArray[np.uint8]
    """``[num_superblocks]`` free bits."""
    kinds: BitSets
    """One set of superblocks per kind of mask; derived from ``masks``."""
    nonempty: NDArray[np.uint64]
    """``[1]`` bit ``s``: set ``s`` has a member; derived."""
    num_free: NDArray[np.int64]
    """``[1]`` granules; derived."""


class BuddyAllocator(AllocatorBase):
    """Buddy blocks of 8 to 64 tokens, and runs of whole superblocks for prefill; fullest superblock first.

    Args:
        num_granules: size of the pool, a multiple of 8.
        block_sizes: the sizes on offer, in tokens. With 64 among them, any multiple of 8 granules above 8 is on offer
            too, as consecutive superblocks (lowest address first).

    Freed granules are reusable at once, whatever block they were part of. Internal waste is below 2x per block.
    Thread-safe (one lock); deterministic. Metadata: 1 bit per granule and 13 bits per superblock to find blocks by.
    """

    kind = "buddy"

    def __init__(self, num_granules: int, *, block_sizes: ArrayLike = (8, 16, 32, 64)) -> None:
        super().__init__(num_granules, block_sizes=block_sizes)
        num_superblocks = self.num_granules // SUPERBLOCK
        self._pool = _Buddy(
            np.full(num_superblocks, _FULL, np.uint8),
            _bitset.make_bitsets(len(_KINDS), num_superblocks),
            np.zeros(1, np.uint64),
            np.zeros(1, np.int64),
        )
        self._after_restore()

    def _state(self) -> dict[str, NDArray[Any]]:
        return {"masks": self._pool.masks}

    def _after_restore(self) -> None:
        _bitset.clear(self._pool.kinds)
        self._pool.nonempty[0] = 0
        _index(self._pool)

    def _check_size(self, sizes: Int32Array) -> int:
        bad = super()._check_size(sizes)
        if bad >= 0 and 64 in self.block_sizes:
            long_run = (sizes > SUPERBLOCK) & (sizes % SUPERBLOCK == 0)
            offered = np.isin(sizes, [size // GRANULE for size in self.block_sizes])
            wrong = np.flatnonzero(~(long_run | offered))
            bad = int(wrong[0]) if len(wrong) else -1
        return bad

    def _sizes_on_offer(self) -> str:
        return super()._sizes_on_offer() + (" or a multiple of 8" if 64 in self.block_sizes else "")

    def _rebuild(self, live: NDArray[np.bool_]) -> None:
        self._pool.masks[:] = ~np.packbits(live, bitorder="little")
        self._after_restore()

    def _allocate(self, sizes: Int32Array, starts: Int32Array, partial: bool) -> int:
        if partial:
            return int(_allocate_in_order(self._pool, sizes, starts))
        order = np.argsort(-sizes, kind="stable") if len(sizes) and sizes.max() > SUPERBLOCK else _NO_ORDER
        return int(_allocate_all(self._pool, sizes, order, starts))

    def _free(self, starts: Int32Array, sizes: Int32Array) -> int:
        return int(_free_all(self._pool, starts, sizes))

    def _is_live(self, granule: int) -> bool:
        return not (self._pool.masks[granule // SUPERBLOCK] >> (granule % SUPERBLOCK)) & 1

    def _num_free_unlocked(self) -> int:
        return int(self._pool.num_free[0])

    def _largest_free_unlocked(self) -> int:
        longest = int(_longest_run(self._pool.masks)) * SUPERBLOCK
        if longest and 64 in self.block_sizes:
            return longest
        return max((size // GRANULE for size, count in self._free_blocks_unlocked().items() if count), default=0)

    def _free_blocks_unlocked(self) -> dict[int, int]:
        kinds_of = np.bincount(self._pool.masks, minlength=256)
        return {
            size: int(_NUM_RUNS[order] @ kinds_of)
            for order, size in enumerate((8, 16, 32, 64))
            if size in self.block_sizes
        }

    def _metadata_nbytes(self) -> int:
        return self._pool.masks.nbytes + _bitset.nbytes(self._pool.kinds)

    def check_integrity(self) -> None:
        with self._lock:
            pool = self._pool
            require(pool.num_free[0] == _POPCOUNT[pool.masks].sum(), "buddy: num_free is not the number of free bits")
            bits = np.unpackbits(pool.kinds.members.view(np.uint8), axis=1, bitorder="little")[:, : len(pool.masks)]
            expected = _SET_OF_MASK[pool.masks] == np.arange(len(_KINDS))[:, None]
            require(np.array_equal(bits.astype(bool), expected), "buddy: a superblock is not in the set of its mask")
            nonempty = [bool(int(pool.nonempty[0]) >> s & 1) for s in range(len(_KINDS))]
            require(nonempty == expected.any(axis=1).tolist(), "buddy: a set is wrongly held to be empty or not")


_NO_ORDER = np.empty(0, np.int64)


@jit
def _index(pool: _Buddy) -> None:
    """Derive the sets and the count from the masks."""
    pool.num_free[0] = 0
    for i in range(len(pool.masks)):
        mask = pool.masks[i]
        pool.num_free[0] += _POPCOUNT[mask]
        if mask != 0:
            _insert(pool, _SET_OF_MASK[mask], i)


@jit
def _insert(pool: _Buddy, kind: int, i: int) -> None:
    _bitset.add(pool.kinds, kind, i)
    pool.nonempty[0] |= _ONE << np.uint64(kind)


@jit
def _remove(pool: _Buddy, kind: int, i: int) -> None:
    _bitset.discard(pool.kinds, kind, i)
    if _bitset.is_empty(pool.kinds, kind):
        pool.nonempty[0] &= ~(_ONE << np.uint64(kind))


@jit
def _set_mask(pool: _Buddy, i: int, mask: int) -> None:
    """Give superblock ``i`` another mask, and update what is derived from it."""
    old = pool.masks[i]
    before, after = _SET_OF_MASK[old], _SET_OF_MASK[mask]
    pool.masks[i] = mask
    pool.num_free[0] += _POPCOUNT[mask] - _POPCOUNT[old]
    if before != after:
        if before >= 0:
            _remove(pool, before, i)
        if after >= 0:
            _insert(pool, after, i)


@jit
def _take_block(pool: _Buddy, order: int) -> Any:
    """Take one block of ``2**order`` granules from the fullest superblock that has one; -1 if none has."""
    candidates = pool.nonempty[0] & _SETS_WITH_ORDER[order]
    if candidates == 0:
        return -1
    i = _bitset.lowest(pool.kinds, count_trailing_zeros(candidates))
    mask = pool.masks[i]
    start = _BEST_START[order, mask]
    run = ((1 << (1 << order)) - 1) << start
    _set_mask(pool, i, mask & ~run & 0xFF)
    return i * 8 + start


@jit
def _take_superblocks(pool: _Buddy, count: int) -> Any:
    """Take ``count`` consecutive whole superblocks, lowest address first; -1 if there are none."""
    run = 0
    for i in range(len(pool.masks)):
        run = run + 1 if pool.masks[i] == 0xFF else 0
        if run == count:
            first = i + 1 - count
            for j in range(first, i + 1):
                _set_mask(pool, j, 0)
            return first * 8
    return -1


@jit
def _take(pool: _Buddy, size: int) -> Any:
    if size > 8:
        return _take_superblocks(pool, size // 8)
    order = 0
    while (1 << order) < size:
        order += 1
    return _take_block(pool, order)


@jit
def _give_back(pool: _Buddy, start: int, size: int) -> None:
    """Set the bits of a run that is known to be live."""
    granule, end = start, start + size
    while granule < end:
        i = granule >> 3
        first = granule & 7
        count = min(8 - first, end - granule)
        _set_mask(pool, i, pool.masks[i] | (((1 << count) - 1) << first))
        granule += count


@jit
def _allocate_in_order(pool: _Buddy, sizes: Int32Array, starts: Int32Array) -> Any:
    starts[:] = -1
    for i in range(len(sizes)):
        start = _take(pool, sizes[i])
        if start < 0:
            return i
        starts[i] = start
    return len(sizes)


@jit
def _allocate_all(pool: _Buddy, sizes: Int32Array, order: NDArray[np.int64], starts: Int32Array) -> Any:
    """Grant all sizes, largest first because small ones may break up the last large runs, or none.

    ``order`` has the indices of the sizes, largest first; it may be empty if no size exceeds a superblock.
    """
    starts[:] = -1
    granted = 0
    if len(order):
        for i in order:
            starts[i] = _take(pool, sizes[i])
            if starts[i] < 0:
                break
            granted += 1
    else:
        wanted = 0
        for i in range(len(sizes)):
            wanted += sizes[i]
        if wanted <= pool.num_free[0]:
            granted = _grant_by_size(pool, sizes, starts)
    if granted < len(sizes):
        for i in range(len(sizes)):
            if starts[i] >= 0:
                _give_back(pool, starts[i], sizes[i])
    return granted


@jit
def _grant_by_size(pool: _Buddy, sizes: Int32Array, starts: Int32Array) -> Any:
    granted = 0
    for order in range(3, -1, -1):
        size = 1 << order
        for i in range(len(sizes)):
            if sizes[i] == size:
                starts[i] = _take_block(pool, order)
                if starts[i] < 0:
                    return granted
                granted += 1
    return granted


@jit
def _free_all(pool: _Buddy, starts: Int32Array, sizes: Int32Array) -> Any:
    """Free the runs, or find the one at fault and undo those before it. Returns its index, or -1."""
    for i in range(len(starts)):
        if not _is_live_run(pool.masks, starts[i], sizes[i]):
            for j in range(i):
                _take_back(pool, starts[j], sizes[j])
            return i
        _give_back(pool, starts[i], sizes[i])
    return -1


@jit
def _is_live_run(masks: NDArray[np.uint8], start: int, size: int) -> Any:
    if size < 1 or start < 0 or start + size > len(masks) * 8:
        return False
    granule, end = start, start + size
    while granule < end:
        first = granule & 7
        count = min(8 - first, end - granule)
        if masks[granule >> 3] & (((1 << count) - 1) << first):
            return False
        granule += count
    return True


@jit
def _take_back(pool: _Buddy, start: int, size: int) -> None:
    for granule in range(start, start + size):
        _set_mask(pool, granule >> 3, pool.masks[granule >> 3] & ~(1 << (granule & 7)) & 0xFF)


@jit
def _longest_run(masks: NDArray[np.uint8]) -> Any:
    longest, run = 0, 0
    for i in range(len(masks)):
        run = run + 1 if masks[i] == 0xFF else 0
        longest = max(longest, run)
    return longest
