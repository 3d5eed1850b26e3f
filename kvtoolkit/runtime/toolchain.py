"""NVRTC, called through CuPy; it needs neither a GPU nor a driver. The kernels include only headers of this project."""

import importlib
from functools import cache
from typing import Any

from kvtoolkit.errors import CompileError, UnsupportedError


@cache
def nvrtc() -> Any:
    """CuPy's binding of NVRTC.

    Raises:
        UnsupportedError: CuPy or NVRTC is not installed; says what to install.
    """
    try:
        binding: Any = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
        binding.getVersion()
    except Exception as error:  # CuPy raises many kinds, depending on what is missing
        raise UnsupportedError(
            "the GPU kernels need CuPy and NVRTC: pip install 'kvtoolkit[cuda13]' (driver 580 or later) or "
            f"'kvtoolkit[cuda12]'; `kvtoolkit doctor` says more ({type(error).__name__}: {error})"
        ) from error
    return binding


def version() -> str:
    """NVRTC's version, such as ``"12.9"``."""
    major, minor = nvrtc().getVersion()
    return f"{major}.{minor}"


def options() -> tuple[str, ...]:
    """The options with which every source is compiled."""
    common = ("-std=c++17", "--ptxas-options=-v", "--generate-line-info", "--restrict", "-default-device")
    # from 12.9 on NVRTC has a cache of its own, and a cached result has no log of registers and spills
    return (*common, "--no-cache") if nvrtc().getVersion() >= (12, 9) else common


def compile_source(source: str, name: str, headers: dict[str, str], options: tuple[str, ...]) -> tuple[bytes, str]:
    """``(cubin, log)`` of one source.

    Args:
        source: CUDA C++.
        name: its name in messages.
        headers: the text of every header that it may include, by the name in the include directive.
        options: options of NVRTC.

    Raises:
        CompileError: with the options and NVRTC's log.
    """
    binding = nvrtc()
    texts, names = ([text.encode() for text in part] for part in (headers.values(), headers))
    program = binding.createProgram(source, name, texts, names)
    try:
        binding.compileProgram(program, options)
        return binding.getCUBIN(program), binding.getProgramLog(program)
    except binding.NVRTCError as error:
        raise CompileError(
            f"{name}: NVRTC {version()} cannot compile it ({error})\noptions: {' '.join(options)}\n"
            f"{binding.getProgramLog(program)}"
        ) from error
    finally:
        binding.destroyProgram(program)
