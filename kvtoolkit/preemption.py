"""Taking the memory of sequences away, and bringing them back."""

import numpy as np

from kvtoolkit import rows
from kvtoolkit.prefix import Int32Array, usable
from kvtoolkit.rows import LENGTH, OPEN, PREEMPTED, STATE
from kvtoolkit.sequences import Preempted, Sequences


def preempt(sequences: Sequences, batch: Int32Array, to: str) -> None:
    """Drop what rows hold, or copy it to the host; see `KVCache.preempt`."""
    pool, table = sequences.pool, sequences.rows
    sequences.tick()
    num_freed = 0
    for row in batch.tolist():
        used = -(-int(table.info[row, LENGTH]) // 8)
        chain, uids = np.empty(used, np.int32), np.empty(used, np.int64)
        count, saved = 0, None
        if to == "host":
            held = np.empty(used, np.int32)
            rows.list_granules(table, row, used, held)
            saved = sequences.storage.read(held)
        else:
            count = rows.list_chain(table, row, pool.nodes, chain, uids)
            table.info[row, LENGTH] = 0
        sequences.preempted[row] = Preempted(chain[:count], uids[:count], saved)
        num_freed = rows.shrink(table, row, 0, pool.nodes, pool.granules, pool.freed, num_freed)
        table.info[row, STATE] = PREEMPTED
    pool.free_listed(num_freed)
    sequences.counters.num_preempted += len(batch)


def restore(sequences: Sequences, row: int) -> bool:
    """Bring one row back; False if there is no memory for it."""
    pool, table, saved = sequences.pool, sequences.rows, sequences.preempted[row]
    if saved.key_values is None:
        lost = np.flatnonzero(pool.nodes.uid[saved.nodes] != saved.uids)
        count = int(lost[0]) if len(lost) else len(saved.nodes)
        count = usable(pool.nodes, pool.granules, saved.nodes, count, sequences.takes_quantized)
        held = rows.adopt(table, row, saved.nodes, count, pool.nodes, pool.granules)
        sequences.counters.reused_tokens += 8 * held
    else:
        needed = saved.key_values.shape[2]
        pool.make_room(needed)
        runs = pool.fit(needed)
        if runs is None:
            return False
        if not sequences.attach(row, runs):
            pool.free_runs(runs)
            return False
        granules = np.empty(needed, np.int32)
        rows.list_granules(table, row, needed, granules)
        sequences.storage.write(granules, saved.key_values)
    table.info[row, STATE] = OPEN
    del sequences.preempted[row]
    sequences.note_use()
    return True
