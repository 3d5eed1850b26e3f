"""`KVCache`: the sequences of an engine, their memory and their block table.

This file is the interface: it checks, takes the lock and calls. The state is in `kvtoolkit.cache.state`, every
operation in a file of its own beside this one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators._calls import exclusive, exclusive_or_later
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache import compaction, integrity, preemption, sharing, snapshot
from kvtoolkit.cache.grants import Grower
from kvtoolkit.cache.lease import Lease
from kvtoolkit.cache.shared_allocator import SharedAllocator
from kvtoolkit.cache.state import block_table, repair, step_passes
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
from kvtoolkit.cache.state.cache_state import Sequences
from kvtoolkit.cache.state.identity import as_extras, as_salts, as_text, forget_prefixes
from kvtoolkit.cache.state.prefix_index import match, usable
from kvtoolkit.cache.state.repair import Repairs
from kvtoolkit.cache.state.sizes import require_tables_fit
from kvtoolkit.cache.state.step_arrays import SpareArrays
from kvtoolkit.cache.stats import CacheStats, collect
from kvtoolkit.cache.step import Step
from kvtoolkit.cache.storage.arenas import Arenas
from kvtoolkit.cache.storage.upload import make_upload
from kvtoolkit.cache.tiering import rules
from kvtoolkit.cache.tiering.demoter import Demoter
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cuda.pool import DevicePool
from kvtoolkit.errors import ArgumentError, ConfigError, StepError
from kvtoolkit.formats.tier_caches import TierCaches

_LEAST_TOKENS_REFUSED = 1 << 20
"""New tokens of a step that are never too many to ask for, however small the pool: rows without room just stall."""


class KVCache:
    """The KV cache of one model: paged memory, prefix reuse, forks, preemption, for a batch at a time.

    Args:
        config: see `CacheConfig`.

    Raises:
        ConfigError: the tables would take more than this machine's memory; nothing of that size is allocated.

    Thread-safe: one lock around every call. Calls that take several sequences do all of them or raise and do none,
    except for `begin_step` and `restore`, which say per row what they could do.

    Source: block tables, Kwon et al. 2023 (arXiv:2309.06180), sec. 4; sharing here is by granule of 8 tokens, and a
    partly filled granule is copied when shared, so that kernels never have to copy on write.
    """

    def __init__(self, config: CacheConfig) -> None:
        if not isinstance(config, CacheConfig):
            raise ConfigError(f"config: expected a CacheConfig, got {type(config).__name__}")
        require_tables_fit(config)
        self.config = config
        self.dtype = config.dtype
        self._sequences = Sequences(config)
        self._calls = self._sequences.calls
        self._grower = Grower(self._sequences)
        self._demoter = None if config.tier_config is None else Demoter(self._sequences, config.tier_config)
        self._arrays = SpareArrays()
        self._most_tokens_of_one = config.seq_len_limit
        self._most_new_tokens = max(_LEAST_TOKENS_REFUSED, 16 * 8 * config.num_granules)
        self._upload = make_upload(config.backend, self._sequences.storage.device)
        self._arenas = Arenas(self._sequences.storage, config.dtype, config.backend)
        hot = self._sequences.pool.allocator
        is_on_device = isinstance(hot, DevicePool)  # kernels take blocks of it, too
        self._allocator = hot if is_on_device else SharedAllocator(self._sequences.pool.ledger, self._calls)

    # -- opening and closing -----------------------------------------------------------------------------------------

    @exclusive
    def open(
        self, prompts: Sequence[ArrayLike], *, salt: Any = None, extra_keys: Any = None
    ) -> tuple[Int64Array, Int32Array]:
        """Open a sequence for each prompt, holding the longest prefix of it that is cached already.

        Salt and extra keys are compared in full, and stay with a sequence and its forks until they are closed.
        Sequences of all salts share the memory: one tenant's prefixes may be evicted for another's.

        Args:
            prompts: token ids of each prompt, ``[n]`` integers; may be empty. Any 64-bit integers, negative ones too;
                floats, bools and numbers of 2**63 or more are refused.
            salt: an int, str or bytes for all prompts, or a list with one for each (None = no salt): whose prompt it
                is, a tenant or an adapter (LoRA). What was computed under a salt is found under the same salt only;
                ``1``, ``"1"`` and ``b"1"`` differ, and no salt is a salt of its own.
            extra_keys: for each prompt a list of ``(position, key)``, or None: what its tokens do not say, such as the
                hash of an image at its first placeholder token. The key, an int, str or bytes, is part of the identity
                of the 8 tokens around the position, and so of everything after it; positions are those of the
                sequence, and may be of tokens yet to come.

        Returns:
            ``(seq_ids, cached_lens)``: ``[batch]`` int64, and ``[batch]`` int32 tokens that need not be computed, a
            multiple of 8 and shorter than the prompt. With quantized tiers only hot tokens are found, unless
            ``prefix_reuse_tiers`` is ``"all"``.

        Raises:
            CacheFullError: more than ``max_seqs`` sequences would be open.
            ArgumentError: a prompt is no vector of 64-bit integers, or a salt or extra key is not as above.
        """
        try:
            tokens = [as_prompt(prompt, i) for i, prompt in enumerate(prompts)]
        except TypeError:
            raise ArgumentError(f"prompts: expected a sequence of prompts, got {prompts!r:.80}") from None
        salts, extras = as_salts(salt, len(tokens)), as_extras(extra_keys, len(tokens))
        sequences, counters = self._sequences, self._sequences.counters
        sequences.require_closed_rows(len(tokens), "open")
        origins = sequences.identities.origins(salts, extras)
        opened = sequences.new_rows(len(tokens), "open", origins)
        sequences.tick()
        nodes, granules = sequences.pool.nodes, sequences.pool.granules
        cached_lens = np.zeros(len(tokens), np.int32)
        found = np.empty(max((len(prompt) for prompt in tokens), default=0) // 8 + 1, np.int32)
        for i, (row, prompt) in enumerate(zip(opened, tokens, strict=True)):
            most = max(0, (min(len(prompt), self.config.seq_len_limit) - 1) // 8)
            most = most if self.config.prefix_caching else 0
            keys = sequences.identities.extras[origins[i, FIRST_EXTRA] : origins[i, END_EXTRA]]
            count = match(nodes, origins[i, ROOT_OF], keys, prompt, most, found)
            count = usable(nodes, granules, found, count, sequences.takes_quantized)
            cached_lens[i] = 8 * block_table.adopt(sequences.rows, row, found, count, nodes, granules)
            counters.prompt_tokens += len(prompt)
            counters.reused_tokens += int(cached_lens[i])
            counters.num_prefix_hits += bool(cached_lens[i])
            counters.num_prefix_misses += most > 0 and not cached_lens[i]
        sequences.note_use()
        return sequences.ids_of(opened), cached_lens

    @exclusive_or_later
    def close(self, seq_ids: ArrayLike) -> None:
        """End sequences. Their full granules stay findable until their memory is needed; their ids never come back.

        With quantized tiers that is what ``prefix_reuse_tiers`` says: by default what stands before a sequence's first
        quantized tile.

        Raises:
            SequenceError: an id is not of an open or preempted sequence, or stands twice.
        """
        self._sequences.release_rows(self._sequences.rows_of(seq_ids, (OPEN, PREEMPTED)))

    def _close_later(self, seq_ids: Int64Array) -> None:
        """Have the next call close what is left of some sequences. For finalizers: it takes no lock."""
        sequences = self._sequences
        self._calls.do_later(lambda: repair.close_left(sequences, seq_ids))

    @exclusive
    def lengths(self, seq_ids: ArrayLike) -> Int32Array:
        """``[batch]`` int32 tokens that each sequence holds; 0 while preempted by ``"drop"``."""
        which = self._sequences.rows_of(seq_ids, (OPEN, IN_STEP, PREEMPTED, PINNED))
        lengths: Int32Array = self._sequences.rows.info[which, LENGTH].astype(np.int32)
        return lengths

    # -- steps -------------------------------------------------------------------------------------------------------

    @exclusive
    def begin_step(self, seq_ids: ArrayLike, num_new_tokens: int | ArrayLike) -> Step:
        """Make room for new tokens of a batch and say where they go.

        With quantized tiers this is also where older tokens of any open sequence change their tier: a few tiles of 64
        tokens a step, or as many as this step needs if the hot tier is short of room. New tokens are always hot, so
        a prompt that is larger than the hot tier has to be fed in several steps.

        Args:
            seq_ids: ``[batch]`` ids of open sequences, each once, in the order of the step's rows.
            num_new_tokens: one number for all rows, or ``[batch]`` of them; 0 to read only.

        Returns:
            The `Step`. Rows that could not get memory are not ``ok`` and are left as they were; the others can go on.
            Memory is granted in the order of the rows.

        Raises:
            SequenceError: an id is unknown, closed, preempted, in another open step, or stands twice.
            ArgumentError: ``num_new_tokens`` is negative, above any cache, has another shape, or comes to more than 16
                times the pool (and 2**20) in all.
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
        sequences = self._sequences
        if total > self._most_new_tokens:
            raise ArgumentError(
                f"num_new_tokens: expected at most {self._most_new_tokens} in all, 16 times the pool, got {total}"
            )
        arrays = self._arrays.take(batch, total)
        arrays.counts[:batch] = counts
        code, where, num_need, num_merge, width, mark = step_passes.begin(
            sequences.rows, arrays, ids, self._most_tokens_of_one, sequences.pool.policy.merges
        )
        if code:
            self._arrays.give_back(arrays, batch, total)
            raise sequences.bad_id(code, int(ids[where]), (OPEN,))
        has_moved = self._demoter is not None and self._demoter.run(arrays, num_need)
        if num_merge:
            self._grower.merge_tails(arrays, num_merge)
        if num_need:
            width = max(width, self._grower.grow(arrays, num_need))
        if has_moved:
            width = step_passes.widest(sequences.rows, arrays, batch)
        if width > arrays.table.shape[1]:
            arrays = self._arrays.widen(arrays, width)
            step_passes.sync_tables(sequences.rows, arrays, batch)
        elif num_merge or has_moved:
            step_passes.sync_tables(sequences.rows, arrays, batch)
        step = Step(self, ids, arrays, total, mark)
        sequences.hold(step, mark)
        return step

    @exclusive
    def end_step(self, step: Step, token_ids: ArrayLike | None = None) -> None:
        """End a step: the lengths of its rows advance, and granules that became full can be found by later prompts.

        Args:
            step: the open step. Once a layer of it was appended to (`Step.append`, or the run of a `GraphStep`), all
                layers must be. A step without any is taken for one of an engine whose own kernels write the cache.
            token_ids: ``[num_tokens]`` the tokens whose keys and values the step appended, in its order. Without them
                nothing is published, and what these sequences append later is not either.

        Raises:
            ArgumentError: ``token_ids`` does not fit the step.
            StepError: the step has ended, belongs to another cache, or some layers were appended to and others were
                not. No length advances, and the step stays open: append to the layers that are named and end it again,
                or abort it.
        """
        self._require_own(step)
        if step._calls is not None or step._graph_step is not None:
            step._require_all_layers()
        sequences, batch = self._sequences, len(step.seq_ids)
        tokens = None if token_ids is None else as_tokens(token_ids, step._num_tokens)
        if step._mass is not None and (masses := step._mass.mean) is not None:
            period = 1 if sequences.storage.device < 0 else rules.DEVICE_PERIOD
            rules.note_masses(sequences.rows, step._arrays, batch, masses, period)
        num_freed, pool = 0, sequences.pool
        self._end(step)
        if tokens is None or not self.config.prefix_caching:
            step_passes.advance(sequences.rows, step._arrays, batch, step._mark)
        else:
            num_freed = step_passes.advance_and_publish(
                sequences.rows, step._arrays, batch, step._mark, tokens, sequences.identities.extras,
                pool.nodes, pool.granules, pool.freed,
            )  # fmt: skip
        sequences.counters.num_steps += 1
        self._arrays.give_back(step._arrays, batch, step._num_tokens)
        pool.free_listed(num_freed)

    @exclusive_or_later
    def abort_step(self, step: Step) -> None:
        """End a step as if it had not happened; blocks it took stay with their sequences as room to grow."""
        self._require_own(step)
        self._end(step)
        batch = len(step.seq_ids)
        step_passes.reopen(self._sequences.rows, step._arrays, batch, step._mark)
        self._arrays.give_back(step._arrays, batch, step._num_tokens)

    def _end(self, step: Step) -> None:
        """Before anything else changes: a step whose end is interrupted has ended, or was aborted."""
        step._is_open = False
        self._sequences.handles.pop(step._mark, None)

    def _require_own(self, step: Step) -> None:
        if not isinstance(step, Step) or step._cache is not self:
            raise StepError(f"step: expected one of this cache, got {step!r}")
        step._require_open()

    # -- forks, beams, speculation -----------------------------------------------------------------------------------

    @exclusive
    def fork(self, seq_ids: ArrayLike, n: int) -> Int64Array:
        """Open ``n`` copies of each sequence. Full granules are shared; the last, partly filled one is copied.

        Returns:
            ``[batch, n]`` int64 ids; the parents stay open. ``ravel()`` it for calls that take ``[batch]``.

        Raises:
            SequenceError: an id is not of an open sequence.
            CacheFullError: too few rows, or too few blocks for the copies; nothing was forked.
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0:
            raise ArgumentError(f"n: expected a number of copies, got {n!r}")
        parents = self._sequences.rows_of(seq_ids, (OPEN,))
        self._sequences.require_closed_rows(len(parents) * int(n), "fork")
        children = sharing.fork(self._sequences, np.repeat(parents, n), "fork")
        return self._sequences.ids_of(children).reshape(len(parents), int(n))

    @exclusive
    def reorder(self, seq_ids: ArrayLike, parents: ArrayLike) -> None:
        """Make sequence ``i`` continue what sequence ``parents[i]`` holds, as beam search does once a step.

        Args:
            seq_ids: ``[batch]`` open sequences.
            parents: ``[batch]`` integers, positions in ``seq_ids``.

        Raises:
            ArgumentError: a parent is no position.
            SequenceError: an id is not of an open sequence.
            CacheFullError: too few blocks for the copies of partly filled granules; nothing was reordered.
        """
        batch = self._sequences.rows_of(seq_ids, (OPEN,))
        origin = as_vector(parents, "parents", len(batch))
        if len(origin) and not (origin.min() >= 0 and origin.max() < len(batch)):
            raise ArgumentError(f"parents: expected 0 to {len(batch) - 1}, got {origin.tolist()}")
        sharing.reorder(self._sequences, batch, origin.astype(np.int32))

    @exclusive
    def truncate(self, seq_ids: ArrayLike, new_lens: ArrayLike) -> None:
        """Forget the last tokens of sequences, as after rejected draft tokens.

        Where a quantized tile is cut, the tokens kept of it become hot again, as exact as they are stored.

        Args:
            seq_ids: ``[batch]`` open sequences.
            new_lens: ``[batch]`` integers, 0 to the present length.

        Raises:
            ArgumentError: a length is out of range.
            SequenceError: an id is not of an open sequence.
            CacheFullError: a partly kept granule is shared or quantized, and there is no block for a copy; nothing was
                truncated.
        """
        batch = self._sequences.rows_of(seq_ids, (OPEN,))
        targets = as_vector(new_lens, "new_lens", len(batch))
        lengths = self._sequences.rows.info[batch, LENGTH]
        bad = np.flatnonzero((targets < 0) | (targets > lengths))
        if len(bad):
            i = int(bad[0])
            raise ArgumentError(f"new_lens[{i}]: expected 0 to {lengths[i]}, the present length, got {targets[i]}")
        sharing.truncate(self._sequences, batch, targets)

    # -- leases, preemption ------------------------------------------------------------------------------------------

    @exclusive
    def pin(self, seq_ids: ArrayLike) -> Lease:
        """Hold what sequences hold now: it is not written, moved, quantized or freed until the lease ends.

        The sequences themselves go on. The lease has rows of its own, which count among ``max_seqs``.

        Raises:
            SequenceError: an id is not of an open sequence.
            CacheFullError: too few rows or blocks.
        """
        sequences = self._sequences
        held = sharing.fork(sequences, sequences.rows_of(seq_ids, (OPEN,)), "pin")
        lease = Lease(sequences, held)
        sequences.hold(lease, lease._mark)
        return lease

    @exclusive
    def preempt(self, seq_ids: ArrayLike, to: str = "drop") -> None:
        """Take the memory of sequences away for others; `restore` brings them back.

        Args:
            seq_ids: ``[batch]`` open sequences.
            to: ``"drop"``: keys and values are forgotten, but for full granules that stay findable, as after `close`,
                for as long as their memory is not needed. ``"host"``: they are copied to host memory outside the pool,
                what several preempted sequences share once.

        Raises:
            ArgumentError: ``to`` is neither.
            SequenceError: an id is not of an open sequence.
        """
        if not (isinstance(to, str) and to in ("drop", "host")):
            raise ArgumentError(f"to: expected 'drop' or 'host', got {to!r}")
        preemption.preempt(self._sequences, self._sequences.rows_of(seq_ids, (OPEN,)), to)

    @exclusive
    def restore(self, seq_ids: ArrayLike, *, keep_free: int = 0) -> NDArray[np.bool_]:
        """Bring preempted sequences back.

        A sequence preempted to the host holds all its tokens again, full granules that are still in the pool shared
        with whoever holds them, and later prompts find them. A dropped one holds the prefix that is still cached, see
        `lengths`; its engine computes the rest again.

        Args:
            seq_ids: ``[batch]`` preempted sequences, the most urgent first.
            keep_free: tokens of the hot tier that must be free, or cached and so free when they are needed, after a
                sequence has come back: room for its next tokens, so that it need not go again at once. Where an
                allocator gives a block size a whole slab (``slab``) this may be seen only once the slab was begun; a
                sequence that is refused then may have evicted cached prefixes.

        Returns:
            ``[batch]`` bool: which are open again; the others found too little memory and stay preempted.

        Raises:
            ArgumentError: ``keep_free`` is no number of tokens.
            SequenceError: an id is not of a preempted sequence.
        """
        if isinstance(keep_free, bool) or not isinstance(keep_free, int | np.integer) or keep_free < 0:
            raise ArgumentError(f"keep_free: expected a number of tokens, got {keep_free!r}")
        batch = self._sequences.rows_of(seq_ids, (PREEMPTED,))
        return preemption.restore(self._sequences, batch, int(keep_free))

    # -- maintenance -------------------------------------------------------------------------------------------------

    @exclusive
    def clear_prefixes(self, salt: Any = None) -> None:
        """Forget all cached prefixes, or those of one salt, as after a change of the weights.

        Prompts opened from now on find nothing that was computed before. Sequences keep what they hold; neither that
        nor what they append to it is ever found, until they are truncated to 0 tokens or begin anew after
        ``preempt(to="drop")``. The same holds for what a step that is open now has appended.

        Args:
            salt: as `open` takes it; None = the prefixes of all salts and those without one.

        Raises:
            ArgumentError: it is no int, str or bytes.
        """
        sequences, pool = self._sequences, self._sequences.pool
        root_uid = None if salt is None else sequences.identities.salts.numbers.get(as_text(salt, "salt"))
        if salt is not None and root_uid is None:
            return
        pool.free_listed(
            forget_prefixes(sequences.rows, salt is None, root_uid or 0, pool.nodes, pool.granules, pool.freed)
        )

    @exclusive
    def compact(self, max_tokens: int) -> int:
        """Merge small blocks into blocks of 64 tokens, and move blocks together to make room for them.

        A call looks at 4096 entries of the block table, and at one more for every 8 tokens of its budget; the next one
        goes on from there. So a result of 0 says that there was nothing to do in that part.

        Args:
            max_tokens: most tokens to copy.

        Returns:
            Tokens copied.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | np.integer) or max_tokens < 0:
            raise ArgumentError(f"max_tokens: expected a number of tokens, got {max_tokens!r}")
        return compaction.compact(self._sequences, int(max_tokens))

    def sync(self) -> None:
        """Wait until the device has done what was asked on the current stream; nothing to do on the CPU."""
        self._sequences.storage.sync()

    @exclusive
    def stats(self) -> CacheStats:
        """Figures of this moment."""
        return collect(self._sequences)

    @exclusive
    def seq_ids(self) -> Int64Array:
        """``[n]`` int64 ids of all sequences that are not closed: open, in a step, preempted, or held by a lease."""
        return self._sequences.ids_of(np.flatnonzero(self._sequences.rows.info[:, STATE] != CLOSED).astype(np.int32))

    @exclusive
    def end_orphans(self, known: ArrayLike) -> Int64Array:
        """Close every sequence whose id the caller does not know; steps and leases that hold one are aborted.

        For ids that were lost, as when Ctrl-C comes between the return of `open` and the assignment of its result.
        Steps and leases themselves need no such care: they end when their last reference goes.

        Args:
            known: ``[n]`` ids to keep, those of leases included; ids of closed sequences do no harm.

        Returns:
            ``[m]`` int64 ids that were closed.
        """
        return repair.end_orphans(self._sequences, as_ids(known))

    @exclusive
    def repair(self) -> Repairs:
        """Make everything that follows from what the sequences hold anew, and end what nobody can end any more.

        After a call that broke off (a plug-in or a copy raised, memory ran out, Ctrl-C) the next call does it by
        itself. Sequences, steps, leases and blocks that somebody still refers to stay as they are.

        Returns:
            What was put in order, by this call and by others, since this was last called.
        """
        sequences = self._sequences
        repair.settle(sequences)
        found, sequences.repairs = sequences.repairs, Repairs()
        return found

    @exclusive
    def check_integrity(self) -> None:
        """Verify every invariant of the cache and of its allocator; for tests.

        Raises:
            IntegrityError: one does not hold.
        """
        integrity.check(self._sequences)

    @exclusive
    def snapshot(self) -> bytes:
        """Everything the cache holds, keys and values included, for `from_snapshot`.

        Raises:
            StepError: a step or a lease is open.
        """
        return snapshot.pack(self._sequences)

    @classmethod
    def from_snapshot(cls, config: CacheConfig, data: bytes) -> "KVCache":
        """A cache as `snapshot` saw it; sequence ids stay valid.

        Keys and values must lie as they did: the same layers, heads, head_dim, dtype and formats of tiers. Everything
        else may be another, as long as what is held fits: a pool whose size only cuts off what is free, ``max_seqs``
        above every row, the allocator, growth, eviction, backend. Only blocks that callers or kernels hold want the
        same allocator and pool size.

        Args:
            data: what `snapshot` returned. It is checked in full, and no code is run from it, so that it may come from
                anywhere; it takes as much memory as it has bytes.

        Raises:
            CacheSnapshotError: ``data`` is damaged, inconsistent, or does not fit the configuration.
        """
        cache = cls(config)
        snapshot.unpack(cache._sequences, data)
        return cache

    @property
    def allocator(self) -> Any:
        """The allocator of the hot tier, for its figures. Blocks taken from it belong to the caller, who frees them.

        With ``lockfree`` on a GPU it is a `DevicePool`, and kernels take blocks from ``allocator.memory``: granule
        numbers of `key_cache` and `value_cache`.
        """
        return self._allocator

    def key_cache(self, layer: int) -> Any:
        """``[num_granules, num_kv_heads, 8, head_dim]`` hot keys of a layer; uint16 for bfloat16. A view, not a copy.

        A NumPy array, on a GPU a CuPy array (``torch.from_dlpack`` makes a tensor of it).
        """
        self._arenas.require_layer(layer)
        return self._sequences.storage.key_values[layer, 0]

    def value_cache(self, layer: int) -> Any:
        """As `key_cache`, of the values."""
        self._arenas.require_layer(layer)
        return self._sequences.storage.key_values[layer, 1]

    def tier_caches(self, layer: int) -> TierCaches:
        """The arrays of a layer, all tiers, as `kvtoolkit.tiered_attention` takes them. Views, not copies."""
        self._arenas.require_layer(layer)
        storage = self._sequences.storage
        warm, cold = (None if one is None else one[layer] for one in (storage.warm, storage.cold))
        hot = storage.key_values[layer]
        return TierCaches(hot[0], hot[1], warm, cold, storage.first)

    def __repr__(self) -> str:
        stats = self.stats()
        return f"KVCache({stats.num_seqs} sequences, {stats.num_tokens} tokens, {self.allocator!r})"
