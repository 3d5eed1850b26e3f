"""Merge two attention results over disjoint keys, as a Numba kernel: the twin of the CUDA kernel `merge_states`.

    out_a        [num_tokens, num_q_heads, head_dim]    uint16 words of float16 or bfloat16; also out_b, out
    lse_a        [num_tokens, num_q_heads] float32,     natural log, -inf = no keys, out_a is not read; also lse_b, lse

Launch:   grid (num_tokens, num_q_heads), any number of threads. out and lse may be those of a side.
Numerics: in float32; two empty sides give 0 and -inf.
Source:   FlashInfer, Ye et al. 2025 (arXiv:2501.01005), sec. 2.2 (attention states and their composition).
"""

import math
from typing import Any

from kvtoolkit.numba.device import NEG_INF, cuda, float32, kernel, narrow, widen


@kernel
def merge_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any, lse: Any, is_bfloat16: bool) -> None:
    token, head = cuda.blockIdx.x, cuda.blockIdx.y
    a, b = lse_a[token, head], lse_b[token, head]
    weight_a = float32(0.0)
    weight_b = float32(0.0)
    merged = NEG_INF
    if a != NEG_INF or b != NEG_INF:  # -inf - -inf is NaN
        row_max = max(a, b)
        weight_a = math.exp(a - row_max)
        weight_b = math.exp(b - row_max)
        total = weight_a + weight_b
        weight_a /= total
        weight_b /= total
        merged = row_max + math.log(total)

    for d in range(cuda.threadIdx.x, out.shape[2], cuda.blockDim.x):
        element = float32(0.0)
        # an empty side may hold anything, and 0 * NaN is NaN
        if a != NEG_INF:
            element += weight_a * widen(out_a[token, head, d], is_bfloat16)
        if b != NEG_INF:
            element += weight_b * widen(out_b[token, head, d], is_bfloat16)
        out[token, head, d] = narrow(element, is_bfloat16)
    cuda.syncthreads()  # lse may be lse_a, which every thread has read by now
    if cuda.threadIdx.x == 0:
        lse[token, head] = merged
