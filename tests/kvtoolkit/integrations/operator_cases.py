"""A small decoder in the manner of Llama, which attends by the step that it is given, and caches to run it on."""

from typing import Any

import torch
from torch import nn

from kvtoolkit import CacheConfig, KVCache

LAYERS, Q_HEADS, KV_HEADS, DIM = 3, 4, 2, 64
WIDTH = Q_HEADS * DIM


class Layer(nn.Module):
    """Attention and a gated MLP, each after a norm."""

    def __init__(self, index: int, window: int) -> None:
        super().__init__()
        self.index, self.window = index, (window - 1, 0) if window else (-1, -1)
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, (Q_HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: Any) -> torch.Tensor:
        """``x`` is ``[num_tokens, WIDTH]``; ``cos`` and ``sin`` are ``[num_tokens, 1, DIM / 2]``."""
        q, k, v = self.qkv(self.norms[0](x)).view(len(x), -1, DIM).split([Q_HEADS, KV_HEADS, KV_HEADS], 1)
        step.append(self.index, _rotate(k, cos, sin), v)
        seen = step.attend(self.index, _rotate(q, cos, sin), window_size=self.window)
        x = x + self.out(seen.reshape(len(x), WIDTH))
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder(nn.Module):
    """Gives logits for new tokens at their positions.

    Args:
        window: tokens that every second layer sees; 0: all.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, WIDTH)
        self.layers = nn.ModuleList([Layer(i, 0 if i % 2 else window) for i in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 100, bias=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, step: Any) -> torch.Tensor:
        """``tokens`` and ``positions`` are ``[num_tokens]`` int64."""
        angles = positions[:, None, None] * 10000 ** -torch.linspace(0, 1, DIM // 2, device=tokens.device)
        x = self.embed(tokens)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, step)
        return self.head(x)


def make_decoder(device: str, window: int = 0) -> Decoder:
    """The decoder with drawn weights: float32 on the CPU, bfloat16 on a GPU."""
    torch.manual_seed(0)
    model = Decoder(window).eval().requires_grad_(False)
    return model if device == "cpu" else model.to("cuda", torch.bfloat16)


def make_cache(device: str, **options: Any) -> KVCache:
    """A cache for the decoder."""
    size = {} if "layer_groups" in options else {"num_tokens": 4096}
    shape = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "max_seq_len": 512}
    where = {"dtype": "float32"} if device == "cpu" else {"dtype": "bfloat16", "backend": "cuda"}
    return KVCache(CacheConfig(**shape, **size, **where, **options))


class Session:
    """Sequences of a cache that a model, compiled or not, goes on with."""

    def __init__(self, cache: KVCache, model: Any, device: str, batch: int) -> None:
        self.cache, self.model, self.device = cache, model, device
        self.ids, _ = cache.open([[]] * batch)

    def step(self, counts: list[int], seed: int) -> torch.Tensor:
        """Logits of so many new tokens of each sequence."""
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(100, (sum(counts),), generator=draw)
        with self.cache.begin_step(self.ids, counts) as step:
            assert step.ok.all()
            ends = torch.from_numpy(step.seq_lens.copy())
            positions = torch.cat([torch.arange(end - n, end) for end, n in zip(ends.tolist(), counts, strict=True)])
            made = self.model(tokens.to(self.device), positions.to(self.device), step)
            self.cache.end_step(step)
        return made

    def held(self) -> list[Any]:
        """Keys and values of all tokens, for each group of layers."""
        return [group.storage.key_values.copy() for group in self.cache._state.groups]
