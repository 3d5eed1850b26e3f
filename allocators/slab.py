"""Slab: slabs of 64 granules, one 64-bit word of free bits each, and every slab serves one block size at a time.

A slab without live granules has no owner, and serves the size that asks next. Sizes never mix inside a slab, so finding
a slot is one count of trailing zeros; but a few live blocks can keep whole slabs from other sizes.

    in every slab:   free, returned and live bits are disjoint and fill `valid`
    free             slots that may be granted, always whole
    returned         granules freed while the rest of their slot is live: ``stats().pinned``
    owner == -1 <=> free == valid

Source: slab caches, Bonwick 1994 (USENIX Summer), sec. 3; word-sized slabs, SlabAlloc, Ashkiani et al. 2018.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators import _bitset
from allocators._bits import count_trailing_zeros, popcount
from allocators._bitset import BitSets
from allocators._jit import jit
from allocators._slots import slots_of
from allocators.protocol import GRANULE, AllocatorBase, Int32Array, require

SLAB = 64
"""Granules in a slab (512 tokens)."""
_NUM_ORDERS = 4
_UNOWNED = 4
"""Number of the set of slabs without an owner; sets 0 to 3 have the slabs of an order with a free slot."""
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_ONE = np.uint64(1)


class _Slabs(NamedTuple):
    free: NDArray[np.uint64]
    returned: NDArray[np.uint64]
    valid: NDArray[np.uint64]
    """All ones, except in the last slab if the pool is not a multiple of 64 granules."""
    owner: NDArray[np.int8]
    """Order of the blocks in the slab, or -1."""
    sets: BitSets
    """Derived from the rest."""
    totals: NDArray[np.int64]
    """``[2]`` free and returned granules; derived."""


class SlabAllocator(AllocatorBase):
    """Blocks of 8 to 64 tokens, one size a slab of 512 tokens; the lowest slab of the size that has a slot serves.

    Args:
        num_granules: size of the pool, a multiple of 8 (of 64, or its last slab is smaller).
        block_sizes: the sizes on offer, in tokens.

    A block freed in parts is held (``stats().pinned``) until all of it is free. A request can fail although
    ``num_free`` is large enough, because the free slots of a slab serve only the size that owns it. Thread-safe (one
    lock); deterministic. Metadata: 2 bits a granule and 14 bits a slab to find slots by.
    """

    kind = "slab"

    def __init__(self, num_granules: int, *, block_sizes: ArrayLike = (8, 16, 32, 64)) -> None:
        super().__init__(num_granules, block_sizes=block_sizes)
        num_slabs = -(-self.num_granules // SLAB)
        valid = np.full(num_slabs, _ALL, np.uint64)
        if self.num_granules % SLAB:
            valid[-1] = (_ONE << np.uint64(self.num_granules % SLAB)) - _ONE
        self._slabs = _Slabs(
            valid.copy(),
            np.zeros(num_slabs, np.uint64),
            valid,
            np.full(num_slabs, -1, np.int8),
            _bitset.make_bitsets(_NUM_ORDERS + 1, num_slabs),
            np.zeros(2, np.int64),
        )
        self._after_restore()

    def _state(self) -> dict[str, NDArray[Any]]:
        slabs = self._slabs
        return {"free": slabs.free, "returned": slabs.returned, "owner": slabs.owner}

    def _after_restore(self) -> None:
        _bitset.clear(self._slabs.sets)
        _index(self._slabs)

    def _rebuild(self, live: NDArray[np.bool_]) -> None:
        slabs = self._slabs
        offered = [(size // GRANULE).bit_length() - 1 for size in self.block_sizes]
        slabs.free[:], slabs.returned[:], slabs.owner[:] = slots_of(live, slabs.owner, offered)
        self._after_restore()

    def unit_sizes(self, granules: Int32Array) -> Int32Array:
        sizes: Int32Array = np.left_shift(1, np.maximum(self._slabs.owner[granules // SLAB], 0), dtype=np.int32)
        return sizes

    def _allocate(self, sizes: Int32Array, starts: Int32Array, partial: bool) -> int:
        if partial:
            return int(_allocate_in_order(self._slabs, sizes, starts))
        return int(_allocate_all(self._slabs, sizes, starts))

    def _free(self, starts: Int32Array, sizes: Int32Array) -> int:
        return int(_free_all(self._slabs, self.num_granules, starts, sizes))

    def _is_live(self, granule: int) -> bool:
        slabs, i = self._slabs, granule // SLAB
        return not int(slabs.free[i] | slabs.returned[i]) >> (granule % SLAB) & 1

    def _num_free_unlocked(self) -> int:
        return int(self._slabs.totals[0])

    def _pinned_unlocked(self) -> int:
        return int(self._slabs.totals[1])

    def _largest_free_unlocked(self) -> int:
        return max((size // GRANULE for size, count in self._free_blocks_unlocked().items() if count), default=0)

    def _free_blocks_unlocked(self) -> dict[int, int]:
        free, owner = np.bitwise_count(self._slabs.free).astype(np.int64), self._slabs.owner
        return {
            size: int((free * ((owner == -1) | (owner == order))).sum()) * GRANULE // size
            for order, size in enumerate((8, 16, 32, 64))
            if size in self.block_sizes
        }

    def _metadata_nbytes(self) -> int:
        return super()._metadata_nbytes() + _bitset.nbytes(self._slabs.sets)

    def check_integrity(self) -> None:
        with self._lock:
            slabs = self._slabs
            require(not np.any(slabs.free & slabs.returned), "slab: a granule is both free and returned")
            require(not np.any((slabs.free | slabs.returned) & ~slabs.valid), "slab: a bit lies beyond the pool")
            require(
                np.array_equal(slabs.owner == -1, slabs.free == slabs.valid),
                "slab: a slab is owned though all of it is free, or unowned though it is not",
            )
            for name, words, total in (("free", slabs.free, 0), ("returned", slabs.returned, 1)):
                counted = int(np.bitwise_count(words).sum())
                require(
                    slabs.totals[total] == counted, f"slab: {slabs.totals[total]} {name} granules, counted {counted}"
                )
            members = np.unpackbits(slabs.sets.members.view(np.uint8), axis=1, bitorder="little")[:, : len(slabs.free)]
            for order in range(_NUM_ORDERS):
                expected = (slabs.owner == order) & (slabs.free != 0)
                require(
                    np.array_equal(members[order], expected), f"slab: the slabs of order {order} are listed wrongly"
                )
                for i in np.flatnonzero(expected):
                    word, run = int(slabs.free[i]), (1 << (1 << order)) - 1
                    slots = [word >> slot & run for slot in range(0, SLAB, 1 << order)]
                    require(set(slots) <= {0, run}, f"slab: slab {i} has a slot that is free in part")
            require(np.array_equal(members[_UNOWNED], slabs.owner == -1), "slab: unowned slabs are listed wrongly")


@jit
def _index(slabs: _Slabs) -> None:
    """Derive the sets and totals from the words."""
    slabs.totals[:] = 0
    for i in range(len(slabs.free)):
        slabs.totals[0] += popcount(slabs.free[i])
        slabs.totals[1] += popcount(slabs.returned[i])
        if slabs.owner[i] < 0:
            _bitset.add(slabs.sets, _UNOWNED, i)
        elif slabs.free[i] != 0:
            _bitset.add(slabs.sets, slabs.owner[i], i)


@jit
def _take(slabs: _Slabs, order: int) -> Any:
    """Take a slot of ``2**order`` granules; -1 if there is none."""
    i = _bitset.lowest(slabs.sets, order)
    if i < 0:
        i = _bitset.lowest(slabs.sets, _UNOWNED)
        if i < 0:
            return -1
        _bitset.discard(slabs.sets, _UNOWNED, i)
        _bitset.add(slabs.sets, order, i)
        slabs.owner[i] = order
    slot = count_trailing_zeros(slabs.free[i])
    slabs.free[i] &= ~(((_ONE << np.uint64(1 << order)) - _ONE) << np.uint64(slot))
    slabs.totals[0] -= 1 << order
    if slabs.free[i] == 0:
        _bitset.discard(slabs.sets, order, i)
    return i * 64 + slot


@jit
def _free_slot(slabs: _Slabs, i: int, slot: int, order: int) -> None:
    """Make a whole slot free again, and the slab unowned if it was the last."""
    if slabs.free[i] == 0:
        _bitset.add(slabs.sets, order, i)
    slabs.free[i] |= ((_ONE << np.uint64(1 << order)) - _ONE) << np.uint64(slot)
    slabs.totals[0] += 1 << order
    if slabs.free[i] == slabs.valid[i]:
        _bitset.discard(slabs.sets, order, i)
        _bitset.add(slabs.sets, _UNOWNED, i)
        slabs.owner[i] = -1


@jit
def _order_of(size: int) -> Any:
    order = 0
    while (1 << order) < size:
        order += 1
    return order


@jit
def _allocate_in_order(slabs: _Slabs, sizes: Int32Array, starts: Int32Array) -> Any:
    starts[:] = -1
    for i in range(len(sizes)):
        start = _take(slabs, _order_of(sizes[i]))
        if start < 0:
            return i
        starts[i] = start
    return len(sizes)


@jit
def _allocate_all(slabs: _Slabs, sizes: Int32Array, starts: Int32Array) -> Any:
    """Grant all sizes, largest first, or none."""
    starts[:] = -1
    granted = 0
    for order in range(3, -1, -1):
        for i in range(len(sizes)):
            if sizes[i] == 1 << order:
                start = _take(slabs, order)
                if start < 0:
                    _undo(slabs, sizes, starts)
                    return granted
                starts[i] = start
                granted += 1
    return granted


@jit
def _undo(slabs: _Slabs, sizes: Int32Array, starts: Int32Array) -> None:
    for i in range(len(sizes)):
        if starts[i] >= 0:
            _free_slot(slabs, starts[i] >> 6, starts[i] & 63, _order_of(sizes[i]))


@jit
def _free_all(slabs: _Slabs, num_granules: int, starts: Int32Array, sizes: Int32Array) -> Any:
    """Mark all runs as returned, undoing that at the first fault; then free the slots that are returned as a whole."""
    for i in range(len(starts)):
        if not _mark_returned(slabs, num_granules, starts[i], sizes[i]):
            for j in range(i):
                for granule in range(starts[j], starts[j] + sizes[j]):
                    slabs.returned[granule >> 6] &= ~(_ONE << np.uint64(granule & 63))
                slabs.totals[1] -= sizes[j]
            return i
    for i in range(len(starts)):
        granule, end = starts[i], starts[i] + sizes[i]
        while granule < end:
            slab = granule >> 6
            order = slabs.owner[slab]
            if order < 0:  # an earlier run of this call completed the slot, and with it the slab
                granule += 1
                continue
            slot = (granule & 63) >> order << order
            run = ((_ONE << np.uint64(1 << order)) - _ONE) << np.uint64(slot)
            if slabs.returned[slab] & run == run:
                slabs.returned[slab] &= ~run
                slabs.totals[1] -= 1 << order
                _free_slot(slabs, slab, slot, order)
            granule = (slab << 6) + slot + (1 << order)
    return -1


@jit
def _mark_returned(slabs: _Slabs, num_granules: int, start: int, size: int) -> Any:
    if size < 1 or start < 0 or start + size > num_granules:
        return False
    for granule in range(start, start + size):
        if (slabs.free[granule >> 6] | slabs.returned[granule >> 6]) >> np.uint64(granule & 63) & _ONE:
            return False
    for granule in range(start, start + size):
        slabs.returned[granule >> 6] |= _ONE << np.uint64(granule & 63)
    slabs.totals[1] += size
    return True
