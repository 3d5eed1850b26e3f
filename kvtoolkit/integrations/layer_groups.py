"""Groups of layers for models of transformers, by the windows and chunks that a trial forward has found."""

from collections.abc import Sequence
from typing import Any

from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.config.split import groups_of
from kvtoolkit.errors import ConfigError, UnsupportedError


def grouped_config(
    spans: Sequence[int], lengths: int | Sequence[int] | None, step_tokens: int, fields: dict[str, Any]
) -> CacheConfig:
    """The configuration for layers with these windows, chunks (as minus ``chunk``), or 0.

    Args:
        spans: of each layer.
        lengths, step_tokens: as `TransformersCache.for_model` takes them.
        fields: of a `CacheConfig`.

    Raises:
        ConfigError: the ``layer_groups`` of ``fields`` do not fit the layers.
        UnsupportedError: chunks, or ``lengths``, where a cache cannot have groups.
    """
    if fields.get("layer_groups") is not None:
        config = CacheConfig.from_dict(fields)
        of = {layer: group.span for group in config.groups for layer in group.layers}
        for layer, span in enumerate(spans):
            if not _fits(span, of[layer]):
                raise ConfigError(
                    f"layer_groups: expected layer {layer} to keep {_words(span)}, which it attends to, got "
                    f"{_words(of[layer])}"
                )
        return config
    needs_groups = any(span < 0 for span in spans)
    if "layer_groups" in fields and needs_groups:
        raise ConfigError("layer_groups: expected groups with chunks for a model that attends in chunks, got None")
    if "layer_groups" in fields or not any(spans):
        return CacheConfig.from_dict(fields)
    if lengths is not None:
        return CacheConfig.for_spans(spans, lengths, step_tokens, **fields)
    try:
        return CacheConfig.from_dict(_of_one_size(spans, fields))
    except UnsupportedError:
        if needs_groups:
            raise
        return CacheConfig.from_dict(fields)


def check_kept(layer: int, span: int, kept: int) -> None:
    """NotImplementedError if a layer attends in chunks, and the cache does not keep just these, or the other way round.

    Windows are checked by the cache itself.
    """
    if span != kept and (span < 0 or kept < 0):
        raise NotImplementedError(
            f"expected a cache that keeps {_words(span)} for layer {layer}, which attends to that, got {_words(kept)}; "
            "TransformersCache.for_model makes one that fits"
        )


def _of_one_size(spans: Sequence[int], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with groups that have the same number of slots."""
    groups, given = groups_of(spans), dict(fields)
    if len(groups) > 1:
        has_tokens = given.get("num_tokens") is not None
        for group in groups:
            if has_tokens:
                group["num_tokens"] = given["num_tokens"]
            elif given.get("memory") is not None:
                group["share"] = len(group["layers"]) / len(spans)
        if has_tokens:
            del given["num_tokens"]
    return {**given, "layer_groups": groups}


def _fits(span: int, kept: int) -> bool:
    """Whether a layer that attends to ``span`` can be in a group that keeps ``kept``."""
    return span == kept or (span >= 0 and kept == 0) or 0 < span <= kept


def _words(span: int) -> str:
    if not span:
        return "all tokens"
    return f"a window of {span}" if span > 0 else f"chunks of {-span}"
