"""Eviction policies, as plug-ins: which cached prefix goes first when its memory is needed.

A policy gives a score to each granule that no sequence holds any more but that a later prompt could still find; the
lowest score goes first. A prompt is found from its beginning, so a granule takes over the highest score of those that
follow it, and goes after them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from allocators._plugins import PluginError, load_class
from kvtoolkit.errors import ConfigError


@dataclass(frozen=True)
class CachedGranules:
    """Figures of the granules to be scored, ``[n]`` each."""

    last_used: NDArray[np.int64]
    """When a sequence last let go of the granule, by the cache's clock, which ticks once a call."""
    num_uses: NDArray[np.int32]
    """How many prompts have found it."""
    depth: NDArray[np.int32]
    """Its position in the sequence, in granules from the beginning."""


class EvictionPolicy(Protocol):
    """The methods of a plug-in."""

    def score(self, granules: CachedGranules) -> NDArray[np.float64]:
        """``[n]`` scores, none of them NaN; the lowest are evicted first.

        A granule is scored once each time it becomes cached, and its score is compared with those of earlier and later
        calls. So a score must depend on nothing but the granule's own figures.
        """
        ...


class LRU:
    """Least recently used first."""

    def score(self, granules: CachedGranules) -> NDArray[np.float64]:
        return granules.last_used.astype(np.float64)


class LFU:
    """Least often found first; among equals, least recently used first."""

    def score(self, granules: CachedGranules) -> NDArray[np.float64]:
        return granules.num_uses.astype(np.float64) * 2.0**32 + granules.last_used.astype(np.float64)


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU}
_BUILT_IN = frozenset(_POLICIES)


def register(name: str, factory: Callable[[], EvictionPolicy], *, replace: bool = False) -> None:
    """Make a policy available under ``name``, as ``eviction`` of a `CacheConfig`.

    Args:
        name: an identifier. A policy that was registered under it before is replaced.
        factory: a class or a function that makes a policy. It is called without arguments, once for each cache.
        replace: whether ``name`` may be that of a built-in policy.

    Raises:
        ConfigError: ``name`` is no identifier, or a built-in policy's without ``replace``; or ``factory`` cannot be
            called.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"name: expected an identifier, got {name!r}")
    if not callable(factory):
        raise ConfigError(f"factory: expected a class or a function, got {factory!r}")
    if name in _BUILT_IN and not replace:
        raise ConfigError(f"name: {name!r} is a built-in policy; choose another name, or replace it by replace=True")
    _POLICIES[name] = factory


def names() -> tuple[str, ...]:
    """The registered policies."""
    return tuple(_POLICIES)


def eviction_policy(spec: str) -> EvictionPolicy:
    """Make the policy of this name, or of the class at ``"package.module:Class"``.

    Raises:
        ConfigError: there is none, it cannot be made, or it is not a policy. A path must lead to a class with a method
            `score`; nothing else is called.
    """
    if not isinstance(spec, str):
        raise ConfigError(f"eviction: expected a name or 'package.module:Class', got {spec!r}")
    factory = _POLICIES.get(spec)
    if factory is None and ":" not in spec:
        raise ConfigError(f"eviction: expected one of {', '.join(_POLICIES)} or 'package.module:Class', got {spec!r}")
    try:
        policy = (factory or load_class(spec, ("score",)))()
    except PluginError as error:
        raise ConfigError(f"eviction: {error}") from error
    except (Exception, SystemExit) as error:  # whatever a plug-in does when it is made
        raise ConfigError(f"eviction: {spec!r} cannot be made: {type(error).__name__}: {error}") from error
    if not callable(getattr(policy, "score", None)):
        raise ConfigError(f"eviction: expected {spec!r} to make policies with a method `score`, got {policy!r:.80}")
    return policy
