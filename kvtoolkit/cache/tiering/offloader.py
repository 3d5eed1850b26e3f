"""Moves superblocks of one tier between device memory and pinned host memory.

A move begins by copying, beside the kernels of the caller. When the copies are done, entries and index change in one
compiled pass, and the old places are free. Until then everybody reads the old places, which nobody writes: what is not
full stays where it is, and a superblock in which anything has changed meanwhile is not moved.

Three rules keep kernels from reading what is half written:
    copies wait for what the current stream was given before them: the writes of the sources, the readers of the targets
    the current stream waits for the copies before anybody names the new places, or gets the old ones
    a superblock is in one move at a time
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.prefix_index import HELD
from kvtoolkit.cache.storage.transfers import Transfer, Transfers
from kvtoolkit.cache.tiering import place_moves
from kvtoolkit.cache.tiering.place_moves import AWAKE, EMPTY, FIXED, Span
from kvtoolkit.config.tiers import HOST_POOL_OF, TierConfig
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES

MOST_AT_ONCE = 448
"""Superblocks of one move."""


_MARGIN = 0.01
"""So much more of the attention must be worth an exchange of two superblocks."""


class Move(NamedTuple):
    """Superblocks on their way."""

    sources: Int32Array
    targets: Int32Array
    stamps: Int64Array
    """``[n, 8]`` see `place_moves.stamp`."""
    to_host: bool
    below: float
    """What is not colder than this when the copies are done stays where it is, as if its sleeper has woken."""
    transfer: Transfer


class Offloader:
    """Moves the superblocks of one tier of a group. The caller holds the cache's lock.

    Args:
        group: of layers.
        tier: hot or cold.
        config: of the tiers.
    """

    def __init__(self, group: CacheGroup, tier: int, config: TierConfig) -> None:
        self._group, self._tier = group, tier
        self._device, self._host = tier, HOST_POOL_OF[tier]  # pools
        self._protected = config.pinned_tokens, config.hot
        blocks = group.blocks
        self._spans = {
            pool: _span(blocks.first[pool], blocks.ledger.num_of(pool)) for pool in (self._device, self._host)
        }
        self._places = np.full(blocks.num_granules // MAX_BLOCK_GRANULES, -1, np.int32)
        self._is_moving = np.zeros(len(self._places), np.bool_)
        self._moves: list[Move] = []
        group.forgets.append(self.forget)

    @property
    def _transfers(self) -> Transfers:
        transfers = self._group.storage.transfers
        assert transfers is not None
        return transfers

    @property
    def num_away(self) -> int:
        """Granules in host memory that rows hold."""
        return int(self._group.blocks.granules.cached[HELD + self._host])

    @property
    def num_moves(self) -> int:
        """Moves under way."""
        return len(self._moves)

    # -- what to move ------------------------------------------------------------------------------------------------

    def make_room(self, wanted: int, *, below: float = FIXED) -> int:
        """Move the coldest superblocks to host memory until so many granules more are free on the device.

        The room can be used at once: the current stream waits for the copies.

        Args:
            wanted: granules.
            below: only superblocks that are colder than this move.

        Returns:
            How many granules became free, which may be fewer: some may not move, and host memory may be full.
        """
        freed = self.settle(wanted)
        if freed < wanted:
            chosen = self._coldest(wanted - freed, below)
            for at in range(0, len(chosen), MOST_AT_ONCE):
                if self._start(chosen[at : at + MOST_AT_ONCE], to_host=True, beside=False):
                    freed += self._finish(self._moves.pop())
        return freed

    def offload(self, rows: Int32Array) -> int:
        """Begin to move to host memory what none but sleeping rows hold; returns how many superblocks."""
        span = self._measure(self._device, self._protected)
        held = self._held_by(rows, self._device)
        return self._begin(held[span.heat[held - span.first] < AWAKE], to_host=True)

    def prefetch(self, rows: Int32Array, most: int, *, evicts: bool) -> int:
        """Begin to move to the device what rows hold in host memory; returns how many superblocks.

        Args:
            rows: the first ones come first, each with its oldest tokens first; where there are scores, the hottest do.
            most: superblocks.
            evicts: whether what no row that is awake holds may leave the device for it.
        """
        wanted, span = self._held_by(rows, self._host), self._measure(self._host, (0, 0))
        wanted = wanted[(span.heat[wanted - span.first] < FIXED) & ~self._is_moving[wanted]]
        if len(self._group.scores):
            wanted = wanted[np.argsort(-span.heat[wanted - span.first], kind="stable")]
        wanted = wanted[:most]
        lacking = MAX_BLOCK_GRANULES * len(wanted) - self._group.blocks.num_known_free
        if evicts and len(wanted) and lacking > 0:
            self.make_room(lacking, below=AWAKE)
        return self._begin(wanted, to_host=False)

    def displace(self, rows: Int32Array, most: int) -> int:
        """Begin to move to host memory what no row that is awake holds, to make room for what rows hold there.

        Returns how many superblocks; as many of what the rows hold are worth a `prefetch` when they have gone.
        """
        span = self._measure(self._host, (0, 0))
        held = self._held_by(rows, self._host)
        wanted = min(most, int(np.count_nonzero(span.heat[held - span.first] < FIXED)))
        if not wanted:
            return 0
        return self._begin(self._coldest(MAX_BLOCK_GRANULES * wanted, AWAKE)[:wanted], to_host=True)

    def exchange(self, rows: Int32Array, most: int) -> int:
        """Begin to move to host memory what is read less than what rows hold there, as much as could take its place.

        Returns how many superblocks; as many of what the rows hold are worth a `prefetch` when they have gone.
        """
        span = self._measure(self._host, (0, 0))
        held = self._held_by(rows, self._host) - span.first
        away = np.sort(span.heat[held][span.heat[held] < FIXED])[::-1]
        span = self._measure(self._device, self._protected)
        may_move = (span.heat >= AWAKE) & (span.heat < FIXED)
        may_move &= ~self._is_moving[span.first : span.first + len(span.heat)]
        here = np.flatnonzero(may_move)
        here = here[np.argsort(span.heat[here], kind="stable")][:most]
        count = min(len(here), len(away))
        count = int(np.count_nonzero(away[:count] > span.heat[here[:count]] + _MARGIN * AWAKE))
        return self._begin((here[:count] + span.first).astype(np.int32), to_host=True, below=FIXED)

    def _measure(self, pool: int, protected: tuple[int, int]) -> Span:
        span, group = self._spans[pool], self._group
        ledger = group.blocks.ledger
        place_moves.measure(
            group.table,
            group.blocks.holdings,
            ledger.granted,
            ledger.callers,
            group.asleep,
            group.scores,
            *protected,
            span,
        )
        return span

    def _held_by(self, rows: Int32Array, pool: int) -> Int32Array:
        span = self._spans[pool]
        out, seen = np.empty(len(span.heat), np.int32), np.zeros(len(span.heat), np.bool_)
        return out[: place_moves.list_superblocks(self._group.table, rows, span.first, seen, out)]

    def _coldest(self, wanted: int, below: float) -> Int32Array:
        """The coldest superblocks on the device that have so many granules in use, or all that may move."""
        span = self._measure(self._device, self._protected)
        may_move = (span.heat > EMPTY) & (span.heat < below)
        may_move &= ~self._is_moving[span.first : span.first + len(span.heat)]
        found = np.flatnonzero(may_move)
        found = found[np.argsort(span.heat[found], kind="stable")]
        count = int(np.searchsorted(np.cumsum(span.num_owned[found]), wanted)) + 1
        return (found[:count] + span.first).astype(np.int32)

    # -- moving ------------------------------------------------------------------------------------------------------

    def _begin(self, sources: Int32Array, *, to_host: bool, below: float = AWAKE) -> int:
        """Begin moves; returns how many superblocks are on their way because of it."""
        sources = sources[~self._is_moving[sources]]
        return sum(
            self._start(sources[at : at + MOST_AT_ONCE], to_host=to_host, beside=True, below=below)
            for at in range(0, len(sources), MOST_AT_ONCE)
        )

    def _start(self, sources: Int32Array, *, to_host: bool, beside: bool, below: float = FIXED) -> int:
        """Take places for superblocks and begin to copy; returns for how many there were places."""
        group, blocks = self._group, self._group.blocks
        starts = self._take(self._host if to_host else self._device, len(sources))
        if not len(starts):
            return 0
        sources, targets = sources[: len(starts)].copy(), starts // MAX_BLOCK_GRANULES
        stamps = np.empty((len(sources), MAX_BLOCK_GRANULES), np.int64)
        copies = group.copies
        copies.next_number = int(place_moves.stamp(blocks.granules, sources, copies.next_number, stamps))
        try:
            transfer = self._transfers.start(self._tier, sources, targets, beside=beside)
        except Exception:
            blocks.free_granules(_granules(targets))
            raise
        self._is_moving[sources] = True
        blocks.arriving |= set(starts.tolist())
        self._moves.append(Move(sources, targets, stamps, to_host, below if to_host else FIXED, transfer))
        return len(sources)

    def _take(self, pool: int, count: int) -> Int32Array:
        """Up to so many blocks of 64 tokens of a pool; in host memory, what is cached there makes way."""
        blocks = self._group.blocks
        sizes = np.full(count, MAX_BLOCK_GRANULES, np.int32)
        starts = blocks.ledger.take(pool, sizes)
        found = starts[starts >= 0]
        if len(found) < count and pool == self._host:
            while len(found) < count and (
                blocks.evict(MAX_BLOCK_GRANULES * (count - len(found)), pool) or blocks.evict(MAX_BLOCK_GRANULES, pool)
            ):
                starts = blocks.ledger.take(pool, sizes[len(found) :])
                found = np.concatenate([found, starts[starts >= 0]])
        return found

    def settle(self, wanted: int = 0) -> int:
        """Finish the moves whose copies are done, and as many others as make ``wanted`` granules of the device free.

        Returns how many granules of the device became free.
        """
        if not self._moves:
            return 0
        freed, moves = 0, self._moves
        self._moves = left = list[Move]()
        for move in moves:
            if move.transfer.is_done() or (move.to_host and freed < wanted):
                freed += self._finish(move) if move.to_host else min(0, self._finish(move))
            else:
                left.append(move)
        return freed

    def settle_all(self) -> None:
        """Finish all moves; the current stream waits for their copies."""
        while self._moves:
            self._finish(self._moves.pop(0))

    def _finish(self, move: Move) -> int:
        """Let everybody read the new places of what has not changed; returns how many granules became free."""
        group, blocks = self._group, self._group.blocks
        move.transfer.join()
        self._is_moving[move.sources] = False
        is_same = np.empty(len(move.sources), np.bool_)
        place_moves.are_unchanged(blocks.granules, move.sources, move.stamps, is_same)
        span = self._measure(self._device, self._protected) if move.to_host else self._measure(self._host, (0, 0))
        is_same &= span.heat[move.sources - span.first] < move.below
        sources, targets = move.sources[is_same], move.targets[is_same]
        freed = int(span.num_owned[sources - span.first].sum())
        blocks.arriving -= set((move.targets * MAX_BLOCK_GRANULES).tolist())
        num_freed = place_moves.relocate(group.table, blocks.holdings, sources, targets, self._places)
        blocks.free_listed(num_freed)
        if not is_same.all():
            blocks.free_granules(_granules(move.targets[~is_same]))
        if move.to_host:
            group.counters.num_offloaded += len(sources)
        else:
            group.counters.num_prefetched += len(sources)
        return freed

    def forget(self) -> None:
        """After a call broke off: no move is under way any more, and whoever gets its targets waits for the copies."""
        self._transfers.join()
        self._moves = []
        self._is_moving[:] = False
        self._places[:] = -1


def _span(first: int, num_granules: int) -> Span:
    n = num_granules // MAX_BLOCK_GRANULES
    return Span(first // MAX_BLOCK_GRANULES, np.empty(n, np.float64), np.empty(n, np.int32))


def _granules(superblocks: Int32Array) -> NDArray[np.int32]:
    """The granules of superblocks, ascending."""
    listed = (np.sort(superblocks)[:, None] * MAX_BLOCK_GRANULES + np.arange(MAX_BLOCK_GRANULES)).ravel()
    return listed.astype(np.int32)
