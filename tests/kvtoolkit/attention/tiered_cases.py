"""Problems for `tiered_attention`: the tokens of `attention_cases`, tile by tile in random tiers, the rest poisoned."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtoolkit import reference
from kvtoolkit.arrays.call import QuantizedTiers
from kvtoolkit.attention.calls import tiered_attention
from kvtoolkit.cpu import attend, operand
from kvtoolkit.formats.entry import GRANULE, MAX_BLOCK_GRANULES, TIER_COLD, TIER_HOT, TIER_WARM, pack_entry
from kvtoolkit.formats.quantized import FORMATS
from kvtoolkit.formats.tier_caches import TierCaches
from tests.kvtoolkit.attention.attention_cases import Case, make_call, nan_filled

TILE = GRANULE * MAX_BLOCK_GRANULES
LETTERS = {"h": TIER_HOT, "w": TIER_WARM, "c": TIER_COLD}
FORMAT_NAMES = {TIER_WARM: "int8", TIER_COLD: "int4"}

TieredArrays = tuple[TierCaches, np.ndarray, np.ndarray]


@dataclass
class TieredCase(Case):
    """A `Case` whose tiles are in tiers: ``patterns`` has a letter of h, w and c for each tile of a row, None = random.

    `tiered` lays the tokens out as NumPy arrays; `run` and `expected` take what it returns.
    """

    head_dim: int = 64
    patterns: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patterns is None:
            self.patterns = ["".join(self.rng.choice([*"hwc"], -(-n // TILE))) for n in self.seq_lens]
        assert [len(pattern) for pattern in self.patterns] == [-(-n // TILE) for n in self.seq_lens]

    def tiered(self) -> TieredArrays:
        """``tier_caches, block_table, block_starts``: entries in random places of their tiers.

        Unused hot slots are NaN; unused blocks hold NaN scales, one of them random bytes. What a block holds behind the
        end of its row is as random as its tokens: blocks are written whole.
        """
        assert self.patterns is not None
        entries: list[list[tuple[int, int, int]]] = []  # of each row: tier, first logical granule, length
        for n, pattern in zip(self.seq_lens, self.patterns, strict=True):
            entries.append(self._entries(n, pattern))
        flat = [(row, i) for row, found in enumerate(entries) for i in range(len(found))]
        flat = [flat[k] for k in self.rng.permutation(len(flat))]
        table = np.full((len(entries), max([*map(len, entries), 1]) + 1), -1, np.int32)
        starts = np.full(table.shape, -1, np.int32)

        sizes = [sum(entries[row][i][2] for row, i in flat if entries[row][i][0] == tier) for tier in range(3)]
        blocks = {tier: sizes[tier] // MAX_BLOCK_GRANULES + 2 for tier in (TIER_WARM, TIER_COLD)}
        # the hot tier in the middle, and none of them at 0
        first_warm, first_hot = MAX_BLOCK_GRANULES, MAX_BLOCK_GRANULES * (2 + blocks[TIER_WARM])
        first_cold = first_hot + -(-(sizes[TIER_HOT] + 3) // MAX_BLOCK_GRANULES) * MAX_BLOCK_GRANULES
        first_granules = (first_hot, first_warm, first_cold)

        shape = (sizes[TIER_HOT] + 3, self.num_kv_heads, GRANULE, self.head_dim)
        k_cache, v_cache = nan_filled(shape, self.dtype), nan_filled(shape, self.dtype)
        quantized = {}
        for tier, count in blocks.items():
            nbytes = FORMATS[FORMAT_NAMES[tier]].nbytes(self.head_dim)
            quantized[tier] = np.full((count, self.num_kv_heads, nbytes), 0xFF, np.uint8)
            quantized[tier][-1] = self.rng.integers(0, 256, quantized[tier][-1].shape)
        free = [2, MAX_BLOCK_GRANULES, MAX_BLOCK_GRANULES]  # the next granule of each tier
        for row, i in flat:
            tier, start, length = entries[row][i]
            granule, free[tier] = free[tier], free[tier] + length
            table[row, i] = pack_entry(first_granules[tier] + granule, length, tier)
            starts[row, i] = start
            if tier == TIER_HOT:
                for p in range(start * GRANULE, min((start + length) * GRANULE, self.seq_lens[row])):
                    place = granule + p // GRANULE - start
                    k_cache[place, :, p % GRANULE] = self.keys[row][p]
                    v_cache[place, :, p % GRANULE] = self.values[row][p]
            else:
                keys, values = (self._tile(tokens[row], start * GRANULE) for tokens in (self.keys, self.values))
                encoded = FORMATS[FORMAT_NAMES[tier]].encode(keys, values)
                quantized[tier][granule // MAX_BLOCK_GRANULES] = encoded
        caches = TierCaches(k_cache, v_cache, quantized[TIER_WARM], quantized[TIER_COLD], first_granules)
        return caches, table, starts

    def _entries(self, n: int, pattern: str) -> list[tuple[int, int, int]]:
        entries = []
        end = -(-n // GRANULE)
        for tile, letter in enumerate(pattern):
            covered = entries[-1][1] + entries[-1][2] if entries else 0
            if letter != "h":
                entries.append((LETTERS[letter], covered, MAX_BLOCK_GRANULES))
                continue
            # an entry may reach into the next tile if that one is hot too, and behind the end of the row
            run = len(pattern) - len(pattern[tile:].lstrip("h"))
            limit = run * MAX_BLOCK_GRANULES if run < len(pattern) else end + MAX_BLOCK_GRANULES
            while covered < min((tile + 1) * MAX_BLOCK_GRANULES, end):
                length = min(int(self.rng.integers(1, MAX_BLOCK_GRANULES + 1)), limit - covered)
                entries.append((TIER_HOT, covered, length))
                covered += length
        return entries

    def _tile(self, tokens: np.ndarray, first: int) -> np.ndarray:
        """``[num_kv_heads, 64, head_dim]`` float32."""
        held = reference.to_float64(tokens[first : first + TILE], self.dtype).astype(np.float32)
        rest = self.rng.standard_normal((TILE - len(held), self.num_kv_heads, self.head_dim)).astype(np.float32)
        return np.concatenate([held, rest]).swapaxes(0, 1)

    def run(self, arrays: Any, layout: str = "HND", **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """``out, lse`` of the CPU kernels, written over NaN."""
        caches, table, starts = arrays
        out = nan_filled(self.q.shape, self.dtype)
        options.setdefault("cu_seqlens_q", self.cu_seqlens_q)
        if self.dtype == "bfloat16":  # raw words: only the low-level call takes them
            lse = np.full(self.q.shape[:2], np.nan, np.float32)
            call = make_call(
                self.q, caches.k_cache, caches.v_cache, table, starts, self.lengths, out=out, lse=lse, dtype="bfloat16",
                tiers=described(caches), **options,
            )  # fmt: skip
            attend(call, check=True)
            return out, lse
        result = tiered_attention(self.q, caches, table, starts, self.lengths, out=out, return_lse=True, **options)
        assert result[0] is out
        return result  # type: ignore[no-any-return]

    def expected(self, arrays: Any, layout: str = "HND", **options: Any) -> tuple[np.ndarray, ...]:
        """``out, lse`` of the reference."""
        options.setdefault("cu_seqlens_q", self.cu_seqlens_q)
        return reference.tiered_attention(self.q, *arrays, self.lengths, dtype=self.dtype, **options)

    def no_masses(self, arrays: TieredArrays) -> np.ndarray:
        """A ``block_mass`` full of NaN."""
        return np.full((len(self.seq_lens), arrays[1].shape[1], self.num_kv_heads), np.nan, np.float32)

    def check_masses(self, arrays: TieredArrays, found: np.ndarray, **options: Any) -> None:
        """The masses agree with the reference, and are 0 behind the rows' ends."""
        options.setdefault("cu_seqlens_q", self.cu_seqlens_q)
        good = reference.tile_masses(self.q, *arrays, self.lengths, dtype=self.dtype, **options)
        np.testing.assert_allclose(found[:, : good.shape[1]], good, rtol=1e-3, atol=1e-6)
        assert (found[:, good.shape[1] :] == 0).all()
        for row, n in enumerate(self.seq_lens):
            assert (found[row, -(-n // TILE) :] == 0).all()


def described(caches: TierCaches) -> QuantizedTiers:
    """The quantized tiers as the kernels take them."""
    warm, cold = (None if b is None else operand(b, "blocks") for b in (caches.warm, caches.cold))
    return QuantizedTiers(warm, cold, caches.first_granules)
