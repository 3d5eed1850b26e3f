"""Write new tokens into a paged cache and copy granules inside it: bytes, so one compilation serves every dtype."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from allocators._bits import fetch_add_acq_rel, load_acquire
from allocators._jit import jit
from kvtoolkit.arrays.extents import extent
from kvtoolkit.arrays.host import Operand, address_of, as_numpy_view, is_torch
from kvtoolkit.arrays.types import ITEMSIZES, ArrayLike
from kvtoolkit.cpu import threads
from kvtoolkit.cpu.kernel import yield_core
from kvtoolkit.cpu.vector import copy_bytes, read_i64
from kvtoolkit.errors import ShapeError, UnsupportedError
from kvtoolkit.findings import Finding, raise_finding

_TOKENS_PER_ITEM = 64
_int: Any = np.int64  # a cast in compiled code
_BYTES_PER_THREAD = 2_000_000  # some 100 us, several times what waking a thread takes

(
    KEY, KEY_TOKEN, KEY_HEAD,           # address, then strides in bytes
    VALUE, VALUE_TOKEN, VALUE_HEAD,
    KEYS, KEYS_BLOCK, KEYS_HEAD, KEYS_SLOT,
    VALUES, VALUES_BLOCK, VALUES_HEAD, VALUES_SLOT,
    SLOTS, NUM_TOKENS, NUM_HEADS, ROW_BYTES, BLOCK_SIZE, NUM_SLOTS,
    NUM_FIELDS,
) = range(21)  # fmt: skip


@jit
def first_bad_slot(problem: Any) -> int:
    """Index of the first slot that is neither -1 nor inside the cache; -1 if there is none."""
    for token in range(problem[NUM_TOKENS]):
        slot = read_i64(problem[SLOTS] + 8 * token)
        if slot < -1 or slot >= problem[NUM_SLOTS]:
            return token
    return -1


@jit
def _append_tokens(problem: Any, begin: int, end: int) -> None:
    block_size = problem[BLOCK_SIZE]
    nbytes = problem[ROW_BYTES]
    for token in range(begin, end):
        slot = read_i64(problem[SLOTS] + 8 * token)
        if slot < 0:
            continue
        block = slot // block_size
        slot -= block * block_size
        key = problem[KEYS] + block * problem[KEYS_BLOCK] + slot * problem[KEYS_SLOT]
        value = problem[VALUES] + block * problem[VALUES_BLOCK] + slot * problem[VALUES_SLOT]
        new_key = problem[KEY] + token * problem[KEY_TOKEN]
        new_value = problem[VALUE] + token * problem[VALUE_TOKEN]
        for head in range(problem[NUM_HEADS]):
            copy_bytes(key + head * problem[KEYS_HEAD], new_key + head * problem[KEY_HEAD], nbytes)
            copy_bytes(value + head * problem[VALUES_HEAD], new_value + head * problem[VALUE_HEAD], nbytes)


@jit
def append_items(problem: Any, counters: Any, is_caller: int) -> None:
    """Claim 64 tokens at a time until none are left; the calling thread then waits for those in other hands."""
    tokens = problem[NUM_TOKENS]
    items = (tokens + _TOKENS_PER_ITEM - 1) // _TOKENS_PER_ITEM
    while True:
        item = _int(fetch_add_acq_rel(counters, 0, np.uint64(1)))
        if item >= items:
            break
        _append_tokens(problem, item * _TOKENS_PER_ITEM, min(tokens, (item + 1) * _TOKENS_PER_ITEM))
        fetch_add_acq_rel(counters, 1, np.uint64(1))
    if is_caller:
        while _int(load_acquire(counters, 1)) < items:
            yield_core()


def append(
    key: Operand, value: Operand, k_cache: Operand, v_cache: Operand, slot_mapping: Operand, *, check: bool = False,
    from_torch: bool | None = None,
) -> Any:  # fmt: skip
    """Copy each token's key and value to its slot; see `kvtoolkit.arrays.call.Backend.append`.

    Shapes, strides and dtypes are *not* checked, and without ``check`` neither are the slots; a wrong one writes to
    foreign memory.

    Args:
        key: ``[num_tokens, num_kv_heads, head_dim]``, last axis contiguous; ``value`` has its shape.
        k_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]`` by its strides; ``v_cache`` has its shape.
        slot_mapping: ``[num_tokens]`` int64, contiguous, ``block * block_size + i``; -1 = skip.
        from_torch: ignored.

    Returns:
        What `append_prepared` takes.

    Raises:
        ShapeError: with ``check``, a slot is outside the cache; nothing has been written.

    May be called from several threads at once, for different slots.
    """
    num_tokens, num_heads, head_dim = key.shape
    num_blocks, _, block_size, _ = k_cache.shape
    size = ITEMSIZES[k_cache.dtype]
    row_bytes = head_dim * size
    (k_block, k_head, k_slot, _), (v_block, v_head, v_slot, _) = k_cache.strides, v_cache.strides
    problem = np.array(
        (
            key.address, key.strides[0] * size, key.strides[1] * size,
            value.address, value.strides[0] * size, value.strides[1] * size,
            k_cache.address, k_block * size, k_head * size, k_slot * size,
            v_cache.address, v_block * size, v_head * size, v_slot * size,
            slot_mapping.address, num_tokens, num_heads, row_bytes, block_size, block_size * num_blocks,
        ),
        dtype=np.int64,
    )  # fmt: skip
    if check and (bad := first_bad_slot(problem)) >= 0:
        raise_finding(Finding.BAD_SLOT, bad, slot_mapping.owner[bad], block_size=block_size, num_blocks=num_blocks)
    _run(problem, num_tokens * num_heads * row_bytes)
    return problem


def append_prepared(prepared: Any, key: int, value: int, k_cache: int, v_cache: int, *, overlaps: bool = False) -> None:
    """Append once more where only the addresses of these four arrays differ, not their shapes, strides or dtypes.

    Args:
        prepared: what `append` returned for the same slots, which must still be alive.
        overlaps: ignored.
    """
    problem = prepared.copy()  # a thread that wakes up late may still read the problem before
    problem[KEY] = key
    problem[VALUE] = value
    problem[KEYS] = k_cache
    problem[VALUES] = v_cache
    _run(problem, int(problem[NUM_TOKENS] * problem[NUM_HEADS] * problem[ROW_BYTES]))


def _run(problem: Any, nbytes: int) -> None:
    helpers = min(threads.num_threads() - 1, 2 * nbytes // _BYTES_PER_THREAD)
    counters = np.zeros(2, np.uint64)
    if helpers > 0:
        threads.run(lambda: append_items(problem, counters, 0), helpers)
    append_items(problem, counters, 1)


@jit
def _copy_blocks(address: int, stride: int, nbytes: int, sources: Any, targets: Any) -> None:
    for i in range(len(sources)):
        if sources[i] != targets[i]:
            copy_bytes(address + targets[i] * stride, address + sources[i] * stride, nbytes)


def copy_granules(arenas: Any, src: ArrayLike, dst: ArrayLike) -> None:
    """Copy whole granules inside arenas: granule ``src[i]`` to ``dst[i]``, for every ``i``, one after the other.

    Args:
        arenas: one NumPy array ``[..., num_granules, num_kv_heads, 8, head_dim]`` of numbers of any dtype, or a
            sequence of them; writable, the last three axes contiguous. Every leading index (a layer, K or V) is copied.
        src: granules to read, integers in ``[0, num_granules)``.
        dst: granules to write, as many.

    Raises:
        ShapeError: an index is no integer or out of range, ``src`` and ``dst`` differ in length, or an arena is not as
            above; nothing was copied.
        UnsupportedError: an arena of objects, or one in which granules share memory.

    A granule may be read after an earlier copy has written it: order the moves accordingly. Thread-safe for disjoint
    granules.
    """
    sources, targets = _granules(src, "src"), _granules(dst, "dst")
    if len(sources) != len(targets):
        raise ShapeError(f"dst: expected as many granules as src, {len(sources)}, got {len(targets)}")
    if not len(sources):
        return
    lowest = min(sources.min(), targets.min())
    highest = max(sources.max(), targets.max())
    several = list(arenas) if isinstance(arenas, Sequence) else [arenas]
    for arena in several:
        _check_arena(arena, int(lowest), int(highest))
    for arena in several:
        nbytes = arena[(0,) * (arena.ndim - 3)].nbytes
        stride = arena.strides[-4]
        address = address_of(arena)
        for leading in np.ndindex(arena.shape[:-4]):
            start = address + sum(i * step for i, step in zip(leading, arena.strides, strict=False))
            _copy_blocks(start, stride, nbytes, sources, targets)


def _granules(listed: ArrayLike, name: str) -> Any:
    """``[n]`` int64, contiguous and writable, so that compiled code has one type to deal with."""
    try:
        found = as_numpy_view(listed, name) if is_torch(listed) else np.asarray(listed)
    except ValueError as error:
        raise ShapeError(f"{name}: expected integers, got no array: {error}") from error
    if found.size and found.dtype.kind not in "iu":
        raise ShapeError(f"{name}: expected integers, got {found.dtype}")
    return found.astype(np.int64).reshape(-1)


def _check_arena(arena: Any, lowest: int, highest: int) -> None:
    if not isinstance(arena, np.ndarray):
        raise ShapeError(f"arenas: expected NumPy arrays, got {type(arena).__name__}")
    if arena.dtype.hasobject:
        raise UnsupportedError(f"arenas: expected numbers, got {arena.dtype}, whose references a copy would not count")
    if arena.ndim < 4 or lowest < 0 or highest >= arena.shape[-4]:
        raise ShapeError(
            f"src, dst: expected granules of arenas [..., num_granules, num_kv_heads, 8, head_dim], "
            f"got {lowest} to {highest} for an arena of shape {arena.shape}"
        )
    inner = (arena.shape[-2] * arena.shape[-1] * arena.itemsize, arena.shape[-1] * arena.itemsize, arena.itemsize)
    if arena.strides[-3:] != inner:
        raise ShapeError(f"arenas: expected the last three axes contiguous, got strides {arena.strides}")
    if not arena.flags.writeable:
        raise ShapeError("arenas: expected writable arrays, got a read-only one")
    if extent(arena.shape, arena.strides).repeats:
        raise UnsupportedError(f"arenas: expected every element in a place of its own, got strides {arena.strides}")
