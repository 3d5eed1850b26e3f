"""The state of a cache: its groups of layers, its sequences, and the calls under way.

Every granule of a group is in exactly one place: free in the allocator, held by rows (``refs`` of them), cached (no row
holds it, but a prompt can still find it), or in the reserve for merging. A granule that several rows hold, or that can
be found, is always full and never written. It moves only while one row holds it, and the index is updated with it.

Nothing here takes a lock; `kvtoolkit.cache.kv_cache.KVCache` does.

A call may break off between any two statements. So each call takes the memory it needs and fills it, then changes rows
and index in one compiled move, and frees what became free last. At any moment the rows hold what they held before the
call or after it, and `kvtoolkit.cache.state.repair` derives everything else from them.
"""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from allocators._calls import Calls
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state import block_table, prefix_windows, repair
from kvtoolkit.cache.state.arguments import as_ids
from kvtoolkit.cache.state.block_manager import Counters
from kvtoolkit.cache.state.block_table import GENERATION, ID_BITS, LENGTH, OPEN, STATE, STATE_NAMES
from kvtoolkit.cache.state.cache_group import NOT_ASLEEP, CacheGroup
from kvtoolkit.cache.state.host_copies import Copy
from kvtoolkit.cache.state.identity import Identities
from kvtoolkit.cache.state.prefix_index import CLOCK, NUM_SPARE, ROOT, ROOT_UID
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.config.groups import lead_of
from kvtoolkit.errors import ArgumentError, BusyError, CacheFullError, SequenceError, StepError


@dataclass
class Preempted:
    """What is kept of a preempted sequence.

    Attributes:
        nodes, uids: for ``to="drop"``, its full granules in the index.
        copies: for ``to="host"``, copies of its granules, in order; else None.
        tokens: for ``to="host"``, ``[n, 9]`` what `Nodes.tokens` has for each full granule; empty if that is not known.
        first: the first logical granule that it held.
        others: what is kept of it in the other groups of layers.
        stays: for ``to="host"`` in a cache with host memory: its row keeps its entries, and nothing else is kept.
    """

    nodes: Int32Array
    uids: Int64Array
    copies: tuple[Copy, ...] | None
    tokens: Int64Array
    first: int = 0
    others: tuple["Preempted", ...] = ()
    stays: bool = False


class CacheState:
    """The state of a `KVCache`."""

    def __init__(self, config: CacheConfig, *, has_storage: bool = True) -> None:
        self.config = config
        self.counters = Counters()
        kinds = list(zip(config.group_configs, config.groups, strict=True))
        kinds.insert(0, kinds.pop(lead_of(config.groups)))
        self.groups = [
            CacheGroup(*kind, self.counters if i == 0 else Counters(), has_storage=has_storage)
            for i, kind in enumerate(kinds)
        ]
        self.group = self.groups[0]
        """The first one, which leads: its rows say what sequences there are, in which state and how long, and its index
        names prefixes (`kvtoolkit.cache.state.prefix_windows`)."""
        self.others = self.groups[1:]
        for group in self.others:
            group.blocks.evictor.evict_whole_blocks()
        self.tables = tuple(group.table for group in self.groups)
        self.holdings = tuple(group.blocks.holdings for group in self.groups)
        tiers = self.group.config.quantization
        self.takes_quantized = tiers is not None and tiers.prefix_reuse_tiers == "all"
        self.identities = Identities(self.group.table, self.group.blocks.nodes)
        self.closed_rows = list(range(config.max_seqs))[::-1]
        self.repairs = repair.Repairs()
        """What was put in order since the last call of `KVCache.repair`."""
        self.preempted: dict[int, Preempted] = {}
        self.now: Callable[[], float] = time.monotonic
        """Seconds; simulations have a clock of their own."""
        self.made_at = self.now()
        self.retained: dict[int, float] = {}
        """Until when later prompts will want what rows hold; see `KVCache.retain`."""
        self.opened = 0, np.empty(0, np.int32)
        """Serial of a call, and the rows that it has opened. If it breaks off, nobody has their ids."""
        self.handles: dict[int, weakref.ref[Any]] = {}
        """The open steps and leases, by the mark that their rows have as OWNER."""
        self.num_spare = int(self.group.blocks.nodes.counts[NUM_SPARE])
        """Nodes of the first group's index that were not in use when `forget_lost` was called last."""
        refusals = (ArgumentError, CacheFullError, SequenceError, StepError)
        self.calls = Calls(self, repair.settle, repair.end_lost, BusyError, refusals)

    def key_values_of(self, layer: int) -> Any:
        """``[2, num_granules, num_kv_heads, 8, head_dim]`` the hot keys and values of a layer."""
        storage, index = self.storage_of(layer)
        return storage.key_values[index]

    def storage_of(self, layer: int) -> tuple[Any, int]:
        """The storage of the group that has a layer, and the layer's place in it."""
        (group,) = (one for one in self.groups if layer in one.layers.layers)
        return group.storage, group.layers.layers.index(layer)

    # -- ids ---------------------------------------------------------------------------------------------------------

    def ids_of(self, which: Int32Array) -> Int64Array:
        """The ids of rows."""
        ids: Int64Array = (self.group.table.info[which, GENERATION] << ID_BITS) | which
        return ids

    def rows_of(self, seq_ids: ArrayLike, states: tuple[int, ...]) -> Int32Array:
        """The rows of ids; SequenceError unless each is in one of the states."""
        ids = as_ids(seq_ids)
        which = np.empty(len(ids), np.int32)
        code, where = block_table.check_ids(self.group.table, ids, sum(1 << state for state in states), which)
        if code:
            raise self.bad_id(code, int(ids[where]), states)
        return which

    def bad_id(self, code: int, seq_id: int, states: tuple[int, ...]) -> SequenceError:
        """The error for an id that compiled code has refused."""
        wanted = " or ".join(STATE_NAMES[state] for state in states)
        if code == block_table.BAD_TWICE:
            return SequenceError(f"seq_ids: expected every sequence once, got {seq_id} twice")
        if code == block_table.BAD_ID:
            return SequenceError(f"seq_ids: expected sequences that are {wanted}, got {seq_id}, unknown or closed")
        state = STATE_NAMES[self.group.table.info[seq_id & ((1 << ID_BITS) - 1), STATE]]
        return SequenceError(f"seq_ids: expected sequences that are {wanted}, got {seq_id}, which is {state}")

    # -- opening and closing rows ------------------------------------------------------------------------------------

    def require_closed_rows(self, count: int, what: str) -> None:
        """CacheFullError unless ``count`` more sequences can be opened."""
        if count > len(self.closed_rows):
            raise CacheFullError(
                f"{what}: expected at most {len(self.closed_rows)} new sequences (max_seqs is "
                f"{self.config.max_seqs}), got {count}"
            )

    def new_rows(self, count: int, what: str, origins: Int64Array | None = None) -> Int32Array:
        """Open empty rows with new ids. Without ``origins`` they have no salt and no extra keys."""
        self.require_closed_rows(count, what)
        opened = np.array(self.closed_rows[len(self.closed_rows) - count :][::-1], np.int32)
        self.opened = self.calls.serial, opened
        del self.closed_rows[len(self.closed_rows) - count :]
        info = self.group.table.info
        info[opened, GENERATION] += 1
        info[opened, STATE] = OPEN
        info[opened, LENGTH] = 0
        self.group.table.origin[opened] = ROOT_UID if origins is None else origins
        self.group.table.chain[opened] = ROOT
        for table in self.tables:
            table.scanned[opened] = -1
            table.masses[opened] = 0
        self.group.asleep[opened] = NOT_ASLEEP
        self.follow(opened)
        return opened

    def follow(self, which: Int32Array) -> None:
        """Give rows of the other groups the ids, states and lengths that they have in the first one."""
        for group in self.others:
            block_table.follow(self.group.table, group.table, which)

    def release_rows(self, closing: Int32Array) -> None:
        """Close rows: let go of everything that they hold, and end their ids."""
        blocks = self.group.blocks
        self.tick()
        retained = [row for row in closing.tolist() if row in self.retained]
        kept = {row: self._chain_of(row) for row in retained}
        num_freed = block_table.close_rows(self.group.table, closing, blocks.holdings)
        for row, nodes in kept.items():
            self._use_later(nodes, self.retained.pop(row))
        for row in closing.tolist():
            self.preempted.pop(row, None)
            self.closed_rows.append(row)
        blocks.free_listed(num_freed)
        for group in self.others:
            group.blocks.free_listed(block_table.close_rows(group.table, closing, group.blocks.holdings))

    def retain(self, which: Int32Array, seconds: float) -> None:
        """See `KVCache.retain`."""
        for row in which.tolist():
            if seconds:
                self.retained[row] = self.now() + seconds
            else:
                self.retained.pop(row, None)

    def _chain_of(self, row: int) -> Int32Array:
        """The nodes of a row's full granules in the first group's index."""
        table, nodes = self.group.table, self.group.blocks.nodes
        last = int(table.chain[row])
        most = int(nodes.depth[last]) + 1 if last >= 0 else 0  # its length is 0 if it was preempted by "drop"
        chain, uids = np.empty(most, np.int32), np.empty(most, np.int64)
        return chain[: block_table.list_chain(table, row, nodes, chain, uids)]

    def _use_later(self, nodes: Int32Array, until: float) -> None:
        """Let nodes count as used at a later time, which is turned into ticks at the mean rate so far."""
        index, now = self.group.blocks.nodes, self.now()
        ticks = int(index.counts[CLOCK])
        later = ticks + max(0.0, until - now) * ticks / max(now - self.made_at, 1e-3)
        index.last_used[nodes] = min(later, float(1 << 60))

    def update_peaks(self) -> None:
        """See `CacheGroup.update_peak`."""
        for group in self.groups:
            group.update_peak()

    def tick(self) -> None:
        """Advance the clocks of the prefix indices, by which granules are dated."""
        for group in self.groups:
            group.blocks.nodes.counts[CLOCK] += 1

    def forget_lost(self) -> None:
        """Free in the other groups what nothing can find any more, because the first one's index has lost its node.

        This must be called before anything is published in the first one, and after that.
        """
        lead = self.group.blocks.nodes
        num_spare = int(lead.counts[NUM_SPARE])
        if num_spare > self.num_spare:
            for group in self.others:
                nodes, granules, freed = group.blocks.holdings
                num_freed = prefix_windows.forget_lost(lead, self.num_spare, nodes, granules, freed)
                group.blocks.free_listed(num_freed)
        self.num_spare = num_spare

    # -- steps and leases --------------------------------------------------------------------------------------------

    def register_handle(self, handle: Any, mark: int) -> None:
        """Remember a step or a lease while it lives; its rows have ``mark`` as their owner already."""
        self.handles[mark] = weakref.ref(handle, self.calls.lost.append)
