"""Simulated loads: every request finishes, figures are of what happened, and traces are read as they are."""

import gzip
import json

import numpy as np
import pytest

from kvtoolkit import ArgumentError
from kvtoolkit.bench import load_cases, loads
from kvtoolkit.bench.load_cases import Load, Request
from kvtoolkit.commands import cli


def small(count=24, prompt=40, new=24, **fields):
    random = np.random.default_rng(0)
    requests = tuple(Request(i, random.integers(0, 1 << 40, prompt), new) for i in range(count))
    return Load("small", requests, **{"max_batch": 8, "step_tokens": 64, **fields})


@pytest.mark.parametrize("choice", loads.CHOICES)
def test_every_request_finishes_where_memory_is_short(choice):
    load = small()
    simulation = loads.Simulation(load, 320, loads.CHOICES[choice])
    for cache in simulation.run():
        assert cache.stats().num_seqs == len(simulation.running)
    simulation.cache.check_integrity()
    assert not [*simulation.waiting, *simulation.returning, *simulation.running]
    if min(simulation.cache.config.block_sizes) == 8:  # larger blocks leave more headroom at admission
        assert simulation.figures.preempted > 0
    assert simulation.cache.stats().num_seqs == simulation.cache.stats().num_preempted_seqs == 0


def test_no_preemption_where_memory_is_plentiful():
    found = loads.simulate(small(), 4096, loads.CHOICES["buddy append"], repeats=2)
    assert found.preempted == 0
    assert found.host_us > 0
    assert 0 < found.running <= 8


def test_figures_but_times_are_the_same_in_every_run():
    runs = [vars(loads.simulate(small(), 320, loads.CHOICES["buddy adaptive"])) for _ in range(2)]
    for figures in runs:
        del figures["times"], figures["host_us"]
    assert runs[0] == runs[1]


def test_waste_is_that_of_one_block_size():
    one = small(count=8, prompt=64, new=1)  # 64 tokens fill their blocks, the token after them begins a new one
    found = loads.simulate(one, 4096, loads.CHOICES["paged fixed64"])
    assert found.waste < 0.5
    assert loads.simulate(one, 4096, loads.CHOICES["paged fixed8"]).waste < found.waste


def test_shared_beginnings_are_found_again():
    load = load_cases.LOADS["shared"]()
    part = Load("part", load.requests[:30], load.max_batch, load.step_tokens)
    assert loads.simulate(part, 1 << 16, loads.CHOICES["buddy adaptive"]).reused > 0.3


def test_a_mooncake_trace(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]},
        {"timestamp": 100, "input_length": 1024, "output_length": 0, "hash_ids": [7, 9]},
        {"timestamp": 900, "input_length": 10, "output_length": 3, "hash_ids": [1]},
    ]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    load = load_cases.read_trace(str(path), 2)
    assert load.name == "trace.jsonl"
    assert [(one.arrival, len(one.prompt), one.num_new) for one in load.requests] == [(0, 600, 5), (2, 1024, 1)]
    first, second = (one.prompt for one in load.requests)
    assert (first[:512] == second[:512]).all()
    assert first[512] != second[512]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gone.csv", None), ("a.csv", b""), ("a.csv", b"root:x:0:0\nbin:x:1:1\n"), ("a.csv", bytes(range(256))),
        ("a.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,1\n"), ("a.csv.gz", b"no gzip"),
        ("a.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03\n"),
        ("a.jsonl", b"TIMESTAMP,ContextTokens\n"), ("a.jsonl", b"7\n"), ("a.jsonl", b"{}\n"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-5]), ("a.jsonl", b'{"hash_ids": ["x"], "input_length": 1}'),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_trace_is_named(name, data, tmp_path):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ArgumentError, match=f"^--trace: {path}:? (cannot be read: |expected ).+") as caught:
        load_cases.read_trace(str(path), 2)
    assert "\n" not in str(caught.value)


def test_an_azure_trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.9799600,30,8"
    )
    load = load_cases.read_trace(str(path), 10)
    assert [(one.arrival, len(one.prompt), one.num_new) for one in load.requests] == [(0, 4808, 10), (20, 30, 8)]


def test_the_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(load_cases.LOADS, "short", small)
    path = tmp_path / "found.json"
    arguments = ["--load", "short", "--choice", "paged fixed16", "--repeats", "1", "--json", str(path)]
    assert cli.main(["bench", "loads", *arguments]) == 0
    assert "small, memory short" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["memory"] for row in rows] == ["plentiful", "short"]
    assert {row["choice"] for row in rows} == {"paged fixed16"}
