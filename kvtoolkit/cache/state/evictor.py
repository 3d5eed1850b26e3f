"""Eviction: which cached granules go when memory is needed. A request evicts as much as it needs, or nothing.

Evicting frees *units*. A unit is the aligned run of granules that an allocator must get back before it can grant any of
them again, and at least the smallest block that the cache asks for. A unit can be freed if all of it that is granted is
cached. Evicting a part of one would free nothing, so units are evicted whole.

A prompt is found from its beginning, so a node must stay for as long as anything that follows it. It therefore takes
over the highest score of its cached descendants:

    keys[n] == max(score of n, keys of its cached children)
    key of a unit == max(keys of its cached nodes)

A heap has the units in the order of their keys. Units with equal keys go one sequence after another, each sequence from
its end, so that whole blocks become free. Units enter the heap late: only when memory is needed, for the granules that
rows have let go of since the last time. So a granule is scored once each time it becomes cached. A unit of which a row
holds a part leaves the heap until that row lets go of it.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.ledger import Flags, Ledger
from kvtoolkit.cache.state.prefix_index import (
    IS_LISTED,
    LISTED,
    NUM_CHANGES,
    NUM_LISTED,
    GranuleState,
    Holdings,
    Nodes,
    pool_of,
    pools_of,
    unpublish,
)
from kvtoolkit.config.eviction import CachedGranules, EvictionPolicy
from kvtoolkit.config.tiers import POOL_NAMES
from kvtoolkit.errors import ConfigError
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT

_DEEPEST = 1 << 25


class _Heap(NamedTuple):
    """The units of one tier, lowest key first. Some are outdated; they are dropped when they are met."""

    keys: NDArray[np.float64]
    ties: Int64Array
    units: Int64Array
    """First granule * 8 + size - 1."""
    serials: Int64Array
    """Serial of the push; only the latest push of a unit counts."""
    counts: Int64Array
    """``[1]`` number of units in the heap."""


class _Scores(NamedTuple):
    """Scores of all nodes."""

    keys: NDArray[np.float64]
    leaves: Int32Array
    """Granule of the descendant from which the node has its key."""
    latest: Int64Array
    """``[num_granules]`` serial of the latest push of the unit that begins at a granule."""


class Evictor:
    """Evicts granules of all tiers.

    Policies and allocators are plug-ins that may raise, so they are asked before anything changes.
    """

    def __init__(self, policy: EvictionPolicy, holdings: Holdings, ledger: Ledger, smallest: list[int]) -> None:
        self._policy = policy
        self._holdings = holdings
        self._nodes, self._granules = holdings.nodes, holdings.granules
        self._ledger = ledger
        self.smallest = np.array(smallest, np.int32)  # smallest block that the cache asks of each pool, in granules
        self.is_single = [size == 1 and ledger.frees_singly(pool) for pool, size in enumerate(smallest)]
        self._widens = False
        self.forget()

    def forget(self) -> None:
        """Start afresh, after `reindex` has listed everything that is cached."""
        num_nodes = len(self._nodes.uid)
        self._scores = _Scores(np.zeros(num_nodes), np.zeros(num_nodes, np.int32), np.zeros(num_nodes, np.int64))
        self._heaps = [_make_heap(64) for _ in POOL_NAMES]
        self._highest = -np.inf
        self._serial = 0
        self._known = [(-1, 0) for _ in POOL_NAMES]  # a change number, and how much could be freed then

    def evict_whole_blocks(self) -> None:
        """From now on evict with a granule all that is cached of its 64 tokens; for an index without parents.

        Sequences let go of a window's past granule by granule, so the oldest ones of all sequences are in as many
        blocks. Evicting just these would leave no block free.
        """
        self._widens = self.is_single[TIER_HOT]

    def can_free(self, tier: int, wanted: int) -> bool:
        """Whether evicting would make ``wanted`` granules of a tier available; evicts nothing."""
        cached, changes = int(self._granules.cached[tier]), int(self._granules.cached[NUM_CHANGES])
        if wanted <= 0 or cached == 0:
            return wanted <= 0
        if self.is_single[tier]:
            return wanted <= cached
        known_at, most = self._known[tier]
        if known_at == changes and wanted > most:
            return False
        self._score_listed()
        heap, ledger = self._heaps[tier], self._ledger
        arguments = (self._scores.latest, self._granules, ledger.granted, ledger.callers)
        gain, num_useless = _count_gain(heap, *arguments, wanted)
        if num_useless > 64:  # otherwise every call would meet the same ones again
            _tidy(heap, *arguments)
        if gain < wanted:
            self._known[tier] = changes, int(gain)
        return bool(gain >= wanted)

    def evict(self, tier: int, wanted: int) -> int:
        """Unpublish enough to make ``wanted`` granules of a tier available; if that is impossible, unpublish nothing.

        What follows an evicted granule goes too, whatever its tier. Returns the number of ``freed`` granules.
        """
        if not self.can_free(tier, wanted):
            return 0
        self._score_listed()
        flags = self._ledger.granted, self._ledger.callers
        return int(_evict(self._heaps[tier], self._scores.latest, self._holdings, *flags, wanted, self._widens))

    def _score_listed(self) -> None:
        """Score what became cached since the last call, and push the units in which rows let go of something."""
        nodes, granules = self._nodes, self._granules
        count = int(granules.cached[NUM_LISTED])
        if not count:
            return
        listed = granules.links[:count, LISTED]
        is_cached = (granules.refs[listed] == 0) & (granules.node[listed] >= 0)
        cached = listed[is_cached]
        found = granules.node[cached]
        order = np.argsort(-nodes.depth[found], kind="stable")  # the deepest first
        cached, found = cached[order], found[order]
        if len(found):
            figures = CachedGranules(nodes.last_used[found], nodes.num_uses[found], nodes.depth[found])
            values = self._ask(figures)
            _inherit(nodes, granules, found, values, self._scores, self._highest)
            self._highest = max(self._highest, float(values.max()))
        self._push(np.concatenate([cached, listed[~is_cached]]), len(cached))
        _forget_listed(granules)

    def _push(self, touched: Int32Array, num_cached: int) -> None:
        """Push the units of ``touched`` granules, of which the first ``num_cached`` are cached."""
        granules = self._granules
        pools = pools_of(granules.first, touched)
        if len(touched) > num_cached:  # the others matter only if a cached one can be freed just with them
            is_of_use = ~np.array(self.is_single)[pools] | (np.arange(len(touched)) < num_cached)
            touched, pools = touched[is_of_use], pools[is_of_use]
        sizes = np.maximum(self._ledger.unit_sizes(touched), self.smallest[pools])
        self._serial += 1
        for pool in range(len(POOL_NAMES)):
            own = pools == pool
            if own.any():
                self._heaps[pool] = heap = self._with_room(self._heaps[pool], int(np.count_nonzero(own)))
                _push_units(heap, self._serial, touched[own], sizes[own], self._nodes, granules, self._scores)

    def _with_room(self, heap: _Heap, more: int) -> _Heap:
        """The heap with room for ``more`` units."""
        if heap.counts[0] + more <= len(heap.keys):
            return heap
        _tidy(heap, self._scores.latest, self._granules, self._ledger.granted, self._ledger.callers)
        count = int(heap.counts[0])
        if 2 * count + more <= len(heap.keys):
            return heap
        larger = _make_heap(2 * (count + more))
        for old, new in zip(heap[:-1], larger[:-1], strict=True):
            new[:count] = old[:count]
        larger.counts[0] = count
        return larger

    def _ask(self, figures: CachedGranules) -> NDArray[np.float64]:
        scores = self._policy.score(figures)
        try:
            array = np.array(scores, np.float64)
        except (TypeError, ValueError):
            array = np.empty(0)
        if array.shape != figures.depth.shape:
            raise ConfigError(
                f"eviction: expected {type(self._policy).__name__}.score to return [{len(figures.depth)}] numbers, "
                f"got {scores!r:.80}"
            )
        if np.isnan(array).any():  # NaN has no place in an order, so chance would decide what is evicted
            raise ConfigError(
                f"eviction: expected {type(self._policy).__name__}.score to return [{len(array)}] numbers without NaN, "
                f"got {int(np.isnan(array).sum())} NaN"
            )
        return array


def _make_heap(room: int) -> _Heap:
    return _Heap(
        np.empty(room), np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64),
        np.zeros(1, np.int64),
    )  # fmt: skip


@jit
def _forget_listed(granules: GranuleState) -> None:
    for i in range(granules.cached[NUM_LISTED]):
        granules.links[granules.links[i, LISTED], IS_LISTED] = 0
    granules.cached[NUM_LISTED] = 0


@jit
def _inherit(
    nodes: Nodes,
    granules: GranuleState,
    found: Int32Array,
    values: NDArray[np.float64],
    scores: _Scores,
    highest: float,
) -> None:
    """Give each node, deepest first, the highest score among itself and its descendants, and the leaf that has it.

    ``highest`` is the highest key of all other nodes. A node with a higher score need not look at children that were
    cached before, of which there may be many; with most policies that is the usual case.
    """
    for i in range(len(found)):
        scores.keys[found[i]], scores.leaves[found[i]] = values[i], -1
    for i in range(len(found)):
        node = found[i]
        if scores.keys[node] <= highest:
            child = nodes.first_child[node]
            while child >= 0:
                if granules.refs[nodes.granule[child]] == 0:
                    _raise_to(scores, node, child)
                child = nodes.next_sibling[child]
        if scores.leaves[node] < 0:
            scores.leaves[node] = nodes.granule[node]
        parent = nodes.parent[node]
        if parent >= 0:
            _raise_to(scores, parent, node)


@jit
def _raise_to(scores: _Scores, node: int, child: int) -> None:
    key, leaf = scores.keys[child], scores.leaves[child]
    if key > scores.keys[node] or (key == scores.keys[node] and leaf > scores.leaves[node]):
        scores.keys[node], scores.leaves[node] = key, leaf


@jit
def _push_units(
    heap: _Heap,
    serial: int,
    touched: Int32Array,
    sizes: Int32Array,
    nodes: Nodes,
    granules: GranuleState,
    scores: _Scores,
) -> None:
    """Push each unit that has one of the granules, once, if something in it is cached."""
    for i in range(len(touched)):
        first = granules.first[pool_of(granules, touched[i])]
        start = first + (touched[i] - first) // sizes[i] * sizes[i]
        if scores.latest[start] == serial:
            continue
        scores.latest[start] = serial
        key, leaf, depth = -np.inf, -1, 0
        for granule in range(start, start + sizes[i]):
            node = granules.node[granule]
            if node >= 0 and granules.refs[granule] == 0:
                depth = max(depth, nodes.depth[node])
                if scores.keys[node] > key or (scores.keys[node] == key and scores.leaves[node] > leaf):
                    key, leaf = scores.keys[node], scores.leaves[node]
        if leaf >= 0:
            _push(heap, key, leaf * _DEEPEST + _DEEPEST - 1 - depth, start * 8 + sizes[i] - 1, serial)


@jit
def _gain(heap: _Heap, i: int, latest: Int64Array, granules: GranuleState, granted: Flags, callers: Flags) -> Any:
    """How many granules evicting a unit makes available; 0 if it was pushed again, is evicted, or held in part."""
    start, size = heap.units[i] >> 3, (heap.units[i] & 7) + 1
    num_cached, is_held = 0, latest[start] != heap.serials[i]
    for granule in range(start, start + size):
        if granules.node[granule] >= 0 and granules.refs[granule] == 0:
            num_cached += 1
        elif granted[granule] or callers[granule]:
            is_held = True
    return 0 if is_held or num_cached == 0 else size


@jit
def count_evictable(
    granules: GranuleState,
    cached: Int32Array,
    sizes: Int32Array,
    pinning: NDArray[np.bool_],
    first: int,
    granted: Flags,
    callers: Flags,
) -> Any:
    """How many granules evicting all that is cached would free: those in units of which no row holds a part.

    Args:
        cached: the cached granules of a tier, ascending.
        sizes: size of the unit that each is in.
        pinning: for each, whether the allocator frees its unit only as a whole, so that the rest of it is not free yet.
        first: first granule of the tier.
    """
    total, last = 0, -1
    for i in range(len(cached)):
        start = first + (cached[i] - first) // sizes[i] * sizes[i]
        if start == last:
            continue
        last = start
        found, is_free = 0, True
        for granule in range(start, start + sizes[i]):
            if granules.node[granule] < 0 or granules.refs[granule] > 0:
                is_free = is_free and not (granted[granule] or callers[granule])
                found += pinning[i]
            else:
                found += 1
        if is_free:
            total += found
    return total


@jit
def _count_gain(
    heap: _Heap, latest: Int64Array, granules: GranuleState, granted: Flags, callers: Flags, wanted: int
) -> Any:
    """``(granules, outdated units)`` met until there are ``wanted`` granules."""
    total, num_outdated, i = 0, 0, 0
    while i < heap.counts[0] and total < wanted:
        gain = _gain(heap, i, latest, granules, granted, callers)
        total += gain
        num_outdated += gain == 0
        i += 1
    return total, num_outdated


@jit
def _tidy(heap: _Heap, latest: Int64Array, granules: GranuleState, granted: Flags, callers: Flags) -> None:
    """Drop outdated units."""
    kept = 0
    for i in range(heap.counts[0]):
        if _gain(heap, i, latest, granules, granted, callers) > 0:
            _copy(heap, i, kept)
            kept += 1
    heap.counts[0] = kept
    for k in range(kept // 2 - 1, -1, -1):
        _sink(heap, k)


@jit
def _evict(
    heap: _Heap,
    latest: Int64Array,
    holdings: Holdings,
    granted: Flags,
    callers: Flags,
    wanted: int,
    widens: bool,
) -> Any:
    """Evict the lowest units until ``wanted`` granules are available, which the caller has found possible.

    ``widens`` is that of `Evictor.evict_whole_blocks`.
    """
    granules = holdings.granules
    total, num_freed = 0, 0
    while total < wanted and heap.counts[0] > 0:
        gain = _gain(heap, 0, latest, granules, granted, callers)
        start = heap.units[0] >> 3
        _pop(heap)
        for granule in range(start + gain - 1, start - 1, -1):
            if granules.node[granule] >= 0:
                num_freed = unpublish(holdings, granules.node[granule], num_freed)
        total += gain
        if widens and gain > 0:
            block = start // MAX_BLOCK_GRANULES * MAX_BLOCK_GRANULES
            for granule in range(block, block + MAX_BLOCK_GRANULES):
                if granules.node[granule] >= 0 and granules.refs[granule] == 0:
                    num_freed = unpublish(holdings, granules.node[granule], num_freed)
                    total += 1
    return num_freed


# -- a binary heap ---------------------------------------------------------------------------------------------------


@jit
def _copy(heap: _Heap, source: int, target: int) -> None:
    heap.keys[target], heap.ties[target] = heap.keys[source], heap.ties[source]
    heap.units[target], heap.serials[target] = heap.units[source], heap.serials[source]


@jit
def _is_below(heap: _Heap, i: int, j: int) -> Any:
    return heap.keys[i] < heap.keys[j] or (heap.keys[i] == heap.keys[j] and heap.ties[i] < heap.ties[j])


@jit
def _swap(heap: _Heap, i: int, j: int) -> None:
    heap.keys[i], heap.keys[j] = heap.keys[j], heap.keys[i]
    heap.ties[i], heap.ties[j] = heap.ties[j], heap.ties[i]
    heap.units[i], heap.units[j] = heap.units[j], heap.units[i]
    heap.serials[i], heap.serials[j] = heap.serials[j], heap.serials[i]


@jit
def _push(heap: _Heap, key: float, tie: int, unit: int, serial: int) -> None:
    i = heap.counts[0]
    heap.keys[i], heap.ties[i], heap.units[i], heap.serials[i] = key, tie, unit, serial
    heap.counts[0] += 1
    while i > 0 and _is_below(heap, i, (i - 1) >> 1):
        _swap(heap, i, (i - 1) >> 1)
        i = (i - 1) >> 1


@jit
def _pop(heap: _Heap) -> None:
    heap.counts[0] -= 1
    if heap.counts[0] > 0:
        _copy(heap, heap.counts[0], 0)
        _sink(heap, 0)


@jit
def _sink(heap: _Heap, i: int) -> None:
    while True:
        lowest = i
        for child in (2 * i + 1, 2 * i + 2):
            if child < heap.counts[0] and _is_below(heap, child, lowest):
                lowest = child
        if lowest == i:
            return
        _swap(heap, i, lowest)
        i = lowest
