"""How a run is shown: a live picture on a terminal, and lines as things happen everywhere else."""

import sys
import time
from collections.abc import Callable

from examples.engine import Engine, Request
from kvtoolkit import CacheStats


def watcher(requests: list[Request], prompts: list[str], decode: Callable[[list[int]], str]) -> "Lines":
    """A picture if rich is installed and somebody watches, else lines."""
    if sys.stdout.isatty():
        try:
            return Screen(requests, prompts, decode)
        except ModuleNotFoundError:
            pass
    return Lines(requests, prompts, decode)


class Lines:
    """Prints a line for everything that happens to a request or in the pool, and each answer when it is complete.

    Args:
        requests: all of the run.
        prompts: their texts.
        decode: makes a text of output tokens.
    """

    def __init__(self, requests: list[Request], prompts: list[str], decode: Callable[[list[int]], str]) -> None:
        self.requests, self.prompts, self.decode = requests, prompts, decode
        self.states = ["waiting"] * len(requests)
        self.stats: CacheStats | None = None
        self.seconds = 0.0
        """Spent on showing, which is no part of the run's own time."""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def on_step(self, engine: Engine) -> None:
        """Show what a step of the engine has changed."""
        began = time.perf_counter()
        self.show(engine)
        self.seconds += time.perf_counter() - began

    def show(self, engine: Engine) -> None:
        for line in self.news(engine):
            self.say(f"step {engine.averages.num_steps:>3}  {line}")

    def say(self, line: str) -> None:
        print(line, flush=True)

    def news(self, engine: Engine) -> list[str]:
        """What has happened since the last step, in words."""
        lines = []
        stats, before = engine.cache.stats(), self.stats or engine.cache.stats()
        if self.stats is None:
            lines.append(f"the pool has {stats.capacity} slots, allocator {engine.cache.config.allocator}")
        reused = stats.reused_tokens - (self.stats.reused_tokens if self.stats else 0)
        if reused:
            lines.append(f"{reused} prompt tokens were in the cache already and are not computed again")
        if count := stats.num_merges - before.num_merges:
            lines.append(f"{count} merged: the small blocks of 64 tokens became one block")
        if count := stats.num_evicted - before.num_evicted:
            lines.append(f"{8 * count} cached tokens of finished requests were evicted")
        if count := stats.num_demoted_warm - before.num_demoted_warm:
            lines.append(f"{count} tiles of 64 tokens went to int8")
        if count := stats.num_demoted_cold - before.num_demoted_cold:
            lines.append(f"{count} tiles of 64 tokens went to int4")
        changed: dict[str, list[int]] = {}
        for index, request in enumerate(self.requests):
            state = state_of(request)
            if state == self.states[index]:
                continue
            if state == "finished":
                lines.append(
                    f"request {index + 1} is finished\n> {self.prompts[index]}\n{self.decode(request.output)}\n"
                )
            else:
                again = " again" if self.states[index] == "in host memory" else ""
                changed.setdefault(state + again, []).append(index + 1)
            self.states[index] = state
        for state, numbers in changed.items():
            which = f"request {numbers[0]} is" if len(numbers) == 1 else f"requests {', '.join(map(str, numbers))} are"
            lines.append(f"{which} {state}")
        self.stats = stats
        return lines


def state_of(request: Request) -> str:
    """Where a request is."""
    if request.preempted:
        return "in host memory"
    if request.seq_id is None:
        return "finished" if request.output else "waiting"
    return "running"


class Screen(Lines):
    """Draws the pool and what is being written several times a second; complete answers move up above the picture."""

    _PERIOD = 0.1
    """Seconds between two pictures."""

    def __init__(self, *arguments, console=None) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(*arguments)
        self.live = Live(console=console or Console(), auto_refresh=False, transient=True)
        self.next = 0.0

    def __enter__(self) -> "Screen":
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def show(self, engine: Engine) -> None:
        from rich.markup import escape

        from examples.picture import draw

        for index, request in enumerate(self.requests):
            state = state_of(request)
            if state == "finished" and self.states[index] != state:
                self.live.console.print(f"[bold]> {escape(self.prompts[index])}[/]", highlight=False)
                self.live.console.print(f"{escape(self.decode(request.output))}\n", highlight=False)
            self.states[index] = state
        if time.perf_counter() >= self.next or not (engine.running or engine.waiting):
            texts = [
                self.decode(request.output) or prompt
                for request, prompt in zip(self.requests, self.prompts, strict=True)
            ]
            self.live.update(draw(engine, self.requests, texts), refresh=True)
            self.next = time.perf_counter() + self._PERIOD
