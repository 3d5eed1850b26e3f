"""How well predictors tell which tiles the next step reads: on a text, on many needles, and on a walk over topics.

SmolLM2-135M reads each text in one forward, and the attention of its last ``--steps`` positions is recorded as the mass
of each tile. The first 64 and the last 256 tokens are always read and left out here. Every predictor is replayed over
the recording: it sees the masses of all steps so far, and chooses a share of the other tiles for the next step. The
first quarter of the steps is for warming up and is not rated.
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit._version import __version__
from kvtoolkit.bench.attention_recordings import Float32Array, Recording
from kvtoolkit.bench.prediction_cases import encode, read_text, record_needles, record_text, record_walk
from kvtoolkit.bench.prediction_scores import (
    SHARING,
    Rating,
    candidates,
    later_masses,
    oracle,
    rate,
    rate_demotion,
    replay,
    replay_sparse,
    share_scores,
)
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.config import prediction
from kvtoolkit.config.predictors import Bound, Frequency, Mass, Random
from kvtoolkit.errors import ArgumentError
from kvtoolkit.integrations.smollm2 import load_smollm2

SHARES = (0.125, 0.25, 0.5)
_QUARTER = 0.25
_SHARED = (("head", "mean"), ("layer", "mean"), ("layer", "max"), ("sequence", "mean"), ("sequence", "max"))
STAYS = (0.99, 0.9, 0.5, 0.0)
BETAS, WIDTHS, PERIODS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99), (0.0, 0.25, 0.5, 0.75, 1.0), (1, 4, 16, 64)
REVISITS = (32, 64, 128, 256)
_MAX_TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench prediction``."""
    parser.add_argument(
        "--tokens", type=integer(640, _MAX_TOKENS), default=4096, help="of each text; default 4096, at most 8192"
    )
    parser.add_argument("--steps", type=integer(64), default=768, help="positions at its end; default 768")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="plain texts beside pydoc_data.topics of Python itself"
    )
    parser.add_argument("--synthetic", action="store_true", help="only the walk, which needs no model")
    parser.add_argument("--quick", action="store_true", help="1024 tokens, 192 steps: a look that takes seconds")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    if options.quick:
        options.tokens, options.steps = 1024, 192
    if options.steps + 512 > options.tokens:
        raise ArgumentError(f"--steps: expected at most {options.tokens - 512} of {options.tokens} tokens, "
                            f"got {options.steps}")  # fmt: skip
    start = time.perf_counter()
    print(
        f"kvtoolkit {__version__}, Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}\n"
        f"{options.tokens} tokens, the last {options.steps} are steps, {options.steps // 4} of them to warm up; "
        f"64 tokens pinned, 256 hot"
    )
    recordings = [] if options.synthetic else _record_model(options)
    walks = [record_walk(stay, options.tokens, options.steps) for stay in STAYS]
    found: dict[str, Any] = {"version": __version__, "tokens": options.tokens, "steps": options.steps}
    for recording in (*recordings, *walks):
        found[recording.name] = figures = measure(recording, options.steps // 4)
        if recording in recordings:
            _print_recording(recording, figures)
    _print_walks([(walk, found[walk.name]) for walk in walks])
    everything = [(one.name, found[one.name]) for one in (*recordings, *walks)]
    print("\nMass at 25 % over that of an oracle of each kv head, by who shares a choice and by which of their scores")
    _print_lines("sharing", everything)
    print("\nRecall at 25 % for each kv head, by what a predictor can be tuned with")
    _print_lines("tuning", everything)
    print("\nRecall at 25 % for each kv head, if masses are seen and tiles chosen every so many steps only")
    _print_lines("periods", everything)
    print("\nRecall at 25 % for each kv head, if only masses of the chosen tiles are seen, by the period of revisits")
    _print_lines("sparse", everything)
    print("\nShare of the candidates' later attention on the 50 % of them that were demoted at half of the steps")
    _print_lines("demotion", everything)
    print(f"\n{time.perf_counter() - start:.0f} s")
    write_json(options.json, found)
    return 0


def _record_model(options: argparse.Namespace) -> list[Recording]:
    model, tokenizer = load_smollm2(progress=lambda text: print(f"{text} ...", flush=True))
    recordings = []
    for path in (None, *options.text):
        ids = encode(tokenizer, read_text(path), options.tokens)
        recordings.append(record_text(model, ids, options.steps, path or "pydoc_data.topics"))
    filler = encode(tokenizer, read_text(None), options.tokens)
    recordings.append(record_needles(model, tokenizer, filler, options.tokens, options.steps))
    return recordings


# -- figures -----------------------------------------------------------------------------------------------------------


def measure(recording: Recording, warm_up: int) -> dict[str, dict[str, Any]]:
    """All figures of a recording.

    Args:
        warm_up: steps at the beginning that are not rated.

    Returns:
        ``at_stake``: share of the attention that falls on candidates. ``ratings``: of each predictor, a `Rating` as a
        dict, by who shares a choice and by the share of the tiles that is chosen. ``sharing``, ``tuning``, ``periods``,
        ``sparse``: recall and ``Rating.wanted`` at a quarter of the tiles, by a label. ``demotion``: share of the later
        attention, by a label.
    """
    first = recording.candidates(warm_up).start
    protecting = partial(Random, num_protected=recording.num_prompt_tiles - first)
    scores = {"oracle": oracle(recording)}
    scores |= {name: replay(recording, prediction.predictor(name)) for name in prediction.names()}
    scores["random, prompt first"] = replay(recording, protecting())
    scores["bound of the same step"] = replay(_shifted(recording), Bound())

    makers: dict[str, Callable[[], Any]] = {f"mass, beta {beta:g}": partial(Mass, beta) for beta in BETAS}
    makers |= {f"bound, width {width:g}": partial(Bound, width) for width in WIDTHS}
    makers |= {f"frequency, period {period}": partial(Frequency, period=period) for period in (16, 64, 256)}
    tuning = {name: replay(recording, make()) for name, make in makers.items()}
    periods = {
        f"{name}, every {period}": replay(recording, prediction.predictor(name), period=period)
        for name in ("mass", "last", "bound")
        for period in PERIODS
    }
    sparse = {
        f"{name}, revisits every {period}": replay_sparse(
            recording, prediction.predictor(name), _QUARTER, "head", period
        )
        for name in ("mass", "last", "frequency")
        for period in REVISITS
    }
    possible = candidates(recording)[warm_up:, None, None]
    on_candidates = np.where(possible, recording.mass[warm_up:], 0).sum(-1).mean()
    sharing = {
        f"{name}, by {sharing}" + (f", {by}" if sharing != "head" else ""): share_scores(scores[name], sharing, by)
        for name in ("oracle", "mass", "last")
        for sharing, by in _SHARED
    }
    return {
        "at_stake": {"candidates": float(on_candidates)},
        "ratings": {
            name: {
                sharing: {str(share): asdict(one) for share, one in _rate(recording, of_one, sharing, warm_up).items()}
                for sharing in SHARING
            }
            for name, of_one in scores.items()
        },
        "sharing": _rate_all(recording, sharing, warm_up),
        "tuning": _rate_all(recording, tuning, warm_up),
        "periods": _rate_all(recording, periods, warm_up),
        "sparse": _rate_all(recording, sparse, warm_up),
        "demotion": _measure_demotion(recording, scores),
    }


def _rate(recording: Recording, scores: Float32Array, sharing: str, warm_up: int) -> dict[float, Rating]:
    return rate(recording, scores, SHARES, sharing, warm_up)


def _rate_all(
    recording: Recording, replays: dict[str, Float32Array], warm_up: int
) -> dict[str, tuple[float, float | None]]:
    """Recall of a quarter of the tiles, as kv heads choose alone, and the share of the attention on wanted tiles."""
    ratings = {name: rate(recording, one, (_QUARTER,), "head", warm_up)[_QUARTER] for name, one in replays.items()}
    return {name: (rating.recall, rating.wanted) for name, rating in ratings.items()}


def _measure_demotion(recording: Recording, scores: dict[str, Float32Array]) -> dict[str, float]:
    at = recording.num_steps // 2
    choices = {
        "oracle": later_masses(recording, at),
        "mass": scores["mass"],
        "mass, beta 0.99": replay(recording, Mass(0.99)),
        "age": scores["recency"],
        "random": scores["random"],
        "random, prompt kept": scores["random, prompt first"],
    }
    return {
        f"{name}, by {sharing}": rate_demotion(recording, of_one, 0.5, sharing, at)
        for name, of_one in choices.items()
        for sharing in SHARING
    }


def _shifted(recording: Recording) -> Recording:
    """A recording whose queries come one step too early, so that a predictor sees that of the step it predicts."""
    early = np.concatenate([recording.query[1:], recording.query[-1:]])
    return Recording(**{**vars(recording), "query": early})


# -- tables ------------------------------------------------------------------------------------------------------------


def _print_recording(recording: Recording, figures: dict[str, dict[str, Any]]) -> None:
    tiles = recording.candidates(recording.num_steps - 1)
    num_layers, num_kv_heads = recording.mass.shape[1:3]
    print(
        f"\n{recording.name}: {num_layers} layers of {num_kv_heads} kv heads, {tiles.stop - tiles.start} candidates at "
        f"the end, {recording.num_prompt_tiles} tiles of prompt; {figures['at_stake']['candidates']:.1%} of the "
        f"attention is on candidates"
    )
    if recording.remarks:
        print(recording.remarks)
    width = max(map(len, figures["ratings"]))
    head = "   ".join(f"{f'recall, by {sharing}':<20}" for sharing in SHARING)
    head += f"   {'missed at 25 %':<26}   mean    new" + ("   wanted" if recording.wanted is not None else "")
    print(f"{'':<{width}}  {head}")
    shares = " ".join(f"{share:>6.1%}" for share in SHARES)
    print(f"{'':<{width}}  " + "   ".join([shares] * 3) + "   " + " ".join(f"{sharing:>8}" for sharing in SHARING))
    for name, of_one in figures["ratings"].items():
        recalls = "   ".join(
            " ".join(f"{of_one[sharing][str(share)]['recall']:>6.3f}" for share in SHARES) for sharing in SHARING
        )
        missed = " ".join(f"{of_one[sharing]['0.25']['missed']:>8.4f}" for sharing in SHARING)
        by_head = of_one["head"]["0.25"]
        line = f"{name:<{width}}  {recalls}   {missed}   {by_head['mean_recall']:>4.3f} {by_head['new']:>6.1%}"
        if recording.wanted is not None:
            line += "  " + " ".join(f"{_number(of_one[sharing]['0.25']['wanted'])}" for sharing in SHARING)
        print(line)


def _number(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"


def _print_walks(walks: Sequence[tuple[Recording, dict[str, dict[str, Any]]]]) -> None:
    print("\nwalk: 2 layers of 4 kv heads; recall at 25 % for each kv head, and the mass that the oracle misses")
    for walk, _ in walks:
        print(f"  {walk.name}: {walk.remarks}")
    names = list(walks[0][1]["ratings"])
    width = max(map(len, names))
    print(f"{'':<{width}}  " + " ".join(f"{walk.name:>16}" for walk, _ in walks))
    for name in names:
        row = " ".join(f"{figures['ratings'][name]['head']['0.25']['recall']:>16.3f}" for _, figures in walks)
        print(f"{name:<{width}}  {row}")
    row = " ".join(f"{figures['ratings']['oracle']['head']['0.25']['missed']:>16.4f}" for _, figures in walks)
    print(f"{'missed by the oracle':<{width}}  {row}")


def _print_lines(part: str, everything: Sequence[tuple[str, dict[str, dict[str, Any]]]]) -> None:
    labels = list(everything[0][1][part])
    columns = []
    for name, figures in everything:
        lines = figures[part]
        if not isinstance(lines[labels[0]], tuple):
            columns.append((name, lines))
            continue
        columns.append((name, {label: recall for label, (recall, _) in lines.items()}))
        if lines[labels[0]][1] is not None:
            columns.append(("wanted tiles", {label: wanted for label, (_, wanted) in lines.items()}))
    width = max(map(len, labels))
    print(f"{'':<{width}}  " + " ".join(f"{name:>17}" for name, _ in columns))
    for label in labels:
        print(f"{label:<{width}}  " + " ".join(f"{lines[label]:>17.3f}" for _, lines in columns))
