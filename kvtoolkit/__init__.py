"""kvtoolkit: the KV cache of LLM inference as parts that can be swapped and measured against each other."""

from allocators import BlockAllocator, create, register
from kvtoolkit._version import __version__
from kvtoolkit.attention import append, merge_states, paged_attention, tiered_attention, variable_block_attention
from kvtoolkit.cache import KVCache
from kvtoolkit.config import CacheConfig
from kvtoolkit.device_pool import DevicePool, lockfree
from kvtoolkit.errors import (
    BusyError,
    CacheFullError,
    CacheSnapshotError,
    CompileError,
    ConfigError,
    KVToolkitError,
    SequenceError,
    ShapeError,
    StepError,
    UnsupportedError,
)
from kvtoolkit.graph import GraphStep
from kvtoolkit.lease import Lease
from kvtoolkit.sources import get_include
from kvtoolkit.stats import CacheStats
from kvtoolkit.step import Step
from kvtoolkit.tiers import TierCaches
from kvtoolkit.untraced import untraced
from kvtoolkit.warm import warmup

__all__ = [
    "BlockAllocator",
    "BusyError",
    "CacheConfig",
    "CacheFullError",
    "CacheSnapshotError",
    "CacheStats",
    "CompileError",
    "ConfigError",
    "DevicePool",
    "GraphStep",
    "KVCache",
    "KVToolkitError",
    "Lease",
    "SequenceError",
    "ShapeError",
    "Step",
    "StepError",
    "TierCaches",
    "UnsupportedError",
    "__version__",
    "append",
    "create",
    "get_include",
    "merge_states",
    "paged_attention",
    "tiered_attention",
    "variable_block_attention",
    "warmup",
]

register("lockfree", lockfree)

for _call in (append, merge_states, paged_attention, tiered_attention, variable_block_attention, warmup):
    untraced(_call)
for _class in (DevicePool, GraphStep, KVCache, Lease, Step):
    untraced(_class)
