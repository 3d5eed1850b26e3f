"""Preemption: free the memory of sequences, and bring the sequences back.

In a cache with host memory, sequences that are preempted to the host keep their entries, if there is room. What these
name moves between the places as what open sequences hold does, so coming back changes nothing but a row's state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache import prefix_hits
from kvtoolkit.cache.state import block_table, prefix_windows, returning
from kvtoolkit.cache.state.block_manager import BlockManager, Runs, granules_of
from kvtoolkit.cache.state.block_table import LENGTH, OPEN, ROOT_OF, STATE
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.cache_state import CacheState, Preempted
from kvtoolkit.cache.state.host_copies import Copy, copy_tiers, numbers_of
from kvtoolkit.cache.state.prefix_index import BROKEN
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT


class Movers(Protocol):
    """What preemption needs of `kvtoolkit.cache.tiering.places.Places`."""

    def can_stay(self, rows: Int32Array) -> NDArray[np.bool_]:
        """Which rows host memory has room for, one after the other."""
        ...

    def offload(self, rows: Int32Array) -> int:
        """Let rows fall asleep, and begin to move what they hold to host memory."""
        ...

    def prefetch(self, rows: Int32Array, keep_free: int = 0) -> int:
        """Wake rows, and begin to move what they hold to the device, as far as so many hot granules are left."""
        ...

    def has_room(self, wanted: int) -> bool:
        """Whether rows can get so many hot granules, on the device or in host memory."""
        ...


def preempt(state: CacheState, batch: Int32Array, to: str, places: Movers | None) -> None:
    """Drop what rows hold, or copy or move it to the host; see `KVCache.preempt`."""
    if to == "host" and places is not None:
        stays = places.can_stay(batch)
        if stays.any():
            _put_to_sleep(state, batch[stays], places)
        batch = batch[~stays]  # is copied, so that preempting always frees memory
        if not len(batch):
            return
    saved = {row: _save(state.group, row, to, state.others) for row in batch.tolist()}
    state.tick()
    state.preempted = state.preempted | saved
    for group in state.groups:
        num_freed = block_table.preempt_rows(group.table, batch, to == "drop", group.blocks.holdings)
        group.blocks.free_listed(num_freed)
    state.counters.num_preempted += len(batch)


def _put_to_sleep(state: CacheState, batch: Int32Array, places: Movers) -> None:
    """Let rows keep what they hold, and begin to move it to host memory."""
    nothing = Preempted(np.empty(0, np.int32), np.empty(0, np.int64), None, np.empty((0, 9), np.int64), stays=True)
    blocks, ledger = state.group.blocks, state.group.blocks.ledger
    state.tick()
    state.preempted = state.preempted | dict.fromkeys(batch.tolist(), nothing)
    unit = int(blocks.offered[-1]) if ledger.frees_singly(TIER_HOT) else MAX_BLOCK_GRANULES
    num_freed = block_table.sleep_rows(state.group.table, batch, unit, blocks.holdings)
    blocks.free_listed(num_freed)
    state.counters.num_preempted += len(batch)
    places.offload(batch)


def _save(group: CacheGroup, row: int, to: str, others: Sequence[CacheGroup] = ()) -> Preempted:
    """Save what a row needs to come back, in this group and the others; the row stays as it is."""
    nodes, table = group.blocks.nodes, group.table
    length = int(table.info[row, LENGTH])
    used = -(-length // 8)
    chain, uids = np.empty(used, np.int32), np.empty(used, np.int64)
    count = int(block_table.list_chain(table, row, nodes, chain, uids))
    chain, uids = chain[:count], uids[:count]
    if to == "drop":
        return Preempted(chain, uids, None, np.empty((0, 9), np.int64))
    first = min(int(block_table.first_held(table, row)), used)
    held = np.empty(used - first, np.int32)
    block_table.list_granules(table, row, len(held), held)
    copies = group.copies.save(held, max(0, length // 8 - first))
    parts = tuple(_save(other, row, to) for other in others)
    tokens = nodes.tokens[chain if first == 0 else chain[:0]]  # a row cannot be published without its beginning
    return Preempted(chain[:0], uids[:0], copies, tokens, first, parts)


def restore(state: CacheState, batch: Int32Array, keep_free: int, places: Movers | None) -> NDArray[np.bool_]:
    """Bring rows back; returns for which of them there was memory."""
    stays = np.array([state.preempted[row].stays for row in batch.tolist()], np.bool_)
    ok = np.array([_restore(state, row, keep_free, places) for row in batch.tolist()], np.bool_)
    restored = set(batch[ok].tolist())
    # in one assignment, because `repair` takes rows that are both saved and open for those of a broken call
    state.preempted = {row: saved for row, saved in state.preempted.items() if row not in restored}
    if places is not None and (ok & stays).any():
        places.prefetch(batch[ok & stays], -(-keep_free // 8))
    return ok


def _restore(state: CacheState, row: int, keep_free: int, places: Movers | None) -> bool:
    """Bring one row back; False if there is no memory for it."""
    saved = state.preempted[row]
    if saved.stays:
        return _wake(state, row, keep_free, places)
    # the first group comes last, because a row is open once it is back there
    for group, part in zip(state.others, saved.others, strict=False):
        if not _restore_copied(state, group, row, part, _keep_free_of(group, keep_free)):
            break
    else:
        if saved.copies is None:
            is_back = _restore_dropped(state, row, saved, keep_free)
        else:
            is_back = _restore_copied(state, state.group, row, saved, _keep_free_of(state.group, keep_free))
        if is_back:
            _follow(state, np.array([row], np.int32))
            state.update_peaks()
            return True
    for group in state.others:
        num_freed = block_table.preempt_rows(group.table, np.array([row], np.int32), False, group.blocks.holdings)
        group.blocks.free_listed(num_freed)
    return False


def _wake(state: CacheState, row: int, keep_free: int, places: Movers | None) -> bool:
    """Open a row that has kept what it holds; False if ``keep_free`` leaves no room for it."""
    blocks, wanted = state.group.blocks, -(-keep_free // 8)
    if not (blocks.can_have(wanted) if places is None else places.has_room(wanted)):
        return False
    block_table.wake_rows(state.group.table, np.array([row], np.int32), blocks.granules)
    return True


def _follow(state: CacheState, which: Int32Array) -> None:
    """Open rows in the other groups that are back in the first one, and let prompts find what they hold there."""
    state.follow(which)
    state.forget_lost()
    lead = state.group
    for group in state.others:
        blocks = group.blocks
        blocks.free_listed(
            prefix_windows.publish_chain(lead.table, lead.blocks.nodes, which, group.table, blocks.holdings)
        )


def _keep_free_of(group: CacheGroup, keep_free: int) -> int:
    """The tokens of ``keep_free`` for which a group needs room; one with a window frees its past in return."""
    span = abs(group.layers.span)
    return min(keep_free, span) if span else keep_free


def _restore_dropped(state: CacheState, row: int, saved: Preempted, keep_free: int) -> bool:
    """Let a row hold the prefix of it that is still cached; False if ``keep_free`` leaves no room for it."""
    blocks, table = state.group.blocks, state.group.table
    lost = np.flatnonzero(blocks.nodes.uid[saved.nodes] != saved.uids)
    count = int(lost[0]) if len(lost) else len(saved.nodes)
    hit = prefix_hits.longest(state, saved.nodes, count)
    if keep_free:
        for i, group in enumerate(state.groups):
            if not group.blocks.can_have(hit.num_taken(state, i) + -(-_keep_free_of(group, keep_free) // 8)):
                return False
    prefix_hits.attach(state, row, hit)
    state.counters.restored_tokens += 8 * hit.length
    table.info[row, STATE] = OPEN
    return True


@dataclass
class _Return:
    """What a row that comes back will hold.

    Attributes:
        granules: ``[n]`` the granules for its tokens, -1 where one must be allocated; later also room to grow.
        is_fresh: ``[n]`` which granules are allocated for it.
        tiers: tiers of the granules for its tokens.
        runs: what was allocated.
    """

    granules: Int32Array
    is_fresh: NDArray[np.bool_]
    tiers: NDArray[np.int8]
    runs: Runs


def _restore_copied(state: CacheState, group: CacheGroup, row: int, saved: Preempted, keep_free: int) -> bool:
    """Let a row hold the granules of it that are still in the pool, and fresh ones filled from copies for the rest.

    The granules still in the pool may keep blocks from being freed that the rest needs. If so, the row gets only fresh
    granules.
    """
    copies = saved.copies or ()
    num_full = max(0, int(group.table.info[row, LENGTH]) // 8 - saved.first)
    found, tiers = _find(group, row, saved, copies, num_full), copy_tiers(copies)
    if _restore_with(state, group, row, saved, copies, _Return(found, found < 0, tiers, []), keep_free):
        return True
    nothing = np.full(len(found), -1, np.int32)
    is_other = bool((found >= 0).any())
    back = _Return(nothing, nothing < 0, tiers, [])
    return is_other and _restore_with(state, group, row, saved, copies, back, keep_free)


def _restore_with(
    state: CacheState, group: CacheGroup, row: int, saved: Preempted, copies: tuple[Copy, ...], back: _Return,
    keep_free: int,
) -> bool:  # fmt: skip
    """Let a row hold what ``back`` says; False, with nothing done, if there is no memory for it."""
    blocks, num_full = group.blocks, max(0, int(group.table.info[row, LENGTH]) // 8 - saved.first)
    held = back.granules[~back.is_fresh]
    returning.incref_listed(blocks.granules, held)  # so that nothing of it is evicted to make room for the rest
    if _allocate(blocks, back, keep_free) and _fill(group, back, copies):
        state.forget_lost()  # what was evicted for the row, before it is published
        num_freed = _attach(group, row, saved, back, numbers_of(copies)[:num_full])
        if num_freed >= 0:
            blocks.free_listed(num_freed)
            return True
    num_freed = returning.decref_listed(blocks.granules, held, blocks.freed)
    blocks.free_listed(num_freed)
    blocks.free_runs(back.runs)
    return False


def _tokens_of(group: CacheGroup, row: int, saved: Preempted) -> tuple[int, Int64Array]:
    """The root of a row in the index, and its tokens there, which are empty if its prefixes were cleared meanwhile."""
    is_known = group.table.chain[row] != BROKEN
    return int(group.table.origin[row, ROOT_OF]), saved.tokens if is_known else saved.tokens[:0]


def _find(group: CacheGroup, row: int, saved: Preempted, copies: tuple[Copy, ...], num_full: int) -> Int32Array:
    """``[n]`` granules of the pool that hold a row's tokens: those that were copied, else those in the index, or -1."""
    blocks, tiers = group.blocks, copy_tiers(copies)
    found = group.copies.find(copies, num_full)
    root_uid, tokens = _tokens_of(group, row, saved)
    returning.find_tokens(blocks.nodes, blocks.granules, root_uid, tokens, tiers, found)
    _, first = np.unique(found, return_index=True)
    is_first = np.zeros(len(found), np.bool_)
    is_first[first] = True  # an index from a snapshot may name a granule twice
    return np.where(is_first, found, np.int32(-1))


def _allocate(blocks: BlockManager, back: _Return, keep_free: int) -> bool:
    """Allocate the granules that are missing; False if one of the tiers has no room for them."""
    missing = back.tiers[back.is_fresh]
    counts = np.bincount(missing, minlength=len(blocks.allocators)).tolist()
    hot, smallest = counts[TIER_HOT], int(blocks.offered[-1])
    counts[TIER_HOT] = -(-hot // smallest) * smallest + -(-keep_free // 8)
    if not all(blocks.can_have(count, tier) for tier, count in enumerate(counts)):
        return False  # so that nothing is evicted in vain
    if hot:
        runs = blocks.fit(hot)
        if runs is None:
            return False
        back.runs += runs
    listed = np.concatenate([np.empty(0, np.int32), *(np.arange(a, a + n, dtype=np.int32) for a, n in back.runs)])
    tiles = []
    for tier in missing[missing != TIER_HOT][::MAX_BLOCK_GRANULES].tolist():
        start = blocks.allocate_block(tier)
        if start < 0:
            return False
        tiles.append(start)
        back.runs.append((start, MAX_BLOCK_GRANULES))
    back.granules[back.is_fresh & (back.tiers == TIER_HOT)] = listed[:hot]
    back.granules[back.is_fresh & (back.tiers != TIER_HOT)] = granules_of(np.array(tiles, np.int32))
    back.granules = np.concatenate([back.granules, listed[hot:]])  # the rest is room to grow
    back.is_fresh = np.concatenate([back.is_fresh, np.ones(len(listed) - hot, np.bool_)])
    return blocks.can_have(-(-keep_free // 8))


def _fill(group: CacheGroup, back: _Return, copies: tuple[Copy, ...]) -> bool:
    """Write the copies to the fresh granules; False if there is not enough host memory to do that."""
    numbers, is_fresh = numbers_of(copies), back.is_fresh[: len(back.tiers)]
    written = set(numbers[is_fresh].tolist())
    try:
        group.copies.write(
            back.granules[: len(back.tiers)][is_fresh], [copy for copy in copies if copy.number in written]
        )
    except MemoryError:
        return False
    return True


def _attach(group: CacheGroup, row: int, saved: Preempted, back: _Return, full: Int64Array) -> int:
    """Let the row hold its granules; returns the number of freed granules, or -1 if it has too few entries."""
    blocks = group.blocks
    numbers = np.zeros(len(back.granules), np.int64)
    numbers[: len(full)] = full
    root_uid, tokens = _tokens_of(group, row, saved)
    num_freed: int = returning.bring_back(
        group.table, row, saved.first, back.granules, back.is_fresh, numbers, root_uid, tokens, blocks.holdings,
    )  # fmt: skip
    return num_freed
