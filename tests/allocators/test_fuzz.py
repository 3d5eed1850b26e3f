"""The fuzz engine finds a planted defect, says how to come back to it, and repeats itself for a seed."""

import argparse
import io
import re
import subprocess
import sys

import pytest

from allocators import BuddyAllocator, register, registry
from allocators.testing import fuzz as engine
from allocators.testing.fuzz import add_arguments, fuzz, main, parse_options, replay_command


def run(spec, *, seconds=0.0, **options):
    out = io.StringIO()
    return fuzz(spec, seconds, stream=out, **options), out.getvalue()


@pytest.mark.parametrize("first_round", range(6))
def test_sound_allocator_passes_each_kind_of_round(first_round):
    status, text = run("buddy", seed=7, num_granules=64, first_round=first_round)
    assert status == 0
    assert "1 rounds, nothing found" in text


def test_options_reach_the_allocator():
    status, text = run("lockfree", seed=1, num_granules=24, options={"layout": "slab"})
    assert (status, "nothing found" in text) == (0, True)
    status, text = run("lockfree", options={"layout": "heap"})
    assert status == 1
    assert "expected 'buddy' or 'slab', got 'heap'" in text


def test_failure_is_printed_with_its_calls_and_the_command_to_repeat_it():
    status, text = run("tests.allocators.broken:Broken", seed=5, num_granules=24)
    assert status == 1
    assert "FAILED in round 0" in text
    assert re.search(
        r"the calls that lead there:\n"
        r"    from allocators import create; pool = create\('tests.allocators.broken:Broken', 24\)\n"
        r"    pool.allocate\(\[.*\]\)  # \[.*\]\n(    .*\n)*?"
        r"    pool.free\(\[.*\], \[.*\]\)\n",
        text,
    )
    assert "state." not in text
    assert (
        "again: kvtoolkit fuzz --allocator tests.allocators.broken:Broken --seconds 0 --seed 5 "
        "--num-granules 24 --first-round 0" in text
    )


def test_same_seed_gives_the_same_report():
    reports = []
    for _ in range(2):
        status, text = run("tests.allocators.broken:Broken", seed=11, num_granules=8)
        # how often it says how far it is depends on the machine
        reports.append((status, [line for line in text.splitlines() if "shrinking: " not in line]))
    assert reports[0] == reports[1]


def test_unknown_allocator_is_reported():
    status, text = run("heap")
    assert status == 1
    assert "got 'heap'" in text


def test_arguments_and_main_agree():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = "--allocator slab --seconds 0 --seed 3 --num-granules 64 --option block_sizes=[8,16]"
    assert main(parser.parse_args(line.split())) == 0
    assert main(parser.parse_args(["--allocator", "slab", "--option", "layout"])) == 2
    assert main(parser.parse_args(["--allocator", "slab", "--num-granules", "7"])) == 2
    assert main(parser.parse_args(["--allocator", "slab", "--option", "x=1"])) == 2
    assert main(parser.parse_args(["--allocator", "heap"])) == 2


def test_options_are_literals_or_strings():
    assert parse_options(["layout=slab", "block_sizes=[8, 16]"]) == {"layout": "slab", "block_sizes": [8, 16]}
    with pytest.raises(ValueError, match="expected KEY=VALUE, got 'layout'"):
        parse_options(["layout"])


def test_replay_command_is_quoted_for_a_shell():
    command = replay_command("paged", 1, None, {"block_sizes": [8]}, 4)
    assert command == (
        "kvtoolkit fuzz --allocator paged --seconds 0 --seed 1 --option 'block_sizes=[8]' --first-round 4"
    )


def test_module_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "allocators.testing.fuzz", "--allocator", "paged", "--seconds", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 rounds, nothing found" in done.stdout


def test_a_run_says_which_kinds_of_rounds_it_did_not_reach():
    text = run("buddy", seed=7, num_granules=24)[1]
    assert "fuzz: no round of epochs, threads was reached; give it more --seconds" in text
    text = run("buddy", seed=7, num_granules=24, first_round=2, more={"kernels": lambda make, seed, is_short: 5})[1]
    assert "no round of kernels, calls, threads was reached" in text


def test_a_run_begins_with_one_short_round_of_each_kind(monkeypatch):
    begun = []

    def conform(make, *, max_examples, **options):
        begun.append((type(make()).__name__, max_examples))

    def thread(make, *, max_examples, num_ops, seed):
        begun.append(("threads", max_examples))

    monkeypatch.setattr(engine, "run_conformance", conform)
    monkeypatch.setattr(engine, "run_threads", thread)
    clock = iter(range(100))
    monkeypatch.setattr(engine.time, "monotonic", lambda: next(clock))
    kernels = lambda make, seed, is_short: begun.append(("kernels", is_short)) or 3  # noqa: E731
    status, text = run("buddy", seconds=13.5, more={"kernels": kernels})
    assert begun[:4] == [("kernels", True), ("BuddyAllocator", 5), ("EpochPool", 5), ("threads", 1)]
    assert begun[4:7] == [("kernels", False), ("BuddyAllocator", 50), ("EpochPool", 50)]
    assert status == 0
    assert "was reached" not in text


def test_an_allocator_that_exits_is_a_failure_of_its_round():
    class Exits(BuddyAllocator):
        def stats(self):
            raise SystemExit(3)

    registered = dict(registry._registered)
    try:
        register("exits", Exits)
        for first_round in range(3):
            status, text = run("exits", num_granules=24, first_round=first_round)
            assert status == 1
            assert "SystemExit" in text
    finally:
        registry._registered.clear()
        registry._registered.update(registered)
