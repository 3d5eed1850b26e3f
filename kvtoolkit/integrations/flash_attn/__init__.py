"""flash-attn's calls on kvtoolkit's kernels, for programs that want to change an import and nothing else."""

from kvtoolkit.integrations.flash_attn.calls import (
    StepPlan,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    plan_for_step,
)

__all__ = [
    "StepPlan",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "plan_for_step",
]
