"""The built-in predictors of `kvtoolkit.config.prediction`; each says what it expects the next step to read.

In all of them a tile without mass, because it was not read, keeps its estimate.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kvtoolkit.config.prediction import TileStep

Float32Array = NDArray[np.float32]


class Mass:
    """The decayed mean of the masses so far.

    ``estimate = sum(beta^age * mass) / sum(beta^age)`` over the steps that read the tile, so the first mass counts in
    full, and one that is old counts little as soon as there is a newer one.

    Args:
        beta: weight that older masses keep at each observation, from 0 to below 1.

    Source: a decayed sum without the division, InfLLM's policy ``lru-s`` (Xiao et al. 2024, arXiv:2402.04617).
    """

    state_size, needs_keys = 2, False

    def __init__(self, beta: float = 0.8) -> None:
        self.beta = beta

    def observe(self, state: Float32Array, step: "TileStep") -> None:
        estimate, weight = state
        read = ~np.isnan(step.mass)
        # weight 0 for a tile that is new: its first mass replaces the NaN of its estimate
        aged = self.beta * np.nan_to_num(weight)
        more = np.where(read, np.float32(1 - self.beta), 0)
        weight[...] = aged + more
        known = np.where(np.isnan(estimate), step.mass, estimate)
        part = np.divide(more, weight, out=np.zeros_like(weight), where=read)
        estimate[...] = np.where(read, known + part * (step.mass - known), estimate)

    def score(self, state: Float32Array, step: "TileStep") -> Float32Array:
        return np.where(np.isnan(state[0]), np.float32(np.inf), state[0])


class Last:
    """The mass that the tile received when it was last read."""

    state_size, needs_keys = 1, False

    def observe(self, state: Float32Array, step: "TileStep") -> None:
        np.copyto(state[0], step.mass, where=~np.isnan(step.mass))

    def score(self, state: Float32Array, step: "TileStep") -> Float32Array:
        return np.where(np.isnan(state[0]), np.float32(np.inf), state[0])


class Recency:
    """The newest tiles. Source: with pinned tokens in front, Xiao et al. 2023, StreamingLLM (arXiv:2309.17453)."""

    state_size, needs_keys = 0, False

    def observe(self, state: Float32Array, step: "TileStep") -> None:
        """Learn nothing."""

    def score(self, state: Float32Array, step: "TileStep") -> Float32Array:
        return np.broadcast_to(np.arange(step.mass.shape[-1], dtype=np.float32), step.mass.shape)


class Frequency:
    """How often the tile was among those with most mass, halved from time to time.

    Args:
        share: share of the tiles that count as those with most mass.
        period: steps between two halvings.
    """

    state_size, needs_keys = 1, False

    def __init__(self, share: float = 0.25, period: int = 64) -> None:
        self.share, self.period = share, period

    def observe(self, state: Float32Array, step: "TileStep") -> None:
        counts = state[0]
        read = ~np.isnan(step.mass)
        if step.index % self.period == 0:
            counts *= 0.5
        np.copyto(counts, 0, where=read & np.isnan(counts))
        num_tiles = step.mass.shape[-1]
        num_most = max(1, round(self.share * num_tiles)) if num_tiles else 0
        most = np.argsort(np.where(read, step.mass, -1), axis=-1, kind="stable")[..., num_tiles - num_most :]
        among = np.zeros(step.mass.shape, np.bool_)
        np.put_along_axis(among, most, True, axis=-1)
        counts[among & read] += 1

    def score(self, state: Float32Array, step: "TileStep") -> Float32Array:
        return np.where(np.isnan(state[0]), np.float32(np.inf), state[0])


class Bound:
    """What the last query would give the tile, from the least and the greatest value of each channel of its keys.

    ``bound = q·c + width * sum_i |q_i| r_i``, where ``c`` is the middle of the box around the tile's keys and ``r``
    half its size. With ``width`` 1 no key of the tile can have a larger product with ``q``. The score is the softmax of
    the bounds over the tiles, the mean over the group's query heads. It needs no masses, so a tile that was never read
    is scored like any other.

    Args:
        width: from 0, the middle of the box alone, to 1, the bound.

    Source: width 1, Tang et al. 2024, Quest (arXiv:2406.10774), sec. 3.2; a smaller box, Chen et al. 2024, ArkVale.
    """

    state_size, needs_keys = 0, True

    def __init__(self, width: float = 0.5) -> None:
        self.width = width

    def observe(self, state: Float32Array, step: "TileStep") -> None:
        """Learn nothing."""

    def score(self, state: Float32Array, step: "TileStep") -> Float32Array:
        assert step.query is not None
        assert step.key_low is not None
        assert step.key_high is not None
        middle, half = (step.key_high + step.key_low) / 2, (step.key_high - step.key_low) / 2
        bounds = step.query @ middle.swapaxes(-1, -2) + self.width * (np.abs(step.query) @ half.swapaxes(-1, -2))
        bounds *= step.softmax_scale
        weights = np.exp(bounds - bounds.max(-1, keepdims=True, initial=-np.inf))
        scores: Float32Array = (weights / weights.sum(-1, keepdims=True)).mean(-2, dtype=np.float32)
        return scores


class Random:
    """Chance, from a seed and the number of the step: what every other predictor has to beat.

    Args:
        seed: of the scores.
        num_protected: tiles at the beginning, such as those of a prompt, that come before all others.

    Source: as strong as scores for long answers if the prompt is protected, "Random Attention" 2026 (arXiv:2609.03430).
    """

    state_size, needs_keys = 0, False

    def __init__(self, seed: int = 0, num_protected: int = 0) -> None:
        self.seed, self.num_protected = seed, num_protected

    def observe(self, state: Float32Array, step: "TileStep") -> None:
        """Learn nothing."""

    def score(self, state: Float32Array, step: "TileStep") -> Float32Array:
        scores = np.random.default_rng([self.seed, step.index]).random(step.mass.shape, np.float32)
        scores[..., : self.num_protected] += 1
        return scores
