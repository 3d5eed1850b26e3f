"""Hugging Face transformers on a `KVCache`: ``model.generate(..., past_key_values=TransformersCache(...))``.

    use_kvtoolkit(model)
    cache = TransformersCache.for_model(model, num_tokens=65536)
    model.generate(**inputs, past_key_values=cache)

For decoder-only models whose attention goes through `AttentionInterface`: Llama, Qwen, Mistral, Gemma and their like,
with transformers 5.17 or later, on the CPU or on one CUDA device. torch.compile breaks its graph at every layer's
attention, which runs as without it. No gradient goes through the cache. On a GPU the host looks at the padding mask
once a forward, since it decides how much memory each row takes.
"""

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvtoolkit.cache import KVCache
from kvtoolkit.config import DTYPES, CacheConfig
from kvtoolkit.cpu import Operand
from kvtoolkit.cpu.arrays import as_numpy_view, tensor_operand
from kvtoolkit.integrations.padded import PaddedBatch
from kvtoolkit.untraced import untraced

NAME = "kvtoolkit"
"""What the attention implementation is called in transformers."""

_DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}
_LAYER_TYPES = ("full_attention", "sliding_attention")


@untraced
def use_kvtoolkit(model: PreTrainedModel) -> None:
    """Make a model attend through kvtoolkit wherever it is given a `TransformersCache`, and through SDPA elsewhere."""
    model.set_attn_implementation(NAME)


@untraced
class TransformersCache(Cache):  # type: ignore[misc]
    """The ``past_key_values`` of one batch, kept in a `KVCache`.

    Padding takes no memory: the 2-D attention mask says what is padding, and only tokens are stored. Padded columns
    stay padding; their outputs are zeros before the output projection. Forwards may be of any number of tokens. A
    forward that raised before the attention of its last layer leaves the cache as it was. Beams share what they have
    in common.

    Args:
        kv_cache: several `TransformersCache`s may take their rows from one `KVCache`.

    Raises (from the model's forward):
        CacheFullError: the pool is full; nothing of the forward was kept.
        NotImplementedError: a 4-D mask, a custom mask function, dropout, attention that is not causal, or a model
            elsewhere than the cache.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        self._batch = PaddedBatch(kv_cache)
        super().__init__(layers=[CacheLayer(self._batch, i) for i in range(kv_cache.config.num_layers)])

    @classmethod
    def for_model(cls, model: PreTrainedModel, **options: Any) -> "TransformersCache":
        """A cache of its own for a model, where the model is.

        Args:
            model: a decoder-only model, on the CPU or on one CUDA device.
            options: as `CacheConfig` takes them; ``num_tokens`` or ``memory`` must be there, and what says the shape
                of the model (``num_layers`` and so on) and where it is (``backend``, ``device``) need not.

        Raises:
            ConfigError: an option makes no sense.
            UnsupportedError: no kernels for the model's dtype or head_dim on a GPU.
            NotImplementedError: the model has layers other than full and sliding-window attention, or lies on several
                devices.
        """
        return cls(KVCache(cache_config(model, **options)))

    @property
    def kv_cache(self) -> KVCache:
        """The cache beneath, for its figures."""
        return self._batch.cache

    @property
    def seq_ids(self) -> np.ndarray:
        """``[batch]`` int64 ids of the rows in `kv_cache`; empty before the first forward."""
        return np.empty(0, np.int64) if self._batch.seq_ids is None else self._batch.seq_ids

    def open(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> int:
        """Begin a batch with prompts, reusing the longest prefixes that earlier batches left in the `KVCache`.

        Call it right before ``generate`` with the same ``input_ids`` and ``attention_mask``; transformers then computes
        only the rest. Without `open` nothing is reused and nothing becomes findable, since a cache is not told tokens.

        Args:
            input_ids: ``[batch, columns]``, padded on the left.
            attention_mask: ``[batch, columns]``; None = no padding.

        Returns:
            Columns that need not be computed: the fewest over the rows.
        """
        mask = None if attention_mask is None else as_numpy_view(attention_mask.cpu(), "attention_mask")
        return self._batch.open(as_numpy_view(input_ids.cpu(), "input_ids"), mask)

    # -- what transformers calls -------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns cached, padding included."""
        return self._batch.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the pool is the limit."""
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` continues row ``beam_idx[i]``; blocks are shared, not copied."""
        self._batch.reorder(as_numpy_view(beam_idx.cpu(), "beam_idx"))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, copies beside each other; blocks are shared."""
        self._batch.select(np.repeat(np.arange(self._batch.batch_size), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of ``indices``, integers or a bool mask; the others are closed."""
        self._batch.select(np.arange(self._batch.batch_size)[torch.as_tensor(indices, device="cpu").numpy()])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns, as after rejected draft tokens.

        Raises:
            ValueError: ``tokens_to_remove`` is positive, which once meant the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected 0 or a negative number, got {tokens_to_remove}")
        self._batch.truncate(-int(tokens_to_remove))

    def reset(self) -> None:
        """Give the memory back; the next forward begins a new batch, of any size."""
        self._batch.reset()

    close = reset

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward."""
        return self._batch.batch_size or -1

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the memory is there already."""

    def __repr__(self) -> str:
        return f"TransformersCache({self._batch.batch_size} rows, {self._batch.num_columns} columns, {self.kv_cache!r})"


@untraced
class CacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers sees of one layer. What concerns the batch is asked of the `TransformersCache`."""

    is_croppable = True
    is_sliding = False  # windows are a matter of attention: all columns stay
    supports_early_init = False

    def __init__(self, batch: PaddedBatch, index: int) -> None:
        super().__init__()
        self.batch = batch
        self.index = index

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give back the new keys and values, marked so that `attention_forward` finds the cache; it stores them."""
        if self.index != self.batch.next_layer and self.index != 0:
            raise NotImplementedError(
                f"layer {self.index} follows layer {self.batch.next_layer - 1}, which was not attended by kvtoolkit: "
                "call use_kvtoolkit(model) first; skipped layers are not supported"
            )
        key_states.kvtoolkit_layer = self
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.batch.num_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return _Columns(self.batch.num_columns + query_length), 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("the memory of a TransformersCache is there from the start")

    def offload(self) -> None:
        raise NotImplementedError("a TransformersCache cannot be offloaded")

    def reset(self) -> None:
        raise NotImplementedError("ask the TransformersCache, not one layer")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise NotImplementedError("ask the TransformersCache, not one layer")


class _Columns(int):
    """A number of columns that tells `attention_mask` that they are in a `TransformersCache`."""


@untraced
def attention_mask(*, kv_length: int, allow_is_causal_skip: bool = True, **options: Any) -> torch.Tensor | None:
    """The mask that `attention_forward` takes: 2-D, on the host, None where nothing is padded; without our cache that
    of SDPA."""
    if not isinstance(kv_length, _Columns):
        mask: torch.Tensor | None = sdpa_mask(kv_length=kv_length, allow_is_causal_skip=allow_is_causal_skip, **options)
        return mask
    if not allow_is_causal_skip:
        raise NotImplementedError("kvtoolkit masks padding, causally; got a custom mask function")
    padding: torch.Tensor | None = options.get("attention_mask")
    if padding is None:
        return None
    padding = padding.cpu()
    return None if padding.all() else padding


@untraced
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Store a layer's new keys and values, and attend.

    Args:
        module: the attention layer.
        query: ``[batch, num_q_heads, columns, head_dim]``.
        key: ``[batch, num_kv_heads, columns, head_dim]``, what `CacheLayer.update` gave back; ``value`` alike. Any
            other key goes to SDPA.
        attention_mask: of `attention_mask`.
        scaling: factor on q.k.
        options: ``sliding_window``, ``softcap`` and ``s_aux`` (sinks) are obeyed.

    Returns:
        ``[batch, columns, num_q_heads, head_dim]``, zeros where padding stands, and None for the weights.
    """
    layer: CacheLayer | None = getattr(key, "kvtoolkit_layer", None)
    if layer is None:
        if options.get("s_aux") is not None:
            raise NotImplementedError("attention sinks need a TransformersCache; SDPA has none")
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return out, None
    batch, index = layer.batch, layer.index
    shape = query.shape
    rows, num_heads, columns, head_dim = shape
    if index == 0:
        _refuse(query, attention_mask, dropout, options, batch.device)
        batch.begin(rows, columns, None if attention_mask is None else attention_mask.cpu().numpy())
        batch.places = None if batch.packed is None else torch.from_numpy(batch.packed).to(query.device)
    step, places = batch.step, batch.places
    assert step is not None
    window, softcap, sinks = options.get("sliding_window"), options.get("softcap"), options.get("s_aux")
    if places is None and columns == 1 and sinks is None:  # what is alike from layer to layer is settled once
        form = (
            shape,
            query.stride(),
            key.shape,
            key.stride(),
            value.stride(),
            query.dtype,
            key.dtype,
            value.dtype,
            query.get_device(),
            (type(query), type(key), type(value)),
            scaling,
            window,
            softcap,
        )
        out = query.new_empty((rows, columns, num_heads, head_dim))
        alike = batch.form == form
        batch.form = form
        if alike and step.repeat(index, key.data_ptr(), value.data_ptr(), query.data_ptr(), out.data_ptr()):
            return _layer_done(batch, index, out)
    chosen = {
        "softmax_scale": scaling,
        "window_size": (window - 1, 0) if window else (-1, -1),
        "softcap": softcap or 0.0,
        "sinks": None if sinks is None else sinks.detach().float(),
    }
    if places is None:
        step.append(index, _tokens_of(key), _tokens_of(value))
        out = query.new_empty((rows, columns, num_heads, head_dim))
        step.attend(index, _tokens_of(query), out=_tokens_of(out.transpose(1, 2)), **chosen)
    else:
        key, value, query = (states.transpose(1, 2).flatten(0, 1)[places] for states in (key, value, query))
        step.append(index, key, value)
        out = query.new_zeros((rows * columns, num_heads, head_dim))
        out[places] = step.attend(index, query, **chosen)
        out = out.view(rows, columns, num_heads, head_dim)
    return _layer_done(batch, index, out)


def _layer_done(batch: PaddedBatch, index: int, out: torch.Tensor) -> tuple[torch.Tensor, None]:
    batch.next_layer = index + 1
    if batch.next_layer == batch.cache.config.num_layers:
        batch.end()
    return out, None


def _tokens_of(states: torch.Tensor) -> Operand:
    """``[batch, heads, columns, head_dim]`` seen as ``[batch * columns, heads, head_dim]``; a copy only if it must be.

    What ``transpose(1, 2).flatten(0, 1)`` would give, without the two tensors in between: this is done for every
    layer of every token.
    """
    tensor_operand(states, "query, key, value", states.is_cuda)  # refuses those without memory of their own
    batch, num_heads, columns, head_dim = states.shape
    row, head, column, dim = states.stride()
    if batch > 1 and columns > 1 and row != columns * column:
        states = states.transpose(1, 2).contiguous()
        head, column, dim = head_dim, num_heads * head_dim, 1
    elif columns == 1:
        column = row
    name = _DTYPE_NAMES.get(states.dtype) or str(states.dtype)
    shape, strides = (batch * columns, num_heads, head_dim), (column, head, dim)
    return Operand(states.data_ptr(), shape, strides, name, states, True, states.get_device())


def _refuse(
    query: torch.Tensor, mask: torch.Tensor | None, dropout: float, options: dict[str, Any], device: int
) -> None:
    expected = torch.device("cpu") if device < 0 else torch.device("cuda", device)
    if query.device != expected:
        raise NotImplementedError(
            f"expected a model on {expected}, where the cache is, got one on {query.device}; "
            "TransformersCache.for_model makes a cache where the model is"
        )
    if mask is not None and mask.ndim != 2:
        raise NotImplementedError(f"attention_mask: expected [batch, columns], got shape {tuple(mask.shape)}")
    if dropout:
        raise NotImplementedError(f"dropout: expected 0, got {dropout}; call model.eval()")
    if options.get("is_causal") is False or options.get("position_bias") is not None:
        raise NotImplementedError("expected causal attention without position bias")


def cache_config(model: PreTrainedModel, **options: Any) -> CacheConfig:
    """The `CacheConfig` for a model; see `TransformersCache.for_model`."""
    config = model.config.get_text_config(decoder=True)
    types = set(getattr(config, "layer_types", None) or _LAYER_TYPES[:1])
    if model.config.is_encoder_decoder or not types <= set(_LAYER_TYPES):
        raise NotImplementedError(f"expected a decoder of {' and '.join(_LAYER_TYPES)}, got {', '.join(sorted(types))}")
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "attention_chunk_size", None):
        raise NotImplementedError("layers that share keys and values, or attend in chunks, are not supported")
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise NotImplementedError(f"expected a model in {', '.join(DTYPES)}, got {dtype}")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise NotImplementedError("expected a model on one device, got one on several")
    fitting = {
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "dtype": dtype,
    }
    if model.device.type == "cuda" and options.get("backend") != "cpu":
        fitting |= {"backend": "cuda", "device": model.device.index}
    return CacheConfig(**{**fitting, **options})


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
