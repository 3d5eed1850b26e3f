"""What tiers cost in accuracy: the metrics by hand, and the command on a tiny model."""

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvtoolkit.bench import accuracy  # noqa: E402
from kvtoolkit.commands import cli  # noqa: E402
from kvtoolkit.integrations.smollm2 import missing_packages  # noqa: E402
from kvtoolkit.integrations.transformers import use_kvtoolkit  # noqa: E402

VOCAB = 300


class Bytes:
    """A tokenizer whose tokens are bytes; a word of the keys' names is one token, as with SmolLM2."""

    def __call__(self, text):
        for i, name in enumerate(accuracy._NAMES):
            text = text.replace(name, chr(256 + i))
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=2048, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float().eval()
    use_kvtoolkit(model)
    return model


@pytest.fixture
def command(model, monkeypatch, tmp_path):
    """``kvtoolkit bench accuracy`` with the tiny model."""
    monkeypatch.setattr(accuracy, "load_smollm2", lambda **options: (model, Bytes()))
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(0).integers(97, 123, 1200))))
    return lambda *arguments: cli.main(["bench", "accuracy", "--text", str(text), *arguments])


def test_equal_logits_have_no_divergence():
    logits = np.random.default_rng(0).normal(0, 10, (5, 50)).astype(np.float32)
    kl, same = accuracy.compare(logits, logits)
    assert (kl == 0).all()
    assert same.all()


def test_the_divergence_of_two_coins():
    half, quarter = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    kl, same = accuracy.compare(half, quarter + 7.0)  # a constant changes nothing
    assert kl == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)])
    assert accuracy.compare(quarter, half)[0] == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5)])
    assert not accuracy.compare(quarter, quarter[:, ::-1])[1]
    assert same.shape == (1,)


def test_a_reference_beside_itself_differs_by_nothing(model):
    ids = np.random.default_rng(1).integers(0, VOCAB, 201).tolist()
    figures = accuracy.measure(model, ids, {"reference": None, "again": None}, skip=70, chunk=32)
    again = figures["again"]
    assert (again.change, again.change_error, again.mean_kl, again.p99_kl, again.agreement) == (0, 0, 0, 0, 1)
    assert (again.hot, again.warm, again.cold) == (1, 0, 0)
    assert again.nbytes_per_token == 2 * 2 * 64 * 2
    assert again == figures["reference"]


def test_the_reference_does_not_depend_on_the_chunk(model):
    """Its perplexity is that of one forward over the whole text."""
    ids = np.random.default_rng(2).integers(0, VOCAB, 150).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0, 40:].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[41:])).exp().item()
    for chunk in (7, 64):
        figures = accuracy.measure(model, ids, {"reference": None}, skip=40, chunk=chunk)
        assert figures["reference"].perplexity == pytest.approx(expected, rel=1e-5)


def test_coarser_tiers_cost_more(model):
    ids = np.random.default_rng(3).integers(0, VOCAB, 513).tolist()
    settings = {name: accuracy.SETTINGS[name] for name in ("reference", "int8", "int4")}
    figures = accuracy.measure(model, ids, settings, skip=256, chunk=16)
    int8, int4 = figures["int8"], figures["int4"]
    assert 0 < int8.mean_kl < int4.mean_kl
    assert int8.mean_kl < int8.p99_kl
    assert int8.agreement > int4.agreement
    # of a length that is a multiple of 64, the first and the last 64 are hot; between, one tile more
    assert int8.hot == pytest.approx(int4.hot)
    assert 0.3 < int8.hot < 0.55
    assert int8.warm == pytest.approx(1 - int8.hot)
    assert int4.cold == pytest.approx(1 - int4.hot)
    assert int8.nbytes_per_token == pytest.approx(2 * (256 * int8.hot + 132 * int8.warm))
    assert int4.nbytes_per_token == pytest.approx(2 * (256 * int4.hot + 72 * int4.cold))


def test_the_command_prints_and_writes_its_figures(command, capsys, tmp_path):
    path = tmp_path / "figures.json"
    custom = "hot=64,pinned_tokens=0,warm=int8,warm_tokens=128,cold=int4,demote=mass"
    arguments = [
        "--tokens",
        "400",
        "--passkey",
        "550",
        "--prompts",
        "2",
        "--settings",
        "int8",
        custom,
        "--json",
        str(path),
    ]
    assert command(*arguments) in (0, 1)  # a random model may miss a gate
    out = capsys.readouterr().out
    assert "positions 200 to 399, 32 tokens a step" in out
    assert "gates: change, top-1" in out
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["reference", "int8", custom]
    assert rows["reference"]["change"] == rows["reference"]["mean_kl"] == 0
    assert rows[custom]["warm"] > 0
    assert rows[custom]["cold"] > 0
    assert all(0 <= row["keys"] <= 16 for row in rows.values())


def test_missed_gates_are_the_exit_status(command, capsys, monkeypatch):
    monkeypatch.setitem(accuracy.GATES, "int4", (-1.0, 0.0))
    assert command("--tokens", "200", "--passkey", "0", "--settings", "int4") == 1
    out = capsys.readouterr().out
    assert "<= -100.0% no, >= 0.0% yes" in out
    assert "of the history was quantized: a longer text says more" in out


def test_keys_are_hidden_whole_at_even_distances():
    prompt, numbers = accuracy.hide_keys(Bytes(), [46] * 2000, 1500)
    text = Bytes().decode(prompt)
    assert len(prompt) == 1500
    places = [text.index(f"The secret number of the {chr(256 + i)} is {n}.") for i, n in enumerate(numbers)]
    assert places == sorted(places)
    assert np.ptp(np.diff(places)) <= 1


def test_answers_do_not_depend_on_the_fork(model):
    """Eight questions to each of two prompts at once are answered as each by itself without a cache."""
    prompts = [accuracy.hide_keys(Bytes(), [46] * 1000, 700, seed)[0] for seed in (0, 1)]
    assert prompts[0] != prompts[1]
    answers = accuracy.ask_keys(model, Bytes(), prompts, None, chunk=50)
    asked = [(prompt, name) for prompt in prompts for name in accuracy._NAMES]
    for (prompt, name), answer in list(zip(asked, answers, strict=True))[::5]:
        ids = prompt + Bytes()(f"The secret number of the {name} is")["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == Bytes().decode(ids[-6:]).strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "--tokens: expected 2 to 8192, got 1"),
        (["--tokens", "100", "--skip", "100"], "--skip: expected 0 to 99, got 100"),
        (["--chunk", "0"], "--chunk: expected at least 1, got 0"),
        (["--prompts", "0"], "--prompts: expected 1 to 64, got 0"),
        (["--device", "cuda:99"], "--device: cuda:99 cannot be used"),
        (["--passkey", "9000"], "--passkey: expected 0 to 8000, got 9000"),
        (["--passkey", "100"], "--passkey: expected 0, or 512 to 8000, got 100"),
        (["--settings", "int3"], "expected some of reference, int8, int4, tiers, tiers-mass, or field=value"),
        (["--settings", "hot=65,warm=int8"], "--settings: tiers.hot: expected a multiple of 64, got 65"),
        (["--text", "/nowhere/at/all"], "--text: /nowhere/at/all cannot be read"),
        (["--tokens", "4000", "--passkey", "0"], "--text: expected a text of at least 4001 tokens, got 1200"),
    ],
)
def test_wrong_options_say_what_was_expected(command, arguments, message, capsys):
    try:
        status = command(*arguments)
    except SystemExit as end:  # of the parser
        status = end.code
    said = capsys.readouterr().err
    assert (status, len(said.splitlines())) == (2, 1)
    assert message in said


@pytest.mark.model
@pytest.mark.slow
def test_int8_of_a_real_model_is_within_its_gates(capsys):
    if missing := missing_packages():
        pytest.skip(f"{', '.join(missing)} not installed")
    arguments = ["--tokens", "768", "--skip", "512", "--passkey", "0", "--settings", "int8"]
    assert cli.main(["bench", "accuracy", *arguments]) == 0
    assert "<= 0.1% yes, >= 98.5% yes" in capsys.readouterr().out
