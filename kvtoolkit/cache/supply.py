"""Blocks that the host takes ahead for steps that the device drives, in one group of layers."""

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state import growing
from kvtoolkit.cache.state.block_manager import Runs
from kvtoolkit.cache.state.block_table import CAPACITY
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.lent_blocks import LentBlocks
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT


def most_grants(max_steps: int) -> int:
    """Blocks that a row gets in so many steps at most: it asks every 8 tokens, and may get 8 blocks at once."""
    return max_steps // 8 + 9


class Supply:
    """Hot blocks for the next tokens of some rows: just those that they will want if none of them ends early.

    While kernels may take them, the blocks are lent by the ledger, as those of callers are. The caller of all methods
    holds the lock of the cache.

    Args:
        group: of layers.
        batch: rows, at most.
        max_steps: new tokens of a row, at most.

    Attributes:
        most: blocks of each size, at most.
        lent: the blocks.
        num_available: granules that were free or cached before they were taken; growth policies look at it.
    """

    def __init__(self, group: CacheGroup, batch: int, max_steps: int) -> None:
        self._group = group
        self.most = min(group.blocks.num_hot + group.config.host_granules[0], batch * most_grants(max_steps))
        blocks = group.blocks
        self.lent = LentBlocks(blocks, self.most)
        self.num_available = 0
        self._capacities: Int64Array = np.empty(0, np.int64)  # of the rows, once they have taken all this
        self._num_steps = 0

    def fill(self, rows: Int32Array, limits: Int32Array, steps: int, held: Int64Array | None = None) -> None:
        """Take the blocks that ``steps`` tokens more of each row will want, or as many as there are.

        It evicts what is cached where that is needed, and takes blocks in host memory where the device has none. Rows
        ask step by step, and in one step in their order.

        Args:
            rows: ``[batch]`` of the block table.
            limits: ``[batch]`` tokens at which a row ends.
            steps: tokens more of each row.
            held: ``[batch]`` granules that each row has for the device; default: those of the block table.
        """
        self._capacities = self._group.table.info[rows, CAPACITY] if held is None else held
        self._num_steps = 0
        self.extend(rows, limits, steps)

    def extend(self, rows: Int32Array, limits: Int32Array, steps: int) -> None:
        """`fill` for so many tokens after those of before."""
        blocks = self._group.blocks
        if len(blocks.reserve) < blocks.wanted_reserve:
            blocks.replenish()
        if len(blocks.ledger.left):
            blocks.ledger.free_left()
        policy, num_free, held = blocks.policy, blocks.num_known_free, int(self.lent.sizes.sum())
        if num_free < len(rows) * MAX_BLOCK_GRANULES * most_grants(steps):
            num_free = blocks.allocator.num_free  # kernels may have freed some since the host last looked
        left, room = num_free + 8 * len(blocks.reserve) + blocks.num_cached, self.most - len(self.lent.sizes)
        self.num_available = left + held
        first, self._num_steps = self._num_steps, self._num_steps + steps
        most = min(left + blocks.num_in_reach, room)
        sizes = np.empty(room + MAX_BLOCK_GRANULES, np.int32)  # those of the row that gets no more are there, too
        count, wanted = growing.choose_ahead(
            self._group.table.info, rows, limits, first, self._num_steps, left, most, blocks.num_hot,
            policy.rule, policy.tail, policy.largest, blocks.offered, self._capacities, sizes,
        )  # fmt: skip
        if wanted > num_free:
            _ = blocks.evict(wanted - num_free) or blocks.evict(blocks.num_evictable(TIER_HOT))
        sizes = sizes[:count]
        starts = blocks.allocate_some(sizes)
        has_got = starts >= 0
        pieces = self._take_pieces(int(wanted - sizes[has_got].sum()), len(rows), room - int(has_got.sum()))
        more = np.array(pieces, np.int32).reshape(-1, 2).T
        self.lent.lend(np.concatenate([starts[has_got], more[0]]), np.concatenate([sizes[has_got], more[1]]))

    def _take_pieces(self, missing: int, num_rows: int, most: int) -> Runs:
        """About so many granules in blocks of any sizes, the smallest first, so that many rows get some.

        Of larger ones it takes one for each row, because a row cannot take a part of one; ``most`` in all. The reserve
        for merging comes last.
        """
        blocks = self._group.blocks
        runs: Runs = []
        while missing > 0 and len(runs) < most:
            for size in blocks.offered[::-1].tolist():
                count = min(max(missing, 0), max(-(-missing // size), num_rows), most - len(runs))
                starts = blocks.allocate_some(np.full(count, size, np.int32))
                found = starts[starts >= 0].tolist()
                runs += [(start, size) for start in found]
                missing -= size * len(found)
            # what was evicted may be of no use, as granules of a slab for another size
            part = missing
            while part > 0 and not blocks.make_way(part):
                part //= 2
            if part <= 0:
                break
        if missing > 0 and blocks.num_in_reach:
            count = min(max(-(-missing // MAX_BLOCK_GRANULES), num_rows), most - len(runs))
            runs += blocks.take_in_host_memory(count)
        return runs

    def lists(self) -> tuple[Int32Array, Int32Array]:
        """``([4, most], [5])``: for each size the first granules, and how many there are; then `num_available`."""
        listed, counts = np.zeros((4, self.most), np.int32), np.zeros(5, np.int32)
        for code in range(4):
            starts = self.lent.starts[self.lent.sizes == 1 << code]
            listed[code, : len(starts)], counts[code] = starts, len(starts)
        counts[4] = self.num_available
        return listed, counts

    def tails(self, rows: Int32Array) -> NDArray[np.int32]:
        """``[batch, 4]`` int32: where each row ends, as ``GrowParams`` has it."""
        out = np.zeros((len(rows), 4), np.int32)
        growing.list_tails(self._group.table.info, rows, out)
        return out
