"""Predictors of attention: what each expects, that no tile is starved, and plug-ins that misbehave."""

import numpy as np
import pytest

from kvtoolkit.config import prediction
from kvtoolkit.config.prediction import (
    TileStep,
    choose,
    extend,
    new_state,
    predict,
    predictor,
    shared_scores,
    with_revisits,
)
from kvtoolkit.config.predictors import Bound, Frequency, Last, Mass, Random, Recency
from kvtoolkit.errors import ConfigError, ShapeError
from tests.kvtoolkit.config import bad_predictors

HERE = "tests.kvtoolkit.config.bad_predictors"
NAN = np.nan


def step_of(mass, index=0, **more):
    return TileStep(index, np.asarray(mass, np.float32), **more)


def scores_after(made, *masses):
    """The scores after steps with these masses of one head's tiles."""
    state = new_state(made, (), 0)
    for index, mass in enumerate(masses):
        state = extend(state, len(mass))
        scores = predict(made, state, step_of(mass, index))
    return scores.tolist()


def random_step(shape, index=0, head_dim=16, group_size=3, seed=0):
    draw = np.random.default_rng(seed)
    mass = draw.random(shape, np.float32)
    keys = draw.standard_normal((*shape, 64, head_dim), np.float32)
    query = draw.standard_normal((*shape[:-1], group_size, head_dim), np.float32)
    step = TileStep(index, mass, query, keys.min(-2), keys.max(-2), head_dim**-0.5)
    return step, query, keys


# -- each predictor ----------------------------------------------------------------------------------------------------


def test_mass_is_the_decayed_mean():
    masses = [[0.5], [0.1], [0.3]]
    weights = np.array([0.64, 0.8, 1.0])
    expected = weights @ np.array([0.5, 0.1, 0.3]) / weights.sum()
    assert scores_after(Mass(0.8), *masses) == pytest.approx([expected])


def test_without_decay_mass_is_the_last_mass():
    masses = np.random.default_rng(0).random((5, 7))
    assert scores_after(Mass(0.0), *masses) == pytest.approx(scores_after(Last(), *masses))


@pytest.mark.parametrize("made", [Mass(0.9), Last()])
def test_an_estimate_does_not_fall_while_its_tile_is_not_read(made):
    assert scores_after(made, [0.25, 0.5], *[[NAN, 0.1]] * 1000)[0] == 0.25


def test_the_first_mass_after_a_long_pause_replaces_the_old_mean():
    after_pause = scores_after(Mass(0.9), *[[0.01]] * 20, *[[NAN]] * 100, [0.4])
    assert after_pause == pytest.approx([0.4], rel=1e-3)
    assert scores_after(Mass(0.9), *[[0.01]] * 20, [0.4])[0] < 0.1


@pytest.mark.parametrize("made", [Mass(), Last(), Frequency()])
def test_a_tile_that_was_never_read_comes_first(made):
    assert scores_after(made, [0.2, NAN, 0.3])[1] == np.inf
    # a tile that is added later, and not read then either
    assert scores_after(made, [0.2], [0.2, NAN])[1] == np.inf
    assert np.isfinite(scores_after(made, [0.2], [0.2, NAN], [NAN, 0.0])).all()


def test_recency_prefers_the_newest():
    assert scores_after(Recency(), [0.9, 0.1, NAN]) == [0, 1, 2]


def test_frequency_counts_membership_and_halves_it():
    made = Frequency(share=0.5, period=4)
    low, high = [0.1, 0.4, 0.3, 0.0], [0.4, 0.1, 0.3, 0.0]
    assert scores_after(made, low, low, high) == [1, 2, 3, 0]
    # the step with index 4 halves before it counts
    assert scores_after(made, low, low, high, high, low) == [1, 2, 3, 0]


def test_frequency_counts_no_tile_that_was_not_read():
    assert scores_after(Frequency(share=1.0), [0.1, 0.2], [NAN, 0.2]) == [1, 2]


def test_the_bound_is_above_every_product_and_tight_for_one_key():
    step, query, keys = random_step((2, 3, 5))
    made = Bound(width=1.0)
    middle, half = (step.key_high + step.key_low) / 2, (step.key_high - step.key_low) / 2
    bounds = np.einsum("lhgd,lhtd->lhgt", query, middle) + np.einsum("lhgd,lhtd->lhgt", np.abs(query), half)
    assert (bounds >= np.einsum("lhgd,lhtkd->lhgtk", query, keys).max(-1) - 1e-4).all()
    weights = np.exp(bounds * step.softmax_scale)
    expected = (weights / weights.sum(-1, keepdims=True)).mean(-2)
    assert made.score(new_state(made, (2, 3), 5), step) == pytest.approx(expected, rel=1e-4)
    # a box of one key has no width
    one = TileStep(0, step.mass, query, keys[..., 0, :], keys[..., 0, :], step.softmax_scale)
    narrow, wide = (Bound(width).score(new_state(made, (2, 3), 5), one) for width in (0.0, 1.0))
    assert (narrow == wide).all()
    assert not np.allclose(Bound(0.0).score(new_state(made, (2, 3), 5), step), expected)


@pytest.mark.parametrize("width", [0.0, 0.5, 1.0])
def test_the_bound_finds_the_tile_that_the_query_points_at(width):
    step, _, keys = random_step((2, 3, 8))
    keys = keys + 10 * np.eye(8, 16, dtype=np.float32)[:, None]  # each tile has a direction of its own
    wanted = np.array([[0, 3, 7], [5, 2, 2]])
    query = np.eye(16, dtype=np.float32)[wanted][..., None, :]
    made = Bound(width)
    towards = TileStep(0, step.mass, query, keys.min(-2), keys.max(-2), step.softmax_scale)
    assert (predict(made, new_state(made, (2, 3), 8), towards).argmax(-1) == wanted).all()


def test_large_products_do_not_overflow():
    step, query, _ = random_step((1, 1, 4))
    huge = TileStep(0, step.mass, 1e4 * query, step.key_low, step.key_high, 1.0)
    assert np.isfinite(predict(Bound(), new_state(Bound(), (1, 1), 4), huge)).all()


def test_random_follows_its_seed_and_the_step():
    step, later = random_step((4, 9))[0], random_step((4, 9), index=1)[0]
    first = Random(seed=3).score(new_state(Random(), (4,), 9), step)
    assert (first == Random(seed=3).score(new_state(Random(), (4,), 9), step)).all()
    assert (first != Random(seed=4).score(new_state(Random(), (4,), 9), step)).any()
    assert (first != Random(seed=3).score(new_state(Random(), (4,), 9), later)).any()
    assert (first[0] != first[1]).any()


def test_random_puts_protected_tiles_before_all_others():
    made = Random(num_protected=3)
    for index in range(20):
        scores = made.score(new_state(made, (5,), 9), random_step((5, 9), index)[0])
        assert (choose(scores, 3)[..., :3]).all()


@pytest.mark.parametrize("name", ["mass", "last", "recency", "frequency", "bound", "random"])
def test_every_built_in_predictor_judges_each_head_by_itself(name):
    """What one head gets among six is what it gets alone; only random draws anew."""
    made = predictor(name)
    state, alone = new_state(made, (2, 3), 6), new_state(made, (), 6)
    for index in range(5):
        step = random_step((2, 3, 6), index, seed=index)[0]
        mass = step.mass.copy()
        mass[..., index] = NAN
        step = TileStep(index, mass, step.query, step.key_low, step.key_high, step.softmax_scale)
        one = TileStep(index, mass[1, 2], step.query[1, 2], step.key_low[1, 2], step.key_high[1, 2], step.softmax_scale)
        scores, of_one = predict(made, state, step), predict(made, alone, one)
        assert scores.shape == (2, 3, 6)
        assert scores.dtype == np.float32
        if name != "random":
            assert scores[1, 2] == pytest.approx(of_one, rel=1e-5)


@pytest.mark.parametrize("name", ["mass", "last", "recency", "frequency", "bound", "random"])
def test_a_sequence_without_candidates_has_no_scores(name):
    made = predictor(name)
    assert predict(made, new_state(made, (2, 3), 0), random_step((2, 3, 0))[0]).shape == (2, 3, 0)


# -- tiles that come, go and wait --------------------------------------------------------------------------------------


def test_a_state_grows_by_unknown_tiles_and_shrinks():
    state = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    longer = extend(state, 5)
    assert (longer[..., :3] == state).all()
    assert np.isnan(longer[..., 3:]).all()
    shorter = extend(state, 2)
    assert (shorter == state[..., :2]).all()
    shorter[...] = -1  # of its own: a fork must not change its parent
    assert (state >= 0).all()


def test_the_highest_are_chosen_and_among_equals_the_newest():
    assert choose(np.float32([[3, 1, 2], [1, 1, 1], [np.inf, 0, -1]]), 2).tolist() == [
        [True, False, True],
        [False, True, True],
        [True, True, False],
    ]
    assert choose(np.float32([1, 2]), 0).tolist() == [False, False]
    assert choose(np.float32([1, 2]), 2).tolist() == [True, True]


def test_a_shared_choice_follows_the_greatest_score_or_the_mean():
    scores = np.float32([[[5, 1, 3], [0, 4, 3]], [[0, 0, 3], [0, 0, 0]]])
    assert shared_scores(scores, (1,))[:, 0].tolist() == [[5, 4, 3], [0, 0, 3]]
    assert shared_scores(scores, (1,), "mean")[:, 1].tolist() == [[2.5, 2.5, 3], [0, 0, 1.5]]
    assert shared_scores(scores, (0, 1))[1, 1].tolist() == [5, 4, 3]
    assert shared_scores(scores, (0, 1), by="mean")[0, 0].tolist() == [1.25, 1.25, 2.25]
    assert shared_scores(scores, ()).tolist() == scores.tolist()
    assert np.isposinf(shared_scores(np.float32([[np.inf, 0], [1, 1]]), (0,), "mean")[:, 0]).all()
    with pytest.raises(ConfigError, match="by: expected one of max, mean"):
        shared_scores(scores, (0,), "median")


@pytest.mark.parametrize("num_tiles", [1, 15, 16, 17, 50])
def test_revisits_reach_every_tile_in_each_period_a_few_at_a_time(num_tiles):
    scores = np.zeros((3, num_tiles), np.float32)
    visited = np.array([np.isinf(with_revisits(scores, index, 16)) for index in range(5, 5 + 16)])
    assert (visited.sum(0) == 1).all()
    assert visited.sum(-1).max() == -(-num_tiles // 16)
    assert (scores == 0).all()


@pytest.mark.parametrize("name", ["mass", "last", "frequency"])
def test_a_tile_that_becomes_important_while_it_is_not_read_is_found(name):
    """Only chosen tiles are seen; from step 50 on all attention is on tile 0, which nothing had spoken for."""
    made = predictor(name)
    state = new_state(made, (), 12)
    mass = np.linspace(0.01, 0.05, 12, dtype=np.float32)
    read, found = np.ones(12, bool), None
    for index in range(100):
        if index == 50:
            mass = np.full(12, 0.01, np.float32)
            mass[0] = 0.8
        scores = predict(made, state, step_of(np.where(read, mass, NAN), index))
        read = choose(with_revisits(scores, index, 16), 3)
        if index > 50 and read[0] and found is None:
            found = index
    assert found is not None
    assert found <= 50 + 17
    if name != "frequency":  # counts need longer to change their order
        assert read[0]


# -- names and plug-ins ------------------------------------------------------------------------------------------------


@pytest.fixture
def own_names(monkeypatch):
    monkeypatch.setattr(prediction, "_PREDICTORS", dict(prediction._PREDICTORS))


def test_predictors_are_made_by_name_by_path_and_from_factories(own_names):
    assert prediction.names() == ("mass", "last", "recency", "frequency", "bound", "random")
    assert isinstance(predictor("mass"), Mass)
    assert isinstance(predictor(f"{HERE}:Fine"), bad_predictors.Fine)
    prediction.register("slow", lambda: Mass(beta=0.999))
    assert predictor("slow").beta == 0.999
    assert "slow" in prediction.names()
    prediction.register("mass", bad_predictors.factory, replace=True)
    assert isinstance(predictor("mass"), bad_predictors.Fine)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prediction.register("a b", Mass), "name: expected an identifier, got 'a b'"),
        (lambda: prediction.register("mine", 7), "factory: expected a class or a function, got 7"),
        (lambda: prediction.register("last", Mass), "name: 'last' is a built-in predictor.*replace=True"),
        (lambda: predictor(7), "predictor: expected a name or 'package.module:Class', got 7"),
        (lambda: predictor("mas"), "expected one of mass, last, recency, frequency, bound, random or .*, got 'mas'"),
        (lambda: predictor("no.such.module:Class"), "cannot be imported: ModuleNotFoundError"),
        (lambda: predictor(f"{HERE}:factory"), "to be a class, got function 'factory'"),
        (lambda: predictor(f"{HERE}:NoScore"), "to have score, which NoScore lacks"),
        (lambda: predictor(f"{HERE}:NeedsArguments"), "cannot be made: TypeError: .*decay"),
        (lambda: predictor(f"{HERE}:NoSize"), "an integer state_size of at least 0, got None"),
        (lambda: predictor(f"{HERE}:NegativeSize"), "an integer state_size of at least 0, got -1"),
        (lambda: predictor(f"{HERE}:SometimesNeedsKeys"), "needs_keys true or false, got 'sometimes'"),
    ],
)
def test_what_is_no_predictor_is_named(call, message):
    bad_predictors.called.clear()
    with pytest.raises(ConfigError, match=message):
        call()
    assert "factory" not in bad_predictors.called


def test_a_factory_that_makes_no_predictor_is_named(own_names):
    prediction.register("seven", lambda: 7)
    with pytest.raises(ConfigError, match="with the methods `observe` and `score`, got 7"):
        predictor("seven")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WrongShape", r"expected WrongShape.score to return \[2, 5\] numbers, got array"),
        ("NoArray", r"expected NoArray.score to return \[2, 5\] numbers, got 'high'"),
        ("Nothing", r"expected Nothing.score to return \[2, 5\] numbers, got None"),
        ("Nan", "expected Nan.score to return numbers without NaN, got 10 NaN"),
        ("RaisesInObserve", "RaisesInObserve failed: KeyError: 'layer 7'"),
        ("ExitsInScore", "ExitsInScore failed: SystemExit: 3"),
    ],
)
def test_nonsense_of_a_predictor_is_refused(name, message):
    made = predictor(f"{HERE}:{name}")
    with pytest.raises(ConfigError, match=message):
        predict(made, new_state(made, (2,), 5), random_step((2, 5))[0])


def test_scores_are_not_the_state_even_if_a_predictor_answers_with_it():
    made = predictor(f"{HERE}:LendsItsState")
    state = new_state(made, (2,), 3)
    scores = predict(made, state, step_of(np.ones((2, 3))))
    scores[...] = -1
    assert (state == 1).all()


def test_a_state_of_another_shape_and_a_step_without_keys_are_refused():
    with pytest.raises(ShapeError, match=r"state: expected \[2, 4, 5\], got \[2, 4, 4\]"):
        predict(Mass(), new_state(Mass(), (4,), 4), random_step((4, 5))[0])
    with pytest.raises(ShapeError, match="expected query, key_low and key_high, which Bound needs"):
        predict(Bound(), new_state(Bound(), (4,), 5), step_of(np.ones((4, 5))))
