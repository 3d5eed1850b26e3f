"""Grants blocks to the rows of a step that need them: of the sizes of the growth policy, or any if memory is short."""

import numpy as np

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state import step_passes
from kvtoolkit.cache.state.block_manager import Runs
from kvtoolkit.cache.state.block_table import CAPACITY, LENGTH
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.step_passes import OK, OUT_OF_BLOCKS, ROW_FULL, StepArrays
from kvtoolkit.formats.entry import TIER_HOT

_NOTHING_REFUSED = 1 << 30


class BlockGranter:
    """Grants blocks to the rows of steps."""

    def __init__(self, group: CacheGroup) -> None:
        config = group.config
        self._group = group
        # scratch, for a block per granule and another one per row
        self._sizes = np.empty(config.num_granules + config.max_seqs + 8, np.int32)
        self._ends = np.empty(config.max_seqs, np.int32)
        self._least_refused = _NOTHING_REFUSED  # fewest granules that this step could not get for a row
        self._frees_singly = group.blocks.ledger.frees_singly(TIER_HOT)

    def merge_tails(self, arrays: StepArrays, num_merge: int) -> None:
        """Merge the last 64 tokens of the rows in ``arrays.work[1]``, whose last tile has just become full."""
        budget = self._group.config.migrate_budget
        candidates = arrays.rows[arrays.work[1, : min(num_merge, budget)]]
        ends = (self._group.table.info[candidates, LENGTH] >> 3).astype(np.int32)
        self._group.merge_blocks(candidates, ends)

    def grow(self, arrays: StepArrays, num_need: int) -> int:
        """Grant blocks to the rows in ``arrays.work[0]``, in order, and complete them; returns the widest of them.

        If a row gets none, its status says why.
        """
        group, blocks, policy = self._group, self._group.blocks, self._group.blocks.policy
        if len(blocks.reserve) < blocks.wanted_reserve:
            blocks.replenish()
        if len(blocks.ledger.left):
            blocks.ledger.free_left()
        num_free = blocks.num_known_free
        available = num_free + 8 * len(blocks.reserve) + blocks.num_cached
        num_blocks, wanted, num_too_large = step_passes.choose_sizes(
            group.table,
            arrays,
            num_need,
            available,
            # evicting may free more than what is cached, or less; `BlockManager.fit` finds out
            (available if self._frees_singly else blocks.num_hot) + blocks.num_in_reach,
            blocks.num_hot,
            policy.rule,
            policy.tail,
            policy.largest,
            blocks.offered,
            self._sizes,
            self._ends,
        )
        # kernels may have freed some since the host last looked
        if wanted > num_free and wanted > (num_free := blocks.allocator.num_free):
            blocks.evict(wanted - num_free)
        sizes = self._sizes[:num_blocks]
        starts = blocks.allocate_some(sizes)
        first, num_refused, width = step_passes.attach_all(
            group.table, blocks.granules, arrays, num_need, starts, sizes, self._ends, blocks.freed
        )
        blocks.free_listed(num_refused)
        if first < num_need or num_refused:
            self._grow_hard(arrays, first, num_need, starts)
            width = step_passes.complete(group.table, arrays, num_need)
        if first < num_need or num_refused or num_too_large:
            group.counters.num_stalls += int(np.count_nonzero(arrays.status[arrays.work[0, :num_need]]))
        group.update_peak()
        return int(width)

    def _grow_hard(self, arrays: StepArrays, first: int, num_need: int, starts: Int32Array) -> None:
        """Grant blocks row by row, because memory is short or in small pieces, or rows have few entries left."""
        self._least_refused = _NOTHING_REFUSED
        for i in range(num_need):
            b = int(arrays.work[0, i])
            if arrays.status[b] == ROW_FULL:
                arrays.status[b] = OK
                self._grow_row(arrays, b, [])
            elif arrays.status[b] == OK and i >= first:
                place = slice(int(self._ends[i - 1]) if i else 0, int(self._ends[i]))
                granted = zip(starts[place].tolist(), self._sizes[place].tolist(), strict=True)
                self._grow_row(arrays, b, [(start, size) for start, size in granted if start >= 0])

    def _grow_row(self, arrays: StepArrays, b: int, runs: Runs) -> None:
        """Grant one row blocks of any sizes, besides the ``runs`` that it has; if that fails, set its status."""
        group, blocks, row = self._group, self._group.blocks, int(arrays.rows[b])
        info = group.table.info[row]
        needed = int(-(-(info[LENGTH] + arrays.counts[b]) // 8) - info[CAPACITY])
        # after a refusal there is only less memory, so do not look for as much again
        more = None
        if needed < self._least_refused:
            more = blocks.fit(needed - sum(size for _, size in runs))
        if more is not None and group.attach(row, runs + more):
            return
        if runs:  # they will be free for later rows
            self._least_refused = _NOTHING_REFUSED
        if more is None:
            self._least_refused = min(needed, self._least_refused)
        arrays.status[b] = OUT_OF_BLOCKS if more is None else ROW_FULL
        blocks.free_runs(runs + (more or []))
