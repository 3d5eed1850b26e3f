"""SmolLM2-135M answers prompts on the engine of `examples.engine`: `python -m examples.generate --help`."""

import argparse
import contextlib
import itertools
import sys
import time

NEEDS = "generate: this needs {}: pip install 'kvtoolkit[demo]'"

try:  # they take seconds, in which somebody may press Ctrl-C
    import torch

    from allocators._command_line import Parser, integer, number, quietly
    from examples.compare import table
    from examples.engine import Engine, Request
    from examples.llama import PackedLlama
    from examples.watch import watcher
    from kvtoolkit import ArgumentError, CacheConfig, KVToolkitError, UnsupportedError, warmup
    from kvtoolkit.integrations.smollm2 import load_smollm2
except ModuleNotFoundError as error:
    print(NEEDS.format(error.name), file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)

PROMPTS = [
    "What is Paris known for, and what should we see there first?",
    "Why is the sky blue, and why does it turn red in the evening?",
    "Tell me a story about a lighthouse keeper and a lost letter.",
    "Why do we need sleep? Give three reasons and explain each of them.",
    "What is the difference between a frog and a toad?",
    "Give me a simple recipe for pancakes, step by step.",
    "How do I learn to swim as a grown man? What comes first?",
    "List five uses of a paper clip and explain each of them.",
]
POOL = {"num_tokens": 704, "allocator": "buddy", "growth": "lazy_merge", "max_seqs": 64}
"""Too small for all requests at once, so that they have to reuse, merge, evict and give way."""
TIERED_POOL = POOL | {"num_tokens": 3072}
TIERS = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 64, "cold": "int4"}
EXPLANATION = """\
Why `adaptive`, the default of a cache, wastes more while memory is plentiful:
it gives a sequence blocks of 64 tokens then, because attention reads few long
entries faster, and the empty rest of the last block is waste. As memory gets
short it takes smaller blocks."""
SYSTEM = (
    "You are a helpful and friendly assistant. Answer in plain words and in complete sentences, as you would explain "
    "it to a friend at the kitchen table, and begin with what matters most. Give an example where one helps, do not "
    "repeat the question, and say so if you do not know the answer."
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m examples.generate", description=__doc__)
    parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="PROMPT", help="default: eight of our own")
    parser.add_argument("--config", help="a TOML file such as examples/cache.toml; the options below win over it")
    parser.add_argument("--allocator", help="paged, buddy (default), slab, lockfree, or package.module:Class")
    parser.add_argument("--growth", help="fixed8 ... fixed64, append, proportional, lazy_merge (default), adaptive")
    parser.add_argument(
        "--num-tokens", type=integer(1), help="token slots in the pool (default 704, with --tiers 3072)"
    )
    parser.add_argument(
        "--tiers", action="store_true",
        help="keep 64 tokens as they are, the 64 before them in int8, what is older in int4; 192 new tokens by default",
    )  # fmt: skip
    parser.add_argument("--backend", choices=["cpu", "cuda", "numba"], help="cuda, numba: all on a GPU (default cpu)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default float32, on a GPU float16")
    parser.add_argument("--max-new-tokens", type=integer(1), help="default 128, with --tiers 192")
    parser.add_argument("--max-batch", type=integer(1), default=16, help="requests that run at once")
    parser.add_argument("--temperature", type=number(0), default=0.0, help="0 takes the likeliest token")
    parser.add_argument(
        "--top-p", type=number(0.01), default=1.0, help="draw of the likeliest tokens that have so much"
    )
    parser.add_argument("--seed", type=integer(0), default=0)
    parser.add_argument("--eager", action="store_true", help="capture no graphs, and fuse no layers, on a GPU")
    options = parser.parse_args(arguments)
    if options.max_new_tokens is None:
        options.max_new_tokens = 192 if options.tiers else 128  # tiers are for what is older than 64 tokens
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        check(options)
        with Progress() as progress:
            engine, tokenizer = make_engine(options, progress)
        requests = [
            Request(
                encode(tokenizer, prompt), options.max_new_tokens, options.temperature, options.seed + i, options.top_p
            )
            for i, prompt in enumerate(options.prompts)
        ]
        for request in requests:
            engine.add(request)
        seconds = run(engine, requests, options.prompts, tokenizer)
    except (KVToolkitError, ValueError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(NEEDS.format(error.name), file=sys.stderr)
        return 2
    report(engine, seconds)
    compare(engine, requests)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise for what no cache can be made of, and no token drawn by, before the model is loaded."""
    if options.top_p > 1:
        raise ArgumentError(f"--top-p: expected at most 1, got {options.top_p:g}")
    backend = backend_of(options)
    dtype = options.dtype or dtype_of(backend)
    config = configure(options, backend=backend, dtype=dtype)
    limit = config.seq_len_limit - 1  # a prompt has a token or more
    if options.max_new_tokens > limit:
        raise ArgumentError(
            f"--max-new-tokens: expected at most {limit}, for sequences of this cache have at most {limit + 1} tokens, "
            f"got {options.max_new_tokens}"
        )


def configure(options: argparse.Namespace, **fields: object) -> CacheConfig:
    """The configuration of a cache for SmolLM2-135M."""
    fields = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64} | cache_options(options) | fields
    return CacheConfig.load(options.config, **fields) if options.config else CacheConfig(**fields)


def make_engine(options: argparse.Namespace, progress: "Progress") -> tuple[Engine, object]:
    """The engine, with everything compiled that it runs, and the tokenizer."""
    backend = backend_of(options)
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else "; this torch is a CPU build"
        raise UnsupportedError(f"backend: {backend!r} needs a CUDA device that torch can use, found none{built}")
    stages = itertools.count()
    model, tokenizer = load_smollm2(
        options.dtype or dtype_of(backend),
        progress=lambda text: progress.show(f"SmolLM2: {text}", next(stages), 5),
    )
    captures = backend == "cuda" and not options.eager
    packed = PackedLlama(model.to(device), fused=captures)
    config = packed.cache_config(options.config, backend=backend, **cache_options(options))
    if backend != "numba":
        warmup(
            config,
            model.config.num_attention_heads,
            progress=lambda part, done, total: progress.show(f"compiled code, kept for next time: {part}", done, total),
        )
    limits = {"eos_token_id": tokenizer.eos_token_id, "max_batch": options.max_batch}
    return Engine(packed, config, captured=captures, **limits), tokenizer


def backend_of(options: argparse.Namespace) -> str:
    """The backend that the command line names, else the file, else the CPU."""
    if options.backend or not options.config:
        return options.backend or "cpu"
    return configure(options).backend


def dtype_of(backend: str) -> str:
    return "float32" if backend == "cpu" else "float16"


def cache_options(options: argparse.Namespace) -> dict[str, object]:
    given = {name: getattr(options, name) for name in ("allocator", "growth", "num_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.config is None:
        given = (TIERED_POOL if options.tiers else POOL) | given
        if given["allocator"] == "paged" and options.growth is None:
            del given["growth"]  # its own: blocks of one size
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
    """Speed, the cache's own figures, and how often it did what is special about it."""
    stats, config, average = engine.cache.stats(), engine.cache.config, engine.averages
    lines = [
        f"{engine.num_decoded} tokens in {seconds:.1f} s: {engine.num_decoded / seconds:.1f} tokens per second",
        f"cache      {config.allocator}, growth {config.growth}, {stats.capacity} slots, "
        f"{stats.nbytes / 1e6:.0f} MB of {config.dtype} on {engine.model.device}",
        f"peak use   {stats.peak_used} slots ({stats.peak_used / stats.capacity:.0%})",
        f"waste      {average.waste:.1%} of the slots held, mean over {stats.num_steps} steps",
        f"entries    {average.entries_per_seq:.1f} per sequence, mean over steps",
    ]
    if config.has_tiers:
        held = ", ".join(f"{count:.1f} {name}" for name, count in average.tiers.items())
        lines.append(f"tiers      {held} tokens, mean over steps")
        lines.append(f"demotions  {stats.num_demoted_warm} tiles to int8, {stats.num_demoted_cold} to int4")
    lines += [
        f"reuse      {stats.num_prefix_hits} prompts began in the cache: {stats.reused_tokens} of "
        f"{stats.prompt_tokens} prompt tokens",
        f"merges     {stats.num_merges} ({stats.num_failed_merges} found no room), {stats.copied_tokens} tokens copied",
        f"evictions  {stats.num_evicted} granules of 8 tokens",
        f"preempted  {stats.num_preempted} times, to host memory",
    ]
    print("\n".join(lines))


def compare(engine: Engine, requests: list[Request]) -> None:
    """The same requests on other caches."""
    print("\nThe same requests and tokens again, without the model; means over all steps")
    print("\n".join(table(engine, requests)))
    print(EXPLANATION)


class Progress:
    """A progress bar where rich is installed and somebody watches, else a line for each part."""

    def __init__(self) -> None:
        self.bar, self.text = None, ""
        self.out = sys.stderr  # transformers is kept quiet by redirecting sys.stderr, which must not silence this
        if self.out.isatty():
            with contextlib.suppress(ImportError):
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
                from rich.progress import Progress as Bar

                columns = (BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
                self.bar = Bar(*columns, console=Console(file=self.out), transient=True)
                self.task = self.bar.add_task("", total=1)

    def show(self, text: str, done: int, total: int) -> None:
        if self.bar:
            self.bar.update(self.task, description=text, completed=done, total=total)
        elif text != self.text:
            print(f"{text} ({done + 1} of {total})", file=self.out, flush=True)
        self.text = text

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()


if __name__ == "__main__":
    sys.exit(quietly(main))
