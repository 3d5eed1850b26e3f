"""Taking the memory of sequences away, and bringing them back."""

import numpy as np
from numpy.typing import NDArray

from kvtoolkit import rows
from kvtoolkit.pool import Runs
from kvtoolkit.prefix import Int32Array, usable
from kvtoolkit.rows import LENGTH, OPEN, STATE
from kvtoolkit.sequences import Preempted, Sequences
from kvtoolkit.tables import MAX_BLOCK_GRANULES, TIER_HOT
from kvtoolkit.twins import find_twins


def preempt(sequences: Sequences, batch: Int32Array, to: str) -> None:
    """Drop what rows hold, or copy it to the host; see `KVCache.preempt`."""
    pool, table = sequences.pool, sequences.rows
    saved = {row: _save(sequences, row, to) for row in batch.tolist()}
    sequences.tick()
    sequences.preempted = sequences.preempted | saved
    num_freed = rows.preempt_rows(table, batch, to == "drop", pool.nodes, pool.granules, pool.freed)
    sequences.counters.num_preempted += len(batch)
    pool.free_listed(num_freed)


def _save(sequences: Sequences, row: int, to: str) -> Preempted:
    """What a row needs to come back; changes nothing."""
    pool, table = sequences.pool, sequences.rows
    used = -(-int(table.info[row, LENGTH]) // 8)
    chain, uids = np.empty(used, np.int32), np.empty(used, np.int64)
    if to == "host":
        held = np.empty(used, np.int32)
        rows.list_granules(table, row, used, held)
        return Preempted(chain[:0], uids[:0], sequences.storage.read(held), pool.tiers_of(held).astype(np.int8))
    count = rows.list_chain(table, row, pool.nodes, chain, uids)
    return Preempted(chain[:count], uids[:count], None, np.empty(0, np.int8))


def restore(sequences: Sequences, batch: Int32Array) -> NDArray[np.bool_]:
    """Bring rows back; which of them found memory."""
    ok = np.array([_restore(sequences, row) for row in batch.tolist()], np.bool_)
    restored = set(batch[ok].tolist())
    # at once, since rows that are saved and open are those of a call that broke off
    sequences.preempted = {row: saved for row, saved in sequences.preempted.items() if row not in restored}
    return ok


def _restore(sequences: Sequences, row: int) -> bool:
    """Bring one row back; False if there is no memory for it."""
    pool, table, saved = sequences.pool, sequences.rows, sequences.preempted[row]
    if saved.contents is None:
        lost = np.flatnonzero(pool.nodes.uid[saved.nodes] != saved.uids)
        count = int(lost[0]) if len(lost) else len(saved.nodes)
        count = usable(pool.nodes, pool.granules, saved.nodes, count, sequences.takes_quantized)
        held = rows.adopt(table, row, saved.nodes, count, pool.nodes, pool.granules)
        sequences.counters.reused_tokens += 8 * held
    else:
        runs = _room(sequences, saved.tiers)
        if runs is None:
            return False
        granules = np.concatenate([np.empty(0, np.int32), *(np.arange(a, a + n, dtype=np.int32) for a, n in runs)])
        try:
            sequences.storage.write(granules[: len(saved.tiers)], saved.contents)
        except MemoryError:  # no room for what the copy needs in between
            pool.free_runs(runs)
            return False
        if not sequences.attach(row, runs):
            pool.free_runs(runs)
            return False
        pool.free_listed(find_twins(table, np.array([row], np.int32), pool.nodes, pool.granules, pool.freed))
    table.info[row, STATE] = OPEN
    sequences.note_use()
    return True


def _room(sequences: Sequences, tiers: NDArray[np.int8]) -> Runs | None:
    """Runs for granules of these tiers, in their order; None if one of the tiers has no room for them."""
    pool = sequences.pool
    counts = np.bincount(tiers, minlength=len(pool.allocators)).tolist()
    if not all(pool.can_have(count, tier) for tier, count in enumerate(counts)):
        return None  # before anything is evicted for it
    runs = pool.fit(counts[TIER_HOT])
    if runs is None:
        return None
    blocks: Runs = []
    for tier in tiers[tiers != TIER_HOT][::MAX_BLOCK_GRANULES].tolist():
        start = pool.allocate_block(tier)
        if start < 0:
            pool.free_runs(runs + blocks)
            return None
        blocks.append((start, MAX_BLOCK_GRANULES))
    return _interleave(tiers, runs, blocks)


def _interleave(tiers: NDArray[np.int8], runs: Runs, blocks: Runs) -> Runs:
    """The hot runs, cut where a quantized block comes, with the blocks between them."""
    ordered: Runs = []
    runs, blocks = runs[::-1], blocks[::-1]
    i = 0
    while i < len(tiers):
        if tiers[i] != TIER_HOT:
            ordered.append(blocks.pop())
            i += MAX_BLOCK_GRANULES
            continue
        quantized = np.flatnonzero(tiers[i:] != TIER_HOT)
        wanted = int(quantized[0]) if len(quantized) else len(tiers)  # what is over at the end is room to grow
        start, size = runs.pop()
        if size > wanted:
            runs.append((start + wanted, size - wanted))
            size = wanted
        ordered.append((start, size))
        i += size
    return ordered + runs[::-1]
