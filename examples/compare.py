"""The same requests and tokens on other caches, without the model: what each allocator makes of the same memory."""

import dataclasses
from dataclasses import dataclass, field

import torch

from examples.engine import Averages, Engine, Request
from kvtoolkit import CacheConfig, CacheStats, KVToolkitError

PLENTY = 8
"""How many times larger than the run's the pool is in which memory is plentiful."""


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


def caches(config: CacheConfig) -> list[CacheConfig]:
    """The cache of a run, the default of the library, and the allocator of plain PagedAttention."""
    config = dataclasses.replace(config, backend="cpu", device=None)
    others = [
        dataclasses.replace(config, allocator=name, allocator_options={}, growth=None, block_sizes=None)
        for name in ("buddy", "paged")
    ]
    found = [config, *others]
    return [one for i, one in enumerate(found) if name_of(one) not in map(name_of, found[:i])]


def name_of(config: CacheConfig) -> str:
    return f"{config.allocator}, {config.growth}"


def table(engine: Engine, requests: list[Request]) -> list[str]:
    """Waste and entries of several caches, in the run's pool and in a larger one."""
    num_tokens = 8 * engine.cache.config.num_granules
    lines = [
        f"{'':<24}{'':>7}{'entries per':>13}{'tokens per':>12}{'merges':>8}{'evicted':>9}{'pre-':>7}",
        f"{'':<24}{'waste':>7}{'sequence':>13}{'entry':>12}{'':>8}{'':>9}{'empted':>7}",
    ]
    for title, factor in ((f"{num_tokens} slots", 1), (f"{PLENTY * num_tokens} slots", PLENTY)):
        lines.append(title)
        for config in caches(engine.cache.config):
            label = f"  {name_of(config):<22}"
            try:
                sized = dataclasses.replace(config, num_tokens=num_tokens * factor, memory=None)
                average, stats = repeat(engine, requests, sized)
            except KVToolkitError as error:
                lines.append(f"{label}{error}"[:80])
                continue
            entries = sum(average.blocks.values())
            tokens = sum(size * count for size, count in average.blocks.items()) / entries
            lines.append(
                f"{label}{average.waste:>7.1%}{average.entries_per_seq:>13.1f}{tokens:>12.0f}{stats.num_merges:>8}"
                f"{stats.num_evicted:>9}{stats.num_preempted:>7}"
            )
    return lines
