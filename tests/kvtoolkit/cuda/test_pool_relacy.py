"""The memory orders of kvt/pool.cuh under Relacy, a model checker of C++ atomics; planted faults must be found.

What runs are the orders of the host's half of kvt/pool/atomic.cuh; those of the device's half have the same names.
"""

import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from kvtoolkit import get_include
from tests.kvtoolkit.cuda.test_pool_header import change_headers, run

HERE = Path(__file__).parent
FOLDERS = [Path(sys.prefix) / "relacy/usr/include", Path("/usr/include")]
RELACY = next((folder for folder in FOLDERS if (folder / "relacy/relacy.hpp").exists()), None)

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(RELACY is None, reason=f"needs Debian's relacy-dev in {FOLDERS[0]} or {FOLDERS[1]}"),
]

ITERATIONS = 100_000
SMALL = [("kShards = 32;", "kShards = 2;"), ("kEpochs = 4;", "kEpochs = 1;")]


def build(folder: Path, *changes: tuple[str, str], optimize: str = "-O0") -> Path:
    """The plays on a copy of the headers with changes, each of which must fit once."""
    include = folder / "include"
    shutil.copytree(get_include(), include)
    change_headers(include, [*SMALL, *changes])
    # the orders stay those of the header, and a builtin that pool_relacy.cpp lacks does not compile
    atomics = include / "kvt" / "pool" / "atomic.cuh"
    atomics.write_text(atomics.read_text().replace("__atomic_", "cells::"))
    program = folder / "pool_relacy"
    # -w: Relacy's headers warn
    command = ["g++", "-std=c++17", optimize, "-w", f"-I{include}", f"-I{RELACY}", str(HERE / "pool_relacy.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return build(tmp_path_factory.mktemp("shipped"), optimize="-O1")


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("layout", ["buddy", "slab"])
@pytest.mark.parametrize("play", ["pass", "limbo", "lease", "move", "shares", "fewer"])
def test_nothing_is_found_where_nothing_is_planted(shipped, play, layout, order):
    assert not run(shipped, play, layout, order, ITERATIONS)


FAULTS = {
    "claims are not acquired": (["pass"], "at, value, __ATOMIC_ACQUIRE", "at, value, __ATOMIC_RELAXED"),
    "runs are not acquired": (
        ["pass"],
        "false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE",
        "false, __ATOMIC_RELAXED, __ATOMIC_RELAXED",
    ),
    "frees are not released": (
        ["pass", "limbo", "lease"],
        "fetch_or(at, value, __ATOMIC_RELEASE",
        "fetch_or(at, value, __ATOMIC_RELAXED",
    ),
    "limbo is taken without order": (["limbo"], "at, value, __ATOMIC_ACQ_REL", "at, value, __ATOMIC_RELAXED"),
    "limbo is not acquired": (["limbo"], "at, value, __ATOMIC_ACQ_REL", "at, value, __ATOMIC_RELEASE"),
    "versions are not released": (
        ["move", "shares"],
        "fetch_add(at, value, __ATOMIC_RELEASE",
        "fetch_add(at, value, __ATOMIC_RELAXED",
    ),
    "a block is taken before the version is seen": (
        ["move", "shares"],
        "    fence_acq_rel();\n  }\n\n  // The word at which a thread begins to search.",
        "  }\n\n  // The word at which a thread begins to search.",
    ),
    "words are read before the version": (
        ["move", "shares"],
        "      const Word before = version();\n      fence_acq_rel();\n      if (proved",
        "      const Word before = version();\n      if (proved",
    ),
    "the version is read before the words": (
        ["move", "shares"],
        "      fence_acq_rel();\n      if (version() == before) {",
        "      if (version() == before) {",
    ),
    "a proof is not acquired": (
        ["fewer"],
        "      const Word proved = load_acquire(memory",
        "      const Word proved = load_relaxed(memory",
    ),
    "fences do not acquire": (["move", "shares"], "fence(__ATOMIC_ACQ_REL", "fence(__ATOMIC_RELEASE"),
    "fences do not release": (["move", "shares"], "fence(__ATOMIC_ACQ_REL", "fence(__ATOMIC_ACQUIRE"),
}
"""What is planted, and the plays that must each show it, in some layout and order."""


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name, tmp_path):
    plays, *change = FAULTS[name]
    program = build(tmp_path, change)
    for play in plays:
        assert any(run(program, play, *how, ITERATIONS) for how in product(["buddy", "slab"], [0, 1]))
