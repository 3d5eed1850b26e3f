"""The command line: what it prints and with which status it ends."""

import importlib
import json
import os
import subprocess
import sys
import types

import pytest

from allocators import _command_line, _disk
from allocators._command_line import Parser
from kvtoolkit import ArgumentError, ConfigError, __version__
from kvtoolkit.bench import peers
from kvtoolkit.bench.attention_cases import SHAPES
from kvtoolkit.commands import cli, doctor, json_file
from kvtoolkit.cpu import threads


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


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The folders of compiled code, each with one sound entry."""
    for kind in ("numba", "cubin"):
        (tmp_path / kind).mkdir()
        _disk.write_entry(tmp_path / kind / "sound.entry", b"code")
    monkeypatch.setattr(_disk, "find_place", lambda kind: _disk.Place(tmp_path / kind))
    return tmp_path


@pytest.mark.parametrize("kind", ["numba", "cubin"])
def test_doctor_tells_a_damaged_and_a_foreign_cache_from_a_sound_one(places, kind):
    sound = doctor._kernel_cache()
    assert (sound.state, sound.advice) == (doctor.OK, "")
    assert f"{places / 'numba'} and cubin beside it, 2 entries" in sound.detail
    bad = places / kind / "bad.entry"
    bad.write_bytes(b"half of an ent")
    found = doctor._kernel_cache()
    assert (found.state, found.detail) == (doctor.BROKEN, f"{bad} is damaged; compiled again when needed")
    bad.chmod(0o666)
    (places / kind / "worse.entry").symlink_to(bad)
    found = doctor._kernel_cache()
    assert (found.state, found.detail) == (doctor.BROKEN, f"{bad} is foreign and 1 more; compiled again when needed")


@pytest.mark.parametrize(
    ("place", "state", "detail"),
    [
        (
            _disk.Place(None, "there is no home folder"),
            doctor.ABSENT,
            "there is no home folder: every process compiles",
        ),
        (
            _disk.Place(None, "/x can be written by others", True),
            doctor.BROKEN,
            "others could put code there: /x can be",
        ),
    ],
)
def test_doctor_says_why_there_is_no_cache(monkeypatch, place, state, detail):
    monkeypatch.setattr(_disk, "find_place", lambda kind: place)
    found = doctor._kernel_cache()
    assert found.state == state
    assert detail in found.detail
    assert "KVTOOLKIT_CACHE_DIR" in found.advice


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
        (["bench", "host", "--batch", "many"], 2, "kvtoolkit bench host: --batch: expected an integer, got 'many'\n"),
        (["bench", "host", "--batch", "0"], 2, "kvtoolkit bench host: --batch: expected at least 1, got 0\n"),
        (["bench", "costs", "--granules", "0"], 2, "--granules: expected at least 4096, got 0\n"),
        (["bench", "loads", "--trace", "/nonexistent"], 2, "--trace: /nonexistent cannot be read: "),
        (
            ["bench", "loads", "--trace", "/etc/passwd"],
            2,
            "--trace: /etc/passwd: expected Mooncake's JSON lines or Azure's",
        ),
        (["fuzz", "--allocator", "paged", "--num-granules", "7"], 2, "num_granules: expected a multiple of 8"),
        (["fuzz", "--allocator", "paged", "--option", "x=1"], 2, "PagedAllocator does not take these options"),
        (
            ["fuzz", "--allocator", "paged", "--seconds", "nan"],
            2,
            "--seconds: expected a number of at least 0, got nan\n",
        ),
        (
            ["compile", "--backend", "cpu", "--head-dim", "7"],
            2,
            "--head-dim: expected only with --backend cuda, got cpu\n",
        ),
        (["compile", "--backend", "cpu", "--arch", "90"], 2, "--arch: expected only with --backend cuda, got cpu\n"),
        (["compile", "--backend", "cpu", "--heads", "8/8"], 2, "--heads: expected only with --backend cuda, got cpu\n"),
        (["compile", "--backend", "cpu", "--dtype", "float16"], 2, "--dtype: expected only with --backend cuda"),
        (["compile", "--allocator", "slab"], 2, "--allocator: expected only with --backend cpu, got cuda\n"),
        (["bench", "host", "--allocator", "budy", "--repeats", "1"], 2, "got 'budy'"),
        (["bench", "alloc", "--granules", "64"], 2, "at most a thread for each of 64 granules, got 1048576"),
        (["fuzz"], 2, "the following arguments are required: --allocator"),
    ],
)
def test_wrong_arguments_are_named(arguments, status, message, capsys):
    assert status_of(arguments) == status
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def status_of(arguments):
    """The exit status as a shell would see it; a text that ends the program goes to stderr, with status 1."""
    try:
        return cli.main(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code


def parsers():
    """The parser of every command that has one of its own, with its arguments."""
    from tests.kvtoolkit.commands.test_help import commands

    for command in commands():
        module = cli._parser().parse_known_args([*command, "--"])[0].module if command not in ([], ["bench"]) else None
        if module is not None:
            parser = Parser()
            importlib.import_module(module).add_arguments(parser)
            yield command, parser


NUMBERS = [
    (command, action.option_strings[0])
    for command, parser in parsers()
    for action in parser._actions
    if action.type is not None and action.dest not in ("json", "heads")
]


@pytest.mark.parametrize(("command", "option"), NUMBERS, ids=str)
@pytest.mark.parametrize("value", ["-1", "nan", "1e999", "", "9" * 5000])
def test_every_number_has_bounds(command, option, value, capsys):
    needed = ["--allocator", "buddy"] if command == ["fuzz"] else []
    if value in ("1e999", "9" * 5000) and option == "--seconds":
        pytest.skip("without end")
    assert status_of([*command, *needed, f"{option}={value}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"kvtoolkit {' '.join(command)}: {option}: expected ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "command", [command for command, parser in parsers() if "--json" in parser._option_string_actions]
)
@pytest.mark.parametrize("path", ["nowhere/at/all", ".", "file/below", ""])
def test_a_file_for_figures_is_tried_before_they_are_measured(command, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("as it was")
    assert status_of([*command, "--json", path]) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert f"kvtoolkit {' '.join(command)}: --json: {path} cannot be written: " in said.err
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file"]


def test_trying_a_file_changes_nothing(tmp_path, capsys):
    parser = Parser()
    json_file.add_json(parser)
    (tmp_path / "old").write_text("as it was")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    for name in ("old", "link", "new"):
        assert parser.parse_args(["--json", str(tmp_path / name)]).json == str(tmp_path / name)
    assert (tmp_path / "old").read_text() == "as it was"
    assert not (tmp_path / "new").exists()
    assert parser.parse_args([]).json is None
    json_file.write_json(None, {})
    with pytest.raises(ArgumentError, match="--json: .* cannot be written: No such file"):
        json_file.write_json(str(tmp_path / "gone/new"), {})


def test_every_option_is_written_by_the_one_helper():
    """A bench that opens its file itself would find out too late."""
    for command, parser in parsers():
        action = parser._option_string_actions.get("--json")
        assert action is None or action.type is json_file._writable, command


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (RuntimeError("of a compiler"), 130), (None, 0)],
)
def test_a_command_ends_quietly(error, status, monkeypatch, capsys):
    def doctor():
        if isinstance(error, RuntimeError):
            error.__context__ = KeyboardInterrupt()
        if error is not None:
            raise error
        return 0

    monkeypatch.setattr(cli, "_doctor", doctor)
    monkeypatch.setattr(_command_line, "_drop_output", lambda: None)
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(cli, "_doctor", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


@pytest.mark.parametrize("arguments", ["['doctor']", "['bench', 'host', '--help']"])
def test_a_reader_that_has_gone_is_no_failure(arguments):
    code = f"import sys; from kvtoolkit.commands.cli import main; sys.exit(main({arguments}))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141 or (done.returncode == 0 and "--help" in arguments)  # argparse may not mind


def test_doctor_names_a_variable_that_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv("KVTOOLKIT_NUM_THREADS", "abc")
    monkeypatch.setattr(threads, "_num_threads", None)
    finding = doctor._guarded("cpu kernels", doctor._cpu_kernels)
    assert finding.state == doctor.BROKEN
    assert finding.detail == "KVTOOLKIT_NUM_THREADS: expected a number of threads from 1 on, got 'abc'"
    assert finding.advice == "correct or unset KVTOOLKIT_NUM_THREADS"


def test_help_of_a_command_is_its_own(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "host", "--help"])
    assert end.value.code == 0
    assert "--context" in capsys.readouterr().out


class Refusing:
    """Takes the place of FlashInfer's wrapper: one of its backends has no kernel for the shape."""

    def __init__(self, workspace, layout, *, use_tensor_cores, backend):
        self.name = ("fa2" if use_tensor_cores else "cuda cores") if backend in ("auto", "fa2") else backend

    def plan(self, *arguments, **options):
        if self.name == self.refused:
            raise ValueError(f"{self.name} has no kernel for this head_dim")

    def run(self, q, storage):
        return self.name


@pytest.mark.parametrize("refused", ["cuda cores", "fa2", "cudnn"])
def test_a_kernel_of_a_peer_that_refuses_a_shape_does_not_hide_the_others(refused, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch, "tensor", lambda data, dtype=None, device=None: torch.as_tensor(data, dtype=dtype))
    monkeypatch.setattr(peers, "_scratch", lambda: None)
    wrapper = type("Wrapper", (Refusing,), {"refused": refused})
    module = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # not installed
    case = types.SimpleNamespace(
        shape=SHAPES["b1_1k"], counts=[64], block_size=16, layout="HND", num_sets=2, indices=[0, 1], tables=[0, 1],
        q=None, storage=None,
    )  # fmt: skip
    made = peers.peers_of(case, ["fa3", "flashinfer"])
    names = ["cuda cores", "fa2", "cudnn"]
    names.remove(refused)
    assert [one.name for one in made] == [f"FlashInfer {name}" for name in names]
    assert [[call() for call in one.calls] for one in made] == [[name] * 2 for name in names]
    out = capsys.readouterr().out
    assert f"FlashInfer {refused:<13}ValueError: {refused} has no kernel" in out
    assert "FA3, scheduled" in out


def test_an_unknown_peer_is_named():
    with pytest.raises(ConfigError, match="--peer: expected some of flashinfer, xqa, xqa-fp8, fa3, got 'fa4'"):
        peers.peers_of(types.SimpleNamespace(shape=SHAPES["b1_1k"]), ["flashinfer", "fa4"])


@pytest.mark.parametrize("command", [["fuzz", "--seconds", "0"], ["bench", "host", "--allocator"]])
def test_an_allocator_in_the_current_folder_is_found_by_every_command(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "pool_of_mine.py").write_text("NoClass = 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert cli.main([*command, *([] if "--allocator" in command else ["--allocator"]), "pool_of_mine:NoClass"]) == 2
    assert "expected 'pool_of_mine:NoClass' to be a class, got int" in capsys.readouterr().err


def test_the_package_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "kvtoolkit", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, [__version__])
