"""The decode shapes that quantized tiers are measured on: random codes in pools that are larger than the cache."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.bench.attention_cases import SHAPES, SHARED, Shape
from kvtoolkit.formats.entry import TIER_COLD, TIER_HOT, TIER_WARM
from kvtoolkit.formats.quantized import BLOCK, FORMATS, INT4, INT8

_POOL_NBYTES = 1 << 30  # the sets of a case span at least so much, many times the second-level cache
_MAX_SETS = 64
_FORMATS = {TIER_WARM: INT8, TIER_COLD: INT4}

TIER_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("b64_512", (512,) * 64),
        Shape("b64_2k", (2048,) * 64),
        Shape("b64_8k", (8192,) * 64),
        Shape("b32_32k", (32768,) * 32),
        Shape("b32_8k", (8192,) * 32),
        Shape("b8_4k", (4096,) * 8),
        Shape("b1_32k", (32768,)),
        Shape("b1_128k", (131072,)),
        SHAPES["b64_ragged"],
        Shape("d64_64_4k", (4096,) * 64, head_dim=64),
        Shape("b64_8k_one_16", (8192,) * 64, new=(1,) * 63 + (16,)),
        Shape("b64_8k_one_512", (8192,) * 64, new=(1,) * 63 + (512,)),
        *(Shape(f"b64_8k_verify_{n}", (8192,) * 64, num_queries=n) for n in (2, 3, 4, 8)),
        Shape("2k_on_8k", (10240,), new=(2048,)),
        Shape("d64_2k_on_8k", (10240,), head_dim=64, new=(2048,)),
        *SHARED,
    )
}


@dataclass(frozen=True)
class Mix:
    """How many tokens of a sequence each tier holds, newest tokens first. None means all the rest."""

    name: str
    hot: int | None = 0
    warm: int | None = 0

    def tiers_of(self, length: int) -> NDArray[np.int32]:
        """The tier of each tile of a sequence."""
        tiles = -(-length // BLOCK)
        age = length - np.minimum(length, BLOCK * np.arange(1, tiles + 1))  # of a tile's last token
        hot = math.inf if self.hot is None else self.hot
        warm = math.inf if self.warm is None else hot + self.warm
        found: NDArray[np.int32] = np.where(age < hot, TIER_HOT, np.where(age < warm, TIER_WARM, TIER_COLD))
        return found.astype(np.int32)


MIXES = {
    mix.name: mix
    for mix in (
        Mix("16 bit", None),
        Mix("int8", 0, None),
        Mix("int4", 0, 0),
        Mix("256 / 2048 / rest", 256, 2048),
        Mix("256 / 1024 / rest", 256, 1024),
    )
}


class TierCase:
    """A shape spread over tiers, in pools of shuffled blocks of 64 tokens, several sets of them.

    Attributes:
        k_cache: ``[num_granules, num_kv_heads, 8, head_dim]``, as has ``v_cache``.
        quantized: ``[num_blocks, num_kv_heads, nbytes]`` uint8 of the warm and the cold tier, None where there is none.
        tables: ``[batch, max_entries]`` int32 entries of each set; starts: ``[batch, max_entries]`` int32.
        nbytes: of keys, values, scales and zeros that a set reads.
    """

    def __init__(self, shape: Shape, mix: Mix, dtype: str = "bfloat16") -> None:
        import torch

        self.shape, self.mix, self.dtype = shape, mix, dtype
        tiers = [mix.tiers_of(length) for length in shape.lengths]
        places = [np.array(row) for row in shape.places(BLOCK)]
        tier_of, rank = np.empty((2, 1 + max(int(row.max()) for row in places)), np.int32)
        for at, one in zip(places, tiers, strict=True):
            tier_of[at] = one  # sequences of one length have what they share in the same tiers
        counts = {}
        for tier in (TIER_HOT, TIER_WARM, TIER_COLD):
            held = tier_of == tier
            counts[tier] = int(held.sum())
            rank[held] = np.arange(counts[tier])
        sizes = {TIER_HOT: BLOCK * shape.head_dim * 4} | {t: f.nbytes(shape.head_dim) for t, f in _FORMATS.items()}
        self.nbytes = shape.num_kv_heads * sum(counts[tier] * sizes[tier] for tier in counts)
        self.num_sets = max(1, min(_MAX_SETS, -(-_POOL_NBYTES // self.nbytes)))
        torch.manual_seed(1)
        kind = getattr(torch, dtype)
        granules = (max(8, 8 * counts[TIER_HOT] * self.num_sets), shape.num_kv_heads, 8, shape.head_dim)
        self.k_cache, self.v_cache = (torch.randn(granules, dtype=kind, device="cuda") for _ in range(2))
        self.quantized: list[Any] = [
            _random_blocks(name, counts[tier] * self.num_sets, shape) if counts[tier] else None
            for tier, name in ((TIER_WARM, "int8"), (TIER_COLD, "int4"))
        ]
        bounds = np.cumsum((0, *shape.new_tokens), dtype=np.int32)
        self.cu_seqlens_q = torch.from_numpy(bounds).cuda()
        self.q = torch.randn(int(bounds[-1]), shape.num_q_heads, shape.head_dim, dtype=kind, device="cuda")
        self.seq_lens = torch.tensor(shape.lengths, dtype=torch.int32, device="cuda")
        width = max(len(one) for one in tiers)
        starts = np.full((shape.batch, width), -1, np.int32)
        for row, one in enumerate(tiers):
            starts[row, : len(one)] = 8 * np.arange(len(one))
        self.starts = torch.from_numpy(starts).cuda()
        rng = np.random.default_rng(1)
        order = {tier: rng.permutation(count * self.num_sets) for tier, count in counts.items()}
        self.entries = []
        for which in range(self.num_sets):
            table = np.full((shape.batch, width), -1, np.int32)
            for row, (at, one) in enumerate(zip(places, tiers, strict=True)):
                for tier in np.unique(one):
                    tiles = np.flatnonzero(one == tier)
                    blocks = order[tier][which * counts[tier] + rank[at[tiles]]]
                    table[row, tiles] = (8 * blocks) | (7 << 24) | (int(tier) << 27)
            self.entries.append(table)
        self.tables = [torch.from_numpy(table).cuda() for table in self.entries]

    def error(self, which: int, out: Any) -> float:
        """Relative L2 error of a set's output, over a few of its sequences, against float64 on the same codes."""
        import torch

        shape, batch = self.shape, self.shape.batch
        group = shape.num_q_heads // shape.num_kv_heads
        wrong = total = 0.0
        bounds = self.cu_seqlens_q.tolist()
        for row in sorted({0, batch - 1, batch // 3, int(np.argmax(shape.lengths))}):
            n, queries = shape.lengths[row], shape.new_tokens[row]
            asked = torch.arange(0, queries, -(-queries // 64), device="cuda")  # some of a prompt's
            found = out[bounds[row] + asked].double()
            q = self.q[bounds[row] + asked].double()
            hidden = torch.arange(n, device="cuda") > n - queries + asked[:, None]
            for head in range(shape.num_kv_heads):
                keys, values = self._decoded(which, row, head)
                heads = slice(head * group, (head + 1) * group)
                scores = torch.einsum("qhd,nd->hqn", q[:, heads], keys[:n]) * shape.head_dim**-0.5
                weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
                good = torch.einsum("hqn,nd->qhd", weights, values[:n])
                wrong += float((found[:, heads] - good).square().sum())
                total += float(good.square().sum())
        return math.sqrt(wrong / total)

    def _decoded(self, which: int, row: int, head: int) -> tuple[Any, Any]:
        """Keys and values of one head of a sequence, ``[tiles * 64, head_dim]`` float64."""
        import torch

        head_dim = self.shape.head_dim
        entries = self.entries[which][row]
        entries = entries[entries >= 0]
        keys, values = (torch.empty(len(entries), BLOCK, head_dim, dtype=torch.float64) for _ in range(2))
        for tier in (TIER_HOT, TIER_WARM, TIER_COLD):
            places = np.flatnonzero(entries >> 27 == tier)
            if not len(places):
                continue
            blocks = torch.from_numpy((entries[places] & 0xFFFFFF) >> 3).long().cuda()
            if tier == TIER_HOT:
                for to, cache in ((keys, self.k_cache), (values, self.v_cache)):
                    tiles = cache.view(-1, 8, *cache.shape[1:])[blocks][:, :, head]
                    to[places] = tiles.reshape(len(places), BLOCK, head_dim).double().cpu()
                continue
            held = self.quantized[tier - 1][blocks, head].cpu().numpy()
            for to, one in zip((keys, values), _FORMATS[tier].decode(held, head_dim), strict=True):
                to[places] = torch.from_numpy(one).double()
        return keys.reshape(-1, head_dim).cuda(), values.reshape(-1, head_dim).cuda()


def _random_blocks(name: str, count: int, shape: Shape) -> Any:
    """Random codes whose scales and zeros make values of about unit size."""
    import torch

    head_dim = shape.head_dim
    nbytes = FORMATS[name].nbytes(head_dim)
    blocks = torch.randint(0, 256, (count, shape.num_kv_heads, nbytes), dtype=torch.uint8, device="cuda")
    halves = blocks.view(torch.float16)

    def fill(first: int, size: int, low: float, high: float) -> None:
        part = torch.empty(count, shape.num_kv_heads, size, dtype=torch.float16, device="cuda")
        halves[..., first // 2 : first // 2 + size] = part.uniform_(low, high)

    if name == "int8":
        codes = 32 * head_dim
        for unit in range(2):
            at = unit * 2 * (codes + 64)
            fill(at + codes, 32, 0.01, 0.02)
            fill(at + 2 * codes + 64, 32, 0.04, 0.08)  # times 4
        return blocks
    codes = 32 * head_dim
    factors = torch.tensor([4.0, 4.0, 0.25, 0.25], dtype=torch.float16, device="cuda").repeat(head_dim // 4)
    fill(codes, head_dim, 0.15, 0.3)
    halves[..., codes // 2 : codes // 2 + head_dim] *= factors
    fill(codes + 2 * head_dim, head_dim, -0.3, 0.3)
    tail = 2 * codes + 4 * head_dim
    fill(tail, BLOCK, 0.15, 0.3)
    halves[..., tail // 2 : tail // 2 + BLOCK] *= factors[[0, 2]].repeat(BLOCK // 2)
    fill(tail + 2 * BLOCK, BLOCK, 7.0, 8.0)
    halves[..., tail // 2 + BLOCK :] *= torch.tensor([1.0, 16.0], dtype=torch.float16, device="cuda").repeat(BLOCK // 2)
    return blocks
