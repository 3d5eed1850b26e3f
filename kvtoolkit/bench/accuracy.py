"""What quantized tiers cost in accuracy: SmolLM2-135M reads a text through caches that differ in tiers only.

Teacher forcing in chunks: a step feeds the next ``--chunk`` tokens of the text. They attend to all before them as a
decode step would, through the cache: what is older than the hot window is read as it is quantized, at every step, and
the keys and values of the chunk were computed from such reads, so errors add up as they do in decode. The one
difference to single tokens is that up to ``chunk - 1`` tokens more are hot.

All caches run beside each other, each on its own, and at every position their logits are compared with those of the
reference: the same weights and an unquantized cache. The hot tier and the reference have the dtype that the model
computes in: on a GPU float16 or bfloat16, so that the reference is a 16-bit cache; on the CPU float32 by default, which
16 bit comes close to. Bytes are counted with a hot tier of 16 bit.

The keys: prompts of filler hide eight numbers each, under eight names; ``--chunk`` tokens a step as before. Each prompt
is forked for eight questions, and the digits are decoded greedily, one token a step.
"""

import argparse
import importlib
import math
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators._command_line import integer
from kvtoolkit._version import __version__
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.errors import ArgumentError, ConfigError
from kvtoolkit.integrations.smollm2 import load_smollm2

Tiers = Mapping[str, Any] | None

REFERENCE = "reference"
SETTINGS: dict[str, Tiers] = {
    REFERENCE: None,
    "int8": {"hot": 64, "pinned_tokens": 64, "warm": "int8"},
    "int4": {"hot": 64, "pinned_tokens": 64, "cold": "int4"},
    "tiers": {"hot": 256, "pinned_tokens": 64, "warm": "int8", "warm_tokens": 1024, "cold": "int4"},
    "tiers-mass": {
        "hot": 256, "pinned_tokens": 64, "warm": "int8", "warm_tokens": 1024, "cold": "int4", "demote": "mass",
    },
}  # fmt: skip
"""Names of the caches and their ``tiers``. ``mass`` keeps as many tokens warm as ``age``, so the bytes are equal."""
GATES = {"int8": (0.001, 0.985), "int4": (0.05, 0.92), "tiers": (0.015, 0.95), "tiers-mass": (0.015, 0.95)}
"""The largest relative change of perplexity that passes, and the smallest top-1 agreement."""
_WANTED_SHARE = 0.85  # of the history outside hot; with less a text says little about tiers
_NAMES = ("fox", "king", "river", "garden", "doctor", "train", "piano", "moon")
_DIGITS = 5


@dataclass(frozen=True)
class Figures:
    """The results of one setting over the evaluated positions."""

    perplexity: float
    change: float
    """Relative change of perplexity. ``change_error`` is its standard error, as if positions were independent."""
    change_error: float
    mean_kl: float
    """KL(reference || this), nats a token; ``p99_kl``: 99th percentile."""
    p99_kl: float
    agreement: float
    """Share of the positions where this setting and the reference have the same likeliest token."""
    hot: float
    """Share of the tokens that were read from the hot tier. ``hot``, ``warm`` and ``cold`` sum to 1."""
    warm: float
    cold: float
    nbytes_per_token: float
    """Bytes of the keys and values of all layers. Hot ones count as 16 bit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench accuracy``."""
    parser.add_argument("--tokens", type=integer(2, 8192), default=4096, help="of the text; default 4096, at most 8192")
    parser.add_argument(
        "--skip", type=integer(0), help="positions at the beginning that are not evaluated; default: half"
    )
    parser.add_argument("--chunk", type=integer(1), default=32, help="tokens fed in one step; default 32")
    parser.add_argument("--text", metavar="FILE", help="plain text; default: pydoc_data.topics of Python itself")
    parser.add_argument(
        "--settings", nargs="+", default=list(SETTINGS), metavar="NAME",
        help=f"{', '.join(SETTINGS)}, or fields of tiers such as hot=128,cold=int4; the reference is always run",
    )  # fmt: skip
    parser.add_argument(
        "--passkey", type=integer(0, 8000), default=3072, help="tokens of a prompt that hides keys; 0: none"
    )
    parser.add_argument(
        "--prompts", type=integer(1, 64), default=1, help="prompts that hide eight keys each; default 1"
    )
    parser.add_argument("--device", default="cpu", help="of the model and its caches: cpu (default) or such as cuda:0")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"],
        help="of the model and its caches; default: float32 on the CPU, float16 elsewhere",
    )  # fmt: skip
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print. Returns 1 if a gate is missed."""
    settings = _check(options)
    text = _read_text(options.text)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # past_key_values is to become cache
    model, tokenizer = load_smollm2(dtype=options.dtype, progress=lambda text: print(f"{text} ...", flush=True))
    import torch
    import transformers

    from kvtoolkit.integrations.transformers import use_kvtoolkit

    try:
        model.to(options.device)
    except (RuntimeError, AssertionError) as error:  # what torch raises where there is no such device
        raise ArgumentError(f"--device: {options.device} cannot be used: {error}") from error
    use_kvtoolkit(model)
    ids = _encode(tokenizer, text, max(options.tokens + 1, options.passkey * options.prompts))
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if model.device.type == "cuda":
        where = torch.cuda.get_device_name(model.device)
    print(
        f"\nkvtoolkit {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, {where}\n"
        f"SmolLM2-135M, {options.dtype}, hot tier {options.dtype}; {options.text or 'pydoc_data.topics'}: positions "
        f"{options.skip} to {options.tokens - 1}, {options.chunk} tokens a step"
    )
    start = time.perf_counter()
    figures = measure(model, ids[: options.tokens + 1], settings, skip=options.skip, chunk=options.chunk)
    found = {}
    if options.passkey:
        fillers = [ids[i * options.passkey :][: options.passkey] for i in range(options.prompts)]
        hidden = [hide_keys(tokenizer, filler, options.passkey, i) for i, filler in enumerate(fillers)]
        prompts, numbers = [prompt for prompt, _ in hidden], [number for _, of_prompt in hidden for number in of_prompt]
        for name, tiers in settings.items():
            answers = ask_keys(model, tokenizer, prompts, tiers, chunk=options.chunk)
            found[name] = sum(answer.startswith(number) for answer, number in zip(answers, numbers, strict=True))
    ok = _print_table(figures, found, len(_NAMES) * options.prompts)
    print(f"{time.perf_counter() - start:.0f} s")
    rows = {name: asdict(row) | {"keys": found.get(name)} for name, row in figures.items()}
    record = {"version": __version__, "text": options.text, "tokens": options.tokens, "skip": options.skip}
    record |= {"chunk": options.chunk, "passkey": options.passkey, "prompts": options.prompts}
    record |= {"device": options.device, "dtype": options.dtype, "settings": settings, "rows": rows}
    write_json(options.json, record)
    return 0 if ok else 1


# -- options -----------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> dict[str, Tiers]:
    """The settings to run, the reference first. Fills in `skip`."""
    if options.skip is None:
        options.skip = options.tokens // 2
    if options.skip >= options.tokens:
        raise ArgumentError(f"--skip: expected 0 to {options.tokens - 1}, got {options.skip}")
    if 0 < options.passkey < 512:
        raise ArgumentError(f"--passkey: expected 0, or 512 to 8000, got {options.passkey}")
    if options.dtype is None:
        options.dtype = "float32" if options.device == "cpu" else "float16"
    return {REFERENCE: None} | {name: parse_setting(name) for name in options.settings}


def parse_setting(name: str) -> Tiers:
    """The ``tiers`` of a setting: one of `SETTINGS`, or ``field=value`` pairs with commas between them."""
    from kvtoolkit.config.tiers import TierConfig

    if name in SETTINGS:
        return SETTINGS[name]
    if "=" not in name:
        raise ArgumentError(f"--settings: expected some of {', '.join(SETTINGS)}, or field=value,..., got {name!r}")
    pairs = (pair.partition("=") for pair in name.split(","))
    tiers = {field: int(value) if value.isdecimal() else value for field, _, value in pairs}
    try:
        TierConfig.from_dict(tiers)
    except ConfigError as error:
        raise ArgumentError(f"--settings: {error}") from error
    return tiers


def _read_text(path: str | None) -> str:
    if path is None:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--text: {path} cannot be read: {error}") from error


def _encode(tokenizer: Any, text: str, count: int) -> list[int]:
    """The first ``count`` tokens of a text."""
    ids: list[int] = tokenizer(text[: 16 * count])["input_ids"]
    if len(ids) < count:
        raise ArgumentError(f"--text: expected a text of at least {count} tokens, got {len(ids)}")
    return ids[:count]


# -- a text ------------------------------------------------------------------------------------------------------------


def measure(
    model: Any, ids: Sequence[int], settings: Mapping[str, Tiers], *, skip: int, chunk: int
) -> dict[str, Figures]:
    """Feed a text to every setting, and compare with the reference.

    Args:
        model: after `kvtoolkit.integrations.transformers.use_kvtoolkit`.
        ids: tokens; the last one is only predicted.
        settings: ``tiers`` of each cache by a name; the first is the reference.
        skip: positions at the beginning that are not evaluated.
        chunk: tokens fed in one step.
    """
    import torch

    caches = {name: _make_cache(model, tiers, len(ids)) for name, tiers in settings.items()}
    seen = {name: _Seen(cache.kv_cache) for name, cache in caches.items()}
    num_tokens = len(ids) - 1
    with torch.inference_mode():
        for at in range(0, num_tokens, chunk):
            fed, targets = ids[at : min(at + chunk, num_tokens)], ids[at + 1 : at + chunk + 1]
            first = max(0, skip - at)  # of the chunk's positions
            reference = None
            for name, cache in caches.items():
                fed_ids = torch.tensor([fed], device=model.device)
                logits = model(fed_ids, past_key_values=cache).logits[0, first:].float().cpu().numpy()
                if len(logits):
                    reference = logits if reference is None else reference
                    seen[name].add(reference, logits, targets[first:])
    base = next(iter(seen.values()))
    return {name: one.figures(base) for name, one in seen.items()}


def compare(
    reference: NDArray[np.floating[Any]], logits: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """KL(reference || logits) in nats, and whether the likeliest token is the same; over the last axis."""
    p, q = log_softmax(reference), log_softmax(logits)
    kl: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return kl, reference.argmax(-1) == logits.argmax(-1)


def log_softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Logarithms of the softmax over the last axis, in float64."""
    shifted = np.asarray(logits, np.float64) - logits.max(-1, keepdims=True)
    logs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


class _Seen:
    """Sums over the positions of one cache that were evaluated so far."""

    def __init__(self, kv_cache: Any) -> None:
        self._cache = kv_cache
        self._losses: list[NDArray[np.float64]] = []
        self._kls: list[NDArray[np.float64]] = []
        self._same: list[NDArray[np.bool_]] = []
        self._tokens = np.zeros(3)  # of each tier, summed over steps

    def add(self, reference: Any, logits: Any, targets: Sequence[int]) -> None:
        """Count the positions of a step that has just ended, while the tiers are still as it read them."""
        kl, same = compare(reference, logits)
        self._kls.append(kl)
        self._same.append(same)
        self._losses.append(-log_softmax(logits)[np.arange(len(targets)), targets])
        stats = self._cache.stats()
        warm, cold = (stats.tiers[name].used if name in stats.tiers else 0 for name in ("warm", "cold"))
        self._tokens += len(targets) * np.array([stats.num_tokens - warm - cold, warm, cold])

    def figures(self, base: "_Seen") -> Figures:
        losses, kls = np.concatenate(self._losses), np.concatenate(self._kls)
        more = losses - np.concatenate(base._losses)
        change = math.expm1(more.mean())
        hot, warm, cold = (self._tokens / self._tokens.sum()).tolist()
        config = self._cache.config
        nbytes = {name: nbytes / 64 for name, nbytes in config.block_nbytes.items()}
        nbytes["hot"] = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
        return Figures(
            perplexity=math.exp(losses.mean()),
            change=change,
            change_error=(1 + change) * float(more.std()) / math.sqrt(len(more)),
            mean_kl=float(kls.mean()),
            p99_kl=float(np.percentile(kls, 99)),
            agreement=float(np.concatenate(self._same).mean()),
            hot=hot, warm=warm, cold=cold,
            nbytes_per_token=hot * nbytes["hot"] + warm * nbytes.get("warm", 0) + cold * nbytes.get("cold", 0),
        )  # fmt: skip


def _make_cache(model: Any, tiers: Tiers, num_tokens: int, num_prompts: int = 1) -> Any:
    """A cache with more room in each tier than its texts need, so that age or mass alone decides."""
    from kvtoolkit.integrations.transformers import TransformersCache

    options: dict[str, Any] = {
        "num_tokens": num_prompts * (num_tokens + 1024), "max_seqs": num_prompts * len(_NAMES), "prefix_caching": False,
    }  # fmt: skip
    if tiers is not None:
        options |= {"num_tokens": num_prompts * (4 * num_tokens + 16384), "tiers": tiers}
    return TransformersCache.for_model(model, **options)


# -- keys --------------------------------------------------------------------------------------------------------------


def hide_keys(
    tokenizer: Any, filler: Sequence[int], num_tokens: int, seed: int = 0
) -> tuple[list[int], list[str]]:  # fmt: skip
    """A prompt of ``num_tokens`` tokens that gives each name a number, at even distances, and the numbers."""
    draw = np.random.default_rng(seed)
    numbers = ["".join(map(str, draw.integers(0, 10, _DIGITS))) for _ in _NAMES]
    said = [
        tokenizer(f"\n\nThe secret number of the {name} is {number}. Remember it: the {name} has {number}.\n\n")
        for name, number in zip(_NAMES, numbers, strict=True)
    ]
    left = num_tokens - sum(len(one["input_ids"]) for one in said)
    prompt: list[int] = []
    for i, one in enumerate(said):
        prompt += filler[left * i // len(said) : left * (i + 1) // len(said)]
        prompt += one["input_ids"]
    return prompt, numbers


def ask_keys(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tiers: Tiers, *, chunk: int
) -> list[str]:  # fmt: skip
    """The model's greedy answer for each name after each prompt. Prompts have one length and run as a batch."""
    import torch

    cache = _make_cache(model, tiers, len(prompts[0]), len(prompts))
    # questions differ only in the name, which is one token, so that no row needs padding
    questions = [tokenizer(f"The secret number of the {name} is")["input_ids"] for name in _NAMES]
    with torch.inference_mode():
        ids = torch.tensor(prompts, device=model.device)
        for at in range(0, ids.shape[1], chunk):
            model(ids[:, at : at + chunk], past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(_NAMES))
        fed, answers = torch.tensor(questions * len(prompts), device=model.device), []
        for _ in range(_DIGITS + 1):  # the space before them is a token of its own
            fed = model(fed, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            answers.append(fed)
    return [tokenizer.decode(row).strip() for row in torch.cat(answers, 1).tolist()]


# -- the table ---------------------------------------------------------------------------------------------------------


def _print_table(figures: Mapping[str, Figures], found: Mapping[str, int], num_keys: int) -> bool:
    """Print the table. Returns whether all gates hold."""
    width = max(len(name) for name in figures)
    print(
        f"\n{'':<{width}}  perplexity    change (s.e.)   mean KL    p99 KL    top-1   hot warm cold  B/token"
        + ("  keys" if found else "") + "  gates: change, top-1"
    )  # fmt: skip
    ok = True
    for name, row in figures.items():
        line = f"{name:<{width}}  {row.perplexity:>10.4f}  {row.change:>+8.3%} ({row.change_error:.3%})"
        line += f"  {row.mean_kl:.2e}  {row.p99_kl:.2e}  {row.agreement:>6.2%}"
        line += "  " + " ".join(f"{share:>4.0%}" for share in (row.hot, row.warm, row.cold))
        line += f"  {row.nbytes_per_token:>7.0f}" + (f"  {found[name]}/{num_keys} " if found else "")
        if name in GATES:
            most, least = GATES[name]
            verdicts = (row.change <= most, row.agreement >= least)
            ok = ok and all(verdicts)
            texts = (f"<= {most:.1%} {_word(verdicts[0])}", f">= {least:.1%} {_word(verdicts[1])}")
            line += "  " + ", ".join(texts)
        print(line)
        if name != REFERENCE and 1 - row.hot < _WANTED_SHARE:
            print(f"{'':<{width}}  only {1 - row.hot:.0%} of the history was quantized: a longer text says more")
    return ok


def _word(holds: bool) -> str:
    return "yes" if holds else "no"
