"""The launches that let rows go on from what other rows hold, in steps of the device."""

from collections.abc import Sequence

from kvtoolkit.arrays.host import Operand
from kvtoolkit.arrays.types import ITEMSIZES
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.grow import MAX_GROUPS
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.runtime.structs import ParameterStruct

MAX_BEAMS = 16

_params = ParameterStruct("cache/reorder.cu", "kvt_reorder")
_copy_params = ParameterStruct("cache/reorder.cu", "kvt_reorder_copy")
_CTAS = 1056  # of all arrays, at most about eight times the SMs of a GPU


def make_reorder(
    rows: Sequence[int], groups: Sequence[Sequence[int]], widths: Sequence[int], batch: int, most_own: int,
    max_steps: int, beams: int, device: int,
) -> Launch:  # fmt: skip
    """The launch that changes the rows; nothing is launched yet.

    Args:
        rows: addresses from ``parents`` to ``history``; see ``ReorderParams``.
        groups: of each group of layers the addresses from ``block_table`` to ``own``.
        widths: entries of a row in each group.
        batch: rows, a multiple of ``beams``.
        most_own: granules that a row gets in a turn.
        max_steps: tokens of a row in the history.
        device: the current one.
    """
    spare = [0] * (MAX_GROUPS - len(groups))
    by_group = [value for column in zip(*groups, strict=True) for value in (*column, *spare)]
    parameters = _params.pack(*rows, *by_group, *widths, *spare, batch, len(groups), most_own, max_steps)
    spec = specs.reorder(beams)
    return Launch(load_spec(spec, device), (1,), min(1024, max(128, -(-batch // 32) * 32)), 0, parameters)


def make_reorder_copy(
    arena: Operand, sources: int, own: int, lengths: int, num_new: int, batch: int, most_own: int, beams: int
) -> Launch:
    """The launch that copies the keys and values that rows have got since the host's turn, of a group of layers.

    Args:
        arena: as `kvtoolkit.cuda.copy.copy_granules` takes it.
        sources, own, lengths, num_new: addresses; see ``ReorderCopyParams``.
        batch, most_own, beams: as for `make_reorder`.
    """
    size = ITEMSIZES[arena.dtype]
    vectors = arena.shape[2] * arena.shape[3] * arena.shape[4] * size // 16
    parameters = _copy_params.pack(
        arena.address, arena.strides[0] * size, arena.strides[1] * size, sources, own, lengths, num_new, vectors, batch,
        most_own,
    )  # fmt: skip
    spec, num_arrays = specs.reorder(beams)._replace(name="kvt_reorder_copy", threads=256), arena.shape[0]
    ctas = min(-(-batch // beams * most_own * vectors // 256), max(1, _CTAS // num_arrays))
    return Launch(load_spec(spec, arena.device), (max(1, ctas), num_arrays), 256, 0, parameters)
