"""What the configuration of a model says of its cache: layers, heads, dtype, and which layers have a window or chunks.

Read from an object of transformers or from the dict of a config.json, which may lack what transformers fills in. Then
the rules here are those of transformers 5.24.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kvtoolkit.arrays.types import as_int
from kvtoolkit.config.fields import require_int
from kvtoolkit.errors import ConfigError, UnsupportedError

MOST_LAYERS = 1 << 16
"""More than any model has."""
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"

_EVERY_LAYER = ("ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2")
"""Model types in which all layers have the window, if there is one."""
_EVERY_NTH = {"cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}
"""Model types in which all layers but each n-th one have the window, unless `sliding_window_pattern` has another n."""
_UNUSUAL = {
    "kv_lora_rank": "latent attention stores keys and values of different widths",
    "num_kv_shared_layers": "some layers share the keys and values of others",
    "global_head_dim": "layers have different shapes",
    "use_bidirectional_attention": "tokens attend to later ones",
}


class ModelShape(NamedTuple):
    """What a cache has to know of a model.

    Attributes:
        num_layers, num_kv_heads, head_dim: as in `CacheConfig`.
        dtype: of the weights, by its name; None if the configuration does not say.
        spans: for each layer: the window, the chunk as a negative number, or 0 if it sees all tokens.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str | None
    spans: tuple[int, ...]


def read_model(model_config: Any) -> ModelShape:
    """Read the configuration of a model; see `CacheConfig.for_model`.

    Raises:
        ConfigError: something is missing, or makes no sense.
        UnsupportedError: layers of a kind for which there is no cache.
    """
    outer = _getter(model_config, "model_config")
    inner = outer("text_config")
    get = outer if inner is None else _getter(inner, "text_config")
    for name, reason in _UNUSUAL.items():
        if get(name):
            raise UnsupportedError(f"{name}: expected a model without it, because {reason}, got {get(name)!r}")
    num_layers = _size(get, "num_hidden_layers", MOST_LAYERS)
    head_dim = get("head_dim")
    if head_dim is None:
        head_dim = _size(get, "hidden_size") // _size(get, "num_attention_heads")
    dtype = next((value for one in (get, outer) for value in (one("dtype"), one("torch_dtype")) if value), None)
    return ModelShape(
        num_layers,
        _num_kv_heads(get),
        require_int("head_dim", head_dim, 1),
        None if dtype is None else str(dtype).removeprefix("torch."),
        tuple(_span(kind, get) for kind in _kinds(get, num_layers)),
    )


def _getter(config: Any, name: str) -> Callable[[str], Any]:
    """A function that reads a field of a configuration, None if there is no such field."""
    if config is None or isinstance(config, str | bytes | int | float | list | tuple):
        raise ConfigError(f"{name}: expected a configuration of transformers, or a dict, got {config!r:.80}")
    if isinstance(config, Mapping):
        return config.get
    return lambda name: getattr(config, name, None)


def _size(get: Callable[[str], Any], name: str, most: int | None = None) -> int:
    return require_int(name, get(name), 1, most)


def _flag(get: Callable[[str], Any], name: str) -> bool | None:
    value = get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, got {value!r:.80}")
    return value


def _num_kv_heads(get: Callable[[str], Any]) -> int:
    """Those of the configuration, or as many as query heads."""
    if get("num_key_value_heads") is None:
        return _size(get, "num_attention_heads")
    found, num_heads = _size(get, "num_key_value_heads"), as_int(get("num_attention_heads"))
    if num_heads is not None and num_heads % found:
        raise ConfigError(
            f"num_key_value_heads: expected a divisor of num_attention_heads, which is {num_heads}, got {found}"
        )
    return found


def _kinds(get: Callable[[str], Any], num_layers: int) -> list[str]:
    """The kind of attention of each layer."""
    kinds = get("layer_types")
    if kinds is None:
        return _kinds_by_type(get, num_layers)
    _require_of_each_layer("layer_types", kinds, num_layers, "kinds of attention")
    return list(kinds)


def _require_of_each_layer(name: str, values: Any, num_layers: int, what: str) -> None:
    """ConfigError unless there is one value for each layer."""
    if not isinstance(values, list | tuple) or len(values) != num_layers:
        got = f"{len(values)}: " if isinstance(values, list | tuple) else ""
        raise ConfigError(f"{name}: expected a list of {num_layers} {what}, one a layer, got {got}{values!r:.80}")


def _kinds_by_type(get: Callable[[str], Any], num_layers: int) -> list[str]:
    """The kind of attention of each layer by what the model is, where a configuration has no list of them."""
    name = get("model_type")
    if name == "llama4_text":
        chunked = CHUNKED if get("attention_chunk_size") else FULL
        return [chunked if rope else FULL for rope in _layers_with_rope(get, num_layers)]
    if get("attention_chunk_size"):
        raise ConfigError(f"layer_types: expected them in a configuration of {name!r} with chunks, got none")
    is_used = _flag(get, "use_sliding_window")
    if not get("sliding_window") or is_used is False:
        return [FULL] * num_layers
    if name in ("qwen2", "qwen3", "qwen2_moe"):
        if not is_used:
            return [FULL] * num_layers
        bound = require_int("max_window_layers", get("max_window_layers"), 0)
        if name == "qwen2_moe":
            return [SLIDING if i < bound and i % 2 == 0 else FULL for i in range(num_layers)]
        return [SLIDING if i >= bound else FULL for i in range(num_layers)]
    if name == "qwen3_moe" and not is_used:
        return [FULL] * num_layers
    if name in _EVERY_LAYER:
        return [SLIDING] * num_layers
    if name in _EVERY_NTH:
        pattern = _pattern(get, _EVERY_NTH[name])
        return [SLIDING if pattern[i % len(pattern)] == "L" else FULL for i in range(num_layers)]
    raise ConfigError(
        f"layer_types: expected them in a configuration of {name!r} with a sliding_window, got none; give the "
        "configuration object of transformers, or layer_groups"
    )


def _layers_with_rope(get: Callable[[str], Any], num_layers: int) -> Sequence[int]:
    """For each layer of a Llama 4 whether it has rotary embedding, and so chunks."""
    given = get("no_rope_layers")  # has 1 where there is one, in spite of its name
    if given is None or given == []:
        every = get("no_rope_layer_interval")
        every = 4 if every is None else require_int("no_rope_layer_interval", every, 1)
        return [(i + 1) % every for i in range(num_layers)]
    _require_of_each_layer("no_rope_layers", given, num_layers, "numbers")
    if not all(isinstance(one, int) and one in (0, 1) for one in given):
        raise ConfigError(f"no_rope_layers: expected 0 or 1 for each layer, got {given!r:.80}")
    found: Sequence[int] = given
    return found


def _pattern(get: Callable[[str], Any], every: int) -> str:
    """Which layers have the window, by turns: L those that have it, G the others."""
    name = "sliding_window_pattern"
    given = get(name)
    if isinstance(given, str):
        if not given or not set(given) <= {"L", "G"}:
            raise ConfigError(f"{name}: expected an int, or a text of L and G such as 'LLLG', got {given!r:.80}")
        return given
    return "L" * ((every if given is None else require_int(name, given, 1, MOST_LAYERS)) - 1) + "G"


def _span(kind: Any, get: Callable[[str], Any]) -> int:
    """The window of a layer of this kind, minus its chunk, or 0."""
    if kind == FULL:
        return 0
    name = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise UnsupportedError(f"layer_types: expected {FULL}, {SLIDING} or {CHUNKED}, got {kind!r}")
    span = as_int(get(name))
    if span is None or span < 1:
        raise ConfigError(f"{name}: expected a number of tokens, because there are layers of {kind}, got {get(name)!r}")
    if kind == CHUNKED and span % 8:
        raise ConfigError(f"{name}: expected a multiple of 8, got {span}")
    return span if kind == SLIDING else -span
