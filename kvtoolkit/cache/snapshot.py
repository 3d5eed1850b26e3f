"""A whole cache as bytes and back.

A snapshot holds what cannot be derived: the configuration, rows that are not closed, index nodes in use, salts and
extra keys, the keys and values of all granules that rows or the index hold, and what is kept of preempted sequences.
Everything else is rebuilt, including what the allocators have granted. So a cache may resume with another allocator,
pool size, eviction or growth policy, backend or number of sequences, as long as all that it holds has a place there.

The bytes are not trusted: every number is checked before it is used as an index.
"""

import json
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators import AllocatorError, IntegrityError
from kvtoolkit.arrays.types import Int64Array
from kvtoolkit.cache import integrity
from kvtoolkit.cache.array_file import pack_arrays, unpack_arrays
from kvtoolkit.cache.group_snapshot import Arrays, GroupReader, pack_group, prefix_of
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    CHAIN_UID,
    CLOSED,
    GENERATION,
    ID_BITS,
    IN_STEP,
    LENGTH,
    OPEN,
    PINNED,
    PREEMPTED,
    ROOT_OF,
    STATE,
)
from kvtoolkit.cache.state.cache_state import CacheState, Preempted
from kvtoolkit.cache.state.host_copies import Copy
from kvtoolkit.cache.state.identity import Names
from kvtoolkit.cache.state.prefix_index import BROKEN, EXTRA, NEXT_UID, NO_EXTRA, NUM_SPARE, ROOT, ROOT_UID, reindex
from kvtoolkit.cache.state.repair import count_refs, publish_again
from kvtoolkit.cache.state.step_passes import first_seen
from kvtoolkit.config.groups import parse_groups
from kvtoolkit.errors import CacheSnapshotError, ConfigError, StepError

_SAME = ("num_layers", "num_kv_heads", "head_dim", "dtype")
"""Fields of the configuration that decide the layout of keys and values; the formats of tiers do, too."""


def pack(state: CacheState) -> bytes:
    """See `KVCache.snapshot`; the caller holds the lock."""
    table = state.group.table
    for held_by, name in ((IN_STEP, "step"), (PINNED, "lease")):
        held = np.flatnonzero(table.info[:, STATE] == held_by).astype(np.int32)
        if len(held):
            ids = f"{', '.join(map(str, state.ids_of(held[:8])))}{', ...' if len(held) > 8 else ''}"
            raise StepError(f"snapshot: expected no open {name}, got sequences {ids} in one; end it first")
    state.forget_lost()
    state.identities.forget_unused(at_once=True)
    rows = np.flatnonzero(table.info[:, STATE] != CLOSED)
    arrays: Arrays = {
        "config": _as_bytes(json.dumps(state.config.to_dict(), sort_keys=True).encode()),
        "generations": np.trim_zeros(table.info[:, GENERATION], "b"),
        "rows": rows,
        "chain": table.chain[rows],
        "origin": table.origin[rows],
        "extras": state.identities.extras[: state.identities.num_extras],
        **_named_texts("salts", state.identities.salts),
        **_named_texts("keys", state.identities.keys),
        "pending": table.pending[rows],
    }
    for i, group in enumerate(state.groups):
        saved = {row: one.others[i - 1] if i else one for row, one in state.preempted.items() if not i or one.others}
        copies = {copy.number: copy for one in saved.values() for copy in one.copies or ()}
        own = pack_group(group, rows, copies) | _pack_preempted(saved, list(copies), state)
        arrays |= {prefix_of(i) + name: array for name, array in own.items()}
    return pack_arrays(arrays)


def _pack_preempted(preempted: dict[int, Preempted], numbers: list[int], state: CacheState) -> Arrays:
    """What is kept of preempted sequences in one group. Copies are numbered from 0, in the order of ``numbers``."""
    arrays: Arrays = {}
    places = {number: i for i, number in enumerate(numbers)}
    for row, saved in preempted.items():
        arrays[f"preempted.{row}.nodes"] = np.stack([saved.nodes.astype(np.int64), saved.uids], axis=1)
        if saved.copies is not None:
            arrays[f"preempted.{row}.copies"] = np.array([places[copy.number] for copy in saved.copies], np.int64)
            is_findable = state.group.table.chain[row] != BROKEN  # otherwise its prefixes were cleared
            arrays[f"preempted.{row}.tokens"] = saved.tokens if is_findable else saved.tokens[:0]
            if saved.first:
                arrays[f"preempted.{row}.first"] = np.array([saved.first], np.int64)
    return arrays


def unpack(state: CacheState, data: bytes) -> None:
    """Fill a fresh cache from a snapshot; after an error the cache cannot be used."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise CacheSnapshotError(f"snapshot: expected bytes, got {type(data).__name__}")
    try:
        _Unpacker(state, unpack_arrays(data)).run()
    except (IntegrityError, AllocatorError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        if isinstance(error, CacheSnapshotError):
            raise
        raise CacheSnapshotError(f"snapshot: expected what KVCache.snapshot has made, got: {error}") from error


class _Unpacker:
    """Checks the arrays of a snapshot and writes them into a fresh cache."""

    def __init__(self, state: CacheState, arrays: Arrays) -> None:
        self._state = state
        config = _config_of(arrays)
        _require_same(state.config.to_dict(), config)
        pool = ("allocator", "allocator_options", "block_sizes")
        expected = state.config.to_dict()
        is_another = any(config.get(name) != expected.get(name) for name in pool)
        self._readers = [GroupReader(group, arrays, i, is_another) for i, group in enumerate(state.groups)]
        self._lead = self._readers[0]

    def run(self) -> None:
        """Read everything."""
        state = self._state
        for reader in self._readers:
            reader.read_nodes()
        self._read_identities()
        self._read_rows()
        self._read_preempted()
        for reader in self._readers:
            self._rebuild(reader)
        states = state.group.table.info[:, STATE]
        state.closed_rows = np.flatnonzero(states == CLOSED)[::-1].tolist()
        state.num_spare = int(state.group.blocks.nodes.counts[NUM_SPARE])
        integrity.check(state)

    def _rebuild(self, reader: GroupReader) -> None:
        """Rebuild of a group what follows from its rows and nodes, and read its keys and values."""
        group, lead = reader.group, self._state.group
        table, blocks = group.table, group.blocks
        integrity.require_well_formed(table, blocks, group.layers.span)
        count_refs(table, blocks.granules)
        reindex(blocks.nodes, blocks.granules)
        integrity.require_rows(table, blocks, group.layers.span)
        integrity.require_index(blocks, None if group is lead else lead.blocks)
        reader.read_contents()
        publish_again(group, lead)
        reader.grant()
        reader.read_counters()

    def _read_identities(self) -> None:
        """Fill in the salts and extra keys. `integrity.check` will see whether rows and nodes fit them."""
        identities, end = self._state.identities, int(self._state.group.blocks.nodes.counts[NEXT_UID])
        for name, names in (("salts", identities.salts), ("keys", identities.keys)):
            numbers = self._lead.vector(f"{name}.numbers", "int64", None)
            self._lead.within(f"{name}.numbers", numbers, ROOT_UID + 1, end)
            ends = self._lead.vector(f"{name}.ends", "int64", len(numbers))
            text = self._lead.vector(f"{name}.text", "uint8", int(ends[-1]) if len(ends) else 0).tobytes()
            begins = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
            if (begins >= ends).any():
                raise CacheSnapshotError(f"snapshot: expected {name} that are not empty")
            pairs = zip(begins.tolist(), ends.tolist(), numbers.tolist(), strict=True)
            names.numbers = {text[begin:end]: number for begin, end, number in pairs}
            if len(names.numbers) != len(numbers):
                raise CacheSnapshotError(f"snapshot: expected different {name}")
        identities.extras = self._lead.array("extras", "int64", (None, 2)).copy()
        identities.num_extras = len(identities.extras)
        self._lead.within("extras", identities.extras[:, 0], 0, 1 << 25)

    def _chains(self, name: str, pairs: NDArray[Any], roots: Any) -> Int64Array:
        """``[n, 2]`` node here (BROKEN if it is gone) and uid; ``roots`` has the root of each row."""
        nodes, renumbered, uids = self._state.group.blocks.nodes, self._lead.renumbered, pairs[:, 1]
        self._lead.within(name, pairs[:, 0], BROKEN, 1 << 25)
        known = (pairs[:, 0] >= 0) & (pairs[:, 0] < len(renumbered))
        here = np.where(known, renumbered[np.where(known, pairs[:, 0], 0)], BROKEN)
        here = np.where((here >= 0) & (nodes.uid[here] == uids), here, BROKEN)
        is_root = (pairs[:, 0] == ROOT) & (uids == roots)
        return np.stack([np.where(is_root, ROOT, here), uids], axis=1)

    def _read_rows(self) -> None:
        table, lead = self._state.group.table, self._lead
        generations = lead.vector("generations", "int64", None)
        if len(generations) > len(table.info):
            # a smaller table would give out the ids of the missing rows again
            raise CacheSnapshotError(
                f"snapshot: expected max_seqs of at least {len(generations)}, got {len(table.info)}"
            )
        lead.within("generations", generations, 0, 1 << (62 - ID_BITS))
        which = lead.distinct("rows", None, len(table.info))
        count = len(which)
        for reader in self._readers:
            reader.read_entries(which)
            reader.group.table.info[: len(generations), GENERATION] = generations
        if count and (table.info[which, GENERATION] == 0).any():
            raise CacheSnapshotError("snapshot: expected rows whose ids exist")
        states, lengths = table.info[which, STATE], table.info[which, LENGTH]
        if not np.isin(states, (OPEN, PREEMPTED)).all():
            raise CacheSnapshotError("snapshot: expected rows that are open or preempted")
        table.origin[which] = lead.array("origin", "int64", (count, 4))
        uids, roots = table.origin[which][:, [CHAIN_UID, ROOT_OF]].T
        pairs = np.stack([lead.vector("chain", "int32", count), uids], axis=1)
        chains = self._chains("chain", pairs, roots)
        dropped = (states == PREEMPTED) & (lengths == 0)
        chains[dropped, 0], chains[dropped, 1] = ROOT, roots[dropped]
        in_index = chains[:, 0] >= 0
        depths = self._state.group.blocks.nodes.depth[chains[in_index, 0]] + 1
        if (depths != lengths[in_index] // 8).any():
            raise CacheSnapshotError("snapshot: expected chains as long as their rows")
        table.chain[which], table.origin[which, CHAIN_UID] = chains[:, 0], chains[:, 1]
        table.pending[which] = lead.array("pending", "int64", (count, 8))

    def _read_preempted(self) -> None:
        state, table = self._state, self._state.group.table
        for reader in self._readers:
            reader.read_copies()
        for row in np.flatnonzero(table.info[:, STATE] == PREEMPTED).tolist():
            name, length = f"preempted.{row}", int(table.info[row, LENGTH])
            nodes, uids = self._read_kept_nodes(name, int(table.origin[row, ROOT_OF]))
            saved = Preempted(nodes.astype(np.int32), uids, None, np.empty((0, 9), np.int64))
            if self._lead.has(f"{name}.copies"):
                saved.first, saved.copies = self._read_kept(self._lead, name, length)
                saved.tokens = self._read_kept_tokens(name, 0 if saved.first else length // 8)
                if len(saved.tokens):  # its tokens are published again when it comes back
                    table.chain[row], table.origin[row, CHAIN_UID] = ROOT, table.origin[row, ROOT_OF]
                nothing = Preempted(nodes[:0].astype(np.int32), uids[:0], None, saved.tokens[:0])
                others = [self._read_kept(reader, name, length) for reader in self._readers[1:]]
                saved.others = tuple(replace(nothing, first=first, copies=copies) for first, copies in others)
            elif length:
                saved.stays = not state.others and bool(
                    table.info[row, CAPACITY]
                )  # `integrity` will see if all is there
                if not saved.stays:
                    raise CacheSnapshotError(f"snapshot: expected the contents of {name}, got none")
            state.preempted[row] = saved

    def _read_kept_nodes(self, name: str, root_uid: int) -> tuple[Int64Array, Int64Array]:
        """The nodes and uids of a dropped sequence, up to the first one that is gone."""
        chain = self._chains(name, self._lead.array(f"{name}.nodes", "int64", (None, 2)), root_uid)
        nodes, uids = chain[:, 0], chain[:, 1]
        gone = np.flatnonzero(nodes < 0)
        nodes = nodes[: gone[0]] if len(gone) else nodes
        index = self._state.group.blocks.nodes
        parents = np.concatenate([np.full(1, ROOT), nodes])[:-1]
        if (index.parent[nodes] != parents).any() or (index.parent_uid[nodes[:1]] != root_uid).any():
            raise CacheSnapshotError(f"snapshot: expected nodes of {name} that follow each other from its root")
        return nodes, uids[: len(nodes)].copy()

    def _read_kept(self, reader: GroupReader, name: str, length: int) -> tuple[int, tuple[Copy, ...]]:
        """The first granule that a sequence held in a group, and the copies from there on."""
        first = 0
        if reader.has(f"{name}.first"):
            given = reader.vector(f"{name}.first", "int64", 1)
            reader.within(f"{name}.first", given, 0, int(first_seen(length, reader.group.layers.span)) + 1)
            first = int(given[0])
        return first, reader.copies_of(name, length, first)

    def _read_kept_tokens(self, name: str, num_full: int) -> Int64Array:
        """The tokens of a sequence that was copied to the host; none if they are not known."""
        tokens: Int64Array = self._lead.array(f"{name}.tokens", "int64", (None, 9)).copy()
        if len(tokens) not in (0, num_full):
            raise CacheSnapshotError(f"snapshot: expected {name}.tokens of all full granules or of none")
        known = np.array([NO_EXTRA, *self._state.identities.keys.numbers.values()], np.int64)
        if not np.isin(tokens[:, EXTRA], known).all():
            raise CacheSnapshotError(f"snapshot: expected {name}.tokens with extra keys that are known")
        return tokens


def _config_of(arrays: Arrays) -> dict[str, Any]:
    """The configuration in a snapshot, which may hold anything."""
    given = arrays.get("config")
    if given is None or given.dtype != np.uint8 or given.ndim != 1:
        raise CacheSnapshotError("snapshot: expected its configuration")
    try:
        found = json.loads(given.tobytes())
    except (ValueError, RecursionError) as error:
        raise CacheSnapshotError("snapshot: expected its configuration in JSON") from error
    if not isinstance(found, dict):
        raise CacheSnapshotError("snapshot: expected its configuration")
    return found


def _require_same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """CacheSnapshotError unless a snapshot of a cache with the configuration ``found`` has the same layout."""
    differing = [name for name in _SAME if found.get(name) != expected.get(name)]
    if differing:
        wanted, got = (
            ", ".join(f"{name} {fields.get(name)!r:.80}" for name in differing) for fields in (expected, found)
        )
        raise CacheSnapshotError(f"snapshot: expected one of a cache with {wanted}, got one with {got}")
    there, here = (_groups_of(fields, expected["num_layers"]) for fields in (found, expected))
    if there != here:
        wanted, got = _difference(here, there)
        raise CacheSnapshotError(f"snapshot: expected one of a cache with {wanted}, got one with {got}")


class _Kept(NamedTuple):
    """What a group of layers keeps."""

    layers: tuple[int, ...]
    seen: str
    """What its layers see: all tokens, a window or chunks, in words."""
    formats: tuple[Any, Any]
    """Formats of the warm and the cold tier; None where there is no such tier."""


def _difference(here: list[_Kept], there: list[_Kept]) -> tuple[str, str]:
    """What the groups of this cache, and of the cache of a snapshot, have first that the others have not."""
    if len(here) != len(there):
        return f"{len(here)} group{'s' * (len(here) > 1)} of layers", str(len(there))
    i = next(i for i, (mine, other) in enumerate(zip(here, there, strict=True)) if mine != other)
    mine, other = here[i], there[i]
    if sorted(there, key=lambda group: group.layers) == sorted(here, key=lambda group: group.layers):
        return "layer_groups in the same order", f"layer_groups[{there.index(mine)}] where here is layer_groups[{i}]"
    if mine.layers != other.layers:
        layer = min(set(mine.layers) ^ set(other.layers))
        ours, theirs = (next(j for j, one in enumerate(all_) if layer in one.layers) for all_ in (here, there))
        return f"layer {layer} in layer_groups[{ours}]", f"it in layer_groups[{theirs}]"
    if mine.seen != other.seen:
        return f"{mine.seen} in layer_groups[{i}]", other.seen
    where = f" in layer_groups[{i}]" if len(here) > 1 else ""
    wanted, got = (f"tiers of {one.formats[0]!r:.20} and {one.formats[1]!r:.20}" for one in (mine, other))
    return f"{wanted} (warm and cold){where}", got


def _groups_of(config: dict[str, Any], num_layers: int) -> list[_Kept]:
    """What each group keeps."""
    given, tiers = config.get("layer_groups"), config.get("tiers") or {}
    if not isinstance(tiers, dict):
        raise CacheSnapshotError(f"snapshot: expected tiers in its configuration, got {tiers!r:.80}")
    try:
        groups = parse_groups([{"layers": list(range(num_layers))}] if given is None else given, num_layers)
    except (ConfigError, RecursionError) as error:
        raise CacheSnapshotError(f"snapshot: expected layer_groups in its configuration, got: {error}") from error
    own = [group.tiers or ({} if group.span else tiers) for group in groups]
    return [
        _Kept(group.layers, str(group), (one.get("warm"), one.get("cold")))
        for group, one in zip(groups, own, strict=True)
    ]


def _named_texts(name: str, names: Names) -> dict[str, NDArray[Any]]:
    texts, numbers = list(names.numbers), list(names.numbers.values())
    return {
        f"{name}.numbers": np.array(numbers, np.int64),
        f"{name}.ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
        f"{name}.text": _as_bytes(b"".join(texts)),
    }


def _as_bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
