"""The memory of a cache as arrays, for an engine's own kernels."""

from typing import Any

from kvtoolkit.cache.state.cache_state import CacheState
from kvtoolkit.cache.storage.arenas import Arenas
from kvtoolkit.formats.tier_caches import TierCaches


class Views:
    """The arrays of a `kvtoolkit.KVCache`. Blocks in host memory are the last ones of an array, see `Hints.offload`."""

    _state: CacheState
    _arenas: Arenas

    def key_cache(self, layer: int) -> Any:
        """``[num_granules, num_kv_heads, 8, head_dim]`` hot keys of a layer; uint16 for bfloat16. A view, not a copy.

        It is a NumPy array, or on a GPU a CuPy array, of which ``torch.from_dlpack`` makes a tensor.
        """
        layer = self._arenas.require_layer(layer)
        return self._state.key_values_of(layer)[0]

    def value_cache(self, layer: int) -> Any:
        """The hot values of a layer, in the form of `key_cache`."""
        layer = self._arenas.require_layer(layer)
        return self._state.key_values_of(layer)[1]

    def tier_caches(self, layer: int) -> TierCaches:
        """The arrays of a layer, all tiers, in the form that `kvtoolkit.tiered_attention` takes. Views, not copies."""
        layer = self._arenas.require_layer(layer)
        storage, index = self._state.storage_of(layer)
        warm, cold = (None if one is None else one[index] for one in (storage.warm, storage.cold))
        return TierCaches(storage.key_values[index][0], storage.key_values[index][1], warm, cold, storage.first)
