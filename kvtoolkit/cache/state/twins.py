"""Find all twins again, after the index was rebuilt; see `prefix_index`."""

from typing import Any

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state.block_table import CAPACITY, CHAIN_UID, BlockTable, first_held, granule_at
from kvtoolkit.cache.state.prefix_index import NEXT, Holdings, add_twin, tier_of


@jit
def find_twins(table: BlockTable, which: Int32Array, holdings: Holdings) -> Any:
    """Find the granules of rows whose tokens another granule has published; returns the number of ``freed``."""
    nodes, granules = holdings.nodes, holdings.granules
    num_freed = 0
    for row in which:
        node, uid = table.chain[row], table.origin[row, CHAIN_UID]
        if node < 0 or nodes.uid[node] != uid or nodes.depth[node] >= table.info[row, CAPACITY]:
            continue
        while node >= 0 and nodes.depth[node] >= first_held(table, row):
            granule = granule_at(table, row, nodes.depth[node])
            is_alone = granules.node[granule] < 0 and granules.links[granule, NEXT] == granule
            if is_alone and tier_of(granules, granule) == 0:
                num_freed = add_twin(holdings, node, granule, num_freed)
            node = nodes.parent[node]
    return num_freed
