"""Host time of calls under memory pressure in a small and a large pool: it depends only on what a call touches.

Each case does the same work in both pools. The figure is the best of ``--repeats`` runs, since other programs only ever
make one slower; calls that an earlier one makes cheaper begin anew each time.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit._version import __version__
from kvtoolkit.arrays.types import Int64Array
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.config.cache import CacheConfig

_MOST_TOKENS = 1 << 17
"""Tokens of the longest sequence, so few that a large pool takes many sequences to fill."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench costs``."""
    parser.add_argument(
        "--granules", type=integer(1 << 12), nargs="+", default=[1 << 16, 1 << 20], help="sizes of the pools"
    )
    parser.add_argument("--repeats", type=integer(1), default=20, help="best of so many runs")


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    print(f"kvtoolkit {__version__}, Python {platform.python_version()}, {platform.processor() or platform.machine()}")
    sizes = "".join(f"{f'{size} granules':>18}" for size in options.granules)
    print(f"\nMicroseconds a call, best of {options.repeats}:\n{'':<58}{sizes}{'ratio':>8}")
    for name, case in CASES.items():
        times = [min(next(runs) for _ in range(options.repeats)) * 1e6 for runs in map(case, options.granules)]
        print(f"{name:<58}{''.join(f'{one:>18.0f}' for one in times)}{times[-1] / times[0]:>8.2f}")
    return 0


def _make(num_granules: int, **fields: Any) -> KVCache:
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "max_seqs": 4096, "max_seq_len": _MOST_TOKENS}
    return KVCache(CacheConfig(**{**shape, "num_tokens": 8 * num_granules, **fields}))


def _fill(cache: KVCache, num_tokens: int, publishes: bool = False) -> Int64Array:
    """Open sequences that hold ``num_tokens`` in all, each with tokens of its own."""
    each = _MOST_TOKENS // 2
    seq_ids, _ = cache.open([[]] * -(-num_tokens // each))
    for i in range(len(seq_ids)):
        tokens = np.arange(i * each, min((i + 1) * each, num_tokens))
        step = cache.begin_step(seq_ids[i : i + 1], len(tokens))
        cache.end_step(step, tokens if publishes else None)
    return seq_ids


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _stalled_rows(num_granules: int) -> Iterator[float]:
    cache = _make(num_granules, growth="fixed64")
    _fill(cache, 8 * num_granules)
    waiting, _ = cache.open([[]] * 256)
    while True:
        start = time.perf_counter()
        step = cache.begin_step(waiting, 1)
        yield time.perf_counter() - start
        cache.end_step(step)


def _short_prompts(num_granules: int, num_cached: int, **fields: Any) -> Iterator[float]:
    """A prompt of 65 tokens in a full pool, ``num_cached`` tokens of it cached."""
    cache = _make(num_granules, **fields)
    _fill(cache, 8 * num_granules - num_cached)
    cache.close(_fill(cache, num_cached, publishes=True))
    for i in range(1 << 30):
        seq_ids, _ = cache.open([[-i] * 65])
        start = time.perf_counter()
        step = cache.begin_step(seq_ids, 65)
        seconds = time.perf_counter() - start
        cache.end_step(step, np.full(65, -i))
        cache.close(seq_ids)
        if i >= 8:  # the first ones find what was cached at once, and compile
            yield seconds


def _held_in_part(num_granules: int) -> Iterator[float]:
    """A token for which there is no memory, because rows hold 8 tokens of every block, whose rest is cached."""
    num_blocks = num_granules >> 5
    cache = _make(num_granules, max_seqs=4 * num_blocks, max_entries=1 << 11, allocator="slab", growth="fixed64")
    others = _fill(cache, 8 * num_granules - 64 * num_blocks)
    prompts = (np.arange(num_blocks)[:, None] + np.arange(64)).astype(np.int64)
    seq_ids, _ = cache.open([[]] * num_blocks)
    cache.end_step(cache.begin_step(seq_ids, 64), prompts.ravel())
    cache.open(list(prompts[:, :9]))
    cache.close(seq_ids)
    short, _ = cache.open([[]])
    while True:
        cache.truncate(others[:1], cache.lengths(others[:1]) - 1)  # something changes
        start = time.perf_counter()
        step = cache.begin_step(short, 1)
        yield time.perf_counter() - start
        cache.abort_step(step)


def _nothing_to_merge(num_granules: int) -> Iterator[float]:
    cache = _make(num_granules, growth="append")
    _fill(cache, 4 * num_granules)
    while True:
        yield _seconds(lambda: cache.compact(64))


def _single_granules(num_granules: int) -> Iterator[float]:
    """A prompt of 4096 tokens where only every other granule is free."""
    cache = _make(num_granules, growth="append", prefix_caching=False, max_seqs=8192)
    _fill(cache, 8 * num_granules - 8 * 4096)
    each, _ = cache.open([[]] * 4096)
    cache.end_step(cache.begin_step(each, 8))
    cache.close(each[::2])
    while True:
        seq_ids, _ = cache.open([[]])
        start = time.perf_counter()
        step = cache.begin_step(seq_ids, 4096)
        yield time.perf_counter() - start
        cache.end_step(step)
        cache.close(seq_ids)


CASES: dict[str, Callable[[int], Iterator[float]]] = {
    "begin_step, 256 rows for which there is no memory": _stalled_rows,
    "begin_step, 65 tokens, 4096 of the pool cached": lambda n: _short_prompts(n, 4096),
    "begin_step, 65 tokens, three quarters cached": lambda n: _short_prompts(n, 6 * n),
    "begin_step, 65 tokens, three quarters cached, slab": lambda n: _short_prompts(n, 6 * n, allocator="slab"),
    "begin_step refused, rows hold a part of all cached blocks": _held_in_part,
    "begin_step, 4096 tokens into single granules": _single_granules,
    "compact(64), half of the pool in blocks of 64": _nothing_to_merge,
}
