"""What the demo shows: the picture of the pool, lines where nobody watches, and the comparison of caches."""

import contextlib
import io
import re

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
