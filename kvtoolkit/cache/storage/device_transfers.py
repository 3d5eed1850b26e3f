"""Copies of superblocks between a device and pinned host memory, on a stream of their own."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cache.storage.calibration import ENGINES, calibrate
from kvtoolkit.cache.storage.transfers import Transfer
from kvtoolkit.cuda import copy, copy_engine
from kvtoolkit.cuda.copy import Superblocks
from kvtoolkit.runtime.streams import current_stream, on_stream

_URGENT_CTAS = 32
"""CTAs where the caller's stream waits anyway."""


class _UnderWay:
    """Copies on a stream, and the event after them."""

    def __init__(self, device: int, event: Any) -> None:
        self._device, self._event = device, event

    def is_done(self) -> bool:
        return bool(self._event.done)

    def join(self) -> None:
        with on_stream(current_stream(self._device)):
            _cupy().cuda.get_current_stream().wait_event(self._event)


class DeviceTransfers:
    """The counterpart of `HostTransfers` for a `DeviceStorage` with host memory.

    Args:
        device: CUDA ordinal.
        tiers: for each tier that has host memory, its superblocks, the number of the first one, and how many of them
            are on the device.

    Attributes:
        ways: how blocks of each tier are copied beside the caller's kernels.
    """

    def __init__(self, device: int, tiers: Mapping[int, tuple[Superblocks, int, int, int]]) -> None:
        self._device, self._tiers = device, tiers
        self._last: Any = None
        with _cupy().cuda.Device(device):
            self._stream = _cupy().cuda.Stream(non_blocking=True)
            self.ways = {
                tier: calibrate(held, on_device, min(on_device, in_host), device, self._stream)
                for tier, (held, _, on_device, in_host) in tiers.items()
            }
            self._stream.synchronize()

    def start(self, tier: int, sources: Int32Array, targets: Int32Array, *, beside: bool = True) -> Transfer:
        """See `Transfers`."""
        held, first, on_device, _ = self._tiers[tier]
        pair = sources - np.int32(first), targets - np.int32(first)
        cupy, current = _cupy(), current_stream(self._device)
        with cupy.cuda.Device(self._device):
            done = cupy.cuda.Event(disable_timing=True)
            if not beside:
                copy.transfer(held, *pair, ctas=_URGENT_CTAS, stream=current, device=self._device)
                with on_stream(current):
                    done.record(cupy.cuda.get_current_stream())
                return _UnderWay(self._device, done)
            self._follow(current)
            ways = self.ways[tier]
            ctas = ways.to_device if pair[0][0] >= on_device else ways.to_host
            if ctas == ENGINES:
                copy_engine.transfer(held, *pair, stream=self._stream.ptr)
            else:
                copy.transfer(held, *pair, ctas=ctas, stream=self._stream.ptr, device=self._device)
            done.record(self._stream)
            self._last = done
        return _UnderWay(self._device, done)

    def _follow(self, current: int) -> None:
        """Let copies wait for what the caller's stream was given: writers of the sources, readers of the targets."""
        given = _cupy().cuda.Event(disable_timing=True)
        with on_stream(current):
            given.record(_cupy().cuda.get_current_stream())
        self._stream.wait_event(given)

    def join(self) -> None:
        """See `Transfers`."""
        if self._last is not None:
            _UnderWay(self._device, self._last).join()


def _cupy() -> Any:
    import cupy

    return cupy
