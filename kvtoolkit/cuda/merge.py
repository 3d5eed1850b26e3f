"""Launch the kernel that merges attention states, on device arrays that are known to be right."""

from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.runtime.structs import ParameterStruct

_params = ParameterStruct("attention/merge_states.cu", "kvt_merge_states")


def merge_states(
    out: Operand, lse: Operand, out_a: Operand, lse_a: Operand, out_b: Operand, lse_b: Operand, *, stream: int = 0
) -> None:
    """Merge into contiguous ``out`` and ``lse``, asynchronously on ``stream``."""
    num_tokens, num_heads, head_dim = out_a.shape
    num_rows = num_tokens * num_heads
    if num_rows == 0:
        return
    parameters = _params.pack(
        out.address, lse.address, out_a.address, lse_a.address, out_b.address, lse_b.address,
        *out_a.strides[:2], *out_b.strides[:2], num_rows, num_heads, head_dim // 2,
    )  # fmt: skip
    spec = specs.merge_states(out_a.dtype)
    grid = (-(-num_rows * (head_dim // 2) // spec.threads),)
    Launch(load_spec(spec, out_a.device), grid, spec.threads, 0, parameters).run(stream)
