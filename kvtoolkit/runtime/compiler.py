"""Compile a kernel source for one architecture, with a cache on disk.

The key covers the source, every header that it includes directly or indirectly, the options, the architecture and the
compiler. Entries are checked before use, see `allocators._disk`. The folder is ``cubin`` beside Numba's.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from allocators._disk import SUFFIX, read_entry, write_entry
from allocators._jit import cache_folder
from kvtoolkit.runtime import toolchain
from kvtoolkit.runtime.sources import source_folder

_INCLUDE = re.compile(r"^\s*#include\s*<(kvt/[^>]+)>", re.MULTILINE)
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<smem>\d+) bytes smem)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class KernelUsage:
    """The resources of one kernel, as the assembler reports them."""

    name: str
    registers: int
    """Per thread."""
    spill_nbytes: int
    """Bytes per thread that did not fit into registers, stores plus loads."""
    stack_nbytes: int
    smem_nbytes: int
    """Static shared memory per CTA."""


@dataclass(frozen=True)
class Build:
    """A compiled source."""

    cubin: bytes
    usage: tuple[KernelUsage, ...]
    path: Path | None
    """Its file in the cache; None if there is no cache."""
    seconds: float
    """Time spent compiling; 0 if it was in the cache."""


def build(source: str, defines: Mapping[str, int], arch: str, *, announce: bool = False) -> Build:
    """Compile a source of ``cuda_src``, or take the result from the cache.

    Args:
        source: its path inside ``cuda_src``, such as ``"attention/decode.cu"``.
        defines: macros.
        arch: compute capability without the dot, such as ``"90"``.
        announce: whether to report a compilation on stderr; ``KVTOOLKIT_QUIET=1`` silences that.

    Raises:
        CompileError: NVRTC refuses the source. The message has the options and the log.
        UnsupportedError: CuPy or NVRTC is missing.

    Needs no GPU. May be called from several threads and processes at once.
    """
    text, headers = read_source(source)
    options = (*toolchain.options(), f"-arch=sm_{arch}", *(f"-D{name}={value}" for name, value in defines.items()))
    key = _key(source, text, headers, options)
    folder = cache_folder("cubin")
    path = None if folder is None else folder / f"{Path(source).stem}-sm{arch}-{key[:32]}{SUFFIX}"
    if path is not None and (found := _load(path)) is not None:
        return found
    if announce and not os.environ.get("KVTOOLKIT_QUIET"):
        kept = f"kept in {folder}" if folder else "not kept: no folder can be used, see `kvtoolkit doctor`"
        settings = " ".join(f"{name.removeprefix('KVT_').lower()}={value}" for name, value in defines.items())
        print(f"kvtoolkit: compiling {source} for sm_{arch} ({settings}), first use; {kept}", file=sys.stderr)
    start = time.perf_counter()
    cubin, log = toolchain.compile_source(text, source, headers, options)
    usage = tuple(
        KernelUsage(
            match["name"], int(match["registers"]), int(match["stores"]) + int(match["loads"]), int(match["stack"]),
            int(match["smem"] or 0),
        )
        for match in _ENTRY.finditer(log)
    )  # fmt: skip
    result = Build(cubin, usage, path, time.perf_counter() - start)
    if path is not None and not _save(path, result):
        result = Build(cubin, usage, None, result.seconds)
    return result


def read_source(source: str) -> tuple[str, dict[str, str]]:
    """The text of a source, and of every header that it includes, directly or not, by name."""
    folder = source_folder()
    text = (folder / source).read_text(encoding="utf-8")
    headers: dict[str, str] = {}
    waiting = _INCLUDE.findall(text)
    while waiting:
        name = waiting.pop()
        if name not in headers:
            headers[name] = (folder / "include" / name).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(headers[name])
    return text, dict(sorted(headers.items()))


def _key(source: str, text: str, headers: Mapping[str, str], options: tuple[str, ...]) -> str:
    parts = [source, text, json.dumps(headers), *options, toolchain.version()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _load(path: Path) -> Build | None:
    """A cached build; None if there is none or it is damaged."""
    payload = read_entry(path)
    if payload is None:
        return None
    header, _, cubin = payload.partition(b"\n")
    try:
        usage = tuple(KernelUsage(**fields) for fields in json.loads(header))
    except (ValueError, TypeError):
        return None
    return Build(cubin, usage, path, 0.0)


def _save(path: Path, result: Build) -> bool:
    header = json.dumps([asdict(usage) for usage in result.usage]).encode()
    return write_entry(path, header + b"\n" + result.cubin)
