"""The work list of decode attention, made on the device once a step and shared by all layers."""

from typing import NamedTuple

from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.runtime.structs import ParameterStruct

MAX_RANGES = 1024  # as in plan.cu

_params = ParameterStruct("attention/plan.cu", "kvt_plan")

# in steps of 16 tokens, all by measurement
_OVERHEAD = 12  # what a sequence costs to begin and to end
_MIN_STEPS = 8  # of a sequence that is cut, on either side
_MIN_COST = 12  # of a range
_MIN_LATE = 12
_RAGGED = 125  # a batch is ragged if its longest sequence has more steps than this percentage of the mean cost
_LONG = 350  # from this cost of a range on, an idle SM costs more than cuts


class Plan(NamedTuple):
    """The place of a plan, and the launch that makes it anew."""

    ranges: int
    """Address of ``[num_ranges + 1]`` int4."""
    sequences: int
    """Address of ``[batch]`` int2."""
    launch: Launch


def plan_nbytes(batch: int, num_ranges: int) -> int:
    """Memory that a plan takes."""
    return 16 * (num_ranges + 1) + 8 * batch


def most_late(batch: int, longest: int) -> int:
    """The number of late ranges that can pay if no sequence has more than ``longest`` tokens."""
    return min(MAX_RANGES // 2, batch * (-(-longest // 16) + _OVERHEAD) // (8 * _MIN_LATE))


def make_plan(
    address: int, seq_lens: Operand, cu_seqlens_q: Operand | None, num_ranges: int, num_late: int, num_even: int,
    only_ragged: bool, left: int, right: int, most_queries: int, all_or_none: bool,
) -> Plan:  # fmt: skip
    """The launch that fills `plan_nbytes` at an address, a multiple of 16, with a plan; nothing is launched yet.

    Args:
        only_ragged: leave the late ranges empty where no sequence is much longer than the others.
        most_queries: rows with more query tokens are another kernel's.
        all_or_none: if there is such a row, so are all others, and all ranges are empty.
    """
    (batch,) = seq_lens.shape
    sequences = address + 16 * (num_ranges + 1)
    parameters = _params.pack(
        seq_lens.address, cu_seqlens_q.address if cu_seqlens_q else 0, address, sequences, batch, num_ranges, num_late,
        num_even, _LONG, left, right, _OVERHEAD, _MIN_STEPS, _MIN_COST, _MIN_LATE,
        _RAGGED if only_ragged else 0, most_queries, int(all_or_none),
    )  # fmt: skip
    spec = specs.plan(batch)
    ctas = min(4, -(-batch // spec.threads))
    kernel = load_spec(spec._replace(smem_nbytes=0), seq_lens.device)
    return Plan(address, sequences, Launch(kernel, (ctas,), spec.threads, spec.smem_nbytes, parameters))
