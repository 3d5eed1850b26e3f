"""What a snapshot has of one group of layers: index nodes, entries of rows, keys and values, copies in host memory.

The names of arrays begin with a prefix, which is empty for the first group, so a cache with one group has the plain
names.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int64Array
from kvtoolkit.cache.state.block_table import CAPACITY, LENGTH, NUM_ENTRIES, STATE, first_held, touch_all
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.host_copies import Copy, copy_tiers, sizes_of
from kvtoolkit.cache.state.prefix_index import CLOCK, NEXT_UID, NUM_POOLS, ROOT, ROOT_UID, pools_of
from kvtoolkit.cache.storage.storage import Contents, split_by_tier
from kvtoolkit.config.tiers import POOL_NAMES, firsts_of
from kvtoolkit.errors import CacheSnapshotError
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, MAX_GRANULES

_NODE_FIELDS = ("uid", "parent_uid", "tokens", "last_used", "parent", "granule", "depth", "num_uses")
_MOST = np.int64(1) << 62

Arrays = dict[str, NDArray[Any]]


def prefix_of(index: int) -> str:
    """What the names of a group's arrays begin with."""
    return f"group{index}." if index else ""


def pack_group(group: CacheGroup, rows: Int64Array, copies: dict[int, Copy]) -> Arrays:
    """The arrays of a group; ``copies`` are those of its preempted rows, by their numbers."""
    table, blocks = group.table, group.blocks
    held = np.flatnonzero((blocks.granules.refs > 0) | (blocks.granules.node >= 0))
    used = np.flatnonzero(blocks.nodes.uid)
    width = int(table.info[rows, NUM_ENTRIES].max(initial=0))
    places = {number: i for i, number in enumerate(copies)}
    numbers = blocks.granules.copy[held].tolist()
    arrays = {
        "counters": np.array(list(vars(group.counters).values()), np.int64),
        "pool_granules": np.array(group.config.pool_granules, np.int64),
        "info": table.info[rows][:, [STATE, LENGTH, NUM_ENTRIES]],
        "entries": table.entries[rows, :width],
        "masses": table.masses[rows],
        "node": used,
        **{f"node.{name}": getattr(blocks.nodes, name)[used] for name in _NODE_FIELDS},
        "clocks": blocks.nodes.counts[[NEXT_UID, CLOCK]],
        "held": held,
        **_named("contents", group.storage.read(held)),
        "callers": np.flatnonzero(blocks.ledger.callers),
        **blocks.ledger.snapshots(),
        "held.copies": np.array([places.get(number, -1) for number in numbers], np.int64),
        "copies.tiers": np.array([copy.tier for copy in copies.values()], np.int8),
        **_named("copies", group.copies.contents_of(list(copies.values()))),
    }
    if group.layers.span:
        arrays["firsts"] = np.array([first_held(table, row) for row in rows], np.int64)
    return arrays


def _named(name: str, contents: Contents) -> Arrays:
    return {f"{name}.{field}": array for field, array in contents._asdict().items()}


class GroupReader:
    """Checks what a snapshot has of a group, and writes it into a fresh cache.

    Args:
        group: of the fresh cache.
        arrays: all of the snapshot.
        index: of the group in the state.
        is_another_pool: whether the snapshot's allocators are configured in another way.

    Attributes:
        renumbered: the node here for each node of the snapshot, or -1.
    """

    def __init__(self, group: CacheGroup, arrays: Arrays, index: int, is_another_pool: bool) -> None:
        self.group = group
        self.renumbered: Int64Array = np.empty(0, np.int64)
        self._arrays, self._prefix = arrays, prefix_of(index)
        self._copies: list[Copy] = []
        there = self.vector("pool_granules", "int64", NUM_POOLS)
        self.within("pool_granules", there, 0, 1 << 25)
        self._first = np.array(firsts_of(there.tolist()))
        self._shift = np.array(group.config.pool_firsts) - self._first
        self._num_hot, self._num_granules = int(there[0]), int(there.sum())
        self._is_another_pool = is_another_pool or there.tolist() != list(group.config.pool_granules)

    def has(self, name: str) -> bool:
        """Whether there is an array of this name."""
        return self._prefix + name in self._arrays

    def array(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """The array of this name; CacheSnapshotError unless it has this dtype and shape (None: any extent)."""
        name = self._prefix + name
        array = self._arrays.get(name)
        if array is None:
            raise CacheSnapshotError(f"snapshot: expected an array {name!r}, got none")
        fits = array.ndim == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
        if array.dtype != dtype or not fits:
            raise CacheSnapshotError(
                f"snapshot: expected {name} of {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}"
            )
        return array

    def vector(self, name: str, dtype: str, length: int | None) -> NDArray[Any]:
        """The vector of this name, with this length unless it is None."""
        return self.array(name, dtype, (length,))

    @staticmethod
    def within(name: str, values: NDArray[Any], low: int, end: int) -> None:
        """CacheSnapshotError unless all values are in ``[low, end)``."""
        if values.size and not (int(values.min()) >= low and int(values.max()) < end):
            raise CacheSnapshotError(
                f"snapshot: expected {name} of {low} to {end - 1}, got {values.min()} to {values.max()}"
            )

    def distinct(self, name: str, length: int | None, end: int) -> Int64Array:
        """A vector of ascending numbers below ``end``, or CacheSnapshotError."""
        values = self.vector(name, "int64", length)
        self.within(name, values, 0, end)
        if (np.diff(values) <= 0).any():
            raise CacheSnapshotError(f"snapshot: expected ascending {name}")
        return values

    def _granules(self, name: str, values: NDArray[Any]) -> Int64Array:
        """Granules of the snapshot as granules here; CacheSnapshotError if the pool here has no such granule."""
        values = values.astype(np.int64)
        self.within(name, values, 0, self._num_granules)
        pools = pools_of(self._first, values)
        offsets = values - self._first[pools]
        sizes = np.array(self.group.config.pool_granules)
        if (offsets >= sizes[pools]).any():
            pool = int(pools[np.argmax(offsets >= sizes[pools])])
            raise CacheSnapshotError(
                f"snapshot: expected a pool with granule {int(offsets[pools == pool].max())} of the {POOL_NAMES[pool]} "
                f"tier, which is in use, got one of {sizes[pool]}"
            )
        here: Int64Array = values + self._shift[pools]
        return here

    def read_nodes(self) -> None:
        """Fill in the index."""
        nodes = self.group.blocks.nodes
        there = self.distinct("node", None, 1 << 25)
        count = len(there)
        renumbered = np.full(int(there[-1]) + 2 if count else 1, -1, np.int64)
        renumbered[there] = np.arange(count)
        clocks = self.vector("clocks", "int64", 2)
        self.within("clocks", clocks, 0, int(_MOST))
        read = {
            name: self.array(f"node.{name}", str(field.dtype), (count, *field.shape[1:]))
            for name, field in nodes._asdict().items()
            if name in _NODE_FIELDS
        }
        self.within("node.uid", read["uid"], ROOT_UID + 1, int(clocks[0]))
        if len(np.unique(read["uid"])) != count:
            raise CacheSnapshotError("snapshot: expected nodes with different uids")
        self.within("node.depth", read["depth"], 0, 1 << 25)
        parents = read["parent"]
        self.within("node.parent", parents, ROOT, len(renumbered) - 1)
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
        self.renumbered = renumbered

    def read_entries(self, which: Int64Array) -> None:
        """Fill in states, lengths and entries of the rows ``which``; `integrity` will see whether they are right."""
        table, count = self.group.table, len(which)
        info = self.array("info", "int64", (count, 3))
        entries = self.array("entries", "int32", (count, None))
        span, most = self.group.layers.span, self.group.blocks.num_granules
        self.within("lengths", info[:, 1], 0, 8 * (MAX_GRANULES if span else most) + 1)
        self.within("numbers of entries", info[:, 2], 0, entries.shape[1] + 1)
        width = int(info[:, 2].max(initial=0))
        if width > table.entries.shape[1]:
            raise CacheSnapshotError(
                f"snapshot: expected max_entries of at least {width}, got {table.entries.shape[1]}"
            )
        is_used = np.arange(width) < info[:, 2:3]
        named = entries[:, :width][is_used]
        self.within("entries", named, 0, 1 << 30)
        granules = self._granules("entries", named & 0xFFFFFF)
        lengths = ((named >> 24) & 7) + 1
        self._granules("entries", (named & 0xFFFFFF) + lengths - 1)
        here = np.full((count, width), -1, np.int32)
        here[is_used] = (named & ~np.int32(0xFFFFFF)) | granules.astype(np.int32)
        starts = np.full((count, width), -1, np.int32)
        sizes = np.zeros((count, width), np.int64)
        sizes[is_used] = lengths
        firsts = self.vector("firsts", "int64", count) if span else np.zeros(count, np.int64)
        self.within("firsts", firsts, 0, MAX_GRANULES + 1)
        starts[is_used] = (firsts[:, None] + np.cumsum(sizes, axis=1) - sizes)[is_used]
        table.info[which, STATE], table.info[which, LENGTH] = info[:, 0], info[:, 1]
        table.info[which, NUM_ENTRIES], table.info[which, CAPACITY] = info[:, 2], firsts + sizes.sum(axis=1)
        table.entries[which, :width], table.starts[which, :width] = here, starts
        masses = self.array("masses", "float32", (count, None))
        tiles = min(masses.shape[1], table.masses.shape[1])
        table.masses[which, :tiles] = np.nan_to_num(masses[:, :tiles], posinf=0, neginf=0)
        touch_all(table, which.astype(np.int32))

    def read_copies(self) -> None:
        """Make all copies in host memory. Those that no preempted sequence refers to are freed with the unpacker."""
        tiers = self.vector("copies.tiers", "int8", None)
        self.within("copies.tiers", tiers, 0, 3)
        if (np.array(self.group.config.tier_granules)[tiers] == 0).any():
            raise CacheSnapshotError("snapshot: expected copies of tiers that exist")
        num_hot, num_warm, num_cold = np.bincount(tiers, minlength=3).tolist()
        self._copies = self.group.copies.make(tiers, self._contents("copies", num_hot, (num_warm, num_cold)))

    def copies_of(self, name: str, length: int, first: int) -> tuple[Copy, ...]:
        """The copies that have the tokens of a preempted sequence, from granule ``first`` on.

        Quantized ones must be full tiles of 64 tokens.
        """
        places = self.vector(f"{name}.copies", "int64", None)
        self.within(f"{name}.copies", places, 0, len(self._copies))
        if len(np.unique(places)) != len(places):
            raise CacheSnapshotError(f"snapshot: expected {name} to hold different copies")
        copies = tuple(self._copies[place] for place in places.tolist())
        tiers = copy_tiers(copies)
        sizes = sizes_of([copy.tier for copy in copies])
        quantized = (np.cumsum(sizes) - sizes)[sizes > 1]
        needed = -(-length // 8) - first
        if len(tiers) != needed:
            raise CacheSnapshotError(f"snapshot: expected {name} to hold {needed} granules, got {len(tiers)}")
        if (quantized % MAX_BLOCK_GRANULES).any() or (8 * quantized + 64 > length).any():
            raise CacheSnapshotError(f"snapshot: expected {name} in whole tiles")
        return copies

    def _contents(self, name: str, num_hot: int, num_blocks: tuple[int, int]) -> Contents:
        """The contents of this many hot granules, and of this many warm and cold blocks."""
        storage = self.group.storage
        hot = storage.key_values.shape
        key_values = self.array(f"{name}.key_values", str(storage.key_values.dtype), (*hot[:2], num_hot, *hot[3:]))
        blocks = []
        for tier, arena, count in zip(("warm", "cold"), (storage.warm, storage.cold), num_blocks, strict=True):
            shape = (0,) if arena is None else (arena.shape[0], count, *arena.shape[2:])
            blocks.append(self.array(f"{name}.{tier}", "uint8", shape))
        return Contents(key_values, *blocks)

    def read_contents(self) -> None:
        """Read the keys and values of all that rows and index hold."""
        blocks = self.group.blocks
        there = self.distinct("held", None, self._num_granules)
        held = self._granules("held", there)
        owned = np.flatnonzero((blocks.granules.refs > 0) | (blocks.granules.node >= 0))
        if not np.array_equal(held, owned):
            raise CacheSnapshotError("snapshot: expected the contents of exactly the granules in use")
        hot, warm, cold = split_by_tier(held, self.group.config.first_granules)  # a part of a block may be held
        self.group.storage.write(held, self._contents("contents", len(hot), (len(warm), len(cold))))
        places = self.vector("held.copies", "int64", len(held))
        self.within("held.copies", places, -1, len(self._copies))
        numbers = np.array([0, *(copy.number for copy in self._copies)], np.int64)
        blocks.granules.copy[held] = numbers[places + 1]

    def grant(self) -> None:
        """Bring the allocators to the state in which everything that is held, callers' blocks included, is granted."""
        blocks, ledger = self.group.blocks, self.group.blocks.ledger
        there = self.distinct("callers", None, self._num_hot)
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
        size = len(self._prefix)
        own = {name[size:]: array for name, array in self._arrays.items() if name.startswith(self._prefix)}
        ledger.resume(owned, own)
        blocks.replenish()

    def read_counters(self) -> None:
        """Go on counting from what the snapshot has counted."""
        counters = self.group.counters
        names = list(vars(counters))
        values = self.vector("counters", "int64", len(names))
        self.within("counters", values, 0, int(_MOST))
        vars(counters).update(zip(names, values.tolist(), strict=True))
        if counters.reused_tokens > counters.prompt_tokens:
            raise CacheSnapshotError("snapshot: expected no more reused tokens than prompts have")
