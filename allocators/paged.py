"""Paged: one block size and a stack of free blocks, as in PagedAttention; the baseline for the other allocators.

    block i free <=> stacked[i] <=> live[i] == 0;    free == stack depth * granules a block

Source: fixed-size KV blocks, Kwon et al. 2023 (arXiv:2309.06180), sec. 4.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators._jit import jit
from allocators.errors import InvalidSizeError
from allocators.protocol import GRANULE, AllocatorBase, Int32Array, require


class _Pages(NamedTuple):
    stack: Int32Array
    """``[num_blocks]`` the first ``depth[0]`` are the free blocks, the last of them is granted next."""
    depth: NDArray[np.int64]
    """``[1]``"""
    live: NDArray[np.uint8]
    """``[num_blocks]`` bit g: granule g of the block is live."""
    stacked: NDArray[np.bool_]
    """``[num_blocks]`` whether the block is on the stack."""


class PagedAllocator(AllocatorBase):
    """Blocks of one size from a free stack, last freed first granted.

    Args:
        num_granules: size of the pool, a multiple of 8.
        block_sizes: the one size on offer, in tokens.

    A block freed in parts is held (``stats().pinned``) until all of it is free. Internal waste is up to a block a
    sequence. Thread-safe (one lock); deterministic for a given call sequence. Metadata: 6 bytes a block.
    """

    kind = "paged"

    def __init__(self, num_granules: int, *, block_sizes: ArrayLike = (16,)) -> None:
        super().__init__(num_granules, block_sizes=block_sizes)
        if len(self.block_sizes) != 1:
            raise InvalidSizeError(f"block_sizes: expected one size for a paged pool, got {self.block_sizes}")
        self._block = self.block_sizes[0] // GRANULE
        num_blocks = self.num_granules // self._block
        self._pages = _Pages(
            np.arange(num_blocks, dtype=np.int32)[::-1].copy(),
            np.array([num_blocks], np.int64),
            np.zeros(num_blocks, np.uint8),
            np.ones(num_blocks, np.bool_),
        )

    def _state(self) -> dict[str, NDArray[Any]]:
        return self._pages._asdict()

    def _rebuild(self, live: NDArray[np.bool_]) -> None:
        pages = self._pages
        bits = live.reshape(-1, self._block) << np.arange(self._block)
        pages.live[:] = bits.sum(axis=1)
        pages.stacked[:] = pages.live == 0
        free = np.flatnonzero(pages.stacked)[::-1]  # the lowest is granted first, as in a fresh pool
        pages.stack[: len(free)] = free
        pages.depth[0] = len(free)

    def unit_sizes(self, granules: Int32Array) -> Int32Array:
        return np.full(len(granules), self._block, np.int32)

    def _allocate(self, sizes: Int32Array, starts: Int32Array, partial: bool) -> int:
        return int(_pop(self._pages, self._block, starts, partial))

    def _free(self, starts: Int32Array, sizes: Int32Array) -> int:
        return int(_push(self._pages, self._block, starts, sizes))

    def _is_live(self, granule: int) -> bool:
        return bool(self._pages.live[granule // self._block] >> (granule % self._block) & 1)

    def _num_free_unlocked(self) -> int:
        return int(self._pages.depth[0]) * self._block

    def _largest_free_unlocked(self) -> int:
        return self._block if self._pages.depth[0] else 0

    def _pinned_unlocked(self) -> int:
        return self.num_granules - self._num_free_unlocked() - int(np.bitwise_count(self._pages.live).sum())

    def _free_blocks_unlocked(self) -> dict[int, int]:
        return {self.block_sizes[0]: int(self._pages.depth[0])}

    def check_integrity(self) -> None:
        with self._lock:
            pages = self._pages
            on_stack = np.sort(pages.stack[: pages.depth[0]])
            require(np.array_equal(on_stack, np.flatnonzero(pages.stacked)), "paged: stack and `stacked` disagree")
            require(not np.any(pages.live[pages.stacked]), "paged: a block on the stack has a live granule")
            require(np.all(pages.live[~pages.stacked]), "paged: a block without live granules is not on the stack")
            require(not np.any(pages.live >> self._block), "paged: a live bit lies beyond its block")


@jit
def _pop(pages: _Pages, block: int, starts: Int32Array, partial: bool) -> Any:
    starts[:] = -1
    granted = min(len(starts), pages.depth[0])
    if granted < len(starts) and not partial:
        return granted
    for i in range(granted):
        pages.depth[0] -= 1
        taken = pages.stack[pages.depth[0]]
        pages.stacked[taken] = False
        pages.live[taken] = (1 << block) - 1
        starts[i] = taken * block
    return granted


@jit
def _push(pages: _Pages, block: int, starts: Int32Array, sizes: Int32Array) -> Any:
    """Clear the live bits of all runs, undoing that at the first fault; then stack the blocks that have none left."""
    for i in range(len(starts)):
        if not _clear_live(pages.live, block, starts[i], sizes[i]):
            for j in range(i):
                for granule in range(starts[j], starts[j] + sizes[j]):
                    pages.live[granule // block] |= 1 << (granule % block)
            return i
    for i in range(len(starts)):
        for page in range(starts[i] // block, (starts[i] + sizes[i] - 1) // block + 1):
            if pages.live[page] == 0 and not pages.stacked[page]:
                pages.stacked[page] = True
                pages.stack[pages.depth[0]] = page
                pages.depth[0] += 1
    return -1


@jit
def _clear_live(live: NDArray[np.uint8], block: int, start: int, size: int) -> Any:
    if size < 1 or start < 0 or start + size > len(live) * block:
        return False
    end = start + size
    for granule in range(start, end):
        if not (live[granule // block] >> (granule % block)) & 1:
            return False
    for granule in range(start, end):
        live[granule // block] &= ~(1 << (granule % block)) & 0xFF
    return True
