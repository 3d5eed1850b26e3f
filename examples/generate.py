"""SmolLM2-135M answers prompts on the engine of `examples.engine`: `python -m examples.generate --help`."""

import argparse
import contextlib
import itertools
import sys
import time

try:
    import torch
except ModuleNotFoundError:
    sys.exit("generate: this needs torch: pip install 'kvtoolkit[demo]'")

from examples.compare import table
from examples.engine import Engine, Request
from examples.llama import PackedLlama
from examples.watch import watcher
from kvtoolkit import CacheConfig, CacheStats, KVToolkitError, UnsupportedError, warmup
from kvtoolkit.integrations.smollm2 import load_smollm2

PROMPTS = [
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about the sea.",
    "List three uses of a paper clip.",
    "Why do we need sleep?",
    "Tell me a very short story about a lighthouse keeper.",
    "What is the difference between a frog and a toad?",
    "Give me a simple recipe for pancakes.",
]
TIERS = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 64, "cold": "int4"}
SYSTEM = "You are a helpful assistant. Answer briefly, in plain words, and say so if you do not know."


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.generate", description=__doc__)
    parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="PROMPT", help="default: eight of our own")
    parser.add_argument("--config", help="a TOML file such as examples/cache.toml; the options below win over it")
    parser.add_argument("--allocator", help="paged, buddy, slab, lockfree, or package.module:Class")
    parser.add_argument("--growth", help="fixed8 ... fixed64, append, proportional, lazy_merge, adaptive")
    parser.add_argument("--num-tokens", type=int, help="token slots in the pool (default 8192)")
    parser.add_argument(
        "--tiers", action="store_true",
        help="keep 64 tokens as they are, the 64 before them in int8, what is older in int4; 192 new tokens by default",
    )  # fmt: skip
    parser.add_argument("--backend", choices=["cpu", "cuda", "numba"], help="cuda, numba: all on a GPU (default cpu)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default float32, on a GPU float16")
    parser.add_argument("--max-new-tokens", type=int, help="default 64")
    parser.add_argument("--max-batch", type=int, default=16, help="requests that run at once")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.max_new_tokens is None:
        options.max_new_tokens = 192 if options.tiers else 64  # tiers are for what is older than 64 tokens
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with Progress() as progress:
            engine, tokenizer = make_engine(options, progress)
        requests = [
            Request(encode(tokenizer, prompt), options.max_new_tokens, options.temperature, options.seed + i)
            for i, prompt in enumerate(options.prompts)
        ]
        for request in requests:
            engine.add(request)
        seconds = run(engine, requests, options.prompts, tokenizer)
    except (KVToolkitError, ValueError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    report(engine, seconds)
    compare(engine, requests)
    return 0


def make_engine(options: argparse.Namespace, progress: "Progress") -> tuple[Engine, object]:
    """The engine, with everything compiled that it runs, and the tokenizer."""
    backend = backend_of(options)
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else "; this torch is a CPU build"
        raise UnsupportedError(f"backend: {backend!r} needs a CUDA device that torch can use, found none{built}")
    stages = itertools.count()
    model, tokenizer = load_smollm2(
        options.dtype or {"cpu": "float32", "cuda": "float16"}[device],
        progress=lambda text: progress.show(f"SmolLM2: {text}", next(stages), 5),
    )
    packed = PackedLlama(model.to(device))
    config = packed.cache_config(options.config, backend=backend, **cache_options(options))
    if backend != "numba":
        warmup(
            config,
            model.config.num_attention_heads,
            progress=lambda part, done, total: progress.show(f"compiling (once on this machine): {part}", done, total),
        )
    return Engine(packed, config, eos_token_id=tokenizer.eos_token_id, max_batch=options.max_batch), tokenizer


def backend_of(options: argparse.Namespace) -> str:
    """The backend that the command line names, else the file, else the CPU."""
    if options.backend or not options.config:
        return options.backend or "cpu"
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64}  # any: only the backend is asked for
    return CacheConfig.load(options.config, **shape, **cache_options(options)).backend


def cache_options(options: argparse.Namespace) -> dict[str, object]:
    given = {name: getattr(options, name) for name in ("allocator", "growth", "num_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.config is None:
        given = {"num_tokens": 8192, "max_seqs": 64} | given
    if options.tiers:
        given["tiers"] = TIERS
    return given


def encode(tokenizer, prompt: str) -> list[int]:
    """The prompt as a chat. The system message is the same for all, so its keys and values are computed once."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def run(engine: Engine, requests: list[Request], prompts: list[str], tokenizer) -> float:
    """Run to the end, and show it; returns the seconds that it took without the showing."""
    began = time.perf_counter()
    with watcher(requests, prompts, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True).strip()) as watch:
        engine.run(watch.on_step)
    return time.perf_counter() - began - watch.seconds


def report(engine: Engine, seconds: float) -> None:
    """Speed, and the cache's own figures."""
    stats: CacheStats = engine.cache.stats()
    config, average = engine.cache.config, engine.averages
    print(
        f"\n{engine.num_decoded} tokens in {seconds:.1f} s: {engine.num_decoded / seconds:.1f} tokens per second, "
        f"{engine.num_prefilled} prompt tokens computed"
    )
    print(
        f"cache       {config.allocator}, growth {config.growth}, {stats.capacity} slots, {stats.nbytes / 1e6:.0f} MB "
        f"of {config.dtype} on {engine.model.device}"
    )
    print(f"peak use    {stats.peak_used} slots ({stats.peak_used / stats.capacity:.0%})")
    print(f"waste       {average.waste:.1%} of the slots held, mean over {stats.num_steps} steps")
    print(f"blocks      {', '.join(f'{n:.1f} of {size}' for size, n in average.blocks.items())} tokens, mean per step")
    if config.tiers:
        print(
            f"tiers       {', '.join(f'{n:.1f} {name}' for name, n in average.tiers.items())} tokens, mean per step; "
            f"{stats.num_demoted_warm} tiles went to int8, {stats.num_demoted_cold} to int4"
        )
    print(f"entries     {average.entries_per_seq:.1f} per sequence, mean over steps")
    print(
        f"copied      {stats.copied_tokens} tokens, {stats.num_merges} merges ({stats.num_failed_merges} found no room)"
    )
    print(f"reused      {stats.reused_tokens} of {stats.prompt_tokens} prompt tokens found in the cache")
    print(f"preempted   {stats.num_preempted} times, {stats.num_evicted} granules evicted")


def compare(engine: Engine, requests: list[Request]) -> None:
    """The same requests on other caches."""
    print("\nThe same requests and tokens again, without the model (waste, entries per sequence: means over steps)")
    print("\n".join(table(engine, requests)))
    print(
        "While memory is plentiful the growth policy `adaptive` gives a sequence blocks of 64 tokens, since attention\n"
        "reads few long entries faster; the empty rest of the last block is waste. As memory gets short it takes\n"
        "smaller blocks, and merges them when 64 tokens are full. `--growth proportional` wastes less from the start."
    )


class Progress:
    """A progress bar where rich is installed and somebody watches, else a line for each part."""

    def __init__(self) -> None:
        self.bar, self.text = None, ""
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
                from rich.progress import Progress as Bar

                columns = (BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
                self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
                self.task = self.bar.add_task("", total=1)

    def show(self, text: str, done: int, total: int) -> None:
        if self.bar:
            self.bar.update(self.task, description=text, completed=done, total=total)
        elif text != self.text:
            print(f"{text} ({done + 1} of {total})", file=sys.stderr, flush=True)
        self.text = text

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()


if __name__ == "__main__":
    sys.exit(main())
