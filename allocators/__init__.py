"""Index arithmetic of a KV-cache pool: allocators that hand out runs of granules (8 token slots).

``create("buddy", num_granules)`` makes one; `BlockAllocator` says what each promises; `allocators.testing` is the
conformance kit that tests them, and yours.
"""

from allocators.buddy import BuddyAllocator
from allocators.epochs import EpochPool, Lease
from allocators.errors import (
    AllocatorError,
    BusyError,
    ContendedError,
    IntegrityError,
    InvalidFreeError,
    InvalidSizeError,
    LeaseError,
    OutOfBlocksError,
    SnapshotError,
    UnknownAllocatorError,
    UnknownStreamError,
)
from allocators.lockfree import LockFreeAllocator
from allocators.paged import PagedAllocator
from allocators.protocol import GRANULE, AllocatorStats, BlockAllocator
from allocators.registry import create, find, names, register
from allocators.slab import SlabAllocator

__all__ = [
    "GRANULE",
    "AllocatorError",
    "AllocatorStats",
    "BlockAllocator",
    "BuddyAllocator",
    "BusyError",
    "ContendedError",
    "EpochPool",
    "IntegrityError",
    "InvalidFreeError",
    "InvalidSizeError",
    "Lease",
    "LeaseError",
    "LockFreeAllocator",
    "OutOfBlocksError",
    "PagedAllocator",
    "SlabAllocator",
    "SnapshotError",
    "UnknownAllocatorError",
    "UnknownStreamError",
    "create",
    "find",
    "names",
    "register",
]
