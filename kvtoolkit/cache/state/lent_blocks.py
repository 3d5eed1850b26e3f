"""Blocks that the device may take until the host's next turn."""

import numpy as np

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state import growing
from kvtoolkit.cache.state.block_manager import BlockManager
from kvtoolkit.cache.state.growing import Loan


class LentBlocks:
    """A loan of blocks of any tiers, with the flags of the ledger that says so. The caller holds the cache's lock.

    Args:
        blocks: of the group.
        most: blocks that are lent at a time, at most.

    Attributes:
        flags: of the ledger: what it has granted to the cache, and what to callers, as these blocks are.
        loan: the blocks.
    """

    def __init__(self, blocks: BlockManager, most: int) -> None:
        self._blocks = blocks
        self.flags = blocks.ledger.granted, blocks.ledger.callers
        self.loan = Loan(np.empty(most, np.int32), np.empty(most, np.int32), np.zeros(1, np.int64))

    @property
    def starts(self) -> Int32Array:
        """``[n]`` first granules of the blocks."""
        return self.loan.starts[: self.loan.number[0]]

    @property
    def sizes(self) -> Int32Array:
        """``[n]`` granules of the blocks."""
        return self.loan.sizes[: self.loan.number[0]]

    def lend(self, starts: Int32Array, sizes: Int32Array) -> None:
        """Lend blocks that were just taken."""
        growing.lend(*self.flags, self.loan, starts, sizes)

    def release(self) -> None:
        """Free all blocks."""
        left = np.empty(int(self.sizes.sum()), np.int32)
        count = growing.take_back(*self.flags, self.loan, self._blocks.granules.refs, left)
        if count:
            self._blocks.free_granules(np.sort(left[:count]))
