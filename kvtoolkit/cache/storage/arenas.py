"""The arenas of a cache as the kernels take them: the keys and values of every layer, described once."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvtoolkit.arrays.host import Operand, address_of
from kvtoolkit.arrays.types import ITEMSIZES, as_int
from kvtoolkit.attention.arguments import check_apart
from kvtoolkit.backends import BACKENDS
from kvtoolkit.cache.storage.storage import Storage
from kvtoolkit.errors import ArgumentError, UnsupportedError


class Arenas:
    """The keys and values of every layer as the kernels want them.

    Args:
        storage: where they are.
        dtype: ``float32``, ``float16`` or ``bfloat16``, the latter stored as uint16.
        backend: name of the cache's backend.
        layers: numbers of the layers in the model, by which all is asked for; default: they are those of ``storage``.
        num_layers: of the model.
    """

    def __init__(
        self, storage: Storage, dtype: str, backend: str, layers: Sequence[int] | None = None, num_layers: int = 0
    ) -> None:
        self.canary: Any = None
        """See `kvtoolkit.cache.layers.canary`; whoever makes the arenas of a cache sets it."""
        self._key_values = storage.key_values
        self._tensor: Any = None
        self.keys: Any = storage.keys
        self.values: Any = storage.values
        self.num_layers = num_layers or len(storage.keys)
        quantized = storage.quantized
        self.tiers = [None] * len(self.keys) if quantized is None else quantized
        """The quantized tiers of each layer; None: there are none."""
        self.tier_addresses = [{} if one is None else one.addresses() for one in self.tiers]
        """What `Backend.attend_prepared` takes of them."""
        self.backend = BACKENDS[backend]
        self.dtype, self.device = dtype, storage.device
        *_, self.num_kv_heads, _, self.head_dim = storage.key_values.shape
        self._is_empty = not self.keys
        held = [one for one in (storage.key_values, storage.warm, storage.cold) if one is not None]
        begins = [address_of(one) if isinstance(one, np.ndarray) else one.data.ptr for one in held]
        self.ranges = [(begin, begin + _extent(one)) for begin, one in zip(begins, held, strict=True)]
        """Addresses of the hot tier, first to one past the last, then of the quantized ones."""
        # an element on the host; the kernels of a device load rows 16 bytes at a time
        self.alignment = ITEMSIZES[dtype] if storage.device < 0 else 16
        self.raw_dtype = "bfloat16" if dtype == "bfloat16" else None
        """What 16-bit integers of callers stand for; see `Backend.describe`."""
        if layers is not None and not self._is_empty:
            for name in ("keys", "values", "tiers", "tier_addresses"):
                setattr(self, name, dict(zip(layers, getattr(self, name), strict=True)))

    def tensor(self) -> Any:
        """The hot tier of all layers as a torch tensor, which compiled graphs name as what they write to."""
        if self._tensor is None:
            torch, array = sys.modules["torch"], self._key_values
            if self.raw_dtype is not None:
                array = array.view(np.int16)
            with torch.inference_mode(False):  # graphs outside of that mode write to it, too
                made = torch.from_numpy(array) if self.device < 0 else torch.from_dlpack(array)
                self._tensor = made if self.raw_dtype is None else made.view(torch.bfloat16)
        return self._tensor

    def check_backend(self, backend: str | None) -> None:
        """UnsupportedError unless it is None or the cache's own."""
        if backend not in (None, self.backend.name):
            expected = self.backend.name
            raise UnsupportedError(f"backend: expected None or {expected!r}, that of the cache, got {backend!r}")

    def has_layer(self, layer: int) -> bool:
        """Whether a layer of the model is one of these."""
        return layer in self.keys if isinstance(self.keys, dict) else layer < len(self.keys)

    def require_layer(self, layer: int) -> int:
        """The layer as an int; ArgumentError unless there is such a layer, UnsupportedError without storage."""
        if self._is_empty:
            raise UnsupportedError(
                "expected a cache with storage, got one made with storage=False, which holds no keys"
            )
        index = layer if type(layer) is int else as_int(layer)
        if index is None or not 0 <= index < self.num_layers:
            raise ArgumentError(f"layer: expected 0 to {self.num_layers - 1}, got {layer!r}")
        return index

    def check_apart(self, layer: int, written: Operand, q: Operand) -> None:
        """UnsupportedError if the output of attention shares memory with what it reads; it may be ``q`` itself."""
        tiers = self.tiers[layer]
        read: list[tuple[str, Operand | None]] = [
            ("q", q), ("k_cache", self.keys[layer]), ("v_cache", self.values[layer])
        ]  # fmt: skip
        if tiers is not None:
            read += [("warm", tiers.warm), ("cold", tiers.cold)]
        check_apart((("out", written),), read, in_place=("out", "q"))

    def contains(self, address: int) -> bool:
        """Whether an address is in the memory of the cache."""
        return any(begin <= address < end for begin, end in self.ranges)

    def are_aligned(self, one: Operand, other: Operand) -> bool:
        """Whether both begin where the kernels can load them, which strides in elements do not tell."""
        return not (one.address | other.address) & (self.alignment - 1)


def _extent(array: Any) -> int:
    """Bytes from the first to the last of an array, with those between its parts."""
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True) if size)
    return int(last + array.itemsize) if array.size else 0
