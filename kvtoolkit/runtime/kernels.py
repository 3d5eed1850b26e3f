"""Kernels on a device: each is loaded once, and launched often.

A kernel is identified by its source, its macros and its function. The first call on a device compiles it, or takes it
from the disk cache, and loads it; later calls look it up. Nothing can be loaded while a CUDA graph is captured; see
`kvtoolkit.warmup`.
"""

import atexit
import threading
from collections.abc import Mapping
from typing import Any

from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime import driver, launch_log
from kvtoolkit.runtime.compiler import Build, KernelUsage, build

_lock = threading.Lock()
_loaded: dict[tuple[Any, ...], "Kernel"] = {}
_devices: dict[int, tuple[str, int, int]] = {}
_modules: list[Any] = []
atexit.register(_modules.clear)  # at interpreter shutdown CuPy can no longer unload them


class Kernel:
    """A kernel on one device.

    Attributes:
        name: name of its function.
        usage: registers, spills and static shared memory, if the compiler has reported them.
    """

    def __init__(self, name: str, function: int, usage: KernelUsage | None) -> None:
        self.name = name
        self.usage = usage
        self._function = function

    def prepare(
        self, grid: tuple[int, ...], threads: int, parameters: bytes, smem_nbytes: int = 0
    ) -> driver.PreparedLaunch:  # fmt: skip
        """Prepare a launch; see `kvtoolkit.runtime.driver.PreparedLaunch`."""
        return driver.PreparedLaunch(self._function, grid, threads, smem_nbytes, parameters)


class LoggedKernel(Kernel):
    """A kernel whose launches are logged, see `kvtoolkit.runtime.launch_log`."""

    def __init__(self, source: str, name: str, function: int, usage: KernelUsage | None) -> None:
        super().__init__(name, function, usage)
        self._source = source

    def prepare(
        self, grid: tuple[int, ...], threads: int, parameters: bytes, smem_nbytes: int = 0
    ) -> driver.PreparedLaunch:  # fmt: skip
        return launch_log.LoggedLaunch(
            self._function, grid, threads, smem_nbytes, parameters, source=self._source, name=self.name
        )


def load(
    source: str, name: str, defines: Mapping[str, int], device: int, *, smem_nbytes: int = 0, feature: str = ""
) -> Kernel:
    """The kernel ``name`` of a source of ``cuda_src`` on a device.

    Args:
        source: such as ``"attention/decode.cu"``.
        name: the ``extern "C"`` function.
        defines: macros.
        device: CUDA ordinal; it must be the current one.
        smem_nbytes: the largest dynamic shared memory of its launches.
        feature: ``"a"`` to compile for what only this architecture has.

    Raises:
        UnsupportedError: no CuPy, no NVRTC, or no such device here.
        CompileError: it does not compile.
    """
    key = (source, name, device, *defines.items())
    found = _loaded.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _loaded:
            built = build(source, defines, _device(device)[0] + feature, announce=True)
            _loaded[key] = _load(built, source, name, smem_nbytes)
        return _loaded[key]


def _load(built: Build, source: str, name: str, smem_nbytes: int) -> Kernel:
    import cupy

    # from memory, because `cupy.RawModule` needs a file, and the disk may be full
    module = cupy.cuda.function.Module()
    module.load(built.cubin)
    loaded = module.get_function(name)
    function = int(loaded.ptr)
    _modules.append(module)  # keeps it loaded
    if smem_nbytes > 48 << 10:
        attribute = cupy.cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        cupy.cuda.driver.funcSetAttribute(function, attribute, smem_nbytes)
    usage = next((usage for usage in built.usage if usage.name == name), None)
    return LoggedKernel(source, name, function, usage) if launch_log.ENABLED else Kernel(name, function, usage)


def _device(device: int) -> tuple[str, int, int]:
    """Compute capability, shared memory of a CTA and number of SMs of a device."""
    if device not in _devices:
        try:
            import cupy

            properties = cupy.cuda.runtime.getDeviceProperties(device)
        except Exception as error:  # no CuPy, no driver, no such device
            raise UnsupportedError(
                f"no CUDA device {device} can be used here ({error}); see `kvtoolkit doctor`"
            ) from error
        arch = f"{properties['major']}{properties['minor']}"
        _devices[device] = (arch, int(properties["sharedMemPerBlockOptin"]), int(properties["multiProcessorCount"]))
    return _devices[device]


def current_device() -> int:
    """The current CUDA device; UnsupportedError if there is none."""
    try:
        import cupy

        return int(cupy.cuda.runtime.getDevice())
    except Exception as error:  # no CuPy, no driver, no device
        raise UnsupportedError(f"no CUDA device can be used here ({error}); see `kvtoolkit doctor`") from error


def smem_limit(device: int) -> int:
    """Most bytes of shared memory that one CTA can have."""
    return _device(device)[1]


def arch_of(device: int) -> int:
    """The compute capability of a device, such as 90."""
    return int(_device(device)[0])


def num_sms(device: int) -> int:
    """The number of multiprocessors of a device."""
    return _device(device)[2]
