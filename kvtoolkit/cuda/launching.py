"""A launch made ready: kernel, grid and packed parameters, of which addresses can be changed for the next layer."""

import functools
import struct
from typing import NamedTuple

from kvtoolkit.cuda.specs import Spec
from kvtoolkit.runtime import Kernel, load

_address = struct.Struct("@q")


class Launch(NamedTuple):
    """One kernel with its parameters."""

    kernel: Kernel
    grid: tuple[int, ...]
    threads: int
    smem_nbytes: int
    parameters: bytes

    def run(self, stream: int, *, dependent: bool = False) -> None:
        """Launch it; ``dependent``: it may begin while the kernel before it still runs, and waits for it itself."""
        self.kernel.launch(self.grid, self.threads, self.parameters, stream, self.smem_nbytes, dependent=dependent)

    def with_addresses(self, addresses: dict[int, int]) -> "Launch":
        """The same with other pointers, by their place among the parameters' 8-byte words."""
        parameters = bytearray(self.parameters)
        for place, address in addresses.items():
            _address.pack_into(parameters, 8 * place, address)
        return self._replace(parameters=bytes(parameters))


@functools.cache
def load_spec(spec: Spec, device: int) -> Kernel:
    """The kernel of a spec on a device, which must be the current one."""
    return load(spec.source, spec.name, dict(spec.defines), device, smem_nbytes=spec.smem_nbytes)
