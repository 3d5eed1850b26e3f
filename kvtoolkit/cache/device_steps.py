"""Steps that the device drives: one captured CUDA graph grows the sequences and runs the model, token after token."""

import sys
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators._calls import Calls, exclusive
from kvtoolkit.arrays.types import ArrayLike, Int32Array, Int64Array, as_int
from kvtoolkit.cache.beams import ROOM, Beams, require_beams
from kvtoolkit.cache.device_turn import DeviceTurn
from kvtoolkit.cache.fixed_tables import Move
from kvtoolkit.cache.graph import GraphRun, GraphStep
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.cache.migration import Migration
from kvtoolkit.cache.migration_launches import MigrationLaunches
from kvtoolkit.cache.state.arguments import as_ids, as_vector
from kvtoolkit.cache.state.block_table import LENGTH, OPEN
from kvtoolkit.cache.state.lent_blocks import LentBlocks
from kvtoolkit.cache.step import Step, require_all_layers
from kvtoolkit.cache.supply import Supply, most_grants
from kvtoolkit.cache.turn_memory import Shapes, TurnMemory
from kvtoolkit.cuda.grow import MAX_GROUPS, GrowingGroup, GrowingRows, make_growth
from kvtoolkit.errors import ArgumentError, StepError, UnsupportedError
from kvtoolkit.runtime import current_stream
from kvtoolkit.runtime.devices import using

_MOST_ROWS = 1 << 16
_MOST_HISTORY = 1 << 30  # bytes; there is a pinned copy of it


class DeviceSteps:
    """Decode steps without the host: a captured graph gives each sequence a slot, and blocks where it needs some.

        steps = DeviceSteps(cache, batch=8, max_steps=32)
        with torch.cuda.graph(graph, stream=stream):          # after one eager run on the same stream
            logits = model(steps.tokens, steps.positions, steps.begin())
            chosen = logits.argmax(-1)
            steps.tokens.copy_(torch.where(steps.status == 0, chosen, steps.tokens))
            steps.finished.logical_or_(steps.tokens == eos)
        ...
        steps.load(seq_ids, tokens, num_steps=32)             # the host's turn: blocks for 32 tokens
        for _ in range(32):
            graph.replay()                                    # the host copies nothing and waits for nothing
        turn = steps.finish()                                 # the sequences have their tokens

    `load` takes blocks ahead, as many as the growth policy will ask for if no sequence ends early. In each replay a
    kernel looks at every row. A row that is finished, or at its ``max_lens``, gets no token. Any other gets the next
    slot, and a block if it has no room left. Blocks go to rows in their order, so equal states grow equally on every
    GPU. A row for which no block is left stalls: it gives zeros and keeps what it holds, and asks again in the next
    replay. After a turn in which the host finds memory it goes on. `finish` reads what happened, gives the sequences
    their blocks and tokens, and frees what was not taken. `refill` takes more blocks while replays are under way, and
    `poll` asks how far they are; neither waits, so the host's turn may come after many hundred tokens.

    Tiles that get old move to colder tiers in the steps at which they would have moved if the host had begun them, and
    small blocks are merged so. What only the host does waits for its turn: freeing what windows do not see and what
    moves have left, moving tiles that several sequences share, and publishing prefixes. So these are behind by up to
    ``num_steps`` tokens of each sequence.

    Args:
        cache: with backend ``"cuda"``; no group of its layers may have chunks.
        batch: rows; a turn may have fewer sequences.
        max_steps: steps of one turn, at most.
        num_new_tokens: of each row in a step. With several, the model may reject some, such as wrong drafts: those of
            the last step of which `kept` says how many stay. A row that has no room for so many below its ``max_lens``
            ends there.
        max_seq_len: tokens of the longest sequence. Default: the cache's limit.
        shared_reads: as in `GraphStep`.
        beams: 2 to 16, a divisor of ``batch``: the rows are the beams of searches, so many of each one after the other,
            which may go on from one another. All of a search have equally many tokens, and the same of ``max_lens``,
            when a turn begins. If one of them stalls, all do. A row whose parent has not as many tokens as it ends. For
            caches with one group of layers and without tiers; blocks are merged between turns only.

    Attributes:
        tokens: ``[batch * num_new_tokens]`` int64 on the device: the new tokens, row after row. The graph writes the
            next ones here, before `begin`; `load` brings the first of each row.
        positions: ``[batch * num_new_tokens]`` int64: the place of each in its sequence, made by `begin`.
        finished: ``[batch]`` bool: the graph sets it where a sequence has ended. `load` clears it but in padding rows.
        status: ``[batch]`` int32, made by `begin`: 0 = the row has new tokens; else why it has none, a place in
            ``STATUS_NAMES`` of `kvtoolkit.cache.device_turn`. Results of other rows mean nothing.
        kept: ``[batch]`` int32: with several new tokens, the graph writes here in each step how many of them stay.
        parents: ``[batch]`` int32, only with ``beams``: the graph writes here, before `begin`, from which row each goes
            on. `begin` lets it, and makes every row its own parent again.

    These are tensors if torch has been imported, else CuPy arrays. Between `load` and `finish` the sequences are in
    a step, and so refused by all other calls. Memory that was taken ahead counts as ``callers`` in `KVCache.stats`. If
    nothing refers to the object any more, its turn is aborted. Not thread-safe; use one stream for `load`, replays and
    `finish`.

    Raises:
        UnsupportedError: the cache is not on a GPU, has chunks or more than four groups of layers, or demotes by mass;
            with ``beams``, it has several groups or tiers.
        ArgumentError: a number is no integer, or more than memory has room for; ``beams`` is not as above.
        StepError: another number is below 1.

    Source: prefix sums over rows in place of a free list, see ``cuda_src/cache/grow.cu``.
    """

    def __init__(
        self, cache: KVCache, batch: int, max_steps: int = 32, *, num_new_tokens: int = 1,
        max_seq_len: int | None = None, shared_reads: bool = False, beams: int = 1,
    ) -> None:  # fmt: skip
        sizes = (
            ("batch", batch), ("max_steps", max_steps), ("num_new_tokens", num_new_tokens), ("beams", beams)
        )  # fmt: skip
        for name, value in (*sizes, ("max_seq_len", max_seq_len)):
            if as_int(value) is None and (value is not None or name != "max_seq_len"):
                raise ArgumentError(f"{name}: expected a number, got {value!r:.80}")
        if max_steps < 1 or num_new_tokens < 1:
            raise StepError(f"max_steps, num_new_tokens: expected at least 1, got {max_steps} and {num_new_tokens}")
        nbytes = 8 * batch * max_steps * num_new_tokens
        if batch > _MOST_ROWS or nbytes > _MOST_HISTORY:
            raise ArgumentError(
                f"batch, max_steps: expected up to {_MOST_ROWS} rows, and 8 bytes for each token of a turn to be up to "
                f"{_MOST_HISTORY >> 20} MiB, got {batch} rows and {nbytes / (1 << 20):.0f} MiB"
            )
        groups = cache._state.groups
        if len(groups) > MAX_GROUPS or any(group.layers.chunk for group in groups):
            raise UnsupportedError(
                f"cache: expected up to {MAX_GROUPS} groups of layers, none with chunks, got {len(groups)}"
            )
        if any(group.collects_mass for group in groups):
            raise UnsupportedError(
                "cache: expected tiles demoted by age, because graphs collect no masses, got by mass"
            )
        if beams != 1:
            require_beams(cache.config, batch, num_new_tokens, beams)
        self.beams = beams
        self._graph_step = GraphStep(
            cache, batch, num_new_tokens, max_seq_len=max_seq_len, shared_reads=shared_reads, _stages=False
        )
        self._cache, self._batch, self.max_steps, self.num_new_tokens = cache, batch, max_steps, num_new_tokens
        self._calls: Calls = cache._calls
        most_tokens = max_steps * num_new_tokens
        self._most_grants = most_grants(most_tokens)
        self._most_own = most_tokens // 8 + ROOM  # granules of a row from this turn on
        self._supplies = [Supply(group, batch, most_tokens) for group in groups]
        fixed = self._graph_step._fixed
        self._migrations = [
            Migration(
                group, batch, max_steps, one.tables.block_table.shape[1], self._graph_step._max_seq_len, beams > 1
            )
            for group, one in zip(groups, fixed, strict=True)
        ]
        self._step: Step | None = None  # holds the rows
        self._num_steps, self._limits = 0, np.empty(0, np.int32)  # of the turn
        self._is_asked = self._is_collected = False
        self._lent = [one.lent for one in self._supplies] + [one.lent for one in self._migrations]
        self._release = weakref.finalize(self, _release_later, self._calls, self._lent)
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        with cupy_on_current_stream(cache._arenas.device) as cupy:
            self._make_arrays(cupy)
        self._launches: list[Any] = []  # of `begin`, once they are made

    def _make_arrays(self, cupy: Any) -> None:
        batch, each, num_groups = self._batch, self.num_new_tokens, len(self._supplies)
        steps = self.max_steps * each
        grants = (num_groups, self._most_grants + 1, batch)
        shapes: Shapes = {
            "finished": ((batch,), np.bool_), "tokens": ((batch * each,), np.int64), "num_new": ((batch,), np.int32),
            "status": ((batch,), np.int32), "ancestors": ((batch,), np.int32), "kept": ((batch,), np.int32),
            "pending": ((batch,), np.int32), "taken": ((num_groups, 5), np.int32), "moved": ((num_groups, 4), np.int32),
            "grants": (grants, np.int32), "history": ((steps, batch), np.int64), **{
                f"journal{i}": ((3, one.most_targets, 4), np.int32) for i, one in enumerate(self._migrations)
            },
        }  # fmt: skip
        self._memory = TurnMemory(shapes, "num_new", "history", "kept", cupy)
        there = self._there = self._memory.arrays
        there["finished"].fill(True)
        self._arrival = cupy.cuda.Event(disable_timing=True)  # of what was asked for last
        self._collected = cupy.cuda.Event(disable_timing=True)
        self._lengths, self._max_lens = cupy.zeros((2, batch), np.int32)
        self._positions = cupy.zeros(batch * each, np.int64)
        self._of_groups = [  # tails of rows, the supply's lists, how many blocks they have
            (cupy.zeros((batch, 4), np.int32), cupy.zeros((4, supply.most), np.int32), cupy.zeros(5, np.int32))
            for supply in self._supplies
        ]
        groups = self._cache._state.groups
        self._moving = [
            MigrationLaunches(one, group.storage, batch, cupy) if one.is_needed else None
            for one, group in zip(self._migrations, groups, strict=True)
        ]
        self._beams: Beams | None = None
        if self.beams > 1:
            tables = self._graph_step._fixed[0].tables
            self._beams = Beams(groups[0], batch, self.beams, self._most_own, tables, cupy)
            self._lent.append(self._beams.lent)
        self._bounds = np.arange(batch + 1, dtype=np.int32) * each
        for fixed in self._graph_step._fixed:
            fixed.tables.cu_seqlens_q[:] = cupy.asarray(self._bounds)
        if self._graph_step._tokens is not None:
            self._graph_step._tokens = there["tokens"]
        arrays = (there["tokens"], self._positions, there["finished"], there["status"], there["kept"])
        self.tokens, self.positions, self.finished, self.status, self.kept = map(_as_tensor, arrays)
        self.parents = None if self._beams is None else _as_tensor(self._beams.parents)

    def load(
        self, seq_ids: ArrayLike, tokens: ArrayLike, num_steps: int | None = None, *, max_lens: ArrayLike | None = None
    ) -> None:
        """The host's turn: hold sequences, take blocks for their next tokens, and bring all that to the device.

        Asynchronous on the current stream.

        Args:
            seq_ids: ``[n]`` open sequences, at most ``batch``, in the order of the rows.
            tokens: ``[n]`` integers: the next token of each, which the first replay appends.
            num_steps: replays until the next turn, for which blocks are taken; default ``max_steps``. In later ones
                rows that need a block stall.
            max_lens: ``[n]`` tokens that each sequence may hold, at least as many as it does; default and upper bound:
                ``max_seq_len``.

        Raises:
            SequenceError: an id is not that of an open sequence, or is given twice.
            ArgumentError: an argument is not as above, or beams of a search differ in length or ``max_lens``.
            CacheFullError: there is no room for copies of the last granules of beams.
            StepError: the last turn has not ended.
        """
        if self._step is not None:
            if self._step._is_open:
                raise StepError("load: expected a turn that has ended, by `finish` or `abort`")
            self.abort()  # what is left of one that `end_orphans` has ended
        ids = as_ids(seq_ids)
        if len(ids) > self._batch:
            raise ArgumentError(f"seq_ids: expected up to {self._batch}, got {len(ids)}")
        steps = self.max_steps if num_steps is None else num_steps
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= self.max_steps:
            raise ArgumentError(f"num_steps: expected 1 to {self.max_steps}, got {steps!r}")
        first = as_vector(tokens, "tokens", len(ids))
        limits = np.full(len(ids), self._graph_step._max_seq_len, np.int64)
        if max_lens is not None:
            wanted, held = as_vector(max_lens, "max_lens", len(ids)), self._cache.lengths(ids)
            if (wanted < held).any():
                row = int((wanted < held).argmax())
                raise ArgumentError(
                    f"max_lens[{row}]: expected at least {held[row]}, the tokens of its sequence, got {wanted[row]}"
                )
            limits = np.minimum(wanted, limits)
        self._num_steps, self._limits = int(steps), limits.astype(np.int32)
        self._is_asked = self._is_collected = False
        self._move_others(ids)
        try:
            self._step = self._cache.begin_step(ids, 0)
            self._fill()
            self._bring(first)
        except BaseException:
            if self._step is not None:
                self.abort()
            raise

    @exclusive
    def _move_others(self, ids: Int64Array) -> None:
        """Move as many tiles as the steps would have, of those that the device will not move, as of other sequences."""
        cache = self._cache
        rows = cache._state.rows_of(ids, (OPEN,))
        if cache._places is not None:
            cache._places.prepare(rows, self._limits, self._num_steps * self.num_new_tokens)
        pairs = [(cache._demoter, cache._arrays)]
        if cache._group_steps is not None:
            pairs = [(part.demoter, part.arrays) for part in cache._group_steps]
        for migration, (demoter, spare) in zip(self._migrations, pairs, strict=True):
            if demoter is None:
                continue
            migration.leave_to_device(rows, self._limits, self._num_steps * self.num_new_tokens)
            arrays = spare.take(0, 0)
            for _ in range(self._num_steps):
                if not demoter.run(arrays, 0):
                    break
            spare.give_back(arrays, 0, 0)

    @exclusive
    def _fill(self) -> None:
        assert self._step is not None
        rows = self._rows()
        for part in self._step._parts or ():  # a step without new tokens leaves them what later ones do not see
            if part.steps.span:
                counts = part.arrays.counts[: len(rows)]
                counts[:] = part.steps.table.info[rows, LENGTH] < self._limits
                part.steps.free_past(part.arrays, len(rows), 0)
                counts[:] = 0
        num_tokens = self._num_steps * self.num_new_tokens
        held = None
        if self._beams is not None:
            self._beams.fill(rows, self._limits)
            held = self._beams.ends[:, 0].astype(np.int64)
        for supply, migration in zip(self._supplies, self._migrations, strict=True):
            supply.fill(rows, self._limits, num_tokens, held)
            migration.fill(rows, self._limits, num_tokens, supply)

    def _rows(self) -> Int32Array:
        """The rows of the block table."""
        assert self._step is not None
        return self._step._arrays.rows[: len(self._step.seq_ids)]

    def _bring(self, tokens: Int64Array) -> None:
        step, rows, there = self._step, self._rows(), self._there
        assert step is not None
        num_rows, batch = len(rows), self._batch
        if not self._launches:
            self._launches = self._make_launches()
        is_padding = np.arange(batch) >= num_rows
        lengths = self._cache._group.table.info[rows, LENGTH].astype(np.int32)
        first = np.zeros((batch, self.num_new_tokens), np.int64)
        first[:num_rows, 0] = tokens
        moves: list[Move] = [
            (first.ravel(), there["tokens"]), (is_padding, there["finished"]),
            (_padded(lengths, batch), self._lengths), (_padded(self._limits, batch), self._max_lens),
        ]  # fmt: skip
        for supply, (tails, _, _), moving in zip(self._supplies, self._of_groups, self._moving, strict=True):
            moves.append((supply.tails(rows), tails))
            if moving is not None:
                moves += moving.marks()
        moves += self._moves_of_supplies()
        moves += [(self._bounds, fixed.tables.cu_seqlens_q) for fixed in self._graph_step._fixed]
        if self._beams is not None:
            moves += self._beams.bring(there["ancestors"], self._of_groups[0][0])
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        with cupy_on_current_stream(self._cache._arenas.device) as cupy:
            self._memory.clear(cupy)
        self._graph_step._bring(step, moves)
        if self._beams is not None:
            with cupy_on_current_stream(self._cache._arenas.device) as cupy:
                self._beams.keep(self._of_groups[0][0], cupy)
        for fixed in self._graph_step._fixed:
            fixed.expect_growth(self._most_grants)
        self._expect_cuts()

    def _moves_of_supplies(self) -> list[Move]:
        moves: list[Move] = []
        for supply, (_, lists, held), moving in zip(self._supplies, self._of_groups, self._moving, strict=True):
            listed, counts = supply.lists()
            used = max(1, int(counts[:4].max()))
            moves += [(listed[:, :used], lists), (counts, held)]
            if moving is not None:
                moves += moving.blocks()
        return moves

    def _expect_cuts(self) -> None:
        """A tile that becomes an entry of its own may cut two others."""
        for fixed, migration in zip(self._graph_step._fixed, self._migrations, strict=True):
            fixed.expect_growth(2 * migration.most_of_a_row)

    def refill(self, num_steps: int) -> None:
        """Take blocks for so many steps more, while the device goes on with those that it has.

        Asynchronous on the current stream, and waits for nothing: the host need not know which sequences have ended.
        Replays after this have the new blocks.

        Raises:
            ArgumentError: with those of before these are more than ``max_steps``.
            StepError: no turn is under way, or `collect` has ended it.
        """
        if self._step is None:
            raise StepError("refill: expected a turn under way, after `load`")
        if self._is_collected:
            raise StepError("refill: expected a turn that goes on, but `collect` has ended it")
        left = self.max_steps - self._num_steps
        if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or not 1 <= num_steps <= left:
            raise ArgumentError(f"num_steps: expected 1 to {left}, what is left of max_steps, got {num_steps!r}")
        self._extend(int(num_steps))
        self._num_steps += int(num_steps)
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        with cupy_on_current_stream(self._cache._arenas.device) as cupy:
            self._graph_step._ring.copy(cupy, self._moves_of_supplies())
        self._expect_cuts()

    @exclusive
    def _extend(self, steps: int) -> None:
        rows, each = self._rows(), self.num_new_tokens
        for supply, migration in zip(self._supplies, self._migrations, strict=True):
            supply.extend(rows, self._limits, steps * each)
            migration.extend(rows, self._limits, (self._num_steps + steps) * each, supply)

    def poll(self) -> DeviceTurn | None:
        """How far the device was when this was called before; None if that is not known yet. Waits for nothing.

        Each call that brings an answer, and the first one, asks the device anew: for a copy to the host, behind what is
        on the current stream by then. The answer has no ``history``.

        Raises:
            StepError: no turn is under way.
        """
        if self._step is None:
            raise StepError("poll: expected a turn under way, after `load`")
        if self._is_asked and not self._arrival.done:
            return None
        answer, num_rows = None, len(self._step.seq_ids)
        if self._is_asked:
            read = {name: array.copy() for name, array in self._memory.found(is_poll=True).items()}
            finished, num_new, status = (read[name][:num_rows] for name in ("finished", "num_new", "status"))
            nothing = np.empty((num_rows, 0), np.int64)
            answer = DeviceTurn(num_new, nothing, self._first(read["tokens"], num_rows), finished, status)
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        with cupy_on_current_stream(self._cache._arenas.device) as cupy:
            self._memory.copy(cupy, self._arrival, is_poll=True)
        self._is_asked = True
        return answer

    def _make_launches(self) -> list[Any]:
        there, cache = self._there, self._cache
        shared = (
            there["finished"], there["tokens"], there["kept"], there["pending"], self._max_lens, self._lengths,
            there["num_new"], there["status"], self._positions, there["history"],
        )  # fmt: skip
        groups = []
        for i, fixed in enumerate(self._graph_step._fixed):
            tables, blocks, supply = fixed.tables, cache._state.groups[i].blocks, self._supplies[i]
            arrays = (
                tables.block_table, tables.block_starts, tables.seq_lens, tables.slot_mapping, *self._of_groups[i],
                there["taken"][i], there["grants"][i],
            )  # fmt: skip
            moving = self._moving[i]
            places = [*(array.data.ptr for array in arrays), 0 if moving is None else moving.gone.data.ptr]
            width, offered = tables.block_table.shape[1], blocks.offered.tolist()
            groups.append(GrowingGroup(places, width, blocks.num_hot, blocks.policy, offered, supply.most))
        rows = GrowingRows(*(array.data.ptr for array in shared))
        each, device = self.num_new_tokens, cache._arenas.device
        most = self.max_steps * each
        launches: list[Any] = []
        if self._beams is not None:
            limits = self._max_lens, self._lengths
            of_beams = there["ancestors"], there["finished"], *limits, there["num_new"], there["history"]
            storage = cache._state.group.storage
            self._beams.make(of_beams, self._of_groups[0][0], storage, most, device)
            launches += self._beams.launches
        for i, (fixed, moving) in enumerate(zip(self._graph_step._fixed, self._moving, strict=True)):
            if moving is not None:
                of_rows = rows.finished, rows.kept, rows.pending, rows.max_lens, rows.lengths, rows.num_new
                tails, moved, journal = self._of_groups[i][0], there["moved"][i], there[f"journal{i}"]
                grants = there["grants"][i]
                launches += moving.make(of_rows, fixed.tables, tails, moved, journal, grants, each, most, device)
        return [*launches, make_growth(rows, groups, self._batch, most, self._most_grants, each, self.beams, device)]

    def begin(self) -> GraphRun:
        """Begin a step, eager or captured: every row gets its place. Returns what serves the layers, as a `Step` does.

        Every run of the model needs a call of its own. Earlier runs end.
        """
        device = self._cache._arenas.device
        if not self._launches:
            with using(device):
                self._launches = self._make_launches()
        for i, launch in enumerate(self._launches):  # each of them waits for the one before it by itself
            launch.run(current_stream(device), dependent=i > 0)
        return self._graph_step.begin()

    def collect(self) -> None:
        """End the turn on the device, behind what is on the current stream by now; waits for nothing.

        What happened is on its way to the host. Later replays change nothing, and `finish` waits for no work that was
        launched after this. So the device can have other work, such as prompts of other sequences, during the host's
        turn.

        Raises:
            StepError: no turn is under way.
        """
        if self._step is None:
            raise StepError("collect: expected a turn under way, after `load`")
        if not self._is_collected:
            self._ask()
            self._stop_rows()
            self._is_collected = True

    def finish(self) -> DeviceTurn:
        """`collect`, and wait for it; give the sequences their tokens and blocks, and free the other blocks.

        Later prompts can find the new tokens. Returns what happened in this turn.

        Raises:
            StepError: no turn is under way, or `KVCache.end_orphans` has closed one of its sequences. Then the others
                are as before it. Or the graph appends to some layers but not to all. Then the turn is still under way.
            allocators.IntegrityError: a canary has found a fault (``KVTOOLKIT_CHECK=canary``).
        """
        if self._step is None:
            raise StepError("finish: expected a turn under way, after `load`")
        if not self._is_collected:
            self._ask()
        self._collected.synchronize()
        read, num_rows = self._memory.found(is_poll=False), len(self._step.seq_ids)
        num_new = read["num_new"][:num_rows] + read["kept"][:num_rows].clip(0, read["pending"][:num_rows])
        history = read["history"][: num_new.max(initial=0), :num_rows].T.copy()
        turn = DeviceTurn(
            num_new, history, self._first(read["tokens"], num_rows), read["finished"][:num_rows].copy(),
            read["status"][:num_rows].copy(),
        )  # fmt: skip
        ids, rows, total = self._step.seq_ids.copy(), self._rows().copy(), int(num_new.sum())
        if total:
            require_all_layers(self._graph_step.layers, self._cache.config.num_layers)
        with self._calls.lock:  # the sequences are open for a moment, in which no other thread may take them
            if not self._step._is_open:
                self.abort()
                raise StepError("finish: expected all sequences of the turn, but `KVCache.end_orphans` has closed some")
            self._stop_rows()
            self._settle(read, num_rows)
            self._end_hold()
            if total:
                is_new = np.arange(history.shape[1]) < num_new[:, None]
                step = self._cache.begin_step(ids, num_new)
                step._graph_step = self._graph_step
                self._cache.end_step(step, history[is_new])
            self._leave_to_host(rows)
        return turn

    def abort(self) -> None:
        """End the turn as if the device had done nothing. It must not be running the graph any more.

        Raises:
            StepError: no turn is under way.
        """
        if self._step is None:
            raise StepError("abort: expected a turn under way, after `load`")
        self._release_supplies()
        self._leave_to_host(self._rows().copy())
        self._end_hold()
        self._stop_rows()

    def _stop_rows(self) -> None:
        """Let replays after this turn find all rows at their ends, because others may have the blocks by then."""
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        with cupy_on_current_stream(self._cache._arenas.device) as cupy:
            stream = cupy.cuda.get_current_stream().ptr
            cupy.cuda.runtime.memsetAsync(self._max_lens.data.ptr, 0, 4 * self._batch, stream)

    def _end_hold(self) -> None:
        step, self._step = self._step, None
        assert step is not None
        with self._calls.lock:
            if step._is_open:
                self._cache.abort_step(step)

    def _ask(self) -> None:
        """Copy what happened to the host, asynchronously."""
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        if self._beams is not None:  # the tokens that were chosen last are of rows that go on from these parents
            for launch in self._beams.launches:
                launch.run(current_stream(self._cache._arenas.device))
        with cupy_on_current_stream(self._cache._arenas.device) as cupy:
            self._memory.copy(cupy, self._collected, is_poll=False)

    def _first(self, tokens: Int64Array, num_rows: int) -> Int64Array:
        """The first token of each row."""
        return tokens[:: self.num_new_tokens][:num_rows].copy()

    @exclusive
    def _settle(self, read: dict[str, NDArray[Any]], num_rows: int) -> None:
        rows, grants = self._rows(), read["grants"][:, :, :num_rows]
        if self._beams is not None:
            self._beams.settle(rows, read["ancestors"][:num_rows])
        for i, (supply, migration) in enumerate(zip(self._supplies, self._migrations, strict=True)):
            migration.settle(supply, rows, grants[i], read["moved"][i], read[f"journal{i}"])

    @exclusive
    def _release_supplies(self) -> None:
        for lent in self._lent:
            lent.release()

    @exclusive
    def _leave_to_host(self, rows: Int32Array) -> None:
        for migration in self._migrations:
            migration.leave_to_host(rows)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("DeviceSteps: expected no copy, because graphs have the addresses of this one")


def _release_later(calls: Calls, all_lent: list[LentBlocks]) -> None:
    """Let the next call free what a lost turn has taken."""
    for lent in all_lent:
        if len(lent.starts):
            calls.do_later(lent.release)


def _padded(array: NDArray[Any], length: int) -> NDArray[Any]:
    """An array with zeros after it."""
    out = np.zeros(length, array.dtype)
    out[: len(array)] = array
    return out


def _as_tensor(array: Any) -> Any:
    """A tensor on the memory of a CuPy array, if the program uses torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return array
    return torch.as_tensor(array, device=f"cuda:{array.device.id}")
