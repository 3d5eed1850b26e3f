"""Launch the kernels that write into a cache - append, moves of granules, conversions - on arrays known to be right."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.host import Operand
from kvtoolkit.arrays.types import ITEMSIZES, ArrayLike
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.errors import ShapeError, UnsupportedError
from kvtoolkit.runtime.kernels import num_sms
from kvtoolkit.runtime.structs import ParameterStruct

_append_params = ParameterStruct("cache/append.cu", "kvt_append")

MAX_MOVES = 448  # as in move.cu
_move_params = ParameterStruct("cache/move.cu", "kvt_move", until="sources")
_UNROLL = 4

_transfer_params = ParameterStruct("cache/move.cu", "kvt_transfer", until="sources")
_listed_transfer_params = ParameterStruct("cache/move.cu", "kvt_transfer_listed")
_listed_move_params = ParameterStruct("cache/move.cu", "kvt_move_listed")

MAX_CONVERSIONS = 48  # as in convert.cu
_convert_params = ParameterStruct("cache/convert.cu", "kvt_convert", until="sources")
_listed_convert_params = ParameterStruct("cache/convert.cu", "kvt_convert_listed")
_CTAS_PER_SM = 2  # of launches that do not know how much there is to move


class Append(NamedTuple):
    """A call of `append` made ready for other layers."""

    device: int
    launch: Launch


def append(
    key: Operand, value: Operand, k_cache: Operand, v_cache: Operand, slot_mapping: Operand, *, stream: int = 0
) -> Append | None:
    """Append, asynchronously on ``stream``; see `kvtoolkit.cpu.append`. Returns what `append_prepared` takes."""
    num_tokens, num_heads, head_dim = key.shape
    if num_tokens == 0:
        return None
    size = ITEMSIZES[key.dtype]
    strides = [s * size for one in (key, value) for s in one.strides[:2]] + [
        stride * size for cache in (k_cache, v_cache) for stride in cache.strides[:3]
    ]
    addresses = (key.address, value.address, k_cache.address, v_cache.address)
    row_nbytes = head_dim * size
    vector = _widest(row_nbytes, *addresses, *strides)
    parameters = _append_params.pack(
        *addresses,
        slot_mapping.address,
        *strides,
        num_tokens,
        num_heads,
        row_nbytes // vector,
        k_cache.shape[2],
    )
    spec = specs.append(vector)
    grid = (-(-num_tokens * num_heads * (row_nbytes // vector) // spec.threads),)
    launch = Launch(load_spec(spec, key.device), grid, spec.threads, 0, parameters)
    launch.run(stream)
    return Append(key.device, launch)


def append_prepared(
    prepared: Append, key: int, value: int, k_cache: int, v_cache: int, *, stream: int = 0, overlaps: bool = False
) -> None:
    """Append once more where only the addresses of these four arrays differ, by multiples of 16 bytes.

    ``overlaps`` lets the kernel start up while the one before it still runs; it waits for it before it reads. The
    launch is changed for the call: one thread at a time.
    """
    prepared.launch.set_addresses(_append_params.word("key"), key, value, k_cache, v_cache)
    prepared.launch.run(stream, dependent=overlaps)


def _widest(*numbers: int) -> int:
    """The widest vector, 16 bytes at most, that divides all of them."""
    together = 0
    for number in numbers:
        together |= number
    return min(16, together & -together)


def copy_granules(arena: Operand, src: ArrayLike, dst: ArrayLike, *, stream: int = 0) -> None:
    """Copy granule ``src[i]`` to ``dst[i]`` of every array of an arena, asynchronously on ``stream``.

    Args:
        arena: ``[num_arrays, num_granules, num_kv_heads, 8, head_dim]`` of numbers of any dtype, the last three axes
            contiguous; granules are whole multiples of 16 bytes, and begin at such.
        src: granules to read, integers on the host in ``[0, num_granules)``; ``dst``: as many to write. No
            granule is in both, and none is twice in ``dst``: the copies happen in any order.

    Raises:
        ShapeError: an index is no integer or out of range, the lists differ in length, or a granule is both read and
            written.
        UnsupportedError: an arena of another dtype or alignment.
    """
    sources, targets = _granules(src, "src"), _granules(dst, "dst")
    num_arrays, num_granules = arena.shape[:2]
    if len(sources) != len(targets):
        raise ShapeError(f"dst: expected as many granules as src, {len(sources)}, got {len(targets)}")
    if not len(sources):
        return
    lowest, highest = min(sources.min(), targets.min()), max(sources.max(), targets.max())
    if lowest < 0 or highest >= num_granules:
        raise ShapeError(f"src, dst: expected granules in [0, {num_granules}), got {lowest} to {highest}")
    if np.intersect1d(sources, targets).size:
        raise ShapeError("src, dst: expected no granule in both, since the copies happen in any order")
    size = ITEMSIZES.get(arena.dtype, 0)
    nbytes = arena.shape[2] * arena.shape[3] * arena.shape[4] * size
    if not size or (arena.address | nbytes | arena.strides[0] * size | arena.strides[1] * size) % 16:
        raise UnsupportedError(
            f"arena: expected numbers in granules of whole multiples of 16 bytes, at such addresses and strides, got "
            f"{arena.dtype}, {nbytes} bytes a granule, address {arena.address:#x}, strides {arena.strides} (elements)"
        )
    vectors = nbytes // 16
    kernel = load_spec(specs.MOVE, arena.device)
    for first in range(0, len(sources), MAX_MOVES):
        some = slice(first, first + MAX_MOVES)
        count = len(sources[some])
        listed = np.zeros((2, MAX_MOVES), np.int32)
        listed[0, :count], listed[1, :count] = sources[some], targets[some]
        parameters = _move_params.pack(arena.address, arena.strides[0] * size, arena.strides[1] * size, vectors, count)
        ctas = min(-(-count * vectors // (256 * _UNROLL)), max(1, 16 * num_sms(arena.device) // num_arrays))
        Launch(kernel, (ctas, num_arrays), specs.MOVE.threads, 0, parameters + listed.tobytes()).run(stream)


def _granules(listed: ArrayLike, name: str) -> NDArray[np.int32]:
    found = np.asarray(listed)
    if found.size and found.dtype.kind not in "iu":
        raise ShapeError(f"{name}: expected integers, got {found.dtype}")
    if found.size and (found.min() < 0 or found.max() >= 1 << 31):
        raise ShapeError(f"{name}: expected granules of the arena, got {found.min()} to {found.max()}")
    return np.ascontiguousarray(found, np.int32).reshape(-1)


def convert(
    hot: Operand, warm: Operand | None, cold: Operand | None, first_granules: tuple[int, int, int],
    sources: ArrayLike, targets: ArrayLike, *, stream: int = 0,
) -> None:  # fmt: skip
    """Write tiles of 64 tokens to another tier, all layers, asynchronously on ``stream``.

    Args:
        hot: ``[2 * num_layers, num_granules, num_kv_heads, 8, head_dim]`` float16 or bfloat16, keys then values of each
            layer, the last three axes contiguous.
        warm: ``[num_layers, num_blocks, num_kv_heads, nbytes]`` uint8, the last two axes contiguous; ``cold`` too.
        first_granules: where the granule numbers of the hot, warm and cold tier begin, ascending.
        sources: ``[n, 8]`` granule numbers on the host; of a quantized tier the 8 of a block.
        targets: ``[n, 8]``; -1 = not wanted. No granule is in both, and none is twice among the targets.
    """
    moves = [np.ascontiguousarray(one, np.int32).reshape(-1, 8) for one in (sources, targets)]
    num_moves = len(moves[0])
    _, _, num_kv_heads, _, head_dim = hot.shape
    spec = specs.convert(head_dim, hot.dtype)
    for first in range(0, num_moves, MAX_CONVERSIONS):
        count = min(MAX_CONVERSIONS, num_moves - first)
        listed = np.zeros((2, MAX_CONVERSIONS, 8), np.int32)
        for side, one in zip(listed, moves, strict=True):
            side[:count] = one[first : first + count]
        parameters = _convert_params.pack(
            hot.address, warm.address if warm else 0, cold.address if cold else 0, hot.strides[0], hot.strides[1],
            warm.strides[0] if warm else 0, cold.strides[0] if cold else 0, num_kv_heads, *first_granules,
        )  # fmt: skip
        grid = (count, num_kv_heads, hot.shape[0] // 2)
        kernel = load_spec(spec, hot.device)
        Launch(kernel, grid, spec.threads, spec.smem_nbytes, parameters + listed.tobytes()).run(stream)


class Superblocks(NamedTuple):
    """The superblocks of a tier: in each of some arrays at equal distances, one after another."""

    address: int
    num_arrays: int
    stride: int
    """Bytes from one array to the next."""
    nbytes: int
    """Of a superblock in one array; a multiple of 16."""


def transfer(
    held: Superblocks, sources: NDArray[np.int32], targets: NDArray[np.int32], *, ctas: int, stream: int, device: int
) -> None:
    """Copy superblocks between a device and pinned host memory by a kernel, asynchronously on ``stream``.

    Args:
        sources, targets: numbers of superblocks, at most `MAX_MOVES`. None is in both.
        ctas: that the kernel has, each of 1024 threads: what it takes from others that run beside it.
    """
    count = len(sources)
    listed = np.zeros((2, MAX_MOVES), np.int32)
    listed[0, :count], listed[1, :count] = sources, targets
    parameters = _transfer_params.pack(
        held.address, held.stride, held.nbytes, held.nbytes // 16, count, held.num_arrays
    )
    spec = specs.TRANSFER
    Launch(load_spec(spec, device), (ctas,), spec.threads, 0, parameters + listed.tobytes()).run(stream)


def make_listed_transfer(held: Superblocks, pairs: int, *, ctas: int, device: int) -> Launch:
    """The launch that copies superblocks by a list on the device.

    Args:
        held: in all arrays that one launch copies.
        pairs: address of int32 numbers: how many pairs there are, a word that is not used, then ``[n, 2]`` superblocks
            to read and to write.
        ctas: see `transfer`.
    """
    parameters = _listed_transfer_params.pack(
        held.address, held.stride, held.nbytes, held.nbytes // 16, 0, held.num_arrays, pairs, pairs + 8
    )
    spec = specs.TRANSFER_LISTED
    return Launch(load_spec(spec, device), (ctas,), spec.threads, 0, parameters)


def set_arrays(launch: Launch, address: int) -> None:
    """Let a launch of `make_listed_transfer` copy in other arrays, at the same distance from one another."""
    launch.set_addresses(_listed_transfer_params.word("arena"), address)


def make_listed_copy(arena: Operand, num_merges: int, merges: int) -> Launch:
    """The launch that copies granules by a list on the device, which a launch before it makes.

    Args:
        arena: as `copy_granules` takes it.
        num_merges: address of how many there are.
        merges: address of ``[n, 16]`` int32: 8 granules to read, 8 to write.
    """
    size = ITEMSIZES[arena.dtype]
    vectors = arena.shape[2] * arena.shape[3] * arena.shape[4] * size // 16
    strides = arena.strides[0] * size, arena.strides[1] * size
    parameters = _listed_move_params.pack(arena.address, *strides, vectors, 0, num_merges, merges)
    spec, num_arrays = specs.MOVE_LISTED, arena.shape[0]
    ctas = max(1, _CTAS_PER_SM * num_sms(arena.device) // num_arrays)
    return Launch(load_spec(spec, arena.device), (ctas, num_arrays), spec.threads, 0, parameters)


def make_listed_conversion(
    hot: Operand, warm: Operand | None, cold: Operand | None, first_granules: tuple[int, int, int], num_moves: int,
    moves: int,
) -> Launch:  # fmt: skip
    """The launch that converts tiles by a list on the device, which a launch before it makes.

    Args:
        hot, warm, cold, first_granules: as `convert` takes them.
        num_moves: address of how many there are.
        moves: address of ``[n, 16]`` int32: 8 sources, 8 targets.
    """
    _, _, num_kv_heads, _, head_dim = hot.shape
    spec = specs.convert(head_dim, hot.dtype)._replace(name="kvt_convert_listed")
    parameters = _listed_convert_params.pack(
        hot.address, warm.address if warm else 0, cold.address if cold else 0, hot.strides[0], hot.strides[1],
        warm.strides[0] if warm else 0, cold.strides[0] if cold else 0, num_kv_heads, *first_granules, num_moves,
        moves, hot.shape[0] // 2,
    )  # fmt: skip
    kernel = load_spec(spec, hot.device)
    return Launch(kernel, (_CTAS_PER_SM * num_sms(hot.device),), spec.threads, spec.smem_nbytes, parameters)
