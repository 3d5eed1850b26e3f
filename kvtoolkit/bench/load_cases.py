"""The loads of ``kvtoolkit bench loads``: requests with lengths, arrivals and tokens from fixed seeds, or a trace."""

import csv
import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.errors import ArgumentError

_MOONCAKE_BLOCK = 512  # tokens that one id of a trace's `hash_ids` stands for
_STEP_SECONDS = 0.05  # of a trace's time in one step of the simulation


@dataclass(frozen=True)
class Request:
    """One prompt, when it arrives, and how many tokens it will generate."""

    arrival: int
    prompt: NDArray[np.int64]
    num_new: int


@dataclass(frozen=True)
class Load:
    """Requests in order of arrival, and the pools on which they are run."""

    name: str
    requests: tuple[Request, ...]
    max_batch: int = 64
    step_tokens: int = 2048

    @property
    def mean_tokens(self) -> float:
        """Tokens of a request at its end, prompt and answer."""
        return float(np.mean([len(one.prompt) + one.num_new for one in self.requests]))

    @property
    def pools(self) -> dict[str, int]:
        """Tokens of a pool that has room for a full batch, and of one that has room for half of it."""
        longest = max(len(one.prompt) + one.num_new for one in self.requests)
        full = self.max_batch * self.mean_tokens
        return {
            name: max(2 * longest, int(share * full)) // 64 * 64 + 64
            for name, share in (("plentiful", 1.5), ("short", 0.5))
        }


def _load(name: str, seed: int, lengths: Iterable[tuple[int, int, int]]) -> Load:
    """Requests of ``(arrival, prompt length, new tokens)`` that share nothing."""
    random = np.random.default_rng(seed)
    requests = (Request(arrival, random.integers(0, 1 << 40, prompt), new) for arrival, prompt, new in lengths)
    return Load(name, tuple(requests))


def _short() -> Load:
    random = np.random.default_rng(1)
    return _load("short", 1, ((i // 4, *random.integers(16, 129, 2).tolist()) for i in range(512)))


def _long() -> Load:
    random = np.random.default_rng(2)
    lengths = ((6 * i, int(random.integers(2048, 8193)), int(random.integers(128, 513))) for i in range(128))
    return _load("long", 2, lengths)


def _mixed_lengths(seed: int) -> tuple[int, int]:
    random = np.random.default_rng([3, seed])
    prompt, new = np.clip(random.lognormal([6.0, 5.0], [1.2, 0.8]), 16, 8192).astype(int).tolist()
    return prompt, new


def _mixed() -> Load:
    return _load("mixed", 3, ((2 * i, *_mixed_lengths(i)) for i in range(384)))


def _bursty() -> Load:
    return _load("bursty", 4, ((i // 96 * 400, *_mixed_lengths(1000 + i)) for i in range(384)))


def _shared() -> Load:
    """Questions that begin with one of eight instructions of 1000 tokens."""
    random = np.random.default_rng(5)
    beginnings = random.integers(0, 1 << 40, (8, 1000))
    requests = []
    for i in range(384):
        question = random.integers(0, 1 << 40, int(random.integers(32, 257)))
        prompt = np.concatenate([beginnings[random.integers(8)], question])
        requests.append(Request(2 * i, prompt, int(random.integers(32, 257))))
    return Load("shared prefix", tuple(requests))


LOADS: dict[str, Callable[[], Load]] = {
    "short": _short,
    "long": _long,
    "mixed": _mixed,
    "bursty": _bursty,
    "shared": _shared,
}


def read_trace(path: str, num_requests: int) -> Load:
    """The first requests of a public trace.

    Args:
        path: JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``, one id for 512
            tokens, as Mooncake's; or CSV with ``TIMESTAMP``, ``ContextTokens`` and ``GeneratedTokens``, as Azure's. A
            name that ends in ``.gz`` is unpacked. One step of the simulation is 50 ms of the trace.
        num_requests: how many to take.

    Raises:
        ArgumentError: there is no such file, or it is no such trace.
    """
    opener: Any = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            rows = json_rows(file) if ".jsonl" in path else csv_rows(file)
            requests = [request for _, request in zip(range(num_requests), rows, strict=False)]
    except OSError as error:  # one of gzip, too
        raise ArgumentError(f"--trace: {path} cannot be read: {error}") from error
    except Exception as error:  # what parsers raise, and rows without a field
        raise ArgumentError(
            f"--trace: {path}: expected Mooncake's JSON lines or Azure's CSV, got {type(error).__name__}: {error}"
        ) from error
    if not requests:
        raise ArgumentError(f"--trace: {path}: expected requests, got none")
    return Load(Path(path).name.removesuffix(".gz"), tuple(requests))


def json_rows(file: Iterable[str]) -> Iterable[Request]:
    """Requests of Mooncake's traces. Equal ids become equal tokens, so prefixes are shared as they were."""
    for line in file:
        row = json.loads(line)
        ids = np.asarray(row["hash_ids"], np.int64)
        prompt = (ids[:, None] * _MOONCAKE_BLOCK + np.arange(_MOONCAKE_BLOCK)).ravel()[: row["input_length"]]
        yield Request(int(row["timestamp"] / 1e3 / _STEP_SECONDS), prompt, max(1, int(row["output_length"])))


def csv_rows(file: Iterable[str]) -> Iterable[Request]:
    """Requests of Azure's traces, which say nothing of what prompts share."""
    random, first = np.random.default_rng(6), None
    for row in csv.DictReader(file):
        seconds = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp()
        first = seconds if first is None else first
        prompt = random.integers(0, 1 << 40, max(1, int(row["ContextTokens"])))
        yield Request(int((seconds - first) / _STEP_SECONDS), prompt, max(1, int(row["GeneratedTokens"])))
