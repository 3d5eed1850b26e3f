"""The prefix index: finds the granules that already hold the beginning of a prompt.

The index is a trie. Each published granule has a node, which holds its parent, the granule's 8 tokens and the number of
its extra keys. A hash table keyed by all three finds nodes. A lookup compares them too, so a hash collision costs time
but never gives a wrong hit. The hash has a random key because prompts come from anybody: with a known key, somebody
could write prompts whose granules all share a bucket. A node's ``uid`` is never used twice, so a sequence that
remembers its last node can tell whether that node is still there. Every salt has a root with a uid of its own
(`kvtoolkit.cache.state.identity`).

    granules.node[nodes.granule[n]] == n for every node in use
    granules.cached[p] == number of published granules of pool p that no row holds; `open` finds them, and they are
                          evicted when memory is needed
    granules.cached[HELD + p] == number of granules of pool p that rows hold

A pool is the memory of one tier in one place: on the device, or in host memory.

Rows that compute the same tokens at the same time hold them in different granules, called twins. Only one of the twins
is published; a ring links it to the others. When no row holds the published twin any more, another one is published in
its place. So tokens that a row holds stay findable, and a granule whose contents exist twice is freed, not cached:

    a ring of more than one granule has exactly one published member, and rows hold all members

Source: prefix sharing by content, as radix trees in SGLang (Zheng et al. 2024, arXiv:2312.07104, sec. 3); here at
granule (8 token) granularity. The hash is Multilinear-HM of Lemire and Kaser 2014 ("Strongly universal string hashing
is fast", arXiv:1202.4961, sec. 2).
"""

import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array, Uint64Array
from kvtoolkit.config.tiers import POOL_NAMES

ROOT, BROKEN = -1, -2
"""Values of a row's `chain` that are no node: nothing is published yet; not all of its tokens are known."""
ROOT_UID = 0
"""Uid of the root for prompts without a salt."""
NO_EXTRA = 0
"""Number that means: no extra keys."""
EXTRA = 8
"""Column of `Nodes.tokens` that has the number of the extra keys."""
NUM_POOLS = len(POOL_NAMES)
HELD = NUM_POOLS
"""Index into `GranuleState.cached` from which the counts of held granules begin."""
NEXT_UID, CLOCK, NUM_SPARE = range(3)
# further entries of `GranuleState.cached`
NUM_LISTED, NUM_CHANGES = 2 * NUM_POOLS, 2 * NUM_POOLS + 1
# columns of `GranuleState.links`
NEXT, PREVIOUS, IS_LISTED, LISTED = range(4)

_KEY_WORDS = 19
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class GranuleState(NamedTuple):
    """What is known of every granule of the pool."""

    refs: Int32Array
    """How many rows hold it."""
    node: Int32Array
    """Its node in the index, or -1."""
    copy: Int64Array
    """Number of the host copy made of it since it was filled, or 0. Without meaning for a granule that nobody holds."""
    first: Int32Array
    """``[5]`` first granule of each pool, in the order of `kvtoolkit.config.tiers.POOL_NAMES`. A tier's granules in
    host memory follow those on the device, so a tier is a range of numbers, too."""
    cached: Int64Array
    """``[12]`` counts: cached granules of each pool; granules of each pool that rows hold (from HELD on, see above);
    how many granules are listed in `links`; how often something has changed what eviction could free."""
    links: Int32Array
    """``[num_granules, 4]``, columns above: its neighbours in the ring of twins (itself if it has none); whether its
    last row has let go of it since the evictor last looked. The LISTED column is a list of all those granules."""


class Nodes(NamedTuple):
    """All nodes of the index; there are as many as granules, because every node has a granule."""

    uid: Int64Array
    """0 while unused."""
    parent_uid: Int64Array
    tokens: Int64Array
    """``[num_granules, 9]``: 8 tokens; in column EXTRA the number of their extra keys, or NO_EXTRA."""
    last_used: Int64Array
    parent: Int32Array
    granule: Int32Array
    first_child: Int32Array
    next_sibling: Int32Array
    previous_sibling: Int32Array
    next_in_bucket: Int32Array
    depth: Int32Array
    num_uses: Int32Array
    buckets: Int32Array
    """First node of each bucket; `next_in_bucket` has the others."""
    key: Uint64Array
    """``[19]`` random key of the hash that chooses a bucket; every index has its own."""
    spare: Int32Array
    """Stack of unused nodes, ``counts[NUM_SPARE]`` deep."""
    counts: Int64Array


class Holdings(NamedTuple):
    """What compiled code passes on where it changes who holds granules."""

    nodes: Nodes
    granules: GranuleState
    freed: Int32Array
    """``[num_granules]`` scratch: the granules that nobody needs any more, for the allocators. Functions that append to
    it take ``num_freed``, its present length, and return the new one."""


def make_holdings(num_granules: int, first: tuple[int, ...]) -> Holdings:
    """Nothing held, nothing published."""
    return Holdings(make_nodes(num_granules), make_granule_state(num_granules, first), np.empty(num_granules, np.int32))


def make_granule_state(num_granules: int, first: tuple[int, ...]) -> GranuleState:
    """Nothing held, nothing published."""
    return GranuleState(
        refs=np.zeros(num_granules, np.int32),
        node=np.full(num_granules, -1, np.int32),
        copy=np.zeros(num_granules, np.int64),
        first=np.array(first, np.int32),
        cached=np.zeros(2 * NUM_POOLS + 2, np.int64),
        links=np.arange(num_granules, dtype=np.int32)[:, None] * np.array([1, 1, 0, 0], np.int32),
    )


def make_nodes(num_granules: int) -> Nodes:
    """An empty index for a pool of this size."""

    def int32s(fill: int) -> Int32Array:
        return np.full(num_granules, fill, np.int32)

    counts = np.zeros(3, np.int64)
    counts[NEXT_UID] = ROOT_UID + 1
    counts[NUM_SPARE] = num_granules
    return Nodes(
        uid=np.zeros(num_granules, np.int64),
        parent_uid=np.zeros(num_granules, np.int64),
        tokens=np.zeros((num_granules, 9), np.int64),
        last_used=np.zeros(num_granules, np.int64),
        parent=int32s(-1),
        granule=int32s(-1),
        first_child=int32s(-1),
        next_sibling=int32s(-1),
        previous_sibling=int32s(-1),
        next_in_bucket=int32s(-1),
        depth=int32s(0),
        num_uses=int32s(0),
        buckets=np.full(1 << max(4, (2 * num_granules - 1).bit_length()), -1, np.int32),
        key=np.frombuffer(os.urandom(8 * _KEY_WORDS), np.uint64).copy(),
        spare=np.arange(num_granules, dtype=np.int32)[::-1].copy(),
        counts=counts,
    )


def tiers_of(granules: GranuleState, listed: NDArray[np.integer[Any]]) -> Int64Array:
    """The tier of each granule number."""
    return np.searchsorted(granules.first[1:3], listed, side="right")


def pools_of(first: NDArray[np.integer[Any]] | tuple[int, ...], listed: NDArray[np.integer[Any]]) -> Int64Array:
    """The pool of each granule number; ``first``: see `GranuleState`."""
    tiers = np.searchsorted(first[1:3], listed, side="right")
    pools: Int64Array = np.where((tiers == 0) & (listed >= first[3]), 3, tiers)
    return np.where((tiers == 2) & (listed >= first[4]), 4, pools)


@jit
def tier_of(granules: GranuleState, granule: int) -> Any:
    """The tier that a granule belongs to."""
    tier = 0
    if granule >= granules.first[1]:
        tier = 1
    if granule >= granules.first[2]:
        tier = 2
    return tier


@jit
def pool_of(granules: GranuleState, granule: int) -> Any:
    """The pool that a granule belongs to."""
    tier = tier_of(granules, granule)
    if tier == 0 and granule >= granules.first[3]:
        return 3
    if tier == 2 and granule >= granules.first[4]:
        return 4
    return tier


@jit
def _hash(key: Uint64Array, parent_uid: int, tokens: Int64Array, first: int) -> Any:
    """32 bits of the parent's uid and 8 tokens.

    Over random keys, any ``b`` of these bits are equal for two different granules with probability 2**-b. Without the
    key, nobody can therefore choose granules that collide more often. The products are independent of each other, which
    makes this faster than a chain of mixing steps.
    """
    word = np.uint64(parent_uid)
    total = key[0] + (key[1] + (word & _LOW)) * (key[2] + (word >> _HALF))
    for i in range(8):
        word = np.uint64(tokens[first + i])
        total += (key[2 * i + 3] + (word & _LOW)) * (key[2 * i + 4] + (word >> _HALF))
    return total >> _HALF


@jit
def _bucket_of(nodes: Nodes, parent_uid: int, extra: int, tokens: Int64Array, first: int) -> Any:
    # one word for both: after 2**32 uids two pairs can share a word, but then they only collide in the hash
    word = parent_uid ^ (extra << 32)
    return _hash(nodes.key, word, tokens, first) & np.uint64(len(nodes.buckets) - 1)


@jit
def rehash(nodes: Nodes) -> None:
    """Fill the buckets anew, after the key or the nodes have changed."""
    nodes.buckets[:] = -1
    for node in range(len(nodes.uid)):
        if nodes.uid[node] != 0:
            _add_to_bucket(nodes, node)


@jit
def find_node(nodes: Nodes, parent_uid: int, extra: int, tokens: Int64Array, first: int) -> Any:
    """The child of ``parent_uid`` that holds ``tokens[first:first + 8]`` with these extra keys, or -1."""
    node = nodes.buckets[_bucket_of(nodes, parent_uid, extra, tokens, first)]
    while node >= 0:
        if nodes.parent_uid[node] == parent_uid and nodes.tokens[node, EXTRA] == extra:
            same = True
            for i in range(8):
                same = same and nodes.tokens[node, i] == tokens[first + i]
            if same:
                return node
        node = nodes.next_in_bucket[node]
    return -1


@jit
def publish(
    nodes: Nodes,
    granules: GranuleState,
    parent: int,
    parent_uid: int,
    extra: int,
    depth: int,
    tokens: Int64Array,
    granule: int,
) -> Any:
    """Make a full granule findable; returns its node. The index must have no node for the same arguments yet."""
    nodes.counts[NUM_SPARE] -= 1
    node = nodes.spare[nodes.counts[NUM_SPARE]]
    nodes.uid[node] = nodes.counts[NEXT_UID]
    nodes.counts[NEXT_UID] += 1
    nodes.parent[node], nodes.parent_uid[node] = parent, parent_uid
    for i in range(8):
        nodes.tokens[node, i] = tokens[i]
    nodes.tokens[node, EXTRA] = extra
    nodes.granule[node] = granule
    nodes.depth[node] = depth
    nodes.num_uses[node] = 0
    nodes.last_used[node] = nodes.counts[CLOCK]
    nodes.first_child[node] = -1
    nodes.previous_sibling[node] = -1
    nodes.next_sibling[node] = -1
    if parent >= 0:
        _add_child(nodes, parent, node)
    _add_to_bucket(nodes, node)
    granules.node[granule] = node
    return node


@jit
def _remove(nodes: Nodes, granules: GranuleState, node: int) -> None:
    """Take one node without children out of the index."""
    bucket = _bucket_of(nodes, nodes.parent_uid[node], nodes.tokens[node, EXTRA], nodes.tokens[node], 0)
    if nodes.buckets[bucket] == node:
        nodes.buckets[bucket] = nodes.next_in_bucket[node]
    else:
        before = nodes.buckets[bucket]
        while nodes.next_in_bucket[before] != node:
            before = nodes.next_in_bucket[before]
        nodes.next_in_bucket[before] = nodes.next_in_bucket[node]
    previous, following = nodes.previous_sibling[node], nodes.next_sibling[node]
    if previous >= 0:
        nodes.next_sibling[previous] = following
    elif nodes.parent[node] >= 0:
        nodes.first_child[nodes.parent[node]] = following
    if following >= 0:
        nodes.previous_sibling[following] = previous
    nodes.uid[node] = 0
    granules.node[nodes.granule[node]] = -1
    nodes.spare[nodes.counts[NUM_SPARE]] = node
    nodes.counts[NUM_SPARE] += 1


@jit
def unpublish(holdings: Holdings, node: int, num_freed: int) -> Any:
    """Take a node and all its descendants out of the index, because without it they could not be found either.

    Appends granules that no row holds to ``freed``, and returns its new length.
    """
    nodes, granules, freed = holdings
    current = node
    while True:
        while nodes.first_child[current] >= 0:
            current = nodes.first_child[current]
        parent, granule = nodes.parent[current], nodes.granule[current]
        _remove(nodes, granules, current)
        while granules.links[granule, NEXT] != granule:
            _leave_ring(granules, granules.links[granule, NEXT])
        if granules.refs[granule] == 0:
            granules.cached[NUM_CHANGES] += 1
            granules.cached[pool_of(granules, granule)] -= 1
            freed[num_freed] = granule
            num_freed += 1
        if current == node:
            return num_freed
        current = parent


@jit
def incref(granules: GranuleState, granule: int) -> None:
    """Count one more row that holds the granule."""
    if granules.refs[granule] == 0:
        pool = pool_of(granules, granule)
        granules.cached[HELD + pool] += 1
        if granules.node[granule] >= 0:
            granules.cached[NUM_CHANGES] += 1
            granules.cached[pool] -= 1
    granules.refs[granule] += 1


@jit
def decref(holdings: Holdings, granule: int, num_freed: int) -> Any:
    """Count one row less that holds the granule; returns the new length of ``freed``.

    When no row is left, a published granule stays findable. If rows hold a twin of it, the twin is published in its
    place. A granule that is not, or no longer, published is appended to ``freed``.
    """
    nodes, granules, freed = holdings
    granules.refs[granule] -= 1
    if granules.refs[granule] > 0:
        return num_freed
    pool = pool_of(granules, granule)
    granules.cached[HELD + pool] -= 1
    note_let_go(granules, granule)
    if granules.links[granule, NEXT] != granule:
        hand_over(nodes, granules, granule)
    node = granules.node[granule]
    if node >= 0:
        granules.cached[pool] += 1
        nodes.last_used[node] = max(nodes.last_used[node], nodes.counts[CLOCK])  # it may be dated into the future
        return num_freed
    freed[num_freed] = granule
    return num_freed + 1


@jit
def note_let_go(granules: GranuleState, granule: int) -> None:
    """Tell the evictor about a granule that no row holds any more: it or its neighbours may now be evictable."""
    granules.cached[NUM_CHANGES] += 1
    if granules.links[granule, IS_LISTED] == 0:
        granules.links[granule, IS_LISTED] = 1
        granules.links[granules.cached[NUM_LISTED], LISTED] = granule
        granules.cached[NUM_LISTED] += 1


@jit
def join_ring(granules: GranuleState, member: int, granule: int) -> None:
    """Make a granule a twin of ``member`` and of its twins."""
    following = granules.links[member, NEXT]
    granules.links[member, NEXT], granules.links[granule, PREVIOUS] = granule, member
    granules.links[granule, NEXT], granules.links[following, PREVIOUS] = following, granule


@jit
def _leave_ring(granules: GranuleState, granule: int) -> None:
    before, following = granules.links[granule, PREVIOUS], granules.links[granule, NEXT]
    granules.links[before, NEXT], granules.links[following, PREVIOUS] = following, before
    granules.links[granule, NEXT] = granules.links[granule, PREVIOUS] = granule


@jit
def hand_over(nodes: Nodes, granules: GranuleState, granule: int) -> None:
    """Take a granule out of its ring; if it was the published twin, publish another one in its place."""
    twin, node = granules.links[granule, NEXT], granules.node[granule]
    _leave_ring(granules, granule)
    if node >= 0 and twin != granule:
        granules.node[granule], granules.node[twin] = -1, node
        nodes.granule[node] = twin


@jit
def withdraw(holdings: Holdings, granule: int, num_freed: int) -> Any:
    """Make sure that a granule which a row holds is not published, because it is about to be written.

    Returns the new length of ``freed``.
    """
    nodes, granules = holdings.nodes, holdings.granules
    if granules.links[granule, NEXT] != granule:
        hand_over(nodes, granules, granule)
    elif granules.node[granule] >= 0:
        num_freed = unpublish(holdings, granules.node[granule], num_freed)
    return num_freed


@jit
def count_move(granules: GranuleState, source: int, target: int) -> None:
    """Count a granule that rows hold, or that is cached, in the pool of the granule that takes its place."""
    before, after = pool_of(granules, source), pool_of(granules, target)
    if before != after:
        kind = HELD if granules.refs[source] > 0 else 0
        granules.cached[kind + before] -= 1
        granules.cached[kind + after] += 1
        granules.cached[NUM_CHANGES] += 1


@jit
def move_granule(nodes: Nodes, granules: GranuleState, source: int, target: int) -> None:
    """Let ``target``, a granule that nobody holds, take the place of ``source`` in counts, index and ring."""
    note_let_go(granules, source)
    count_move(granules, source, target)
    granules.refs[target] = granules.refs[source]
    granules.refs[source] = 0
    granules.copy[target] = granules.copy[source]
    node = granules.node[source]
    granules.node[target] = node
    granules.node[source] = -1
    if node >= 0:
        nodes.granule[node] = target
    if granules.links[source, NEXT] != source:
        join_ring(granules, source, target)
        _leave_ring(granules, source)


@jit
def reindex(nodes: Nodes, granules: GranuleState) -> None:
    """Rebuild all that follows from the nodes in use and from the reference counts. Afterwards there are no twins.

    Of each node, uid, parent, parent_uid, tokens, granule, depth, num_uses and last_used must be right.
    """
    granules.node[:] = -1
    granules.cached[: NUM_LISTED + 1] = 0
    granules.links[:, IS_LISTED] = 0
    granules.cached[NUM_CHANGES] += 1
    for granule in range(len(granules.refs)):
        granules.links[granule, NEXT] = granules.links[granule, PREVIOUS] = granule
        if granules.refs[granule] > 0:
            granules.cached[HELD + pool_of(granules, granule)] += 1
    nodes.counts[NUM_SPARE] = 0
    for node in range(len(nodes.uid) - 1, -1, -1):  # the lowest is used first, as in a fresh index
        nodes.first_child[node] = nodes.next_sibling[node] = nodes.previous_sibling[node] = -1
        if nodes.uid[node] == 0:
            nodes.spare[nodes.counts[NUM_SPARE]] = node
            nodes.counts[NUM_SPARE] += 1
    for node in range(len(nodes.uid)):
        if nodes.uid[node] == 0:
            continue
        granule, parent = nodes.granule[node], nodes.parent[node]
        granules.node[granule] = node
        if granules.refs[granule] == 0:
            granules.cached[pool_of(granules, granule)] += 1
            note_let_go(granules, granule)
        if parent >= 0:
            _add_child(nodes, parent, node)
    rehash(nodes)


@jit
def _add_child(nodes: Nodes, parent: int, node: int) -> None:
    sibling = nodes.first_child[parent]
    nodes.next_sibling[node] = sibling
    if sibling >= 0:
        nodes.previous_sibling[sibling] = node
    nodes.first_child[parent] = node


@jit
def _add_to_bucket(nodes: Nodes, node: int) -> None:
    bucket = _bucket_of(nodes, nodes.parent_uid[node], nodes.tokens[node, EXTRA], nodes.tokens[node], 0)
    nodes.next_in_bucket[node] = nodes.buckets[bucket]
    nodes.buckets[bucket] = node


@jit
def match(nodes: Nodes, root_uid: int, extras: Int64Array, tokens: Int64Array, most: int, found: Int32Array) -> Any:
    """Follow the trie from a root along ``tokens`` for up to ``most`` granules.

    Args:
        extras: ``[n, 2]`` granule (ascending) and number of the extra keys in it.
        found: receives the nodes.

    Returns:
        How many nodes were found.
    """
    uid, k = root_uid, 0
    for i in range(most):
        extra = NO_EXTRA
        if k < len(extras) and extras[k, 0] == i:
            extra = extras[k, 1]
            k += 1
        node = find_node(nodes, uid, extra, tokens, i * 8)
        if node < 0:
            return i
        found[i] = node
        uid = nodes.uid[node]
    return most


@jit
def reusable_length(nodes: Nodes, granules: GranuleState, found: Int32Array, count: int, takes_quantized: bool) -> Any:
    """How many of the nodes found a row may use: hot granules and, if ``takes_quantized``, whole quantized tiles."""
    i = 0
    while i < count:
        granule = nodes.granule[found[i]]
        if tier_of(granules, granule) == 0:
            i += 1
            continue
        if not takes_quantized or i & 7 != 0 or granule & 7 != 0 or i + 8 > count:
            return i
        for k in range(1, 8):
            if nodes.granule[found[i + k]] != granule + k:
                return i
        i += 8
    return count


@jit
def repoint(holdings: Holdings, node: int, granule: int, num_freed: int) -> Any:
    """Publish another granule with the same tokens, which a row holds, in place of a node's present one.

    The present one has no twins. If no row holds it, it is appended to ``freed``; returns the new length.
    """
    nodes, granules, freed = holdings
    old = nodes.granule[node]
    granules.node[old], granules.node[granule] = -1, node
    nodes.granule[node] = granule
    if granules.refs[old] == 0:
        granules.cached[NUM_CHANGES] += 1
        granules.cached[pool_of(granules, old)] -= 1
        freed[num_freed] = old
        num_freed += 1
    return num_freed


@jit
def add_twin(holdings: Holdings, node: int, granule: int, num_freed: int) -> Any:
    """Note that a row holds the tokens of a node in another granule, a hot one, than the published one.

    If no row holds the published granule, or it is quantized, the row's granule is published in its place; otherwise
    the two become twins. Returns the new length of ``freed``.
    """
    nodes, granules = holdings.nodes, holdings.granules
    old = nodes.granule[node]
    if granules.refs[old] == 0 or tier_of(granules, old) > 0:
        return repoint(holdings, node, granule, num_freed)
    join_ring(granules, old, granule)
    return num_freed
