"""Folders on disk for compiled code: where they are, who may write there, and entries that prove they are whole.

Entries are code, so neither folders that others can write to nor entries that somebody else owns are used. A truncated
or damaged entry is treated as missing. A failure here costs a compilation, but never stops a program.

    entry == MAGIC + SHA-256 of the payload, in hexadecimal + newline + payload
"""

import contextlib
import functools
import hashlib
import os
import stat
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"kvtoolkit entry 1\n"
_HEAD = len(MAGIC) + 64 + 1
SUFFIX = ".entry"
_TEMPORARY = ".tmp"
_STALE_S = 3600.0
"""Age in seconds at which a temporary file is taken to be abandoned."""

_has_complained = False
"""Whether this process has said that a folder is not used."""


@dataclass(frozen=True)
class Place:
    """The place where entries of one kind are kept."""

    folder: Path | None
    """None if there is no place."""
    problem: str = ""
    """Why there is no folder."""
    is_foreign: bool = False
    """Whether the reason is that others can write to the folder."""


@functools.cache
def find_place(kind: str) -> Place:
    """The folder of a kind of entries, made if need be: ``$KVTOOLKIT_CACHE_DIR/kind``, or in the user's own cache.

    If none can be used, standard error says so, once in a process, unless ``KVTOOLKIT_QUIET`` is set.
    """
    chosen = os.environ.get("KVTOOLKIT_CACHE_DIR", "").strip()
    if chosen.lower() == "off":
        return Place(None, "switched off by KVTOOLKIT_CACHE_DIR")
    try:
        base = Path(chosen).expanduser().absolute() if chosen else _default_base()
    except RuntimeError as error:  # "~" where there is no home folder, or "~somebody" where there is no such user
        return _unusable(Path(chosen), f"KVTOOLKIT_CACHE_DIR: {error}")
    if base is None:
        return _unusable(Path("~/.cache/kvtoolkit"), "there is no home folder")
    folder = base / kind
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for made in (base, folder):
            made.mkdir(mode=0o700, exist_ok=True)
        if problem := foreign_writer(folder):
            return _unusable(folder, problem, is_foreign=True)
        with tempfile.TemporaryFile(dir=folder):
            return Place(folder)
    except FileExistsError as error:
        return _unusable(folder, f"{error.filename} is no folder")
    except OSError as error:
        return _unusable(folder, f"{folder} is not writable: {error.strerror or error}")


def _unusable(folder: Path, problem: str, *, is_foreign: bool = False) -> Place:
    global _has_complained
    if not _has_complained and not os.environ.get("KVTOOLKIT_QUIET"):
        _has_complained = True
        print(f"kvtoolkit: {problem}, so {folder} is not used; see `kvtoolkit doctor`", file=sys.stderr)
    return Place(None, problem, is_foreign)


def _default_base() -> Path | None:
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():
        return shared / "kvtoolkit"
    try:
        home = Path.home() if os.environ.get("HOME", "x") else None
    except (RuntimeError, KeyError):  # no HOME, and nobody in the list of users has our number
        return None
    return home / ".cache" / "kvtoolkit" if home is not None and home.is_absolute() else None


def foreign_writer(folder: Path) -> str:
    """Who else could put an entry into a folder or replace the folder; empty if nobody could.

    Administrators do not count. Above the folder itself, the user's own group does not count either.
    """
    here = Path(os.path.realpath(folder))
    found = here.stat()
    if found.st_uid != os.geteuid():
        return f"{here} belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{here} can be written by others"
    for parent in here.parents:
        found = parent.stat()
        writers = stat.S_IWOTH | (stat.S_IWGRP if found.st_gid not in (0, os.getegid()) else 0)
        # in a sticky folder such as /tmp nobody can rename files of others
        if found.st_mode & writers and not found.st_mode & stat.S_ISVTX:
            return f"{parent} can be written by others"
    return ""


def read_entry(path: Path) -> bytes | None:
    """The payload of an entry; None if there is none, it is damaged, or it is not this user's own."""
    try:
        data = _read_own(path)
    except OSError:
        return None
    return payload_of(data) if data is not None else None


def payload_of(data: bytes) -> bytes | None:
    """The payload of an entry; None if it is damaged."""
    digest, payload = data[len(MAGIC) : _HEAD - 1], data[_HEAD:]
    is_whole = data.startswith(MAGIC) and data[_HEAD - 1 : _HEAD] == b"\n"
    return payload if is_whole and hashlib.sha256(payload).hexdigest().encode() == digest else None


def _read_own(path: Path) -> bytes | None:
    """The bytes of a plain file that nobody else can write to; None if it is not one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        is_own = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return file.read() if is_own and stat.S_ISREG(found.st_mode) else None


def write_entry(path: Path, payload: bytes) -> bool:
    """Store a payload; False, with nothing changed, if that fails. Other processes see all of it or nothing."""
    digest = hashlib.sha256(payload).hexdigest().encode()
    temporary = ""
    try:
        _remove_stale(path.parent)
        descriptor, temporary = tempfile.mkstemp(_TEMPORARY, path.name, path.parent)  # readable by this user alone
        with open(descriptor, "wb") as file:
            file.write(MAGIC + digest + b"\n" + payload)
        os.replace(temporary, path)
        temporary = ""
        return True
    except OSError:
        return False
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@functools.cache
def _remove_stale(folder: Path) -> None:
    """Remove temporary files that killed processes have left; once for each folder."""
    before = time.time() - _STALE_S
    for found in folder.glob(f"*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            if found.stat().st_mtime < before:
                found.unlink()


@dataclass(frozen=True)
class Survey:
    """The contents of a folder of entries."""

    num_sound: int
    nbytes: int
    damaged: tuple[Path, ...]
    foreign: tuple[Path, ...]
    """Entries that belong to somebody else, or that others can write to."""


def survey(folder: Path) -> Survey:
    """Read every entry of a folder; changes nothing. Other files are ignored, such as those of earlier releases."""
    num_sound, nbytes = 0, 0
    damaged: list[Path] = []
    foreign: list[Path] = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            data = _read_own(path)
        except OSError:
            data = None
        if data is None:
            foreign.append(path)
        elif payload_of(data) is None:
            damaged.append(path)
        else:
            num_sound, nbytes = num_sound + 1, nbytes + len(data)
    return Survey(num_sound, nbytes, tuple(damaged), tuple(foreign))
