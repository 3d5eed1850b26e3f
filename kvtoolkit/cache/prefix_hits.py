"""Prefix hits: let a new row hold the longest beginning of its tokens that is cached, in all groups of layers."""

from typing import NamedTuple

import numpy as np

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state import block_table, prefix_windows
from kvtoolkit.cache.state.cache_state import CacheState
from kvtoolkit.cache.state.prefix_index import reusable_length
from kvtoolkit.cache.state.step_passes import first_seen
from kvtoolkit.formats.entry import TIER_HOT


class Hit(NamedTuple):
    """A prefix that a row may hold.

    Attributes:
        length: granules of the prefix.
        found: for each group the node of each granule; only those from ``first`` on are valid.
        first: for each group the first granule that the row will hold.
    """

    length: int
    found: list[Int32Array]
    first: list[int]

    def num_taken(self, state: CacheState, index: int) -> int:
        """Hot granules of a group that are cached now, and will be held."""
        blocks, first = state.groups[index].blocks, self.first[index]
        held = blocks.nodes.granule[self.found[index][first : self.length]]
        return int(np.count_nonzero((blocks.granules.refs[held] == 0) & (blocks.tiers_of(held) == TIER_HOT)))


def longest(state: CacheState, found: Int32Array, count: int) -> Hit:
    """The longest prefix that every group of layers can give, of the first ``count`` nodes ``found`` in the index."""
    lead = state.group.blocks
    count = int(block_table.fitting(lead.nodes, found, 0, count, state.group.table.entries.shape[1]))
    everywhere = [found]
    for group in state.others:
        own = np.empty(count, np.int32)
        prefix_windows.find_own(lead.nodes, found, count, group.blocks.nodes, group.blocks.granules, own)
        everywhere.append(own)
    shortest = -1
    while shortest != count:  # a shorter prefix has its window elsewhere, which another group may lack
        shortest = count
        count = int(reusable_length(lead.nodes, lead.granules, found, count, state.takes_quantized))
        for group, own in zip(state.others, everywhere[1:], strict=True):
            most = group.table.entries.shape[1]
            count = int(prefix_windows.usable_length(group.blocks.nodes, own, count, group.layers.span, most))
    first = [0, *(int(first_seen(8 * count, group.layers.span)) for group in state.others)]
    return Hit(count, everywhere, first)


def attach(state: CacheState, row: int, hit: Hit) -> None:
    """Let an empty row hold a prefix, in the first group last."""
    for group, found, first in zip(state.others, hit.found[1:], hit.first[1:], strict=True):
        nodes, granules = group.blocks.nodes, group.blocks.granules
        block_table.hold_found(group.table, row, found, first, hit.length, nodes, granules)
    nodes, granules = state.group.blocks.nodes, state.group.blocks.granules
    block_table.attach_prefix(state.group.table, row, hit.found[0], hit.length, nodes, granules)
