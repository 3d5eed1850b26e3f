"""Entries of several lengths as a list of granules, made on the device once a step and shared by all layers."""

from typing import NamedTuple

from kvtoolkit.arrays.call import QuantizedTiers
from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.runtime.structs import ParameterStruct

_params = ParameterStruct("attention/expand.cu", "kvt_expand")


class Granules(NamedTuple):
    """A list of granules, and the launch that makes it anew."""

    table: Operand
    """``[batch, width]`` int32: the granule at each logical granule of a row, in its tier, | tier << 27."""
    launch: Launch


def list_width(max_entries: int, max_seq_len: int | None) -> int:
    """Granules of a row: of the longest sequence, where the host knows, else what the table could hold."""
    return max(1, 8 * max_entries if max_seq_len is None else -(-max_seq_len // 8))


def longest_row(block_table: Operand, block_starts: Operand | None, block_size: int, max_seq_len: int | None) -> int:
    """Tokens of a row at most: what its blocks hold, or what the host knows.

    Entries of layers with a window begin anywhere in a row, so for them the number of entries says nothing.
    """
    _, max_entries = block_table.shape
    if block_starts is not None:
        return 8 * list_width(max_entries, max_seq_len)
    return min(max_entries * block_size, max_seq_len or max_entries * block_size)


def make_granules(
    address: int, block_table: Operand, block_starts: Operand, seq_lens: Operand, width: int,
    tiers: QuantizedTiers | None = None,
) -> Granules:  # fmt: skip
    """The launch that fills ``4 * batch * width`` bytes at an address with the list; nothing is launched yet.

    Args:
        tiers: those that entries may be in besides the hot one; None = all entries are hot.
    """
    first_granules = (0, 0, 0) if tiers is None else tiers.first_granules
    batch, max_entries = block_table.shape
    parameters = _params.pack(
        block_table.address, block_starts.address, seq_lens.address, address, block_table.strides[0],
        block_starts.strides[0], max_entries, width, *first_granules,
    )  # fmt: skip
    ctas = max(1, -(-min(max_entries, width) // specs.EXPAND.threads))
    launch = Launch(load_spec(specs.EXPAND, block_table.device), (batch, ctas), specs.EXPAND.threads, 0, parameters)
    return Granules(Operand(address, (batch, width), (width, 1), "int32", None, True, block_table.device), launch)
