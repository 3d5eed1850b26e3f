"""Which cached prefix goes first when its memory is needed: policies as plug-ins.

A policy sees figures of every granule that no sequence holds any more but that a later prompt could still find, and
gives each a score; the lowest goes first, among equals the one deepest in its sequence.
"""

import importlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.errors import ConfigError


@dataclass(frozen=True)
class CachedGranules:
    """Figures of the granules that may be evicted, ``[n]`` each."""

    last_used: NDArray[np.int64]
    """Time of the cache's clock (one tick a call) at which a sequence last let go of the granule."""
    num_uses: NDArray[np.int32]
    """How many prompts found it."""
    depth: NDArray[np.int32]
    """Its place in the sequence, in granules from the front."""


class EvictionPolicy(Protocol):
    """What a plug-in provides."""

    def score(self, granules: CachedGranules) -> NDArray[np.float64]:
        """``[n]`` scores; the lowest are evicted first."""
        ...


class LRU:
    """Least recently used first."""

    def score(self, granules: CachedGranules) -> NDArray[np.float64]:
        return granules.last_used.astype(np.float64)


class LFU:
    """Least often found first, among equals the least recently used."""

    def score(self, granules: CachedGranules) -> NDArray[np.float64]:
        latest = float(granules.last_used.max(initial=0)) + 1.0
        scores: NDArray[np.float64] = granules.num_uses + granules.last_used / latest
        return scores


_POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LRU, "lfu": LFU}


def eviction_policy(spec: str) -> EvictionPolicy:
    """The policy of this name, or of the class at ``"package.module:Class"``; ConfigError if there is none."""
    if not isinstance(spec, str):
        raise ConfigError(f"eviction: expected a name or 'package.module:Class', got {spec!r}")
    if spec in _POLICIES:
        return _POLICIES[spec]()
    module, _, name = spec.partition(":")
    if not name:
        raise ConfigError(f"eviction: expected one of {', '.join(_POLICIES)} or 'package.module:Class', got {spec!r}")
    try:
        policy: EvictionPolicy = getattr(importlib.import_module(module), name)()
    except Exception as error:  # whatever a plug-in does when it is imported
        raise ConfigError(f"eviction: {spec!r} cannot be made: {error}") from error
    if not callable(getattr(policy, "score", None)):
        raise ConfigError(f"eviction: expected {spec!r} to have a method `score`")
    return policy
