"""The bench of predictors: recordings beside plain attention, ratings by hand, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kvtoolkit.bench import prediction as bench
from kvtoolkit.bench import prediction_cases as cases
from kvtoolkit.bench import prediction_scores as scores
from kvtoolkit.bench.attention_recordings import Recording, tile_bounds, tile_masses
from kvtoolkit.commands import cli
from kvtoolkit.config.predictors import Last, Mass, Recency
from kvtoolkit.errors import ArgumentError
from kvtoolkit.integrations.smollm2 import missing_packages


def recording_of(mass, first_position=447):
    """A recording of one layer; its candidates are the tiles from 1 up to the hot window."""
    mass = np.asarray(mass, np.float32)
    if mass.ndim == 2:
        mass = mass[:, None, None]
    bounds = np.zeros((*mass.shape[1:], 4), np.float32)
    query = np.zeros((*mass.shape[:3], 1, 4), np.float32)
    return Recording("made", first_position, mass, query, bounds, bounds, 0.5, num_prompt_tiles=2)


def random_recording(num_steps=40, lead=(2, 3), first_position=700, num_tiles=12, seed=0):
    mass = np.random.default_rng(seed).random((num_steps, *lead, num_tiles), np.float32)
    return recording_of(mass / mass.sum(-1, keepdims=True), first_position)


# -- recordings --------------------------------------------------------------------------------------------------------


def test_masses_are_those_of_plain_attention():
    draw = np.random.default_rng(0)
    query, key = draw.normal(size=(2, 3, 70, 8)), draw.normal(size=(2, 200, 8))
    masses = tile_masses(query.astype(np.float32), key.astype(np.float32), 130, 0.7)
    assert masses.shape == (70, 2, 4)
    assert masses.sum(-1) == pytest.approx(np.ones((70, 2)), rel=1e-5)
    for step in (0, 1, 63, 64, 69):
        seen = 130 + step + 1
        logits = 0.7 * np.einsum("hgd,htd->hgt", query[:, :, step], key[:, :seen])
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for tile in range(4):
            expected = weights[..., 64 * tile : 64 * tile + 64].sum(-1).mean(-1)
            assert masses[step, :, tile] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_bounds_are_those_of_each_tile():
    key = np.random.default_rng(1).normal(size=(2, 130, 4)).astype(np.float32)
    low, high = tile_bounds(key)
    assert low.shape == (2, 3, 4)
    assert (low[:, 1] == key[:, 64:128].min(1)).all()
    assert (high[:, 2] == key[:, 128:].max(1)).all()


def test_candidates_are_full_tiles_between_the_pinned_ones_and_the_hot_window():
    recording = recording_of(np.zeros((80, 9)), first_position=383)
    # 384 tokens: of the tiles 0 to 5 the first is pinned and four are hot
    assert recording.candidates(0) == slice(1, 2)
    assert recording.candidates(63) == slice(1, 2)
    assert recording.candidates(64) == slice(1, 3)
    assert recording_of(np.zeros((2, 9)), first_position=100).candidates(0) == slice(1, 1)


def test_a_model_is_recorded_as_it_attends():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from kvtoolkit.bench.attention_recordings import record_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float().eval()
    ids = np.random.default_rng(0).integers(0, 100, 300).tolist()
    recording, likeliest = record_model(model, ids, 40, "tiny", num_prompt_tiles=1)
    assert recording.first_position == 260
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True, use_cache=True)
    assert (likeliest == out.logits[0, -40:].argmax(-1).numpy()).all()
    for layer, weights in enumerate(out.attentions):
        tiles = np.add.reduceat(weights[0, :, -40:].numpy(), np.arange(0, 300, 64), axis=-1)  # [heads, steps, tiles]
        expected = tiles.reshape(2, 2, 40, 5).mean(1).transpose(1, 0, 2)
        assert recording.mass[:, layer] == pytest.approx(expected, abs=1e-5)
        key = out.past_key_values.layers[layer].keys[0].numpy()
        assert recording.key_low[layer] == pytest.approx(tile_bounds(key)[0], abs=1e-5)
        assert recording.key_high[layer] == pytest.approx(tile_bounds(key)[1], abs=1e-5)
        query = recording.query[:, layer].transpose(1, 2, 0, 3)
        assert tile_masses(query, key, 260, recording.softmax_scale) == pytest.approx(expected, abs=1e-5)


# -- replays -----------------------------------------------------------------------------------------------------------


def test_scores_come_from_earlier_steps_alone():
    recording = random_recording()
    changed = recording.mass.copy()
    changed[20:] = changed[20:, ..., ::-1]
    for made in (Mass(), Last()):
        before, after = scores.replay(recording, made), scores.replay(replace(recording, mass=changed), made)
        assert (before[:21] == after[:21]).all()
        assert (before[21] != after[21]).any()


def test_last_scores_are_the_masses_of_the_step_before():
    recording = random_recording()
    found = scores.replay(recording, Last())
    possible = scores.candidates(recording)
    for step in (1, 5, 39):
        tiles = recording.candidates(step)
        assert (found[step, ..., tiles] == recording.mass[step - 1, ..., tiles]).all()
        assert np.isneginf(found[step][..., ~possible[step]]).all()


def test_between_observations_scores_stay_and_new_tiles_are_kept():
    recording = random_recording(num_steps=40, first_position=700)
    found = scores.replay(recording, Last(), period=16)
    # 704 tokens at step 3: a tile more; it is observed in step 16
    assert recording.candidates(3).stop == recording.candidates(2).stop + 1
    new = recording.candidates(2).stop
    assert np.isposinf(found[3:17, ..., new]).all()
    assert np.isfinite(found[17:, ..., new]).all()
    old = recording.candidates(1)
    assert (found[2:17, ..., old] == found[1, ..., old]).all()
    assert (found[17, ..., old] == recording.mass[16, ..., old]).all()


class Spy(Last):
    def __init__(self):
        self.shown = []

    def observe(self, state, step):
        self.shown.append(step.mass.copy())
        super().observe(state, step)


@pytest.mark.parametrize("sharing", scores.SHARING)
def test_a_sparse_replay_shows_only_what_was_chosen_and_revisits_all(sharing):
    recording, spy = random_recording(num_steps=40), Spy()
    found = scores.replay_sparse(recording, spy, 0.5, sharing, period=8)
    assert not np.isnan(spy.shown[0]).any()
    for step, shown in enumerate(spy.shown[1:], 1):
        tiles = recording.candidates(step)
        before = scores.chosen_tiles(found[step : step + 1], np.array([round(0.5 * (tiles.stop - tiles.start))]))[0]
        read = ~np.isnan(shown[..., : tiles.stop - tiles.start])
        assert (read == before[..., tiles]).all()
        # shares of the softmax over what was read
        whole = recording.mass[step, ..., tiles]
        left_out = np.where(read, 0, whole).sum(-1, keepdims=True)
        expected = (whole / (1 - left_out))[read]
        assert shown[..., : read.shape[-1]][read] == pytest.approx(expected, rel=1e-5)
    reads = np.array([~np.isnan(shown[..., :5]) for shown in spy.shown[8:]])
    assert all(reads[i : i + 8].any(0).all() for i in range(len(reads) - 8))


# -- ratings -----------------------------------------------------------------------------------------------------------


def test_ratings_of_a_choice_by_hand():
    # 448 tokens: candidates are the tiles 1 and 2; half of them is one tile
    mass = [[0.2, 0.3, 0.1, 0.4], [0.2, 0.1, 0.3, 0.4], [0.2, 0.3, 0.1, 0.4]]
    recording = recording_of(mass)
    assert recording.candidates(2) == slice(1, 3)
    by_last = scores.rate(recording, scores.replay(recording, Last()), (0.5, 1.0), "head", 1)
    assert figures_of(by_last[0.5]) == pytest.approx([1 / 3, 1 / 3, 0.3, 1.0])
    assert figures_of(by_last[1.0]) == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=1e-6)
    newest = scores.rate(recording, scores.replay(recording, Recency()), (0.5,), "head", 1)[0.5]
    assert figures_of(newest) == pytest.approx([0.4 / 0.6, (1 + 1 / 3) / 2, 0.2, 0.0])


def figures_of(rating):
    return [rating.recall, rating.mean_recall, rating.missed, rating.new]


def test_wanted_tiles_count_by_the_attention_on_them():
    mass = np.full((4, 1, 2, 4), 0.1)
    mass[:, 0, 0, 1], mass[:, 0, 1, 1] = 0.3, 0.2
    # the candidates are 1 and 2, of which Recency chooses 2; 0 is pinned and 3 hot
    recording = recording_of(mass)
    newest = scores.replay(recording, Recency())
    for wanted, expected in (
        ([-1, 1, -1, -1], 0.0),
        ([-1, 2, -1, 1], 0.2 / 0.7),
        ([2, -1, -1, -1], None),
        ([-1, 3, 0, -1], None),
    ):
        asking = replace(recording, wanted=np.array(wanted))
        found = scores.rate(asking, newest, (0.5,), "head", 1)[0.5].wanted
        assert found == (None if expected is None else pytest.approx(expected))
    assert scores.rate(recording, newest, (0.5,), "head", 1)[0.5].wanted is None


@pytest.mark.parametrize("sharing", scores.SHARING)
def test_the_oracle_is_the_best_of_its_kind_and_sharing_costs(sharing):
    recording = random_recording()
    best = scores.rate(recording, scores.oracle(recording), (0.25,), sharing, 5)[0.25]
    alone = scores.rate(recording, scores.oracle(recording), (0.25,), "head", 5)[0.25]
    assert best.recall == pytest.approx(1)
    assert best.missed >= alone.missed
    assert (best.missed > alone.missed) == (sharing != "head")
    for made in (Mass(), Recency()):
        assert scores.rate(recording, scores.replay(recording, made), (0.25,), sharing, 5)[0.25].recall < 1


def test_shared_choices_are_the_same_for_all_that_share():
    found = scores.oracle(random_recording())
    layer, sequence = (scores.share_scores(found, sharing) for sharing in ("layer", "sequence"))
    assert (layer[:, :, :1] == layer).all()
    assert (layer[:, :1] != layer).any()
    assert (sequence[:, :1, :1] == sequence).all()
    assert (found[:, :, :1] != found).any()
    assert (scores.share_scores(found, "layer", "max")[:, :, 0] == found.max(2)).all()


def test_demotion_counts_what_falls_on_the_demoted_tiles_later():
    mass = [[0.2, 0.3, 0.1, 0.4], [0.2, 0.3, 0.1, 0.4], [0.2, 0.1, 0.2, 0.5], [0.2, 0.1, 0.4, 0.3]]
    recording = recording_of(mass)
    by_mass = scores.rate_demotion(recording, scores.replay(recording, Last()), 0.5, "head", 2)
    assert by_mass == pytest.approx(0.6 / 0.8)  # tile 2 had less until then, and has more from then on
    by_age = scores.rate_demotion(recording, scores.replay(recording, Recency()), 0.5, "head", 2)
    assert by_age == pytest.approx(0.2 / 0.8)
    best = scores.rate_demotion(recording, scores.later_masses(recording, 2), 0.5, "head", 2)
    assert best == pytest.approx(0.2 / 0.8)


# -- cases -------------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) for letter in text]}


def test_every_answer_says_where_its_fact_is():
    ids, sources, num_document = cases.needle_tokens(Letters(), [46] * 3000, 3000, 700)
    text = "".join(map(chr, ids))
    assert (len(ids), len(sources), num_document) == (3000, 3000, (3000 - 700) * 5 // 8)
    assert set(text[num_document:-700]) == {"."}
    answers = np.flatnonzero(sources >= 0)
    assert len(answers) >= 32
    assert answers.min() >= 2300
    assert (np.array(ids)[answers] == np.array(ids)[sources[answers]]).all()
    firsts = sources[answers][: len(answers) // 4 * 4 : 4]
    for answer, source in zip(answers[::4], firsts, strict=False):
        name = text[:answer].rpartition("What is the number of the ")[2].partition("?")[0]
        assert text[:source].endswith(f"Remember: the number of the {name} is ")
    assert len(set(firsts.tolist())) == len(firsts)
    assert sorted(firsts.tolist()) != firsts.tolist()


def test_facts_that_have_no_room_are_refused():
    with pytest.raises(ArgumentError, match="--tokens: expected more for 20 facts, got 1000"):
        cases.needle_tokens(Letters(), [46] * 3000, 1000, 600)


@pytest.mark.parametrize("stay", [0.0, 0.5, 0.99])
def test_a_walk_stays_as_often_as_it_should(stay):
    topics = cases.walk(np.random.default_rng(0), 20_000, stay)
    assert (topics[1:] == topics[:-1]).mean() == pytest.approx(stay, abs=0.01)
    assert np.bincount(topics, minlength=cases.NUM_TOPICS).min() > 0


def test_rotation_keeps_products_at_equal_distances():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 1, 64)).astype(np.float32)
    at = [float((cases.rotate(x, np.array([p])) @ cases.rotate(y, np.array([p + 7])).T)[0, 0]) for p in (0, 500, 4000)]
    assert at == pytest.approx([at[0]] * 3, abs=1e-3)
    assert float((x @ y.T)[0, 0]) != pytest.approx(at[0], abs=1e-3)


def contrast_of(recording):
    return float(recording.remarks.split()[1].rstrip(":"))


def test_the_walk_has_contrast_and_noise_has_none():
    assert contrast_of(cases.record_walk(0.9, 1024, 128)) > 1.5
    assert abs(contrast_of(cases.record_walk(0.9, 1024, 128, strength=0.0))) < 0.05


def test_a_predictor_of_masses_follows_a_slow_walk_and_loses_a_fast_one():
    recalls = []
    for stay in (0.99, 0.0):
        recording = cases.record_walk(stay, 1024, 192)
        rated = scores.rate(recording, scores.replay(recording, Mass()), (0.25,), "head", 48)
        recalls.append(rated[0.25].recall)
    assert recalls[0] > 0.9
    assert recalls[1] < 0.6


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_its_figures_without_a_model(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "load_smollm2", lambda **options: pytest.fail("needs no model"))
    path = tmp_path / "figures.json"
    assert cli.main(["bench", "prediction", "--synthetic", "--quick", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "contrast" in out
    figures = json.loads(path.read_text())["walk, stay 0.99"]
    assert figures["ratings"]["oracle"]["head"]["0.25"]["recall"] == 1
    assert figures["ratings"]["mass"]["head"]["0.25"]["recall"] > figures["ratings"]["random"]["head"]["0.25"]["recall"]
    names = ("at_stake", "ratings", "tuning", "periods", "sparse", "demotion")
    assert all(figures[name] for name in names)
    for part in ("sharing", "tuning", "periods", "sparse"):
        assert all(0 < recall <= 1 and wanted is None for recall, wanted in figures[part].values())
    assert all(0 < value < 1 for value in figures["demotion"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "100"], "--tokens: expected 640 to 8192, got 100"),
        (["--tokens", "1024", "--steps", "600"], "--steps: expected at most 512 of 1024 tokens, got 600"),
        (["--steps", "1"], "--steps: expected at least 64, got 1"),
    ],
)
def test_wrong_options_are_named_in_one_line(arguments, message, capsys):
    try:
        status = cli.main(["bench", "prediction", "--synthetic", *arguments])
    except SystemExit as end:  # of the parser
        status = end.code
    said = capsys.readouterr().err
    assert (status, len(said.splitlines())) == (2, 1)
    assert message in said


@pytest.mark.model
@pytest.mark.slow
def test_masses_of_a_real_model_are_predicted_from_those_before(tmp_path):
    if missing := missing_packages():
        pytest.skip(f"{', '.join(missing)} not installed")
    path = tmp_path / "figures.json"
    assert cli.main(["bench", "prediction", "--quick", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    for name in ("pydoc_data.topics", "needles"):
        recalls = {key: of_one["head"]["0.25"]["recall"] for key, of_one in figures[name]["ratings"].items()}
        assert recalls["mass"] > 0.85
        assert recalls["random"] < 0.6
    wanted = figures["needles"]["ratings"]["mass"]["head"]["0.25"]["wanted"]
    assert wanted > figures["needles"]["ratings"]["random"]["head"]["0.25"]["wanted"]
