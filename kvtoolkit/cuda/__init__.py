"""The raw CUDA kernels: the low-level calls that run them unchecked, on device arrays."""

from kvtoolkit.arrays.device import device_operand
from kvtoolkit.cuda.attention import Attention, attend, attend_alike
from kvtoolkit.cuda.copy import append, append_alike, convert, copy_granules
from kvtoolkit.cuda.merge import merge_states

__all__ = [
    "Attention",
    "append",
    "append_alike",
    "attend",
    "attend_alike",
    "convert",
    "copy_granules",
    "device_operand",
    "merge_states",
]
