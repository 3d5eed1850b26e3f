"""Fuzz moves to and from host memory: ``python -m fuzz.host_memory [steps] [--seed N] [--host]``. Prints its seed.

Two caches get the same calls: a small one with host memory, and one that has all of it on the device. Sequences decode,
sleep, wake, are cut, forked, closed and opened anew, while blocks move beside the kernels that read them. The results
of every step must be equal to the bit. ``--host`` runs on the CPU, with copies that end late.
"""

import sys
import time
from typing import Any

import numpy as np

from allocators._command_line import Parser, integer
from kvtoolkit import CacheConfig, KVCache
from tests.kvtoolkit.cache.late_transfers import LateTransfers

LAYERS, HEADS, HEAD_DIM, MOST = 3, 2, 64, 12
HOST = {"host": "16 MiB", "hot": 64, "pinned_tokens": 64}
CONFIGS: list[dict[str, Any]] = [
    {"tiers": HOST},
    {"tiers": {**HOST, "staging": 512}, "growth": "append"},
    {"tiers": HOST, "growth": "lazy_merge", "allocator": "slab"},
    {"tiers": {**HOST, "host": "1 MiB"}, "allocator": "lockfree"},
]


class Program:
    """The two caches, and what each sequence holds in both."""

    def __init__(self, config: dict[str, Any], rng: np.random.Generator, on_host: bool) -> None:
        self.rng, self.on_host, self.num_steps, self.differs = rng, on_host, 0, 0
        shape = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM, "max_seqs": 2 * MOST}
        shape |= {"dtype": "float16", "max_seq_len": 700, "backend": "cpu" if on_host else "cuda"}
        if not on_host:
            import torch

            torch.cuda.init()
            torch.manual_seed(0)
        self.caches = [
            KVCache(CacheConfig(**shape, num_tokens=2048, **config)),
            KVCache(CacheConfig(**shape, num_tokens=1 << 14)),
        ]
        if on_host:
            storage = self.caches[0]._group.storage
            storage.transfers = LateTransfers(storage.transfers)
        self.ids: list[np.ndarray] = [np.empty(0, np.int64)] * 2
        self.wrong: Any = 0 if on_host else __import__("torch").zeros((), dtype=torch.int64, device="cuda")

    def words(self, count: int) -> list[Any]:
        """Keys, values and queries of one layer."""
        if self.on_host:
            return [self.rng.standard_normal((count, heads, HEAD_DIM)).astype(np.float16) for heads in (2, 2, 8)]
        import torch

        return [torch.randn(count, heads, HEAD_DIM, device="cuda").half() for heads in (2, 2, 8)]

    def step(self, which: np.ndarray, counts: Any) -> None:
        """Append and attend in both; rows for which the small one has no room are left out of the next one."""
        counts = np.broadcast_to(np.asarray(counts, np.int64), (len(which),))
        total = int(counts.sum())
        tokens = self.rng.integers(0, 1 << 60, total)  # keys are drawn, so no two rows may find each other's prefixes
        words, outs = [self.words(total) for _ in range(LAYERS)], []
        for cache, ids in zip(self.caches, self.ids, strict=True):
            with cache.begin_step(ids[which], counts) as step:
                if not step.ok.all():
                    assert cache is self.caches[0], "the large cache has room for everything"
                    return
                found = []
                for layer, (key, value, q) in enumerate(words):
                    step.append(layer, key, value)
                    found.append(step.attend(layer, q))
                outs.append(found)
                cache.end_step(step, tokens)
        for one, other in zip(*outs, strict=True):
            self.wrong = self.wrong + (one != other).any()
        self.num_steps += 1

    def both(self, call: Any) -> list[Any]:
        return [call(cache, ids) for cache, ids in zip(self.caches, self.ids, strict=True)]

    def open_some(self) -> None:
        while (count := len(self.ids[0])) < MOST:
            opened = [cache.open([[]])[0] for cache in self.caches]
            self.ids = [np.concatenate(pair) for pair in zip(self.ids, opened, strict=True)]
            self.step(np.array([count]), int(self.rng.integers(1, 300)))

    def turn(self) -> None:
        """Some calls."""
        rng, small = self.rng, self.caches[0]
        self.open_some()
        order = rng.permutation(len(self.ids[0]))
        asleep, awake = order[:3], order[3:]
        small.offload(self.ids[0][asleep])
        for _ in range(int(rng.integers(1, 6))):
            self.step(awake, 1)
        if rng.random() < 0.5:
            small.prefetch(self.ids[0][asleep])
        self.step(asleep, int(rng.integers(1, 20)))
        kind = int(rng.integers(6))
        if kind == 0:
            lens = [int(rng.integers(0, length + 1)) for length in small.lengths(self.ids[0][order[:2]])]
            self.both(lambda cache, ids: cache.truncate(ids[order[:2]], lens))
        elif kind == 1:
            kept = order[2:]
            self.both(lambda cache, ids: cache.close(ids[order[:2]]))
            self.ids = [ids[kept] for ids in self.ids]
        elif kind == 2:
            self.both(lambda cache, ids: cache.preempt(ids[order[:2]], to="host"))
            self.step(order[2:], 1)
            is_back = small.restore(self.ids[0][order[:2]])
            self.caches[1].restore(self.ids[1][order[:2]])
            if not is_back.all():
                self.both(lambda cache, ids: cache.close(ids[order[:2][~is_back]]))
                self.ids = [np.delete(ids, order[:2][~is_back]) for ids in self.ids]
        elif kind == 3:
            small.compact(256)
        lengths = self.both(lambda cache, ids: cache.lengths(ids))
        too_long = np.flatnonzero(lengths[0] > 600)
        if len(too_long):
            self.both(lambda cache, ids: cache.close(ids[too_long]))
            self.ids = [np.delete(ids, too_long) for ids in self.ids]

    def check(self) -> None:
        """Everything was equal, and both caches are in order."""
        assert int(self.wrong) == 0, f"{int(self.wrong)} results differ after {self.num_steps} steps"
        for cache in self.caches:
            cache.check_integrity()
        lengths = self.both(lambda cache, ids: cache.lengths(ids).tolist())
        assert lengths[0] == lengths[1], lengths


def main() -> int:
    parser = Parser(prog="python -m fuzz.host_memory", description=__doc__)
    parser.add_argument("steps", type=integer(1), nargs="?", default=10_000)
    parser.add_argument("--seed", type=integer(0), default=int(time.time()))
    parser.add_argument("--host", action="store_true", help="on the CPU")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    done, began, runs = 0, time.monotonic(), 0
    while done < options.steps:
        rng = np.random.default_rng([options.seed, runs])
        program = Program(CONFIGS[runs % len(CONFIGS)], rng, options.host)
        runs += 1
        while program.num_steps < min(options.steps - done, options.steps // 8 + 1):
            for _ in range(10):
                program.turn()
            program.check()
        done += program.num_steps
        stats = program.caches[0].stats()
        print(
            f"{done} steps, {time.monotonic() - began:.0f} s; the last {program.num_steps}: {stats.num_offloaded} "
            f"blocks to the host, {stats.num_prefetched} back, {stats.num_evicted} evicted, {stats.num_stalls} stalls",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
