"""An inference engine in 150 lines: continuous batching, chunked prefill, prefix reuse, preemption.

What it leaves to kvtoolkit is everything about memory. What it decides is who runs: requests are admitted in order
while there is room, every step feeds each running request its next tokens (a part of its prompt, or the token it just
got), and when the pool is full the request that came last gives its memory up and is computed again later.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from examples.llama import PackedLlama
from kvtoolkit import CacheConfig, CacheFullError, CacheStats, KVCache


@dataclass
class Request:
    """One prompt and what has become of it."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    output: list[int] = field(default_factory=list)
    seq_id: int | None = None
    """Its sequence in the cache; None before it is admitted."""
    preempted: bool = False
    num_held: int = 0
    """Tokens the cache holds of it."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


@dataclass
class Averages:
    """Figures of the cache, as the mean over all steps: at the end of a run it is empty again."""

    num_steps: int = 0
    waste: float = 0.0
    entries_per_seq: float = 0.0
    blocks: dict[int, float] = field(default_factory=dict)
    tiers: dict[str, float] = field(default_factory=dict)
    """Slots that requests hold in each tier."""

    def add(self, stats: CacheStats) -> None:
        self.num_steps += 1
        self.waste += (stats.waste - self.waste) / self.num_steps
        self.entries_per_seq += (stats.entries_per_seq - self.entries_per_seq) / self.num_steps
        for size in sorted({*self.blocks, *stats.blocks}):
            mean = self.blocks.get(size, 0.0)
            self.blocks[size] = mean + (stats.blocks.get(size, 0) - mean) / self.num_steps
        self.blocks = dict(sorted(self.blocks.items()))
        for name, tier in stats.tiers.items():
            mean = self.tiers.get(name, 0.0)
            self.tiers[name] = mean + (tier.used - mean) / self.num_steps


class Engine:
    """Runs requests on one model and one cache.

    Args:
        model: the forward pass.
        config: the cache; its ``allocator`` and ``growth`` are one line each.
        eos_token_id: ends a request.
        max_batch: requests that run at once.
        max_step_tokens: new tokens in one step; longer prompts are computed in parts.
    """

    def __init__(
        self,
        model: PackedLlama,
        config: CacheConfig,
        *,
        eos_token_id: int | None = None,
        max_batch: int = 16,
        max_step_tokens: int = 512,
    ) -> None:
        self.model = model
        self.cache = KVCache(config)
        self.eos_token_id = eos_token_id
        self.max_batch = min(max_batch, config.max_seqs)
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission: the last one is the first to be preempted
        self.num_prefilled = 0
        self.num_decoded = 0
        self.averages = Averages()

    def add(self, request: Request) -> None:
        """Queue a request."""
        if not request.prompt:
            raise ValueError("prompt: expected at least one token, got none")
        limit = self.cache.config.seq_len_limit
        if len(request.prompt) + request.max_new_tokens > limit:
            raise ValueError(
                f"prompt and max_new_tokens: expected at most {limit} tokens, the longest sequence of this cache, "
                f"got {len(request.prompt)} + {request.max_new_tokens}"
            )
        self.waiting.append(request)

    def run(self, on_step=lambda engine: None) -> None:
        """Run until every request has finished; calls ``on_step(engine)`` after each step."""
        while self.waiting or self.running:
            self.admit()
            self.step()
            self.averages.add(self.cache.stats())
            on_step(self)

    def admit(self) -> None:
        """Let waiting requests in while their prompts seem to fit."""
        while self.waiting and len(self.running) < self.max_batch:
            request, stats = self.waiting[0], self.cache.stats()
            if self.running and stats.free + stats.cached < len(request.tokens) + 8 * (len(self.running) + 1):
                return  # it, and a granule for each to go on, would not fit
            if any(other.num_held == 0 and other.prompt[:8] == request.prompt[:8] for other in self.running):
                return  # one step later the beginning they share is in the cache
            self.waiting.popleft()
            if request.preempted:
                self.cache.restore([request.seq_id])
                request.preempted = False
                request.num_held = int(self.cache.lengths([request.seq_id])[0])
            else:
                (request.seq_id,), (request.num_held,) = (part.tolist() for part in self.cache.open([request.prompt]))
            self.running.append(request)

    def step(self) -> None:
        """Feed every running request its next tokens."""
        chunks, budget = [], self.max_step_tokens
        for request in self.running:
            chunk = request.tokens[request.num_held :][: max(budget, 0)]
            budget -= len(chunk)
            chunks.append((request, chunk))
        batch = [(request, chunk) for request, chunk in chunks if chunk]
        with self.cache.begin_step(
            [request.seq_id for request, _ in batch], [len(chunk) for _, chunk in batch]
        ) as step:
            if step.ok.any():
                tokens = torch.tensor([token for _, chunk in batch for token in chunk])
                positions = torch.cat([torch.arange(len(c)) + request.num_held for request, c in batch])
                logits = self.model.forward(tokens, positions, step).cpu()  # once a step: sampling is done here
                self.cache.end_step(step, tokens.numpy())
            fed, stalled = step.ok.copy(), step.explain()
        for row, (request, chunk) in enumerate(batch):
            if fed[row]:
                self.accept(request, len(chunk), logits[row])
        self.running = [request for request in self.running if request.seq_id is not None]
        if stalled:
            self.preempt_last(stalled)

    def accept(self, request: Request, num_fed: int, logits: torch.Tensor) -> None:
        """Count what was fed; if that was all there is, choose the next token."""
        request.num_held += num_fed
        self.num_prefilled += num_fed
        if request.num_held < len(request.tokens):
            return
        self.num_prefilled -= 1
        self.num_decoded += 1
        token = self.sample(request, logits)
        request.output.append(token)
        if token == self.eos_token_id or len(request.output) == request.max_new_tokens:
            self.cache.close([request.seq_id])
            request.seq_id = None

    def sample(self, request: Request, logits: torch.Tensor) -> int:
        """The next token: the likeliest, or drawn. A draw depends on the request alone, not on who runs beside it."""
        if not request.temperature:
            return int(logits.argmax())
        chances = torch.softmax(logits.double() / request.temperature, dim=-1).cumsum(-1).numpy()
        draw = np.random.default_rng([request.seed, len(request.output)]).random() * chances[-1]
        return int(np.searchsorted(chances, draw, side="right"))

    def preempt_last(self, stalled: list[str]) -> None:
        """Take the memory of the request that was admitted last; it will be computed again."""
        if len(self.running) < 2:
            raise CacheFullError(f"the pool is too small for one request: {'; '.join(stalled)}")
        request = self.running.pop()
        self.cache.preempt([request.seq_id])
        request.preempted = True
        self.waiting.appendleft(request)
