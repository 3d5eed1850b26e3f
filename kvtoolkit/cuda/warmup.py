"""Compile and load ahead: every GPU kernel that a cache and its attention need."""

from collections.abc import Callable

from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import load_spec
from kvtoolkit.cuda.specs import Spec
from kvtoolkit.runtime import smem_limit
from kvtoolkit.runtime.kernels import arch_of, current_device

Progress = Callable[[str, int, int], None]
"""Called with what comes next, and how many parts of how many are done."""


def kernels_of(config: CacheConfig, num_q_heads: int, arch: int, smem_limit: int) -> list[Spec]:
    """Every kernel of a cache: of groups with quantized tiers, and of those without."""
    shape = (config.head_dim, config.dtype, num_q_heads, config.num_kv_heads)
    found: dict[Spec, None] = {}
    for group in config.group_configs:
        masses = group.tiers is not None and group.tiers["demote"] == "mass"
        one = specs.of_model(*shape, arch, smem_limit, tiers=group.tiers is not None, masses=masses)
        found |= dict.fromkeys(one)
    return list(found)


def load_kernels(config: CacheConfig, num_q_heads: int, progress: Progress | None = None) -> None:
    """Compile and load the kernels of a cache with backend ``"cuda"`` on its device; see `kvtoolkit.warmup`."""
    device = current_device() if config.device is None else config.device
    found = kernels_of(config, num_q_heads, arch_of(device), smem_limit(device))
    import cupy

    with cupy.cuda.Device(device):
        for number, spec in enumerate(found):
            if progress is not None:
                progress(spec.name, number, len(found))
            load_spec(spec, device)
