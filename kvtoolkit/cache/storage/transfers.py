"""Copies of superblocks between places that run beside the caller's kernels, and when they are done."""

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.formats.entry import MAX_BLOCK_GRANULES, TIER_HOT


class Transfer(Protocol):
    """Copies under way."""

    def is_done(self) -> bool:
        """Whether all have been made; does not wait."""
        ...

    def join(self) -> None:
        """Let everything that the current stream is given from now on wait for them. The host does not wait."""
        ...


class Transfers(Protocol):
    """What a storage copies superblocks with."""

    def start(self, tier: int, sources: Int32Array, targets: Int32Array, *, beside: bool = True) -> Transfer:
        """Copy superblocks of a tier, all layers.

        Args:
            tier: hot or cold.
            sources, targets: numbers of superblocks: granule numbers / 8. None is in both.
            beside: whether the copies run on a stream of their own. They wait for what the current stream has been
                given so far: for kernels that write the sources, and for those that read what the targets held before.
        """
        ...

    def join(self) -> None:
        """Let everything that the current stream is given from now on wait for all copies. The host does not wait."""
        ...


class _Done:
    """Copies that were made before the call returned."""

    def is_done(self) -> bool:
        return True

    def join(self) -> None:
        pass


class HostTransfers:
    """Copies in the memory of a `HostStorage`.

    Args:
        key_values: ``[num_layers, 2, num_granules, num_kv_heads, 8, head_dim]`` the hot tier.
        cold: ``[num_layers, num_blocks, num_kv_heads, nbytes]``, or None.
        first: the first granule of the hot, the warm and the cold tier.
    """

    def __init__(
        self, key_values: NDArray[Any], cold: NDArray[np.uint8] | None, first: tuple[int, int, int]
    ) -> None:  # fmt: skip
        layers, two, granules, *inner = key_values.shape
        size = MAX_BLOCK_GRANULES * math.prod(inner)
        self._hot = key_values.reshape(layers, two, granules // MAX_BLOCK_GRANULES, size)  # there may be no layer
        self._cold = None if cold is None else cold.reshape(*cold.shape[:2], math.prod(cold.shape[2:]))
        self._first = first

    def arrays(self, tier: int) -> list[NDArray[Any]]:
        """The memory of a tier, ``[..., num_superblocks, n]`` each."""
        found = self._hot if tier == TIER_HOT else self._cold
        return [] if found is None else [found]

    def first(self, tier: int) -> int:
        """The superblock with which that memory begins."""
        return self._first[tier] // MAX_BLOCK_GRANULES

    def start(self, tier: int, sources: Int32Array, targets: Int32Array, *, beside: bool = True) -> Transfer:
        """See `Transfers`."""
        first = self.first(tier)
        for array in self.arrays(tier):
            array[..., targets - first, :] = array[..., sources - first, :]
        return _Done()

    def join(self) -> None:
        """See `Transfers`."""
