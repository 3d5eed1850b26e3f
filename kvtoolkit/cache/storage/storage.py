"""The keys and values of a cache, in host memory or on a CUDA device: one array per tier for all layers."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtoolkit.arrays.call import QuantizedTiers
from kvtoolkit.arrays.host import Operand, operand
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.backends import BACKENDS
from kvtoolkit.cache.storage.device_transfers import DeviceTransfers
from kvtoolkit.cache.storage.transfers import HostTransfers
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cpu.convert import all_finite
from kvtoolkit.cuda import check
from kvtoolkit.cuda.copy import Superblocks, make_listed_conversion, make_listed_copy
from kvtoolkit.cuda.launching import Launch
from kvtoolkit.cuda.reorder import make_reorder_copy
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.formats.entry import GRANULE, MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT, TIER_WARM
from kvtoolkit.runtime.mapped_memory import MappedMemory

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""NumPy dtypes of the arrays; bfloat16 is stored as its bits."""


class Contents(NamedTuple):
    """The contents of granules in host memory, in the order in which the granules were listed."""

    key_values: NDArray[Any]
    """``[num_layers, 2, n, num_kv_heads, 8, head_dim]`` contents of the hot granules."""
    warm: NDArray[np.uint8]
    """``[num_layers, n, num_kv_heads, nbytes]`` contents of the blocks that have the warm granules."""
    cold: NDArray[np.uint8]
    """The same for the cold granules."""


class HostStorage:
    """Keys and values in host memory.

    Attributes:
        key_values: ``[num_layers, 2, num_granules, num_kv_heads, 8, head_dim]``; keys, then values of each layer.
        warm, cold: ``[num_layers, num_blocks, num_kv_heads, nbytes]`` uint8; None: no such tier.
        keys, values: an `Operand` for each layer.
        quantized: the `QuantizedTiers` of each layer; None: no quantized tiers.
        records: keys of one layer more, for `kvtoolkit.cache.layers.canary`; None: there is no such layer.
        transfers: copies superblocks between places.
        device: CUDA ordinal; -1 = host.
    """

    device = -1

    def __init__(self, config: CacheConfig, *, is_empty: bool = False) -> None:
        """``is_empty``: the arrays have no layers, and so take no memory; all else works as with them."""
        self._backend = BACKENDS["cpu" if is_empty else config.backend]
        num_layers = 0 if is_empty else config.num_layers
        shapes = [shape_of(config), *block_shapes(config)]
        if is_empty:
            shapes = [None if shape is None else (0, *shape[1:]) for shape in shapes]
        hot, *quantized = shapes
        assert hot is not None
        # zeros, not empty: the system hands out zeroed pages only when they are touched
        self.key_values: NDArray[Any] = np.zeros(hot, DTYPES[config.dtype])
        keys = [operand(layer[0], "k_cache", config.dtype) for layer in self.key_values]
        self.keys, self.records = keys[:num_layers], keys[-1] if check.CANARY and keys else None
        self.values = [operand(layer[1], "v_cache", config.dtype) for layer in self.key_values[:num_layers]]
        self.first = config.first_granules
        self.warm, self.cold = (None if shape is None else np.zeros(shape, np.uint8) for shape in quantized)
        self.transfers = HostTransfers(self.key_values, self.cold, self.first)
        self.quantized: list[QuantizedTiers] | None = None
        if config.quantization is not None:
            self.quantized = [
                QuantizedTiers(
                    None if self.warm is None else operand(self.warm[layer], "warm"),
                    None if self.cold is None else operand(self.cold[layer], "cold"),
                    self.first,
                )
                for layer in range(num_layers)
            ]

    def copy_granules(self, sources: ArrayLike, targets: ArrayLike) -> None:
        """Copy granules to others, all layers; none is in both lists."""
        if not self.keys:
            return
        self._backend.copy_granules(self.key_values, sources, targets)

    def convert_tiles(self, sources: Int32Array, targets: Int32Array) -> None:
        """Write the tokens of tiles to other tiers; see `kvtoolkit.arrays.call.Backend.convert`."""
        if not self.keys:
            return
        self._backend.convert(self.key_values, self.warm, self.cold, self.first, sources, targets)
        if self.records is not None:
            _forget_records(self.key_values, targets)

    def all_finite(self, granules: Int32Array) -> bool:
        """Whether these 16-bit granules hold neither infinities nor NaN, in all layers."""
        return all_finite(self.key_values[: len(self.keys), :, granules])

    def read(self, granules: ArrayLike) -> Contents:
        """A copy of the contents of granules; for quantized ones, of their whole blocks."""
        hot, warm, cold = split_by_tier(granules, self.first)
        return Contents(self.key_values[:, :, hot], _take(self.warm, warm), _take(self.cold, cold))

    def write(self, granules: ArrayLike, contents: Contents) -> None:
        """Fill granules with what `read` has returned for as many granules of each tier, in the same order."""
        hot, warm, cold = split_by_tier(granules, self.first)
        self.key_values[:, :, hot] = contents.key_values
        for blocks, held, which in ((self.warm, contents.warm, warm), (self.cold, contents.cold, cold)):
            if blocks is not None:
                blocks[:, which] = held

    def sync(self) -> None:
        """Wait until all work is done."""


class DeviceStorage:
    """The counterpart of `HostStorage` on a device; its arrays are CuPy arrays.

    `copy_granules` is asynchronous on the current stream, which is torch's if torch uses the GPU and CuPy's otherwise.
    `read` and `write` wait. Use one stream, or order several yourself.
    """

    def __init__(self, config: CacheConfig) -> None:
        from kvtoolkit.runtime.kernels import current_device

        self._backend = BACKENDS[config.backend]

        try:
            self.device = current_device() if config.device is None else config.device
            import cupy

            count = cupy.cuda.runtime.getDeviceCount()
        except Exception as error:  # no CuPy, no driver, no device
            raise UnsupportedError(
                f"backend: {config.backend!r} needs CuPy and a CUDA device; `kvtoolkit doctor` says what is missing, "
                f"backend='cpu' works everywhere ({error})"
            ) from error
        if self.device >= count:
            raise UnsupportedError(f"device: expected 0 to {count - 1}, got {self.device}")
        shape = shape_of(config)
        tiers: dict[int, tuple[Superblocks, int, int, int]] = {}
        self.stage: Stage | None = None
        self.superblocks: Superblocks | None = None
        """Those of the hot tier, keys and values of all layers, if some are in host memory."""
        with cupy.cuda.Device(self.device):
            if config.host_granules[0]:
                staged = config.staged_granules
                self.key_values, held, first = _mapped(
                    cupy, shape, 2, config.tier_granules[0], DTYPES[config.dtype], staged
                )
                counts = config.tier_granules[0] // MAX_BLOCK_GRANULES, config.host_granules[0] // MAX_BLOCK_GRANULES
                tiers[TIER_HOT] = held._replace(nbytes=held.nbytes * MAX_BLOCK_GRANULES), 0, *counts
                self.superblocks = tiers[TIER_HOT][0]
                if staged:
                    self.stage = Stage(first // MAX_BLOCK_GRANULES, staged // MAX_BLOCK_GRANULES)
            else:
                self.key_values = cupy.zeros(shape, DTYPES[config.dtype])
            cupy.cuda.runtime.deviceSynchronize()  # because other streams may use it from now on
        stage = self.stage
        num_granules = shape[2] if stage is None else MAX_BLOCK_GRANULES * (stage.first + stage.num)
        strides = tuple(stride // self.key_values.itemsize for stride in self.key_values.strides)
        base, half = self.key_values.data.ptr, self.key_values.strides[1]

        def described(layer: int, which: int) -> Operand:
            address = base + (2 * layer + which) * half
            return Operand(
                address, (num_granules, *shape[3:]), strides[2:], config.dtype, self.key_values, True, self.device
            )

        self.records = described(config.num_layers, 0) if check.CANARY else None
        self.keys = [described(layer, 0) for layer in range(config.num_layers)]
        self.values = [described(layer, 1) for layer in range(config.num_layers)]
        arrays = (2 * shape[0], *shape[2:])
        self._arena = Operand(base, arrays, strides[1:], config.dtype, self.key_values, True, self.device)
        self._make_quantized(config, tiers)
        self.transfers = DeviceTransfers(self.device, tiers) if tiers else None
        """Copies superblocks between places; None: all of them are on the device."""

    def _make_quantized(self, config: CacheConfig, tiers: dict[int, tuple[Superblocks, int, int, int]]) -> None:
        import cupy

        self.first = config.first_granules
        with cupy.cuda.Device(self.device):
            made: list[Any] = [None, None]
            for i, shape in enumerate(block_shapes(config)):
                if shape is not None and i == 1 and config.host_granules[1]:
                    blocks = config.tier_granules[2] // MAX_BLOCK_GRANULES
                    made[i], held, _ = _mapped(cupy, shape, 1, blocks, np.uint8)
                    first, in_host = self.first[TIER_COLD], config.host_granules[1]
                    tiers[TIER_COLD] = held, first // MAX_BLOCK_GRANULES, blocks, in_host // MAX_BLOCK_GRANULES
                elif shape is not None:
                    made[i] = cupy.zeros(shape, np.uint8)
            cupy.cuda.runtime.deviceSynchronize()
        self.warm, self.cold = made
        self._blocks = [None if one is None else self._described(one) for one in made]
        self.quantized: list[QuantizedTiers] | None = None
        if config.quantization is not None:
            layers = range(config.num_layers)
            warm, cold = ([None if one is None else self._described(one[layer]) for layer in layers] for one in made)
            self.quantized = [QuantizedTiers(warm[layer], cold[layer], self.first) for layer in layers]

    def _described(self, array: Any) -> Operand:
        return Operand(array.data.ptr, array.shape, array.strides, "uint8", array, True, self.device)

    def copy_granules(self, sources: ArrayLike, targets: ArrayLike) -> None:
        """See `HostStorage.copy_granules`."""
        self._backend.copy_granules(self._arena, sources, targets)

    def convert_tiles(self, sources: Int32Array, targets: Int32Array) -> None:
        """See `HostStorage.convert_tiles`; asynchronous. Tokens that hold an infinity or NaN become NaN."""
        warm, cold = self._blocks
        self._backend.convert(self._arena, warm, cold, self.first, sources, targets)
        if self.records is not None:
            with self._on_current_stream():
                _forget_records(self.key_values, targets)

    def listed_moves(self, num_moves: int, demotions: int, merges: int) -> list[Launch]:
        """Launches that make the moves listed by ``cuda_src/cache/migrate.cu`` at these addresses.

        Demotions are converted, merges are copied; an address of 0 means that there are none.
        """
        warm, cold = self._blocks
        made = []
        if demotions:
            made.append(make_listed_conversion(self._arena, warm, cold, self.first, num_moves, demotions))
        if merges:
            made.append(make_listed_copy(self._arena, num_moves + 4, merges))
        return made

    def reorder_copy(self, *places: int) -> Launch:
        """The launch that copies what reordered rows have got; see `kvtoolkit.cuda.reorder.make_reorder_copy`."""
        return make_reorder_copy(self._arena, *places)

    def all_finite(self, granules: Int32Array) -> bool:
        """Always True: to know, the host would have to wait. The conversion deals with such tokens instead."""
        return True

    def read(self, granules: ArrayLike) -> Contents:
        """See `HostStorage.read`."""
        with self._on_current_stream() as cupy:
            hot, warm, cold = (cupy.asarray(one) for one in split_by_tier(granules, self.first))
            held: NDArray[Any] = self.key_values[:, :, hot].get()
            return Contents(held, _take(self.warm, warm), _take(self.cold, cold))

    def write(self, granules: ArrayLike, contents: Contents) -> None:
        """See `HostStorage.write`."""
        with self._on_current_stream() as cupy:
            hot, warm, cold = (cupy.asarray(one) for one in split_by_tier(granules, self.first))
            self.key_values[:, :, hot] = cupy.asarray(contents.key_values)
            for blocks, held, which in ((self.warm, contents.warm, warm), (self.cold, contents.cold, cold)):
                if blocks is not None:
                    blocks[:, which] = cupy.asarray(held)
            cupy.cuda.get_current_stream().synchronize()

    def sync(self) -> None:
        """See `HostStorage.sync`."""
        with self._on_current_stream() as cupy:
            cupy.cuda.get_current_stream().synchronize()

    def _on_current_stream(self) -> Any:
        from kvtoolkit.runtime.streams import cupy_on_current_stream

        return cupy_on_current_stream(self.device)


Storage = HostStorage | DeviceStorage


def make_storage(config: CacheConfig, *, is_empty: bool = False) -> Storage:
    """The storage that a config asks for; UnsupportedError where its backend cannot work.

    ``is_empty``: one that holds nothing, in host memory whatever the backend.
    """
    return HostStorage(config, is_empty=is_empty) if is_empty or config.backend == "cpu" else DeviceStorage(config)


class Stage(NamedTuple):
    """Room on the device for what the next layers read of host memory: superblocks that layers take turns to use."""

    first: int
    """Its first superblock, in the array of any layer."""
    num: int


RING = 2
"""Layers that have a stage of their own at a time: one that is read, and one that is filled."""


def _mapped(
    cupy: Any, shape: tuple[int, ...], axis: int, on_device: int, dtype: Any, staged: int = 0
) -> tuple[Any, Superblocks, int]:
    """An array whose elements along an axis are on the device up to ``on_device``, and in host memory from there on.

    Args:
        staged: elements that follow in every array, at places that it shares with every fourth one.

    Returns:
        The array; its elements along that axis, each as large as it is in the array; the first of those that follow.
    """
    count, nbytes = math.prod(shape[:axis]), math.prod(shape[axis + 1 :]) * np.dtype(dtype).itemsize
    unit = MAX_BLOCK_GRANULES * nbytes
    memory = MappedMemory(
        cupy.cuda.runtime.getDevice(), count, on_device * nbytes, (shape[axis] - on_device) * nbytes,
        staged * nbytes + unit if staged else 0, 2 * RING,
    )  # fmt: skip
    owned = cupy.cuda.UnownedMemory(memory.address, memory.nbytes, memory)
    inner = cupy.ndarray(shape[axis:], dtype, cupy.cuda.MemoryPointer(owned, 0)).strides
    outer = [memory.stride * math.prod(shape[i + 1 : axis]) for i in range(axis)]
    array = cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(owned, 0), strides=(*outer, *inner))
    first_staged = -(-memory.shared_at // unit) * MAX_BLOCK_GRANULES
    return array, Superblocks(memory.address, count, memory.stride, nbytes), first_staged


def shape_of(config: CacheConfig) -> tuple[int, ...]:
    """The shape of ``key_values``."""
    num_granules = config.tier_granules[0] + config.host_granules[0]
    return (_num_layers(config), 2, num_granules, config.num_kv_heads, GRANULE, config.head_dim)


def _num_layers(config: CacheConfig) -> int:
    """Layers in the arrays: those of the model, and one for records if there are some."""
    return config.num_layers + check.CANARY


def _forget_records(key_values: Any, targets: Int32Array) -> None:
    """Make records unknown where tiles became hot again: their keys are not what they were."""
    granules = np.asarray(targets, np.int64).ravel()
    hot = granules[(granules >= 0) & (granules < key_values.shape[2])]
    if len(hot):
        key_values[-1, 0].view(np.uint8)[hot] = 0xFF


def block_shapes(config: CacheConfig) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The shapes of the warm and the cold array; None: no such tier."""
    _, warm_granules, cold_granules = config.tier_granules
    formats = (None, None) if config.quantization is None else config.quantization.formats
    warm, cold = (
        None
        if one is None
        else (_num_layers(config), count // MAX_BLOCK_GRANULES, config.num_kv_heads, one.nbytes(config.head_dim))
        for one, count in zip(formats, (warm_granules, cold_granules + config.host_granules[1]), strict=True)
    )
    return warm, cold


def split_by_tier(granules: ArrayLike, first: tuple[int, int, int]) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The hot granules of a list, and the blocks of its warm and cold ones, each once and in the list's order."""
    listed = np.asarray(granules, np.int64)
    tiers = np.searchsorted(np.array(first[1:]), listed, side="right")
    warm, cold = (_blocks_of(listed[tiers == tier] - first[tier]) for tier in (TIER_WARM, TIER_COLD))
    return listed[tiers == TIER_HOT], warm, cold


def _blocks_of(granules: Int64Array) -> Int64Array:
    blocks = granules // MAX_BLOCK_GRANULES
    once: Int64Array = blocks[np.diff(blocks, prepend=-1) != 0]  # the granules of a block are neighbours in the list
    return once


def _take(blocks: Any, which: Any) -> NDArray[np.uint8]:
    """A copy of blocks in host memory; empty if there is no array."""
    if blocks is None:
        return np.empty(0, np.uint8)
    held = blocks[:, which]
    taken: NDArray[np.uint8] = held if isinstance(held, np.ndarray) else held.get()
    return taken
