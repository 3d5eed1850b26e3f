"""The launch that checks what the slots of rows hold, and notes what is stored now: ``KVTOOLKIT_CHECK=canary``."""

from kvtoolkit.arrays.host import Operand
from kvtoolkit.arrays.types import ITEMSIZES
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.runtime.structs import ParameterStruct

_params = ParameterStruct("cache/canary.cu", "kvt_canary")


def check_rows(
    keys: Operand, records: Operand, block_table: Operand, block_starts: Operand, seq_lens: Operand,
    cu_seqlens_q: Operand | None, tokens: int, report: int, *, stream: int,
) -> None:  # fmt: skip
    """Check the rows of a batch and note their new tokens, asynchronously on ``stream``.

    Args:
        keys: ``[num_granules, num_kv_heads, 8, head_dim]`` of the first layer; ``records`` of the same form.
        tokens: address of ``[num_tokens]`` int64; 0 = not known.
        report: address of ``[6]`` uint32.
    """
    size, (batch, max_entries) = ITEMSIZES[keys.dtype], block_table.shape
    if not batch:
        return
    parameters = _params.pack(
        keys.address, records.address, block_table.address, block_starts.address, seq_lens.address,
        0 if cu_seqlens_q is None else cu_seqlens_q.address, tokens, report, keys.strides[0] * size,
        keys.strides[2] * size, block_table.strides[0], block_starts.strides[0], max_entries,
    )  # fmt: skip
    Launch(load_spec(specs.CANARY, keys.device), (batch,), specs.CANARY.threads, 0, parameters).run(stream)
