"""The command ``kvtoolkit``: doctor, fuzz, compile and bench."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from allocators._command_line import Parser, quietly
from kvtoolkit._version import __version__
from kvtoolkit.errors import KVToolkitError

_EXTRAS = {
    "cupy": "cuda13",  # or cuda12; `kvtoolkit doctor` has more to say
    "cupy_backends": "cuda13",
    "gguf": "demo",
    "hypothesis": "fuzz",
    "rich": "demo",
    "torch": "torch",
    "transformers": "demo",
}
"""The extra that brings an optional package."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    It is 0 for success, 1 for a failure found, 2 for wrong arguments and what is missing here, 130 after Ctrl-C, and
    141 if nobody reads the output any more.
    """
    return quietly(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.module is None:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _doctor() if options.module is None else _run_module(options.module, options.prog, rest)
    except (KVToolkitError, _allocator_error()) as error:
        print(f"kvtoolkit: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"kvtoolkit: {_advice(error)}", file=sys.stderr)
        return 2


def _advice(error: ModuleNotFoundError) -> str:
    """What is missing, and the extra that brings it."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return f"{error}; `kvtoolkit doctor` says what is installed"
    return f"this needs {package}: pip install 'kvtoolkit[{_EXTRAS[package]}]'"


def _allocator_error() -> type[Exception]:
    from allocators import AllocatorError

    return AllocatorError


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="kvtoolkit", description="The KV cache of LLM inference as parts.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _add(commands, "doctor", None, "say what is installed and which backends work here")
    _add(commands, "fuzz", "kvtoolkit.commands.fuzz", "test an allocator, ours or your own, with random programs")
    _add(
        commands,
        "compile",
        "kvtoolkit.commands.compile",
        "compile ahead: GPU kernels for any architecture, or the code for the CPU",
    )
    bench = commands.add_parser("bench", help="measure")
    benches = bench.add_subparsers(title="measurements", required=True, metavar="WHAT")
    _add(benches, "host", "kvtoolkit.bench.host", "host time of a decode step, and of each allocator")
    _add(benches, "costs", "kvtoolkit.bench.costs", "host time of calls while memory is short, in two pools")
    _add(benches, "loads", "kvtoolkit.bench.loads", "waste, entries and host time of each choice under simulated loads")
    _add(benches, "alloc", "kvtoolkit.bench.alloc", "blocks that kernels on a GPU take and give back")
    _add(benches, "attention", "kvtoolkit.bench.attention", "decode attention on a GPU, beside other people's kernels")
    _add(benches, "tiers", "kvtoolkit.bench.tiers", "attention over quantized tiers on a GPU, beside 16 bit")
    _add(benches, "demotion", "kvtoolkit.bench.demotion", "what moving tokens to colder tiers costs on a GPU")
    _add(benches, "promotion", "kvtoolkit.bench.promotion", "what writing old tokens back to 16 bit costs and brings")
    _add(benches, "blocks", "kvtoolkit.bench.blocks", "what block sizes, planning and calls cost on a GPU")
    _add(benches, "cache", "kvtoolkit.bench.cache", "append, and the moves of forks and merges, on a GPU")
    _add(benches, "groups", "kvtoolkit.bench.groups", "a captured step of layers in groups on a GPU, beside one group")
    _add(benches, "device", "kvtoolkit.bench.device", "what growing sequences costs, on a GPU and on the host")
    _add(
        benches,
        "transfers",
        "kvtoolkit.bench.transfers",
        "moves to and from host memory on a GPU, and steps that need it",
    )
    _add(benches, "prediction", "kvtoolkit.bench.prediction", "how well predictors tell which tiles are read next")
    _add(benches, "sessions", "kvtoolkit.bench.sessions", "what hints are worth when sessions of agents pause")
    _add(benches, "generate", "kvtoolkit.bench.generate", "a real model on the CPU, beside transformers' own cache")
    _add(
        benches,
        "accuracy",
        "kvtoolkit.bench.accuracy",
        "what quantized tiers cost in accuracy, a real model on the CPU",
    )
    return parser


def _add(commands: Any, name: str, module: str | None, help_text: str) -> None:
    """Add a command. One with a ``module`` parses what follows it itself, so that only its own module is imported."""
    command = commands.add_parser(name, help=help_text, add_help=module is None)
    command.set_defaults(module=module, prog=command.prog)


def _run_module(module: str, prog: str, arguments: Sequence[str]) -> int:
    if "" not in sys.path:
        sys.path.insert(0, "")  # where `python -m` finds an allocator of the user's too
    loaded: Any = importlib.import_module(module)
    parser = Parser(prog=prog, description=loaded.__doc__.partition("\n")[0])
    loaded.add_arguments(parser)
    return int(loaded.main(parser.parse_args(arguments)))


def _doctor() -> int:
    from kvtoolkit.commands.doctor import report

    return report()


if __name__ == "__main__":
    sys.exit(main())
