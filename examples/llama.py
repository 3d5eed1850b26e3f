"""A Llama-like model that reads and writes a kvtoolkit cache: a forward pass for an engine of your own.

The weights and small modules come from a transformers model; attention is a `kvtoolkit.Step`. Tokens of all sequences
are packed into one row of tokens, so a step may mix prompts, parts of prompts and single decoded tokens.
"""

from typing import Any

import numpy as np
import torch

from examples import few_rows
from kvtoolkit import CacheConfig


class PackedLlama:
    """Runs a Llama, Mistral, Qwen 2 or Qwen 3 of transformers on packed tokens, where the model is: CPU or GPU.

    Args:
        model: of transformers.
        fused: whether what is between two attentions becomes few kernels: by torch.compile, and in steps of few rows by
            `examples.few_rows`, where that fits the model.
    """

    def __init__(self, model: torch.nn.Module, *, fused: bool = False) -> None:
        self.model = model.eval()
        self.device = model.device
        self.config, self.vocab_size = model.config, model.config.vocab_size
        self.head_dim = getattr(model.config, "head_dim", None) or (
            model.config.hidden_size // model.config.num_attention_heads
        )
        self.dtype = str(model.dtype).removeprefix("torch.")
        window = getattr(model.config, "sliding_window", None)
        kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * model.config.num_hidden_layers
        self.windows = [window if kind == "sliding_attention" else None for kind in kinds]
        self.layers = [Layer(layer, self.head_dim) for layer in model.model.layers]
        self.is_fused = fused
        self.before, self.between, self.after = before, between, after
        if fused:  # one graph of each serves all layers and numbers of tokens
            parts = (torch.compile(part, dynamic=True) for part in (before, between, after))
            self.before, self.between, self.after = parts
        self.of_few_rows = few_rows_of(model, self.layers) if fused else None

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
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, step: Any, *, every: bool = False) -> torch.Tensor:
        """Logits ``[batch, vocab_size]`` after the last new token of each row of the step; after ``every`` new token.

        Args:
            tokens: ``[num_tokens]`` int64, the new tokens of all rows, one row after the other, on any device.
            positions: ``[num_tokens]`` int64, their positions in their sequences.
            step: a `kvtoolkit.Step`, or the run of a captured one.
        """
        layers, device = self.layers, self.device
        parts = self.of_few_rows if self.of_few_rows and len(tokens) <= few_rows.MOST_ROWS else self
        hidden, cos, sin, q, k, v = parts.before(self.model.model, layers[0], tokens.to(device), positions.to(device))
        for index, layer in enumerate(layers):
            step.append(index, k, v)
            window = self.windows[index]  # the token itself and those before it
            attended = step.attend(index, q, window_size=(window - 1, 0) if window else (-1, -1))
            if index + 1 < len(layers):
                hidden, q, k, v = parts.between(layer, layers[index + 1], hidden, attended, cos, sin)
        last = slice(None) if every else last_of_rows(step.cu_seqlens_q, device)
        return parts.after(layers[-1], self.model.model.norm, self.model.lm_head, hidden, attended, last)


class Layer(torch.nn.Module):
    """A layer of transformers, with the products of one input joined: small ones cost about as much as large ones."""

    def __init__(self, layer: torch.nn.Module, head_dim: int) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim, self.has_norms = head_dim, hasattr(attention, "q_norm")  # Qwen 3 has
        self.norm_before, self.norm_after = layer.input_layernorm, layer.post_attention_layernorm
        if self.has_norms:
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads = [part.out_features // head_dim for part in parts]
        self.qkv, self.out = join(parts), attention.o_proj
        self.gate_up, self.activation, self.down = join([mlp.gate_proj, mlp.up_proj]), mlp.act_fn, mlp.down_proj

    def project(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values, ``[num_tokens, heads, head_dim]``."""
        joined = self.qkv(self.norm_before(hidden)).view(len(hidden), -1, self.head_dim)
        q, k, v = joined.split(self.heads, 1)
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        return [rotate(q, cos, sin), rotate(k, cos, sin), v]

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What is after attention."""
        hidden = add(hidden, self.out(attended.reshape(len(hidden), -1)))
        gate, up = self.gate_up(self.norm_after(hidden)).chunk(2, -1)
        return add(hidden, self.down(self.activation(gate) * up))


def join(parts: list[torch.nn.Linear]) -> torch.nn.Linear:
    """One product instead of several of the same input. The parts keep their weights, as views of the joined ones."""
    first, sizes = parts[0], [part.out_features for part in parts]
    joined = torch.nn.Linear(
        first.in_features, sum(sizes), first.bias is not None, first.weight.device, first.weight.dtype
    )
    for name in ("weight", "bias")[: 1 if first.bias is None else 2]:
        whole = torch.cat([getattr(part, name).detach() for part in parts])
        setattr(joined, name, torch.nn.Parameter(whole, requires_grad=False))
        for part, view in zip(parts, whole.split(sizes), strict=True):
            getattr(part, name).data = view
    return joined


def add(hidden: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """The sum, rounded as always, but no part of the product: a compiler would copy ``hidden`` for that."""
    return (hidden.float() + product.float()).to(hidden.dtype)


def before(
    decoder: torch.nn.Module, layer: Layer, tokens: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What is before the first attention."""
    hidden, cos, sin = embed(decoder, tokens, positions)
    return hidden, cos, sin, *layer.project(hidden, cos, sin)


def embed(decoder: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of tokens, and the cosines and sines of their positions."""
    hidden = decoder.embed_tokens(tokens)
    return hidden, *angles_of(decoder.rotary_emb, positions, hidden)


def angles_of(
    rotary: torch.nn.Module, positions: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary position embedding, ``[num_tokens, 1, head_dim]``."""
    if rotary.rope_type in ("dynamic", "longrope"):  # whose frequencies depend on the longest position
        return tuple(part[0].unsqueeze(1) for part in rotary(hidden, positions.unsqueeze(0)))
    angles = positions.float()[:, None] * rotary.inv_freq.float()  # transformers makes a matrix product of it
    angles = torch.cat((angles, angles), -1).unsqueeze(1)
    return tuple((part * rotary.attention_scaling).to(hidden.dtype) for part in (angles.cos(), angles.sin()))


def after(
    layer: Layer, norm: torch.nn.Module, head: torch.nn.Module, hidden: torch.Tensor, attended: torch.Tensor,
    last: Any,
) -> torch.Tensor:  # fmt: skip
    """What is after the last attention."""
    return logits(norm, head, layer.finish(hidden, attended)[last])


def logits(norm: torch.nn.Module, head: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What is after the last layer."""
    return head(norm(hidden))


def between(
    layer: Layer, following: Layer, hidden: torch.Tensor, attended: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What is between the attention of a layer and that of the following one."""
    hidden = layer.finish(hidden, attended)
    return hidden, *following.project(hidden, cos, sin)


def few_rows_of(model: torch.nn.Module, layers: list[Layer]) -> few_rows.FewRows | None:
    """The same three for steps of few rows; None where its kernels do not fit the model."""
    if not few_rows.fits(model, layers):
        return None
    from examples import few_rows_kernels  # where there is no GPU there may be no Triton

    parts = (torch.compile(part, dynamic=True) for part in (embed, logits))
    return few_rows.FewRows(few_rows_kernels, *parts, overlaps=torch.cuda.get_device_capability(model.device) >= (9, 0))


def last_of_rows(bounds: Any, device: torch.device) -> slice | torch.Tensor:
    """Where the last new token of each row is; a slice where every row has one, so that nothing has to be gathered."""
    if not isinstance(bounds, np.ndarray):  # of a captured step, on the device
        return (torch.as_tensor(bounds, device=device)[1:].long() - 1).clamp(min=0)
    if (np.diff(bounds) == 1).all():
        return slice(None)
    return torch.from_numpy(bounds[1:] - 1).to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding to ``x`` ``[num_tokens, heads, head_dim]``. A pair has one dim of each half."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
