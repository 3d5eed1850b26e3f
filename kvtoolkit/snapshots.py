"""A whole cache as bytes and back, and the check of everything that must hold in it."""

import io
import json
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators import BlockAllocator, SnapshotError
from allocators.protocol import require
from kvtoolkit.device_pool import DevicePool
from kvtoolkit.errors import CacheSnapshotError, StepError
from kvtoolkit.pool import Pool
from kvtoolkit.rows import CAPACITY, CLOSED, IN_STEP, LENGTH, NUM_ENTRIES, PINNED, PREEMPTED, STATE
from kvtoolkit.sequences import Preempted, Sequences
from kvtoolkit.storage import Contents
from kvtoolkit.tables import TIER_HOT, unpack_entries
from kvtoolkit.tier_config import TIER_NAMES


def pack(sequences: Sequences) -> bytes:
    """See `KVCache.snapshot`; the caller holds the lock."""
    for state, name in ((IN_STEP, "step"), (PINNED, "lease")):
        if np.any(sequences.rows.info[:, STATE] == state):
            raise StepError(f"snapshot: expected no open {name}; end it first")
    pool = sequences.pool
    held = np.flatnonzero((pool.granules.refs > 0) | (pool.granules.node >= 0))
    arrays: dict[str, NDArray[Any]] = {
        "config": _as_bytes(json.dumps(sequences.config.to_dict(), sort_keys=True).encode()),
        "counters": np.array(list(vars(sequences.counters).values()), np.int64),
        **{f"allocator.{tier}": _as_bytes(one.snapshot()) for tier, one in enumerate(pool.allocators) if one},
        "kept_back": np.array(pool.kept_back, np.int64),
        "closed_rows": np.array(sequences.closed_rows, np.int64),
        "held": held,
        **_named("contents", sequences.storage.read(held)),
        "preempted": np.array(sorted(sequences.preempted), np.int64),
    }
    for group, table in (("rows", sequences.rows), ("nodes", pool.nodes), ("granules", pool.granules)):
        arrays |= {f"{group}.{name}": array for name, array in table._asdict().items()}
    for row, saved in sequences.preempted.items():
        arrays[f"preempted.{row}.nodes"], arrays[f"preempted.{row}.uids"] = saved.nodes, saved.uids
        if saved.contents is not None:
            arrays[f"preempted.{row}.tiers"] = saved.tiers
            arrays |= _named(f"preempted.{row}", saved.contents)
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def unpack(sequences: Sequences, data: bytes) -> None:
    """Fill a fresh cache from a snapshot; after an error it is of no use."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise CacheSnapshotError(f"snapshot: expected bytes, got {type(data).__name__}")
    try:
        _unpack(sequences, data)
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, CacheSnapshotError):
            raise
        raise CacheSnapshotError(
            f"snapshot: expected the bytes of KVCache.snapshot, got damaged ones: {error}"
        ) from error


def _unpack(sequences: Sequences, data: bytes) -> None:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    found = json.loads(arrays["config"].tobytes())
    expected = json.loads(json.dumps(sequences.config.to_dict(), sort_keys=True))
    # where the keys and values lie does not matter: a snapshot of a GPU's cache may go on on the CPU
    differing = sorted(
        key for key in {*found, *expected} - {"backend", "device"} if found.get(key) != expected.get(key)
    )
    if differing:
        raise CacheSnapshotError(
            f"snapshot: expected one of this configuration, got one that differs in {', '.join(differing)}"
        )
    pool = sequences.pool
    try:
        for tier, allocator in enumerate(pool.allocators):
            if allocator is not None:
                allocator.restore(arrays[f"allocator.{tier}"].tobytes())
    except SnapshotError as error:
        raise CacheSnapshotError(str(error)) from error
    for group, table in (("rows", sequences.rows), ("nodes", pool.nodes), ("granules", pool.granules)):
        for name, array in table._asdict().items():
            array[...] = arrays[f"{group}.{name}"]
    pool.kept_back = arrays["kept_back"].tolist()
    for evictor in pool.evictors:
        evictor.forget()
    sequences.closed_rows = arrays["closed_rows"].tolist()
    vars(sequences.counters).update(zip(vars(sequences.counters), arrays["counters"].tolist(), strict=True))
    sequences.storage.write(arrays["held"], _contents(arrays, "contents"))
    sequences.preempted = {
        row: Preempted(
            arrays[f"preempted.{row}.nodes"],
            arrays[f"preempted.{row}.uids"],
            _contents(arrays, f"preempted.{row}") if f"preempted.{row}.tiers" in arrays else None,
            arrays.get(f"preempted.{row}.tiers", np.empty(0, np.int8)),
        )
        for row in arrays["preempted"].tolist()
    }


def _named(name: str, contents: Contents) -> dict[str, NDArray[Any]]:
    return {f"{name}.{field}": array for field, array in contents._asdict().items()}


def _contents(arrays: dict[str, NDArray[Any]], name: str) -> Contents:
    return Contents(*(arrays[f"{name}.{field}"] for field in Contents._fields))


def _as_bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def check(sequences: Sequences) -> None:
    """See `KVCache.check_integrity`; the caller holds the lock."""
    table, pool = sequences.rows, sequences.pool
    nodes, granules = pool.nodes, pool.granules
    refs = np.zeros(pool.num_granules, np.int64)
    for row in range(len(table.info)):
        refs += _check_row(sequences, row)
    require(np.array_equal(refs, granules.refs), "cache: refs are not the number of rows that hold each granule")
    used = np.flatnonzero(nodes.uid)
    require(len(np.unique(nodes.granule[used])) == len(used), "cache: two index nodes hold the same granule")
    require(np.array_equal(granules.node[nodes.granule[used]], used), "cache: a granule does not know its node")
    require(int((granules.node >= 0).sum()) == len(used), "cache: a granule knows a node that is not in use")
    for node in used:
        parent = int(nodes.parent[node])
        same = nodes.uid[parent] == nodes.parent_uid[node] if parent >= 0 else nodes.parent_uid[node] == 0
        require(bool(same), f"cache: node {node} has lost its parent")
    for tier, allocator in enumerate(pool.allocators):
        if allocator is not None:
            _check_tier(pool, tier, allocator)
    closed = np.flatnonzero(table.info[:, STATE] == CLOSED)
    require(np.array_equal(np.sort(sequences.closed_rows), closed), "cache: the list of closed rows is wrong")
    require(
        sorted(sequences.preempted) == np.flatnonzero(table.info[:, STATE] == PREEMPTED).tolist(),
        "cache: what is kept of preempted sequences does not match their rows",
    )


def _check_tier(pool: Pool, tier: int, allocator: BlockAllocator) -> None:
    """What is held and cached in one tier is what its allocator has given away."""
    allocator.check_integrity()
    own = slice(pool.first[tier], pool.first[tier] + allocator.num_granules)
    refs, node = pool.granules.refs[own], pool.granules.node[own]
    cached, counted = int(((refs == 0) & (node >= 0)).sum()), int(pool.granules.cached[tier])
    name = TIER_NAMES[tier]
    require(cached == counted, f"cache: {counted} {name} granules counted as cached, found {cached}")
    owned = (refs > 0) | (node >= 0)
    if tier == TIER_HOT:
        for start in pool.kept_back:
            require(not owned[start : start + 8].any(), f"cache: block {start} is kept back and in use")
            owned[start : start + 8] = True
    left = pool.ledger.left - pool.first[tier]
    owned[left[(left >= 0) & (left < len(owned))]] = True
    granted, callers = pool.ledger.granted[own], pool.ledger.callers[own]
    require(np.array_equal(granted, owned), f"cache: not all {name} granules granted are held, cached or kept back")
    require(not (granted & callers).any(), f"cache: a caller holds a {name} granule of the cache")
    known, live = int(np.count_nonzero(granted | callers)), allocator.stats().num_live
    # of a pool on a device kernels may hold blocks that nobody here knows
    may_hold_more = isinstance(allocator, DevicePool) or pool.ledger.unresolved
    is_enough = known <= live if may_hold_more else known == live
    require(is_enough, f"cache: {known} {name} granules held, cached, kept back or a caller's, {live} live in the pool")


def _check_row(sequences: Sequences, row: int) -> NDArray[np.int64]:
    """Check one row; returns how often it holds each granule (0 or 1)."""
    table, granules = sequences.rows, sequences.pool.granules
    count, capacity, length = (int(table.info[row, column]) for column in (NUM_ENTRIES, CAPACITY, LENGTH))
    starts, sizes, tiers = unpack_entries(table.entries[row, :count])
    require(bool((sizes > 0).all()), f"cache: row {row} has an empty entry among its entries")
    require(bool((table.entries[row, count:] == -1).all()), f"cache: row {row} has an entry beyond its last")
    expected = np.concatenate([[0], np.cumsum(sizes)])
    require(np.array_equal(table.starts[row, :count], expected[:-1]), f"cache: block_starts of row {row} are wrong")
    require(int(expected[-1]) == capacity, f"cache: row {row} claims {capacity} granules, holds {expected[-1]}")
    ends = np.array([*sequences.pool.first[1:], sequences.pool.num_granules])
    named = np.searchsorted(ends[:2], starts, side="right")
    inside = starts + sizes <= ends[np.minimum(tiers, 2)]
    require(bool((tiers == named).all() and inside.all()), f"cache: row {row} has an entry that names another tier")
    whole = (sizes == 8) & (starts % 8 == 0) & (expected[:-1] % 8 == 0)
    require(bool(whole[tiers > 0].all()), f"cache: row {row} holds a part of a quantized tile")
    quantized_end = int((expected[:-1] + sizes)[tiers > 0].max(initial=0))
    require(8 * quantized_end <= length or not count, f"cache: row {row} will write a quantized tile")
    if table.info[row, STATE] in (CLOSED, PREEMPTED):
        require(count == 0, f"cache: row {row} is closed or preempted and still holds memory")
    else:
        require(length <= 8 * capacity, f"cache: row {row} has {length} tokens in {capacity} granules")
    holds = np.zeros(sequences.pool.num_granules, np.int64)
    listed = np.concatenate(
        [np.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)] or [np.empty(0, np.int64)]
    )
    np.add.at(holds, listed.astype(np.int64), 1)
    require(bool((holds <= 1).all()), f"cache: row {row} holds a granule twice")
    open_end = listed[length // 8 :].astype(np.int64)
    require(bool((granules.refs[open_end] == 1).all()), f"cache: row {row} shares a granule that it will write")
    require(bool((granules.node[open_end] < 0).all()), f"cache: row {row} will write a granule that can be found")
    return holds
