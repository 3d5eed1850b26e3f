"""Memory for the log-sum-exp of every unit, from which the attention kernels compute the share of each tile."""

from typing import NamedTuple


class UnitLse(NamedTuple):
    """What the kernels write for it, as ``kvt/attention/decode/masses.cuh`` has it."""

    lse: int
    """Address of ``[num_tokens, num_q_heads]`` float32."""
    unit_lse: int
    """Address of ``[batch, num_kv_heads, slots, rows]`` float32, a multiple of 16; 0 = no masses are wanted."""
    rows: int
    """Query rows of a kv head, rounded up to a multiple of 4."""


class UnitLseShape(NamedTuple):
    """The shape of `UnitLse.unit_lse`."""

    batch: int
    num_kv_heads: int
    slots: int
    rows: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.batch * self.num_kv_heads * self.slots * self.rows


def unit_lse_shape(batch: int, num_kv_heads: int, max_tiles: int, stride: int, rows: int) -> UnitLseShape:
    """The shape where a warp takes every ``stride``-th unit and a kv head has up to ``rows`` query rows."""
    return UnitLseShape(batch, num_kv_heads, -(-max_tiles // stride) * stride * 4, -(-rows // 4) * 4)


def unit_lse_nbytes(shape: UnitLseShape, lse_size: int) -> int:
    """Memory for a `UnitLse` of that shape, with an ``lse`` of ``lse_size`` elements."""
    return 4 * (shape.size + lse_size)


def place_unit_lse(address: int, shape: UnitLseShape, lse: int) -> UnitLse:
    """A `UnitLse` at an address, a multiple of 16; ``lse`` is the caller's, 0 = the caller wants none."""
    return UnitLse(lse or address + 4 * shape.size, address, shape.rows)
