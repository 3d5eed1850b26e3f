"""Blocks in host memory that a step reads, copied to the device one layer ahead of the kernels that read them.

The keys and values of all layers have the same granule numbers. So one table serves all layers, in which blocks in
host memory are replaced by places of the stage; for every layer the same places are filled with its own keys and
values. Layers take turns with the memory behind these places: while one is read, the next one is filled.

    a copy waits for the attention that read the same memory before it, and for what the stream was given by then
    attention waits for the copy of its layer
    what is not full, and so may be written in the step, is read in place
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.storage.storage import RING, DeviceStorage, HostStorage, Stage, Storage
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.config.tiers import HOST_POOL_OF
from kvtoolkit.cuda.copy import make_listed_transfer, set_arrays
from kvtoolkit.cuda.launching import Launch
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT, entry_granule, entry_length, entry_tier, pack_entry
from kvtoolkit.runtime.streams import current_stream, on_stream

_CTAS = 4
"""Enough to fill the link from blocks of 16 KiB on; see ``docs/results/gpu_transfers.md``."""


class Staging:
    """Chooses what a step copies to the stage; one for each cache.

    Args:
        storage: of the cache, with a stage.
        first, end: first superblock in host memory, and one past the last.
    """

    def __init__(self, storage: DeviceStorage, first: int, end: int) -> None:
        assert storage.stage is not None
        self.storage, self.stage, self._first = storage, storage.stage, first
        self._places = np.empty(end - first, np.int32)
        self._stream: Any = None

    @property
    def words(self) -> int:
        """int32 numbers of a list of pairs."""
        return 2 + 2 * self.stage.num

    def choose(
        self, block_table: Int32Array, block_starts: Int32Array, seq_lens: Int32Array, counts: Int32Array
    ) -> tuple[Int32Array, Int32Array]:
        """The table of a step with places of the stage in it, and the list of what must be copied there.

        Args:
            block_table, block_starts, seq_lens: of a `kvtoolkit.Step`; ``counts``: new tokens of each row.

        Returns:
            ``(table, pairs)``: as ``block_table``; and ``[words]`` how many pairs there are, 0, then the pairs: the
            superblock to read, and the one to write.
        """
        table, pairs = block_table.copy(), np.zeros(self.words, np.int32)
        self._places[:] = _UNSEEN
        pairs[0] = _choose(table, block_starts, seq_lens, counts, self._first, self.stage, self._places, pairs[2:])
        return table, pairs

    def copies(self, pairs: Any) -> "StagedCopies":
        """The copies of one run over the layers, by a list on the device."""
        import cupy

        if self._stream is None:
            with cupy.cuda.Device(self.storage.device):
                self._stream = cupy.cuda.Stream(non_blocking=True)
        return StagedCopies(self.storage, self._stream, pairs)


def make_staging(storage: Storage, config: CacheConfig) -> Staging | None:
    """The staging of a cache; None: it has none, and what is in host memory is read in place."""
    if isinstance(storage, HostStorage) or storage.stage is None:
        return None
    first = config.pool_firsts[HOST_POOL_OF[TIER_HOT]]
    return Staging(storage, first // MAX_BLOCK_GRANULES, (first + config.host_granules[0]) // MAX_BLOCK_GRANULES)


_UNSEEN, _IN_PLACE = -1, -2
"""Places of a superblock that no entry has named yet, and of one that is not copied."""


@jit
def _choose(
    table: Int32Array, starts: Int32Array, seq_lens: Int32Array, counts: Int32Array, first: int, stage: Stage,
    places: NDArray[np.int32], pairs: Int32Array,
) -> Any:  # fmt: skip
    """Fill in places and pairs, and put the places into the table; returns how many pairs there are."""
    count = 0
    for fills in (False, True):  # a superblock may be in several rows, of which one may write to it
        for b in range(len(seq_lens)):
            for e in range(table.shape[1]):
                if table[b, e] < 0:
                    break
                i = (entry_granule(table[b, e]) >> 3) - first
                if i < 0 or i >= len(places):
                    continue
                if not fills:
                    if 8 * (starts[b, e] + entry_length(table[b, e])) > seq_lens[b] - counts[b]:
                        places[i] = _IN_PLACE
                elif places[i] == _UNSEEN and count < stage.num:
                    places[i] = stage.first + count
                    pairs[2 * count], pairs[2 * count + 1] = first + i, places[i]
                    count += 1
    for b in range(len(seq_lens)):
        for e in range(table.shape[1]):
            if table[b, e] < 0:
                break
            granule = entry_granule(table[b, e])
            i = (granule >> 3) - first
            if 0 <= i < len(places) and places[i] >= 0:
                length, tier = entry_length(table[b, e]), entry_tier(table[b, e])
                table[b, e] = pack_entry(8 * places[i] + (granule & 7), length, tier)
    return count


class StagedCopies:
    """The copies of one run over the layers of a model. They may be captured in a CUDA graph with it.

    Args:
        storage: of the cache.
        stream: where the copies run.
        pairs: the list of `Staging.choose` on the device.
    """

    def __init__(self, storage: DeviceStorage, stream: Any, pairs: Any) -> None:
        import cupy

        assert storage.superblocks is not None
        self._device, self._stream, self._pairs = storage.device, stream, pairs
        self._addresses = [one.address for one in storage.keys]
        self._held = [-1] * RING  # the layer that each stage has
        with cupy.cuda.Device(self._device):
            held = storage.superblocks._replace(address=self._addresses[0], num_arrays=2)
            self._launch: Launch = make_listed_transfer(held, pairs.data.ptr, ctas=_CTAS, device=self._device)
            self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(RING)]
            self._given = cupy.cuda.Event(disable_timing=True)

    def before(self, layer: int) -> None:
        """Called before the attention of a layer: the current stream waits for its copies."""
        import cupy

        with on_stream(current_stream(self._device)):
            current = cupy.cuda.get_current_stream()
            for ahead in range(RING):
                self._copy(layer + ahead, current)
            current.wait_event(self._copied[layer % RING])

    def after(self, layer: int) -> None:
        """Called after the attention of a layer: its stage can be filled for another layer."""
        import cupy

        with on_stream(current_stream(self._device)):
            self._copy(layer + RING, cupy.cuda.get_current_stream())

    def _copy(self, layer: int, current: Any) -> None:
        """Begin to copy for a layer, if there is such a layer and its stage does not have it yet."""
        if layer >= len(self._addresses) or self._held[layer % RING] == layer:
            return
        self._given.record(current)
        self._stream.wait_event(self._given)
        set_arrays(self._launch, self._addresses[layer])
        self._launch.run(self._stream.ptr)
        self._copied[layer % RING].record(self._stream)
        self._held[layer % RING] = layer
