"""Hugging Face transformers on a `KVCache`: ``model.generate(..., past_key_values=TransformersCache(...))``.

    use_kvtoolkit(model)
    cache = TransformersCache.for_model(model, num_tokens=65536)
    model.generate(**inputs, past_key_values=cache)

For decoder-only models whose attention goes through `AttentionInterface`: Llama, Qwen, Mistral, Gemma and their like,
with transformers 5.17 or later, on the CPU or on one CUDA device. torch.compile breaks its graph at every layer's
attention, which runs as without it. No gradient goes through the cache. On a GPU the host looks at the padding mask
once a forward, since it decides how much memory each row takes.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvtoolkit.arrays.host import as_numpy_view, tensor_operand
from kvtoolkit.arrays.types import as_int
from kvtoolkit.attention.options import AttendOptions
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.config.cache import DTYPES, CacheConfig
from kvtoolkit.cpu import Operand
from kvtoolkit.errors import ArgumentError, ConfigError, ShapeError
from kvtoolkit.integrations.layer_groups import check_kept, grouped_config
from kvtoolkit.integrations.marks import Mask, NewKeys, make_mask, mark_keys, span_of
from kvtoolkit.integrations.models import Columns, check_call, check_structure, trial_forward
from kvtoolkit.integrations.padded import PaddedBatch
from kvtoolkit.tracing import untraced

NAME = "kvtoolkit"
"""What the attention implementation is called in transformers, where it is put over SDPA."""

_OVER = f"{NAME}_over_"  # begins the name of one that is put over another
_DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@untraced
def use_kvtoolkit(model: PreTrainedModel) -> None:
    """Make a model attend through kvtoolkit wherever it is given a `TransformersCache`, and as before elsewhere.

    Raises:
        ArgumentError: it is no model of transformers.
        NotImplementedError: the model cannot run on a `TransformersCache`; says why.
    """
    check_structure(model)
    model.set_attn_implementation(_names_over(model.config))


def _names_over(config: Any) -> Any:
    """For a configuration and those in it, the implementation to set, as `set_attn_implementation` takes them."""
    own = _name_over(config._attn_implementation)
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    parts = {key: part for key, part in parts.items() if part is not None}
    return {"": own} | {key: _names_over(part) for key, part in parts.items()} if parts else own


def _name_over(former: str | None) -> str:
    """The name of the implementation that is ours with our cache and ``former`` without; registers it."""
    former = former or "sdpa"
    if former == NAME or former.startswith(_OVER):
        return former
    # transformers looks for "flash" in names to see what it calls itself
    name = NAME if former == "sdpa" else _OVER + former.replace("flash", "fl")
    AttentionInterface.register(name, functools.partial(attention_forward, former=former))
    AttentionMaskInterface.register(name, functools.partial(attention_mask, former=former))
    return name


@contextlib.contextmanager
def _using_kvtoolkit(model: PreTrainedModel) -> Iterator[None]:
    """`use_kvtoolkit` for a while, where it has not been called."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    former = [(config, config._attn_implementation) for config in configs.values()]
    use_kvtoolkit(model)
    try:
        yield
    finally:
        for config, name in former:
            config._attn_implementation_internal = name


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
        NotImplementedError: a 4-D mask, a custom mask function, dropout, attention that is not causal, padding between
            tokens of one window, or a model elsewhere than the cache.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        if not isinstance(kv_cache, KVCache):
            raise ArgumentError(f"kv_cache: expected a KVCache, got {type(kv_cache).__name__}")
        self._batch = PaddedBatch(kv_cache)
        super().__init__(layers=[CacheLayer(self._batch, i) for i in range(kv_cache.config.num_layers)])

    @classmethod
    def for_model(
        cls, model: PreTrainedModel, *, lengths: int | Sequence[int] | None = None,
        step_tokens: int | None = None, **options: Any,
    ) -> "TransformersCache":  # fmt: skip
        """A cache of its own for a model, where the model is.

        Layers with a window or chunks go to groups of layers that free their past, where `CacheConfig` has groups. All
        groups get as many slots, so that ``generate`` can compute a prompt at once. With ``lengths`` they get less and
        save memory; then give ``generate`` a ``prefill_chunk_size``.

        Args:
            model: a decoder-only model, on the CPU or on one CUDA device.
            lengths: how many tokens sequences have while they are in the cache, as in `CacheConfig.for_model`; memory
                is then divided as there.
            step_tokens: only with ``lengths``: most new tokens in a forward, all rows together, so rows times
                ``prefill_chunk_size``; None = 512.
            options: as `CacheConfig` takes them; ``num_tokens`` or ``memory`` must be there, and what says the shape
                of the model (``num_layers`` and so on) and where it is (``backend``, ``device``) need not. With
                ``layer_groups=None`` all layers keep all tokens.

        Raises:
            ArgumentError: ``model`` is no model of transformers.
            ConfigError: an option makes no sense or is unknown, ``step_tokens`` without ``lengths``, a shape that is
                not the model's, or ``layer_groups`` that do not fit its windows.
            UnsupportedError: no kernels for the model's dtype or head_dim on a GPU; or ``lengths`` or a model with
                chunks, with options that exclude groups of layers, such as ``tiers`` if no layer keeps all tokens.
            NotImplementedError: the model cannot run on a `TransformersCache`; says why.

        Two forwards of a few tokens show how the model's layers attend. A 16-bit ``dtype`` with a float32 model is
        fine: keys, values and queries are rounded.
        """
        if step_tokens is not None and lengths is None:
            raise ConfigError(f"step_tokens: expected it only with lengths, got {step_tokens!r:.80} without them")
        check_structure(model)
        _check_place(model)
        with _using_kvtoolkit(model):
            shape, spans = trial_forward(model)
        for name, value in shape._asdict().items():
            if name in options and as_int(options[name]) != value:
                raise ConfigError(f"{name}: expected {value}, which the model has, or none, got {options[name]!r:.80}")
        fields = _fitting(model, **{**shape._asdict(), **options})
        return cls(KVCache(grouped_config(spans, lengths, 512 if step_tokens is None else step_tokens, fields)))

    def __deepcopy__(self, memo: Any) -> "TransformersCache":
        """A fork: a cache in the same `KVCache` that goes on from the same columns and shares their memory.

        Raises:
            CacheFullError: too few rows or blocks for it.
        """
        forked = type(self)(self.kv_cache)
        forked._batch.fork_from(self._batch)
        return forked

    def __copy__(self) -> "TransformersCache":
        return self.__deepcopy__(None)

    @property
    def kv_cache(self) -> KVCache:
        """The cache beneath, for its figures."""
        return self._batch.cache

    @property
    def seq_ids(self) -> np.ndarray:
        """``[batch]`` int64 ids of the rows in `kv_cache`; empty before the first forward."""
        return np.empty(0, np.int64) if self._batch.seq_ids is None else self._batch.seq_ids

    def open(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, salt: Any = None,
        extra_keys: Any = None,
    ) -> int:  # fmt: skip
        """Begin a batch with prompts, reusing the longest prefixes that earlier batches left in the `KVCache`.

        Call it right before ``generate`` with the same ``input_ids`` and ``attention_mask``; transformers then computes
        only the rest. Without `open` nothing is reused and nothing becomes findable, since a cache is not told tokens.

        Args:
            input_ids: ``[batch, columns]``, padded on the left.
            attention_mask: ``[batch, columns]``; None = no padding.
            salt: whose prompts these are (a tenant, an adapter), one for all or a list; see `KVCache.open`.
            extra_keys: for each row a list of ``(column, key)``, such as an image's first column and its hash.

        Returns:
            Columns that need not be computed: the fewest over the rows.

        Raises:
            ShapeError: ``input_ids`` or ``attention_mask`` is not as above.
            CacheFullError: too few rows for the batch.
        """
        for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if not isinstance(given, torch.Tensor) and (given is not None or name == "input_ids"):
                raise ShapeError(f"{name}: expected a tensor [batch, columns], got {type(given).__name__}")
        mask = None if attention_mask is None else as_numpy_view(attention_mask.cpu(), "attention_mask")
        tokens = as_numpy_view(input_ids.cpu(), "input_ids")
        return self._batch.open(tokens, mask, salt=salt, extra_keys=extra_keys)

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
            ArgumentError: layers with a window have let go of what the next columns would see. Right after a forward,
                its own columns can always be taken back.
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
    is_sliding = False  # for masks, all columns are there
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
        return mark_keys(key_states, self), value_states

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
        scaling: float | None, dropout: float, options: dict[str, Any],
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Store the layer's new keys and values, and attend; see `attention_forward`."""
        span = check_call(module, mask, dropout, options)
        batch, dtype = self.batch, query.dtype
        check_kept(self.index, span, batch.spans[self.index])
        if self.index == 0:
            _check_device(query, batch.device)
        stored = _DTYPES[batch.cache.dtype]
        if not query.dtype == key.dtype == value.dtype == stored:  # autocast, or a cache of another precision
            query, key, value = query.to(stored), key.to(stored), value.to(stored)
        if self.index == 0:
            rows, _, columns, _ = query.shape
            batch.begin(rows, columns, None if mask.padding is None else mask.padding.numpy())
            batch.places = None if batch.packed is None else torch.from_numpy(batch.packed).to(query.device)
        if span and mask.padding is not None and batch.gap(mask.padding.numpy()) > abs(span):
            raise NotImplementedError(
                "attention_mask: expected no padding between tokens that are further apart than the window or chunk of "
                f"layer {self.index}, {abs(span)} columns"
            )
        out = _attend(batch, self.index, query, key, value, scaling, max(span, 0), options)
        batch.next_layer = self.index + 1
        if batch.next_layer == batch.cache.config.num_layers:
            batch.end()
        return (out if out.dtype == dtype else out.to(dtype)), None

    def get_seq_length(self) -> int:
        return self.batch.num_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return Columns(self.batch.num_columns + query_length), 0

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


@untraced
def attention_mask(
    *, kv_length: int, allow_is_causal_skip: bool = True, former: str = "sdpa", **options: Any
) -> torch.Tensor | None:
    """The `Mask` that `attention_forward` takes for columns of a `TransformersCache`, else that of ``former``.

    Raises:
        NotImplementedError: it is not a matter of padding, windows and chunks.
    """
    if not isinstance(kv_length, Columns):
        mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[former](
            kv_length=kv_length, allow_is_causal_skip=allow_is_causal_skip, **options
        )
        return mask
    if not allow_is_causal_skip:
        raise NotImplementedError("kvtoolkit masks padding, windows and chunks, causally; got a custom mask function")
    padding: torch.Tensor | None = options.get("attention_mask")
    if padding is not None:
        padding = padding.cpu()
        padding = None if padding.all() else padding
    # masks of chunks compute with a tensor on the model's device
    has_chunks = getattr(options.get("config"), "attention_chunk_size", None) is not None
    device = options.get("device", "cpu") if has_chunks else "cpu"
    function = options.get("mask_function", causal_mask_function)
    return make_mask(padding, span_of(function, options.get("local_size"), padding, device))


@untraced
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    former: str = "sdpa",
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Store a layer's new keys and values, and attend.

    Args:
        module: the attention layer.
        query: ``[batch, num_q_heads, columns, head_dim]``.
        key: ``[batch, num_kv_heads, columns, head_dim]``, what `CacheLayer.update` gave back; ``value`` has its shape.
            Any other key goes to ``former``.
        attention_mask: of `attention_mask`.
        scaling: factor on q.k.
        former: the implementation without a `TransformersCache`.
        options: ``softcap`` and ``s_aux`` (sinks) are obeyed; ``sliding_window`` must be the mask's.

    Returns:
        ``[batch, columns, num_q_heads, head_dim]``, zeros where there is padding, and None for the weights.
    """
    if type(key) is NewKeys:
        result: tuple[torch.Tensor, None] = key.layer.attend(
            module, query, key.states, value, attention_mask, scaling, dropout, options
        )
        return result
    if type(attention_mask) is Mask:
        raise NotImplementedError(f"{type(module).__name__} attends to keys that are not those of the cache")
    attend = ALL_ATTENTION_FUNCTIONS.get(former)
    if attend is None:  # "eager" is a function of each model's module
        attend = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if attend is None:
        raise NotImplementedError(f"{type(module).__name__}: its attention '{former}' was not found")
    found: tuple[torch.Tensor, torch.Tensor | None] = attend(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return found


def _attend(
    batch: PaddedBatch, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    scaling: float | None, window: int, options: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """``[batch, columns, num_q_heads, head_dim]``: append and attend in the step that is open."""
    step, places = batch.step, batch.places
    assert step is not None
    shape = query.shape
    rows, num_heads, columns, head_dim = shape
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if places is None and columns == 1 and sinks is None:  # what layers have in common is settled once
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
        same = batch.form == form
        batch.form = form
        if same and step.attend_prepared(index, key.data_ptr(), value.data_ptr(), query.data_ptr(), out.data_ptr()):
            return out
    chosen: AttendOptions = {
        "softmax_scale": scaling,
        "window_size": (window - 1, 0) if window else (-1, -1),
        "softcap": softcap or 0.0,
        "sinks": None if sinks is None else sinks.detach().float(),
    }
    if places is None:
        step.append(index, _tokens_of(key), _tokens_of(value))
        out = query.new_empty((rows, columns, num_heads, head_dim))
        chosen["out"] = _tokens_of(out.transpose(1, 2))
        step.attend(index, _tokens_of(query), **chosen)
        return out
    key, value, query = (states.transpose(1, 2).flatten(0, 1)[places] for states in (key, value, query))
    step.append(index, key, value)
    out = query.new_zeros((rows * columns, num_heads, head_dim))
    out[places] = step.attend(index, query, **chosen)
    return out.view(rows, columns, num_heads, head_dim)


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


def _check_device(query: torch.Tensor, device: int) -> None:
    expected = torch.device("cpu") if device < 0 else torch.device("cuda", device)
    if query.device != expected:
        raise NotImplementedError(
            f"expected a model on {expected}, where the cache is, got one on {query.device}; "
            "TransformersCache.for_model makes a cache where the model is"
        )


def _check_place(model: PreTrainedModel) -> None:
    """NotImplementedError if a model is on several devices, or in a dtype that no cache has."""
    if _dtype_name(model) not in DTYPES:
        raise NotImplementedError(f"expected a model in {', '.join(DTYPES)}, got {_dtype_name(model)}")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise NotImplementedError("expected a model on one device, got one on several")


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def cache_config(model: PreTrainedModel, **options: Any) -> CacheConfig:
    """The `CacheConfig` for a model, by its configuration, in which all layers keep all tokens."""
    check_structure(model)
    _check_place(model)
    return CacheConfig.from_dict(_fitting(model, **options))


def _fitting(model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    """Fields of a `CacheConfig` for a model: ``options``, and what they do not say."""
    fitting: dict[str, Any] = {"dtype": _dtype_name(model)}
    if not {"num_layers", "num_kv_heads", "head_dim"} <= set(options):
        config = model.config.get_text_config(decoder=True)
        fitting |= {
            "num_layers": config.num_hidden_layers,
            "num_kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        }
    if model.device.type == "cuda" and options.get("backend") != "cpu":
        fitting |= {"backend": "cuda", "device": model.device.index}
    return {**fitting, **options}


_name_over("sdpa")
