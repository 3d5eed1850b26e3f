"""Copies of superblocks between a device and pinned host memory, on a stream of their own."""

from typing import Any

from kvtoolkit.arrays.types import Int32Array
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
        tiers: the superblocks of the tiers that have host memory, and the number of the first one.

    Attributes:
        ctas: of the kernel that copies beside the caller's kernels; 0: the copy engines copy.
    """

    def __init__(self, device: int, tiers: dict[int, tuple[Superblocks, int]]) -> None:
        self._device, self._tiers = device, tiers
        with _cupy().cuda.Device(device):
            self._stream = _cupy().cuda.Stream(non_blocking=True)
        self._last: Any = None
        self.ctas = max((_ctas_for(held.nbytes) for held, _ in tiers.values()), default=1)

    def start(self, tier: int, sources: Int32Array, targets: Int32Array, *, beside: bool = True) -> Transfer:
        """See `Transfers`."""
        held, first = self._tiers[tier]
        cupy, current = _cupy(), current_stream(self._device)
        with cupy.cuda.Device(self._device):
            done = cupy.cuda.Event(disable_timing=True)
            if not beside:
                arguments = {"ctas": _URGENT_CTAS, "stream": current, "device": self._device}
                copy.transfer(held, sources - first, targets - first, **arguments)
                with on_stream(current):
                    done.record(cupy.cuda.get_current_stream())
                return _UnderWay(self._device, done)
            self._follow(current)
            if self.ctas:
                arguments = {"ctas": self.ctas, "stream": self._stream.ptr, "device": self._device}
                copy.transfer(held, sources - first, targets - first, **arguments)
            else:
                copy_engine.transfer(held, sources - first, targets - first, stream=self._stream.ptr)
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


def _ctas_for(nbytes: int) -> int:
    """CTAs that fill the link with pieces of so many bytes; measured, see docs/results/gpu_transfers.md."""
    return 4 if nbytes >= 1 << 16 else 8 if nbytes >= 1 << 14 else 16


def _cupy() -> Any:
    import cupy

    return cupy
