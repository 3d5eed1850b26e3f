"""Help for every command in 80 columns, also where optional packages are missing, and what is said about those."""

import argparse
import subprocess
import sys

import pytest

from kvtoolkit.commands import cli


def names_of(parser):
    """The commands that a parser knows."""
    return next(list(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def commands():
    """Every command, benches included, as arguments."""
    parser = cli._parser()
    names = names_of(parser)
    (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [[], *([name] for name in names), *(["bench", name] for name in names_of(choices["bench"]))]


BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
from kvtoolkit.commands.cli import main
sys.exit(main({arguments!r}))
"""


def run_without(blocked, arguments):
    """Run the command in a process that lacks some packages."""
    code = BLOCKED.format(blocked=blocked, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(" ".join(["usage: kvtoolkit", *command]))
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", [["fuzz", "--help"], ["compile", "--help"], ["bench", "generate", "--help"]])
def test_help_needs_no_optional_package(command):
    done = run_without({"hypothesis", "torch", "cupy", "cupy_backends", "transformers", "rich", "gguf"}, command)
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


@pytest.mark.parametrize(
    ("blocked", "command", "message"),
    [
        ("hypothesis", ["fuzz", "--allocator", "buddy"], "this needs hypothesis: pip install 'kvtoolkit[fuzz]'"),
        ("torch", ["bench", "attention"], "torch"),
    ],
)
def test_a_missing_package_is_one_line_with_its_extra(blocked, command, message):
    done = run_without({blocked}, command)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
