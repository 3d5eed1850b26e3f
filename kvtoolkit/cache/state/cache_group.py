"""The memory of one kind of layers, with the moves on it that several operations need."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state import block_merging, block_table
from kvtoolkit.cache.state.block_manager import BlockManager, Counters, Runs
from kvtoolkit.cache.state.host_copies import HostCopies
from kvtoolkit.cache.state.shared_reads import make_shared_reads
from kvtoolkit.cache.storage.storage import make_storage
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.config.groups import LayerGroup

NOT_ASLEEP = -1.0


class CacheGroup:
    """Storage, blocks and block table of layers that keep the same tokens.

    By default a cache has one group, because all its layers keep all tokens of a sequence. Otherwise sequences have the
    same row in all groups; ids, states and lengths are those of the first group, which the others follow.

    Args:
        config: of a cache that has only these layers.
        layers: their numbers in the model.
        counters: what happens here is counted there.
        has_storage: whether there are keys and values.

    Attributes:
        layers: see above, and the window.
        storage: keys and values, all tiers.
        blocks: the allocators of all tiers, the growth policy, and what is known of each granule.
        table: a row for each sequence.
        copies: what is kept in host memory for preempted sequences.
        shared_reads: finds what the rows of a step have in common; None if that is never used, as with a window or
            chunks, whose rows let go of their beginnings.
        compacted: ``[2]`` int64 row and logical granule at which compaction goes on.
        asleep: ``[max_seqs]`` when each row fell asleep, by the clock of the index, or `NOT_ASLEEP`; see
            `KVCache.offload`.
        scores: ``[max_seqs, num_tiles]`` what a predictor expects of each tile, NaN where it knows nothing; ``[0, 0]``
            where there is none.
        forgets: called after a call broke off, before anything is put in order: what was planned is not done.
    """

    def __init__(
        self, config: CacheConfig, layers: LayerGroup, counters: Counters, *, has_storage: bool = True
    ) -> None:
        self.config = config
        self.layers = layers
        self.counters = counters
        self.storage = make_storage(config, is_empty=not has_storage)
        self.blocks = BlockManager(config, counters, self.storage.device if self.storage.device >= 0 else None)
        self.collects_mass = config.quantization is not None and config.quantization.demote == "mass"
        """Whether the masses of tiles are noted in `table`."""
        num_tiles = -(-config.seq_len_limit // 64) if self.collects_mass else 0
        self.table = block_table.make_block_table(config.max_seqs, config.entries_limit, num_tiles)
        self.shared_reads = None if layers.span else make_shared_reads(config, self.table)
        self.copies = HostCopies(self.storage, self.blocks.granules)
        self.compacted = np.zeros(2, np.int64)
        self.asleep = np.full(config.max_seqs, NOT_ASLEEP)
        self.scores = np.empty((0, 0), np.float32)
        self.forgets: list[Callable[[], None]] = []

    def attach(self, row: int, runs: Runs) -> bool:
        """Append freshly allocated runs to a row; False, and nothing done, if it has too few entries."""
        starts = np.array([start for start, _ in runs], np.int32)
        sizes = np.array([size for _, size in runs], np.int32)
        return bool(block_table.attach(self.table, self.blocks.granules, row, starts, sizes))

    def copy_granules(self, sources: ArrayLike, targets: ArrayLike, num_tokens: int) -> None:
        """Copy granules, all layers, and count the tokens in them."""
        self.storage.copy_granules(sources, targets)
        self.counters.copied_tokens += num_tokens

    def convert_tiles(self, sources: Int32Array, targets: Int32Array, num_tokens: int) -> None:
        """Write tiles to another tier, all layers, and count the tokens in them."""
        self.storage.convert_tiles(sources, targets)
        self.counters.converted_tokens += num_tokens

    def merge_blocks(self, candidates: Int32Array, ends: Int32Array) -> int:
        """Copy 8 granules in small blocks into one block of 64 tokens, for as many candidates as there is room.

        Args:
            candidates: rows.
            ends: for each of them the logical granule at which the 8 end; `block_merging.mergeable` has found them.

        Returns:
            How many were merged.
        """
        table, blocks = self.table, self.blocks
        private = int(block_merging.keep_private_merges(table, candidates, ends, blocks.granules))
        if not private:
            return 0
        targets = blocks.take_targets(private)
        if len(targets):
            sources = np.empty(8 * len(targets), np.int32)
            block_merging.list_windows(table, candidates, ends, len(targets), sources)
            offsets = np.arange(8, dtype=np.int32)
            self.copy_granules(sources, (targets[:, None] + offsets).ravel(), 64 * len(targets))
            block_merging.merge_blocks_all(table, candidates, ends, targets, blocks.nodes, blocks.granules)
            blocks.free_granules(sources)
        self.counters.num_merges += len(targets)
        self.counters.num_failed_merges += private - len(targets)
        return len(targets)

    def update_peak(self) -> None:
        """Raise the peak if more granules are held than ever before."""
        self.counters.peak_granules = max(self.counters.peak_granules, self.blocks.num_used)
