"""Write new tokens into a paged cache and copy granules inside it, as Numba kernels: twins of the CUDA kernels.

    key          [num_tokens, num_kv_heads, head_dim]                any dtype, not converted; value the same
    k_cache      [num_blocks, num_kv_heads, block_size, head_dim]    any strides, NHD is transposed; v_cache the same
    slot_mapping [num_tokens] int64, block * block_size + i;         -1 = skip; no slot twice

    arena        [n, num_granules, granule_elements]                 any dtype; n counts layers, K and V apart
    src          [num_moves] int32, granules to read;                dst those to write; no granule in both

Launch: grid (num_tokens) and (num_moves, n), any number of threads.
"""

from typing import Any

from kvtoolkit.numba.device import cuda, kernel


@kernel
def append(key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any) -> None:
    """One CTA copies one token, all its heads."""
    token = cuda.blockIdx.x
    num_kv_heads, head_dim = key.shape[1], key.shape[2]
    block_size = k_cache.shape[2]
    if slot_mapping[token] < 0:
        return
    block, slot = slot_mapping[token] // block_size, slot_mapping[token] % block_size
    for i in range(cuda.threadIdx.x, num_kv_heads * head_dim, cuda.blockDim.x):
        head, d = i // head_dim, i % head_dim
        k_cache[block, head, slot, d] = key[token, head, d]
        v_cache[block, head, slot, d] = value[token, head, d]


@kernel
def copy_granules(arena: Any, src: Any, dst: Any) -> None:
    """One CTA copies one granule of one layer; the moves run side by side."""
    move, layer = cuda.blockIdx.x, cuda.blockIdx.y
    for i in range(cuda.threadIdx.x, arena.shape[2], cuda.blockDim.x):
        arena[layer, dst[move], i] = arena[layer, src[move], i]
