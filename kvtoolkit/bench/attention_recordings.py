"""Recordings of attention: the mass of each tile (64 tokens) in a row of decode steps, without the weights of tokens.

Teacher forcing: a text goes through a model in one forward, so the query at position ``p`` is that of the decode step
that fed token ``p``. Queries are kept for the steps of the recording alone, and of the keys only the bounds of each
tile are kept.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.formats.quantized import BLOCK as TILE

Float32Array = NDArray[np.float32]

PINNED_TOKENS, HOT_TOKENS = 64, 256
"""What is always read at the beginning and at the end of a sequence, as a `TierConfig` keeps it by default."""
_CHUNK = 64  # queries whose weights are in memory at a time


@dataclass(frozen=True)
class Recording:
    """Attention of ``num_steps`` decode steps in a row, of one sequence."""

    name: str
    first_position: int
    """Of the first step's token; the step reads ``first_position + 1`` tokens."""
    mass: Float32Array
    """``[num_steps, num_layers, num_kv_heads, num_tiles]``: share of the attention on each tile, the mean over the
    group's query heads. Sums to 1 over the tiles."""
    query: Float32Array
    """``[num_steps, num_layers, num_kv_heads, group_size, head_dim]``, after RoPE."""
    key_low: Float32Array
    """``[num_layers, num_kv_heads, num_tiles, head_dim]``: least value of each channel of a tile's keys after RoPE;
    ``key_high`` has the greatest. Only those of full tiles say anything."""
    key_high: Float32Array
    softmax_scale: float
    num_prompt_tiles: int
    """Tiles at the beginning that count as the prompt."""
    remarks: str = ""
    """What else there is to say about it."""
    wanted: NDArray[np.int64] | None = None
    """``[num_steps]``: the tile that holds what the step has to say next; -1 in a step that has nothing to look up."""

    @property
    def num_steps(self) -> int:
        return len(self.mass)

    def candidates(self, step: int) -> slice:
        """The tiles that a step may leave out: the full ones between the pinned tokens and the hot window."""
        seq_len = self.first_position + step + 1
        return slice(PINNED_TOKENS // TILE, max(PINNED_TOKENS, seq_len - HOT_TOKENS) // TILE)


def tile_masses(query: Float32Array, key: Float32Array, first_position: int, softmax_scale: float) -> Float32Array:
    """Causal attention mass of each tile.

    Args:
        query: ``[num_kv_heads, group_size, num_steps, head_dim]`` of consecutive positions.
        key: ``[num_kv_heads, num_tokens, head_dim]`` of all positions from 0 on.
        first_position: that of the first query.
        softmax_scale: factor on q·k.

    Returns:
        ``[num_steps, num_kv_heads, ceil(num_tokens / 64)]`` float32, the mean over the group.
    """
    num_kv_heads, _, num_steps, _ = query.shape
    num_tokens = key.shape[1]
    num_tiles = -(-num_tokens // TILE)
    masses = np.zeros((num_steps, num_kv_heads, num_tiles), np.float32)
    transposed = np.ascontiguousarray(key.swapaxes(1, 2))[:, None]
    edges = np.arange(0, num_tokens, TILE)
    for begin in range(0, num_steps, _CHUNK):
        some = query[:, :, begin : begin + _CHUNK]
        scores = (some * np.float32(softmax_scale)) @ transposed
        positions = first_position + begin + np.arange(some.shape[2])
        scores[..., np.arange(num_tokens) > positions[:, None]] = -np.inf
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        of_tiles = np.add.reduceat(scores, edges, axis=-1).mean(1)
        masses[begin : begin + _CHUNK] = of_tiles.transpose(1, 0, 2)
    return masses


def tile_bounds(key: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Least and greatest value of each channel in each tile, ``[num_kv_heads, num_tiles, head_dim]`` each.

    Args:
        key: ``[num_kv_heads, num_tokens, head_dim]``.
    """
    edges = np.arange(0, key.shape[1], TILE)
    return np.minimum.reduceat(key, edges, axis=1), np.maximum.reduceat(key, edges, axis=1)


def record_arrays(
    name: str, query: Float32Array, key: Float32Array, *, num_prompt_tiles: int, remarks: str = ""
) -> Recording:
    """A recording from queries of the last positions and all keys.

    Args:
        query: ``[num_layers, num_kv_heads, group_size, num_steps, head_dim]`` float32, after RoPE.
        key: ``[num_layers, num_kv_heads, num_tokens, head_dim]`` float32, after RoPE.
        name, num_prompt_tiles, remarks: as in `Recording`.
    """
    num_steps, head_dim = query.shape[-2:]
    first, scale = key.shape[2] - num_steps, head_dim**-0.5
    masses = [tile_masses(q, k, first, scale) for q, k in zip(query, key, strict=True)]
    bounds = [tile_bounds(k) for k in key]
    return Recording(
        name=name, first_position=first, mass=np.stack(masses, 1),
        query=np.ascontiguousarray(query.transpose(3, 0, 1, 2, 4)),
        key_low=np.stack([low for low, _ in bounds]), key_high=np.stack([high for _, high in bounds]),
        softmax_scale=scale, num_prompt_tiles=num_prompt_tiles, remarks=remarks,
    )  # fmt: skip


def record_model(
    model: Any, ids: list[int], num_steps: int, name: str, *, num_prompt_tiles: int
) -> tuple[Recording, NDArray[np.int64]]:
    """Record a Llama-like model of transformers that reads ``ids``, in its last ``num_steps`` positions.

    Args:
        model: a ``LlamaForCausalLM`` in float32 on the CPU, whatever its attention implementation.
        ids: the tokens, at least ``num_steps``.
        name, num_prompt_tiles: as in `Recording`.

    Returns:
        The recording, and ``[num_steps]`` the likeliest next token at each of its positions.
    """
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    recordings: list[Recording] = []

    def listen(module: Any, _: Any, given: dict[str, Any]) -> None:
        hidden = given["hidden_states"]
        query, key = (
            projected(hidden).view(1, len(ids), -1, module.head_dim).transpose(1, 2)
            for projected in (module.q_proj, module.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *given["position_embeddings"])
        query, key = query[0, :, -num_steps:].numpy(), key[0].numpy()
        grouped = query.reshape(len(key), -1, num_steps, module.head_dim)
        recordings.append(record_arrays(name, grouped[None], key[None], num_prompt_tiles=num_prompt_tiles))

    layers = model.model.layers
    hooks = [layer.self_attn.register_forward_pre_hook(listen, with_kwargs=True) for layer in layers]
    try:
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), use_cache=False, logits_to_keep=num_steps).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    one = recordings[0]
    recording = Recording(
        name, one.first_position,
        mass=np.concatenate([each.mass for each in recordings], 1),
        query=np.concatenate([each.query for each in recordings], 1),
        key_low=np.concatenate([each.key_low for each in recordings]),
        key_high=np.concatenate([each.key_high for each in recordings]),
        softmax_scale=one.softmax_scale, num_prompt_tiles=num_prompt_tiles,
    )  # fmt: skip
    likeliest: NDArray[np.int64] = logits.argmax(-1).numpy()
    return recording, likeliest
