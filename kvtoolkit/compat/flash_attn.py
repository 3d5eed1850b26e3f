"""The former place of `kvtoolkit.integrations.flash_attn`."""

from kvtoolkit.integrations.flash_attn import (
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
