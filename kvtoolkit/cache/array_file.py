"""Named arrays as bytes and back: a checksum, a header that describes the arrays, then the arrays one after another.

Nothing is compressed, and the bytes are read as numbers only. So reading takes no more memory than there are bytes,
runs no code, and notices any changed byte. Bytes with a correct checksum may still hold any numbers.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.errors import CacheSnapshotError

_MAGIC = b"kvt-cache-3\n"
_DTYPES = ("bool", "int8", "uint8", "uint16", "int32", "int64", "float16", "float32", "float64", "uint64")


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The arrays as bytes."""
    header = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    line = json.dumps(header).encode() + b"\n"
    body = b"".join([line, *(np.ascontiguousarray(array).tobytes() for array in arrays.values())])
    return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def unpack_arrays(data: bytes | bytearray | memoryview) -> dict[str, NDArray[Any]]:
    """The arrays, as read-only views of the bytes; CacheSnapshotError if `pack_arrays` did not make these bytes."""
    view = memoryview(data).cast("B")
    head = len(_MAGIC) + 4
    if bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise CacheSnapshotError(f"snapshot: expected bytes that begin with {_MAGIC!r}, got {bytes(view[:12])!r}")
    body = view[head:]
    if zlib.crc32(body) != int.from_bytes(view[len(_MAGIC) : head], "little"):
        raise CacheSnapshotError(f"snapshot: the checksum of its {len(body)} bytes does not match; it is damaged")
    end = bytes(body[: 1 << 20]).find(b"\n")
    arrays, offset = {}, end + 1
    for name, dtype, shape in _header(bytes(body[: max(end, 0)])):
        count = 1
        for extent in shape:
            count *= extent
        nbytes = count * np.dtype(dtype).itemsize
        if nbytes > len(body) - offset:
            raise CacheSnapshotError(f"snapshot: expected {nbytes} bytes of {name}, got {len(body) - offset}")
        arrays[name] = np.frombuffer(body, dtype, count, offset).reshape(shape)
        offset += nbytes
    if offset != len(body):
        raise CacheSnapshotError(f"snapshot: expected {offset} bytes of arrays, got {len(body)}")
    return arrays


def _header(line: bytes) -> list[tuple[str, str, list[int]]]:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CacheSnapshotError(f"snapshot: expected a header in JSON, got {line[:40]!r}") from error
    if not isinstance(header, dict):
        raise CacheSnapshotError(f"snapshot: expected a header that names arrays, got {line[:40]!r}")
    listed = []
    for name, entry in header.items():
        is_pair = isinstance(entry, list) and len(entry) == 2 and entry[0] in _DTYPES and isinstance(entry[1], list)
        if not is_pair or not all(type(extent) is int and 0 <= extent < 1 << 48 for extent in entry[1]):
            raise CacheSnapshotError(f"snapshot: expected dtype and shape of {name!r:.40}, got {entry!r:.80}")
        if len(entry[1]) > 8:
            raise CacheSnapshotError(f"snapshot: expected at most 8 axes of {name!r:.40}, got {len(entry[1])}")
        listed.append((name, entry[0], entry[1]))
    return listed
