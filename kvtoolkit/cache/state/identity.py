"""What identifies a prefix besides its tokens: salts (a tenant, an adapter) and extra keys (an image at a position).

Every salt has its own root in the prefix index. The extra keys of a granule have a number, which the granule's node
carries. Both numbers come from dictionaries whose keys are what callers gave, so different salts or keys never share a
number.

    a row's root is ROOT_UID or the number of a salt;  a node's EXTRA is NO_EXTRA or the number of extra keys
    numbers come from the counter that gives nodes their uids, so none is ever used twice

A number is forgotten some time after the last node and the last row that use it are gone. The dictionaries hold at most
1024 numbers, or twice as many as are in use.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.arguments import MAX_TOKENS
from kvtoolkit.cache.state.block_table import (
    CHAIN_UID,
    CLOSED,
    END_EXTRA,
    FIRST_EXTRA,
    IN_STEP,
    LENGTH,
    ROOT_OF,
    STATE,
    BlockTable,
)
from kvtoolkit.cache.state.prefix_index import BROKEN, EXTRA, NEXT_UID, NO_EXTRA, ROOT_UID, Holdings, Nodes, unpublish
from kvtoolkit.errors import ArgumentError

FEWEST = 1024
"""Number of names up to which none is forgotten."""

Extras = list[tuple[int, bytes]]
"""``(granule, text)`` of a prompt's extra keys, by granule. The text encodes the keys and their positions in it."""


class Names:
    """A number for every text, the same each time until the text is forgotten.

    Args:
        counts: `Nodes.counts`, because the uids of nodes come from the same counter.
    """

    def __init__(self, counts: Int64Array) -> None:
        self.numbers: dict[bytes, int] = {}
        self.limit = FEWEST
        self._counts = counts

    def number_of(self, text: bytes) -> int:
        """The number of a text; a new one if it has none yet."""
        number = self.numbers.get(text)
        if number is None:
            number = int(self._counts[NEXT_UID])
            self._counts[NEXT_UID] += 1
            self.numbers[text] = number
        return number

    def keep(self, used: Int64Array) -> None:
        """Forget the texts whose numbers are not in ``used``."""
        kept = set(np.unique(used).tolist())
        self.numbers = {text: number for text, number in self.numbers.items() if number in kept}
        self.limit = max(FEWEST, 2 * len(self.numbers))


class Identities:
    """The salts and extra keys of the rows and nodes of a cache."""

    def __init__(self, table: BlockTable, nodes: Nodes) -> None:
        self.salts, self.keys = Names(nodes.counts), Names(nodes.counts)
        self.extras: Int64Array = np.empty((0, 2), np.int64)
        """``[room, 2]`` granule and number of extra keys. `BlockTable.origin` has a row's part; forks share one."""
        self.num_extras = 0
        self._table, self._nodes = table, nodes

    def origins(self, salts: list[bytes], extras: list[Extras]) -> Int64Array:
        """Make rows of `BlockTable.origin` for prompts, from the texts of `as_salts` and `as_extras`."""
        self.forget_unused()
        made = np.zeros((len(salts), 4), np.int64)
        self._make_room(sum(map(len, extras)))
        for i, (salt, own) in enumerate(zip(salts, extras, strict=True)):
            made[i, CHAIN_UID] = made[i, ROOT_OF] = self.salts.number_of(salt) if salt else ROOT_UID
            if own:
                first, end = self.num_extras, self.num_extras + len(own)
                self.extras[first:end] = [(granule, self.keys.number_of(text)) for granule, text in own]
                self.num_extras = end
                made[i, FIRST_EXTRA], made[i, END_EXTRA] = first, end
        return made

    def _make_room(self, count: int) -> None:
        if self.num_extras + count <= len(self.extras):
            return
        self._pack()
        needed = self.num_extras + count
        if 2 * needed > len(self.extras):
            room = np.empty((max(64, 4 * needed), 2), np.int64)
            room[: self.num_extras] = self.extras[: self.num_extras]
            self.extras = room

    def _pack(self) -> None:
        """Move the extra keys of live rows together."""
        origin = self._table.origin
        rows = np.flatnonzero(self.is_live() & (origin[:, END_EXTRA] > origin[:, FIRST_EXTRA]))
        order = rows[np.argsort(origin[rows, FIRST_EXTRA], kind="stable")].astype(np.int32)
        self.num_extras = int(_pack(self._table, self.extras, order))

    def forget_unused(self, *, at_once: bool = False) -> None:
        """Forget salts and extra keys that nothing uses, if many have come since the last time."""
        if at_once or len(self.salts.numbers) > self.salts.limit:
            self.salts.keep(self._used_roots())
        if at_once or len(self.keys.numbers) > self.keys.limit:
            self._pack()
            self.keys.keep(self._used_keys())

    def is_live(self) -> NDArray[np.bool_]:
        """``[max_seqs]`` which rows are not closed."""
        live: NDArray[np.bool_] = self._table.info[:, STATE] != CLOSED
        return live

    def _used_roots(self) -> Int64Array:
        nodes = self._nodes
        of_nodes = nodes.parent_uid[(nodes.uid != 0) & (nodes.parent < 0)]
        return np.concatenate([of_nodes, self._table.origin[self.is_live(), ROOT_OF]])

    def _used_keys(self) -> Int64Array:
        nodes = self._nodes
        return np.concatenate([nodes.tokens[nodes.uid != 0, EXTRA], self.extras[: self.num_extras, 1]])


# -- what callers give -----------------------------------------------------------------------------------------------


def as_salts(salt: Any, count: int) -> list[bytes]:
    """The text of each prompt's salt, empty for None; ArgumentError unless it is a salt or a list of ``count``."""
    if salt is None:
        return [b""] * count
    if not isinstance(salt, list | tuple | np.ndarray):
        return [as_text(salt, "salt")] * count
    if np.ndim(salt) > 1 or len(salt) != count:
        raise ArgumentError(f"salt: expected one, or {count}, one for each prompt, got {len(salt)}")
    return [b"" if one is None else as_text(one, f"salt[{i}]") for i, one in enumerate(salt)]


def as_text(value: Any, name: str) -> bytes:
    """A text that is different for every value and type; ArgumentError unless it is an int, str or bytes."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return b"i" + hex(value).encode()  # hex, because decimal digits of a long int take quadratic time
    if isinstance(value, str):
        return b"s" + value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return b"b" + value
    raise ArgumentError(f"{name}: expected an int, str or bytes, got {value!r:.80} ({type(value).__name__})")


def as_extras(extra_keys: Any, count: int) -> list[Extras]:
    """The extra keys of each prompt by granule; ArgumentError unless they are ``count`` lists of (position, key)."""
    made = []
    for i, pairs in enumerate(as_pairs(extra_keys, count)):
        found: dict[int, set[tuple[int, bytes]]] = {}
        for position, key in pairs:
            found.setdefault(position >> 3, set()).add((position & 7, as_text(key, f"extra_keys[{i}]")))
        made.append([(granule, _joined(found[granule])) for granule in sorted(found)])
    return made


def as_pairs(extra_keys: Any, count: int) -> list[list[tuple[int, Any]]]:
    """The ``(position, key)`` pairs of each prompt; ArgumentError unless they are ``count`` lists of them."""
    if extra_keys is None:
        return [[]] * count
    if not isinstance(extra_keys, list | tuple) or len(extra_keys) != count:
        got = f"{len(extra_keys)} of them" if isinstance(extra_keys, list | tuple) else repr(extra_keys)[:80]
        raise ArgumentError(f"extra_keys: expected {count} lists, one for each prompt, got {got}")
    return [[] if pairs is None else list(_pairs(pairs, f"extra_keys[{i}]")) for i, pairs in enumerate(extra_keys)]


def _pairs(pairs: Any, name: str) -> Iterable[tuple[int, Any]]:
    if not isinstance(pairs, list | tuple):
        raise ArgumentError(f"{name}: expected a list of (position, key), got {pairs!r:.80}")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ArgumentError(f"{name}: expected (position, key), got {pair!r:.80}")
        position, key = pair
        is_whole = isinstance(position, int | np.integer) and not isinstance(position, bool)
        if not is_whole or not 0 <= position < MAX_TOKENS:
            raise ArgumentError(f"{name}: expected positions of 0 to {MAX_TOKENS - 1}, got {position!r:.80}")
        as_text(key, name)
        yield int(position), key


def _joined(keys: set[tuple[int, bytes]]) -> bytes:
    """One text for the keys of a granule. It has their lengths, so that different keys never give the same text."""
    return b"".join(b"%d %d %b" % (offset, len(text), text) for offset, text in sorted(keys))


# -- compiled moves --------------------------------------------------------------------------------------------------


@jit
def extra_at(table: BlockTable, extras: Int64Array, row: int, index: int) -> Any:
    """The number of the extra keys in granule ``index`` of a row, or NO_EXTRA; ``extras`` has those of all rows."""
    low, high = table.origin[row, FIRST_EXTRA], table.origin[row, END_EXTRA]
    end = high
    while low < high:
        middle = (low + high) >> 1
        if extras[middle, 0] < index:
            low = middle + 1
        else:
            high = middle
    if low < end and extras[low, 0] == index:
        return extras[low, 1]
    return NO_EXTRA


@jit
def _pack(table: BlockTable, extras: Int64Array, order: Int32Array) -> Any:
    """Move the extra keys of rows to the front; returns how many there are. ``order``: rows by first key."""
    end, moved, first_there = 0, -1, 0
    for row in order:
        first, count = table.origin[row, FIRST_EXTRA], table.origin[row, END_EXTRA] - table.origin[row, FIRST_EXTRA]
        if first != moved:  # a fork shares the keys of the row before it
            for i in range(count):
                extras[end + i, 0], extras[end + i, 1] = extras[first + i, 0], extras[first + i, 1]
            moved, first_there = first, end
            end += count
        table.origin[row, FIRST_EXTRA], table.origin[row, END_EXTRA] = first_there, first_there + count
    return end


@jit
def forget_prefixes(table: BlockTable, everything: bool, root_uid: int, holdings: Holdings) -> Any:
    """Take the nodes of one root, or all nodes, out of the index; returns the number of ``freed`` granules.

    Rows keep what they hold, but neither that nor what they append to it can be found any more.
    """
    nodes = holdings.nodes
    num_freed = 0
    for node in range(len(nodes.uid)):
        if nodes.uid[node] != 0 and nodes.parent[node] < 0 and (everything or nodes.parent_uid[node] == root_uid):
            num_freed = unpublish(holdings, node, num_freed)
    for row in range(len(table.info)):
        # a row in an open step may have written tokens although its length is still 0
        is_stale = table.info[row, LENGTH] > 0 or table.info[row, STATE] == IN_STEP
        if is_stale and table.info[row, STATE] != CLOSED and (everything or table.origin[row, ROOT_OF] == root_uid):
            table.chain[row] = BROKEN
    return num_freed


@jit
def roots_of(nodes: Nodes, by_depth: Int64Array, roots: Int64Array) -> None:
    """Write the uid of the root of each node to ``roots``; parents come before their children in ``by_depth``."""
    for node in by_depth:
        parent = nodes.parent[node]
        roots[node] = nodes.parent_uid[node] if parent < 0 else roots[parent]
