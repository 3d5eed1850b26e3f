"""Fuzz steps that the device drives: ``python -m fuzz.device_steps [steps] [--seed N] [--host]``. Prints its seed.

A small pool serves more sequences than it has room for. They finish at random places, stall, go on when there is room
again, are preempted, forked, cut and opened anew, and their tokens are merged, quantized or let go by windows. Every
step checks what it reads by canaries (``KVTOOLKIT_CHECK=canary``). After each turn the host checks that all slots are
accounted for, and how long each sequence is. ``--host`` runs the kernels in host memory, where there is no GPU.
"""

import sys
import time
from typing import Any

import numpy as np
import pytest

from allocators._command_line import Parser, integer
from kvtoolkit import CacheConfig, CacheFullError, DeviceSteps, KVCache
from kvtoolkit.cuda import check
from kvtoolkit.cuda.pool import can_be_made
from tests.kvtoolkit.cache.host_device import make_cache, use_host

BATCH, MOST, EOS = 12, 32, 7
TIERS = {
    "hot": 64,
    "pinned_tokens": 0,
    "warm": "int8",
    "cold": "int4",
    "tier_memory": {"hot": 0.5, "warm": 0.25, "cold": 0.25},
}
WINDOW = [{"layers": [0], "num_tokens": 2048}, {"layers": [1], "window": 40, "num_tokens": 1536}]
CONFIGS: list[dict[str, Any]] = [
    {"num_tokens": 1280, "growth": "adaptive"},
    {"num_tokens": 3072, "growth": "lazy_merge", "allocator": "slab"},
    {"num_tokens": 6144, "tiers": TIERS, "prefix_caching": False},
    {"layer_groups": WINDOW},
]


class Program:
    """A cache, the steps of the device on it, and what each sequence should hold."""

    def __init__(self, config: dict[str, Any], rng: np.random.Generator, on_host: bool) -> None:
        self.rng, self.on_host = rng, on_host
        shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "max_seqs": 64, "max_seq_len": 400}
        if on_host:
            self.cache = make_cache(**{**shape, "dtype": "float16", **config})
        else:
            import torch

            torch.cuda.init()  # the arrays of the steps are tensors where the program uses torch
            self.cache = KVCache(CacheConfig(**{**shape, "dtype": "bfloat16", "backend": "cuda", **config}))
        self.steps = DeviceSteps(self.cache, BATCH, MOST)
        self.tokens: dict[int, list[int]] = {}  # what each sequence holds
        self.preempted: set[int] = set()
        self.num_steps = self.num_stalls = self.num_finished = 0
        self.make_model()

    def make_model(self) -> None:
        if self.on_host:
            self.weights = np.random.default_rng(0).standard_normal((3, 128, 4, 64)).astype(np.float16)
            return
        import torch

        from examples.steps import capture

        torch.manual_seed(0)
        self.weights = torch.randn(3, 128, 4, 64, device="cuda").bfloat16()
        self.graph = capture(self.compute)

    def forward(self, tokens: Any, step: Any) -> Any:
        """The next token of each row."""
        q, keys, values = (one[tokens] for one in self.weights)
        for layer in range(2):
            step.append(layer, keys[:, 2 * layer : 2 * layer + 2], values[:, 2 * layer : 2 * layer + 2])
            q = q + step.attend(layer, q, window_size=(39, 0) if layer else (-1, -1))
        if self.on_host:
            return (np.nan_to_num(q.astype(np.float32).sum((1, 2))) * 100).astype(np.int64) % 128
        return q.float().sum((1, 2)).mul(100).long().remainder(128)

    def compute(self) -> None:
        """One token more in each row."""
        steps = self.steps
        chosen = self.forward(steps.tokens, steps.begin())
        is_ok = steps.status == 0
        if self.on_host:
            steps.tokens[:] = np.where(is_ok, chosen, steps.tokens)
            steps.finished[:] |= is_ok & (chosen == EOS)
            return
        import torch

        steps.tokens.copy_(torch.where(is_ok, chosen, steps.tokens))
        steps.finished.logical_or_(is_ok & (chosen == EOS))

    def feed(self, ids: list[int], pieces: list[list[int]]) -> None:
        """Feed prompts on the host, as far as there is room."""
        flat = np.array([token for piece in pieces for token in piece], np.int64)
        with self.cache.begin_step(ids, [len(piece) for piece in pieces], flat) as step:
            given = flat if self.on_host else __import__("torch").from_numpy(flat).cuda()
            self.forward(given, step)
            self.cache.end_step(step)
            for ok, seq_id, piece in zip(step.ok, ids, pieces, strict=True):
                if ok:
                    self.tokens[seq_id] += piece

    def open_some(self) -> None:
        while len(self.tokens) < 24:
            prompt = [int(token) for token in self.rng.integers(8, 16, int(self.rng.integers(1, 80)))]
            (seq_id,), (held,) = (part.tolist() for part in self.cache.open([prompt]))
            self.tokens[seq_id] = prompt[:held]
            self.feed([seq_id], [prompt[held:]])

    def turn(self) -> None:
        """Some steps of the device."""
        rng, open_ones = self.rng, [one for one in self.tokens if one not in self.preempted]
        ids = [int(one) for one in rng.permutation(open_ones)[:BATCH]]
        if not ids:
            return
        num_steps = int(rng.integers(1, MOST + 1))
        held = self.cache.lengths(ids)
        first = rng.integers(0, 128, len(ids))
        max_lens = np.minimum(held + rng.integers(0, 60, len(ids)), 400)
        planned = int(rng.integers(1, num_steps + 1))
        self.steps.load(ids, first, planned, max_lens=max_lens)
        for i in range(num_steps):
            if i == planned:
                self.steps.refill(num_steps - planned)
            if rng.random() < 0.02:
                self.steps.finished[int(rng.integers(len(ids)))] = True
            if rng.random() < 0.1:
                self.steps.poll()
            self.compute() if self.on_host else self.graph.replay()
        if rng.random() < 0.03:
            self.steps.abort()
        else:
            turn = self.steps.finish()
            assert (held + turn.num_new <= max_lens).all()
            for row, seq_id in enumerate(ids):
                self.tokens[seq_id] += turn.history[row, : turn.num_new[row]].tolist()
            self.num_stalls += int((turn.status == 1).sum())
            for seq_id in np.array(ids)[turn.finished].tolist():
                self.num_finished += 1
                self.cache.close([seq_id])
                del self.tokens[seq_id]
        self.num_steps += num_steps

    def host_turn(self) -> None:
        """Something else that engines do."""
        rng, cache = self.rng, self.cache
        if back := sorted(self.preempted):
            for seq_id, ok in zip(back, cache.restore(back), strict=True):
                if ok:
                    self.preempted.discard(seq_id)
        ids = [one for one in self.tokens if one not in self.preempted]
        if not ids:
            return
        seq_id, kind = int(rng.choice(ids)), int(rng.integers(6))
        try:
            if kind == 0:
                cache.preempt([seq_id], to="host")
                self.preempted.add(seq_id)
            elif kind == 1:
                self.tokens[int(cache.fork([seq_id], 1)[0, 0])] = list(self.tokens[seq_id])
            elif kind == 2 and not cache.config.is_grouped:
                keep = int(rng.integers(len(self.tokens[seq_id]) + 1))
                cache.truncate([seq_id], [keep])
                del self.tokens[seq_id][keep:]
            elif kind == 3:
                cache.compact(256)
            elif kind == 4 or len(self.tokens) > 40:
                cache.close([seq_id])
                del self.tokens[seq_id]
        except CacheFullError:
            pass

    def check(self) -> None:
        """All slots are accounted for, and every sequence has its length."""
        for group in self.cache.stats().groups:
            parts = (group.free, group.used, group.cached, group.kept_back, group.callers, group.pinned)
            assert sum(parts) == group.capacity, parts
            assert group.callers == 0
        ids = [one for one in self.tokens if one not in self.preempted]
        assert self.cache.lengths(ids).tolist() == [len(self.tokens[one]) for one in ids]


def run(config: dict[str, Any], num_steps: int, seed: int, on_host: bool) -> Program:
    """Run a program of so many steps, and end all sequences; what is left must be nothing."""
    program, turns = Program(config, np.random.default_rng(seed), on_host), 0
    while program.num_steps < num_steps:
        program.open_some()
        program.turn()
        program.host_turn()
        program.check()
        turns += 1
        if turns % 50 == 0:
            program.cache.check_integrity()
    program.cache.close(list(program.tokens))
    program.cache.clear_prefixes()
    program.cache.check_integrity()
    stats = program.cache.stats()
    assert stats.used == stats.cached == stats.callers == 0, stats
    return program


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m fuzz.device_steps", description=__doc__)
    parser.add_argument("steps", type=integer(len(CONFIGS)), nargs="?", default=10_000, help="in all; default 10000")
    parser.add_argument("--seed", type=integer(0), default=time.time_ns() % 1_000_000)
    parser.add_argument("--host", action="store_true", help="run the kernels in host memory; needs g++")
    options = parser.parse_args(arguments)
    if not options.host and not can_be_made():
        print("fuzz.device_steps: expected a CUDA device, found none; --host needs none", file=sys.stderr)
        return 2
    print(f"seed {options.seed}", flush=True)
    check.CANARY = True
    with pytest.MonkeyPatch.context() as patch:
        if options.host:
            use_host(patch)
        for i, config in enumerate(CONFIGS):
            begin = time.perf_counter()
            program = run(config, options.steps // len(CONFIGS), options.seed + i, options.host)
            print(
                f"{config}: {program.num_steps} steps, {program.num_finished} sequences finished, {program.num_stalls} "
                f"rows stalled at the end of a turn, {time.perf_counter() - begin:.1f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
