"""What the queries of a tiered batch see, as lists of units of about equal bytes: made on the device once a step."""

from typing import NamedTuple

from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.runtime.structs import ParameterStruct

_params = ParameterStruct("attention/units.cu", "kvt_units")


class Units(NamedTuple):
    """Lists of units, and the launch that makes them anew."""

    address: int
    """Of ``[batch, max_units]`` int4."""
    counts: int
    """Address of ``[batch]`` int32."""
    plan_lens: Operand
    """``[batch]`` int32: the tokens of 16 bits that would cost as much."""
    tile_units: int
    """Address of ``[batch, max_units / 4 + 1]`` int32: the first unit of each tile."""
    max_units: int
    table: Operand
    """``[batch, width]`` int32: the list of granules that the units are made from."""
    launch: Launch


def max_units(width: int) -> int:
    """Units of a row of ``width`` granules: all of them hot."""
    return 4 * -(-width // 8)


def units_nbytes(batch: int, width: int) -> int:
    """Memory that the lists take, and the list of granules that they are made from."""
    return batch * (17 * max_units(width) + 4 * width + 12)


def make_units(
    address: int, block_table: Operand, block_starts: Operand, seq_lens: Operand, cu_seqlens_q: Operand | None,
    width: int, left: int, right: int, first_granules: tuple[int, int, int],
) -> Units:  # fmt: skip
    """The launch that fills `units_nbytes` at an address, a multiple of 16; nothing is launched yet."""
    batch, max_entries = block_table.shape
    most = max_units(width)
    counts = address + 16 * batch * most
    plan_lens, granules = counts + 4 * batch, counts + 8 * batch
    tile_units = granules + 4 * batch * width
    parameters = _params.pack(
        block_table.address, block_starts.address, seq_lens.address, cu_seqlens_q.address if cu_seqlens_q else 0,
        granules, address, counts, plan_lens, tile_units, block_table.strides[0], block_starts.strides[0],
        max_entries, width, most, left, right, *first_granules,
    )  # fmt: skip
    launch = Launch(load_spec(specs.UNITS, block_table.device), (batch,), specs.UNITS.threads, 0, parameters)
    lens = Operand(plan_lens, (batch,), (1,), "int32", None, True, block_table.device)
    table = Operand(granules, (batch, width), (width, 1), "int32", None, True, block_table.device)
    return Units(address, counts, lens, tile_units, most, table, launch)
