"""Entries of several lengths as a list of granules, made on the device once a step and shared by all layers."""

from typing import Any, NamedTuple

from kvtoolkit.cpu.arrays import Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.workspace import step_memory
from kvtoolkit.runtime.kernels import packer

_params = packer("6q2i")


class Granules(NamedTuple):
    """A list of granules, the launch that makes it anew, and the memory it lies in."""

    table: Operand
    """``[batch, width]`` int32: the granule at each logical granule of a row."""
    launch: Launch
    memory: Any


def make_granules(
    block_table: Operand, block_starts: Operand, seq_lens: Operand, max_seq_len: int | None, stream: int
) -> Granules:
    """Memory for the list and the launch that fills it; nothing is launched yet.

    Args:
        max_seq_len: tokens of the longest sequence, where the host knows; else what the table could hold.
    """
    batch, max_entries = block_table.shape
    width = 8 * max_entries if max_seq_len is None else -(-max(max_seq_len, 1) // 8)
    address, memory = step_memory(block_table.device, stream, 4 * batch * width)
    parameters = _params.pack(
        block_table.address, block_starts.address, seq_lens.address, address, block_table.strides[0],
        block_starts.strides[0], max_entries, width,
    )  # fmt: skip
    ctas = -(-min(max_entries, width) // specs.EXPAND.threads)
    launch = Launch(load_spec(specs.EXPAND, block_table.device), (batch, ctas), specs.EXPAND.threads, 0, parameters)
    return Granules(
        Operand(address, (batch, width), (width, 1), "int32", memory, True, block_table.device), launch, memory
    )
