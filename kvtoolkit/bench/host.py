"""Host time of one decode step, and of allocating and freeing blocks, for every allocator.

A decode step is ``begin_step`` and ``end_step`` with one new token a sequence and all checks on. The sequences have
different lengths around the context, so every step of 64 in a row makes its share of them grow; the figure is the mean
of 64 steps, the best of ``--repeats`` such means (other programs only ever make it slower).
"""

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators import BlockAllocator, create, find
from allocators._command_line import integer
from kvtoolkit._version import __version__
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.config.cache import CacheConfig

_STEPS = 64

_ALLOCATORS: list[tuple[str, dict[str, Any]]] = [
    ("paged", {}),
    ("buddy", {}),
    ("slab", {}),
    ("lockfree", {"layout": "buddy"}),
    ("lockfree", {"layout": "slab"}),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench host``."""
    parser.add_argument("--batch", type=integer(1), nargs="+", default=[256, 4096], help="sequences in a step")
    parser.add_argument("--context", type=integer(1), default=1024, help="tokens in each sequence")
    parser.add_argument("--repeats", type=integer(1), default=20, help="best of so many runs")
    parser.add_argument("--allocator", nargs="+", help="only these, by name or 'package.module:Class'")
    parser.add_argument("--growth", default=None, help="growth policy; default: the allocator's own")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    for name in options.allocator or ():
        find(name)
    chosen = [(name, {}) for name in options.allocator] if options.allocator else _ALLOCATORS
    print(f"kvtoolkit {__version__}, Python {platform.python_version()}, {platform.processor() or platform.machine()}")
    steps = _measure_steps(chosen, options)
    blocks = _measure_blocks(chosen, options)
    write_json(options.json, {"version": __version__, "steps": steps, "allocators": blocks})
    return 0


def _measure_steps(chosen: list[tuple[str, dict[str, Any]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"\nOne decode step, context {options.context}, mean of {_STEPS} steps, best of {options.repeats} (median):")
    print(f"{'allocator':<16} {'growth':<12} {'batch':>6} {'ms/step':>16} {'with token ids':>18} {'entries/seq':>12}")
    rows = []
    for name, extra in chosen:
        for batch in options.batch:
            row: dict[str, Any] = {"allocator": _label(name, extra), "batch": batch, "context": options.context}
            for key, publish in (("ms", False), ("ms_with_token_ids", True)):
                cache, times = _time_steps(name, extra, batch, publish, options)
                row[key], row[f"{key}_median"] = min(times) * 1e3, float(np.median(times)) * 1e3
            row["growth"], row["entries_per_seq"] = cache.config.growth, cache.stats().entries_per_seq
            rows.append(row)
            print(
                f"{row['allocator']:<16} {row['growth']:<12} {batch:>6} {row['ms']:>8.4f} ({row['ms_median']:.3f}) "
                f"{row['ms_with_token_ids']:>10.4f} ({row['ms_with_token_ids_median']:.3f}) "
                f"{row['entries_per_seq']:>11.1f}"
            )
    return rows


def _time_steps(
    name: str, extra: dict[str, Any], batch: int, publish: bool, options: argparse.Namespace
) -> tuple[KVCache, list[float]]:
    config = CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        num_tokens=batch * (options.context + 512),
        max_seqs=batch,
        max_seq_len=options.context + 512,
        allocator=name,
        allocator_options=extra,
        growth=options.growth,
    )
    cache = KVCache(config)
    seq_ids, _ = cache.open([[]] * batch)
    random = np.random.default_rng(0)
    lengths = np.maximum(1, options.context - np.arange(batch) * 37 % _STEPS)
    step = cache.begin_step(seq_ids, lengths)
    cache.end_step(step, random.integers(0, 50_000, int(lengths.sum())) if publish else None)
    tokens = random.integers(0, 50_000, batch) if publish else None

    def decode() -> None:
        for _ in range(_STEPS):
            cache.end_step(cache.begin_step(seq_ids, 1), tokens)

    times = []
    for _ in range(options.repeats):
        times.append(_seconds(decode) / _STEPS)
        cache.truncate(seq_ids, lengths)
    return cache, times


def _measure_blocks(chosen: list[tuple[str, dict[str, Any]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"\nAllocate and free, ns per block, mixed sizes on offer, pool of 1 M tokens, best of {options.repeats}:")
    print(f"{'allocator':<16} {'batch':>6} {'allocate':>10} {'free':>10} {'metadata B/granule':>20}")
    rows = []
    for name, extra in chosen:
        pool = create(name, 1 << 17, **extra)
        for batch in (1, 64, 4096):
            sizes = np.random.default_rng(0).choice([size // 8 for size in pool.block_sizes], batch).astype(np.int32)
            rounds = max(1, 4096 // batch // 4)
            allocate_best = free_best = float("inf")
            for _ in range(options.repeats):
                allocating, freeing = _time_blocks(pool, sizes, rounds)
                allocate_best = min(allocate_best, allocating / rounds / batch)
                free_best = min(free_best, freeing / rounds / batch)
            row = {
                "allocator": _label(name, extra),
                "batch": batch,
                "allocate_ns": allocate_best * 1e9,
                "free_ns": free_best * 1e9,
                "metadata_bytes_per_granule": pool.stats().metadata_nbytes / pool.num_granules,
            }
            rows.append(row)
            print(
                f"{row['allocator']:<16} {batch:>6} {row['allocate_ns']:>10.1f} {row['free_ns']:>10.1f} "
                f"{row['metadata_bytes_per_granule']:>20.2f}"
            )
    return rows


def _time_blocks(pool: BlockAllocator, sizes: NDArray[np.int32], rounds: int) -> tuple[float, float]:
    granted = []
    start = time.perf_counter()
    for _ in range(rounds):
        granted.append(pool.allocate(sizes))  # noqa: PERF401 - as a caller would
    middle = time.perf_counter()
    for starts in granted:
        pool.free(starts, sizes)
    return middle - start, time.perf_counter() - middle


def _label(name: str, extra: dict[str, Any]) -> str:
    return name + "".join(f"/{value}" for value in extra.values())


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
