"""One step of a batch: where the new tokens go, what attention reads, for all layers."""

from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.call import Hints, Sharing
from kvtoolkit.arrays.types import Array, Int32Array, Int64Array
from kvtoolkit.attention.options import AttendOptions
from kvtoolkit.cache.group_steps import StepPart
from kvtoolkit.cache.layers import traced
from kvtoolkit.cache.layers.group_calls import GroupCalls
from kvtoolkit.cache.layers.layers import LayerCalls
from kvtoolkit.cache.layers.masses import MassSum
from kvtoolkit.cache.layers.staging import StagedCopies
from kvtoolkit.cache.state.cache_group import CacheGroup
from kvtoolkit.cache.state.shared_reads import MAX_ROWS, SharedReads
from kvtoolkit.cache.state.step_passes import OK, OUT_OF_BLOCKS, STATUS_NAMES, StepArrays
from kvtoolkit.cache.storage.upload import DeviceTables
from kvtoolkit.cache.tiering.rules import DEVICE_PERIOD, MOST_QUERIES, note_masses
from kvtoolkit.cache.tiering.sparse import ShortTables
from kvtoolkit.config.tiers import HOST_POOL_OF
from kvtoolkit.errors import StepError, UnsupportedError
from kvtoolkit.formats.entry import TIER_HOT
from kvtoolkit.runtime import current_stream, is_capturing
from kvtoolkit.tracing import is_traced, traceable

if TYPE_CHECKING:
    from kvtoolkit.cache.graph import GraphStep
    from kvtoolkit.cache.kv_cache import KVCache

_IN_PLACE = Sharing()


def _hints_of(counts: Int32Array, seq_lens: Int32Array, sharing: Sharing | None) -> Hints:
    """What the host knows of rows with these numbers of new tokens, for a device."""
    query_counts = (int(counts.min()), int(counts.max())) if len(counts) else (1, 1)
    return Hints(query_counts, int(seq_lens.max(initial=0)), {}, sharing)


class GroupTables(NamedTuple):
    """What kernels read of a step for the layers of a group; see `Step`."""

    block_table: Int32Array
    block_starts: Int32Array
    seq_lens: Int32Array
    cu_seqlens_q: Int32Array
    slot_mapping: Int64Array


class Step:
    """What `KVCache.begin_step` returns; serves all layers, until `KVCache.end_step`.

    In a cache with several groups of layers, tables and slots are those of the first one that keeps all tokens (or, if
    none does, of the one with the largest window or chunk), not cut at chunks; `tables_of` and
    `tables_on_device` have what kernels read.

    The arrays are NumPy's. They are read-only because the kernels trust them; ``torch.from_numpy`` warns about such
    arrays, so give it a copy. `on_device` has the arrays that kernels read on a GPU, which cannot be protected: do not
    write to them. All arrays belong to the cache, and the next `KVCache.begin_step` may overwrite them. Their rows are
    in the order of ``seq_ids``.

    At the end of a ``with`` a step that was not ended is aborted: its tokens are forgotten, and the sequences keep its
    blocks as room to grow. Only one thread at a time may call `append` and `attend` of a step.

    Attributes:
        seq_ids: ``[batch]`` int64.
        ok: ``[batch]`` bool; a row that is not ok got no memory for its tokens. Its ``seq_lens`` is 0, its slots are
            -1, its queries give zeros, and `KVCache.end_step` leaves it as it is.
        status: ``[batch]`` int8, the reason; see `kvtoolkit.cache.state.step_passes.STATUS_NAMES`.
        num_new_tokens: ``[batch]`` int32.
        block_table: ``[batch, max_entries]`` int32 entries, -1 = empty.
        block_starts: ``[batch, max_entries]`` int32, first logical granule of each entry.
        seq_lens: ``[batch]`` int32 tokens, the new ones included.
        cu_seqlens_q: ``[batch + 1]`` int32, where the new tokens of each row begin.
        slot_mapping: ``[num_tokens]`` int64, ``granule * 8 + i`` of every new token.
    """

    __slots__ = (
        "__weakref__",
        "_arrays",
        "_cache",
        "_calls",
        "_device_tables",
        "_graph_step",
        "_in_graphs",
        "_is_open",
        "_mark",
        "_mass",
        "_num_tokens",
        "_parts",
        "_shown",
        "_tokens",
        "seq_ids",
    )

    def __init__(
        self, cache: "KVCache", seq_ids: NDArray[np.int64], arrays: StepArrays, num_tokens: int, mark: int,
        parts: list[StepPart] | None, tokens: Int64Array | None,
    ) -> None:  # fmt: skip
        self._cache = cache
        self._arrays = arrays
        self._is_open = True
        self._mark = mark
        self._num_tokens = num_tokens
        self._shown = cache._arrays.shown(arrays)
        seq_ids.setflags(write=False)
        self.seq_ids = seq_ids
        self._parts = parts  # of all groups; None: there is one, without a window
        self._tokens = tokens  # the new ones, if they were told
        self._calls: LayerCalls | GroupCalls | None = None
        self._mass: MassSum | None = None
        self._device_tables: list[DeviceTables] | None = None  # of each group
        self._graph_step: GraphStep | None = None  # which has loaded it
        self._in_graphs = cache._graph_names.of(self)
        cache._state.register_handle(self, mark)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("Step: expected no copy, because a step ends once")

    # made only when they are asked for, because an integration may need none of them
    @property
    def num_new_tokens(self) -> Int32Array:
        """``[batch]``; see `Step`."""
        return self._shown.counts[: len(self.seq_ids)]

    @property
    def block_table(self) -> Int32Array:
        """``[batch, max_entries]``; see `Step`."""
        return self._shown.table[: len(self.seq_ids)]

    @property
    def block_starts(self) -> Int32Array:
        """``[batch, max_entries]``; see `Step`."""
        return self._shown.starts[: len(self.seq_ids)]

    @property
    def seq_lens(self) -> Int32Array:
        """``[batch]``; see `Step`."""
        return self._shown.seq_lens[: len(self.seq_ids)]

    @property
    def cu_seqlens_q(self) -> Int32Array:
        """``[batch + 1]``; see `Step`."""
        return self._shown.cu_seqlens_q[: len(self.seq_ids) + 1]

    @property
    def slot_mapping(self) -> Int64Array:
        """``[num_tokens]``; see `Step`."""
        return self._shown.slot_mapping[: self._num_tokens]

    @property
    def status(self) -> NDArray[np.int8]:
        """``[batch]``; see `Step`."""
        return self._shown.status[: len(self.seq_ids)]

    @property
    def ok(self) -> NDArray[np.bool_]:
        """``[batch]``; see `Step`."""
        ok: NDArray[np.bool_] = self.status == OK
        return ok

    def tables_of(self, layer: int) -> GroupTables:
        """The arrays that kernels read for a layer; see `Step`. In a cache with one group they are those of all layers.

        Where the layer has a window, the entries of a row begin with the first one that is still held, and
        ``block_starts`` says where in the sequence that is. Where it has chunks, there is a row for each chunk in which
        a row of the step has new tokens, as if it were a sequence of its own; slots are in the order of the step.
        """
        layer = self._cache._arenas.require_layer(layer)
        if self._parts is None:
            return self._all_tables()[0]
        (part,) = (one for one in self._parts if layer in one.steps.group.layers.layers)
        return self._tables_of(part)

    def _all_tables(self) -> list[GroupTables]:
        """The arrays that kernels read for each group."""
        if self._parts is not None:
            return [self._tables_of(part) for part in self._parts]
        tables = self.block_table, self.block_starts, self.seq_lens, self.cu_seqlens_q, self.slot_mapping
        return [GroupTables(*tables)]

    def _tables_of(self, part: StepPart) -> GroupTables:
        batch, shown = len(self.seq_ids), part.steps.arrays.shown(part.arrays)
        if part.steps.group.layers.chunk:
            cut = part.steps.cut_chunks(part.arrays, batch)
            return GroupTables(*cut, shown.slot_mapping[: self._num_tokens])
        return GroupTables(
            shown.table[:batch], shown.starts[:batch], shown.seq_lens[:batch], shown.cu_seqlens_q[: batch + 1],
            shown.slot_mapping[: self._num_tokens],
        )  # fmt: skip

    @traceable
    def append(self, layer: int, key: Array, value: Array) -> None:
        """Store the keys and values of this step's new tokens.

        Args:
            layer: 0 to ``num_layers - 1``.
            key: ``[num_tokens, num_kv_heads, head_dim]`` of the cache's dtype, last axis contiguous: a NumPy array or
                CPU tensor; on a GPU a CUDA tensor, CuPy array or the like. A bfloat16 cache also takes uint16 arrays of
                its bits. Rows of tokens whose slot is -1 are skipped.
            value: the same form.

        Raises:
            ShapeError: a shape, dtype or stride is not as above; nothing was written.
            ArgumentError: there is no such layer.
            StepError: the step has ended.
        """
        if is_traced():
            traced.append(self, layer, key, value)
            return
        self._require_open()
        (self._calls or self._make_calls()).append(layer, key, value)

    @traceable
    def attend(self, layer: int, q: Array, **options: "Unpack[AttendOptions]") -> Any:
        """Attend the new tokens to everything their sequences hold, these tokens included: `append` them first.

        Args:
            layer: 0 to ``num_layers - 1``.
            q: ``[num_tokens, num_q_heads, head_dim]``, of the dtypes that `append` takes, last axis contiguous.
            options: ``softmax_scale``, ``causal``, ``window_size``, ``softcap``, ``sinks``, ``alibi_slopes``, ``out``,
                ``return_lse``, ``num_splits`` and ``backend``, as in `kvtoolkit.paged_attention`. For masses of your
                own call `kvtoolkit.tiered_attention` on `KVCache.tier_caches` and the step's arrays.

        Returns:
            ``[num_tokens, num_q_heads, head_dim]`` of the dtype of ``q``, a tensor if ``q`` is one; with ``return_lse``
            also ``lse`` ``[num_tokens, num_q_heads]`` float32, natural log.

        Raises:
            ShapeError: a shape, dtype, stride or option is not as above.
            ArgumentError: there is no such layer.
            StepError: the step has ended, or has appended to other layers but not to this one.
        """
        if is_traced():
            return traced.attend(self, layer, q, **options)
        self._require_open()
        return (self._calls or self._make_calls()).attend(layer, q, **options)

    def attend_prepared(self, layer: int, key: int, value: int, q: int, out: int) -> bool:
        """`append` and `attend` in one, on raw addresses: for integrations that have checked the arrays themselves.

        It repeats for this layer what the calls for the previous layer did. The caller guarantees that the arrays have
        the same shapes, strides and dtypes. Returns False, with nothing done, if there was no previous layer, or if its
        options included sinks, slopes or ``return_lse``.
        """
        self._require_open()
        return self._calls is not None and self._calls.attend_prepared(layer, key, value, q, out)

    def _make_calls(self) -> LayerCalls | GroupCalls:
        arenas = self._cache._arenas
        if self._parts is not None:
            calls = self._calls_of_groups() if arenas.device < 0 else self._device_calls_of_groups()
            groups = [part.steps.group.layers for part in self._parts]
            self._calls = GroupCalls(arenas, calls, groups, self._num_tokens)
            return self._calls
        self._mass = self._make_mass(self._cache._group)
        short = self._short_tables()
        if arenas.device < 0:
            tables = self.block_table, self.block_starts, self.seq_lens, self.cu_seqlens_q, self.slot_mapping
            if short is not None:
                tables = *short, *tables[3:]
            is_short = short is not None
            self._calls = LayerCalls(arenas, tables, mass=self._mass, tokens=self._tokens, is_short=is_short)
            return self._calls
        sharing = self._find_sharing(self._cache._group.shared_reads, self._arrays)
        hints = _hints_of(self.num_new_tokens, self.seq_lens, None if short is not None else sharing)
        tables, staged = self._tables_on_device(self._all_tables())[0], None
        if self._cache._places is not None and self._cache._places.is_away:
            tables, staged = self._changed_tables(tables, short)
        tokens, is_short = self._tokens_on_device(), short is not None
        self._calls = LayerCalls(
            arenas, tables, hints, mass=self._mass, tokens=tokens, staged=staged, is_short=is_short
        )  # fmt: skip
        return self._calls

    def _short_tables(self) -> ShortTables | None:
        """The tables without what this step leaves out; None if it reads everything."""
        sparse, state = self._cache._sparse, self._cache._state
        if sparse is None or sparse.is_full(state.counters.num_steps, self.num_new_tokens):
            return None
        return sparse.shorten(self._arrays, len(self.seq_ids), self.block_table.shape[1])

    def _changed_tables(
        self, tables: DeviceTables, short: ShortTables | None
    ) -> tuple[DeviceTables, StagedCopies | None]:  # fmt: skip
        """The tables for kernels that leave out tokens or read the stage, and the copies to it."""
        upload, staging, staged = self._cache._upload, self._cache._staging, None
        assert upload is not None
        read = short or ShortTables(self.block_table, self.block_starts, self.seq_lens)
        if staging is not None:
            table, pairs = staging.choose(*read, self.num_new_tokens)
            read, staged = read._replace(block_table=table), staging.copies(upload.one(pairs))
        if short is None and staging is None:
            return tables, None
        changed = {name: upload.one(np.ascontiguousarray(one)) for name, one in read._asdict().items()}
        return tables._replace(**changed), staged

    def _calls_of_groups(self) -> list[LayerCalls]:
        """The calls of each group on the CPU."""
        assert self._parts is not None
        for part in self._parts:
            part.mass = self._make_mass(part.steps.group)
        return [
            LayerCalls(part.steps.arenas, self._tables_of(part), mass=part.mass, tokens=self._tokens)
            for part in self._parts
        ]

    def _device_calls_of_groups(self) -> list[LayerCalls]:
        """The calls of each group on a device. Each group has its own hints, and keeps its own plan and list."""
        assert self._parts is not None
        calls, tables, tokens = [], self._all_tables(), self._tokens_on_device()
        for part, one, on_device in zip(self._parts, tables, self._tables_on_device(tables), strict=True):
            group = part.steps.group
            sharing = self._find_sharing(group.shared_reads, part.arrays)
            hints = _hints_of(np.diff(one.cu_seqlens_q), one.seq_lens, sharing)
            part.mass = self._make_mass(group)
            begin_late = group.layers.window > 0
            options = {"begin_late": begin_late, "mass": part.mass, "tokens": tokens}
            calls.append(LayerCalls(part.steps.arenas, on_device, hints, **options))
        return calls

    def _tokens_on_device(self) -> Any:
        """The new tokens, if they were told and somebody wants to know."""
        if self._tokens is None or self._cache._arenas.canary is None:
            return None
        assert self._cache._upload is not None
        return self._cache._upload.one(self._tokens)

    def _require_clean(self) -> None:
        """IntegrityError if a canary has found something."""
        if self._parts is None:
            groups = [(self._cache._arenas, 0)]
        else:
            groups = [(part.steps.arenas, part.steps.group.layers.chunk) for part in self._parts]
        for arenas, chunk in groups:
            if arenas.canary is not None:
                arenas.canary.require_clean(None if chunk else self.seq_ids)

    def _find_sharing(self, reads: SharedReads | None, arrays: StepArrays) -> Sharing | None:
        """That rows have enough in common to read it once for all of them; None if they have not."""
        cache = self._cache
        if reads is None or not 1 < len(self.seq_ids) <= MAX_ROWS:
            return None
        found = reads.find(self.seq_ids, arrays)
        if not found.pays or found.is_in_place:
            return _IN_PLACE if found.pays else None
        # other streams neither wait for this copy nor keep its memory from being used again
        stream = current_stream(cache._arenas.device)
        order = found.uploaded.get(stream)
        if order is None:
            if is_capturing(stream):
                return None
            assert cache._upload is not None
            order = cache._arenas.backend.describe(cache._upload.one(found.order), "order")
            found.uploaded[stream] = order
        return Sharing(order)

    def _note_masses(self) -> None:
        """Note the attention masses that this step has collected, in each group."""
        self._require_clean()
        if self._calls is None:  # no layer has been called
            return
        period = 1 if self._cache._arenas.device < 0 else DEVICE_PERIOD
        if self._parts is None:
            collected = [(self._cache._group.table, self._arrays, self._mass)]
        else:
            collected = [(part.steps.table, part.arrays, part.mass) for part in self._parts]
        sparse = self._cache._sparse
        for table, arrays, mass in collected:
            if mass is not None and (masses := mass.mean) is not None:
                if sparse is not None:
                    self._mass = None  # if the predictor fails, the step can be ended without it
                    sparse.observe(arrays, len(self.seq_ids), masses, mass.peaks)
                    if self._cache._places is not None:
                        self._cache._places.may_exchange = True
                else:
                    note_masses(table, arrays, len(self.seq_ids), masses, period)

    def _make_mass(self, group: CacheGroup) -> MassSum | None:
        """Where the masses of this step are summed up in a group; None if it collects none."""
        state, arenas = self._cache._state, self._cache._arenas
        sparse = self._cache._sparse
        if not group.collects_mass and sparse is None:
            return None
        if arenas.device >= 0 or sparse is not None:
            is_due = state.counters.num_steps % DEVICE_PERIOD == 0
            if not is_due or self.num_new_tokens.max(initial=0) > MOST_QUERIES:
                return None
        num_tiles = -(-int(self.seq_lens.max(initial=1)) // 64)
        shape = len(self.seq_ids), num_tiles, arenas.num_kv_heads
        return MassSum(*shape, arenas.backend.name, arenas.device, keeps_peaks=sparse is not None)

    @property
    def on_device(self) -> DeviceTables:
        """The arrays that kernels read, as CuPy arrays on the cache's device, for kernels of your own.

        With several groups of layers they are those of layer 0; `tables_on_device` has those of each layer.

        Raises:
            StepError: the step has ended.
            UnsupportedError: the cache is not on a device.
        """
        return self.tables_on_device(0)

    def tables_on_device(self, layer: int) -> DeviceTables:
        """What `tables_of` has for a layer, as CuPy arrays on the cache's device; see `on_device`."""
        self._require_open()
        layer = self._cache._arenas.require_layer(layer)
        if self._cache._upload is None:
            raise UnsupportedError("on_device: expected a cache with backend 'cuda' or 'numba', got 'cpu'")
        tables, groups = self._tables_on_device(self._all_tables()), self._cache._state.groups
        return next(one for one, group in zip(tables, groups, strict=True) if layer in group.layers.layers)

    def _tables_on_device(self, tables: list[GroupTables]) -> list[DeviceTables]:
        """The tables of all groups on the device, where they are brought once."""
        if self._device_tables is None:
            assert self._cache._upload is not None
            self._device_tables = self._cache._upload.all(tables)
        return self._device_tables

    def explain(self) -> list[str]:
        """A sentence for each row that is not ok."""
        return [
            f"sequence {int(seq_id)}: {STATUS_NAMES[status]}{self._room(int(count)) if status == OUT_OF_BLOCKS else ''}"
            for seq_id, count, status in zip(self.seq_ids, self.num_new_tokens, self.status, strict=True)
            if status != OK
        ]

    def _room(self, num_new_tokens: int) -> str:
        """The end of a sentence: how much was needed, and how much memory there is now."""
        hot = [group.blocks.allocator for group in self._cache._state.groups]
        kind = " 16-bit" if self._cache.config.has_tiers else ""
        slots = ", ".join(f"{one.num_free * 8} of {one.num_granules * 8}" for one in hot)
        where = " in the groups of layers" if len(hot) > 1 else ""
        if (host := self._cache._group.blocks.allocators[HOST_POOL_OF[TIER_HOT]]) is not None:
            where = f" on the device and {host.num_free * 8} of {host.num_granules * 8} in host memory"
        return f": {num_new_tokens} new tokens, {slots}{kind} slots free{where} beside what cached prefixes hold"

    def _require_all_layers(self) -> None:
        """StepError if some layers were appended to and others were not."""
        layers = 0 if self._calls is None else self._calls.layers
        if self._graph_step is not None:
            layers |= self._graph_step.layers
        if self._num_tokens:
            require_all_layers(layers, self._cache.config.num_layers)

    def _require_open(self) -> None:
        if not self._is_open:
            raise StepError("expected an open step, got one that has ended; begin_step makes a new one")

    def __enter__(self) -> "Step":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_open:
            self._cache.abort_step(self)


def require_all_layers(layers: int, num_layers: int) -> None:
    """StepError if some layers were appended to, those whose bits are set, and others were not."""
    if not layers or layers == (1 << num_layers) - 1:
        return
    missing = [layer for layer in range(num_layers) if not layers >> layer & 1]
    raise StepError(
        f"end_step: expected all {num_layers} layers appended to, or none, got none for layer "
        f"{', '.join(map(str, missing))}; append them and end the step again, or abort it"
    )
