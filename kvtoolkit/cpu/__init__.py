"""The CPU kernels: attention, append and granule copies in Numba, and the low-level calls that run them unchecked."""

from kvtoolkit.arrays.host import Operand, operand
from kvtoolkit.cpu.copy import append, append_alike, copy_granules
from kvtoolkit.cpu.launch import Attention, attend, attend_alike
from kvtoolkit.cpu.threads import num_threads, set_num_threads

__all__ = [
    "Attention",
    "Operand",
    "append",
    "append_alike",
    "attend",
    "attend_alike",
    "copy_granules",
    "num_threads",
    "operand",
    "set_num_threads",
]
