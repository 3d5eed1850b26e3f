"""kvtoolkit: the KV cache of LLM inference as parts that can be swapped and measured against each other."""

from allocators import BlockAllocator, create, register
from kvtoolkit._version import __version__
from kvtoolkit.attention.calls import append, merge_states, paged_attention, tiered_attention, variable_block_attention
from kvtoolkit.attention.plan import AttentionPlan, plan_attention
from kvtoolkit.cache.device_steps import DeviceSteps
from kvtoolkit.cache.device_turn import DeviceTurn
from kvtoolkit.cache.graph import GraphRun, GraphStep
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.cache.lease import Lease
from kvtoolkit.cache.stats import CacheStats
from kvtoolkit.cache.step import Step
from kvtoolkit.cache.warmup import warmup
from kvtoolkit.config import eviction, growth
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cuda.pool import DevicePool
from kvtoolkit.cuda.pool_share import PoolWithShare, lockfree
from kvtoolkit.errors import (
    ArgumentError,
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
from kvtoolkit.formats.tier_caches import TierCaches
from kvtoolkit.integrations import operators
from kvtoolkit.runtime.sources import get_include
from kvtoolkit.tracing import untraced

__all__ = [
    "ArgumentError",
    "AttentionPlan",
    "BlockAllocator",
    "BusyError",
    "CacheConfig",
    "CacheFullError",
    "CacheSnapshotError",
    "CacheStats",
    "CompileError",
    "ConfigError",
    "DevicePool",
    "DeviceSteps",
    "DeviceTurn",
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
    "eviction",
    "get_include",
    "growth",
    "merge_states",
    "paged_attention",
    "plan_attention",
    "tiered_attention",
    "variable_block_attention",
    "warmup",
]

register("lockfree", lockfree, replace=True)  # makes pools on a GPU, too

for _call in (
    append, merge_states, paged_attention, plan_attention, tiered_attention, variable_block_attention, warmup,
):  # fmt: skip
    untraced(_call)
for _class in (
    AttentionPlan, DevicePool, DeviceSteps, GraphRun, GraphStep, KVCache, Lease, PoolWithShare, Step,
):  # fmt: skip
    untraced(_class)
operators.install()
