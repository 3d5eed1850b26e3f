"""What is between two attentions as four kernels, for steps of few rows of a Llama-like model on a GPU.

`FewRows` takes the place of the functions of `examples.llama` that torch.compile fuses, and gives the same results up
to rounding. The kernels are in `examples.few_rows_kernels`.
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

MOST_ROWS = 16
"""New tokens in a step, at most, for which the kernels are made."""
_LEAST_ROWS = 2  # of a kernel: with one, Triton 3.6 computes wrong products
_PARTS = 8  # the inputs of a product are divided into so many, among the warps of a program
_COLUMNS = 16  # of a product, in one program; the best on an H200
_PAIRS = 16  # of columns, in one program of a kernel that needs two columns for a result


def fits(model: torch.nn.Module, layers: Sequence[Any]) -> bool:
    """Whether the kernels can run a model. They know RMS norms, SiLU and rotary embedding, and no biases.

    Args:
        model: of transformers.
        layers: its layers, as `examples.llama.Layer`.
    """
    norms = [norm for one in layers for norm in (one.norm_before, one.norm_after)]
    products = [(part, columns) for one in layers for part, columns in products_of(one)]
    memory = shared_memory(model.device)
    return (
        model.dtype in (torch.float16, torch.bfloat16)
        and all(type(norm).__name__ in ("LlamaRMSNorm", "MistralRMSNorm") for norm in norms)
        and not any(one.has_norms for one in layers)
        and model.config.hidden_act == "silu"
        and all(part.bias is None for part, _ in products)
        and all(2 * (columns + MOST_ROWS) * power_of_two(part.in_features) <= memory for part, columns in products)
    )


def products_of(layer: Any) -> list[tuple[torch.nn.Linear, int]]:
    """The products of a layer, and how many columns one program computes."""
    return [(layer.qkv, 2 * _PAIRS), (layer.out, _COLUMNS), (layer.gate_up, 2 * _PAIRS), (layer.down, _COLUMNS)]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use; 0 where there is no Triton to compile it."""
    if device.type != "cuda" or find_spec("triton") is None:
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class FewRows:
    """What is before, between and after attentions, as in `examples.llama`, for up to `MOST_ROWS` new tokens.

    Args:
        kernels: the module `examples.few_rows_kernels`.
        embed: the function of `examples.llama`, as it is or compiled; ``logits`` too.
        overlaps: whether a kernel may begin while the one before it runs; for sm_90 and later.
    """

    def __init__(
        self, kernels: Any, embed: Callable[..., tuple[torch.Tensor, ...]], logits: Callable[..., torch.Tensor], *,
        overlaps: bool,
    ) -> None:  # fmt: skip
        self.kernels, self.embed, self.logits, self.overlaps = kernels, embed, logits, overlaps

    def before(
        self, decoder: torch.nn.Module, layer: Any, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        hidden, cos, sin = self.embed(decoder, tokens, positions)
        return hidden, cos, sin, *self.project(layer, hidden, cos, sin)

    def between(
        self, layer: Any, following: Any, hidden: torch.Tensor, attended: torch.Tensor, cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        hidden = self.finish(layer, hidden, attended)
        return hidden, *self.project(following, hidden, cos, sin)

    def after(
        self, layer: Any, norm: torch.nn.Module, head: torch.nn.Module, hidden: torch.Tensor, attended: torch.Tensor,
        last: Any,
    ) -> torch.Tensor:  # fmt: skip
        return self.logits(norm, head, self.finish(layer, hidden, attended)[last])

    def project(
        self, layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, as `examples.llama.Layer.project` gives them."""
        norm, heads, size = layer.norm_before, layer.heads, layer.qkv.out_features
        out = hidden.new_empty(len(hidden), sum(heads), layer.head_dim)
        self.launch(
            self.kernels.norm_project_rotate, size / 2 / _PAIRS, hidden, norm.weight, layer.qkv.weight, cos, sin, out,
            len(hidden), norm.variance_epsilon, NUM_ROTATED=heads[0] + heads[1], HALF=layer.head_dim // 2, N=size,
            K=layer.qkv.in_features, PAIRS=_PAIRS,
        )  # fmt: skip
        return out.split(heads, 1)

    def finish(self, layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What is after attention, as `examples.llama.Layer.finish` gives it."""
        hidden = self.add_product(hidden, layer.out, attended)
        norm, size = layer.norm_after, layer.down.in_features
        gated = hidden.new_empty(len(hidden), size)
        self.launch(
            self.kernels.norm_gate_up, size / _PAIRS, hidden, norm.weight, layer.gate_up.weight, gated, len(hidden),
            norm.variance_epsilon, HALF=size, N=2 * size, K=layer.gate_up.in_features, PAIRS=_PAIRS,
        )  # fmt: skip
        return self.add_product(hidden, layer.down, gated)

    def add_product(self, hidden: torch.Tensor, product: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out, size = torch.empty_like(hidden), product.out_features
        self.launch(
            self.kernels.product_add, size / _COLUMNS, x, product.weight, hidden, out, len(hidden), N=size,
            K=product.in_features, COLUMNS=_COLUMNS,
        )  # fmt: skip
        return out

    def launch(self, kernel: Any, num_programs: float, x: torch.Tensor, *arguments: Any, **sizes: int) -> None:
        """Launch a kernel over the rows ``x``. With a fraction of a program the last one has less to do."""
        size = max(16, power_of_two(math.ceil(sizes["K"] / _PARTS)))
        options = {"num_warps": 4 if size <= 128 else 8} | ({"launch_pdl": True} if self.overlaps else {})
        rows = max(_LEAST_ROWS, power_of_two(len(x)))
        kernel[(math.ceil(num_programs),)](
            x, *arguments, **sizes, ROWS=rows, PARTS=_PARTS, SIZE=size, OVERLAPS=self.overlaps, **options
        )


def power_of_two(n: int) -> int:
    """The smallest one that is not below ``n``."""
    return 1 << (n - 1).bit_length()
