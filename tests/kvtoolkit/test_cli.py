"""The command line: what it prints and with which status it ends."""

import json
import sys

import pytest

from kvtoolkit import cli, doctor


def test_doctor_finds_the_cpu_backend_working(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "cpu kernels" in out
    assert "Backends" in out


def test_doctor_tells_two_cupys_from_one(monkeypatch):
    both = {"cupy-cuda12x": "14.0", "cupy-cuda13x": "14.0"}
    monkeypatch.setattr(doctor, "_version", both.get)
    finding = doctor._cupy()
    assert finding.state == doctor.BROKEN
    assert finding.detail == "cupy-cuda12x 14.0 and cupy-cuda13x 14.0 are installed together"
    assert "uninstall all of them, then install one" in finding.advice


def test_doctor_survives_a_package_that_cannot_be_imported(monkeypatch, capsys):
    def broken():
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "_torch", broken)
    assert doctor.report() == 1
    assert "OSError: libcudart.so" in capsys.readouterr().out


def test_doctor_reports_an_old_transformers(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"transformers": "4.57.0"}.get)
    assert doctor._transformers().state == doctor.BROKEN


def test_bench_host_prints_and_writes_its_figures(capsys, tmp_path):
    path = tmp_path / "host.json"
    arguments = ["bench", "host", "--batch", "2", "--context", "64", "--repeats", "1", "--allocator", "buddy"]
    assert cli.main([*arguments, "--json", str(path)]) == 0
    assert "ms/step" in capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert figures["steps"][0]["batch"] == 2
    assert [row["batch"] for row in figures["allocators"]] == [1, 64, 4096]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "the following arguments are required: COMMAND"),
        (["bake"], 2, "invalid choice: 'bake'"),
        (["doctor", "--now"], 2, "unrecognized arguments: --now"),
        (["bench", "host", "--batch", "many"], 2, "invalid int value: 'many'"),
        (["bench", "host", "--batch", "0"], 1, "--batch: expected at least 1, got 0"),
        (["bench", "host", "--allocator", "budy", "--repeats", "1"], 2, "got 'budy'"),
        (["bench", "alloc", "--granules", "64"], 2, "at most a thread for each of 64 granules, got 1048576"),
        (["fuzz"], 2, "the following arguments are required: --allocator"),
    ],
)
def test_wrong_arguments_are_named(arguments, status, message, capsys):
    assert status_of(arguments) == status
    assert message in capsys.readouterr().err


def status_of(arguments):
    """The exit status as a shell would see it; a text that ends the program goes to stderr, with status 1."""
    try:
        return cli.main(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code


def test_help_of_a_command_is_its_own(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "host", "--help"])
    assert end.value.code == 0
    assert "--context" in capsys.readouterr().out
