"""A whole cache as bytes and back.

A snapshot holds what cannot be derived: the configuration, rows that are not closed, index nodes in use, salts and
extra keys, the keys and values of all granules that rows or the index hold, and what is kept of preempted sequences.
Everything else is rebuilt, including what the allocators have granted. So a cache may resume with another allocator,
pool size, eviction or growth policy, backend or number of sequences, as long as all that it holds has a place there.

The bytes are not trusted: every number is checked before it is used as an index.
"""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators import AllocatorError, IntegrityError
from kvtoolkit.arrays.types import Int64Array
from kvtoolkit.cache import integrity
from kvtoolkit.cache.array_file import pack_arrays, unpack_arrays
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    CHAIN_UID,
    CLOSED,
    GENERATION,
    ID_BITS,
    IN_STEP,
    LENGTH,
    NUM_ENTRIES,
    OPEN,
    PINNED,
    PREEMPTED,
    ROOT_OF,
    STATE,
    touch_all,
)
from kvtoolkit.cache.state.cache_state import CacheState, Preempted
from kvtoolkit.cache.state.host_copies import Copy, copy_tiers, sizes_of
from kvtoolkit.cache.state.identity import Names
from kvtoolkit.cache.state.prefix_index import BROKEN, CLOCK, EXTRA, NEXT_UID, NO_EXTRA, ROOT, ROOT_UID, reindex
from kvtoolkit.cache.state.repair import count_refs
from kvtoolkit.cache.state.twins import find_twins
from kvtoolkit.cache.storage.storage import Contents, split_by_tier
from kvtoolkit.config.tiers import TIER_NAMES
from kvtoolkit.errors import CacheSnapshotError, StepError, UnsupportedError
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES

_SAME = ("num_layers", "num_kv_heads", "head_dim", "dtype")
"""Fields of the configuration that decide the layout of keys and values; the formats of tiers do, too."""
_NODE_FIELDS = ("uid", "parent_uid", "tokens", "last_used", "parent", "granule", "depth", "num_uses")
_MOST = np.int64(1) << 62


def pack(state: CacheState) -> bytes:
    """See `KVCache.snapshot`; the caller holds the lock."""
    if state.config.is_grouped:
        raise UnsupportedError("snapshot: expected a cache without layer_groups, because snapshots know one group only")
    table, blocks = state.group.table, state.group.blocks
    for held_by, name in ((IN_STEP, "step"), (PINNED, "lease")):
        if np.any(table.info[:, STATE] == held_by):
            raise StepError(f"snapshot: expected no open {name}; end it first")
    state.identities.forget_unused(at_once=True)
    held = np.flatnonzero((blocks.granules.refs > 0) | (blocks.granules.node >= 0))
    rows = np.flatnonzero(table.info[:, STATE] != CLOSED)
    used = np.flatnonzero(blocks.nodes.uid)
    width = int(table.info[rows, NUM_ENTRIES].max(initial=0))
    arrays: dict[str, NDArray[Any]] = {
        "config": _as_bytes(json.dumps(state.config.to_dict(), sort_keys=True).encode()),
        "counters": np.array(list(vars(state.counters).values()), np.int64),
        "tier_granules": np.array(state.config.tier_granules, np.int64),
        "generations": np.trim_zeros(table.info[:, GENERATION], "b"),
        "rows": rows,
        "info": table.info[rows][:, [STATE, LENGTH, NUM_ENTRIES]],
        "entries": table.entries[rows, :width],
        "chain": table.chain[rows],
        "origin": table.origin[rows],
        "extras": state.identities.extras[: state.identities.num_extras],
        **_named_texts("salts", state.identities.salts),
        **_named_texts("keys", state.identities.keys),
        "pending": table.pending[rows],
        "masses": table.masses[rows],
        "node": used,
        **{f"node.{name}": getattr(blocks.nodes, name)[used] for name in _NODE_FIELDS},
        "clocks": blocks.nodes.counts[[NEXT_UID, CLOCK]],
        "held": held,
        **_named("contents", state.group.storage.read(held)),
        "callers": np.flatnonzero(blocks.ledger.callers),
        **blocks.ledger.snapshots(),
    }
    return pack_arrays(arrays | _pack_preempted(state, held))


def _pack_preempted(state: CacheState, held: Int64Array) -> dict[str, NDArray[Any]]:
    """What is kept of preempted sequences. Copies are numbered from 0."""
    arrays: dict[str, NDArray[Any]] = {}
    saved_copies = [saved.copies or () for saved in state.preempted.values()]
    copies = {copy.number: copy for listed in saved_copies for copy in listed}
    places = {number: i for i, number in enumerate(copies)}
    for row, saved in state.preempted.items():
        arrays[f"preempted.{row}.nodes"] = np.stack([saved.nodes.astype(np.int64), saved.uids], axis=1)
        if saved.copies is not None:
            arrays[f"preempted.{row}.copies"] = np.array([places[copy.number] for copy in saved.copies], np.int64)
            is_findable = state.group.table.chain[row] != BROKEN  # otherwise its prefixes were cleared
            arrays[f"preempted.{row}.tokens"] = saved.tokens if is_findable else saved.tokens[:0]
    numbers = state.group.blocks.granules.copy[held].tolist()
    arrays["held.copies"] = np.array([places.get(number, -1) for number in numbers], np.int64)
    arrays["copies.tiers"] = np.array([copy.tier for copy in copies.values()], np.int8)
    return arrays | _named("copies", state.group.copies.contents_of(list(copies.values())))


def unpack(state: CacheState, data: bytes) -> None:
    """Fill a fresh cache from a snapshot; after an error the cache cannot be used."""
    if state.config.is_grouped:
        raise UnsupportedError("config: expected none with layer_groups, because snapshots know one group only")
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

    def __init__(self, state: CacheState, arrays: dict[str, NDArray[Any]]) -> None:
        self._state = state
        self._arrays = arrays
        self._first = np.zeros(3, np.int64)  # first granule of each tier in the snapshot; its distance to here
        self._shift = np.zeros(3, np.int64)
        self._copies: list[Copy] = []

    def run(self) -> None:
        """Read everything."""
        state, blocks = self._state, self._state.group.blocks
        self._check_config()
        renumbered = self._read_nodes()
        self._read_identities()
        self._read_rows(renumbered)
        self._read_preempted(renumbered)
        integrity.require_well_formed(state.group.table, blocks)
        count_refs(state.group.table, blocks.granules)
        reindex(blocks.nodes, blocks.granules)
        integrity.require_rows(state.group.table, blocks)
        integrity.require_index(blocks)
        self._read_contents()
        rows = np.flatnonzero(state.group.table.info[:, STATE] != CLOSED).astype(np.int32)
        find_twins(state.group.table, rows, blocks.holdings)
        self._grant()
        states = state.group.table.info[:, STATE]
        state.closed_rows = np.flatnonzero(states == CLOSED)[::-1].tolist()
        names = list(vars(state.counters))
        counters = self._vector("counters", "int64", len(names))
        self._within("counters", counters, 0, int(_MOST))
        vars(state.counters).update(zip(names, counters.tolist(), strict=True))
        if state.counters.reused_tokens > state.counters.prompt_tokens:
            raise CacheSnapshotError("snapshot: expected no more reused tokens than prompts have")
        blocks.replenish()
        integrity.check(state)

    # -- arrays ------------------------------------------------------------------------------------------------------

    def _array(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """The array of this name; CacheSnapshotError unless it has this dtype and shape (None: any extent)."""
        array = self._arrays.get(name)
        if array is None:
            raise CacheSnapshotError(f"snapshot: expected an array {name!r}, got none")
        fits = array.ndim == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
        if array.dtype != dtype or not fits:
            raise CacheSnapshotError(
                f"snapshot: expected {name} of {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}"
            )
        return array

    def _vector(self, name: str, dtype: str, length: int | None) -> NDArray[Any]:
        return self._array(name, dtype, (length,))

    @staticmethod
    def _within(name: str, values: NDArray[Any], low: int, end: int) -> None:
        """CacheSnapshotError unless all values are in ``[low, end)``."""
        if values.size and not (int(values.min()) >= low and int(values.max()) < end):
            raise CacheSnapshotError(
                f"snapshot: expected {name} of {low} to {end - 1}, got {values.min()} to {values.max()}"
            )

    def _distinct(self, name: str, length: int | None, end: int) -> Int64Array:
        """A vector of ascending numbers below ``end``, or CacheSnapshotError."""
        values = self._vector(name, "int64", length)
        self._within(name, values, 0, end)
        if (np.diff(values) <= 0).any():
            raise CacheSnapshotError(f"snapshot: expected ascending {name}")
        return values

    # -- its parts ---------------------------------------------------------------------------------------------------

    def _check_config(self) -> None:
        config = self._state.config
        try:
            found = json.loads(self._vector("config", "uint8", None).tobytes())
        except (ValueError, RecursionError) as error:
            raise CacheSnapshotError("snapshot: expected its configuration in JSON") from error
        if not isinstance(found, dict):
            raise CacheSnapshotError("snapshot: expected its configuration")
        expected = config.to_dict()
        differing = [name for name in _SAME if found.get(name) != expected.get(name)]
        tiers = found.get("tiers") or {}
        formats = config.tiers or {}
        if not isinstance(tiers, dict) or any(tiers.get(name) != formats.get(name) for name in ("warm", "cold")):
            differing.append("tiers")
        if differing:
            wanted, got = (
                ", ".join(f"{name} {fields.get(name)!r:.80}" for name in differing) for fields in (expected, found)
            )
            raise CacheSnapshotError(f"snapshot: expected one of a cache with {wanted}, got one with {got}")
        there = self._vector("tier_granules", "int64", 3)
        self._within("tier_granules", there, 0, 1 << 25)
        self._first = np.array([0, there[0], there[0] + there[1]])
        self._shift = np.array(config.first_granules) - self._first
        self._ends = self._first + there
        fields = ("allocator", "allocator_options", "block_sizes")
        self._is_another_pool = any(found.get(name) != expected.get(name) for name in fields) or (
            there.tolist() != list(config.tier_granules)
        )

    def _granules(self, name: str, values: NDArray[Any]) -> Int64Array:
        """Granules of the snapshot as granules here; CacheSnapshotError if the pool here has no such granule."""
        values = values.astype(np.int64)
        self._within(name, values, 0, int(self._ends[2]))
        tiers = np.searchsorted(self._first[1:], values, side="right")
        offsets = values - self._first[tiers]
        sizes = np.array(self._state.config.tier_granules)
        if (offsets >= sizes[tiers]).any():
            tier = int(tiers[np.argmax(offsets >= sizes[tiers])])
            raise CacheSnapshotError(
                f"snapshot: expected a pool with granule {int(offsets[tiers == tier].max())} of the {TIER_NAMES[tier]} "
                f"tier, which is in use, got one of {sizes[tier]}"
            )
        here: Int64Array = values + self._shift[tiers]
        return here

    def _read_nodes(self) -> Int64Array:
        """Fill in the index; returns the node here for each node of the snapshot, or -1."""
        nodes = self._state.group.blocks.nodes
        there = self._distinct("node", None, 1 << 25)
        count = len(there)
        renumbered = np.full(int(there[-1]) + 2 if count else 1, -1, np.int64)
        renumbered[there] = np.arange(count)
        clocks = self._vector("clocks", "int64", 2)
        self._within("clocks", clocks, 0, int(_MOST))
        read = {
            name: self._array(f"node.{name}", str(field.dtype), (count, *field.shape[1:]))
            for name, field in nodes._asdict().items()
            if name in _NODE_FIELDS
        }
        self._within("node.uid", read["uid"], ROOT_UID + 1, int(clocks[0]))
        if len(np.unique(read["uid"])) != count:
            raise CacheSnapshotError("snapshot: expected nodes with different uids")
        self._within("node.depth", read["depth"], 0, 1 << 25)
        parents = read["parent"]
        self._within("node.parent", parents, ROOT, len(renumbered) - 1)
        granules = self._granules("node.granule", read["granule"])
        if len(np.unique(granules)) != count:
            raise CacheSnapshotError("snapshot: expected every node to have a granule of its own")
        for name in _NODE_FIELDS:
            getattr(nodes, name)[:count] = read[name]
        nodes.parent[:count] = np.where(parents < 0, ROOT, renumbered[parents])
        if ((parents >= 0) & (nodes.parent[:count] < 0)).any():
            raise CacheSnapshotError("snapshot: expected every node's parent to be there")
        nodes.granule[:count] = granules
        nodes.counts[[NEXT_UID, CLOCK]] = clocks
        return renumbered

    def _read_identities(self) -> None:
        """Fill in the salts and extra keys. `integrity.check` will see whether rows and nodes fit them."""
        identities = self._state.identities
        for name, names in (("salts", identities.salts), ("keys", identities.keys)):
            numbers = self._vector(f"{name}.numbers", "int64", None)
            self._within(f"{name}.numbers", numbers, ROOT_UID + 1, int(self._state.group.blocks.nodes.counts[NEXT_UID]))
            ends = self._vector(f"{name}.ends", "int64", len(numbers))
            text = self._vector(f"{name}.text", "uint8", int(ends[-1]) if len(ends) else 0).tobytes()
            begins = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
            if (begins >= ends).any():
                raise CacheSnapshotError(f"snapshot: expected {name} that are not empty")
            pairs = zip(begins.tolist(), ends.tolist(), numbers.tolist(), strict=True)
            names.numbers = {text[begin:end]: number for begin, end, number in pairs}
            if len(names.numbers) != len(numbers):
                raise CacheSnapshotError(f"snapshot: expected different {name}")
        identities.extras = self._array("extras", "int64", (None, 2)).copy()
        identities.num_extras = len(identities.extras)
        self._within("extras", identities.extras[:, 0], 0, 1 << 25)

    def _chains(self, name: str, pairs: NDArray[Any], roots: Any, renumbered: Int64Array) -> Int64Array:
        """``[n, 2]`` node here (BROKEN if it is gone) and uid; ``roots`` has the root of each row."""
        nodes, uids = self._state.group.blocks.nodes, pairs[:, 1]
        self._within(name, pairs[:, 0], BROKEN, 1 << 25)
        known = (pairs[:, 0] >= 0) & (pairs[:, 0] < len(renumbered))
        here = np.where(known, renumbered[np.where(known, pairs[:, 0], 0)], BROKEN)
        here = np.where((here >= 0) & (nodes.uid[here] == uids), here, BROKEN)
        is_root = (pairs[:, 0] == ROOT) & (uids == roots)
        return np.stack([np.where(is_root, ROOT, here), uids], axis=1)

    def _read_rows(self, renumbered: Int64Array) -> None:
        state, table = self._state, self._state.group.table
        generations = self._vector("generations", "int64", None)
        if len(generations) > len(table.info):
            # a smaller table would give out the ids of the missing rows again
            raise CacheSnapshotError(
                f"snapshot: expected max_seqs of at least {len(generations)}, got {len(table.info)}"
            )
        self._within("generations", generations, 0, 1 << (62 - ID_BITS))
        which = self._distinct("rows", None, len(table.info))
        count = len(which)
        info = self._array("info", "int64", (count, 3))
        entries = self._array("entries", "int32", (count, None))
        if not np.isin(info[:, 0], (OPEN, PREEMPTED)).all():
            raise CacheSnapshotError("snapshot: expected rows that are open or preempted")
        self._within("lengths", info[:, 1], 0, 8 * state.group.blocks.num_granules + 1)
        self._within("numbers of entries", info[:, 2], 0, entries.shape[1] + 1)
        width = int(info[:, 2].max(initial=0))
        if width > table.entries.shape[1]:
            raise CacheSnapshotError(
                f"snapshot: expected max_entries of at least {width}, got {table.entries.shape[1]}"
            )
        is_used = np.arange(width) < info[:, 2:3]
        named = entries[:, :width][is_used]
        self._within("entries", named, 0, 1 << 30)
        granules = self._granules("entries", named & 0xFFFFFF)
        lengths = ((named >> 24) & 7) + 1
        self._granules("entries", (named & 0xFFFFFF) + lengths - 1)
        here = np.full((count, width), -1, np.int32)
        here[is_used] = (named & ~np.int32(0xFFFFFF)) | granules.astype(np.int32)
        starts = np.full((count, width), -1, np.int32)
        sizes = np.zeros((count, width), np.int64)
        sizes[is_used] = lengths
        starts[is_used] = (np.cumsum(sizes, axis=1) - sizes)[is_used]
        table.info[: len(generations), GENERATION] = generations
        if count and (table.info[which, GENERATION] == 0).any():
            raise CacheSnapshotError("snapshot: expected rows whose ids exist")
        table.info[which, STATE], table.info[which, LENGTH] = info[:, 0], info[:, 1]
        table.info[which, NUM_ENTRIES], table.info[which, CAPACITY] = info[:, 2], sizes.sum(axis=1)
        table.entries[which, :width], table.starts[which, :width] = here, starts
        table.origin[which] = self._array("origin", "int64", (count, 4))
        uids, roots = table.origin[which][:, [CHAIN_UID, ROOT_OF]].T
        pairs = np.stack([self._vector("chain", "int32", count), uids], axis=1)
        chains = self._chains("chain", pairs, roots, renumbered)
        dropped = (info[:, 0] == PREEMPTED) & (info[:, 1] == 0)
        chains[dropped, 0], chains[dropped, 1] = ROOT, roots[dropped]
        in_index = chains[:, 0] >= 0
        depths = state.group.blocks.nodes.depth[chains[in_index, 0]] + 1
        if (depths != info[in_index, 1] // 8).any():
            raise CacheSnapshotError("snapshot: expected chains as long as their rows")
        table.chain[which], table.origin[which, CHAIN_UID] = chains[:, 0], chains[:, 1]
        table.pending[which] = self._array("pending", "int64", (count, 8))
        masses = self._array("masses", "float32", (count, None))
        tiles = min(masses.shape[1], table.masses.shape[1])
        table.masses[which, :tiles] = np.nan_to_num(masses[:, :tiles], posinf=0, neginf=0)
        touch_all(table, which.astype(np.int32))

    def _read_preempted(self, renumbered: Int64Array) -> None:
        state, table = self._state, self._state.group.table
        self._read_copies()
        for row in np.flatnonzero(table.info[:, STATE] == PREEMPTED).tolist():
            name, length = f"preempted.{row}", int(table.info[row, LENGTH])
            root_uid = table.origin[row, ROOT_OF]
            chain = self._chains(name, self._array(f"{name}.nodes", "int64", (None, 2)), root_uid, renumbered)
            nodes, uids = chain[:, 0], chain[:, 1]
            gone = np.flatnonzero(nodes < 0)
            nodes = nodes[: gone[0]] if len(gone) else nodes
            index = state.group.blocks.nodes
            parents = np.concatenate([np.full(1, ROOT), nodes])[:-1]
            if (index.parent[nodes] != parents).any() or (index.parent_uid[nodes[:1]] != root_uid).any():
                raise CacheSnapshotError(f"snapshot: expected nodes of {name} that follow each other from its root")
            saved = Preempted(nodes.astype(np.int32), uids[: len(nodes)].copy(), None, np.empty((0, 9), np.int64))
            if f"{name}.copies" in self._arrays:
                saved.copies = self._copies_of(name, length)
                saved.tokens = self._array(f"{name}.tokens", "int64", (None, 9)).copy()
                if len(saved.tokens) not in (0, length // 8):
                    raise CacheSnapshotError(f"snapshot: expected {name}.tokens of all full granules or of none")
                known = np.array([NO_EXTRA, *state.identities.keys.numbers.values()], np.int64)
                if not np.isin(saved.tokens[:, EXTRA], known).all():
                    raise CacheSnapshotError(f"snapshot: expected {name}.tokens with extra keys that are known")
                if len(saved.tokens):  # its tokens are published again when it comes back
                    table.chain[row], table.origin[row, CHAIN_UID] = ROOT, root_uid
            elif length:
                raise CacheSnapshotError(f"snapshot: expected the contents of {name}, got none")
            state.preempted[row] = saved

    def _read_copies(self) -> None:
        """Make all copies in host memory. Those that no preempted sequence refers to are freed with the unpacker."""
        state = self._state
        tiers = self._vector("copies.tiers", "int8", None)
        self._within("copies.tiers", tiers, 0, 3)
        if (np.array(state.config.tier_granules)[tiers] == 0).any():
            raise CacheSnapshotError("snapshot: expected copies of tiers that exist")
        num_hot, num_warm, num_cold = np.bincount(tiers, minlength=3).tolist()
        self._copies = state.group.copies.make(tiers, self._contents("copies", num_hot, (num_warm, num_cold)))

    def _copies_of(self, name: str, length: int) -> tuple[Copy, ...]:
        """The copies that have the tokens of a preempted sequence. Quantized ones must be full tiles of 64 tokens."""
        places = self._vector(f"{name}.copies", "int64", None)
        self._within(f"{name}.copies", places, 0, len(self._copies))
        if len(np.unique(places)) != len(places):
            raise CacheSnapshotError(f"snapshot: expected {name} to hold different copies")
        copies = tuple(self._copies[place] for place in places.tolist())
        tiers = copy_tiers(copies)
        sizes = sizes_of([copy.tier for copy in copies])
        quantized = (np.cumsum(sizes) - sizes)[sizes > 1]
        if len(tiers) != -(-length // 8):
            raise CacheSnapshotError(f"snapshot: expected {name} to hold {-(-length // 8)} granules, got {len(tiers)}")
        if (quantized % MAX_BLOCK_GRANULES).any() or (8 * quantized + 64 > length).any():
            raise CacheSnapshotError(f"snapshot: expected {name} in whole tiles")
        return copies

    def _contents(self, name: str, num_hot: int, num_blocks: tuple[int, int]) -> Contents:
        """The contents of this many hot granules, and of this many warm and cold blocks."""
        storage = self._state.group.storage
        hot = storage.key_values.shape
        key_values = self._array(f"{name}.key_values", str(storage.key_values.dtype), (*hot[:2], num_hot, *hot[3:]))
        blocks = []
        for tier, arena, count in zip(("warm", "cold"), (storage.warm, storage.cold), num_blocks, strict=True):
            shape = (0,) if arena is None else (arena.shape[0], count, *arena.shape[2:])
            blocks.append(self._array(f"{name}.{tier}", "uint8", shape))
        return Contents(key_values, *blocks)

    def _read_contents(self) -> None:
        blocks = self._state.group.blocks
        there = self._distinct("held", None, int(self._ends[2]))
        held = self._granules("held", there)
        owned = np.flatnonzero((blocks.granules.refs > 0) | (blocks.granules.node >= 0))
        if not np.array_equal(held, owned):
            raise CacheSnapshotError("snapshot: expected the contents of exactly the granules in use")
        hot, warm, cold = split_by_tier(held, self._state.config.first_granules)  # a part of a block may be held
        self._state.group.storage.write(held, self._contents("contents", len(hot), (len(warm), len(cold))))
        places = self._vector("held.copies", "int64", len(held))
        self._within("held.copies", places, -1, len(self._copies))
        numbers = np.array([0, *(copy.number for copy in self._copies)], np.int64)
        blocks.granules.copy[held] = numbers[places + 1]

    def _grant(self) -> None:
        """Bring the allocators to the state in which everything that is held, callers' blocks included, is granted."""
        blocks, ledger = self._state.group.blocks, self._state.group.blocks.ledger
        there = self._distinct("callers", None, int(self._ends[0]))
        callers = self._granules("callers", there)
        owned = (blocks.granules.refs > 0) | (blocks.granules.node >= 0)
        if owned[callers].any():
            raise CacheSnapshotError("snapshot: expected callers' blocks apart from those of the cache")
        if len(callers) and self._is_another_pool:
            raise CacheSnapshotError(
                f"snapshot: expected no blocks of callers to resume in another allocator or pool size, got "
                f"{len(callers)} granules"
            )
        blocks.reserve = []
        ledger.callers[callers] = True
        ledger.resume(owned, self._arrays)


def _named(name: str, contents: Contents) -> dict[str, NDArray[Any]]:
    return {f"{name}.{field}": array for field, array in contents._asdict().items()}


def _named_texts(name: str, names: Names) -> dict[str, NDArray[Any]]:
    texts, numbers = list(names.numbers), list(names.numbers.values())
    return {
        f"{name}.numbers": np.array(numbers, np.int64),
        f"{name}.ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
        f"{name}.text": _as_bytes(b"".join(texts)),
    }


def _as_bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
