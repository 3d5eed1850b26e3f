"""The batches that attention is measured on, laid out in a paged pool that is larger than the second-level cache."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_POOL_NBYTES = 1 << 30  # the sets of a case span at least so much, many times the second-level cache
_MAX_SETS = 64


@dataclass(frozen=True)
class Shape:
    """The sizes of a batch."""

    name: str
    lengths: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    num_queries: int = 1
    """Query tokens of each sequence, where all have the same number."""
    new: tuple[int, ...] = ()
    """Query tokens of each sequence, where they differ or are many."""
    beginnings: tuple[tuple[int, int], ...] = ()
    """``(rows, tokens)`` for each level: each group of ``rows`` consecutive rows shares ``tokens`` tokens, which follow
    those of the level above."""

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Query tokens of each sequence."""
        return self.new or (self.num_queries,) * self.batch

    @property
    def flops(self) -> int:
        """Operations of both products, causal."""
        pairs = sum(n * length - n * (n - 1) // 2 for n, length in zip(self.new_tokens, self.lengths, strict=True))
        return 4 * self.num_q_heads * self.head_dim * pairs

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the 16-bit keys and values, each read once."""
        own = sum(self.lengths) - self.batch * sum(tokens for _, tokens in self.beginnings)
        in_common = sum(-(-self.batch // rows) * tokens for rows, tokens in self.beginnings)
        return (own + in_common) * self.num_kv_heads * self.head_dim * 4

    def places(self, block_size: int) -> list[list[int]]:
        """The blocks of each sequence, numbered from 0 in the order in which they are met."""
        next_place = itertools.count()
        levels: list[dict[int, list[int]]] = [{} for _ in self.beginnings]
        found = []
        for row, length in enumerate(self.lengths):
            of_row: list[int] = []
            for (rows, tokens), groups in zip(self.beginnings, levels, strict=True):
                group = row // rows
                if group not in groups:
                    groups[group] = list(itertools.islice(next_place, tokens // block_size))
                of_row += groups[group]
            own = -(-length // block_size) - len(of_row)
            found.append(of_row + list(itertools.islice(next_place, own)))
        return found


def _even(name: str, batch: int, length: int, **options: Any) -> Shape:
    return Shape(name, (length,) * batch, **options)


def _ragged(batch: int, low: int, high: int) -> tuple[int, ...]:
    """Log-uniform lengths."""
    drawn = np.exp(np.random.default_rng(0).uniform(math.log(low), math.log(high), batch)).round()
    return tuple(int(n) for n in drawn.clip(low, high))


SHAPES = {
    shape.name: shape
    for shape in (
        _even("b64_2k", 64, 2048),
        _even("b16_8k", 16, 8192),
        _even("b128_1k", 128, 1024),
        _even("b256_1k", 256, 1024),
        _even("b8_4k", 8, 4096),
        _even("b1_8k", 1, 8192),
        _even("b1_1k", 1, 1024),
        _even("b1_128k", 1, 131072),
        _even("b32_8k_g8", 32, 8192, num_q_heads=64),
        _even("b16_8k_mha", 16, 8192, num_kv_heads=32),
        Shape("b64_ragged", _ragged(64, 64, 16384)),
        Shape("b256_ragged_h9_3_64", _ragged(256, 32, 4096), 9, 3, 64),
        # no cliffs: groups, head_dims, several queries, skewed batches
        _even("g1", 16, 4096, num_q_heads=8),
        _even("g2", 32, 4096, num_q_heads=16),
        _even("g5", 32, 4096, num_q_heads=40),
        _even("g7", 64, 4096, num_q_heads=28, num_kv_heads=4),
        _even("g16", 64, 4096, num_q_heads=128),
        _even("d64", 64, 4096, head_dim=64),
        _even("d256", 32, 4096, num_q_heads=16, head_dim=256),
        Shape("skew_128k", (131072,) + (4096,) * 31),
        Shape("skew_128", (128,) * 32 + (4096,) * 32),
    )
}
PEER_SHAPES = tuple(SHAPES)[:12]


def _new(name: str, new: tuple[int, ...], cached: tuple[int, ...], **options: Any) -> Shape:
    return Shape(name, tuple(map(sum, zip(new, cached, strict=True))), new=new, **options)


_DRAWN = np.random.default_rng(11)
_RAGGED_NEW = tuple(int(n) for n in np.exp(_DRAWN.uniform(math.log(64), math.log(2048), 16)))
_RAGGED_CACHED = tuple(int(n) if n > 96 else 0 for n in np.exp(_DRAWN.uniform(math.log(32), math.log(16384), 16)))

PREFILL = (
    _new("512_on_0", (512,), (0,)),
    _new("512_on_8k", (512,), (8192,)),
    _new("512_on_32k", (512,), (32768,)),
    _new("2k_on_0", (2048,), (0,)),
    _new("2k_on_8k", (2048,), (8192,)),
    _new("2k_on_32k", (2048,), (32768,)),
    _new("4x2k_on_2k", (2048,) * 4, (2048,) * 4),
    _new("16_ragged", _RAGGED_NEW, _RAGGED_CACHED),
    _new("2k_on_8k_d64", (2048,), (8192,), num_q_heads=9, num_kv_heads=3, head_dim=64),
    _new("2k_on_8k_d96", (2048,), (8192,), num_kv_heads=32, head_dim=96),
    _new("2k_on_8k_d256", (2048,), (8192,), head_dim=256),
)
SHORT = (
    _new("12_on_8k", (12,), (8192,)),
    _new("16_on_32k", (16,), (32768,)),
    _new("64_on_32k", (64,), (32768,)),
    _new("16x16_on_4k", (16,) * 16, (4096,) * 16),
    _new("100_on_16k", (100,), (16384,)),
    _new("g64", (1,) * 32, (4096,) * 32, num_q_heads=64, num_kv_heads=1),
    _new("g128", (1,) * 32, (4096,) * 32, num_q_heads=128, num_kv_heads=1),
)
MIXED = (
    _new("63_decode_1k_on_4k", (1,) * 63 + (1024,), (4095,) * 63 + (4096,)),
    _new("200_decode_4x512", (1,) * 200 + (512,) * 4, (1023,) * 200 + (512,) * 4),
    _new("63_decode_16_on_4k", (1,) * 63 + (16,), (4095,) * 63 + (4096,)),
    _new("63_decode_8_on_4k", (1,) * 63 + (8,), (4095,) * 63 + (4096,)),
    _new("64x8_on_4k", (8,) * 64, (4096,) * 64),
)
VERIFY = (
    _even("q1", 8, 4096),
    _even("q2", 8, 4096, num_queries=2),
    _even("q4", 8, 4096, num_queries=4),
    _even("q8", 8, 4096, num_queries=8),
    _even("b64_q1", 64, 4096),
    _even("b64_q8", 64, 4096, num_queries=8),
)
SHARED = (
    _even("64_on_16k", 64, 16640, beginnings=((64, 16384),)),
    _even("two_levels", 64, 7168, beginnings=((64, 4096), (8, 2048))),
    _even("8x16_samples", 128, 1152, beginnings=((16, 1024),)),
    _even("8_beams", 8, 4160, beginnings=((8, 4096),)),
    _even("64_beams", 64, 2112, beginnings=((64, 2048),)),
    _even("4_with_128", 4, 4224, beginnings=((4, 128),)),
)
CLIFFS = (
    _even("b384_256", 384, 256),
    _even("b256_64", 256, 64),
    _even("b512_300", 512, 300),
    _even("b64_256", 64, 256),
    _even("b1_16k", 1, 16384),
    SHAPES["b1_128k"],
    _even("b1_128k_d64", 1, 131072, head_dim=64),
    _even("b1_8k_h9_3_64", 1, 8192, num_q_heads=9, num_kv_heads=3, head_dim=64),
    _even("b1_8k_h8_1", 1, 8192, num_q_heads=8, num_kv_heads=1),
    _even("b1_8k_h8_1_256", 1, 8192, num_q_heads=8, num_kv_heads=1, head_dim=256),
)
_SWEPT_HEADS = (
    (32, 8, 128), (8, 2, 128), (8, 1, 128), (64, 8, 128), (32, 32, 128), (28, 4, 128), (40, 8, 128), (9, 3, 64),
    (32, 8, 64), (16, 8, 256), (8, 1, 256), (24, 8, 96),
)  # fmt: skip
_MOST_SWEPT_NBYTES = 6 << 30  # of a set's keys and values
SWEEP: tuple[Shape, ...] = tuple(
    shape
    for heads in _SWEPT_HEADS
    for batch in (1, 8, 64, 384)
    for length in (256, 1024, 4096, 16384, 65536)
    for shape in (
        _even(
            f"b{batch}_{length}_{heads[0]}/{heads[1]}x{heads[2]}", batch, length, num_q_heads=heads[0],
            num_kv_heads=heads[1], head_dim=heads[2],
        ),
    )
    if shape.kv_nbytes <= _MOST_SWEPT_NBYTES
)  # fmt: skip
KINDS = {"decode": PEER_SHAPES} | {
    kind: tuple(shape.name for shape in shapes)
    for kind, shapes in (
        ("prefill", PREFILL),
        ("short", SHORT),
        ("mixed", MIXED),
        ("verify", VERIFY),
        ("shared", SHARED),
        ("cliffs", CLIFFS),
        ("sweep", SWEEP),
    )
}
SHAPES |= {shape.name: shape for shape in (*PREFILL, *SHORT, *MIXED, *VERIFY, *SHARED, *CLIFFS, *SWEEP)}


class Case:
    """A shape in a pool of shuffled blocks, several sets of them: no two share a block.

    Attributes:
        storage: keys and values, contiguous in ``layout``.
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]`` bfloat16, a view of them; ``v_cache`` too.
        tables: ``[batch, max_blocks]`` int32 of each set; ``indices`` the same row after row, without what is unused.
        q: ``[num_tokens, num_q_heads, head_dim]``; seq_lens: ``[batch]`` int32.
    """

    def __init__(self, shape: Shape, block_size: int = 16, layout: str = "HND") -> None:
        import torch

        self.shape, self.block_size, self.layout = shape, block_size, layout
        rows = shape.places(block_size)
        self.counts = [len(row) for row in rows]
        per_set = 1 + max(map(max, rows))
        self.num_sets = max(1, min(_MAX_SETS, -(-_POOL_NBYTES // shape.kv_nbytes)))
        torch.manual_seed(1)
        inner = (block_size, shape.num_kv_heads) if layout == "NHD" else (shape.num_kv_heads, block_size)
        size = (per_set * self.num_sets, *inner, shape.head_dim)
        self.storage = tuple(torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self.k_cache, self.v_cache = (one if layout == "NHD" else one.transpose(1, 2) for one in self.storage)
        tokens = sum(shape.new_tokens)
        self.q = torch.randn(tokens, shape.num_q_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
        self.seq_lens = torch.tensor(shape.lengths, dtype=torch.int32, device="cuda")
        self.cu_seqlens_q = torch.tensor(np.cumsum([0, *shape.new_tokens]), dtype=torch.int32, device="cuda")
        sets = torch.randperm(size[0], device="cuda", dtype=torch.int32).split(per_set)
        flat = torch.tensor([place for row in rows for place in row], device="cuda")
        self.indices = [ids[flat] for ids in sets]
        self.tables = [
            torch.nn.utils.rnn.pad_sequence(list(ids.split(self.counts)), batch_first=True) for ids in self.indices
        ]

    def error(self, which: int, out: Any) -> float:
        """Relative L2 error of a set's output, over a few of its sequences, against float64."""
        import torch

        shape = self.shape
        group = shape.num_q_heads // shape.num_kv_heads
        bounds = self.cu_seqlens_q.tolist()
        longest = int(np.argmax(shape.lengths))
        wrong = total = 0.0
        for row in {0, shape.batch // 3, shape.batch - 1, longest}:
            n, queries = shape.lengths[row], shape.new_tokens[row]
            blocks = self.tables[which][row, : self.counts[row]].long()
            asked = torch.arange(0, queries, -(-queries // 64), device="cuda")  # some of a prompt's
            found = out[bounds[row] + asked].double()
            q = self.q[bounds[row] + asked].double()
            hidden = torch.arange(n, device="cuda") > n - queries + asked[:, None]
            for head in range(shape.num_kv_heads):
                keys, values = (
                    cache[blocks, :, head].reshape(-1, shape.head_dim)[:n].double()
                    for cache in (self.k_cache, self.v_cache)
                )
                heads = slice(head * group, (head + 1) * group)
                scores = torch.einsum("qhd,nd->hqn", q[:, heads], keys) * shape.head_dim**-0.5
                weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
                good = torch.einsum("hqn,nd->qhd", weights, values)
                wrong += float((found[:, heads] - good).square().sum())
                total += float(good.square().sum())
        return math.sqrt(wrong / total)


class Contender(NamedTuple):
    """One way to compute a case: a call for each set, which returns its output."""

    name: str
    calls: list[Any]
