"""Copies of granules in host memory, for preempted sequences: each is made once, however many sequences hold it.

A granule that has been copied keeps the number of its copy (`GranuleState.copy`) for as long as it holds the same keys
and values. So a second sequence that holds it needs no copy of its own, and a sequence that comes back finds the
granules that are in the pool still, or again.
"""

import weakref

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.prefix_index import GranuleState, tiers_of
from kvtoolkit.cache.storage.storage import Contents, Storage
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT, TIER_WARM

_AT_ONCE = 64
"""Most copies in one read or write, which needs their memory a second time."""


class Copy:
    """The contents of one hot granule or one quantized tile; freed with the last sequence that refers to it.

    Attributes:
        number: a number that no other copy of the cache ever has.
        tier: tier of the granules.
        contents: hot ``[num_layers, 2, num_kv_heads, 8, head_dim]``, else ``[num_layers, num_kv_heads, nbytes]`` uint8.
    """

    __slots__ = ("__weakref__", "contents", "number", "tier")

    def __init__(self, number: int, tier: int, contents: NDArray[np.generic]) -> None:
        self.number = number
        self.tier = tier
        self.contents = contents


class HostCopies:
    """All copies of a group that somebody still refers to."""

    def __init__(self, storage: Storage, granules: GranuleState) -> None:
        self._storage = storage
        self._granules = granules
        self._made: weakref.WeakValueDictionary[int, Copy] = weakref.WeakValueDictionary()
        self.next_number = 1
        """A number that no copy has, and that no granule is marked with."""

    def save(self, held: Int32Array, num_full: int) -> tuple[Copy, ...]:
        """The copies of a row's granules, in order; makes those that do not exist yet.

        The first ``num_full`` granules are full, so nobody changes them while they are held.
        """
        tiers = tiers_of(self._granules, held)
        pieces = np.flatnonzero((tiers == TIER_HOT) | (np.arange(len(held)) % MAX_BLOCK_GRANULES == 0))
        found = [self._made.get(number) for number in self._granules.copy[held[pieces]].tolist()]
        missing = [i for i, copy in enumerate(found) if copy is None]
        for at in range(0, len(missing), _AT_ONCE):
            which = missing[at : at + _AT_ONCE]
            kinds = tiers[pieces[which]]
            listed = np.concatenate([held[pieces[i] : pieces[i] + _size(tiers[pieces[i]])] for i in which])
            for i, copy in zip(which, self.make(kinds, self._storage.read(listed)), strict=True):
                found[i] = copy
        copies = tuple(copy for copy in found if copy is not None)
        self._granules.copy[held[:num_full]] = numbers_of(copies)[:num_full]
        return copies

    def make(self, tiers: NDArray[np.integer], contents: Contents) -> list[Copy]:
        """Make copies of contents, one for each of ``tiers``; ``contents`` lists each tier in the same order."""
        places, made = [0, 0, 0], []
        for tier in tiers.tolist():
            at = places[tier]
            places[tier] += 1
            part = contents.key_values[:, :, at] if tier == TIER_HOT else contents[tier][:, at]
            self.next_number += 1
            copy = Copy(self.next_number - 1, tier, part.copy())
            self._made[copy.number] = copy
            made.append(copy)
        return made

    def write(self, granules: Int32Array, copies: list[Copy]) -> None:
        """Fill granules from copies: one granule for each hot copy, 8 for each quantized one."""
        ends = np.cumsum([_size(copy.tier) for copy in copies])
        for at in range(0, len(copies), _AT_ONCE):
            end = min(at + _AT_ONCE, len(copies))
            first = ends[at] - _size(copies[at].tier)
            self._storage.write(granules[first : ends[end - 1]], self.contents_of(copies[at:end]))

    def contents_of(self, copies: list[Copy]) -> Contents:
        """The contents of copies, as `HostStorage.read` returns them."""
        hot, warm, cold = ([copy.contents for copy in copies if copy.tier == tier] for tier in range(3))
        shape = self._storage.key_values.shape
        key_values = np.empty((*shape[:2], len(hot), *shape[3:]), self._storage.key_values.dtype)
        for i, contents in enumerate(hot):
            key_values[:, :, i] = contents
        return Contents(key_values, _joined(warm, self._storage.warm), _joined(cold, self._storage.cold))

    def find(self, copies: tuple[Copy, ...], num_full: int) -> Int32Array:
        """Find granules of the pool that have the contents of copies, for the first ``num_full`` granules.

        Returns:
            ``[n]`` granules, -1 where there is none. A quantized copy has 8, all of one block or all -1.
        """
        granules, numbers = self._granules, numbers_of(copies)
        marked = np.flatnonzero((granules.copy > 0) & ((granules.refs > 0) | (granules.node >= 0)))
        marked = marked[np.argsort(granules.copy[marked], kind="stable")]
        known = granules.copy[marked]
        found = np.full(len(numbers), -1, np.int32)
        i = 0
        for copy in copies:
            size, at = _size(copy.tier), int(np.searchsorted(known, copy.number))
            there = marked[at : at + size][known[at : at + size] == copy.number]
            if i + size <= num_full and _is_piece(granules, there, copy.tier):
                found[i : i + size] = there
            i += size
        return found


def numbers_of(copies: tuple[Copy, ...]) -> Int64Array:
    """``[n]`` for each granule, the number of its copy."""
    return np.array([copy.number for copy in copies], np.int64).repeat(sizes_of([copy.tier for copy in copies]))


def copy_tiers(copies: tuple[Copy, ...]) -> NDArray[np.int8]:
    """``[n]`` for each granule, its tier."""
    tiers = np.array([copy.tier for copy in copies], np.int8)
    return tiers.repeat(sizes_of(tiers))


def sizes_of(tiers: ArrayLike) -> Int64Array:
    """For each tier, the granules of a copy."""
    return np.where(np.asarray(tiers, np.int64) == TIER_HOT, 1, MAX_BLOCK_GRANULES)


def _size(tier: int) -> int:
    """Granules of a copy."""
    return 1 if tier == TIER_HOT else MAX_BLOCK_GRANULES


def _is_piece(granules: GranuleState, listed: NDArray[np.integer], tier: int) -> bool:
    """Whether these are one granule of the hot tier, or the 8 of one block of a quantized tier."""
    size = _size(tier)
    if len(listed) != size or (tiers_of(granules, listed) != tier).any():
        return False
    return bool(listed[0] % size == 0 and listed[-1] == listed[0] + size - 1)


def _joined(blocks: list[NDArray[np.generic]], arena: object) -> NDArray[np.uint8]:
    if arena is None:
        return np.empty(0, np.uint8)
    if not blocks:
        shape = arena.shape  # type: ignore[attr-defined]
        return np.empty((shape[0], 0, *shape[2:]), np.uint8)
    joined: NDArray[np.uint8] = np.stack(blocks, axis=1)
    return joined


assert (TIER_HOT, TIER_WARM, TIER_COLD) == (0, 1, 2), "fields of Contents by their tier"
