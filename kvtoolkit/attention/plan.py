"""One plan for the attention calls of all layers of a step: `plan_attention`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from kvtoolkit.arrays.call import Hints, check_hints
from kvtoolkit.arrays.device import check_devices
from kvtoolkit.arrays.host import (
    DENSE_TYPES,
    Operand,
    as_numpy_view,
    int32_view,
    is_on_device,
    is_torch,
    mark_written,
    operand,
)
from kvtoolkit.arrays.types import ITEMSIZES, Array
from kvtoolkit.attention.arguments import (
    check_apart,
    check_flags,
    check_indices,
    check_options,
    choose_backend,
    count,
    describe_per_head,
)
from kvtoolkit.attention.options import Options
from kvtoolkit.backends import BACKENDS
from kvtoolkit.errors import ArgumentError, UnsupportedError
from kvtoolkit.formats.tier_caches import TierCaches
from kvtoolkit.handles import handle_of
from kvtoolkit.runtime.streams import capture_id, current_stream

_NAMES = ("block_table", "block_starts", "seq_lens", "cu_seqlens_q")
_Tables = tuple[Operand, Operand | None, Operand, Operand | None]


class _Prepared(NamedTuple):
    """A call made ready for other layers, and where that holds."""

    call: Any
    """What `Backend.attend` returned."""
    stream: int
    capture: int
    """`capture_id` of the stream then."""
    alive: Any
    """Arrays that the call reads and that belong to no layer."""


class _Form(NamedTuple):
    """What decides whether one prepared call serves another layer: everything but addresses."""

    options: tuple[Any, ...]
    arrays: tuple[Any, ...]


class AttentionPlan:
    """What the attention calls of one step share; made by `plan_attention`.

    One thread at a time may use it, on one stream at a time. It keeps its arrays alive.
    """

    __slots__ = (
        "__weakref__",
        "_given",
        "_handle",
        "_kept",
        "_max_seqlen_k",
        "_max_seqlen_q",
        "_prepared",
        "_read",
        "_tables",
    )

    def __init__(
        self, given: tuple[Any, ...], tables: _Tables, max_seqlen_q: int | None, max_seqlen_k: int | None
    ) -> None:
        self._given, self._tables = given, tables
        self._max_seqlen_q, self._max_seqlen_k = max_seqlen_q, max_seqlen_k
        self._prepared: dict[_Form, _Prepared] = {}
        self._kept: dict[Any, dict[Any, Any]] = {}  # memory of plans on a GPU, which captured graphs refer to
        self._handle = handle_of(self)
        self._read: _Tables | None = None  # what calls read: on the CPU, copies that nobody can change

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("AttentionPlan: expected no copy, because a plan belongs to its arrays; make another one")

    def renew(self) -> None:
        """Forget what was planned, because the contents of the arrays have changed: the next call plans anew.

        Memory on a GPU is kept, so plans stay where captured graphs expect them.
        """
        self._prepared.clear()
        self._read = None

    def _attend(
        self, full: Callable[..., Any], q: Any, k_cache: Any, v_cache: Any, tables: tuple[Any, ...], options: Options,
        *, has_entries: bool, layout: str, block_mass: Any, tier_caches: TierCaches | None, hints: Hints,
        before: Callable[[], None] | None, memory: tuple[Operand, Operand] | None,
    ) -> Any:  # fmt: skip
        """Attend as the layer before did, if this one is of the same form; else in full, and keep what was prepared.

        Args:
            full: `kvtoolkit.attention.calls.attend`; the other arguments are as it takes them.
            tables: ``block_table, block_starts, seq_lens, cu_seqlens_q``.
        """
        backend = BACKENDS[choose_backend(options.backend, is_on_device(q))]
        device = self._tables[0].device
        if (backend.name == "cpu") != (device < 0):
            raise UnsupportedError(f"q: expected it {_place(device)}, as the arrays of the plan")
        self._check_tables(backend.describe, tables, has_entries, options.max_seqlen_q)
        described = _describe(backend.describe, q, k_cache, v_cache, options.out, tier_caches)
        queries, keys, values, target, warm, cold = described
        window = check_options(options.softmax_scale, options.window_size, options.softcap, options.num_splits)
        check_flags(causal=options.causal, return_lse=options.return_lse)
        sinks = slopes = None
        if (options.sinks is not None or options.alibi_slopes is not None) and len(queries.shape) == 3:
            sinks, slopes = describe_per_head(
                backend.describe, options.sinks, options.alibi_slopes, queries.shape[1], self._tables[0].shape[0],
                backend.name,
            )  # fmt: skip
        form = _form_of(backend.name, layout, hints, window, options, described, sinks, slopes, tier_caches)
        stream = capture = 0
        if device >= 0:
            stream = current_stream(device, is_torch(q))
            capture = capture_id(stream)
        is_plain = block_mass is None and not options.return_lse
        prepared = self._prepared.get(form) if is_plain and form is not None else None
        if (
            prepared is not None
            and (prepared.stream, prepared.capture) == (stream, capture)
            and _are_aligned(described, device)
        ):
            out = options.out
            if out is None:
                out, target = backend.empty(queries.shape, queries.dtype, q, device)
            else:
                assert target is not None
                self._check_apart(target, described, memory, sinks, slopes)
            if before is not None:
                before()
            backend.attend_prepared(
                prepared.call, queries.address, keys.address, values.address, target.address,
                warm=warm.address if warm else 0, cold=cold.address if cold else 0, from_torch=is_torch(q),
            )  # fmt: skip
            if options.out is not None:
                mark_written(out)
            return out

        def keep(call: Any) -> None:
            if is_plain and form is not None and call is not None:
                self._prepared[form] = _Prepared(call, stream, capture, (sinks, slopes))

        return self._attend_in_full(
            full, q, k_cache, v_cache, form, options, hints, keep, has_entries=has_entries, layout=layout,
            block_mass=block_mass, tier_caches=tier_caches, before=before, memory=memory,
        )  # fmt: skip

    def _attend_in_full(
        self, full: Callable[..., Any], q: Any, k_cache: Any, v_cache: Any, form: _Form | None, options: Options,
        hints: Hints, keep: Callable[[Any], None], **others: Any,
    ) -> Any:  # fmt: skip
        """Attend with every check, and with a plan of its own in memory that calls of the same plan share."""
        is_first = self._read is None
        if self._read is None:
            self._read = self._tables if self._tables[0].device >= 0 else self._copies()
        table, starts, lengths, bounds = self._read
        kept = None
        if table.device >= 0 and form is not None:
            kept = self._kept.setdefault(_plan_key(form), {})
        if self._max_seqlen_k is not None:
            hints = hints._replace(max_seq_len=self._max_seqlen_k)
        options = options._replace(cu_seqlens_q=bounds, max_seqlen_q=self._max_seqlen_q, plan=None)
        hints = hints._replace(kept=kept)
        try:
            return full(q, k_cache, v_cache, table, starts, lengths, options, hints=hints, keep=keep, **others)
        except BaseException:
            if is_first:  # nothing was attended by these copies, so the caller may mend the arrays and call again
                self.renew()
            raise

    def _copies(self) -> _Tables:
        """Copies of the arrays on the host, which stay as they are checked."""

        def copy(one: Operand, name: str) -> Operand:
            # a tensor that NumPy has viewed could not be resized any more
            copied = one.owner.detach().clone() if is_torch(one.owner) else as_numpy_view(one.owner, name).copy()
            return operand(copied, name)

        table, starts, lengths, bounds = self._tables
        lengths = copy(lengths, "seq_lens")
        if self._max_seqlen_k is not None:
            check_hints(Hints(None, self._max_seqlen_k), int32_view(lengths), None)
        return (
            copy(table, "block_table"), starts and copy(starts, "block_starts"), lengths,
            bounds and copy(bounds, "cu_seqlens_q"),
        )  # fmt: skip

    def _check_tables(
        self, describe: Callable[[Any, str], Operand], tables: tuple[Any, ...], has_entries: bool, max_seqlen_q: Any
    ) -> None:
        """ArgumentError unless these are the arrays of the plan."""
        if max_seqlen_q is not None and max_seqlen_q != self._max_seqlen_q:
            raise ArgumentError(
                f"max_seqlen_q: expected {self._max_seqlen_q}, as in the plan, or None, got {max_seqlen_q!r:.80}"
            )
        if has_entries != (self._tables[1] is not None):
            other = "a plan" if has_entries else "no plan"
            raise ArgumentError(f"plan: expected {other} for block_starts, got {'none' if has_entries else 'one'}")
        for name, given, known, planned in zip(_NAMES, tables, self._given, self._tables, strict=True):
            if given is known and (
                planned is None or (type(given) in DENSE_TYPES and given.data_ptr() == planned.address)
            ):
                continue
            if given is None or planned is None:
                expected, got = ("None", "an array") if planned is None else ("an array", "None")
                raise ArgumentError(f"{name}: expected {expected}, as in the plan, got {got}")
            found = describe(given, name)
            if found[:4] != planned[:4] or found.device != planned.device:
                raise ArgumentError(
                    f"{name}: expected the array that the plan was made for, {_said(planned)}, got {_said(found)}; "
                    "make a plan for these arrays"
                )

    def _check_apart(
        self, out: Operand, described: "_Described", memory: tuple[Operand, Operand] | None, sinks: Operand | None,
        slopes: Operand | None,
    ) -> None:  # fmt: skip
        """UnsupportedError if the output shares memory with what the call reads, unless it is the queries."""
        queries, keys, values, _, warm, cold = described
        keys, values = memory or (keys, values)
        read = [
            ("q", queries), ("k_cache", keys), ("v_cache", values), *zip(_NAMES, self._tables, strict=True),
            ("sinks", sinks), ("alibi_slopes", slopes), ("warm", warm), ("cold", cold),
        ]  # fmt: skip
        check_apart((("out", out),), read, in_place=("out", "q"))


_Described = tuple[Operand, Operand, Operand, Operand | None, Operand | None, Operand | None]
"""``q, k_cache, v_cache, out, warm, cold``; caches in the caller's layout."""


def _describe(
    describe: Callable[[Any, str], Operand], q: Any, k_cache: Any, v_cache: Any, out: Any, caches: TierCaches | None
) -> _Described:
    warm, cold = (None, None) if caches is None else (caches.warm, caches.cold)
    return (
        describe(q, "q"), describe(k_cache, "k_cache"), describe(v_cache, "v_cache"),
        None if out is None else describe(out, "out"), None if warm is None else describe(warm, "warm"),
        None if cold is None else describe(cold, "cold"),
    )  # fmt: skip


def _form_of(
    backend: str, layout: str, hints: Hints, window: tuple[int, int], options: Options, described: _Described,
    sinks: Operand | None, slopes: Operand | None, caches: TierCaches | None,
) -> _Form | None:  # fmt: skip
    """The form of a call whose options are checked; None if it has none, because an argument is wrong."""
    queries, keys, values, target, warm, cold = described
    scale = None if options.softmax_scale is None else float(options.softmax_scale)
    first = None if caches is None else caches.first_granules
    form = _Form(
        (
            backend, hints.query_counts, hints.max_seq_len, window, bool(options.causal), int(options.num_splits),
            first, layout, scale,
            float(options.softcap), sinks and (sinks[:4], sinks.device), slopes and (slopes[:4], slopes.device),
        ),
        (
            queries[1:4], keys[1:4], values[1:4], target and target[1:4], warm and warm[1:4], cold and cold[1:4],
            queries.device, keys.device, values.device, target and target[5:], warm and warm.device,
            cold and cold.device,
        ),
    )  # fmt: skip
    try:
        hash(form)
    except TypeError:  # first_granules is no tuple of integers
        return None
    return form


def _plan_key(form: _Form) -> tuple[Any, ...]:
    """What decides how work is planned: calls with the same key can share the memory of their plans."""
    queries, keys, *_ = form.arrays
    return *form.options[:8], queries[0], queries[2], keys[0][1:]


def _are_aligned(described: _Described, device: int) -> bool:
    """Whether arrays are where kernels can load them from: checked in full for the first layer of a form."""
    queries, keys, values, target, warm, cold = described
    addresses = queries.address | keys.address | values.address | (target.address if target else 0)
    if device < 0:
        return not addresses & (ITEMSIZES[queries.dtype] - 1)
    addresses |= (warm.address if warm else 0) | (cold.address if cold else 0)
    return not addresses & 15


def _place(device: int) -> str:
    return "in host memory" if device < 0 else f"on CUDA device {device}"


def _said(array: Operand) -> str:
    return f"{array.shape} {array.dtype} with strides {array.strides} at {array.address:#x} {_place(array.device)}"


def plan_attention(
    block_table: Array,
    seq_lens: Array,
    *,
    block_starts: Array | None = None,
    cu_seqlens_q: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> AttentionPlan:
    """Make a plan that the attention calls of all layers of a step share.

        plan = kvtoolkit.plan_attention(block_table, seq_lens)
        for layer in layers:
            ...
            out = kvtoolkit.paged_attention(q, k_cache, v_cache, block_table, seq_lens, plan=plan)

    Nothing is planned yet. The first call with ``plan=`` checks and plans; later ones whose ``q``, caches and ``out``
    have its shapes, strides and dtypes, and whose options are the same, skip that: on a GPU their host time is a part
    of it, and one kernel is launched. Calls of another form are planned once for each form; calls with ``return_lse``
    or ``block_mass`` are planned every time. Results have the same bits as without a plan.

    The calls get the arrays of the plan again. Their contents must not change while the plan is in use; when they have
    changed, as in the next step of a captured graph, call `AttentionPlan.renew`. On the CPU calls read copies, made by
    the first call that is not refused, and see no change until then; on a GPU calls after a change that was not renewed
    may read foreign memory.

    A plan may be used while a CUDA graph is captured: the first call of a capture plans in the graph, so every replay
    plans anew, for what the arrays hold then. Run the calls with this plan once before, so that it has its memory, and
    keep the plan as long as the graph.

    Args:
        block_table: as `paged_attention` takes it, or with ``block_starts`` `variable_block_attention`.
        seq_lens: ``[batch]`` int32, tokens in the cache, the new ones included.
        block_starts: as `variable_block_attention` and `tiered_attention` take it; None for `paged_attention`.
        cu_seqlens_q: ``[batch + 1]`` int32; None = one query per row.
        max_seqlen_q: as in `paged_attention`; calls with this plan may give the same one, or none.
        max_seqlen_k: most tokens of a row, whenever the plan is used or a graph captured with it is replayed; None =
            what the table has room for. Checked on the CPU and with ``KVTOOLKIT_CHECK=1``, else trusted.

    Returns:
        A plan for one thread and one stream at a time, which keeps the arrays alive.

    Raises:
        ShapeError: a shape, dtype, stride or number is not as above. What arrays hold is checked by the first call.
        UnsupportedError: the arrays are not all in one place.
    """
    describe = BACKENDS[choose_backend(None, is_on_device(block_table))].describe
    table, lengths = describe(block_table, "block_table"), describe(seq_lens, "seq_lens")
    check_indices(table, "block_table", ("batch", "max_entries"))
    batch, max_entries = table.shape
    check_indices(lengths, "seq_lens", (batch,))
    starts = bounds = None
    if block_starts is not None:
        starts = describe(block_starts, "block_starts")
        check_indices(starts, "block_starts", (batch, max_entries))
    if cu_seqlens_q is not None:
        bounds = describe(cu_seqlens_q, "cu_seqlens_q")
        check_indices(bounds, "cu_seqlens_q", (batch + 1,))
    tables = (table, starts, lengths, bounds)
    if table.device >= 0:
        check_devices(dict(zip(_NAMES, tables, strict=True)))
    most_q, most_k = (
        None if most is None else count(name, most)
        for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k))
    )
    return AttentionPlan((block_table, block_starts, seq_lens, cu_seqlens_q), tables, most_q, most_k)
