"""A launch made ready: kernel, grid and packed parameters, of which addresses can be changed for the next layer."""

import functools
from typing import Any

from kvtoolkit.cuda.specs import Spec
from kvtoolkit.runtime import Kernel, load


class Launch:
    """One kernel with its parameters, to be launched any number of times, by one thread at a time.

    Args:
        kernel: on its device.
        grid: CTAs, up to three axes.
        threads: of a CTA.
        smem_nbytes: dynamic shared memory of a CTA.
        parameters: the bytes of its struct, see `kvtoolkit.runtime.structs.ParameterStruct`.
    """

    __slots__ = ("_prepared", "_words", "kernel")

    def __init__(
        self, kernel: Kernel, grid: tuple[int, ...], threads: int, smem_nbytes: int, parameters: bytes
    ) -> None:  # fmt: skip
        self.kernel = kernel
        self._prepared = kernel.prepare(grid, threads, parameters, smem_nbytes)
        self._words: Any = self._prepared.words

    def run(self, stream: int, *, dependent: bool = False) -> None:
        """Launch it; ``dependent``: it may begin while the kernel before it still runs, and waits for it itself."""
        self._prepared.run(stream, dependent)

    def set_addresses(self, first: int, *addresses: int) -> None:
        """Change pointers that follow each other in the struct, ``first`` being the place of one in 8-byte words."""
        self._words[first : first + len(addresses)] = addresses


@functools.cache
def load_spec(spec: Spec, device: int) -> Kernel:
    """The kernel of a spec on a device, which must be the current one."""
    return load(spec.source, spec.name, dict(spec.defines), device, smem_nbytes=spec.smem_nbytes, feature=spec.feature)
