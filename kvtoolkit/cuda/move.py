"""Move granules inside an arena on a device: forks, merges, compaction."""

import numpy as np
from numpy.typing import ArrayLike

from kvtoolkit.cpu.arrays import ITEMSIZES, Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.errors import ShapeError
from kvtoolkit.runtime.kernels import num_sms, packer

MAX_MOVES = 448  # as in move.cu
_head = packer("3q2i")
_UNROLL = 4


def copy_granules(arena: Operand, src: ArrayLike, dst: ArrayLike, *, stream: int = 0) -> None:
    """Copy granule ``src[i]`` to ``dst[i]`` of every array of an arena, asynchronously on ``stream``.

    Args:
        arena: ``[num_arrays, num_granules, num_kv_heads, 8, head_dim]`` of any dtype, the last three axes contiguous.
        src: granules to read, integers on the host in ``[0, num_granules)``; ``dst`` alike, to write. No granule is
            in both, and none stands twice in ``dst``: the copies happen in any order.

    Raises:
        ShapeError: an index is out of range, the lists differ in length, or a granule is both read and written.
    """
    sources, targets = (np.ascontiguousarray(one, np.int32).reshape(-1) for one in (src, dst))
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
    size = ITEMSIZES[arena.dtype]
    vectors = arena.shape[2] * arena.shape[3] * arena.shape[4] * size // 16
    kernel = load_spec(specs.MOVE, arena.device)
    for first in range(0, len(sources), MAX_MOVES):
        some = slice(first, first + MAX_MOVES)
        count = len(sources[some])
        listed = np.zeros((2, MAX_MOVES), np.int32)
        listed[0, :count], listed[1, :count] = sources[some], targets[some]
        parameters = _head.pack(arena.address, arena.strides[0] * size, arena.strides[1] * size, vectors, count)
        ctas = min(-(-count * vectors // (256 * _UNROLL)), max(1, 16 * num_sms(arena.device) // num_arrays))
        Launch(kernel, (ctas, num_arrays), specs.MOVE.threads, 0, parameters + listed.tobytes()).run(stream)
