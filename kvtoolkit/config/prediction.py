"""Predictors, as plug-ins: which tiles (64 tokens) of a sequence the next step will read most of.

A predictor keeps a few numbers for each tile, updates them after each step, and gives every tile a score; the highest
scores are expected to receive most attention. Only tiles that can be left out are shown to it: pinned tiles before
them and the hot window after them are always read. Its arrays have leading axes ``*lead``, such as layers and kv heads,
and each tile of each of them is judged on its own.

A tile that was not read has no mass. A predictor must not take that for a mass of zero, because the tile would then
never be read again. Two rules prevent it: what a predictor knows of such a tile stays as it was, and `with_revisits`
gives each tile the highest score once in every ``period`` steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from allocators._plugins import PluginError, load_class
from kvtoolkit.config import predictors
from kvtoolkit.config.fields import require_one_of
from kvtoolkit.errors import ConfigError, ShapeError

Float32Array = NDArray[np.float32]

_METHODS = ("observe", "score")


@dataclass(frozen=True)
class TileStep:
    """What one step says about the tiles that a predictor judges. Read-only for predictors."""

    index: int
    """Number of the step, counted from 0."""
    mass: Float32Array
    """``[*lead, num_tiles]``: share of the attention that the tile received, the mean over the group's query heads; all
    tiles of a sequence, those that are not shown included, sum to 1. NaN where the tile was not read. In a cache there
    are no leading axes: a tile has the greatest share of all layers and kv heads, so the sum is more than 1, and only
    steps that read everything are shown."""
    query: Float32Array | None = None
    """``[*lead, group_size, head_dim]``: the step's query after RoPE. Given if the predictor has ``needs_keys``."""
    key_low: Float32Array | None = None
    """``[*lead, num_tiles, head_dim]``: least value of each channel among the tile's keys. Given as ``query`` is."""
    key_high: Float32Array | None = None
    """``[*lead, num_tiles, head_dim]``: greatest value of each channel. Given as ``query`` is."""
    softmax_scale: float = 1.0
    """Factor on q·k."""


class Predictor(Protocol):
    """The members of a plug-in.

    One object serves all sequences: what it knows of a tile is in the array ``state``, which the caller keeps, and
    extends by NaN when a tile is added. So a fork copies the state with the sequence, and a new sequence begins with
    NaN.
    """

    state_size: int
    """How many numbers it keeps for each tile."""
    needs_keys: bool
    """Whether a step must have its query and the bounds of the keys."""

    def observe(self, state: Float32Array, step: TileStep) -> None:
        """Update what is known of the tiles by a step that has ended.

        Args:
            state: ``[state_size, *lead, num_tiles]`` float32, changed in place. All values of a new tile are NaN.
            step: the step. Where its mass is NaN the estimate must not fall.
        """
        ...

    def score(self, state: Float32Array, step: TileStep) -> Float32Array:
        """``[*lead, num_tiles]`` scores, none of them NaN; the highest are expected to be read most.

        Where layers or heads share one choice, `shared_scores` makes one score of theirs, so they should be of one
        scale. Tiles that the predictor has never seen read should get ``inf``: they are read once, and known then.

        Args:
            state: as `observe` left it after ``step``.
            step: the last step; the scores are for the one after it.
        """
        ...


_PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "mass": predictors.Mass,
    "last": predictors.Last,
    "recency": predictors.Recency,
    "frequency": predictors.Frequency,
    "bound": predictors.Bound,
    "random": predictors.Random,
}
_BUILT_IN = frozenset(_PREDICTORS)


def register(name: str, factory: Callable[[], Predictor], *, replace: bool = False) -> None:
    """Make a predictor available under ``name``.

    Args:
        name: an identifier. A predictor that was registered under it before is replaced.
        factory: a class or a function that makes a predictor. It is called without arguments.
        replace: whether ``name`` may be that of a built-in predictor.

    Raises:
        ConfigError: ``name`` is no identifier, or a built-in predictor's without ``replace``; or ``factory`` cannot be
            called.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"name: expected an identifier, got {name!r}")
    if not callable(factory):
        raise ConfigError(f"factory: expected a class or a function, got {factory!r}")
    if name in _BUILT_IN and not replace:
        raise ConfigError(f"name: {name!r} is a built-in predictor; choose another name, or replace it by replace=True")
    _PREDICTORS[name] = factory


def names() -> tuple[str, ...]:
    """The registered predictors."""
    return tuple(_PREDICTORS)


def predictor(spec: str) -> Predictor:
    """Make the predictor of this name, or of the class at ``"package.module:Class"``.

    Raises:
        ConfigError: there is none, it cannot be made, or it is not a predictor. A path must lead to a class with the
            methods `observe` and `score`; nothing else is called.
    """
    if not isinstance(spec, str):
        raise ConfigError(f"predictor: expected a name or 'package.module:Class', got {spec!r}")
    factory = _PREDICTORS.get(spec)
    if factory is None and ":" not in spec:
        raise ConfigError(
            f"predictor: expected one of {', '.join(_PREDICTORS)} or 'package.module:Class', got {spec!r}"
        )
    try:
        made = (factory or load_class(spec, _METHODS))()
    except PluginError as error:
        raise ConfigError(f"predictor: {error}") from error
    except (Exception, SystemExit) as error:  # whatever a plug-in does when it is made
        raise ConfigError(f"predictor: {spec!r} cannot be made: {type(error).__name__}: {error}") from error
    missing = [name for name in _METHODS if not callable(getattr(made, name, None))]
    if missing:
        raise ConfigError(
            f"predictor: expected {spec!r} to make predictors with the methods `observe` and `score`, got {made!r:.80}"
        )
    size, needs_keys = getattr(made, "state_size", None), getattr(made, "needs_keys", None)
    if type(size) is not int or size < 0:
        raise ConfigError(f"predictor: expected {spec!r} to have an integer state_size of at least 0, got {size!r:.80}")
    if not isinstance(needs_keys, bool):
        raise ConfigError(f"predictor: expected {spec!r} to have needs_keys true or false, got {needs_keys!r:.80}")
    return made


def predict(made: Predictor, state: Float32Array, step: TileStep) -> Float32Array:
    """Show a step to a predictor, and ask for the scores of the next one.

    Args:
        made: the predictor.
        state: ``[state_size, *lead, num_tiles]`` float32, updated in place. Its contents are unspecified if this
            raises.
        step: the step that has ended.

    Returns:
        ``[*lead, num_tiles]`` float32 scores without NaN.

    Raises:
        ShapeError: ``state`` has another shape, or the predictor needs a query or bounds that the step lacks.
        ConfigError: the predictor raises, or answers with anything else than such scores.
    """
    expected = (made.state_size, *step.mass.shape)
    if state.shape != expected:
        raise ShapeError(f"state: expected {list(expected)}, got {list(state.shape)}")
    if made.needs_keys and (step.query is None or step.key_low is None or step.key_high is None):
        raise ShapeError(f"step: expected query, key_low and key_high, which {type(made).__name__} needs")
    name = type(made).__name__
    try:
        made.observe(state, step)
        scores = made.score(state, step)
    except (Exception, SystemExit) as error:  # whatever a plug-in does
        raise ConfigError(f"predictor: {name} failed: {type(error).__name__}: {error}") from error
    try:
        array = np.array(scores, np.float32)
    except (TypeError, ValueError):
        array = np.empty(0, np.float32)
    if array.shape != step.mass.shape:
        raise ConfigError(
            f"predictor: expected {name}.score to return {list(step.mass.shape)} numbers, got {scores!r:.80}"
        )
    if np.isnan(array).any():  # NaN has no place in an order, so chance would decide what is read
        raise ConfigError(
            f"predictor: expected {name}.score to return numbers without NaN, got {int(np.isnan(array).sum())} NaN"
        )
    return array


def new_state(made: Predictor, lead: tuple[int, ...], num_tiles: int) -> Float32Array:
    """``[state_size, *lead, num_tiles]`` float32 of tiles that no step has shown yet."""
    return np.full((made.state_size, *lead, num_tiles), np.nan, np.float32)


def extend(state: Float32Array, num_tiles: int) -> Float32Array:
    """The state of a sequence that now has ``num_tiles`` tiles: shorter, or with new tiles at the end.

    Args:
        state: ``[state_size, *lead, any]`` float32; stays as it is.
    """
    more = num_tiles - state.shape[-1]
    if more <= 0:
        return state[..., :num_tiles].copy()
    return np.concatenate([state, np.full((*state.shape[:-1], more), np.nan, np.float32)], axis=-1)


def with_revisits(scores: Float32Array, index: int, period: int = 64) -> Float32Array:
    """Give every ``period``-th tile the highest score, another set of tiles at each step.

    Each tile of a sequence is then chosen at least once in ``period`` steps, whatever the predictor thinks of it, as
    long as the choice has room for them: ``num_tiles / period`` tiles, rounded up, at each step.

    Args:
        scores: ``[*lead, num_tiles]`` float32; stay as they are.
        index: number of the step.
        period: steps between two visits, at least 1.
    """
    visited = scores.copy()
    visited[..., index % period :: period] = np.inf
    return visited


def shared_scores(scores: Float32Array, axes: tuple[int, ...], by: str = "max") -> Float32Array:
    """Give all layers, heads or both the same scores, because they read the same tiles.

    The mean keeps most attention in total. The greatest score keeps a tile that one head alone needs, as for looking up
    a fact; the mean of many heads hides it.

    Args:
        scores: ``[*lead, num_tiles]`` float32.
        axes: those of ``lead`` that share; with none the scores are returned as they are.
        by: ``max`` or ``mean``.

    Returns:
        Scores of the same shape, perhaps a read-only view.

    Raises:
        ConfigError: ``by`` is something else.
    """
    require_one_of("by", by, ("max", "mean"))
    if not axes:
        return scores
    shared = scores.max(axes, keepdims=True) if by == "max" else scores.mean(axes, keepdims=True)
    return np.broadcast_to(shared, scores.shape)


def choose(scores: Float32Array, count: int) -> NDArray[np.bool_]:
    """The ``count`` tiles with the highest scores; among equals the newest.

    Args:
        scores: ``[*lead, num_tiles]`` without NaN.
        count: tiles to choose, from 0 to ``num_tiles``.

    Returns:
        ``[*lead, num_tiles]`` bool, with ``count`` true values on the last axis.
    """
    num_tiles = scores.shape[-1]
    order = np.argsort(scores, axis=-1, kind="stable")[..., num_tiles - count :]
    chosen = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen
