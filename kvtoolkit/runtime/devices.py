"""Which CUDA device is the current one, and how to change it for a call."""

import contextlib
import functools
from typing import Any

_as_it_is: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def using(device: int) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one inside a ``with`` block."""
    if _num_devices() == 1:
        return _as_it_is
    import cupy

    return _as_it_is if cupy.cuda.runtime.getDevice() == device else cupy.cuda.Device(device)


@functools.cache
def _num_devices() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())
