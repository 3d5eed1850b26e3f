"""`kvtoolkit doctor`: what is installed, which backends work here, and what to do about those that do not."""

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from kvtoolkit._version import __version__
from kvtoolkit.errors import ConfigError

OK, ABSENT, BROKEN = "ok", "absent", "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    """``ok``, ``absent`` or ``broken``."""
    detail: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything kvtoolkit can use. Takes a second or two; changes nothing."""
    return [
        Finding("kvtoolkit", OK, f"{__version__}, Python {platform.python_version()} on {platform.machine()}"),
        _guarded("numpy", _numpy),
        _guarded("numba", _numba),
        _guarded("cpu kernels", _cpu_kernels),
        _guarded("kernel cache", _kernel_cache),
        _guarded("torch", _torch),
        _guarded("transformers", _transformers),
        _guarded("cupy", _cupy),
        _guarded("nvrtc", _nvrtc),
        _guarded("driver", _driver),
        _guarded("numba-cuda", _numba_cuda),
        _guarded("cuda kernels", _cuda_kernels),
        _guarded("numba kernels", _numba_kernels),
        _guarded("hypothesis", _hypothesis),
        _guarded("allocators", _allocators),
        _guarded("cuda sources", _cuda_sources),
    ]


def backends(findings: list[Finding]) -> list[Finding]:
    """Say for each backend whether it works, from the findings."""
    state = {finding.name: finding for finding in findings}
    cpu = state["cpu kernels"]
    found = [Finding("cpu", cpu.state, "attention, append and every allocator on the host", cpu.advice)]
    for name, what in (("cuda", "the fast kernels"), ("numba", "the readable kernels, slow")):
        kernels = state[f"{name} kernels"]
        missing = ", ".join(part for part in ("cupy", "nvrtc", "driver") if state[part].state != OK)
        lacks = f"lacks {missing}" if missing else kernels.detail
        detail = f"{what}, on arrays in GPU memory" if kernels.state == OK else lacks
        found.append(Finding(name, kernels.state, detail, "" if kernels.state == OK else "use backend='cpu'"))
    return found


def report(stream: TextIO | None = None) -> int:
    """Print the findings; returns an exit status: 1 if the CPU backend does not work or something is broken."""
    stream = stream or sys.stdout
    findings = examine()
    results = backends(findings)
    width = max(len(finding.name) for finding in findings)
    for title, group in (("What is here", findings), ("Backends", results)):
        print(title, file=stream)
        for finding in group:
            print(f"  {finding.name:<{width}}  {finding.state:<6}  {finding.detail}", file=stream)
    todo = [finding for finding in findings + results if finding.advice]
    if todo:
        print("What to do", file=stream)
        for finding in todo:
            print(f"  {finding.name:<{width}}  {finding.advice}", file=stream)
    return int(any(finding.state == BROKEN for finding in findings) or results[0].state != OK)


def _guarded(name: str, look: Callable[[], Finding]) -> Finding:
    """Run a check. If it raises, that is a finding too: a broken package must not stop the doctor."""
    try:
        return look()
    except ConfigError as error:  # of a variable of the environment, which nothing else configures here
        return Finding(name, BROKEN, str(error), f"correct or unset {str(error).partition(':')[0]}")
    except Exception as error:
        return Finding(name, BROKEN, f"{type(error).__name__}: {error}", f"reinstall what provides {name}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numpy() -> Finding:
    import numpy as np

    return Finding("numpy", OK, np.__version__)


def _numba() -> Finding:
    import llvmlite
    import numba

    return Finding("numba", OK, f"{numba.__version__}, llvmlite {llvmlite.__version__}")


def _cpu_kernels() -> Finding:
    import numpy as np

    from kvtoolkit.attention.calls import variable_block_attention
    from kvtoolkit.cpu import num_threads

    one = np.ones((1, 1, 32), np.float32)
    cache = np.ones((1, 1, 8, 32), np.float32)
    table, starts, lengths = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    out = variable_block_attention(one, cache, cache, table, starts, lengths)
    if not np.allclose(out, 1.0):
        return Finding("cpu kernels", BROKEN, "attention gave a wrong result", "please report this machine's processor")
    return Finding("cpu kernels", OK, f"attention runs, {num_threads()} threads (KVTOOLKIT_NUM_THREADS)")


def _kernel_cache() -> Finding:
    """The folders of compiled code on disk: where they are, and whether everything in them is whole and the user's."""
    from allocators._disk import find_place, survey

    name = "kernel cache"
    places = [find_place(kind) for kind in ("numba", "cubin")]
    for place in places:
        if place.is_foreign:
            advice = "take the right to write from others (chmod go-w), or set KVTOOLKIT_CACHE_DIR to a folder of yours"
            return Finding(name, BROKEN, f"not used, for others could put code there: {place.problem}", advice)
        if place.folder is None:
            detail = f"{place.problem}: every process compiles again"
            return Finding(name, ABSENT, detail, "set KVTOOLKIT_CACHE_DIR to a writable folder")
    surveys = [survey(place.folder) for place in places if place.folder is not None]
    bad = [(path, what) for one in surveys for what in ("damaged", "foreign") for path in getattr(one, what)]
    if bad:
        path, what = bad[0]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        detail = f"{path} is {what}{more}; compiled again when needed"
        return Finding(name, BROKEN, detail, "delete what is named; if it comes back, look at the disk")
    nbytes, count = (sum(getattr(one, field) for one in surveys) for field in ("nbytes", "num_sound"))
    return Finding(name, OK, f"{places[0].folder} and cubin beside it, {count} entries, {nbytes / 1e6:.1f} MB")


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("torch", ABSENT, "optional: tensors in and out", "pip install 'kvtoolkit[torch]'")
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("torch", OK, f"{version}, {cuda}, {torch.get_num_threads()} threads")


def _transformers() -> Finding:
    version = _version("transformers")
    if version is None:
        return Finding("transformers", ABSENT, "optional: model.generate on kvtoolkit", "pip install 'kvtoolkit[demo]'")
    if tuple(int(part) for part in version.split(".")[:2]) < (5, 17):
        return Finding("transformers", BROKEN, f"{version} is too old", "pip install 'transformers>=5.17'")
    return Finding("transformers", OK, version)


def cupy_flavours() -> list[str]:
    """The installed distributions that provide the module `cupy`."""
    known = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
    return [f"{name} {version}" for name in known if (version := _version(name)) is not None]


def _cupy() -> Finding:
    flavours = cupy_flavours()
    if not flavours:
        advice = "for a GPU: pip install 'kvtoolkit[cuda13]' (driver 580 or later), or 'kvtoolkit[cuda12]'"
        return Finding("cupy", ABSENT, "optional: GPU kernels", advice)
    if len(flavours) > 1:
        advice = "both write the module cupy: uninstall all of them, then install one"
        return Finding("cupy", BROKEN, " and ".join(flavours) + " are installed together", advice)
    import cupy

    return Finding("cupy", OK, f"{flavours[0]}, module {cupy.__version__}")


def _nvrtc() -> Finding:
    flavours = cupy_flavours()
    if len(flavours) != 1:
        return Finding("nvrtc", ABSENT, "comes with the CuPy extras")
    module: Any = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    major, minor = module.getVersion()
    return Finding("nvrtc", OK, f"{major}.{minor}")


def _driver() -> Finding:
    if len(cupy_flavours()) == 1:
        import cupy

        if cupy.cuda.is_available():
            properties = cupy.cuda.runtime.getDeviceProperties(0)
            version = cupy.cuda.runtime.driverGetVersion()
            return Finding(
                "driver", OK, f"CUDA {version // 1000}.{version % 1000 // 10}, {properties['name'].decode()}"
            )
    where = "nvidia-smi is on the path" if shutil.which("nvidia-smi") else "no nvidia-smi on the path"
    advice = "for a GPU: install NVIDIA's driver, 580 or later for CUDA 13" if len(cupy_flavours()) == 1 else ""
    return Finding("driver", ABSENT, f"no CUDA device can be used; {where}", advice)


def _numba_cuda() -> Finding:
    version = _version("numba-cuda")
    if version is None:
        return Finding("numba-cuda", ABSENT, "optional: the readable GPU kernels", "pip install 'kvtoolkit[numba]'")
    return Finding("numba-cuda", OK, version)


def _cuda_kernels() -> Finding:
    return _try_on_device("cuda")


def _numba_kernels() -> Finding:
    return _try_on_device("numba")


def _try_on_device(backend: str) -> Finding:
    """Run a small attention on the GPU."""
    name = f"{backend} kernels"
    if len(cupy_flavours()) != 1:
        return Finding(name, ABSENT, "need CuPy")
    import cupy

    if not cupy.cuda.is_available():
        return Finding(name, ABSENT, "need a CUDA device")
    from kvtoolkit.attention.calls import variable_block_attention

    one, cache = cupy.ones((1, 1, 64), "float16"), cupy.ones((1, 1, 8, 64), "float16")
    table, starts, lengths = (cupy.full(shape, n, "int32") for shape, n in (((1, 1), 0), ((1, 1), 0), ((1,), 5)))
    out = variable_block_attention(one, cache, cache, table, starts, lengths, backend=backend)
    if not bool((out == 1).all()):
        return Finding(name, BROKEN, "attention gave a wrong result", "please report this device and driver")
    return Finding(name, OK, "attention runs")


def _hypothesis() -> Finding:
    version = _version("hypothesis")
    if version is None:
        return Finding("hypothesis", ABSENT, "optional: fuzzing", "pip install 'kvtoolkit[fuzz]'")
    return Finding("hypothesis", OK, version)


def _allocators() -> Finding:
    import allocators

    for name in ("paged", "buddy", "slab", "lockfree"):
        pool = allocators.create(name, 64)
        size = pool.block_sizes[0] // 8
        pool.free(pool.allocate([size]), [size])
        pool.check_integrity()
    return Finding("allocators", OK, ", ".join(allocators.names()))


def _cuda_sources() -> Finding:
    from kvtoolkit.runtime.sources import get_include

    return Finding("cuda sources", OK, str(get_include()))
