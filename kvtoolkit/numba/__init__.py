"""The kernels once more in Numba CUDA, for reading and as a second opinion: attention, append, merge, granule copies.

Each has the name, the arguments and the phases of its raw CUDA twin, without its tricks. Importing this package does
not import Numba's CUDA target; the first call does.
"""

from kvtoolkit.numba.launch import append, attend, copy_granules, merge_states

__all__ = ["append", "attend", "copy_granules", "merge_states"]
