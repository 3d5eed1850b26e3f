"""Lock-free: words of 64 granules, claimed by compare-and-swap; the host form of the pool on a GPU.

A free bit *is* the state of its granule, so there is no list, no tag and no ABA problem. Two shared words decide what a
failure means:

    version    grows after every free and after every undone claim
    undoers    calls under way that may still give back what they took

A pass over all words that found nothing proves exhaustion if `version` did not change during the pass and no other call
was an undoer, because then nothing can have become free after the pass had looked at it. Otherwise the pass is
repeated, and after `MAX_PASSES` the answer is CONTENDED. A counter of free granules would not do: it reports false
exhaustion while a call is between subtracting and undoing.

Two layouts share the words: ``buddy`` (sizes mix freely) and ``slab`` (a word serves one size until all of it is free).
"""

import threading
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators._bits import (
    cas_acq_rel,
    count_trailing_zeros,
    fetch_add_acq_rel,
    fetch_or_release,
    load_acquire,
    load_relaxed,
    popcount,
    store_release,
)
from allocators._forks import lock_across_forks
from allocators._jit import jit
from allocators._slots import slots_of
from allocators.errors import ContendedError, InvalidSizeError
from allocators.protocol import GRANULE, AllocatorBase, Int32Array, require

OK, EXHAUSTED, CONTENDED = 0, 1, 2
MAX_PASSES = 4

_WORD = 64
_VERSION, _UNDOERS, _HINT, _CONTROL_WORDS = 0, 8, 16, 24  # a cache line (8 words) each
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_MINUS_ONE = _ALL
# bits at which a run of 2**order granules may start
_ALIGNED = np.array([0xFFFFFFFFFFFFFFFF, 0x5555555555555555, 0x1111111111111111, 0x0101010101010101], np.uint64)
_MAX_ATTEMPTS = 100_000


class _Pool(NamedTuple):
    free: NDArray[np.uint64]
    """Free bits: the words that allocations contend for."""
    owner: NDArray[np.uint64]
    """In the slab layout, the order of the blocks in the word plus one; meaningless while the whole word is free."""
    control: NDArray[np.uint64]
    """The version, the undoers, and the lowest word that may have a free bit (only a hint)."""
    valid: NDArray[np.uint64]
    returned: NDArray[np.uint64]
    """Granules freed while the rest of their slot is live; changed only under the lock of `free`."""


class LockFreeAllocator(AllocatorBase):
    """Claims blocks with atomics; threads wait for each other only when they compete for the last blocks.

    Args:
        num_granules: size of the pool, a multiple of 8.
        block_sizes: the sizes on offer, in tokens.
        layout: ``"buddy"``: freed granules are reusable at once, sizes mix. ``"slab"``: 512 tokens serve one size at a
            time, and a block freed in parts is held (``stats().pinned``) until all of it is free.

    Progress: `allocate` takes no lock. If the answer is undecided after `MAX_PASSES` passes, because other calls keep
    giving blocks back, the caller joins a queue in which one call at a time tries again while new ones wait. So
    exhaustion is exact. `free` checks the whole batch before it changes anything, and batches are freed one after
    another, as on one stream of a GPU. Do not call `snapshot`, `restore`, `stats` or `check_integrity` while other
    threads use the pool.

    Deterministic for a given call sequence from one thread. Metadata: 2 bits a granule and 16 bytes a word of 64.

    Source: claim by bitmap word instead of a stack, and exhaustion by an unchanged version, are this project's; random
    search over page bits, Pham et al. 2025 (ACM TOPC 12, 1), is the nearest published design.
    """

    kind = "lockfree"

    def __init__(self, num_granules: int, *, block_sizes: ArrayLike = (8, 16, 32, 64), layout: str = "buddy") -> None:
        super().__init__(num_granules, block_sizes=block_sizes)
        if layout not in ("buddy", "slab"):
            raise InvalidSizeError(f"layout: expected 'buddy' or 'slab', got {layout!r}")
        self.layout = layout
        self._slab = layout == "slab"
        num_words = -(-self.num_granules // _WORD)
        valid = np.full(num_words, _ALL, np.uint64)
        if self.num_granules % _WORD:
            valid[-1] = (_ONE << np.uint64(self.num_granules % _WORD)) - _ONE
        self._pool = _Pool(
            valid.copy(),
            np.zeros(num_words, np.uint64),
            np.zeros(_CONTROL_WORDS, np.uint64),
            valid,
            np.zeros(num_words, np.uint64),
        )
        self._queue = lock_across_forks(threading.RLock())
        self._queueing = False

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"layout": self.layout}

    def _state(self) -> dict[str, NDArray[Any]]:
        # the owner of a wholly free word is meaningless, so it must not be part of the state
        owner = self._pool.owner
        owner[self._pool.free == self._pool.valid] = 0
        return {"free": self._pool.free, "owner": owner, "returned": self._pool.returned}

    def _after_restore(self) -> None:
        self._pool.control[:] = 0

    def _rebuild(self, live: NDArray[np.bool_]) -> None:
        pool = self._pool
        orders = np.zeros(len(pool.free), np.int64)  # buddies: every granule is a slot
        offered = [(size // GRANULE).bit_length() - 1 for size in self.block_sizes]
        if self._slab:
            in_use = (pool.free != pool.valid) & (pool.owner > 0) & (pool.owner <= 4)
            orders = np.where(in_use, pool.owner.astype(np.int64) - 1, -1)
        pool.free[:], pool.returned[:], orders = slots_of(live, orders, offered)
        pool.owner[:] = orders + 1 if self._slab else 0
        pool.control[:] = 0

    def unit_sizes(self, granules: Int32Array) -> Int32Array:
        if not self._slab:
            return super().unit_sizes(granules)
        orders = np.clip(self._pool.owner[granules // _WORD].astype(np.int32) - 1, 0, 3)
        return np.left_shift(1, orders, dtype=np.int32)

    # `AllocatorBase.allocate` would take the lock; this one must not.
    def allocate(self, sizes: ArrayLike, *, partial: bool = False) -> Int32Array:
        wanted = self._wanted(sizes)
        starts = np.empty(len(wanted), np.int32)
        code = CONTENDED if self._queueing else _claim(self._pool, self._slab, wanted, starts, partial)
        if code == CONTENDED:
            code = self._claim_in_queue(wanted, starts, partial)
        if code == CONTENDED:
            raise ContendedError(f"asked for {len(wanted)} blocks, undecided after {_MAX_ATTEMPTS} attempts")
        if code == EXHAUSTED and not partial:
            raise self._out_of_blocks(wanted)
        return starts

    def _claim_in_queue(self, wanted: Int32Array, starts: Int32Array, partial: bool) -> int:
        """Try again, one caller at a time; meanwhile `allocate` sends all other callers here, too."""
        with self._queue:
            self._queueing = True
            try:
                for _ in range(_MAX_ATTEMPTS):
                    code = int(_claim(self._pool, self._slab, wanted, starts, partial))
                    if code != CONTENDED:
                        return code
                    time.sleep(0)  # let the calls under way finish
                return CONTENDED
            finally:
                self._queueing = False

    def _allocate(self, sizes: Int32Array, starts: Int32Array, partial: bool) -> int:
        raise NotImplementedError("allocate() claims without the lock")

    def _free(self, starts: Int32Array, sizes: Int32Array) -> int:
        return int(_free_all(self._pool, self._slab, self.num_granules, starts, sizes))

    def _is_live(self, granule: int) -> bool:
        i = granule // _WORD
        return not int(self._pool.free[i] | self._pool.returned[i]) >> (granule % _WORD) & 1

    def _num_free_unlocked(self) -> int:
        return int(np.bitwise_count(self._pool.free).sum())

    def _pinned_unlocked(self) -> int:
        return int(np.bitwise_count(self._pool.returned).sum())

    def _largest_free_unlocked(self) -> int:
        return max((size // GRANULE for size, count in self._free_blocks_unlocked().items() if count), default=0)

    def _free_blocks_unlocked(self) -> dict[int, int]:
        free = self._pool.free.copy()
        blocks = {}
        for order, size in enumerate((8, 16, 32, 64)):
            serves = (self._pool.owner == order + 1) | (free == self._pool.valid) if self._slab else True
            if size in self.block_sizes:
                blocks[size] = int(np.bitwise_count(np.where(serves, _fold_all(free, order), _ZERO)).sum())
        return blocks

    def _metadata_nbytes(self) -> int:
        return sum(array.nbytes for array in self._pool)

    def check_integrity(self) -> None:
        with self._lock:
            pool = self._pool
            require(pool.control[_UNDOERS] == 0, "lockfree: a call has not ended; this check wants a quiet pool")
            require(not np.any(pool.free & pool.returned), "lockfree: a granule is both free and returned")
            require(not np.any((pool.free | pool.returned) & ~pool.valid), "lockfree: a bit lies beyond the pool")
            if not self._slab:
                require(not np.any(pool.returned), "lockfree: a granule is held back in the buddy layout")
                return
            for i in np.flatnonzero((pool.free != pool.valid) & (pool.free != 0)):
                order, word = int(pool.owner[i]) - 1, int(pool.free[i])
                require(0 <= order < 4, f"lockfree: word {i} is in use and has no owner")
                run = (1 << (1 << order)) - 1
                slots = [word >> slot & run for slot in range(0, _WORD, 1 << order)]
                require(set(slots) <= {0, run}, f"lockfree: word {i} has a slot that is free in part")


def _fold_all(free: NDArray[np.uint64], order: int) -> NDArray[np.uint64]:
    """`_fold` for arrays."""
    for step in range(order):
        free = free & (free >> np.uint64(1 << step))
    folded: NDArray[np.uint64] = free & _ALIGNED[order]
    return folded


@jit
def _fold(word: Any, order: int) -> Any:
    """A bit for every aligned run of ``2**order`` set bits, at the start of the run."""
    for step in range(order):
        word &= word >> np.uint64(1 << step)
    return word & _ALIGNED[order]


@jit
def _best_run(word: Any, order: int) -> Any:
    """Start of the run of ``2**order`` free granules in the fullest superblock of the word that has one; -1 if none."""
    runs = _fold(word, order)
    best, best_count = -1, 9
    while runs != 0:
        bit = count_trailing_zeros(runs)
        superblock = bit & ~7
        count = popcount((word >> np.uint64(superblock)) & np.uint64(0xFF))
        if count < best_count:
            # within the superblock, prefer the run that breaks up the smallest larger run
            best, best_count = superblock + _tightest(word >> np.uint64(superblock), order), count
        if superblock == 56:
            break
        runs &= _ALL << np.uint64(superblock + 8)
    return best


@jit
def _tightest(byte: Any, order: int) -> Any:
    """Start of the run of ``2**order`` set bits in the low byte that is in the smallest free aligned run."""
    best, best_order = -1, 4
    for start in range(0, 8, 1 << order):
        if (_fold(byte, order) >> np.uint64(start)) & _ONE == 0:
            continue
        around = order
        while around < 3 and (_fold(byte, around + 1) >> np.uint64(start >> (around + 1) << (around + 1))) & _ONE != 0:
            around += 1
        if around < best_order:
            best, best_order = start, around
    return best


@jit
def _run_mask(start: int, order: int) -> Any:
    return ((_ONE << np.uint64(1 << order)) - _ONE) << np.uint64(start)


@jit
def _claim_in_word(pool: _Pool, w: int, order: int) -> Any:
    """Claim a run in word ``w``; -1 if it has none. Lock-free: it retries only if another thread made progress."""
    word = load_acquire(pool.free, w)
    while True:
        start = _best_run(word, order)
        if start < 0:
            return -1
        seen = cas_acq_rel(pool.free, w, word, word & ~_run_mask(start, order))
        if seen == word:
            return w * 64 + start
        word = seen


@jit
def _claim_in_slab(pool: _Pool, w: int, order: int) -> Any:
    """Claim a slot in word ``w`` if its slots are of this order; -1 if not, or if none is free."""
    tag = np.uint64(order + 1)
    while True:
        if load_acquire(pool.owner, w) != tag:
            return -1
        word = load_acquire(pool.free, w)
        if word == 0 or word == pool.valid[w]:
            return -1
        start = count_trailing_zeros(word)
        run = _run_mask(start, order)
        if cas_acq_rel(pool.free, w, word, word & ~run) != word:
            continue
        # Since its owner was read, the word may have been freed as a whole and claimed for another size. While a
        # granule is held the owner cannot change, so reading it again decides.
        if load_acquire(pool.owner, w) == tag:
            return w * 64 + start
        # under another size a part of this run may be live, so give back only the bits that were free
        fetch_or_release(pool.free, w, word & run)
        fetch_add_acq_rel(pool.control, _VERSION, _ONE)


@jit
def _claim_whole_slab(pool: _Pool, w: int, order: int) -> Any:
    """Make word ``w`` serve this order if all of it is free, and claim its first slot; -1 if it is not."""
    valid = pool.valid[w]
    if load_acquire(pool.free, w) != valid or cas_acq_rel(pool.free, w, valid, _ZERO) != valid:
        return -1
    store_release(pool.owner, w, np.uint64(order + 1))
    fetch_or_release(pool.free, w, valid & ~_run_mask(0, order))
    fetch_add_acq_rel(pool.control, _VERSION, _ONE)
    return w * 64


@jit
def _pass(pool: _Pool, slab: bool, order: int, first: int) -> Any:
    """Look through the words from ``first`` on; the first granule of what was claimed, or -1."""
    if not slab:
        for w in range(first, len(pool.free)):
            if load_relaxed(pool.free, w) != 0:
                start = _claim_in_word(pool, w, order)
                if start >= 0:
                    return start
        return -1
    for w in range(first, len(pool.free)):
        start = _claim_in_slab(pool, w, order)
        if start >= 0:
            return start
    for w in range(first, len(pool.free)):
        start = _claim_whole_slab(pool, w, order)
        if start >= 0:
            return start
    return -1


@jit
def _claim_one(pool: _Pool, slab: bool, order: int, own_undoers: Any) -> Any:
    """Claim one block; returns its first granule, or -EXHAUSTED (which is proven), or -CONTENDED."""
    hint = int(load_relaxed(pool.control, _HINT))
    start = _pass(pool, slab, order, hint)
    if start >= 0:
        _raise_hint(pool, hint, start >> 6)
        return start
    for _ in range(MAX_PASSES):
        version = load_acquire(pool.control, _VERSION)
        undoers = load_acquire(pool.control, _UNDOERS)
        start = _pass(pool, slab, order, 0)
        if start >= 0:
            return start
        quiet = undoers == own_undoers and load_acquire(pool.control, _UNDOERS) == own_undoers
        if quiet and load_acquire(pool.control, _VERSION) == version:
            return -EXHAUSTED
    return -CONTENDED


@jit
def _raise_hint(pool: _Pool, hint: int, claimed: int) -> None:
    """Move the hint past words without free bits, so that they are not searched again."""
    w = hint
    while w < claimed and load_relaxed(pool.free, w) == 0:
        w += 1
    if w != hint:
        store_release(pool.control, _HINT, np.uint64(w))


@jit
def _claim(pool: _Pool, slab: bool, sizes: Int32Array, starts: Int32Array, partial: bool) -> Any:
    """Claim a block for each size: if ``partial``, in order until one does not fit; else largest first, all or none."""
    starts[:] = -1
    # a slab claim may have to be undone, and so may any block of a batch but the last
    undoer = slab or len(sizes) > 1
    own = _ONE if undoer else _ZERO
    if undoer:
        fetch_add_acq_rel(pool.control, _UNDOERS, _ONE)
    code = OK
    if partial:
        for i in range(len(sizes)):
            start = _claim_one(pool, slab, _order_of(sizes[i]), own)
            if start < 0:
                code = -start
                break
            starts[i] = start
        if code == CONTENDED:
            _undo(pool, sizes, starts)
    else:
        for order in range(3, -1, -1):
            for i in range(len(sizes)):
                if code == OK and sizes[i] == 1 << order:
                    start = _claim_one(pool, slab, order, own)
                    if start < 0:
                        code = -start
                    else:
                        starts[i] = start
        if code != OK:
            _undo(pool, sizes, starts)
    if undoer:
        fetch_add_acq_rel(pool.control, _UNDOERS, _MINUS_ONE)
    return code


@jit
def _order_of(size: int) -> Any:
    order = 0
    while (1 << order) < size:
        order += 1
    return order


@jit
def _undo(pool: _Pool, sizes: Int32Array, starts: Int32Array) -> None:
    for i in range(len(sizes)):
        if starts[i] >= 0:
            _publish(pool, starts[i], _order_of(sizes[i]))
            starts[i] = -1
    fetch_add_acq_rel(pool.control, _VERSION, _ONE)


@jit
def _publish(pool: _Pool, start: int, order: int) -> None:
    """Free a whole block: set the bits first, then the hint. The caller changes the version after that."""
    w = start >> 6
    fetch_or_release(pool.free, w, _run_mask(start & 63, order))
    if load_relaxed(pool.control, _HINT) > np.uint64(w):
        store_release(pool.control, _HINT, np.uint64(w))


@jit
def _free_all(pool: _Pool, slab: bool, num_granules: int, starts: Int32Array, sizes: Int32Array) -> Any:
    """Mark all runs as returned, or undo that at the first fault; then free the slots that are returned as a whole.

    The caller holds the lock of `free`, so a granule that is live stays live: allocations only clear free bits.
    """
    for i in range(len(starts)):
        if not _mark_returned(pool, num_granules, starts[i], sizes[i]):
            for j in range(i):
                for granule in range(starts[j], starts[j] + sizes[j]):
                    pool.returned[granule >> 6] &= ~(_ONE << np.uint64(granule & 63))
            return i
    for i in range(len(starts)):
        granule, end = starts[i], starts[i] + sizes[i]
        while granule < end:
            w = granule >> 6
            order = int(pool.owner[w]) - 1 if slab else 0
            slot = (granule & 63) >> order << order
            run = _run_mask(slot, order)
            if pool.returned[w] & run == run:
                pool.returned[w] &= ~run
                _publish(pool, w * 64 + slot, order)
            granule = w * 64 + slot + (1 << order)
    fetch_add_acq_rel(pool.control, _VERSION, _ONE)
    return -1


@jit
def _mark_returned(pool: _Pool, num_granules: int, start: int, size: int) -> Any:
    if size < 1 or start < 0 or start + size > num_granules:
        return False
    for granule in range(start, start + size):
        taken = load_acquire(pool.free, granule >> 6) | pool.returned[granule >> 6]
        if (taken >> np.uint64(granule & 63)) & _ONE:
            return False
    for granule in range(start, start + size):
        pool.returned[granule >> 6] |= _ONE << np.uint64(granule & 63)
    return True
