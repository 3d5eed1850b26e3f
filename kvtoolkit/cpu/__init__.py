"""The CPU kernels: attention, append and granule copies in Numba, and the low-level calls that run them unchecked."""

from kvtoolkit.cpu.arrays import Operand, operand
from kvtoolkit.cpu.copy import append, copy_granules
from kvtoolkit.cpu.launch import attend
from kvtoolkit.cpu.threads import num_threads, set_num_threads

__all__ = ["Operand", "append", "attend", "copy_granules", "num_threads", "operand", "set_num_threads"]
