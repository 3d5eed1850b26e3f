"""A Llama-like model that reads and writes a kvtoolkit cache: a forward pass for an engine of your own.

The weights and small modules come from a transformers model; attention is a `kvtoolkit.Step`. Tokens of all sequences
are packed into one row of tokens, so a step may mix prompts, parts of prompts and single decoded tokens.
"""

from typing import Any

import numpy as np
import torch

from kvtoolkit import CacheConfig


class PackedLlama:
    """Runs a Llama, Mistral, Qwen 2 or Qwen 3 of transformers on packed tokens, where the model is: CPU or GPU.

    Args:
        model: of transformers.
        fused: whether torch.compile makes few kernels of what is between two attentions.
    """

    def __init__(self, model: torch.nn.Module, *, fused: bool = False) -> None:
        self.model = model.eval()
        self.device = model.device
        self.config = model.config
        self.head_dim = getattr(model.config, "head_dim", None) or (
            model.config.hidden_size // model.config.num_attention_heads
        )
        self.dtype = str(model.dtype).removeprefix("torch.")
        window = getattr(model.config, "sliding_window", None)
        kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * model.config.num_hidden_layers
        self.windows = [window if kind == "sliding_attention" else None for kind in kinds]
        # one graph serves all layers and numbers of tokens
        self.between = torch.compile(between, dynamic=True) if fused else between

    def cache_config(self, path: str | None = None, **options) -> CacheConfig:
        """Configure a cache for this model, on the model's device, from the TOML file at ``path`` and ``options``.

        Layers with a window are in a group that frees what it no longer needs.
        """
        fitting = {"dtype": self.dtype}
        if self.device.type == "cuda":
            fitting |= {"backend": "cuda", "device": self.device.index}
        fitting |= options
        if path:
            shape = {
                "num_layers": self.config.num_hidden_layers,
                "num_kv_heads": self.config.num_key_value_heads,
                "head_dim": self.head_dim,
            }
            fitting = CacheConfig.load(path, **shape, **fitting).to_dict()
        return CacheConfig.for_model(self.config, **fitting)

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, step: Any) -> torch.Tensor:
        """Logits ``[batch, vocab_size]`` after the last new token of each row of the step.

        Args:
            tokens: ``[num_tokens]`` int64, the new tokens of all rows, one row after the other, on any device.
            positions: ``[num_tokens]`` int64, their positions in their sequences.
            step: a `kvtoolkit.Step`, or the run of a captured one.
        """
        decoder, head_dim = self.model.model, self.head_dim
        hidden = decoder.embed_tokens(tokens.to(self.device))
        cos, sin = decoder.rotary_emb(hidden, positions.to(self.device).unsqueeze(0))
        cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
        layers = decoder.layers
        q, k, v = project(layers[0], hidden, cos, sin, head_dim)
        for index, layer in enumerate(layers):
            step.append(index, k, v)
            window = self.windows[index]  # the token itself and those before it
            attended = step.attend(index, q, window_size=(window - 1, 0) if window else (-1, -1))
            if index + 1 < len(layers):
                hidden, q, k, v = self.between(layer, layers[index + 1], hidden, attended, cos, sin, head_dim)
            else:
                hidden = finish(layer, hidden, attended)
        return self.model.lm_head(decoder.norm(hidden[last_of_rows(step.cu_seqlens_q, self.device)]))


def last_of_rows(bounds: Any, device: torch.device) -> slice | torch.Tensor:
    """Where the last new token of each row is; a slice where every row has one, so that nothing has to be gathered."""
    if not isinstance(bounds, np.ndarray):  # of a captured step, on the device
        return (torch.as_tensor(bounds, device=device)[1:].long() - 1).clamp(min=0)
    if (np.diff(bounds) == 1).all():
        return slice(None)
    return torch.from_numpy(bounds[1:] - 1).to(device)


def project(
    layer: torch.nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int
) -> list[torch.Tensor]:
    """Queries, keys and values of a layer, ``[num_tokens, heads, head_dim]``."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    q, k, v = (
        linear(normed).view(len(hidden), -1, head_dim)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):  # Qwen 3
        q, k = attention.q_norm(q), attention.k_norm(k)
    return [rotate(q, cos, sin), rotate(k, cos, sin), v]


def finish(layer: torch.nn.Module, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """What is after a layer's attention."""
    hidden = hidden + layer.self_attn.o_proj(attended.reshape(len(hidden), -1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def between(
    layer: torch.nn.Module, following: torch.nn.Module, hidden: torch.Tensor, attended: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, head_dim: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What is between the attention of a layer and that of the following one."""
    hidden = finish(layer, hidden, attended)
    return hidden, *project(following, hidden, cos, sin, head_dim)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding to ``x`` ``[num_tokens, heads, head_dim]``. A pair has one dim of each half."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
