"""flash-attn's calls on kvtoolkit's kernels, for programs that want to change an import and nothing else."""

from kvtoolkit.integrations.flash_attn.calls import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
