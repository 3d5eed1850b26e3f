"""The raw CUDA kernels: the low-level calls that run them unchecked, on device arrays."""

from kvtoolkit.arrays.device import device_operand
from kvtoolkit.cuda.attention import Attention, Prepared, attend, attend_prepared
from kvtoolkit.cuda.copy import Append, append, append_prepared, convert, copy_granules
from kvtoolkit.cuda.merge import merge_states

__all__ = [
    "Append",
    "Attention",
    "Prepared",
    "append",
    "append_prepared",
    "attend",
    "attend_prepared",
    "convert",
    "copy_granules",
    "device_operand",
    "merge_states",
]
