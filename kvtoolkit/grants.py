"""What an allocator hands out is checked before anything is written there: a plug-in may be wrong, or change later."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from allocators import BlockAllocator
from allocators._jit import jit
from kvtoolkit.errors import ConfigError
from kvtoolkit.prefix import Granules, Int32Array

_FINE, _OUTSIDE, _MISALIGNED, _HELD, _TWICE, _AFTER_REFUSAL = range(6)
_TAKEN = -1
"""Value of ``granules.refs`` while `check_starts` looks for granules that are granted twice."""


def require_allocator(allocator: BlockAllocator, num_granules: int, block_sizes: tuple[int, ...]) -> None:
    """ConfigError unless an allocator that was just made is of this size, wholly free, and offers some of the sizes."""
    name = type(allocator).__name__
    figures = {"num_granules": allocator.num_granules, "num_free of a fresh one": allocator.num_free}
    for what, got in figures.items():
        if isinstance(got, bool) or not isinstance(got, int | np.integer) or got != num_granules:
            raise ConfigError(f"allocator: expected {name} to have {what} {num_granules}, got {got!r:.80}")
    sizes: Any = allocator.block_sizes
    if not isinstance(sizes, tuple | list) or not sizes or not set(sizes) <= set(block_sizes):
        expected = ", ".join(map(str, block_sizes))
        raise ConfigError(f"allocator: expected {name} to have block_sizes among {expected}, got {sizes!r:.80}")


def grant(allocator: BlockAllocator, sizes: ArrayLike, granules: Granules, tier: int) -> Int32Array:
    """Ask for blocks of a tier in the order of ``sizes``, -1 from the first that does not fit.

    Args:
        allocator: of the tier; its numbers begin at 0.
        sizes: ``[n]`` granules.
        granules: of the pool.
        tier: whose granules they are.

    Returns:
        ``[n]`` int32 first granules in the allocator's numbers, each of them free, aligned, inside the tier, and in no
        other block of the answer.

    Raises:
        ConfigError: the allocator's answer is none of that.
    """
    wanted = np.array(sizes, np.int32)
    answer = allocator.allocate(wanted.copy(), partial=True)  # a plug-in may sort what it is given
    if not (isinstance(answer, np.ndarray) and answer.dtype == np.int32 and answer.shape == wanted.shape):
        raise ConfigError(
            f"allocator: expected {type(allocator).__name__}.allocate to return [{len(wanted)}] int32 starts, "
            f"got {answer!r:.80}"
        )
    starts = np.array(answer)  # its own memory, whatever the plug-in keeps of it
    require_free(allocator, starts, wanted, granules, tier)
    return starts


def require_free(
    allocator: BlockAllocator, starts: Int32Array, sizes: Int32Array, granules: Granules, tier: int
) -> None:
    """ConfigError unless blocks that an allocator has granted are free for the cache, as `grant` promises."""
    code, i = check_starts(starts, sizes, granules, tier)
    if code == _FINE:
        return
    problem = {
        _OUTSIDE: "outside the pool",
        _MISALIGNED: f"no multiple of {sizes[i]}",
        _HELD: "held by the cache already",
        _TWICE: "granted twice in one call",
        _AFTER_REFUSAL: "granted after a size that did not fit",
    }[code]
    raise ConfigError(
        f"allocator: expected {type(allocator).__name__}.allocate to return free blocks, got {sizes[i]} granules at "
        f"{starts[i]}, {problem}; `kvtoolkit fuzz` tests an allocator"
    )


@jit
def check_starts(starts: Int32Array, sizes: Int32Array, granules: Granules, tier: int) -> Any:
    """``(_FINE, 0)``, or what is wrong with the first start at fault, and its place. Changes nothing."""
    refs, node = granules.refs, granules.node
    first = granules.first[tier]
    end = len(refs) if tier == 2 else granules.first[tier + 1]
    code, marked = _FINE, 0
    for i in range(len(starts)):
        start, size = starts[i], sizes[i]
        if start == -1:
            break
        if start < 0 or start > end - first - size:
            code = _OUTSIDE
        elif start & (size - 1) != 0:
            code = _MISALIGNED
        else:
            for granule in range(first + start, first + start + size):
                if refs[granule] == _TAKEN:
                    code = _TWICE
                elif refs[granule] != 0 or node[granule] >= 0:
                    code = _HELD
        if code != _FINE:
            break
        for granule in range(first + start, first + start + size):
            refs[granule] = _TAKEN
        marked = i + 1
    for i in range(marked):
        for granule in range(first + starts[i], first + starts[i] + sizes[i]):
            refs[granule] = 0
    if code == _FINE:
        for i in range(marked, len(starts)):
            if starts[i] != -1:
                return _AFTER_REFUSAL, i
    return code, marked if code != _FINE else 0
