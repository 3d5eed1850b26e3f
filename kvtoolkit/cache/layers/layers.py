"""What the layers of a step do with the cache: check what the caller brings, then run the kernels.

The cache's arrays and the step's tables are valid by construction, so they are described once per step and never
checked; the step's tables on the host are read-only to callers.
"""

from collections.abc import Callable
from typing import Any

from kvtoolkit.arrays.call import NO_HINTS, AttentionCall, Hints, attention_call
from kvtoolkit.arrays.extents import extent
from kvtoolkit.arrays.host import Operand, mark_written
from kvtoolkit.arrays.types import ITEMSIZES
from kvtoolkit.attention.arguments import (
    autocast_note,
    check_apart,
    check_flags,
    check_heads,
    check_options,
    check_output,
    check_per_head,
    check_rows,
)
from kvtoolkit.cache.layers.masses import MassSum
from kvtoolkit.cache.layers.staging import StagedCopies
from kvtoolkit.cache.storage.arenas import Arenas
from kvtoolkit.errors import ShapeError, StepError, UnsupportedError
from kvtoolkit.runtime import current_stream, is_capturing

StepTables = tuple[Any, Any, Any, Any, Any]
"""``block_table, block_starts, seq_lens, cu_seqlens_q, slot_mapping``; see `kvtoolkit.Step`."""

_MOST_FORMS = 4
_NO_POSITIONS = (
    "attend: expected no window_size, alibi_slopes or causal=False in a step that leaves out tokens (tiers.sparse), "
    "since kernels do not see their positions"
)
_IN_PLACE = 0  # of a form: whether the output is written over the queries


class LayerCalls:
    """The arrays of one step, described once, and what its layers have in common with the first of them.

    A layer whose arrays have the shape, strides and dtype of a layer before, and whose options are the same, needs no
    check, and no new plan. Models with two kinds of layers have two such forms.

    Args:
        arenas: of the cache.
        tables: the arrays of the step, valid by construction, where the backend works.
        hints: what the host knows of the step; on a device ``kept`` is given.
        is_fixed: whether ``hints.max_seq_len`` holds for all replays of a graph that captures the calls, too.
        begin_late: whether rows may begin after token 0, so that the size of the table says nothing of their lengths.
        is_short: whether the tables leave out tokens, so that positions are not those of the sequences.
        staged: copies what the layers read of host memory to the device; None = it is read in place.
        mass: where attention masses are summed up; None = none are wanted.
        tokens: the new tokens, where the backend works, for canaries; None = not known.

    Attributes:
        layers: bit ``i`` is set once layer ``i`` has been appended to.
    """

    __slots__ = (
        "_appended", "_appended_keys", "_arenas", "_attended", "_backend", "_begin_late", "_hints", "_is_fixed",
        "_is_short",
        "_mass", "_num_tokens", "_overlaps", "_seen", "_slots", "_staged", "_tables", "_watch", "_watched", "layers",
    )  # fmt: skip

    def __init__(
        self, arenas: Arenas, tables: StepTables, hints: Hints = NO_HINTS, *, is_fixed: bool = False,
        begin_late: bool = False, mass: MassSum | None = None, tokens: Any = None,
        staged: StagedCopies | None = None, is_short: bool = False,
    ) -> None:  # fmt: skip
        self._arenas, self._backend, self._hints, self._is_fixed = arenas, arenas.backend, hints, is_fixed
        self._begin_late, self._is_short = begin_late, is_short
        block_table, block_starts, seq_lens, cu_seqlens_q, slot_mapping = tables
        describe = arenas.backend.describe
        self._tables = (
            describe(block_table, "block_table"),
            describe(block_starts, "block_starts"),
            describe(seq_lens, "seq_lens"),
            None if hints.query_counts == (1, 1) else describe(cu_seqlens_q, "cu_seqlens_q"),
        )
        self._slots = describe(slot_mapping, "slot_mapping")
        self._num_tokens = len(slot_mapping)
        self._staged = staged
        self._overlaps = staged is None and arenas.backend.can_overlap(arenas.device)
        self._appended_keys = 0  # address of the keys that were appended to last
        self._appended: tuple[Any, Any] | None = None
        self._attended: list[tuple[Any, Any]] = []  # forms and prepared calls, the one used last first
        self._seen = 0  # bit i: layer i has been attended to
        self._mass = mass
        self._watched = -1  # the layer whose append calls for a check
        self._watch: Callable[[], None] | None = None
        if arenas.canary is not None:
            self._watched = min(arenas.keys) if isinstance(arenas.keys, dict) else 0
            self._watch = arenas.canary.watch(tables[:4], self._tables, tokens)
        self.layers = 0

    def append(self, layer: int, key: Any, value: Any) -> None:
        """Check a layer's new keys and values, and store them."""
        arenas = self._arenas
        layer = arenas.require_layer(layer)
        describe, raw = self._backend.describe, arenas.raw_dtype
        keys, values = describe(key, "key", raw), describe(value, "value", raw)
        form = (keys[1:4], values[1:4], keys.device, values.device)
        begin, end = arenas.ranges[0]
        apart = not (begin <= keys.address < end or begin <= values.address < end)
        if self._appended is not None and self._appended[0] == form and apart and arenas.are_aligned(keys, values):
            self._append_again(layer, keys.address, values.address)
            return
        expected = (self._num_tokens, arenas.num_kv_heads, arenas.head_dim)
        for new, name in ((keys, "key"), (values, "value")):
            if new.shape != expected or new.dtype != arenas.dtype:
                raise ShapeError(
                    f"{name}: expected [num_tokens, num_kv_heads, head_dim] = {expected} {arenas.dtype}, "
                    f"got {new.shape} {new.dtype}{autocast_note()}"
                )
            check_rows(new, name, "[num_tokens, num_kv_heads, head_dim]", 3)
            if not apart:
                check_apart(((name, new),), (("k_cache", arenas.keys[layer]), ("v_cache", arenas.values[layer])))
        self._appended_keys = arenas.keys[layer].address
        prepared = self._backend.append(keys, values, arenas.keys[layer], arenas.values[layer], self._slots)
        if prepared is not None:
            self._appended = form, prepared
        self.layers |= 1 << layer
        if layer == self._watched and self._watch is not None:
            self._watch()

    def attend_prepared(self, layer: int, key: int, value: int, q: int, out: int) -> bool:
        """Append and attend as the layer before did, with arrays of the same shapes, strides and dtypes elsewhere.

        Args:
            layer: the layer.
            key, value, q, out: addresses of the arrays.

        Returns:
            False, with nothing done, if there was no such layer before, or an address is not of a whole element.
        """
        arenas = self._arenas
        if self._appended is None or not self._attended or (key | value | q | out) & (arenas.alignment - 1):
            return False
        layer = arenas.require_layer(layer)
        if self._attended[0][0][_IN_PLACE] != (q == out) or not self._may_repeat(layer):
            return False
        self._append_again(layer, key, value)
        self._attend_again(layer, q, out)
        return True

    def _append_again(self, layer: int, key: int, value: int) -> None:
        assert self._appended is not None
        keys = self._appended_keys = self._arenas.keys[layer].address
        values = self._arenas.values[layer].address
        self._backend.append_prepared(self._appended[1], key, value, keys, values, overlaps=self._overlaps)
        self.layers |= 1 << layer
        if layer == self._watched and self._watch is not None:
            self._watch()

    def attend(
        self,
        layer: int,
        q: Any,
        *,
        softmax_scale: float | None = None,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        sinks: Any = None,
        alibi_slopes: Any = None,
        out: Any = None,
        return_lse: bool = False,
        num_splits: int = 0,
        backend: str | None = None,
    ) -> Any:
        """Check a layer's queries and the options, and attend; see `kvtoolkit.variable_block_attention`."""
        arenas = self._arenas
        layer = arenas.require_layer(layer)
        if self.layers and not self.layers >> layer & 1 and self._num_tokens:
            raise StepError(
                f"layer: expected one that this step has appended to, got {layer}; append its keys and values"
            )
        backend_of, raw = self._backend, arenas.raw_dtype
        queries = backend_of.describe(q, "q", raw)
        is_own = out is None
        if is_own:
            out, target = backend_of.empty(queries.shape, arenas.dtype, q, queries.device)
        else:
            target = backend_of.describe(out, "out", raw)
        options = (softmax_scale, causal, window_size, softcap, num_splits, backend)
        in_place = queries.address == target.address
        form = (in_place, queries[1:4], target[1:4], target.writable, queries.device, target.device, options)
        is_plain = sinks is None and alibi_slopes is None and return_lse is False
        may_repeat = self._may_repeat(layer)
        if (
            is_plain
            and may_repeat
            and self._find_form(form)
            and arenas.are_aligned(queries, target)
            and (is_own or self._is_apart(queries, target))
        ):
            self._attend_again(layer, queries.address, target.address)
            if not is_own:
                mark_written(out)
            return out
        arenas.check_backend(backend)
        check_flags(causal=causal, return_lse=return_lse)
        window = check_options(softmax_scale, window_size, softcap, num_splits)
        if self._is_short and (window != (-1, -1) or alibi_slopes is not None or causal is False):
            raise UnsupportedError(_NO_POSITIONS)
        self._check_queries(queries)
        check_output(target, "out", queries.shape, arenas.dtype)
        if not is_own:
            arenas.check_apart(layer, target, queries)
        if not is_plain:
            sinks, alibi_slopes = self._describe_per_head(sinks, alibi_slopes, queries.shape[1])
        lse, lse_target = None, None
        if return_lse:
            lse, lse_target = backend_of.empty(queries.shape[:2], "float32", q, queries.device)
        table, starts, lengths, bounds = self._tables
        call = attention_call(
            queries, arenas.keys[layer], arenas.values[layer], table, starts, lengths, out=target, lse=lse_target,
            cu_seqlens_q=bounds, sinks=sinks, alibi_slopes=alibi_slopes, tiers=arenas.tiers[layer],
            block_mass=None if self._mass is None else self._mass.operand, softmax_scale=softmax_scale, causal=causal,
            window_size=window, softcap=softcap, num_splits=num_splits,
        )  # fmt: skip
        prepared = self._run(layer, call)
        if is_plain and prepared is not None:
            self._attended = [(form, prepared), *self._attended[: _MOST_FORMS - 1]]
        if not is_own:
            mark_written(out)
        return (out, lse) if return_lse else out

    def _run(self, layer: int, call: AttentionCall) -> Any:
        """Attend; returns what `Backend.attend` returns."""
        if self._staged is not None:
            self._staged.before(layer)
        prepared = self._backend.attend(call, self._hints_now())
        if self._staged is not None:
            self._staged.after(layer)
        if self._mass is not None:
            self._mass.add()
        return prepared

    def _hints_now(self) -> Hints:
        """The hints, without those that a graph which is being captured will outlive."""
        hints, device = self._hints, self._arenas.device
        if device >= 0 and not self._is_fixed and is_capturing(current_stream(device)):
            if self._begin_late:
                raise UnsupportedError(
                    "attend: expected a run of a GraphStep while a CUDA graph is captured, because for layers with a "
                    "window (layer_groups) the longest sequence of all replays must be known, got a step"
                )
            # the graph will meet longer sequences than now, and others that have nothing in common
            return hints._replace(max_seq_len=None, sharing=None)
        return hints

    def _describe_per_head(
        self, sinks: Any, alibi_slopes: Any, num_q_heads: int
    ) -> tuple[Operand | None, Operand | None]:
        """``sinks, alibi_slopes``, checked."""
        if sinks is not None:
            sinks = self._backend.describe(sinks, "sinks")
            check_per_head(sinks, "sinks", num_q_heads, infinite=True)
        if alibi_slopes is not None:
            alibi_slopes = self._backend.describe(alibi_slopes, "alibi_slopes")
            check_per_head(alibi_slopes, "alibi_slopes", num_q_heads, infinite=False)
        return sinks, alibi_slopes

    def _may_repeat(self, layer: int) -> bool:
        """Whether this layer may be attended to as one before it was.

        Not where a graph is captured after an eager run of the same step: the graph would follow the plan of that run,
        whatever the tables hold in a replay. Then everything is prepared anew, in the graph.
        """
        bit = 1 << layer
        if not self._seen & bit:
            self._seen |= bit
            return True
        device = self._arenas.device
        if device >= 0 and not self._is_fixed and is_capturing(current_stream(device)):
            self._seen = bit
            self._attended = []
            return False
        return True

    def _find_form(self, form: Any) -> bool:
        """Whether a layer before had these arrays and options; if so, its call becomes the first of `_attended`."""
        attended = self._attended
        try:
            for i, (known, _) in enumerate(attended):
                if known == form:
                    if i:
                        attended.insert(0, attended.pop(i))
                    return True
        except ValueError:  # an option is an array; it will be refused
            pass
        return False

    def _is_apart(self, q: Operand, out: Operand) -> bool:
        """Whether an output of the caller certainly shares no memory with what attention reads, or is ``q`` itself."""
        distance = out.address - q.address
        first, second = (q, out) if distance > 0 else (out, q)
        _, low, _, _ = extent(second.shape, second.strides)
        _, _, end, _ = extent(first.shape, first.strides)
        size = ITEMSIZES[q.dtype]
        apart = abs(distance) + size * low >= size * end or (distance == 0 and q.strides == out.strides)
        return apart and not self._arenas.contains(out.address)

    def _attend_again(self, layer: int, q: int, out: int) -> None:
        arenas = self._arenas
        keys, mass = arenas.keys[layer].address, self._mass
        # the append of this layer wrote nothing but the new tokens, and it waited for everything before it
        overlaps = self._overlaps and self._appended_keys == keys
        if self._staged is not None:
            self._staged.before(layer)
        self._backend.attend_prepared(
            self._attended[0][1], q, keys, arenas.values[layer].address, out, **arenas.tier_addresses[layer],
            block_mass=0 if mass is None else mass.operand.address, overlaps=overlaps,
        )  # fmt: skip
        if self._staged is not None:
            self._staged.after(layer)
        if mass is not None:
            mass.add()

    def _check_queries(self, queries: Operand) -> None:
        arenas, shape = self._arenas, queries.shape
        good = len(shape) == 3 and shape[0] == self._num_tokens and shape[2] == arenas.head_dim
        if not good or queries.dtype != arenas.dtype:
            raise ShapeError(
                f"q: expected [num_tokens, num_q_heads, head_dim] = ({self._num_tokens}, num_q_heads, "
                f"{arenas.head_dim}) {arenas.dtype}, got {shape} {queries.dtype}{autocast_note()}"
            )
        check_rows(queries, "q", "[num_tokens, num_q_heads, head_dim]", 3)
        check_heads(shape[1], arenas.num_kv_heads, arenas.head_dim)
