"""The compiled moves that bring back a row which was preempted to the host."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    CHAIN_UID,
    NUM_ENTRIES,
    OPEN,
    STATE,
    BlockTable,
    _append_run,
    touch,
)
from kvtoolkit.cache.state.prefix_index import (
    BROKEN,
    EXTRA,
    HELD,
    NEXT,
    ROOT,
    GranuleState,
    Holdings,
    Nodes,
    add_twin,
    find_node,
    incref,
    note_let_go,
    pool_of,
    publish,
    tier_of,
)


@jit
def find_tokens(
    nodes: Nodes, granules: GranuleState, root_uid: int, tokens: Int64Array, tiers: NDArray[np.int8], found: Int32Array
) -> None:
    """Fill the gaps in ``found`` with hot granules that the index has for ``tokens``.

    ``tokens`` has the words of `Nodes.tokens` for each granule, from the beginning. A granule that was quantized is not
    replaced by a hot one.
    """
    uid = root_uid
    for i in range(len(tokens)):
        node = find_node(nodes, uid, tokens[i, EXTRA], tokens[i], 0)
        if node < 0:
            return
        granule = nodes.granule[node]
        if found[i] < 0 and tiers[i] == 0 and tier_of(granules, granule) == 0:
            found[i] = granule
        uid = nodes.uid[node]


@jit
def incref_listed(granules: GranuleState, listed: Int32Array) -> None:
    """Count one more holder of each granule, so that nothing evicts them."""
    for granule in listed:
        incref(granules, granule)


@jit
def decref_listed(granules: GranuleState, listed: Int32Array, freed: Int32Array) -> Any:
    """Undo `incref_listed`; returns the number of ``freed`` granules, which nobody needs any more."""
    num_freed = 0
    for granule in listed:
        granules.refs[granule] -= 1
        if granules.refs[granule] == 0:
            granules.cached[HELD + pool_of(granules, granule)] -= 1
            note_let_go(granules, granule)
            if granules.node[granule] >= 0:
                granules.cached[pool_of(granules, granule)] += 1
            else:  # unpublished meanwhile, together with what it followed
                freed[num_freed] = granule
                num_freed += 1
    return num_freed


@jit
def bring_back(
    table: BlockTable,
    row: int,
    first: int,
    listed: Int32Array,
    is_fresh: NDArray[np.bool_],
    numbers: Int64Array,
    root_uid: int,
    tokens: Int64Array,
    holdings: Holdings,
) -> Any:
    """Open an empty row that holds the granules ``listed``.

    Args:
        first: the logical granule at which it begins.
        listed: the granules, in order. Those that are not fresh are counted for the row already.
        is_fresh: ``[n]`` which of them were just allocated and filled.
        numbers: ``[n]`` number of the copy that each fresh one was filled from, or 0 if it is not full.
        root_uid: uid of the root in the index.
        tokens: ``[n, 9]`` what `Nodes.tokens` has for each full granule, to make them findable; or empty.

    Returns:
        The number of ``freed`` granules; -1, with nothing changed, if the row has too few entries.
    """
    granules = holdings.granules
    needed, previous = 0, -2
    for granule in listed:
        if granule != previous + 1 or granule & 7 == 0:
            needed += 1
        previous = granule
    if needed > table.entries.shape[1]:
        return -1
    count = 0
    for i in range(len(listed)):
        granule = listed[i]
        if is_fresh[i]:
            granules.refs[granule] = 1
            granules.cached[HELD + pool_of(granules, granule)] += 1
            granules.copy[granule] = numbers[i]
        count = _append_run(table, row, count, first + i, granule, 1, tier_of(granules, granule))
    table.info[row, NUM_ENTRIES], table.info[row, CAPACITY] = count, first + len(listed)
    table.info[row, STATE] = OPEN
    table.scanned[row] = -1
    touch(table, row)
    if len(tokens) == 0:
        return 0
    return _publish_all(table, row, listed, root_uid, tokens, holdings)


@jit
def _publish_all(
    table: BlockTable,
    row: int,
    listed: Int32Array,
    root_uid: int,
    tokens: Int64Array,
    holdings: Holdings,
) -> Any:
    """Publish the full granules of a row, or make them twins of published ones; returns the number of ``freed``.

    This is what the end of a step does for one granule; see `add_twin`.
    """
    nodes, granules = holdings.nodes, holdings.granules
    node, uid, num_freed = ROOT, root_uid, 0
    for i in range(len(tokens)):
        parent, granule = node, listed[i]
        is_known = granules.node[granule] >= 0 or granules.links[granule, NEXT] != granule
        node = find_node(nodes, uid, tokens[i, EXTRA], tokens[i], 0)
        if node < 0:
            if is_known:  # published under other tokens, so nothing is known of what follows
                table.chain[row] = BROKEN
                return num_freed
            node = publish(nodes, granules, parent, uid, tokens[i, EXTRA], i, tokens[i], granule)
        elif not is_known and tier_of(granules, granule) == 0:
            num_freed = add_twin(holdings, node, granule, num_freed)
        uid = nodes.uid[node]
    table.chain[row], table.origin[row, CHAIN_UID] = node, uid
    return num_freed
