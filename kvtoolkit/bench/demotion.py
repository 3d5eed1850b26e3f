"""What demotion costs a GPU cache as it decodes, and what one sequence of a million tokens costs.

The first part decodes sequences that began together, step by step, every layer appended to and attended: the time of
each step on the GPU, and of the conversions in it, by events. The second fills one long sequence with random tokens and
compares its attention with float64 over the codes it holds.
"""

import argparse
import math
import time
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit.bench.timing import device_line, event_times, require_device
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.formats.quantized import INT4, INT8

_TIERS = {"hot": 256, "warm": "int8", "warm_tokens": 2048, "cold": "int4", "pinned_tokens": 64}
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench demotion``."""
    parser.add_argument("--batch", type=integer(1), default=64, help="sequences")
    parser.add_argument("--length", type=integer(1), default=8192, help="tokens at the start")
    parser.add_argument("--layers", type=integer(1), default=8)
    parser.add_argument("--steps", type=integer(1), default=256, help="decode steps")
    parser.add_argument(
        "--long", type=integer(0), default=1 << 20, help="tokens of the one long sequence; 0 = leave it out"
    )


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    require_device("demotion")
    print(device_line())
    print("bfloat16, 32 query and 8 kv heads of 128, tiers 256 / 2048 / rest, 64 pinned tokens\n")
    _decode(options.batch, options.length, options.layers, options.steps)
    if options.long:
        _long(options.long)
    return 0


def _shares(batch: int, length: int) -> dict[str, float]:
    """Shares of memory in proportion to what sequences of a length fill of each tier, and some more for the hot one."""
    hot, warm = 256 + 64 + 512, 2048 + 128
    nbytes = np.array([512.0 * hot, 260.0 * warm, 140.0 * max(64, length - 2048)])
    shares = nbytes / nbytes.sum()
    return dict(zip(("hot", "warm", "cold"), shares.tolist(), strict=True))


def _config(num_layers: int, batch: int, length: int) -> CacheConfig:
    per_token = 512 * (256 + 64 + 512) + 260 * (2048 + 128) + 140 * length
    return CacheConfig(
        num_layers=num_layers, num_kv_heads=_KV_HEADS, head_dim=_HEAD_DIM, dtype="bfloat16", backend="cuda",
        memory=int(1.1 * num_layers * _KV_HEADS * batch * per_token) + (64 << 20), prefix_caching=False,
        max_seqs=batch, tiers={**_TIERS, "tier_memory": _shares(batch, length)},
    )  # fmt: skip


def _decode(batch: int, length: int, num_layers: int, num_steps: int) -> None:
    import torch

    cache = KVCache(_config(num_layers, batch, length + num_steps + 64))
    seq_ids, _ = cache.open([[]] * batch)
    tokens = torch.randn(batch, _KV_HEADS, _HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(batch, _HEADS, _HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    for _ in range(length // 256):  # what they hold does not matter here
        with cache.begin_step(seq_ids, 256) as step:
            _require_room(step)
            cache.end_step(step)
    conversions: list[tuple[Any, Any, int]] = []
    storage = cache._state.group.storage
    convert = storage.convert_tiles

    def timed(sources: Any, targets: Any) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        convert(sources, targets)
        end.record()
        conversions.append((begin, end, len(targets)))

    def decode() -> None:
        with cache.begin_step(seq_ids, 1) as step:
            _require_room(step)
            for layer in range(num_layers):
                step.append(layer, tokens, tokens)
                step.attend(layer, q)
            cache.end_step(step)

    # until the demotions that filling the cache left are done
    while True:
        before = cache.stats().num_demoted_warm + cache.stats().num_demoted_cold
        for _ in range(64):
            decode()
        after = cache.stats().num_demoted_warm + cache.stats().num_demoted_cold
        if after - before <= 2 * batch + batch // 4:
            break
    storage.convert_tiles = timed  # type: ignore[method-assign]
    torch.cuda.synchronize()
    times = np.array(event_times(decode, num_steps))
    converting = np.array([begin.elapsed_time(end) * 1e3 for begin, end, _ in conversions])
    moved = np.array([count for *_, count in conversions])
    storage.convert_tiles = convert  # type: ignore[method-assign]
    rest, median, most = times.sum() - converting.sum(), float(np.median(times)), converting.max(initial=0.0)
    print(f"{batch} sequences that began together, {length} tokens and more, {num_layers} layers, {num_steps} steps")
    print(f"  a step            {median:9.1f} us median, p99 {np.percentile(times, 99):.1f}, {times.max():.1f} at most")
    print(f"  tiles moved       {moved.sum()} in {len(moved)} steps, {moved.max(initial=0)} at most in one")
    print(f"  conversions       {converting.sum() / num_steps:9.1f} us a step, {most:.1f} at most in one")
    print(f"  because of them   {1 + most / median:9.2f} times the median, at most")
    print(f"  of the rest       {converting.sum() / rest:9.2%} of the time of appends and attention\n")


def _require_room(step: Any) -> None:
    if not step.ok.all():
        raise MemoryError(f"bench demotion: {step.explain()[0]}")


def _long(length: int) -> None:
    import torch

    cache = KVCache(_config(1, 1, length + 1024))
    seq_ids, _ = cache.open([[]])
    torch.manual_seed(0)
    begin = time.perf_counter()
    for first in range(0, length, 256):
        count = min(256, length - first)
        key, value = torch.randn(2, count, _KV_HEADS, _HEAD_DIM, dtype=torch.bfloat16, device="cuda").unbind()
        with cache.begin_step(seq_ids, count) as step:
            _require_room(step)
            step.append(0, key, value)
            cache.end_step(step)
    torch.cuda.synchronize()
    filled = time.perf_counter() - begin
    q = torch.randn(1, _HEADS, _HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    with cache.begin_step(seq_ids, 0) as step:
        table, starts = step.block_table[0].copy(), step.block_starts[0].copy()
    token = torch.randn(1, _KV_HEADS, _HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    step = cache.begin_step(seq_ids, 1)
    _require_room(step)
    step.append(0, token, token)
    out = step.attend(0, q)
    table, starts, seq_len = step.block_table[0].copy(), step.block_starts[0].copy(), int(step.seq_lens[0])
    times = event_times(lambda: step.attend(0, q), 50)
    error = _error(cache, table, starts, seq_len, q[0], out[0])
    cache.end_step(step)
    tiers = cache.stats().tiers
    used = sum(one.used * one.nbytes / one.capacity for one in tiers.values())
    print(f"one sequence of {seq_len} tokens, one layer; filled in {filled:.1f} s")
    for name, one in tiers.items():
        print(f"  {name:<18}{one.used:>9} tokens")
    print(f"  bytes             {used / 1e9:9.3f} GB, 16 bit would need {seq_len * _KV_HEADS * 512 / 1e9:.3f} GB")
    print(f"  attention         {np.median(times):9.1f} us a token and layer")
    print(f"  error             {error:9.1e} relative L2 against float64 on the same codes, 2 kv heads")


def _error(cache: KVCache, table: Any, starts: Any, seq_len: int, q: Any, out: Any) -> float:
    import torch

    caches = cache.tier_caches(0)
    group = _HEADS // _KV_HEADS
    wrong = total = 0.0
    for head in (0, _KV_HEADS - 1):
        keys, values = torch.empty(2, -(-seq_len // 64) * 64, _HEAD_DIM, dtype=torch.float64, device="cuda").unbind()
        keys.zero_(), values.zero_()
        for tier in range(3):
            which = np.flatnonzero((table >= 0) & (table >> 27 == tier))
            first = caches.first_granules[tier]
            if tier == 0:
                for e in which:
                    granule, count, start = (table[e] & 0xFFFFFF) - first, ((table[e] >> 24) & 7) + 1, int(starts[e])
                    for to, cached in ((keys, caches.k_cache), (values, caches.v_cache)):
                        held = torch.from_dlpack(cached[granule : granule + count, head]).view(torch.bfloat16)
                        to[8 * start : 8 * (start + int(count))] = held.reshape(-1, _HEAD_DIM).double()
                continue
            blocks = ((table[which] & 0xFFFFFF) - first) >> 3
            arena, form = (caches.warm, INT8) if tier == 1 else (caches.cold, INT4)
            held = arena[blocks.tolist(), head].get()
            places = torch.from_numpy(starts[which].astype(np.int64) // 8).cuda()
            for to, decoded in zip((keys, values), form.decode(held, _HEAD_DIM), strict=True):
                to.view(-1, 64, _HEAD_DIM)[places] = torch.from_numpy(decoded).cuda().double()
        mine = slice(head * group, (head + 1) * group)
        scores = q[mine].double() @ keys[:seq_len].T * _HEAD_DIM**-0.5
        good = scores.softmax(-1) @ values[:seq_len]
        wrong += float((out[mine].double() - good).square().sum())
        total += float(good.square().sum())
    return math.sqrt(wrong / total)
