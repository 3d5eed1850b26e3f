"""Damage the disk cache of compiled code, then use it: ``python -m fuzz.disk_caches [rounds] [seed]``.

Whatever a child process finds on disk, it must end with status 0 and correct results, run nothing that others could
have put there, and leave no temporary file. If there is a usable place, the next process must find all entries
undamaged.
"""

import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from allocators._disk import payload_of

ROOT = Path(__file__).parents[1]

PROGRAM = """
from allocators import PagedAllocator, _jit
from allocators.paged import _pop
pool = PagedAllocator(16)
starts = pool.allocate([2, 2])
assert len(set(starts.tolist())) == 2, starts
print(sum(_pop.stats.cache_hits.values()), sum(_pop.stats.cache_misses.values()), _jit.cache_folder() is not None)
"""
NOBODY = "import pwd\ndef nobody(*_): raise KeyError('getpwuid(): uid not found')\npwd.getpwuid = nobody\n"
FULL = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
"""Limits files to 1000 bytes, so that writing fails as on a full disk, for any user."""


@dataclass
class Outcome:
    """What happened to the caches."""

    tried: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
        return self.tried - len(self.problems)


class Marker:
    """Makes a file when it is unpickled, like an entry that somebody else has planted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a child process; empty environment variables are removed."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), "KVTOOLKIT_QUIET": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", program], env={name: value for name, value in merged.items() if value},
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip


# -- damaged entries ---------------------------------------------------------------------------------------------------


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(data))] ^= draw.randint(1, 255)
    return bytes(changed)


def zero_a_page(data: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(0, len(data), 4096)
    return data[:first] + bytes(min(4096, len(data) - first)) + data[first + 4096 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": truncate,
    "bytes flipped": flip,
    "a page of zeros": zero_a_page,
    "empty": lambda data, draw: b"",
    "more at the end": lambda data, draw: data + draw.randbytes(draw.randint(1, 100)),
    "noise": lambda data, draw: draw.randbytes(len(data)),
    "a bare pickle": lambda data, draw: pickle.dumps({}),
}


def damage_all(folder: Path, draw: random.Random) -> list[str]:
    """Damage every entry of a folder; returns how."""
    done = []
    for path in sorted(folder.iterdir()):
        name = draw.choice(sorted(DAMAGES))
        data = path.read_bytes()
        damaged = DAMAGES[name](data, draw)
        path.write_bytes(damaged if damaged != data else data[:-1])
        done.append(f"{path.name}: {name}")
    return done


def use_damaged_entries(cache: Path, draw: random.Random, program: str = PROGRAM) -> Outcome:
    """Damage every entry, use the cache twice."""
    outcome = Outcome()
    if not (cache / "numba").exists():
        run(program, KVTOOLKIT_CACHE_DIR=str(cache))
    done = damage_all(cache / "numba", draw)
    outcome.tried = len(done)
    for expected in ("0 1 True", "1 0 True"):  # rebuilt, then found
        child = run(program, KVTOOLKIT_CACHE_DIR=str(cache))
        if child.returncode or child.stdout.strip() != expected:
            outcome.problems = [*done, f"{child.returncode} {child.stdout} {child.stderr[-800:]}"][: len(done)]
            return outcome
    for path in sorted((cache / "numba").iterdir()):
        if path.suffix == ".tmp" or payload_of(path.read_bytes()) is None:
            outcome.problems.append(f"{path.name} is not whole")
    return outcome


# -- places that cannot be used ----------------------------------------------------------------------------------------


def _writable_by_others(cache: Path) -> dict[str, str]:
    (cache / "numba").chmod(0o777)
    return {}


def _replaceable(cache: Path) -> dict[str, str]:
    cache.chmod(0o777)
    return {}


def _nowhere(cache: Path) -> dict[str, str]:
    return {"KVTOOLKIT_CACHE_DIR": str(cache / "numba" / next((cache / "numba").iterdir()).name / "below a file")}


def _no_home(cache: Path) -> dict[str, str]:
    return {"KVTOOLKIT_CACHE_DIR": "", "HOME": "", "XDG_CACHE_HOME": "", "USER": "", "LOGNAME": ""}


def _relative_home(cache: Path) -> dict[str, str]:
    return {"KVTOOLKIT_CACHE_DIR": "", "HOME": "somewhere", "XDG_CACHE_HOME": "elsewhere"}


PLACES: dict[str, tuple[str, Callable[[Path], dict[str, str]]]] = {
    "a folder that all can write to": ("", _writable_by_others),
    "a folder in one that all can write to": ("", _replaceable),
    "a place that cannot be": ("", _nowhere),
    "no home and no user": (NOBODY, _no_home),
    "a home that is no absolute path": ("", _relative_home),
}
"""What is put before the program, and what is done to a cache. In each case there must be no place for a cache."""


def use_bad_place(cache: Path, name: str) -> Outcome:
    """Use a place that must be refused, with an entry that would leave a mark if it were read."""
    outcome, marker = Outcome(tried=1), cache.parent / f"{cache.name}.marker"
    before, prepare = PLACES[name]
    folder = cache / "numba"
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    for made in (cache, folder):
        made.chmod(0o700)
    if not any(folder.iterdir()):
        run(PROGRAM, KVTOOLKIT_CACHE_DIR=str(cache))
    plant(folder, marker)
    environment = {"KVTOOLKIT_CACHE_DIR": str(cache), **prepare(cache)}
    child = run(before + PROGRAM, **environment)
    if child.returncode or child.stdout.strip() != "0 1 False":
        outcome.problems.append(f"{name}: {child.returncode} {child.stdout} {child.stderr[-800:]}")
    elif marker.exists():
        outcome.problems.append(f"{name}: what others could have planted was run")
    return outcome


def plant(folder: Path, marker: Path) -> None:
    """Replace every entry by a valid one that leaves a mark when it is read."""
    from allocators._disk import write_entry

    for path in folder.iterdir():
        assert write_entry(path, pickle.dumps(Marker(marker)))


def use_full_disk(cache: Path) -> Outcome:
    """Use a cache where nothing more can be written."""
    outcome = Outcome(tried=1)
    child = run(FULL + PROGRAM, KVTOOLKIT_CACHE_DIR=str(cache))
    left = list((cache / "numba").iterdir())
    if child.returncode or child.stdout.strip() != "0 1 True" or left:
        outcome.problems.append(f"full: {child.returncode} {child.stdout} {left} {child.stderr[-800:]}")
    return outcome


def main(rounds: int, seed: int) -> int:
    print(f"seed {seed}")
    draw, tried, problems = random.Random(seed), 0, []
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [use_full_disk(Path(folder) / "full")]
        outcomes += [use_bad_place(Path(folder) / f"place {i}", name) for i, name in enumerate(PLACES)]
        for number in range(rounds):
            outcomes.append(use_damaged_entries(Path(folder) / "damaged", draw))
            if outcomes[-1].problems:
                shutil.rmtree(Path(folder) / "damaged")
            print(f"round {number}: {outcomes[-1].survived} of {outcomes[-1].tried}", flush=True)
        for outcome in outcomes:
            tried += outcome.tried
            problems += outcome.problems
    for problem in problems:
        print(problem)
    print(f"{tried} caches tried, {tried - len(problems)} survived")
    return int(bool(problems))


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(arguments + [10, 1][len(arguments) :])))
