"""The attention calls: check the arguments, choose a backend, launch, return.

On the host they take NumPy arrays, torch CPU tensors, or objects with ``__dlpack__`` or ``__array_interface__``, in any
mixture, and return torch tensors where ``q`` is one, else NumPy arrays. They are synchronous, may be made from several
threads at once, and share the threads of `kvtoolkit.cpu.threads`; results do not depend on the number of threads.

On a GPU they take torch CUDA tensors, CuPy arrays, or objects with ``__cuda_array_interface__`` or ``__dlpack__``, all
on one device, and return torch tensors where ``q`` is one, else CuPy arrays. They run on the current stream, torch's
where ``q`` is a tensor, else CuPy's; nothing is copied and nothing is waited for, so they can be captured in a CUDA
graph once they have run (`kvtoolkit.warmup` compiles beforehand). Calls on one stream share scratch memory: make them
from one thread at a time. float16 and bfloat16, head_dim a multiple of 16 up to 256, rows of ``q``, ``out`` and the
caches at multiples of 16 bytes. The contents of index arrays are not checked, unless ``KVTOOLKIT_CHECK=1`` was set when
kvtoolkit was imported: a wrong index reads or writes foreign memory.

bfloat16 is ``torch.bfloat16`` or ``ml_dtypes.bfloat16``. No gradient is recorded; a tensor that a call writes to counts
as changed for autograd. ``torch.autocast`` changes nothing: arrays keep their dtypes, which must agree. In what
``torch.compile`` compiles, a call on tensors is an operator, see `kvtoolkit.integrations.operators`. Tensors must have
memory of their own: fake, meta and freed tensors, wrapper subclasses such as DTensor, and negated views raise
UnsupportedError, as do arrays to write to that overlap themselves or another argument.
"""

from collections.abc import Callable
from typing import Any

from kvtoolkit.arrays.call import (
    NO_HINTS,
    AttentionCall,
    Hints,
    QuantizedTiers,
    attention_call,
    heads_first,
)
from kvtoolkit.arrays.host import Operand, is_on_device, is_torch, mark_written
from kvtoolkit.arrays.types import Array
from kvtoolkit.attention.arguments import (
    as_integers,
    check_apart,
    check_caches,
    check_flags,
    check_heads,
    check_indices,
    check_layout,
    check_options,
    check_output,
    check_rows,
    choose_backend,
    count_queries,
    describe_per_head,
)
from kvtoolkit.attention.options import Options, make_options
from kvtoolkit.attention.plan import AttentionPlan
from kvtoolkit.backends import BACKENDS
from kvtoolkit.errors import ArgumentError, ShapeError
from kvtoolkit.formats.entry import GRANULE, MAX_BLOCK_GRANULES, MAX_GRANULES
from kvtoolkit.formats.quantized import INT4, INT8
from kvtoolkit.formats.tier_caches import TierCaches


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    seq_lens: Array,
    *,
    layout: str = "NHD",
    cu_seqlens_q: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    num_splits: int = 0,
    max_seqlen_q: int | None = None,
    plan: AttentionPlan | None = None,
    backend: str | None = None,
) -> Any:
    """Attend the newest tokens of each sequence to its cached keys and values: decode, verify, chunked or full prefill.

    Query ``i`` of the ``n`` of a row is at position ``seq_len - n + i``. One before position 0 sees nothing under
    ``causal``: its ``out`` is 0 and its ``lse`` -inf, or the sink's logit. A padding row gives 0 and -inf.
    A score is ``softmax_scale * q.k``, then ``softcap * tanh(score / softcap)``, then
    ``score - slope * |position - j|``: the order of flash-attn.

    Args:
        q: ``[num_tokens, num_q_heads, head_dim]`` float32, float16 or bfloat16, last axis contiguous, ``head_dim`` a
            multiple of 8, ``num_q_heads`` one of ``num_kv_heads``; on a GPU no float32, a multiple of 16 up to 256.
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]`` for layout ``"NHD"``,
            ``[num_blocks, num_kv_heads, block_size, head_dim]`` for ``"HND"``; dtype of ``q``, any block size, any
            strides but the last axis contiguous; ``v_cache`` has its shape and dtype. Slots past a sequence's end are
            never used.
        block_table: ``[batch, max_blocks_per_seq]`` int32 block ids in ``[0, num_blocks)``; those past a row's end are
            not read.
        seq_lens: ``[batch]`` int32, tokens in the cache, the new ones included; 0 = padding row.
        cu_seqlens_q: ``[batch + 1]`` int32, row ``b`` asks ``q[cu[b]:cu[b + 1]]``; None = one query per row.
        softmax_scale: factor on q.k; default ``head_dim ** -0.5``.
        causal: a query sees no later position; bottom-right aligned.
        window_size: a query sees positions ``position - left`` to ``position + right``; -1 = unbounded.
        softcap: bound of the scores; 0 = off.
        sinks: ``[num_q_heads]`` float32, an extra logit in each head's denominator, without a value; -inf = none.
        alibi_slopes: ``[num_q_heads]`` float32; on the CPU also ``[batch, num_q_heads]``, last axis contiguous.
        out: array or tensor to write, shaped and typed as ``q``, last axis contiguous; it may be ``q`` itself.
        num_splits: splits of each sequence, merged by their log-sum-exp, so that a row's result does not depend on the
            batch around it; 0 = automatic: on the CPU also by the row alone, on a GPU by what keeps it busy. There,
            more than 128 are taken as 128, and rows of more than 8 new tokens are not split.
        max_seqlen_q: most query tokens of a row, flash-attn's name; None = unknown. It saves work on a GPU where
            ``cu_seqlens_q`` is given: without it any row may have all tokens, and with it a decode batch is launched
            as one. Checked on the CPU and with ``KVTOOLKIT_CHECK=1``, else trusted on a GPU: the results of a row that
            has more, now or when a graph is replayed, are wrong.
        plan: what `kvtoolkit.plan_attention` made of these ``block_table``, ``seq_lens`` and ``cu_seqlens_q``, for all
            layers of a step.
        backend: ``"cpu"``, ``"cuda"``, ``"numba"`` (the readable GPU kernels), or None to choose by where the arrays
            are.

    Returns:
        ``out``; with ``return_lse`` also ``lse`` ``[num_tokens, num_q_heads]`` float32, natural log.

    Raises:
        ShapeError: a shape, dtype, stride or value is not as above, or a row is longer than its table; nothing was
            written.
        UnsupportedError: no kernel for this head_dim or backend.
        ArgumentError: ``plan`` is no plan, or one for other arrays.

    Source: block tables, Kwon et al. 2023 (arXiv:2309.06180), sec. 4.
    """
    check_layout(layout)
    options = make_options(
        (
            cu_seqlens_q, softmax_scale, causal, window_size, softcap, sinks, alibi_slopes, out, return_lse, num_splits,
            backend, max_seqlen_q, plan,
        )
    )  # fmt: skip
    return attend(q, k_cache, v_cache, block_table, None, seq_lens, options, has_entries=False, layout=layout)


def variable_block_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    block_starts: Array,
    seq_lens: Array,
    *,
    block_mass: Array | None = None,
    cu_seqlens_q: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    num_splits: int = 0,
    max_seqlen_q: int | None = None,
    plan: AttentionPlan | None = None,
    backend: str | None = None,
) -> Any:
    """Attend as `paged_attention`, to blocks of 1-8 granules of 8 tokens, all lengths mixed within one sequence.

    The place of the tokens does not matter: every partition into blocks gives the same bits, and so does
    `paged_attention` on the same tokens in blocks of a multiple of 8 (on the CPU, of any size).

    Args:
        k_cache: ``[num_granules, num_kv_heads, 8, head_dim]``, dtype of ``q``, last axis contiguous; ``v_cache`` too.
        block_table: ``[batch, max_entries]`` int32 entries in the hot tier, -1 = empty. An entry is made of a first
            granule, a length in granules and a tier by `kvtoolkit.formats.entry.pack_entry`.
        block_starts: ``[batch, max_entries]`` int32, first logical granule of each entry: 0, then where the one before
            ends. All entries after a row's first empty one are empty.
        block_mass: as in `tiered_attention`.

    Everything else is as in `paged_attention`.

    Raises:
        ShapeError: a shape, dtype, stride or value is not as above, or a row is longer than its entries; nothing was
            written.
        UnsupportedError: no kernel for this head_dim or backend, or an entry in another tier.
    """
    options = make_options(
        (
            cu_seqlens_q, softmax_scale, causal, window_size, softcap, sinks, alibi_slopes, out, return_lse, num_splits,
            backend, max_seqlen_q, plan,
        )
    )  # fmt: skip
    return attend(
        q, k_cache, v_cache, block_table, block_starts, seq_lens, options, has_entries=True, block_mass=block_mass
    )


def tiered_attention(
    q: Array,
    tier_caches: TierCaches,
    block_table: Array,
    block_starts: Array,
    seq_lens: Array,
    *,
    block_mass: Array | None = None,
    cu_seqlens_q: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    num_splits: int = 0,
    max_seqlen_q: int | None = None,
    plan: AttentionPlan | None = None,
    backend: str | None = None,
) -> Any:
    """Attend as `variable_block_attention` to tokens of which some are stored as int8 and some as int4, in one softmax.

    A row gives the attention over what the codes stand for, see `kvtoolkit.formats.quantized`; each 64 positions from a
    multiple of 64 on, a tile, are in one tier. On the CPU a row whose entries are all hot gives the bits of
    `variable_block_attention`; on a GPU another kernel runs, whose sums have another order. On sm_90, rows with more
    than a few new tokens see what codes stand for rounded to 16 bits.

    Args:
        tier_caches: `kvtoolkit.TierCaches`: ``k_cache`` and ``v_cache`` ``[num_granules, num_kv_heads, 8, head_dim]``,
            dtype of ``q``, last axis contiguous; ``warm`` and ``cold`` ``[num_blocks, num_kv_heads, nbytes]`` uint8,
            contiguous, or None, for ``head_dim`` 64 or 128; ``first_granules``, multiples of 8.
        block_table: ``[batch, max_entries]`` int32 entries in these tiers, -1 = empty. Their granules count through
            the tiers. In the hot tier an entry is 1-8 granules; in another it is 8, and both its
            place in its tier and its start in ``block_starts`` are multiples of 8.
        block_mass: None, or ``[batch, max_tiles, num_kv_heads]`` float32, contiguous, ``max_tiles`` at least
            ``max_entries``. Written, not added to: the share of the attention that goes to each tile, averaged over
            the queries of the row and of the group; 0 from a row's end on. A sink's share is in no tile. Asking
            for it does not change a bit of the result (but on a GPU where rows have, or for all that the host knows may
            have, more than a few new tokens: they are decode kernels' work then).

    Everything else is as in `variable_block_attention`.

    Raises:
        ShapeError: a shape, dtype, stride or value is not as above, a row is longer than its entries, or an entry is in
            no tier or reaches out of it; nothing was written.
        UnsupportedError: no kernel for this head_dim or backend.
    """
    try:
        caches = TierCaches(*tier_caches)
    except TypeError:
        raise ShapeError(
            f"tier_caches: expected (k_cache, v_cache, warm, cold, first_granules), got {type(tier_caches).__name__}"
        ) from None
    options = make_options(
        (
            cu_seqlens_q, softmax_scale, causal, window_size, softcap, sinks, alibi_slopes, out, return_lse, num_splits,
            backend, max_seqlen_q, plan,
        )
    )  # fmt: skip
    return attend(
        q, caches.k_cache, caches.v_cache, block_table, block_starts, seq_lens, options, has_entries=True,
        block_mass=block_mass, tier_caches=caches,
    )  # fmt: skip


def attend(
    q: Any, k_cache: Any, v_cache: Any, block_table: Any, block_starts: Any, seq_lens: Any, options: Options, *,
    has_entries: bool, layout: str = "HND", block_mass: Any = None, tier_caches: TierCaches | None = None,
    hints: Hints = NO_HINTS, before: Callable[[], None] | None = None, memory: tuple[Operand, Operand] | None = None,
    keep: Callable[[Any], None] | None = None,
) -> Any:  # fmt: skip
    """Check the arguments of any attention call, choose a backend and launch; the public calls all come here.

    Args:
        has_entries: whether the table holds entries, which begin at ``block_starts``; else it holds block ids.
        layout: of the caches.
        hints: what the host knows.
        before: called once everything is checked and before anything is read or written.
        memory: where keys and values are, if the caches reach beyond it.
        keep: called with what `Backend.attend` returns.
    """
    (
        cu_seqlens_q, softmax_scale, causal, window_size, softcap, given_sinks, given_slopes, out, return_lse,
        num_splits, name, max_seqlen_q, plan,
    ) = options  # fmt: skip
    if plan is not None:
        if type(plan) is not AttentionPlan:
            raise ArgumentError(f"plan: expected one of plan_attention, got {type(plan).__name__}")
        return plan._attend(
            attend, q, k_cache, v_cache, (block_table, block_starts, seq_lens, cu_seqlens_q), options,
            has_entries=has_entries, layout=layout, block_mass=block_mass, tier_caches=tier_caches, hints=hints,
            before=before, memory=memory,
        )  # fmt: skip
    backend = BACKENDS[choose_backend(name, is_on_device(q))]
    describe = backend.describe
    window = check_options(softmax_scale, window_size, softcap, num_splits)
    if type(causal) is not bool or type(return_lse) is not bool:
        check_flags(causal=causal, return_lse=return_lse)
    queries, keys, values = _describe_tokens(describe, q, k_cache, v_cache, layout)
    table, starts, lengths, bounds = _describe_tables(
        describe, queries, keys, block_table, block_starts, has_entries, seq_lens, cu_seqlens_q
    )
    if max_seqlen_q is not None:
        hints = hints._replace(query_counts=count_queries(max_seqlen_q, queries.shape[0], lengths, bounds))
    sinks = slopes = None
    if given_sinks is not None or given_slopes is not None:
        sinks, slopes = describe_per_head(
            describe, given_sinks, given_slopes, queries.shape[1], table.shape[0], backend.name
        )
    tiers = None if tier_caches is None else _describe_tiers(tier_caches, describe, keys.shape[1], queries.shape[2])
    masses = None
    if block_mass is not None:
        masses = describe(block_mass, "block_mass")
        _check_block_mass(masses, table, keys.shape[1])
    is_own = out is None
    if is_own:
        out, target = backend.empty(queries.shape, queries.dtype, q, queries.device)
    else:
        target = describe(out, "out")
        check_output(target, "out", queries.shape, queries.dtype)
    lse = lse_target = None
    call = attention_call(
        queries, keys, values, table, starts, lengths, out=target, cu_seqlens_q=bounds, sinks=sinks,
        alibi_slopes=slopes, tiers=tiers, block_mass=masses, softmax_scale=softmax_scale, causal=causal,
        window_size=window, softcap=softcap, num_splits=num_splits,
    )  # fmt: skip
    if not is_own or masses is not None:
        _check_written(call, is_own, memory)
    if return_lse:
        lse, lse_target = backend.empty(queries.shape[:2], "float32", q, queries.device)
        call = call._replace(lse=lse_target)
    if queries.device >= 0:
        hints = hints._replace(from_torch=is_torch(q))
    prepared = backend.attend(call, hints, check=True, before=before)
    if keep is not None:
        keep(prepared)
    if not is_own or masses is not None:
        mark_written(None if is_own else out, block_mass)
    return (out, lse) if return_lse else out


_Describe = Callable[[Any, str], Operand]


def _describe_tokens(
    describe: _Describe, q: Any, k_cache: Any, v_cache: Any, layout: str
) -> tuple[Operand, Operand, Operand]:
    """Queries and caches, checked; the caches ``[num_blocks, num_kv_heads, block_size, head_dim]``."""
    queries = describe(q, "q")
    keys, values = describe(k_cache, "k_cache"), describe(v_cache, "v_cache")
    check_rows(queries, "q", "[num_tokens, num_q_heads, head_dim]", 3)
    _, num_q_heads, head_dim = queries.shape
    check_caches(keys, values, queries.dtype, layout, head_dim, None)
    if layout != "HND":
        keys, values = heads_first(keys, layout), heads_first(values, layout)
    check_heads(num_q_heads, keys.shape[1], head_dim)
    return queries, keys, values


def _describe_tables(
    describe: _Describe, queries: Operand, keys: Operand, block_table: Any, block_starts: Any, has_entries: bool,
    seq_lens: Any, cu_seqlens_q: Any,
) -> tuple[Operand, Operand | None, Operand, Operand | None]:  # fmt: skip
    """``block_table, block_starts, seq_lens, cu_seqlens_q``, checked."""
    table, lengths = describe(block_table, "block_table"), describe(seq_lens, "seq_lens")
    check_indices(table, "block_table", ("batch", "max_entries"))
    batch, max_entries = table.shape
    num_tokens = queries.shape[0]
    check_indices(lengths, "seq_lens", (batch,))
    if batch == 0 and num_tokens:
        raise ShapeError(f"q: expected no tokens for a batch of no rows, got {num_tokens}")
    starts = bounds = None
    if has_entries:
        if keys.shape[2] != GRANULE:
            raise ShapeError(f"k_cache: expected [num_granules, num_kv_heads, 8, head_dim], got {keys.shape}")
        starts = describe(block_starts, "block_starts")
        check_indices(starts, "block_starts", (batch, max_entries))
    if cu_seqlens_q is not None:
        bounds = describe(cu_seqlens_q, "cu_seqlens_q")
        check_indices(bounds, "cu_seqlens_q", (batch + 1,))
    elif num_tokens != batch:
        raise ShapeError(f"q: expected one token per row, {batch}, where cu_seqlens_q is None, got {num_tokens}")
    return table, starts, lengths, bounds


def _check_written(call: AttentionCall, is_own: bool, memory: tuple[Operand, Operand] | None) -> None:
    """UnsupportedError if arrays to write share memory with others; an ``out`` that is ours does not."""
    keys, values = memory or (call.k_cache, call.v_cache)
    read = [
        ("q", call.q), ("k_cache", keys), ("v_cache", values), ("block_table", call.block_table),
        ("block_starts", call.block_starts), ("seq_lens", call.seq_lens), ("cu_seqlens_q", call.cu_seqlens_q),
        ("sinks", call.sinks), ("alibi_slopes", call.alibi_slopes),
    ]  # fmt: skip
    if call.tiers is not None:
        read += [("warm", call.tiers.warm), ("cold", call.tiers.cold)]
    written = [] if is_own else [("out", call.out)]
    if call.block_mass is not None:
        written.append(("block_mass", call.block_mass))
    check_apart(written, read, in_place=("out", "q"))


def _describe_tiers(caches: TierCaches, describe: Any, num_kv_heads: int, head_dim: int) -> QuantizedTiers:
    """The quantized tiers for the kernels, checked."""
    described: list[Operand | None] = []
    for name, blocks, form in (("warm", caches.warm, INT8), ("cold", caches.cold, INT4)):
        if blocks is None:
            described.append(None)
            continue
        tier = describe(blocks, name)
        shape = (num_kv_heads, form.nbytes(head_dim))
        if tier.dtype != "uint8" or len(tier.shape) != 3 or tier.shape[1:] != shape:
            raise ShapeError(
                f"{name}: expected [num_blocks, num_kv_heads = {shape[0]}, nbytes = {shape[1]}] uint8, "
                f"got {tier.shape} {tier.dtype}"
            )
        _check_contiguous(tier, name)
        described.append(tier)
    try:
        hot, warm, cold = as_integers("first_granules", "three integers", caches.first_granules)
    except (TypeError, ValueError):
        raise ShapeError(f"first_granules: expected three integers, got {caches.first_granules!r}") from None
    for first in (hot, warm, cold):
        if first % MAX_BLOCK_GRANULES or not 0 <= first <= MAX_GRANULES:
            raise ShapeError(
                f"first_granules: expected multiples of 8 from 0 to {MAX_GRANULES}, got {caches.first_granules!r}"
            )
    return QuantizedTiers(described[0], described[1], (hot, warm, cold))


def _check_block_mass(masses: Operand, table: Operand, num_kv_heads: int) -> None:
    batch, max_entries = table.shape
    shape = masses.shape
    good = len(shape) == 3 and (shape[0], shape[2]) == (batch, num_kv_heads) and shape[1] >= max_entries
    if not good or masses.dtype != "float32":
        raise ShapeError(
            f"block_mass: expected [batch = {batch}, at least max_entries = {max_entries}, "
            f"num_kv_heads = {num_kv_heads}] float32, got {shape} {masses.dtype}"
        )
    if not masses.writable:
        raise ShapeError("block_mass: expected a writable array, got a read-only one")
    _check_contiguous(masses, "block_mass")


def _check_contiguous(array: Operand, name: str) -> None:
    expected = 1
    for size, stride in zip(reversed(array.shape), reversed(array.strides), strict=True):
        if stride != expected and size > 1 and 0 not in array.shape:
            raise ShapeError(f"{name}: expected a contiguous array, got strides {array.strides} (elements)")
        expected *= size


def append(
    key: Array,
    value: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    *,
    layout: str,
    backend: str | None = None,
) -> None:
    """Write each new token's key and value to its slot of the cache, in place.

    Args:
        key: ``[num_tokens, num_kv_heads, head_dim]``, last axis contiguous, dtype of the caches; ``value`` too.
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]`` for layout ``"NHD"``,
            ``[num_blocks, num_kv_heads, block_size, head_dim]`` for ``"HND"`` (granule arenas: ``"HND"``, block size
            8); any strides but the last axis contiguous; ``v_cache`` has its shape.
        slot_mapping: ``[num_tokens]`` int64, ``block * block_size + i``; -1 = skip. No slot may be named twice.
        backend: as in `paged_attention`.

    Raises:
        ShapeError: a shape, dtype, stride or slot is not as above; nothing was written.
        UnsupportedError: an array is not where the backend works.

    May be called from several threads at once, for different slots.
    """
    check_layout(layout)
    kernels = BACKENDS[choose_backend(backend, is_on_device(key, "key"))]
    describe = kernels.describe
    new_keys, new_values = describe(key, "key"), describe(value, "value")
    keys, values = describe(k_cache, "k_cache"), describe(v_cache, "v_cache")
    check_rows(new_keys, "key", "[num_tokens, num_kv_heads, head_dim]", 3)
    check_rows(new_values, "value", "[num_tokens, num_kv_heads, head_dim]", 3)
    num_tokens, num_heads, head_dim = new_keys.shape
    if new_values.shape != new_keys.shape or new_values.dtype != new_keys.dtype:
        raise ShapeError(
            f"value: expected as key, {new_keys.shape} {new_keys.dtype}, got {new_values.shape} {new_values.dtype}"
        )
    check_caches(keys, values, new_keys.dtype, layout, head_dim, num_heads)
    if not (keys.writable and values.writable):
        raise ShapeError("k_cache, v_cache: expected writable arrays, got a read-only one")
    slots = describe(slot_mapping, "slot_mapping")
    check_indices(slots, "slot_mapping", (num_tokens,), "int64")
    check_apart(
        (("k_cache", keys), ("v_cache", values)),
        (("key", new_keys), ("value", new_values), ("slot_mapping", slots)),
    )
    keys, values = heads_first(keys, layout), heads_first(values, layout)
    kernels.append(new_keys, new_values, keys, values, slots, check=True, from_torch=is_torch(key))
    mark_written(k_cache, v_cache)


def merge_states(
    out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, *, backend: str | None = None
) -> tuple[Any, Any]:
    """Merge the attention over two disjoint sets of keys into the attention over both.

    Args:
        out_a: ``[num_tokens, num_q_heads, head_dim]`` float32, float16 or bfloat16, last axis contiguous; ``out_b``
            has its shape and dtype. Where a side's lse is -inf, its ``out`` is not used.
        lse_a: ``[num_tokens, num_q_heads]`` float32, natural log, contiguous; -inf = no keys; ``lse_b`` too.

    Returns:
        New ``(out, lse)``, typed as ``out_a`` and ``lse_a``. Two empty sides give 0 and -inf.

    Raises:
        ShapeError: a shape, dtype or stride is not as above.
        UnsupportedError: head_dim is not a multiple of 8, or an array is not where the backend works.

    Source: Ye et al. 2025 (FlashInfer, arXiv:2501.01005), composition of attention states.
    """
    kernels = BACKENDS[choose_backend(backend, is_on_device(out_a, "out_a"))]
    describe = kernels.describe
    a, b = describe(out_a, "out_a"), describe(out_b, "out_b")
    check_rows(a, "out_a", "[num_tokens, num_q_heads, head_dim]", 3)
    check_rows(b, "out_b", "[num_tokens, num_q_heads, head_dim]", 3)
    if b.shape != a.shape or b.dtype != a.dtype:
        raise ShapeError(f"out_b: expected as out_a, {a.shape} {a.dtype}, got {b.shape} {b.dtype}")
    check_heads(a.shape[1], 1, a.shape[2], "out_a")
    sides = []
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        side = describe(lse, name)
        if side.shape != a.shape[:2] or side.dtype != "float32":
            raise ShapeError(f"{name}: expected {a.shape[:2]} float32, got {side.shape} {side.dtype}")
        scattered = (a.shape[0] > 1 and side.strides[0] != a.shape[1]) or (a.shape[1] > 1 and side.strides[1] != 1)
        if scattered and 0 not in a.shape:
            raise ShapeError(f"{name}: expected a contiguous array, got strides {side.strides} (elements)")
        sides.append(side)
    out, target = kernels.empty(a.shape, a.dtype, out_a, a.device)
    lse, lse_target = kernels.empty(a.shape[:2], "float32", out_a, a.device)
    kernels.merge_states(target, lse_target, a, sides[0], b, sides[1], from_torch=is_torch(out_a))
    return out, lse
