"""The attention that each tile got, from what the attention kernels note of every 16 positions or unit."""

from typing import NamedTuple

from kvtoolkit.cpu.arrays import Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.units import Units
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime.kernels import packer

_params = packer("7q9i")
_MASSES = 6  # word of MassParams
MAX_ROWS = 1024  # as in masses.cu


class Notes(NamedTuple):
    """What an attention kernel writes for `make_masses`."""

    lse: int
    """Address of ``[num_tokens, num_q_heads]`` float32."""
    unit_lse: int
    """Address of ``[batch, num_kv_heads, slots, rows]`` float32, a multiple of 16."""
    slots: int
    """One for every step of 16 tokens, and some more, since a warp's go together."""
    rows: int


def num_slots(num_tiles: int, stride: int) -> int:
    """Slots for so many tiles where a warp takes every ``stride``-th step."""
    return -(-4 * num_tiles // (4 * stride)) * 4 * stride


def notes_nbytes(batch: int, num_kv_heads: int, slots: int, rows: int, lse_size: int) -> int:
    """Memory of `Notes`."""
    return 4 * (batch * num_kv_heads * slots * rows + lse_size)


def place_notes(address: int, batch: int, num_kv_heads: int, slots: int, rows: int, lse: Operand | None) -> Notes:
    """Notes at an address, a multiple of 16; with the caller's ``lse`` where it wants one."""
    if rows > MAX_ROWS:
        raise UnsupportedError(
            f"block_mass: expected at most {MAX_ROWS} query rows of a kv head (new tokens times heads of its group), "
            f"got {rows}"
        )
    behind = address + 4 * batch * num_kv_heads * slots * rows
    return Notes(behind if lse is None else lse.address, address, slots, rows)


def make_masses(
    notes: Notes, block_mass: Operand, seq_lens: Operand, cu_seqlens_q: Operand | None, units: Units | None,
    group_size: int, left: int, right: int, stride: int,
) -> Launch:  # fmt: skip
    """The launch that fills ``block_mass`` ``[batch, max_tiles, num_kv_heads]``; nothing is launched yet."""
    batch, max_tiles, num_kv_heads = block_mass.shape
    parameters = _params.pack(
        notes.unit_lse, notes.lse, cu_seqlens_q.address if cu_seqlens_q else 0, seq_lens.address,
        units.address if units else 0, units.counts if units else 0, block_mass.address,
        num_kv_heads, group_size, units.max_units if units else 0, notes.slots, notes.rows, max_tiles, left, right,
        stride,
    )  # fmt: skip
    kernel = load_spec(specs.MASSES, block_mass.device)
    ctas = max(1, -(-notes.slots // (4 * specs.MASSES.threads)))  # with a quarter of the units, one round
    return Launch(kernel, (batch, num_kv_heads, ctas), specs.MASSES.threads, 0, parameters)


def set_masses(launch: Launch, block_mass: int) -> None:
    """Let the launch fill another array of the same shape."""
    launch.set_addresses(_MASSES, block_mass)
