"""The tiers of a cache as attention reads them: where each one's keys and values are, and which granules are its own.

Granule numbers run through the tiers of a cache: those of tier ``t`` begin at ``first_granules[t]``. In the hot tier a
granule is 8 slots of the arrays; in a quantized tier 8 aligned granules are a block of 64 tokens, positions 64 n to
64 n + 63 of a sequence, and one entry. So every tile of a sequence is in one tier.
"""

from typing import Any, NamedTuple


class TierCaches(NamedTuple):
    """The tiers of one layer, for `kvtoolkit.tiered_attention`; `KVCache.tier_caches` has those of a cache.

    In a block table of your own the 64 tokens of block ``b`` of the warm tier are the entry
    ``kvtoolkit.formats.entry.pack_entry(first_granules[1] + 8 * b, 8, TIER_WARM)``; the same holds for the cold tier.

    Attributes:
        k_cache: hot: ``[num_granules, num_kv_heads, 8, head_dim]`` float16 or bfloat16, on the CPU also float32.
        v_cache: shaped and typed as ``k_cache``.
        warm: ``[num_blocks, num_kv_heads, nbytes]`` uint8, contiguous: blocks of `kvtoolkit.formats.quantized.INT8`.
        cold: as ``warm``, but blocks of `kvtoolkit.formats.quantized.INT4`.
        first_granules: first granule number of the hot, warm and cold tier, multiples of 8: they must not overlap, so a
    quantized tier begins where the granules of the one before it end, or later.
    """

    k_cache: Any
    v_cache: Any
    warm: Any = None
    cold: Any = None
    first_granules: tuple[int, int, int] = (0, 0, 0)
