"""The CPU kernels: attention, append and granule copies in Numba, and the low-level calls that run them unchecked."""

from kvtoolkit.arrays.host import Operand, operand
from kvtoolkit.cpu.convert import convert
from kvtoolkit.cpu.copy import append, append_prepared, copy_granules
from kvtoolkit.cpu.launch import Attention, attend, attend_prepared
from kvtoolkit.cpu.merge import merge_states
from kvtoolkit.cpu.threads import num_threads, set_num_threads

__all__ = [
    "Attention",
    "Operand",
    "append",
    "append_prepared",
    "attend",
    "attend_prepared",
    "convert",
    "copy_granules",
    "merge_states",
    "num_threads",
    "operand",
    "set_num_threads",
]
