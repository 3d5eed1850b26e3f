"""`KVCache`: the sequences of an engine, their memory and their block table.

This file is the interface: it checks arguments, takes the lock and calls. The state is in `kvtoolkit.cache.state`;
every operation has a file of its own beside this one.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from allocators._calls import exclusive, exclusive_or_later
from kvtoolkit.arrays.types import ArrayLike, Int32Array, Int64Array
from kvtoolkit.cache import compaction, group_steps, integrity, preemption, prefix_hits, sharing, snapshot
from kvtoolkit.cache.grants import BlockGranter
from kvtoolkit.cache.group_steps import GroupSteps
from kvtoolkit.cache.hints import Hints
from kvtoolkit.cache.layers.graph_names import GraphNames
from kvtoolkit.cache.layers.staging import make_staging
from kvtoolkit.cache.lease import Lease
from kvtoolkit.cache.shared_allocator import SharedAllocator
from kvtoolkit.cache.state import repair, step_passes
from kvtoolkit.cache.state.arguments import MAX_TOKENS, as_counts, as_ids, as_prompt, as_tokens, as_vector, is_ids
from kvtoolkit.cache.state.block_table import (
    CLOSED,
    END_EXTRA,
    FIRST_EXTRA,
    IN_STEP,
    LENGTH,
    OPEN,
    PINNED,
    PREEMPTED,
    ROOT_OF,
    STATE,
)
from kvtoolkit.cache.state.cache_state import CacheState
from kvtoolkit.cache.state.identity import as_extras, as_salts, as_text, forget_prefixes
from kvtoolkit.cache.state.prefix_index import match
from kvtoolkit.cache.state.repair import Repairs
from kvtoolkit.cache.state.sizes import require_tables_fit
from kvtoolkit.cache.state.step_arrays import SpareArrays
from kvtoolkit.cache.stats import CacheStats, collect
from kvtoolkit.cache.step import Step
from kvtoolkit.cache.storage.upload import make_upload
from kvtoolkit.cache.tiering.demoter import Demoter
from kvtoolkit.cache.tiering.places import Places
from kvtoolkit.cache.tiering.sparse import SparseReads
from kvtoolkit.cache.views import Views
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cuda.pool import DevicePool
from kvtoolkit.errors import ArgumentError, ConfigError, StepError

_LEAST_TOKENS_REFUSED = 1 << 20
"""So many new tokens a step may always ask for, however small the pool is; rows without room just stall."""


class KVCache(Hints, Views):
    """The KV cache of one model, for a batch at a time: paged memory, prefix reuse, forks, preemption.

    Args:
        config: see `CacheConfig`.
        storage: False = without keys and values, for simulations; `Step.append` and `Step.attend` are refused then.

    Raises:
        ConfigError: the tables would not fit into this machine's memory; nothing of that size is allocated.

    Thread-safe: one lock is held during every call. Calls that take several sequences do all of them, or raise and do
    none. The exceptions are `begin_step` and `restore`, which say for each row whether it succeeded.

    Source: block tables, Kwon et al. 2023 (arXiv:2309.06180), sec. 4. Here granules of 8 tokens are shared, and a
    partly filled granule is copied when it would be shared, so kernels never have to copy on write.
    """

    def __init__(self, config: CacheConfig, *, storage: bool = True) -> None:
        if not isinstance(config, CacheConfig):
            raise ConfigError(f"config: expected a CacheConfig, got {type(config).__name__}")
        require_tables_fit(config)
        self.config = config
        self.dtype = config.dtype
        self._state = CacheState(config, has_storage=storage)
        self._group = self._state.group
        self._calls = self._state.calls
        self._granter = BlockGranter(self._group)
        tiers = None if config.is_grouped else config.tier_config
        self._places = Places(self._group, tiers) if tiers is not None and tiers.host is not None else None
        self._staging = make_staging(self._group.storage, config)
        self._sparse = None if tiers is None or tiers.sparse is None else SparseReads(self._group, tiers)
        self._demoter = None  # of a cache with one group
        if tiers is not None and tiers.quantized:
            self._demoter = Demoter(self._group, tiers, self._places)
        self._arrays = SpareArrays()
        self._most_tokens_of_one = config.seq_len_limit
        self._most_new_tokens = max(_LEAST_TOKENS_REFUSED, 16 * 8 * config.num_granules)
        self._upload = make_upload(config.backend, self._group.storage.device)
        self._arenas = group_steps.arenas_of(config, self._group)
        self._group_steps: list[GroupSteps] | None = None
        if config.is_grouped:
            first = GroupSteps(self._group, self._arenas, self._granter, self._arrays)
            self._group_steps = [first, *(group_steps.make(config, group) for group in self._state.others)]
        self._graph_names = GraphNames([self._arenas, *(part.arenas for part in self._group_steps or ())], config)
        hot, shared = self._group.blocks.allocator, SharedAllocator(self._group.blocks.ledger, self._calls)
        self._allocator = hot if isinstance(hot, DevicePool) else shared  # kernels take blocks of a pool, too

    # -- opening and closing -----------------------------------------------------------------------------------------

    @exclusive
    def open(
        self, prompts: Sequence[ArrayLike], *, salt: Any = None, extra_keys: Any = None
    ) -> tuple[Int64Array, Int32Array]:
        """Open a sequence for each prompt; it begins with the longest prefix that is cached already.

        Salts and extra keys are compared in full. They stay with a sequence and its forks until these are closed.
        Sequences of all salts share the memory, so one tenant's prefixes may be evicted for another's.

        Args:
            prompts: token ids of each prompt, ``[n]`` integers; may be empty. Any 64-bit integers are valid, negative
                ones too. Floats, bools and numbers of 2**63 or more are refused.
            salt: whose prompt it is, such as a tenant or an adapter (LoRA): an int, str or bytes for all prompts, or a
                list with one for each (None = no salt). A prompt finds only what was computed under the same salt, or
                without a salt if it has none. ``1``, ``"1"`` and ``b"1"`` are different salts.
            extra_keys: what the tokens do not say, such as the hash of an image at its first placeholder token: for
                each prompt None or a list of ``(position, key)``. The key is an int, str or bytes. It is part of the
                identity of the 8 tokens around the position, and so of everything after them. Positions count from the
                beginning of the sequence; they may be those of tokens yet to come.

        Returns:
            ``(seq_ids, cached_lens)``: ``[batch]`` int64, and ``[batch]`` int32 numbers of tokens that need not be
            computed, multiples of 8 that are shorter than the prompt. With quantized tiers only hot tokens are found,
            unless ``prefix_reuse_tiers`` is ``"all"``. Layers with a window must still have the last window of these
            tokens.

        Raises:
            CacheFullError: more than ``max_seqs`` sequences would be open.
            ArgumentError: a prompt is not a vector of 64-bit integers, or a salt or extra key is not as above.
        """
        try:
            tokens = [as_prompt(prompt, i) for i, prompt in enumerate(prompts)]
        except TypeError:
            raise ArgumentError(f"prompts: expected a sequence of prompts, got {prompts!r:.80}") from None
        salts, extras = as_salts(salt, len(tokens)), as_extras(extra_keys, len(tokens))
        state, counters = self._state, self._state.counters
        state.require_closed_rows(len(tokens), "open")
        if self._places is not None:
            self._places.settle()
        origins = state.identities.origins(salts, extras)
        opened = state.new_rows(len(tokens), "open", origins)
        state.tick()
        nodes, cached_lens = self._group.blocks.nodes, np.zeros(len(tokens), np.int32)
        found = np.empty(max((len(prompt) for prompt in tokens), default=0) // 8 + 1, np.int32)
        for i, (row, prompt) in enumerate(zip(opened, tokens, strict=True)):
            limit = self.config.seq_len_limit if self.config.prefix_caching else 0
            most = max(0, (min(len(prompt), limit) - 1) // 8)
            keys = state.identities.extras[origins[i, FIRST_EXTRA] : origins[i, END_EXTRA]]
            hit = prefix_hits.longest(state, found, match(nodes, origins[i, ROOT_OF], keys, prompt, most, found))
            prefix_hits.attach(state, row, hit)
            cached_lens[i] = 8 * hit.length
            counters.prompt_tokens += len(prompt)
            counters.reused_tokens += int(cached_lens[i])
            counters.num_prefix_hits += bool(cached_lens[i])
            counters.num_prefix_misses += most > 0 and not cached_lens[i]
        state.update_peaks()
        return state.ids_of(opened), cached_lens

    @exclusive_or_later
    def close(self, seq_ids: ArrayLike) -> None:
        """End sequences. Their full granules stay findable until their memory is needed; their ids are not used again.

        With quantized tiers, ``prefix_reuse_tiers`` decides which granules can be found: by default only those before
        a sequence's first quantized tile.

        Raises:
            SequenceError: an id is not that of an open or preempted sequence, or is given twice.
        """
        self._state.release_rows(self._state.rows_of(seq_ids, (OPEN, PREEMPTED)))

    def _close_later(self, seq_ids: Int64Array) -> None:
        """Let the next call close those of the sequences that are still open. For finalizers: it takes no lock."""
        state = self._state
        self._calls.do_later(lambda: repair.close_left(state, seq_ids))

    @exclusive
    def lengths(self, seq_ids: ArrayLike) -> Int32Array:
        """``[batch]`` int32 tokens that each sequence holds; 0 while it is preempted by ``"drop"``."""
        which = self._state.rows_of(seq_ids, (OPEN, IN_STEP, PREEMPTED, PINNED))
        lengths: Int32Array = self._group.table.info[which, LENGTH].astype(np.int32)
        return lengths

    # -- steps -------------------------------------------------------------------------------------------------------

    @exclusive
    def begin_step(
        self, seq_ids: ArrayLike, num_new_tokens: int | ArrayLike, token_ids: ArrayLike | None = None
    ) -> Step:
        """Make room for the new tokens of a batch, and say where they go.

        With quantized tiers, older tokens of any open sequence change their tier here: a few tiles of 64 tokens in each
        step, or as many as this step needs if the hot tier is short of room. New tokens are always hot, so a prompt
        that is larger than the hot tier must be fed in several steps.

        Args:
            seq_ids: ``[batch]`` ids of open sequences, each once, in the order of the step's rows.
            num_new_tokens: one number for all rows, or ``[batch]`` of them; 0 to read only.
            token_ids: what `end_step` takes, which then needs none; canaries (``KVTOOLKIT_CHECK=canary``) note them.

        Returns:
            The `Step`. Rows that got no memory are not ``ok`` and stay as they were; the others can go on. Memory is
            granted in the order of the rows.

        Raises:
            SequenceError: an id is unknown, closed, preempted, in another open step, or given twice.
            ArgumentError: ``num_new_tokens`` is negative, larger than any cache, of another shape, or in all more than
                16 times the pool (and more than 2**20).
        """
        ids = seq_ids.copy() if is_ids(seq_ids) else as_ids(seq_ids).copy()
        batch = len(ids)
        counts: int | Int64Array
        if type(num_new_tokens) is not int:
            counts = as_counts(num_new_tokens, batch)
            total = int(counts.sum())
        elif 0 <= num_new_tokens <= MAX_TOKENS:
            counts, total = num_new_tokens, batch * num_new_tokens
        else:
            raise ArgumentError(f"num_new_tokens: expected 0 to {MAX_TOKENS}, got {num_new_tokens}")
        if total > self._most_new_tokens:
            raise ArgumentError(
                f"num_new_tokens: expected at most {self._most_new_tokens} in all, 16 times the pool, got {total}"
            )
        tokens = None if token_ids is None else as_tokens(token_ids, total)
        if self._group_steps is not None:
            parts = group_steps.begin(self._state, self._group_steps, ids, counts, total, self._most_tokens_of_one)
            return Step(self, ids, parts[0].arrays, total, parts[0].mark, parts, tokens)
        table, arrays = self._group.table, self._arrays.take(batch, total)
        arrays.counts[:batch] = counts
        code, where, num_need, num_merge, width, mark, _ = step_passes.begin(
            table, arrays, ids, self._most_tokens_of_one, self._group.blocks.policy.merges, 0
        )
        if code:
            self._arrays.give_back(arrays, batch, total)
            raise self._state.bad_id(code, int(ids[where]), (OPEN,))
        has_moved = self._demoter is not None and self._demoter.run(arrays, num_need)
        if self._places is not None and self._places.run(arrays, batch, num_need):
            has_moved = True
        if num_merge:
            self._granter.merge_tails(arrays, num_merge)
        if num_need:
            width = max(width, self._granter.grow(arrays, num_need))
        if has_moved:
            width = step_passes.widest(table, arrays, batch)
        if width > arrays.table.shape[1]:
            arrays = self._arrays.widen(arrays, width)
            step_passes.sync_tables(table, arrays, batch)
        elif num_merge or has_moved:
            step_passes.sync_tables(table, arrays, batch)
        return Step(self, ids, arrays, total, mark, None, tokens)

    @exclusive
    def end_step(self, step: Step, token_ids: ArrayLike | None = None) -> None:
        """End a step: the lengths of its rows advance, and later prompts can find the granules that became full.

        Args:
            step: the open step. It must have appended to all layers (`Step.append`, or the run of a `GraphStep`), or to
                none; in the latter case the engine's own kernels are taken to have written the cache.
            token_ids: ``[num_tokens]`` the tokens whose keys and values the step appended, in its order. Without any
                later prompts find neither these tokens nor what the sequences append afterwards.

        Raises:
            ArgumentError: ``token_ids`` does not fit the step.
            ConfigError: a predictor (``tiers.prefetch``) has failed. The step stays open, and the next call ends it
                without asking the predictor.
            StepError: the step has ended, belongs to another cache, or has appended to some layers but not to all. In
                the last case it stays open and no length advances: append to the layers named and end it again, or
                abort it.
        """
        self._require_own(step)
        if step._calls is not None or step._graph_step is not None:
            step._require_all_layers()
        table, blocks, batch = self._group.table, self._group.blocks, len(step.seq_ids)
        tokens = step._tokens if token_ids is None else as_tokens(token_ids, step._num_tokens)
        step._note_masses()
        num_freed = 0
        self._end(step)
        if step._parts is not None:
            if tokens is None or not self.config.prefix_caching:
                group_steps.end(step._parts, batch, step._num_tokens)
            else:
                group_steps.end_and_publish(self._state, step._parts, batch, step._num_tokens, tokens)
            self._state.counters.num_steps += 1
            return
        if tokens is None or not self.config.prefix_caching:
            step_passes.advance(table, step._arrays, batch, step._mark)
        else:
            num_freed = step_passes.advance_and_publish(
                table, step._arrays, batch, step._mark, tokens, self._state.identities.extras,
                blocks.nodes, blocks.granules, blocks.freed,
            )  # fmt: skip
        self._state.counters.num_steps += 1
        self._arrays.give_back(step._arrays, batch, step._num_tokens)
        blocks.free_listed(num_freed)

    @exclusive_or_later
    def abort_step(self, step: Step) -> None:
        """End a step as if it had not happened, except that sequences keep its blocks as room to grow."""
        self._require_own(step)
        self._end(step)
        batch = len(step.seq_ids)
        if step._parts is not None:
            group_steps.abort(step._parts, batch, step._num_tokens)
            return
        step_passes.reopen(self._group.table, step._arrays, batch, step._mark)
        self._arrays.give_back(step._arrays, batch, step._num_tokens)

    def _end(self, step: Step) -> None:
        """Mark a step as ended. This comes first, so that a step whose end is interrupted is not open any more."""
        step._is_open = False
        self._state.handles.pop(step._mark, None)

    def _require_own(self, step: Step) -> None:
        if not isinstance(step, Step) or step._cache is not self:
            got = "one of another cache" if isinstance(step, Step) else repr(step)
            raise StepError(f"step: expected one of this cache, got {got:.80}")
        step._require_open()

    # -- forks, beams, speculation -----------------------------------------------------------------------------------

    @exclusive
    def fork(self, seq_ids: ArrayLike, n: int) -> Int64Array:
        """Open ``n`` copies of each sequence. Full granules are shared; the last, partly filled one is copied.

        Returns:
            ``[batch, n]`` int64 ids. The parents stay open. Use ``ravel()`` for calls that take ``[batch]``.

        Raises:
            SequenceError: an id is not that of an open sequence.
            CacheFullError: there are too few rows, or too few blocks for the copies; nothing was forked.
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0:
            raise ArgumentError(f"n: expected a number of copies, got {n!r}")
        parents = self._state.rows_of(seq_ids, (OPEN,))
        self._state.require_closed_rows(len(parents) * int(n), "fork")
        children = sharing.fork(self._state, np.repeat(parents, n), "fork")
        return self._state.ids_of(children).reshape(len(parents), int(n))

    @exclusive
    def reorder(self, seq_ids: ArrayLike, parents: ArrayLike) -> None:
        """Let sequence ``i`` continue what sequence ``parents[i]`` holds, as beam search does after each step.

        Args:
            seq_ids: ``[batch]`` open sequences.
            parents: ``[batch]`` integers, positions in ``seq_ids``.

        Raises:
            ArgumentError: a parent is not a position.
            SequenceError: an id is not that of an open sequence.
            CacheFullError: there are too few blocks for copies of partly filled granules; nothing was reordered.
        """
        batch = self._state.rows_of(seq_ids, (OPEN,))
        origin = as_vector(parents, "parents", len(batch))
        if len(origin) and not (origin.min() >= 0 and origin.max() < len(batch)):
            raise ArgumentError(f"parents: expected 0 to {len(batch) - 1}, got {origin.tolist()}")
        sharing.reorder(self._state, batch, origin.astype(np.int32))

    @exclusive
    def truncate(self, seq_ids: ArrayLike, new_lens: ArrayLike) -> None:
        """Forget the last tokens of sequences, for example rejected draft tokens.

        If a quantized tile is cut, the tokens kept of it become hot again, with the precision they had in the tile.

        Args:
            seq_ids: ``[batch]`` open sequences.
            new_lens: ``[batch]`` integers, 0 to the present length.

        Raises:
            ArgumentError: a length is out of range, or layers with a window have let go of tokens that the next one
                would see there. Right after a step this is never so, if no sequence ends up shorter than before it.
            SequenceError: an id is not that of an open sequence.
            CacheFullError: a partly kept granule is shared or quantized, and there is no block for a copy; nothing was
                truncated.
        """
        batch = self._state.rows_of(seq_ids, (OPEN,))
        targets = as_vector(new_lens, "new_lens", len(batch))
        lengths = self._group.table.info[batch, LENGTH]
        bad = np.flatnonzero((targets < 0) | (targets > lengths))
        if len(bad):
            i = int(bad[0])
            raise ArgumentError(f"new_lens[{i}]: expected 0 to {lengths[i]}, the present length, got {targets[i]}")
        sharing.require_past(self._state, batch, targets)
        sharing.truncate(self._state, batch, targets)

    # -- leases, preemption ------------------------------------------------------------------------------------------

    @exclusive
    def pin(self, seq_ids: ArrayLike) -> Lease:
        """Hold what sequences hold now: until the lease ends, nothing writes, moves, quantizes or frees it.

        The sequences themselves go on. The lease has rows of its own, which count towards ``max_seqs``.

        Raises:
            SequenceError: an id is not that of an open sequence.
            CacheFullError: there are too few rows or blocks.
        """
        state = self._state
        held = sharing.fork(state, state.rows_of(seq_ids, (OPEN,)), "pin")
        lease = Lease(state, held)
        state.register_handle(lease, lease._mark)
        return lease

    @exclusive
    def preempt(self, seq_ids: ArrayLike, to: str = "drop") -> None:
        """Free the memory of sequences for others; `restore` brings the sequences back.

        Args:
            seq_ids: ``[batch]`` open sequences.
            to: ``"drop"``: keys and values are forgotten, except that full granules stay findable until their memory is
                needed, as after `close`. ``"host"``: they are copied to host memory outside the pool, once if several
                preempted sequences share them. In a cache with host memory (``tiers={"host": ...}``) they move there
                instead, as `offload` moves them: the call returns at once, and the memory becomes free when the copies
                are done, or at once when it is needed. Warm tiles, and what open sequences hold too, stay on the
                device. A sequence for which host memory has no room is copied outside the pool.

        Raises:
            ArgumentError: ``to`` is neither.
            SequenceError: an id is not that of an open sequence.
        """
        if not (isinstance(to, str) and to in ("drop", "host")):
            raise ArgumentError(f"to: expected 'drop' or 'host', got {to!r}")
        preemption.preempt(self._state, self._state.rows_of(seq_ids, (OPEN,)), to, self._places)

    @exclusive
    def restore(self, seq_ids: ArrayLike, *, keep_free: int = 0) -> NDArray[np.bool_]:
        """Bring preempted sequences back.

        A sequence that was preempted to the host holds all its tokens again, and later prompts find them. It shares
        full granules that are still in the pool with whoever holds them. A dropped sequence holds the prefix that is
        still cached, see `lengths`; its engine must compute the rest again. One that was moved to host memory is open
        at once, and what it holds begins to move back, as by `prefetch`.

        Args:
            seq_ids: ``[batch]`` preempted sequences, the most urgent first.
            keep_free: tokens of the hot tier that must be free, or cached and so available, after a sequence has come
                back; with host memory, in either place. This is room for its next tokens, so that it is not preempted
                again at once. With an allocator that gives a block size a whole slab (``slab``), a lack of room may
                show only after a slab was begun; a sequence that is refused then may have evicted cached prefixes.

        Returns:
            ``[batch]`` bool: which sequences are open again. There was too little memory for the others, which stay
            preempted.

        Raises:
            ArgumentError: ``keep_free`` is not a number of tokens.
            SequenceError: an id is not that of a preempted sequence.
        """
        if isinstance(keep_free, bool) or not isinstance(keep_free, int | np.integer) or keep_free < 0:
            raise ArgumentError(f"keep_free: expected a number of tokens, got {keep_free!r}")
        batch = self._state.rows_of(seq_ids, (PREEMPTED,))
        return preemption.restore(self._state, batch, int(keep_free), self._places)

    # -- maintenance -------------------------------------------------------------------------------------------------

    @exclusive
    def clear_prefixes(self, salt: Any = None) -> None:
        """Forget all cached prefixes, or those of one salt, for example after a change of the weights.

        Prompts opened from now on find nothing that was computed before. Open sequences keep what they hold, but
        prompts find neither that nor what is appended to it, until the sequence is truncated to 0 tokens or begins
        again after ``preempt(to="drop")``. This includes the tokens of steps that are open now.

        Args:
            salt: a salt as `open` takes it; None = the prefixes of all salts, and those without one.

        Raises:
            ArgumentError: the salt is not an int, str or bytes.
        """
        blocks, salts = self._group.blocks, self._state.identities.salts
        root_uid = None if salt is None else salts.numbers.get(as_text(salt, "salt"))
        if salt is not None and root_uid is None:
            return
        blocks.free_listed(forget_prefixes(self._group.table, salt is None, root_uid or 0, blocks.holdings))
        self._state.forget_lost()

    @exclusive
    def compact(self, max_tokens: int) -> int:
        """Merge small blocks into blocks of 64 tokens, and move blocks together to make room for these.

        A call looks at ``4096 + max_tokens // 8`` entries of the block table, and the next call continues there. So a
        result of 0 only means that there was nothing to do in that part of the table.

        Args:
            max_tokens: budget, the most tokens to copy; one above the slots of all groups is taken as these.

        Returns:
            The number of tokens copied; with several groups of layers, of all groups.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | np.integer) or max_tokens < 0:
            raise ArgumentError(f"max_tokens: expected a number of tokens, got {max_tokens!r}")
        return compaction.compact_all(self._state.groups, int(max_tokens))

    def sync(self) -> None:
        """Wait until the device has finished all work on the current stream; does nothing on the CPU."""
        self._group.storage.sync()

    @exclusive
    def stats(self) -> CacheStats:
        """The present figures of the cache."""
        return collect(self._state, None if self._sparse is None else self._sparse.skipped_mass)

    @exclusive
    def seq_ids(self) -> Int64Array:
        """``[n]`` int64 ids of all sequences that are not closed: open, in a step, preempted, or held by a lease."""
        return self._state.ids_of(np.flatnonzero(self._group.table.info[:, STATE] != CLOSED).astype(np.int32))

    @exclusive
    def end_orphans(self, known: ArrayLike) -> Int64Array:
        """Close every sequence whose id the caller does not know; abort steps and leases that hold one.

        An id is lost, for example, if Ctrl-C comes between the return of `open` and the assignment of its result. Steps
        and leases cannot be lost like that: they end when nothing refers to them any more.

        Args:
            known: ``[n]`` ids to keep, those of leases included. Ids of closed sequences are ignored.

        Returns:
            ``[m]`` int64 ids that were closed.
        """
        return repair.end_orphans(self._state, as_ids(known))

    @exclusive
    def repair(self) -> Repairs:
        """Rebuild everything that can be derived from what sequences hold, and end what nobody can end any more.

        After a call broke off (a plug-in or a copy raised, memory ran out, Ctrl-C), the next call does this by itself.
        Sequences, steps, leases and blocks that somebody still refers to stay as they are.

        Returns:
            What was put in order since the last call of `repair`, by this call and by others.
        """
        state = self._state
        repair.settle(state)
        found, state.repairs = state.repairs, Repairs()
        return found

    @exclusive
    def check_integrity(self) -> None:
        """Verify every invariant of the cache and of its allocator; for tests.

        Raises:
            IntegrityError: one does not hold.
        """
        integrity.check(self._state)

    @exclusive
    def snapshot(self) -> bytes:
        """Everything that the cache holds, keys and values included, as bytes for `from_snapshot`.

        Raises:
            StepError: a step or a lease is open.
        """
        if self._places is not None:
            self._places.settle_all()
        return snapshot.pack(self._state)

    @classmethod
    def from_snapshot(cls, config: CacheConfig, data: bytes) -> "KVCache":
        """Make a cache in the state that `snapshot` saved; sequence ids stay valid.

        The new configuration must have the same layers, in the same groups in the same order, and the same heads,
        head_dim, dtype and formats of tiers. Everything else may differ if all that is held has a place: the allocator,
        growth, eviction and backend; a pool size that cuts off nothing but free granules; a ``max_seqs`` above every
        row in use. If callers or kernels hold blocks, the allocator and the pool size must also be the same.

        Args:
            config: of the new cache.
            data: what `snapshot` returned. It may come from anywhere: it is checked in full, no code in it is run, and
                reading it takes no more memory than it has bytes.

        Raises:
            CacheSnapshotError: ``data`` is damaged, inconsistent, or does not fit the configuration.
        """
        cache = cls(config)
        snapshot.unpack(cache._state, data)
        return cache

    @property
    def allocator(self) -> Any:
        """The allocator of the hot tier; with ``layer_groups``, of the first group that keeps all tokens, if one does.

        Blocks that a caller takes from it belong to the caller, who must free them. With ``lockfree`` on a GPU it is a
        `DevicePool`, and kernels can take blocks from ``allocator.memory``. They get granule numbers, which are indices
        into `key_cache` and `value_cache`. See `DevicePool.return_share` for the blocks that the cache has taken ahead.
        """
        return self._allocator

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "KVCache: cannot be copied or pickled; KVCache.from_snapshot(cache.config, cache.snapshot()) makes another"
        )

    def __repr__(self) -> str:
        stats = self.stats()
        return f"KVCache({stats.num_seqs} sequences, {stats.num_tokens} tokens, {self.allocator!r})"
