"""A Llama-like model that reads and writes a kvtoolkit cache: a forward pass for an engine of your own.

The weights and small modules come from a transformers model; attention is a `kvtoolkit.Step`. Tokens of all sequences
are packed into one row of tokens, so a step may mix prompts, parts of prompts and single decoded tokens.
"""

import numpy as np
import torch

from kvtoolkit import CacheConfig, Step


class PackedLlama:
    """Runs a Llama, Mistral, Qwen 2 or Qwen 3 of transformers on packed tokens, where the model is: CPU or GPU."""

    def __init__(self, model: torch.nn.Module) -> None:
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
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
        """Logits ``[batch, vocab_size]`` after the last new token of each row of the step.

        Args:
            tokens: ``[num_tokens]`` int64, the new tokens of all rows, one row after the other, on any device.
            positions: ``[num_tokens]`` int64, their positions in their sequences.
        """
        decoder = self.model.model
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        last: slice | torch.Tensor = slice(None)
        if (np.diff(step.cu_seqlens_q) != 1).any():  # a decode step needs no indices, and can be captured in a graph
            last = torch.from_numpy(step.cu_seqlens_q[1:] - 1).to(self.device)
        hidden = decoder.embed_tokens(tokens)
        cos, sin = (table[0].unsqueeze(1) for table in decoder.rotary_emb(hidden, positions.unsqueeze(0)))
        for index, layer in enumerate(decoder.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            q, k, v = (
                project(normed).view(len(tokens), -1, self.head_dim)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):  # Qwen 3
                q, k = attention.q_norm(q), attention.k_norm(k)
            step.append(index, rotate(k, cos, sin), v)
            window = self.windows[index]  # the token itself and those before it
            window_size = (window - 1, 0) if window else (-1, -1)
            attended = step.attend(index, rotate(q, cos, sin), window_size=window_size)
            hidden = hidden + attention.o_proj(attended.reshape(len(tokens), -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(decoder.norm(hidden[last]))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding to ``x`` ``[num_tokens, heads, head_dim]``. A pair has one dim of each half."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
