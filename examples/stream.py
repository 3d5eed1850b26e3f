"""A stream of requests through the example engine on a GPU: `python -m examples.stream --help`.

Requests arrive as a trace says, or at random, with prompts of 100 to 2000 tokens and answers of up to 256. Tokens are
drawn, because a trace has no text. The
model has the shape of SmolLM2-135M and drawn weights. "First" is the time from arrival to the first token, "each" the
mean time of a request's further tokens, and "gap" the time between two deliveries of tokens to it, which are many at
once where the device decodes ahead.
"""

import argparse
import contextlib
import csv
import gzip
import math
import random
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from allocators._command_line import Parser, integer, number
from examples.busy import busy_cores
from examples.engine import Engine, Request
from examples.llama import PackedLlama
from examples.measure import make_model

LEAST, MOST = 100, 2000  # tokens of a prompt
_COLUMNS = ("ahead", "tokens/s", "first ms, p50", "p99", "each ms, p50", "p99", "gap ms, p50", "p99")
_WIDTHS = (6, 10, 15, 8, 14, 8, 13, 8)


class Arrival(NamedTuple):
    """A request of a stream."""

    seconds: float
    """From the beginning."""
    prompt: int
    """Tokens."""
    answer: int


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m examples.stream", description=__doc__)
    parser.add_argument("--trace", type=Path, help="CSV: TIMESTAMP, ContextTokens, GeneratedTokens; may be gzipped")
    parser.add_argument("--requests", type=integer(1), default=200, help="default 200")
    parser.add_argument(
        "--rate", type=number(0.001), default=20.0, help="requests a second, default 20; the trace's pauses are scaled"
    )
    parser.add_argument("--batch", type=integer(1), default=64, help="requests that run at once, at most")
    parser.add_argument("--ahead", type=integer(1), nargs="+", default=[1, 8, 32], help="tokens without the host")
    parser.add_argument("--busy", action="store_true", help="beside one process for each core that never rests")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("stream: expected a CUDA device that torch can use, found none", file=sys.stderr)
        return 2
    try:
        arrivals = read_trace(options.trace, options) if options.trace else draw(options)
    except (OSError, ValueError) as error:
        print(f"stream: {error}", file=sys.stderr)
        return 2
    model = PackedLlama(make_model(), fused=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{len(arrivals)} requests in {arrivals[-1].seconds:.1f} s")
    print("".join(f"{name:>{width}}" for name, width in zip(_COLUMNS, _WIDTHS, strict=True)))
    with busy_cores() if options.busy else contextlib.nullcontext():
        for ahead in options.ahead:
            engine = make_engine(model, arrivals, options.batch, ahead)
            run(engine, [one._replace(seconds=0) for one in arrivals])  # compiles and captures what will come up
            seen = run(engine, arrivals)
            print("".join(f"{text:>{width}}" for text, width in zip([ahead, *seen.columns()], _WIDTHS, strict=True)))
    return 0


def read_trace(path: Path, options: argparse.Namespace) -> list[Arrival]:
    """The first requests of a trace whose prompts are neither shorter nor longer than a stream's."""
    found = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        reader = csv.DictReader(lines)
        if missing := {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(reader.fieldnames or ()):
            raise ValueError(f"{path}: expected columns {', '.join(sorted(missing))}, got {reader.fieldnames}")
        for row in reader:
            prompt, answer = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            if LEAST <= prompt <= MOST and answer > 0:
                found.append(Arrival(datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(), prompt, answer))
                if len(found) == options.requests:
                    break
    if not found:
        raise ValueError(f"{path}: expected requests with prompts of {LEAST} to {MOST} tokens, found none")
    first, span = found[0].seconds, found[-1].seconds - found[0].seconds
    scale = len(found) / options.rate / span if span else 0.0
    return [one._replace(seconds=(one.seconds - first) * scale) for one in found]


def draw(options: argparse.Namespace) -> list[Arrival]:
    """Requests at exponential pauses, with log-uniform lengths."""
    rng, now, found = random.Random(0), 0.0, []
    for _ in range(options.requests):
        prompt, answer = (round(math.exp(rng.uniform(*map(math.log, ends)))) for ends in ((LEAST, MOST), (16, 256)))
        found.append(Arrival(now, prompt, answer))
        now += rng.expovariate(options.rate)
    return found


def make_engine(model: PackedLlama, arrivals: list[Arrival], batch: int, ahead: int) -> Engine:
    """An engine with room for ``batch`` of the longest requests."""
    longest = max(one.prompt + one.answer for one in arrivals)
    config = model.cache_config(num_tokens=batch * (longest + 64), max_seqs=batch, max_seq_len=longest + 8)
    captured = model.device.type == "cuda"
    return Engine(model, config, max_batch=batch, max_step_tokens=1024, captured=captured, ahead=ahead)


class Seen:
    """When the tokens of each request came."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.each: list[float] = []
        self.gaps: list[float] = []
        self.num_tokens = 0
        self.seconds = 0.0

    def columns(self) -> list[str]:
        """Tokens a second, then the median and the 99th percentile of each kind of time."""
        times = [np.percentile(one or [0.0], (50, 99)) * 1e3 for one in (self.first, self.each, self.gaps)]
        return [f"{self.num_tokens / self.seconds:.0f}", *(f"{ms:.2f}" for pair in times for ms in pair)]


def run(engine: Engine, arrivals: list[Arrival]) -> Seen:
    """Send the requests at their times, and run the engine until all have their answers."""
    rng, seen = random.Random(1), Seen()
    vocab_size = engine.model.vocab_size
    waiting = [(one, Request([rng.randrange(vocab_size) for _ in range(one.prompt)], one.answer)) for one in arrivals]
    under_way: list[tuple[float, Request, list[float]]] = []  # arrival; times at which tokens came
    begin = time.perf_counter()
    while waiting or under_way:
        now = time.perf_counter() - begin
        while waiting and waiting[0][0].seconds <= now:
            arrival, request = waiting.pop(0)
            engine.add(request)
            under_way.append((arrival.seconds, request, []))
        if not under_way:
            time.sleep(max(0.0, waiting[0][0].seconds - now))
            continue
        engine.admit()
        engine.step()
        now = time.perf_counter() - begin
        for _, request, times in under_way:
            if (num_new := len(request.output) - len(times)) > 0:
                seen.gaps += [now - times[-1]] if times else []
                times += [now] * num_new
        for arrived, _, times in [one for one in under_way if len(one[2]) == one[1].max_new_tokens]:
            seen.first.append(times[0] - arrived)
            if len(times) > 1:
                seen.each.append((times[-1] - times[0]) / (len(times) - 1))
            seen.num_tokens += len(times)
        under_way = [one for one in under_way if len(one[2]) < one[1].max_new_tokens]
    seen.seconds = time.perf_counter() - begin
    return seen


if __name__ == "__main__":
    raise SystemExit(main())
