"""Tensor maps: how the copy engine of sm_90 is told of an array, once for any number of copies.

Source: CUDA Driver API, "Tensor Map Object Management".
"""

import ctypes
import functools

from kvtoolkit.runtime import driver

NBYTES = 128
_ALIGNMENT = 64
_BFLOAT16 = 9  # CUtensorMapDataType; any type of 16 bits moves the same bytes
_NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _ZEROS = 0, 3, 3, 0


@functools.lru_cache(8192)
def tensor_map(
    address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> tuple[int, ...] | None:
    """A map of an array of 16-bit numbers whose boxes come to shared memory in rows of 128 bytes, swizzled by 128.

    Maps are kept, because a program describes the same arrays again and again.

    Args:
        address: of the first number, a multiple of 16.
        sizes: of each axis, the contiguous one first.
        strides: bytes from one to the next on each axis but the first, multiples of 16.
        box: what one copy brings of each axis; beyond the array it brings zeros.

    Returns:
        The map as words of 64 bits; None if the driver cannot describe the array.
    """
    rank = len(sizes)
    memory = ctypes.create_string_buffer(NBYTES + _ALIGNMENT)
    at = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
    status = driver.library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), _BFLOAT16, rank, ctypes.c_void_p(address), (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _ZEROS,
    )  # fmt: skip
    return None if status else tuple((ctypes.c_int64 * (NBYTES // 8)).from_address(at))
