"""The same requests and tokens on other caches, without the model: what each allocator makes of the same memory."""

import dataclasses
from dataclasses import dataclass, field

import torch

from examples.engine import Averages, Engine, Request
from kvtoolkit import CacheConfig, CacheStats, KVToolkitError

PLENTY = 8
"""The pool of the comparison in which memory is plentiful, in pools of the run."""


@dataclass
class Repeated(Request):
    """A request whose answer is known."""

    answer: list[int] = field(default_factory=list)


class Repeat(Engine):
    """The engine, with tokens from a record; the cache decides nothing by what keys and values it holds."""

    def sample(self, request: Repeated, logits: torch.Tensor) -> int:
        return request.answer[len(request.output)]


class NoModel:
    """Appends nothing and attends to nothing."""

    def forward(self, tokens, positions, step) -> torch.Tensor:
        return torch.zeros(len(step.seq_ids), 1)


def repeat(engine: Engine, requests: list[Request], config: CacheConfig) -> tuple[Averages, CacheStats]:
    """Run finished requests of an engine again on another cache; returns the averages of its steps and its figures."""
    other = Repeat(
        NoModel(), config, eos_token_id=engine.eos_token_id,
        max_batch=engine.max_batch, max_step_tokens=engine.max_step_tokens,
    )  # fmt: skip
    for one in requests:
        other.add(Repeated(one.prompt, one.max_new_tokens, seed=one.seed, answer=one.output))
    other.run()
    return other.averages, other.cache.stats()


def table(engine: Engine, requests: list[Request]) -> list[str]:
    """The run's cache beside ``paged`` (or ``buddy`` beside it), in the run's pool and in a larger one."""
    config = dataclasses.replace(engine.cache.config, backend="cpu", device=None)
    other = "buddy" if config.allocator == "paged" else "paged"
    rival = dataclasses.replace(config, allocator=other, allocator_options={}, growth=None, block_sizes=None)
    lines = [f"{'':<22}{'waste':>8}{'entries':>10}{'block sizes in a sequence':>32}"]
    for name, factor in (("this pool", 1), (f"a pool {PLENTY} times as large", PLENTY)):
        lines.append(name)
        for one in (config, rival):
            sized = dataclasses.replace(one, num_tokens=8 * config.num_granules * factor, memory=None)
            label = f"  {one.allocator}, {one.growth}"
            try:
                averages, _ = repeat(engine, requests, sized)
            except KVToolkitError as error:
                lines.append(f"{label:<22}  {error}"[:80])
                continue
            total = sum(averages.blocks.values())
            sizes = ", ".join(f"{count / total:.0%} {size}" for size, count in averages.blocks.items())
            lines.append(f"{label:<22}{averages.waste:>8.1%}{averages.entries_per_seq:>10.1f}{sizes:>32}")
    return lines
