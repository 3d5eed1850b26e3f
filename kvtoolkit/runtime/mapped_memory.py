"""Arrays that are partly in the memory of a device and partly in pinned host memory, at addresses one after another.

Kernels use the same addresses for both parts; what is in host memory is read and written over the link. So no kernel
needs to know what is where. CUDA C++ Programming Guide, "Virtual Memory Management"; host memory in such a range needs
a driver of CUDA 12.6 or later.
"""

import ctypes
import weakref
from typing import Any

from kvtoolkit.errors import DeviceError, UnsupportedError
from kvtoolkit.runtime.driver import library

_PINNED, _ON_DEVICE, _ON_HOST = 1, 1, 3  # CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE and _HOST_NUMA
_READ_AND_WRITE = 3
_SUPPORTED, _HOST_SUPPORTED = 102, 141  # attributes of a device: virtual memory, also in the host's
_HOST_NODE = 134  # CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", _Location), ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )  # fmt: skip


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class MappedMemory:
    """``count`` arrays of equal size, each with a beginning on a device and the rest in pinned host memory.

    After these, each array may have room that it shares with others: array ``i`` with all ``j`` for which
    ``i % ring == j % ring``. What is written there through one of them is read through the others.

    The memory is zero. It is given back when nothing refers to this object any more, after all work of the device that
    may use it.

    Args:
        device: CUDA ordinal; it must be the current one.
        count: arrays.
        device_nbytes: of each array on the device, rounded up to whole pages.
        host_nbytes: of each array after these; pages that hold both kinds are on the device.
        shared_nbytes: of the room at the end of each array, on the device.
        ring: how many such rooms there are.

    Attributes:
        address: of the first array.
        stride: bytes from one array to the next.
        shared_at: bytes from the beginning of an array to the room that it shares.
        nbytes: of all addresses, from the first to the last.

    Raises:
        UnsupportedError: the device or its driver has no such memory.
        DeviceError: there is not enough memory; says which.
    """

    def __init__(
        self, device: int, count: int, device_nbytes: int, host_nbytes: int, shared_nbytes: int = 0, ring: int = 1
    ) -> None:  # fmt: skip
        import cupy

        cupy.cuda.runtime.setDevice(device)  # in a thread that has not used CUDA yet
        self._require_support(device)
        page = _page(device)
        first = -(-device_nbytes // page) * page
        rest = max(0, -(-(device_nbytes + host_nbytes) // page) * page - first)
        shared = -(-shared_nbytes // page) * page
        self.shared_at, self.stride = first + rest, first + rest + shared
        self.nbytes = count * self.stride
        address = ctypes.c_uint64()
        _call("cuMemAddressReserve", ctypes.byref(address), _size(self.nbytes), _size(0), _u64(0), _u64(0))
        self.address = address.value
        pieces: list[tuple[int, int, int]] = []  # address, bytes, handle
        self._finalizer = weakref.finalize(self, _release, device, self.address, self.nbytes, pieces)
        self._finalizer.atexit = False  # the driver gives everything back
        try:
            for i in range(count):
                at = self.address + i * self.stride
                _map(pieces, at, first, _Location(_ON_DEVICE, device), f"{count * first} bytes of device memory")
                if rest:
                    host = _Location(_ON_HOST, _host_node(device))
                    _map(pieces, at + first, rest, host, f"{count * rest} bytes of pinned host memory")
                if shared and i < ring:
                    what = f"{ring * shared} bytes of device memory"
                    _map(pieces, at + first + rest, shared, _Location(_ON_DEVICE, device), what)
                elif shared:
                    _map_again(pieces, at + first + rest, shared, self.address + i % ring * self.stride + first + rest)
            access = _Access(_Location(_ON_DEVICE, device), _READ_AND_WRITE)
            _call("cuMemSetAccess", _u64(self.address), _size(self.nbytes), ctypes.byref(access), _size(1))
            cupy.cuda.runtime.memset(self.address, 0, self.nbytes)
            cupy.cuda.runtime.deviceSynchronize()
        except BaseException:
            self._finalizer()
            raise

    @staticmethod
    def _require_support(device: int) -> None:
        for attribute, what in ((_SUPPORTED, "virtual memory"), (_HOST_SUPPORTED, "virtual memory of the host")):
            if not _attribute(attribute, device):
                raise UnsupportedError(
                    f"tiers.host: expected a device and driver with {what} (CUDA 12.6 or later), got device {device} "
                    "without"
                )


def _map(pieces: list[tuple[int, int, int]], at: int, nbytes: int, location: _Location, what: str) -> None:
    """Make memory at an address, and note it."""
    properties, handle = _Properties(_PINNED, 0, location), ctypes.c_uint64()
    status = library().cuMemCreate(ctypes.byref(handle), _size(nbytes), ctypes.byref(properties), _u64(0))
    if status:
        raise DeviceError(f"expected {what} to be free, got none ({_name_of(status)})")
    try:
        _call("cuMemMap", _u64(at), _size(nbytes), _size(0), handle, _u64(0))
    except BaseException:
        library().cuMemRelease(handle)
        raise
    pieces.append((at, nbytes, handle.value))


def _map_again(pieces: list[tuple[int, int, int]], at: int, nbytes: int, other: int) -> None:
    """Give memory that is mapped at an address another one, too."""
    (handle,) = (handle for address, _, handle in pieces if address == other)
    _call("cuMemMap", _u64(at), _size(nbytes), _size(0), _u64(handle), _u64(0))
    pieces.append((at, nbytes, 0))


def _release(device: int, address: int, nbytes: int, pieces: list[tuple[int, int, int]]) -> None:
    """Give memory and addresses back, once nothing uses them."""
    import cupy

    with cupy.cuda.Device(device):
        cupy.cuda.runtime.deviceSynchronize()
        for at, size, handle in pieces:
            library().cuMemUnmap(_u64(at), _size(size))
            if handle:
                library().cuMemRelease(_u64(handle))
        library().cuMemAddressFree(_u64(address), _size(nbytes))


def _page(device: int) -> int:
    """Bytes of the smallest piece of memory."""
    properties, found = _Properties(_PINNED, 0, _Location(_ON_DEVICE, device)), ctypes.c_size_t()
    _call("cuMemGetAllocationGranularity", ctypes.byref(found), ctypes.byref(properties), 0)
    return found.value


def _host_node(device: int) -> int:
    """The NUMA node of the host that is closest to a device."""
    return max(0, _attribute(_HOST_NODE, device))


def _attribute(attribute: int, device: int) -> int:
    found = ctypes.c_int()
    _call("cuDeviceGetAttribute", ctypes.byref(found), attribute, device)
    return found.value


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the driver; DeviceError if it fails."""
    status = getattr(library(), name)(*arguments)
    if status:
        raise DeviceError(f"{name}: expected success, got {_name_of(status)}")


def _name_of(status: int) -> str:
    text = ctypes.c_char_p()
    library().cuGetErrorName(status, ctypes.byref(text))
    return (text.value or str(status).encode()).decode()


_size, _u64 = ctypes.c_size_t, ctypes.c_uint64
