"""The option ``--json``: a file for figures, tried before they are measured."""

import argparse
import json
import os
from typing import Any

from kvtoolkit.errors import ArgumentError


def add_json(parser: argparse.ArgumentParser, what: str = "figures") -> None:
    """Add ``--json PATH``."""
    parser.add_argument("--json", metavar="PATH", type=_writable, help=f"also write the {what} there")


def write_json(path: str | None, record: Any) -> None:
    """Write what ``--json`` asks for; ``path`` is None where it was not given.

    Raises:
        ArgumentError: it cannot be written.
    """
    if path is None:
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    except OSError as error:
        raise ArgumentError(f"--json: {path} cannot be written: {error.strerror or error}") from error


def _writable(path: str) -> str:
    """The ``type`` of the option: a path that can be written to. A file that is there stays as it is."""
    is_new = not os.path.lexists(path)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        return path  # a pipe or a device, for which opening has an effect
    try:
        with open(path, "ab"):
            pass
        if is_new:
            os.unlink(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
