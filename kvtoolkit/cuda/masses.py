"""Memory for what the attention kernels note of every unit, from which they tell what share each tile got."""

from typing import NamedTuple


class Notes(NamedTuple):
    """What the kernels write there, as ``kvt/attention/decode/masses.cuh`` has it."""

    lse: int
    """Address of ``[num_tokens, num_q_heads]`` float32."""
    unit_lse: int
    """Address of ``[batch, num_kv_heads, slots, rows]`` float32, a multiple of 16."""
    rows: int
    """Query rows of a kv head, rounded up to a multiple of 4."""


class NotesShape(NamedTuple):
    """The shape of `Notes`."""

    batch: int
    num_kv_heads: int
    slots: int
    rows: int

    @property
    def size(self) -> int:
        """Of the array: float32."""
        return self.batch * self.num_kv_heads * self.slots * self.rows


def notes_shape(batch: int, num_kv_heads: int, max_tiles: int, stride: int, rows: int) -> NotesShape:
    """Where a warp takes every ``stride``-th unit and a kv head has up to ``rows`` query rows."""
    return NotesShape(batch, num_kv_heads, -(-max_tiles // stride) * stride * 4, -(-rows // 4) * 4)


def notes_nbytes(shape: NotesShape, lse_size: int) -> int:
    """Memory of `Notes`."""
    return 4 * (shape.size + lse_size)


def place_notes(address: int, shape: NotesShape, lse: int) -> Notes:
    """Notes at an address, a multiple of 16; with the caller's ``lse`` where it wants one, else 0."""
    return Notes(lse or address + 4 * shape.size, address, shape.rows)
