"""From CUDA C++ to a running kernel: find the compiler, compile once, load once per device, launch."""

from kvtoolkit.runtime.compiler import Build, KernelUsage, build
from kvtoolkit.runtime.kernels import Kernel, load, smem_limit
from kvtoolkit.runtime.streams import current_stream, is_capturing

__all__ = ["Build", "Kernel", "KernelUsage", "build", "current_stream", "is_capturing", "load", "smem_limit"]
