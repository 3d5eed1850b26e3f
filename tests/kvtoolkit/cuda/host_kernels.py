"""Kernels that plan work, built by g++ and run on the host, by the launches that the library makes for a GPU."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kvtoolkit.runtime.sources import get_include, source_folder

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
HERE = Path(__file__).parent
_LAUNCH = """
extern "C" int launch_{name}(
    const void* parameters, unsigned x, unsigned y, unsigned threads, unsigned smem, unsigned seed) {{
  const auto& p = *static_cast<const kvt::{struct}*>(parameters);
  return fibers::run([&] {{ kvt::{name}(p); }}, Index{{x, y}}, threads, smem, seed);
}}
"""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def build(source: str, defines: tuple[tuple[str, int], ...], *changes: tuple[str, str]) -> ctypes.CDLL:
    """A library of the kernels of a source under ``cuda_src``, with changes to it, each of which must fit once."""
    text = (source_folder() / source).read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    kernels = re.findall(r"(kvt_\w+)\(const __grid_constant__ (\w+) p\)", text)
    memory = "reinterpret_cast<int*>(fibers::dynamic_shared.data())"
    text = re.sub(r"extern __shared__ int (\w+)\[\];", rf"int* const \1 = {memory};", text)
    launches = "".join(_LAUNCH.format(name=name, struct=struct) for name, struct in kernels)
    base = Path(_folder().name) / f"{len(list(Path(_folder().name).iterdir()))}.cpp"
    base.write_text(f'#include "cta_on_fibers.h"\n{text}{launches}')
    library = base.with_suffix(".so")
    macros = [f"-D{name}={value}" for name, value in defines]
    include = [f"-I{HERE}", f"-I{get_include()}"]
    flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, *macros, *include, str(base), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class HostLaunch:
    """Stands for `kvtoolkit.cuda.launching.Launch`; ``kernel`` is its spec."""

    seed = 0
    """Of the order in which threads run; 0: one after the other."""
    changes: tuple[tuple[str, str], ...] = ()
    """Of the source."""

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], threads: int, smem_nbytes: int, parameters: bytes
    ) -> None:  # fmt: skip
        self.spec, self.grid, self.threads, self.smem_nbytes = kernel, (*grid, 1)[:2], threads, smem_nbytes
        self.parameters = parameters

    def run(self, stream: int = 0, *, dependent: bool = False) -> None:
        """Run it and wait for its end."""
        library = build(self.spec.source, self.spec.defines, *self.changes)
        kernel = getattr(library, f"launch_{self.spec.name}")
        assert kernel(self.parameters, *self.grid, self.threads, self.smem_nbytes, self.seed), "threads wait for good"


def on_the_host(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
    """Let the launches of modules run on the host, with arrays of the host."""
    for module in modules:
        monkeypatch.setattr(module, "load_spec", lambda spec, device: spec)
        monkeypatch.setattr(module, "Launch", HostLaunch)
