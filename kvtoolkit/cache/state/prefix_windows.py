"""The prefix index of caches with several groups of layers, or with a window.

The trie of the first group names prefixes; that group keeps all tokens, if one does. Layers with a window need only the
last tokens of a prefix, and the granules before them may be gone. So in the index of every other group each node is a
root of its own. It has the key of the trie's node for the same 8 tokens: the uid of that node's parent, the tokens, and
the number of their extra keys. By this key it is found, whatever else is there.

    every node of another group has the key of a node in the trie, or of one lost since the last `forget_lost`

A prefix can be used up to a granule if the first group has all granules before it, and every other group those that the
next token sees.
"""

from typing import Any

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    CHAIN_UID,
    LENGTH,
    BlockTable,
    first_held,
    fitting,
    granule_at,
)
from kvtoolkit.cache.state.prefix_index import (
    EXTRA,
    NEXT,
    NUM_SPARE,
    ROOT,
    GranuleState,
    Holdings,
    Nodes,
    add_twin,
    find_node,
    publish,
    tier_of,
    unpublish,
)
from kvtoolkit.cache.state.step_passes import first_seen


@jit
def _own_node(lead: Nodes, node: int, nodes: Nodes) -> Any:
    """The node of another group with the key of ``node`` in the trie, or -1."""
    return find_node(nodes, lead.parent_uid[node], lead.tokens[node, EXTRA], lead.tokens[node], 0)


@jit
def find_own(lead: Nodes, found: Int32Array, count: int, nodes: Nodes, granules: GranuleState, out: Int32Array) -> None:
    """Write another group's node for each of the trie's first ``count`` nodes ``found`` to ``out``.

    It is -1 where there is none, or its granule is quantized.
    """
    for i in range(count):
        own = _own_node(lead, found[i], nodes)
        out[i] = own if own >= 0 and tier_of(granules, nodes.granule[own]) == 0 else -1


@jit
def usable_length(nodes: Nodes, found: Int32Array, count: int, span: int, most: int) -> Any:
    """The longest prefix, in granules and at most ``count``, of which a group has what the next token sees.

    Args:
        found: the group's node for each granule of the prefix, or -1.
        span: that of `first_seen`.
        most: entries of a row.
    """
    while count > 0:
        first = first_seen(8 * count, span)
        i = count - 1
        while i >= first and found[i] >= 0:
            i -= 1
        if i >= first:
            count = i  # every length above it needs granule i, too
            continue
        fits = fitting(nodes, found, first, count, most)
        if fits == count:
            return count
        count = fits
    return 0


@jit
def _publish_held(
    lead: Nodes, node: int, table: BlockTable, row: int, holdings: Holdings, num_freed: int
) -> Any:  # fmt: skip
    """Make the granule findable that a row of another group has for a node of the trie, or make it a twin.

    Returns the new length of ``freed``; see `add_twin`.
    """
    nodes, granules = holdings.nodes, holdings.granules
    index = lead.depth[node]
    if index < first_held(table, row) or index >= table.info[row, CAPACITY]:
        return num_freed
    granule = granule_at(table, row, index)
    if granules.node[granule] >= 0 or granules.links[granule, NEXT] != granule:
        return num_freed  # it is known already
    own = _own_node(lead, node, nodes)
    if own >= 0:  # a quantized granule has no twins
        return add_twin(holdings, own, granule, num_freed) if tier_of(granules, granule) == 0 else num_freed
    publish(nodes, granules, ROOT, lead.parent_uid[node], lead.tokens[node, EXTRA], index, lead.tokens[node], granule)
    return num_freed


@jit
def publish_chain(
    lead_table: BlockTable, lead: Nodes, which: Int32Array, table: BlockTable, holdings: Holdings
) -> Any:  # fmt: skip
    """`_publish_held` for all that rows hold of what the trie has of them; returns the number of ``freed`` granules."""
    num_freed = 0
    for row in which:
        node = lead_table.chain[row]
        if node >= 0 and lead.uid[node] == lead_table.origin[row, CHAIN_UID]:
            while node >= 0 and lead.depth[node] >= first_held(table, row):
                num_freed = _publish_held(lead, node, table, row, holdings, num_freed)
                node = lead.parent[node]
    return num_freed


@jit
def publish_step(
    chain: Int32Array,
    origin: Int64Array,
    lead: Nodes,
    table: BlockTable,
    rows: Int32Array,
    counts: Int32Array,
    batch: int,
    nodes: Nodes,
    granules: GranuleState,
    freed: Int32Array,
) -> Any:
    """`_publish_held` for what has become full in a step, whose tokens the trie has; returns the number of ``freed``.

    ``chain`` and ``origin`` are those of the first group's table.
    """
    holdings = Holdings(nodes, granules, freed)
    num_freed = 0
    for b in range(batch):
        row = rows[b]
        node, length = chain[row], table.info[row, LENGTH]
        if node >= 0 and lead.uid[node] == origin[row, CHAIN_UID]:
            for _ in range((length >> 3) - (max(length - counts[b], 0) >> 3)):
                num_freed = _publish_held(lead, node, table, row, holdings, num_freed)
                node = lead.parent[node]
                if node < 0:
                    break
    return num_freed


@jit
def forget_lost(lead: Nodes, begin: int, nodes: Nodes, granules: GranuleState, freed: Int32Array) -> Any:
    """Take the nodes out of another group's index whose keys were those of nodes that the trie has lost.

    Args:
        begin: the trie's nodes from this place on in its stack of spare ones were lost, and are not in use again yet.

    Returns:
        The number of ``freed`` granules.
    """
    holdings = Holdings(nodes, granules, freed)
    num_freed = 0
    for i in range(begin, lead.counts[NUM_SPARE]):
        own = _own_node(lead, lead.spare[i], nodes)
        if own >= 0:
            num_freed = unpublish(holdings, own, num_freed)
    return num_freed


@jit
def drop_lost(lead: Nodes, nodes: Nodes) -> None:
    """`forget_lost` for all nodes, before `reindex` of the other group and after that of the first."""
    for node in range(len(nodes.uid)):
        if nodes.uid[node] != 0 and find_lost(lead, nodes, node):
            nodes.uid[node] = 0


@jit
def find_lost(lead: Nodes, nodes: Nodes, node: int) -> Any:
    """Whether the trie has no node with the key of a node of another group."""
    return find_node(lead, nodes.parent_uid[node], nodes.tokens[node, EXTRA], nodes.tokens[node], 0) < 0


@jit
def count_lost(lead: Nodes, nodes: Nodes, used: Int64Array) -> Any:
    """How many nodes ``used`` of another group have keys that another one or no node of the trie has, or a parent."""
    count = 0
    for node in used:
        own = find_node(nodes, nodes.parent_uid[node], nodes.tokens[node, EXTRA], nodes.tokens[node], 0)
        count += nodes.parent[node] != ROOT or own != node or find_lost(lead, nodes, node)
    return count
