"""What allocators, growth policies and block sizes cost under simulated loads: waste, entries, copies, host time.

Requests arrive, are admitted while there is room, decode in one batch, and are preempted when memory runs out. There is
no model: every step calls ``begin_step`` and ``end_step`` as an engine does and writes no keys or values. Lengths,
arrivals and token ids have fixed seeds, so all figures but the times are the same in every run.
"""

import argparse
import platform
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit._version import __version__
from kvtoolkit.bench.load_cases import LOADS, Load, Request, read_trace
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.errors import CacheFullError

CHOICES: dict[str, dict[str, Any]] = {
    "paged fixed8": {"allocator": "paged", "growth": "fixed8"},
    "paged fixed16": {"allocator": "paged", "growth": "fixed16"},
    "paged fixed32": {"allocator": "paged", "growth": "fixed32"},
    "paged fixed64": {"allocator": "paged", "growth": "fixed64"},
    "buddy append": {"allocator": "buddy", "growth": "append"},
    "buddy proportional": {"allocator": "buddy", "growth": "proportional"},
    "buddy lazy_merge": {"allocator": "buddy", "growth": "lazy_merge"},
    "buddy adaptive": {"allocator": "buddy", "growth": "adaptive"},
    "slab lazy_merge": {"allocator": "slab", "growth": "lazy_merge"},
    "slab adaptive": {"allocator": "slab", "growth": "adaptive"},
    "lockfree adaptive": {"allocator": "lockfree", "growth": "adaptive"},
}
"""What is compared: the part of a `CacheConfig` that differs."""
_SAMPLE = 4  # steps from one look at the statistics to the next


@dataclass
class Running:
    """A request that was admitted, and how far it is."""

    request: Request
    seq_id: int
    num_held: int
    is_preempted: bool = False

    @property
    def next_tokens(self) -> int:
        """Tokens that its next step has to feed: what is left of its prompt, or the token that it just got."""
        return max(1, len(self.request.prompt) - self.num_held)

    @property
    def total(self) -> int:
        return len(self.request.prompt) + self.request.num_new


@dataclass
class Figures:
    """What one run showed; means are over its steps."""

    steps: int = 0
    running: float = 0.0
    waste: float = 0.0
    pinned: float = 0.0
    entries_per_seq: float = 0.0
    copied: float = 0.0
    reused: float = 0.0
    preempted: int = 0
    host_us: float = 0.0
    metadata_nbytes: int = 0
    times: list[float] = field(default_factory=list, repr=False)


class Simulation:
    """An engine without a model. ``run`` yields the cache after each step, for whoever draws a picture of it."""

    def __init__(self, load: Load, num_tokens: int, choice: dict[str, Any]) -> None:
        shape: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "max_seqs": 4 * load.max_batch}
        self.cache = KVCache(CacheConfig(**shape, num_tokens=num_tokens, **choice))
        self.load = load
        self.waiting = deque(load.requests)
        self.returning: deque[Running] = deque()
        self.running: list[Running] = []
        self.step_tokens = load.step_tokens
        self.now = 0
        self.has_stalled = False
        self.figures = Figures()
        self.random = np.random.default_rng(7)

    def run(self, max_steps: int | None = None) -> Iterator[KVCache]:
        """Run until every request has finished, or for so many steps."""
        while (self.waiting or self.returning or self.running) and (max_steps is None or self.now < max_steps):
            self._admit()
            if self.running:
                self._step()
                yield self.cache
            self.now += 1
        self._finish()

    def _admit(self) -> None:
        """Let requests in as `examples/engine.py` does: only with room for a block of everybody who runs."""
        while len(self.running) < self.load.max_batch and not self.has_stalled:
            headroom = min(self.cache.config.block_sizes or (8,)) * (len(self.running) + 1)
            if self.returning:
                one = self.returning[0]
                keep_free = one.total - one.num_held + headroom if self.running else 0
                if not self.cache.restore([one.seq_id], keep_free=keep_free)[0]:
                    return self._require_others()
                one.is_preempted = False
                self.running.append(self.returning.popleft())
                continue
            if not self.waiting or self.waiting[0].arrival > self.now:
                return None
            request, hot = self.waiting[0], self.cache.stats()
            if self.running and hot.free + hot.cached < len(request.prompt) + headroom:
                return None
            (seq_id,), (held,) = self.cache.open([request.prompt])
            self.running.append(Running(self.waiting.popleft(), int(seq_id), int(held)))
        return None

    def _require_others(self) -> None:
        if not self.running:
            raise CacheFullError("the pool is too small for one request of this load")

    def _step(self) -> None:
        budget, batch, counts, tokens = self.step_tokens, [], [], []
        for one in self.running:
            count = min(one.next_tokens, budget)
            if count:
                budget -= count
                batch.append(one)
                counts.append(count)
                known = one.request.prompt[one.num_held : one.num_held + count]
                tokens.append(known if len(known) else self.random.integers(1 << 40, 1 << 50, 1))
        packed, seq_ids = np.concatenate(tokens), [one.seq_id for one in batch]
        start = time.thread_time()
        step = self.cache.begin_step(seq_ids, counts)
        middle = time.thread_time()
        fed = step.ok.copy()
        resumed = time.thread_time()
        self.cache.end_step(step, packed)
        self.figures.times.append(middle - start + time.thread_time() - resumed)
        for one, count, ok in zip(batch, counts, fed, strict=True):
            one.num_held += count if ok else 0
        self._sample()
        finished = [one for one in self.running if one.num_held >= one.total]
        if finished:
            self.cache.close([one.seq_id for one in finished])
            self.running = [one for one in self.running if one.num_held < one.total]
        self.has_stalled = not fed.all()
        if not self.has_stalled:
            self.step_tokens = min(2 * self.step_tokens, self.load.step_tokens)
        elif not finished:
            self._make_room(sum(counts))

    def _make_room(self, num_tokens: int) -> None:
        """Preempt the newest request to the host, or feed the only one fewer tokens at a time."""
        if len(self.running) > 1:
            one = self.running.pop()
            self.cache.preempt([one.seq_id], to="host")
            one.is_preempted = True
            self.returning.appendleft(one)
        elif num_tokens > 1:
            self.step_tokens = num_tokens // 2
        else:
            raise CacheFullError("the pool is too small for one request of this load")

    def _sample(self) -> None:
        figures = self.figures
        figures.steps += 1
        if figures.steps % _SAMPLE:
            return
        stats, count = self.cache.stats(), figures.steps // _SAMPLE
        figures.running += (len(self.running) - figures.running) / count
        figures.waste += (stats.waste - figures.waste) / count
        figures.pinned += (stats.pinned / stats.capacity - figures.pinned) / count
        figures.entries_per_seq += (stats.entries_per_seq - figures.entries_per_seq) / count

    def _finish(self) -> None:
        stats, figures = self.cache.stats(), self.figures
        appended = sum(len(one.prompt) + one.num_new for one in self.load.requests)
        figures.copied = stats.copied_tokens / appended
        figures.reused = stats.reused_tokens / max(1, stats.prompt_tokens)
        figures.preempted = stats.num_preempted
        figures.metadata_nbytes = stats.metadata_nbytes


def simulate(load: Load, num_tokens: int, choice: dict[str, Any], repeats: int = 1) -> Figures:
    """Run a load to its end on a pool of ``num_tokens``.

    Every repeat does the same, so the time of a step is the least of its repeats: other programs only make it longer.
    """
    times = []
    for _ in range(repeats):
        simulation = Simulation(load, num_tokens, choice)
        for _ in simulation.run():
            pass
        times.append(simulation.figures.times)
    figures = simulation.figures
    figures.host_us = float(np.min(times, axis=0).mean()) * 1e6
    return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench loads``."""
    parser.add_argument(
        "--load",
        nargs="+",
        choices=list(LOADS),
        metavar="LOAD",
        help=f"only these of {', '.join(LOADS)}; with --trace none unless given",
    )
    parser.add_argument(
        "--choice", nargs="+", choices=list(CHOICES), metavar="CHOICE", help=f"only these of {', '.join(CHOICES)}"
    )
    parser.add_argument("--trace", nargs="+", default=[], metavar="PATH",
                        help="requests of a trace: Mooncake's JSON lines or Azure's CSV, .gz or not")  # fmt: skip
    parser.add_argument("--requests", type=integer(1), default=400, help="so many requests of each trace")
    parser.add_argument("--repeats", type=integer(1), default=3, help="runs of each, for the times")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Simulate and print."""
    names = options.load or ([] if options.trace else list(LOADS))
    loads = [LOADS[name]() for name in names] + [read_trace(path, options.requests) for path in options.trace]
    choices = {name: CHOICES[name] for name in options.choice or CHOICES}
    print(f"kvtoolkit {__version__}, Python {platform.python_version()}, {platform.processor() or platform.machine()}")
    rows = []
    for load in loads:
        for memory in load.pools:
            rows += _compare(load, memory, choices, options.repeats)
    write_json(options.json, {"version": __version__, "rows": rows})
    return 0


def _compare(load: Load, memory: str, choices: dict[str, dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    print(
        f"\n{load.name}, memory {memory}: {len(load.requests)} requests, mean {load.mean_tokens:.0f} tokens, "
        f"pool {load.pools[memory]}"
    )
    print(
        f"{'':<20} {'waste':>7} {'pinned':>7} {'entries':>8} {'copied':>7} {'reused':>7} {'running':>8} "
        f"{'preempted':>10} {'steps':>7} {'us/step':>8} {'metadata':>9}"
    )
    rows = []
    for name, choice in choices.items():
        found = simulate(load, load.pools[memory], choice, repeats)
        row = {"load": load.name, "memory": memory, "choice": name, **asdict(found)}
        del row["times"]
        rows.append(row)
        print(
            f"{name:<20} {found.waste:>7.1%} {found.pinned:>7.1%} {found.entries_per_seq:>8.1f} {found.copied:>7.1%} "
            f"{found.reused:>7.1%} {found.running:>8.1f} {found.preempted:>10} {found.steps:>7} {found.host_us:>8.1f} "
            f"{found.metadata_nbytes / 1e6:>6.2f} MB",
            flush=True,
        )
    return rows
