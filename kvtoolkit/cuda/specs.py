"""Which kernels there are: the source, the macros and the shared memory that a shape and a device call for."""

from collections.abc import Iterator
from typing import NamedTuple

from kvtoolkit.errors import UnsupportedError

SMEM_LIMITS = {"80": 166912, "86": 101376, "89": 101376, "90": 232448, "100": 232448, "120": 101376}
"""Shared memory of one CTA by compute capability, for compiling where no device tells."""

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
"""What models have; any multiple of 16 up to 256 compiles."""

_RESERVED = 1024  # static shared memory and what the driver takes


class Spec(NamedTuple):
    """One kernel."""

    source: str
    name: str
    defines: tuple[tuple[str, int], ...]
    threads: int
    """Of a CTA."""
    smem_nbytes: int = 0
    """Dynamic shared memory of a CTA."""
    rows: int = 1
    """Query rows of a CTA."""


def check_head_dim(head_dim: int, dtype: str) -> None:
    """UnsupportedError where there is no attention kernel for these tokens."""
    if dtype not in ("float16", "bfloat16"):
        raise UnsupportedError(f"q: the CUDA attention kernels take float16 and bfloat16, got {dtype}")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise UnsupportedError(f"q: no CUDA kernel for head_dim {head_dim}; expected a multiple of 16 up to 256")


def row_bytes(head_dim: int) -> int:
    """Shared memory of one token's keys or values: rows begin at multiples of 128 bytes."""
    return -(-head_dim // 64) * 128


def decode(head_dim: int, dtype: str, entries: bool, most_rows: int, smem_limit: int) -> Spec:
    """The decode kernel for blocks of up to ``most_rows`` query rows."""
    row_tiles = 2 if most_rows > 8 and head_dim <= 128 else 1
    step = 2 * 16 * row_bytes(head_dim)
    shapes = ((8, 3), (8, 2), (4, 3), (4, 2)) if head_dim <= 128 else ((4, 3), (4, 2), (2, 3), (2, 2))
    # the most bytes under way that fit
    warps, stages = next(shape for shape in shapes if shape[0] * shape[1] * step + _RESERVED <= smem_limit)
    defines = (
        ("KVT_HEAD_DIM", head_dim), ("KVT_BF16", int(dtype == "bfloat16")), ("KVT_ENTRIES", int(entries)),
        ("KVT_ROW_TILES", row_tiles), ("KVT_WARPS", warps), ("KVT_STAGES", stages),
    )  # fmt: skip
    return Spec("attention/decode.cu", "kvt_decode", defines, 32 * warps, warps * stages * step, 8 * row_tiles)


def prefill(head_dim: int, dtype: str, entries: bool) -> Spec:
    """The prefill kernel."""
    keys, row = (64 if head_dim <= 128 else 32), row_bytes(head_dim)
    defines = (("KVT_HEAD_DIM", head_dim), ("KVT_BF16", int(dtype == "bfloat16")), ("KVT_ENTRIES", int(entries)))
    return Spec("attention/prefill.cu", "kvt_prefill", defines, 128, 64 * row + 4 * keys * row + 32 * keys, 64)


def append(vector: int) -> Spec:
    """The append kernel that moves ``vector`` bytes at a time: 16, 8, 4 or 2."""
    return Spec("cache/append.cu", "kvt_append", (("KVT_VECTOR", vector),), 256)


MOVE = Spec("cache/move.cu", "kvt_move", (), 256)
CHECK = Spec("cache/check.cu", "kvt_check", (), 256)


def merge_states(dtype: str) -> Spec:
    """The kernel that merges states of a dtype."""
    code = {"float32": 0, "float16": 1, "bfloat16": 2}[dtype]
    return Spec("attention/merge_states.cu", "kvt_merge_states", (("KVT_DTYPE", code),), 256)


def of_model(head_dim: int, dtype: str, group_size: int, smem_limit: int, *, plain: bool = False) -> Iterator[Spec]:
    """Every kernel that the cache of a model needs; ``plain`` adds those for caches of plain block ids."""
    for entries in (True, False) if plain else (True,):
        # decode, and verify with up to 8 tokens
        yield from dict.fromkeys(
            decode(head_dim, dtype, entries, rows, smem_limit) for rows in (group_size, 8 * group_size)
        )
        yield prefill(head_dim, dtype, entries)
    yield from (append(16), MOVE, CHECK, merge_states(dtype))
