"""Which models of transformers can run on a `KVCache`: what a configuration says, and what a trial forward shows."""

import inspect
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtoolkit.config.model_config import CHUNKED, FULL, SLIDING
from kvtoolkit.errors import ArgumentError
from kvtoolkit.integrations.marks import Mask, mark_keys

LAYER_TYPES = (FULL, SLIDING, CHUNKED)


class CacheShape(NamedTuple):
    """What a model stores of a token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def check_structure(model: PreTrainedModel) -> None:
    """NotImplementedError, with the reason, if the configuration or the class of a model rules it out.

    Raises:
        ArgumentError: it is no model of transformers.
    """
    # wrappers, as of adapters, are no PreTrainedModel but pass on what one has
    if not isinstance(model, torch.nn.Module) or not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ArgumentError(f"model: expected a model of transformers, got {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    types = set(getattr(config, "layer_types", None) or LAYER_TYPES[:1])
    if model.config.is_encoder_decoder or not types <= set(LAYER_TYPES):
        raise NotImplementedError(
            f"expected a decoder of {', '.join(LAYER_TYPES)}, got {', '.join(sorted(map(str, types)))}"
        )
    if getattr(config, "kv_lora_rank", None):
        raise NotImplementedError(
            f"latent attention (MLA, kv_lora_rank {config.kv_lora_rank}) stores keys and values of different widths, "
            "for which kvtoolkit has no kernel"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise NotImplementedError("layers that share keys and values are not supported")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        raise NotImplementedError("ALiBi reaches the attention as a mask of numbers, which kvtoolkit does not take")
    if getattr(config, "is_causal", True) is False:
        raise NotImplementedError("expected causal attention, got is_causal=False")
    can_set = getattr(model, "_can_set_attn_implementation", None)
    if can_set is not None and not can_set():
        raise NotImplementedError(
            f"{type(model).__name__} attends by code of its own, not through transformers' AttentionInterface"
        )


class TrialCache(Cache):  # type: ignore[misc]
    """Notes what the attention of each layer is asked, and stores nothing."""

    def __init__(self, num_layers: int) -> None:
        self.calls: list[tuple[int, CacheShape, int, str | None]] = []
        """Layer, shape, span of the mask, and what is wrong, of every attention call in order."""
        self.num_columns = 0
        super().__init__(layers=[TrialLayer(self, i) for i in range(num_layers)])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_columns


class TrialLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer of a `TrialCache`."""

    is_sliding = False

    def __init__(self, cache: TrialCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return mark_keys(key_states, self), value_states

    def get_seq_length(self) -> int:
        return self.cache.num_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return Columns(self.cache.num_columns + query_length), 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
        scaling: float | None, dropout: float, options: dict[str, Any],
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Note the call; the result is zeros."""
        shape = CacheShape(len(self.cache.layers), key.shape[1], key.shape[3])
        span = check_call(module, mask, 0.0, options)
        self.cache.calls.append((self.index, shape, span, _wrong_shape(query, key, value)))
        rows, num_heads, columns, _ = query.shape
        return query.new_zeros((rows, columns, num_heads, value.shape[3])), None


class Columns(int):
    """A number of columns that tells the mask function that they are in a cache of ours."""


def _wrong_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    if key.shape != value.shape:
        return f"keys {list(key.shape)} and values {list(value.shape)} of one shape"
    if query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1] or query.shape[2] != key.shape[2]:
        return f"queries {list(query.shape)} that fit keys {list(key.shape)}"
    if key.shape[3] % 8:
        return f"a head_dim that is a multiple of 8, got {key.shape[3]}"
    return None


def check_call(module: torch.nn.Module, mask: Any, dropout: float, options: dict[str, Any]) -> int:
    """What a query of a layer sees, as its mask says; see `Mask.span`.

    Raises:
        NotImplementedError: attention of a kind that kvtoolkit does not have.
    """
    if type(mask) is not Mask:
        got = "none" if mask is None else f"shape {tuple(mask.shape)}"
        raise NotImplementedError(
            f"attention_mask: expected [batch, columns] or a mask of transformers' masking_utils, got {got}"
        )
    if dropout:
        raise NotImplementedError(f"dropout: expected 0, got {dropout}; call model.eval()")
    causal = options.get("is_causal")
    if causal is False or (causal is None and getattr(module, "is_causal", True) is False):
        raise NotImplementedError("expected causal attention, got is_causal=False")
    if options.get("position_bias") is not None:
        raise NotImplementedError("expected attention without position bias")
    window = options.get("sliding_window")
    if window is not None and window != mask.span:
        shown = mask.span if mask.span > 0 else None
        raise NotImplementedError(f"sliding_window: expected that of the layer's mask, {shown}, got {window}")
    span: int = mask.span
    return span


class Trial(NamedTuple):
    """What a trial forward has found."""

    shape: CacheShape
    spans: tuple[int, ...]
    """For each layer: the window, the chunk as a negative number, or 0 if it sees all tokens."""


def trial_forward(model: PreTrainedModel) -> Trial:
    """Run a model on 2 rows of 4 and then 1 columns, with attention that only notes how it is called.

    The model must attend through kvtoolkit. Costs two forwards of a few tokens.

    Raises:
        NotImplementedError: its layers do not attend as a `KVCache` can serve; says why.
    """
    config = model.config.get_text_config(decoder=True)
    num_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        raise NotImplementedError(f"expected a configuration with num_hidden_layers, got {type(config).__name__}")
    cache = TrialCache(num_layers)
    known = inspect.signature(model.forward).parameters
    cache_name = "cache" if "cache" in known else "past_key_values"  # transformers 5.24 renamed it
    mask = torch.ones((2, 5), dtype=torch.long, device=model.device)
    mask[0, 0] = 0
    for columns in (4, 1):
        ids = torch.ones((2, columns), dtype=torch.long, device=model.device)
        seen = cache.num_columns + columns
        positions = (mask[:, :seen].cumsum(1) - 1).clamp(min=0)[:, -columns:]
        before = len(cache.calls)
        try:
            with torch.no_grad():
                options = {"position_ids": positions} if "position_ids" in known else {}
                model(input_ids=ids, attention_mask=mask[:, :seen], use_cache=True, **{cache_name: cache}, **options)
        except NotImplementedError:
            raise
        except Exception as error:
            raise NotImplementedError(
                f"{type(model).__name__} cannot be tried on a cache: {type(error).__name__}: {error}"
            ) from error
        calls = cache.calls[before:]
        if [index for index, *_ in calls] != list(range(len(cache.layers))):
            raise NotImplementedError(
                f"expected each of {len(cache.layers)} layers to attend once, in order, through the cache, "
                f"got layers {[index for index, *_ in calls]}"
            )
        cache.num_columns = seen
    for *_, wrong in cache.calls:
        if wrong is not None:
            raise NotImplementedError(f"expected {wrong}")
    spans = tuple(span for _, _, span, _ in cache.calls)
    if spans[:num_layers] != spans[num_layers:]:
        raise NotImplementedError(f"expected layers with the same windows in every forward, got {spans}")
    window = getattr(config, "sliding_window", None)
    if window and not getattr(config, "layer_types", None) and not any(spans):
        # transformers' own cache would then forget keys that the model's masks show
        raise NotImplementedError(f"sliding_window: the configuration says {window}, but no layer's mask has a window")
    odd = [-span for span in spans if span < 0 and span % 8]
    if odd:
        raise NotImplementedError(f"attention_chunk_size: expected a multiple of 8, got {odd[0]}")
    shapes = {shape for _, shape, *_ in cache.calls}
    if len(shapes) > 1:
        raise NotImplementedError(f"expected layers of one shape, got {sorted(shapes)}")
    return Trial(shapes.pop(), spans[:num_layers])
