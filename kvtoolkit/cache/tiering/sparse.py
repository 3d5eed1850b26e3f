"""Sparse reads: decode steps that leave out what is in host memory and receives little attention. Approximate.

Every 16th step reads everything, and notes which share of the attention each tile (64 tokens) received. A predictor
makes scores of that. Of what a row has in host memory then, the steps until the next such one read the tiles with the
highest scores, as many as the budget has room for; they leave out the others, of which the last full step knows the
share. What is on the device is always read, and so is what came to host memory since.

All layers and heads of a row share one choice. So the score of a tile is that of the head that needs it most: the mean
would outvote the few heads that look facts up (``docs/results/prediction.md``).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import GENERATION, LENGTH, NUM_ENTRIES
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.step_passes import OK, StepArrays
from kvtoolkit.cache.tiering.rules import DEVICE_PERIOD, MOST_QUERIES
from kvtoolkit.config.prediction import TileStep, choose, new_state, predict, predictor
from kvtoolkit.config.tiers import HOST_POOL_OF, TierConfig
from kvtoolkit.formats.entry import TIER_HOT, entry_granule, entry_length


class ShortTables(NamedTuple):
    """The tables of a step without what it leaves out: every row is a shorter sequence to kernels."""

    block_table: Int32Array
    block_starts: Int32Array
    seq_lens: Int32Array


class SparseReads:
    """What decode steps leave out. The caller holds the cache's lock.

    Args:
        group: of layers.
        config: of the tiers, with ``sparse``.

    Attributes:
        skipped_mass: mean share of the attention, over the rows of the last full step, that went to tiles which the
            steps before it had left out. None before there was such a step.
    """

    def __init__(self, group: CacheGroup, config: TierConfig) -> None:
        assert config.sparse is not None
        assert config.prefetch is not None
        self._group, self._budget = group, config.sparse // 64
        self._bounds = config.pinned_tokens // 64, config.hot
        self._first = group.blocks.first[HOST_POOL_OF[TIER_HOT]]
        self._predictor = predictor(config.prefetch)
        num_rows, num_tiles = group.config.max_seqs, -(-group.config.seq_len_limit // 64)
        self._left_out = np.zeros((num_rows, num_tiles), np.bool_)
        self._states = new_state(self._predictor, (num_rows,), num_tiles)
        group.scores = np.full((num_rows, num_tiles), np.nan, np.float32)
        self._known: Int64Array = np.zeros((num_rows, 3), np.int64)  # generation, length, full steps of each row
        self.skipped_mass: float | None = None

    def is_full(self, step_number: int, counts: Int32Array) -> bool:
        """Whether a step reads everything."""
        return step_number % DEVICE_PERIOD == 0 or self.is_prompt(counts)

    @staticmethod
    def is_prompt(counts: Int32Array) -> bool:
        """Whether a step has more new tokens in a row than decoding has; it reads everything, and says nothing new."""
        return int(counts.max(initial=0)) > MOST_QUERIES

    def shorten(self, arrays: StepArrays, batch: int, width: int) -> ShortTables:
        """The tables of a step without what its rows leave out."""
        table, starts, lens = (one[:batch].copy() for one in (arrays.table, arrays.starts, arrays.seq_lens))
        rows = arrays.rows[:batch]
        self._forget_others(rows)
        _shorten(table, starts, lens, arrays.counts, rows, self._left_out, self._first)
        return ShortTables(table[:, :width], starts[:, :width], lens)

    def observe(self, arrays: StepArrays, batch: int, masses: NDArray[np.float64], peaks: NDArray[np.float64]) -> None:
        """Choose what the next steps leave out.

        Args:
            masses: ``[batch, num_tiles]`` of the step, the mean over layers and kv heads; ``peaks``: the greatest of
                them.

        Raises:
            ConfigError: the predictor fails; then nothing has changed.
        """
        rows = arrays.rows[:batch][(arrays.status[:batch] == OK) & (arrays.counts[:batch] > 0)]
        at = np.flatnonzero((arrays.status[:batch] == OK) & (arrays.counts[:batch] > 0))
        self._forget_others(rows)
        chosen = [self._choose(int(row), peaks[b]) for row, b in zip(rows, at, strict=True)]
        scores = self._group.scores
        skipped = [masses[b][self._left_out[row, : masses.shape[1]]].sum() for row, b in zip(rows, at, strict=True)]
        for row, (left_out, state, score) in zip(rows.tolist(), chosen, strict=True):
            scores[row] = np.nan
            scores[row, self._bounds[0] : self._bounds[0] + len(score)] = score
            self._left_out[row] = False
            self._left_out[row, : len(left_out)] = left_out
            self._states[:, row, : state.shape[1]] = state
            self._known[row, 2] += 1
        if skipped:
            self.skipped_mass = float(np.mean(skipped))

    def _choose(
        self, row: int, peaks: NDArray[np.float64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
        """Which tiles a row leaves out from now on, what is known of its tiles, and the scores of those not pinned."""
        length = int(self._group.table.info[row, LENGTH])
        first, end = self._bounds[0], max(0, length - self._bounds[1]) // 64
        left_out, state = np.zeros(max(end, 0), np.bool_), self._states[:, row, : max(end, 0)].copy()
        if end <= first:
            return left_out, state, np.empty(0, np.float32)
        shown = state[:, first:end].copy()
        mass = np.nan_to_num(peaks[first:end]).astype(np.float32)
        scores = predict(self._predictor, shown, TileStep(int(self._known[row, 2]), mass))
        state[:, first:end] = shown
        is_away = _tiles_away(self._group, row, self._first)[first:end]
        kept = choose(np.where(is_away, scores, -np.inf).astype(np.float32), min(self._budget, end - first))
        left_out[first:end] = np.logical_and(is_away, ~kept)
        return left_out, state, scores

    def _forget_others(self, rows: Int32Array) -> None:
        """Forget what is known of the sequences that had these rows before, or that were longer."""
        info = self._group.table.info
        is_other = (self._known[rows, 0] != info[rows, GENERATION]) | (self._known[rows, 1] > info[rows, LENGTH])
        others = rows[is_other]
        self._left_out[others] = False
        self._group.scores[others] = np.nan
        self._states[:, others] = np.nan
        self._known[others, 2] = 0
        self._known[rows, 0], self._known[rows, 1] = info[rows, GENERATION], info[rows, LENGTH]


def _tiles_away(group: CacheGroup, row: int, first: int) -> NDArray[np.bool_]:
    """``[num_tiles]`` whether a tile of a row is in host memory, all of it."""
    table = group.table
    count = int(table.info[row, NUM_ENTRIES])
    entries, starts = table.entries[row, :count], table.starts[row, :count]
    lengths = (entries >> 24 & 7) + 1
    is_hot = entries >> 27 == TIER_HOT
    is_away: NDArray[np.bool_] = np.repeat((entries & 0xFFFFFF >= first) & is_hot, lengths)
    num_granules = int(starts[-1] + lengths[-1]) if count else 0
    found = np.zeros(-(-num_granules // 8) * 8, np.bool_)
    found[:num_granules] = is_away
    tiles: NDArray[np.bool_] = found.reshape(-1, 8).min(axis=1)
    return tiles


@jit
def _shorten(
    table: Int32Array, starts: Int32Array, seq_lens: Int32Array, counts: Int32Array, rows: Int32Array,
    left_out: NDArray[np.bool_], first: int,
) -> Any:  # fmt: skip
    """Take entries out of rows that have nothing but full tiles in host memory that the row leaves out."""
    for b in range(len(rows)):
        row, kept, gone = rows[b], 0, 0
        for e in range(table.shape[1]):
            entry = table[b, e]
            if entry < 0:
                break
            begin, length = starts[b, e], entry_length(entry)
            is_out = entry_granule(entry) >= first and 8 * (begin + length) <= seq_lens[b] - counts[b]
            for granule in range(begin, begin + length):
                is_out = is_out and left_out[row, granule >> 3]
            if is_out:
                gone += length
            else:
                table[b, kept], starts[b, kept] = entry, begin - gone
                kept += 1
        for e in range(kept, table.shape[1]):
            if table[b, e] < 0:
                break
            table[b, e] = starts[b, e] = -1
        seq_lens[b] -= 8 * gone
