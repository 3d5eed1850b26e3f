"""One attention call as every backend takes it: `AttentionCall`; and what a backend must offer: `Backend`.

An `AttentionCall` is made by `attention_call` where arguments enter the library, after they have been checked. What
callers may leave out or say in several ways is settled there and nowhere else: the default scale, the window that
``causal`` stands for, and the layout of the caches.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvtoolkit.arrays.host import Operand, make_operand
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.errors import ShapeError


class QuantizedTiers(NamedTuple):
    """The quantized tiers of one layer, described and checked."""

    warm: Operand | None
    """``[num_blocks, num_kv_heads, nbytes]`` uint8; None: there is no such tier."""
    cold: Operand | None
    first_granules: tuple[int, int, int]

    def addresses(self) -> dict[str, int]:
        """Addresses of the tiers that exist, as `Backend.attend_prepared` takes them."""
        return {name: one.address for name, one in (("warm", self.warm), ("cold", self.cold)) if one is not None}


class AttentionCall(NamedTuple):
    """The arrays and the numbers of one attention call. The library trusts it: nothing here is checked again."""

    q: Operand
    """``[num_tokens, num_q_heads, head_dim]``, last axis contiguous."""
    k_cache: Operand
    """``[num_blocks, num_kv_heads, block_size, head_dim]`` by its strides, whatever the layout in memory; last axis
    contiguous; block size 8 where there are ``block_starts``."""
    v_cache: Operand
    """The same for the values."""
    block_table: Operand
    """``[batch, max_entries]`` int32: entries, or block ids where ``block_starts`` is None."""
    block_starts: Operand | None
    """``[batch, max_entries]`` int32: the first logical granule of each entry."""
    seq_lens: Operand
    """``[batch]`` int32, contiguous: tokens in the cache, the new ones included; 0 = padding row."""
    cu_seqlens_q: Operand | None
    """``[batch + 1]`` int32, contiguous: where the queries of each row begin; None = one query per row."""
    out: Operand
    """To write: shaped and typed as ``q``; it may be ``q`` itself."""
    lse: Operand | None
    """To write: ``[num_tokens, num_q_heads]`` float32, contiguous."""
    sinks: Operand | None
    """``[num_q_heads]`` float32: an extra logit of each head."""
    alibi_slopes: Operand | None
    """``[num_q_heads]`` float32; on the CPU also ``[batch, num_q_heads]``."""
    tiers: QuantizedTiers | None
    """The tiers that entries may be in besides the hot one; None = all entries are hot."""
    block_mass: Operand | None
    """To write: ``[batch, max_tiles, num_kv_heads]`` float32, contiguous: the share of attention of each tile."""
    scale: float
    """Factor on q.k."""
    softcap: float
    """Bound of the scores; 0 = off."""
    left: int
    """Keys visible before a query's position; -1 = all."""
    right: int
    """Keys visible after it; -1 = all, 0 = causal."""
    num_splits: int
    """Splits of each sequence; 0 = automatic."""


class Sharing(NamedTuple):
    """That rows of a call begin with the same blocks, often enough to read these once for all of them.

    It says where to look. What rows have in common is found on the device, in the tables.
    """

    order: Operand | None = None
    """``[batch]`` int32: the rows in an order that has those with a common beginning side by side; None: they are."""


class Hints(NamedTuple):
    """What the host knows about an `AttentionCall` that its arrays, which may be on a device, do not tell it.

    Hints never change which keys a query sees. They save launches and memory on a GPU; the CPU ignores them.
    """

    query_counts: tuple[int, int] | None = None
    """Fewest and most query tokens of the rows."""
    max_seq_len: int | None = None
    """No row is longer than that, now or in a replay of a captured graph."""
    kept: dict[Any, Any] | None = None
    """Where the plan and the list of granules of a step are kept for its other layers; None = in scratch memory."""
    sharing: Sharing | None = None
    """That rows have blocks in common; None = they are not looked for."""
    from_torch: bool | None = None
    """Whose current stream the call runs on, torch's or CuPy's; None = torch's if the program uses torch on the GPU."""
    counts_are_bounds: bool = False
    """Whether rows may have fewer query tokens than ``query_counts`` says, now or in a replay of a captured graph. If
    they may, what depends on the most of them is decided on the device."""


NO_HINTS = Hints()


def check_hints(hints: Hints, seq_lens: Int32Array, cu_seqlens_q: Int32Array | None) -> None:
    """ShapeError if a row has more query tokens, or more tokens in the cache, than the hints say.

    Args:
        hints: ``query_counts`` and ``max_seq_len`` are looked at.
        seq_lens: ``[batch]`` on the host.
        cu_seqlens_q: ``[batch + 1]`` on the host; whether it ascends is checked elsewhere.
    """
    if hints.query_counts is not None and cu_seqlens_q is not None:
        counts = np.diff(cu_seqlens_q.astype(np.int64))
        found, most = int(counts.max(initial=0)), hints.query_counts[1]
        if found > most and counts.min() >= 0:
            raise ShapeError(f"max_seqlen_q: expected at least {found}, the longest row by cu_seqlens_q, got {most}")
    if hints.max_seq_len is not None:
        found = int(seq_lens.max(initial=0))
        if found > hints.max_seq_len:
            raise ShapeError(
                f"max_seqlen_k: expected at least {found}, the longest of seq_lens, got {hints.max_seq_len}"
            )


class Backend(Protocol):
    """The kernels of one kind, and the arrays they work on; `kvtoolkit.backends` has the members.

    A device backend runs on the current stream of the device that the arrays are on, and makes that device current for
    the call. What `attend` and `append` return is made ready for the other layers of a step, whose arrays differ only
    in their addresses.
    """

    name: str

    def describe(self, array: Any, name: str, dtype: str | None = None) -> Operand:
        """An array of a caller, called ``name`` in errors; ``dtype`` tells what its 16-bit integers stand for."""

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: int) -> tuple[Any, Operand]:
        """A new array, a torch tensor if ``like`` is one, and its description."""

    def can_overlap(self, device: int) -> bool:
        """Whether kernels can begin while the one before still runs: whether ``overlaps=True`` has any effect."""

    def attend(
        self, call: AttentionCall, hints: Hints = NO_HINTS, *, check: bool = False,
        before: Callable[[], None] | None = None,
    ) -> Any:  # fmt: skip
        """Attend, writing ``out``, ``lse`` and ``block_mass`` of the call.

        Args:
            call: the arrays and numbers; shapes, strides and dtypes are right.
            hints: what the host knows.
            check: check also what a cache of ours guarantees: that its arrays suit the kernels, and its tables, where
                the host can look.
            before: called after all checks and before anything is read or written.

        Returns:
            What `attend_prepared` takes; None where the next layer must call `attend` again.
        """

    def attend_prepared(
        self, prepared: Any, q: int, k_cache: int, v_cache: int, out: int, *, warm: int = 0, cold: int = 0,
        block_mass: int = 0, overlaps: bool = False, from_torch: Any = None,
    ) -> None:  # fmt: skip
        """Attend once more with arrays at other addresses; 0 where the prepared call had none.

        Args:
            overlaps: let the kernel begin while the one before it still runs. Right only where that one wrote nothing
                but the present tokens' keys and values, as `append` does.
            from_torch: as in `Hints`.
        """

    def append(
        self, key: Operand, value: Operand, k_cache: Operand, v_cache: Operand, slot_mapping: Operand, *,
        check: bool = False, from_torch: bool | None = None,
    ) -> Any:  # fmt: skip
        """Copy the keys and values of new tokens to their slots; caches as in `AttentionCall`.

        Returns:
            What `append_prepared` takes; None if there are no tokens.
        """

    def append_prepared(
        self, prepared: Any, key: int, value: int, k_cache: int, v_cache: int, *, overlaps: bool = False
    ) -> None:
        """Append once more with arrays at other addresses."""

    def merge_states(
        self, out: Operand, lse: Operand, out_a: Operand, lse_a: Operand, out_b: Operand, lse_b: Operand, *,
        from_torch: bool | None = None,
    ) -> None:  # fmt: skip
        """Merge two attention results over disjoint keys into contiguous ``out`` and ``lse``."""

    def copy_granules(self, arena: Any, sources: Any, targets: Any) -> None:
        """Copy granules of an arena of a cache to others, in all layers; no granule is in both lists."""

    def convert(
        self, hot: Any, warm: Any, cold: Any, first_granules: tuple[int, int, int], sources: Any, targets: Any
    ) -> None:
        """Write the tokens of tiles to other tiers, in all layers; arenas as the storage of the backend has them."""


def heads_first(cache: Operand, layout: str) -> Operand:
    """A cache as ``[num_blocks, num_kv_heads, block_size, head_dim]``: the same memory, other strides."""
    if layout == "HND":
        return cache
    address, (blocks, slots, heads, dims), (block, slot, head, dim), dtype, owner, writable, device = cache
    return make_operand(
        (address, (blocks, heads, slots, dims), (block, head, slot, dim), dtype, owner, writable, device)
    )


def attention_call(
    q: Operand, k_cache: Operand, v_cache: Operand, block_table: Operand, block_starts: Operand | None,
    seq_lens: Operand, *, out: Operand, lse: Operand | None = None, cu_seqlens_q: Operand | None = None,
    sinks: Operand | None = None, alibi_slopes: Operand | None = None, tiers: QuantizedTiers | None = None,
    block_mass: Operand | None = None, layout: str = "HND", softmax_scale: float | None = None, causal: bool = True,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, num_splits: int = 0,
) -> AttentionCall:  # fmt: skip
    """The record of a call whose arguments are right; options as in `kvtoolkit.paged_attention`.

    Args:
        layout: that of the caches, ``"NHD"`` or ``"HND"``.
    """
    if layout != "HND":
        k_cache, v_cache = heads_first(k_cache, layout), heads_first(v_cache, layout)
    left, right = window_size
    if type(num_splits) is not int:
        num_splits = int(num_splits)
    scale = q[1][2] ** -0.5 if softmax_scale is None else softmax_scale
    return _make(
        (
            q, k_cache, v_cache, block_table, block_starts, seq_lens, cu_seqlens_q, out, lse, sinks, alibi_slopes,
            tiers, block_mass, scale, softcap, left, 0 if causal else right, num_splits,
        )
    )  # fmt: skip


_make: Callable[[tuple[Any, ...]], AttentionCall] = functools.partial(tuple.__new__, AttentionCall)
