"""What the layers of a step do with the cache: check what the caller brings, then run the kernels.

The cache's arrays and the step's tables are valid by construction, so they are described once per step and never
checked; the step's tables on the host are read-only to callers.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit import cpu
from kvtoolkit.arrays.extents import extent
from kvtoolkit.arrays.host import Operand, address_of, empty, mark_written, operand
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
from kvtoolkit.cache.storage.storage import Storage
from kvtoolkit.errors import ArgumentError, ShapeError, StepError, UnsupportedError

if TYPE_CHECKING:
    from kvtoolkit.cache.layers.device_masses import DeviceMassSum


class Arenas:
    """The keys and values of every layer as the kernels want them.

    Args:
        storage: where they lie.
        dtype: ``float32``, ``float16`` or ``bfloat16``, the latter stored as uint16.
        backend: of the cache.
    """

    def __init__(self, storage: Storage, dtype: str, backend: str) -> None:
        self.keys, self.values = storage.keys, storage.values
        # of each layer: what `attend` takes of the quantized tiers, and what `attend_alike` does
        none: list[dict[str, Any]] = [{}] * len(self.keys)
        quantized = storage.quantized
        self.tiers = none if quantized is None else [{"tiers": one} for one in quantized]
        self.tier_addresses = none if quantized is None else [one.addresses() for one in quantized]
        self.dtype, self.backend, self.device = dtype, backend, storage.device
        _, self.num_kv_heads, _, self.head_dim = self.keys[0].shape
        held = [one for one in (storage.key_values, storage.warm, storage.cold) if one is not None]
        begins = [address_of(one) if isinstance(one, np.ndarray) else one.data.ptr for one in held]
        self.ranges = [(begin, begin + one.nbytes) for begin, one in zip(begins, held, strict=True)]
        """Addresses of the hot tier, first to one past the last, then of the quantized ones."""
        # of addresses: an element on the host; the kernels of a device load rows by 16 bytes
        self.alignment = ITEMSIZES[dtype] if storage.device < 0 else 16
        self._raw = "bfloat16" if dtype == "bfloat16" else None
        self._describe = operand
        if storage.device >= 0:
            from kvtoolkit.attention.device import device_operand

            self._describe = device_operand

    def describe(self, array: Any, name: str) -> Operand:
        """An array of the caller; in a bfloat16 cache 16-bit integers are the bits of bfloat16."""
        return self._describe(array, name, self._raw)

    def check_backend(self, backend: str | None) -> None:
        """UnsupportedError unless it is None or the cache's own."""
        if backend not in (None, self.backend):
            raise UnsupportedError(f"backend: expected None or {self.backend!r}, that of the cache, got {backend!r}")

    def require_layer(self, layer: int) -> None:
        """ArgumentError unless there is such a layer."""
        if not isinstance(layer, (int, np.integer)) or not 0 <= layer < len(self.keys):
            raise ArgumentError(f"layer: expected 0 to {len(self.keys) - 1}, got {layer!r}")

    def check_apart(self, layer: int, written: Operand, q: Operand) -> None:
        """UnsupportedError if the output of attention shares memory with what it reads; it may be ``q`` itself."""
        tiers = self.tiers[layer].get("tiers")
        read: dict[str, Operand | None] = {
            "q": q,
            "k_cache": self.keys[layer],
            "v_cache": self.values[layer],
        }
        if tiers is not None:
            read |= {"warm": tiers.warm, "cold": tiers.cold}
        check_apart(written, "out", read, in_place="q")

    def hold(self, address: int) -> bool:
        """Whether an address is in the memory of the cache."""
        return any(begin <= address < end for begin, end in self.ranges)

    def are_aligned(self, one: Operand, other: Operand) -> bool:
        """Whether both begin where the kernels can load them; strides in elements do not tell."""
        return not (one.address | other.address) & (self.alignment - 1)


class MassSum:
    """The attention masses of a step's tiles, summed up over the layers that have attended.

    Args:
        batch: rows.
        num_tiles: of the longest of them.
        num_kv_heads: of the cache.
    """

    def __init__(self, batch: int, num_tiles: int, num_kv_heads: int) -> None:
        self._last = np.zeros((batch, num_tiles, num_kv_heads), np.float32)
        self._sum = np.zeros((batch, num_tiles))
        self._count = 0
        self.operand = operand(self._last, "block_mass")
        """Where the next layer writes its masses; `add` has them counted."""

    def add(self) -> None:
        """Count what a layer has written."""
        self._sum += self._last.mean(axis=2)
        self._count += 1

    @property
    def mean(self) -> NDArray[np.float64] | None:
        """``[batch, num_tiles]`` mean over layers and kv heads; None if no layer has attended."""
        return self._sum / self._count if self._count else None


class StepAccess:
    """The arrays of one step, described once, and what its layers have in common with the first of them.

    A layer whose arrays have the shape, strides and dtype of the layer before needs no check, and no new plan.

    Attributes:
        layers: bit ``i`` is set once layer ``i`` has been appended to.
    """

    __slots__ = (
        "_appended", "_arenas", "_attended", "_cu_seqlens_q", "_mass", "_num_tokens", "_slots", "_tables", "layers",
    )  # fmt: skip

    def __init__(
        self, arenas: Arenas, block_table: Any, block_starts: Any, seq_lens: Any, cu_seqlens_q: Any, slot_mapping: Any,
        *, mass: "MassSum | DeviceMassSum | None" = None,
    ) -> None:  # fmt: skip
        self._arenas = arenas
        describe = arenas._describe
        self._tables = (
            describe(block_table, "block_table"),
            describe(block_starts, "block_starts"),
            describe(seq_lens, "seq_lens"),
        )
        self._cu_seqlens_q = None if cu_seqlens_q is None else describe(cu_seqlens_q, "cu_seqlens_q")
        self._slots = describe(slot_mapping, "slot_mapping")
        self._num_tokens = len(slot_mapping)
        self._appended: tuple[Any, Any] | None = None
        self._attended: tuple[Any, Any] | None = None
        self._mass = mass
        self.layers = 0

    # the kernels; `kvtoolkit.cache.layers.device_layers` has those of a device
    _append = staticmethod(cpu.append)
    _append_alike = staticmethod(cpu.append_alike)
    _attend = staticmethod(cpu.attend)
    _attend_alike = staticmethod(cpu.attend_alike)

    def append(self, layer: int, key: Any, value: Any) -> None:
        """Check a layer's new keys and values, and store them."""
        arenas = self._arenas
        arenas.require_layer(layer)
        keys, values = arenas.describe(key, "key"), arenas.describe(value, "value")
        form = (keys[1:4], values[1:4], keys.device, values.device)
        begin, end = arenas.ranges[0]
        apart = not (begin <= keys.address < end or begin <= values.address < end)
        if self._appended is not None and self._appended[0] == form and apart and arenas.are_aligned(keys, values):
            self._append_alike(
                self._appended[1],
                keys.address,
                values.address,
                arenas.keys[layer].address,
                arenas.values[layer].address,
            )
            self.layers |= 1 << int(layer)  # NumPy shifts within 64 bits
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
                check_apart(new, name, {"k_cache": arenas.keys[layer], "v_cache": arenas.values[layer]})
        prepared = self._append(keys, values, arenas.keys[layer], arenas.values[layer], self._slots)
        if prepared is not None:
            self._appended = form, prepared
        self.layers |= 1 << int(layer)  # NumPy shifts within 64 bits

    def repeat(self, layer: int, key: int, value: int, q: int, out: int) -> bool:
        """Append and attend as the layer before did, with arrays of the same shapes, strides and dtypes elsewhere.

        Args:
            layer: the layer.
            key, value, q, out: addresses of the arrays.

        Returns:
            False, with nothing done, if there was no such layer before, or an address is not of a whole element.
        """
        arenas = self._arenas
        if self._appended is None or self._attended is None or (key | value | q | out) & (arenas.alignment - 1):
            return False
        arenas.require_layer(layer)
        keys, values = arenas.keys[layer].address, arenas.values[layer].address
        self._append_alike(self._appended[1], key, value, keys, values)
        self.layers |= 1 << int(layer)  # NumPy shifts within 64 bits
        self._attend_again(layer, q, keys, values, out)
        return True

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
        arenas.require_layer(layer)
        if self.layers and not self.layers >> int(layer) & 1 and self._num_tokens:
            raise StepError(
                f"layer: expected one that this step has appended to, got {layer}; append its keys and values"
            )
        queries = arenas.describe(q, "q")
        is_own = out is None
        if is_own:
            out, target = self._empty(q, queries, queries.shape, arenas.dtype)
        else:
            target = arenas.describe(out, "out")
        options = (softmax_scale, causal, window_size, softcap, num_splits, backend)
        form = (queries[1:4], target[1:4], target.writable, queries.device, target.device, options)
        is_plain = sinks is None and alibi_slopes is None and return_lse is False
        if (
            is_plain
            and self._attended is not None
            and self._is_as_before(form)
            and arenas.are_aligned(queries, target)
            and (is_own or self._is_apart(queries, target))
        ):
            self._attend_again(
                layer, queries.address, arenas.keys[layer].address, arenas.values[layer].address, target.address
            )
            if not is_own:
                mark_written(out)
            return out
        arenas.check_backend(backend)
        check_flags(causal, return_lse)
        window = check_options(softmax_scale, window_size, softcap, num_splits)
        self._check_queries(queries)
        num_q_heads = queries.shape[1]
        check_output(target, "out", queries.shape, arenas.dtype)
        if not is_own:
            arenas.check_apart(layer, target, queries)
        if sinks is not None:
            sinks = arenas._describe(sinks, "sinks")
            check_per_head(sinks, "sinks", num_q_heads, infinite=True)
        if alibi_slopes is not None:
            alibi_slopes = arenas._describe(alibi_slopes, "alibi_slopes")
            check_per_head(alibi_slopes, "alibi_slopes", num_q_heads, infinite=False)
        lse, lse_target = self._empty(q, queries, queries.shape[:2], "float32") if return_lse else (None, None)
        extra = arenas.tiers[layer] if self._mass is None else {**arenas.tiers[layer], "block_mass": self._mass.operand}
        prepared = self._attend(
            queries, arenas.keys[layer], arenas.values[layer], *self._tables,
            out=target, lse=lse_target,
            cu_seqlens_q=self._cu_seqlens_q, softmax_scale=softmax_scale, causal=causal, window_size=window,
            softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, num_splits=num_splits,
            **extra,
        )  # fmt: skip
        if self._mass is not None:
            self._mass.add()
        if is_plain and prepared is not None:
            self._attended = form, prepared
        if not is_own:
            mark_written(out)
        return (out, lse) if return_lse else out

    def _is_as_before(self, form: Any) -> bool:
        """Whether arrays and options are those of the layer before."""
        assert self._attended is not None
        try:
            return bool(self._attended[0] == form)
        except ValueError:  # an option is an array; it will be refused
            return False

    def _is_apart(self, q: Operand, out: Operand) -> bool:
        """Whether an output of the caller certainly shares no memory with what attention reads, or is ``q`` itself."""
        distance = out.address - q.address
        first, second = (q, out) if distance > 0 else (out, q)
        _, low, _, _ = extent(second.shape, second.strides)
        _, _, end, _ = extent(first.shape, first.strides)
        size = ITEMSIZES[q.dtype]
        apart = abs(distance) + size * low >= size * end or (distance == 0 and q.strides == out.strides)
        return apart and not self._arenas.hold(out.address)

    def _attend_again(self, layer: int, q: int, keys: int, values: int, out: int) -> None:
        assert self._attended is not None
        addresses = self._arenas.tier_addresses[layer]
        if self._mass is None:
            self._attend_alike(self._attended[1], q, keys, values, out, **addresses)
        else:
            block_mass = self._mass.operand.address
            self._attend_alike(self._attended[1], q, keys, values, out, block_mass=block_mass, **addresses)
            self._mass.add()

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

    @staticmethod
    def _empty(like: Any, described: Operand, shape: tuple[int, ...], dtype: str) -> tuple[Any, Operand]:
        """A new array or tensor, whichever ``like`` is, and its description."""
        return empty(shape, dtype, like)
