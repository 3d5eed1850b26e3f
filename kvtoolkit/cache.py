"""`KVCache`: the sequences of an engine, their memory and their block table.

Every granule of the pool is in exactly one place: free in the allocator, held by rows (``refs`` of them), cached (no
row holds it but a prompt can still find it), or kept back for merging. A granule that several rows hold, or that is
findable, is always full and never written; it moves only while one row holds it, and the index follows.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtoolkit import access, compaction, rows, snapshots
from kvtoolkit.config import CacheConfig
from kvtoolkit.cpu import copy_granules
from kvtoolkit.errors import CacheFullError, SequenceError, StepError
from kvtoolkit.pool import Pool
from kvtoolkit.prefix import CLOCK, ROOT, ROOT_UID, match, unpublish
from kvtoolkit.rows import (
    CAPACITY,
    GENERATION,
    ID_BITS,
    IN_STEP,
    LENGTH,
    NUM_ENTRIES,
    OK,
    OPEN,
    OUT_OF_BLOCKS,
    PINNED,
    PREEMPTED,
    ROW_FULL,
    STATE,
    STATE_NAMES,
    StepArrays,
)
from kvtoolkit.stats import CacheStats, Counters, collect
from kvtoolkit.step import Step, as_tokens
from kvtoolkit.tables import GRANULE, MAX_GRANULES

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]

_STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass
class Preempted:
    """What is kept of a preempted sequence."""

    nodes: Int32Array
    uids: Int64Array
    """Where its full granules stood in the index; for ``to="drop"``."""
    key_values: NDArray[Any] | None
    """``[num_layers, 2, num_granules, num_kv_heads, 8, head_dim]``; for ``to="host"``."""


class KVCache:
    """The KV cache of one model: paged memory, prefix reuse, forks, preemption, for a batch at a time.

    Args:
        config: see `CacheConfig`.

    Thread-safe: one lock around every call. Calls that take several sequences do all of them or raise and do none,
    except for `begin_step` and `restore`, which say per row what they could do.

    Source: block tables, Kwon et al. 2023 (arXiv:2309.06180), sec. 4; sharing here is by granule of 8 tokens, and a
    partly filled granule is copied when shared, so that kernels never have to copy on write.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.dtype = config.dtype
        self._lock = threading.RLock()
        self._pool = Pool(config)
        self._rows = rows.make_rows(config.max_seqs, config.entries_limit)
        self._closed_rows = list(range(config.max_seqs))[::-1]
        self._preempted: dict[int, Preempted] = {}
        # zeros, not empty: the system hands out zeroed pages only when they are touched
        self._key_values = np.zeros(
            (config.num_layers, 2, config.num_granules, config.num_kv_heads, GRANULE, config.head_dim),
            _STORAGE[config.dtype],
        )
        self._key_caches: list[NDArray[Any]] = [layer[0] for layer in self._key_values]
        self._value_caches: list[NDArray[Any]] = [layer[1] for layer in self._key_values]
        self._arenas = access.Arenas(self._key_values, config.dtype)
        self._spare_arrays: list[StepArrays] = []
        self._sizes = np.empty(config.num_granules + config.max_seqs + 8, np.int32)
        self._ends = np.empty(config.max_seqs, np.int32)
        self._counters = Counters()

    # -- opening and closing -----------------------------------------------------------------------------------------

    def open(self, prompts: Sequence[ArrayLike]) -> tuple[Int64Array, Int32Array]:
        """Open a sequence for each prompt, holding the longest prefix of it that is cached already.

        Args:
            prompts: token ids of each prompt, ``[n]`` integers; may be empty.

        Returns:
            ``(seq_ids, cached_lens)``: ``[batch]`` int64, and ``[batch]`` int32 tokens that need not be computed, a
            multiple of 8 and shorter than the prompt.

        Raises:
            CacheFullError: more than ``max_seqs`` sequences would be open.
            SequenceError: a prompt is no vector of integers.
        """
        tokens = [_as_prompt(prompt, i) for i, prompt in enumerate(prompts)]
        with self._lock:
            opened = self._new_rows(len(tokens), "open")
            nodes, granules = self._pool.nodes, self._pool.granules
            nodes.counts[CLOCK] += 1
            cached_lens = np.zeros(len(tokens), np.int32)
            found = np.empty(max((len(prompt) for prompt in tokens), default=0) // 8 + 1, np.int32)
            for i, (row, prompt) in enumerate(zip(opened, tokens, strict=True)):
                most = max(0, (min(len(prompt), self.config.seq_len_limit) - 1) // 8)
                count = match(nodes, prompt, most, found) if self.config.prefix_caching else 0
                cached_lens[i] = 8 * rows.adopt(self._rows, row, found, count, nodes, granules)
                self._counters.prompt_tokens += len(prompt)
                self._counters.reused_tokens += int(cached_lens[i])
            self._note_use()
            return self._ids_of(opened), cached_lens

    def close(self, seq_ids: ArrayLike) -> None:
        """End sequences. Their full granules stay findable until their memory is needed; their ids never come back.

        Raises:
            SequenceError: an id is not of an open or preempted sequence, or stands twice.
        """
        with self._lock:
            closing = self._rows_of(seq_ids, (OPEN, PREEMPTED))
            self._release_rows(closing)

    def lengths(self, seq_ids: ArrayLike) -> Int32Array:
        """``[batch]`` int32 tokens that each sequence holds; 0 while preempted by ``"drop"``."""
        with self._lock:
            which = self._rows_of(seq_ids, (OPEN, IN_STEP, PREEMPTED, PINNED))
            lengths: Int32Array = self._rows.info[which, LENGTH].astype(np.int32)
            return lengths

    # -- steps -------------------------------------------------------------------------------------------------------

    def begin_step(self, seq_ids: ArrayLike, num_new_tokens: int | ArrayLike) -> Step:
        """Make room for new tokens of a batch and say where they go.

        Args:
            seq_ids: ``[batch]`` ids of open sequences, each once, in the order of the step's rows.
            num_new_tokens: one number for all rows, or ``[batch]`` of them; 0 to read only.

        Returns:
            The `Step`. Rows that could not get memory are not ``ok`` and are left as they were; the others can go on.
            Memory is granted in the order of the rows.

        Raises:
            SequenceError: an id is unknown, closed, preempted, in another open step, or stands twice.
            StepError: ``num_new_tokens`` is negative, above any cache, or has another shape.
        """
        ids = seq_ids.copy() if _is_ids(seq_ids) else _as_ids(seq_ids)
        batch = len(ids)
        counts: int | Int64Array
        if type(num_new_tokens) is not int:
            counts = _as_counts(num_new_tokens, batch)
            total = int(counts.sum())
        elif 0 <= num_new_tokens <= MAX_GRANULES * GRANULE:
            counts, total = num_new_tokens, batch * num_new_tokens
        else:
            raise StepError(f"num_new_tokens: expected 0 to {MAX_GRANULES * GRANULE}, got {num_new_tokens}")
        with self._lock:
            arrays = self._take_arrays(batch, total)
            arrays.counts[:batch] = counts
            policy = self._pool.policy
            code, where, num_need, num_merge, width = rows.begin(
                self._rows, arrays, ids, self.config.seq_len_limit, policy.merges
            )
            if code:
                self._spare_arrays.append(arrays)
                raise self._bad_id(code, int(ids[where]), (OPEN,))
            try:
                if num_merge:
                    self._merge_tails(arrays, num_merge)
                if num_need:
                    width = max(width, self._grow(arrays, num_need))
            except BaseException:
                rows.reopen(self._rows, arrays, batch)
                self._spare_arrays.append(arrays)
                raise
            if width > arrays.table.shape[1]:
                arrays = _widen(arrays, width)
                rows.sync_tables(self._rows, arrays, batch)
            elif num_merge:
                rows.sync_tables(self._rows, arrays, batch)
            return Step(self, ids, arrays, total)

    def end_step(self, step: Step, token_ids: ArrayLike | None = None) -> None:
        """End a step: the lengths of its rows advance, and granules that became full can be found by later prompts.

        Args:
            step: the open step.
            token_ids: ``[num_tokens]`` the tokens whose keys and values the step appended, in its order. Without them
                nothing is published, and what these sequences append later is not either.

        Raises:
            StepError: the step has ended, belongs to another cache, or ``token_ids`` does not fit it.
        """
        with self._lock:
            self._require_own(step)
            batch = len(step.seq_ids)
            if token_ids is None or not self.config.prefix_caching:
                if token_ids is not None:
                    as_tokens(token_ids, len(step.slot_mapping))
                rows.advance(self._rows, step._arrays, batch)
            else:
                tokens = as_tokens(token_ids, len(step.slot_mapping))
                rows.advance_and_publish(self._rows, step._arrays, batch, tokens, self._pool.nodes, self._pool.granules)
            self._counters.num_steps += 1
            self._end(step)

    def abort_step(self, step: Step) -> None:
        """End a step as if it had not happened; blocks it took stay with their sequences as room to grow."""
        with self._lock:
            self._require_own(step)
            rows.reopen(self._rows, step._arrays, len(step.seq_ids))
            self._end(step)

    def _end(self, step: Step) -> None:
        step._is_open = False
        self._spare_arrays.append(step._arrays)

    def _require_own(self, step: Step) -> None:
        if not isinstance(step, Step) or step._cache is not self:
            raise StepError(f"step: expected one of this cache, got {step!r}")
        step._require_open()

    def _check_layer(self, layer: int) -> None:
        self._arenas.require_layer(layer)

    # -- growth ------------------------------------------------------------------------------------------------------

    def _grow(self, arrays: StepArrays, num_need: int) -> int:
        """Give blocks to the rows that need them, in order, and complete them; returns the widest of them.

        The status of those that get none says why.
        """
        pool, policy = self._pool, self._pool.policy
        if len(pool.kept_back) < pool.reserve:
            pool.replenish()
        num_free = pool.allocator.num_free
        num_blocks, wanted = rows.choose_sizes(
            self._rows,
            arrays,
            num_need,
            num_free + 8 * len(pool.kept_back),
            pool.num_cached,
            pool.num_granules,
            policy.rule,
            policy.tail,
            policy.largest,
            pool.offered,
            self._sizes,
            self._ends,
        )
        if wanted > num_free:
            pool.make_room(wanted)
        sizes = self._sizes[:num_blocks]
        starts = pool.allocate_some(sizes)
        first, num_refused, width = rows.attach_all(
            self._rows, pool.granules, arrays, 0, num_need, starts, sizes, self._ends, pool.freed
        )
        if num_refused:
            pool.free_listed(num_refused)
        if first < num_need:
            for i in range(first, num_need):
                self._grow_hard(arrays, i, starts)
            width = rows.complete(self._rows, arrays, num_need)
        if num_blocks < num_need or num_refused or first < num_need:
            self._counters.num_stalls += int(np.count_nonzero(arrays.status[arrays.work[0, :num_need]]))
        self._note_use()
        return int(width)

    def _grow_hard(self, arrays: StepArrays, i: int, starts: Int32Array) -> None:
        """Find room for one row by whatever sizes there are: memory is short or in small pieces."""
        b = int(arrays.work[0, i])
        if arrays.status[b] != OK:
            return
        pool, row = self._pool, int(arrays.rows[b])
        place = slice(int(self._ends[i - 1]) if i else 0, int(self._ends[i]))
        runs = [
            (int(start), int(size)) for start, size in zip(starts[place], self._sizes[place], strict=True) if start >= 0
        ]
        info = self._rows.info[row]
        needed = int(-(-(info[LENGTH] + arrays.counts[b]) // 8) - info[CAPACITY]) - sum(size for _, size in runs)
        more = pool.fit(needed)
        if more is None and pool.give_up_reserve():
            more = pool.fit(needed)
        if more is None:
            arrays.status[b] = OUT_OF_BLOCKS
        elif self._attach(row, runs + more):
            return
        else:
            arrays.status[b] = ROW_FULL
        pool.free_runs(runs + (more or []))

    def _attach(self, row: int, runs: list[tuple[int, int]]) -> bool:
        starts = np.array([start for start, _ in runs], np.int32)
        sizes = np.array([size for _, size in runs], np.int32)
        return bool(rows.attach(self._rows, self._pool.granules, row, starts, sizes))

    def _merge_tails(self, arrays: StepArrays, num_merge: int) -> None:
        """Merge the last 64 tokens of rows where these have just become full."""
        candidates = arrays.rows[arrays.work[1, : min(num_merge, self.config.migrate_budget)]]
        self._merge(candidates, (self._rows.info[candidates, LENGTH] >> 3).astype(np.int32))

    def _merge(self, candidates: Int32Array, ends: Int32Array) -> int:
        """Copy 8 granules in small blocks into one block of 64 tokens, for as many candidates as there is room."""
        pool = self._pool
        private = rows.keep_private_merges(self._rows, candidates, ends, pool.granules)
        if not private:
            return 0
        targets = pool.take_targets(private)
        if len(targets):
            sources = np.empty(8 * len(targets), np.int32)
            rows.merge_all(self._rows, candidates, ends, targets, pool.nodes, pool.granules, sources)
            self._copy(sources, (targets[:, None] + np.arange(8, dtype=np.int32)).ravel(), 64 * len(targets))
            pool.freed[: len(sources)] = sources
            pool.free_listed(len(sources))
        self._counters.num_merges += len(targets)
        self._counters.num_failed_merges += private - len(targets)
        return len(targets)

    def _copy(self, sources: ArrayLike, targets: ArrayLike, num_tokens: int) -> None:
        copy_granules(self._key_values, sources, targets)
        self._counters.copied_tokens += num_tokens

    # -- forks, beams, speculation -----------------------------------------------------------------------------------

    def fork(self, seq_ids: ArrayLike, n: int) -> Int64Array:
        """Open ``n`` copies of each sequence. Full granules are shared; the last, partly filled one is copied.

        Returns:
            ``[batch, n]`` int64 ids.

        Raises:
            SequenceError: an id is not of an open sequence.
            CacheFullError: too few rows, or too few blocks for the copies; nothing was forked.
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0:
            raise SequenceError(f"n: expected a number of copies, got {n!r}")
        with self._lock:
            parents = self._rows_of(seq_ids, (OPEN,))
            children = self._fork_rows(np.repeat(parents, n), "fork")
            return self._ids_of(children).reshape(len(parents), int(n))

    def _fork_rows(self, parents: Int32Array, what: str) -> Int32Array:
        self._require_closed_rows(len(parents), what)
        tails = self._copy_tails(self._rows, parents, what)
        children = self._new_rows(len(parents), what)
        nodes, granules = self._pool.nodes, self._pool.granules
        for parent, child, tail in zip(parents, children, tails, strict=True):
            keep = int(self._rows.info[parent, LENGTH]) >> 3
            rows.hold_first(self._rows, parent, keep, nodes, granules)
            rows.copy_first(self._rows, parent, self._rows, child, keep)
            rows.copy_tokens(self._rows, parent, self._rows, child)
            if tail:
                self._attach(child, tail)
        self._note_use()
        return children

    def _copy_tails(self, source: rows.Rows, parents: Int32Array, what: str) -> list[list[tuple[int, int]]]:
        """A copy of the partly filled granule of each parent, as the runs to attach; empty where there is none."""
        lengths = source.info[parents, LENGTH]
        partial = np.flatnonzero(lengths & 7)
        tails: list[list[tuple[int, int]]] = [[] for _ in parents]
        if len(partial):
            for i in partial:
                self._require_entry(source, int(parents[i]), int(lengths[i]) >> 3, what)
            granted = self._pool.allocate_all([self._tail_size()] * len(partial), what)
            sources = [rows.granule_at(source, int(parents[i]), int(lengths[i]) >> 3) for i in partial]
            self._copy(sources, [runs[0][0] for runs in granted], int((lengths[partial] & 7).sum()))
            for i, runs in zip(partial, granted, strict=True):
                tails[i] = runs
        return tails

    def _tail_size(self) -> int:
        """Granules of the block that receives a copied tail."""
        policy = self._pool.policy
        return min(int(size) for size in self._pool.offered if size >= policy.tail)

    def _require_entry(self, source: rows.Rows, row: int, keep: int, what: str) -> None:
        """One entry more must fit after a row's first ``keep`` granules."""
        used = rows.find_entry(source, row, keep - 1) + 1 if keep else 0
        if used >= self._rows.entries.shape[1]:
            raise CacheFullError(f"{what}: expected rows of at most {used - 1} entries, max_entries is {used}")

    def reorder(self, seq_ids: ArrayLike, parents: ArrayLike) -> None:
        """Make sequence ``i`` continue what sequence ``parents[i]`` holds, as beam search does once a step.

        Args:
            seq_ids: ``[batch]`` open sequences.
            parents: ``[batch]`` integers, positions in ``seq_ids``.

        Raises:
            SequenceError: an id is not of an open sequence, or a parent is no position.
            CacheFullError: too few blocks for the copies of partly filled granules; nothing was reordered.
        """
        with self._lock:
            batch = self._rows_of(seq_ids, (OPEN,))
            origin = np.asarray(parents)
            if origin.shape != batch.shape or (origin.size and origin.dtype.kind not in "iu"):
                raise SequenceError(f"parents: expected [{len(batch)}] integers, got {origin.dtype} {origin.shape}")
            if len(origin) and not (origin.min() >= 0 and origin.max() < len(batch)):
                raise SequenceError(f"parents: expected 0 to {len(batch) - 1}, got {origin.tolist()}")
            changed = np.flatnonzero(origin != np.arange(len(batch)))
            if not len(changed):
                return
            # copies of the rows as they are: a parent may itself be overwritten
            before = self._copy_of_rows(batch)
            origin = origin.astype(np.int32)
            tails = self._copy_tails(before, origin[changed], "reorder")
            nodes, granules = self._pool.nodes, self._pool.granules
            nodes.counts[CLOCK] += 1
            keeps = before.info[origin, LENGTH] >> 3
            for i in changed:
                rows.hold_first(before, origin[i], keeps[i], nodes, granules)
            num_freed = 0
            for i in changed:
                num_freed = rows.shrink(self._rows, batch[i], 0, nodes, granules, self._pool.freed, num_freed)
            self._pool.free_listed(num_freed)
            for i, tail in zip(changed, tails, strict=True):
                rows.copy_first(before, origin[i], self._rows, batch[i], keeps[i])
                rows.copy_tokens(before, origin[i], self._rows, batch[i])
                if tail:
                    self._attach(int(batch[i]), tail)
            self._note_use()

    def _copy_of_rows(self, which: Int32Array) -> rows.Rows:
        width = int(self._rows.info[which, NUM_ENTRIES].max(initial=0))
        return rows.Rows(
            self._rows.info[which],
            self._rows.entries[which, :width],
            self._rows.starts[which, :width],
            self._rows.marks[which],
            self._rows.chain[which],
            self._rows.chain_uid[which],
            self._rows.pending[which],
            self._rows.clock.copy(),
        )

    def truncate(self, seq_ids: ArrayLike, new_lens: ArrayLike) -> None:
        """Forget the last tokens of sequences, as after rejected draft tokens.

        Args:
            seq_ids: ``[batch]`` open sequences.
            new_lens: ``[batch]`` integers, 0 to the present length.

        Raises:
            SequenceError: an id is not of an open sequence, or a length is out of range.
            CacheFullError: a partly kept granule is shared, and there is no block for a copy; nothing was truncated.
        """
        with self._lock:
            batch = self._rows_of(seq_ids, (OPEN,))
            targets = np.asarray(new_lens)
            if targets.shape != batch.shape or (targets.size and targets.dtype.kind not in "iu"):
                raise SequenceError(f"new_lens: expected [{len(batch)}] integers, got {targets.dtype} {targets.shape}")
            lengths = self._rows.info[batch, LENGTH]
            bad = np.flatnonzero((targets < 0) | (targets > lengths))
            if len(bad):
                i = int(bad[0])
                raise SequenceError(f"new_lens[{i}]: expected 0 to {lengths[i]}, the present length, got {targets[i]}")
            pool = self._pool
            refs = pool.granules.refs
            shared = [
                i
                for i in range(len(batch))
                if targets[i] & 7 and refs[rows.granule_at(self._rows, batch[i], targets[i] >> 3)] > 1
            ]
            copies = {}
            if shared:
                for i in shared:
                    self._require_entry(self._rows, int(batch[i]), int(targets[i]) >> 3, "truncate")
                granted = pool.allocate_all([self._tail_size()] * len(shared), "truncate")
                sources = [rows.granule_at(self._rows, batch[i], targets[i] >> 3) for i in shared]
                self._copy(sources, [runs[0][0] for runs in granted], int((targets[shared] & 7).sum()))
                copies = dict(zip(shared, granted, strict=True))
            pool.nodes.counts[CLOCK] += 1
            for i in range(len(batch)):
                self._truncate_row(int(batch[i]), int(targets[i]), copies.get(i))

    def _truncate_row(self, row: int, length: int, tail: list[tuple[int, int]] | None) -> None:
        pool = self._pool
        nodes, granules = pool.nodes, pool.granules
        if length == self._rows.info[row, LENGTH]:
            return
        rows.walk_back(self._rows, row, length, nodes)
        self._rows.info[row, LENGTH] = length
        num_freed = 0
        if tail is not None:
            keep = length >> 3
        else:
            keep = (length + 7) >> 3
            if length & 7:
                # the granule will be written again: what it holds must no longer be found
                node = int(granules.node[rows.granule_at(self._rows, row, length >> 3)])
                if node >= 0:
                    num_freed = unpublish(nodes, granules, node, pool.freed, num_freed)
            keep = rows.spare_end(self._rows, row, keep, granules)
        num_freed = rows.shrink(self._rows, row, keep, nodes, granules, pool.freed, num_freed)
        pool.free_listed(num_freed)
        if tail is not None:
            self._attach(row, tail)

    # -- leases, preemption ------------------------------------------------------------------------------------------

    def pin(self, seq_ids: ArrayLike) -> "Lease":
        """Hold what sequences hold now: it is not written, moved or freed until the lease ends.

        The sequences themselves go on. The lease has rows of its own, which a step with 0 new tokens can read.

        Raises:
            SequenceError: an id is not of an open sequence.
            CacheFullError: too few rows or blocks.
        """
        with self._lock:
            held = self._fork_rows(self._rows_of(seq_ids, (OPEN,)), "pin")
            self._rows.info[held, STATE] = PINNED
            return Lease(self, self._ids_of(held), held)

    def preempt(self, seq_ids: ArrayLike, to: str = "drop") -> None:
        """Take the memory of sequences away for others; `restore` brings them back.

        Args:
            seq_ids: ``[batch]`` open sequences.
            to: ``"drop"``: keys and values are forgotten, but for full granules that stay findable for as long as
                their memory is not needed. ``"host"``: they are copied to host memory outside the pool.

        Raises:
            SequenceError: an id is not of an open sequence, or ``to`` is neither.
        """
        if to not in ("drop", "host"):
            raise SequenceError(f"to: expected 'drop' or 'host', got {to!r}")
        with self._lock:
            batch = self._rows_of(seq_ids, (OPEN,))
            pool = self._pool
            pool.nodes.counts[CLOCK] += 1
            num_freed = 0
            for row in batch:
                used = -(-int(self._rows.info[row, LENGTH]) // 8)
                chain, uids = np.empty(used, np.int32), np.empty(used, np.int64)
                count, saved = 0, None
                if to == "host":
                    held = np.empty(used, np.int32)
                    rows.list_granules(self._rows, row, used, held)
                    saved = self._key_values[:, :, held]
                else:
                    count = rows.list_chain(self._rows, row, pool.nodes, chain, uids)
                    self._rows.info[row, LENGTH] = 0
                self._preempted[int(row)] = Preempted(chain[:count], uids[:count], saved)
                num_freed = rows.shrink(self._rows, row, 0, pool.nodes, pool.granules, pool.freed, num_freed)
                self._rows.info[row, STATE] = PREEMPTED
            pool.free_listed(num_freed)
            self._counters.num_preempted += len(batch)

    def restore(self, seq_ids: ArrayLike) -> NDArray[np.bool_]:
        """Bring preempted sequences back.

        A sequence preempted to the host holds all its tokens again. A dropped one holds the prefix that is still
        cached, see `lengths`; its engine computes the rest again.

        Returns:
            ``[batch]`` bool: which are open again; the others found no memory and stay preempted.

        Raises:
            SequenceError: an id is not of a preempted sequence.
        """
        with self._lock:
            batch = self._rows_of(seq_ids, (PREEMPTED,))
            return np.array([self._restore_row(int(row)) for row in batch], np.bool_)

    def _restore_row(self, row: int) -> bool:
        pool, saved = self._pool, self._preempted[row]
        if saved.key_values is None:
            still = np.flatnonzero(pool.nodes.uid[saved.nodes] != saved.uids)
            count = int(still[0]) if len(still) else len(saved.nodes)
            rows.adopt(self._rows, row, saved.nodes, count, pool.nodes, pool.granules)
            self._counters.reused_tokens += 8 * count
        else:
            needed = saved.key_values.shape[2]
            pool.make_room(needed)
            runs = pool.fit(needed) if needed else []
            if runs is None:
                return False
            if not self._attach(row, runs):
                pool.free_runs(runs)
                return False
            held = np.empty(needed, np.int32)
            rows.list_granules(self._rows, row, needed, held)
            self._key_values[:, :, held] = saved.key_values
        self._rows.info[row, STATE] = OPEN
        del self._preempted[row]
        self._note_use()
        return True

    # -- maintenance -------------------------------------------------------------------------------------------------

    def compact(self, max_tokens: int) -> int:
        """Merge small blocks into blocks of 64 tokens, and move blocks together to make room for them.

        Args:
            max_tokens: most tokens to copy.

        Returns:
            Tokens copied.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | np.integer) or max_tokens < 0:
            raise StepError(f"max_tokens: expected a number of tokens, got {max_tokens!r}")
        with self._lock:
            return compaction.compact(self, int(max_tokens))

    def sync(self) -> None:
        """Wait until the device has done what was asked; nothing to do on the CPU."""

    def stats(self) -> CacheStats:
        """Figures of this moment."""
        with self._lock:
            return collect(self._rows, self._pool, self._counters, self.config)

    def check_integrity(self) -> None:
        """Verify every invariant of the cache and of its allocator; for tests.

        Raises:
            IntegrityError: one does not hold.
        """
        with self._lock:
            snapshots.check_cache(self)

    def snapshot(self) -> bytes:
        """Everything the cache holds, keys and values included, for `from_snapshot`.

        Raises:
            StepError: a step or a lease is open.
        """
        with self._lock:
            return snapshots.pack_cache(self)

    @classmethod
    def from_snapshot(cls, config: CacheConfig, data: bytes) -> "KVCache":
        """A cache as `snapshot` saw it; sequence ids stay valid.

        Raises:
            CacheSnapshotError: ``data`` is damaged, or was taken with another configuration.
        """
        cache = cls(config)
        snapshots.unpack_cache(cache, data)
        return cache

    @property
    def allocator(self) -> Any:
        """The allocator, for its figures. Blocks taken from it belong to the caller."""
        return self._pool.allocator

    def key_cache(self, layer: int) -> NDArray[Any]:
        """``[num_granules, num_kv_heads, 8, head_dim]`` keys of a layer; uint16 for bfloat16. A view, not a copy."""
        self._check_layer(layer)
        return self._key_caches[layer]

    def value_cache(self, layer: int) -> NDArray[Any]:
        """As `key_cache`, of the values."""
        self._check_layer(layer)
        return self._value_caches[layer]

    def __repr__(self) -> str:
        stats = self.stats()
        return f"KVCache({stats.num_seqs} sequences, {stats.num_tokens} tokens, {self._pool.allocator!r})"

    # -- rows and ids ------------------------------------------------------------------------------------------------

    def _require_closed_rows(self, count: int, what: str) -> None:
        if count > len(self._closed_rows):
            raise CacheFullError(
                f"{what}: expected at most {len(self._closed_rows)} new sequences (max_seqs is "
                f"{self.config.max_seqs}), got {count}"
            )

    def _new_rows(self, count: int, what: str) -> Int32Array:
        """Open empty rows with new ids."""
        self._require_closed_rows(count, what)
        opened = np.array([self._closed_rows.pop() for _ in range(count)], np.int32)
        info = self._rows.info
        info[opened, GENERATION] += 1
        info[opened, STATE] = OPEN
        info[opened, LENGTH] = 0
        self._rows.chain[opened] = ROOT
        self._rows.chain_uid[opened] = ROOT_UID
        return opened

    def _release_rows(self, closing: Int32Array) -> None:
        pool = self._pool
        pool.nodes.counts[CLOCK] += 1
        pool.free_listed(rows.close_rows(self._rows, closing, pool.nodes, pool.granules, pool.freed))
        for row in closing.tolist():
            self._preempted.pop(row, None)
            self._closed_rows.append(row)

    def _ids_of(self, which: Int32Array) -> Int64Array:
        ids: Int64Array = (self._rows.info[which, GENERATION] << ID_BITS) | which
        return ids

    def _rows_of(self, seq_ids: ArrayLike, states: tuple[int, ...]) -> Int32Array:
        """The rows of ids that are each in one of the states, or SequenceError."""
        ids = _as_ids(seq_ids)
        which = np.empty(len(ids), np.int32)
        code, where = rows.check_ids(self._rows, ids, sum(1 << state for state in states), which)
        if code:
            raise self._bad_id(code, int(ids[where]), states)
        return which

    def _bad_id(self, code: int, seq_id: int, states: tuple[int, ...]) -> SequenceError:
        wanted = " or ".join(STATE_NAMES[state] for state in states)
        if code == rows.BAD_TWICE:
            return SequenceError(f"seq_ids: expected every sequence once, got {seq_id} twice")
        if code == rows.BAD_ID:
            return SequenceError(f"seq_ids: expected sequences that are {wanted}, got {seq_id}, unknown or closed")
        state = STATE_NAMES[self._rows.info[seq_id & ((1 << ID_BITS) - 1), STATE]]
        return SequenceError(f"seq_ids: expected sequences that are {wanted}, got {seq_id}, which is {state}")

    # -- arrays of steps ---------------------------------------------------------------------------------------------

    def _take_arrays(self, batch: int, num_tokens: int) -> StepArrays:
        """Arrays that no open step uses; those of the last step if possible, whose tables are nearly right."""
        arrays = None
        while self._spare_arrays and arrays is None:
            arrays = self._spare_arrays.pop()
            if len(arrays.rows) < batch:
                arrays = None
        if arrays is None:
            arrays = _make_arrays(max(8, 1 << (batch - 1).bit_length()), 16)
        if num_tokens > len(arrays.slot_mapping):
            arrays = arrays._replace(slot_mapping=np.empty(1 << (num_tokens - 1).bit_length(), np.int64))
        return arrays

    def _note_use(self) -> None:
        self._counters.peak_granules = max(self._counters.peak_granules, self._pool.num_used)


class Lease:
    """Granules that stay as they are; made by `KVCache.pin`. Usable in a ``with``.

    Attributes:
        seq_ids: ``[batch]`` ids of the rows that hold them; read them with ``begin_step(lease.seq_ids, 0)`` after
            `commit`, which turns them into ordinary sequences.
        starts, sizes: the runs of granules held, in order.
    """

    def __init__(self, cache: KVCache, seq_ids: Int64Array, held: Int32Array) -> None:
        self.seq_ids = seq_ids
        self._cache = cache
        self._rows = held
        self._is_open = True
        runs = []
        for row in held:
            count = int(cache._rows.info[row, NUM_ENTRIES])
            entries = cache._rows.entries[row, :count]
            runs.append(np.stack([entries & 0xFFFFFF, ((entries >> 24) & 7) + 1]))
        self.starts, self.sizes = np.concatenate(runs, axis=1) if runs else np.empty((2, 0), np.int32)

    def commit(self) -> Int64Array:
        """Turn what is held into open sequences of their own, as a fork would have; returns ``seq_ids``."""
        with self._cache._lock:
            self._end()
            self._cache._rows.info[self._rows, STATE] = OPEN
            return self.seq_ids

    def abort(self) -> None:
        """Let go of everything."""
        with self._cache._lock:
            self._end()
            self._cache._release_rows(self._rows)

    release = abort

    def _end(self) -> None:
        if not self._is_open:
            raise SequenceError("expected an open lease, got one that has ended")
        self._is_open = False

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_open:
            self.abort()


def _widen(arrays: StepArrays, width: int) -> StepArrays:
    """The arrays, with empty tables for rows of ``width`` entries."""
    table = np.full((len(arrays.rows), 1 << (width - 1).bit_length()), -1, np.int32)
    arrays.stamps[:] = -1
    arrays.filled[:] = 0
    return arrays._replace(table=table, starts=table.copy())


def _make_arrays(batch: int, width: int) -> StepArrays:
    table = np.full((batch, width), -1, np.int32)
    return StepArrays(
        table=table,
        starts=table.copy(),
        seq_lens=np.zeros(batch, np.int32),
        cu_seqlens_q=np.zeros(batch + 1, np.int32),
        slot_mapping=np.empty(batch, np.int64),
        status=np.zeros(batch, np.int8),
        rows=np.zeros(batch, np.int32),
        counts=np.zeros(batch, np.int32),
        stamps=np.full(batch, -1, np.int64),
        filled=np.zeros(batch, np.int32),
        work=np.zeros((2, batch), np.int32),
    )


def _is_ids(values: Any) -> TypeGuard[Int64Array]:
    return type(values) is np.ndarray and values.dtype == np.int64 and values.ndim == 1 and values.flags.c_contiguous


def _as_ids(seq_ids: ArrayLike) -> Int64Array:
    ids = np.asarray(seq_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise SequenceError(f"seq_ids: expected [batch] integers, got {ids.dtype} {list(ids.shape)}")
    return np.ascontiguousarray(ids, np.int64)


def _as_counts(num_new_tokens: ArrayLike, batch: int) -> Int64Array:
    counts = np.asarray(num_new_tokens)
    if counts.dtype.kind not in "iu" and counts.size:
        raise StepError(f"num_new_tokens: expected integers, got {counts.dtype}")
    if counts.shape not in ((batch,), ()):
        raise StepError(f"num_new_tokens: expected a number or [{batch}] of them, got shape {list(counts.shape)}")
    if counts.size and not (counts.min() >= 0 and counts.max() <= MAX_GRANULES * GRANULE):
        raise StepError(f"num_new_tokens: expected 0 to {MAX_GRANULES * GRANULE}, got {counts.min()} to {counts.max()}")
    return np.broadcast_to(counts, (batch,)).astype(np.int64)


def _as_prompt(prompt: ArrayLike, index: int) -> Int64Array:
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise SequenceError(
            f"prompts[{index}]: expected a vector of token ids, got {tokens.dtype} {list(tokens.shape)}"
        )
    return np.ascontiguousarray(tokens, np.int64)
