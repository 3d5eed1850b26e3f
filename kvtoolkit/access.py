"""What the layers of a step do with the cache: check what the caller brings, then run the kernels.

The arrays of the cache itself and those of the step cannot be wrong; they are described once and checked never.
"""

import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtoolkit import cpu
from kvtoolkit.checks import check_backend, check_heads, check_options, check_output, check_per_head, check_rows
from kvtoolkit.cpu.arrays import Operand, is_on_device, is_torch, operand
from kvtoolkit.errors import ShapeError


class Arenas:
    """The keys and values of every layer as the kernels want them.

    Args:
        key_values: ``[num_layers, 2, num_granules, num_kv_heads, 8, head_dim]``.
        dtype: ``float32``, ``float16`` or ``bfloat16``, the latter stored as uint16.
    """

    def __init__(self, key_values: NDArray[Any], dtype: str) -> None:
        self.keys = [operand(layer[0], "k_cache", dtype) for layer in key_values]
        self.values = [operand(layer[1], "v_cache", dtype) for layer in key_values]
        self.dtype = dtype
        self.num_kv_heads = key_values.shape[3]
        self.head_dim = key_values.shape[5]
        self._raw = "bfloat16" if dtype == "bfloat16" else None

    def describe(self, array: Any, name: str) -> Operand:
        """An array of the caller; in a bfloat16 cache 16-bit integers are the bits of bfloat16."""
        return operand(array, name, self._raw)


class StepOperands(NamedTuple):
    """The arrays of one step, described once for all layers."""

    block_table: Operand
    block_starts: Operand
    seq_lens: Operand
    cu_seqlens_q: Operand
    slot_mapping: Operand


def append(arenas: Arenas, layer: int, key: Any, value: Any, step: StepOperands) -> None:
    """Check a layer's new keys and values, and store them."""
    keys, values = arenas.describe(key, "key"), arenas.describe(value, "value")
    expected = (step.slot_mapping.shape[0], arenas.num_kv_heads, arenas.head_dim)
    for new, name in ((keys, "key"), (values, "value")):
        if new.shape != expected or new.dtype != arenas.dtype:
            raise ShapeError(
                f"{name}: expected [num_tokens, num_kv_heads, head_dim] = {expected} {arenas.dtype}, "
                f"got {new.shape} {new.dtype}"
            )
        check_rows(new, name, "[num_tokens, num_kv_heads, head_dim]", 3)
    cpu.append(keys, values, arenas.keys[layer], arenas.values[layer], step.slot_mapping)


def attend(
    arenas: Arenas,
    layer: int,
    q: Any,
    step: StepOperands,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Any = None,
    alibi_slopes: Any = None,
    out: Any = None,
    return_lse: bool = False,
    num_splits: int = 0,
    backend: str | None = None,
) -> Any:
    """Check a layer's queries and the options, and attend; see `kvtoolkit.variable_block_attention`."""
    check_backend(backend, is_on_device(q))
    window = check_options(softmax_scale, window_size, softcap, num_splits)
    queries = arenas.describe(q, "q")
    num_tokens = step.slot_mapping.shape[0]
    shape = queries.shape
    if len(shape) != 3 or shape[0] != num_tokens or shape[2] != arenas.head_dim or queries.dtype != arenas.dtype:
        raise ShapeError(
            f"q: expected [num_tokens, num_q_heads, head_dim] = ({num_tokens}, num_q_heads, {arenas.head_dim}) "
            f"{arenas.dtype}, got {shape} {queries.dtype}"
        )
    check_rows(queries, "q", "[num_tokens, num_q_heads, head_dim]", 3)
    num_q_heads = shape[1]
    check_heads(num_q_heads, arenas.num_kv_heads, arenas.head_dim)
    if sinks is not None:
        sinks = operand(sinks, "sinks")
        check_per_head(sinks, "sinks", num_q_heads, infinite=True)
    if alibi_slopes is not None:
        alibi_slopes = operand(alibi_slopes, "alibi_slopes")
        check_per_head(alibi_slopes, "alibi_slopes", num_q_heads, infinite=False)
    if out is None:
        out = _empty(q, queries, shape)
        target = arenas.describe(out, "out")
    else:
        target = arenas.describe(out, "out")
        check_output(target, "out", shape, arenas.dtype)
    lse = _empty(q, queries, shape[:2], "float32") if return_lse else None
    cpu.attend(
        queries, arenas.keys[layer], arenas.values[layer], step.block_table, step.block_starts, step.seq_lens,
        out=target, lse=lse, cu_seqlens_q=step.cu_seqlens_q, softmax_scale=softmax_scale, causal=causal,
        window_size=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, num_splits=num_splits,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _empty(array: Any, described: Operand, shape: tuple[int, ...], dtype: str | None = None) -> Any:
    """A new array or tensor, whichever ``array`` is, of its dtype or of ``dtype``."""
    if is_torch(array):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype) if dtype else array.dtype)
    return np.empty(shape, dtype or (array.dtype if isinstance(array, np.ndarray) else described.owner.dtype))
