"""Move tiles of 64 tokens between the tiers of a cache in host memory, all layers and heads, through float32."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.formats.entry import GRANULE, MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT, TIER_WARM
from kvtoolkit.formats.quantized import BLOCK, INT4, INT8

Floats = NDArray[np.float32]

_FORMATS = {TIER_WARM: INT8, TIER_COLD: INT4}


def convert(
    hot: Any, warm: Any, cold: Any, first: tuple[int, int, int], sources: Int32Array, targets: Int32Array
) -> None:
    """Write the tokens of each source tile to its target.

    Args:
        hot: ``[num_layers, 2, num_granules, num_kv_heads, 8, head_dim]``, bfloat16 as uint16.
        warm: ``[num_layers, num_blocks, num_kv_heads, nbytes]`` or None; ``cold`` too.
        first: first granule number of each tier.
        sources: ``[n, 8]`` granule numbers: any of the hot tier, or those of a block of a quantized one.
        targets: ``[n, 8]`` granule numbers; -1, in the hot tier: not wanted. None of them is a source.
    """
    tiers = hot, warm, cold
    from_tiers, to_tiers = _tiers_of(sources, first), _tiers_of(targets, first)
    for source in np.unique(from_tiers):
        for target in np.unique(to_tiers[from_tiers == source]):
            some = (from_tiers == source) & (to_tiers == target)
            keys, values = _read(tiers, source, sources[some] - first[source])
            _write(tiers, target, np.where(targets[some] < 0, -1, targets[some] - first[target]), keys, values)


def _tiers_of(tiles: Int32Array, first: tuple[int, int, int]) -> NDArray[np.int64]:
    tiers: NDArray[np.int64] = np.searchsorted(np.array(first[1:]), tiles.max(axis=1), side="right")
    return tiers


def _read(tiers: tuple[Any, Any, Any], tier: int, tiles: Int32Array) -> tuple[Floats, Floats]:
    """Keys and values ``[num_layers, n, num_kv_heads, 64, head_dim]``."""
    hot = tiers[TIER_HOT]
    if tier != TIER_HOT:
        return _FORMATS[tier].decode(tiers[tier][:, tiles[:, 0] // MAX_BLOCK_GRANULES], hot.shape[-1])
    held = hot[:, :, tiles].transpose(0, 1, 2, 4, 3, 5, 6)
    held = as_floats(held.reshape(*held.shape[:4], BLOCK, held.shape[-1]))
    return held[:, 0], held[:, 1]


def _write(tiers: tuple[Any, Any, Any], tier: int, tiles: Int32Array, keys: Floats, values: Floats) -> None:
    hot = tiers[TIER_HOT]
    if tier != TIER_HOT:
        tiers[tier][:, tiles[:, 0] // MAX_BLOCK_GRANULES] = _FORMATS[tier].encode(keys, values)
        return
    wanted = tiles >= 0
    for which, tokens in enumerate((keys, values)):
        split = tokens.reshape(*tokens.shape[:3], MAX_BLOCK_GRANULES, GRANULE, tokens.shape[-1])
        hot[:, which, tiles[wanted]] = from_floats(split.transpose(0, 1, 3, 2, 4, 5)[:, wanted], hot.dtype)


def as_floats(array: NDArray[Any]) -> Floats:
    """float32 of an array; of uint16, which are the bits of bfloat16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def from_floats(array: Floats, dtype: Any) -> NDArray[Any]:
    """The inverse of `as_floats`; bfloat16 is rounded to the nearest, ties to even."""
    if dtype == np.uint16:
        bits = np.ascontiguousarray(array).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return array.astype(dtype)


def all_finite(array: NDArray[Any]) -> bool:
    """Whether there are neither infinities nor NaN; uint16 are the bits of bfloat16."""
    if array.dtype == np.uint16:
        return bool(((array & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(array).all())
