"""The prefix index: finds the granules that already hold the beginning of a prompt.

One node per published granule, a trie of granules: a node is its parent, the 8 tokens it holds and the number of its
extra keys, and it is found through a hash table keyed by all of them. They are compared, so a hash collision costs
time, never a wrong hit. Prompts come from anybody, so the hash has a random key: without it nobody can make prompts
whose granules share a bucket. A node's ``uid`` is never used twice, so a sequence that remembers the node it ended on
can tell whether that is still there. Every salt has a root with a uid of its own (`kvtoolkit.cache.state.identity`).

    granules.node[nodes.granule[n]] == n for every node in use
    granules.cached[t] == number of published granules of tier t that no row holds: found by `open`, evicted when
                          memory is needed
    granules.cached[HELD + t] == number of granules of tier t that rows hold

Rows that were given the same tokens at the same time hold them in different granules, called twins, and the index
stands for one of them. Twins form a ring. When no row holds the published one any more, the index is pointed at another
one, so what a row holds stays findable, and memory that holds the same twice is freed instead of cached:

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

ROOT, BROKEN = -1, -2
"""Chain ends that are no node: nothing yet, and a row whose tokens are not all known."""
ROOT_UID = 0
"""Uid of the root of prompts without a salt."""
NO_EXTRA = 0
"""Number of no extra keys at all."""
EXTRA = 8
"""Where `Nodes.tokens` has the number of the extra keys."""
HELD = 3
"""Where `Granules.cached` has the granules that rows hold."""
NEXT_UID, CLOCK, NUM_SPARE = range(3)
# further entries of `Granules.cached`
NUM_LISTED, NUM_CHANGES = 6, 7
# columns of `Granules.links`
NEXT, PREVIOUS, IS_LISTED, LISTED = range(4)

_KEY_WORDS = 19
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class GranuleState(NamedTuple):
    """Per granule of the pool."""

    refs: Int32Array
    """Rows that hold it."""
    node: Int32Array
    """Its node in the index, or -1."""
    copy: Int64Array
    """Number of the copy in host memory that was made of it since it was filled, or 0; of nobody's granule anything."""
    first: Int32Array
    """``[3]`` number of the first granule of the hot, the warm and the cold tier."""
    cached: Int64Array
    """``[8]`` how many granules of each tier are cached, then how many of each tier rows hold, see above; how many are
    listed in `links`; how often something has changed what eviction could free."""
    links: Int32Array
    """``[num_granules, 4]``, columns above: the neighbours in the ring of twins, itself where there are none; whether
    its last row let go of it since the evictor looked; and, by their number, the granules of which that is so."""


class Nodes(NamedTuple):
    """Per node of the index; as many as granules, since each holds one."""

    uid: Int64Array
    """0 while unused."""
    parent_uid: Int64Array
    tokens: Int64Array
    """``[num_granules, 9]``: 8 tokens, and at EXTRA the number of the extra keys at them, or NO_EXTRA."""
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
    """First node of each; what follows it is in `next_in_bucket`."""
    key: Uint64Array
    """``[19]`` key of the hash that chooses the bucket; random, and of no other index."""
    spare: Int32Array
    """Stack of unused nodes, ``counts[NUM_SPARE]`` deep."""
    counts: Int64Array


def make_granule_state(num_granules: int, first: tuple[int, int, int]) -> GranuleState:
    """Nothing held, nothing published."""
    return GranuleState(
        refs=np.zeros(num_granules, np.int32),
        node=np.full(num_granules, -1, np.int32),
        copy=np.zeros(num_granules, np.int64),
        first=np.array(first, np.int32),
        cached=np.zeros(8, np.int64),
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
    return np.searchsorted(granules.first[1:], listed, side="right")


@jit
def tier_of(granules: GranuleState, granule: int) -> Any:
    """The tier that a granule number is of."""
    tier = 0
    if granule >= granules.first[1]:
        tier = 1
    if granule >= granules.first[2]:
        tier = 2
    return tier


@jit
def _hash(key: Uint64Array, parent_uid: int, tokens: Int64Array, first: int) -> Any:
    """32 bits of the parent's uid and 8 tokens.

    Two different granules have the same ``b`` of these bits with probability 2**-b, over the keys: whoever does not
    know the key can choose no granules that collide more often than that. The products do not wait for each other, so
    it takes less time than a chain of mixing steps.
    """
    word = np.uint64(parent_uid)
    total = key[0] + (key[1] + (word & _LOW)) * (key[2] + (word >> _HALF))
    for i in range(8):
        word = np.uint64(tokens[first + i])
        total += (key[2 * i + 3] + (word & _LOW)) * (key[2 * i + 4] + (word >> _HALF))
    return total >> _HALF


@jit
def _bucket_of(nodes: Nodes, parent_uid: int, extra: int, tokens: Int64Array, first: int) -> Any:
    # one word for both: two pairs have the same only after 2**32 uids, and then collide without being confused
    word = parent_uid ^ (extra << 32)
    return _hash(nodes.key, word, tokens, first) & np.uint64(len(nodes.buckets) - 1)


@jit
def rehash(nodes: Nodes) -> None:
    """Put every node in use into the bucket that `Nodes.key` chooses, as after another key or other nodes."""
    nodes.buckets[:] = -1
    for node in range(len(nodes.uid)):
        if nodes.uid[node] != 0:
            _add_to_bucket(nodes, node)


@jit
def find_node(nodes: Nodes, parent_uid: int, extra: int, tokens: Int64Array, first: int) -> Any:
    """The node that holds ``tokens[first:first + 8]`` with these extra keys after the node ``parent_uid``, or -1."""
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
    """Make a full granule findable; returns its node. `find_node` must not find one for the same arguments."""
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
def unpublish(nodes: Nodes, granules: GranuleState, node: int, freed: Int32Array, num_freed: int) -> Any:
    """Take a node and all that follows it out of the index.

    What follows an unfindable granule could not be found either. Granules that no row holds are appended to ``freed``;
    returns their new number.
    """
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
            granules.cached[tier_of(granules, granule)] -= 1
            freed[num_freed] = granule
            num_freed += 1
        if current == node:
            return num_freed
        current = parent


@jit
def incref(nodes: Nodes, granules: GranuleState, granule: int) -> None:
    """One row more holds the granule."""
    if granules.refs[granule] == 0:
        tier = tier_of(granules, granule)
        granules.cached[HELD + tier] += 1
        if granules.node[granule] >= 0:
            granules.cached[NUM_CHANGES] += 1
            granules.cached[tier] -= 1
    granules.refs[granule] += 1


@jit
def decref(nodes: Nodes, granules: GranuleState, granule: int, freed: Int32Array, num_freed: int) -> Any:
    """One row less holds the granule; returns the number of ``freed``.

    If none is left it stays findable, unless a row holds a twin: then the index stands for that one, and the granule
    joins ``freed``, as does one that cannot be found.
    """
    granules.refs[granule] -= 1
    if granules.refs[granule] > 0:
        return num_freed
    tier = tier_of(granules, granule)
    granules.cached[HELD + tier] -= 1
    note_let_go(granules, granule)
    if granules.links[granule, NEXT] != granule:
        hand_over(nodes, granules, granule)
    node = granules.node[granule]
    if node >= 0:
        granules.cached[tier] += 1
        nodes.last_used[node] = nodes.counts[CLOCK]
        return num_freed
    freed[num_freed] = granule
    return num_freed + 1


@jit
def note_let_go(granules: GranuleState, granule: int) -> None:
    """Tell the evictor of a granule that no row holds any more: it is cached now, or others can be freed with it."""
    granules.cached[NUM_CHANGES] += 1
    if granules.links[granule, IS_LISTED] == 0:
        granules.links[granule, IS_LISTED] = 1
        granules.links[granules.cached[NUM_LISTED], LISTED] = granule
        granules.cached[NUM_LISTED] += 1


@jit
def join_ring(granules: GranuleState, member: int, granule: int) -> None:
    """Make a granule a twin of another one and its twins."""
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
    """Let the twins of a granule go on without it: if the index stood for it, it stands for one of them now."""
    twin, node = granules.links[granule, NEXT], granules.node[granule]
    _leave_ring(granules, granule)
    if node >= 0 and twin != granule:
        granules.node[granule], granules.node[twin] = -1, node
        nodes.granule[node] = twin


@jit
def withdraw(nodes: Nodes, granules: GranuleState, granule: int, freed: Int32Array, num_freed: int) -> Any:
    """A granule that a row holds is about to be written: what it holds must no longer be found in it.

    Returns the number of ``freed``, to which `unpublish` adds.
    """
    if granules.links[granule, NEXT] != granule:
        hand_over(nodes, granules, granule)
    elif granules.node[granule] >= 0:
        num_freed = unpublish(nodes, granules, granules.node[granule], freed, num_freed)
    return num_freed


@jit
def move_granule(nodes: Nodes, granules: GranuleState, source: int, target: int) -> None:
    """Re-point what knows ``source`` to ``target``, which nobody knew."""
    note_let_go(granules, source)
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
    """Make everything that follows from the nodes in use, and from reference counts, anew; nothing has twins.

    What is given of a node is its uid, parent, parent_uid, tokens, granule, depth, num_uses and last_used.
    """
    granules.node[:] = -1
    granules.cached[: NUM_LISTED + 1] = 0
    granules.links[:, IS_LISTED] = 0
    granules.cached[NUM_CHANGES] += 1
    for granule in range(len(granules.refs)):
        granules.links[granule, NEXT] = granules.links[granule, PREVIOUS] = granule
        if granules.refs[granule] > 0:
            granules.cached[HELD + tier_of(granules, granule)] += 1
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
            granules.cached[tier_of(granules, granule)] += 1
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
        extras: ``[n, 2]`` granule, ascending, and number of the extra keys in it.
        found: receives the nodes.

    Returns:
        How many were found.
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
    """How many of the nodes found a row may hold: hot granules, and quantized tiles if they are welcome and whole."""
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
def repoint(nodes: Nodes, granules: GranuleState, node: int, granule: int, freed: Int32Array, num_freed: int) -> Any:
    """Make a node stand for another granule with the same tokens, which a row holds.

    The granule it stood for, which has no twins, is appended to ``freed`` if no row holds it; returns their new number.
    """
    old = nodes.granule[node]
    granules.node[old], granules.node[granule] = -1, node
    nodes.granule[node] = granule
    if granules.refs[old] == 0:
        granules.cached[NUM_CHANGES] += 1
        granules.cached[tier_of(granules, old)] -= 1
        freed[num_freed] = old
        num_freed += 1
    return num_freed


@jit
def add_twin(nodes: Nodes, granules: GranuleState, node: int, granule: int, freed: Int32Array, num_freed: int) -> Any:
    """A row holds the tokens of a node in another, hot granule than the one the node stands for.

    Where no row holds that one, or it is quantized, the node stands for the row's from now on; else the two are twins.
    Returns the new number of ``freed``.
    """
    old = nodes.granule[node]
    if granules.refs[old] == 0 or tier_of(granules, old) > 0:
        return repoint(nodes, granules, node, granule, freed, num_freed)
    join_ring(granules, old, granule)
    return num_freed
