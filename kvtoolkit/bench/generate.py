"""SmolLM2 on the CPU with transformers: prefill and decode on its own DynamicCache (SDPA) and on kvtoolkit's cache.

Both run in one process, one after the other within each repetition, on the same prompts; greedy, without the rest of
``generate``. The tokens of the two are compared before anything is timed. kvtoolkit's pool is made once, as an engine's
is, so that no timed run is the first to touch its memory.
"""

import argparse
import platform
import time
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit._version import __version__
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.integrations.smollm2 import load_smollm2

_CACHES = ("DynamicCache", "kvtoolkit")
_UNDECIDED = 1e-4  # two best logits closer than this: either token is right


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench generate``."""
    parser.add_argument("--batch", type=integer(1), nargs="+", default=[1, 8], help="prompts at once")
    parser.add_argument("--prompt", type=integer(1), default=512, help="tokens in each prompt")
    parser.add_argument("--new", type=integer(1), default=128, help="tokens generated for each")
    parser.add_argument("--repeats", type=integer(1), default=5, help="repetitions of each")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=integer(1), help="threads of torch and of kvtoolkit; default: all cores")
    parser.add_argument("--allocator", default="buddy", help="by name or 'package.module:Class'")
    parser.add_argument("--growth", help="growth policy; default: the allocator's own")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    model, _ = load_smollm2(options.dtype, progress=lambda text: print(f"{text} ...", flush=True))
    import torch
    import transformers

    from kvtoolkit import cpu

    if options.threads:
        torch.set_num_threads(options.threads)
        cpu.set_num_threads(options.threads)
    print(
        f"\nkvtoolkit {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads\n"
        f"SmolLM2-135M, {options.dtype}, {options.prompt} tokens in, {options.new} out: "
        f"tokens/s, median of {options.repeats} (best)"
    )
    print(f"{'batch':>5}  {'':<8}" + "".join(f"{name:>24}" for name in _CACHES) + f"{'ratio':>16}   same tokens")
    rows = [_measure(model, batch, options) for batch in options.batch]
    found = {"version": __version__, "dtype": options.dtype, "prompt": options.prompt, "new": options.new}
    write_json(options.json, {**found, "rows": rows})
    return 0


def _measure(model: Any, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    tokens = np.random.default_rng(0).integers(100, model.config.vocab_size, (batch, options.prompt))
    prompt = torch.from_numpy(tokens)
    pool = _make_pool(model, batch, options)
    same = _compare(model, pool, prompt, options)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in _CACHES}
    for _ in range(options.repeats):
        for name in _CACHES:
            prefill, decode, _, _ = _generate(model, name, pool, prompt, options.new)
            seconds[name].append((prefill, decode))
    row: dict[str, Any] = {"batch": batch, "same_tokens": same}
    for i, (phase, count) in enumerate((("prefill", options.prompt), ("decode", options.new - 1))):
        if not count:
            continue
        line, medians, bests = f"{batch:>5}  {phase:<8}", [], []
        for name in _CACHES:
            speeds = [batch * count / pair[i] for pair in seconds[name]]
            medians.append(float(np.median(speeds)))
            bests.append(max(speeds))
            row[f"{phase}_{name}"] = {"median": medians[-1], "best": bests[-1]}
            line += f"{medians[-1]:>14.1f} ({bests[-1]:>6.1f})"
        row[f"{phase}_ratio"] = medians[1] / medians[0]
        print(f"{line}{medians[1] / medians[0]:>8.2f} ({bests[1] / bests[0]:.2f})   {same}", flush=True)
    return row


def _compare(model: Any, pool: Any, prompt: Any, options: argparse.Namespace) -> str:
    """How many tokens agree, up to the first position in each row where two tokens are equally likely."""
    runs = [_generate(model, name, pool, prompt, options.new) for name in _CACHES]
    expected, got, gaps = runs[0][2], runs[1][2], runs[0][3]
    total = agreeing = 0
    for row in range(len(prompt)):
        undecided = np.flatnonzero(gaps[row] < _UNDECIDED)
        end = int(undecided[0]) if len(undecided) else options.new
        total += end
        agreeing += int((np.cumsum(expected[row, :end] != got[row, :end]) == 0).sum())
    return f"{agreeing} of {total}"


def _make_pool(model: Any, batch: int, options: argparse.Namespace) -> Any:
    from kvtoolkit.cache.kv_cache import KVCache
    from kvtoolkit.integrations.transformers import cache_config

    slots = batch * (options.prompt + options.new + 64)
    chosen = {"allocator": options.allocator, "growth": options.growth}
    return KVCache(cache_config(model, num_tokens=slots + slots // 8, max_seqs=batch, **chosen))


def _generate(model: Any, name: str, pool: Any, prompt: Any, new: int) -> tuple[float, float, Any, Any]:
    """Generate greedily; ``(prefill seconds, decode seconds, tokens, gaps between the two best logits)``."""
    import torch
    from transformers import DynamicCache

    from kvtoolkit.integrations.transformers import TransformersCache, use_kvtoolkit

    cache: Any
    if name == "kvtoolkit":
        use_kvtoolkit(model)
        cache = TransformersCache(pool)
    else:
        model.set_attn_implementation("sdpa")
        cache = DynamicCache(config=model.config)
    chosen: list[Any] = []
    gaps: list[Any] = []
    with torch.inference_mode():
        start = time.perf_counter()
        logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        prefilled = time.perf_counter()
        for i in range(new):
            if i:
                logits = model(chosen[-1][:, None], past_key_values=cache).logits[:, -1]
            best = logits.topk(2)
            chosen.append(best.indices[:, 0])
            gaps.append(best.values[:, 0] - best.values[:, 1])
        done = time.perf_counter()
    cache.reset()
    return (
        prefilled - start,
        done - prefilled,
        torch.stack(chosen, 1).numpy(),
        torch.stack(gaps, 1).float().numpy(),
    )
