"""The work list of decode attention, made on the device once a step and shared by all layers."""

from typing import Any, NamedTuple

from kvtoolkit.cpu.arrays import Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.workspace import step_memory
from kvtoolkit.runtime.kernels import packer

_params = packer("4q7i4x")


class Plan(NamedTuple):
    """Where a plan lies, and the launch that makes it anew."""

    ranges: int
    """Address of ``[num_ranges + 1]`` int4."""
    sequences: int
    """Address of ``[batch]`` int2."""
    num_ranges: int
    launch: Launch
    memory: Any


def make_plan(
    seq_lens: Operand, cu_seqlens_q: Operand | None, num_ranges: int, left: int, right: int, head_dim: int,
    has_prefill: bool, stream: int,
) -> Plan:  # fmt: skip
    """Memory for a plan of these lengths and the launch that fills it; nothing is launched yet."""
    (batch,) = seq_lens.shape
    address, memory = step_memory(seq_lens.device, stream, 16 * (num_ranges + 1) + 8 * batch)
    sequences = address + 16 * (num_ranges + 1)
    overhead = 16 if head_dim <= 64 else 12  # in steps of 16 tokens: what a sequence costs to begin and to end
    parameters = _params.pack(
        seq_lens.address, cu_seqlens_q.address if cu_seqlens_q else 0, address, sequences, batch, num_ranges, left,
        right, overhead, 8, int(has_prefill),
    )  # fmt: skip
    spec = specs.plan(batch)
    ctas = min(4, -(-batch // spec.threads))
    launch = Launch(load_spec(spec, seq_lens.device), (ctas,), spec.threads, spec.smem_nbytes, parameters)
    return Plan(address, sequences, num_ranges, launch, memory)
