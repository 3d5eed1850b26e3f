"""Folders of transformers models on disk, for weights that take long to convert: written whole, checked when read.

A folder is ``$KVTOOLKIT_CACHE_DIR/weights/NAME`` and holds what ``save_pretrained`` writes, and in
``digests.json`` the SHA-256 of every file. A folder that is damaged or incomplete counts as absent, and is replaced.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from allocators._disk import find_place

_DIGESTS = "digests.json"


def name_of(source: Path, *parts: str) -> str:
    """A folder's name, which changes with the size and time of a source file and with everything in ``parts``."""
    found = source.stat()
    key = json.dumps([source.name, found.st_size, found.st_mtime_ns, *parts])
    return f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def find(name: str) -> Path | None:
    """The folder of that name; None if there is none, it is damaged, or nothing can be kept here."""
    place = find_place("weights").folder
    return place / name if place is not None and _is_whole(place / name) else None


def keep(name: str, write: Callable[[Path], None]) -> Path | None:
    """Have ``write`` fill a folder, and keep it under a name; None, and nothing kept, where that cannot be.

    Other processes see the whole folder or none.
    """
    place = find_place("weights").folder
    if place is None:
        return None
    temporary = ""
    try:
        temporary = tempfile.mkdtemp(".tmp", f"{name}.", place)
        write(Path(temporary))
        files = sorted(path for path in Path(temporary).iterdir() if path.is_file())
        digests = {path.name: _digest(path) for path in files}
        (Path(temporary) / _DIGESTS).write_text(json.dumps(digests, indent=1))
        if (place / name).exists() and not _is_whole(place / name):
            shutil.rmtree(place / name)
        os.rename(temporary, place / name)
    except Exception:
        # no room on the disk, which every format reports in its own way, or another process was faster
        return find(name)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
    return place / name


def _is_whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / _DIGESTS).read_text())
        return bool(digests) and all(_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
