"""The fuzz engine finds a planted defect, says how to come back to it, and repeats itself for a seed."""

import argparse
import io
import subprocess
import sys

import pytest

from allocators.testing.fuzz import add_arguments, fuzz, main, parse_options, replay_command


def run(spec, *, seconds=0.0, **options):
    out = io.StringIO()
    return fuzz(spec, seconds, stream=out, **options), out.getvalue()


@pytest.mark.parametrize("first_round", range(4))
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
    assert "state.teardown()" in text
    assert (
        "again: kvtoolkit fuzz --allocator tests.allocators.broken:Broken --seconds 0 --seed 5 "
        "--num-granules 24 --first-round 0" in text
    )


def test_same_seed_gives_the_same_report():
    first, second = (run("tests.allocators.broken:Broken", seed=11, num_granules=8) for _ in range(2))
    assert first == second


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
    assert main(parser.parse_args(["--allocator", "slab", "--seconds", "nan"])) == 2
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
