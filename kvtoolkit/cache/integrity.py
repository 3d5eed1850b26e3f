"""Checks every invariant of a cache, in one pass over rows, index and granules."""

from typing import TYPE_CHECKING, Any

import numpy as np

from allocators import BlockAllocator
from allocators._jit import jit
from allocators.protocol import require
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.state import prefix_windows
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    CHAIN_UID,
    CLOSED,
    END_EXTRA,
    FIRST_EXTRA,
    GENERATION,
    LENGTH,
    NUM_ENTRIES,
    PREEMPTED,
    ROOT_OF,
    STATE,
    BlockTable,
    first_held,
)
from kvtoolkit.cache.state.identity import Identities, roots_of
from kvtoolkit.cache.state.prefix_index import (
    EXTRA,
    HELD,
    NEXT,
    NO_EXTRA,
    PREVIOUS,
    ROOT,
    ROOT_UID,
    GranuleState,
    tier_of,
)
from kvtoolkit.cache.state.step_passes import first_seen
from kvtoolkit.config.tiers import POOL_NAMES
from kvtoolkit.cuda.pool import DevicePool
from kvtoolkit.cuda.pool_share import PoolWithShare
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT, entry_granule, entry_length, entry_tier

if TYPE_CHECKING:
    from kvtoolkit.cache.state.block_manager import BlockManager
    from kvtoolkit.cache.state.cache_state import CacheState

_FAULTS = (
    "",
    "has another number of entries than its table has room for",
    "has an empty entry among its entries",
    "has wrong block_starts",
    "has an entry that names another tier, or no granule of it",
    "holds a part of a quantized tile",
    "holds a granule twice",
    "has an entry beyond its last",
    "claims another number of granules than its entries hold",
    "is closed or preempted and still holds memory",
    "has more tokens than its granules",
    "will write a quantized tile",
    "shares a granule that it will write",
    "will write a granule that can be found",
    "will write a granule that was copied for a preempted sequence",
    "has let go of tokens that its next one sees",
)


def check(state: "CacheState") -> None:
    """See `KVCache.check_integrity`; the caller holds the lock."""
    state.forget_lost()
    table = state.group.table
    for group in state.groups:
        require_rows(group.table, group.blocks, group.layers.span)
        require_index(group.blocks, None if group is state.group else state.group.blocks)
        for tier, allocator in enumerate(group.blocks.allocators):
            if allocator is not None:
                _require_tier(group.blocks, tier, allocator)
        columns = [GENERATION, STATE, LENGTH]
        require(
            np.array_equal(group.table.info[:, columns], table.info[:, columns]),
            "cache: a row has another id, state or length in one group of layers than in the first",
        )
    require_identities(table, state.group.blocks, state.identities)
    states = table.info[:, STATE]
    require(
        np.array_equal(np.sort(state.closed_rows), np.flatnonzero(states == CLOSED)),
        "cache: the list of closed rows is wrong",
    )
    require(
        sorted(state.preempted) == np.flatnonzero(states == PREEMPTED).tolist(),
        "cache: what is kept of preempted sequences does not match their rows",
    )
    stays = [row for row, saved in sorted(state.preempted.items()) if saved.stays and table.info[row, LENGTH] > 0]
    for group in state.groups:
        holds = (states == PREEMPTED) & (group.table.info[:, CAPACITY] > 0)
        require(
            np.flatnonzero(holds).tolist() == stays,
            "cache: a preempted row holds memory although it was copied or dropped, or holds none although it stays",
        )


def require_rows(table: BlockTable, blocks: "BlockManager", span: int) -> None:
    """IntegrityError unless rows are well formed and reference counts are the number of rows that hold a granule."""
    require_well_formed(table, blocks, span)
    counted = np.zeros(blocks.num_granules, np.int32)
    _count(table, counted)
    require(
        np.array_equal(counted, blocks.granules.refs), "cache: refs are not the number of rows that hold each granule"
    )
    fault, row = _check_tails(table, blocks.granules)
    require(not fault, f"cache: row {row} {_FAULTS[fault]}")


def require_well_formed(table: BlockTable, blocks: "BlockManager", span: int) -> None:
    """IntegrityError unless every row names granules that exist, each once, as its figures say.

    ``span`` is that of `first_seen`: a row may have let go of what its next token does not see.
    """
    ends = np.array([*blocks.first[1:3], blocks.num_granules], np.int32)
    fault, row = _check_rows(table, blocks.granules, ends, np.full(blocks.num_granules, -1, np.int32), span)
    require(not fault, f"cache: row {row} {_FAULTS[fault]}")


def require_index(blocks: "BlockManager", lead: "BlockManager | None" = None) -> None:
    """IntegrityError unless nodes and granules refer to each other, and every node to its parent.

    ``lead`` has the index of the first group; None if ``blocks`` are its own.
    """
    nodes, granules = blocks.nodes, blocks.granules
    used = np.flatnonzero(nodes.uid)
    require(len(np.unique(nodes.granule[used])) == len(used), "cache: two index nodes hold the same granule")
    require(np.array_equal(granules.node[nodes.granule[used]], used), "cache: a granule does not know its node")
    require(int((granules.node >= 0).sum()) == len(used), "cache: a granule knows a node that is not in use")
    parents = nodes.parent[used]
    has_parent = parents >= 0
    expected_uid = np.where(has_parent, nodes.uid[parents], nodes.parent_uid[used])  # of roots: require_identities
    expected_depth = np.where(has_parent, nodes.depth[parents] + 1, 0)
    lost = used[(nodes.parent_uid[used] != expected_uid) | (nodes.depth[used] != expected_depth)]
    require(lead is not None or not len(lost), f"cache: node {lost[:1]} has lost its parent")
    num_lost = 0 if lead is None else int(prefix_windows.count_lost(lead.nodes, nodes, used))
    require(not num_lost, f"cache: {num_lost} nodes of another group have keys that the first group's index lacks")
    wrong = int(_check_twins(granules))
    require(wrong < 0, f"cache: granule {wrong} has twins that are not held, or not exactly one of them is findable")


def require_identities(table: BlockTable, blocks: "BlockManager", identities: Identities) -> None:
    """IntegrityError unless all roots and extra keys are known, and every row has the root of its nodes."""
    nodes, (salts, keys) = blocks.nodes, (identities.salts.numbers, identities.keys.numbers)
    numbers = [*salts.values(), *keys.values(), *nodes.uid[nodes.uid != 0].tolist()]
    is_distinct = len(set(numbers)) == len(numbers) and ROOT_UID not in numbers
    require(is_distinct, "cache: a number is that of two salts, extra keys or index nodes")
    used, live = np.flatnonzero(nodes.uid), np.flatnonzero(identities.is_live())
    roots = np.zeros(len(nodes.uid), np.int64)
    roots_of(nodes, used[np.argsort(nodes.depth[used], kind="stable")], roots)
    known_roots, known_keys = np.array([ROOT_UID, *salts.values()]), np.array([NO_EXTRA, *keys.values()])
    require(bool(np.isin(roots[used], known_roots).all()), "cache: a node's root is that of no salt")
    require(
        bool(np.isin(nodes.tokens[used, EXTRA], known_keys).all()), "cache: a node has extra keys that nobody knows"
    )
    own = table.origin[live, ROOT_OF]
    require(bool(np.isin(own, known_roots).all()), "cache: a row's root is that of no salt")
    chain, uids = table.chain[live], table.origin[live, CHAIN_UID]
    is_there = (chain >= 0) & (nodes.uid[chain] == uids)
    expected = np.where(is_there, roots[chain], np.where(chain == ROOT, uids, own))
    require(np.array_equal(own, expected), "cache: a row continues nodes of another root than its own")
    for first, end in table.origin[live][:, [FIRST_EXTRA, END_EXTRA]].tolist():
        extras = identities.extras[first:end]
        is_whole = 0 <= first <= end <= identities.num_extras
        is_whole = is_whole and bool((np.diff(extras[:, 0]) > 0).all() and np.isin(extras[:, 1], known_keys).all())
        require(is_whole, "cache: the extra keys of a row are not in order")


def _require_tier(blocks: "BlockManager", tier: int, allocator: BlockAllocator) -> None:
    """IntegrityError unless the allocator of a tier has granted exactly what is held, cached or in the reserve."""
    allocator.check_integrity()
    own, name = slice(blocks.first[tier], blocks.first[tier] + allocator.num_granules), POOL_NAMES[tier]
    refs, node = blocks.granules.refs[own], blocks.granules.node[own]
    cached, counted = int(((refs == 0) & (node >= 0)).sum()), int(blocks.granules.cached[tier])
    require(cached == counted, f"cache: {counted} {name} granules counted as cached, found {cached}")
    held, counted = int((refs > 0).sum()), int(blocks.granules.cached[HELD + tier])
    require(held == counted, f"cache: {counted} {name} granules counted as held, found {held}")
    owned = (refs > 0) | (node >= 0)
    if tier == TIER_HOT:
        for start in blocks.reserve:
            require(
                not owned[start : start + MAX_BLOCK_GRANULES].any(), f"cache: block {start} is kept back and in use"
            )
            owned[start : start + MAX_BLOCK_GRANULES] = True
    for start in blocks.arriving:
        if own.start <= start < own.stop:
            at = start - own.start
            require(not owned[at : at + MAX_BLOCK_GRANULES].any(), f"cache: block {start} is on its way and in use")
            owned[at : at + MAX_BLOCK_GRANULES] = True
    left = blocks.ledger.left - blocks.first[tier]
    owned[left[(left >= 0) & (left < len(owned))]] = True
    granted, callers = blocks.ledger.granted[own], blocks.ledger.callers[own]
    require(np.array_equal(granted, owned), f"cache: not all {name} granules granted are held, cached or kept back")
    require(not (granted & callers).any(), f"cache: a caller holds a {name} granule of the cache")
    known, live = int(np.count_nonzero(granted | callers)), allocator.stats().num_live
    # kernels may have taken blocks of a pool on a device without telling the host
    may_hold_more = isinstance(allocator, DevicePool) or bool(blocks.ledger.unresolved)
    if isinstance(allocator, PoolWithShare):
        is_same = np.array_equal(allocator.held & ~allocator.share.free_flags, granted | callers)
        require(is_same, f"cache: what the {name} pool has granted is not what is held, cached, kept back or lent")
    is_enough = known <= live if may_hold_more else known == live
    require(is_enough, f"cache: {known} {name} granules held, cached, kept back or a caller's, {live} live in the pool")


@jit
def _check_rows(table: BlockTable, granules: GranuleState, ends: Int32Array, seen: Int32Array, span: int) -> Any:
    """``(fault, row)`` of the first row that is not well formed, or ``(0, 0)``. ``seen`` must be -1 everywhere."""
    for row in range(len(table.info)):
        count, expected, quantized_end = table.info[row, NUM_ENTRIES], 0, 0
        if count < 0 or count > table.entries.shape[1]:
            return 1, row
        if span != 0:
            expected = first_held(table, row)
            if expected < 0 or expected > first_seen(max(table.info[row, LENGTH], 0), span):
                return 15, row
        for e in range(count):
            entry = table.entries[row, e]
            if entry < 0:
                return 2, row
            if table.starts[row, e] != expected:
                return 3, row
            granule, length, tier = entry_granule(entry), entry_length(entry), entry_tier(entry)
            if tier > 2 or granule + length > ends[2] or tier_of(granules, granule) != tier:
                return 4, row
            if granule + length > ends[tier]:
                return 4, row
            if tier > 0 and (length != 8 or granule & 7 != 0 or expected & 7 != 0):
                return 5, row
            for i in range(length):
                if seen[granule + i] == row:
                    return 6, row
                seen[granule + i] = row
            expected += length
            if tier > 0:
                quantized_end = expected
        for e in range(count, table.entries.shape[1]):
            if table.entries[row, e] != -1 or table.starts[row, e] != -1:
                return 7, row
        if table.info[row, CAPACITY] != expected:
            return 8, row
        state, length = table.info[row, STATE], table.info[row, LENGTH]
        if state == CLOSED or (state == PREEMPTED and count == 0):  # `check` knows which preempted rows hold memory
            if expected > 0:
                return 9, row
        elif length < 0 or length > 8 * expected:
            return 10, row
        elif 8 * quantized_end > length:
            return 11, row
    return 0, 0


@jit
def _check_twins(granules: GranuleState) -> Any:
    """The first granule whose ring of twins is wrong, or -1."""
    num_members, num_reached = 0, 0
    for granule in range(len(granules.refs)):
        following = granules.links[granule, NEXT]
        if granules.links[following, PREVIOUS] != granule:
            return granule
        if following == granule:
            continue
        num_members += 1
        if granules.refs[granule] == 0:
            return granule
        if granules.node[granule] >= 0:
            num_reached += 1
            while following != granule:
                if granules.node[following] >= 0:
                    return granule
                num_reached += 1
                following = granules.links[following, NEXT]
    if num_reached != num_members:
        for granule in range(len(granules.refs)):
            if granules.links[granule, NEXT] != granule:
                return granule
    return -1


@jit
def _count(table: BlockTable, counted: Int32Array) -> None:
    for row in range(len(table.info)):
        for e in range(table.info[row, NUM_ENTRIES]):
            entry = table.entries[row, e]
            for i in range(entry_length(entry)):
                counted[entry_granule(entry) + i] += 1


@jit
def _check_tails(table: BlockTable, granules: GranuleState) -> Any:
    """``(fault, row)`` of the first row that would write to a granule it must not write, or ``(0, 0)``."""
    for row in range(len(table.info)):
        for e in range(table.info[row, NUM_ENTRIES] - 1, -1, -1):
            entry, first = table.entries[row, e], table.starts[row, e]
            if first + entry_length(entry) <= table.info[row, LENGTH] >> 3:
                break
            for i in range(entry_length(entry)):
                if first + i >= table.info[row, LENGTH] >> 3:
                    if granules.refs[entry_granule(entry) + i] != 1:
                        return 12, row
                    if granules.node[entry_granule(entry) + i] >= 0:
                        return 13, row
                    # a preempted row writes only after it is restored, which resets the number
                    if granules.copy[entry_granule(entry) + i] != 0 and table.info[row, STATE] != PREEMPTED:
                        return 14, row
    return 0, 0
