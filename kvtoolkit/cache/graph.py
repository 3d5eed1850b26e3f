"""The tables of steps at fixed addresses, so that one captured CUDA graph serves every later step."""

from typing import Any, Unpack

import numpy as np

from kvtoolkit.arrays.types import Array
from kvtoolkit.attention.options import AttendOptions
from kvtoolkit.cache.fixed_tables import Bounds, FixedTables, Move, bounds_of
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.cache.layers import traced
from kvtoolkit.cache.layers.group_calls import GroupCalls
from kvtoolkit.cache.layers.layers import LayerCalls
from kvtoolkit.cache.state.shared_reads import MAX_ROWS
from kvtoolkit.cache.step import Step
from kvtoolkit.cache.storage.upload import DeviceTables, PinnedRing
from kvtoolkit.errors import StepError, UnsupportedError
from kvtoolkit.tracing import is_traced, traceable


class GraphStep:
    """Tables of steps at fixed addresses. `begin` returns the replacement of a `Step` in a captured CUDA graph.

        fixed = GraphStep(cache, batch=8)
        fixed.load(cache.begin_step(seq_ids, 1))
        model(tokens, fixed.begin())              # run the model once eagerly
        with torch.cuda.graph(graph):
            model(tokens, fixed.begin())          # then capture it
        ...
        step = cache.begin_step(seq_ids, 1)       # the host makes room
        fixed.load(step)                          # the tables go to where the graph reads them
        graph.replay()
        cache.end_step(step, tokens)

    Lengths, tables and the sequences themselves may change between replays, because work is planned on the device.
    Rows beyond those of the step loaded last are padding: they cost next to nothing, and give zeros. Where rows may
    have several new tokens, the arrays of the model have ``max_tokens`` tokens: first those of the step, row after row
    as ``cu_seqlens_q`` of the run says, then some that nothing is stored for and whose results are undefined.
    `KVCache.end_step` of a loaded step counts a layer as appended to if the run that was begun last has appended to it,
    because that is the run whose replays append.

    Args:
        cache: with backend ``"cuda"``.
        batch: number of rows; a step that is loaded may have fewer.
        max_new_tokens: new tokens of a row, at most. At 1, each row has one, and the graph holds the decode kernel
            (the prompt kernel with ``shared_reads``, and for more than 16 query heads to a kv head, 8 above head_dim
            128). With more, rows have 0 to so many, in any mixture; where that is more query rows than the decode
            kernel takes at once, the graph holds both kernels, and each replay runs the one that an eager step with the
            same new tokens runs. The other one ends at once. With ``tiers``, and where the prefill kernel takes
            prompts, each row has its kernel, and both run.
        max_tokens: new tokens of all rows, at most; default ``batch * max_new_tokens``. Kernels of the model run over
            so many in every replay.
        max_seq_len: tokens of the longest sequence that will be loaded. Default: the cache's limit. Needed where all
            layers have a window or chunks (`layer_groups`) and the cache has no limit.
        shared_reads: whether captured runs look, in every replay, for beginnings that rows have in common, and read
            them once for all of these rows; `CacheConfig.shared_reads` says what that changes. A graph holds the
            launches that it was captured with, so the choice is made here, once. It costs some kernels a replay, and
            in each layer about 6 us where the rows have nothing in common; and `load` looks for a good order of the
            rows. So choose it where rows do share a lot: forks, beams, groups of samples of one prompt, a long system
            prompt.
            With ``tiers``, tokens that are not shared take about four times as long as without.
            It has no effect with more than 1024 rows or 4096 tokens, with windows, chunks, ALiBi or ``out`` in
            place of ``q``, on GPUs that are not sm_90, and where the cache's configuration says False.

    With groups of layers (`CacheConfig.layer_groups`) each group has its own tables, which `load` brings to their
    places, and its own plan, which the first layer of the group makes for all of them.

    Not thread-safe; use one stream for `load` and the replays.

    Raises:
        UnsupportedError: the cache is not on a GPU.
    """

    def __init__(
        self, cache: KVCache, batch: int, max_new_tokens: int = 1, max_tokens: int | None = None, *,
        max_seq_len: int | None = None, shared_reads: bool = False, _stages: bool = True,
    ) -> None:  # fmt: skip
        if cache.config.backend != "cuda":
            raise UnsupportedError(f"cache: expected one with backend 'cuda', got {cache.config.backend!r}")
        limit = cache.config.seq_len_limit
        if max_seq_len is None and cache.config.max_seq_len is None and all(one.span for one in cache.config.groups):
            raise StepError(
                "max_seq_len: expected a number of tokens, here or in the cache's configuration, because layers with a "
                "window or chunks alone (layer_groups) set no limit, got None"
            )
        self._cache, self._batch = cache, batch
        self._max_seq_len = limit if max_seq_len is None else min(max_seq_len, limit)
        if batch < 1 or self._max_seq_len < 1:
            raise StepError(f"batch, max_seq_len: expected at least 1, got {batch} and {max_seq_len}")
        tokens = batch * max_new_tokens if max_tokens is None else max_tokens
        if max_new_tokens < 1 or tokens < 1 or (max_new_tokens == 1 and tokens != batch):
            raise StepError(
                f"max_new_tokens, max_tokens: expected at least 1, and one token a row where max_new_tokens is 1, "
                f"got {max_new_tokens} and {max_tokens}"
            )
        self._max_new_tokens, self._max_tokens = max_new_tokens, tokens
        parts = cache._group_steps
        groups = [(cache._group, cache._arenas)] if parts is None else [(one.group, one.arenas) for one in parts]
        self._groups = [group.layers for group, _ in groups]
        bounds = Bounds(batch, max_new_tokens, tokens, self._max_seq_len)
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        shares = shared_reads and batch <= MAX_ROWS
        with cupy_on_current_stream(cache._arenas.device) as cupy:
            options = (cache._staging, cache._sparse) if _stages else ()
            self._fixed = [FixedTables(group, arenas, bounds, shares, cupy, *options) for group, arenas in groups]
            whole = [fixed for fixed in self._fixed if not fixed.is_cut]
            self._own_bounds = None if whole else cupy.zeros(batch + 1, np.int32)
            self._tokens = None if cache._arenas.canary is None else cupy.zeros(tokens, np.int64)
        self._cu_seqlens_q = whole[0].tables.cu_seqlens_q if whole else self._own_bounds
        self._ring = PinnedRing()
        self._run: GraphRun | None = None  # the one that was begun last

    @property
    def tables(self) -> DeviceTables:
        """Where graphs read the tables of the first group of layers; by default there is no other."""
        return self._fixed[0].tables

    @property
    def layers(self) -> int:
        """Bit ``i`` is set if the run that was begun last, so the one that is captured, has appended to layer ``i``."""
        return 0 if self._run is None else self._run._calls.layers

    def load(self, step: Step) -> None:
        """Bring the tables of a step to the fixed places, asynchronously on the current stream.

        Args:
            step: of this cache, open, at most ``batch`` rows, each with as many new tokens as this was made for.

        Raises:
            StepError: it is not such a step, or a sequence is longer than ``max_seq_len``; nothing was changed.
        """
        if step._cache is not self._cache:
            raise StepError("step: expected one of the cache that this was made for")
        step._require_open()
        rows, counts, num_tokens = len(step.seq_ids), step.num_new_tokens, len(step.slot_mapping)
        most, tokens = self._max_new_tokens, self._max_tokens
        fits = rows <= self._batch and num_tokens <= tokens and int(counts.max(initial=0)) <= most
        if not fits or (most == 1 and num_tokens != rows):
            each = "one new token" if most == 1 else f"up to {most} new tokens, {tokens} in all"
            raise StepError(
                f"step: expected up to {self._batch} rows of {each}, got {rows} rows and {num_tokens} tokens, "
                f"{int(counts.max(initial=0))} in one row"
            )
        longest = int(step.seq_lens.max(initial=0))
        if longest > self._max_seq_len:
            raise StepError(f"step: expected sequences of up to {self._max_seq_len} tokens, got {longest}")
        self._bring(step, [])

    def _bring(self, step: Step, others: list[Move]) -> None:
        """Bring the tables of a step to the fixed places, and after them other arrays to theirs."""
        num_tokens = len(step.slot_mapping)
        parts = [step._arrays] if step._parts is None else [part.arrays for part in step._parts]
        moves: list[Move] = []
        if self._tokens is not None and step._tokens is not None:
            known = np.zeros(self._max_tokens, np.int64)
            known[:num_tokens] = step._tokens
            moves.append((known, self._tokens))
        if self._own_bounds is not None:
            moves.append((bounds_of(step.cu_seqlens_q, self._batch, num_tokens), self._own_bounds))
        for fixed, one, arrays in zip(self._fixed, step._all_tables(), parts, strict=True):
            moves += fixed.load(one, step.seq_ids, arrays)
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        with cupy_on_current_stream(self._cache._arenas.device) as cupy:
            self._ring.copy(cupy, moves + others)
        for fixed in self._fixed:
            fixed.loaded()
        step._graph_step = self

    def begin(self) -> "GraphRun":
        """Begin a run of the model over the tables, eager or captured. Every run needs a call of its own.

        The first layer of the run launches kernels that plan the work of all layers, so these kernels are part of the
        graph in which the run is captured. Earlier runs end.
        """
        calls = [fixed.calls(self._tokens) for fixed in self._fixed]
        cache = self._cache
        if cache.config.is_grouped:
            self._run = GraphRun(self, GroupCalls(cache._arenas, calls, self._groups, self._max_tokens))
        else:
            self._run = GraphRun(self, calls[0])
        return self._run


class GraphRun:
    """One run of a model over the tables of a `GraphStep`, used like a `Step`; made by `GraphStep.begin`.

    Attributes:
        cu_seqlens_q: ``[batch + 1]`` int32, where the new tokens of each row begin: on the host where every row has
            one, else on the device, of the step that is loaded.
    """

    def __init__(self, graph_step: GraphStep, calls: LayerCalls | GroupCalls) -> None:
        self._graph_step, self._calls = graph_step, calls
        self._in_graphs = graph_step._cache._graph_names.of(self)
        self.cu_seqlens_q: Any = graph_step._cu_seqlens_q
        if graph_step._max_new_tokens == 1:
            self.cu_seqlens_q = np.arange(graph_step._batch + 1, dtype=np.int32)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("GraphRun: expected no copy, because a run ends when another one begins")

    @traceable
    def append(self, layer: int, key: Array, value: Array) -> None:
        """Store keys and values as `Step.append` does; rows beyond those of the step are skipped.

        Raises:
            StepError: there is no such layer, this run has appended to it before, or another run has begun; nothing was
                written.
        """
        if is_traced():
            traced.append(self, layer, key, value)
            return
        self._require_current()
        layer = self._graph_step._cache._arenas.require_layer(layer)
        if self._calls.layers >> layer & 1:
            raise StepError(f"layer: expected one that this run has not appended to, got {layer}; `begin` another run")
        self._calls.append(layer, key, value)

    @traceable
    def attend(self, layer: int, q: Array, **options: "Unpack[AttendOptions]") -> Any:
        """Attend as `Step.attend` does; rows beyond those of the step give zeros.

        Raises:
            StepError: there is no such layer, this run has appended to other layers but not to this one, or another run
                has begun.
        """
        if is_traced():
            return traced.attend(self, layer, q, **options)
        self._require_current()
        return self._calls.attend(layer, q, **options)

    def _require_current(self) -> None:
        if self._graph_step._run is not self:
            raise StepError("expected the run that `GraphStep.begin` returned last, got an earlier one")
