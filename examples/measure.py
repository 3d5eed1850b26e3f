"""What a token takes in the example engine on a GPU, beside transformers: `python -m examples.measure --help`.

The model has the shape of SmolLM2-135M and drawn weights. A step gives every sequence one more token: room in the
cache, the model, sampling, and the tokens back on the host. Its figure is the mean over many steps, the best of three
rounds. "Ahead": the device decodes 32 tokens of each sequence before the host looks again.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable

import torch
import transformers

from allocators._command_line import Parser, integer
from examples.busy import busy_cores
from examples.engine import Engine, Request
from examples.llama import PackedLlama
from examples.steps import capture
from kvtoolkit import GraphStep, KVCache

_ROUNDS, _STEPS = 3, 64


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m examples.measure", description=__doc__)
    parser.add_argument("--batch", type=integer(1), nargs="+", default=[1, 8, 64], help="sequences")
    parser.add_argument("--context", type=integer(1), default=1024, help="tokens of each when the measurement begins")
    parser.add_argument(
        "--peers", action="store_true", help="transformers, too: dynamic cache, and static with compile"
    )
    parser.add_argument(
        "--logits", action="store_true", help="how far those of captured, fused steps are from eager ones"
    )
    parser.add_argument("--busy", action="store_true", help="beside one process for each core that never rests")
    parser.add_argument("--only", nargs="+", help="what has one of these in its name")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("measure: expected a CUDA device that torch can use, found none", file=sys.stderr)
        return 2
    model = make_model()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{'ms a step, context ' + str(options.context):<44}" + "".join(f"{f'batch {n}':>12}" for n in options.batch))
    for batch in options.batch if options.logits else ():
        largest, relative = difference(model, batch, options.context)
        print(f"logits of batch {batch}: at most {largest:.4f} apart, {relative:.5f} in L2")
    with busy_cores() if options.busy else contextlib.nullcontext():
        for name, measure in kinds(model, options).items():
            if not options.only or any(part in name for part in options.only):
                print(f"{name:<44}" + "".join(times_of(name, measure, options.batch)), flush=True)
    return 0


def difference(model: torch.nn.Module, batch: int, context: int) -> tuple[float, float]:
    """How far the logits of a captured, fused step are from those of an eager one: the largest, and relative in L2."""
    eager, fused = (
        logits_of(packed, batch, context) for packed in (PackedLlama(model), PackedLlama(model, fused=True))
    )
    apart = (eager - fused).abs()
    return float(apart.max()), float(apart.norm() / eager.norm())


@torch.inference_mode()
def logits_of(model: PackedLlama, batch: int, context: int) -> torch.Tensor:
    """``[batch, vocab_size]`` float32 logits of a decode step after prompts; a fused model runs it as a graph."""
    cache = KVCache(model.cache_config(num_tokens=batch * (context + 64), max_seqs=batch))
    seq_ids, _ = cache.open([[]] * batch)
    for i, row in enumerate(seq_ids):
        with cache.begin_step([row], context) as step:
            prompt = torch.tensor([(7 * i + 3 * k) % 49152 for k in range(context)])
            model.forward(prompt, torch.arange(context), step)
            cache.end_step(step)
    tokens, positions = torch.arange(batch, device="cuda"), torch.full((batch,), context, device="cuda")
    with cache.begin_step(seq_ids, 1) as step:
        if not model.is_fused:
            return model.forward(tokens, positions, step).float()
        fixed, out = GraphStep(cache, batch), torch.empty(batch, model.vocab_size, device="cuda")
        fixed.load(step)
        capture(lambda: out.copy_(model.forward(tokens, positions, fixed.begin()))).replay()
        return out


def times_of(name: str, measure: Callable[[int], float], batches: list[int]) -> list[str]:
    """A column for each batch: milliseconds, or the error of a peer."""
    times = []
    for batch in batches:
        try:
            times.append(f"{measure(batch):>12.3f}")
        except Exception as error:  # of a peer
            if not name.startswith("transformers"):
                raise
            times.append(f"{type(error).__name__:>12.11}")
    return times


def make_model() -> torch.nn.Module:
    """A model of the shape of SmolLM2-135M, in bfloat16, on the GPU."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def kinds(model: torch.nn.Module, options: argparse.Namespace) -> dict[str, Callable[[int], float]]:
    """What is measured, by name: each takes a batch and gives milliseconds."""
    fused = PackedLlama(model, fused=True)
    found: dict[str, Callable[[int], float]] = {
        "engine, eager": lambda batch: ours(PackedLlama(model), batch, options, captured=False),
        "captured": lambda batch: ours(PackedLlama(model), batch, options, ahead=1),
        "captured, fused": lambda batch: ours(fused, batch, options, ahead=1),
        "captured, fused, ahead": lambda batch: ours(fused, batch, options),
        "captured, fused, ahead, drawn": lambda batch: ours(fused, batch, options, 0.8),
        "captured, fused, ahead, drawn, top_p 0.9": lambda batch: ours(fused, batch, options, 0.8, 0.9),
    }
    if options.peers:
        found["transformers, dynamic cache"] = lambda batch: peer(model, batch, options, None)
        found["transformers, static cache and compile"] = lambda batch: peer(model, batch, options, "static")
    return found


def ours(
    model: PackedLlama, batch: int, options: argparse.Namespace, temperature: float = 0.0, top_p: float = 1.0, *,
    captured: bool = True, ahead: int = 32,
) -> float:  # fmt: skip
    """Milliseconds of a decode step of the engine."""
    # the first sequences decode while the last prompts are fed
    length = options.context + _ROUNDS * _STEPS + 64 + batch * options.context // 2048
    size = {"num_tokens": batch * (-(-length // 64) + 1) * 64, "max_seqs": batch, "max_seq_len": length + 8}
    engine = Engine(
        model, model.cache_config(**size), max_batch=batch, max_step_tokens=2048, captured=captured, ahead=ahead
    )
    for i in range(batch):
        prompt = [(7 * i + 3 * k) % 49152 for k in range(options.context)]
        engine.add(Request(prompt, length - options.context, temperature, i, top_p))

    def decode(count: int) -> None:
        """Give every sequence so many tokens, or a few more."""
        wanted = engine.num_decoded + batch * count
        while engine.running and engine.num_decoded < wanted:
            engine.step()

    while engine.waiting or any(not request.output for request in engine.running):
        engine.admit()
        engine.step()
    decode(1)  # everything is captured now
    best = float("inf")
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        before, begin = engine.num_decoded, time.perf_counter()
        decode(_STEPS)
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / (engine.num_decoded - before) * batch * 1e3)
    return best


@torch.inference_mode()
def peer(model: torch.nn.Module, batch: int, options: argparse.Namespace, cache: str | None) -> float:
    """Milliseconds of a decode step of transformers: from the times of a long and a short generation."""
    prompts = torch.randint(49152, (batch, options.context), device="cuda")
    fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "cache_implementation": cache}

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(prompts, max_new_tokens=count, min_new_tokens=count, **fixed)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds(1 + _STEPS)
    return min(seconds(1 + _STEPS) - seconds(1) for _ in range(_ROUNDS)) / _STEPS * 1e3


if __name__ == "__main__":
    raise SystemExit(main())
