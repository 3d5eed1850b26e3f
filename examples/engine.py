"""An inference engine in 300 lines: continuous batching, chunked prefill, prefix reuse, preemption.

What it leaves to kvtoolkit is everything about memory. What it decides is who runs: requests are admitted in order
while there is room, every step feeds each running request its next tokens (a part of its prompt, or the token it just
got), and when the pool is full the request that came last waits in host memory until there is room for it again.

Every request finishes: the oldest one is never preempted, and nobody is let in between a step in which a request found
no memory and one in which all did. So the oldest gets what the others give up before anybody else can take it.
"""

import operator
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from examples.llama import PackedLlama
from examples.sampling import Choice
from examples.steps import MOST_AHEAD, CapturedSteps, EagerSteps
from kvtoolkit import CacheConfig, CacheFullError, CacheStats, KVCache


@dataclass
class Request:
    """One prompt, and how far its answer is."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0
    output: list[int] = field(default_factory=list)
    seq_id: int | None = None
    """Its sequence in the cache; None before it is admitted."""
    preempted: bool = False
    num_held: int = 0
    """Tokens of it that the cache holds."""
    reuses: bool = True
    """Whether it may start from a cached prefix of its prompt."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def pending(self, most: int) -> list[int]:
        """The next tokens that the cache does not hold, at most so many."""
        first = self.num_held - len(self.prompt)
        if first >= 0:  # as in most steps, without putting the two together
            return self.output[first : first + most]
        return (self.prompt[self.num_held :] + self.output)[:most]


@dataclass
class Averages:
    """Means of the cache's figures over all steps, because at the end of a run the cache is empty."""

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
        captured: whether steps are captured in CUDA graphs; for caches with backend ``"cuda"``.
        ahead: tokens of each request that captured steps decode at most before the host looks again.
    """

    def __init__(
        self,
        model: PackedLlama,
        config: CacheConfig,
        *,
        eos_token_id: int | None = None,
        max_batch: int = 16,
        max_step_tokens: int = 512,
        captured: bool = False,
        ahead: int = MOST_AHEAD,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_step_tokens", max_step_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.model = model
        self.cache = KVCache(config)
        self.steps = CapturedSteps(model, self.cache, max_step_tokens) if captured else EagerSteps(model)
        self.ahead = ahead if captured else 1
        self.eos_token_id = eos_token_id
        self.max_batch = min(max_batch, config.max_seqs)
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission: the last one is the first to be preempted
        self.has_stalled = False
        """Whether some request got no memory in the last step."""
        self.step_tokens = max_step_tokens
        """New tokens in the next step; fewer than ``max_step_tokens`` after they found no memory."""
        self.tail_tokens = min(config.block_sizes or (8,))
        """Tokens of the smallest block: what a running request needs to go on."""
        self.num_prefilled = 0
        self.num_decoded = 0
        self.averages = Averages()
        self.block_tables: dict[int, np.ndarray] = {}
        """What each sequence of the last step held, as entries of the block table; for those who draw it."""

    def add(self, request: Request) -> None:
        """Queue a request."""
        try:  # whatever kind of integers they are
            request.prompt = [operator.index(token) for token in request.prompt]
            request.max_new_tokens, request.seed = map(operator.index, (request.max_new_tokens, request.seed))
        except TypeError as error:
            raise ValueError(f"prompt, max_new_tokens, seed: expected integers, got {request!r:.300}") from error
        if not request.prompt:
            raise ValueError("prompt: expected at least one token, got none")
        vocab_size = getattr(self.model, "vocab_size", float("inf"))
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
            got = f"{min(request.prompt)} to {max(request.prompt)}"
            raise ValueError(f"prompt: expected tokens from 0 to {vocab_size - 1}, got {got}")
        if request.max_new_tokens < 1 or not 0 <= request.temperature < float("inf"):
            raise ValueError(f"expected max_new_tokens from 1 and a finite temperature from 0 on, got {request!r:.300}")
        if not 0 < np.float32(request.top_p) <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {request.top_p}")
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
        """Admit waiting requests while there is room for their tokens, and for every running request to go on."""
        while self.waiting and len(self.running) < self.max_batch and not self.has_stalled:
            request = self.waiting[0]
            if any(other.num_held == 0 and other.prompt[:8] == request.prompt[:8] for other in self.running):
                return  # after the next step the prefix they share is in the cache
            if not self.let_in(request):
                return
            self.running.append(self.waiting.popleft())

    def let_in(self, request: Request) -> bool:
        """Open or restore a request's sequence. Returns False, and does nothing, if the others would lack memory."""
        headroom = self.tail_tokens * (len(self.running) + 1)
        if request.preempted:
            # keep free all that it may still need, because being preempted again costs more than waiting
            missing = len(request.prompt) + request.max_new_tokens - request.num_held
            keep_free = max(self.most_hot(missing)) + headroom if self.running else 0
            if not self.cache.restore([request.seq_id], keep_free=keep_free)[0]:
                if not self.running:
                    raise CacheFullError("the pool is too small for one request: no room to bring it back")
                return False
            request.preempted = False
            return True
        if self.running and not self.has_room(len(request.prompt), headroom):
            return False
        (request.seq_id,), (request.num_held,) = (part.tolist() for part in self.cache.open([request.prompt]))
        return True

    def has_room(self, num_tokens: int, headroom: int) -> bool:
        """Whether the next tokens of a sequence fit into the hot tier of every group of layers; and headroom."""
        for group, most in zip(self.cache.stats().groups, self.most_hot(num_tokens), strict=True):
            hot = group.tiers["hot"]
            if hot.free + hot.cached < most + headroom:
                return False
        return True

    def most_hot(self, num_tokens: int) -> list[int]:
        """For each group of layers the most of a sequence's next tokens that are in its hot tier at any time."""
        config, most = self.cache.config, []
        for group, own in zip(config.groups, config.group_configs, strict=True):
            if group.span:  # later steps free the rest
                most.append(min(num_tokens, abs(group.span) + 64 + self.step_tokens))
            elif tiers := own.tier_config:  # or quantize it
                most.append(min(num_tokens, tiers.hot + tiers.pinned_tokens + 64 + self.step_tokens))
            else:
                most.append(num_tokens)
        return most

    def step(self) -> None:
        """Feed every running request its next tokens."""
        if self.ahead > 1 and self.running and all(one.num_tokens == one.num_held + 1 for one in self.running):
            self.decode_ahead()
            return
        chunks, budget = [], self.step_tokens
        for request in self.running:
            chunk = request.pending(max(budget, 0))
            budget -= len(chunk)
            chunks.append((request, chunk))
        batch = [(request, chunk) for request, chunk in chunks if chunk]
        requests, counts = [request for request, _ in batch], np.array([len(chunk) for _, chunk in batch])
        tokens = np.array([token for _, chunk in batch for token in chunk])
        with self.cache.begin_step([request.seq_id for request in requests], counts) as step:
            if step.ok.any():
                held = np.array([request.num_held for request in requests])
                positions = np.arange(len(tokens)) + np.repeat(held - (counts.cumsum() - counts), counts)
                chosen = self.steps.run(step, tokens, positions, choice_of(requests)).tolist()
                self.cache.end_step(step, tokens)
            fed, stalled = step.ok.copy(), step.explain()
            self.block_tables = dict(zip(step.seq_ids.tolist(), step.block_table.copy(), strict=True))
        for row, (request, chunk) in enumerate(batch):
            if fed[row]:
                self.accept(request, len(chunk), chosen[row])
        num_running = len(self.running)
        self.running = [request for request in self.running if request.seq_id is not None]
        self.has_stalled = bool(stalled)
        if not stalled:
            self.step_tokens = min(2 * self.step_tokens, self.max_step_tokens)
        elif len(self.running) == num_running:  # if one has finished there is memory now
            self.make_room(stalled, sum(len(chunk) for _, chunk in batch))

    def decode_ahead(self) -> None:
        """Let the device decode several tokens of every running request, of which only the next one is missing."""
        requests = self.running
        left = [request.max_new_tokens - len(request.output) for request in requests]
        # whoever waits may come in when the first one ends
        num_steps = min(self.ahead, min(left) if self.waiting else max(left))
        max_lens = [request.num_held + count for request, count in zip(requests, left, strict=True)]
        eos = -1 if self.eos_token_id is None else self.eos_token_id
        turn = self.steps.run_ahead(
            [request.seq_id for request in requests], [request.output[-1] for request in requests], max_lens,
            choice_of(requests), num_steps, eos,
        )  # fmt: skip
        for row, request in enumerate(requests):
            fed = turn.history[row, : turn.num_new[row]].tolist()
            for token in [*fed[1:], int(turn.next_tokens[row])] if fed else []:
                self.accept(request, 1, token)
        num_running = len(requests)
        self.running = [request for request in requests if request.seq_id is not None]
        self.has_stalled = bool((turn.status == 1).any())
        if self.has_stalled and len(self.running) == num_running:
            self.make_room(["out of blocks"], 1)

    def accept(self, request: Request, num_fed: int, token: int) -> None:
        """Count the tokens that were fed. If none of the request are left, ``token`` is its next one."""
        request.num_held += num_fed
        self.num_prefilled += num_fed
        if request.num_held < request.num_tokens:
            return
        self.num_prefilled -= 1
        self.num_decoded += 1
        request.output.append(token)
        if token == self.eos_token_id or len(request.output) == request.max_new_tokens:
            self.cache.close([request.seq_id])
            request.seq_id = None

    def make_room(self, stalled: list[str], num_tokens: int) -> None:
        """Preempt the request that was admitted last. If there is only one, feed it fewer tokens at a time."""
        if len(self.running) > 1:
            request = self.running.pop()
            self.cache.preempt([request.seq_id], to="host")
            request.preempted = True
            self.waiting.appendleft(request)
            return
        (request,) = self.running
        if num_tokens > 1:
            self.step_tokens = num_tokens // 2
        elif request.reuses:  # its cached prefix may be scattered over blocks whose other granules it cannot use
            self.cache.close([request.seq_id])
            (request.seq_id,), request.num_held = self.cache.open([[]])[0].tolist(), 0
            request.reuses = False
        else:
            raise CacheFullError(f"the pool is too small for one request: {'; '.join(stalled)}")


def choice_of(requests: list[Request]) -> Choice:
    """How the next token of each request is chosen."""
    floats = np.array([(min(request.temperature, 1e30), request.top_p) for request in requests], np.float32)
    integers = np.array([(request.seed % (1 << 63), len(request.output)) for request in requests])
    return Choice(*(torch.from_numpy(part) for part in (*floats.T.copy(), *integers.T.copy())))
