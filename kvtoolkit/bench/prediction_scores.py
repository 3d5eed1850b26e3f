"""How much attention falls on predicted tiles: predictors replayed over a recording, and their choices rated.

Everything is computed from arrays over all steps. Tiles that are no candidates in a step have the score ``-inf``, so
they come last in every order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.bench.attention_recordings import Float32Array, Recording
from kvtoolkit.config.prediction import (
    Predictor,
    TileStep,
    choose,
    extend,
    new_state,
    predict,
    shared_scores,
    with_revisits,
)

SHARING = ("head", "layer", "sequence")
"""Who makes one choice together: each kv head of each layer, all heads of a layer, all layers of a sequence."""
_AXES = {"head": (), "layer": (2,), "sequence": (1, 2)}


@dataclass(frozen=True)
class Rating:
    """How good choices were, over the steps that were rated."""

    recall: float
    """Mass on the chosen tiles over that on the oracle's, which makes its choice at the same places; sums over all."""
    mean_recall: float
    """The same ratio of each layer and kv head by itself, the mean of all."""
    missed: float
    """Share of the whole attention that falls on candidates that were not chosen; the mean of all layers and heads."""
    new: float
    """Share of the chosen tiles that the step before had not chosen."""
    wanted: float | None = None
    """Share of the attention on the tiles of ``Recording.wanted`` that falls on chosen ones; None if there are none."""


def replay(recording: Recording, predictor: Predictor, *, period: int = 1) -> Float32Array:
    """Scores of a predictor for every step, each from the steps before it.

    Args:
        period: steps from one observation to the next. The scores are those after the last one; a tile that became a
            candidate since then has ``inf``, because it has been in the hot window until now.

    Returns:
        ``[num_steps, num_layers, num_kv_heads, num_tiles]`` float32; ``-inf`` in the first step, and for all tiles that
        are no candidates.
    """
    scores = np.full(recording.mass.shape, -np.inf, np.float32)
    lead = recording.mass.shape[1:3]
    state, latest = new_state(predictor, lead, 0), np.empty((*lead, 0), np.float32)
    for step in range(1, recording.num_steps):
        tiles = recording.candidates(step)
        if (step - 1) % period == 0:
            state = extend(state, tiles.stop - tiles.start)
            latest = predict(predictor, state, _tile_step(recording, predictor, step - 1, tiles))
        known = tiles.start + latest.shape[-1]
        scores[step, ..., tiles.start : known] = latest
        scores[step, ..., known : tiles.stop] = np.inf
    return scores


def replay_sparse(recording: Recording, predictor: Predictor, share: float, sharing: str, period: int) -> Float32Array:
    """Scores of a predictor that sees only masses of chosen tiles, as in a cache whose attention leaves out the others.

    Each step reads ``share`` of the tiles, those of `with_revisits` among them. Masses are of the softmax over what was
    read, so they are larger than those of the recording. A tile that has just left the hot window is read.

    Args:
        share: share of the candidates that a step reads.
        sharing: one of `SHARING`.
        period: of `with_revisits`.
    """
    scores = np.full(recording.mass.shape, -np.inf, np.float32)
    lead = recording.mass.shape[1:3]
    first = recording.candidates(1)
    state = new_state(predictor, lead, 0)
    read = np.ones((*lead, first.stop - first.start), np.bool_)  # the prompt is read as a whole
    for step in range(1, recording.num_steps):
        tiles = recording.candidates(step)
        num_tiles = tiles.stop - tiles.start
        state = extend(state, num_tiles)
        read = np.concatenate([read, np.ones((*lead, num_tiles - read.shape[-1]), np.bool_)], -1)
        shown = _tile_step(recording, predictor, step - 1, tiles)
        left_out = np.where(read, 0, shown.mass).sum(-1, keepdims=True)
        mass = np.where(read, shown.mass / (1 - left_out), np.float32(np.nan)).astype(np.float32)
        shown = TileStep(step - 1, mass, shown.query, shown.key_low, shown.key_high, shown.softmax_scale)
        shared = share_scores(predict(predictor, state, shown)[None], sharing)[0]
        latest = with_revisits(shared, step, period)
        read = choose(latest, max(1, round(share * num_tiles)))
        scores[step, ..., tiles] = latest
    return scores


def _tile_step(recording: Recording, predictor: Predictor, step: int, tiles: slice) -> TileStep:
    mass = recording.mass[step, ..., tiles]
    if not predictor.needs_keys:
        return TileStep(step, mass)
    low, high = recording.key_low[..., tiles, :], recording.key_high[..., tiles, :]
    return TileStep(step, mass, recording.query[step], low, high, recording.softmax_scale)


def oracle(recording: Recording) -> Float32Array:
    """Scores that are the masses of the step itself."""
    return np.where(candidates(recording)[:, None, None], recording.mass, np.float32(-np.inf))


def candidates(recording: Recording) -> NDArray[np.bool_]:
    """``[num_steps, num_tiles]``: whether a step may leave a tile out."""
    found = np.zeros((recording.num_steps, recording.mass.shape[-1]), np.bool_)
    for step in range(recording.num_steps):
        found[step, recording.candidates(step)] = True
    return found


def share_scores(scores: Float32Array, sharing: str, by: str = "mean") -> Float32Array:
    """`shared_scores` of ``[num_steps, num_layers, num_kv_heads, num_tiles]`` for one of `SHARING`."""
    return shared_scores(scores, _AXES[sharing], by)


def chosen_tiles(scores: Float32Array, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The ``counts[step]`` tiles with the highest scores in each step; among equals the newest."""
    # both sorts at once: rank 0 is the highest
    order = np.argsort(scores, axis=-1, kind="stable")[..., ::-1]
    ranks = np.empty(order.shape, np.int64)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), axis=-1)
    chosen: NDArray[np.bool_] = ranks < counts[:, None, None, None]
    return chosen


def rate(
    recording: Recording, scores: Float32Array, shares: Sequence[float], sharing: str, warm_up: int
) -> dict[float, Rating]:
    """Rate choices of ``share`` of the candidates by scores.

    Args:
        scores: as `replay` returns them.
        shares: shares of the candidates that are chosen.
        sharing: one of `SHARING`.
        warm_up: steps at the beginning that are not rated, at least 1.
    """
    rated = slice(warm_up, None)
    mass, possible = recording.mass[rated], candidates(recording)[rated]
    num_tiles = possible.sum(-1)
    on_candidates = np.where(possible[:, None, None], mass, 0).sum(-1)
    ranked, best = (share_scores(one[rated], sharing) for one in (scores, oracle(recording)))
    ratings = {}
    for share in shares:
        counts = np.maximum(1, np.rint(share * num_tiles)).astype(np.int64)
        chosen = chosen_tiles(ranked, counts)
        kept = np.where(chosen, mass, 0).sum(-1, dtype=np.float64)
        possible_mass = np.where(chosen_tiles(best, counts), mass, 0).sum(-1, dtype=np.float64)
        fresh = (chosen[1:] & ~chosen[:-1]).sum(-1).mean()
        ratings[share] = Rating(
            recall=float(kept.sum() / possible_mass.sum()),
            mean_recall=float((kept / np.maximum(possible_mass, 1e-30)).mean()),
            missed=float((on_candidates - kept).mean()),
            new=float(fresh / counts.mean()),
            wanted=None if recording.wanted is None else _on_wanted(recording.wanted[rated], mass, possible, chosen),
        )
    return ratings


def _on_wanted(
    wanted: NDArray[np.int64], mass: Float32Array, possible: NDArray[np.bool_], chosen: NDArray[np.bool_]
) -> float | None:
    steps = np.flatnonzero(wanted >= 0)
    steps = steps[possible[steps, wanted[steps]]]
    on_tile, is_chosen = mass[steps, ..., wanted[steps]], chosen[steps, ..., wanted[steps]]
    return float((on_tile * is_chosen).sum() / on_tile.sum()) if len(steps) else None


def rate_demotion(recording: Recording, scores: Float32Array, share: float, sharing: str, at: int) -> float:
    """Share of the candidates' mass that later falls on tiles that were demoted at a step.

    Args:
        scores: as `replay` returns them; those of step ``at`` decide, and the lowest are demoted.
        share: share of the candidates that are demoted.
        sharing: one of `SHARING`.
        at: the step; those after it are rated, with the candidates of this step.
    """
    tiles = recording.candidates(at)
    ranked = share_scores(scores[at : at + 1, ..., tiles], sharing)
    num_tiles = tiles.stop - tiles.start
    kept = chosen_tiles(ranked, np.array([num_tiles - round(share * num_tiles)]))[0]
    later = recording.mass[at:, ..., tiles].sum(0, dtype=np.float64)
    return float(later[~kept].sum() / later.sum())


def later_masses(recording: Recording, at: int) -> Float32Array:
    """Scores for `rate_demotion` that know the future: the sum of each tile's masses from step ``at`` on."""
    scores = np.zeros(recording.mass.shape, np.float32)
    scores[at] = recording.mass[at:].sum(0)
    return scores
